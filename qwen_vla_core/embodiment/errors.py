"""The one error of this package: file, line, key, what is wrong and the fix, on a single line."""

from __future__ import annotations

from difflib import get_close_matches
from typing import NamedTuple

from qwen_vla_core.errors import UserError


class EmbodimentError(UserError):
    """A mistake in an embodiment YAML, formatted ``file:line: key.path: what is wrong; fix: …``.

    Attributes:
        source: file name as the user gave it.
        line: 1-based line, 0 when the file as a whole is wrong.
        key: dotted path such as ``actions[0].limits.lower[2]``; empty when no key is concerned.
        problem: what is wrong.
        fix: what to do about it.
    """

    def __init__(self, source: str, line: int, key: str, problem: str, fix: str) -> None:
        self.source, self.line, self.key, self.problem, self.fix = source, line, key, problem, fix
        place = f"{source}:{line}" if line else source
        text = f"{place}: {key}: {problem}; fix: {fix}" if key else f"{place}: {problem}; fix: {fix}"
        super().__init__(" ".join(text.split()))


class Problem(NamedTuple):
    """One broken rule, by key path; who knows the file adds its name and the line."""

    key: str
    problem: str
    fix: str


def did_you_mean(word: str, known: tuple[str, ...]) -> str:
    """The fix for a misspelt word: the nearest known one, or all of them."""
    close = get_close_matches(word, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"use one of: {', '.join(known)}"


def shown(value: object) -> str:
    """``repr`` short enough for one line of an error."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
