"""Boxes for words: RefCOCO's references, MDETR's phrase files and COCO detection, answered as Qwen prints boxes.

Layouts, told apart by their keys:
- RefCOCO, RefCOCO+, RefCOCOg (github.com/lichengunc/refer, Apache-2.0 code; COCO pictures): an array of references
  ``{ref_id, ann_id, image_id, split, sentences: [{sent}]}`` and ``instances.json`` beside it. They are shipped as
  ``refs(unc).p``, a pickle, which is never read here: write it as JSON first.
- MDETR (github.com/ashkamath/mdetr, Apache-2.0): ``images`` with a ``caption`` each, ``annotations`` with
  ``tokens_positive`` spans of it. RefCOCO*, Flickr30k Entities and Visual Genome exist in it.
- COCO detection (cocodataset.org, annotations CC BY 4.0): ``images``, ``annotations``, ``categories``.

Prompts are Qwen's own wordings [X]. On disk boxes are in the backbone's convention (``boxes.py``).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_vla_core.data.boxes import Labelled, Size, print_boxes
from qwen_vla_core.data.json_source import Document, load
from qwen_vla_core.data.llava_writer import Draft, Picture, write_dataset
from qwen_vla_core.data.vl_options import add_arguments as add_shared
from qwen_vla_core.data.vl_options import option, picture_folder

REFER = "Locate {} in this image and output the bbox coordinates in JSON format."
PHRASES = 'Locate every object that is mentioned in "{}" and report bbox coordinates in JSON format.'
DETECT = "Locate every instance that belongs to the following categories: '{}'. Report bbox coordinates in JSON format."
SLACK = 1.0  # pixels by which annotators may leave the picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SRC is the annotation file."""
    add_shared(parser)
    parser.add_argument("--instances", type=Path, help="RefCOCO's boxes (default: instances.json beside SRC)")
    parser.add_argument("--split", help="only references of this split (RefCOCO: train, val, testA, …)")
    parser.add_argument("--max-objects", type=int, default=40, help="more in one answer are left out (default: 40)")


def convert(src: Path, out: Path, options: Any, workers: int | None = None, progress: bool = True) -> dict[str, Any]:
    """One conversation per reference or picture; see ``write_dataset`` for result and errors."""
    src = Path(src)
    document, root = load(src), picture_folder(options, src)
    most = option(options, "max_objects", 40)
    files = [src]
    if isinstance(document.value, list):
        files.append(Path(option(options, "instances", src.with_name("instances.json"))))
        drafts, layout = _references(document, load(files[1]), root, option(options, "split")), "RefCOCO"
    elif any("caption" in image for image in document.array("images")):
        drafts, layout = _phrases(document, root, most), "MDETR"
    else:
        drafts, layout = _detection(document, root, most), "COCO detection"
    source = {"name": "grounding", "annotations": src.name, "layout": layout, "licence": "see the corpus"}
    return write_dataset(
        Path(out), drafts, family="spatial_grounding", source=source, files=files, options=options, workers=workers,
        progress=progress,
    )  # fmt: skip


class _BadBox(ValueError):
    pass


def _corners(document: Document, entry: dict[str, Any], size: Size, *at: str | int) -> list[float]:
    """x1, y1, x2, y2 in pixels from COCO's x, y, width, height.

    Raises:
        UserError: not four numbers.
        _BadBox: thinner than a pixel, or outside the picture.
    """
    box = document.get(entry, list, "bbox", *at)
    if len(box) != 4 or not all(type(number) in (int, float) for number in box):
        document.fail(f"expected four numbers, got {box}", *at, "bbox")
    x, y, width, height = map(float, box)
    if not (width >= 1 and height >= 1):
        raise _BadBox(f"box {box} is thinner than a pixel")
    if x < -SLACK or y < -SLACK or x + width > size[0] + SLACK or y + height > size[1] + SLACK:
        raise _BadBox(f"box {box} leaves the {size[0]}×{size[1]} picture")
    return [max(x, 0.0), max(y, 0.0), min(x + width, size[0]), min(y + height, size[1])]


def _pictures(document: Document) -> dict[Any, tuple[int, str, Size]]:
    """id → (position, file name, size)."""
    found = {}
    for number, image in enumerate(document.array("images")):
        at = ("images", number)
        size = (document.get(image, int, "width", *at), document.get(image, int, "height", *at))
        key = document.get(image, (int, str), "id", *at)
        found[key] = number, document.get(image, str, "file_name", *at), size
    return found


def _by_picture(document: Document, pictures: dict[Any, Any]) -> dict[Any, list[tuple[int, dict[str, Any]]]]:
    grouped: dict[Any, list[tuple[int, dict[str, Any]]]] = {key: [] for key in pictures}
    for number, entry in enumerate(document.array("annotations")):
        key = document.get(entry, (int, str), "image_id", "annotations", number)
        if key not in grouped:
            document.fail(f"image_id {key} is not among 'images'", "annotations", number)
        grouped[key].append((number, entry))
    return grouped


def _references(refs: Document, instances: Document, root: Path, split: str | None) -> list[Draft]:
    pictures = _pictures(instances)
    boxes = {entry.get("id"): (number, entry) for number, entry in enumerate(instances.array("annotations"))}
    drafts = []
    for number, ref in enumerate(refs.value):
        if not isinstance(ref, dict):
            refs.fail("expected an object", number)
        if split is not None and ref.get("split") != split:
            continue
        annotation = refs.get(ref, (int, str), "ann_id", number)
        if annotation not in boxes:
            refs.fail(f"ann_id {annotation} is not in {instances.path.name}", number)
        at, entry = boxes[annotation]
        image = instances.get(entry, (int, str), "image_id", "annotations", at)
        if image not in pictures:
            instances.fail(f"image_id {image} is not among 'images'", "annotations", at)
        _, name, size = pictures[image]
        for order, sentence in enumerate(refs.get(ref, list, "sentences", number)):
            words = " ".join(str(sentence.get("sent", "") if isinstance(sentence, dict) else "").split())
            turns: tuple[tuple[str, str], ...] = ()
            problem = "" if words else "its sentence is empty"
            try:
                box = _corners(instances, entry, size, "annotations", at)
                turns = ((REFER.format(words), print_boxes([(box, words)])),)
            except _BadBox as error:
                problem = problem or str(error)
            drafts.append(
                Draft(
                    id=f"ref-{ref.get('ref_id', number)}-{order}",
                    pictures=(Picture(str(root / name), name),),
                    turns=turns,
                    where=refs.where(number),
                    task="refer",
                    problem=problem,
                    size=size,
                )
            )
    return drafts


def _phrases(document: Document, root: Path, most: int) -> list[Draft]:
    pictures = _pictures(document)
    drafts = []
    for image, entries in _by_picture(document, pictures).items():
        number, name, size = pictures[image]
        caption = document.get(document.value["images"][number], str, "caption", "images", number)
        objects: list[Labelled] = []
        problem = "" if entries else "no phrase has a box"
        for at, entry in entries:
            spans = document.get(entry, list, "tokens_positive", "annotations", at)
            try:
                label = " ".join(caption[int(start) : int(end)].strip() for start, end in spans)
            except (TypeError, ValueError):
                document.fail("expected [[start, end], …]", "annotations", at, "tokens_positive")
            try:
                objects.append((_corners(document, entry, size, "annotations", at), label))
            except _BadBox as error:
                problem = problem or str(error)
            if not label:
                problem = problem or "a span of the caption is empty"
        one = len(objects) == 1
        question = REFER.format(caption.strip().rstrip(".")) if one else PHRASES.format(caption.strip())
        if one:
            objects = [(objects[0][0], caption.strip())]
        drafts.append(
            _draft(document, f"phrases-{image}", number, (root, name, size), question, objects, most, problem)
        )
    return drafts


def _detection(document: Document, root: Path, most: int) -> list[Draft]:
    categories = {entry.get("id"): str(entry.get("name")) for entry in document.array("categories")}
    pictures = _pictures(document)
    drafts = []
    for image, entries in _by_picture(document, pictures).items():
        number, name, size = pictures[image]
        objects: list[Labelled] = []
        crowded, problem = set(), ""
        for at, entry in entries:
            category = document.get(entry, (int, str), "category_id", "annotations", at)
            if category not in categories:
                document.fail(f"category_id {category} is not among 'categories'", "annotations", at)
            label = categories[category]
            if entry.get("iscrowd"):
                crowded.add(label)  # a crowd is one box for many: "every instance" would be a lie
                continue
            try:
                objects.append((_corners(document, entry, size, "annotations", at), label))
            except _BadBox as error:
                problem = problem or str(error)
        objects = [item for item in objects if item[1] not in crowded]
        if not objects:
            problem = problem or ("only crowds" if crowded else "no object has a box")
        names = ", ".join(sorted({label for _, label in objects}))
        question = DETECT.format(names)
        where = (root, name, size)
        drafts.append(_draft(document, f"detect-{image}", number, where, question, objects, most, problem))
    return drafts


def _draft(
    document: Document,
    key: str,
    number: int,
    picture: tuple[Path, str, Size],
    question: str,
    objects: Sequence[Labelled],
    most: int,
    problem: str,
) -> Draft:
    root, name, size = picture
    if len(objects) > most:
        problem = problem or f"{len(objects)} objects are more than --max-objects {most}"
    ordered = sorted(objects, key=lambda item: (item[0][1], item[0][0]))  # as one reads [O]
    return Draft(
        id=key,
        pictures=(Picture(str(root / name), name),),
        turns=((question, print_boxes(ordered)),) if not problem else (),
        where=document.where("images", number),
        task="detect" if key.startswith("detect") else "phrases",
        problem=problem,
        size=size,
    )
