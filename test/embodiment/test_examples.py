"""docs/examples of ros2_control and Interbotix: what can be checked without their packages fits the embodiments."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.embodiment.urdf import read_urdf

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
CONTROL = EXAMPLES / "ros2_control"
# Type → the parameters that ROS 2 Jazzy's ros2_controllers declare for it, as far as the examples may use them.
DECLARED = {
    "joint_trajectory_controller/JointTrajectoryController": {
        "joints", "command_joints", "command_interfaces", "state_interfaces", "allow_partial_joints_goal",
        "allow_nonzero_velocity_at_trajectory_end", "action_monitor_rate", "constraints", "gains",
    },
    "forward_command_controller/ForwardCommandController": {"joints", "interface_name"},
    "joint_state_broadcaster/JointStateBroadcaster": set(),
}  # fmt: skip
KIND_OF = {
    "joint_trajectory_controller/JointTrajectoryController": ("joint_trajectory", "joint_trajectory"),
    "forward_command_controller/ForwardCommandController": ("forward_command", "commands"),
}


def test_controllers_and_embodiment_command_the_same_joints_in_the_same_order() -> None:
    config = yaml.safe_load((CONTROL / "controllers.yaml").read_text())
    manager = config["controller_manager"]["ros__parameters"]
    robot = load_embodiment(CONTROL / "reach7_ros2_control.yaml")
    urdf = {joint.name: joint for joint in read_urdf(EXAMPLES / "reach7.urdf").joints}
    assert manager["update_rate"] >= 2 * robot.control.controller_rate_hz
    controllers = {name: value["type"] for name, value in manager.items() if isinstance(value, dict)}
    for name, kind in controllers.items():
        assert set(config.get(name, {}).get("ros__parameters", {})) <= DECLARED[kind]
    commanded: set[str] = set()
    for group in robot.actions:
        controller, topic = group.command.topic.strip("/").split("/")
        assert (group.command.kind, topic) == KIND_OF[controllers[controller]]
        joints = config[controller]["ros__parameters"]["joints"]
        assert list(group.command.fields) == joints
        commanded |= set(joints)
        map_ = group.command.map
        for i, joint in enumerate(joints):
            ends = map_.to_message(group.limits.lower[i]), map_.to_message(group.limits.upper[i])
            assert min(ends) >= urdf[joint].lower - 1e-9 and max(ends) <= urdf[joint].upper + 1e-9
            assert urdf[joint].commands == ("position",)
    assert commanded == {name for name, joint in urdf.items() if not joint.mimics}


def test_the_launch_file_starts_those_controllers_on_the_mocked_urdf() -> None:
    text = (CONTROL / "reach7_mock.launch.py").read_text()
    compile(text, "reach7_mock.launch.py", "exec")
    driver = re.search(r'DRIVER, MOCK = "([^"]+)", "mock_components/GenericSystem"', text)
    assert driver is not None and driver[1] in (EXAMPLES / "reach7.urdf").read_text()
    manager = yaml.safe_load((CONTROL / "controllers.yaml").read_text())["controller_manager"]["ros__parameters"]
    spawned = re.search(r"names = \(([^)]+)\)", text)
    assert spawned is not None
    assert set(re.findall(r'"(\w+)"', spawned[1])) == {
        name for name, value in manager.items() if isinstance(value, dict)
    }
    robot = load_embodiment(CONTROL / "reach7_ros2_control.yaml")
    assert robot.cameras[0].topic in text and f'"width": {robot.cameras[0].size[0]}' in text


def test_the_mode_file_names_the_groups_of_the_shipped_arms() -> None:
    modes = yaml.safe_load((EXAMPLES / "interbotix" / "modes.yaml").read_text())
    assert set(modes) == {"groups", "singles"}
    keys = {"operating_mode", "profile_type", "profile_velocity", "profile_acceleration", "torque_enable"}
    for name in ("aloha", "mobile_aloha", "widowx_joints"):
        for group in load_embodiment(name).actions:
            if not group.command.kind.startswith("interbotix"):
                continue
            part = modes["groups" if group.command.kind == "interbotix_group" else "singles"][group.command.group_name]
            assert set(part) == keys and part["torque_enable"] is True
            assert part["profile_velocity"] == part["profile_acceleration"] == 0
    assert modes["groups"]["arm"]["operating_mode"] == "position"
