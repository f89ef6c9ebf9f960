"""Checks of channels: constants, copies of the state, units, limits, speed, idling, clipped grippers."""

from __future__ import annotations

import math
from collections import defaultdict

from qwen_vla_core.data.doctor.case import SIDES, Case, places_of
from qwen_vla_core.data.doctor.channels import DELTA_KINDS, Channel, Side, names
from qwen_vla_core.data.doctor.findings import Finding, Place, finding, many
from qwen_vla_core.data.sketch import QuantileSketch

# unit → what the numbers may be in instead, and how many of them make one of the unit
_OTHER_UNITS: dict[str, tuple[tuple[str, float], ...]] = {
    "rad": (("degrees", 180 / math.pi),),
    "rad/s": (("degrees per second", 180 / math.pi),),
    "m": (("centimetres", 100.0), ("millimetres", 1000.0)),
    "m/s": (("centimetres per second", 100.0), ("millimetres per second", 1000.0)),
    "fraction": (("percent", 100.0), ("bytes", 255.0)),
}
# Believable values of kinds without limits [O]; travelling bases have none.
_BELIEVABLE = {
    ("joint_position", "rad"): 4 * math.pi,
    ("joint_position", "m"): 3.0,
    ("joint_delta", "rad"): 1.0,
    ("joint_delta", "m"): 0.5,
    ("eef_pose", "rad"): 2 * math.pi,
    ("eef_pose", "m"): 3.0,
    ("eef_delta", "rad"): 1.0,
    ("eef_delta", "m"): 0.5,
    ("gripper", "fraction"): 1.0,
}
_FINGER_M = 0.12  # no gripper opens wider than this in metres, and no open gripper is at 12 %


def check_finite(case: Case) -> list[Finding]:
    """NaN and infinity."""
    found = []
    for side in SIDES:
        channels = case.work.channels(side)
        hits = [(facts.episode, hit) for facts in case.facts for hit in facts.not_finite.get(side, [])]
        if hits:
            columns = [channels[i] for i in sorted({hit.column for _, hit in hits})]
            rows = sum(hit.rows for _, hit in hits)
            found.append(
                finding(
                    "not_finite",
                    "error",
                    f"{many(rows, 'value')} of {side} not finite (NaN or infinite), in {names(columns)}",
                    "find the sensor or division that made them; leave the episodes out with `qwen-vla data clean`",
                    places_of(hits, channels),
                    {"values": rows},
                    side,
                    [channel.name for channel in columns],
                )
            )
    return found


def check_constant(case: Case) -> list[Finding]:
    """Channels without information: normalisation would map them to 0, or blow their noise up."""
    found = []
    for side in SIDES:
        still, numbers = [], {}
        for channel, sketch in case.channels(side):
            low, high = sketch.quantile((0.01, 0.99))
            if high - low < case.thresholds.near_constant * channel.scale:
                still.append(channel)
                numbers[channel.name] = {"q01": float(low), "q99": float(high), "min": sketch.minimum}
                numbers[channel.name]["max"] = sketch.maximum
        if still:
            rare = [c.name for c in still if numbers[c.name]["max"] - numbers[c.name]["min"] > 0.1 * c.scale]
            also = f"; {', '.join(rare)} move, but in less than 2 % of the rows" if rare else ""
            found.append(
                finding(
                    "near_constant",
                    "warning",
                    f"{many(len(still), f'{side} channel')} with hardly any change between the 1 % and 99 % quantiles: "
                    f"{names(still)}{also}",
                    "leave them out of the embodiment if they never move; otherwise check that they were recorded",
                    [Place(case.facts[0].episode)] if case.facts else (),
                    numbers,
                    side,
                    [channel.name for channel in still],
                )
            )
    return found


def check_copies(case: Case) -> list[Finding]:
    """Actions that are the state of the same row: a policy would learn to stand still."""
    equal, compared = (sum(facts.same[i] for facts in case.facts) for i in (0, 1))
    if not compared or equal / compared < case.thresholds.same_as_state:
        return []
    return [
        finding(
            "action_is_state",
            "error",
            f"{equal / compared:.1%} of {compared} action values equal the state of the same row",
            "shift the actions by one row (action[t] = state[t + 1]), or record the commands; "
            "`qwen-vla data clean --pseudo-actions` makes them from the states",
            [Place(facts.episode) for facts in case.facts if facts.same[1]],
            {"share": equal / compared},
            "action",
        )
    ]


def check_idle(case: Case) -> list[Finding]:
    """Rows in which nothing moves: they teach a policy to wait."""
    steps = sum(max(facts.length, 1) for facts in case.facts if not facts.error)
    idle = sum(facts.idle for facts in case.facts)
    whole = [facts for facts in case.facts if facts.length and facts.idle >= 0.9 * (facts.length - 1) > 0]
    if not steps or (idle / steps < case.thresholds.idle_share and not whole):
        return []
    worst = sorted(case.facts, key=lambda facts: facts.idle_run[0] - facts.idle_run[1])
    longest = worst[0].idle_run[1] - worst[0].idle_run[0]
    also = f"; {many(len(whole), 'episode')} with nothing else" if whole else ""
    return [
        finding(
            "idle",
            "warning",
            f"{idle / steps:.1%} of the steps are idle, up to {longest / case.dataset.fps:.3g} s at a stretch{also}",
            "cut the waiting at the start and the end when converting; `qwen-vla data clean` drops what never moves",
            [Place(f.episode, f.idle_run, note=f"{f.idle} idle steps") for f in worst if f.idle],
            {"share": idle / steps, "longest_s": longest / case.dataset.fps, "idle_episodes": len(whole)},
            "action" if case.work.action else "state",
        )
    ]


def check_grippers(case: Case) -> list[Finding]:
    """Grippers whose values stick to a limit: a measurement has noise, so one that has none there was cut off.

    A command may rightly be exactly open or closed, so for actions it is worth knowing and no more.
    """
    found = []
    for side in SIDES:
        limit = case.thresholds.clipped_state if side == "state" else case.thresholds.clipped_action
        totals: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0])
        for facts in case.facts:
            for column, (low, high) in facts.at_limit.get(side, {}).items():
                totals[column] = [a + b for a, b in zip(totals[column], (low, high, facts.length), strict=True)]
        flagged = wrong_units(case)[side]
        for column, (low, high, rows) in totals.items():
            channel = case.work.channels(side)[column]
            span = case.sketches[side][column]
            if column in flagged or span.maximum == span.minimum or (low + high) / rows < limit:
                continue
            found.append(
                finding(
                    "clipped_gripper",
                    "warning" if side == "state" else "info",
                    f"{side} channel {channel.name} is exactly at a limit in {(low + high) / rows:.1%} of the rows "
                    f"({low / rows:.1%} at {channel.lower:g}, {high / rows:.1%} at {channel.upper:g})",
                    "widen the range of the gripper's map in the embodiment YAML and convert again"
                    + ("" if side == "state" else "; right as it is if the gripper is only told to open or close"),
                    [
                        Place(f.episode)
                        for f in sorted(case.facts, key=lambda f: -sum(f.at_limit.get(side, {}).get(column, (0, 0))))
                        if sum(f.at_limit.get(side, {}).get(column, (0, 0)))
                    ],
                    {"at_lower": low / rows, "at_upper": high / rows},
                    side,
                    [channel.name],
                )
            )
    return found


def check_units(case: Case) -> list[Finding]:
    """Values that do not fit the unit, but fit another one."""
    found = []
    for side in SIDES:
        by_unit: dict[str, list[tuple[Channel, QuantileSketch]]] = defaultdict(list)
        flagged = wrong_units(case)[side]
        for channel, sketch in case.channels(side):
            if channel.column in flagged:
                by_unit[flagged[channel.column]].append((channel, sketch))
        for other, members in by_unit.items():
            channel, sketch = members[0]
            low, high = sketch.quantile((0.01, 0.99))
            allowed = _allowed(channel)
            columns = {c.column for c, _ in members}
            hits = [(f.episode, hit) for f in case.facts for hit in f.outside.get(side, []) if hit.column in columns]
            hits.sort(key=lambda each: -_excess(each[1].value, case.work.channels(side)[each[1].column]))
            # Too small a unit (finger metres) leaves no limit: then it is everywhere.
            everywhere = [Place(facts.episode) for facts in case.facts[:1]]
            found.append(
                finding(
                    "wrong_units",
                    "error",
                    f"{side} channels {names([c for c, _ in members])} look like {other}, not {channel.unit}: "
                    f"{channel.name} runs from {low:.4g} to {high:.4g}"
                    + (f", allowed are {allowed[0]:.4g} to {allowed[1]:.4g}" if allowed else ""),
                    f"convert them to {channel.unit} (the embodiment's unit), or correct the map in its YAML; "
                    "motion is judged after that",
                    places_of(hits, case.work.channels(side)) or everywhere,
                    {c.name: [float(v) for v in s.quantile((0.01, 0.99))] for c, s in members},
                    side,
                    [c.name for c, _ in members],
                )
            )
    return found


def check_limits(case: Case) -> list[Finding]:
    """Values beyond the limits, and actions faster than the velocity limits. Channels in a wrong unit are left out."""
    found = []
    flagged = wrong_units(case)
    for side in SIDES:
        channels = case.work.channels(side)
        hits = [
            (facts.episode, hit)
            for facts in case.facts
            for hit in facts.outside.get(side, [])
            if hit.column not in flagged[side]
        ]
        if hits:
            columns = [channels[i] for i in sorted({hit.column for _, hit in hits})]
            hits.sort(key=lambda each: -_excess(each[1].value, channels[each[1].column]))
            worst = channels[hits[0][1].column]
            rows = sum(hit.rows for _, hit in hits)
            found.append(
                finding(
                    "out_of_limits",
                    "error" if side == "action" else "warning",
                    f"{many(rows, 'value')} of {side} beyond the limits, in {names(columns)}; the worst: "
                    f"{worst.name} = {hits[0][1].value:.4g} with limits {worst.lower:g} … {worst.upper:g}",
                    "check the limits in the YAML, the zero position and the unit; the robot would clamp these",
                    places_of(hits, channels),
                    {"values": rows},
                    side,
                    [channel.name for channel in columns],
                )
            )
    jumps = [(facts.episode, hit) for facts in case.facts for hit in facts.jumps if hit.column not in flagged["action"]]
    if jumps:
        channels = case.work.action
        columns = [channels[i] for i in sorted({hit.column for _, hit in jumps})]
        jumps.sort(key=lambda each: -(each[1].value or 0.0) / (channels[each[1].column].velocity or 1.0))
        worst = channels[jumps[0][1].column]
        rows = sum(hit.rows for _, hit in jumps)
        found.append(
            finding(
                "velocity",
                "warning",
                f"{many(rows, 'step')} faster than the velocity limits, in {names(columns)}; the worst: "
                f"{worst.name} at {jumps[0][1].value:.4g} per second, allowed {worst.velocity:g}",
                "look for dropped rows, wrapped angles and resets inside episodes; the robot would lag behind",
                places_of(jumps, channels),
                {"steps": rows},
                "action",
                [channel.name for channel in columns],
            )
        )
    return found


def _excess(value: float | None, channel: Channel) -> float:
    if value is None or channel.lower is None or channel.upper is None:
        return 0.0
    return max(channel.lower - value, value - channel.upper) / (channel.upper - channel.lower or 1.0)


def _allowed(channel: Channel) -> tuple[float, float] | None:
    """Limits, or what is believable for the kind and unit."""
    if channel.lower is not None and channel.upper is not None:
        return channel.lower, channel.upper
    size = _BELIEVABLE.get((channel.kind, channel.unit))
    return None if size is None else (0.0 if channel.unit == "fraction" else -size, size)


def wrong_units(case: Case) -> dict[Side, dict[int, str]]:
    """Side → column → the unit that its values seem to be in."""
    found: dict[Side, dict[int, str]] = {side: {} for side in SIDES}
    for side in SIDES:
        for channel, sketch in case.channels(side):
            low, high = (float(v) for v in sketch.quantile((0.01, 0.99)))
            allowed = _allowed(channel)
            if allowed is None:
                continue
            tiny = high - low > 1e-4 and low >= -0.01 and high <= _FINGER_M
            if tiny and channel.unit == "fraction" and channel.kind == "gripper":
                found[side][channel.column] = "metres of finger opening"
                continue
            size = allowed[1] - allowed[0] if channel.kind in DELTA_KINDS else max(channel.scale, 1e-9)
            if max(allowed[0] - low, high - allowed[1]) <= case.thresholds.unit_excess * size:
                continue
            fitting = [
                name
                for name, factor in _OTHER_UNITS.get(channel.unit, ())
                if low / factor >= allowed[0] - 0.1 * size and high / factor <= allowed[1] + 0.1 * size
            ]
            if fitting:
                found[side][channel.column] = " or ".join(fitting)
    return found
