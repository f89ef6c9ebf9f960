"""All checks over one examined dataset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwen_vla_core.data.doctor.case import SIDES, Case
from qwen_vla_core.data.doctor.checks import (
    check_clock,
    check_contract,
    check_duplicates,
    check_pictures,
    check_rows,
)
from qwen_vla_core.data.doctor.findings import SEVERITIES, Finding, ordered
from qwen_vla_core.data.doctor.language import check_language
from qwen_vla_core.data.doctor.values import (
    check_constant,
    check_copies,
    check_finite,
    check_grippers,
    check_idle,
    check_limits,
    check_units,
    wrong_units,
)
from qwen_vla_core.data.statistics import ChannelStatistics

CHECKS: tuple[Callable[[Case], list[Finding]], ...] = (
    check_contract,
    check_rows,
    check_finite,
    check_clock,
    check_pictures,
    check_duplicates,
    check_language,
    check_copies,
    check_units,
    check_limits,
    check_constant,
    check_grippers,
    check_idle,
)
NEED_MOTION = frozenset({"idle", "frozen_frames", "instruction_motion"})


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor says.

    Attributes:
        case: what was examined.
        findings: errors first.
        statistics: side → channels.
    """

    case: Case
    findings: tuple[Finding, ...]
    statistics: dict[str, tuple[ChannelStatistics, ...]]

    @property
    def errors(self) -> int:
        """Number of findings that are errors."""
        return sum(each.severity == "error" for each in self.findings)

    @property
    def looked(self) -> int:
        """Pictures that were looked at."""
        return sum(view.looked for facts in self.case.facts for view in facts.views)

    def summary(self) -> dict[str, Any]:
        """The dataset in numbers."""
        dataset = self.case.dataset
        steps = int(dataset.lengths.sum()) if len(dataset.lengths) else 0
        return {
            "dataset": dataset.name,
            "family": dataset.family,
            "embodiment": self.case.robot.name if self.case.robot else None,
            "episodes": len(dataset.lengths),
            "steps": steps,
            "hours": steps / dataset.fps / 3600,
            "fps": dataset.fps,
            "views": list(dataset.views),
            "tasks": len(dataset.tasks),
            "pictures_looked_at": self.looked,
            **{f"{severity}s": sum(f.severity == severity for f in self.findings) for severity in SEVERITIES},
        }

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**self.summary(), "findings": [each.to_json() for each in self.findings]}


def diagnose(case: Case) -> Diagnosis:
    """Runs every check."""
    statistics: dict[str, tuple[ChannelStatistics, ...]] = {
        side: tuple(ChannelStatistics.of(c.name, c.unit, sketch) for c, sketch in case.channels(side)) for side in SIDES
    }
    findings = [found for check in CHECKS for found in check(case)]
    if any(wrong_units(case).values()):  # how far something moved is then unknown, and so is the rest
        findings = [found for found in findings if found.code not in NEED_MOTION]
    return Diagnosis(case, ordered(findings), statistics)
