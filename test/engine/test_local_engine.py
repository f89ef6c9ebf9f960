from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_support import ROBOTS, eager, make_policy, make_request

from qwen_vla_core.engine.buckets import bucket_length
from qwen_vla_core.engine.inputs import shrink, whole_cells
from qwen_vla_core.engine.local import LocalEngine
from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import Committed, Request
from qwen_vla_core.model.checkpoint import load_checkpoint, resolve_checkpoint, save_checkpoint
from qwen_vla_core.model.policy import QwenVLA
from qwen_vla_core.model.processor import Processor
from qwen_vla_core.resources import DEFAULT_CHECKPOINT

Difference = Callable[[np.ndarray, np.ndarray], float]
NAMES = tuple(robot.name for robot in ROBOTS)
VARIANTS = (
    {"context": "cached"},
    {"context": "joint"},
    {"model_type": "qwen3_vl"},
    {"model_type": "qwen2_5_vl"},
    {"state_mode": "none"},
    {"state_mode": "prompt"},
)


def answers(engine: LocalEngine, requests: list[Request]) -> list[np.ndarray]:
    return [prediction.chunk.actions_hc for prediction in engine.predict(requests)]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("graphs", [False, True], ids=["called", "static buffers"])
def test_every_robots_chunk_is_that_of_the_eager_path(
    options: dict[str, str], graphs: bool, difference: Difference
) -> None:
    """One to three views; alone, in one batch of mixed robots, and again: static buffers keep nothing."""
    policy = make_policy(**options)
    engine = LocalEngine(policy, graphs=graphs)
    asked = [make_request(policy, name, seed) for seed, name in enumerate(NAMES)]
    asked.append(make_request(policy, "aloha", 9, "transfer the blue cube to the other arm"))
    references = [eager(policy, request) for request in asked]
    together = answers(engine, asked)
    for request, reference, batched in zip(asked, references, together, strict=True):
        assert difference(batched, reference) < 1e-4
        assert difference(answers(engine, [request])[0], reference) < 1e-4


def test_bfloat16_is_near_the_float32_reference() -> None:
    """The shipped weights; the norm of the difference, median over observations, as near as eager bfloat16."""
    path = resolve_checkpoint(DEFAULT_CHECKPOINT)
    exact, policy = load_checkpoint(path), load_checkpoint(path, dtype=torch.bfloat16)
    engine = LocalEngine(policy, graphs=True)
    for name in NAMES:
        away = []
        for seed in range(4):
            request = make_request(policy, name, seed)
            reference = eager(exact, request)
            away.append(np.linalg.norm(answers(engine, [request])[0] - reference) / np.linalg.norm(reference))
        assert np.median(away) < 2e-2


def test_half_precision_rounds_no_rotary_frequency() -> None:
    policy = load_checkpoint(resolve_checkpoint(DEFAULT_CHECKPOINT), dtype=torch.bfloat16)
    assert {buffer.dtype for _, buffer in policy.named_buffers()} == {torch.float32}
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}


def test_padding_to_a_bucket_and_beside_a_longer_prompt_changes_nothing(
    policy: QwenVLA, difference: Difference
) -> None:
    short, long = make_request(policy, "aloha"), make_request(policy, "aloha", 1, "go to the door and stop " * 8)
    exact, padded = LocalEngine(policy), LocalEngine(policy, graphs=True)
    packed = padded._pack([padded._prepare(short.observation, "aloha")])
    tokens = packed.arrangement.valid.lengths[0, 0]
    assert packed.arrangement.bucket.length == bucket_length(int(tokens)) > tokens
    (alone,) = answers(exact, [short])
    assert difference(answers(padded, [short])[0], alone) < 1e-5
    assert difference(answers(exact, [short, long])[0], alone) < 1e-5
    assert difference(answers(exact, [long, short])[1], alone) < 1e-5


def test_a_prompt_of_any_length_has_a_bucket(policy: QwenVLA, difference: Difference) -> None:
    assert [bucket_length(n) for n in (1, 32, 33, 512, 513, 700)] == [32, 32, 64, 512, 640, 768]
    request = make_request(policy, "widowx", instruction="turn left " * 400)
    engine = LocalEngine(policy, graphs=True)
    assert engine._prepare(request.observation, "widowx").row.length > 512
    assert difference(answers(engine, [request])[0], eager(policy, request)) < 1e-4


def test_instruction_steps_and_weights_in_use_may_change(policy: QwenVLA, difference: Difference) -> None:
    engine = LocalEngine(policy, graphs=True)
    seen = []
    for steps, instruction in ((None, "pick up the red cube"), (2, "pick up the red cube"), (7, "stop"), (2, "stop")):
        engine.steps = steps
        request = make_request(policy, "aloha", instruction=instruction)
        seen.append(answers(engine, [request])[0])
        assert difference(seen[-1], eager(policy, request, steps)) < 1e-4
    assert all(np.abs(left - right).max() > 1e-4 for i, left in enumerate(seen) for right in seen[i + 1 :])


def test_each_request_has_its_own_noise_or_a_new_one(policy: QwenVLA) -> None:
    engine, request = LocalEngine(policy), make_request(policy, "aloha")
    free = dataclasses.replace(request, noise_hk=None)
    first, second, given, again = answers(engine, [free, free, request, request])
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_allclose(given, again, atol=1e-4)


def test_what_is_missing_or_wrong_is_named(policy: QwenVLA) -> None:
    engine, request = LocalEngine(policy), make_request(policy, "aloha")
    observation = request.observation
    views = {view: image for view, image in observation.images.items() if view != "cam_left_wrist"}
    for changed, message in (
        (dataclasses.replace(observation, images=views), "cam_left_wrist"),
        (dataclasses.replace(observation, state=observation.state[:-1]), "state of embodiment aloha"),
    ):
        with pytest.raises(UserError, match=message):
            engine.predict([dataclasses.replace(request, observation=changed)])
    with pytest.raises(UserError, match="tractor"):
        engine.predict([dataclasses.replace(request, embodiment="tractor")])
    wrong = {**observation.images, "ego": observation.images["ego"].astype(np.float32)}
    with pytest.raises(ValueError, match="uint8"):
        engine.predict([dataclasses.replace(request, observation=dataclasses.replace(observation, images=wrong))])
    assert engine.predict([]) == []


def test_conditioned_requests_stand_beside_free_ones(policy: QwenVLA, difference: Difference) -> None:
    request = make_request(policy, "aloha")
    committed = Committed(np.full((6, 14), 0.2), frozen=3, use="prefix")
    continuing = dataclasses.replace(request, committed=committed)
    first, second, third = answers(LocalEngine(policy), [continuing, request, make_request(policy, "widowx")])
    np.testing.assert_allclose(first[:3], committed.actions_hc[:3], atol=1e-5)
    assert difference(second, eager(policy, request)) < 1e-4 and third.shape == (8, 7)


def test_a_policy_with_an_engine_still_trains_and_saves(tmp_path: Path) -> None:
    policy = make_policy(state_mode="none")
    request = make_request(policy, "aloha")
    before = eager(policy, request)
    LocalEngine(policy)
    save_checkpoint(policy, tmp_path / "saved")
    np.testing.assert_allclose(eager(load_checkpoint(tmp_path / "saved"), request), before, atol=1e-5)
    batch = policy.collate([request.observation], "aloha", np.zeros((1, 16, 14)))
    policy.loss(batch)["action"].backward()
    assert all(block.ffn.gate.weight.grad.abs().sum() > 0 for block in policy.decoder.blocks)
    policy.zero_grad()


def test_the_network_can_be_compiled_per_bucket(policy: QwenVLA, difference: Difference, monkeypatch: Any) -> None:
    """Traced as torch.compile traces it, but run in Python: the C++ of inductor takes minutes."""
    traced: list[Any] = []
    real = torch.compile

    def quick(function: Any, **options: Any) -> Any:
        traced.append(function)
        return real(function, **options, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", quick)
    engine = LocalEngine(policy, compile=True)
    for seed, instruction in enumerate(("stop", "pick up the red cube")):
        request = make_request(policy, "widowx", seed, instruction)
        assert difference(answers(engine, [request])[0], eager(policy, request)) < 1e-4
    assert len(traced) == 2  # both sentences are in one bucket: its prefill and its Euler steps


def test_seconds_add_up_to_the_call(policy: QwenVLA) -> None:
    seconds = LocalEngine(policy).predict([make_request(policy, "aloha")])[0].seconds
    assert set(seconds) == {"preprocess", "backbone", "denoise"} and min(seconds.values()) > 0


@pytest.mark.parametrize("size", [(480, 640), (192, 256), (96, 128), (500, 333), (240, 320)])
def test_pictures_are_reduced_as_the_processor_reduces_them(policy: QwenVLA, size: tuple[int, int]) -> None:
    """Whole cells by sums of bytes, other sizes by torch; both give the grey levels of the reference."""
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    picture.setflags(write=False)  # as in a message's memory
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = shrink(policy, picture)
    patches, _ = policy.processor.patchify(torch.from_numpy(picture.copy())[None])
    as_it_is = dataclasses.replace(policy.processor.image, min_pixels=1, max_pixels=2**30)
    again, _ = Processor(policy.processor.tokenizer, as_it_is).patchify(small[None])
    assert torch.equal(patches, again)
    assert whole_cells(np.full((4, 6, 3), 255, np.uint8), 2, 3).tolist() == [[[255] * 3] * 2] * 2
