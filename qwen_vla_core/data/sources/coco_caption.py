"""Captions in the COCO layout: ``{"images": [{id, file_name, …}], "annotations": [{id, image_id, caption}]}``.

Source: COCO 2014/2017 captions (cocodataset.org); annotations CC BY 4.0, pictures under their Flickr terms. Also used
by NoCaps and by many corpora that were written in this layout.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qwen_vla_core.data.json_source import load
from qwen_vla_core.data.llava_writer import Draft, Picture, write_dataset
from qwen_vla_core.data.vl_options import add_arguments as add_shared
from qwen_vla_core.data.vl_options import picture_folder

# Drawn by the annotation's number, so that the same caption is always asked for in the same words [O].
WORDINGS = (
    "Describe this image in one sentence.",
    "What does this image show? Answer in one sentence.",
    "Write a short caption for this image.",
    "Summarise the image in one sentence.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SRC is ``captions_*.json``."""
    add_shared(parser)


def convert(src: Path, out: Path, options: Any, workers: int | None = None, progress: bool = True) -> dict[str, Any]:
    """One conversation per caption; see ``write_dataset`` for result and errors."""
    src = Path(src)
    document, root = load(src), picture_folder(options, src)
    names: dict[Any, str] = {}
    for number, image in enumerate(document.array("images")):
        key = document.get(image, (int, str), "id", "images", number)
        names[key] = document.get(image, str, "file_name", "images", number)
    drafts = []
    for number, entry in enumerate(document.array("annotations")):
        at = ("annotations", number)
        image, caption = (
            document.get(entry, (int, str), "image_id", *at),
            document.get(entry, str, "caption", *at),
        )
        if image not in names:
            document.fail(f"image_id {image} is not among 'images'", *at)
        drafts.append(
            Draft(
                id=f"coco-caption-{entry.get('id', number)}",
                pictures=(Picture(str(root / names[image]), names[image]),),
                turns=((WORDINGS[number % len(WORDINGS)], " ".join(caption.split())),),
                where=document.where(*at),
                task="caption",
            )
        )
    source = {
        "name": "coco_caption",
        "annotations": src.name,
        "licence": "captions CC BY 4.0; pictures: Flickr terms",
    }
    return write_dataset(
        Path(out), drafts, family="general_vl", source=source, files=[src], options=options, workers=workers,
        progress=progress,
    )  # fmt: skip
