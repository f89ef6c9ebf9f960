"""The longer jobs of ``qwen-vla embodiment``, one module each."""
