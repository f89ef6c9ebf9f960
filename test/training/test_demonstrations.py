"""Batches are a function of the generator, follow the robot, and say only what the pictures show."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.demonstration import Demonstration
from qwen_vla_core.sim.grounding import Grid, intention, questions
from qwen_vla_core.sim.randomize import COLOURS
from qwen_vla_core.sim.scenes import CLASSES
from qwen_vla_core.sim.state import SceneState
from qwen_vla_core.training import demonstrations
from qwen_vla_core.training.demonstrations import START_STEPS, Demonstrations


@pytest.fixture(scope="module")
def data(episodes: list[Demonstration], aloha: Embodiment) -> Demonstrations:
    return Demonstrations(episodes, aloha)


def find(episodes: list[Demonstration], state: np.ndarray) -> tuple[Demonstration, int]:
    """The frame an observation was made of."""
    for episode in episodes:
        matches = np.flatnonzero((episode.rows.state == state.astype(np.float32)).all(1))
        if len(matches):
            return episode, int(matches[0])
    raise AssertionError("an observation of no frame")


def test_counts_statistics_and_sentences_cover_the_data(data: Demonstrations, episodes: list[Demonstration]) -> None:
    assert len(data) == 2 and data.frame_count == sum(map(len, episodes))
    actions = np.concatenate([episode.rows.action for episode in episodes])
    np.testing.assert_allclose(data.stats().action.q99, np.quantile(actions.astype(float), 0.99, axis=0))
    assert data.stats().action.names == data.robot.channels
    sentences = data.sentences()
    assert {episode.instruction for episode in episodes} <= set(sentences)
    assert any(sentence.startswith("row ") for sentence in sentences) and sentences == data.sentences()


def test_a_chunk_is_the_next_actions_and_its_mask_ends_at_a_push(
    data: Demonstrations, episodes: list[Demonstration]
) -> None:
    batch = data.chunks(np.random.default_rng(0), 40, 2)
    assert batch.actions_bhc.shape == (40, 16, 14) and batch.step_mask_bh.shape == (40, 16)
    masked = 0
    for index, observation in enumerate(batch.observations):
        episode, t = find(episodes, observation.state)
        mask = batch.step_mask_bh[index]
        ahead = min(16, len(episode) - t)
        said = mask[:ahead]
        np.testing.assert_array_equal(batch.actions_bhc[index, :ahead][said], episode.rows.action[t : t + ahead][said])
        held = np.tile(episode.rows.action[-1], (16 - ahead, 1))[mask[ahead:]]
        np.testing.assert_array_equal(batch.actions_bhc[index, ahead:][mask[ahead:]], held)
        pushes = np.flatnonzero(episode.rows.perturbed[t : t + 15])
        assert mask.sum() == (pushes[0] + 1 if len(pushes) else 16) and mask[: mask.sum()].all()
        masked += not mask.all()
        assert observation.instruction == episode.instruction and len(batch.turns[index]) == 3
    assert 0 < masked < 40


def test_questions_beside_a_chunk_are_true_in_its_frame(data: Demonstrations, episodes: list[Demonstration]) -> None:
    batch = data.chunks(np.random.default_rng(1), 10, 3)
    for observation, turns in zip(batch.observations, batch.turns, strict=True):
        episode, t = find(episodes, observation.state)
        scene = SceneState.from_dict(episode.scene(t))
        true = {pair for seed in range(20) for pair in questions(scene, np.random.default_rng(seed))}
        assert turns[0] == ("", intention(scene))
        assert set(turns[1:]) <= true


def test_beginnings_of_episodes_come_more_often_than_their_share(
    data: Demonstrations, episodes: list[Demonstration]
) -> None:
    batch = data.chunks(np.random.default_rng(2), 300, 0)
    early = np.mean([find(episodes, observation.state)[1] < START_STEPS for observation in batch.observations])
    share = np.mean([t < START_STEPS for episode in episodes for t in range(len(episode))])
    assert early > share + 0.1


def test_sampling_depends_on_the_generator_alone(data: Demonstrations) -> None:
    def draw(seed: int) -> tuple[list[np.ndarray], list[object]]:
        batch = data.chunks(np.random.default_rng(seed), 4, 2)
        asked = data.questions(np.random.default_rng(seed), 4, 2)
        pictures = [picture for o in batch.observations for picture in o.images.values()]
        pictures += [picture for sample in asked for picture in sample.images.values()]
        words = [batch.turns, [(sample.prompt, sample.turns, list(sample.images)) for sample in asked]]
        return [*pictures, batch.actions_bhc, batch.step_mask_bh], words

    first, words = draw(5)
    np.random.default_rng(0).random()  # other generators do not matter
    again, same_words = draw(5)
    assert words == same_words and draw(6)[1] != words
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)


def test_every_view_is_labelled_with_the_cells_of_its_visible_cubes(
    data: Demonstrations, episodes: list[Demonstration]
) -> None:
    batch, grid = data.cells(np.random.default_rng(0), 20, Grid(3, 4)), Grid(3, 4)
    views = data.robot.views
    assert data.picture_size == (96, 128) and batch.images_nhwc.shape == (20 * len(views), 96, 128, 3)
    kinds = len(CLASSES)
    assert batch.occupied.shape == (60, 12, kinds) and batch.inside.shape == (60, 12, kinds, 2)
    on_tables = {name for name in CLASSES if name.endswith("cube")} | set(COLOURS)
    assert (batch.applies == [name in on_tables for name in CLASSES]).all()
    assert batch.occupied.any() and ((batch.inside >= 0) & (batch.inside <= 1)).all()
    scenes = [SceneState.from_dict(episode.scene(t)) for episode in episodes for t in range(len(episode))]
    known = {view: [np.zeros((12, kinds))] for view in views}
    for scene in scenes:
        for view in views:
            table = np.zeros((12, kinds))
            for cube in scene.cubes:
                if view in cube.visible:
                    row, column = grid.cell(cube.pixels[view])
                    for name in (f"{cube.colour} cube", cube.colour, "cube"):
                        table[4 * row + column, CLASSES.index(name)] = 1
            known[view].append(table)
    for index, occupied in enumerate(batch.occupied):
        assert any(np.array_equal(occupied, table) for table in known[views[index % len(views)]])
    assert (batch.inside[batch.occupied == 0] == 0).all()


def test_grounding_shows_one_view_and_asks_only_what_it_shows(
    data: Demonstrations, episodes: list[Demonstration]
) -> None:
    samples = data.questions(np.random.default_rng(0), 60, 4)
    assert len(samples) == 60
    possible: dict[str, set[tuple[str, str]]] = {view: set() for view in data.robot.views}
    for scene in (SceneState.from_dict(episode.scene(t)) for episode in episodes for t in range(len(episode))):
        for view, pairs in possible.items():
            for seed in range(4):  # wordings are drawn
                pairs |= set(questions(scene, np.random.default_rng(seed), views=(view,)))
    for sample in samples:
        (view,) = sample.images
        assert sample.turns[0][0] == "" and 1 <= len(sample.turns) <= 4
        asked = [(sample.prompt, sample.turns[0][1]), *sample.turns[1:]]
        assert set(asked) <= possible[view]
        assert all("wrist view" not in question for question, _ in asked) or view != "ego"


def test_data_that_shows_nothing_to_ask_about_is_an_error_not_an_endless_search(
    aloha: Embodiment, episodes: list[Demonstration], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demonstrations, "MOST_MISSES", 50)
    monkeypatch.setattr(demonstrations, "questions", lambda *args, **options: [])
    with pytest.raises(UserError, match="nothing to ask about in view 'ego'"):
        Demonstrations(episodes, aloha).questions(np.random.default_rng(0), 4, 2)


def test_augmentation_changes_colours_a_little_and_geometry_never(
    data: Demonstrations, episodes: list[Demonstration]
) -> None:
    for observation in data.chunks(np.random.default_rng(2), 6, 1).observations:
        episode, t = find(episodes, observation.state)
        for view, picture in observation.images.items():
            original = episode.images[view][t]
            assert picture.dtype == np.uint8 and not np.array_equal(picture, original)
            # Mid greys only: at the ends clipping bends the line that brightness and contrast draw.
            middle = (original > 40) & (original < 215)
            correlation = np.corrcoef(original[middle], picture[middle])[0, 1]
            assert correlation > 0.9 and abs(picture.astype(float) - original).mean() < 45


def test_episodes_that_do_not_fit_the_robot_are_refused_by_name(
    aloha: Embodiment, episodes: list[Demonstration]
) -> None:
    with pytest.raises(UserError, match="no episodes"):
        Demonstrations([], aloha)
    images = {view: pictures for view, pictures in episodes[0].images.items() if view != "cam_left_wrist"}
    with pytest.raises(UserError, match="episode 0: view 'cam_left_wrist' of aloha is missing"):
        Demonstrations([dataclasses.replace(episodes[0], images=images)], aloha)
    with pytest.raises(UserError, match="episode 0: 13 action channels, aloha has 14"):
        rows = dataclasses.replace(episodes[0].rows, action=episodes[0].rows.action[:, :13])
        Demonstrations([dataclasses.replace(episodes[0], rows=rows)], aloha)


def test_a_dataset_gives_the_recorded_demonstrations(
    folder: Path, aloha: Embodiment, episodes: list[Demonstration]
) -> None:
    read = Demonstrations.load([folder], aloha, progress=False).episodes
    assert len(read) == 2
    for one, two in zip(read, episodes, strict=True):
        for name in ("state", "action", "perturbed"):
            np.testing.assert_array_equal(getattr(one.rows, name), getattr(two.rows, name))
        assert (one.instruction, one.seed, one.success, one.info) == (
            two.instruction,
            two.seed,
            two.success,
            two.info,
        )
        assert [one.scene(t) for t in range(len(one))] == [two.scene(t) for t in range(len(two))]
        for view, pictures in two.images.items():
            error = one.images[view].astype(float) - pictures
            assert 10 * np.log10(255**2 / np.square(error).mean()) > 33  # dB; chroma is stored at half the resolution
