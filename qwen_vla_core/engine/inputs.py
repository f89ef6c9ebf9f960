"""Requests → tensors, doing only what this observation needs: what depends on robot and sentence is kept.

A robot asks with the same sentence and the same picture sizes hundreds of times. Token ids, where the pictures go, and
all rotary angles depend on those only, so they are made once (``Row``). What is left per request is bringing pictures
to the model's size, as bytes, and normalising the state; grey levels are normalised inside the first matrix product.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional

from qwen_vla_core.embodiment import Embodiment, build_prompt
from qwen_vla_core.interfaces import Observation
from qwen_vla_core.model.batching import ActionRow, conversation
from qwen_vla_core.model.policy import QwenVLA
from qwen_vla_core.model.processor import AREA, Sample

Size = tuple[int, int]
KEPT_ROWS = 256


@dataclass(frozen=True)
class Row:
    """One robot and sentence, on the CPU.

    Attributes:
        ids: n token ids.
        sizes: per picture, the height and width the model sees.
        slots: per picture, the positions of its tokens in ``ids``.
        positions: (3, n) M-RoPE positions.
        channels: c, real action channels.
        horizon: H of the robot.
    """

    ids: torch.Tensor
    sizes: tuple[Size, ...]
    slots: tuple[torch.Tensor, ...]
    positions: torch.Tensor
    channels: int
    horizon: int

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.ids)

    @property
    def next_position(self) -> int:
        """The first position after the prompt."""
        return int(self.positions.max()) + 1


@dataclass(frozen=True)
class Ready:
    """One request, prepared.

    Attributes:
        row: what is kept between requests.
        pictures: per view, (height, width, 3) uint8 at the model's size.
        state: (c_s,) normalised.
    """

    row: Row
    pictures: tuple[torch.Tensor, ...]
    state: np.ndarray


class Preparer:
    """Makes ``Ready`` requests for one policy."""

    def __init__(self, policy: QwenVLA) -> None:
        """
        Args:
            policy: its robots, statistics and processor are read, its network only for M-RoPE positions.
        """
        self.policy = policy
        self._rows: OrderedDict[tuple[object, ...], Row] = OrderedDict()

    def __call__(self, observation: Observation, embodiment: str) -> Ready:
        """
        Raises:
            UserError: a view is missing, the state has another length, or the robot is unknown.
        """
        policy = self.policy
        robot = policy.embodiment(embodiment)
        stats = policy.embodiment_stats(robot.name)
        state = stats.state.normalize(policy.checked_state(observation, robot))
        views = policy.checked_views(observation, robot)
        pictures = tuple(shrink(self.policy, picture) for picture in views.values())
        return Ready(self._row(robot, views, pictures, observation.instruction, state), pictures, state)

    def _row(
        self,
        robot: Embodiment,
        views: Mapping[str, np.ndarray],
        pictures: Sequence[torch.Tensor],
        instruction: str,
        state: np.ndarray,
    ) -> Row:
        sizes = tuple((int(picture.shape[0]), int(picture.shape[1])) for picture in pictures)
        told = state.tobytes() if self.policy.config.state_mode == "prompt" else b""
        key = (robot.name, robot.hash, sizes, instruction, told)
        row = self._rows.get(key)
        if row is None:
            sample = conversation(
                ActionRow(views, build_prompt(robot, instruction), state, len(robot.channels)), self.policy.config
            )
            row = self._make_row(robot, sample, sizes)
            if told == b"":
                self._rows[key] = row
                if len(self._rows) > KEPT_ROWS:
                    self._rows.popitem(last=False)
        else:
            self._rows.move_to_end(key)
        return row

    def _make_row(self, robot: Embodiment, sample: Sample, sizes: tuple[Size, ...]) -> Row:
        policy, processor = self.policy, self.policy.processor
        patch = processor.image.patch_size
        grids = [(height // patch, width // patch) for height, width in sizes]
        ids = torch.tensor(processor.context_ids(sample, grids))
        seen = ids == processor.token_id("<|image_pad|>")
        counts = [processor.image_tokens(grid) for grid in grids]
        slots = seen.nonzero()[:, 0].split(counts) if grids else ()
        thw = torch.tensor([(1, *grid) for grid in grids]) if grids else None
        positions = policy.backbone.positions(ids[None], seen[None].long(), thw, None)[:, 0]
        return Row(ids, sizes, tuple(slots), positions, len(robot.channels), robot.control.horizon)


def shrink(policy: QwenVLA, picture: np.ndarray) -> torch.Tensor:
    """A picture at the size the model sees, the grey levels that ``Processor.patchify`` would give it.

    Args:
        policy: its processor's settings are used.
        picture: (height, width, 3) uint8 RGB.

    Raises:
        ValueError: another shape or dtype.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"pictures are (height, width, 3) uint8, got {picture.shape} {picture.dtype}")
    settings = policy.processor.image
    height, width = picture.shape[:2]
    target = settings.target_size(height, width)
    if target == (height, width):
        return _tensor(picture)
    if settings.resample == AREA:
        if height % target[0] == 0 and width % target[1] == 0:
            return torch.from_numpy(whole_cells(picture, height // target[0], width // target[1]))
        pixels = _tensor(picture).permute(2, 0, 1)[None].float()
        reduced = functional.interpolate(pixels, target, mode="area").round()
        return reduced[0].permute(1, 2, 0).to(torch.uint8)
    pixels = _tensor(picture).permute(2, 0, 1)[None].contiguous()
    resized = functional.interpolate(pixels, target, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).contiguous()


def _tensor(picture: np.ndarray) -> torch.Tensor:
    """Without a copy where that is allowed: pictures in a message's memory are read-only."""
    return torch.from_numpy(picture if picture.flags.writeable else picture.copy())


def whole_cells(picture: np.ndarray, down: int, across: int) -> np.ndarray:
    """Means of cells of ``down`` × ``across`` pixels, rounded half to even as torch's area mode followed by ``round``.

    Sums of bytes are exact, so the order of the additions does not matter; a tenth of the time of a float resize.
    """
    rows = picture[0::down].astype(np.uint16)
    for offset in range(1, down):
        rows += picture[offset::down]
    total = rows[:, 0::across].astype(np.uint32)
    for offset in range(1, across):
        total += rows[:, offset::across]
    mean = total.astype(np.float32) / np.float32(down * across)
    return np.rint(mean, out=mean).astype(np.uint8)
