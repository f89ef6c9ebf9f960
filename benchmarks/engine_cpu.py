"""The CPU part of ``engine.py``: a shipped checkpoint on one thread, from raw 640×480 pictures to a chunk."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import torch

from qwen_vla_core.actions.normalize import Quantiles
from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.engine.local import LocalEngine
from qwen_vla_core.interfaces import Observation, Request
from qwen_vla_core.model import flow
from qwen_vla_core.model.checkpoint import load_checkpoint, resolve_checkpoint
from qwen_vla_core.model.policy import QwenVLA, Stats
from qwen_vla_core.model.presets import build_tiny

STEPS = (4, 10)
Say = Callable[[str], None]


def tiny() -> QwenVLA:
    """The preset with random weights (its backbone is Qwen3.5; the shipped checkpoint's is Qwen3-VL)."""
    robots = [load_embodiment(name) for name in ("aloha", "widowx", "mobile_base")]

    def spread(names: Sequence[str]) -> Quantiles:
        return Quantiles((-1.0,) * len(names), (1.5,) * len(names), tuple(names))

    stats = {robot.name: Stats(spread(robot.channels), spread(robot.state_channels)) for robot in robots}
    policy = build_tiny(robots, stats).eval()
    for parameter in policy.decoder.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return policy


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


def measure(checkpoint: str, embodiment: str, repeats: int, compiled: bool, say: Say) -> dict[str, Any]:
    """Parity, the paths beside each other, the engine's parts, and several robots at once."""
    torch.set_num_threads(1)
    policy = tiny() if checkpoint == "tiny" else load_checkpoint(resolve_checkpoint(checkpoint))
    engine = LocalEngine(policy)
    asked = request(policy, embodiment)
    report: dict[str, Any] = {
        "checkpoint": checkpoint,
        "embodiment": embodiment,
        "torch": torch.__version__,
        "rows": [],
    }
    engines = {"engine": engine} | ({"compiled": LocalEngine(policy, compile=True)} if compiled else {})
    for steps in STEPS:
        reference = cached(policy, asked, steps)
        row: dict[str, Any] = {"steps": steps}
        calls: list[Callable[[], Any]] = [
            functools.partial(uncached, policy, asked, steps),
            functools.partial(cached, policy, asked, steps),
        ]
        for name, each in engines.items():
            each.steps = steps
            start = time.perf_counter()
            answer = each.predict([asked])[0].chunk.actions_hc
            row[f"{name}_first_s"] = time.perf_counter() - start
            row[f"{name}_parity"] = float(np.abs(answer - reference).max() / np.abs(reference).max())
            calls.append(functools.partial(each.predict, [asked]))
        slow, middle, *fast = interleaved(calls, repeats)
        row |= {"uncached_ms": slow, "cached_ms": middle}
        say(f"{steps:>2} steps: eager uncached {slow:.2f} ms, eager {middle:.2f} ms")
        for name, value in zip(engines, fast, strict=True):
            row |= {f"{name}_ms": value, f"{name}_over_uncached": slow / value}
            say(f"          {name} {value:.2f} ms: {slow / value:.2f}x, parity {row[f'{name}_parity']:.1e}")
        report["rows"].append(row)
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


def scenes(asked: Request) -> list[np.ndarray]:
    """As many pictures as the request has, smooth as a camera's are: noise would not compress."""
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return [cv2.resize(coarse, (640, 480), interpolation=cv2.INTER_CUBIC) for _ in asked.observation.images]


@torch.inference_mode()
def parts(engine: LocalEngine, asked: Request, repeats: int) -> dict[str, float]:
    """Where the engine's time goes, at the checkpoint's number of steps."""
    ready = engine._prepare(asked.observation, asked.embodiment)
    packed = engine._pack([ready])
    prefix = engine._see(packed)
    noise = engine._noise([asked], packed)
    chunk = engine._sample(packed, prefix, noise)[0]
    encoded = [cv2.imencode(".jpg", view, (cv2.IMWRITE_JPEG_QUALITY, 80))[1] for view in scenes(asked)]
    names = ("decode jpeg", "prepare", "pack", "prefill", "Euler steps", "postprocess", "whole")
    values = interleaved(
        [
            lambda: [cv2.cvtColor(cv2.imdecode(each, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB) for each in encoded],
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
    """Two requests of every robot: one call each, one call per robot, everything padded together."""
    requests = [request(policy, name) for name in policy.embodiments]
    twice = [*requests, *[request(policy, name, 1) for name in policy.embodiments]]

    per_robot = [[each for each in twice if each.embodiment == name] for name in policy.embodiments]
    names = [
        f"{len(twice)} requests, one call each",
        f"{len(twice)} requests, one call per robot",
        f"{len(twice)} requests, one padded batch",
    ]
    values = interleaved(
        [
            lambda: [engine.predict([each]) for each in twice],
            lambda: [engine.predict(pair) for pair in per_robot],
            lambda: engine.predict(twice),
        ],
        max(repeats // 2, 5),
    )
    return dict(zip(names, values, strict=True))
