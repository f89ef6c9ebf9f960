"""A fault: what is done, what is promised, within which bound; and the ledger of what was measured."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPORT_VARIABLE = "QWEN_VLA_FAULT_REPORT"  # a file: the ledger is written there as JSON
HEADER = ("fault", "promised", "bound", "measured", "ok")


@dataclass(frozen=True)
class Fault:
    """One way in which a running robot goes wrong.

    Attributes:
        name: short and unique; the row's key in the table.
        done: what is done to the running processes.
        promised: what must happen then.
        bound: largest value allowed of what ``provoke`` measures, in ``unit``.
        provoke: does it on a bench, checks the promise, puts everything right again and returns the measured value.
    """

    name: str
    done: str
    promised: str
    bound: float
    unit: str
    provoke: Callable[[Any], float]


@dataclass(frozen=True)
class Row:
    """What became of a fault; ``measured`` is None where the promise was broken before anything could be measured."""

    name: str
    done: str
    promised: str
    bound: float
    unit: str
    measured: float | None
    ok: bool


class Ledger:
    """Rows in the order of the tests."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def judge(self, fault: Fault, bench: Any) -> None:
        """Provokes ``fault`` and enters the result, whatever it is.

        ``bench`` has ``healthy()``, which returns with everything running as it should, and ``unsafe()``, which lists
        what was wrong with the commands published since ``healthy()``: nothing unsafe may ever reach a command topic,
        whatever else a fault is about.

        Raises:
            AssertionError: The promise was broken, the bound was not kept, or a command was unsafe.
        """
        measured: float | None = None
        kept = False
        try:
            bench.healthy()
            measured = float(fault.provoke(bench))
            unsafe: Sequence[str] = bench.unsafe()
            assert not unsafe, "; ".join(unsafe[:5])
            assert measured <= fault.bound, f"measured {measured:.4g} {fault.unit}, bound {fault.bound:g}"
            kept = True
        finally:
            values = {key: value for key, value in vars(fault).items() if key != "provoke"}
            self.rows.append(Row(**values, measured=measured, ok=kept))

    def write(self) -> None:
        """Writes the rows to the file that the environment names, if it names one."""
        path = os.environ.get(REPORT_VARIABLE)
        if path:
            Path(path).write_text(json.dumps([asdict(row) for row in self.rows], indent=2, ensure_ascii=False) + "\n")


def table(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Rows of text, ``HEADER`` first: name, promise, bound, measured value, yes or no."""
    return [HEADER, *(_cells(row) for row in rows)]


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    measured = "–" if row["measured"] is None else f"{number(row['measured'])} {row['unit']}"
    return row["name"], row["promised"], f"{number(row['bound'])} {row['unit']}", measured, "yes" if row["ok"] else "NO"


def number(value: float) -> str:
    """Three significant digits, and whole numbers from a hundred on."""
    return f"{value:.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3g}"
