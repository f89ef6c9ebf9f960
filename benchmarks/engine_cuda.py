"""The CUDA part of ``engine.py``: the paper-size model with random weights, 1 to 3 views of 224², a 64-token prompt."""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen_vla_core.actions.normalize import Quantiles
from qwen_vla_core.embodiment import Embodiment, build_prompt, load_embodiment
from qwen_vla_core.engine.graphs import Recorded
from qwen_vla_core.engine.local import LocalEngine
from qwen_vla_core.interfaces import Observation, Request
from qwen_vla_core.model.backbone import Backbone
from qwen_vla_core.model.config import ModelConfig
from qwen_vla_core.model.policy import QwenVLA, Stats
from qwen_vla_core.model.presets import preset_config
from qwen_vla_core.model.processor import ImageConfig, Processor, Sample
from qwen_vla_core.model.tokenizer import train_tokenizer

SIDE = 224
PROMPT_TOKENS = 64
VIEWS = (1, 2, 3)
STEPS = (4, 10)
DEVICE = torch.device("cuda")
Say = Callable[[str], None]


def robots() -> list[Embodiment]:
    """ALOHA with its first one, two and three cameras; 16 actions per chunk."""
    aloha = load_embodiment(Path(__file__).parents[1] / "embodiments" / "aloha.yaml")
    return [dataclasses.replace(aloha, name=f"views{n}", cameras=aloha.cameras[:n]) for n in VIEWS]


def random_policy(preset: str, dtype: torch.dtype) -> QwenVLA:
    """A preset with random weights, built on the GPU; its decoder answers something (fresh AdaLN gates are zero)."""
    known = robots()
    tokenizer = train_tokenizer(known[-1].views, robots=[known[0].prompt.robot_tag])
    image = ImageConfig(min_pixels=SIDE**2, max_pixels=SIDE**2)
    ids = tokenizer.get_vocab()
    config = preset_config(preset)
    special = {f"{name}_token_id": ids[f"<|{name}|>"] for name in ("vision_start", "vision_end")}
    special |= {"image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"]}
    config = dataclasses.replace(config, backbone={**config.backbone, **special})
    spread = {
        robot.name: Stats(
            Quantiles((-1.0,) * len(robot.channels), (1.5,) * len(robot.channels), robot.channels),
            Quantiles((-1.0,) * len(robot.state_channels), (1.5,) * len(robot.state_channels), robot.state_channels),
        )
        for robot in known
    }
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with DEVICE:
            policy = _build(config, Processor(tokenizer, image), known, spread)
    finally:
        torch.set_default_dtype(before)
    return policy.eval().requires_grad_(False)


def _build(config: ModelConfig, processor: Processor, known: list[Embodiment], stats: dict[str, Stats]) -> QwenVLA:
    policy = QwenVLA(config, Backbone.from_config(config.backbone), processor, {r.name: r for r in known}, stats)
    policy.decoder.reset_parameters()
    for parameter in policy.decoder.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return policy


def request(policy: QwenVLA, views: int, seed: int = 0) -> Request:
    """Random pictures, a sentence of ``PROMPT_TOKENS`` tokens (everything but the pictures' own), fixed noise."""
    robot = policy.embodiment(f"views{views}")
    rng = np.random.default_rng(seed)
    images = {view: rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for view in robot.views}
    grid = (SIDE // policy.processor.image.patch_size,) * 2

    def tokens(instruction: str) -> int:
        ids = policy.processor.context_ids(Sample(images, build_prompt(robot, instruction)), [grid] * views)
        return len(ids) - views * policy.processor.image_tokens(grid)

    instruction = "pick up the red cube"
    while tokens(instruction) < PROMPT_TOKENS:
        instruction += " 1" if tokens(instruction + " 1") <= PROMPT_TOKENS else "1"
    observation = Observation(images, rng.uniform(-1, 1, len(robot.state_channels)), instruction)
    noise = rng.standard_normal((robot.control.horizon, policy.config.decoder.channels), dtype=np.float32)
    return Request(observation, robot.name, noise_hk=noise)


def events(call: Callable[[], Any], repeats: int, warm: int = 3) -> float:
    """Median milliseconds on the GPU, by CUDA events around each call."""
    for _ in range(warm):
        call()
    pairs = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def wall(call: Callable[[], Any], repeats: int, warm: int = 2) -> float:
    """Median milliseconds of a call on the host's clock; the call waits for its answer."""
    for _ in range(warm):
        call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def machine() -> dict[str, float | str]:
    """Measured ceilings: device-to-device copy (bytes read and written) and an 8192³ bfloat16 product."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device=DEVICE).normal_()
    target = torch.empty_like(source)
    copy_ms = events(functools.partial(target.copy_, source), 20)
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product_ms = events(functools.partial(torch.mm, a, b), 20)
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_gb_per_s": 2 * 2**31 / copy_ms / 1e6,
        "matmul_tflop_per_s": 2 * 8192**3 / product_ms / 1e9,
    }


def roofline(policy: QwenVLA, views: int, steps: int, ceilings: dict[str, Any]) -> dict[str, float]:
    """The least time of one observation, in milliseconds per part: the larger of its bytes and its operations.

    Counted are the weights that must be read, each once per part, two operations per weight and token, and the two
    products of attention. Activations, norms and the delta rule's own work are not counted: the true floor is higher.
    """
    bandwidth, rate = float(ceilings["copy_gb_per_s"]) * 1e9, float(ceilings["matmul_tflop_per_s"]) * 1e12
    size = next(policy.parameters()).element_size()
    backbone, decoder, config = policy.backbone, policy.decoder, policy.config.decoder

    def count(module: Any) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    per_picture = (SIDE // policy.processor.image.patch_size) ** 2
    merged = per_picture // policy.processor.image.merge_size**2
    length, horizon = PROMPT_TOKENS + views * merged, 16
    tower: Any = backbone.visual
    text: Any = backbone.model.model.language_model
    vision = count(tower.blocks), count(tower.merger)
    inner = config.heads * config.head_dim
    block = count(decoder.blocks[0]) - count(decoder.blocks[0].modulation)
    context = (config.depth - 1) * block + 2 * config.width * inner + count(decoder.context_in)
    step = config.depth * block + count(decoder.action_in) + count(decoder.action_out)
    keys = 2 * config.depth * inner * (length + horizon)
    width = tower.config.hidden_size
    text_config = backbone.config.get_text_config()
    full = sum(kind == "full_attention" for kind in text_config.layer_types)
    text_inner = text_config.num_attention_heads * text_config.head_dim

    def least(weights: float, operations: float) -> float:
        return 1000 * max(weights * size / bandwidth, operations / rate)

    parts = {
        "vision": least(
            sum(vision),
            2 * views * (per_picture * vision[0] + merged * vision[1])
            + 4 * views * per_picture**2 * width * len(tower.blocks),
        ),
        "text": least(count(text.layers), 2 * length * count(text.layers) + 2 * length**2 * text_inner * full),
        "context": least(context, 2 * length * context + 4 * length**2 * inner * (config.depth - 1)),
        "steps": steps
        * least(step + keys, 2 * horizon * step + 4 * horizon * (length + horizon) * inner * config.depth),
    }
    return {**parts, "total": sum(parts.values())}


def difference(answer: np.ndarray, reference: np.ndarray, asked: Request) -> dict[str, float]:
    """How far a chunk is from the reference, relative to the chunk and to what the network did to the noise.

    With random weights most of a chunk is its noise, so the second is the stricter figure.
    """
    if not np.isfinite(answer).all():
        return {"chunk": float("inf"), "displacement": float("inf")}
    channels = np.abs(reference).max(0) > 0
    moved = (reference - asked.noise_hk)[:, channels]
    wrong = np.linalg.norm(answer - reference)
    return {
        "chunk": float(wrong / np.linalg.norm(reference)),
        "displacement": float(wrong / np.linalg.norm(moved)),
    }


@torch.inference_mode()
def normalised(engine: LocalEngine, asked: Request) -> np.ndarray:
    """The engine's chunk before statistics are applied, (H, K): nothing is clipped away."""
    packed = engine._pack([engine._prepare(asked.observation, asked.embodiment)])
    chunk = engine._sample(packed, engine._see(packed), engine._noise([asked], packed))
    return chunk[0].float().cpu().numpy()


@torch.inference_mode()
def eager(policy: QwenVLA, asked: Request, steps: int) -> np.ndarray:
    """The eager path's chunk, (H, K) before statistics are applied."""
    inputs = policy.preprocess(asked.observation, asked.embodiment)
    assert asked.noise_hk is not None
    noise = torch.from_numpy(asked.noise_hk)[None].to(DEVICE)
    chunk = policy.denoise(policy.encode(inputs), inputs, noise.shape[1], steps, noise)
    return chunk[0].float().cpu().numpy()


def parity_fp32(say: Say) -> dict[str, Any]:
    """``small`` in float32: the captured engine against the eager path."""
    policy = random_policy("small", torch.float32)
    asked = request(policy, 2)
    reference = eager(policy, asked, 4)
    engine = LocalEngine(policy, steps=4)
    normalised(engine, asked)
    found = {"small fp32": difference(normalised(engine, asked), reference, asked)}
    say(f"small, float32, 2 views, 4 steps, from the eager path (ask 1e-4): {found['small fp32']}")
    return found


def parity_bf16(policy: QwenVLA, say: Say) -> tuple[dict[str, Any], dict[tuple[int, int], np.ndarray]]:
    """References in float32 with the same weights, and how far eager bfloat16 is from them."""
    exact = copy.deepcopy(policy).float()
    references = {(v, s): eager(exact, request(policy, v), s) for v in VIEWS for s in STEPS}
    del exact
    torch.cuda.empty_cache()
    found = {
        f"eager bf16, {v} views, {s} steps": difference(
            eager(policy, request(policy, v), s), references[v, s], request(policy, v)
        )
        for v, s in ((1, 4), (3, 10))
    }
    for name, value in found.items():
        say(f"{name}, from eager float32: {value}")
    return found, references


def measure(repeats: int, profile: bool, say: Say) -> dict[str, Any]:
    """Everything; a failing part is reported and the others go on."""
    begun = time.monotonic()
    torch.backends.cudnn.allow_tf32 = False  # float32 references are float32
    report: dict[str, Any] = {"machine": machine(), "parity": {}, "rows": [], "errors": []}
    say(str(report["machine"]))

    def attempt(name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception:
            report["errors"].append({"part": name, "error": traceback.format_exc()})
            say(f"FAILED {name}\n{traceback.format_exc()}")
            return None

    report["parity"] |= attempt("parity small fp32", lambda: parity_fp32(say)) or {}
    torch.cuda.empty_cache()
    policy = random_policy("paper", torch.bfloat16)
    say(f"[{time.monotonic() - begun:.0f} s] paper-size policy built")
    base = attempt("references", lambda: parity_bf16(policy, say))
    references = base[1] if base else {}
    report["parity"] |= base[0] if base else {}
    slow = {(v, s): attempt("eager", lambda v=v, s=s: time_eager(policy, v, s)) for v in VIEWS for s in STEPS}
    say(f"[{time.monotonic() - begun:.0f} s] eager timed")
    engines: dict[str, LocalEngine] = {}
    for name, kernels in (("kernels", True), ("torch ops", False)):
        engine = attempt(f"engine {name}", lambda kernels=kernels: LocalEngine(policy, kernels=kernels))
        if engine is None:
            continue
        if kernels:
            report["plans"] = {
                str(shape): str(plan) for shape, plan in getattr(engine.network.ops, "plans", {}).items()
            }
            say(f"[{time.monotonic() - begun:.0f} s] {report['plans']}")
        cases = [(v, s) for v in VIEWS for s in STEPS] if name == "kernels" else [(3, 10)]
        for views, steps in cases:
            row = attempt(
                f"{name} {views} {steps}", lambda e=engine, v=views, s=steps: time_engine(e, v, s, repeats, references)
            )
            if row is None:
                break
            floor = roofline(policy, views, steps, report["machine"])
            row |= {"ops": name, "roofline_ms": floor, "times_roofline": row["network_ms"] / floor["total"]}
            if slow[views, steps]:
                row |= slow[views, steps]
                row["speed_up"] = row["eager_ms"] / row["chunk_ms"]
            report["rows"].append(row)
            say(line(row))
        else:
            engines[name] = engine
        say(f"[{time.monotonic() - begun:.0f} s] {name} timed")
    if "kernels" in engines:
        report["parts_ms"] = attempt("parts", lambda: time_parts(engines["kernels"], repeats))
        say(str(report["parts_ms"]))
        if profile:
            report["kernels"] = attempt("profile", lambda: profile_kernels(engines["kernels"], say))
    report["seconds"] = time.monotonic() - begun
    say(f"[{report['seconds']:.0f} s] done")
    return report


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    return (
        f"{row['ops']:<10} {row['views']} views {row['steps']:>2} steps: chunk {row['chunk_ms']:7.2f} ms, on the GPU "
        f"{row['network_ms']:7.2f} (prefill {row['prefill_ms']:.2f}, steps {row['steps_ms']:.2f}), "
        f"{row['times_roofline']:.2f}x roofline {row['roofline_ms']['total']:.2f}, "
        f"eager {row.get('eager_ms', float('nan')):7.1f} ({row.get('speed_up', float('nan')):.1f}x), "
        f"parity {row.get('parity')}, first call {row['first_s']:.1f} s"
    )


def time_eager(policy: QwenVLA, views: int, steps: int) -> dict[str, float]:
    """``QwenVLA.predict``, from observation to chunk."""
    asked = request(policy, views)
    return {"eager_ms": wall(lambda: policy.predict(asked.observation, asked.embodiment, steps), 3, warm=1)}


@torch.inference_mode()
def time_engine(
    engine: LocalEngine, views: int, steps: int, repeats: int, references: dict[tuple[int, int], np.ndarray]
) -> dict[str, Any]:
    """Parity, the chunk on the host's clock, and the two graphs on the GPU's."""
    asked = request(engine.policy, views)
    engine.steps = steps
    start = time.perf_counter()
    engine.predict([request(engine.policy, views, seed=1)])  # another observation first: nothing of it may stay
    first = time.perf_counter() - start
    row: dict[str, Any] = {"views": views, "steps": steps, "first_s": first}
    if (views, steps) in references:
        row["parity"] = difference(normalised(engine, asked), references[views, steps], asked)
    row["chunk_ms"] = wall(lambda: engine.predict([asked]), repeats)
    captured = engine._captured
    assert captured is not None
    slot = captured._slot(engine._pack([engine._prepare(asked.observation, asked.embodiment)]))
    assert slot.prefill is not None
    row["prefill_ms"] = events(slot.prefill, repeats)
    row["steps_ms"] = events(slot.integrate[steps], repeats)
    row["network_ms"] = row["prefill_ms"] + row["steps_ms"]
    parts = [engine.predict([asked])[0].seconds["preprocess"] for _ in range(repeats)]
    row["preprocess_ms"] = 1000 * statistics.median(parts)
    return row


@torch.inference_mode()
def time_parts(engine: LocalEngine, repeats: int) -> dict[str, float]:
    """Each part of the network as a graph of its own, 3 views."""
    asked = request(engine.policy, 3)
    network, captured = engine.network, engine._captured
    assert captured is not None and network.fast is not None
    slot = captured._slot(engine._pack([engine._prepare(asked.observation, asked.embodiment)]))
    fast, arrangement = network.fast, slot.arrangement
    patch = fast.image.patch_size
    grid = fast.grid((SIDE // patch, SIDE // patch))
    see = Recorded(lambda: fast.see(slot.pictures[0], grid), DEVICE, None)
    read = Recorded(
        lambda: fast.read(arrangement.ids, see.output, arrangement.slots[0], arrangement.text_rotary), DEVICE, None
    )
    tokens = network.decoder.tokens(read.output, slot.state)
    context = Recorded(
        lambda: network.decoder.context(tokens, arrangement.context_rotary, arrangement.valid),
        DEVICE,
        None,
    )
    one = Recorded(
        lambda: network.decoder.velocity(
            slot.noise,
            network.decoder.terms(10)[0],
            context.output,
            arrangement.action_rotary,
            arrangement.valid,
        ),
        DEVICE,
        None,
    )
    named = {"vision": see, "text": read, "context": context, "one step": one}
    return {name: events(call, repeats) for name, call in named.items()}


def profile_kernels(engine: LocalEngine, say: Say) -> dict[str, list[dict[str, Any]]]:
    """Time per kernel inside the two graphs, 3 views and 4 steps."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    asked = request(engine.policy, 3)
    engine.steps = 4
    engine.predict([asked])
    captured = engine._captured
    assert captured is not None
    slot = captured._slot(engine._pack([engine._prepare(asked.observation, asked.embodiment)]))
    assert slot.prefill is not None
    found: dict[str, list[dict[str, Any]]] = {}
    for name, graph in (("prefill", slot.prefill), ("4 steps", slot.integrate[4])):
        with record(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(3):
                graph()
            torch.cuda.synchronize()
        rows = [
            {"kernel": item.key[:110], "calls": item.count / 3, "us": item.self_device_time_total / 3}
            for item in profiler.key_averages()
            if item.self_device_time_total > 0
        ]
        found[name] = sorted(rows, key=lambda row: -row["us"])[:28]
        say(f"{name}: {sum(row['us'] for row in rows):.0f} us in {sum(row['calls'] for row in rows):.0f} kernels")
        for row in found[name]:
            say(f"  {row['us']:8.1f} us {row['calls']:5.0f} x {row['us'] / row['calls']:6.2f}  {row['kernel']}")
    return found
