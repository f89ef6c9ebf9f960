"""Run by an interpreter that has lerobot (``LEROBOT_PYTHON``), never imported by tests: reads and writes with it.

python check_with_lerobot.py read FOLDER OUT.npz [--backend pyav|torchcodec]   what lerobot's loader gives
python check_with_lerobot.py convert FOLDER                                    lerobot's own v2.1 → v3.0, in place
python check_with_lerobot.py write FOLDER IN.npz                               a dataset recorded by lerobot itself
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset


def read(folder: Path, out: Path, backend: str | None) -> None:
    """Every frame through ``LeRobotDataset.__getitem__``."""
    dataset = LeRobotDataset("local/check", root=folder, video_backend=backend)
    columns: dict[str, list] = {}
    for index in range(len(dataset)):
        for key, value in dataset[index].items():
            if key in dataset.meta.camera_keys:
                value = (value.numpy() * 255).round().astype(np.uint8).transpose(1, 2, 0)
            columns.setdefault(key, []).append(value if isinstance(value, str) else np.asarray(value))
    arrays = {
        key: np.array(values) if isinstance(values[0], str) else np.stack(values) for key, values in columns.items()
    }
    stats = {
        f"stats:{name}:{key}": value
        for name, entry in (dataset.meta.stats or {}).items()
        for key, value in entry.items()
    }
    lengths = np.array([episode["length"] for episode in dataset.meta.episodes])
    np.savez(out, **arrays, **stats, lengths=lengths, fps=dataset.fps, tasks=np.array(list(dataset.meta.tasks.index)))


def convert(folder: Path) -> None:
    """lerobot's converter of v2.1 to v3.0; the old dataset is left beside it as ``_old``."""
    from lerobot.datasets.v30.convert_dataset_v21_to_v30 import convert_dataset

    convert_dataset(repo_id=folder.name, root=folder.parent, push_to_hub=False)


def write(folder: Path, source: Path) -> None:
    """Records the episodes of an npz (state, action, ego, lengths, tasks) with lerobot's own writer."""
    given = np.load(source)
    names = json.loads(str(given["names"]))
    features = {
        "observation.state": {"dtype": "float32", "shape": given["state"].shape[1:], "names": names},
        "action": {"dtype": "float32", "shape": given["action"].shape[1:], "names": names},
        "observation.images.ego": {
            "dtype": "video",
            "shape": given["ego"].shape[1:],
            "names": ["height", "width", "channels"],
        },
    }
    dataset = LeRobotDataset.create(
        "local/check", int(given["fps"]), features, root=folder, vcodec=str(given["vcodec"])
    )
    start = 0
    for length, task in zip(given["lengths"], given["tasks"], strict=True):
        for row in range(start, start + length):
            frame = {"observation.state": given["state"][row], "action": given["action"][row], "task": str(task)}
            dataset.add_frame(frame | {"observation.images.ego": given["ego"][row]})
        dataset.save_episode(parallel_encoding=False)
        start += length
    dataset.finalize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=("read", "convert", "write"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--backend")
    args = parser.parse_args()
    if args.job == "read":
        read(args.folder, args.file, args.backend)
    elif args.job == "convert":
        convert(args.folder)
    else:
        write(args.folder, args.file)
