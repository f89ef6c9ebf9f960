"""Checks of files, clocks and copies: what is wrong whatever the numbers mean."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from scipy.spatial import cKDTree

from qwen_vla_core.data.doctor.case import Case
from qwen_vla_core.data.doctor.facts import EpisodeFacts
from qwen_vla_core.data.doctor.findings import Finding, Place, finding, many
from qwen_vla_core.data.doctor.language import contradict


def check_contract(case: Case) -> list[Finding]:
    """The dataset against the robot: channels, convention, rate, views."""
    found: list[Finding] = []
    own = case.contract
    if case.robot is None:
        return found
    robot = case.robot
    for side, has, wants in (
        ("state", own.state_channels, robot.state_channels),
        ("action", own.action_channels, robot.channels),
    ):
        if has == wants:
            continue
        missing, extra = [n for n in wants if n not in has], [n for n in has if n not in wants]
        how = "; ".join(
            text
            for text in (
                f"missing: {', '.join(missing)}" if missing else "",
                f"unknown: {', '.join(extra)}" if extra else "",
                "" if missing or extra else "the same channels in another order",
            )
            if text
        )
        found.append(
            finding(
                "dimensions",
                "error",
                f"{side} has {len(has)} channels, {robot.name} has {len(wants)} ({how})",
                "convert the corpus with this embodiment, or give the doctor the YAML of the robot that recorded it",
                numbers={"dataset": list(has), "embodiment": list(wants)},
                side=side,
            )
        )
    if own.convention != robot.control.convention:
        found.append(
            finding(
                "convention",
                "error",
                f"actions are {own.convention}, {robot.name} expects {robot.control.convention}",
                "set control.convention in the YAML to what the actions are, or convert them",
            )
        )
    absent = [view for view in robot.views if view not in case.dataset.views]
    if absent:
        found.append(
            finding(
                "missing_views",
                "error",
                f"no pictures of {', '.join(absent)}; the dataset has {', '.join(case.dataset.views) or 'none'}",
                "name the views as in the embodiment's cameras when converting, or record them",
                numbers={"missing": absent, "present": list(case.dataset.views)},
            )
        )
    return found


def check_rows(case: Case) -> list[Finding]:
    """Episodes without rows, with unreadable rows, or with a task that does not exist."""
    found: list[Finding] = []
    unreadable = [facts for facts in case.facts if facts.error]
    if unreadable:
        found.append(
            finding(
                "unreadable_rows",
                "error",
                f"{many(len(unreadable), 'episode')} cannot be read; the first: {unreadable[0].error}",
                "write these files again from the source, or leave the episodes out with `qwen-vla data clean`",
                [Place(facts.episode, note=facts.error) for facts in unreadable],
            )
        )
    empty = [facts.episode for facts in case.facts if not facts.length]
    if empty:
        found.append(
            finding(
                "zero_length",
                "error",
                f"no rows in {many(len(empty), 'episode')}",
                "leave them out with `qwen-vla data clean`",
                [Place(episode) for episode in empty],
            )
        )
    lost = [facts for facts in case.facts if facts.unknown_tasks]
    if lost:
        found.append(
            finding(
                "unknown_task",
                "error",
                f"{many(len(lost), 'episode')} with a task that is not among the {len(case.dataset.tasks)} of the list",
                "add the missing instructions to the tasks file, or convert the corpus again",
                [Place(f.episode, (f.unknown_tasks[0], f.unknown_tasks[0] + 1)) for f in lost],
            )
        )
    return found


def check_clock(case: Case) -> list[Finding]:
    """Time that goes back, gaps, and another rate than the one that is stated."""
    found: list[Finding] = []
    backward = [facts for facts in case.facts if facts.backward]
    if backward:
        rows = sum(len(facts.backward) for facts in backward)
        found.append(
            finding(
                "time_not_increasing",
                "error",
                f"time stands still or goes back at {many(rows, 'row')} of {many(len(backward), 'episode')}",
                "sort the rows by capture time and drop repeated ones, then write the episodes again",
                [Place(f.episode, (row, row + 1)) for f in backward for row in f.backward],
                {"rows": rows},
            )
        )
    gaps = sorted(((s, f.episode, row) for f in case.facts for row, s in f.gaps), reverse=True)
    if gaps:
        found.append(
            finding(
                "time_gaps",
                "warning",
                f"{many(len(gaps), 'gap')}, the longest {gaps[0][0]:.3g} s where {1 / case.dataset.fps:.3g} s was due",
                "split the episodes at the gaps, or resample state, action and pictures to an even rate",
                [Place(episode, (row, row + 2), note=f"{seconds:.3g} s") for seconds, episode, row in gaps],
                {"gaps": len(gaps), "longest_s": gaps[0][0]},
            )
        )
    expected = 1.0 / case.dataset.fps
    wrong = [
        facts
        for facts in case.facts
        if facts.period_s is not None and abs(facts.period_s / expected - 1) > case.thresholds.period_tolerance
    ]
    if wrong:
        measured = float(np.median([1.0 / facts.period_s for facts in wrong if facts.period_s]))
        found.append(
            finding(
                "wrong_rate",
                "error",
                f"timestamps of {many(len(wrong), 'episode')} say {measured:.4g} Hz, "
                f"the dataset says {case.dataset.fps:g} Hz",
                "state the true fps when converting, or resample to the stated one",
                [Place(f.episode, note=f"{1 / f.period_s:.4g} Hz") for f in wrong if f.period_s],
                {"measured_hz": measured, "stated_hz": case.dataset.fps},
            )
        )
    wanted = case.robot.control.frequency_hz if case.robot else case.contract.frequency_hz
    if abs(case.dataset.fps / wanted - 1) > case.thresholds.period_tolerance and not wrong:
        found.append(
            finding(
                "wrong_rate",
                "error",
                f"the dataset runs at {case.dataset.fps:g} Hz, its prompt would say {wanted:g} Hz",
                "resample the dataset, or set control.frequency_hz in the YAML to the dataset's rate",
                numbers={"stated_hz": case.dataset.fps, "prompt_hz": wanted},
            )
        )
    return found


def check_pictures(case: Case) -> list[Finding]:
    """Pictures that are not there, show nothing, or stand still while the robot moves."""
    found: list[Finding] = []
    seen = [(facts, view) for facts in case.facts for view in facts.views]
    looked = sum(view.looked for _, view in seen)
    missing = [(facts, view) for facts, view in seen if view.error]
    if missing:
        found.append(
            finding(
                "missing_frames",
                "error",
                f"pictures cannot be read in {many(len(missing), 'video')}; the first: {missing[0][1].error}",
                "write the videos again from the source, or leave the episodes out with `qwen-vla data clean`",
                [Place(facts.episode, view=view.view, note=view.error) for facts, view in missing],
            )
        )
    blank = [(facts, view) for facts, view in seen if view.blank_total]
    if blank:
        total = sum(view.blank_total for _, view in blank)
        colour = "black" if all(view.black for _, view in blank) else "one even colour"
        found.append(
            finding(
                "blank_frames",
                "error",
                f"{total} of {looked} pictures are {colour}, in {many(len(blank), 'video')}",
                "check the camera and its cable; leave the episodes out with `qwen-vla data clean`",
                [
                    Place(facts.episode, (view.blank[0], view.blank[-1] + 1), view.view, f"{view.blank_total} pictures")
                    for facts, view in blank
                ],
                {"pictures": total, "looked": looked},
            )
        )
    frozen = sorted(
        ((stop - start, facts.episode, start, stop, view.view) for facts, view in seen for start, stop in view.frozen),
        reverse=True,
    )
    if frozen:
        found.append(
            finding(
                "frozen_frames",
                "warning",
                f"{many(len(frozen), 'time')} a picture stays the same while the robot moves, "
                f"once for {frozen[0][0]} rows",
                "check that frames are stored with their own time (the camera may have dropped out)",
                [Place(episode, (start, stop), view) for _, episode, start, stop, view in frozen],
                {"runs": len(frozen), "longest_rows": frozen[0][0]},
            )
        )
    return found


def check_duplicates(case: Case) -> list[Finding]:
    """Episodes that occur twice, by rows or by pictures, and the same motion under instructions that contradict."""
    found: list[Finding] = []
    groups: dict[str, list[EpisodeFacts]] = defaultdict(list)
    for facts in case.facts:
        if facts.digest:
            groups[facts.digest].append(facts)
    copies: list[list[EpisodeFacts]] = []
    against: list[tuple[EpisodeFacts, EpisodeFacts]] = []
    for group in groups.values():
        clash = next(
            (
                (a, b)
                for i, a in enumerate(group)
                for b in group[i + 1 :]
                if contradict(instructions(case, a), instructions(case, b))
            ),
            None,
        )
        if clash:
            against.append(clash)
        elif len(group) > 1:
            copies.append(group)
    if against:
        first = against[0]
        found.append(
            finding(
                "contradicting_instructions",
                "error",
                f"{many(len(against), 'motion')} under contradicting instructions: "
                f"{instructions(case, first[0])!r} and {instructions(case, first[1])!r}",
                "find out which instruction is right and drop the other episode",
                [Place(facts.episode, note=instructions(case, facts)) for pair in against for facts in pair],
            )
        )
    if copies:
        extra = sum(len(group) - 1 for group in copies)
        found.append(
            finding(
                "duplicate_rows",
                "warning",
                f"states and actions of {many(extra, 'episode')} (of {len(case.facts)}) repeat those of another one",
                "keep one of each: `qwen-vla data clean` drops the later ones",
                [Place(f.episode, note=f"as episode {group[0].episode}") for group in copies for f in group[1:]],
                {"groups": [[facts.episode for facts in group] for group in copies]},
            )
        )
    pairs = _same_pictures(case)
    if pairs:
        found.append(
            finding(
                "duplicate_frames",
                "error",
                f"{many(len(pairs), 'pair')} of episodes with the same pictures, but different states and actions",
                "pictures were copied to the wrong episode; convert these episodes again",
                [Place(b, note=f"pictures of episode {a}") for a, b in pairs],
                {"pairs": [list(pair) for pair in pairs[:100]]},
            )
        )
    return found


def instructions(case: Case, facts: EpisodeFacts) -> str:
    """All instructions of an episode in order."""
    return "; ".join(case.instruction(segment.task) for segment in facts.segments)


def _same_pictures(case: Case) -> list[tuple[int, int]]:
    """Episodes of one length whose pictures agree in every view, though their rows differ."""
    buckets: dict[tuple[int, tuple[str, ...]], list[EpisodeFacts]] = defaultdict(list)
    for facts in case.facts:
        usable = facts.views and all(v.signature and not v.blank_total and not v.frozen for v in facts.views)
        if usable and facts.travel > case.thresholds.frozen_travel:
            buckets[facts.length, tuple(view.view for view in facts.views)].append(facts)
    pairs = []
    for bucket in buckets.values():
        levels = np.array(
            [np.frombuffer(bytes.fromhex("".join(v.signature for v in f.views)), np.uint8) for f in bucket]
        )
        for a, b in close_pairs(levels, case.thresholds.same_picture):
            if bucket[a].digest != bucket[b].digest:
                pairs.append((bucket[a].episode, bucket[b].episode))
    return sorted(pairs)


def close_pairs(levels: np.ndarray, tolerance: float) -> list[tuple[int, int]]:
    """Pairs (i < j) of rows of (n, d) uint8 that differ nowhere by more than ``tolerance``.

    Means of 64 neighbours cannot differ by more either: a k-d tree over them leaves few pairs to compare in full.
    """
    n, d = levels.shape
    coarse = levels.reshape(n, -1, 64).mean(axis=2) if d % 64 == 0 else levels.astype(np.float64)
    candidates = cKDTree(coarse).query_pairs(tolerance + 1e-6, p=np.inf, output_type="ndarray")
    found: list[tuple[int, int]] = []
    for start in range(0, len(candidates), 4096):
        i, j = candidates[start : start + 4096].T
        near = np.abs(levels[i].astype(np.int16) - levels[j]).max(axis=1) <= tolerance
        found += zip(i[near].tolist(), j[near].tolist(), strict=True)
    return sorted(found)
