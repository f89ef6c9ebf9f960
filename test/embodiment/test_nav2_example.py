"""The example for Nav2: its topics, types and limits fit those of the embodiment beside it."""

from __future__ import annotations

from pathlib import Path

import yaml

from qwen_vla_core.embodiment import contract_difference, load_embodiment

FOLDER = Path(__file__).parents[2] / "docs" / "examples" / "nav2"


def test_the_chain_takes_what_the_controller_publishes_and_changes_nothing_that_is_smooth() -> None:
    robot = load_embodiment(FOLDER / "base.yaml")
    nodes = {name: node["ros__parameters"] for name, node in yaml.safe_load(_read("velocity_chain.yaml")).items()}
    smoother, monitor = nodes["velocity_smoother"], nodes["collision_monitor"]
    (group,) = robot.actions
    assert contract_difference(robot, load_embodiment("mobile_base")) is None  # any checkpoint of the base drives it
    for node in (smoother, monitor):
        assert node["enable_stamped_cmd_vel"] is (group.command.kind == "twist_stamped") is True
    assert group.command.topic == "/cmd_vel_nav" and '("cmd_vel", "cmd_vel_nav")' in _read("velocity_chain.launch.py")
    assert (monitor["cmd_vel_in_topic"], monitor["cmd_vel_out_topic"]) == ("cmd_vel_smoothed", "cmd_vel")
    tracker, stop = group.command.tracker, robot.safety.obstacle_stop
    assert tracker is not None and stop is not None
    assert smoother["max_velocity"] == [tracker.max_speed, 0.0, tracker.max_turn]
    assert smoother["min_velocity"] == [-tracker.max_reverse, 0.0, -tracker.max_turn]
    assert smoother["max_accel"] == [tracker.acceleration, 0.0, tracker.turn_acceleration]
    assert smoother["max_decel"] == [-value for value in smoother["max_accel"]]
    assert monitor["base_frame_id"] == group.command.frame_id
    assert monitor["scan"]["topic"] == stop.topic.removeprefix("/")
    assert nodes["lifecycle_manager_velocity"]["node_names"] == ["velocity_smoother", "collision_monitor"]


def _read(name: str) -> str:
    return (FOLDER / name).read_text()
