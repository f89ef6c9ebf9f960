"""The recipe of one training stage: a YAML, parsed once into frozen dataclasses; unknown keys are errors.

Every default that is published or taken from peers carries its tag. ``--set optim.rates.decoder=1e-4`` changes a key
from the command line, with the same checks.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qwen_vla_core.embodiment.parse import NodeParser
from qwen_vla_core.embodiment.spec import doc
from qwen_vla_core.training.recipe_file import read_recipe

StageName = Literal["vision", "grounding", "t2a", "cpt", "sft"]


@dataclass(frozen=True)
class ModelSpec:
    """A new model, where the stage does not go on from a checkpoint."""

    preset: Literal["paper", "small", "tiny"] = field(default="tiny", metadata=doc("Size."))
    backbone: Literal["qwen3_5", "qwen3_vl", "qwen2_5_vl"] = field(
        default="qwen3_5", metadata=doc("Class of the tiny backbone; the others are Qwen3.5 [P].")
    )
    pretrained: str | None = field(
        default=None, metadata=doc("Folder or hub name of a published Qwen VL; default: random weights.")
    )
    context: Literal["cached", "joint"] = field(default="cached", metadata=doc("See docs/model.md."))
    state: Literal["none", "prompt", "dit_token"] = field(
        default="none", metadata=doc("How proprioception enters [P]: not at all by default.")
    )
    words: tuple[str, ...] = field(
        default=(),
        metadata=doc("Mixtures whose sentences a tiny tokenizer learns, beside the stage's own; relative paths."),
    )


@dataclass(frozen=True)
class RenewSpec:
    """A new action decoder behind the backbone of `start`, with its own choices."""

    context: Literal["cached", "joint"] = field(default="cached", metadata=doc("See docs/model.md."))
    state: Literal["none", "prompt", "dit_token"] = field(
        default="none", metadata=doc("How proprioception enters [P]: not at all by default.")
    )


@dataclass(frozen=True)
class Rates:
    """Peak learning rates; 0 freezes a part."""

    vision: float = field(default=0.0, metadata=doc("Vision tower.", minimum=0.0))
    language: float = field(default=0.0, metadata=doc("The rest of the backbone.", minimum=0.0))
    decoder: float = field(default=0.0, metadata=doc("Action decoder.", minimum=0.0))


@dataclass(frozen=True)
class OptimSpec:
    """The optimizer and its schedule."""

    rates: Rates = field(metadata=doc("Per part."))
    matrices: Literal["adamw", "muon"] = field(
        default="adamw",
        metadata=doc(
            "What trains the weights inside blocks; all else is AdamW's [X]. muon [O]: fewer steps at tiny size."
        ),
    )
    betas: tuple[float, float] = field(default=(0.9, 0.95), metadata=doc("Of AdamW [X]."))
    weight_decay: float = field(default=0.01, metadata=doc("On matrices only.", minimum=0.0))
    clip_norm: float = field(default=1.0, metadata=doc("Of the whole gradient [X].", exclusive_minimum=0.0))
    warmup_steps: int = field(default=100, metadata=doc("Linear from 0 [X: 5,000 for CPT].", minimum=0))
    shape: Literal["cosine", "linear", "constant"] = field(
        default="cosine", metadata=doc("How the rates fall: cosine [X], linear, or not at all.")
    )
    fall: float = field(
        default=1.0, metadata=doc("Last part of the steps in which they fall.", exclusive_minimum=0.0, maximum=1.0)
    )
    floor: float = field(default=0.0, metadata=doc("What is left of them at the end.", minimum=0.0, maximum=1.0))
    accumulate: int = field(default=1, metadata=doc("Micro-batches per optimizer step.", minimum=1))
    average: float = field(
        default=0.999, metadata=doc("Decay of the averaged weights that are saved; 0: none.", minimum=0.0, maximum=1.0)
    )


@dataclass(frozen=True)
class LossSpec:
    """Weights of the losses, and how the flow is sampled."""

    action: float = field(default=1.0, metadata=doc("Of actions [P].", minimum=0.0))
    navigation: float = field(default=1.0, metadata=doc("Of waypoints [P].", minimum=0.0))
    text: float = field(default=0.1, metadata=doc("Of next tokens [P].", minimum=0.0))
    tau: Literal["sigmoid_normal", "beta"] = field(
        default="beta", metadata=doc("Flow times: sigmoid(N(0, 1)) for T2A, Beta for CPT and SFT [P].")
    )
    draws: int = field(default=4, metadata=doc("Noise draws per observation [X].", minimum=1))
    prefix: int = field(
        default=0,
        metadata=doc("Trained real-time chunking: up to this many first actions are given, not predicted.", minimum=0),
    )


@dataclass(frozen=True)
class LoaderSpec:
    """How samples are made; none of it changes which they are."""

    workers: int = field(default=1, metadata=doc("Processes per rank; 0: in the training process.", minimum=0))
    prefetch: int = field(default=2, metadata=doc("Batches per worker made ahead.", minimum=1))
    cache_mb: float = field(default=256.0, metadata=doc("Decoded frames that each worker keeps.", minimum=0.0))
    jitter: float = field(default=1.0, metadata=doc("Photometric jitter; 0: none.", minimum=0.0))
    frames: int = field(default=1, metadata=doc("Pictures per view.", minimum=1))
    frame_stride: int = field(default=1, metadata=doc("Steps between them.", minimum=1))
    size: tuple[int, int] | None = field(default=None, metadata=doc("[width, height] of pictures; default: as stored."))
    sequence_steps: int = field(default=512, metadata=doc("Whole sequences are cut after this many steps.", minimum=1))


@dataclass(frozen=True)
class Recompute:
    """Share of the layers of each part whose activations are computed again in the backward pass: 0 none, 1 all.

    What fits in memory need not be computed twice. Vision blocks give most memory for the time.
    """

    vision: float = field(default=0.0, metadata=doc("Vision blocks.", minimum=0.0, maximum=1.0))
    language: float = field(default=0.0, metadata=doc("Text layers.", minimum=0.0, maximum=1.0))
    decoder: float = field(default=0.0, metadata=doc("Blocks of the action decoder.", minimum=0.0, maximum=1.0))


NOTHING_TWICE, ALL_TWICE = Recompute(), Recompute(1.0, 1.0, 1.0)


@dataclass(frozen=True)
class ScaleSpec:
    """How the work is spread."""

    parallel: Literal["ddp", "fsdp2"] = field(default="ddp", metadata=doc("With several ranks."))
    precision: Literal["bf16", "fp32"] = field(default="bf16", metadata=doc("Autocast."))
    together: bool = field(
        default=True,
        metadata=doc("One padded pass over all robots; false: a pass per robot, without padding; not for fsdp2."),
    )
    recompute: Recompute = field(default=Recompute(), metadata=doc("Activation checkpointing: less memory, more time."))
    compile: bool = field(
        default=False,
        metadata=doc("torch.compile of every repeated layer; a CPU needs a C++ compiler."),
    )
    threads: int = field(default=1, metadata=doc("Torch threads per rank on a CPU.", minimum=1))


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters on the backbone instead of its own weights."""

    rank: int = field(metadata=doc("Of the adapters.", minimum=1))
    alpha: float = field(default=16.0, metadata=doc("Scale is alpha / rank.", exclusive_minimum=0.0))
    dropout: float = field(default=0.0, metadata=doc("On the adapters' input.", minimum=0.0, maximum=0.9))


@dataclass(frozen=True)
class EvaluateSpec:
    """Closed-loop episodes during training."""

    every: int = field(metadata=doc("Optimizer steps.", minimum=1))
    embodiments: tuple[str, ...] = field(metadata=doc("Whose worlds; a task may follow a slash: aloha/pick."))
    episodes: int = field(default=10, metadata=doc("Per world.", minimum=1))
    video: bool = field(default=True, metadata=doc("Film the first one."))


@dataclass(frozen=True)
class OpenLoopSpec:
    """Predicted beside recorded chunks during training, on the episodes that the mixture's `leave_out` names."""

    frames: int = field(default=200, metadata=doc("Questions per dataset.", minimum=1))


@dataclass(frozen=True)
class StageRecipe:
    """Everything that makes one stage repeatable."""

    stage: StageName = field(metadata=doc("Which stage this is."))
    mixture: str = field(metadata=doc("YAML of the data, relative to this file."))
    steps: int = field(metadata=doc("Optimizer steps.", minimum=1))
    optim: OptimSpec = field(metadata=doc("Rates and schedule."))
    embodiments: tuple[str, ...] = field(
        default=(), metadata=doc("Robots of the checkpoint, by shipped name or YAML; default: those of `start`.")
    )
    start: str | None = field(default=None, metadata=doc("Checkpoint to go on from; default: a new `model`."))
    model: ModelSpec = field(default_factory=ModelSpec, metadata=doc("Where there is no `start`."))
    renew: RenewSpec | None = field(
        default=None, metadata=doc("A new decoder behind the backbone of `start`; default: that of `start`.")
    )
    loss: LossSpec = field(default_factory=LossSpec, metadata=doc("Weights and flow times."))
    loader: LoaderSpec = field(default_factory=LoaderSpec, metadata=doc("How samples are made."))
    scale: ScaleSpec = field(default_factory=ScaleSpec, metadata=doc("How the work is spread."))
    lora: LoraSpec | None = field(default=None, metadata=doc("Adapters on the backbone; default: none."))
    evaluate: EvaluateSpec | None = field(default=None, metadata=doc("Episodes during training; default: none."))
    open_loop: OpenLoopSpec | None = field(
        default=None, metadata=doc("Errors on left-out episodes at every saved state; default: none.")
    )
    tensorboard: bool = field(default=False, metadata=doc("TensorBoard events beside the log."))
    seed: int = field(default=0, metadata=doc("Of weights, samples, noise.", minimum=0))
    log_every: int = field(default=20, metadata=doc("Steps between log lines.", minimum=1))
    save_every: int = field(default=500, metadata=doc("Steps between saved states.", minimum=1))
    save_minutes: float = field(
        default=0.0, metadata=doc("Also save when so long nothing was saved; 0: no such time.", minimum=0.0)
    )
    description: str = field(default="", metadata=doc("For humans."))
    source: str = field(default="<recipe>", compare=False, metadata=doc("", internal=True))

    def path(self, relative: str) -> Path:
        """A path of this recipe, from the folder it lies in."""
        return Path(os.path.normpath(Path(self.source).parent / Path(relative).expanduser()))

    def to_json(self) -> dict[str, Any]:
        """Plain values, for logs and checkpoints."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        del plain["source"]
        return plain

    @property
    def choices(self) -> dict[str, Any]:
        """Every choice that changes what is learnt; where it begins, how it is spread and logged is left out."""
        plain = self.to_json()
        beside = ("evaluate", "open_loop", "tensorboard", "log_every", "save_every", "save_minutes")
        for key in ("start", "scale", *beside, "description"):
            del plain[key]
        for key in ("workers", "prefetch", "cache_mb"):
            del plain["loader"][key]
        return plain


def load_stage(path: str | Path, changes: Sequence[str] = ()) -> StageRecipe:
    """Reads a recipe.

    Args:
        path: of the YAML.
        changes: ``a.b=value``, as given to ``--set``.

    Raises:
        UserError: with file, line, key and the fix.
    """
    recipe, parser = read_recipe(StageRecipe, path, changes)
    _check(recipe, parser)
    return recipe


def _check(recipe: StageRecipe, parser: NodeParser) -> None:
    rates = recipe.optim.rates
    if not any((rates.vision, rates.language, rates.decoder)):
        parser.fail("optim.rates", "every part is frozen", "give at least one part a rate")
    if recipe.stage == "t2a" and (rates.vision or rates.language):
        parser.fail("optim.rates", "T2A trains the decoder alone", "leave vision and language at 0 [P]")
    if recipe.stage in ("vision", "grounding") and rates.decoder:
        parser.fail("optim.rates.decoder", "stage 0 has no actions", "leave it at 0")
    if recipe.scale.parallel == "fsdp2" and not recipe.scale.together:
        parser.fail("scale.together", "every rank of fsdp2 has to do the same passes", "leave it true, or use ddp")
    if recipe.optim.matrices == "muon" and recipe.scale.parallel == "fsdp2":
        parser.fail("optim.matrices", "muon needs whole matrices on every rank", "use adamw, or scale.parallel: ddp")
    if recipe.lora is not None and recipe.scale.parallel == "fsdp2":
        parser.fail("lora", "adapters are not sharded", "use scale.parallel: ddp; the frozen weights need no gradients")
    if recipe.open_loop is not None and recipe.scale.parallel == "fsdp2":
        parser.fail("open_loop", "one rank alone cannot ask a sharded policy", "use scale.parallel: ddp")
    if recipe.open_loop is not None and recipe.stage not in ("cpt", "sft"):
        parser.fail("open_loop", f"stage {recipe.stage} does not act on what it sees", "remove the key")
    if recipe.renew is not None and not rates.decoder:
        parser.fail("renew", "the new decoder would stay as it begins", "give optim.rates.decoder a rate")
    if recipe.lora is not None and rates.vision:
        parser.fail("optim.rates.vision", "with `lora` the tower's weights stay", "leave it at 0")
    if recipe.model.pretrained is not None and recipe.model.preset == "tiny":
        parser.fail("model.pretrained", "the tiny preset has no published weights", "use preset: small or paper")
