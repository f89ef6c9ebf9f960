"""``qwen-vla model show``: parameter counts per part, beside the published ones."""

from __future__ import annotations

import argparse
import json
from typing import Any

from qwen_vla_core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``model show --preset NAME`` or ``model show --checkpoint DIR``."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="parameter counts of a preset or a checkpoint")
    source = show.add_mutually_exclusive_group(required=True)
    source.add_argument("--preset", help="paper, small or tiny; paper and small are counted without allocating weights")
    source.add_argument("--checkpoint", metavar="NAME", help="shipped name or checkpoint folder")
    show.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the report; returns 0."""
    report = describe_checkpoint(args.checkpoint) if args.checkpoint else describe_preset(args.preset)
    print(json.dumps(report, indent=2) if args.json else _table(report))
    return 0


def describe_preset(name: str) -> dict[str, Any]:
    """Counts of a preset on the meta device: the paper's 5.7 billion parameters take no memory."""
    import torch

    from qwen_vla_core.model.policy import parameter_counts
    from qwen_vla_core.model.presets import PRESETS, PUBLISHED_BACKBONE, preset_network

    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: use one of {', '.join(PRESETS)} (--preset)")
    with torch.device("meta"):
        config, backbone, decoder = preset_network(name)
    source = PUBLISHED_BACKBONE.get(name, "random initialisation")
    return _report(f"preset {name}", source, config, parameter_counts(backbone, decoder))


def describe_checkpoint(folder: str) -> dict[str, Any]:
    """Counts of a checkpoint, its robots and where it came from; loads it, so every part is checked."""
    from qwen_vla_core.model.checkpoint import load_checkpoint, read_config, resolve_checkpoint
    from qwen_vla_core.model.policy import parameter_counts

    path = resolve_checkpoint(folder)
    stored = read_config(path)
    policy = load_checkpoint(path)
    report = _report(
        f"checkpoint {folder}", policy.config.preset, policy.config, parameter_counts(policy.backbone, policy.decoder)
    )
    return report | {
        "weights_id": stored["weights_id"],
        "embodiments": list(policy.embodiments),
        "provenance": stored["provenance"],
    }


def _report(title: str, source: str, config: Any, counts: dict[str, int]) -> dict[str, Any]:
    from qwen_vla_core.model.presets import PUBLISHED

    compared = config.preset == "paper"
    return {
        "title": title,
        "backbone": config.backbone["model_type"],
        "backbone_source": source,
        "context": config.decoder.context,
        "state_mode": config.state_mode,
        "euler_steps": config.flow.steps,
        "parts": {
            part: {"parameters": number, **({"published": PUBLISHED[part]} if compared and part in PUBLISHED else {})}
            for part, number in counts.items()
        },
    }


def _table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['title']}: {report['backbone']} ({report['backbone_source']}), context {report['context']}, "
        f"state {report['state_mode']}, {report['euler_steps']} Euler steps",
        f"{'part':<14}{'parameters':>16}{'published':>14}{'difference':>12}",
    ]
    for part, entry in report["parts"].items():
        line = f"{part:<14}{entry['parameters']:>16,}"
        if "published" in entry:
            difference = entry["parameters"] / entry["published"] - 1.0
            line += f"{entry['published'] / 1e6:>13,.1f}M{difference:>+12.1%}"
        lines.append(line)
    if "embodiments" in report:
        lines.append(f"embodiments: {', '.join(report['embodiments'])}")
        lines.append(f"weights_id: {report['weights_id']}")
        lines += [f"{key}: {value}" for key, value in report["provenance"].items()]
    return "\n".join(lines)
