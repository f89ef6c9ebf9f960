"""From demonstrations to a checkpoint: a stage 0 that teaches to see and to answer, then behaviour cloning.

The simplest honest loop: four stages, one optimizer each, averaged weights, all repeatable from the recipe's seed. An
interrupted run goes on from its last saved state and sees the samples that it would have seen.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.model.attention import use_float32_attention
from qwen_vla_core.model.checkpoint import save_checkpoint
from qwen_vla_core.model.presets import build_tiny
from qwen_vla_core.training.demonstrations import Demonstrations
from qwen_vla_core.training.first_state import Average, read_progress, restore_state, save_state
from qwen_vla_core.training.plot import plot_losses
from qwen_vla_core.training.recipe import Recipe
from qwen_vla_core.training.vision_probe import VisionProbe, token_grid

LOG_EVERY = 20
Losses = dict[str, torch.Tensor]


def train(recipe: Recipe, out: Path, checkpoint: Path, progress: bool = True) -> dict[str, Any]:
    """Runs or resumes a recipe and writes the checkpoint.

    Args:
        recipe: what to train on and how.
        out: folder of the run: training state, ``log.jsonl``, ``loss.png``.
        checkpoint: folder of the resulting checkpoint.
        progress: whether to draw progress bars.

    Returns:
        Final losses, seconds, steps; for ``--json``.

    Raises:
        UserError: no demonstrations, a damaged state, or a loss that is not finite (the last good state stays).
    """
    if recipe.preset != "tiny":
        raise UserError(f"recipe: preset {recipe.preset!r} is not trained by this loop; use 'tiny'")
    torch.set_num_threads(recipe.threads)
    out.mkdir(parents=True, exist_ok=True)
    robot = load_embodiment(recipe.embodiment)
    data = Demonstrations.load(recipe.data, robot, progress=progress)
    policy = build_tiny(
        [robot],
        {robot.name: data.stats()},
        seed=recipe.seed,
        extra_text=data.sentences(),
        model_type=recipe.backbone,
        phrases=(),  # as the shipped checkpoint was trained
    )
    policy.train()
    use_float32_attention(policy.backbone.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        probe = VisionProbe(policy)
    learner = nn.ModuleDict({"policy": policy, "probe": probe})
    average = Average(learner, recipe.ema_decay)
    result: dict[str, Any] = {"episodes": len(data), "frames": data.frame_count}

    def export(result: dict[str, Any]) -> None:
        """Writes the averaged weights as a checkpoint, and the curves so far."""
        with average.applied_to(learner):
            save_checkpoint(policy, checkpoint, dtype=torch.float16, provenance=_provenance(recipe, result))
        if (out / "log.jsonl").exists():
            plot_losses(out / "log.jsonl", out / "loss.png")

    cells = token_grid(policy, *data.picture_size)

    def vision(step: int) -> Losses:
        rng = np.random.default_rng([recipe.seed, 0, step])
        losses: Losses = probe(policy, data.cells(rng, recipe.vision.batch_size, cells))
        return losses

    def grounding(step: int) -> Losses:
        rng = np.random.default_rng([recipe.seed, 1, step])
        batch = policy.processor.collate(data.questions(rng, recipe.grounding.batch_size, recipe.grounding.questions))
        return {"text": policy.text_loss(batch)}

    def instruction(step: int) -> Losses:
        rng = np.random.default_rng([recipe.seed, 2, step])
        stage = recipe.instruction
        observations, turns = data.instructions(rng, stage.batch_size, stage.questions)
        return {"text": policy.loss(policy.collate(observations, robot.name, turns=turns))["text"]}

    def cloning(step: int) -> Losses:
        rng = np.random.default_rng([recipe.seed, 3, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        # Every other batch does without the further questions: shorter sequences, and half the answers are enough.
        asked = recipe.policy.questions if step % 2 else 0
        drawn = data.chunks(rng, recipe.policy.batch_size, asked)
        batch = policy.collate(drawn.observations, robot.name, drawn.actions_bhc, drawn.step_mask_bh, drawn.turns)
        losses = policy.loss(batch, repeat=recipe.policy.noise_draws, generator=generator)
        return {"action": losses["action"], "text": recipe.policy.text_weight * losses["text"]}

    rates = recipe.policy.backbone_learning_rate, recipe.policy.learning_rate
    stages: list[tuple[str, int, Callable[[int], Losses], list[tuple[nn.Module, float]]]] = [
        (
            "vision",
            recipe.vision.steps,
            vision,
            [(policy.backbone.visual, recipe.vision.learning_rate), (probe, recipe.vision.learning_rate)],
        ),
        ("grounding", recipe.grounding.steps, grounding, [(policy.backbone, recipe.grounding.learning_rate)]),
        ("instruction", recipe.instruction.steps, instruction, [(policy.backbone, recipe.instruction.learning_rate)]),
        ("policy", recipe.policy.steps, cloning, [(policy.backbone, rates[0]), (policy.decoder, rates[1])]),
    ]
    for number, (name, steps, losses_of, groups) in enumerate(stages):
        loop = _Loop(
            recipe,
            out,
            learner,
            average,
            _optimizer(recipe, groups),
            name,
            number,
            steps,
            export,
            number == len(stages) - 1,
        )
        result[name] = loop.run(losses_of, progress)
    export(result)
    return result


class _Loop:
    """One stage: optimizer steps with logging, averaging, saving and resuming."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        learner: nn.Module,
        average: Average,
        optimizer: torch.optim.AdamW,
        name: str,
        number: int,
        steps: int,
        export: Callable[[dict[str, Any]], None],
        decay: bool,
    ) -> None:
        self.recipe, self.out, self.learner, self.average = recipe, out, learner, average
        self.optimizer, self.name, self.number, self.steps = optimizer, name, number, steps
        self.export = export
        self.state_file = out / "training_state.safetensors"
        warmup = max(1, recipe.warmup_steps)
        # Only the last stage cools down: earlier ones end in the middle of learning, not at rest.
        cooldown = max(1, round(recipe.cooldown * steps)) if decay else 0
        self.schedule = lambda step: min(1.0, (step + 1) / warmup, (steps - step) / cooldown if cooldown else 1.0)
        self.peaks = [group["lr"] for group in optimizer.param_groups]

    def run(self, losses_of: Callable[[int], Losses], progress: bool) -> dict[str, Any]:
        """Runs the stage from wherever the run's state says it is."""
        first = self._resume()
        began, recent = time.monotonic(), dict[str, float]()
        bar = tqdm(range(first, self.steps), desc=self.name, initial=first, total=self.steps, disable=not progress)
        for step in bar:
            recent = self._step(step, losses_of, recent)
            if step % LOG_EVERY == 0:
                bar.set_postfix({key: f"{value:.4f}" for key, value in recent.items()})
                self._log({"stage": self.name, "step": step, **recent})
            if (step + 1) % self.recipe.save_every == 0 or step + 1 == self.steps:
                progressed: dict[str, int | str] = {"stage": self.number, "step": step + 1}
                save_state(self.state_file, self.learner, self.average, self.optimizer, progressed)
                self.export({"stage": self.name, "step": step + 1, **recent})
        return {"steps": self.steps, "seconds": round(time.monotonic() - began, 1), **recent}

    def _resume(self) -> int:
        """First step still to do: 0 in a fresh stage, all of them in a stage that is behind us."""
        progress = read_progress(self.state_file)
        if progress is None or int(progress["stage"]) < self.number:
            return 0
        if int(progress["stage"]) > self.number:
            return self.steps
        restore_state(self.state_file, self.learner, self.average, self.optimizer)
        return min(int(progress["step"]), self.steps)

    def _step(self, step: int, losses_of: Callable[[int], Losses], recent: dict[str, float]) -> dict[str, float]:
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * float(self.schedule(step))
        with torch.autocast("cpu", torch.bfloat16):
            losses = losses_of(step)
        total = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(total):
            raise UserError(
                f"{self.name} step {step}: the loss is not finite; the last good state is {self.state_file}: "
                "lower the recipe's learning rates and run again"
            )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        # This stage's parameters only: the others still hold gradients of the stage before, unless the run was resumed.
        own = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(own, self.recipe.clip_norm)
        self.optimizer.step()
        self.average.update(self.learner, step)
        values = {key: float(value.detach()) for key, value in losses.items()}
        return {key: 0.95 * recent.get(key, value) + 0.05 * value for key, value in values.items()}

    def _log(self, row: dict[str, Any]) -> None:
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def _optimizer(recipe: Recipe, groups: list[tuple[nn.Module, float]]) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95) [X]; matrices decay, vectors do not."""
    parameters: list[dict[str, Any]] = []
    for module, rate in groups:
        matrices = [p for p in module.parameters() if p.ndim >= 2]
        vectors = [p for p in module.parameters() if p.ndim < 2]
        parameters.append({"params": matrices, "lr": rate, "weight_decay": recipe.weight_decay})
        parameters.append({"params": vectors, "lr": rate, "weight_decay": 0.0})
    return torch.optim.AdamW(parameters, betas=(0.9, 0.95), foreach=True)


def _provenance(recipe: Recipe, result: dict[str, Any]) -> dict[str, Any]:
    """What the checkpoint says about its own making."""
    return {"recipe": json.loads(json.dumps(recipe, default=vars)), "result": result, "torch": torch.__version__}
