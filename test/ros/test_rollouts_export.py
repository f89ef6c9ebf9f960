"""What leaves a recording for training is what was seen and commanded: times, channels, sentences, hands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rclpy.serialization import serialize_message
from std_msgs.msg import Bool, String

from qwen_vla_core.cli import main
from qwen_vla_core.data.lerobot import LeRobotDataset
from qwen_vla_core.data.loader import MixtureLoader
from qwen_vla_core.data.mixture import Mixture
from qwen_vla_core.data.mixture_recipe import load_mixture
from qwen_vla_core.data.sample_maker import SampleOptions
from qwen_vla_core.embodiment import Embodiment, load_embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.rollouts.index import Rollout, find_rollouts, read_rollout
from qwen_vla_ros.bag import EpisodeBag
from qwen_vla_ros.commands import adapter_for, command_kind
from qwen_vla_ros.messages import (
    groups_by_topic,
    image_message_type,
    numpy_to_image,
    rgb_to_compressed,
    state_message_type,
    state_to_message,
)
from qwen_vla_ros.node_utils import HUMAN_TOPIC, INSTRUCTION_TOPIC, PLAYING_TOPIC, ns_to_stamp
from qwen_vla_ros.rollouts.episode import Episode
from qwen_vla_ros.rollouts.lerobot import export
from qwen_vla_ros.rollouts.rows import rows_of

pytest.importorskip("av")
BEGIN_NS = 1_700_000_000_000_000_000
LATE_NS = 3_000_000  # a recorder hears everything so much later than it was stamped
SECONDS, STATE_HZ, SIZE = 4.0, 50, (32, 24)
ALOHA = load_embodiment("aloha")
NAMESPACE = "lab"


def at(channel: int, seconds: float) -> float:
    """The value of a channel in time: all move, no two alike, inside every gripper's range."""
    return 0.1 + 0.2 * seconds * (0.5 + channel / 20) / 2


class Scene:
    """A robot that was recorded by the book; tests change what they are about."""

    def __init__(self, robot: Embodiment = ALOHA) -> None:
        self.robot = robot
        self.camera_hz, self.stamped = robot.control.frequency_hz, True
        self.told: list[tuple[float, str]] = [(0.0, "pick it up"), (2.0, "put it down")]
        self.human: list[tuple[float, bool]] = []
        self.played: list[tuple[float, str]] = []
        self.blind: Callable[[str, float], bool] = lambda view, seconds: False
        self.silent: Callable[[str, float], bool] = lambda group, seconds: False
        self.value: Callable[[int, float], float] = at

    def messages(self) -> list[tuple[float, str, Any]]:
        """(seconds, topic, message) in order."""
        found: list[tuple[float, str, Any]] = []
        for index in range(int(SECONDS * self.camera_hz)):
            seconds = index / self.camera_hz
            stamp = ns_to_stamp(BEGIN_NS + round(seconds * 1e9) if self.stamped else 0)
            for number, camera in enumerate(self.robot.cameras):
                if not self.blind(camera.view, seconds):
                    pixels = np.full((SIZE[1], SIZE[0], 3), 4 * index + 20 * number, np.uint8)
                    pixels[:, : SIZE[0] // 2] += 40
                    make = rgb_to_compressed if camera.transport == "compressed" else numpy_to_image
                    picture = (
                        make(pixels, stamp) if make is rgb_to_compressed else numpy_to_image(pixels, "rgb8", stamp)
                    )
                    found.append((seconds, camera.topic, picture))
        channels = {name: i for i, name in enumerate(self.robot.state_channels)}
        for index in range(int(SECONDS * STATE_HZ)):
            seconds = index / STATE_HZ
            stamp = ns_to_stamp(BEGIN_NS + round(seconds * 1e9))
            values = {name: self.value(i, seconds) for name, i in channels.items()}
            for topic, groups in groups_by_topic(self.robot.state).items():
                found.append((seconds, topic, state_to_message(groups, values, stamp)))
            first = 0
            for group in self.robot.actions:
                columns = range(first, first := first + len(group.channels))
                if not self.silent(group.name, seconds):
                    values_c = np.array([0.05 + self.value(column, seconds) for column in columns])
                    adapter = adapter_for(command_kind(group, True))
                    told = group.command.map.to_message(values_c)
                    if group.tracked(True):  # a twist of two values
                        told = told[:2]
                    message = adapter.encode(group, told, np.zeros(len(told)), stamp, 0.02)
                    found.append((seconds, group.command.topic, message))
        found += [(seconds, f"/{NAMESPACE}/{INSTRUCTION_TOPIC}", String(data=text)) for seconds, text in self.told]
        found += [(seconds, f"/{NAMESPACE}/{HUMAN_TOPIC}", Bool(data=on)) for seconds, on in self.human]
        for seconds, text in self.played:
            event = String(data=json.dumps({"playing": bool(text), "instruction": text}))
            found.append((seconds, f"/{NAMESPACE}/{PLAYING_TOPIC}", event))
        return sorted(found, key=lambda message: message[0])

    def record(self, folder: Path, **about: object) -> Rollout:
        """Writes the episode."""
        types: dict[str, type] = {camera.topic: image_message_type(camera) for camera in self.robot.cameras}
        types |= {t: state_message_type(groups) for t, groups in groups_by_topic(self.robot.state).items()}
        for group in self.robot.actions:
            types[group.command.topic] = adapter_for(command_kind(group, True)).message_type
        types |= {f"/{NAMESPACE}/{name}": String for name in (INSTRUCTION_TOPIC, PLAYING_TOPIC)}
        types[f"/{NAMESPACE}/{HUMAN_TOPIC}"] = Bool
        known = {"embodiment": self.robot.name, "embodiment_yaml": self.robot.source_text, "simulated": True}
        known |= {"instruction": self.told[0][1] if self.told else "", "namespace": f"/{NAMESPACE}"}
        bag = EpisodeBag(folder, types, {**known, "started_ns": BEGIN_NS, "seed": 3, **about})
        for seconds, topic, message in self.messages():
            bag.write(topic, BEGIN_NS + LATE_NS + round(seconds * 1e9), serialize_message(message))
        return read_rollout(bag.close({"outcome": "partial", "reason": "slipped", "note": "slowly"}))


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_rows_are_what_was_seen_and_what_was_commanded_one_period_later(scene: Scene, tmp_path: Path) -> None:
    with Episode(scene.record(tmp_path / "run" / "episode_000")) as episode:
        rows = rows_of(episode)
    (segment,) = rows.segments
    steps = len(segment)
    assert 37 <= steps <= 40 and sum(rows.left_out.values()) == 40 - steps
    seconds = (segment.stamps_ns - BEGIN_NS) * 1e-9
    np.testing.assert_allclose(np.diff(seconds), 0.1, atol=1e-9)
    np.testing.assert_allclose(segment.state[:, 0], [at(0, s) for s in seconds], atol=1e-6)
    gripper = ALOHA.state_channels.index("left_gripper")
    np.testing.assert_allclose(segment.state[:, gripper], [at(gripper, s) for s in seconds], atol=1e-6)
    for channel in range(len(ALOHA.channels)):  # the newest command that the robot can have had by then
        wanted = [
            0.05 + at(channel, np.floor((s + 0.1 - LATE_NS * 1e-9) * STATE_HZ + 1e-6) / STATE_HZ) for s in seconds
        ]
        np.testing.assert_allclose(segment.action[:, channel], wanted, atol=1e-6)
    assert rows.instructions == ("pick it up", "put it down")
    np.testing.assert_array_equal(segment.task, seconds > 2.0 + 1e-6)
    assert not segment.human.any()


def test_a_dataset_reads_back_passes_the_doctor_and_feeds_the_loader(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene.human = [(1.0, True), (1.8, False)]
    scene.record(tmp_path / "rollouts" / "run" / "episode_000")
    out = tmp_path / "dataset"
    command = ["rollouts", "export", "--rollouts", str(tmp_path / "rollouts"), "--to", "lerobot", "--output", str(out)]
    assert main([*command, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["episodes"], made["outcomes"]) == (1, {"partial": 1}) and made["human_steps"] == 8

    data = LeRobotDataset(out)
    rows, info = data.rows(0), data.infos[0]
    assert data.fps == 10 and list(data.tasks) == ["pick it up", "put it down"] and data.family == "manipulation"
    assert (info["rollout"], info["outcome"], info["reason"], info["note"]) == (
        "run/episode_000",
        "partial",
        "slipped",
        "slowly",
    )
    assert info["seed"] == 3 and info["human_steps"] == 8
    flagged = np.flatnonzero(rows.extra["is_intervention"])
    np.testing.assert_array_equal(flagged, np.arange(flagged[0], flagged[0] + 8))
    first_s = info["first_s"]
    assert 0.9 <= first_s + flagged[0] / 10 <= 1.0  # whose action was due after the hand-over
    for number, view in enumerate(ALOHA.views):  # pictures of the same instants as the states
        grey = data.frames(0, view, range(len(rows))).mean(axis=(1, 2, 3))
        np.testing.assert_allclose(grey, 20 + 4 * np.round(first_s * 10 + np.arange(len(rows))) + 20 * number, atol=3)

    assert main(["data", "doctor", str(out), "--embodiment", "aloha", "--workers", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["errors"] == 0
    text = "batch_size: 4\nfamilies:\n  - {name: manipulation, datasets: [{path: dataset}]}\n"
    (tmp_path / "recipe.yaml").write_text(
        f"{text}absent: [human, navigation, synthetic, general_vl, spatial_grounding, driving_vqa, captions]\n"
    )
    mixture = Mixture(load_mixture(tmp_path / "recipe.yaml"))
    with MixtureLoader(mixture, SampleOptions()) as loader:
        for sample in loader.batch(0).samples:
            assert sample.instruction in data.tasks and sample.state.shape == (len(ALOHA.state_channels),)
            assert sample.actions_hc.shape[1] == len(ALOHA.channels) and set(sample.images) == set(ALOHA.views)

    assert main([*command, "--resume"]) == 0 and len(LeRobotDataset(out)) == 1
    assert "is in the dataset already" in capsys.readouterr().out
    assert main(command) == 2
    assert "holds a dataset already" in capsys.readouterr().err


def test_only_what_a_person_corrected(scene: Scene, tmp_path: Path) -> None:
    scene.human = [(0.5, True), (1.5, False), (2.5, True), (3.5, False)]
    rollout = scene.record(tmp_path / "run" / "episode_000")
    made = export([rollout], tmp_path / "human", keep="human")
    assert (made.episodes, made.steps, made.human_steps) == (2, 20, 20)
    data = LeRobotDataset(tmp_path / "human")
    assert [info["segment"] for info in data.infos] == [0, 1]
    assert all(data.rows(i).extra["is_intervention"].all() for i in range(2))
    other = export([rollout], tmp_path / "policy", keep="policy")
    assert other.human_steps == 0 and other.left_out["driven by a person"] == 20


def test_gaps_cut_an_episode_and_are_counted(scene: Scene, tmp_path: Path) -> None:
    scene.blind = lambda view, seconds: view == "cam_left_wrist" and 1.0 < seconds < 2.0
    scene.silent = lambda group, seconds: group == "right_arm" and seconds >= 3.0
    with Episode(scene.record(tmp_path / "run" / "episode_000")) as episode:
        rows = rows_of(episode)
    assert [len(segment) for segment in rows.segments] == [pytest.approx(14, abs=1), pytest.approx(17, abs=1)]
    assert 2 <= rows.left_out["no picture of cam_left_wrist"] <= 5  # max_age_ms is 300
    assert 3 <= rows.left_out["nothing commanded right_arm"] <= 6  # watchdog_ms is 500


def test_pictures_without_stamps_count_by_their_arrival(scene: Scene, tmp_path: Path) -> None:
    scene.stamped = False
    with Episode(scene.record(tmp_path / "run" / "episode_000")) as episode:
        (segment,) = rows_of(episode).segments
    assert (segment.stamps_ns[1] - BEGIN_NS) % 100_000_000 == LATE_NS


def test_displacements_are_the_mean_of_what_was_commanded(tmp_path: Path) -> None:
    """A robot that is told displacements: half a period of nothing and half of twice as much is one period of one."""
    widowx = load_embodiment("widowx")
    scene = Scene(widowx)
    period_s = widowx.period_s
    scene.value = lambda channel, seconds: (
        (0.15 if seconds % period_s < period_s / 2 else -0.05) if channel < 6 else 0.5
    )
    with Episode(scene.record(tmp_path / "run" / "episode_000")) as episode:
        (segment,) = rows_of(episode).segments
    np.testing.assert_allclose(segment.action[1:-1, :6].mean(), 0.10, atol=0.02)
    assert np.ptp(segment.action[1:-1, 0]) < 0.21


def test_waypoints_that_become_twists_are_where_the_base_got_to(tmp_path: Path) -> None:
    base = load_embodiment("mobile_base")
    scene = Scene(base)
    scene.camera_hz = 10.0
    with Episode(scene.record(tmp_path / "run" / "episode_000")) as episode:
        (segment,) = rows_of(episode, shortest=3).segments
    due_s = (segment.stamps_ns - BEGIN_NS) * 1e-9 + base.period_s
    for channel, name in enumerate(base.channels):
        measured = base.state_channels.index(name)
        # Nothing was measured after the last step's own moment but the reading just before it.
        np.testing.assert_allclose(segment.action[:-1, channel], [at(measured, s) for s in due_s[:-1]], atol=1e-6)


def test_an_action_belongs_to_the_instruction_that_is_played(scene: Scene, tmp_path: Path) -> None:
    """The plan of the first is played on for 0.5 s after the second was given."""
    scene.played = [(0.0, "pick it up"), (2.5, "put it down")]
    with Episode(scene.record(tmp_path / "run" / "episode_000")) as episode:
        rows = rows_of(episode)
    (segment,) = rows.segments
    due_s = (segment.stamps_ns - BEGIN_NS) * 1e-9 + 0.1
    np.testing.assert_array_equal(segment.task, due_s > 2.5 + LATE_NS * 1e-9)


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (lambda scene: setattr(scene, "silent", lambda group, seconds: True), "nothing was commanded to left_arm"),
        (lambda scene: setattr(scene, "blind", lambda view, seconds: view == "ego"), "no picture of ego"),
    ],
)
def test_what_was_never_there_is_named(scene: Scene, tmp_path: Path, break_it: Callable, told: str) -> None:
    break_it(scene)
    rollout = scene.record(tmp_path / "run" / "episode_000")
    try:
        made = export([rollout], tmp_path / "out")
    except UserError as error:
        assert told in str(error)
    else:
        assert told in made.skipped["run/episode_000"] and made.episodes == 0
        assert not (tmp_path / "out").exists()


def test_another_robot_needs_a_dataset_of_its_own(scene: Scene, tmp_path: Path) -> None:
    scene.record(tmp_path / "run" / "episode_000")
    text = ALOHA.source_text.replace("frequency_hz: 10 ", "frequency_hz: 5 ")
    scene.record(tmp_path / "run" / "episode_001", embodiment_yaml=text)
    with pytest.raises(UserError, match=r"run/episode_001: was recorded with another 'aloha'"):
        export(find_rollouts(tmp_path), tmp_path / "out")


def test_a_rerun_recording_holds_every_part(scene: Scene, tmp_path: Path) -> None:
    pytest.importorskip("rerun", reason="rerun-sdk is not installed")
    from qwen_vla_ros.rollouts.rerun_export import export as to_rerun

    written = to_rerun(scene.record(tmp_path / "run" / "episode_000"), tmp_path / "out.rrd")
    assert written["camera/ego"] == 40 and written["state/left_arm"] == written["command/right_gripper"] == 200
    assert written["events"] == 2
    data = (tmp_path / "out.rrd").read_bytes()
    assert data[:3] == b"RRF" and len(data) > 20_000
    with pytest.raises(UserError, match=r"ends in \.rrd"):
        to_rerun(read_rollout(tmp_path / "run" / "episode_000"), tmp_path / "out.mp4")


def test_flags_that_make_no_sense(scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene.record(tmp_path / "run" / "episode_000")
    scene.record(tmp_path / "run" / "episode_001")
    where = ["rollouts", "export", "--rollouts", str(tmp_path), "--output"]
    for words, told in (
        ([str(tmp_path / "o"), "--to", "lerobot", "--size", "33x24"], "--size 33x24"),
        ([str(tmp_path / "o.mp4"), "--to", "mp4"], "2 rollouts need a folder"),
        ([str(tmp_path / "o"), "--to", "mp4", "--outcome", "success"], "nothing to export"),
        ([str(tmp_path / "o"), "--to", "lerobot", "--family", "cooking"], "family 'cooking'"),
    ):
        assert main([*where, *words]) == 2
        assert told in capsys.readouterr().err
