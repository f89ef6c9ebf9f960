"""What a dataset holds, as data: the part of an embodiment that training needs.

A robot's YAML says far more (topics, limits, watchdog), and a corpus of human hands or of walks through houses has no
topics at all. A dataset therefore carries its own contract in ``meta/qwen_vla.json``; for one that was recorded without
(any LeRobot dataset), the contract comes from an embodiment YAML.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qwen_vla_core.embodiment.prompt import sentence
from qwen_vla_core.embodiment.spec import Embodiment, PromptSpec
from qwen_vla_core.errors import UserError

# Families of the training mixture with their published shares in percent [P].
PUBLISHED_MIXTURE: dict[str, float] = {
    "manipulation": 74.2,
    "human": 6.0,
    "navigation": 7.5,
    "synthetic": 3.7,
    "general_vl": 3.4,
    "spatial_grounding": 2.5,
    "driving_vqa": 2.4,
    "captions": 0.2,
}
# Families whose samples are conversations about pictures; the others are actions. `t2a` is stage I's own corpus.
TEXT_FAMILIES = frozenset({"general_vl", "spatial_grounding", "driving_vqa", "captions"})
FAMILIES: tuple[str, ...] = (*PUBLISHED_MIXTURE, "t2a")
CONTRACT_FILE = "meta/qwen_vla.json"
CONTRACT_VERSION = 1


@dataclass(frozen=True)
class ChannelGroup:
    """Neighbouring channels of one kind.

    Attributes:
        name: unique among the groups of its side (state or action).
        kind: as in the embodiment YAML (``GroupKind``).
        unit: as in the embodiment YAML, for example ``rad`` or ``m,axis_angle``.
        channels: their names.
        frame: as in the embodiment YAML, of an action group's displacements or relative poses; empty: the default.
    """

    name: str
    kind: str
    unit: str
    channels: tuple[str, ...]
    frame: str = ""


@dataclass(frozen=True)
class DataContract:
    """Prompt, rate, views and channels of a dataset.

    Attributes:
        prompt: fields of the published sentence [P].
        frequency_hz: action rate that the prompt names; the dataset's own rate.
        horizon: H, actions per chunk.
        convention: as in the embodiment YAML (``control.convention``).
        views: view names in model order; empty for data without pictures.
        state: groups of the state vector.
        action: groups of the action vector, in column order.
    """

    prompt: PromptSpec
    frequency_hz: float
    horizon: int
    convention: str
    views: tuple[str, ...]
    state: tuple[ChannelGroup, ...]
    action: tuple[ChannelGroup, ...]

    @classmethod
    def of(cls, robot: Embodiment) -> DataContract:
        """The part of an embodiment that training needs."""
        return cls(
            prompt=robot.prompt,
            frequency_hz=float(robot.control.frequency_hz),
            horizon=robot.control.horizon,
            convention=robot.control.convention,
            views=robot.views,
            state=tuple(ChannelGroup(g.name, g.kind, g.unit, g.channels) for g in robot.state),
            action=tuple(ChannelGroup(g.name, g.kind, g.unit, g.channels, g.frame) for g in robot.actions),
        )

    @property
    def state_channels(self) -> tuple[str, ...]:
        """Names of the state vector's channels."""
        return tuple(channel for group in self.state for channel in group.channels)

    @property
    def action_channels(self) -> tuple[str, ...]:
        """The c names of the action vector's channels."""
        return tuple(channel for group in self.action for channel in group.channels)

    def prompt_for(self, instruction: str) -> str:
        """The published sentence with this instruction, as ``build_prompt`` gives it for a robot [P]."""
        return sentence(self.prompt, self.frequency_hz, self.horizon, self.convention, instruction)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; undone by ``from_json``."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        for group in (*plain["state"], *plain["action"]):
            if not group["frame"]:
                del group["frame"]
        return plain

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> DataContract:
        """Reads what ``to_json`` wrote.

        Args:
            value: the JSON object.
            where: file name for errors.

        Raises:
            UserError: a key is missing, unknown or of another type.
        """
        try:
            groups = {
                side: tuple(
                    ChannelGroup(
                        g["name"], g["kind"], g["unit"], tuple(map(str, g["channels"])), str(g.get("frame", ""))
                    )
                    for g in value[side]
                )
                for side in ("state", "action")
            }
            return cls(
                prompt=PromptSpec(**value["prompt"]),
                frequency_hz=float(value["frequency_hz"]),
                horizon=int(value["horizon"]),
                convention=str(value["convention"]),
                views=tuple(map(str, value["views"])),
                **groups,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: damaged contract ({type(error).__name__}: {error}); write it again") from None
