"""The CPU part of ``engine.py``: a shipped checkpoint on one thread, from raw 640×480 pictures to a chunk."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from qwen_vla_core.engine.local import LocalEngine
from qwen_vla_core.interfaces import Observation, Request
from qwen_vla_core.model import flow
from qwen_vla_core.model.checkpoint import load_checkpoint, resolve_checkpoint
from qwen_vla_core.model.policy import QwenVLA

STEPS = (4, 10)
Say = Callable[[str], None]


def request(policy: QwenVLA, name: str, seed: int = 0) -> Request:
    """Random pictures of a camera's size, a rest state, fixed noise."""
    robot, rng = policy.embodiment(name), np.random.default_rng(seed)
    images = {view: rng.integers(0, 256, (480, 640, 3), dtype=np.uint8) for view in robot.views}
    noise = rng.standard_normal((robot.control.horizon, policy.config.decoder.channels)).astype(np.float32)
    return Request(Observation(images, np.zeros(len(robot.state_channels)), "pick up the red cube"), name, None, noise)


@torch.no_grad()
def uncached(policy: QwenVLA, asked: Request, steps: int) -> np.ndarray:
    """The eager path that keeps no keys and values: the context goes through every block again in every Euler step."""
    inputs = policy.preprocess(asked.observation, asked.embodiment)
    context = policy._context(inputs, policy._encode(inputs))
    mask = inputs["channel_mask"]
    start = torch.where(mask[:, None], torch.as_tensor(asked.noise_hk)[None], 0.0)
    chunk = flow.integrate(lambda noisy, tau: policy.decoder.denoise_step(context, noisy, tau, mask), start, steps)
    return policy.postprocess(chunk[0], asked.observation, asked.embodiment).actions_hc


def cached(policy: QwenVLA, asked: Request, steps: int) -> np.ndarray:
    """``QwenVLA.predict``: the eager path with the context's keys and values kept."""
    noise = torch.as_tensor(asked.noise_hk)[None]
    return policy.predict(asked.observation, asked.embodiment, steps, noise).actions_hc


def interleaved(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median milliseconds of each call, of this thread's CPU time: on an idle machine that is the wall clock's.

    The calls take turns, and CPU time does not count other programs: figures hold on a machine that is not idle.
    """
    times: list[list[float]] = [[] for _ in calls]
    for index in range(repeats + 3):
        for call, kept in zip(calls, times, strict=True):
            start = time.thread_time()
            call()
            if index >= 3:
                kept.append(1000 * (time.thread_time() - start))
    return [statistics.median(kept) for kept in times]


def measure(checkpoint: str, embodiment: str, repeats: int, say: Say) -> dict[str, Any]:
    """Parity, the three paths beside each other, the engine's parts, and several robots at once."""
    torch.set_num_threads(1)
    policy = load_checkpoint(resolve_checkpoint(checkpoint))
    engine = LocalEngine(policy)
    asked = request(policy, embodiment)
    report: dict[str, Any] = {
        "checkpoint": checkpoint,
        "embodiment": embodiment,
        "torch": torch.__version__,
        "rows": [],
    }
    for steps in STEPS:
        engine.steps = steps
        reference = cached(policy, asked, steps)
        answer = engine.predict([asked])[0].chunk.actions_hc
        slow, middle, fast = interleaved(
            [
                lambda s=steps: uncached(policy, asked, s),
                lambda s=steps: cached(policy, asked, s),
                lambda: engine.predict([asked]),
            ],
            repeats,
        )
        row = {
            "steps": steps,
            "uncached_ms": slow,
            "cached_ms": middle,
            "engine_ms": fast,
            "over_uncached": slow / fast,
            "parity": float(np.abs(answer - reference).max() / np.abs(reference).max()),
        }
        report["rows"].append(row)
        say(
            f"{steps:>2} steps: eager uncached {slow:.2f} ms, eager {middle:.2f} ms, engine {fast:.2f} ms: "
            f"{slow / fast:.2f}x, parity {row['parity']:.1e}"
        )
    engine.steps = None
    report["parts_ms"] = parts(engine, asked, repeats)
    for name, value in report["parts_ms"].items():
        say(f"  {name:<24}{value:8.3f} ms")
    report["outside_share"] = report["parts_ms"]["outside the model"] / report["parts_ms"]["whole"]
    say(f"  outside the model: {report['outside_share']:.1%}")
    report["batches_ms"] = batches(engine, policy, repeats)
    for name, value in report["batches_ms"].items():
        say(f"  {name:<40}{value:8.2f} ms")
    return report


@torch.inference_mode()
def parts(engine: LocalEngine, asked: Request, repeats: int) -> dict[str, float]:
    """Where the engine's time goes, at the checkpoint's number of steps."""
    ready = engine._prepare(asked.observation, asked.embodiment)
    packed = engine._pack([ready])
    prefix = engine._see(packed)
    noise = engine._noise([asked], packed)
    chunk = engine._sample(packed, prefix, noise)[0]
    names = ("prepare", "pack", "prefill", "Euler steps", "postprocess", "whole")
    values = interleaved(
        [
            lambda: engine._prepare(asked.observation, asked.embodiment),
            lambda: engine._pack([ready]),
            lambda: engine._see(packed),
            lambda: engine._sample(packed, prefix, noise),
            lambda: engine.policy.postprocess(chunk, asked.observation, asked.embodiment),
            lambda: engine.predict([asked]),
        ],
        repeats,
    )
    found = dict(zip(names, values, strict=True))
    return {**found, "outside the model": found["whole"] - found["prefill"] - found["Euler steps"]}


def batches(engine: LocalEngine, policy: QwenVLA, repeats: int) -> dict[str, float]:
    """One request of every robot: one call each, one call with equal shapes together, everything padded together."""
    requests = [request(policy, name) for name in policy.embodiments]
    twice = [*requests, *[request(policy, name, 1) for name in policy.embodiments]]

    def padded(asked: Sequence[Request]) -> None:
        with torch.inference_mode():
            packed = engine._pack([engine._prepare(each.observation, each.embodiment) for each in asked])
            engine._sample(packed, engine._see(packed), engine._noise(asked, packed))

    names = [
        f"{len(twice)} requests, one call each",
        f"{len(twice)} requests, one call",
        f"{len(twice)} requests, one padded batch",
    ]
    values = interleaved(
        [
            lambda: [engine.predict([each]) for each in twice],
            lambda: engine.predict(twice),
            lambda: padded(twice),
        ],
        max(repeats // 2, 5),
    )
    return dict(zip(names, values, strict=True))
