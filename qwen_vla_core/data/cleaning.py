"""Which episodes a training run should not see, and why [P].

Published: corrupted frames, near-zero-variance motion, abnormal lengths, and instructions that do not match are
dropped; datasets without actions get finite differences of proprioception. Rules for each are ours [O], see
``doctor/config.py``. Nothing is deleted: a cleaned copy is written and every dropped episode is listed with its reason.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qwen_vla_core.data.contract import DataContract
from qwen_vla_core.data.dataset import ActionDataset
from qwen_vla_core.data.doctor.case import SIDES, Case, examination
from qwen_vla_core.data.doctor.checks import instructions
from qwen_vla_core.data.doctor.config import Thresholds
from qwen_vla_core.data.doctor.examine import Examination, Sketches, examine
from qwen_vla_core.data.doctor.facts import EpisodeFacts
from qwen_vla_core.data.doctor.language import contradict, empty, mismatch
from qwen_vla_core.data.parallel import map_episodes
from qwen_vla_core.data.pseudo_actions import sources_of
from qwen_vla_core.data.sketch import QuantileSketch
from qwen_vla_core.embodiment.spec import Embodiment
from qwen_vla_core.errors import UserError

REPORT = "meta/cleaning.json"
# reason → what it means; the order is the order in which an episode is judged, so that it has exactly one reason
REASONS: dict[str, str] = {
    "unreadable": "rows cannot be read",
    "too_short": "no rows, or too few",
    "not_finite": "NaN or infinity in state or action",
    "unknown_task": "points to an instruction that does not exist",
    "corrupted_frames": "pictures missing, undecodable, blank or frozen [P]",
    "no_motion": "near-zero-variance motion [P]",
    "abnormal_length": "much longer or shorter than its like [P]",
    "mismatch": "the instruction is empty, does not fit the motion, or contradicts another one for it [P]",
    "duplicate": "repeats the rows and the instruction of an earlier episode [O]",
}


@dataclass(frozen=True)
class Drop:
    """An episode that is left out.

    Attributes:
        episode: its number in the source.
        reason: a key of ``REASONS``.
        detail: the numbers behind it.
    """

    episode: int
    reason: str
    detail: str


def judge(case: Case) -> list[Drop]:
    """Every episode to drop, with its first reason, in order."""
    odd, wrong, copies = _abnormal_lengths(case), _mismatches(case), _copies(case)
    limits = case.thresholds
    drops = []
    for facts in case.facts:
        bad = [
            f"{side} {channels[hit.column].name} row {hit.first}"
            for side, channels in (("state", case.work.state), ("action", case.work.action))
            for hit in facts.not_finite.get(side, [])
        ]
        checks = {
            "unreadable": facts.error,
            "too_short": "" if facts.length >= limits.shortest else f"{facts.length} rows",
            "not_finite": ", ".join(bad),
            "unknown_task": f"row {facts.unknown_tasks[0]}" if facts.unknown_tasks else "",
            "corrupted_frames": _corrupted(facts, limits),
            "no_motion": ""
            if facts.spread >= limits.no_motion
            else f"largest deviation {facts.spread:.2g} full scales",
            "abnormal_length": odd.get(facts.episode, ""),
            "mismatch": wrong.get(facts.episode, ""),
            "duplicate": copies.get(facts.episode, "") if limits.drop_duplicates else "",
        }
        reason = next((name for name in REASONS if checks[name]), None)
        if reason:
            drops.append(Drop(facts.episode, reason, checks[reason]))
    return drops


def examine_resumably(
    dataset: ActionDataset,
    robot: Embodiment | None,
    thresholds: Thresholds,
    pictures: int | None,
    notes: Path | None,
    workers: int | None = None,
    ray: bool = False,
    progress: bool = True,
) -> Case:
    """``examine_all`` without the sketches, noting every finished episode in a file and going on from it.

    Args:
        dataset: see ``examine_all``.
        robot: see there.
        thresholds: see there.
        pictures: see there.
        notes: JSON lines; notes of other content or other thresholds are started anew. None keeps none.
        workers: see there.
        ray: see there.
        progress: see there.

    Raises:
        UserError: the notes cannot be written.
    """
    work = examination(dataset, robot, thresholds, pictures)
    key = _key(work)
    known = _read_notes(notes, key) if notes else {}
    left = [episode for episode in range(len(dataset.lengths)) if episode not in known]
    if notes and left:
        lines = [json.dumps({"key": key}), *(json.dumps(known[episode].to_json()) for episode in sorted(known))]
        _note(notes, lines, "w")
    for facts in map_episodes(partial(_facts, work), left, workers, ray, progress, "examine"):
        known[facts.episode] = facts
        if notes:
            _note(notes, [json.dumps(facts.to_json())], "a")
    ordered = [known[episode] for episode in range(len(dataset.lengths))]
    none: Sketches = {side: [QuantileSketch() for _ in work.channels(side)] for side in SIDES}
    return Case(work, ordered, none, robot)


def report(case: Case, drops: Sequence[Drop], **more: Any) -> dict[str, Any]:
    """What was dropped and why, as plain JSON."""
    dataset = case.dataset
    steps = int(sum(int(dataset.lengths[drop.episode]) for drop in drops))
    return {
        "dataset": dataset.name,
        "content_hash": dataset.content_hash(),
        "episodes": len(dataset.lengths),
        "kept": len(dataset.lengths) - len(drops),
        "steps": int(np.sum(dataset.lengths)),
        "steps_dropped": steps,
        "by_reason": dict(Counter(drop.reason for drop in drops)),
        "dropped": [asdict(drop) for drop in drops],
        "thresholds": asdict(case.thresholds),
        **more,
    }


def cleaned_contract(contract: DataContract, robot: Embodiment | None, make_actions: bool) -> DataContract:
    """Contract of the cleaned copy.

    Args:
        contract: the source's.
        robot: says what the actions are where the source has none.
        make_actions: whether actions are made from the states.

    Raises:
        UserError: the source has no actions and no robot says what they should be, or they cannot be made.
    """
    if not make_actions:
        return contract
    if not contract.action:
        if robot is None:
            raise UserError(
                "the dataset has no actions: give --embodiment, whose action groups say what to make of them"
            )
        wanted = DataContract.of(robot)
        contract = replace(contract, action=wanted.action, convention=wanted.convention)
    sources_of(contract)  # fails before hours of work
    return contract


def _facts(work: Examination, episode: int) -> EpisodeFacts:
    return examine(work, episode)[0]


def _key(work: Examination) -> str:
    """Identifies what was examined and how."""
    how = [
        work.dataset.content_hash(),
        asdict(work.thresholds),
        [asdict(c) for c in (*work.state, *work.action)],
        work.pictures,
    ]
    return hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()


def _note(path: Path, lines: Sequence[str], mode: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode) as file:
            file.writelines(line + "\n" for line in lines)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); make room and run again") from None


def _read_notes(path: Path, key: str) -> dict[int, EpisodeFacts]:
    """Episodes that were examined already; half a line, as a killed run leaves it, counts for nothing."""
    known: dict[int, EpisodeFacts] = {}
    try:
        lines = path.read_text().splitlines()
        if not lines or json.loads(lines[0])["key"] != key:
            return known
        for line in lines[1:]:
            facts = EpisodeFacts.from_json(json.loads(line))
            known[facts.episode] = facts
    except (OSError, KeyError, TypeError, ValueError):
        pass
    return known


def _corrupted(facts: EpisodeFacts, limits: Thresholds) -> str:
    for view in facts.views:
        if view.error:
            return f"{view.view}: {view.error}"
        still = sum(stop - start for start, stop in view.frozen)
        if view.looked and (view.blank_total + still) / view.looked > limits.corrupted_share:
            return f"{view.view}: {view.blank_total} blank and {still} frozen of {view.looked} pictures"
    return ""


def _abnormal_lengths(case: Case) -> dict[int, str]:
    """Lengths far from the median of their like, by a robust rule on logarithms.

    Their like are the episodes of the same first instruction if there are enough, else all of the dataset: reaching and
    folding a shirt differ rightly. A length must be beyond k robust deviations and off by a factor, so that a dataset
    of equal lengths (MAD 0) keeps an episode that is a step longer.
    """
    limits = case.thresholds
    groups: dict[int, list[EpisodeFacts]] = defaultdict(list)
    usable = [facts for facts in case.facts if facts.length > 0 and not facts.error]
    for facts in usable:
        groups[facts.segments[0].task].append(facts)
    small = [group for group in groups.values() if len(group) < limits.length_episodes]
    found: dict[int, str] = {}
    for members, like, name in (
        *((g, g, "its instruction") for g in groups.values() if len(g) >= limits.length_episodes),
        *((g, usable, "the dataset") for g in small if len(usable) >= limits.length_episodes),
    ):
        logs = np.log([facts.length for facts in like])
        median = float(np.median(logs))
        deviation = 1.4826 * float(np.median(np.abs(logs - median)))
        for facts in members:
            off = abs(math.log(facts.length) - median)
            if off > limits.length_deviations * deviation and off > math.log(limits.length_factor):
                found[facts.episode] = f"{facts.length} rows, the median of {name} is {math.exp(median):.0f}"
    return found


def _mismatches(case: Case) -> dict[int, str]:
    found: dict[int, str] = {}
    for facts in case.facts:
        for segment in facts.segments:
            text = case.instruction(segment.task)
            if empty(text):
                found.setdefault(facts.episode, f"rows {segment.start}–{segment.stop - 1}: instruction {text!r}")
            elif reason := mismatch(case, segment, len(facts.segments) == 1):
                found.setdefault(facts.episode, f"{text!r} {reason}")
    for group in _twins(case):
        for a in group:
            for b in group:
                if a is not b and contradict(instructions(case, a), instructions(case, b)):
                    found.setdefault(a.episode, f"same motion as episode {b.episode}: {instructions(case, b)!r}")
    return found


def _copies(case: Case) -> dict[int, str]:
    """Later copies with the same rows and the same words; other words for the same motion are worth keeping."""
    found: dict[int, str] = {}
    for group in _twins(case):
        first: dict[str, int] = {}
        for facts in group:
            original = first.setdefault(instructions(case, facts), facts.episode)
            if original != facts.episode:
                found[facts.episode] = f"same rows and instruction as episode {original}"
    return found


def _twins(case: Case) -> Iterator[list[EpisodeFacts]]:
    """Groups of episodes with equal rows."""
    groups: dict[str, list[EpisodeFacts]] = defaultdict(list)
    for facts in case.facts:
        if facts.digest:
            groups[facts.digest].append(facts)
    return (group for group in groups.values() if len(group) > 1)
