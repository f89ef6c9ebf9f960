"""Parts of an embodiment that say what the policy is told and how its chunks are timed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qwen_vla_core.embodiment.spec_base import doc

DEFAULT_EXECUTE_STEPS = 5
Convention = Literal[
    "absolute_joint",
    "delta_joint",
    "absolute_eef",
    "delta_eef",
    "base_velocity",
    "waypoint",
    "relative_joint",
    "relative_eef",
]


@dataclass(frozen=True)
class PromptSpec:
    """Fields of the published embodiment sentence [P]."""

    robot_tag: str = field(metadata=doc("Robot name as the model reads it, e.g. 'ALOHA'."))
    arms: Literal["single arm", "dual arms", "no arm"] = field(metadata=doc("How many arms the prompt names."))
    waist: bool = field(default=False, metadata=doc("Whether the prompt says the robot has a waist."))
    mobile_base: bool = field(default=False, metadata=doc("Whether the prompt says the robot has a mobile base."))


@dataclass(frozen=True)
class ControlSpec:
    """Rates and the chunk's length."""

    frequency_hz: float = field(
        metadata=doc("Action frequency of the policy, as in the prompt.", exclusive_minimum=0.0)
    )
    horizon: int = field(metadata=doc("H: actions per chunk, as in the prompt.", minimum=1))
    controller_rate_hz: float = field(
        default=0.0,
        kw_only=True,
        metadata=doc(
            "Rate of the controller's loop; it interpolates between actions.", exclusive_minimum=0.0, robot=True
        ),
    )
    execute_steps: int | None = field(
        default=None,
        kw_only=True,
        metadata=doc(
            "Actions of a chunk that are executed before the policy looks again; fewer where the next chunk would come "
            "too late. A small number follows a changing scene, a large one costs less. Default: 5, or the whole of a "
            "shorter chunk.",
            minimum=1,
        ),
    )
    convention: Convention = field(
        metadata=doc(
            "Action convention of the policy. With relative_* and waypoint a chunk is relative to the state at its "
            "first frame, while datasets and commands hold absolute values."
        )
    )
