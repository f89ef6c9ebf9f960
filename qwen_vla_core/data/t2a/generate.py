"""Writes the corpus: one LeRobot dataset per robot (their channels differ), block after block, resumable."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qwen_vla_core.data.contract import CONTRACT_FILE
from qwen_vla_core.data.lerobot import LeRobotDataset
from qwen_vla_core.data.lerobot.layout import read_info
from qwen_vla_core.data.lerobot.staging import STAGING
from qwen_vla_core.data.lerobot.writer import LeRobotWriter
from qwen_vla_core.data.parallel import map_episodes
from qwen_vla_core.data.t2a.checks import check
from qwen_vla_core.data.t2a.corpus import BLOCK, Block, Job, Tally, contract, make_block, source
from qwen_vla_core.data.t2a.robots import find_arm
from qwen_vla_core.data.t2a.scenes import Spec, Template
from qwen_vla_core.errors import UserError

VERIFIED = 100  # episodes per robot that are read back from disk and judged again


@dataclass
class RobotReport:
    """What became of one robot's dataset.

    Attributes:
        wanted: trajectories asked for.
        before: trajectories that were there already.
        episodes: trajectories there now.
        steps: their steps.
        templates: trajectories by template.
        tally: what this run drew.
        read_back: episodes read back from disk.
        passed: those of them that passed every check.
        faults: of the others, by fault.
    """

    wanted: int
    before: int = 0
    episodes: int = 0
    steps: int = 0
    templates: Counter[str] = field(default_factory=Counter)
    tally: Tally = field(default_factory=Tally)
    read_back: int = 0
    passed: int = 0
    faults: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """For ``--json``. Shares are of what this run drew; None when it drew nothing."""
        planned = sum(self.tally.kept.values()) + sum(self.tally.failed.values())
        drawn = planned + sum(self.tally.impossible.values())
        return {
            "episodes": self.episodes,
            "new": self.episodes - self.before,
            "steps": self.steps,
            "templates": dict(self.templates),
            "drawn": drawn,
            "redrawn_share": 1 - planned / drawn if drawn else None,
            "redrawn": dict(self.tally.impossible.most_common()),
            "check_passed_share": sum(self.tally.kept.values()) / planned if planned else None,
            "check_failed": dict(self.tally.failed.most_common()),
            "read_back": self.read_back,
            "read_back_passed": self.passed,
            "read_back_faults": dict(self.faults),
        }


def shares(count: int, robots: Sequence[str]) -> dict[str, int]:
    """Trajectories per robot: as equal as possible, the first ones get what is left over."""
    return {robot: count // len(robots) + (i < count % len(robots)) for i, robot in enumerate(robots)}


def generate(
    out: Path,
    count: int,
    robots: Sequence[str],
    templates: tuple[Template, ...],
    seed: int,
    *,
    workers: int | None = None,
    ray: bool = False,
    progress: Callable[[int], None] = lambda new: None,
) -> dict[str, RobotReport]:
    """Brings ``out/<robot>`` to its share of ``count`` trajectories; what is there already stays as it is.

    Args:
        out: folder of the datasets.
        count: trajectories of all robots together.
        robots: names of kinematic models.
        templates: in the order of ``TEMPLATES``.
        seed: of the corpus.
        workers: processes; None is all cores. The result does not depend on it.
        ray: work as a Ray Data job.
        progress: told how many trajectories were there at first, then how many new ones were written.

    Raises:
        UserError: a folder was written with other settings, or a template cannot be done by a robot.
    """
    reports = {robot: RobotReport(wanted) for robot, wanted in shares(count, robots).items() if wanted}
    writers: dict[str, LeRobotWriter] = {}
    try:
        jobs: list[Job] = []
        for robot, report in reports.items():
            root = out / robot
            report.before = report.episodes = _present(root, robot, templates, seed)
            if report.before >= report.wanted and not (root / STAGING).exists():
                continue
            writer = _open(root, robot, templates, seed)
            writers[robot] = writer
            report.before = report.episodes = writer.episodes  # with what was staged when an earlier run stopped
            blocks = range(report.before // BLOCK, -(-report.wanted // BLOCK)) if report.before < report.wanted else ()
            jobs += [Job(robot, templates, seed, block) for block in blocks]
        progress(sum(report.before for report in reports.values()))
        last = {job.robot: job for job in jobs}
        for robot in [robot for robot in writers if robot not in last]:
            writers.pop(robot).close()
        for job, block in zip(jobs, map_episodes(make_block, jobs, workers, ray, progress=False), strict=True):
            progress(_write(writers[job.robot], job, block, reports[job.robot]))
            if job == last[job.robot]:
                writers.pop(job.robot).close()
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    for robot, report in reports.items():
        _read_back(out / robot, robot, report)
    return reports


def _present(root: Path, robot: str, templates: tuple[Template, ...], seed: int) -> int:
    """Joined episodes in a folder, after making sure that they belong to this corpus."""
    sidecar = root / CONTRACT_FILE
    if not sidecar.is_file():
        return 0
    try:
        known = json.loads(sidecar.read_text(encoding="utf-8"))["source"]
        now = source(find_arm(robot), templates, seed)
        different = [key for key in ("name", "generator", "robot", "templates", "seed") if known.get(key) != now[key]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{sidecar}: damaged ({type(error).__name__}: {error}); write to another folder") from None
    if different:
        key = different[0]
        raise UserError(
            f"{root}: was written with {key} {known.get(key)!r}, now {now[key]!r}; use another --out or the same {key}"
        )
    return int(read_info(root)["total_episodes"])


def _open(root: Path, robot: str, templates: tuple[Template, ...], seed: int) -> LeRobotWriter:
    arm = find_arm(robot)
    return LeRobotWriter(root, contract(arm), family="t2a", source=source(arm, templates, seed), resume=True)


def _write(writer: LeRobotWriter, job: Job, block: Block, report: RobotReport) -> int:
    """Writes those of a block's trajectories that are wanted and not there yet; returns how many."""
    first = job.block * BLOCK
    report.tally.add(block.tally)
    new = 0
    for number, sample in enumerate(block.samples, first):
        if writer.episodes <= number < report.wanted:
            writer.add_episode(sample.episode(), [sample.text], info=sample.info())
            new += 1
    report.episodes += new
    return new


def _read_back(root: Path, robot: str, report: RobotReport) -> None:
    """Judges some episodes again as they lie on the disk, evenly over the dataset."""
    dataset, arm = LeRobotDataset(root), find_arm(robot)
    report.steps = int(np.sum(dataset.lengths))
    infos = dataset.infos
    report.templates = Counter(str(info["template"]) for info in infos)
    for i in np.unique(np.linspace(0, len(infos) - 1, min(VERIFIED, len(infos))).astype(int)):
        rows = dataset.rows(int(i))
        faults = check(arm, Spec.from_json(infos[i]["spec"]), rows.state, rows.action)
        report.read_back += 1
        report.passed += not faults
        report.faults.update(faults)


@dataclass(frozen=True)
class Clock:
    """Wall and processor time since it was made, the processor time of finished child processes included."""

    wall: float = field(default_factory=time.perf_counter)
    cpu: float = field(default_factory=lambda: _cpu_seconds())

    def read(self) -> tuple[float, float]:
        """Seconds of wall time, and of processor time."""
        return time.perf_counter() - self.wall, _cpu_seconds() - self.cpu


def _cpu_seconds() -> float:
    return sum(os.times()[:4])
