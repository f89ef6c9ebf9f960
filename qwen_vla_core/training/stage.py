"""What supervised stages begin and end with: policy, data, statistics, checkpoint. Their pages are in ``training/``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from qwen_vla_core.data.loader import MixtureLoader
from qwen_vla_core.data.mixture import Mixture
from qwen_vla_core.data.mixture_recipe import load_mixture
from qwen_vla_core.data.sample_maker import SampleOptions
from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.model.attention import use_float32_attention
from qwen_vla_core.model.checkpoint import load_checkpoint, read_config, resolve_checkpoint, save_checkpoint
from qwen_vla_core.model.flow import FlowConfig
from qwen_vla_core.model.policy import QwenVLA, Stats, loss_counts
from qwen_vla_core.model.presets import PUBLISHED_BACKBONE, build_from_pretrained, build_tiny
from qwen_vla_core.training.distributed import Ranks
from qwen_vla_core.training.feed import Feed, FeedOptions, StepBatch, hidden, mixture_stats, sentences
from qwen_vla_core.training.flops import FlopModel, Work, work_of
from qwen_vla_core.training.lora import apply_lora, has_lora, merged
from qwen_vla_core.training.optim import freeze
from qwen_vla_core.training.parallel import (
    checkpoint_activations,
    compile_blocks,
    parallelise,
    prepare_cuda,
)
from qwen_vla_core.training.stage_recipe import StageRecipe
from qwen_vla_core.training.state import whole_weights

WORDS_STEPS = 40  # batches of each mixture that a new tokenizer reads


@dataclass(frozen=True)
class Stage:
    """A stage that is about to run.

    Attributes:
        recipe: as parsed.
        out: folder of the run.
        ranks: this process among all.
        policy: to be trained, on this rank's device.
        mixture: its data.
        loader: of the mixture.
        stats: embodiment name of the mixture → quantiles.
        progress: whether to draw bars.
    """

    recipe: StageRecipe
    out: Path
    ranks: Ranks
    policy: QwenVLA
    mixture: Mixture
    loader: MixtureLoader
    stats: Mapping[str, Stats]
    progress: bool

    @property
    def provenance(self) -> dict[str, Any]:
        """What a saved state belongs to: every choice, the data, and the weights that the stage began with."""
        recipe = self.recipe
        begin = None if recipe.start is None else read_config(resolve_checkpoint(recipe.start))["weights_id"]
        return {**recipe.choices, "mixture": self.mixture.hash, "start": begin}

    def feed(self, together: bool = False) -> Feed:
        """Batches for the policy; ``together`` as in ``FeedOptions``."""
        loss = self.recipe.loss
        options = FeedOptions(
            flow=replace(self.policy.config.flow, tau=loss.tau),
            draws=loss.draws,
            prefix=loss.prefix,
            sequence_steps=self.recipe.loader.sequence_steps,
            together=together,
            accumulate=self.recipe.optim.accumulate,
        )
        return Feed(self.loader, self.policy, self.stats, options)

    def export(self, folder: Path, result: Mapping[str, Any]) -> None:
        """Writes the weights that the policy has now as a checkpoint; the tiny preset's in half precision.

        All ranks call it; the first one writes.
        """
        sharded = any(isinstance(value, DTensor) for value in self.policy.parameters())
        weights = whole_weights(self.policy) if sharded else None
        if not self.ranks.first:
            return
        provenance = {"recipe": self.recipe.to_json(), "result": dict(result), "torch": torch.__version__}
        dtype = torch.float16 if self.policy.config.preset == "tiny" else torch.bfloat16
        with merged(self.policy) if has_lora(self.policy) else nullcontext():
            save_checkpoint(self.policy, folder, dtype=dtype, provenance=provenance, weights=weights)


@contextmanager
def opened(recipe: StageRecipe, out: Path, ranks: Ranks, progress: bool) -> Iterator[Stage]:
    """Opens the data, loads or builds the policy, and closes the loader at the end.

    Raises:
        UserError: a dataset, checkpoint or embodiment is missing or damaged; a robot of the checkpoint has no data.
    """
    if recipe.start is None and not recipe.embodiments:
        raise UserError(
            f"{recipe.source}: start: name the checkpoint to go on from (--from), or give `embodiments` for a new model"
        )
    if ranks.device.type == "cpu":
        torch.set_num_threads(recipe.scale.threads)
    progress = progress and ranks.first
    mixture = Mixture(load_mixture(recipe.path(recipe.mixture)))
    spec = recipe.loader
    options = SampleOptions(spec.frames, spec.frame_stride, spec.size, spec.jitter, spec.cache_mb)
    with MixtureLoader(mixture, options, spec.workers, spec.prefetch, ranks.rank, ranks.world) as loader:
        robots = [load_embodiment(name) for name in recipe.embodiments]
        policy = _loaded(recipe) if recipe.start is not None else None
        stats = mixture_stats(mixture, policy.stats if policy else {}, progress=progress)
        for robot in robots:
            if robot.name not in stats:
                raise UserError(
                    f"{recipe.source}: embodiments: {robot.name} has no data in {recipe.mixture}, so nothing says how "
                    f"its numbers are normalised; add a dataset with `embodiment: {robot.name}`, or leave it out"
                )
            stats[robot.name] = hidden(stats[robot.name], robot)
        if policy is None:
            policy = _new(recipe, robots, stats, mixture, loader)
        for robot in robots:
            policy.add_embodiment(robot, stats[robot.name])
        policy.processor.add_views([view for source in mixture.sources for view in _views(source.dataset)])
        policy.backbone.resize_vocabulary(len(policy.processor.tokenizer))
        policy.train()
        if ranks.device.type == "cpu" and recipe.scale.precision == "bf16":
            use_float32_attention(policy.backbone.model)
        yield Stage(recipe, out, ranks, policy, mixture, loader, stats, progress)


def _views(dataset: Any) -> tuple[str, ...]:
    contract = getattr(dataset, "contract", None)
    return tuple(contract.views) if contract is not None else tuple(dataset.views)


def _loaded(recipe: StageRecipe) -> QwenVLA:
    """The checkpoint that the stage goes on from; a relative path starts where the command was given."""
    assert recipe.start is not None
    policy = load_checkpoint(resolve_checkpoint(recipe.start), "cpu")
    if recipe.renew is None:
        return policy
    spec, known = recipe.renew, policy.config
    config = replace(known, decoder=replace(known.decoder, context=spec.context), state_mode=spec.state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        renewed = QwenVLA(config, policy.backbone, policy.processor, policy.embodiments, policy.stats)
        renewed.decoder.reset_parameters()
    return renewed


def _new(
    recipe: StageRecipe, robots: list[Any], stats: Mapping[str, Stats], mixture: Mixture, loader: MixtureLoader
) -> QwenVLA:
    spec = recipe.model
    known = {robot.name: stats[robot.name] for robot in robots}
    if spec.preset == "tiny":
        text = set(sentences(mixture, loader, WORDS_STEPS))
        for other in spec.words:
            further = Mixture(load_mixture(recipe.path(other)))
            with MixtureLoader(further) as words:
                text |= set(sentences(further, words, WORDS_STEPS))
        return build_tiny(
            robots,
            known,
            seed=recipe.seed,
            extra_text=sorted(text),
            context=spec.context,
            state_mode=spec.state,
            model_type=spec.backbone,
            flow=FlowConfig(steps=4),
        )
    if spec.pretrained is None:
        raise UserError(
            f"{recipe.source}: model.pretrained: preset {spec.preset} begins from published weights; give a folder or "
            f"hub name, for example {PUBLISHED_BACKBONE[spec.preset]}"
        )
    return build_from_pretrained(spec.pretrained, robots, known, state_mode=spec.state, seed=recipe.seed)


class PolicyTask:
    """Flow matching on actions and next tokens on answers, one backbone pass for both; satisfies ``engine.Task``."""

    def __init__(self, stage: Stage) -> None:
        """Freezes what has no rate and spreads the policy over the ranks."""
        recipe, ranks = stage.recipe, stage.ranks
        if recipe.lora is not None:
            apply_lora(stage.policy, recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout, recipe.seed)
        freeze(stage.policy, vars(recipe.optim.rates))
        self._flops = FlopModel.of(stage.policy)
        self._draws = recipe.loss.draws
        prepare_cuda(stage.policy, ranks, recipe.scale.precision)
        if recipe.scale.compile:
            compile_blocks(stage.policy)
        checkpoint_activations(stage.policy, recipe.scale.recompute)
        self.module: nn.Module = parallelise(stage.policy, recipe.scale.parallel, ranks, recipe.scale.precision)
        self.learner: nn.Module = stage.policy
        self.weights = {"action": recipe.loss.action, "navigation": recipe.loss.navigation, "text": recipe.loss.text}
        self._feed = stage.feed(together=recipe.scale.together)

    def steps(self, first: int, count: int) -> Iterator[StepBatch]:
        """Batches of the mixture."""
        return self._feed.steps(first, count)

    def counts(self, part: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Samples with actions, with waypoints, and answer tokens."""
        return loss_counts(part)

    def work(self, part: Mapping[str, torch.Tensor]) -> Work:
        """What a micro-batch makes the model read and write."""
        return work_of(part, self._draws)

    def flops(self, part: Mapping[str, torch.Tensor]) -> float:
        """Model FLOPs of a micro-batch, forward and backward."""
        return float(self._flops.total(self.work(part)))
