"""What the examination of one episode keeps: plain values, JSON both ways, so that long work can resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from qwen_vla_core.data.doctor.looking import ViewFacts


@dataclass(frozen=True)
class Hit:
    """A channel in which something is wrong.

    Attributes:
        column: number of the channel on its side.
        rows: how many rows.
        first: the first of them.
        worst: row of the worst value.
        value: the worst value (None: not finite).
    """

    column: int
    rows: int
    first: int
    worst: int
    value: float | None


@dataclass(frozen=True)
class Segment:
    """Rows with one instruction, and what moved in them, in full scales.

    Attributes:
        task: index of the instruction.
        start: first row.
        stop: row after the last.
        arms: arm (``left``, ``right``, empty) → largest span of one of its joints or of its pose.
        grippers: arm → largest span of its gripper.
    """

    task: int
    start: int
    stop: int
    arms: dict[str, float]
    grippers: dict[str, float]


@dataclass(frozen=True)
class EpisodeFacts:
    """One examined episode; every field is empty when ``error`` says why the rows could not be read.

    Attributes:
        episode: its number.
        length: rows.
        error: the reader's complaint, or empty.
        digest: equal for episodes with equal state and action.
        not_finite: side → channels with NaN or infinity.
        outside: side → channels beyond their limits.
        jumps: action channels faster than their velocity limit; the value is the speed.
        at_limit: side → gripper column → rows exactly at its lower and at its upper limit.
        same: action values equal to the state of the same row, in channels that move, and how many were compared.
        idle: idle steps.
        idle_run: first row and the row after the longest idle stretch.
        spread: largest standard deviation of a channel's place, in full scales.
        travel: largest path of a channel, in full scales.
        backward: rows whose time does not increase.
        gaps: rows after which the time jumps, with the seconds.
        period_s: median of the steps in time; None without two rows.
        off_grid_s: largest distance of a time from row / fps.
        unknown_tasks: rows whose task index the dataset does not have.
        segments: in order.
        views: in the dataset's order.
    """

    episode: int
    length: int
    error: str = ""
    digest: str = ""
    not_finite: dict[str, list[Hit]] = field(default_factory=dict)
    outside: dict[str, list[Hit]] = field(default_factory=dict)
    jumps: list[Hit] = field(default_factory=list)
    at_limit: dict[str, dict[int, tuple[int, int]]] = field(default_factory=dict)
    same: tuple[int, int] = (0, 0)
    idle: int = 0
    idle_run: tuple[int, int] = (0, 0)
    spread: float = 0.0
    travel: float = 0.0
    backward: list[int] = field(default_factory=list)
    gaps: list[tuple[int, float]] = field(default_factory=list)
    period_s: float | None = None
    off_grid_s: float = 0.0
    unknown_tasks: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    views: list[ViewFacts] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; undone by ``from_json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> EpisodeFacts:
        """Reads what ``to_json`` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is not that.
        """
        given = dict(value)
        for name in ("not_finite", "outside"):
            given[name] = {side: [Hit(**hit) for hit in hits] for side, hits in given[name].items()}
        given["jumps"] = [Hit(**hit) for hit in given["jumps"]]
        given["at_limit"] = {
            side: {int(column): (int(low), int(high)) for column, (low, high) in found.items()}
            for side, found in given["at_limit"].items()
        }
        given["gaps"] = [(int(row), float(seconds)) for row, seconds in given["gaps"]]
        given["same"], given["idle_run"] = tuple(given["same"]), tuple(given["idle_run"])
        given["segments"] = [Segment(**segment) for segment in given["segments"]]
        given["views"] = [ViewFacts.from_json(view) for view in given["views"]]
        return cls(**given)
