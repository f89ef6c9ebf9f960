"""What a stage would do, before it does it: who trains at which rate, memory, samples, time. For ``--dry-run``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qwen_vla_core.data.mixture_recipe import MixtureRecipe
from qwen_vla_core.data.sampling import Quota
from qwen_vla_core.model.policy import QwenVLA
from qwen_vla_core.training.flops import FlopModel, Work
from qwen_vla_core.training.memory import Memory, estimate_memory
from qwen_vla_core.training.optim import PARTS, part_of
from qwen_vla_core.training.peak import Peak, utilisation
from qwen_vla_core.training.stage_recipe import NOTHING_TWICE, Recompute


@dataclass(frozen=True)
class Group:
    """One part of the policy.

    Attributes:
        name: ``vision``, ``language`` or ``decoder``.
        parameters: all of it; a number that two parts share counts once.
        trained: what gets gradients: nothing of a frozen part, and with LoRA the adapters alone.
        rate: peak learning rate.
    """

    name: str
    parameters: int
    trained: int
    rate: float


@dataclass(frozen=True)
class Family:
    """One family of the mixture.

    Attributes:
        name: as in the recipe.
        share: of every minibatch.
        per_step: fewest and most samples in a step.
        total: samples in the whole stage.
    """

    name: str
    share: float
    per_step: tuple[int, int]
    total: int


@dataclass(frozen=True)
class Timing:
    """What was measured.

    Attributes:
        seconds_per_step: median of the timed steps.
        steps: how many were timed.
    """

    seconds_per_step: float
    steps: int


@dataclass(frozen=True)
class Plan:
    """The answer to ``--dry-run``.

    Attributes:
        stage: its name.
        steps: optimizer steps.
        batch_size: samples per step over all ranks.
        groups: parts with rates.
        families: of the mixture.
        memory: of one rank.
        flops_per_step: model FLOPs of one step on one rank; None without a batch.
        tokens_per_step: of one step on one rank, padding left out; None without a batch.
        timing: None where no step could be timed.
        mfu: of the timed steps; None on a CPU.
    """

    stage: str
    steps: int
    batch_size: int
    groups: tuple[Group, ...]
    families: tuple[Family, ...]
    memory: Memory
    flops_per_step: int | None
    tokens_per_step: int | None
    timing: Timing | None
    mfu: float | None

    @property
    def eta_s(self) -> float | None:
        """Seconds for all steps at the measured speed; None where nothing was measured."""
        return None if self.timing is None else self.steps * self.timing.seconds_per_step

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "memory": self.memory.to_json(), "eta_s": self.eta_s}

    def __str__(self) -> str:
        lines = [f"{self.stage}: {self.steps:,} steps of {self.batch_size} samples", ""]
        lines.append(f"{'part':<12}{'parameters':>16}{'trained':>16}{'peak rate':>12}")
        for group in self.groups:
            rate = f"{group.rate:.3g}" if group.trained else "frozen"
            lines.append(f"{group.name:<12}{group.parameters:>16,}{group.trained:>16,}{rate:>12}")
        lines += ["", f"{'family':<20}{'share':>8}{'per step':>12}{'in all':>14}"]
        for family in self.families:
            low, high = family.per_step
            per_step = str(low) if low == high else f"{low}-{high}"
            lines.append(f"{family.name:<20}{family.share:>8.1%}{per_step:>12}{family.total:>14,}")
        memory = self.memory
        lines += ["", f"memory of one rank, estimated: {_bytes(memory.peak)}"]
        parts = asdict(memory)
        lines.append("  " + ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items() if size))
        if self.flops_per_step is not None:
            lines.append(f"one step of one rank: {self.flops_per_step:.3g} FLOPs, {self.tokens_per_step:,} tokens")
        if self.timing is not None and self.eta_s is not None:
            used = "" if self.mfu is None else f", {self.mfu:.0%} of the device's peak"
            lines.append(f"time: {_duration(self.eta_s)} at {self.timing.seconds_per_step:.3g} s a step{used}")
        else:
            lines.append("time: not measured")
        return "\n".join(lines)


def describe(
    policy: QwenVLA,
    *,
    stage: str,
    rates: Mapping[str, float],
    steps: int,
    mixture: MixtureRecipe,
    works: Sequence[Work] = (),
    precision: str = "bf16",
    recompute: Recompute = NOTHING_TWICE,
    average: bool = True,
    ranks: int = 1,
    sharded: bool = False,
    timed: Callable[[], float] | None = None,
    timed_steps: int = 3,
    peak: Peak | None = None,
) -> Plan:
    """Collects the plan of a stage.

    Args:
        policy: with ``requires_grad`` as it will be trained, checkpointed and compiled or not, but not sharded; on the
            meta device too.
        stage: its name.
        rates: part → peak learning rate; a part without one counts as frozen.
        steps: optimizer steps.
        mixture: its data recipe.
        works: micro-batches of one step of one rank, from ``flops.work_of``.
        precision: ``bf16`` or ``fp32``.
        recompute: shares of the layers with activation checkpointing.
        average: whether averaged weights are kept.
        ranks: how many there will be.
        sharded: FSDP2.
        timed: does one real step and returns its seconds, see ``time_step``; called after everything else, so that it
            may change the policy. None: no time is estimated.
        timed_steps: how often it is called, beside a first one that warms up.
        peak: of the device, for its utilisation.
    """
    model = FlopModel.of(policy)
    memory = estimate_memory(policy, works, precision, recompute, average, ranks, sharded)
    groups = tuple(_groups(policy, rates))
    flops = sum(model.total(work) for work in works) if works else None
    timing = None
    if timed is not None:
        timed()
        seconds = sorted(timed() for _ in range(timed_steps))
        timing = Timing(seconds[len(seconds) // 2], timed_steps)
    used = utilisation(flops, timing.seconds_per_step, peak) if flops and timing else None
    return Plan(
        stage=stage,
        steps=steps,
        batch_size=mixture.batch_size,
        groups=groups,
        families=tuple(family_samples(mixture, steps)),
        memory=memory,
        flops_per_step=flops,
        tokens_per_step=sum(work.tokens for work in works) if works else None,
        timing=timing,
        mfu=used,
    )


def family_samples(recipe: MixtureRecipe, steps: int) -> Iterable[Family]:
    """How many samples of each family ``steps`` minibatches hold, exactly: the quotas that training will draw."""
    quota = Quota(recipe.weights, recipe.batch_size)
    counts = [quota.counts(step) for step in range(steps)]
    for family, share, drawn in zip(recipe.families, recipe.shares, zip(*counts, strict=True), strict=True):
        yield Family(family.name, share, (min(drawn), max(drawn)), sum(drawn))


def time_step(step: Callable[[], object]) -> float:
    """Seconds of one call, with the work it left to a GPU."""
    import torch

    began = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _groups(policy: QwenVLA, rates: Mapping[str, float]) -> Iterable[Group]:
    for name in PARTS:
        rate = float(rates.get(name, 0.0))
        own = [parameter for key, parameter in policy.named_parameters() if part_of(key) == name]
        trained = sum(p.numel() for p in own if p.requires_grad) if rate else 0
        yield Group(name, sum(p.numel() for p in own), trained, rate)


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
