"""Conversations about frames: a pure function of the number, true in the frame; a request reads as the policy does."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from loader_support import open_memory
from scene_support import ROOM_TASKS, TABLE_TASKS, demonstrations, without_scenes

from qwen_vla_core.actions.normalize import Quantiles
from qwen_vla_core.data import scene_questions
from qwen_vla_core.data.contract import DataContract
from qwen_vla_core.data.mixture import Draw, SampleForm
from qwen_vla_core.data.sample_maker import SampleMaker, SampleOptions, SourceReference
from qwen_vla_core.data.samples import plain_pictures, policy_inputs
from qwen_vla_core.data.scene_questions import QUESTIONS, SceneQuestions, reference_view
from qwen_vla_core.data.stored_scenes import StoredScenes
from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import Observation
from qwen_vla_core.model.policy import Stats
from qwen_vla_core.model.presets import build_tiny
from qwen_vla_core.model.processor import Sample as Conversation
from qwen_vla_core.sim.scenes import read_scene

FAMILY = "spatial_grounding"


def test_frames_are_numbered_through_all_episodes() -> None:
    data = demonstrations("table", 3, 9)
    data.episodes[1] = dataclasses.replace(
        data.episodes[1],
        **{name: getattr(data.episodes[1], name)[:4] for name in ("state", "action", "timestamp", "task", "perturbed")},
    )
    scenes = StoredScenes(data)
    assert [scenes.frame(i) for i in (0, 8, 9, 12, 13, 21)] == [(0, 0), (0, 8), (1, 0), (1, 3), (2, 0), (2, 8)]
    assert len(scenes) == len(SceneQuestions(data, "all", FAMILY)) == 22
    for wrong in (-1, 22):
        with pytest.raises(IndexError):
            scenes.frame(wrong)


@pytest.mark.parametrize("kind", ["table", "rooms"])
@pytest.mark.parametrize("ask", ["where", "requests", "all"])
def test_a_conversation_is_a_pure_function_of_its_number_and_true(kind: str, ask: str) -> None:
    data = demonstrations(kind)
    texts, again = SceneQuestions(data, ask, FAMILY), SceneQuestions(demonstrations(kind), ask, FAMILY)  # type: ignore[arg-type]
    assert (texts.name, texts.family, len(texts)) == (f"demos: {ask}", FAMILY, 27)
    for index in (26, 4, 0, 13, 4):
        sample, asked = texts.sample(index), texts.asked(index)
        assert sample.turns == asked.turns == again.sample(index).turns and sample.turns
        assert list(sample.images) == list(texts.views) == (["ego"] if ask == "where" else list(data.contract.views))
        assert (asked.episode, asked.t) == divmod(index, 9)
        for view, frames in sample.images.items():
            np.testing.assert_array_equal(frames, data.pictures[asked.episode][view][[asked.t]])
        scene = read_scene(data.episodes[asked.episode].extra["scene"][asked.t])
        if ask == "requests":
            continue
        true = {pair for seed in range(60) for pair in scene.questions(np.random.default_rng(seed), texts.views)}
        assert set(sample.turns) <= true and 1 <= len(sample.turns) <= QUESTIONS
        assert ask == "all" or all(answer.startswith("row ") for _, answer in sample.turns)


@pytest.mark.parametrize("kind", ["table", "rooms"])
def test_requests_say_what_was_asked_or_something_else_with_its_meaning(kind: str) -> None:
    data = demonstrations(kind, 6, 9)
    texts = SceneQuestions(data, "requests", FAMILY)
    own = 0
    for index in range(len(texts)):
        asked = texts.asked(index)
        ((prompt, meaning),) = asked.turns
        rows = data.episodes[asked.episode]
        scene, said = read_scene(rows.extra["scene"][asked.t]), data.tasks[int(rows.task[asked.t])]
        wordings = [scene.requests(said, np.random.default_rng(seed)) for seed in range(40)]
        possible = {(said, scene.intention())} | {request for requests in wordings for request in requests}
        assert (prompt, meaning) in {(data.contract.prompt_for(text), means) for text, means in possible}
        own += prompt == data.contract.prompt_for(said)
    # One of three cubes, one of about four things in a room.
    assert 0.1 * len(texts) < own < 0.6 * len(texts)
    assert set(data.tasks) == set(TABLE_TASKS if kind == "table" else ROOM_TASKS)


@pytest.mark.parametrize("frames", [1, 2])
def test_a_request_is_token_for_token_what_the_policy_reads(frames: int) -> None:
    robot = load_embodiment("mobile_base")
    data = demonstrations("rooms", 2, 9)
    data.contract = DataContract.of(robot)
    quantiles = (Quantiles((-1.0,) * len(n), (1.0,) * len(n), n) for n in (robot.channels, robot.state_channels))
    policy = build_tiny([robot], {robot.name: Stats(*quantiles)})
    reference = SourceReference(Path("there"), FAMILY, None, "", SampleForm(ask="requests"))
    texts = SceneQuestions(data, "requests", FAMILY)
    maker = SampleMaker([reference], open_memory, SampleOptions(frames=frames), {0: texts})
    for index in (0, 9, 14):
        sample = maker.make(Draw(0, -1, index, 1))
        inputs = policy_inputs([sample])
        ((prompt, meaning),) = sample.turns
        said = prompt.split("following task: ")[1].removesuffix(".")
        found = policy.processor.collate([Conversation(*one) for one in inputs.conversations])
        pictures = plain_pictures(sample.images)
        observation = Observation(pictures, np.zeros(len(robot.state_channels)), said)
        expected = policy.collate([observation], turns=[(("", meaning),)])
        for key in ("input_ids", "labels", "context_mask", "pixel_values", "image_grid_thw"):
            torch.testing.assert_close(found[key], expected[key])


def test_a_frame_that_shows_nothing_is_replaced_by_another_and_nothing_at_all_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = demonstrations("rooms", 2, 9)
    blind = '"visible": []'
    scenes = [text.replace('"visible": ["ego"]', blind) for text in data.episodes[0].extra["scene"]]
    data.episodes[0] = dataclasses.replace(data.episodes[0], extra={"scene": scenes})
    texts = SceneQuestions(data, "where", FAMILY)
    assert {texts.asked(index).episode for index in range(9)} == {1}
    assert len({texts.asked(index).t for index in range(9)}) > 1
    data.episodes[1] = dataclasses.replace(data.episodes[1], extra={"scene": scenes})
    monkeypatch.setattr(scene_questions, "MOST_MISSES", 20)
    with pytest.raises(UserError, match="demos: nothing to ask about in ego; check the recordings"):
        SceneQuestions(data, "where", FAMILY).sample(3)


def test_positions_come_most_often_among_all_questions() -> None:
    texts = SceneQuestions(demonstrations("table", 6, 9), "all", FAMILY)
    kinds = Counter(answer.startswith("row ") for i in range(len(texts)) for _, answer in texts.asked(i).turns)
    every = Counter(
        answer.startswith("row ")
        for rows in demonstrations("table", 6, 9).episodes
        for text in rows.extra["scene"]
        for _, answer in read_scene(text).questions(np.random.default_rng(0), texts.views)
    )
    assert kinds[True] / kinds.total() > 1.5 * every[True] / every.total()


def test_what_is_missing_or_damaged_is_named() -> None:
    data = demonstrations("table")
    with pytest.raises(UserError, match=r"demos: has no feature 'scene'.* `qwen-vla sim demos`"):
        SceneQuestions(without_scenes(data), "all", FAMILY)
    pictures = [{"ego": views["ego"]} for views in data.pictures]
    with pytest.raises(UserError, match="demos has no pictures of view 'cam_wrist'"):
        SceneQuestions(dataclasses.replace(data, pictures=pictures), "where", FAMILY)
    data.episodes[1].extra["scene"][2] = "{}"  # type: ignore[index]
    with pytest.raises(UserError, match="demos: episode 1, step 2: a scene of no known world"):
        SceneQuestions(data, "all", FAMILY).sample(11)


def test_the_hash_follows_data_and_kind() -> None:
    def found(*arguments: object) -> str:
        return SceneQuestions(demonstrations("table", *arguments[1:]), arguments[0], FAMILY).content_hash()  # type: ignore[arg-type]

    assert found("where") == found("where")
    assert len({found("where"), found("all"), found("where", 4)}) == 3


def test_positions_are_told_in_the_ego_view_or_in_the_first() -> None:
    assert reference_view(("cam_wrist", "ego")) == "ego" and reference_view(("front", "back")) == "front"
