"""JSON of a known shape out of any language model: only tokens that keep the shape may be drawn.

A caption's JSON has a fixed skeleton; only the phrases are the model's. So a shape is a row of pieces: text that is
forced, a phrase up to its closing quote, a choice, and a list that may go on. What comes out always parses; whether it
makes sense is checked afterwards. Small models fail at braces far more often than at phrases, so this saves retries.

Forced text is cut into tokens as the model itself would write it: literals are long, and a token that ends a phrase and
begins what follows (``.",``) is allowed. Other tokens than the usual ones confuse a model: with the bare quote as the
only closing, a tiny one that knew its answer by heart lost the thread there [O].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from qwen_vla_core.data.captions.script import DIMENSIONS, MAX_STEPS, clock


@dataclass(frozen=True)
class Literal:
    """Text that must come next; after a phrase it begins with the closing quote."""

    text: str


@dataclass(frozen=True)
class Phrase:
    """The model's own words, at least one token and at most ``tokens``."""

    tokens: int


@dataclass(frozen=True)
class Choice:
    """One of several texts, none of which begins another."""

    options: tuple[str, ...]


@dataclass(frozen=True)
class More:
    """Either ``end``, or ``again`` and ``item`` and the same question once more, at most ``left`` times."""

    end: str
    again: str
    item: tuple[Piece, ...]
    left: int


Piece = Literal | Phrase | Choice | More
_Way = tuple[str, tuple[Piece, ...]]  # a text, and the pieces that it adds in front of the row


def sketch_guide(times: Sequence[float], phrase_tokens: int) -> tuple[Piece, ...]:
    """The shape of ``script.sketch_schema``."""
    moments = Choice(tuple(dict.fromkeys(map(clock, times))))
    step: tuple[Piece, ...] = (
        moments,
        Literal(', "end": '),
        moments,
        Literal(', "action": "'),
        Phrase(phrase_tokens),
    )
    begin = '{"start": '
    more = More('"}]}', f'"}}, {begin}', step, MAX_STEPS - 1)
    return (Literal('{"summary": "'), Phrase(2 * phrase_tokens), Literal(f'", "steps": [{begin}'), *step, more)


def script_guide(times: Sequence[float], phrase_tokens: int) -> tuple[Piece, ...]:
    """The shape of ``script.script_schema``."""
    pieces: list[Piece] = []
    before = '{"frames": ['
    for time in times:
        before += f'{{"time": {clock(time)}'
        for name in DIMENSIONS:
            pieces += [Literal(f'{before}, "{name}": "'), Phrase(phrase_tokens)]
            before = '"'
        before += "}, "
    return (*pieces, Literal('"}]}'))


def _ways(piece: Piece) -> tuple[_Way, ...]:
    """How a row can go on through a piece that is no phrase."""
    if isinstance(piece, Literal):
        return ((piece.text, ()),)
    if isinstance(piece, Choice):
        return tuple((option, ()) for option in piece.options)
    assert isinstance(piece, More)
    end: _Way = (piece.end, ())
    if not piece.left:
        return (end,)
    return (end, (piece.again, (*piece.item, More(piece.end, piece.again, piece.item, piece.left - 1))))


class Vocabulary:
    """Which tokens may stand inside a JSON string, and which may end one; made once per tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Decodes every token once."""
        self._tokenizer = tokenizer
        added = set(tokenizer.get_added_vocab().values())
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        inside = torch.zeros(len(texts), dtype=torch.bool)
        self._closers: list[tuple[int, str, str]] = []  # token, what it adds to the phrase, what it begins
        for token, text in enumerate(texts):
            lead, quote, tail = text.partition('"')
            if token in added or not text or any(sign == "\\" or ord(sign) < 32 for sign in lead):
                continue
            if quote:
                self._closers.append((token, lead, quote + tail))
            else:
                inside[token] = True
        self.inside = inside
        self._cached: dict[tuple[str, ...], dict[int, bool]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def closers(self, texts: tuple[str, ...]) -> dict[int, bool]:
        """Tokens that end a phrase and begin one of ``texts`` → whether they add words to the phrase."""
        if texts not in self._cached:
            fitting = ((t, lead) for t, lead, tail in self._closers if any(text.startswith(tail) for text in texts))
            self._cached[texts] = {token: bool(lead.strip()) for token, lead in fitting}
        return self._cached[texts]

    def begins(self, token: int) -> str:
        """What a closing token begins."""
        return next(tail for found, _, tail in self._closers if found == token)


class Guide:
    """Where one generation is in its shape."""

    def __init__(self, pieces: Sequence[Piece], vocabulary: Vocabulary, stop: Sequence[int]) -> None:
        """Begins at the first piece; ``stop`` ids may come only at the end."""
        self._vocabulary, self._stop = vocabulary, list(stop)
        self._pieces = list(pieces)
        self._enter()

    def _enter(self) -> None:
        """Goes into the next piece: fixed ways to go on, or a phrase with so many tokens left."""
        self._fixed: list[tuple[list[int], tuple[Piece, ...]]] = []
        self._left, self._begun = -1, False
        if not self._pieces:
            return
        piece = self._pieces.pop(0)
        if isinstance(piece, Phrase):
            self._left = piece.tokens
        else:
            self._take(_ways(piece))

    def _take(self, ways: Sequence[_Way]) -> None:
        """Goes on by one of several texts; an empty one has arrived."""
        arrived = [more for text, more in ways if not text]
        if arrived:
            self._pieces[:0] = arrived[0]
            self._enter()
        else:
            self._left = -1
            self._fixed = [(self._vocabulary.encode(text), more) for text, more in ways]

    def _closing(self) -> dict[int, bool]:
        closers = self._vocabulary.closers(tuple(text for text, _ in _ways(self._pieces[0])))
        return closers if self._begun else {token: adds for token, adds in closers.items() if adds}

    def allowed(self) -> torch.Tensor:
        """(vocabulary,) bool of what may come next."""
        if self._left < 0:
            mask = torch.zeros_like(self._vocabulary.inside)
            mask[[ids[0] for ids, _ in self._fixed] or self._stop] = True
            return mask
        mask = self._vocabulary.inside.clone() if self._left else torch.zeros_like(self._vocabulary.inside)
        mask[list(self._closing())] = True
        return mask

    def advance(self, token: int) -> None:
        """Takes the token that was drawn, one of the allowed."""
        if self._left >= 0:
            if token in self._closing():
                begun = self._vocabulary.begins(token)
                ways = _ways(self._pieces.pop(0))
                self._take([(text[len(begun) :], more) for text, more in ways if text.startswith(begun)])
            else:
                self._left, self._begun = self._left - 1, True
            return
        self._fixed = [(ids[1:], more) for ids, more in self._fixed if ids[0] == token]
        arrived = [more for ids, more in self._fixed if not ids]
        if arrived:
            self._pieces[:0] = arrived[0]
            self._enter()


def longest(pieces: Sequence[Piece], vocabulary: Vocabulary) -> int:
    """Upper bound of the tokens of a shape, its end token included."""
    total = 1
    for piece in pieces:
        if isinstance(piece, Phrase):
            total += piece.tokens
        elif isinstance(piece, More):
            again = Literal(piece.again)
            total += longest((Literal(piece.end),), vocabulary)
            total += piece.left * longest((again, *piece.item), vocabulary)
        else:  # a closing token may leave an unusual rest
            total += max(len(vocabulary.encode(text)) for text, _ in _ways(piece)) + 4
    return total


class GuidedLogits(LogitsProcessor):
    """Masks the scores of one generated row by its guide."""

    def __init__(self, guide: Guide, prompt_length: int) -> None:
        """``prompt_length`` tokens come before the guide's first."""
        self._guide, self._seen = guide, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(1, L) ids so far, (1, vocabulary) scores → scores with -inf where a token would break the shape."""
        for token in input_ids[0, self._seen :].tolist():
            self._guide.advance(token)
        self._seen = input_ids.shape[1]
        allowed = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
        mask = self._guide.allowed().to(scores.device)[: scores.shape[1]]
        allowed[: len(mask)] = mask  # embedding tables are longer than the tokenizer
        return scores.masked_fill(~allowed, -torch.inf)
