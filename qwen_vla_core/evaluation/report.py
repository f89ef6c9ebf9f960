"""From episodes to rates: success, wrong choices, language following, per axis and task, each with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_vla_core.evaluation.metrics import Rate, mean_metrics
from qwen_vla_core.evaluation.results import Result


def summarise(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rates over ``rows``: success, a wrong object chosen, and language following where it was asked for.

    Args:
        rows: of ``episodes.run_seeds``, at least one.
        settings: kept with them.
    """
    count = len(rows)
    report: dict[str, Any] = {
        "settings": dict(settings),
        "success": Rate(sum(row["success"] for row in rows), count).to_dict(),
        "wrong_object": Rate(sum(_wrong(row) for row in rows), count).to_dict(),
        "mean_seconds_to_success": _mean([row["seconds"] for row in rows if row["success"]]),
        "metrics": mean_metrics([row["metrics"] for row in rows]),
        "episodes": list(rows),
    }
    others = [row["other"] for row in rows if row.get("other")]
    if others:
        chosen = [row for row in (*rows, *others) if row["chosen"] is not None]
        report["other_object_success"] = Rate(sum(row["success"] for row in others), len(others)).to_dict()
        if chosen:  # a share of nothing is no number
            named = sum(row["chosen"] == row["target"] for row in chosen)
            report["named_of_chosen"] = Rate(named, len(chosen)).to_dict()
        both = sum(row["success"] and row["other"]["success"] for row in rows if row.get("other"))
        report["both_instructions"] = Rate(both, len(others)).to_dict()
    return report


def _wrong(row: Mapping[str, Any]) -> bool:
    return row["chosen"] not in (None, row["target"])


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Line:
    """One line of a table: an axis, or one task of it.

    Attributes:
        axis: its name.
        task: None: all tasks of the axis.
        rate: successes over trials.
        interval: 95 %; anytime-valid where the run was stopped by its outcomes, else Wilson's.
        seconds: mean time to success; None without one.
        metrics: means; only what every row has.
    """

    axis: str
    task: str | None
    rate: Rate
    interval: tuple[float, float]
    wrong: Rate
    seconds: float | None
    metrics: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "success": {**self.rate.to_dict(), "interval_95": list(self.interval)},
            "wrong_object": self.wrong.to_dict(),
            "mean_seconds_to_success": self.seconds,
            "metrics": dict(self.metrics),
        }


def axis_table(result: Result) -> list[Line]:
    """A line per axis and task, and one per axis that has several tasks, after them.

    The line of all tasks is left out where the run was stopped early: tasks then have different numbers of trials,
    and no interval of their sum holds.
    """
    lines: list[Line] = []
    for axis in result.axes:
        tasks = result.tasks(axis)
        lines += [_line(result, axis, task) for task in tasks]
        if len(tasks) > 1 and not result.early_stop:
            lines.append(_line(result, axis, None))
    return lines


def _line(result: Result, axis: str, task: str | None) -> Line:
    rows = result.of(axis, task)
    rate = Rate(sum(bool(row["success"]) for row in rows), len(rows))
    return Line(
        axis,
        task,
        rate,
        rate.anytime_interval if result.early_stop else rate.interval,
        Rate(sum(_wrong(row) for row in rows), len(rows)),
        _mean([row["seconds"] for row in rows if row["success"]]),
        mean_metrics([row["metrics"] for row in rows]),
    )


def summarise_axes(result: Result) -> dict[str, Any]:
    """axis → task (or ``all``) → rates and means, for ``--json``."""
    axes: dict[str, Any] = {}
    for line in axis_table(result):
        axes.setdefault(line.axis, {})[line.task or "all"] = line.to_dict()
    return axes


def print_axes(result: Result) -> None:
    """The table, for people."""
    table = axis_table(result)
    names = list(dict.fromkeys(name for line in table for name in line.metrics))
    print(f"{'axis':<16} {'task':<9} {'success':>9}  {'95 % interval':<15} {'to success':>10}  means")
    for line in table:
        low, high = line.interval
        seconds = "-" if line.seconds is None else f"{line.seconds:.1f} s"
        means = "  ".join(f"{name} {line.metrics[name]:.2f}" for name in names if name in line.metrics)
        print(
            f"{line.axis:<16} {line.task or 'all':<9} {line.rate.successes:>4}/{line.rate.trials:<4}  "
            f"{low:>5.1%} – {high:<6.1%} {seconds:>10}  {means}"
        )
    print()


def print_report(report: Mapping[str, Any], anytime: bool = False) -> None:
    """Rates over all rows, for people.

    Args:
        report: of ``summarise``.
        anytime: the run was stopped by its outcomes.
    """
    names = {
        "success": "success",
        "wrong_object": "another object chosen",
        "other_object_success": "asked for another object: success",
        "both_instructions": "both instructions followed in one scene",
        "named_of_chosen": "of all chosen objects: the named one",
    }
    for key, label in names.items():
        if key in report:
            rate = Rate(report[key]["successes"], report[key]["trials"])
            low, high = rate.anytime_interval
            text = f"{rate.successes}/{rate.trials} = {rate.value:.0%} [{low:.0%}, {high:.0%}] anytime-valid"
            print(f"{label:<42} {text if anytime else rate}")
    if report["mean_seconds_to_success"] is not None:
        print(f"{'simulated seconds to success, mean':<42} {report['mean_seconds_to_success']:.1f}")
    for name, value in report["metrics"].items():
        print(f"{name + ', mean':<42} {value:.3f}")
