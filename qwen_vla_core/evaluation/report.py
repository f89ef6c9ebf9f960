"""From episodes to rates: success, wrong choices, language following, each with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen_vla_core.evaluation.metrics import Rate, mean_metrics


def summarise(rows: Sequence[dict[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rates over ``rows``: success, a wrong object chosen, and language following where it was asked for.

    Args:
        rows: of ``episodes.run_seeds``, at least one.
        settings: kept with them.
    """
    count = len(rows)
    report: dict[str, Any] = {
        "settings": dict(settings),
        "success": Rate(sum(row["success"] for row in rows), count).to_dict(),
        "wrong_object": Rate(sum(row["chosen"] not in (None, row["target"]) for row in rows), count).to_dict(),
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


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
