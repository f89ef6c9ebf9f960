"""A folder of demonstrations: one safetensors file per episode and ``dataset.json`` as the index.

Pictures are stored as PNG bytes (lossless, a tenth of the raw size); everything that questions and labels need lies in
the file's own metadata, so an episode can be read without its index and the index rebuilt from the episodes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_bytes, atomic_write_json

INDEX = "dataset.json"
VERSION = 1


@dataclass(frozen=True)
class Episode:
    """One demonstration at the policy's rate; T steps.

    Attributes:
        images: view → (T, height, width, 3) uint8 RGB.
        state: (T, c) float32, canonical channel units.
        action: (T, c) float32: the canonical target for one period after step t, as the expert meant it.
        perturbed: (T,) bool: at this step something other than ``action`` was executed.
        instruction: what was asked.
        seed: of the world.
        success: whether the world said the task was done.
        info: task, target colour and whatever else the recorder noted (JSON).
        scenes: T snapshots of the scene (JSON; ``SceneState.from_dict`` restores one).
    """

    images: Mapping[str, np.ndarray]
    state: np.ndarray
    action: np.ndarray
    perturbed: np.ndarray
    instruction: str
    seed: int
    success: bool
    info: Mapping[str, Any]
    scenes: Sequence[Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.state)

    def chunk(self, t: int, horizon: int) -> tuple[np.ndarray, np.ndarray]:
        """The label of step ``t``: the next actions and which of them are the expert's answer to what is seen at ``t``.

        Actions after a perturbation answer something that could not be foreseen at ``t``: they are marked invalid.
        Beyond the end the last action is repeated (the robot holds) and valid.

        Returns:
            actions (horizon, c) float32, valid (horizon,) bool. ``valid[0]`` is always True.
        """
        steps = np.arange(t, t + horizon)
        pushed = np.concatenate([self.perturbed, np.zeros(horizon, bool)])[t : t + horizon - 1]
        valid = np.concatenate([[True], ~np.logical_or.accumulate(pushed)])
        return self.action[np.minimum(steps, len(self) - 1)], valid


def episode_file(seed: int) -> str:
    """File name of the episode of a seed."""
    return f"episode_{seed:08d}.safetensors"


def write_episode(folder: str | Path, episode: Episode) -> dict[str, Any]:
    """Writes one episode file (atomically) and returns its line for the index."""
    tensors: dict[str, np.ndarray] = {
        "state": np.ascontiguousarray(episode.state, np.float32),
        "action": np.ascontiguousarray(episode.action, np.float32),
        "perturbed": np.ascontiguousarray(episode.perturbed, np.bool_),
    }
    for view, pictures in episode.images.items():
        encoded = [cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].ravel() for picture in pictures]
        tensors[f"png.{view}"] = np.concatenate(encoded)
        tensors[f"png_end.{view}"] = np.cumsum([len(data) for data in encoded]).astype(np.int64)
    entry: dict[str, Any] = {
        "file": episode_file(episode.seed),
        "seed": episode.seed,
        "instruction": episode.instruction,
        "success": episode.success,
        "steps": len(episode),
        "info": dict(episode.info),
    }
    metadata = {"entry": json.dumps(entry), "scenes": json.dumps(list(episode.scenes))}
    atomic_write_bytes(Path(folder) / entry["file"], save(tensors, metadata=metadata))
    return entry


def read_entry(path: str | Path) -> dict[str, Any]:
    """The index line of an episode file, from the file itself.

    Raises:
        UserError: missing, cut short or not an episode.
    """
    with _open(Path(path)) as file:
        metadata = file.metadata() or {}
        if "entry" not in metadata:
            raise UserError(f"{path}: not an episode file (no 'entry' in its metadata)")
        return dict(json.loads(metadata["entry"]))


def read_episode(path: str | Path) -> Episode:
    """Reads one episode with all its pictures decoded.

    Raises:
        UserError: missing, cut short or not an episode.
    """
    entry = read_entry(path)
    with _open(Path(path)) as file:
        names = set(file.keys())
        missing = {"state", "action", "perturbed"} - names
        if missing:
            raise UserError(f"{path}: episode has no {', '.join(sorted(missing))}; delete it and write it again")
        images = {}
        for name in sorted(names):
            if name.startswith("png."):
                view = name.removeprefix("png.")
                images[view] = _decode(file.get_tensor(name), file.get_tensor(f"png_end.{view}"), path)
        return Episode(
            images=images,
            state=file.get_tensor("state"),
            action=file.get_tensor("action"),
            perturbed=file.get_tensor("perturbed"),
            instruction=entry["instruction"],
            seed=entry["seed"],
            success=entry["success"],
            info=entry["info"],
            scenes=json.loads(file.metadata()["scenes"]),
        )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot read this episode ({error}); delete it and write it again") from None


def _decode(data: np.ndarray, ends: np.ndarray, path: str | Path) -> np.ndarray:
    pictures = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        picture = cv2.imdecode(data[start:end], cv2.IMREAD_COLOR)
        if picture is None:
            raise UserError(f"{path}: a picture in this episode is damaged; delete it and write it again")
        pictures.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
    return np.stack(pictures)


class EpisodeStore:
    """A folder of episodes, read by position: ``len(store)``, ``store[i]``, ``for episode in store``."""

    def __init__(self, path: str | Path) -> None:
        """Opens the index.

        Raises:
            UserError: the folder has no index, or the index is damaged or of another version.
        """
        self.path = Path(path)
        index = self.path / INDEX
        if not index.is_file():
            raise UserError(
                f"{self.path}: no {INDEX}; write demonstrations with `qwen-vla sim demos --out {self.path}`"
            )
        try:
            self.index: dict[str, Any] = json.loads(index.read_text())
            version, entries = self.index["version"], list(self.index["episodes"])
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{index}: damaged index; delete it and run `qwen-vla sim demos` again to rebuild"
            ) from None
        if version != VERSION:
            raise UserError(f"{index}: version {version!r}, this program reads version {VERSION}")
        self.entries: list[dict[str, Any]] = entries

    @cached_property
    def steps(self) -> int:
        """Steps in all episodes together."""
        return sum(int(entry["steps"]) for entry in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> Episode:
        return read_episode(self.path / self.entries[i]["file"])

    def __iter__(self) -> Iterator[Episode]:
        return (self[i] for i in range(len(self)))


def write_index(
    folder: str | Path, entries: Sequence[Mapping[str, Any]], failed_seeds: Sequence[int], about: Mapping[str, Any]
) -> None:
    """Writes ``dataset.json`` atomically, episodes in the order of their seeds.

    Args:
        folder: of the episodes.
        entries: what ``write_episode`` returned.
        failed_seeds: seeds tried without success; not tried again on resume.
        about: how the episodes were made (JSON): embodiment, channels, rate, picture size.
    """
    ordered = sorted(entries, key=lambda entry: entry["seed"])
    atomic_write_json(
        Path(folder) / INDEX,
        {"version": VERSION, **about, "failed_seeds": sorted(failed_seeds), "episodes": [dict(e) for e in ordered]},
    )
