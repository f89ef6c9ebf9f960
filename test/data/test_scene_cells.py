"""Dense batches: a pure function of seed and step, over several worlds, true in every picture."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scene_support import demonstrations, without_scenes

from qwen_vla_core.data.scene_cells import SceneCells
from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.grounding import Grid
from qwen_vla_core.sim.scenes import CLASSES, read_scene

GRID = Grid(3, 4)


def worlds() -> list:
    return [demonstrations("table", 3, 9, "table"), demonstrations("rooms", 2, 30, "rooms")]


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    one, two = SceneCells(worlds(), 6, seed=3), SceneCells(worlds(), 6, seed=3)
    two.batch(1, GRID)
    for name, array in vars(one.batch(5, GRID)).items():
        np.testing.assert_array_equal(array, getattr(two.batch(5, GRID), name))
    assert one.draws(5) != one.draws(6) and one.draws(5) != SceneCells(worlds(), 6, seed=4).draws(5)


def test_every_view_comes_with_the_cells_of_its_scene() -> None:
    data = worlds()
    cells = SceneCells(data, 8, strength=0.0)
    batch, row = cells.batch(0, GRID), 0
    for number, index, _ in cells.draws(0):
        episode, t = divmod(index, 9 if number == 0 else 30)
        scene = read_scene(data[number].episodes[episode].extra["scene"][t])
        for view in data[number].contract.views:
            np.testing.assert_array_equal(batch.images_nhwc[row], data[number].pictures[episode][view][t])
            occupied, inside = scene.cells(view, GRID)
            np.testing.assert_array_equal(batch.occupied[row], occupied)
            np.testing.assert_array_equal(batch.inside[row], inside)
            np.testing.assert_array_equal(batch.applies[row], scene.applies)
            row += 1
    assert row == len(batch.images_nhwc) and batch.occupied.shape == (row, 12, len(CLASSES))
    assert not batch.occupied[~np.repeat(batch.applies[:, None], 12, 1)].any()
    assert SceneCells(data, 8).batch(0, GRID).images_nhwc.tolist() != batch.images_nhwc.tolist()  # jitter


def test_worlds_give_as_many_pictures_whatever_their_size_and_ranks_share_a_batch() -> None:
    cells = SceneCells(worlds(), 16)
    drawn = Counter(number for step in range(100) for number, _, _ in cells.draws(step))
    assert 2 * drawn[0] == pytest.approx(drawn[1], rel=0.15) and drawn.total() == 1600  # two views and one
    frames = {(number, index) for step in range(100) for number, index, _ in cells.draws(step)}
    assert len(frames) == 27 + 60
    parts = [SceneCells(worlds(), 16, rank=rank, world=3).draws(2) for rank in range(3)]
    assert sorted(draw for part in parts for draw in part) == sorted(cells.draws(2))


def test_sizes_must_agree_or_be_given() -> None:
    data = worlds()
    data[1].pictures = [{"ego": views["ego"][:, :12]} for views in data[1].pictures]
    with pytest.raises(UserError, match=r"pictures of 32×(12|24), others of 32×(12|24); give one size"):
        SceneCells(data, 16).batch(0, GRID)
    cells = SceneCells(data, 16, size=(16, 12))
    assert cells.batch(0, GRID).images_nhwc.shape[1:] == (12, 16, 3) and cells.picture_size() == (12, 16)


def test_nothing_to_learn_from_is_said() -> None:
    with pytest.raises(UserError, match="no demonstrations"):
        SceneCells([], 4)
    with pytest.raises(UserError, match="table: has no feature 'scene'"):
        SceneCells([without_scenes(worlds()[0])], 4)
    with pytest.raises(UserError, match="demos holds no episodes"):
        empty = demonstrations("rooms", 1)
        empty.episodes = []
        SceneCells([empty], 4)
    with pytest.raises(UserError, match="rank 2 of 3 with 2 frames"):
        SceneCells(worlds(), 2, rank=2, world=3)
