"""JSON of a known shape out of any language model: only tokens that keep the shape may be drawn.

A caption's JSON has a fixed skeleton; only the phrases are the model's. So a guide is a row of pieces: text that is
forced, a phrase up to its closing quote, a choice, and a list that may go on. What comes out always parses; whether it
makes sense is checked afterwards. Small models fail at braces far more often than at phrases, so this saves most
retries [O].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from qwen_vla_core.data.captions.script import DIMENSIONS, MAX_STEPS, clock


@dataclass(frozen=True)
class Literal:
    """Text that must come next."""

    text: str


@dataclass(frozen=True)
class Phrase:
    """The model's own words, up to ``tokens`` of them; its closing quote begins the literal that follows."""

    tokens: int


@dataclass(frozen=True)
class Choice:
    """One of several texts, none of which begins another."""

    options: tuple[str, ...]


@dataclass(frozen=True)
class More:
    """Either the end of a list or another item, at most ``left`` more."""

    item: tuple[Piece, ...]
    separator: str
    end: str
    left: int


Piece = Literal | Phrase | Choice | More


def sketch_guide(times: Sequence[float], phrase_tokens: int) -> tuple[Piece, ...]:
    """The shape of ``script.sketch_schema``."""
    moments = Choice(tuple(dict.fromkeys(map(clock, times))))
    item: tuple[Piece, ...] = (
        Literal('{"start": '),
        moments,
        Literal(', "end": '),
        moments,
        Literal(', "action": "'),
        Phrase(phrase_tokens),
        Literal('"}'),
    )
    steps: tuple[Piece, ...] = (*item, More(item, ", ", "]}", MAX_STEPS - 1))
    return (Literal('{"summary": "'), Phrase(2 * phrase_tokens), Literal('", "steps": ['), *steps)


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


class Vocabulary:
    """Which tokens may stand inside a JSON string; made once per tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Decodes every token once."""
        self.tokenizer = tokenizer
        added = set(tokenizer.get_added_vocab().values())
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        self.inside = torch.tensor(
            [
                token not in added and bool(text) and not any(sign in '"\\' or ord(sign) < 32 for sign in text)
                for token, text in enumerate(texts)
            ]
        )
        self.quotes = {text: token for token, text in enumerate(texts) if text.startswith('"') and token not in added}

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))


class Guide:
    """Where one generation is in its shape."""

    def __init__(self, pieces: Sequence[Piece], vocabulary: Vocabulary, stop: Sequence[int]) -> None:
        """Begins at the first piece; ``stop`` ids may come only at the end."""
        self._vocabulary, self._stop = vocabulary, list(stop)
        self._pieces = list(pieces)
        self._enter()

    def _enter(self) -> None:
        """Goes into the next piece: either fixed ways to go on, each with what it adds to the row, or a phrase."""
        self._fixed: list[tuple[list[int], tuple[Piece, ...]]] = []
        self._left, self._begun = -1, False
        if not self._pieces:
            return
        piece, encode = self._pieces.pop(0), self._vocabulary.encode
        if isinstance(piece, Phrase):
            self._left = piece.tokens
        elif isinstance(piece, More):
            self._fixed = [(encode(piece.end), ())]
            if piece.left:
                again = More(piece.item, piece.separator, piece.end, piece.left - 1)
                self._fixed.append((encode(piece.separator), (*piece.item, again)))
        else:
            texts = (piece.text,) if isinstance(piece, Literal) else piece.options
            self._fixed = [(encode(text), ()) for text in texts]

    def _closers(self) -> dict[int, str]:
        """Tokens that close the phrase and agree with the literal after it → what they leave of that literal.

        Not the bare quote alone: Qwen has tokens such as ``",``, and a model writes best in its own tokens.
        """
        following = self._pieces[0]
        if not self._begun or not isinstance(following, Literal):
            return {}
        quotes = self._vocabulary.quotes.items()
        return {token: following.text[len(text) :] for text, token in quotes if following.text.startswith(text)}

    def allowed(self) -> torch.Tensor:
        """(vocabulary,) bool of what may come next."""
        mask = torch.zeros_like(self._vocabulary.inside)
        if self._left < 0:
            mask[[ids[0] for ids, _ in self._fixed] or self._stop] = True
            return mask
        if self._left:
            mask |= self._vocabulary.inside
        mask[list(self._closers())] = True
        return mask

    def advance(self, token: int) -> None:
        """Takes the token that was drawn, one of the allowed."""
        if self._left < 0:
            ways = [(ids[1:], more) for ids, more in self._fixed if ids[0] == token]
            finished = [more for ids, more in ways if not ids]
            self._fixed = ways
            if finished:
                self._pieces[:0] = finished[0]
                self._enter()
            return
        rest = self._closers().get(token)
        if rest is None:
            self._left, self._begun = self._left - 1, True
            return
        self._pieces[:1] = [Literal(rest)] if rest else []
        self._enter()


def longest(pieces: Sequence[Piece], vocabulary: Vocabulary) -> int:
    """Upper bound of the tokens of a shape, its end token included."""
    total = 1
    for piece in pieces:
        if isinstance(piece, Phrase):
            total += piece.tokens + 1
        elif isinstance(piece, Literal):
            total += len(vocabulary.encode(piece.text))
        elif isinstance(piece, Choice):
            total += max(len(vocabulary.encode(option)) for option in piece.options)
        else:
            item = longest(piece.item, vocabulary) + len(vocabulary.encode(piece.separator))
            total += piece.left * item + len(vocabulary.encode(piece.end))
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
