"""Rows of several robots and conversations in one batch give the losses they give alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.model.batching import ActionRow, Row, collate_rows
from qwen_vla_core.model.policy import QwenVLA, loss_counts
from qwen_vla_core.model.processor import Sample


def rows(seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)

    def picture() -> np.ndarray:
        return rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)

    return [
        ActionRow({"ego": picture()}, "go", rng.normal(size=5), 3, rng.normal(size=(8, 3)), kind="navigation"),
        Sample({"ego": picture()}, "where is the red cube?", (("", "row 1 column 2"),)),
        ActionRow(
            {"ego": picture(), "cam_left_wrist": picture()},
            "take it",
            rng.normal(size=14),
            14,
            rng.normal(size=(16, 14)),
            np.arange(16) < 11,
            (("", "left row 3 column 4"),),
        ),
        ActionRow({}, "draw", None, 6, rng.normal(size=(4, 6))),
    ]


def test_a_mixed_batch_has_the_losses_of_its_rows(policy: QwenVLA) -> None:
    noise, tau = torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([[0.2], [0.5], [0.9]])
    batch = collate_rows(policy.processor, policy.config, rows())
    with torch.no_grad():
        together = policy(batch, noise=noise, tau=tau)
        alone: dict[str, float] = {}
        counts: dict[str, int] = {}
        drawn = iter(range(3))
        for row in rows():
            single = collate_rows(policy.processor, policy.config, [row])
            given = {}
            if isinstance(row, ActionRow):
                k = next(drawn)
                given = {"noise": noise[k : k + 1, : single["actions"].shape[1]], "tau": tau[k : k + 1]}
            for key, value in policy(single, **given).items():
                alone[key] = alone.get(key, 0.0) + float(value)
            for key, number in loss_counts(single).items():
                counts[key] = counts.get(key, 0) + number
    assert loss_counts(batch) == counts == {"action": 2, "navigation": 1, "text": counts["text"]}
    assert counts["text"] > 0
    assert {key: float(value) for key, value in together.items()} == pytest.approx(alone, rel=1e-4)


def test_what_a_row_does_not_have_changes_nothing(policy: QwenVLA) -> None:
    """The targets of padded steps and channels are never read."""
    batch = collate_rows(policy.processor, policy.config, rows())
    settings = {"noise": torch.randn(3, 16, 64), "tau": torch.full((3, 1), 0.4)}
    with torch.no_grad():
        before = policy(batch, **settings)
        spoiled = batch["actions"].clone()
        spoiled[~(batch["step_mask"][:, :, None] & batch["channel_mask"][:, None])] = torch.nan
        after = policy({**batch, "actions": spoiled}, **settings)
    assert before == after


def test_conversations_alone_have_no_actions(policy: QwenVLA) -> None:
    batch = collate_rows(policy.processor, policy.config, rows()[1:2])
    assert not {"actions", "channel_mask", "state"} & batch.keys()
    assert policy(batch).keys() == {"text"}


def test_state_as_text_stands_in_the_prompt(make_policy: Callable[..., QwenVLA]) -> None:
    policy = make_policy(state_mode="prompt")
    row = ActionRow({}, "go.", np.array([-1.0, 0.0, 2.0]), 3)
    batch = collate_rows(policy.processor, policy.config, [row])
    assert "go. State: 0 128 255." in policy.processor.tokenizer.decode(batch["input_ids"][0])
    assert "state" not in batch


def test_a_wrong_prompt_speaks_of_another_robot(
    make_policy: Callable[..., QwenVLA], observe: Callable[..., object]
) -> None:
    policy = make_policy()
    policy.add_embodiment(load_embodiment("widowx"))
    right, wrong = (policy.collate([observe()], "aloha", told=told) for told in (None, "widowx"))  # type: ignore[list-item]
    texts = [policy.processor.tokenizer.decode(batch["input_ids"][0]) for batch in (right, wrong)]
    assert "The robot is ALOHA with dual arms" in texts[0] and "The robot is WidowX with single arm" in texts[1]
    assert right["image_grid_thw"].equal(wrong["image_grid_thw"]) and right["channel_mask"].equal(wrong["channel_mask"])
