"""Any Qwen VL as a captioner: a clip in, a checked sketch and script out, or the reason why not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, LogitsProcessorList

from qwen_vla_core.data.captions.guided import (
    Guide,
    GuidedLogits,
    Piece,
    Vocabulary,
    longest,
    script_guide,
    sketch_guide,
)
from qwen_vla_core.data.captions.script import (
    BadAnswer,
    check,
    clock,
    parse,
    script_question,
    script_schema,
    sketch_question,
    sketch_schema,
)
from qwen_vla_core.data.captions.video import Clip, thin, windows
from qwen_vla_core.errors import UserError
from qwen_vla_core.model.backbone import _quiet_transformers as quiet_transformers
from qwen_vla_core.model.processor import Processor

_SHOWN = 400  # characters of a bad generation that the failure list keeps


@dataclass(frozen=True)
class Settings:
    """How videos are captioned; part of what a folder of captions must agree on.

    Attributes:
        sketch_frames: at most so many frames in the first pass.
        window: frames per generation of the second pass.
        retries: further attempts after a bad generation, each with another seed.
        temperature: of those attempts; the first one is greedy.
        top_p: of those attempts.
        seed: of all of them, with the video's name.
        guided: only tokens that keep the JSON's shape are drawn; otherwise the model is on its own.
        phrase_tokens: most tokens of one phrase.
    """

    sketch_frames: int = 16
    window: int = 8
    retries: int = 3
    temperature: float = 0.7
    top_p: float = 0.8
    seed: int = 0
    guided: bool = True
    phrase_tokens: int = 32


@dataclass(frozen=True)
class Attempt:
    """One generation that could not be used."""

    number: int
    seed: int
    reason: str
    text: str


class CaptionFailure(Exception):
    """A video whose generations were all bad.

    Attributes:
        stage: which question failed.
        attempts: every generation of it.
    """

    def __init__(self, stage: str, attempts: Sequence[Attempt]) -> None:
        self.stage, self.attempts = stage, tuple(attempts)
        super().__init__(f"{stage}: {attempts[-1].reason}")


@dataclass(frozen=True)
class Caption:
    """What came of one clip.

    Attributes:
        sketch: first pass.
        script: second pass: one entry per frame.
        attempts: generations per question: 1 = the first was good.
        questions: per question its frame indices, its text and the answer, for training.
    """

    sketch: dict[str, Any]
    script: list[dict[str, Any]]
    attempts: dict[str, int]
    questions: list[tuple[tuple[int, ...], str, dict[str, Any]]] = field(default_factory=list)


class Captioner:
    """A model with its processor."""

    def __init__(self, model: Any, processor: Processor, settings: Settings) -> None:
        """Wraps a loaded model; see ``from_pretrained``."""
        self.model, self.processor, self.settings = model.eval(), processor, settings
        self._vocabulary = Vocabulary(processor.tokenizer)
        self._stop = [processor.token_id("<|im_end|>"), processor.token_id("<|endoftext|>")]

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, settings: Settings, device: torch.device, dtype: torch.dtype, pixels: int | None = None
    ) -> Captioner:
        """Loads a Qwen VL of any class that transformers knows, from a folder or a hub name.

        Raises:
            UserError: it cannot be loaded, or is no Qwen VL.
        """
        processor = Processor.from_pretrained(name_or_path, pixels)
        try:
            config = AutoConfig.from_pretrained(name_or_path)
            if not config.model_type.startswith("qwen"):
                raise UserError(f"--model {name_or_path}: a {config.model_type}, not a Qwen VL")
            with quiet_transformers():
                model = AutoModelForImageTextToText.from_pretrained(name_or_path, dtype=dtype, use_safetensors=True)
        except (OSError, ValueError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise UserError(f"--model {name_or_path}: cannot be loaded: {first_line}") from None
        return cls(model.to(device), processor, settings)

    def caption(self, clip: Clip, key: str) -> Caption:
        """Both passes over a clip.

        Args:
            clip: all frames of the script.
            key: the video's name; decides the seeds.

        Raises:
            CaptionFailure: one question found no good answer.
        """
        settings, attempts = self.settings, {}
        seen = tuple(thin(len(clip.times), settings.sketch_frames))
        times = [clip.times[i] for i in seen]
        question = sketch_question(times, clip.task)
        schema = sketch_schema(times)
        shape = sketch_guide(times, settings.phrase_tokens)
        sketch, attempts["sketch"] = self._ask(clip, seen, question, schema, shape, key, "sketch")
        questions = [(seen, question, sketch)]
        script: list[dict[str, Any]] = []
        for window in windows(len(clip.times), settings.window):
            seen = tuple(window)
            times = [clip.times[i] for i in seen]
            stage = f"script {clock(times[0])}–{clock(times[-1])} s"
            question = script_question(times, sketch, clip.task)
            shape = script_guide(times, settings.phrase_tokens)
            part, attempts[stage] = self._ask(clip, seen, question, script_schema(times), shape, key, stage)
            questions.append((seen, question, part))
            script += part["frames"]
        return Caption(sketch, script, attempts, questions)

    def _ask(
        self,
        clip: Clip,
        seen: Sequence[int],
        question: str,
        schema: dict[str, Any],
        shape: tuple[Piece, ...],
        key: str,
        stage: str,
    ) -> tuple[dict[str, Any], int]:
        """A good answer and which attempt it was."""
        inputs = self.inputs([(clip.times[i], clip.frames[i]) for i in seen], question)
        bad: list[Attempt] = []
        for number in range(1 + self.settings.retries):
            digest = hashlib.sha256(f"{self.settings.seed}/{key}/{stage}/{number}".encode()).digest()
            seed = int.from_bytes(digest[:4], "big")
            text, ended = self.generate(inputs, shape, seed, greedy=number == 0)
            try:
                if not ended:
                    raise BadAnswer("did not come to an end")
                return check(parse(text), schema), number + 1
            except BadAnswer as error:
                bad.append(Attempt(number, seed, str(error), text[:_SHOWN]))
        raise CaptionFailure(stage, bad)

    def inputs(self, frames: Sequence[tuple[float, np.ndarray]], question: str) -> dict[str, torch.Tensor]:
        """Frames, each after its time as Qwen3-VL writes it, and a question, in the model's own chat format.

        Frames are given as pictures and not as a video: that works alike for every class, and keeps every frame at its
        own time instead of merging pairs [O].
        """
        processor = self.processor
        marker = "\u241eFRAMES\u241e"
        rendered = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": marker + question}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        before, after = str(rendered).split(marker)
        encode: Callable[[str], list[int]] = self._vocabulary.encode
        patches, (rows, columns) = processor.patchify(torch.from_numpy(np.stack([frame for _, frame in frames])))
        begin, pad, end = (processor.token_id(f"<|{name}|>") for name in ("vision_start", "image_pad", "vision_end"))
        picture = [begin, *[pad] * processor.image_tokens((rows, columns)), end]
        ids = encode(before)
        for time, _ in frames:
            ids += [*encode(f"<{clock(time)} seconds>"), *picture]
        row = torch.tensor([[*ids, *encode(after)]])
        return {
            "input_ids": row,
            "attention_mask": torch.ones_like(row),
            "mm_token_type_ids": (row == pad).long(),
            "pixel_values": patches.flatten(0, 1),
            "image_grid_thw": torch.tensor([(1, rows, columns)] * len(frames)),
        }

    @torch.no_grad()
    def generate(
        self, inputs: dict[str, torch.Tensor], shape: tuple[Piece, ...], seed: int, greedy: bool
    ) -> tuple[str, bool]:
        """One generation, and whether it ended by itself; reproducible by its seed, whatever was drawn before."""
        settings = self.settings
        device = self.model.device
        given = {name: value.to(device) for name, value in inputs.items()}
        given["pixel_values"] = given["pixel_values"].to(self.model.dtype)
        length = given["input_ids"].shape[1]
        processors = LogitsProcessorList()
        if settings.guided:
            processors.append(GuidedLogits(Guide(shape, self._vocabulary, self._stop), length))
        drawn: dict[str, Any] = {"do_sample": False}
        if not greedy and settings.temperature > 0:
            drawn = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), quiet_transformers():
            torch.manual_seed(seed)
            output = self.model.generate(
                **given,
                **drawn,
                logits_processor=processors,
                max_new_tokens=longest(shape, self._vocabulary),
                eos_token_id=self._stop,
                pad_token_id=self._stop[-1],
            )[0, length:]
        ended = int(output[-1]) in self._stop
        return self.processor.tokenizer.decode(output, skip_special_tokens=True), ended
