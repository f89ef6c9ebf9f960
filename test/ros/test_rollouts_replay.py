"""A recorded episode goes through the real policy node again: bit-identical, or it is said what is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rclpy
from graph_support import DEMO_INSTRUCTION, Demo, Watcher
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore
from trajectory_msgs.msg import JointTrajectory

from qwen_vla_core.cli import main
from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import Committed, Observation
from qwen_vla_core.rollouts.bag import BagFile
from qwen_vla_core.rollouts.index import find_rollout
from qwen_vla_core.rollouts.summary import summarise
from qwen_vla_ros.inference_log import Held, InferenceRecord, input_digests, noise_of
from qwen_vla_ros.node_utils import CHUNK_TOPIC, COMMAND_QOS, INFERENCE_TOPIC
from qwen_vla_ros.rollouts.film import film
from qwen_vla_ros.rollouts.replay import replay

Change = Callable[[str, bytes, int], bytes | None]


def edited(demo: Demo, folder: Path, change: Change) -> Path:
    """A copy of the demo's episode; ``change(topic, message, number on its topic)`` may alter or drop messages."""
    source, path = demo.run / "episode_000", folder / "run" / "episode_000"
    store, numbers = get_typestore(Stores.ROS2_JAZZY), dict[str, int]()
    with BagFile(source) as bag, Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connections = {t.name: writer.add_connection(t.name, t.type, typestore=store) for t in bag.topics.values()}
        for topic, time_ns, data in bag.messages():
            numbers[topic] = numbers.get(topic, -1) + 1
            new = change(topic, bytes(data), numbers[topic])
            if new is not None:
                writer.write(connections[topic], time_ns, new)
    shutil.copy(source / "episode.json", path / "episode.json")
    return path


def records(demo: Demo) -> int:
    """Inference records of the episode, one for each chunk. The chunk does not wait for it: where the episode ends
    between the two, the last chunk is alone.
    """
    count = demo.count(INFERENCE_TOPIC)
    assert demo.count(CHUNK_TOPIC) - count in (0, 1) and count >= 1
    return count


def test_every_input_and_every_chunk_is_bit_identical(
    demo: Demo, watcher: Watcher, capsys: pytest.CaptureFixture[str]
) -> None:
    heard = watcher.listen(JointTrajectory, CHUNK_TOPIC, COMMAND_QOS)
    assert main(["rollouts", "replay", str(demo.run / "episode_000"), "--strict", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["chunks"] == records(demo)
    assert result["inputs_identical"] == result["outputs_identical"] == result["outputs_compared"] == result["chunks"]
    assert result["output_max_difference"] == 0.0
    assert result["chunks_without_record"] == demo.count(CHUNK_TOPIC) - result["chunks"]
    watcher.executor.spin_once(timeout_sec=0.2)
    assert not heard, "a replay was heard by whoever drives the robot"


def one_pixel(topic: str, data: bytes, number: int) -> bytes:
    changed = bytearray(data)
    if topic.startswith("/cam_high"):
        changed[len(data) // 2] ^= 1
    return bytes(changed)


def one_joint(topic: str, data: bytes, number: int) -> bytes:
    changed = bytearray(data)
    if topic == "/follower_right/joint_states":
        changed[-16] ^= 1  # the last bit of the last position: velocities and efforts are empty lists
    return bytes(changed)


def cut_short(topic: str, data: bytes, number: int) -> bytes:
    return data[:40] if topic == "/follower_right/joint_states" else data


def another_word(topic: str, data: bytes, number: int) -> bytes:
    return data.replace(b"red", b"RED") if topic.endswith("/instruction") else data


@pytest.mark.parametrize(("change", "part"), [(one_pixel, "ego"), (one_joint, "state")])
def test_one_bit_of_the_recording_is_seen(demo: Demo, tmp_path: Path, change: Change, part: str) -> None:
    result = replay(find_rollout(str(edited(demo, tmp_path, change))), inputs_only=True)
    assert {chunk.different for chunk in result.chunks} == {(part,)}


def test_a_damaged_message_is_named(demo: Demo, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="message on /follower_right/joint_states cannot be read"):
        replay(find_rollout(str(edited(demo, tmp_path, cut_short))), inputs_only=True)


def test_what_is_missing_from_the_bag_is_counted_and_fails(
    demo: Demo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def drop(topic: str, data: bytes, number: int) -> bytes | None:
        return None if topic.startswith("/cam_left_wrist") else data

    path = edited(demo, tmp_path, drop)
    assert main(["rollouts", "replay", str(path), "--inputs-only", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["messages_missing"] > 0 and len(result["different"]) == result["chunks"]
    assert all("no image received on /cam_left_wrist" in row["held"] for row in result["different"])
    assert main(["rollouts", "replay", str(path), "--inputs-only"]) == 1
    assert "held are not in the bag" in capsys.readouterr().out


def test_a_word_that_was_never_said_is_no_secret(demo: Demo, tmp_path: Path) -> None:
    result = replay(find_rollout(str(edited(demo, tmp_path, another_word))), inputs_only=True)
    assert sum(chunk.missing for chunk in result.chunks) >= 1  # the sentence of the records is not in the bag


def test_a_chunk_without_its_record_is_counted(demo: Demo, tmp_path: Path) -> None:
    last = records(demo) - 1

    def drop(topic: str, data: bytes, number: int) -> bytes | None:
        return None if topic.endswith("/inference") and number == last else data

    result = replay(find_rollout(str(edited(demo, tmp_path, drop))), inputs_only=True).to_json()
    assert result["inputs_identical"] == result["chunks"] == last
    assert result["chunks_without_record"] == demo.count(CHUNK_TOPIC) - last


def test_without_records_there_is_nothing_to_compare(demo: Demo, tmp_path: Path) -> None:
    def drop(topic: str, data: bytes, number: int) -> bytes | None:
        return None if topic.endswith("/inference") else data

    with pytest.raises(UserError, match=r"no message on qwen_vla/inference \(it has \d+ chunks\)"):
        replay(find_rollout(str(edited(demo, tmp_path, drop))), inputs_only=True)
    assert not rclpy.ok()


def test_other_weights_compare_inputs_alone(demo: Demo, tmp_path: Path) -> None:
    result = replay(find_rollout(str(demo.run / "episode_000")), checkpoint="generalist").to_json()
    assert result["inputs_identical"] == result["chunks"] and result["outputs_compared"] == 0
    assert "recorded with checkpoint 'random-tiny" in result["outputs_not_compared_because"]


def test_show_knows_what_the_policy_and_the_controller_did(demo: Demo, capsys: pytest.CaptureFixture[str]) -> None:
    rollout = find_rollout(str(demo.run / "episode_000"))
    summary = summarise(rollout)
    assert summary.chunks == demo.count(CHUNK_TOPIC)
    assert summary.latency["observation_to_chunk"].count == summary.seeds == records(demo)
    assert summary.interventions["limited.soft_start"] > 0  # it does so in every episode
    said = [event.text for event in summary.events]
    assert f"instruction: {DEMO_INSTRUCTION}" in said and any(text.startswith("running") for text in said)
    assert main(["rollouts", "show", str(rollout.folder)]) == 0
    told = capsys.readouterr().out
    assert "/cam_high/camera/color/image_rect_raw" in told and "interventions of the controller: limited" in told


def test_the_film_is_one_that_browsers_play(demo: Demo, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    rollout = find_rollout(str(demo.run / "episode_000"))
    count = film(rollout, tmp_path / "film.mp4", fps=5, height=96)
    with av.open(str(tmp_path / "film.mp4")) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    assert len(frames) == count >= 12 and frames[0].shape == (96 + 28, 3 * 128, 3)
    assert np.abs(frames[0].astype(int) - frames[-1]).mean() > 0.5  # something moves
    assert sorted(p.name for p in tmp_path.iterdir()) == ["film.mp4"]
    for bad, told in (({"views": ["nose"]}, "view 'nose'"), ({"fps": 0}, "fps 0")):
        with pytest.raises(UserError, match=told):
            film(rollout, tmp_path / "film.mp4", **bad)
    with pytest.raises(UserError, match="no camera sent a picture"):
        silent = edited(demo, tmp_path, lambda topic, data, _: None if topic.startswith("/cam") else data)
        film(find_rollout(str(silent)), tmp_path / "none.mp4")


def test_a_record_survives_its_text_and_digests_know_every_part() -> None:
    record = InferenceRecord(
        *(10**18 + 5, 10**18 + 9, 10**18 + 20, 0, "tu's", "aloha", "tiny 12", "guided"),
        cameras={"ego": (10**18, 10**18 + 33_000_000)},
        states={"arm": ()},
        held=Held(0.125, (10**18 - 4, 10**18), True),
        seed=2**47 + 1,
        flow_steps=4,
        inputs={"ego": "aa"},
        chunk="bb",
        ms={"backbone": 1.5},
    )
    assert InferenceRecord.from_text(record.to_text()) == record
    assert InferenceRecord.from_text(replace(record, held=None, seed=None).to_text()).held is None
    for text in ("", "[]", "{}", '{"version": 99}', record.to_text().replace('"seed"', '"seeds"')):
        with pytest.raises(ValueError):
            InferenceRecord.from_text(text)

    picture = np.zeros((4, 6, 3), np.uint8)
    seen = Observation({"ego": picture}, np.zeros(2), "go", 7)
    plan = Committed(np.zeros((2, 3)), 1)
    before = input_digests(seen, "aloha", plan, 0)
    other = picture.copy()
    other[3, 5, 2] = 1
    changed = {
        "ego": input_digests(replace(seen, images={"ego": other}), "aloha", plan, 0),
        "state": input_digests(replace(seen, state=np.array([0.0, -0.0])), "aloha", plan, 0),
        "question": input_digests(replace(seen, stamp_ns=8), "aloha", plan, 0),
        "committed": input_digests(seen, "aloha", replace(plan, frozen=2), 0),
    }
    for part, after in changed.items():
        assert [key for key in before if before[key] != after[key]] == [part]
    assert input_digests(replace(seen, images={"ego": other[:, ::-1][:, ::-1]}), "aloha", plan, 0) == changed["ego"]
    np.testing.assert_array_equal(noise_of(5, (3, 4)), noise_of(5, (3, 4)))
    assert noise_of(5, (3, 4)).dtype == np.float32 and not np.array_equal(noise_of(5, (3, 4)), noise_of(6, (3, 4)))
