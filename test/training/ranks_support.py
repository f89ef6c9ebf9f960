"""A tiny policy trained for a few steps, alone or as one of several ranks; run by torchrun it does all scenarios.

Every step has four rows: two of a robot with a picture and actions, two conversations without a picture. Rank 0 of two
gets the robot's, rank 1 the conversations, so that each lacks what the other has.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from qwen_vla_core.actions.normalize import Quantiles
from qwen_vla_core.embodiment import build_prompt, load_embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.model.batching import ActionRow, Row, collate_rows
from qwen_vla_core.model.policy import QwenVLA, Stats, loss_counts
from qwen_vla_core.model.presets import build_tiny
from qwen_vla_core.model.processor import Sample
from qwen_vla_core.training import distributed, parallel
from qwen_vla_core.training.distributed import Ranks, all_sum, clip_gradients
from qwen_vla_core.training.state import Average, restore_state, save_state, whole_weights

STEPS, SAVED_AT = 5, 3
PROGRESS = {"recipe": {"rate": 1e-3}, "mixture": "m"}


@dataclass(frozen=True)
class Scenario:
    """One short run.

    Attributes:
        kind: ``ddp`` or ``fsdp2``.
        frozen: whether only the decoder learns.
        recompute: activation checkpointing.
        cut: micro-batches that each rank cuts its rows into.
        precision: of the autocast.
        save: whether a state is kept after ``SAVED_AT`` steps.
        resume: name of the scenario whose state it goes on from.
        steps: after which weights are compared; one more follows, in which gathered weights must not be stale.
    """

    kind: parallel.Kind = "ddp"
    frozen: bool = False
    recompute: bool = False
    cut: int = 1
    precision: parallel.Precision = "fp32"
    save: bool = False
    resume: str | None = None
    steps: int = STEPS


SCENARIOS = {
    "ddp": Scenario("ddp", save=True),
    "fsdp2": Scenario("fsdp2", save=True),
    "ddp_resumed": Scenario("ddp", resume="alone"),
    "fsdp2_resumed": Scenario("fsdp2", resume="alone"),
    "ddp_frozen": Scenario("ddp", frozen=True, steps=2),
    "fsdp2_frozen": Scenario("fsdp2", frozen=True, steps=2),
    "ddp_thrifty": Scenario("ddp", recompute=True, cut=2),
    "fsdp2_thrifty": Scenario("fsdp2", recompute=True, cut=2),
    "fsdp2_half": Scenario("fsdp2", precision="bf16", steps=2),
}


def build() -> QwenVLA:
    """The same weights in every process, with awake gates: fresh ones are zero and would hide gradients."""
    robot = load_embodiment("mobile_base")

    def spread(names: tuple[str, ...]) -> Quantiles:
        return Quantiles((-1.0,) * len(names), (1.5,) * len(names), tuple(names))

    stats = Stats(spread(robot.channels), spread(robot.state_channels))
    policy = build_tiny([robot], {robot.name: stats}, seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.decoder.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy.train()


def rows_of(policy: QwenVLA, step: int) -> list[tuple[Row, int]]:
    """Four rows with the seed of their noise."""
    robot = policy.embodiment()
    rng = np.random.default_rng([7, step])
    rows: list[tuple[Row, int]] = []
    for number in range(2):
        picture = rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)
        acting = ActionRow(
            images={robot.views[0]: picture},
            prompt=build_prompt(robot, "go to the red ball"),
            state=rng.uniform(-1, 1, len(robot.state_channels)),
            channels=len(robot.channels),
            actions_hc=rng.uniform(-1, 1, (8, len(robot.channels))),
            step_mask_h=np.arange(8) < 8 - number,
            kind="navigation" if number else "action",
        )
        rows.append((acting, 10 * step + number))
        rows.append((Sample({}, "what colour is the ball?", (("", "red" if number else "blue and green"),)), -1))
    return rows


def parts_of(policy: QwenVLA, step: int, ranks: Ranks, cut: int) -> Iterator[tuple[dict[str, torch.Tensor], Any]]:
    """This rank's micro-batches with the arguments of forward."""
    mine = rows_of(policy, step)[ranks.rank :: ranks.world]
    size = len(mine) // cut
    for first in range(0, len(mine), size):
        rows = mine[first : first + size]
        batch = collate_rows(policy.processor, policy.config, [row for row, _ in rows])
        options = {}
        if "actions" in batch:
            generators = [torch.Generator().manual_seed(seed) for _, seed in rows if seed >= 0]
            shape = batch["actions"].shape[1:]
            options["noise"] = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
            options["tau"] = torch.stack([torch.rand(1, generator=generator) for generator in generators])
        yield batch, options


def train(scenario: Scenario, ranks: Ranks, out: Path, states: Path) -> dict[str, Any]:
    """Runs a scenario; losses and gradient norms per step, and, on the first rank, the final averaged weights."""
    policy = build()
    if scenario.frozen:
        policy.backbone.requires_grad_(False)
    if scenario.recompute:
        parallel.checkpoint_activations(policy)
    module = parallel.parallelise(policy, scenario.kind, ranks, scenario.precision)
    # A generous eps: Adam would blow up the rounding noise of gradients that are zero but for it.
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-3, eps=1e-4)
    average = Average(policy, 0.5)
    first = restore_state(states / scenario.resume, policy, optimizer, average, PROGRESS) if scenario.resume else 0
    rows = []
    for step in range(first, scenario.steps):
        rows.append(learn(module, policy, optimizer, average, step, scenario, ranks))
        if scenario.save and step + 1 == SAVED_AT:
            save_state(out, SAVED_AT, policy, optimizer, average, PROGRESS)
    trained, averaged = whole_weights(policy), whole_weights(policy, average)
    with average.applied_to(policy):
        exported = whole_weights(policy)
    again = learn(module, policy, optimizer, average, scenario.steps, scenario, ranks)
    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
        assert all(torch.equal(exported[name], averaged[name]) for name in averaged)
        for name, weights in (("trained", trained), ("averaged", averaged)):
            save_file({key: value.contiguous() for key, value in weights.items()}, out / f"{name}.safetensors")
    return {"rows": rows, "again": again}


def learn(
    module: nn.Module,
    policy: QwenVLA,
    optimizer: torch.optim.Optimizer,
    average: Average,
    step: int,
    scenario: Scenario,
    ranks: Ranks,
) -> dict[str, float]:
    """One optimizer step."""
    parts = list(parts_of(policy, step, ranks, scenario.cut))
    counted = [loss_counts(batch) for batch, _ in parts]
    keys = ("action", "navigation", "text")
    counts = all_sum({key: float(sum(count.get(key, 0) for count in counted)) for key in keys})
    sums = dict.fromkeys(keys, 0.0)
    for number, (batch, options) in enumerate(parts):
        with parallel.accumulating(module, number == len(parts) - 1):
            with parallel.autocast(ranks, scenario.precision):
                losses = module(batch, **options)
            torch.stack([value / counts[key] for key, value in losses.items()]).sum().backward()
        for key, value in losses.items():
            sums[key] += float(value.detach())
    norm = clip_gradients(policy.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    average.update(policy, step)
    return {"step": step, "norm": norm, **{key: value / counts[key] for key, value in all_sum(sums).items()}}


def unequal(ranks: Ranks) -> dict[str, str | None]:
    """What goes wrong on one rank only, as every rank sees it."""
    try:
        all_sum({"a": 1.0} if ranks.first else {})
        keys = None
    except ValueError as error:
        keys = str(error)
    return {"keys": keys, "error": distributed.first_error("no space" if ranks.rank == 1 else None)}


def full_disk(ranks: Ranks, out: Path) -> dict[str, str]:
    """The second rank's disk is full while the state of a step is written."""
    from qwen_vla_core.training import state

    policy = nn.Linear(4, 4)
    optimizer, average = torch.optim.AdamW(policy.parameters()), Average(policy, 0.5)
    save_state(out, 1, policy, optimizer, average, PROGRESS)
    written = state.write_pieces

    def failing(*arguments: Any) -> None:
        if ranks.rank == 1:
            raise OSError(28, "No space left on device")
        written(*arguments)

    state.write_pieces = failing  # type: ignore[assignment]
    try:
        save_state(out, 2, policy, optimizer, average, PROGRESS)
    except UserError as error:
        return {"error": str(error)}
    finally:
        state.write_pieces = written
    return {"error": "none"}


def main(work: Path) -> None:
    """All scenarios, on as many ranks as torchrun started."""
    torch.set_num_threads(1)
    ranks = distributed.start("cpu")
    try:
        results: dict[str, Any] = {name: train(one, ranks, work / name, work) for name, one in SCENARIOS.items()}
        results["unequal"] = unequal(ranks)
        results["full_disk"] = full_disk(ranks, work / "full_disk")
        results["ranks"] = {key: str(value) for key, value in dataclasses.asdict(ranks).items()}
        (work / f"results_{ranks.rank}.json").write_text(json.dumps(results))
    finally:
        distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
