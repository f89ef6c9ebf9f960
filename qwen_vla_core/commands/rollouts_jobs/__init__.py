"""Jobs of ``qwen-vla rollouts``."""
