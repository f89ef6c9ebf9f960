"""Datasets in memory that a worker process can open for itself: the path is a small JSON file that describes one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from memory_dataset import MemoryDataset, contract, healthy
from scene_support import demonstrations

from qwen_vla_core.data.mixture_recipe import MixtureRecipe, load_mixture
from qwen_vla_core.data.samples import TextSample
from qwen_vla_core.embodiment.spec import PromptSpec
from qwen_vla_core.errors import UserError

PUBLISHED = "human, navigation, synthetic, general_vl, spatial_grounding, driving_vqa, captions"


class MemoryTexts:
    """Conversations made up on the spot."""

    def __init__(self, name: str, family: str, count: int) -> None:
        self.name, self.family, self.count = name, family, count

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> TextSample:
        picture = np.full((1, 20, 30 + index, 3), index, np.uint8)
        turns = (("How dark?", str(index)), ("And now?", "as before"))
        return TextSample({"image": picture} if index else {}, turns, self.family, self.name, index)

    def content_hash(self) -> str:
        return f"{self.name} {self.count}"


def open_memory(path: Path, family: str, embodiment: str | None) -> MemoryDataset | MemoryTexts:
    """What the JSON file describes."""
    about = json.loads(path.read_text())
    if "texts" in about:
        return MemoryTexts(path.stem, family, about["texts"])
    if "mistake" in about:
        raise UserError(about["mistake"])
    if "scenes" in about:
        return demonstrations(about["scenes"], about["episodes"], about.get("steps", 9), path.stem)
    data = healthy(about["episodes"], seed=about.get("seed", 0), steps=about.get("steps", 12))
    if "tag" in about:
        data.contract = contract(prompt=PromptSpec(about["tag"], "dual arms"))
    if "convention" in about:
        data.contract = contract(convention=about["convention"])
    if "tasks" in about:
        data.tasks = about["tasks"]
    data.name, data.family = path.stem, family
    for episode in about.get("broken", []):
        data.broken[episode, "ego"] = f"{path}: episode {episode} of view ego cannot be decoded"
    return data


def write_recipe(folder: Path, text: str, **datasets: dict[str, object]) -> Path:
    """The recipe in ``folder`` with a JSON file per dataset."""
    for name, about in datasets.items():
        (folder / f"{name}.json").write_text(json.dumps(about))
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def small_recipe(folder: Path, **options: object) -> MixtureRecipe:
    """Two robots and conversations."""
    text = f"""
batch_size: {options.get("batch_size", 8)}
seed: {options.get("seed", 3)}
families:
  - name: manipulation
    weight: 3
    datasets: [{{path: pair.json}}, {{path: other.json}}]
  - name: captions
    weight: 1
    datasets: [{{path: texts.json}}]
absent: [{PUBLISHED.removesuffix(", captions")}]
"""
    pair = {"episodes": 4, **{k: v for k, v in options.items() if k in ("broken", "convention")}}
    files = {"pair": pair, "other": {"episodes": 3, "seed": 1, "tag": "Other"}, "texts": {"texts": 5}}
    return load_mixture(write_recipe(folder, text, **files))
