"""A training recipe: one YAML, parsed once into frozen dataclasses; unknown keys are errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qwen_vla_core.embodiment.parse import NodeParser
from qwen_vla_core.embodiment.spec import doc
from qwen_vla_core.embodiment.yamlpos import compose, read_text


@dataclass(frozen=True)
class VisionStage:
    """The vision tower alone learns which cell of a picture holds which cube; stands in for its pretraining [O]."""

    steps: int = field(metadata=doc("Optimizer steps.", minimum=0))
    batch_size: int = field(metadata=doc("Frames per step, each with all its views.", minimum=1))
    learning_rate: float = field(metadata=doc("Peak learning rate of AdamW.", exclusive_minimum=0.0))


@dataclass(frozen=True)
class GroundingStage:
    """Stage 0: questions about pictures, answered from the simulator's state; stands in for Qwen's pretraining [O]."""

    steps: int = field(metadata=doc("Optimizer steps.", minimum=0))
    batch_size: int = field(metadata=doc("Frames per step.", minimum=1))
    questions: int = field(metadata=doc("Questions per frame.", minimum=0))
    learning_rate: float = field(metadata=doc("Peak learning rate of AdamW.", exclusive_minimum=0.0))


@dataclass(frozen=True)
class PolicyStage:
    """Behaviour cloning by flow matching, with the grounding loss beside it."""

    steps: int = field(metadata=doc("Optimizer steps.", minimum=0))
    batch_size: int = field(metadata=doc("Observations per step.", minimum=1))
    noise_draws: int = field(metadata=doc("Noise draws per observation [X].", minimum=1))
    learning_rate: float = field(metadata=doc("Peak learning rate of the decoder.", exclusive_minimum=0.0))
    backbone_learning_rate: float = field(metadata=doc("Peak learning rate of the backbone.", exclusive_minimum=0.0))
    questions: int = field(metadata=doc("Grounding questions per observation, in every other batch.", minimum=0))
    text_weight: float = field(metadata=doc("Weight of the next-token loss [P: 0.1].", minimum=0.0))


@dataclass(frozen=True)
class Recipe:
    """Everything that makes a training run repeatable."""

    embodiment: str = field(metadata=doc("Shipped name or YAML of the robot."))
    preset: str = field(metadata=doc("Model preset."))
    data: tuple[str, ...] = field(metadata=doc("Folders of demonstrations."))
    seed: int = field(metadata=doc("Seed of weights, sampling, noise.", minimum=0))
    vision: VisionStage = field(metadata=doc("Warm-up of the vision tower."))
    grounding: GroundingStage = field(metadata=doc("Stage 0."))
    instruction: GroundingStage = field(
        metadata=doc("What the instruction means, asked after the whole policy prompt.")
    )
    policy: PolicyStage = field(metadata=doc("Behaviour cloning."))
    backbone: Literal["qwen3_5", "qwen3_vl", "qwen2_5_vl"] = field(
        default="qwen3_5", metadata=doc("Class of the tiny backbone.")
    )
    warmup_steps: int = field(default=200, metadata=doc("Linear warm-up of each stage.", minimum=0))
    cooldown: float = field(
        default=0.3,
        metadata=doc("Last part of the policy stage in which the rates fall to zero.", minimum=0.0, maximum=1.0),
    )
    weight_decay: float = field(default=0.01, metadata=doc("AdamW weight decay.", minimum=0.0))
    clip_norm: float = field(default=1.0, metadata=doc("Gradient clipping.", exclusive_minimum=0.0))
    ema_decay: float = field(default=0.999, metadata=doc("Decay of the averaged weights that are saved.", minimum=0.0))
    save_every: int = field(default=500, metadata=doc("Steps between saved training states.", minimum=1))
    threads: int = field(default=1, metadata=doc("Torch threads.", minimum=1))


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe; errors carry file, line, key and the fix."""
    source = str(path)
    return NodeParser(source).dataclass(Recipe, compose(read_text(Path(path), source), source), "")
