"""Open loop: how far predicted chunks are from what was recorded, beside two policies that know nothing.

Errors are in normalised units, so that metres and radians may be averaged: 2 is the whole range between the 1 % and
99 % quantiles of a channel. A low error is no success in closed loop, but it is measured in minutes, has little noise,
and two checkpoints that are asked about the same frames can be compared frame by frame. The two other policies [O]:
stay where the robot is, and repeat the action that came before; who is no better than they has learned nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap

from qwen_vla_core.actions.conventions import relative_parts, to_relative
from qwen_vla_core.actions.rest import rest, stay
from qwen_vla_core.data.dataset import ActionDataset, EpisodeRows
from qwen_vla_core.data.samples import plain_pictures
from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import Observation
from qwen_vla_core.model.policy import QwenVLA

POLICIES = ("policy", "stay", "repeat")


@dataclass(frozen=True)
class Frame:
    """One question to the policy, and the answers.

    Attributes:
        episode, t: where in the dataset.
        observation: what was to be seen.
        target_hc: (H, c) what was recorded, normalised.
        valid_h: (H,) bool, False behind the end of the episode or of the instruction.
        stay_hc, repeat_hc: (H, c) normalised; None where the robot's place or the action before is not known.
    """

    episode: int
    t: int
    observation: Observation
    target_hc: np.ndarray
    valid_h: np.ndarray
    stay_hc: np.ndarray | None
    repeat_hc: np.ndarray | None


def choose_frames(lengths: Sequence[int], count: int, seed: int) -> list[tuple[int, int]]:
    """``count`` frames (episode, t) spread evenly over episodes, at random within them; the same for the same seed.

    Args:
        lengths: steps of each episode.
        count: how many; all there are, if they are fewer.
        seed: of the choice.

    Raises:
        UserError: there are none.
    """
    usable = [episode for episode, length in enumerate(lengths) if length > 0]
    if not usable or count < 1:
        raise UserError("open loop: needs at least one frame: give a dataset with episodes, and --frames of at least 1")
    rng = np.random.default_rng([seed, len(lengths)])
    orders = {episode: rng.permutation(lengths[episode]) for episode in usable}
    chosen: list[tuple[int, int]] = []
    for place in range(max(lengths)):
        for episode in usable:
            if place < lengths[episode] and len(chosen) < count:
                chosen.append((episode, int(orders[episode][place])))
    return sorted(chosen)


def compare(
    policy: QwenVLA,
    embodiment: str,
    dataset: ActionDataset,
    count: int = 200,
    *,
    seed: int = 0,
    steps: int | None = None,
    batch_size: int = 16,
    hold_at_end: bool = False,
    on_frame: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Errors of a policy on frames of a dataset it has not learned from.

    Args:
        policy: with statistics of the robot.
        embodiment: its name in the checkpoint.
        dataset: recorded episodes of that robot.
        count: frames.
        seed: of the choice of frames and of the sampler's noise.
        steps: Euler steps; None: the checkpoint's.
        batch_size: frames in one forward pass; it does not change the answers.
        hold_at_end: after an episode's end its last target counts, as in the mixtures.
        on_frame: called with the number of frames done, for a progress bar.

    Returns:
        ``errors``: for policy, stay and repeat the mean absolute error with a 95 % interval (bootstrap over episodes),
        over the chunk, of its first action alone, and per channel; ``frames``: one row each, with the same means.

    Raises:
        UserError: the data are not of this robot, a view is missing, or there are no frames.
    """
    robot = policy.embodiment(embodiment)
    check(robot, dataset)
    frames = choose_frames([int(length) for length in dataset.lengths], count, seed)
    rows: list[dict[str, Any]] = []
    errors: dict[str, list[np.ndarray]] = {name: [] for name in POLICIES}  # per frame: (c,) mean over valid steps
    for batch in _batches(_frames(policy, robot, dataset, frames, hold_at_end), batch_size):
        predicted = _predict(policy, robot, batch, seed, steps)
        for frame, chunk_hc in zip(batch, predicted, strict=True):
            row: dict[str, Any] = {"episode": frame.episode, "t": frame.t}
            for name, answer in (("policy", chunk_hc), ("stay", frame.stay_hc), ("repeat", frame.repeat_hc)):
                if answer is None:
                    continue
                wrong = np.abs(answer - frame.target_hc)
                errors[name].append(wrong[frame.valid_h].mean(0))
                row[name] = float(wrong[frame.valid_h].mean())
                row[f"{name}_first"] = float(wrong[0].mean())
            rows.append(row)
        if on_frame is not None:
            on_frame(len(rows))
    return {
        "embodiment": robot.name,
        "dataset": dataset.name,
        "content": dataset.content_hash(),
        "seed": seed,
        "errors": {name: _summary(rows, name, errors[name], robot) for name in POLICIES if errors[name]},
        "frames": rows,
    }


def check(robot: Embodiment, dataset: ActionDataset) -> None:
    """Whether the data are of this robot.

    Raises:
        UserError: other channels, another convention or rate, or a view without pictures.
    """
    contract = dataset.contract
    pairs = {
        "action channels": (tuple(robot.channels), contract.action_channels),
        "state channels": (tuple(robot.state_channels), contract.state_channels),
        "control.convention": (robot.control.convention, contract.convention),
        "control.frequency_hz": (float(robot.control.frequency_hz), contract.frequency_hz),
    }
    for name, (wanted, found) in pairs.items():
        if wanted != found:
            raise UserError(f"dataset {dataset.name}: its {name} are {found}, those of {robot.name} are {wanted}")
    missing = [view for view in robot.views if view not in dataset.views]
    if missing:
        raise UserError(f"dataset {dataset.name}: has no pictures of view {', '.join(missing)} of {robot.name}")


def difference(first: dict[str, Any], second: dict[str, Any]) -> tuple[float, float, float]:
    """Mean of (error of ``second`` − error of ``first``) over the same frames, and its 95 % interval.

    Args:
        first, second: from ``compare``, with the same data, count and seed.

    Raises:
        UserError: they were asked about other frames.
    """
    places = [[(row["episode"], row["t"]) for row in report["frames"]] for report in (first, second)]
    if places[0] != places[1] or first["content"] != second["content"]:
        raise UserError("open loop: the two results are not about the same frames; use the same data, frames and seed")
    gaps = [b["policy"] - a["policy"] for a, b in zip(first["frames"], second["frames"], strict=True)]
    return _interval(gaps, [row["episode"] for row in first["frames"]])


def _frames(
    policy: QwenVLA, robot: Embodiment, dataset: ActionDataset, chosen: Sequence[tuple[int, int]], hold_at_end: bool
) -> Iterator[Frame]:
    quantiles = policy.embodiment_stats(robot.name).action
    parts = relative_parts(robot.control.convention, robot.actions, robot.state)
    horizon = robot.control.horizon
    known: tuple[int, EpisodeRows] | None = None
    for episode, t in chosen:
        if known is None or known[0] != episode:
            known = (episode, dataset.rows(episode))
        rows = known[1]
        actions, valid = rows.chunk(t, horizon, hold_at_end=hold_at_end)
        if hold_at_end and t + horizon > len(rows):
            columns, still = rest(robot.actions)
            actions[len(rows) - t :, columns] = still

        def normal(actions_hc: np.ndarray, state: np.ndarray = rows.state[t]) -> np.ndarray:
            return quantiles.normalize(to_relative(parts, actions_hc, state))

        here = stay(robot.actions, robot.state_channels, rows.state[t])
        before = here if t == 0 else rows.action[t - 1]
        images = {view: dataset.frames(episode, view, [t]) for view in robot.views}
        yield Frame(
            episode,
            t,
            Observation(plain_pictures(images), rows.state[t].astype(np.float64), dataset.tasks[int(rows.task[t])]),
            normal(actions),
            valid,
            None if here is None else normal(np.repeat(here[None], horizon, 0)),
            None if before is None else normal(np.repeat(before[None], horizon, 0)),
        )


def _batches(frames: Iterator[Frame], size: int) -> Iterator[list[Frame]]:
    batch: list[Frame] = []
    for frame in frames:
        batch.append(frame)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _predict(policy: QwenVLA, robot: Embodiment, batch: Sequence[Frame], seed: int, steps: int | None) -> np.ndarray:
    """(B, H, c) normalised; each frame's noise is its own, whatever the batch."""
    shape = (robot.control.horizon, policy.config.decoder.channels)
    noise = np.stack(
        [np.random.default_rng([seed, frame.episode, frame.t]).standard_normal(shape, np.float32) for frame in batch]
    )
    inputs = policy.collate([frame.observation for frame in batch], robot.name)
    chunks = policy.sample(inputs, steps, torch.from_numpy(noise).to(policy.device))
    return chunks[:, :, : len(robot.channels)].double().cpu().numpy().clip(-1.0, 1.0)


def _summary(
    rows: Sequence[dict[str, Any]], name: str, errors: Sequence[np.ndarray], robot: Embodiment
) -> dict[str, Any]:
    rows = [row for row in rows if name in row]
    mean, low, high = _interval([row[name] for row in rows], [row["episode"] for row in rows])
    return {
        "chunk": mean,
        "interval_95": [low, high],
        "first_action": float(np.mean([row[f"{name}_first"] for row in rows])),
        "channels": dict(zip(robot.channels, map(float, np.mean(errors, axis=0)), strict=True)),
    }


def _interval(values: Sequence[float], episodes: Sequence[int]) -> tuple[float, float, float]:
    """The mean and its 95 % interval: whole episodes are drawn again, because frames of one are alike."""
    values_n, episodes_n = np.asarray(values), np.asarray(episodes)
    names = np.unique(episodes_n)
    sums = np.array([values_n[episodes_n == name].sum() for name in names])
    counts = np.array([(episodes_n == name).sum() for name in names])
    mean = float(values_n.mean())
    if len(names) < 2:
        return mean, float("nan"), float("nan")

    def ratio(total: np.ndarray, number: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(total.sum(axis) / number.sum(axis))

    drawn = bootstrap(
        (sums, counts), ratio, paired=True, vectorized=True, n_resamples=2000, method="percentile",
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return mean, float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)
