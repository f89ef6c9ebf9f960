"""Splits an episode into subtasks at grasp and release events, each with its own instruction [P].

Only numbers are needed: a gripper's command and measured opening, and, where the recorder kept them, scene snapshots
that know what is held. The paper names the two kinds of events; the finer cut around them (reach, grasp, lift, carry,
hand over, release, withdraw) and the wording are our choice [O].
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from qwen_vla_core.data.contract import DataContract
from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.errors import UserError

Kind = Literal["reach", "grasp", "lift", "carry", "hand over", "release", "withdraw"]
LIFTED = 0.05  # metres above where a thing was grasped; from there on it is carried
SQUEEZED = 0.06  # share of the opening by which a held thing keeps the fingers from where they are told to be
STILL = 0.03  # share of the opening per step below which fingers count as standing
GAP, BRIEF = 3, 2  # steps: a hold may flicker for so long; a subtask is at least so long

# {thing}: from the scene, or "the object". {arm}: " with the left arm", or nothing. {side}: "left ", or nothing.
FORMS: dict[Kind, tuple[str, ...]] = {
    "reach": ("reach for {thing}{arm}", "move the {side}gripper to {thing}", "go to {thing}{arm}"),
    "grasp": ("grasp {thing}{arm}", "close the {side}gripper on {thing}", "grip {thing}{arm}"),
    "lift": ("lift {thing}{arm}", "raise {thing}{arm}", "lift {thing} off the table{arm}"),
    "carry": ("carry {thing}{arm}", "hold {thing} up{arm}", "move {thing} through the air{arm}"),
    "hand over": ("hand {thing} over to the {side}arm", "take {thing} over{arm}", "pass {thing} to the {side}arm"),
    "release": ("release {thing}{arm}", "let go of {thing}{arm}", "open the {side}gripper to release {thing}"),
    "withdraw": ("move the {side}arm away from {thing}", "withdraw the {side}gripper", "retreat{arm}"),
}


@dataclass(frozen=True)
class Gripper:
    """A gripper's columns: name of its arm ("" for the only one), and its channel in state and action."""

    arm: str
    state: int
    action: int


@dataclass(frozen=True)
class Subtask:
    """Steps ``start`` … ``stop - 1`` of an episode: what happens, by which arm, with which thing, in words."""

    start: int
    stop: int
    kind: Kind
    arm: str
    thing: str
    instruction: str


@dataclass(frozen=True)
class _Hold:
    """One successful grasp of one gripper: closing begins, held from, opening begins, free from; and what."""

    gripper: int
    closing: int
    held: int
    opening: int
    free: int
    thing: str


def grippers(contract: DataContract) -> tuple[Gripper, ...]:
    """The grippers of a robot, from the groups of kind ``gripper``.

    Raises:
        UserError: there is none, or a gripper's channel is not in the state too.
    """
    found = []
    for group in contract.action:
        if group.kind != "gripper":
            continue
        channel = group.channels[0]
        if channel not in contract.state_channels:
            raise UserError(f"contract: gripper channel {channel} is in the actions but not in the state; add it there")
        arm = group.name.removesuffix("gripper").strip("_ ")
        found.append(Gripper(arm, contract.state_channels.index(channel), contract.action_channels.index(channel)))
    if not found:
        raise UserError("contract: no action group of kind 'gripper', so grasps and releases cannot be found")
    return tuple(found) if len(found) > 1 else (replace(found[0], arm=""),)


def split(
    rows: EpisodeRows,
    hands: Sequence[Gripper],
    scenes: Sequence[Mapping[str, Any] | str] | None = None,
    *,
    thing: str = "the object",
    seed: int = 0,
) -> list[Subtask]:
    """Subtasks that together cover the episode; empty when nothing was grasped.

    Args:
        rows: the episode.
        hands: see ``grippers``.
        scenes: T snapshots (``SceneState.to_dict``, or that as JSON text). Without them a grasp is where fingers stand
            although they are told to close further, or, where that never happens, where they are told to be closed.
        thing: name of what is grasped when no scene tells.
        seed: chooses the wordings.

    Raises:
        UserError: a scene snapshot cannot be read, or there is not one for every step.
    """
    known = None if scenes is None else [_scene(scene, t) for t, scene in enumerate(scenes)]
    if known is not None and len(known) != len(rows):
        raise UserError(f"scene: {len(known)} snapshots for {len(rows)} steps; there must be one for each")
    holds = [hold for g in range(len(hands)) for hold in _holds(rows, hands, g, known, thing)]
    if not holds:
        return []
    labels = [_label(t, holds, known) for t in range(len(rows))]
    rng = np.random.default_rng([seed, len(rows)])
    subtasks: list[Subtask] = []
    for start, stop in _runs(labels):
        kind, g, name = labels[start]
        forms, arm = FORMS[kind], hands[g].arm
        words = {"thing": name, "arm": f" with the {arm} arm" if arm else "", "side": f"{arm} " if arm else ""}
        text = forms[int(rng.integers(len(forms)))].format(**words)
        subtasks.append(Subtask(start, stop, kind, arm, name, " ".join(text.split())))
    return subtasks


def with_subtasks(rows: EpisodeRows, subtasks: Sequence[Subtask]) -> tuple[EpisodeRows, list[str]]:
    """The episode with one task per subtask, and the tasks' instructions: what a writer is given."""
    texts = list(dict.fromkeys(subtask.instruction for subtask in subtasks))
    task = np.zeros(len(rows), np.int64)
    for subtask in subtasks:
        task[subtask.start : subtask.stop] = texts.index(subtask.instruction)
    return replace(rows, task=task), texts


def _scene(scene: Mapping[str, Any] | str, t: int) -> Mapping[str, Any]:
    try:
        value = json.loads(scene) if isinstance(scene, str) else scene
        for cube in value["cubes"]:
            cube["colour"], cube["position"][2], cube["held_by"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"scene of step {t}: cannot be read ({type(error).__name__}: {error}); record it again"
        ) from None
    return dict(value)


def _holds(
    rows: EpisodeRows, hands: Sequence[Gripper], g: int, scenes: list[Mapping[str, Any]] | None, thing: str
) -> list[_Hold]:
    """Every successful grasp of one gripper, in order."""
    told, is_ = rows.action[:, hands[g].action].astype(float), rows.state[:, hands[g].state].astype(float)
    reach = float(told.max() - told.min())
    if reach < 1e-6:
        return []
    names = _held_things(scenes, hands[g].arm, len(rows)) if scenes is not None else None
    if names is not None:
        held = np.array([name is not None for name in names])
    else:
        standing = np.abs(np.diff(is_, prepend=is_[0])) < STILL * reach
        begun = is_ < is_.max() - 0.1 * reach  # fingers that have not begun to move stand too
        held = (is_ - told > SQUEEZED * reach) & standing & begun
        if not _steady(held).any():  # the command stops where the fingers meet the thing, as planners command it
            held = told < told.min() + 0.25 * reach
    holds: list[_Hold] = []
    earliest = 0
    for start, stop in _stretches(_steady(held)):
        if start < earliest or told[start] > told.max() - 0.05 * reach:
            continue  # still the same hold (a contact flickers), or touched by an open gripper
        closing = start
        while closing > earliest and told[closing - 1] < told[earliest : start + 1].max() - 0.05 * reach:
            closing -= 1
        rises = np.flatnonzero(told[start:] > np.minimum.accumulate(told[start:]) + 0.05 * reach)
        opening = start + int(rises[0]) if len(rises) else len(rows)
        free = opening
        while free < len(rows) and (free == opening or told[free] > told[free - 1] + 0.01 * reach):
            free += 1
        free = min(free + 1, len(rows))  # the fingers follow the command one step behind
        holds.append(_Hold(g, closing, start, opening, free, thing if names is None else _most(names[start:stop])))
        earliest = free
    return holds


def _held_things(scenes: list[Mapping[str, Any]], arm: str, steps: int) -> list[str | None]:
    """Name of what the arm holds at every step."""
    names: list[str | None] = [None] * steps
    for t, scene in enumerate(scenes):
        for cube in scene["cubes"]:
            if arm in cube["held_by"] or (not arm and cube["held_by"]):
                names[t] = f"the {cube['colour']} cube"
    return names


def _most(names: Sequence[str | None]) -> str:
    told = [name for name in names if name is not None]
    return max(dict.fromkeys(told), key=told.count)


def _steady(held: np.ndarray) -> np.ndarray:
    """Without gaps of up to ``GAP`` steps and without stretches shorter than ``BRIEF``."""
    filled = held.copy()
    for start, stop in _stretches(~held):
        if start > 0 and stop < len(held) and stop - start <= GAP:
            filled[start:stop] = True
    for start, stop in _stretches(filled):
        if stop - start < BRIEF:
            filled[start:stop] = False
    return filled


def _stretches(flags: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _label(t: int, holds: Sequence[_Hold], scenes: list[Mapping[str, Any]] | None) -> tuple[Kind, int, str]:
    """What is going on at a step: the most telling thing that any gripper does. Kind, gripper, thing."""
    for giver, taker in _handovers(holds):
        at_once = giver.opening < taker.held  # lets go while the other closes
        end = max(giver.free, taker.held) if at_once else giver.opening
        if min(giver.opening, taker.closing) <= t < end:
            return "hand over", taker.gripper, taker.thing
    held = [hold for hold in holds if hold.held <= t < hold.opening]
    for hold in holds:
        if hold.opening <= t < hold.free:
            return "release", hold.gripper, hold.thing
    for hold in holds:
        if hold.closing <= t < hold.held:
            return "grasp", hold.gripper, hold.thing
    if held:
        now = max(held, key=lambda hold: hold.held)
        for giver, taker in _handovers(holds):
            if taker is now and giver.free <= t:
                return "withdraw", giver.gripper, giver.thing
        return ("lift" if _is_low(t, now, scenes) else "carry"), now.gripper, now.thing
    coming = [hold for hold in holds if hold.closing > t]
    if coming:
        following = min(coming, key=lambda hold: hold.closing)
        return "reach", following.gripper, following.thing
    last = max(holds, key=lambda hold: hold.free)  # nothing is held and nothing comes, so it is over
    return "withdraw", last.gripper, last.thing


def _handovers(holds: Sequence[_Hold]) -> list[tuple[_Hold, _Hold]]:
    """(giver, taker) of every thing that one gripper closes on while another still has it, or lets go of it."""
    return [
        (giver, taker)
        for giver in holds
        for taker in holds
        if giver.gripper != taker.gripper and giver.thing == taker.thing and giver.held < taker.closing <= giver.free
    ]


def _is_low(t: int, hold: _Hold, scenes: list[Mapping[str, Any]] | None) -> bool:
    """Whether a held thing is still being lifted; without scenes the whole hold is one subtask, a lift."""
    if scenes is None:
        return True
    heights = [
        cube["position"][2]
        for scene in scenes[hold.held : t + 1]
        for cube in scene["cubes"]
        if hold.thing == f"the {cube['colour']} cube"
    ]
    return not heights or max(heights) < heights[0] + LIFTED


def _runs(labels: list[tuple[Kind, int, str]]) -> list[tuple[int, int]]:
    """(start, stop) of equal labels; a run shorter than ``BRIEF`` steps goes to the one before (or after)."""
    edges = [0, *(t for t in range(1, len(labels)) if labels[t] != labels[t - 1]), len(labels)]
    merged: list[tuple[int, int]] = []
    for start, stop in pairwise(edges):
        if merged and (stop - start < BRIEF or labels[start] == labels[merged[-1][0]]):
            merged[-1] = (merged[-1][0], stop)
        elif merged and merged[-1][1] - merged[-1][0] < BRIEF:  # a brief beginning
            merged[-1] = (merged[-1][0], stop)
            for t in range(merged[-1][0], start):
                labels[t] = labels[start]
        else:
            merged.append((start, stop))
    return merged
