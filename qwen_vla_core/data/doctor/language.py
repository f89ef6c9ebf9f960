"""What an instruction says about motion, read with plain rules [O]: which arm, whether a gripper must move.

Rules miss much and that is meant: a finding must be worth reading. A sentence is judged only where it names an arm or a
gripper outright; what cannot be told from words alone is left to people.
"""

from __future__ import annotations

import re

from qwen_vla_core.data.doctor.case import Case
from qwen_vla_core.data.doctor.facts import Segment
from qwen_vla_core.data.doctor.findings import Finding, Place, finding, many

_ARM = re.compile(r"\b(left|right)[\s-]+(?:robot(?:ic)?\s+)?(?:arm|hand|gripper|manipulator|claw)s?\b")
_OPEN_CLOSE = re.compile(r"\b(?:open|close|clos|releas|release)(?:s|es|ing|d|ed)?\b[^.;]*\b(?:gripper|claw|finger)s?\b")
_GRASP = re.compile(r"\b(?:grasp|grab|pick(?:s|ing)? up)\b")
_PLACEHOLDERS = frozenset({"", "none", "null", "nan", "n/a", "na", "todo", "tbd", "unknown", "default", "task"})
# Words of one class exclude each other in the same place of a sentence.
_CLASSES: tuple[frozenset[str], ...] = tuple(
    frozenset(words.split())
    for words in (
        "left right",
        "open close",
        "up down",
        "push pull",
        "on off",
        "into from",
        "front back behind",
        "upper lower top bottom",
        "first second third",
        "one two three four five six",
        "red green blue yellow orange purple pink black white brown grey gray",
    )
)


def named_arms(text: str) -> set[str]:
    """Arms that a sentence names as the ones to use: ``the left drawer`` names none."""
    return set(_ARM.findall(text.lower()))


def moves_gripper(text: str) -> bool:
    """Whether the sentence says outright that a gripper opens or closes."""
    return bool(_OPEN_CLOSE.search(text.lower()))


def empty(text: str) -> bool:
    """Whether a sentence says nothing."""
    return text.strip().strip(".").lower() in _PLACEHOLDERS


def contradict(a: str, b: str) -> bool:
    """Whether two sentences exclude each other by words of one class: left and right, open and close, colours, …"""
    words = [set(re.findall(r"[a-z]+", text.lower())) for text in (a, b)]
    return any((words[0] & these) != (words[1] & these) and words[0] & these and words[1] & these for these in _CLASSES)


def mismatch(case: Case, segment: Segment, whole: bool) -> str:
    """Why the motion of a segment is not what its instruction says; empty where it may be.

    Args:
        case: for the instruction and the thresholds.
        segment: rows with one instruction.
        whole: whether the segment is the whole episode: only then must picking up include a moving gripper.
    """
    text = case.instruction(segment.task)
    arms, grippers, limits = segment.arms, segment.grippers, case.thresholds
    moved = {
        side: max(arms.get(side, 0.0) / limits.arm_moves, grippers.get(side, 0.0) / limits.gripper_moves)
        for side in {*arms, *grippers}
    }
    named = named_arms(text)
    if len(named) == 1 and {"left", "right"} <= set(moved):
        (arm,) = named
        other = "right" if arm == "left" else "left"
        if moved[arm] < 1 <= moved[other]:
            return f"names the {arm} arm, but only the {other} one moves"
    if not grippers:
        return ""
    wanted = [span for side, span in grippers.items() if not named or side in named] or list(grippers.values())
    if max(wanted) < limits.gripper_moves:
        if moves_gripper(text):
            return "says that a gripper opens or closes, but none moves"
        if whole and _GRASP.search(text.lower()):
            return "says to grasp something, but no gripper moves"
    return ""


def check_language(case: Case) -> list[Finding]:
    """Instructions that say nothing, and motions that are not what the instruction says."""
    silent, wrong = [], []
    for facts in case.facts:
        for segment in facts.segments:
            rows = (segment.start, segment.stop)
            if empty(case.instruction(segment.task)) and 0 <= segment.task < len(case.dataset.tasks):
                silent.append(Place(facts.episode, rows, note=repr(case.instruction(segment.task))))
            elif reason := mismatch(case, segment, len(facts.segments) == 1):
                wrong.append(Place(facts.episode, rows, note=f"{case.instruction(segment.task)!r} {reason}"))
    found = []
    if silent:
        found.append(
            finding(
                "empty_instruction",
                "error",
                f"{many(len(silent), 'stretch', 'stretches')} with an instruction that says nothing",
                "write what the robot does there into the tasks file, or leave the episodes out",
                silent,
            )
        )
    if wrong:
        found.append(
            finding(
                "instruction_motion",
                "warning",
                f"{many(len(wrong), 'instruction')} against the motion: {wrong[0].note}",
                "look at the pictures and correct the instruction, or drop the episodes with `qwen-vla data clean`",
                wrong,
            )
        )
    return found
