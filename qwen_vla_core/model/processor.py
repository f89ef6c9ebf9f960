"""Pictures and sentences → the backbone's inputs, in plain torch, reading and writing the real Qwen folder layout.

One conversation format serves everything. The first user turn holds the views, each between its boundary tokens [P],
and the prompt; the context of the action decoder ends where the assistant would begin to answer. Text answers
(grounding, VQA) may follow: the backbone is causal, so they cannot change the context, and one forward pass serves both
losses [O].
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qwen_vla_core.embodiment.prompt import PLAIN
from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_json
from qwen_vla_core.model.picture_size import target_size
from qwen_vla_core.model.tokenizer import add_view_tokens, view_tokens

IMAGE_FILE = "preprocessor_config.json"
IGNORED_LABEL = -100
BICUBIC, AREA = 3, 4  # Pillow's numbers, as preprocessor_config.json stores them


@dataclass(frozen=True)
class ImageConfig:
    """What ``preprocessor_config.json`` says.

    Attributes:
        patch_size: pixels per patch side.
        merge_size: patches per token side.
        temporal_patch_size: frames per patch; a still picture is repeated.
        min_pixels: smaller pictures are enlarged to about this area.
        max_pixels: larger pictures are reduced to at most this area.
        image_mean: per RGB channel, of values in [0, 1].
        image_std: per RGB channel.
        resample: 3 = antialiased bicubic (Qwen's), 4 = area.
    """

    patch_size: int = 16
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 65536
    max_pixels: int = 16777216
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: int = BICUBIC

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ImageConfig:
        """Reads the published file; Qwen2.5-VL writes min_pixels/max_pixels, later ones ``size``."""
        size = data.get("size") or {}
        low = data.get("min_pixels") or size.get("shortest_edge") or cls.min_pixels
        high = data.get("max_pixels") or size.get("longest_edge") or cls.max_pixels
        try:
            return cls(
                patch_size=int(data["patch_size"]),
                merge_size=int(data["merge_size"]),
                temporal_patch_size=int(data["temporal_patch_size"]),
                min_pixels=int(low),
                max_pixels=int(high),
                image_mean=tuple(map(float, data["image_mean"])),
                image_std=tuple(map(float, data["image_std"])),
                resample=int(data.get("resample", BICUBIC)),
            )
        except KeyError as error:
            raise UserError(f"{IMAGE_FILE}: missing key {error.args[0]}") from error

    def to_dict(self) -> dict[str, Any]:
        """The published file's keys."""
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": self.patch_size,
            "merge_size": self.merge_size,
            "temporal_patch_size": self.temporal_patch_size,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "resample": self.resample,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "rescale_factor": 1 / 255,
        }

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """Qwen's rule: multiples of a token's side, nearly the same shape, an area within the limits."""
        return target_size(height, width, self.patch_size * self.merge_size, self.min_pixels, self.max_pixels)


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        images: view → (height, width, 3) uint8 RGB, or (n, height, width, 3) for several frames of one view, oldest
            first; in the order the model sees them; empty for text only.
        prompt: the first user turn after the views.
        turns: (question, answer) pairs after the context. An empty first question means that the answer replies to the
            prompt itself, as in VQA: ``Sample(images, question, (("", answer),))``.
    """

    images: Mapping[str, np.ndarray]
    prompt: str
    turns: tuple[tuple[str, str], ...] = ()


@dataclass
class Processor:
    """Tokenizer and picture settings; ``folder_extra`` are unknown keys of the picture file, kept for saving."""

    tokenizer: PreTrainedTokenizerBase
    image: ImageConfig = field(default_factory=ImageConfig)
    folder_extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._encode_cached = lru_cache(maxsize=65536)(self._encode)

    @classmethod
    def from_pretrained(cls, name_or_path: str, pixels: int | None = None) -> Processor:
        """Reads a Qwen folder (or hub name): tokenizer, chat template, preprocessor_config.json.

        Args:
            name_or_path: local folder or hub name.
            pixels: area every picture is brought to; None keeps the folder's limits.

        Raises:
            UserError: a file is missing; its name is in the message.
        """
        file = Path(name_or_path) / IMAGE_FILE
        if not Path(name_or_path).is_dir():
            from huggingface_hub import hf_hub_download

            try:
                file = Path(hf_hub_download(name_or_path, IMAGE_FILE))
            except Exception as error:
                raise UserError(f"cannot fetch {IMAGE_FILE} of {name_or_path!r}: {error}") from error
        if not file.is_file():
            raise UserError(f"{name_or_path}: {IMAGE_FILE} is missing")
        try:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        except (OSError, ValueError) as error:
            raise UserError(f"{name_or_path}: tokenizer files are missing or unreadable: {error}") from error
        raw = json.loads(file.read_text())
        image = ImageConfig.from_dict(raw)
        if pixels is not None:
            image = ImageConfig(**{**image.__dict__, "min_pixels": pixels, "max_pixels": pixels})
        return cls(tokenizer, image, {key: value for key, value in raw.items() if key not in image.to_dict()})

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json, chat_template.jinja and preprocessor_config.json."""
        self.tokenizer.save_pretrained(str(folder))
        atomic_write_json(Path(folder) / IMAGE_FILE, {**self.folder_extra, **self.image.to_dict()})

    def add_views(self, views: Sequence[str]) -> int:
        """Makes the boundary tokens of ``views`` single special tokens; returns how many were new."""
        self._encode_cached.cache_clear()
        return add_view_tokens(self.tokenizer, views)

    def token_id(self, token: str) -> int:
        """Id of one special token; a ValueError if the tokenizer lacks it."""
        found = self.tokenizer.get_vocab().get(token) if token not in self._special else self._special[token]
        if found is None:
            raise ValueError(f"the tokenizer has no token {token}")
        self._special[token] = found
        return found

    @property
    def _special(self) -> dict[str, int]:
        return self.__dict__.setdefault("_special_ids", {})

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False)) if text else ()

    @torch.no_grad()
    def patchify(self, images_nhwc: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Pictures of one size → normalised patches, in Qwen's order (tokens row by row, patches of a token together).

        Args:
            images_nhwc: (N, height, width, 3) uint8.

        Returns:
            (N, rows * columns, 3 * temporal * patch * patch) float32, and the grid (rows, columns) in patches.
        """
        image = self.image
        pixels = images_nhwc.permute(0, 3, 1, 2)
        height, width = image.target_size(pixels.shape[2], pixels.shape[3])
        if (height, width) != tuple(pixels.shape[2:]):
            if image.resample == AREA:
                # Rounded to whole grey levels: a picture reduced here equals one reduced and stored earlier.
                pixels = functional.interpolate(pixels.float(), (height, width), mode="area").round()
            else:
                pixels = functional.interpolate(
                    pixels.contiguous(), (height, width), mode="bicubic", antialias=True, align_corners=False
                )
        mean = torch.tensor(image.image_mean, device=pixels.device)[:, None, None]
        std = torch.tensor(image.image_std, device=pixels.device)[:, None, None]
        normal = (pixels.float() * (1 / 255) - mean) / std
        patch, merge = image.patch_size, image.merge_size
        rows, columns = height // patch, width // patch
        blocks = normal.reshape(-1, 3, rows // merge, merge, patch, columns // merge, merge, patch)
        blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
        blocks = blocks.expand(-1, -1, -1, -1, -1, -1, image.temporal_patch_size, -1, -1)
        return blocks.reshape(blocks.shape[0], rows * columns, -1), (rows, columns)

    def image_tokens(self, grid: tuple[int, int]) -> int:
        """Tokens of a picture with this patch grid."""
        return grid[0] * grid[1] // self.image.merge_size**2

    def view_ids(self, view: str, tokens: int, frames: int = 1) -> list[int]:
        """``<|view_start|>``, per frame ``<|vision_start|>`` picture ``<|vision_end|>``, ``<|view_end|>`` as ids.

        A picture of no camera (``Picture 1``, as Qwen's own template counts them) stands without the outer tokens.
        """
        picture = [
            self.token_id("<|vision_start|>"),
            *[self.token_id("<|image_pad|>")] * tokens,
            self.token_id("<|vision_end|>"),
        ]
        if view.startswith(f"{PLAIN} "):
            return picture * frames
        start, end = view_tokens(view)
        return [self.token_id(start), *picture * frames, self.token_id(end)]

    def collate(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """A right-padded batch.

        Returns:
            input_ids (B, L), attention_mask (B, L) bool, mm_token_type_ids (B, L), context_mask (B, L) bool (what the
            action decoder may see), labels (B, L) with -100 outside answers; with pictures also pixel_values
            (patches, n) and image_grid_thw (images, 3).
        """
        patches, grids = self._patches([frame for sample in samples for frame in _frames(sample.images)])
        sequences, first = [], 0
        for sample in samples:
            count = len(_frames(sample.images))
            sequences.append(self._conversation(sample, grids[first : first + count]))
            first += count
        length = max(len(ids) for ids, _, _ in sequences)
        pad = self.tokenizer.pad_token_id
        pad = self.token_id("<|endoftext|>") if pad is None else pad
        input_ids = torch.full((len(samples), length), pad, dtype=torch.long)
        labels = torch.full((len(samples), length), IGNORED_LABEL, dtype=torch.long)
        attention, context = torch.zeros(2, len(samples), length, dtype=torch.bool)
        for row, (ids, targets, context_length) in enumerate(sequences):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, : len(ids)] = torch.tensor(targets)
            attention[row, : len(ids)] = True
            context[row, :context_length] = True
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention,
            "mm_token_type_ids": (input_ids == self.token_id("<|image_pad|>")).long(),
            "context_mask": context,
            "labels": labels,
        }
        if grids:
            batch["pixel_values"] = patches
            batch["image_grid_thw"] = torch.tensor([(1, *grid) for grid in grids])
        return batch

    def _patches(self, images: list[np.ndarray]) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """Patches of all pictures in order; pictures of one size are processed together."""
        by_size: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise ValueError(f"pictures are (height, width, 3) uint8, got {image.shape} {image.dtype}")
            by_size.setdefault(image.shape, []).append(index)
        parts: list[torch.Tensor] = [torch.empty(0)] * len(images)
        grids: list[tuple[int, int]] = [(0, 0)] * len(images)
        for indices in by_size.values():
            patches, grid = self.patchify(torch.from_numpy(np.stack([images[i] for i in indices])))
            if len(by_size) == 1:
                return patches.flatten(0, 1), [grid] * len(images)
            for position, index in enumerate(indices):
                parts[index], grids[index] = patches[position], grid
        return (torch.cat(parts) if parts else torch.empty(0)), grids

    def _views(self, images: Mapping[str, np.ndarray], grids: Sequence[tuple[int, int]]) -> list[int]:
        ids: list[int] = []
        first = 0
        for view, image in images.items():
            frames = len(image) if image.ndim == 4 else 1
            ids += self.view_ids(view, self.image_tokens(grids[first]), frames)
            first += frames
        return ids

    def context_ids(self, sample: Sample, grids: list[tuple[int, int]]) -> list[int]:
        """Token ids of what the action decoder may see: views and prompt. ``grids`` as ``patchify`` returns them."""
        ids, _, length = self._conversation(sample, grids)
        return ids[:length]

    def _conversation(self, sample: Sample, grids: list[tuple[int, int]]) -> tuple[list[int], list[int], int]:
        """Ids, labels and the length of the context."""
        encode = self._encode_cached
        to_answer = encode("<|im_end|>\n<|im_start|>assistant\n")
        ids = [
            *encode("<|im_start|>user\n"),
            *self._views(sample.images, grids),
            *encode(sample.prompt),
            *to_answer,
        ]
        labels = [IGNORED_LABEL] * len(ids)
        context_length = len(ids)
        for number, (question, answer) in enumerate(sample.turns):
            if question or number:
                # After the prompt the assistant's turn is the action chunk: no text, so it is closed at once.
                opening = "<|im_end|>\n<|im_start|>user\n" if number == 0 else "\n<|im_start|>user\n"
                asked = [*encode(opening), *encode(question), *to_answer]
                ids += asked
                labels += [IGNORED_LABEL] * len(asked)
            told = [*encode(answer), self.token_id("<|im_end|>")]
            ids += told
            labels += told
        return ids, labels, context_length

    def question(self, images: Mapping[str, np.ndarray], question: str) -> dict[str, torch.Tensor]:
        """Inputs for text generation, through the tokenizer's own chat template; one row, no padding."""
        marker = "\u241eVIEWS\u241e"
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": marker + question}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        before, after = str(rendered).split(marker)
        patches, grids = self._patches(_frames(images))
        ids = torch.tensor([[*self._encode(before), *self._views(images, grids), *self._encode(after)]])
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == self.token_id("<|image_pad|>")).long(),
        }
        if grids:
            inputs["pixel_values"] = patches
            inputs["image_grid_thw"] = torch.tensor([(1, *grid) for grid in grids])
        return inputs


def _frames(images: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Every picture of every view, one by one."""
    return [frame for image in images.values() for frame in (image if image.ndim == 4 else (image,))]
