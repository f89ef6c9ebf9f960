"""Conversations about pictures: LLaVA-style JSON lines next to a picture folder.

One line is ``{"id", "image": str | [str], "conversations": [{"from": "human" | "gpt", "value": "<image>…"}]}``. A
picture that belongs to a camera stands between the camera's boundary tokens, as in the policy's prompt [P]; several
frames of it follow each other, oldest first: ``<|cam_front_start|><image><image><|cam_front_end|>``. Anything else in
a line (``task``, ``times``) is kept and ignored by readers that do not know it.
Conversion writes it and the reader checks it with the same function, so neither can produce what the other refuses.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vla_core.data.samples import Turns
from qwen_vla_core.embodiment.prompt import PLAIN

TAG = "<image>"
_VIEW = re.compile(r"<\|(\w+?)_start\|>((?:<image>)+)<\|(\w+?)_end\|>")
_TOKEN = re.compile(r"<\|[^<>|]*\|>")
# One marker of pictures in a text: a view with its frames, or a bare picture.
_MARKER = re.compile(rf"{_VIEW.pattern}|{TAG}")


@dataclass(frozen=True)
class Record:
    """One parsed line.

    Attributes:
        id: as written, or the line's number.
        images: picture files relative to the picture folder, in the order of their markers.
        views: per picture the name of its view; ``Picture 1``, ``Picture 2``, … for those without one.
        turns: (question, answer) pairs without markers; where a picture stood inside a sentence, its name does.
        task: what balanced sampling may tell apart, such as a question's category; may be empty.
        times: seconds per picture on one clock, in driving 0 is now; empty where unknown.
    """

    id: str
    images: tuple[str, ...]
    views: tuple[str, ...]
    turns: Turns
    task: str = ""
    times: tuple[float, ...] = ()


def parse_record(value: Any) -> Record:
    """Checks the content of a line.

    Raises:
        ValueError: what is wrong, in words.
    """
    if not isinstance(value, dict):
        raise ValueError("expected an object")
    images = value.get("image", value.get("images", []))
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise ValueError("'image' must be a file name or a list of them")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in images):
        raise ValueError("'image' must stay inside the picture folder: no absolute path and no '..'")
    talk = value.get("conversations")
    if not isinstance(talk, list) or not talk:
        raise ValueError("'conversations' must be a list of turns")
    if len(talk) % 2:
        raise ValueError(f"'conversations' has {len(talk)} turns: every question needs its answer")
    texts: list[str] = []
    for number, turn in enumerate(talk):
        speaker = ("human", "gpt")[number % 2]
        if not isinstance(turn, dict) or turn.get("from") != speaker:
            raise ValueError(f"turn {number + 1} must be from {speaker!r}: human and gpt take turns, human begins")
        if not isinstance(turn.get("value"), str):
            raise ValueError(f"turn {number + 1}: 'value' must be text")
        texts.append(turn["value"])
    for number, text in enumerate(texts):
        if number % 2 and not text.strip():
            raise ValueError(f"turn {number + 1}: the answer is empty")
        if number % 2 and TAG in text:
            raise ValueError(f"turn {number + 1}: an answer cannot hold {TAG}")
        reserved = _TOKEN.search(_VIEW.sub("", text))
        if reserved:
            raise ValueError(
                f"turn {number + 1}: {reserved[0]} is a token of the model; only <|VIEW_start|> and <|VIEW_end|> "
                f"around {TAG} may stand in a text"
            )
    tags = sum(text.count(TAG) for text in texts)
    if tags != len(images):
        raise ValueError(f"{tags} {TAG} tags for {len(images)} pictures")
    times = value.get("times", [])
    if not isinstance(times, list) or not all(type(t) in (int, float) for t in times):
        raise ValueError("'times' must be a list of seconds")
    if times and len(times) != len(images):
        raise ValueError(f"{len(times)} times for {len(images)} pictures")
    views, turns = _views_and_turns(texts)
    for number, (question, _) in enumerate(turns):
        if not question:
            raise ValueError(f"turn {2 * number + 1}: the question is empty")
    return Record(
        str(value.get("id", "")), tuple(images), views, turns, str(value.get("task") or ""), tuple(map(float, times))
    )


def _views_and_turns(texts: Sequence[str]) -> tuple[tuple[str, ...], Turns]:
    """Names every picture and takes the markers out of the texts."""
    views: list[str] = []
    plain = 0

    def name(match: re.Match[str]) -> str:
        nonlocal plain
        if match[1] is not None:
            if match[1] != match[3]:
                raise ValueError(f"<|{match[1]}_start|> is closed by <|{match[3]}_end|>")
            if match[1] in views:
                raise ValueError(f"view {match[1]!r} comes twice; put its frames between one pair of tokens")
            views.extend([match[1]] * match[2].count(TAG))
            return match[1]
        plain += 1
        views.append(f"{PLAIN} {plain}")
        return views[-1]

    out: list[str] = []
    for text in texts:
        # Markers at either end of a question are the usual LLaVA way; only one inside a sentence means something.
        named, pieces, last = [], [], 0
        for match in _MARKER.finditer(text):
            pieces.append(text[last : match.start()])
            named.append(name(match))
            last = match.end()
        pieces.append(text[last:])
        while named and not pieces[0].strip():
            pieces.pop(0)
            named.pop(0)
        while named and not pieces[-1].strip():
            pieces.pop()
            named.pop()
        words = pieces[0] + "".join(name + piece for name, piece in zip(named, pieces[1:], strict=True))
        out.append(words.strip())
    return tuple(views), tuple(zip(out[::2], out[1::2], strict=True))
