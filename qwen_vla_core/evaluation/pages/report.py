"""Puts the page together: results, comparisons of pairs of them, recorded rollouts, films of the worst episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from itertools import combinations
from pathlib import Path
from typing import Any

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.compare import Comparison, compare
from qwen_vla_core.evaluation.definitions import METRICS, label, shown
from qwen_vla_core.evaluation.metrics import Rate
from qwen_vla_core.evaluation.pages import charts
from qwen_vla_core.evaluation.pages.films import film_worst
from qwen_vla_core.evaluation.report import Line, axis_table
from qwen_vla_core.evaluation.results import Result, find_results, is_result, read_result
from qwen_vla_core.rollouts.index import OUTCOMES, UNFINISHED, Rollout, find_rollouts

TEMPLATE = Path(__file__).with_name("report.html")  # everything that comes from files is escaped by jinja2 in it
FAILURES = 40  # rows of the table of failed trials
VARIANTS = 12  # of an axis that are still told apart
JUDGED = ("success", "partial", "failure")


def gather(paths: Sequence[Path]) -> tuple[list[Result], list[tuple[Path, list[Rollout]]]]:
    """What paths mean: result files, folders of them, and folders of recorded rollouts.

    Raises:
        UserError: a path is none of these, or a result file is damaged.
    """
    results: list[Result] = []
    recorded: list[tuple[Path, list[Rollout]]] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: there is no such file or folder")
        if path.is_file():
            results.append(read_result(path))
            continue
        files = find_results(path)
        rollouts = [] if files else find_rollouts(path)
        if not files and not rollouts:
            raise UserError(
                f"{path}: holds neither results of `qwen-vla eval run --output` nor recorded rollouts "
                "(RUN/episode_000/episode.json)"
            )
        results += [read_result(file) for file in files]
        if rollouts:
            recorded.append((path, rollouts))
    return [result for result in results if result.rows], recorded


def render(
    results: Sequence[Result],
    recorded: Sequence[tuple[Path, Sequence[Rollout]]],
    films: int,
    title: str = "Evaluation",
    checkpoints: Mapping[str, str] | None = None,
) -> str:
    """The HTML text.

    Args:
        results: each with at least one row.
        recorded: (folder, its episodes).
        films: at most so many per result; 0: none, and nothing is run.
        title: of the page.
        checkpoints: name in a result → where its weights are now.
    """
    from jinja2 import Environment

    parts = [_result(i, result, films, checkpoints or {}) for i, result in enumerate(results)]
    comparisons = [part for a, b in combinations(results, 2) if (part := _comparison(a, b)) is not None]
    rollouts = [_rollouts(i, folder, rows) for i, (folder, rows) in enumerate(recorded)]
    environment = Environment(autoescape=True)
    environment.filters["label"] = label
    now = datetime.now(timezone.utc)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        written=f"Written {now:%Y-%m-%d %H:%M} UTC by qwen-vla eval report",
        contents=[(part["anchor"], part["heading"]) for part in (*parts, *comparisons, *rollouts)],
        results=parts,
        comparisons=comparisons,
        rollouts=rollouts,
        metrics=[(name, metric) for name, metric in METRICS.items() if _is_used(name, results)],
    )


def _is_used(name: str, results: Sequence[Result]) -> bool:
    always = ("success", "wrong_object", "mean_seconds_to_success")
    return name in always or any(name in row["metrics"] for result in results for row in result.rows[:1])


def _result(index: int, result: Result, films: int, checkpoints: Mapping[str, str]) -> dict[str, Any]:
    table = axis_table(result)
    header, settings = result.header, result.header.get("settings", {})
    names = list(dict.fromkeys(name for line in table for name in line.metrics))
    limit = max(row["seconds"] for row in result.rows)
    failed = [row for row in result.rows if not row["success"]]
    failed.sort(key=lambda row: (row["metrics"].get("progress", 0.0), -row["seconds"]))
    made, no_films = film_worst(result, films, checkpoints.get(result.checkpoint)) if films else ([], "")
    facts = [
        ("suite", header.get("suite") or settings.get("embodiment") or "?"),
        ("trials", len(result.rows)),
        ("first seed", header.get("seed", result.rows[0]["seed"])),
        ("actions executed of a chunk", settings.get("execute_steps")),
        ("latency", "the world waits" if settings.get("latency_ms") is None else f"{settings['latency_ms']:g} ms"),
        ("weights", str(header["weights"])[:12] if header.get("weights") else None),
        ("prompt speaks of", settings.get("told")),
        ("file", result.path.name),
    ]
    if header.get("ros"):
        facts[4] = ("latency", "real, in the ROS graph")
    remarks = []
    if result.early_stop:
        remarks.append(
            "This run was stopped once its intervals were narrow enough; the intervals are anytime-valid, and there is "
            "no line for all tasks of an axis."
        )
    return {
        "anchor": f"result-{index}",
        "heading": f"{result.checkpoint}: {header.get('title') or result.path.stem}",
        "facts": [(name, value) for name, value in facts if value is not None],
        "remarks": remarks,
        "lines": [_line(result, line, names, limit) for line in table],
        "has_progress": all("progress" in row["metrics"] for row in result.rows),
        "columns": ["wrong_object", "mean_seconds_to_success", *names],
        "limit": f"{limit:.0f}",
        "films": made,
        "no_films": no_films,
        "failures": failed[:FAILURES],
        "failed": len(failed),
        "variants": _variants(result),
        "axes": [(name, text) for name, text in header.get("axes", {}).items() if text],
        "protocol": header.get("protocol"),
    }


def _variants(result: Result) -> list[dict[str, Any]]:
    """Success by what an axis was in an episode (which unseen colour or shape), where there are few of them."""
    lines = []
    for axis in result.axes:
        rows = [row for row in result.of(axis) if row.get("variant")]
        names = sorted({str(row["variant"]) for row in rows})
        for name in names if 1 < len(names) <= VARIANTS else ():
            members = [row for row in rows if str(row["variant"]) == name]
            rate = Rate(sum(bool(row["success"]) for row in members), len(members))
            low, high = rate.anytime_interval if result.early_stop else rate.interval
            lines.append(
                {
                    "name": f"{axis} · {name}",
                    "count": f"{rate.successes}/{rate.trials}",
                    "rate": f"{rate.value:.0%}",
                    "interval": charts.interval(low, rate.value, high),
                }
            )
    return lines


def _line(result: Result, line: Line, names: Sequence[str], limit: float) -> dict[str, Any]:
    rows = result.of(line.axis, line.task)
    progress = [float(row["metrics"].get("progress", row["success"])) for row in rows]
    done = [row["seconds"] for row in rows if row["success"]]
    low, high = line.interval
    several = len(result.tasks(line.axis)) > 1 or len(result.axes) == 1
    return {
        "name": f"{line.axis} · {line.task or 'all'}" if several else line.axis,
        "axis": line.axis,
        "task": line.task or "all",
        "is_all": line.task is None,
        "count": f"{line.rate.successes}/{line.rate.trials}",
        "rate": f"{line.rate.value:.0%}",
        "span": f"{low:.0%} – {high:.0%}",
        "interval": charts.interval(low, line.rate.value, high),
        "stages": charts.stages(progress, len(done)),
        "progress": f"{sum(progress) / len(progress):.2f}",
        "times": charts.times(done, limit),
        "seconds": "–" if line.seconds is None else f"{line.seconds:.1f} s",
        "cells": [
            f"{line.wrong.value:.0%}",
            "–" if line.seconds is None else f"{line.seconds:.1f}",
            *(shown(name, line.metrics[name]) if name in line.metrics else "" for name in names),
        ],
    }


def _comparison(a: Result, b: Result) -> dict[str, Any] | None:
    """None where the two are not about the same trials."""
    if a.suite != b.suite:
        return None
    try:
        lines = compare(a, b)
    except UserError:
        return None
    return {
        "anchor": f"compare-{a.path.stem}-{b.path.stem}",
        "heading": f"{b.checkpoint} against {a.checkpoint}",
        "a": a.name,
        "b": b.name,
        "lines": [_compared(line) for line in lines],
    }


def _compared(line: Comparison) -> dict[str, Any]:
    return {
        "axis": line.axis or "all",
        "pairs": line.a.trials,
        "a": f"{line.a.value:.0%}",
        "b": f"{line.b.value:.0%}",
        "difference": f"{100 * line.difference:+.0f} points",
        "interval": "–" if line.interval is None else f"{100 * line.interval[0]:+.0f} to {100 * line.interval[1]:+.0f}",
        "only_a": line.only_a,
        "only_b": line.only_b,
        "p": f"{line.p:.2g}",
        "p_holm": "" if line.axis is None else f"{line.p_holm:.2g}",
        "detectable": f"{100 * line.detectable:.0f} points",
    }


def _rollouts(index: int, folder: Path, rows: Sequence[Rollout]) -> dict[str, Any]:
    instructions = list(dict.fromkeys(row.instruction for row in rows))
    groups: list[tuple[str, list[Rollout]]] = [
        (text or "(no instruction)", [row for row in rows if row.instruction == text]) for text in instructions
    ]
    lines = [_outcomes(name, members, False) for name, members in groups]
    if len(groups) > 1:
        lines.append(_outcomes("all", list(rows), True))
    facts = [
        ("episodes", len(rows)),
        ("runs", len({row.run for row in rows})),
        ("robots", ", ".join(sorted({row.embodiment for row in rows if row.embodiment})) or "?"),
        ("simulated", sum(row.simulated for row in rows)),
    ]
    return {
        "anchor": f"rollouts-{index}",
        "heading": f"Recorded rollouts: {folder.name}",
        "facts": facts,
        "lines": lines,
        "episodes": list(rows),
    }


def _outcomes(name: str, rows: Sequence[Rollout], is_all: bool) -> dict[str, Any]:
    counts = {outcome: sum(row.outcome == outcome for row in rows) for outcome in (*OUTCOMES, UNFINISHED)}
    rate = Rate(counts["success"], sum(counts[outcome] for outcome in JUDGED))
    seconds = [row.seconds for row in rows if row.outcome == "success" and row.seconds is not None]
    low, high = rate.interval
    value = rate.value if rate.trials else 0.0
    return {
        "name": name,
        "is_all": is_all,
        "outcomes": list(counts.values()),
        "count": f"{rate.successes}/{rate.trials}",
        "rate": f"{value:.0%}" if rate.trials else "not judged",
        "span": f"({low:.0%} – {high:.0%})" if rate.trials else "",
        "interval": charts.interval(low, value, high) if rate.trials else "",
        "seconds": f"{sum(seconds) / len(seconds):.1f}" if seconds else "–",
    }


__all__ = ["gather", "is_result", "render"]
