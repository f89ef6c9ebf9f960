"""``qwen-vla embodiment check --live``: a healthy graph passes, every mistake is an error or a warning with its fix."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rclpy
from graph_support import Graph
from rclpy.qos import QoSProfile
from rclpy.serialization import serialize_message
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray

from qwen_vla_core.cli import main
from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.embodiment.findings import Finding
from qwen_vla_core.embodiment.spec_base import FootprintSpec, ObstacleStopSpec
from qwen_vla_core.runtime.obstacles import Scan
from qwen_vla_ros import live, live_report
from qwen_vla_ros.bringup import build_graph
from qwen_vla_ros.live import check_live, graph_topics, listening, picture_of, stamp_of
from qwen_vla_ros.live_report import Endpoint, Evidence, Picture, TopicEvidence, judge
from qwen_vla_ros.messages import numpy_to_image, scan_to_message
from qwen_vla_ros.node_utils import ns_to_stamp

ALOHA = load_embodiment("aloha")
NOW = 1_800_000_000_000_000_000
IMAGE, JOINTS = "sensor_msgs/msg/Image", "sensor_msgs/msg/JointState"
ARRAY = "std_msgs/msg/Float64MultiArray"
EGO, LEFT_STATE = ALOHA.cameras[0].topic, ALOHA.state[0].topic
LEFT_COMMAND = ALOHA.actions[0].command.topic


def stream(evidence: TopicEvidence, rate_hz: float, seconds: float = 3.0, age_ms: float = 5.0) -> TopicEvidence:
    evidence.arrivals_ns = [NOW + round(i / rate_hz * 1e9) for i in range(round(rate_hz * seconds))]
    evidence.stamps_ns = [arrival - round(age_ms * 1e6) for arrival in evidence.arrivals_ns]
    return evidence


def healthy() -> dict[str, TopicEvidence]:
    """What ALOHA's own drivers would look like."""
    seen: dict[str, TopicEvidence] = {}
    for camera in ALOHA.cameras:
        driver = (Endpoint("/camera", IMAGE),)
        seen[camera.topic] = stream(TopicEvidence(camera.topic, driver), 30.0)
        seen[camera.topic].pictures = [Picture("rgb8", 640, 480)]
    for topic in {group.topic for group in ALOHA.state}:
        groups = [group for group in ALOHA.state if group.topic == topic]
        seen[topic] = stream(TopicEvidence(topic, (Endpoint("/driver", JOINTS),)), 50.0)
        seen[topic].names = tuple(name for group in groups for name in group.fields)
        seen[topic].values = {channel: 0.5 for group in groups for channel in group.channels}
    for group in ALOHA.actions:
        listener = Endpoint("/driver", "interbotix_xs_msgs/msg/JointGroupCommand")
        if group.kind == "gripper":
            listener = Endpoint("/driver", "interbotix_xs_msgs/msg/JointSingleCommand")
        seen[group.command.topic] = TopicEvidence(group.command.topic, (), (listener,))
    return seen


def complaints(seen: dict[str, TopicEvidence], **changes: object) -> list[Finding]:
    topics = {name: (*e.published, *e.expected) for name, e in seen.items()}
    evidence = Evidence(**{"topics": topics, "robot": seen, "seconds": 3.0, **changes})  # type: ignore[arg-type]
    return [finding for finding in judge(ALOHA, evidence) if finding.level != "ok"]


def test_a_healthy_robot_has_nothing_but_ok_lines_one_per_topic_and_pair_of_views() -> None:
    assert complaints(healthy()) == []
    findings = judge(ALOHA, Evidence({}, healthy(), 3.0))
    assert len(findings) == 3 + 2 + 2 + 4
    assert "640x480 rgb8, 30.0 Hz, 5 ms old on arrival, none lost" in str(findings[0])


def command_with(types: str, **endpoint: object) -> Callable[[dict[str, TopicEvidence]], object]:
    def change(seen: dict[str, TopicEvidence]) -> None:
        seen[LEFT_COMMAND].subscribers = (Endpoint("/arm", types, **endpoint),)  # type: ignore[arg-type]

    return change


def change_of(topic: str, **values: object) -> Callable[[dict[str, TopicEvidence]], object]:
    return lambda seen: [setattr(seen[topic], key, value) for key, value in values.items()]


FIELDS = ALOHA.state[0].fields
NAMES = (*FIELDS, "left_finger")
WRONG: dict[str, tuple[Callable[[dict[str, TopicEvidence]], object], str, str, str]] = {
    "no driver": (change_of(EGO, publishers=()), "error", "nobody publishes it", "start the driver"),
    "another transport": (
        change_of(EGO, publishers=(Endpoint("/camera", "sensor_msgs/msg/CompressedImage"),)),
        "error", "carries sensor_msgs/msg/CompressedImage", "set cameras[0].transport: compressed",
    ),
    "another state": (
        change_of(LEFT_STATE, publishers=(Endpoint("/odometer", "nav_msgs/msg/Odometry"),)),
        "error", "carries nav_msgs/msg/Odometry", "set state[0].source: odometry",
    ),
    "QoS of a driver": (
        change_of(EGO, publishers=(Endpoint("/camera", IMAGE, "incompatible deadline"),)),
        "error", "incompatible deadline", "QoS",
    ),
    "silence": (change_of(EGO, arrivals_ns=[], stamps_ns=[]), "error", "nothing arrived in 3 s", "FASTDDS"),
    "two drivers": (
        change_of(LEFT_STATE, publishers=(Endpoint("/a", JOINTS), Endpoint("/b", JOINTS))),
        "warn", "2 publishers: /a, /b", "end all but one",
    ),
    "a few lost": (change_of(EGO, lost=2), "warn", "2 of 92 messages never arrived (2%)", "fastdds.xml"),
    "many lost": (change_of(EGO, lost=30), "error", "(25%)", "compressed pictures"),
    "slow camera": (lambda seen: stream(seen[EGO], 2.0), "error", "500 ms between two messages", "max_age_ms"),
    "camera slower than the policy": (lambda seen: stream(seen[EGO], 5.0), "warn", "5.0 Hz, slower than", "rate"),
    "no stamps": (change_of(EGO, stamps_ns=[0] * 90), "error", "time stamps are zero", "header.stamp"),
    "one stamp": (change_of(EGO, stamps_ns=[NOW] * 90), "error", "the same time stamp", "header.stamp"),
    "future": (lambda seen: stream(seen[LEFT_STATE], 50.0, age_ms=-900), "error", "900 ms in the future", "chrony"),
    "slightly ahead": (lambda seen: stream(seen[LEFT_STATE], 50.0, age_ms=-50), "warn", "50 ms in the f", "chrony"),
    "old": (lambda seen: stream(seen[LEFT_STATE], 50.0, age_ms=450), "error", "450 ms old on arrival", "max_age_ms"),
    "skew": (lambda seen: stream(seen[EGO], 30.0, age_ms=4000), "error", "apart, safety.max_skew_ms", "trigger"),
    "shape": (
        change_of(EGO, pictures=[Picture("rgb8", 1280, 720)]),
        "error", "another shape", "set cameras[0].size: [1280, 720]",
    ),
    "size": (change_of(EGO, pictures=[Picture("bgr8", 320, 240)]), "warn", "they are scaled", "size: [320, 240]"),
    "depth": (
        change_of(EGO, pictures=[Picture("16UC1", 640, 480, problem="camera encoding '16UC1' is not a colour")]),
        "error", "16UC1", "rgb8",
    ),
    "black": (change_of(EGO, pictures=[Picture("rgb8", 640, 480, dark=True)]), "error", "black", "lens"),
    "a misspelt joint": (
        change_of(LEFT_STATE, names=("waist", "sholder", *NAMES[2:])),
        "error", "no joint 'shoulder'", "state[0].fields[1]: did you mean 'sholder'?",
    ),
    "no position": (change_of(LEFT_STATE, short=("elbow",)), "error", "joint 'elbow' has no position", "position"),
    "degrees": (
        lambda seen: seen[LEFT_STATE].values.update(left_waist=57.3),
        "error", "left_waist is measured at 57.3 rad, outside its limits", "map",
    ),
    "no number": (lambda seen: seen[LEFT_STATE].values.update(left_waist=float("nan")), "error", "is nan", "numbers"),
    "nobody listens": (change_of(LEFT_COMMAND, subscribers=()), "error", "nobody listens", "start the robot's"),
    "another command": (
        command_with("trajectory_msgs/msg/JointTrajectory"),
        "error", "carries trajectory_msgs/msg/JointTrajectory", "set actions[0].command.kind: joint_trajectory",
    ),
    "QoS of a controller": (command_with(ARRAY, qos="incompatible durability"), "error", "durability", "volatile"),
    "order of numbers": (
        command_with(ARRAY, joints=tuple(reversed(FIELDS))),
        "error", "another order of joints: wrist_rotate", "set actions[0].command.fields: [wrist_rotate",
    ),
    "other joints": (
        command_with(ARRAY, joints=("waist", "knee")),
        "error", "it also has knee", "fields: [waist, knee]",
    ),
    "a second commander": (
        change_of(LEFT_COMMAND, publishers=(Endpoint("/teleop", ARRAY), Endpoint("/ns/controller_node", ARRAY))),
        "warn", "/teleop publishes commands too", "end it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_named_with_its_fix(name: str) -> None:
    change, level, message, fix = WRONG[name]
    seen = healthy()
    change(seen)
    found = complaints(seen)
    assert any(f.level == level and message in f.message and fix in f"{f.message} {f.fix}" for f in found), found
    if name != "skew":
        assert len(found) == 1, found


def test_a_simulated_clock_is_told_apart_from_a_wrong_one() -> None:
    seen = healthy()
    stream(seen[EGO], 30.0, age_ms=20_000)
    assert any("--use-sim-time" in finding.fix for finding in complaints(seen, simulated_clock=True))
    assert any("nobody publishes /clock" in finding.message for finding in complaints(healthy(), follows_clock=True))


def test_stamps_and_pictures_are_read_from_real_messages() -> None:
    image = numpy_to_image(np.full((48, 64, 3), 200, np.uint8), "rgb8", ns_to_stamp(NOW + 7), "frame")
    assert stamp_of(serialize_message(image)) == NOW + 7
    joints = JointState()
    joints.header.stamp = ns_to_stamp(NOW)
    assert stamp_of(serialize_message(joints)) == NOW
    assert picture_of(image) == Picture("rgb8", 64, 48)
    assert picture_of(numpy_to_image(np.zeros((48, 64, 3), np.uint8), "rgb8")).dark
    assert "16UC1" in picture_of(numpy_to_image(np.zeros((48, 64), np.uint16), "16UC1")).problem
    assert "step" in picture_of(Image(height=4, width=4, encoding="rgb8", step=3)).problem


SCANNER = """  obstacle_stop:
    topic: /scan
    footprint: {front: 0.2, rear: 0.2, side: 0.2}
    stop_distance: 0.15
    slow_distance: 0.7
  #"""


@pytest.fixture
def mock(tmp_path: Path) -> Iterator[Path]:
    """A one-camera robot on its mock, with small pictures."""
    path = tmp_path / "robot.yaml"
    text = load_embodiment("mobile_base").source_text.replace("size: [640, 480]", "size: [160, 120]")
    path.write_text(text.replace("  # obstacle_stop:", SCANNER))
    graph = Graph([s for s in build_graph(str(path), mock=True) if s.name == "mock_node"], tmp_path)
    try:
        yield path
    finally:
        graph.close()


def test_losses_are_counted_by_the_publishers_own_numbers() -> None:
    listener = SimpleNamespace(
        node=SimpleNamespace(create_subscription=lambda *_args, **_options: None), now_ns=lambda: NOW
    )
    evidence = TopicEvidence(EGO, (Endpoint("/camera", IMAGE),))
    probe = live._CameraProbe(listener, evidence, Image)  # type: ignore[arg-type]
    data = serialize_message(numpy_to_image(np.full((4, 4, 3), 200, np.uint8), "rgb8", ns_to_stamp(NOW)))
    for number in (1, 2, 5, 6):
        probe._on_message(data, {"publication_sequence_number": number})
    assert evidence.lost == 2 and len(evidence.arrivals_ns) == 4 and evidence.pictures == [Picture("rgb8", 4, 4)]


def test_arm_and_gripper_may_be_published_apart_on_one_topic() -> None:
    listener = SimpleNamespace(
        node=SimpleNamespace(create_subscription=lambda *_args, **_options: None), now_ns=lambda: NOW
    )
    evidence = TopicEvidence(LEFT_STATE, (Endpoint("/driver", JOINTS),))
    groups = [group for group in ALOHA.state if group.topic == LEFT_STATE]
    probe = live._StateProbe(listener, evidence, JointState, groups)  # type: ignore[arg-type]
    for names, positions in ((list(FIELDS), [0.1] * 6), (["left_finger", "spare"], [0.05])):
        probe._on_message(serialize_message(JointState(name=names, position=positions)), {})
    assert evidence.names == (*NAMES, "spare") and evidence.short == ("spare",)
    assert set(evidence.values) == {channel for group in groups for channel in group.channels}


def test_a_scanner_is_judged_as_the_obstacle_stop_judges_it() -> None:
    base = load_embodiment("mobile_base")
    stop = ObstacleStopSpec("/scan", FootprintSpec(0.2, 0.2, 0.2), 0.15, 0.7)
    robot = dataclasses.replace(base, safety=dataclasses.replace(base.safety, obstacle_stop=stop))
    listener = SimpleNamespace(
        node=SimpleNamespace(create_subscription=lambda *_args, **_options: None), now_ns=lambda: NOW
    )

    def findings(ranges: np.ndarray) -> list[Finding]:
        evidence = TopicEvidence("/scan", (Endpoint("/driver", "sensor_msgs/msg/LaserScan"),))
        probe = live._ScanProbe(listener, evidence, stop)  # type: ignore[arg-type]
        step = np.pi / 180
        scan = Scan(-step * (len(ranges) // 2), step, 0.05, 10.0, ranges, NOW)
        for number in range(2):
            probe._on_message(
                serialize_message(scan_to_message(scan, "laser")), {"publication_sequence_number": number}
            )
        evidence.arrivals_ns, evidence.stamps_ns = [NOW, NOW + 100_000_000], [NOW, NOW + 100_000_000]
        seen = Evidence({}, {"/scan": evidence}, 3.0)
        return list(live_report._scan(stop, robot, seen))

    (good,) = findings(np.full(360, 3.0))
    assert good.level == "ok" and "360 ranges" in good.message
    (nothing,) = findings(np.full(360, np.nan))
    assert nothing.level == "error" and "no measurement: the robot would hold" in nothing.message
    (ahead,) = findings(np.full(180, 3.0))
    assert ahead.level == "warn" and "does not see behind" in ahead.message


def test_the_mock_passes_and_a_wrong_yaml_does_not(
    mock: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    robot = load_embodiment(mock)
    findings = check_live(robot, seconds=1.5)
    assert [finding for finding in findings if finding.level == "error"] == []
    assert any("160x120 rgb8" in finding.message for finding in findings)
    assert any(f.subject == "scanner /scan" and f.level == "ok" and "360 ranges" in f.message for f in findings)
    monkeypatch.setattr(live, "DISCOVERY_S", 4.0)
    wrong = mock.with_name("wrong.yaml")
    wrong.write_text(robot.source_text.replace("/cmd_vel", "/cmd_vle").replace("160, 120", "160, 90"))
    assert main(["embodiment", "check", str(wrong), "--live", "--seconds", "1", "--json"]) == 2
    (result,) = json.loads(capsys.readouterr().out)
    errors = [line for line in result["live"] if line["level"] == "error"]
    assert not result["ok"] and len(errors) == 2
    assert "another shape" in errors[0]["message"] and "did you mean '/cmd_vel'?" in errors[1]["fix"]


def test_a_controller_is_asked_for_its_joints_and_its_qos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "DISCOVERY_S", 4.0)
    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node("arm_controller", context=context)
    node.declare_parameter("joints", list(reversed(FIELDS)))
    latched = QoSProfile(depth=1, durability=rclpy.qos.DurabilityPolicy.TRANSIENT_LOCAL)
    node.create_subscription(Float64MultiArray, LEFT_COMMAND, lambda _: None, latched)
    executor = rclpy.executors.SingleThreadedExecutor(context=context)
    executor.add_node(node)
    stopping = threading.Event()

    def spin() -> None:
        while not stopping.is_set():
            executor.spin_once(timeout_sec=0.1)

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    try:
        topics = {topic.name: topic for topic in graph_topics(seconds=0.5)}
        assert topics[LEFT_COMMAND].joints == tuple(reversed(FIELDS)) and topics[LEFT_COMMAND].subscribed
        findings = [f for f in check_live(ALOHA, seconds=0.5) if f.subject == f"command left_arm {LEFT_COMMAND}"]
    finally:
        stopping.set()
        thread.join()
        executor.shutdown()
        node.destroy_node()
        rclpy.shutdown(context=context)
    assert any("another order of joints" in finding.message for finding in findings), findings
    assert any("QoS of /arm_controller does not fit" in finding.message for finding in findings), findings


@pytest.mark.usefixtures("no_profile_chosen")
def test_a_listener_leaves_no_profile_behind_that_looks_like_the_users_choice() -> None:
    with listening():
        assert not [key for key in os.environ if "PROFILES_FILE" in key]


def test_bad_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embodiment", "check", "aloha", "widowx", "--live"]) == 2
    assert main(["embodiment", "check", "aloha", "--live", "--seconds", "0"]) == 2
    assert main(["embodiment", "check", "/nowhere.yaml", "--live"]) == 2
    said = capsys.readouterr().err
    assert "exactly one robot" in said and "greater than 0" in said and "no such embodiment file" in said
