from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_vla_core.errors import UserError
from qwen_vla_core.model.presets import TINY_IMAGE
from qwen_vla_core.model.processor import AREA, ImageConfig, Processor, Sample
from qwen_vla_core.model.tokenizer import COLOURS, train_tokenizer

VIEWS = ("ego", "cam_left_wrist")


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(train_tokenizer(VIEWS), TINY_IMAGE)


def picture(height: int = 96, width: int = 128, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_view_tokens_are_single_tokens_around_their_picture(processor: Processor) -> None:
    batch = processor.collate([Sample({view: picture() for view in VIEWS}, "pick up the red cube")])
    tokens = processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    for view in VIEWS:
        start, end = tokens.index(f"<|{view}_start|>"), tokens.index(f"<|{view}_end|>")
        assert tokens[start + 1 : end] == ["<|vision_start|>", *["<|image_pad|>"] * 12, "<|vision_end|>"]
    assert tokens.index("<|ego_end|>") < tokens.index("<|cam_left_wrist_start|>")


def test_several_frames_of_a_view_lie_between_its_tokens_in_time_order(processor: Processor) -> None:
    film = np.stack([picture(seed=1), picture(seed=2)])
    several = processor.collate(
        [Sample({"ego": film, "cam_left_wrist": picture()}, "go"), Sample({"ego": film[1]}, "")]
    )
    tokens = processor.tokenizer.convert_ids_to_tokens(several["input_ids"][0].tolist())
    frame = ["<|vision_start|>", *["<|image_pad|>"] * 12, "<|vision_end|>"]
    assert tokens[tokens.index("<|ego_start|>") + 1 : tokens.index("<|ego_end|>")] == frame * 2
    assert len(several["image_grid_thw"]) == 4
    patches = several["pixel_values"].reshape(4, -1)
    assert torch.equal(patches[1], patches[3]) and not torch.equal(patches[0], patches[1])


def test_token_ids_equal_those_of_the_whole_text_tokenised_at_once(processor: Processor) -> None:
    batch = processor.collate(
        [Sample({"ego": picture()}, "pick up the red cube", (("Where?", "row 3"), ("And?", "no")))]
    )
    text = (
        f"<|im_start|>user\n<|ego_start|><|vision_start|>{'<|image_pad|>' * 12}<|vision_end|><|ego_end|>"
        "pick up the red cube<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n"
        "<|im_start|>assistant\nrow 3<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>"
    )
    assert batch["input_ids"][0].tolist() == processor.tokenizer.encode(text)


def test_only_answers_are_learned_and_the_context_ends_before_them(processor: Processor) -> None:
    samples = [Sample({}, "What colour?", (("", "red"),)), Sample({}, "pick up the red cube", (("Where?", "row 3"),))]
    batch = processor.collate(samples)
    for row, answer in enumerate(("red<|im_end|>", "row 3<|im_end|>")):
        learned = batch["labels"][row] != -100
        assert processor.tokenizer.decode(batch["input_ids"][row][learned]) == answer
        assert torch.equal(batch["labels"][row][learned], batch["input_ids"][row][learned])
        context = processor.tokenizer.decode(batch["input_ids"][row][batch["context_mask"][row]])
        assert context == f"<|im_start|>user\n{samples[row].prompt}<|im_end|>\n<|im_start|>assistant\n"
        assert not (learned & batch["context_mask"][row]).any()
    assert "pixel_values" not in batch


def test_questions_use_the_same_format_in_training_and_generation(processor: Processor) -> None:
    images = {"ego": picture()}
    asked = processor.question(images, "Where?")
    learned = processor.collate([Sample(images, "Where?", (("", "row 3"),))])
    length = int(learned["context_mask"].sum())
    assert torch.equal(asked["input_ids"], learned["input_ids"][:, :length])
    assert torch.equal(asked["pixel_values"], learned["pixel_values"])


def test_digits_and_colours_are_single_tokens_and_text_survives(processor: Processor) -> None:
    for word in (*map(str, range(10)), *(f" {colour}" for colour in COLOURS)):
        assert len(processor.tokenizer.encode(word)) == 1, word
    text = "Unseen: 3.14 naïve Ωmega\n"
    assert processor.tokenizer.decode(processor.tokenizer.encode(text)) == text


def test_the_tokenizer_is_deterministic() -> None:
    assert train_tokenizer(VIEWS).get_vocab() == train_tokenizer(VIEWS).get_vocab()


def test_patches_equal_the_official_processor() -> None:
    official_class = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    image = ImageConfig(min_pixels=128 * 128, max_pixels=128 * 128)
    official = official_class.Qwen2VLImageProcessorPil(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 128 * 128, "longest_edge": 128 * 128},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor = Processor(train_tokenizer(VIEWS), image)
    for shape, tolerance in (((128, 128), 1e-6), ((240, 320), 0.02)):  # resizing may differ by a grey level
        pixels = picture(*shape)
        expected = official(images=[pixels], return_tensors="pt")
        patches, grid = processor.patchify(torch.from_numpy(pixels)[None])
        assert [1, *grid] == expected["image_grid_thw"][0].tolist()
        torch.testing.assert_close(patches[0], expected["pixel_values"], atol=tolerance, rtol=0)


def test_a_reduced_picture_equals_one_stored_reduced(processor: Processor) -> None:
    large = torch.from_numpy(picture(480, 640))[None]
    small = large.reshape(1, 96, 5, 128, 5, 3).float().mean((2, 4)).round().to(torch.uint8)
    assert processor.image.resample == AREA
    assert torch.equal(processor.patchify(large)[0], processor.patchify(small)[0])


def test_pictures_of_different_sizes_keep_their_order() -> None:
    processor = Processor(train_tokenizer(VIEWS), ImageConfig(min_pixels=1024, max_pixels=64 * 64))
    batch = processor.collate(
        [
            Sample({"ego": picture(32, 64), "cam_left_wrist": picture(64, 32)}, "x"),
            Sample({"ego": picture(32, 64, 1)}, "y"),
        ]
    )
    assert batch["image_grid_thw"].tolist() == [[1, 2, 4], [1, 4, 2], [1, 2, 4]]
    alone = processor.patchify(torch.from_numpy(picture(32, 64, 1))[None])[0][0]
    assert torch.equal(batch["pixel_values"][-8:], alone)


def test_folder_round_trip_and_missing_file_by_name(processor: Processor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = Processor.from_pretrained(str(tmp_path))
    assert again.image == processor.image
    sample = [Sample({"ego": picture()}, "pick up the red cube")]
    for key, value in processor.collate(sample).items():
        assert torch.equal(value, again.collate(sample)[key]), key
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        Processor.from_pretrained(str(tmp_path))


def test_float_pictures_are_refused(processor: Processor) -> None:
    with pytest.raises(ValueError, match="uint8"):
        processor.collate([Sample({"ego": np.zeros((96, 128, 3))}, "x")])
