"""The recipe of stage IV, reinforcement learning: a YAML, parsed once into frozen dataclasses; unknown keys are errors.

Defaults are the published numbers [P], for a 4B model on 128 worlds; recipes of tiny models say what they change.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qwen_vla_core.embodiment.spec import doc
from qwen_vla_core.errors import UserError
from qwen_vla_core.model.checkpoint import resolve_checkpoint
from qwen_vla_core.training.ppo import PpoConfig
from qwen_vla_core.training.recipe_file import read_recipe


@dataclass(frozen=True)
class WorldsSpec:
    """The worlds of one robot."""

    embodiment: str = field(metadata=doc("Robot of the checkpoint, by name; its YAML names the world."))
    tasks: tuple[str, ...] = field(default=(), metadata=doc("Tasks drawn from; default: all of the world."))
    worlds: int = field(default=128, metadata=doc("Instances that run at the same time [P].", minimum=1))
    chunks: int = field(default=8, metadata=doc("Decisions per episode at most [P]; then it is timed out.", minimum=1))
    execute_steps: int | None = field(
        default=None, metadata=doc("Actions executed of each chunk; default: all.", minimum=1)
    )


@dataclass(frozen=True)
class RlRates:
    """Learning rates; 0 freezes a part."""

    vision: float = field(default=0.0, metadata=doc("Vision tower [O].", minimum=0.0))
    language: float = field(default=0.0, metadata=doc("The rest of the backbone [O].", minimum=0.0))
    decoder: float = field(default=5e-6, metadata=doc("Action decoder, the actor [P].", minimum=0.0))
    value: float = field(default=1e-4, metadata=doc("Value head [P].", exclusive_minimum=0.0))
    shape: Literal["constant", "linear"] = field(
        default="constant", metadata=doc("Over the iterations: constant, or linear down to 0 [O].")
    )


@dataclass(frozen=True)
class SamplingSpec:
    """Flow-SDE: how chunks are drawn while learning."""

    steps: int | None = field(default=None, metadata=doc("Euler steps; default: the checkpoint's.", minimum=1))
    noise_level: float = field(
        default=0.5, metadata=doc("a in σ = a √(t / (1 − t)) [X].", exclusive_minimum=0.0, maximum=2.0)
    )
    reduction: Literal["mean", "sum"] = field(
        default="mean", metadata=doc("Of log-probabilities over executed steps × real channels [X: mean].")
    )


@dataclass(frozen=True)
class RlEvaluateSpec:
    """Episodes without exploration noise, on scenes of their own; they decide which weights are kept."""

    every: int = field(metadata=doc("Iterations.", minimum=1))
    episodes: int = field(default=50, metadata=doc("Per robot.", minimum=1))
    seed: int = field(default=0, metadata=doc("Chooses the scenes; the same ones every time.", minimum=0))


@dataclass(frozen=True)
class RlRecipe:
    """Everything that makes a run of reinforcement learning repeatable."""

    worlds: tuple[WorldsSpec, ...] = field(metadata=doc("Per robot."))
    iterations: int = field(metadata=doc("Rounds of collecting and updating.", minimum=1))
    start: str | None = field(
        default=None, metadata=doc("Checkpoint to go on from: a folder or a shipped name; default: named by --from.")
    )
    rounds: int = field(default=8, metadata=doc("Episodes per world and iteration [P].", minimum=1))
    rates: RlRates = field(default_factory=RlRates, metadata=doc("Per part."))
    ppo: PpoConfig = field(default_factory=PpoConfig, metadata=doc("Advantages and updates."))
    sampling: SamplingSpec = field(default_factory=SamplingSpec, metadata=doc("Flow-SDE."))
    evaluate: RlEvaluateSpec | None = field(
        default=None, metadata=doc("Keeps the best weights; default: none, the last ones are kept.")
    )
    micro_batch: int = field(default=64, metadata=doc("Decisions per forward and backward pass.", minimum=1))
    forward_batch: int = field(default=128, metadata=doc("Observations per forward pass in the worlds.", minimum=1))
    workers: int = field(default=1, metadata=doc("Processes or actors with worlds; 0: in this one.", minimum=0))
    workers_backend: Literal["processes", "ray"] = field(
        default="processes", metadata=doc("Where they run; a Ray cluster is named by RAY_ADDRESS.")
    )
    precision: Literal["bf16", "fp32"] = field(
        default="bf16", metadata=doc("Autocast; log-probabilities are fp32 [P].")
    )
    threads: int = field(default=1, metadata=doc("Torch threads on a CPU.", minimum=1))
    export: Literal["float32", "float16", "bfloat16"] = field(
        default="float32", metadata=doc("How the checkpoint stores its weights.")
    )
    tensorboard: bool = field(default=False, metadata=doc("TensorBoard events beside the log."))
    seed: int = field(default=0, metadata=doc("Of scenes, noise and minibatches.", minimum=0))
    save_every: int = field(default=1, metadata=doc("Iterations between saved states.", minimum=1))
    description: str = field(default="", metadata=doc("For humans."))
    source: str = field(default="<recipe>", compare=False, metadata=doc("", internal=True))

    def start_folder(self) -> Path:
        """Where the checkpoint to go on from lies.

        Raises:
            UserError: there is none, or it is not named.
        """
        if self.start is None:
            raise UserError(f"{self.source}: start: name the checkpoint to go on from (--from)")
        return resolve_checkpoint(self.start)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for logs and checkpoints."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        del plain["source"]
        return plain

    def scale(self, iteration: int) -> float:
        """Share of the rates that an iteration learns with."""
        return 1.0 if self.rates.shape == "constant" else 1.0 - iteration / self.iterations

    @property
    def identity(self) -> dict[str, Any]:
        """Every choice that changes what is learnt, but not where it runs and for how long."""
        plain = self.to_json()
        del plain["start"]  # its weights tell better than its name
        where = ("workers", "workers_backend", "threads", "save_every", "tensorboard", "description")
        for key in ("evaluate", *where, *(["iterations"] if self.rates.shape == "constant" else [])):
            del plain[key]
        return plain


def load_rl_recipe(path: str | Path, changes: Sequence[str] = ()) -> RlRecipe:
    """Reads a recipe.

    Args:
        path: of the YAML.
        changes: ``a.b=value``, as given to ``--set``.

    Raises:
        UserError: with file, line, key and the fix.
    """
    recipe, parser = read_recipe(RlRecipe, path, changes)
    if not recipe.worlds:
        parser.fail("worlds", "no worlds to learn in", "name a robot: [{embodiment: aloha}]")
    names = [spec.embodiment for spec in recipe.worlds]
    for index, name in enumerate(names):
        if name in names[:index]:
            parser.fail(f"worlds[{index}].embodiment", f"'{name}' is there already", "name each robot once")
    if not any((recipe.rates.vision, recipe.rates.language, recipe.rates.decoder)):
        parser.fail("rates", "every part of the policy is frozen", "give at least one part a rate")
    return recipe
