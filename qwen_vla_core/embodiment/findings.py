"""One line of a report: how bad, about what, what was found, and the fix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "warn", "error"]


@dataclass(frozen=True)
class Finding:
    """``fix`` is empty where there is nothing to do."""

    level: Level
    subject: str
    message: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.level:<5}  {self.subject}: {self.message}" + (f"; fix: {self.fix}" if self.fix else "")

    def as_json(self) -> dict[str, Any]:
        """The same for ``--json``."""
        return asdict(self)


def failed(findings: Iterable[Finding]) -> bool:
    """Whether one of them is an error."""
    return any(finding.level == "error" for finding in findings)


def summary(findings: Iterable[Finding]) -> str:
    """How many of each, in one line."""
    levels = [finding.level for finding in findings]
    return f"{levels.count('ok')} ok, {levels.count('warn')} warnings, {levels.count('error')} errors"
