"""What all converters of vision-language corpora are told on the command line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from qwen_vla_core.data.boxes import ABSOLUTE, CONVENTIONS, Coordinates
from qwen_vla_core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that all vision-language converters share."""
    parser.add_argument("--images", type=Path, help="picture folder of the corpus (default: beside the annotations)")
    parser.add_argument("--limit", type=int, help="only the first so many conversations")
    parser.add_argument(
        "--backbone",
        default="qwen3_5",
        choices=sorted(CONVENTIONS),
        help="class whose box convention the text uses (default: qwen3_5; readers re-express it for another)",
    )
    parser.add_argument("--processor", type=Path, help="model folder with preprocessor_config.json; for qwen2_5_vl")
    parser.add_argument(
        "--pictures", choices=("link", "copy"), default="link", help="hard-link pictures, or copy them (default: link)"
    )


def option(options: Any, name: str, default: Any = None) -> Any:
    """An option that a caller from Python may have left out."""
    value = getattr(options, name, None)
    return default if value is None else value


def picture_folder(options: Any, annotations: Path) -> Path:
    """``--images``, or the folder of the annotation file.

    Raises:
        UserError: there is no such folder.
    """
    folder = Path(option(options, "images", annotations if annotations.is_dir() else annotations.parent))
    if not folder.is_dir():
        raise UserError(f"--images {folder}: no such folder")
    return folder


def described_coordinates(options: Any) -> dict[str, Any]:
    """In which convention the text will be, as the sidecar says it (``llava.coordinates_of`` reads it).

    Raises:
        UserError: the convention needs a processor's limits and none is given, or it cannot be read.
    """
    model_type, processor = str(option(options, "backbone", "qwen3_5")), option(options, "processor")
    if CONVENTIONS.get(model_type) != ABSOLUTE:
        return {"convention": Coordinates.of(model_type).convention}
    if processor is None:
        raise UserError(
            f"--backbone {model_type} counts pixels of the resized picture: name the model's folder with --processor, "
            "or leave --backbone out and let the reader re-express the boxes"
        )
    from qwen_vla_core.model.processor import IMAGE_FILE, ImageConfig

    file = Path(processor) / IMAGE_FILE
    try:
        image = ImageConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"--processor {processor}: cannot read {IMAGE_FILE} ({error})") from None
    return {"convention": ABSOLUTE, "image": image.to_dict()}
