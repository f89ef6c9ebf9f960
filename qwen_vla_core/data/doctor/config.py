"""Every threshold of the doctor and of cleaning, in one place; flags and YAML set them by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from qwen_vla_core.embodiment.parse import NodeParser
from qwen_vla_core.embodiment.spec import doc
from qwen_vla_core.embodiment.yamlpos import compose, read_text
from qwen_vla_core.errors import UserError


@dataclass(frozen=True)
class Thresholds:
    """When something counts as wrong.

    The paper names the faults [P] and no numbers: all numbers are ours [O]. A "full scale" of a channel is the range of
    its limits, or what is usual for its unit where there are none (π rad, 1 m, 1 as a fraction, 4 eigengrasps).
    """

    near_constant: float = field(
        default=0.002, metadata=doc("q99 − q01 below this part of the full scale is near-constant.", minimum=0.0)
    )
    same_as_state: float = field(
        default=0.99, metadata=doc("Share of equal numbers from which action ≡ state.", minimum=0.0, maximum=1.0)
    )
    idle_rate: float = field(
        default=0.01, metadata=doc("Slower than this part of the full scale a second is idle.", minimum=0.0)
    )
    idle_share: float = field(
        default=0.3, metadata=doc("Share of idle steps worth a warning.", minimum=0.0, maximum=1.0)
    )
    clipped_state: float = field(
        default=0.2, metadata=doc("Share of measured gripper values exactly at a limit.", minimum=0.0, maximum=1.0)
    )
    clipped_action: float = field(
        default=0.95, metadata=doc("Share of commanded gripper values exactly at a limit.", minimum=0.0, maximum=1.0)
    )
    action_margin: float = field(
        default=0.01, metadata=doc("Part of the full scale an action may exceed a limit by.", minimum=0.0)
    )
    state_margin: float = field(
        default=0.05, metadata=doc("Part of the full scale a measured value may exceed a limit by.", minimum=0.0)
    )
    velocity_margin: float = field(
        default=0.1, metadata=doc("Part of the velocity limit an action may exceed it by.", minimum=0.0)
    )
    unit_excess: float = field(
        default=0.5, metadata=doc("Part of the full scale beyond the limits that makes a unit suspicious.", minimum=0.0)
    )
    period_tolerance: float = field(
        default=0.05, metadata=doc("Relative error of the frame period that is a wrong rate.", minimum=0.0)
    )
    gap_periods: float = field(default=1.5, metadata=doc("A longer step, in periods, is a gap.", minimum=1.0))
    blank_contrast: float = field(
        default=6.0, metadata=doc("Grey levels between the darkest and brightest part of a blank picture.", minimum=0.0)
    )
    frozen_change: float = field(
        default=4.0,
        metadata=doc("Grey levels that no part of a frozen picture changes by (an encoder makes 3).", minimum=0.0),
    )
    frozen_travel: float = field(
        default=0.1, metadata=doc("Motion, in full scales, that a picture must show.", exclusive_minimum=0.0)
    )
    same_picture: float = field(
        default=4.0, metadata=doc("Grey levels between pictures of duplicate episodes.", minimum=0.0)
    )
    arm_moves: float = field(
        default=0.05, metadata=doc("Span, in full scales, from which an arm has moved.", exclusive_minimum=0.0)
    )
    gripper_moves: float = field(
        default=0.05, metadata=doc("Span, in full scales, from which a gripper has moved.", exclusive_minimum=0.0)
    )
    no_motion: float = field(
        default=0.005,
        metadata=doc("Cleaning: no channel's standard deviation exceeds this part of its full scale.", minimum=0.0),
    )
    length_deviations: float = field(
        default=5.0,
        metadata=doc(
            "Cleaning: robust deviations of log length (1.4826 MAD) that are abnormal.", exclusive_minimum=0.0
        ),
    )
    length_factor: float = field(
        default=2.0, metadata=doc("Cleaning: an abnormal length also differs by this factor.", minimum=1.0)
    )
    length_episodes: int = field(
        default=8, metadata=doc("Cleaning: fewer episodes say nothing about lengths.", minimum=3)
    )
    shortest: int = field(default=2, metadata=doc("Cleaning: fewer steps are no episode.", minimum=1))
    corrupted_share: float = field(
        default=0.0,
        metadata=doc("Cleaning: share of blank or frozen pictures in a view that is kept.", minimum=0.0, maximum=1.0),
    )
    drop_duplicates: bool = field(default=True, metadata=doc("Cleaning: whether later copies of an episode go."))


def load_thresholds(path: str | Path | None, changes: Mapping[str, float | None] | None = None) -> Thresholds:
    """Thresholds of a YAML (all keys optional), then of flags.

    Raises:
        UserError: an unknown key, another type, or a value out of bounds; names file, line and key, or the flag.
    """
    parsed = Thresholds()
    if path is not None:
        source = str(path)
        parsed = NodeParser(source).dataclass(Thresholds, compose(read_text(Path(path), source), source), "")
    given = {name: value for name, value in (changes or {}).items() if value is not None}
    known = {each.name: each for each in fields(Thresholds)}
    for name, value in given.items():
        bounds = known[name].metadata
        low, above, high = (bounds.get(key) for key in ("minimum", "exclusive_minimum", "maximum"))
        if not ((low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)):
            said = f"at least {low:g}" if low is not None else f"above {above:g}"
            raise UserError(
                f"--{name.replace('_', '-')} {value}: must be {said}{'' if high is None else ', at most 1'}"
            )
    return replace(parsed, **given)  # type: ignore[arg-type]
