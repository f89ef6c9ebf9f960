"""The soak benchmark's judgement: bags that lost something, growing memory and missed deadlines do not pass."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from std_msgs.msg import String

from qwen_vla_ros.bag import EpisodeBag

pytest.importorskip("rosbags")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import soak

ARMS = ["/follower_left/joint_states", "/follower_right/joint_states"]


def bag(run_dir: Path, left: int, right: int, lost: dict[str, int]) -> None:
    """A closed bag with so many messages of each arm."""
    made = EpisodeBag(run_dir / f"episode_{len(list(run_dir.glob('*'))):03d}", dict.fromkeys(ARMS, String), {})
    for topic, number in zip(ARMS, (left, right), strict=True):
        for i in range(number):
            made.write(topic, i, b"\0" * 8)
    made.close({"outcome": "success", "lost": lost})


def test_bags_are_counted_checked_and_deleted(tmp_path: Path) -> None:
    bags = soak.Bags(tmp_path)
    bag(tmp_path, 10, 11, {})
    bag(tmp_path, 20, 20, {ARMS[0]: 3})
    bags.look()
    assert bags.recorded == {ARMS[0]: 30, ARMS[1]: 31} and bags.lost == {ARMS[0]: 3}
    assert not bags.problems and not list(tmp_path.glob("episode_*"))
    bag(tmp_path, 20, 10, {})
    bags.look()
    assert len(bags.problems) == 1 and "recorded apart" in bags.problems[0]


def judged(tmp_path: Path, missed: int = 0, growth: float = 0.0, lost: int = 0) -> dict[str, Any]:
    rows = [
        {"s": s, "rss_mb": {"policy_node": 500 + growth * s / 60}, "missed": missed * s // 600}
        for s in range(0, 601, 2)
    ]
    rows = [{**row, "period_max_ms": 21.0, "period_p99_ms": 20.0} for row in rows]
    bags = soak.Bags(tmp_path)
    bags.lost.update({ARMS[0]: lost})
    bare = {"missed": 2, "worst_late_ms": 25.0}
    return soak._result(600.0, 50.0, rows, bare, {"policy_node": 60.0}, bags, [], {"policy_node": 0}, "", False)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"missed": 40}, "no_deadline_missed_beyond_the_machines_own"),
        ({"growth": 1.5}, "memory_flat"),
        ({"lost": 1}, "no_recorded_message_lost"),
    ],
)
def test_each_promise_can_be_broken(change: dict[str, Any], verdict: str, tmp_path: Path) -> None:
    assert all(judged(tmp_path, missed=4, growth=0.3)["ok"].values())
    broken = [name for name, good in judged(tmp_path, **change)["ok"].items() if not good]
    assert broken == [verdict]
