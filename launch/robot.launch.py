"""``ros2 launch qwen_vla_ros robot.launch.py embodiment:=FILE.yaml``: any robot; ``--show-args`` lists the rest."""

from launch import LaunchDescription

from qwen_vla_ros.launching import describe


def generate_launch_description() -> LaunchDescription:
    """Entry point of ``ros2 launch``."""
    return describe()
