"""The probe teaches the tower what lies where in several worlds at once, and is silent on what cannot occur there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qwen_vla_core.data.scene_cells import CellBatch
from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.model.policy import QwenVLA
from qwen_vla_core.model.presets import build_tiny
from qwen_vla_core.sim.scenes import CLASSES
from qwen_vla_core.training.vision_probe import RARITY, VisionProbe, cell_counts, cell_tensors, token_grid

SHADE = {"red cube": (220, 30, 30), "red ball": (30, 30, 220)}


@pytest.fixture(scope="module")
def policy() -> QwenVLA:
    torch.manual_seed(0)
    return build_tiny([load_embodiment("mobile_base")], {})


def squares(policy: QwenVLA, count: int, seed: int) -> CellBatch:
    """A coloured square in one cell: a cube on a table, or a ball in a room."""
    rng = np.random.default_rng(seed)
    images = np.full((count, 96, 128, 3), 120, np.uint8)
    grid = token_grid(policy, 96, 128)
    side = 96 // grid.rows
    occupied = np.zeros((count, grid.rows * grid.columns, len(CLASSES)), np.float32)
    applies = np.zeros((count, len(CLASSES)), bool)
    for n in range(count):
        name = ("red cube", "red ball")[n % 2]
        row, column = int(rng.integers(grid.rows)), int(rng.integers(grid.columns))
        images[n, row * side : (row + 1) * side, column * side : (column + 1) * side] = SHADE[name]
        occupied[n, row * grid.columns + column, CLASSES.index(name)] = 1
        applies[n] = [other.endswith("cube") == (n % 2 == 0) for other in CLASSES]
    inside = np.repeat(occupied[..., None], 2, -1) * 0.5
    return CellBatch(images, occupied, inside.astype(np.float32), applies)


def test_losses_are_means_over_what_applies(policy: QwenVLA) -> None:
    probe, batch = VisionProbe(policy), squares(policy, 4, 0)
    torch.nn.init.zeros_(probe.head.weight)
    torch.nn.init.zeros_(probe.head.bias)
    losses = {name: value.detach() for name, value in probe(policy, batch).items()}
    part = cell_tensors(policy.processor, batch)
    counts = cell_counts(part)
    cells = batch.occupied.shape[1]
    assert counts == {"cells": cells * int(batch.applies.sum()), "place": 4}
    expected = np.log(2) * (counts["cells"] + 4 * (RARITY - 1)) / counts["cells"]
    assert float(losses["cells"]) == pytest.approx(expected, rel=1e-5)
    assert float(losses["place"]) == pytest.approx(0.5)
    halves = [
        replace(batch, **{name: array[rows] for name, array in vars(batch).items()})
        for rows in (slice(0, 1), slice(1, 4))
    ]
    for name in losses:  # of two ranks together as of one
        sums = [probe.sums(policy, cell_tensors(policy.processor, half))[name].detach() for half in halves]
        count = sum(cell_counts(cell_tensors(policy.processor, half))[name] for half in halves)
        torch.testing.assert_close(sum(sums) / count, losses[name])


def test_what_cannot_occur_in_a_world_gets_no_gradient(policy: QwenVLA) -> None:
    probe, batch = VisionProbe(policy), squares(policy, 4, 1)
    rows = slice(0, 4, 2)  # tables only
    tables = CellBatch(batch.images_nhwc[rows], batch.occupied[rows], batch.inside[rows], batch.applies[rows])
    probe(policy, tables)["cells"].backward()
    moved = probe.head.weight.grad.reshape(len(CLASSES), 3, -1)[:, 0].abs().sum(-1) > 0
    assert [name for name, changed in zip(CLASSES, moved.tolist(), strict=True) if changed] == [
        name for name in CLASSES if name.endswith("cube")
    ]


def test_a_random_tower_learns_to_find_things_of_both_worlds(policy: QwenVLA) -> None:
    torch.manual_seed(1)
    probe = VisionProbe(policy)
    parameters = [*policy.backbone.visual.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(parameters, 2e-3)
    for step in range(40):
        losses = probe(policy, squares(policy, 8, step))
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    # Knowing only how often what occurs in which world would give 0.127.
    assert float(probe(policy, squares(policy, 32, 99))["cells"].detach()) < 0.06
