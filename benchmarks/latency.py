#!/usr/bin/env python3
"""Observation → chunk, split into its parts: decode, preprocess, backbone, context, decoder per Euler step.

    python benchmarks/latency.py [--checkpoint generalist] [--embodiment aloha] [--repeats 40] [--json]

Protocol: one thread, batch 1, every view of the embodiment as a 640×480 picture, the embodiment's prompt, medians after
a warm-up. "decode" is what the policy node does to one set of messages: raw pictures are views on the message's memory,
compressed ones are JPEG (quality 80) through OpenCV. Shares are of one observation with raw pictures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch

from qwen_vla_core.interfaces import Observation
from qwen_vla_core.model.checkpoint import load_checkpoint, resolve_checkpoint

SIZE = (640, 480)


def timed(call: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of a call, after three that do not count."""
    times = []
    for index in range(repeats + 3):
        start = time.perf_counter()
        call()
        if index >= 3:
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


@torch.no_grad()
def measure(checkpoint: str, embodiment: str, repeats: int) -> dict[str, Any]:
    """All parts in milliseconds."""
    torch.set_num_threads(1)
    policy = load_checkpoint(resolve_checkpoint(checkpoint))
    robot = policy.embodiment(embodiment)
    rng = np.random.default_rng(0)
    scene = cv2.resize(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), SIZE, interpolation=cv2.INTER_CUBIC)
    raw = {view: scene.tobytes() for view in robot.views}
    jpeg = {view: cv2.imencode(".jpg", scene, (cv2.IMWRITE_JPEG_QUALITY, 80))[1] for view in robot.views}
    observation = Observation(
        dict.fromkeys(robot.views, scene), np.zeros(len(robot.state_channels)), "pick up the red cube"
    )
    inputs = policy.preprocess(observation, embodiment)
    encoded = policy._encode(inputs)
    context = policy.encode(inputs)
    horizon = robot.control.horizon
    noise = torch.zeros(1, horizon, policy.config.decoder.channels)
    steps = policy.config.flow.steps
    few, many = (timed(lambda n=n: policy.denoise(context, inputs, horizon, n, noise), repeats) for n in (2, 10))

    def decode_raw() -> None:
        for data in raw.values():
            np.frombuffer(data, np.uint8).reshape(SIZE[1], SIZE[0], 3)

    def decode_jpeg() -> None:
        for data in jpeg.values():
            cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)

    parts = {
        "decode raw": timed(decode_raw, repeats),
        "decode jpeg": timed(decode_jpeg, repeats),
        "preprocess": timed(lambda: policy.preprocess(observation, embodiment), repeats),
        "backbone": timed(lambda: policy._encode(inputs), repeats),
        "context keys and values": timed(
            lambda: policy.decoder.encode_context(policy._context(inputs, encoded)), repeats
        ),
        "decoder, one Euler step": (many - few) / 8,
        "postprocess": timed(lambda: policy.postprocess(noise[0], observation, embodiment), repeats),
    }
    whole = timed(lambda: policy.predict(observation, embodiment, noise=noise), repeats)
    return {
        "checkpoint": checkpoint,
        "embodiment": embodiment,
        "views": len(robot.views),
        "prompt_tokens": int(inputs["input_ids"].shape[1]),
        "euler_steps": steps,
        "milliseconds": {**parts, f"whole chunk, {steps} steps": whole},
    }


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="generalist", help="shipped name or folder (default: generalist)")
    parser.add_argument("--embodiment", default="aloha", help="one of the checkpoint's robots (default: aloha)")
    parser.add_argument("--repeats", type=int, default=40, help="timed calls per part (default: 40)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    report = measure(args.checkpoint, args.embodiment, args.repeats)
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    *parts, (label, whole) = report["milliseconds"].items()
    for name, value in parts:
        times = report["euler_steps"] if "Euler" in name else 1
        share = "" if name == "decode jpeg" else f"{value * times / whole:7.1%}"
        print(f"{name:<28}{value:9.3f} ms {share}")
    print(f"{label:<28}{whole:9.3f} ms    ({report['views']} views, {report['prompt_tokens']} tokens, one thread)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
