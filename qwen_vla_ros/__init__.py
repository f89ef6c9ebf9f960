"""Thin ROS 2 nodes around qwen_vla_core."""
