"""General conversations in the LLaVA layout: a JSON array or JSON lines, next to a picture folder.

Source: LLaVA-Instruct, LLaVA-1.5's mix665k, LLaVA-NeXT, ShareGPT4V, Cambrian, ALLaVA and most later mixtures. The
licence is that of each corpus and of its pictures; LLaVA-Instruct-150K is CC BY 4.0 with text from GPT-4.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from qwen_vla_core.data.boxes import PIXELS, RELATIVE
from qwen_vla_core.data.contract import TEXT_FAMILIES
from qwen_vla_core.data.json_source import load
from qwen_vla_core.data.llava import LlavaDataset
from qwen_vla_core.data.llava_format import parse_record
from qwen_vla_core.data.llava_writer import Draft, Picture, write_dataset
from qwen_vla_core.data.vl_options import add_arguments as add_shared
from qwen_vla_core.data.vl_options import option, picture_folder

# [0.12, 0.3, 0.45, 0.8]: LLaVA-1.5 writes boxes as shares of the padded square, which no Qwen class was trained on.
_UNIT_BOX = re.compile(r"\[\s*(?:[01]?\.\d+|[01])(?:\s*,\s*(?:[01]?\.\d+|[01])){3}\s*\]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SRC is the annotation file (.json or .jsonl)."""
    add_shared(parser)
    parser.add_argument(
        "--family", default="general_vl", choices=sorted(TEXT_FAMILIES), help="of the mixture (default: general_vl)"
    )
    parser.add_argument(
        "--boxes",
        default=RELATIVE,
        choices=(RELATIVE, PIXELS),
        help=f"in what the file's bbox_2d and point_2d are (default: {RELATIVE})",
    )
    parser.add_argument(
        "--unit-boxes",
        default="drop",
        choices=("drop", "keep"),
        help="conversations with boxes as [0.1, 0.2, 0.3, 0.4]: leave them out, listed, or keep them (default: drop)",
    )


def convert(src: Path, out: Path, options: Any, workers: int | None = None, progress: bool = True) -> dict[str, Any]:
    """Writes a LLaVA file as a checked dataset; see ``write_dataset`` for result and errors."""
    src = Path(src)
    root = picture_folder(options, src)
    drop_units = option(options, "unit_boxes", "drop") == "drop"
    written = option(options, "boxes", RELATIVE)
    drafts: list[Draft] = []
    for where, value in _entries(src):
        try:
            record = parse_record(value)
        except ValueError as error:
            name = str(value.get("id", "")) if isinstance(value, dict) else ""
            drafts.append(Draft(name, (), (), where, problem=str(error)))
            continue
        talk = [turn["value"] for turn in value["conversations"]]
        problem = ""
        if drop_units and any(_UNIT_BOX.search(text) for text in talk):
            problem = "boxes as shares of a padded square; take the corpus they come from, or --unit-boxes keep"
        pictures = tuple(
            Picture(str(root / name), name, time=record.times[number] if record.times else None)
            for number, name in enumerate(record.images)
        )
        turns = tuple(zip(talk[::2], talk[1::2], strict=True))
        drafts.append(
            Draft(record.id or where.rsplit(":", 1)[-1], pictures, turns, where, record.task, True, problem, written)
        )
    source = {"name": "llava", "annotations": src.name, "layout": "LLaVA conversations"}
    return write_dataset(
        Path(out), drafts, family=option(options, "family", "general_vl"), source=source, files=[src], options=options,
        workers=workers, progress=progress,
    )  # fmt: skip


def _entries(src: Path) -> list[tuple[str, Any]]:
    """(where, JSON value) of every conversation."""
    if src.suffix == ".jsonl":
        lines = LlavaDataset.open(src)
        return [(f"{src}:{index + 1}", lines.raw(index)) for index in range(len(lines))]
    document = load(src)
    if not isinstance(document.value, list):
        document.fail("expected an array of conversations")
    return [(document.where(index), value) for index, value in enumerate(document.value)]
