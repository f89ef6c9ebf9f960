from __future__ import annotations

import numpy as np
import pytest
import torch

from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.model.attention import IMAGE_ATTENTION, use_float32_attention
from qwen_vla_core.model.backbone import Backbone
from qwen_vla_core.model.presets import build_tiny, tiny_backbone
from qwen_vla_core.model.processor import Sample

IDS = {"<|image_pad|>": 5, "<|video_pad|>": 6, "<|vision_start|>": 7, "<|vision_end|>": 8}
GRID = torch.tensor([[1, 6, 8]])  # 3 × 4 tokens


def batch(rows: int = 2, padded: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[10, 7, *[5] * 12, 8, 11, 12, 13]]).repeat(rows, 1)
    attention = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        attention[-1, -2:] = False
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == 5).long(),
        "pixel_values": torch.randn(48 * rows, 768, generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": GRID.repeat(rows, 1),
        "attention_mask": attention,
    }


@pytest.fixture(scope="module", params=["qwen3_5", "qwen3_vl", "qwen2_5_vl"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    torch.manual_seed(0)
    return Backbone.from_config(tiny_backbone(32, IDS, request.param)).eval()


def test_every_class_reads_pictures(backbone: Backbone) -> None:
    inputs = batch(1)
    with torch.no_grad():
        seen = backbone.encode(**inputs)
        other = backbone.encode(**{**inputs, "pixel_values": -inputs["pixel_values"]})
    assert seen.hidden.shape == (1, 18, backbone.hidden_size)
    assert backbone.logits(seen.hidden).shape == (1, 18, 32)
    assert (seen.hidden[:, -1] - other.hidden[:, -1]).abs().max() > 1e-3


def test_positions_are_the_classes_own(backbone: Backbone) -> None:
    inputs = batch(3, padded=True)
    mask = inputs["attention_mask"]
    ours = backbone.positions(inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"], mask)
    theirs, _ = backbone.model.model.get_rope_index(
        input_ids=inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=mask.long(),
    )
    assert torch.equal(ours, theirs)
    assert ours[:, 0, 2:14].amax(1).tolist() == [2, 4, 5]  # one frame, 3 rows, 4 columns
    assert ours[:, 0, 14].tolist() == [6, 6, 6]


def test_rows_with_different_pictures_get_their_own_positions(backbone: Backbone) -> None:
    ids = torch.tensor([[10, *[5] * 12, 11, 12], [10, *[5] * 12, 11, 12]])
    grids = torch.tensor([[1, 6, 8], [1, 8, 6]])
    ours = backbone.positions(ids, (ids == 5).long(), grids, None)
    assert ours[:, 0, 12].tolist() == [1, 3, 4]
    assert ours[:, 1, 12].tolist() == [1, 4, 3]


def test_text_only_positions_skip_padding(backbone: Backbone) -> None:
    ids = torch.tensor([[1, 2, 3], [1, 2, 0]])
    mask = torch.tensor([[True] * 3, [True, True, False]])
    ours = backbone.positions(ids, torch.zeros_like(ids), None, mask)
    assert ours[:, 1].tolist() == [[0, 1, 1]] * 3


def test_padding_does_not_change_real_tokens(backbone: Backbone) -> None:
    inputs = batch(2, padded=True)
    with torch.no_grad():
        together = backbone.encode(**inputs)
        alone = backbone.encode(
            inputs["input_ids"][1:, :-2], inputs["mm_token_type_ids"][1:, :-2], inputs["pixel_values"][48:], GRID
        )
    assert together.mask is not None
    assert alone.mask is None
    torch.testing.assert_close(together.hidden[1:, :-2], alone.hidden, atol=2e-5, rtol=1e-4)


def test_configuration_round_trip_builds_the_same_shapes(backbone: Backbone) -> None:
    again = Backbone.from_config(backbone.config_dict())
    assert type(again.model) is type(backbone.model)
    assert [(n, p.shape) for n, p in again.named_parameters()] == [(n, p.shape) for n, p in backbone.named_parameters()]


def test_float32_attention_changes_nothing_without_autocast_and_is_not_saved(backbone: Backbone) -> None:
    inputs = batch(2, padded=True)
    with torch.no_grad():
        before = backbone.encode(**inputs).hidden
        use_float32_attention(backbone.model)
        after = backbone.encode(**inputs).hidden
    backbone.model.set_attn_implementation("sdpa")
    torch.testing.assert_close(after[inputs["attention_mask"]], before[inputs["attention_mask"]])
    assert "sdpa_float32" not in str(backbone.config_dict())


def test_vocabulary_grows_but_never_shrinks() -> None:
    small = Backbone.from_config(tiny_backbone(32, IDS))
    small.resize_vocabulary(20)
    assert small.model.get_input_embeddings().num_embeddings == 32
    small.resize_vocabulary(40)
    assert small.model.get_input_embeddings().num_embeddings == 40
    assert small.model.lm_head.weight is small.model.get_input_embeddings().weight
    assert small.config_dict()["text_config"]["vocab_size"] == 40


def test_vision_positions_start_as_distinct_waves() -> None:
    table = Backbone.from_config(tiny_backbone(32, IDS)).visual.pos_embed.weight  # type: ignore[union-attr]
    assert torch.pdist(table.detach()).min() > 1e-2  # type: ignore[operator]


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_vl"])
def test_a_local_folder_in_the_real_layout_loads(model_type: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(1)
    original = Backbone.from_config(tiny_backbone(32, IDS, model_type)).eval()
    original.model.save_pretrained(tmp_path)
    loaded = Backbone.from_pretrained(str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(loaded.encode(**batch()).hidden, original.encode(**batch()).hidden)


def test_an_unsupported_or_absent_backbone_is_one_user_error(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="llama"):
        Backbone.from_config({"model_type": "llama"})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="backbone"):
        Backbone.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("sizes", [((96, 128),) * 3, ((96, 128), (64, 64), (128, 96))], ids=["one size", "three sizes"])
@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_vl", "qwen2_5_vl"])
def test_pictures_attended_to_together_are_read_as_one_by_one(
    aloha: Embodiment, model_type: str, sizes: tuple[tuple[int, int], ...]
) -> None:
    policy = build_tiny([aloha], model_type=model_type).eval()
    rng = np.random.default_rng(0)
    images = {
        view: rng.integers(0, 255, (*size, 3), dtype=np.uint8) for view, size in zip(aloha.views, sizes, strict=True)
    }
    batch = policy.processor.collate([Sample(images, "hello")] * 2)
    config = policy.backbone.visual.config
    assert config._attn_implementation == IMAGE_ATTENTION
    with torch.no_grad():
        together = policy._encode(batch).hidden
        config._attn_implementation = "sdpa"
        torch.testing.assert_close(together, policy._encode(batch).hidden, rtol=1e-5, atol=1e-5)
