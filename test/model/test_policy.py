from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_vla_core.actions.normalize import Quantiles
from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import Observation
from qwen_vla_core.model.config import DecoderConfig
from qwen_vla_core.model.policy import QwenVLA, Stats
from qwen_vla_core.model.presets import TINY_DECODER, build_from_pretrained
from qwen_vla_core.model.processor import Sample

Observe = Callable[..., Observation]
Make = Callable[..., QwenVLA]


def noise(policy: QwenVLA, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 16, policy.config.decoder.channels, generator=torch.Generator().manual_seed(5))


def test_predict_gives_a_chunk_in_channel_units(policy: QwenVLA, observe: Observe, aloha: Embodiment) -> None:
    chunk = policy.predict(observe(), noise=noise(policy))
    assert chunk.actions_hc.shape == (aloha.control.horizon, len(aloha.channels))
    assert chunk.channels == aloha.channels
    assert (chunk.stamp_ns, chunk.period_s) == (7, 1 / aloha.control.frequency_hz)
    assert np.isfinite(chunk.actions_hc).all()
    assert chunk.actions_hc.min() >= -1.0
    assert chunk.actions_hc.max() <= 1.5


def test_a_relative_convention_still_gives_absolute_targets(
    make_policy: Make, observe: Observe, aloha: Embodiment, stats: Stats
) -> None:
    policy, observation = make_policy(), observe()
    absolute = policy.postprocess(torch.zeros(16, 64), observation).actions_hc
    control = dataclasses.replace(aloha.control, convention="relative_joint")
    policy.add_embodiment(dataclasses.replace(aloha, control=control), stats)
    relative = policy.postprocess(torch.zeros(16, 64), observation).actions_hc
    groups = {channel: group.kind for group in aloha.actions for channel in group.channels}
    measured = dict(zip(aloha.state_channels, observation.state, strict=True))
    moved = [measured[channel] if groups[channel] == "joint_position" else 0.0 for channel in aloha.channels]
    assert np.count_nonzero(moved) == 12
    np.testing.assert_allclose(relative - absolute, np.tile(moved, (16, 1)), atol=1e-12)


def test_the_same_noise_gives_the_same_chunk_and_other_noise_another(policy: QwenVLA, observe: Observe) -> None:
    def seeded(seed: int) -> np.ndarray:
        return policy.predict(observe(), generator=torch.Generator().manual_seed(seed)).actions_hc

    np.testing.assert_array_equal(seeded(1), seeded(1))
    assert np.abs(seeded(1) - seeded(2)).max() > 1e-3
    first = policy.predict(observe(), noise=noise(policy)).actions_hc
    np.testing.assert_array_equal(first, policy.predict(observe(), noise=noise(policy)).actions_hc)


def test_pictures_state_and_instruction_all_reach_the_actions(policy: QwenVLA, observe: Observe) -> None:
    base = observe()
    reference = policy.predict(base, noise=noise(policy)).actions_hc
    dark = {**base.images, "cam_right_wrist": base.images["cam_right_wrist"] // 2}
    for changed in (
        dataclasses.replace(base, instruction="pick up the blue cube"),
        dataclasses.replace(base, state=base.state * 0.5),
        dataclasses.replace(base, images=dark),
    ):
        assert np.abs(policy.predict(changed, noise=noise(policy)).actions_hc - reference).max() > 1e-5


def test_noise_in_padded_channels_changes_nothing(policy: QwenVLA, observe: Observe, aloha: Embodiment) -> None:
    dirty = noise(policy)
    dirty[..., len(aloha.channels) :] = 1e3
    inputs = policy.preprocess(observe())
    clean, other = policy.sample(inputs, noise=noise(policy)), policy.sample(inputs, noise=dirty)
    assert torch.equal(clean, other)
    assert clean[..., len(aloha.channels) :].abs().max() == 0


def test_padded_channels_reach_neither_loss_nor_gradients(
    make_policy: Make, observe: Observe, aloha: Embodiment
) -> None:
    policy, real = make_policy(), len(aloha.channels)
    batch = policy.collate([observe()], actions_bhc=np.zeros((1, 16, real)))
    tau = torch.full((1, 1), 0.5)
    results = []
    for garbage in (0.0, float("nan")):
        given, data = noise(policy), batch["actions"].clone()
        given[..., real:] = data[..., real:] = garbage
        policy.zero_grad()
        loss = policy.loss({**batch, "actions": data}, noise=given, tau=tau)["action"]
        loss.backward()
        results.append((loss.item(), [p.grad.clone() for p in policy.parameters() if p.grad is not None]))
    assert results[0][0] == results[1][0] > 0
    assert len(results[0][1]) > 50
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("state_mode", ["none", "prompt", "dit_token"])
@pytest.mark.parametrize("context", ["cached", "joint"])
def test_every_arrangement_samples_and_recomputing_gives_the_same_chunk(
    make_policy: Make, observe: Observe, context: str, state_mode: str
) -> None:
    policy = make_policy(context=context, state_mode=state_mode)
    batch = policy.collate([observe(0), observe(1)])
    with torch.no_grad():
        cached = policy.encode(batch)
        plain = policy._context(batch, policy._encode(batch))
        first = policy.denoise(cached, batch, 16, 3, noise(policy, 2))
        second = policy.denoise(plain, batch, 16, 3, noise(policy, 2))
    assert not plain.layers
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    moved = policy.predict(dataclasses.replace(observe(0), state=-observe(0).state), noise=noise(policy)).actions_hc
    changed = np.abs(moved - policy.predict(observe(0), noise=noise(policy)).actions_hc).max() > 1e-6
    assert changed == (state_mode != "none")


def test_a_batch_with_prompts_of_different_length_equals_one_by_one(policy: QwenVLA, observe: Observe) -> None:
    both = [observe(0), observe(1, "transfer the green cube to the other arm")]
    together = policy.sample(policy.collate(both), noise=noise(policy, 2))
    for index, one in enumerate(both):
        alone = policy.sample(policy.collate([one]), noise=noise(policy, 2)[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-4, rtol=0)


def test_answers_after_the_prompt_do_not_change_the_action_loss(policy: QwenVLA, observe: Observe) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 16, 14))
    settings = {"noise": noise(policy, 2), "tau": torch.full((2, 1), 0.4)}
    turns = [(("Where is the red cube?", "row 3"),), (("", "a longer answer, at once"),)]
    plain = policy.loss(policy.collate([observe(0), observe(1)], actions_bhc=actions), **settings)
    asked = policy.loss(policy.collate([observe(0), observe(1)], actions_bhc=actions, turns=turns), **settings)
    assert set(plain) == {"action"}
    assert set(asked) == {"action", "text"}
    torch.testing.assert_close(plain["action"], asked["action"], atol=1e-5, rtol=1e-5)


def test_repeat_averages_over_its_draws(policy: QwenVLA, observe: Observe) -> None:
    batch = policy.collate([observe()], actions_bhc=np.zeros((1, 16, 14)))
    draws, tau = torch.cat([noise(policy), -noise(policy)]), torch.tensor([[0.3], [0.8]])
    twice = policy.loss(batch, repeat=2, noise=draws, tau=tau)["action"]
    singles = [policy.loss(batch, noise=draws[i : i + 1], tau=tau[i : i + 1])["action"] for i in (0, 1)]
    torch.testing.assert_close(twice, (singles[0] + singles[1]) / 2)


def test_one_batch_can_be_learned_and_the_answer_generated(make_policy: Make, observe: Observe) -> None:
    torch.manual_seed(0)
    policy = make_policy(awake=False).train()
    observations = [observe(0), observe(1, "pick up the blue cube")]
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 1, 14)).repeat(16, 1)
    question = "Where is the red cube?"
    answers = ("row 3 column 4", "row 1 column 7")
    batch = policy.collate(observations, actions_bhc=actions, turns=[(("", answer),) for answer in answers])
    asked = policy.processor.collate(
        [Sample(o.images, question, (("", answer),)) for o, answer in zip(observations, answers, strict=True)]
    )
    optimizer = torch.optim.AdamW(policy.parameters(), 2e-3)
    history = []
    for _ in range(60):
        losses = policy.loss(batch, repeat=4)
        text = policy.text_loss(asked)
        (losses["action"] + losses["text"] + text).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append((losses["action"].item(), losses["text"].item(), text.item()))
    first, last = np.mean(history[:3], 0), np.mean(history[-5:], 0)
    assert last[0] < 0.6 * first[0]
    assert last[1] < 0.1 * first[1]
    policy.eval()
    for observation, answer in zip(observations, answers, strict=True):
        assert policy.generate_text(observation.images, question, 12) == answer


def test_a_missing_view_is_an_error_never_a_black_picture(policy: QwenVLA, observe: Observe) -> None:
    seen = observe()
    images = {view: image for view, image in seen.images.items() if view != "cam_left_wrist"}
    with pytest.raises(UserError, match="cam_left_wrist"):
        policy.predict(dataclasses.replace(seen, images=images))


@pytest.mark.parametrize("state", [np.zeros(3), np.full(14, np.nan)])
def test_a_wrong_state_is_an_error(policy: QwenVLA, observe: Observe, state: np.ndarray) -> None:
    with pytest.raises(UserError, match="state"):
        policy.predict(dataclasses.replace(observe(), state=state))


def test_an_unknown_robot_or_one_without_stats_is_an_error(
    make_policy: Make, observe: Observe, aloha: Embodiment
) -> None:
    policy = make_policy()
    with pytest.raises(UserError, match="widowx"):
        policy.predict(observe(), embodiment="widowx")
    policy.stats.clear()
    with pytest.raises(UserError, match=r"stats\.json"):
        policy.predict(observe())
    quantiles = Quantiles((0.0,), (1.0,), ("other",))
    with pytest.raises(UserError, match="action channels"):
        policy.add_embodiment(aloha, Stats(quantiles, quantiles))


def test_more_channels_than_the_model_holds_are_refused(make_policy: Make, aloha: Embodiment) -> None:
    policy = make_policy()
    policy.config = dataclasses.replace(policy.config, decoder=dataclasses.replace(TINY_DECODER, channels=13))
    with pytest.raises(UserError, match="14 actions channels"):
        policy.add_embodiment(aloha)


def test_view_tokens_are_added_to_a_published_style_folder_and_it_predicts(
    make_policy: Make, observe: Observe, aloha: Embodiment, stats: Stats, tmp_path: Path
) -> None:
    source = make_policy()
    source.backbone.model.save_pretrained(tmp_path)
    source.processor.save_pretrained(tmp_path)
    other = dataclasses.replace(
        aloha, cameras=tuple(dataclasses.replace(camera, view=f"new_{camera.view}") for camera in aloha.cameras)
    )
    decoder: DecoderConfig = dataclasses.replace(TINY_DECODER, depth=1)
    policy = build_from_pretrained(str(tmp_path), [other], {aloha.name: stats}, decoder, pixels=128 * 96).eval()
    assert len(policy.processor.tokenizer.encode("<|new_ego_start|>")) == 1
    rows = policy.backbone.model.get_input_embeddings().num_embeddings
    assert rows == source.backbone.model.get_input_embeddings().num_embeddings + 6
    seen = observe()
    renamed = dataclasses.replace(seen, images={f"new_{view}": image for view, image in seen.images.items()})
    assert policy.predict(renamed, noise=noise(policy)).actions_hc.shape == (16, 14)
    small = build_from_pretrained(str(tmp_path), [aloha], {aloha.name: stats}, decoder, pixels=64 * 48)
    assert small.preprocess(seen)["image_grid_thw"].tolist() == [[1, 2, 4]] * 3
