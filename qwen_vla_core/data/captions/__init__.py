"""Fine-grained captions of videos in two passes of a Qwen VL: coarse sketch, then a frame-aligned script [P]."""
