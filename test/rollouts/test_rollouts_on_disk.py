"""Episodes on disk: found, judged afterwards, read and repaired however their recorder ended."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rosbags.highlevel import AnyReader
from rosbags.typesys import Stores, get_typestore

from qwen_vla_core.cli import main
from qwen_vla_core.errors import UserError
from qwen_vla_core.rollouts.bag import BagFile
from qwen_vla_core.rollouts.index import find_rollout, find_rollouts, label, read_rollout
from qwen_vla_core.rollouts.repair import repair
from qwen_vla_core.rollouts.summary import summarise
from qwen_vla_ros.bag import EpisodeBag

STORE = get_typestore(Stores.ROS2_JAZZY)
STRING = type("String", (), {"__module__": "std_msgs.msg._string"})  # all that a bag asks of a message class
MESSAGES = [("/a" if i % 3 else "/b", 1_000_000_000 + i * 10_000_000, f"message {i} " + "x" * 2000) for i in range(600)]


def text(value: str) -> bytes:
    return bytes(STORE.serialize_cdr(STORE.types["std_msgs/msg/String"](value), "std_msgs/msg/String"))


def open_bag(folder: Path, messages: Sequence[tuple[str, int, str]] = (), **about: object) -> EpisodeBag:
    topics = sorted({"/a", "/b", "/silent", *(topic for topic, _, _ in messages)})
    bag = EpisodeBag(folder, dict.fromkeys(topics, STRING), {"instruction": "go", "embodiment": "aloha", **about})
    for topic, time_ns, value in messages:
        bag.write(topic, time_ns, text(value))
    return bag


def closed(folder: Path, messages: Sequence[tuple[str, int, str]] = MESSAGES[:20], **about: object) -> Path:
    outcome = {"outcome": about.pop("outcome", "success"), "seconds": 1.5, "lost": {"/a": 2}}
    return open_bag(folder, messages, **about).close(outcome)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two runs: three closed episodes, and one whose recorder was killed."""
    closed(tmp_path / "20250101_000" / "episode_000", instruction="pick up the red cube", seed=7)
    closed(tmp_path / "20250101_000" / "episode_001", outcome="failure", instruction="open the drawer")
    closed(tmp_path / "20250101_001" / "episode_000", outcome="aborted")
    left = open_bag(tmp_path / "20250101_001" / "episode_001", MESSAGES[:30])
    left.flush()
    left._writer.abort()  # what the kernel does for a process that dies
    return tmp_path


def test_every_episode_is_found_in_order_with_what_its_sidecar_says(root: Path) -> None:
    found = find_rollouts(root)
    assert [(r.name, r.outcome, r.partial) for r in found] == [
        ("20250101_000/episode_000", "success", False),
        ("20250101_000/episode_001", "failure", False),
        ("20250101_001/episode_000", "aborted", False),
        ("20250101_001/episode_001", "unfinished", True),
    ]
    first = found[0]
    assert (first.instruction, first.seed, first.seconds, first.messages) == ("pick up the red cube", 7, 1.5, 20)
    assert dict(first.lost) == {"/a": 2} and first.size > 40_000 and first.readable and not first.recording
    assert len(find_rollouts(root / "20250101_000")) == 2
    assert find_rollouts(first.folder) == [read_rollout(first.folder)]


def test_names_that_people_use(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("20250101_000/1", "20250101_000/episode_001", str(root / "20250101_000" / "episode_001")):
        assert find_rollout(name, root).number == 1
    monkeypatch.chdir(root / "20250101_000" / "episode_001")
    assert find_rollout(".", root).outcome == "failure"
    shutil.rmtree(root / "20250101_001" / "episode_000")
    assert find_rollout("20250101_001", root).outcome == "unfinished"
    for name, told in (("20250101_000", "2 rollouts"), ("20250101_009/0", "no such rollout")):
        with pytest.raises(UserError, match=told):
            find_rollout(name, root)
    with pytest.raises(UserError, match="no such folder"):
        find_rollouts(root / "nowhere")


def test_the_newest_that_nobody_writes_is_the_last(root: Path) -> None:
    writing = open_bag(root / "20250101_002" / "episode_000", MESSAGES[:3])
    (recording,) = find_rollouts(root / "20250101_002")
    assert recording.recording and recording.outcome == "unfinished"
    assert find_rollout("last", root).run == "20250101_001"
    with pytest.raises(UserError, match="is being recorded"):
        label(recording, "success")
    with pytest.raises(UserError, match="is being recorded"):
        repair(recording)
    writing.close({"outcome": "success"})
    assert find_rollout("last", root).run == "20250101_002"


@pytest.mark.parametrize("damage", ["", "[]", "{not json", '{"seed": "seven"}', '{"lost": 3}'])
def test_a_damaged_sidecar_is_told_and_hides_nothing_else(root: Path, damage: str) -> None:
    (root / "20250101_000" / "episode_000" / "episode.json").write_text(damage)
    found = find_rollouts(root)
    assert len(found) == 4 and "episode.json" in found[0].problem and not found[1].problem
    assert found[0].outcome == "unfinished" and found[0].readable


def test_a_label_keeps_what_was_said_before(root: Path) -> None:
    rollout = find_rollout("20250101_000/0", root)
    assert label(rollout, "partial", "dropped it", "slipped").outcome == "partial"
    again = label(rollout, note="dropped it twice", by="reviewer")
    assert (again.outcome, again.note, again.reason, again.judged_by) == (
        "partial",
        "dropped it twice",
        "slipped",
        "person",
    )
    about = json.loads((rollout.folder / "episode.json").read_text())
    assert [(e["outcome"], e["note"]) for e in about["earlier"]] == [("success", None), ("partial", "dropped it")]
    assert about["seed"] == 7
    before = (rollout.folder / "episode.json").read_bytes()
    label(rollout, "partial")  # says nothing new
    assert (rollout.folder / "episode.json").read_bytes() == before
    with pytest.raises(UserError, match="outcome 'great': use one of success, partial"):
        label(rollout, "great")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bag of 1.2 MB in three chunks, closed."""
    folder = tmp_path_factory.mktemp("whole") / "run" / "episode_000"
    bag = open_bag(folder)
    for number, (topic, time_ns, value) in enumerate(MESSAGES):
        bag.write(topic, time_ns, text(value))
        if number in (100, 350):
            bag.flush()
    bag.close({"outcome": "success"})
    return folder / "episode_000.mcap"


@settings(max_examples=40, deadline=None)
@example(share=0.580078125, noise=True)  # the zeros fill the cut chunk to its end
@given(share=st.floats(0.0, 1.0), noise=st.booleans())
def test_a_bag_cut_anywhere_gives_every_message_before_the_cut(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, share: float, noise: bool
) -> None:
    """Whatever follows the cut: nothing, or the zeros that a power failure leaves."""
    folder = tmp_path_factory.mktemp("cut") / "episode_000"
    folder.mkdir()
    content = whole.read_bytes()
    cut = int(share * len(content))
    (folder / "episode_000.mcap").write_bytes(content[:cut] + bytes(4096 * noise))
    if cut < 8:
        with pytest.raises(UserError, match="no MCAP file"):
            BagFile(folder)
        return
    with BagFile(folder) as bag:
        got = [(topic, time_ns, bag.decode(topic, data).data) for topic, time_ns, data in bag.messages()]
        assert got == MESSAGES[: len(got)] and bag.count == len(got) and not bag.whole
    if cut < len(content) - 200_000:  # in the data: at most the message that was cut is missing, and record heads
        assert len(got) >= (cut - 30_000) / 2100


def test_a_repaired_bag_is_one_that_standard_tools_open(root: Path) -> None:
    left = find_rollout("20250101_001/1", root)
    made = repair(left)
    assert (made.outcome, made.messages, made.partial) == ("aborted", 30, False) and "without closing" in made.reason
    assert not (root / "20250101_001" / ".partial").exists()
    with AnyReader([made.folder]) as reader:
        assert {c.topic: c.msgcount for c in reader.connections} == {"/a": 20, "/b": 10, "/silent": 0}
        values = [reader.deserialize(data, c.msgtype).data for c, _, data in reader.messages()]
    assert values == [value for _, _, value in MESSAGES[:30]]
    with pytest.raises(UserError, match="nothing to repair"):
        repair(made)
    assert label(made, "success").outcome == "success"


def test_what_cannot_be_repaired_says_why_and_stays(root: Path) -> None:
    left = find_rollout("20250101_001/1", root)
    (root / "20250101_001" / "episode_001").mkdir()
    with pytest.raises(UserError, match="exists already"):
        repair(left)
    (root / "20250101_001" / "episode_001").rmdir()
    left.bag.write_bytes(left.bag.read_bytes()[:100])
    with pytest.raises(UserError, match="no complete message"):
        repair(left)
    assert left.bag.exists()


def test_a_truncated_copy_in_its_final_place_is_read_as_far_as_it_goes(root: Path) -> None:
    rollout = find_rollout("20250101_000/0", root)
    rollout.bag.write_bytes(rollout.bag.read_bytes()[:-5000])
    with BagFile(rollout.folder) as bag:
        assert not bag.whole and bag.count > 10


def test_a_summary_tells_rates_and_what_was_noted(tmp_path: Path) -> None:
    start = 5_000_000_000
    story = [
        ("/ns/qwen_vla/instruction", start, "pick"),
        *(("/a", start + i * 20_000_000, "") for i in range(51)),
        ("/ns/qwen_vla/instruction", start + 600_000_000, "place"),
        ("/ns/qwen_vla/note", start + 700_000_000, "a remark"),
        ("/ns/qwen_vla/inference", start + 800_000_000, '{"ms": {"backbone": 4.0}, "seed": 3}'),
        ("/ns/qwen_vla/inference", start + 900_000_000, "from another version"),
        ("/ns/qwen_vla/outcome", start + 1_000_000_000, '{"outcome": "partial", "reason": "late"}'),
    ]
    rollout = read_rollout(closed(tmp_path / "r" / "episode_000", sorted(story, key=lambda m: m[1])))
    summary = summarise(rollout)
    rates = {rate.topic: rate for rate in summary.topics}
    assert rates["/a"].hz == 50.0 and rates["/a"].longest_gap_ms == 20.0 and rates["/silent"].longest_gap_ms is None
    assert summary.instructions == ((0.0, "pick"), (0.6, "place"))
    assert summary.seeds == 1 and summary.latency["backbone"].p50_ms == 4.0 and summary.interventions == {}
    said = [event.text for event in summary.events]
    assert said == ["instruction: pick", "instruction: place", "note: a remark", "verdict: partial (late)"]


def test_the_command_lists_filters_labels_and_repairs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*words: str, code: int = 0) -> str:
        assert main(["rollouts", *words]) == code
        out, err = capsys.readouterr()
        return out if code == 0 else err

    rows = json.loads(told("list", str(root), "--json"))
    assert [row["outcome"] for row in rows] == ["success", "failure", "aborted", "unfinished"]
    assert "red cube" in told("list", str(root)) and "1 unfinished" in told("list", str(root))
    kept = json.loads(told("list", str(root), "--json", "--outcome", "success,failure", "--instruction", "DRAWER"))
    assert [row["name"] for row in kept] == ["20250101_000/episode_001"]
    assert "--outcome great" in told("list", str(root), "--outcome", "great", code=2)
    where = ["--rollouts", str(root)]
    assert "partial (slow)" in told("label", "20250101_000/0", *where, "--outcome", "partial", "--reason", "slow")
    assert "nothing to change" in told("label", "20250101_000/0", *where, code=2)
    assert "30 messages" in told("repair", *where) and "nothing to repair" in told("repair", *where)
    assert "/silent" in told("show", "last", *where)
    assert json.loads(told("show", "20250101_000/0", *where, "--json"))["bag"]["topics"][0]["topic"] == "/a"
