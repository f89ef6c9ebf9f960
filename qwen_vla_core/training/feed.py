"""From samples to the tensors of one optimizer step.

What a step consists of, noise and flow times included, is a pure function of the recipe and the step: every sample
brings its own seed. Ranks, workers and micro-batches only change who does it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from qwen_vla_core.actions.normalize import Quantiles
from qwen_vla_core.data.contract import DataContract
from qwen_vla_core.data.dataset import ActionDataset
from qwen_vla_core.data.joined import JoinedRows
from qwen_vla_core.data.loader import MixtureLoader
from qwen_vla_core.data.mixture import Mixture
from qwen_vla_core.data.samples import ActionSample, Sample, TextSample, plain_pictures
from qwen_vla_core.data.statistics import dataset_statistics, default_cache
from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.model.batching import ActionRow, Row, collate_rows, kind_of
from qwen_vla_core.model.flow import FlowConfig, sample_tau
from qwen_vla_core.model.policy import QwenVLA, Stats
from qwen_vla_core.model.processor import Sample as Conversation

_TAU_KEYS = ("noise", "tau", "prefix")


@dataclass(frozen=True)
class StepBatch:
    """What one rank does in one optimizer step.

    Attributes:
        step: its number.
        parts: micro-batches as ``QwenVLA.forward`` takes them; ``noise``, ``tau`` and ``prefix`` are its arguments.
        samples: rows in them.
        tokens: tokens in them, without padding.
    """

    step: int
    parts: tuple[dict[str, torch.Tensor], ...]
    samples: int
    tokens: int


@dataclass(frozen=True)
class FeedOptions:
    """How samples become micro-batches.

    Attributes:
        flow: where flow times come from.
        draws: noise draws per observation.
        prefix: longest prefix of actions that is given; 0 = none.
        sequence_steps: longer sequences are cut.
        together: one padded micro-batch instead of one per robot. Padding costs time, but every rank then does the same
            number of passes, which sharded models need.
        accumulate: each micro-batch is cut into this many.
    """

    flow: FlowConfig
    draws: int = 4
    prefix: int = 0
    sequence_steps: int = 512
    together: bool = False
    accumulate: int = 1


class Feed:
    """Batches of a mixture for a policy."""

    def __init__(
        self, loader: MixtureLoader, policy: QwenVLA, stats: Mapping[str, Stats], options: FeedOptions
    ) -> None:
        """
        Args:
            loader: of the mixture.
            policy: its processor and configuration; its robots' view tokens must be known to it.
            stats: embodiment name (of the mixture) → quantiles.
            options: how.
        """
        self.loader, self.policy, self.stats, self.options = loader, policy, stats, options
        self.contracts: dict[str, DataContract] = {
            source.embodiment: source.actions.contract
            for source in loader.mixture.sources
            if source.conversations is None
        }

    def steps(self, first: int, count: int) -> Iterator[StepBatch]:
        """Batches ``first`` … ``first + count - 1``."""
        for batch in self.loader.batches(first, count):
            yield self.make(batch.step, batch.samples)

    def make(self, step: int, samples: Sequence[Sample]) -> StepBatch:
        """One rank's samples as micro-batches."""
        parts = []
        for group in self._groups(samples):
            size = -(-len(group) // self.options.accumulate)
            parts += [self._part(group[i : i + size]) for i in range(0, len(group), size)]
        tokens = sum(int(part["attention_mask"].sum()) for part in parts)
        return StepBatch(step, tuple(parts), len(samples), tokens)

    def _groups(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        if self.options.together:
            return [list(samples)]
        groups: dict[str, list[Sample]] = {}
        for sample in samples:
            # Conversations about all views of a robot are as long as its prompts; others are padded to the longest.
            key = sample.embodiment if isinstance(sample, ActionSample) else " ".join(("text", *sample.images))
            groups.setdefault(key, []).append(sample)
        return list(groups.values())

    def _part(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        batch = collate_rows(self.policy.processor, self.policy.config, [self._row(sample) for sample in samples])
        acting = [sample for sample in samples if isinstance(sample, ActionSample)]
        if acting:
            batch |= draw_flow(acting, batch["actions"].shape[1:], self.options)
        return batch

    def _row(self, sample: Sample) -> Row:
        if isinstance(sample, TextSample):
            (question, answer), *rest = sample.turns
            return Conversation(plain_pictures(sample.images), question, (("", answer), *rest))
        contract, stats = self.contracts[sample.embodiment], self.stats[sample.embodiment]
        steps = self.options.sequence_steps
        return ActionRow(
            images=plain_pictures(sample.images),
            prompt=self.contracts[sample.told or sample.embodiment].prompt_for(sample.instruction),
            state=stats.state.normalize(sample.state) if len(sample.state) else None,
            channels=len(contract.action_channels),
            actions_hc=stats.action.normalize(sample.actions_hc[:steps]),
            step_mask_h=sample.step_mask_h[:steps],
            turns=sample.turns,
            kind=kind_of(contract.convention),
        )


def draw_flow(
    samples: Sequence[ActionSample], shape_hk: Sequence[int], options: FeedOptions
) -> dict[str, torch.Tensor]:
    """Noise (B·draws, H, K), flow times (B·draws, 1) and, where asked, prefixes (B·draws,), from each sample's seed."""
    horizon, channels = shape_hk
    noise = torch.zeros(len(samples), options.draws, horizon, channels)
    tau = torch.zeros(len(samples), options.draws)
    prefix = torch.zeros(len(samples), options.draws, dtype=torch.long)
    generator = torch.Generator()
    for row, sample in enumerate(samples):
        generator.manual_seed(sample.seed)
        steps = min(len(sample.actions_hc), options.sequence_steps)
        noise[row, :, :steps] = torch.randn(options.draws, steps, channels, generator=generator)
        tau[row] = sample_tau(options.draws, options.flow, generator)
        if options.prefix:
            most = min(options.prefix, steps - 1)
            prefix[row] = torch.randint(most + 1, (options.draws,), generator=generator)
    drawn = {"noise": noise.flatten(0, 1), "tau": tau.flatten()[:, None]}
    return drawn | {"prefix": prefix.flatten()} if options.prefix else drawn


def forward_arguments(part: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A micro-batch → the batch and the keyword arguments of ``QwenVLA.forward``."""
    batch = {key: value for key, value in part.items() if key not in _TAU_KEYS}
    options: dict[str, Any] = {key: value for key, value in part.items() if key in _TAU_KEYS}
    if "noise" in part:
        options["repeat"] = len(part["noise"]) // len(part["actions"])
    return batch, options


def mixture_stats(
    mixture: Mixture, known: Mapping[str, Stats], workers: int | None = None, progress: bool = True
) -> dict[str, Stats]:
    """Quantiles of every embodiment of a mixture: those already ``known``, else of all its datasets together.

    The paper normalises per dataset [P]; here datasets with one contract are one robot, which has one set of quantiles
    at run time [O].
    """
    stats = dict(known)
    by_robot: dict[str, list[int]] = {}
    for number, source in enumerate(mixture.sources):
        if source.conversations is None and source.embodiment not in stats:
            by_robot.setdefault(source.embodiment, []).append(number)
    for name, numbers in by_robot.items():
        datasets = [mixture.sources[number].actions for number in numbers]
        joined = datasets[0] if len(datasets) == 1 else JoinedRows(name, datasets)
        found = dataset_statistics(cast(ActionDataset, joined), workers, progress, cache=default_cache())
        stats[name] = Stats(found.action_quantiles, found.state_quantiles)
    return stats


def hidden(stats: Stats, robot: Embodiment) -> Stats:
    """Statistics in which the channels of state groups with ``shown: false`` count as constant.

    That way every normalisation, in training and on the robot, hides them, and the checkpoint says so.
    """
    unseen = {channel for group in robot.state if not group.shown for channel in group.channels}
    state = stats.state
    q99 = tuple(
        low if name in unseen else high for name, low, high in zip(state.names, state.q01, state.q99, strict=True)
    )
    return Stats(stats.action, Quantiles(state.q01, q99, state.names))


def sentences(mixture: Mixture, loader: MixtureLoader, steps: int = 40) -> list[str]:
    """Every instruction of a mixture's datasets, and questions and answers of its first batches, for a tokenizer."""
    found: set[str] = set()
    for source in mixture.sources:
        if source.conversations is None:
            found |= {source.actions.contract.prompt_for(task) for task in source.actions.tasks[:500]}
    for step in range(steps):
        for sample in loader.batch(step).samples:
            for turn in sample.turns:
                found |= set(turn)
    return sorted(text for text in found if text)
