"""The last two nodes of Nav2's velocity chain, without the rest of Nav2.

``ros2 launch docs/examples/nav2/velocity_chain.launch.py``
beside ``qwen-vla up docs/examples/nav2/base.yaml --no-sim``.
Where Nav2's own bringup runs these nodes already, only its parameters are needed.
"""

from pathlib import Path

from launch import LaunchDescription
from launch_ros.actions import Node

PARAMETERS = str(Path(__file__).with_name("velocity_chain.yaml"))


def generate_launch_description() -> LaunchDescription:
    """Entry point of ``ros2 launch``."""
    return LaunchDescription(
        [
            Node(
                package="nav2_velocity_smoother",
                executable="velocity_smoother",
                name="velocity_smoother",
                parameters=[PARAMETERS],
                remappings=[("cmd_vel", "cmd_vel_nav")],
                output="screen",
            ),
            Node(
                package="nav2_collision_monitor",
                executable="collision_monitor",
                name="collision_monitor",
                parameters=[PARAMETERS],
                output="screen",
            ),
            Node(
                package="nav2_lifecycle_manager",
                executable="lifecycle_manager",
                name="lifecycle_manager_velocity",
                parameters=[PARAMETERS],
                output="screen",
            ),
        ]
    )
