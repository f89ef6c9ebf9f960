"""Jobs of ``qwen-vla eval``, one module each."""
