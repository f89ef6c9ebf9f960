"""From observations to chunks, fast: the only code that runs the model for a robot."""
