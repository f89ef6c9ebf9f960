"""What was seen and heard of a running graph → findings against the embodiment. No ROS in here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qwen_vla_core.embodiment.commanded import commanded_robot
from qwen_vla_core.embodiment.errors import did_you_mean
from qwen_vla_core.embodiment.findings import Finding
from qwen_vla_core.embodiment.spec import (
    COMMAND_MESSAGES,
    IMAGE_MESSAGES,
    STATE_MESSAGES,
    VELOCITY_KINDS,
    ActionGroup,
    CameraSpec,
    Embodiment,
    StateGroup,
)
from qwen_vla_core.embodiment.spec_base import ObstacleStopSpec
from qwen_vla_ros.observation import SHAPE_TOLERANCE

SCAN_MESSAGE = "sensor_msgs/msg/LaserScan"
LOST_ERROR = 0.05  # a larger share of lost messages is an error [O]
FUTURE_WARN_MS = 20.0  # two processes on one machine never differ by so much; two machines with chrony seldom do [O]
START_TOLERANCE_S = 0.1  # as the controller: so far outside its limits a joint may be measured at its velocity limit
CONTROLLER = "controller_node"
TRANSPORT_FIX = (
    "set FASTDDS_DEFAULT_PROFILES_FILE to config/fastdds.xml for the driver too (docs/ros2.md); over a network use "
    "compressed pictures, or raise net.core.rmem_max"
)
CLOCK_FIX = "synchronise the machines' clocks (chrony); with a simulated clock use --use-sim-time and use_sim_time"


@dataclass(frozen=True)
class Endpoint:
    """Somebody on a topic.

    Attributes:
        type: of the message it sends or expects; two on one topic may differ, and then never hear each other.
        qos: why this project's end cannot talk to it; empty where it can.
        joints: of a controller, where it tells.
    """

    node: str
    type: str
    qos: str = ""
    joints: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """One picture that was looked at; ``problem``: why the policy could not use it."""

    encoding: str
    width: int
    height: int
    dark: bool = False
    problem: str = ""


@dataclass(frozen=True)
class ScanEvidence:
    """A laser scan: how many ranges, why the obstacle stop could not use it, and where it measures nothing."""

    ranges: int
    problem: str = ""
    unseen: tuple[str, ...] = ()


@dataclass
class TopicEvidence:
    """One topic as it was seen and heard. Times in nanoseconds of the ROS clock.

    Attributes:
        arrivals_ns, stamps_ns: one per message heard.
        lost: messages that were published meanwhile but never arrived, by the publisher's own numbers.
        names: joint names of the JointStates heard; values: their channels (or the odometry's) in channel units.
        short: names in a JointState that had no position.
    """

    name: str
    publishers: tuple[Endpoint, ...] = ()
    subscribers: tuple[Endpoint, ...] = ()
    arrivals_ns: list[int] = field(default_factory=list)
    stamps_ns: list[int] = field(default_factory=list)
    lost: int = 0
    names: tuple[str, ...] = ()
    short: tuple[str, ...] = ()
    values: dict[str, float] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    scan: ScanEvidence | None = None

    @property
    def published(self) -> tuple[str, ...]:
        """Types that somebody publishes."""
        return tuple(dict.fromkeys(endpoint.type for endpoint in self.publishers))

    @property
    def expected(self) -> tuple[str, ...]:
        """Types that somebody listens to."""
        return tuple(dict.fromkeys(endpoint.type for endpoint in self.subscribers))


@dataclass(frozen=True)
class Evidence:
    """The graph: every topic's types, and what belongs to the robot by its name in the YAML."""

    topics: Mapping[str, tuple[str, ...]]
    robot: Mapping[str, TopicEvidence]
    seconds: float
    simulated_clock: bool = False  # the graph has a /clock
    follows_clock: bool = False  # and this check follows it


def judge(robot: Embodiment, evidence: Evidence) -> list[Finding]:
    """All findings, in the order of the YAML: an ok line where there is nothing to complain about."""
    findings: list[Finding] = []
    robot = commanded_robot(robot)  # joints that are published in place of hand poses are checked against their limits
    if evidence.follows_clock and not evidence.simulated_clock:
        findings.append(Finding("error", "clock", "nobody publishes /clock", "leave --use-sim-time out"))
    for index, camera in enumerate(robot.cameras):
        findings += _camera(index, camera, robot, evidence)
    findings += _skew(robot, evidence)
    for topic in dict.fromkeys(group.topic for group in robot.state):
        groups = [(index, group) for index, group in enumerate(robot.state) if group.topic == topic]
        findings += _state(groups, robot, evidence)
    for index, action in enumerate(robot.actions):
        findings += _command(index, action, evidence)
    if robot.safety.obstacle_stop is not None:
        findings += _scan(robot.safety.obstacle_stop, robot, evidence)
    return findings


def _scan(stop: ObstacleStopSpec, robot: Embodiment, evidence: Evidence) -> Iterator[Finding]:
    """The obstacle stop's scanner: without a scan that it can use the robot holds."""
    key, subject, seen = "safety.obstacle_stop", f"scanner {stop.topic}", evidence.robot[stop.topic]
    problem = _missing(key, subject, SCAN_MESSAGE, seen, evidence)
    if problem is not None:
        yield problem
        return
    found = list(_stream(key, subject, seen, stop.max_age_ms, robot, evidence))
    scan = seen.scan
    if scan is not None and scan.problem:
        fix = "let the driver follow REP 117 (inf where nothing is), or uncover the scanner"
        found.append(Finding("error", subject, f"{scan.problem}: the robot would hold", fix))
    elif scan is not None and scan.unseen:
        text = f"does not see {' and '.join(scan.unseen)}: the base will not drive there"
        found.append(Finding("warn", subject, text, f"check {key}.mount (yaw), or let another scanner see it"))
    yield from found
    if not found and scan is not None:
        yield Finding("ok", subject, f"{scan.ranges} ranges, {_rhythm(seen)}")


def _camera(index: int, camera: CameraSpec, robot: Embodiment, evidence: Evidence) -> Iterator[Finding]:
    key, subject = f"cameras[{index}]", f"camera {camera.view} {camera.topic}"
    seen = evidence.robot[camera.topic]
    problem = _missing(key, subject, IMAGE_MESSAGES[camera.transport], seen, evidence)
    if problem is not None:
        yield problem
        return
    found = [*_stream(key, subject, seen, camera.max_age_ms, robot, evidence), *_pictures(key, subject, camera, seen)]
    yield from found
    if not found:
        picture = seen.pictures[-1]
        text = f"{picture.width}x{picture.height} {picture.encoding}, {_rhythm(seen)}"
        yield Finding("ok", subject, text)


def _pictures(key: str, subject: str, camera: CameraSpec, seen: TopicEvidence) -> Iterator[Finding]:
    if not seen.pictures:
        return
    picture = seen.pictures[-1]
    if picture.problem:
        yield Finding("error", subject, picture.problem, f"let the driver publish rgb8, or correct {key}.topic")
        return
    (width, height), (wide, high) = (picture.width, picture.height), camera.size
    if abs(width * high - height * wide) > SHAPE_TOLERANCE * height * wide:
        text = f"pictures are {width}x{height}, another shape than size [{wide}, {high}]: the policy would hold"
        yield Finding("error", subject, text, f"set {key}.size: [{width}, {height}], or the driver's resolution")
    elif (width, height) != (wide, high):
        text = f"pictures are {width}x{height}, size says [{wide}, {high}]: they are scaled"
        yield Finding("warn", subject, text, f"set {key}.size: [{width}, {height}]")
    if all(p.dark for p in seen.pictures):
        yield Finding("error", subject, "every picture is black: the policy would hold", "uncover the lens, add light")


def _missing(key: str, subject: str, wanted: str, seen: TopicEvidence, evidence: Evidence) -> Finding | None:
    """Why nothing of a topic can be heard at all."""
    if not seen.publishers:
        fix = f"start the driver, or {_other(key, seen, wanted, evidence)}"
        return Finding("error", subject, "nobody publishes it", fix)
    if wanted not in seen.published:
        fix = f"correct {key}.topic"
        for transport, message in IMAGE_MESSAGES.items():
            if message in seen.published and wanted in IMAGE_MESSAGES.values():
                fix = f"set {key}.transport: {transport}"
        for source, message in STATE_MESSAGES.items():
            if message in seen.published and wanted in STATE_MESSAGES.values():
                fix = f"set {key}.source: {source}, or correct {key}.topic"
        return Finding("error", subject, f"carries {', '.join(seen.published)}, not {wanted}", fix)
    return next((Finding("error", subject, _qos(e), "change the driver's QoS") for e in seen.publishers if e.qos), None)


def _qos(endpoint: Endpoint) -> str:
    return f"QoS of {endpoint.node} does not fit: {endpoint.qos}"


def _other(key: str, seen: TopicEvidence, wanted: str, evidence: Evidence) -> str:
    others = tuple(name for name, types in evidence.topics.items() if wanted in types and "/qwen_vla/" not in name)
    others = tuple(name for name in others if name != seen.name)
    if not others:
        return f"correct {key}.topic: the graph has no {wanted}"
    return f"correct {key}.topic: {did_you_mean(seen.name, others)}"


def _stream(
    key: str, subject: str, seen: TopicEvidence, max_age_ms: float, robot: Embodiment, evidence: Evidence
) -> Iterator[Finding]:
    """Rate, losses and stamps of what is heard."""
    if not seen.arrivals_ns:
        who = ", ".join(endpoint.node for endpoint in seen.publishers)
        text = f"{who} publishes, but nothing arrived in {evidence.seconds:g} s"
        yield Finding("error", subject, text, f"see whether the driver is silent; else {TRANSPORT_FIX}")
        return
    if len(seen.publishers) > 1:
        who = ", ".join(endpoint.node for endpoint in seen.publishers)
        yield Finding("warn", subject, f"{len(seen.publishers)} publishers: {who}", "end all but one")
    count = len(seen.arrivals_ns)
    if seen.lost:
        share = seen.lost / (seen.lost + count)
        text = f"{seen.lost} of {seen.lost + count} messages never arrived ({share:.0%})"
        yield Finding("error" if share > LOST_ERROR else "warn", subject, text, TRANSPORT_FIX)
    gaps_ms = np.diff(seen.arrivals_ns) / 1e6
    if gaps_ms.size:
        rate = 1000.0 / max(float(np.mean(gaps_ms)), 1e-6)
        gap = float(np.percentile(gaps_ms, 95))
        if gap > max_age_ms:
            text = f"{gap:.0f} ms between two messages ({rate:.1f} Hz), longer than max_age_ms {max_age_ms:g}"
            yield Finding("error", subject, text, f"raise the driver's rate, or {key}.max_age_ms")
        elif rate < 0.9 * robot.control.frequency_hz:
            text = f"{rate:.1f} Hz, slower than the policy's {robot.control.frequency_hz:g} Hz"
            yield Finding("warn", subject, text, "raise the driver's rate")
    elif count == 1:
        text = f"one message in {evidence.seconds:g} s"
        yield Finding("error", subject, text, f"raise the driver's rate, or {key}.max_age_ms and --seconds")
    yield from _stamps(key, subject, seen, max_age_ms, evidence)


def _stamps(key: str, subject: str, seen: TopicEvidence, max_age_ms: float, evidence: Evidence) -> Iterator[Finding]:
    stamps = np.array(seen.stamps_ns, dtype=np.int64)
    if (stamps == 0).any():
        yield Finding("error", subject, "time stamps are zero", "let the driver fill header.stamp")
        return
    if len(stamps) > 2 and len(set(seen.stamps_ns)) == 1:
        yield Finding(
            "error", subject, "every message has the same time stamp", "let the driver fill header.stamp anew"
        )
        return
    ages_ms = (np.array(seen.arrivals_ns, dtype=np.int64) - stamps) / 1e6
    middle, late = float(np.median(ages_ms)), float(np.percentile(ages_ms, 95))
    other_clock = evidence.simulated_clock and not evidence.follows_clock
    clock_fix = "the graph has a /clock: add --use-sim-time" if other_clock else CLOCK_FIX
    if middle < -FUTURE_WARN_MS:
        level = "error" if middle < -max_age_ms else "warn"
        yield Finding(level, subject, f"stamps are {-middle:.0f} ms in the future", clock_fix)  # type: ignore[arg-type]
    elif middle > max_age_ms:
        fix = clock_fix if middle > 10_000 else f"lower the driver's latency, or raise {key}.max_age_ms; {CLOCK_FIX}"
        yield Finding("error", subject, f"{middle:.0f} ms old on arrival, max_age_ms is {max_age_ms:g}", fix)
    elif late > max_age_ms:
        text = f"up to {late:.0f} ms old on arrival (95 %), max_age_ms is {max_age_ms:g}"
        yield Finding("warn", subject, text, f"lower the load, or raise {key}.max_age_ms")


def _rhythm(seen: TopicEvidence) -> str:
    gaps = np.diff(seen.arrivals_ns) / 1e9
    rate = 1.0 / max(float(np.mean(gaps)), 1e-9) if gaps.size else math.nan
    age = float(np.median(np.array(seen.arrivals_ns, np.int64) - np.array(seen.stamps_ns, np.int64))) / 1e6
    return f"{rate:.1f} Hz, {age:.0f} ms old on arrival, none lost"


def _skew(robot: Embodiment, evidence: Evidence) -> Iterator[Finding]:
    """How far the other views' nearest stamps are from the reference camera's."""
    reference = robot.reference_camera
    base = np.array(evidence.robot[reference.topic].stamps_ns, dtype=np.int64)
    limit = robot.safety.max_skew_ms
    for camera in robot.cameras:
        stamps = np.array(evidence.robot[camera.topic].stamps_ns, dtype=np.int64)
        if camera is reference or not base.size or not stamps.size or not base.all() or not stamps.all():
            continue
        # Only the time when both were heard says something.
        common = base[(base >= stamps.min()) & (base <= stamps.max())]
        common = common if common.size else base
        apart_ms = np.min(np.abs(common[:, None] - stamps[None, :]), axis=1) / 1e6
        subject = f"views {camera.view} and {reference.view}"
        middle = float(np.median(apart_ms))
        if middle > limit:
            text = f"stamps are {middle:.0f} ms apart, safety.max_skew_ms is {limit:g}: the policy would hold"
            yield Finding("error", subject, text, f"trigger the cameras together; {CLOCK_FIX}")
        else:
            yield Finding("ok", subject, f"stamps are {middle:.0f} ms apart, limit {limit:g}")


def _state(groups: Sequence[tuple[int, StateGroup]], robot: Embodiment, evidence: Evidence) -> Iterator[Finding]:
    index, first = groups[0]
    key, subject = f"state[{index}]", f"state {', '.join(group.name for _, group in groups)} {first.topic}"
    seen = evidence.robot[first.topic]
    problem = _missing(key, subject, STATE_MESSAGES[first.source], seen, evidence)
    if problem is not None:
        yield problem
        return
    strictest = min((group.max_age_ms, i) for i, group in groups)
    found = list(_stream(f"state[{strictest[1]}]", subject, seen, strictest[0], robot, evidence))
    note = ""
    if first.source == "joint_state" and seen.arrivals_ns:
        found += _joint_names(groups, subject, seen)
        read = [name for _, group in groups for name in group.fields]
        told = [name for name in seen.names if name in read]
        note = "" if told == read else ", in another order than the YAML's (they are matched by name)"
    found += _values(groups, subject, seen, robot)
    yield from found
    if not found:
        what = f"{sum(len(group.fields) for _, group in groups)} fields"
        yield Finding("ok", subject, f"{what}{note}, {_rhythm(seen)}")


def _joint_names(groups: Sequence[tuple[int, StateGroup]], subject: str, seen: TopicEvidence) -> Iterator[Finding]:
    for index, group in groups:
        for column, name in enumerate(group.fields):
            where = f"state[{index}].fields[{column}]"
            if name not in seen.names:
                yield Finding(
                    "error", subject, f"no joint '{name}' in the messages", f"{where}: {did_you_mean(name, seen.names)}"
                )
            elif name in seen.short:
                yield Finding("error", subject, f"joint '{name}' has no position", "let the driver fill position")


def _values(
    groups: Sequence[tuple[int, StateGroup]], subject: str, seen: TopicEvidence, robot: Embodiment
) -> Iterator[Finding]:
    """A measured value outside its limits stops the controller at the first command; most often a unit is wrong."""
    limits = {
        channel: (low, up, speed * START_TOLERANCE_S)
        for action in robot.actions
        if action.kind not in VELOCITY_KINDS
        for channel, low, up, speed in zip(
            action.channels, action.limits.lower, action.limits.upper, action.limits.velocity, strict=True
        )
    }
    for index, group in groups:
        for channel in group.channels:
            value = seen.values.get(channel)
            if value is None:
                continue
            if not math.isfinite(value):
                yield Finding("error", subject, f"{channel} is {value}", "let the driver publish numbers only")
            elif channel in limits:
                low, up, slack = limits[channel]
                if not low - slack <= value <= up + slack:
                    text = f"{channel} is measured at {value:.4g} {group.unit}, outside its limits {low:g} … {up:g}"
                    yield Finding("error", subject, text, f"correct state[{index}].map, the unit, or the limits")


def _command(index: int, group: ActionGroup, evidence: Evidence) -> Iterator[Finding]:
    command, key, subject = group.command, f"actions[{index}].command", f"command {group.name} {group.command.topic}"
    seen = evidence.robot[command.topic]
    wanted = COMMAND_MESSAGES[command.kind]
    stand_in = COMMAND_MESSAGES[command.simulation_kind] if command.simulation_kind else wanted
    if not seen.subscribers:
        others = tuple(n for n, types in evidence.topics.items() if wanted in types and "/qwen_vla/" not in n)
        others = tuple(name for name in others if name != seen.name)
        fix = f"or correct {key}.topic: {did_you_mean(seen.name, others)}" if others else f"or correct {key}.topic"
        yield Finding("error", subject, "nobody listens", f"start the robot's controller, {fix}")
        return
    if wanted not in seen.expected and stand_in not in seen.expected:
        fits = [kind for kind, message in COMMAND_MESSAGES.items() if message in seen.expected]
        fix = f"set {key}.kind: {fits[0]}" if fits else f"correct {key}.topic"
        yield Finding("error", subject, f"carries {', '.join(seen.expected)}, not {wanted}", fix)
        return
    kind = command.kind if wanted in seen.expected else command.simulation_kind
    found: list[Finding] = []
    for endpoint in seen.subscribers:
        if endpoint.qos:
            fix = "subscribe volatile: commands are reliable and volatile"
            found.append(Finding("error", subject, _qos(endpoint), fix))
        if endpoint.joints and kind in ("joint_trajectory", "forward_command"):
            found += _controller_joints(key, subject, kind, group, endpoint)
    rivals = [endpoint.node for endpoint in seen.publishers if endpoint.node.split("/")[-1] != CONTROLLER]
    if rivals:
        text = f"{', '.join(rivals)} publishes commands too"
        found.append(Finding("warn", subject, text, "end it before the controller starts"))
    yield from found
    if not found:
        note = "" if kind == command.kind else f", as simulation_kind {kind}"
        listeners = ", ".join(endpoint.node for endpoint in seen.subscribers)
        yield Finding("ok", subject, f"{COMMAND_MESSAGES[kind or command.kind]}, heard by {listeners}{note}")


def _controller_joints(key: str, subject: str, kind: str, group: ActionGroup, endpoint: Endpoint) -> Iterator[Finding]:
    ours = group.command.fields or group.channels
    theirs = endpoint.joints
    fix = f"set {key}.fields: [{', '.join(theirs)}] and the channels, limits and start in that order"
    if set(ours) != set(theirs):
        extra, absent = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
        text = f"{endpoint.node} moves other joints: "
        text += "; ".join(
            [
                *([f"it lacks {', '.join(extra)}"] if extra else []),
                *([f"it also has {', '.join(absent)}"] if absent else []),
            ]
        )
        yield Finding("error", subject, text, fix)
    elif ours != theirs and kind == "forward_command":  # numbers without names: the order is all there is
        yield Finding("error", subject, f"{endpoint.node} has another order of joints: {', '.join(theirs)}", fix)
