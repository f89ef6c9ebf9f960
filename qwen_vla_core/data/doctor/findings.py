"""A finding: what is wrong, how bad, where, in numbers, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
MOST_PLACES = 20


@dataclass(frozen=True)
class Place:
    """Rows of one episode.

    Attributes:
        episode: its number in the dataset.
        rows: first row and the row after the last one; None for the whole episode.
        view: the camera, where it is about pictures.
        note: what is to be seen here.
    """

    episode: int
    rows: tuple[int, int] | None = None
    view: str = ""
    note: str = ""

    def __str__(self) -> str:
        text = f"episode {self.episode}"
        if self.rows:
            first, stop = self.rows
            text += f" row {first}" if stop - first == 1 else f" rows {first}–{stop - 1}"
        return text + (f" {self.view}" if self.view else "")


@dataclass(frozen=True)
class Finding:
    """One fault of a dataset.

    Attributes:
        code: short name of the kind of fault.
        severity: error: training on it goes wrong; warning: look at it; info: worth knowing.
        message: what is wrong, with numbers.
        fix: what to do.
        places: the first places, worst first where there is an order.
        total: how many places there are.
        numbers: what the message says, for programs (JSON).
        side: ``state`` or ``action`` where channels are concerned.
        channels: their names.
    """

    code: str
    severity: Severity
    message: str
    fix: str
    places: tuple[Place, ...] = ()
    total: int = 0
    numbers: dict[str, Any] = field(default_factory=dict)
    side: str = ""
    channels: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def finding(
    code: str,
    severity: Severity,
    message: str,
    fix: str,
    places: Sequence[Place] = (),
    numbers: dict[str, Any] | None = None,
    side: str = "",
    channels: Sequence[str] = (),
) -> Finding:
    """A finding that keeps the first ``MOST_PLACES`` places and counts them all."""
    kept = tuple(places[:MOST_PLACES])
    return Finding(code, severity, message, fix, kept, len(places), numbers or {}, side, tuple(channels))


def many(count: int, one: str, more: str = "") -> str:
    """``1 episode``, ``2 episodes``."""
    return f"{count} {one if count == 1 else more or one + 's'}"


def ordered(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Errors first, then warnings, then infos; otherwise as found."""
    return tuple(sorted(findings, key=lambda each: SEVERITIES.index(each.severity)))
