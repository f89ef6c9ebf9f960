#!/usr/bin/env python3
"""Samples per CPU-second: our loader beside the plain way, on the same pictures and numbers, in one run.

python benchmarks/loader.py [--episodes 24] [--samples 400] [--workers 2] [--batches 60] [--json]

The data: two cameras over a textured table with moving things on it, written by our writer (H.264, GOP 2) as LeRobot
v3, and the same packets copied into the v2.1 layout: one parquet file per episode, one mp4 per episode and camera.
"noisy" adds so much of a sensor's noise that the encoder keeps part of it: the hardest thing to decode.
A sample is one step: both pictures as RGB, state, the next 16 actions, the padding mask.

The plain way is a dataset class written straight down, for the v2.1 layout: open the episode's parquet file, read the
columns it needs, cut the window; per camera open the episode's mp4 with PyAV, seek to the keyframe before the frame,
decode up to it, convert it to RGB. Nothing stays open and nothing is remembered between items; PyAV as it comes. The
layout favours it: in v3 the files that it would have to open hold many episodes ("plain, v3").

CPU-seconds are this process's (all threads), one process, the same random steps for everyone, files in the page cache.
"ours, no caches" keeps files open and nothing else; "ours" has the loader's default caches. Wall time with worker
processes, as a training sees it, comes last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow.parquet as pq

from qwen_vla_core.data.contract import ChannelGroup, DataContract
from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.data.lerobot import LeRobotDataset, LeRobotWriter
from qwen_vla_core.data.loader import MixtureLoader
from qwen_vla_core.data.mixture import Draw, Mixture
from qwen_vla_core.data.mixture_recipe import load_mixture
from qwen_vla_core.data.sample_maker import SampleMaker, SampleOptions, SourceReference
from qwen_vla_core.data.video import choose_decoder
from qwen_vla_core.embodiment.spec import PromptSpec

VIEWS = ("ego", "wrist")
FPS, HORIZON, CHANNELS, STEPS = 30.0, 16, 14, 150
TRIES = 3  # each figure is the best of so many: other programs only ever make it worse


# ---- data -----------------------------------------------------------------------------------------------------------


def contract() -> DataContract:
    """Two arms of seven channels."""
    names = tuple(f"{arm}_{i}" for arm in ("left", "right") for i in range(7))
    group = (ChannelGroup("arms", "joint_position", "rad", names),)
    return DataContract(
        PromptSpec("Benchmark", "dual arms"), FPS, HORIZON, "absolute_joint", VIEWS, state=group, action=group
    )


def film(seed: int, size: int, noise: float) -> np.ndarray:
    """(STEPS, size, size, 3) uint8: a table, three things that move over it, their shadows."""
    rng = np.random.default_rng(seed)
    grain = cv2.GaussianBlur(rng.normal(0, 1, (size, size, 1)), (0, 0), sigmaX=size / 8, sigmaY=1.2)[..., None]
    light = np.linspace(0.85, 1.1, size)[:, None, None]
    table = (np.array([168, 140, 110]) + 12 * grain / grain.std()) * light
    phase, speed = rng.uniform(0, 6, (3, 2)), rng.uniform(0.02, 0.06, (3, 2))
    frames = []
    for t in range(STEPS):
        picture = table.copy()
        for i, colour in enumerate(((190, 40, 40), (40, 150, 60), (50, 70, 190))):
            x, y = (size * (0.5 + 0.33 * np.sin(phase[i] + speed[i] * t))).astype(int)
            r = size // 12
            cv2.ellipse(picture, (int(x + r // 2), int(y + r)), (r, r // 2), 0, 0, 360, (90, 75, 60), -1, cv2.LINE_AA)
            cv2.rectangle(picture, (int(x - r), int(y - r)), (int(x + r), int(y + r)), colour, -1, cv2.LINE_AA)
            cv2.line(picture, (int(x), int(y)), (size // 2, 0), (70, 70, 75), max(2, size // 24), cv2.LINE_AA)
        if noise:
            picture += rng.normal(0, noise, picture.shape)
        frames.append(np.clip(picture, 0, 255).astype(np.uint8))
    return np.stack(frames)


def rows(seed: int) -> EpisodeRows:
    """Smooth motion."""
    rng = np.random.default_rng(seed)
    path = np.sin(np.linspace(0, 6, STEPS + 1)[:, None] * rng.uniform(0.5, 2, CHANNELS) + rng.uniform(0, 6, CHANNELS))
    return EpisodeRows(
        state=path[:-1].astype(np.float32),
        action=path[1:].astype(np.float32),
        timestamp=np.arange(STEPS) / FPS,
        task=np.zeros(STEPS, np.int64),
        perturbed=np.zeros(STEPS, bool),
    )


def write(folder: Path, size: int, noise: float, episodes: int) -> None:
    """``folder/v3`` and, with the same packets, ``folder/v2``."""
    arguments: dict[str, Any] = {"family": "manipulation", "views": dict.fromkeys(VIEWS, (size, size))}
    with LeRobotWriter(folder / "v3", contract(), **arguments) as writer:
        for episode in range(episodes):
            frames = {view: film(2 * episode + i, size, noise) for i, view in enumerate(VIEWS)}
            writer.add_episode(rows(episode), [f"task {episode % 5}"], frames)
    data = LeRobotDataset(folder / "v3")
    with LeRobotWriter(folder / "v2", contract(), version="v2.1", **arguments) as writer:
        for episode in range(episodes):
            clips = {view: data.clip(episode, view) for view in VIEWS}
            writer.add_episode(data.rows(episode), data.tasks, clips)


# ---- the plain way --------------------------------------------------------------------------------------------------


class Plain:
    """See the top of this file; nothing here is slower than it has to be."""

    columns = ("observation.state", "action", "task_index")

    def __init__(self, root: Path, episode_files: bool) -> None:
        self.root, self.data = root, LeRobotDataset(root)  # its metadata only: where an episode lies
        self.episode_files = episode_files

    def __call__(self, episode: int, t: int) -> dict[str, np.ndarray]:
        number = int(self.data.table.file[episode])
        name = f"episode_{number:06d}" if self.episode_files else f"file-{number:03d}"
        table = pq.read_table(self.root / f"data/chunk-000/{name}.parquet", columns=list(self.columns))
        first = 0 if self.episode_files else int(self.data.table.first_row[episode])
        length = int(self.data.lengths[episode])
        state, action = (
            table[name].combine_chunks().flatten().to_numpy().reshape(-1, CHANNELS)[first : first + length]
            for name in self.columns[:2]
        )
        steps = np.arange(t, t + HORIZON)
        sample = {
            "state": state[t],
            "action": action[np.minimum(steps, length - 1)],
            "mask": steps < length,
            "task": table["task_index"][first + t].as_py(),
        }
        for view in VIEWS:
            place = self.data.table.videos[f"observation.images.{view}"]
            path = self.video(view, int(place.file[episode]))
            sample[view] = self.frame(path, (0.0 if self.episode_files else float(place.start_s[episode])) + t / FPS)
        return sample

    def video(self, view: str, number: int) -> Path:
        """The mp4 of an episode."""
        if self.episode_files:
            return self.root / f"videos/chunk-000/observation.images.{view}/episode_{number:06d}.mp4"
        return self.root / f"videos/observation.images.{view}/chunk-000/file-{number:03d}.mp4"

    @staticmethod
    def frame(path: Path, seconds: float) -> np.ndarray:
        """The frame shown at a time."""
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            wanted = round(seconds / stream.time_base)
            container.seek(wanted, stream=stream)
            for frame in container.decode(stream):
                if frame.pts is not None and frame.pts >= wanted:
                    return frame.to_ndarray(format="rgb24")
        raise RuntimeError(f"{path}: no frame at {seconds} s")


# ---- measuring ------------------------------------------------------------------------------------------------------


def per_cpu_second(make: Callable[[int, int], Any], tries: list[list[tuple[int, int]]]) -> float:
    """Samples per CPU-second, the best of some tries; each asks for other steps, so that no cache knows them all."""
    best = np.inf
    for steps in tries:
        began = time.process_time()
        for episode, t in steps:
            make(episode, t)
        best = min(best, (time.process_time() - began) / len(steps))
    return 1 / best


def ours(root: Path, options: SampleOptions) -> Callable[[int, int], Any]:
    """Our way to a sample, without processes around it."""
    data = LeRobotDataset(root)
    maker = SampleMaker([SourceReference(root, "manipulation", None, "robot")], _no_other, options, opened={0: data})
    return lambda episode, t: maker.make(Draw(0, episode, t, 0))


def _no_other(path: Path, family: str, embodiment: str | None) -> Any:
    raise AssertionError("everything is open already")


def check_equal(plain: Plain, make: Callable[[int, int], Any], steps: list[tuple[int, int]]) -> None:
    """Both ways give the same sample; a fast wrong answer is worth nothing."""
    for episode, t in steps:
        a, b = plain(episode, t), make(episode, t)
        for view in VIEWS:
            # PyAV's one-off conversion and the kept one are the same filter: equal to the last bit.
            np.testing.assert_array_equal(a[view], b.images[view][0])
        np.testing.assert_array_equal(a["mask"], b.step_mask_h)
        np.testing.assert_array_equal(a["action"], b.actions_hc)
        np.testing.assert_array_equal(a["state"], b.state)


def wall(root: Path, batches: int, workers: int, options: SampleOptions) -> dict[str, float]:
    """Samples per second of wall time with worker processes, after they have started."""
    text = (
        "batch_size: 32\nfamilies: [{name: manipulation, weight: 1, datasets: [{path: %s}]}]\nabsent: [human, "
        "navigation, synthetic, general_vl, spatial_grounding, driving_vqa, captions]\n"
    )
    recipe = root.parent / "recipe.yaml"
    recipe.write_text(text % root.name)
    with MixtureLoader(Mixture(load_mixture(recipe)), options, workers=workers) as loader:
        stream = loader.batches()
        for _ in range(2 * workers + 1):
            next(stream)
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(batches):
            next(stream)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        stream.close()  # type: ignore[attr-defined]
    return {"samples_per_s": 32 * batches / seconds, "trainer_cpu_ms_per_sample": 1e3 * cpu / (32 * batches)}


def measure(size: int, noise: float, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one dataset."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, size, noise, args.episodes)
        rng = np.random.default_rng(0)
        drawn = rng.integers((args.episodes, STEPS), size=(TRIES, args.samples, 2))
        tries = [[(int(episode), int(t)) for episode, t in steps] for steps in drawn]
        plain, plain_v3 = Plain(folder / "v2", True), Plain(folder / "v3", False)
        bare = SampleOptions(cache_mb=0, rows_cache_mb=0)
        check_equal(plain, ours(folder / "v3", SampleOptions()), tries[0][:20])
        check_equal(plain_v3, ours(folder / "v3", bare), tries[0][:20])
        videos = list((folder / "v2").rglob("*.mp4"))
        rates = {
            "plain": per_cpu_second(plain, tries),
            "plain, v3": per_cpu_second(plain_v3, tries),
            "ours, no caches": per_cpu_second(ours(folder / "v3", bare), tries),
            "ours": per_cpu_second(ours(folder / "v3", SampleOptions()), tries),
        }
        return {
            "bytes_per_frame": sum(video.stat().st_size for video in videos) / (len(videos) * STEPS),
            "samples_per_cpu_s": rates,
            "ratio": rates["ours"] / rates["plain"],
            "ratio_no_caches": rates["ours, no caches"] / rates["plain"],
            "wall": {
                f"to {target}x{target}": wall(
                    folder / "v3", args.batches, args.workers, SampleOptions(cache_mb=0, size=(target, target))
                )
                for target in {size, 96}
                if args.workers
            },
        }


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=24, help="of 150 steps each (default: 24)")
    parser.add_argument("--samples", type=int, default=400, help="per try (default: 400)")
    parser.add_argument("--workers", type=int, default=2, help="processes for the wall time; 0: none (default: 2)")
    parser.add_argument("--batches", type=int, default=60, help="of 32 samples, for the wall time (default: 60)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    report: dict[str, Any] = {"decoder": choose_decoder(), "views": len(VIEWS), "workers": args.workers}
    datasets = {"224x224": (224, 0.0), "224x224 noisy": (224, 8.0), "96x96": (96, 0.0)}
    report["datasets"] = {name: measure(size, noise, args) for name, (size, noise) in datasets.items()}
    if args.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{len(VIEWS)} cameras, decoder {report['decoder']}; samples per CPU-second")
    names = list(report["datasets"]["224x224"]["samples_per_cpu_s"])
    print(f"{'':<14} {'B/frame':>8} " + " ".join(f"{name:>15}" for name in names) + f" {'ours/plain':>11}")
    for name, figures in report["datasets"].items():
        rates = " ".join(f"{rate:>15.0f}" for rate in figures["samples_per_cpu_s"].values())
        print(f"{name:<14} {figures['bytes_per_frame']:>8.0f} {rates} {figures['ratio']:>10.1f}x")
    print(f"\nwall time, {args.workers} workers, no frame cache")
    for name, figures in report["datasets"].items():
        for size, line in figures["wall"].items():
            print(
                f"{name + ' ' + size:<26} {line['samples_per_s']:>7.0f} samples/s, "
                f"{line['trainer_cpu_ms_per_sample']:.2f} ms of the trainer's CPU each"
            )


if __name__ == "__main__":
    main()
