"""reach7 under ros2_control without hardware: ``ros2 launch docs/examples/ros2_control/reach7_mock.launch.py``.

The URDF's driver is replaced by ``mock_components/GenericSystem``, which mirrors commands into states; a test picture
stands in for the camera. Needs ros-jazzy-ros2-control, -ros2-controllers, -robot-state-publisher and -image-tools.
"""

from pathlib import Path

from launch import LaunchDescription
from launch_ros.actions import Node

HERE = Path(__file__).resolve().parent
CONTROLLERS = str(HERE / "controllers.yaml")
DRIVER, MOCK = "reach7_driver/Reach7System", "mock_components/GenericSystem"


def generate_launch_description() -> LaunchDescription:
    """Entry point of ``ros2 launch``."""
    urdf = (HERE.parent / "reach7.urdf").read_text().replace(DRIVER, MOCK)
    names = ("joint_state_broadcaster", "arm_controller", "gripper_controller")
    picture = {"width": 640, "height": 480, "burger_mode": True, "reliability": "best_effort"}
    return LaunchDescription(
        [
            # controller_manager reads the URDF from /robot_description, which this node publishes.
            Node(
                package="robot_state_publisher",
                executable="robot_state_publisher",
                parameters=[{"robot_description": urdf}],
            ),
            Node(package="controller_manager", executable="ros2_control_node", parameters=[CONTROLLERS]),
            *[
                Node(package="controller_manager", executable="spawner", arguments=[name, "--param-file", CONTROLLERS])
                for name in names
            ],
            Node(
                package="image_tools",
                executable="cam2image",
                parameters=[picture],
                remappings=[("image", "/front_camera/color/image_raw")],
            ),
        ]
    )
