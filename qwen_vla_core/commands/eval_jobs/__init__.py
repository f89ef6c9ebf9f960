"""The jobs of ``qwen-vla eval``."""
