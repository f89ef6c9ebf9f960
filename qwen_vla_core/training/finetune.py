"""Settings for one new robot: from a dataset and an embodiment YAML to a recipe and a mixture of stage SFT.

Both are ordinary YAMLs in the run's folder, to be read, changed and run again with ``qwen-vla train run``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from qwen_vla_core.data.contract import PUBLISHED_MIXTURE
from qwen_vla_core.data.doctor.diagnose import Diagnosis
from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_text

Method = Literal["lora", "full"]
FULL_BELOW = 100_000_000  # parameters of a backbone that a small machine trains in full [O]
LEFT_OUT = 0.1  # of the episodes, for the error in open loop [O]
EPOCHS = 10  # how often a frame is seen, if nobody says how many steps [O]
FEWEST, MOST = 1000, 30_000  # steps [O]
RECIPE, MIXTURE = "recipe.yaml", "mixture.yaml"
# Peak rates and optimizer. Full, small: those of the generalist's last part of SFT (docs/training.md). Large: what
# openpi and its peers fine-tune with, 2.5e-5 … 1e-4 under AdamW, cosine [X].
OPTIM: dict[tuple[Method, bool], dict[str, Any]] = {
    ("full", True): {
        "matrices": "muon",
        "rates": {"vision": 2.5e-4, "language": 2.5e-4, "decoder": 5.0e-4},
        "shape": "linear",
    },
    ("full", False): {"rates": {"vision": 1.0e-5, "language": 2.5e-5, "decoder": 1.0e-4}},
    ("lora", True): {"rates": {"vision": 0.0, "language": 5.0e-4, "decoder": 5.0e-4}},
    ("lora", False): {"rates": {"vision": 0.0, "language": 1.0e-4, "decoder": 1.0e-4}},
}


@dataclass(frozen=True)
class Plan:
    """What will be trained.

    Attributes:
        method: LoRA or all weights.
        why: the reason for it, for people.
        steps: optimizer steps.
        batch_size: samples each.
        left_out: last episodes of each dataset that are not learned from.
        frames: steps of demonstrations that are learned from.
    """

    method: Method
    why: str
    steps: int
    batch_size: int
    left_out: tuple[int, ...]
    frames: int


def choose_method(wanted: Literal["auto", "lora", "full"], backbone: int) -> tuple[Method, str]:
    """LoRA where the backbone is large, unless somebody says otherwise.

    Args:
        wanted: by ``--method``.
        backbone: its parameters.
    """
    size = f"{backbone / 1e6:,.0f} million parameters in the backbone"
    if wanted != "auto":
        return wanted, f"--method {wanted} ({size})"
    if backbone < FULL_BELOW:
        return "full", f"{size}: all weights fit"
    return "lora", f"{size}: adapters need a tenth of the memory; --method full trains all"


def plan(
    wanted: Literal["auto", "lora", "full"],
    backbone: int,
    lengths: Sequence[Sequence[int]],
    batch_size: int,
    steps: int | None,
    left_out: int | None,
) -> Plan:
    """Settings for datasets of these sizes.

    Args:
        wanted: method.
        backbone: its parameters.
        lengths: steps of each episode, per dataset.
        batch_size: samples per step.
        steps: of the optimizer; None: ten times through the data, within bounds.
        left_out: episodes of each dataset; None: a tenth, at least one.

    Raises:
        UserError: a dataset is too small to leave something out.
    """
    method, why = choose_method(wanted, backbone)
    out = []
    for episodes in lengths:
        count = max(1, round(LEFT_OUT * len(episodes))) if left_out is None else left_out
        if count >= len(episodes):
            raise UserError(
                f"--left-out: {count} of {len(episodes)} episodes leaves none to learn from; record more, or give less"
            )
        out.append(count)
    frames = sum(sum(episodes[: len(episodes) - n]) for episodes, n in zip(lengths, out, strict=True))
    if steps is None:
        steps = min(max(EPOCHS * frames // batch_size, FEWEST), MOST)
    return Plan(method, why, steps, batch_size, tuple(out), frames)


def mixture_of(
    chosen: Plan, data: Sequence[Path], embodiment: str, family: str, hold_at_end: bool, out: Path
) -> dict[str, Any]:
    """The mixture as plain YAML values; paths are relative to ``out``."""
    datasets = [
        {
            "path": os.path.relpath(path, out),
            "embodiment": embodiment,
            **({"hold_at_end": True} if hold_at_end else {}),
            **({"leave_out": count} if count else {}),
        }
        for path, count in zip(data, chosen.left_out, strict=True)
    ]
    return {
        "batch_size": chosen.batch_size,
        "families": [{"name": family, "weight": 100, "balance": ["task"], "datasets": datasets}],
        "absent": [name for name in PUBLISHED_MIXTURE if name != family],
    }


def recipe_of(chosen: Plan, small: bool, robot: str, start: str, report_minutes: float) -> dict[str, Any]:
    """The stage's recipe as plain YAML values."""
    recipe: dict[str, Any] = {
        "stage": "sft",
        "mixture": MIXTURE,
        "steps": chosen.steps,
        "start": start,
        "embodiments": [robot],
        "optim": {**OPTIM[chosen.method, small], "warmup_steps": min(100, max(chosen.steps // 10, 1))},
        "loss": {"draws": 4},
        "save_every": max(chosen.steps // 4, 1),
        "save_minutes": report_minutes,
    }
    if chosen.method == "lora":
        recipe["lora"] = {"rank": 16, "alpha": 16.0}
    if any(chosen.left_out):
        recipe["open_loop"] = {"frames": 200}
    return recipe


def write(out: Path, recipe: dict[str, Any], mixture: dict[str, Any]) -> Path:
    """Writes both YAMLs; files of an earlier run that say something else are not overwritten.

    Returns:
        The recipe's path.

    Raises:
        UserError: the folder holds another run.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name, values in ((MIXTURE, mixture), (RECIPE, recipe)):
        path = out / name
        if path.is_file() and yaml.safe_load(path.read_text(encoding="utf-8")) != json.loads(json.dumps(values)):
            raise UserError(
                f"--out {out}: {name} of another run is there; go on with `qwen-vla train run --recipe {out / RECIPE} "
                f"--out {out}`, or name another folder"
            )
        atomic_write_text(path, yaml.safe_dump(values, sort_keys=False))
    return out / RECIPE


def refuse(diagnosis: Diagnosis, robot: Embodiment, path: Path) -> None:
    """Stops before a training on data that cannot be right.

    Raises:
        UserError: the doctor found errors; names the first ones.
    """
    errors = [found for found in diagnosis.findings if found.severity == "error"]
    if errors:
        said = "; ".join(f"{found.code}: {found.message} ({found.fix})" for found in errors[:3])
        raise UserError(
            f"{path}: does not fit {robot.name}: {said}. All of it: `qwen-vla data doctor {path} --embodiment …`; "
            "--force trains all the same"
        )
