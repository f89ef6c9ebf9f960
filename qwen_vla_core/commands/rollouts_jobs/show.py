"""``qwen-vla rollouts show NAME``: what happened in one episode."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from qwen_vla_core.commands.rollouts_jobs.common import NAME_HELP, add_root, megabytes, table
from qwen_vla_core.errors import UserError
from qwen_vla_core.rollouts.index import Rollout, find_rollout, read_about

if TYPE_CHECKING:
    from qwen_vla_core.rollouts.summary import Summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the job's arguments."""
    parser.add_argument("name", metavar="ROLLOUT", help=NAME_HELP)
    add_root(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Reads the bag and prints."""
    from qwen_vla_core.rollouts.summary import summarise

    rollout = find_rollout(args.name, args.rollouts)
    try:
        started_ns = int(read_about(rollout.folder).get("started_ns") or 0)
    except UserError:  # the bag may still be read
        started_ns = 0
    summary = summarise(rollout, started_ns)
    if args.json:
        print(json.dumps({**rollout.to_json(), "bag": summary.to_json()}, indent=2, ensure_ascii=False))
    else:
        _print(rollout, summary)
    return 0


def _print(rollout: Rollout, summary: Summary) -> None:
    judged = f" ({rollout.judged_by})" if rollout.judged_by else ""
    judged_s = rollout.seconds
    facts = {
        "instruction": rollout.instruction,
        "outcome": f"{rollout.outcome}{judged}" + (f": {rollout.reason}" if rollout.reason else ""),
        "note": rollout.note.replace("\n", " / "),
        "state": "being recorded"
        if rollout.recording
        else "bag not closed (rollouts repair)"
        if rollout.partial
        else "",
        "problem": rollout.problem,
        "started": rollout.started,
        "length": f"{summary.seconds:.1f} s"
        + ("" if judged_s is None or abs(judged_s - summary.seconds) < 0.1 else f", judged after {judged_s:.1f} s"),
        "robot": f"{rollout.embodiment}{' (simulated)' if rollout.simulated else ''}",
        "checkpoint": rollout.checkpoint_id or rollout.checkpoint,
        "seed": "" if rollout.seed is None else str(rollout.seed),
        "bag": f"{rollout.bag} ({megabytes(rollout.size)})",
        "lost": ", ".join(f"{count} on {topic}" for topic, count in rollout.lost.items()) or "nothing",
    }
    print(rollout.name)
    for key, value in facts.items():
        if value:
            print(f"  {key:<12} {value}")
    rows = [("topic", "messages", "Hz", "longest gap")]
    for topic in summary.topics:
        gap = "" if topic.longest_gap_ms is None else f"{topic.longest_gap_ms:.0f} ms"
        rows.append((topic.topic, str(topic.count), f"{topic.hz:.1f}" if topic.hz else "", gap))
    print(f"\n{table(rows, right=frozenset({1, 2, 3}))}")
    rate = "" if summary.looks_hz is None else f", {summary.looks_hz:.1f} a second"
    print(f"\n{summary.chunks} chunks{rate}; the noise of {summary.seeds} can be drawn again")
    if summary.latency:
        parts = [("latency, ms", "p50", "p95", "max")]
        parts += [(n, f"{s.p50_ms:.1f}", f"{s.p95_ms:.1f}", f"{s.max_ms:.1f}") for n, s in summary.latency.items()]
        print(table(parts, right=frozenset({1, 2, 3})))
    counted = ", ".join(f"{key} {count}" for key, count in summary.interventions.items())
    print(f"\ninterventions of the controller: {counted or 'none'}")
    if summary.human_seconds:
        print(f"a person drove for {summary.human_seconds:.1f} s")
    print("\ntimeline")
    for event in summary.events:
        print(f"  {event.seconds:7.2f} s  {event.who:<10}  {event.text}")
