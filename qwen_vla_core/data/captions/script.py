"""What the two passes ask for, and what counts as an answer: prompts, JSON schemas, checks.

The paper writes captions in two passes, a coarse action sketch and then a script frame by frame over 13 dimensions [P];
it does not print the dimensions. Those below are ours [O]: what a policy must tell apart in a frame, from the room to
the fingers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

DIMENSIONS: dict[str, str] = {
    "scene": "the place, its surfaces and its light",
    "camera": "the viewpoint, and whether it moves",
    "objects": "the visible objects that matter, with colour and shape",
    "layout": "where they are relative to each other and to the camera",
    "agent": "who acts: a person, a hand, a robot arm, or nobody",
    "pose": "how arms and body are held, and where",
    "hand": "how open the hand or gripper is, and its grasp",
    "contact": "what touches or holds what",
    "action": "what is being done at this moment, as a verb phrase",
    "motion": "which way and how fast the moving part moves",
    "state": "states of objects: open, closed, full, empty, on, off",
    "change": "what is different from the frame before",
    "intent": "what this serves, and what comes next",
}
MAX_STEPS = 12
_WORD = re.compile(r"\w+")

_TEXT = {"type": "string", "minLength": 1, "pattern": r"\S"}


class BadAnswer(ValueError):
    """A generation that cannot be used; the message says why."""


def clock(time: float) -> str:
    """A time as prompts and answers write it; one decimal, so that no time is the beginning of another."""
    return f"{time:.1f}"


def sketch_schema(times: Sequence[float]) -> dict[str, Any]:
    """Schema of the first pass over frames at ``times``."""
    moment = {"enum": [float(clock(time)) for time in times]}
    step = {"start": moment, "end": moment, "action": _TEXT}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "summary": _TEXT,
            "steps": {
                "type": "array",
                "minItems": 1,
                "maxItems": MAX_STEPS,
                "items": {"type": "object", "properties": step, "required": list(step), "additionalProperties": False},
            },
        },
        "required": ["summary", "steps"],
        "additionalProperties": False,
    }


def script_schema(times: Sequence[float]) -> dict[str, Any]:
    """Schema of the second pass: exactly one entry per frame, in order, with all dimensions."""
    frames = [
        {
            "type": "object",
            "properties": {"time": {"const": float(clock(time))}, **dict.fromkeys(DIMENSIONS, _TEXT)},
            "required": ["time", *DIMENSIONS],
            "additionalProperties": False,
        }
        for time in times
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "frames": {"type": "array", "prefixItems": frames, "minItems": len(frames), "maxItems": len(frames)}
        },
        "required": ["frames"],
        "additionalProperties": False,
    }


def sketch_question(times: Sequence[float], task: str = "") -> str:
    """The first pass; the frames stand before it, each after its time."""
    return (
        f"These are {len(times)} frames of a video, each after its time in seconds.{_about(task)} Sketch the action "
        'coarsely as JSON: {"summary": one sentence, "steps": [{"start": seconds, "end": seconds, "action": verb '
        "phrase}, …]}. Steps follow each other; start and end are times of frames. Answer with the JSON alone."
    )


def script_question(times: Sequence[float], sketch: dict[str, Any], task: str = "") -> str:
    """The second pass over one window of frames, with the sketch of the whole video."""
    dimensions = "; ".join(f"{name}: {meaning}" for name, meaning in DIMENSIONS.items())
    return (
        f"These are {len(times)} frames of a video, each after its time in seconds.{_about(task)} The whole video in "
        f"short: {json.dumps(sketch, ensure_ascii=False)}. Write a script of exactly these frames as JSON: "
        f'{{"frames": [{{"time": seconds, {", ".join(json.dumps(name) + ": phrase" for name in DIMENSIONS)}}}, …]}}. '
        f"The dimensions are {dimensions}. Say only what is visible in a frame. The times are "
        f"{', '.join(map(clock, times))}. Answer with the JSON alone."
    )


def _about(task: str) -> str:
    return f" It is recorded as: {task}." if task else ""


def parse(text: str) -> Any:
    """The JSON in a generation; a fence, a finished train of thought and white space around it are forgiven.

    Raises:
        BadAnswer: there is none.
    """
    text = text.rsplit("</think>", 1)[-1].strip()
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
    try:
        return json.loads(fenced[1] if fenced else text)
    except ValueError as error:
        raise BadAnswer(f"not JSON ({error})") from None


def check(value: Any, schema: dict[str, Any]) -> dict[str, Any]:
    """An answer that fits its schema and makes formal sense.

    Raises:
        BadAnswer: the first thing that is wrong, with its place.
    """
    import jsonschema

    errors = sorted(jsonschema.Draft202012Validator(schema).iter_errors(value), key=lambda error: list(error.path))
    if errors:
        first = errors[0]
        where = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in first.path).lstrip(".")
        wanted = json.dumps(first.validator_value, ensure_ascii=False)[:60]
        raise BadAnswer(f"does not fit the schema at {where or 'the top'}: {first.validator} {wanted}")
    previous = 0.0
    for number, step in enumerate(value.get("steps", [])):
        if step["end"] < step["start"] or step["start"] < previous:
            raise BadAnswer(f"steps[{number}] goes back in time")
        previous = step["start"]
    for where, text in _texts(value):
        if "\ufffd" in text:
            raise BadAnswer(f"{where} holds broken characters")
        words = _WORD.findall(text.lower())
        if len(words) >= 8 and len(set(words)) < 0.3 * len(words):
            raise BadAnswer(f"{where} repeats itself: {text[:60]!r}")
        if not words:
            raise BadAnswer(f"{where} has no word: {text[:60]!r}")
    fitting: dict[str, Any] = value
    return fitting


def _texts(value: Any, where: str = "") -> list[tuple[str, str]]:
    """(place, text) of every text in an answer."""
    if isinstance(value, str):
        return [(where, value)]
    if isinstance(value, dict):
        return [found for key, inner in value.items() for found in _texts(inner, f"{where}.{key}".lstrip("."))]
    if isinstance(value, list):
        return [found for number, inner in enumerate(value) for found in _texts(inner, f"{where}[{number}]")]
    return []
