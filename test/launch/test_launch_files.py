"""Every launch file offers the same arguments and starts its own robot's graph; needs ROS 2's launch."""

from __future__ import annotations

from pathlib import Path

import pytest

# `launch` alone would also find this repository's folder of that name.
pytest.importorskip("launch.actions", reason="ROS 2's launch is not installed: the launch files cannot run here")
pytest.importorskip("launch_ros.actions", reason="launch_ros is not installed")

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch_ros.actions import Node

FOLDER = Path(__file__).parents[2] / "launch"


def description(robot: str) -> LaunchDescription:
    return PythonLaunchDescriptionSource(str(FOLDER / f"{robot}.launch.py")).get_launch_description(LaunchContext())


@pytest.mark.parametrize("robot", ["aloha", "widowx", "mobile_base"])
def test_its_robot_in_simulation(robot: str, tmp_path: Path) -> None:
    context = LaunchContext()
    context.launch_configurations.update({"sim": "true", "rollouts": str(tmp_path)})
    described = description(robot)
    for entity in described.entities:
        if isinstance(entity, DeclareLaunchArgument):
            entity.execute(context)
    assert context.launch_configurations["embodiment"] == robot
    (start,) = (entity for entity in described.entities if isinstance(entity, OpaqueFunction))
    nodes = start.execute(context)
    assert nodes is not None and all(isinstance(node, Node) for node in nodes)
    assert [node.node_executable for node in nodes] == [
        "controller_node", "recorder_node", "policy_node", "sim_node", "dashboard_node",
    ]  # fmt: skip
    assert len(list(tmp_path.iterdir())) == 1  # the folder of the run


def test_all_have_the_same_arguments() -> None:
    def names(robot: str) -> list[str]:
        return [entity.name for entity in description(robot).entities if isinstance(entity, DeclareLaunchArgument)]

    assert names("aloha") == names("widowx") == names("mobile_base") == names("robot")
    assert {"embodiment", "checkpoint", "instruction", "namespace", "sim", "mock", "record", "params_file"} <= {
        *names("aloha")
    }


def test_any_robot_needs_to_be_named_and_starts_on_a_mock(tmp_path: Path) -> None:
    described = description("robot")
    arguments = {entity.name: entity for entity in described.entities if isinstance(entity, DeclareLaunchArgument)}
    assert arguments["embodiment"].default_value is None
    context = LaunchContext()
    yaml = tmp_path / "mine.yaml"
    yaml.write_text((FOLDER.parent / "embodiments" / "widowx.yaml").read_text().split("\nsimulation:")[0] + "\n")
    context.launch_configurations.update({"embodiment": str(yaml), "mock": "true", "rollouts": str(tmp_path / "out")})
    for argument in arguments.values():
        argument.execute(context)
    (start,) = (entity for entity in described.entities if isinstance(entity, OpaqueFunction))
    nodes = start.execute(context)
    assert nodes is not None
    assert [node.node_executable for node in nodes] == [
        "controller_node", "recorder_node", "policy_node", "mock_node", "dashboard_node",
    ]  # fmt: skip
