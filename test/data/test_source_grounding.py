from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from vl_support import convert, picture, read_lines, write_json

from qwen_vla_core.data.boxes import (
    ABSOLUTE,
    CONVENTIONS,
    RELATIVE,
    Coordinates,
    Size,
    parse_boxes,
    print_boxes,
    re_express,
)
from qwen_vla_core.data.json_source import load, stream_array
from qwen_vla_core.data.llava import LlavaDataset
from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_json
from qwen_vla_core.model.backbone import BACKBONES
from qwen_vla_core.model.processor import IMAGE_FILE, ImageConfig

# Qwen2.5-VL's published preprocessor_config.json: patches of 14, merged 2×2.
QWEN25 = ImageConfig(patch_size=14, min_pixels=3136, max_pixels=12845056)
SMALL = ImageConfig(patch_size=14, min_pixels=3136, max_pixels=14 * 14 * 4 * 1280)
SIZES = st.tuples(st.integers(60, 2500), st.integers(60, 2500))


def boxes(size: Size) -> st.SearchStrategy[list[float]]:
    sides = [st.floats(0, side, allow_nan=False) for side in size]
    return st.tuples(*sides, *sides).map(lambda b: [min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3])])


def test_every_supported_backbone_has_its_convention() -> None:
    assert {name: CONVENTIONS[name] for name in BACKBONES} == {
        "qwen3_5": RELATIVE,
        "qwen3_vl": RELATIVE,
        "qwen2_5_vl": ABSOLUTE,
    }
    with pytest.raises(UserError, match="no box convention is known for 'llama'"):
        Coordinates.of("llama")
    with pytest.raises(UserError, match="need the processor's picture limits"):
        Coordinates.of("qwen2_5_vl")


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_pictures_are_resized_as_the_official_processor_does(size: Size) -> None:
    width, height = size
    for config in (QWEN25, SMALL, ImageConfig()):
        factor = config.patch_size * config.merge_size
        expected = smart_resize(height, width, factor, config.min_pixels, config.max_pixels)
        assert config.target_size(height, width) == expected
        if config.patch_size == 14:
            assert Coordinates.of("qwen2_5_vl", config.target_size).frame(size) == (expected[1], expected[0])


@settings(max_examples=100, deadline=None)
@given(st.data(), SIZES)
def test_encoding_is_undone_to_half_a_unit_and_stable(data: st.DataObject, size: Size) -> None:
    box = data.draw(boxes(size))
    for coordinates in (Coordinates.of("qwen3_5"), Coordinates.of("qwen2_5_vl", SMALL.target_size)):
        numbers = coordinates.encode(box, size)
        frame = coordinates.frame(size)
        assert all(type(number) is int and 0 <= number <= frame[axis % 2] for axis, number in enumerate(numbers))
        back = coordinates.decode(numbers, size)
        for axis, (pixel, again) in enumerate(zip(box, back, strict=True)):
            unit = size[axis % 2] / frame[axis % 2]
            edge = 0.5 if coordinates.convention == RELATIVE or pixel / unit < frame[axis % 2] - 1 else 1.0
            assert abs(pixel - again) <= edge * unit + 1e-6
        assert coordinates.encode(back, size) == numbers  # decode, encode is the identity on what a model prints


def test_numbers_equal_those_of_qwens_own_tools() -> None:
    # The picture and box of Qwen's fine-tuning notebook, in both conventions: 428 high, 640 wide.
    box, size = [146.0, 137.0, 615.0, 415.0], (640, 428)
    assert Coordinates.of("qwen3_vl").encode(box, size) == [228, 320, 961, 970]
    # Resized to 420 high, 644 wide.
    assert Coordinates.of("qwen2_5_vl", SMALL.target_size).encode(box, size) == [147, 134, 619, 407]


def test_the_answer_is_json_as_qwen_prints_it_and_is_read_back() -> None:
    text = print_boxes([([10, 20, 30, 40], 'the "left" Tür'), ([1, 2, 3, 4], "猫")])
    assert text == (
        '```json\n[\n\t{"bbox_2d": [10, 20, 30, 40], "label": "the \\"left\\" Tür"},\n'
        '\t{"bbox_2d": [1, 2, 3, 4], "label": "猫"}\n]\n```'
    )
    assert parse_boxes(text) == [([10.0, 20.0, 30.0, 40.0], 'the "left" Tür'), ([1.0, 2.0, 3.0, 4.0], "猫")]
    assert parse_boxes('Sure: ```json\n[{"bbox_2d": [1, 2, 3, 4]}]\n``` done') == [([1.0, 2.0, 3.0, 4.0], "")]
    for bad in ("no", "[]x", '[{"bbox_2d": [1, 2, 3]}]', '[{"bbox": [1, 2, 3, 4]}]', '[{"bbox_2d": [1, 2, 3, "4"]}]'):
        with pytest.raises(ValueError):
            parse_boxes(bad)


def test_texts_are_rewritten_place_by_place() -> None:
    pixels, relative = Coordinates(), Coordinates.of("qwen3_5")
    text = 'A [1, 2] list, {"point_2d": [320, 120], "label": "x"} and {"bbox_2d": [0,0,640,480], "label": "y"}.'
    assert re_express(text, {"image": (640, 480)}, pixels, relative) == (
        'A [1, 2] list, {"point_2d": [500, 250], "label": "x"} and {"bbox_2d": [0, 0, 1000, 1000], "label": "y"}.'
    )
    assert re_express(text, {}, pixels, pixels) == text
    with pytest.raises(ValueError, match="of several sizes"):
        re_express(text, {"a": (640, 480), "b": (64, 48)}, pixels, relative)
    with pytest.raises(ValueError, match="not a place"):
        re_express('{"bbox_2d": [1, 2, "x", 3]}', {"a": (8, 8)}, pixels, relative)


COCO: dict[str, Any] = {
    "info": {"description": "COCO 2017 Dataset"},
    "images": [
        {"license": 4, "file_name": "000000397133.jpg", "height": 120, "width": 160, "id": 397133},
        {"license": 4, "file_name": "000000037777.jpg", "height": 120, "width": 160, "id": 37777},
    ],
    "annotations": [
        {
            "area": 1,
            "iscrowd": 0,
            "image_id": 397133,
            "bbox": [97.5, 39.25, 62.5, 60.0],
            "category_id": 44,
            "id": 82445,
        },
        {"area": 1, "iscrowd": 0, "image_id": 397133, "bbox": [1.0, 2.0, 20.0, 30.0], "category_id": 67, "id": 119568},
        {"area": 1, "iscrowd": 1, "image_id": 397133, "bbox": [0.0, 0.0, 99.0, 99.0], "category_id": 1, "id": 9},
        {"area": 1, "iscrowd": 0, "image_id": 397133, "bbox": [5.0, 5.0, 9.0, 9.0], "category_id": 1, "id": 10},
    ],
    "categories": [
        {"supercategory": "person", "id": 1, "name": "person"},
        {"supercategory": "kitchen", "id": 44, "name": "bottle"},
        {"supercategory": "furniture", "id": 67, "name": "dining table"},
    ],
}


def coco(folder: Path) -> dict[str, Any]:
    for image in COCO["images"]:
        picture(folder / image["file_name"], image["width"], image["height"])
    return json.loads(json.dumps(COCO))


def test_coco_detection_lists_every_instance_but_no_crowds(tmp_path: Path) -> None:
    src = write_json(tmp_path / "instances_val2017.json", coco(tmp_path))
    summary = convert("grounding", src, tmp_path / "out")
    assert (summary["family"], summary["converted"], len(summary["dropped"])) == ("spatial_grounding", 1, 1)
    question, answer = LlavaDataset.open(tmp_path / "out").sample(0).turns[0]
    assert question == (
        "Locate every instance that belongs to the following categories: 'bottle, dining table'. "
        "Report bbox coordinates in JSON format."
    )
    assert parse_boxes(answer) == [([6, 17, 131, 267], "dining table"), ([609, 327, 1000, 827], "bottle")]
    assert read_lines(tmp_path / "out/dropped.jsonl")[0]["reason"] == "no object has a box"


def test_a_reader_gets_the_boxes_of_its_own_backbone(tmp_path: Path) -> None:
    src = write_json(tmp_path / "instances.json", coco(tmp_path))
    convert("grounding", src, tmp_path / "out")
    image = ImageConfig(patch_size=14, min_pixels=56 * 56, max_pixels=100 * 100)
    wanted = Coordinates.of("qwen2_5_vl", image.target_size)
    assert wanted.frame((160, 120)) == (112, 84)
    data = LlavaDataset.open(tmp_path / "out", coordinates=wanted)
    assert parse_boxes(data.sample(0).turns[0][1]) == [([1, 1, 15, 22], "dining table"), ([68, 27, 111, 69], "bottle")]

    folder = tmp_path / "qwen25"
    folder.mkdir()
    atomic_write_json(folder / IMAGE_FILE, image.to_dict())
    convert("grounding", src, tmp_path / "abs", "--backbone", "qwen2_5_vl", "--processor", str(folder))
    absolute = LlavaDataset.open(tmp_path / "abs")
    assert absolute.stored.frame((160, 120)) == (112, 84)
    assert absolute.sample(0).turns == data.sample(0).turns
    back = LlavaDataset.open(tmp_path / "abs", coordinates=Coordinates.of("qwen3_5")).sample(0).turns[0][1]
    assert parse_boxes(back)[0][0] == [9, 12, 134, 262]  # within half a pixel of the 112×84 picture
    with pytest.raises(UserError, match="--processor"):
        convert("grounding", src, tmp_path / "no", "--backbone", "qwen2_5_vl")


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([10, 10, 0.5, 20], "thinner than a pixel"),
        ([10, 10, -5, 20], "thinner than a pixel"),
        ([100, 10, 90, 20], "leaves the 160×120 picture"),
        ([-9, 10, 90, 20], "leaves the 160×120 picture"),
    ],
)
def test_bad_boxes_are_dropped_with_their_reason(box: list[float], reason: str, tmp_path: Path) -> None:
    corpus = coco(tmp_path)
    good = {**corpus["annotations"][0], "image_id": 37777}
    corpus["annotations"] = [good, {**corpus["annotations"][0], "bbox": box}]
    convert("grounding", write_json(tmp_path / "a.json", corpus), tmp_path / "out")
    (dropped,) = read_lines(tmp_path / "out/dropped.jsonl")
    assert dropped["id"] == "detect-397133" and reason in dropped["reason"]
    at = int(dropped["item"].split(":")[1])
    assert '"file_name": "000000397133.jpg"' in "".join((tmp_path / "a.json").read_text().splitlines()[at - 1 : at + 4])


def test_a_picture_of_another_size_than_annotated_is_dropped(tmp_path: Path) -> None:
    corpus = coco(tmp_path)
    corpus["annotations"].append({**corpus["annotations"][0], "image_id": 37777})
    picture(tmp_path / "000000037777.jpg", 80, 60)
    convert("grounding", write_json(tmp_path / "a.json", corpus), tmp_path / "out")
    (dropped,) = read_lines(tmp_path / "out/dropped.jsonl")
    assert dropped["reason"] == "annotated for 160×120, but the picture is 80×60"


def test_refcoco_references_become_one_question_per_sentence(tmp_path: Path) -> None:
    write_json(tmp_path / "instances.json", coco(tmp_path))
    refs = [
        {
            "sent_ids": [0, 1],
            "file_name": "COCO_train2014_000000397133_4.jpg",
            "ann_id": 82445,
            "ref_id": 0,
            "image_id": 397133,
            "split": "train",
            "sentences": [
                {"tokens": ["the", "bottle"], "raw": "THE BOTTLE", "sent_id": 0, "sent": "the bottle on the right"},
                {"tokens": [], "raw": "", "sent_id": 1, "sent": " "},
            ],
            "category_id": 44,
        },
        {"ann_id": 119568, "ref_id": 1, "image_id": 397133, "split": "testA", "sentences": [{"sent": "table"}]},
    ]
    src = write_json(tmp_path / "refs(unc).json", refs)
    summary = convert("grounding", src, tmp_path / "out", "--split", "train")
    assert (summary["converted"], len(summary["dropped"]), summary["tasks"]) == (1, 1, {"refer": 1})
    question, answer = LlavaDataset.open(tmp_path / "out").sample(0).turns[0]
    assert question == "Locate the bottle on the right in this image and output the bbox coordinates in JSON format."
    assert parse_boxes(answer) == [([609, 327, 1000, 827], "the bottle on the right")]

    refs[0]["ann_id"] = 1
    with pytest.raises(UserError, match=r"refs\(unc\)\.json:2: \[0\]: ann_id 1 is not in instances\.json"):
        convert("grounding", write_json(src, refs), tmp_path / "out2")
    (tmp_path / "refs(unc).p").write_bytes(b"\x80\x04N.")
    with pytest.raises(UserError, match="pickle files can run code and are never read"):
        convert("grounding", tmp_path / "refs(unc).p", tmp_path / "out2")


def test_mdetr_phrases_take_their_words_from_the_caption(tmp_path: Path) -> None:
    corpus = coco(tmp_path)
    corpus["images"][0]["caption"] = "a bottle beside a brown table"
    corpus["images"][1]["caption"] = "the red door."
    corpus["annotations"] = [
        {**corpus["annotations"][0], "tokens_positive": [[2, 8]]},
        {**corpus["annotations"][1], "tokens_positive": [[18, 23], [24, 29]]},
        {**corpus["annotations"][1], "image_id": 37777, "tokens_positive": [[0, 12]]},
    ]
    convert("grounding", write_json(tmp_path / "finetune_refcoco_train.json", corpus), tmp_path / "out")
    data = LlavaDataset.open(tmp_path / "out")
    question, answer = data.sample(0).turns[0]
    assert '"a bottle beside a brown table"' in question
    assert [label for _, label in parse_boxes(answer)] == ["brown table", "bottle"]
    assert data.sample(1).turns[0][0].startswith("Locate the red door in this image")


def test_wrong_structure_names_file_line_and_key(tmp_path: Path) -> None:
    corpus = coco(tmp_path)
    corpus["annotations"][1]["bbox"] = [1, 2, 3]
    with pytest.raises(UserError, match=r"a\.json:\d+: annotations\[1\]\.bbox: expected four numbers"):
        convert("grounding", write_json(tmp_path / "a.json", corpus), tmp_path / "out")
    corpus["annotations"][1]["category_id"] = 2
    with pytest.raises(UserError, match=r"annotations\[1\]: category_id 2 is not among 'categories'"):
        convert("grounding", write_json(tmp_path / "a.json", corpus), tmp_path / "out")
    del corpus["images"][0]["width"]
    with pytest.raises(UserError, match=r"images\[0\]: has no 'width'"):
        convert("grounding", write_json(tmp_path / "a.json", corpus), tmp_path / "out")
    assert not (tmp_path / "out").exists()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=80, deadline=None)
@given(VALUES, st.sampled_from([None, 1, "\t"]))
def test_documents_are_parsed_as_json_does(tmp_path_factory: pytest.TempPathFactory, value: Any, indent: Any) -> None:
    file = tmp_path_factory.mktemp("json") / "a.json"
    file.write_text(f"\n {json.dumps(value, indent=indent)}\n", encoding="utf-8")
    assert load(file).value == value


@pytest.mark.parametrize("text", ["", "[1, 2", '{"a": 1,}', '{"a" 1}', "[1 2]", "[1] 2", '{"a": [1,]}', "{'a': 1}"])
def test_what_is_not_json_is_refused_with_its_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(f"\n\n{text}")
    with pytest.raises(UserError, match=r"a\.json:3: not JSON"):
        load(tmp_path / "a.json")


def test_large_tables_are_streamed_across_block_borders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"token": f"t{n}", "text": "ö" * (n % 7), "list": [n, {"x": "],}"}]} for n in range(50)]
    file = tmp_path / "a.json"
    for indent in (None, 0, 2):
        file.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
        lines = file.read_text(encoding="utf-8").splitlines()
        for block in (1, 7, 64, 1 << 20):
            monkeypatch.setattr("qwen_vla_core.data.json_source._BLOCK", block)
            found = list(stream_array(file))
            assert [row for _, row in found] == rows
            assert all("{" in lines[line - 1] for line, _ in found)
    file.write_text("[]")
    assert list(stream_array(file)) == []
    for text, problem in (
        ('[{"a": 1}\n {"b": 2}]', "no comma"),
        ('[\n{"a": 1},\n{"b"', "cut short"),
        ("{}", "an array"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=problem):
            list(stream_array(file))
    file.write_text("[1]")
    with pytest.raises(UserError, match="expected an object"):
        list(stream_array(file))
