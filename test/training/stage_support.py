"""Recipes of very short stages over two real demonstrations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from qwen_vla_core.training import engine, stage
from qwen_vla_core.training.distributed import Ranks
from qwen_vla_core.training.stage_recipe import StageRecipe, load_stage

ABSENT = ["human", "navigation", "synthetic", "general_vl", "driving_vqa", "captions"]


def mixture(folder: Path, *, actions: bool = True, asks: Sequence[str] = ("requests",), batch_size: int = 4) -> dict:
    manipulation = {
        "name": "manipulation",
        "weight": 3,
        "balance": ["dataset"],
        "datasets": [{"path": str(folder), "embodiment": "aloha", "intention": True, "hold_at_end": True}],
    }
    grounding = {
        "name": "spatial_grounding",
        "weight": 1,
        "balance": ["dataset"],
        "datasets": [{"path": str(folder), "embodiment": "aloha", "ask": ask} for ask in asks],
    }
    families = [manipulation] * actions + [grounding] * bool(asks)
    absent = [*ABSENT, *["manipulation"] * (not actions), *["spatial_grounding"] * (not asks)]
    return {"batch_size": batch_size, "families": families, "absent": absent}


def stage_recipe(tmp_path: Path, mixed: dict, changes: Sequence[str] = (), **keys: Any) -> StageRecipe:
    tmp_path.mkdir(parents=True, exist_ok=True)
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(mixed))
    recipe = {
        "stage": "cpt",
        "mixture": "mixture.yaml",
        "embodiments": ["aloha"],
        "steps": 5,
        "model": {"preset": "tiny", "backbone": "qwen3_vl", "state": "dit_token"},
        "optim": {
            "rates": {"vision": 1e-3, "language": 1e-3, "decoder": 1e-3},
            "warmup_steps": 2,
            "average": 0.5,
        },
        "loss": {"text": 0.3, "draws": 2},
        "loader": {"workers": 0},
        "scale": {"precision": "fp32"},
        "log_every": 1,
        "save_every": 2,
    } | keys
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return load_stage(path, changes)


def run(recipe: StageRecipe, out: Path, task: Any = stage.PolicyTask, hooks: engine.Hooks | None = None) -> dict:
    """The stage as its page runs it, with the averaged weights as ``checkpoint`` after every saved state."""
    with stage.opened(recipe, out, Ranks(), progress=False) as opened:

        def saved(step: int) -> None:
            opened.export(out / "checkpoint", {"step": step})

        return engine.run(
            task(opened), recipe, Ranks(), out, opened.provenance, hooks or engine.Hooks(saved=saved), progress=False
        )


def log(out: Path) -> list[dict]:
    """Rows of ``log.jsonl`` without what depends on the clock."""
    timed = ("samples_per_s", "tokens_per_s", "seconds")
    lines = (out / "log.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in timed} for line in lines]
