"""How one chunk follows another: strategies by name, each a choice of conditioning and of joining.

* **Conditioning** is the policy's part: what the next inference is told about the plan that goes on meanwhile.
* **Joining** is the controller's part: how a chunk takes over from the plan being played.

Everything is a function of plan time (see ``plan_clock``), so what will be played is known ahead: that rest of the plan
is what the next inference is conditioned on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from qwen_vla_core.errors import UserError

Conditioning = Literal["none", "guided", "guided_jacobian", "prefix"]
Joining = Literal["replace", "blend", "ensemble_act", "ensemble_adaptive"]


@dataclass(frozen=True)
class Strategy:
    """One way to keep a motion continuous over chunks.

    Attributes:
        name: what parameters and flags call it.
        summary: one line for people.
        conditioning: ``none``; ``guided``, ``guided_jacobian``: the sampler is pulled towards the committed actions
            with a soft mask, without and with the decoder's Jacobian; ``prefix``: the frozen actions are given to the
            decoder as already denoised, which it has to be trained for.
        joining: ``replace``: at once; ``blend``: the step fades out; ``ensemble_…``: all chunks that reach this far are
            averaged, weighted by age (ACT) or by how much they agree with the newest (adaptive).
        blend_s: plan seconds of the fade.
    """

    name: str
    summary: str
    conditioning: Conditioning = "none"
    joining: Joining = "blend"
    blend_s: float = 0.2


STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("replace", "the new chunk at once", joining="replace"),
        Strategy("blend", "the step to the new chunk fades out"),
        Strategy("ensemble_act", "average of all chunks, weighted by age (ACT)", joining="ensemble_act"),
        Strategy("ensemble_adaptive", "average, weighted by agreement", joining="ensemble_adaptive"),
        Strategy("guided", "real-time chunking, soft mask, no Jacobian", conditioning="guided"),
        Strategy("guided_jacobian", "real-time chunking, soft mask, as published", conditioning="guided_jacobian"),
        Strategy("trained_prefix", "real-time chunking trained in: clamped prefix", conditioning="prefix"),
    )
}
DEFAULT_STRATEGY = "blend"


def find_strategy(name: str) -> Strategy:
    """The strategy of that name.

    Raises:
        UserError: there is none.
    """
    if name not in STRATEGIES:
        raise UserError(f"strategy '{name}' is unknown; use one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


@dataclass(frozen=True)
class Plan:
    """One chunk placed in plan time.

    Attributes:
        knots_tc: (H + 1, c) where it starts, then its actions.
        origin_s: plan time of its observation; knot i is due ``i`` periods later.
        period_s: between two actions.
        held_c: (c,) bool, True for displacements per period, which are held instead of interpolated.
    """

    knots_tc: np.ndarray
    origin_s: float
    period_s: float
    held_c: np.ndarray

    @property
    def end_s(self) -> float:
        """Plan time of its last action."""
        return self.origin_s + (len(self.knots_tc) - 1) * self.period_s

    def at(self, clock_s: float) -> np.ndarray:
        """(c,) at a plan time: linear between knots, the nearest knot outside; a displacement for its own period."""
        position = min(max((clock_s - self.origin_s) / self.period_s, 0.0), len(self.knots_tc) - 1.0)
        low = min(int(position), len(self.knots_tc) - 2)
        weight = position - low
        if weight < 1e-9:
            value_c = self.knots_tc[low].copy()
        else:
            value_c = self.knots_tc[low] * (1.0 - weight) + self.knots_tc[low + 1] * weight
        if self.held_c.any():
            period = min(int(position + 1e-6) + 1, len(self.knots_tc) - 1)
            value_c[self.held_c] = self.knots_tc[period][self.held_c]
        return value_c


class Joiner(Protocol):
    """Makes one path out of the chunks that have come."""

    def join(self, plan: Plan, clock_s: float, from_c: np.ndarray | None, alone: bool) -> None:
        """Takes a plan over at ``clock_s``.

        Args:
            plan: the new one.
            clock_s: plan time now.
            from_c: (c,) what is commanded now; None where nothing is known.
            alone: it has nothing to do with the plans before it, only ``from_c`` counts.
        """
        ...

    def at(self, clock_s: float) -> np.ndarray:
        """(c,) the joined path at a plan time; only after ``join``."""
        ...


class _Fade:
    """The step between what was commanded and a new plan, fading out linearly in plan time."""

    def __init__(self, blend_s: float) -> None:
        self.blend_s = blend_s
        self._step_c: np.ndarray | None = None
        self._start_s = 0.0

    def begin(self, step_c: np.ndarray | None, clock_s: float) -> None:
        # Finite, but 1e308 apart: nothing worth blending.
        self._step_c = None if step_c is None else np.where(np.isfinite(step_c), step_c, 0.0)
        self._start_s = clock_s

    def add_to(self, value_c: np.ndarray, clock_s: float) -> np.ndarray:
        elapsed_s = clock_s - self._start_s
        if self._step_c is None or self.blend_s <= 0 or elapsed_s >= self.blend_s:
            return value_c
        return value_c + self._step_c * (1.0 - max(elapsed_s, 0.0) / self.blend_s)


class Latest:
    """Plays the newest chunk; with ``blend_s`` > 0 the step to it fades out, with 0 it replaces the old one at once."""

    def __init__(self, blend_s: float) -> None:
        self._fade = _Fade(blend_s)
        self._plan: Plan | None = None

    def join(self, plan: Plan, clock_s: float, from_c: np.ndarray | None, alone: bool) -> None:
        """See ``Joiner``."""
        self._plan = plan
        self._fade.begin(_difference(from_c, plan.at(clock_s)), clock_s)

    def at(self, clock_s: float) -> np.ndarray:
        """See ``Joiner``."""
        assert self._plan is not None
        return self._fade.add_to(self._plan.at(clock_s), clock_s)


class Ensemble:
    """Averages every chunk that reaches a moment, as far as it agrees or by its age.

    The step that a newcomer makes fades out like any other, and a chunk leaves over its last period: the path is
    continuous [O].

    Args:
        weigh: (plans from oldest to newest, plan time) → their weights.
        blend_s: of that fade.
    """

    def __init__(self, weigh: Callable[[list[Plan], float], list[float]], blend_s: float) -> None:
        self._weigh = weigh
        self._fade = _Fade(blend_s)
        self._members: list[Plan] = []  # oldest first
        self._weights: list[float] = []

    def join(self, plan: Plan, clock_s: float, from_c: np.ndarray | None, alone: bool) -> None:
        """See ``Joiner``."""
        kept = [] if alone else [member for member in self._members if member.end_s > clock_s]
        self._members = [*kept, plan]
        self._weights = self._weigh(self._members, clock_s)
        self._fade.begin(_difference(from_c, self._mean(clock_s)), clock_s)

    def at(self, clock_s: float) -> np.ndarray:
        """See ``Joiner``."""
        return self._fade.add_to(self._mean(clock_s), clock_s)

    def _mean(self, clock_s: float) -> np.ndarray:
        newest = self._members[-1]
        total, sum_c = 0.0, np.zeros(len(newest.held_c))
        for plan, weight in zip(self._members, self._weights, strict=True):
            share = weight * min((plan.end_s - clock_s) / plan.period_s, 1.0)
            if share > 0:
                total += share
                sum_c += share * plan.at(clock_s)
        return sum_c / total if total > 1e-9 else newest.at(clock_s)


def weigh_by_age(plans: list[Plan], clock_s: float, decay: float = 0.01) -> list[float]:
    """ACT: exp(−0.01 · i), i = 0 for the oldest [P, arXiv 2304.13705]: nearly equal, the oldest most."""
    return [float(np.exp(-decay * index)) for index in range(len(plans))]


def weigh_by_agreement(plans: list[Plan], clock_s: float, sharpness: float = 2.0) -> list[float]:
    """exp(sharpness · cosine) between the way a plan goes from here and the way the newest goes.

    CogACT compares single actions, which are displacements there [X]. Absolute angles always have a cosine near 1, so
    what is compared is the motion over the rest that two plans share, and the sharpness is higher than its 0.1 [O].
    """
    newest = plans[-1]
    weights = []
    for plan in plans:
        times = clock_s + newest.period_s * np.arange(1, 1 + max(round((plan.end_s - clock_s) / plan.period_s), 1))
        ways = [np.array([p.at(t) for t in times]) for p in (plan, newest)]
        with np.errstate(over="ignore", invalid="ignore"):
            a, b = (np.where(p.held_c, way, way - p.at(clock_s)) for p, way in zip((plan, newest), ways, strict=True))
            product = float(np.linalg.norm(a) * np.linalg.norm(b))
            cosine = float((a * b).sum()) / product if product > 1e-12 else 1.0
        weights.append(float(np.exp(sharpness * (min(max(cosine, -1.0), 1.0) if np.isfinite(cosine) else -1.0))))
    return weights


def make_joiner(strategy: Strategy) -> Joiner:
    """The joiner of a strategy."""
    if strategy.joining == "replace":
        return Latest(0.0)
    if strategy.joining == "blend":
        return Latest(strategy.blend_s)
    return Ensemble(weigh_by_age if strategy.joining == "ensemble_act" else weigh_by_agreement, strategy.blend_s)


def _difference(from_c: np.ndarray | None, to_c: np.ndarray) -> np.ndarray | None:
    if from_c is None:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        return from_c - to_c
