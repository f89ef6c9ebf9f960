"""Boxes and points as each Qwen VL class writes them, and the way back.

Qwen2.5-VL was trained on pixels of the picture *after* its processor resized it; Qwen2-VL, Qwen3-VL and Qwen3.5 on
thousandths of its width and height [X: Qwen's own fine-tuning tools and maintainers]. Training a backbone on the other
convention teaches it to miss, so a corpus says in which one its text is, and is re-expressed when it is read.

All classes print boxes the same way: a fenced JSON list of ``{"bbox_2d": [x1, y1, x2, y2], "label": "…"}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qwen_vla_core.errors import UserError

Size = tuple[int, int]  # width, height
Resize = Callable[[int, int], tuple[int, int]]  # (height, width) → (height, width), as ``ImageConfig.target_size``
Labelled = tuple[Sequence[float], str]

PIXELS = "pixels"  # of the picture as it lies on disk; what corpora are annotated in
RELATIVE = "relative_1000"
ABSOLUTE = "absolute"  # pixels of the resized picture

# model_type in the configuration → convention [X]
CONVENTIONS: dict[str, str] = {
    "qwen2_vl": RELATIVE,
    "qwen2_5_vl": ABSOLUTE,
    "qwen3_vl": RELATIVE,
    "qwen3_vl_moe": RELATIVE,
    "qwen3_5": RELATIVE,
    "qwen3_5_moe": RELATIVE,
}

_NUMBER = r"-?\d+(?:\.\d+)?"
# What Qwen prints, for boxes and for points.
_JSON = re.compile(r'"(bbox_2d|point_2d)"\s*:\s*\[([^\[\]{}]*)\]')
# DriveLM's objects, <c1,CAM_FRONT,1043.2,82.2>, and its lists of traffic elements in the front view.
_TAG = re.compile(rf"<(c\d+),(CAM_[A-Z_]+),({_NUMBER}),({_NUMBER})>")
_TUPLE = re.compile(rf"\(([^(),]+), ([^(),]+), ({_NUMBER}), ({_NUMBER}), ({_NUMBER}), ({_NUMBER})\)")
_FRONT = "cam_front"


@dataclass(frozen=True)
class Coordinates:
    """One way of writing places in a picture.

    Attributes:
        convention: ``PIXELS``, ``RELATIVE`` or ``ABSOLUTE``.
        resize: what the processor does to a picture's (height, width); ``ABSOLUTE`` needs it.
    """

    convention: str = PIXELS
    resize: Resize | None = None

    def __post_init__(self) -> None:
        if self.convention not in (PIXELS, RELATIVE, ABSOLUTE):
            raise UserError(f"coordinates {self.convention!r}: use {PIXELS}, {RELATIVE} or {ABSOLUTE}")
        if self.convention == ABSOLUTE and self.resize is None:
            raise UserError(f"coordinates {ABSOLUTE!r} need the processor's picture limits; name the model's folder")

    @classmethod
    def of(cls, model_type: str, resize: Resize | None = None) -> Coordinates:
        """The convention that a backbone was trained on.

        Raises:
            UserError: no convention is known for the class.
        """
        if model_type not in CONVENTIONS:
            raise UserError(f"no box convention is known for {model_type!r}; use one of {', '.join(CONVENTIONS)}")
        return cls(CONVENTIONS[model_type], resize)

    def frame(self, size: Size) -> tuple[float, float]:
        """Width and height of a picture of ``size`` in units of this convention."""
        width, height = size
        if self.convention == RELATIVE:
            return 1000.0, 1000.0
        if self.convention == ABSOLUTE and self.resize is not None:
            new_height, new_width = self.resize(height, width)
            return float(new_width), float(new_height)
        return float(width), float(height)

    def encode(self, pixels: Sequence[float], size: Size) -> list[float]:
        """Pixels x, y, x, y, … of a picture → numbers of this convention.

        Whole numbers inside the picture, as Qwen's tools make them: 0…1000, or 0…side − 1 of the resized picture [X].
        ``decode`` undoes it to half a unit; the right and lower edge of ``ABSOLUTE`` to one.
        """
        if self.convention == PIXELS:
            return [round(float(value), 2) for value in pixels]
        frame, last = self.frame(size), 0 if self.convention == RELATIVE else 1
        return [
            max(0, min(round(value / size[axis % 2] * frame[axis % 2]), round(frame[axis % 2]) - last))
            for axis, value in enumerate(pixels)
        ]

    def decode(self, numbers: Sequence[float], size: Size) -> list[float]:
        """Numbers of this convention → pixels of a picture of ``size``."""
        frame = self.frame(size)
        return [value / frame[axis % 2] * size[axis % 2] for axis, value in enumerate(numbers)]


def print_boxes(objects: Sequence[Labelled]) -> str:
    """Objects as Qwen prints them [X]; numbers are written as given."""
    lines = [
        f'\t{{"bbox_2d": [{", ".join(f"{n:g}" if abs(n) < 1e6 else str(n) for n in box)}], '
        f'"label": {json.dumps(label, ensure_ascii=False)}}}'
        for box, label in objects
    ]
    return "```json\n[\n" + ",\n".join(lines) + "\n]\n```"


def parse_boxes(text: str) -> list[Labelled]:
    """What a model printed → objects.

    Raises:
        ValueError: no such list in the text.
    """
    fenced = re.search(r"```(?:json)?\s*(.*?)```", text, re.DOTALL)
    found = json.loads(fenced.group(1) if fenced else text)
    objects: list[Labelled] = []
    for item in found if isinstance(found, list) else [found]:
        box = item.get("bbox_2d") if isinstance(item, dict) else None
        if not (isinstance(box, list) and len(box) == 4 and all(type(n) in (int, float) for n in box)):
            raise ValueError(f"not a box: {json.dumps(item, ensure_ascii=False)[:80]}")
        objects.append(([float(n) for n in box], str(item.get("label", ""))))
    return objects


def re_express(text: str, sizes: Mapping[str, Size], source: Coordinates, target: Coordinates) -> str:
    """Rewrites every place in a text from one convention into another; the rest of the text stays as it is.

    Args:
        text: a question or an answer.
        sizes: view → size of its pictures. DriveLM's tags name their view; a JSON box belongs to the only picture, so
            all pictures must be of one size.
        source: in which the text is.
        target: in which it shall be.

    Raises:
        ValueError: a place belongs to a picture that is not shown, or it cannot be told to which.
    """
    if source.convention == target.convention and source.convention != ABSOLUTE:
        return text

    def change(numbers: Sequence[str], size: Size) -> list[str]:
        values = target.encode(source.decode([float(number) for number in numbers], size), size)
        return [f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value) for value in values]

    def json_place(match: re.Match[str]) -> str:
        numbers = [number.strip() for number in match[2].split(",")]
        if len(numbers) != (4 if match[1] == "bbox_2d" else 2) or not all(re.fullmatch(_NUMBER, n) for n in numbers):
            raise ValueError(f"not a place: {match[0][:60]}")
        if len(set(sizes.values())) != 1:
            raise ValueError("a box beside pictures of several sizes, or of none")
        return f'"{match[1]}": [{", ".join(change(numbers, next(iter(sizes.values()))))}]'

    def tag(match: re.Match[str]) -> str:
        view = match[2].lower()
        if view not in sizes:
            raise ValueError(f"{match[0]} lies in a view that is not shown")
        return f"<{match[1]},{match[2]},{','.join(change(match.groups()[2:], sizes[view]))}>"

    def traffic(match: re.Match[str]) -> str:
        return f"({match[1]}, {match[2]}, {', '.join(change(match.groups()[2:], sizes[_FRONT]))})"

    text = _TAG.sub(tag, _JSON.sub(json_place, text))
    return _TUPLE.sub(traffic, text) if _FRONT in sizes else text
