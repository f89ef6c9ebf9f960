"""Keeps points of the robot inside boxes: by forward kinematics of the commanded joints, or by a measured position.

``JointFence`` bounds what is *commanded*. It never accepts a step unless the box holds not only the point after the
step but every point that the joints could reach while stopping from there. Those joint vectors lie in a small box
around the command (``reserves`` of the motion rules), and over it the point is bounded by its Jacobian and by how fast
a Jacobian can change. So the first step of a stop is inside what was accepted before and is always allowed; in between,
a step is scaled back towards it. A point that starts outside may move inwards, and then never out again.

``MeasuredFence`` bounds displacements by where the hand was *measured*: outward speed falls with the room left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qwen_vla_core.embodiment.load import mistake
from qwen_vla_core.embodiment.spec import Embodiment, Workspace
from qwen_vla_core.runtime.kinematics import ChainSet, KinematicsError, SerialChain, find_model, load_chain
from qwen_vla_core.runtime.motion import stopping_speed

SHARES = np.array([0.9, 0.75, 0.6, 0.45, 0.3, 0.15, 0.05])  # of the wish that are tried, the rest being the stop
ALONE = np.array([0.5, 0.15, 0.05, 0.01])  # of one joint's wish, where no share of the whole fits
Blend = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]
SLACK_M = 1e-9
# The hand goes on for about this long at the speed it was told before (state on its way, servo, ramp) [O].
REACTION_S = 0.15


@dataclass(frozen=True)
class Bounded:
    """One box with the chain that moves its point, and the action columns of the chain's joints in chain order."""

    box: Workspace
    chain: SerialChain
    columns: np.ndarray


@dataclass(frozen=True)
class Tried:
    """k steps that were tried: (k, m) bool, (k, m, 3) bounds of every point, (k, c) bool within the other limits."""

    fits: np.ndarray
    low: np.ndarray
    high: np.ndarray
    allowed: np.ndarray

    def good(self, members: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """(k,) bool, the steps that these chains and their columns may make."""
        good: np.ndarray = np.all(self.fits[:, members], axis=1) & np.all(self.allowed[:, columns], axis=1)
        return good

    def first(self, members: np.ndarray, columns: np.ndarray) -> int | None:
        """The first of them."""
        good = self.good(members, columns)
        best = int(np.argmax(good))
        return best if good[best] else None


def load_bounded(embodiment: Embodiment) -> list[Bounded]:
    """Opens the models of all boxes on joint groups.

    Raises:
        EmbodimentError: names file, line and key of what cannot be used.
    """
    bounded = []
    for index, box in enumerate(embodiment.safety.workspace):
        spec = box.kinematics
        if spec is None:
            continue
        try:
            path = find_model(spec.model, embodiment.source_path)
            chain = load_chain(path, spec.tip, spec.base, spec.offset)
            bounded.append(Bounded(box, chain, _columns(embodiment, box, chain)))
        except KinematicsError as error:
            key = f"safety.workspace[{index}].kinematics.{error.key}"
            raise mistake(embodiment, key, error.problem, error.fix) from None
    return bounded


def _columns(embodiment: Embodiment, box: Workspace, chain: SerialChain) -> np.ndarray:
    """(n,) action column of every joint of the chain."""
    assert box.kinematics is not None
    own = next(group for group in embodiment.actions if group.name == box.group)
    channels = box.kinematics.channels or own.channels
    told = {c: n for g in embodiment.actions for c, n in zip(g.channels, g.command.fields or g.channels, strict=True)}
    names = box.kinematics.joints or tuple(told[channel] for channel in channels)
    of_joint = dict(zip(names, channels, strict=True))
    in_chain = [joint.name for joint in chain.joints]
    for column, name in enumerate(names):
        if name not in in_chain:
            problem = f"joint '{name}' is not on the way to '{box.kinematics.tip}' ({', '.join(in_chain)})"
            raise KinematicsError(f"joints[{column}]", problem, "give the model's joint names, one per channel")
    for name in in_chain:
        if name not in of_joint:
            problem = f"joint '{name}' moves '{box.kinematics.tip}', but no channel commands it"
            raise KinematicsError("joints", problem, "add its channel and joint, or choose another base or tip")
    return np.array([embodiment.channels.index(of_joint[name]) for name in in_chain], dtype=np.intp)


class JointFence:
    """The boxes of all joint-commanded points of one robot.

    Attributes:
        columns_c: (c,) bool, the action columns that move some bounded point.
    """

    def __init__(self, embodiment: Embodiment, bounded: Sequence[Bounded], largest_c: np.ndarray) -> None:
        """``largest_c`` (c,) is the largest |command| of every channel."""
        maps = [group.command.map for group in embodiment.actions for _ in group.channels]
        scale, offset = np.array([m.scale for m in maps]), np.array([m.offset for m in maps])
        travel = [np.abs(scale[b.columns]) * largest_c[b.columns] + np.abs(offset[b.columns]) for b in bounded]
        self._chains = ChainSet([b.chain for b in bounded], [list(t) for t in travel])
        m, n = self._chains.count, self._chains.length
        self._column = np.zeros((m, n), dtype=np.intp)
        self._scale, self._offset = np.zeros((m, n)), np.zeros((m, n))  # zero: a joint that pads a short chain
        for i, b in enumerate(bounded):
            own = slice(0, len(b.columns))
            self._column[i, own] = b.columns
            self._scale[i, own], self._offset[i, own] = scale[b.columns], offset[b.columns]
        reach = self._chains.reach
        distal = np.maximum(np.arange(n)[:, None], np.arange(n)[None])  # the farther of two joints bounds the change
        self._change = 0.5 * reach[:, distal]  # (m, n, n)
        self._lower = np.array([b.box.lower for b in bounded])
        self._upper = np.array([b.box.upper for b in bounded])
        self._now_lower, self._now_upper = self._lower.copy(), self._upper.copy()
        # Chains that share a joint must agree on one share of the wish.
        self._party = np.arange(m, dtype=np.int64)
        for i in range(m):
            for j in range(i):
                if np.intersect1d(bounded[i].columns, bounded[j].columns).size:
                    self._party[self._party == self._party[i]] = self._party[j]
        self.columns_c = np.zeros(len(embodiment.channels), bool)
        self._party_columns = {}
        for party in sorted({int(party) for party in self._party}):
            columns = np.zeros(len(embodiment.channels), bool)
            for member, b in enumerate(bounded):
                columns[b.columns] |= self._party[member] == party
            self._party_columns[party] = columns
            self.columns_c |= columns

    def points(self, command_c: np.ndarray) -> np.ndarray:
        """(…, m, 3) where the points are at commands (…, c), metres."""
        return self._chains.forward(command_c[..., self._column] * self._scale + self._offset)[0]

    def reset(self, command_c: np.ndarray) -> None:
        """Begins at rest at ``command_c`` (c,); the boxes grow to hold points that are outside now."""
        here = self.points(command_c)
        self._now_lower = np.minimum(self._lower, here)
        self._now_upper = np.maximum(self._upper, here)

    def confine(
        self,
        position_c: np.ndarray,
        below_c: np.ndarray,
        above_c: np.ndarray,
        blend: Blend,
    ) -> np.ndarray | None:
        """How much of a wished step may be made.

        First the whole wish is scaled. Where not even a twentieth of it fits, joints are tried one by one: at a wall
        the straight way to a good pose may lead outside, and a robot that has been pushed there must come back.

        Args:
            position_c: (c,) the command after the wished step.
            below_c, above_c: (c,) how far a stop from there may go down and up.
            blend: shares (k, c) of the wish → the same three (k, c), and (k, c) bool which are within the other limits;
                called only when the wish does not fit.

        Returns:
            (c,) share 0 … 1 of every channel's wish, the rest being its stop; None: all of it.
        """
        fits, low, high = self._fits(position_c, below_c, above_c)
        if fits.all():
            self._shrink(low, high, np.ones(len(fits), bool))
            return None
        scaled_kc = np.repeat(SHARES[:, None], len(position_c), axis=1)
        shares_c = np.ones(len(position_c))
        found = self._tried(scaled_kc, blend)
        for party, columns in self._party_columns.items():
            members = self._party == party
            if fits[members].all():
                self._shrink(low, high, members)
                continue
            best = found.first(members, columns)
            if best is None:
                shares_c[columns] = self._joint_by_joint(members, columns, blend)[columns]
            else:
                shares_c[columns] = SHARES[best]
                self._shrink(found.low[best], found.high[best], members)
        return shares_c

    def _tried(self, shares_kc: np.ndarray, blend: Blend) -> Tried:
        positions, belows, aboves, allowed = blend(shares_kc)
        return Tried(*self._fits(positions, belows, aboves), allowed)

    def _joint_by_joint(self, members: np.ndarray, columns: np.ndarray, blend: Blend) -> np.ndarray:
        """(c,) shares: of each joint what it may do alone, of all together where that fits, else of the freest."""
        joints = np.flatnonzero(columns)
        alone_kc = np.zeros((len(ALONE) * len(joints), len(columns)))
        alone_kc[np.arange(len(alone_kc)), np.tile(joints, len(ALONE))] = np.repeat(ALONE, len(joints))
        found = self._tried(alone_kc, blend)
        good = found.good(members, columns)
        if not good.any():
            return np.zeros(len(columns))
        together_c = np.max(alone_kc * good[:, None], axis=0)
        at_once = self._tried(together_c[None], blend)
        if at_once.first(members, columns) is not None:
            self._shrink(at_once.low[0], at_once.high[0], members)
            return together_c
        best = int(np.argmax(good))  # the largest shares come first
        self._shrink(found.low[best], found.high[best], members)
        return np.asarray(alone_kc[best])

    def _fits(
        self, position: np.ndarray, below: np.ndarray, above: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(…, m) bool, and (…, m, 3) bounds of every point that a stop may pass."""
        scale = self._scale
        point, jacobian = self._chains.forward(position[..., self._column] * scale + self._offset)
        down, up = -below[..., self._column] * scale, above[..., self._column] * scale
        down, up = np.minimum(down, up), np.maximum(down, up)  # a negative scale swaps them
        rising, falling = np.maximum(jacobian, 0.0), np.minimum(jacobian, 0.0)
        size = np.maximum(-down, up)[..., None]  # (…, m, n, 1)
        bend = (np.swapaxes(size, -1, -2) @ self._change @ size)[..., 0]  # (…, m, 1)
        down, up = down[..., None], up[..., None]
        low = point + (rising @ down + falling @ up)[..., 0] - bend
        high = point + (rising @ up + falling @ down)[..., 0] + bend
        fits = (low >= self._now_lower - SLACK_M) & (high <= self._now_upper + SLACK_M)
        return fits.all(axis=-1), low, high

    def _shrink(self, low: np.ndarray, high: np.ndarray, members: np.ndarray) -> None:
        """A point that started outside does not go back out."""
        inward_low = np.maximum(self._now_lower, np.minimum(self._lower, low))
        inward_high = np.minimum(self._now_upper, np.maximum(self._upper, high))
        self._now_lower = np.where(members[:, None], inward_low, self._now_lower)
        self._now_upper = np.where(members[:, None], inward_high, self._now_upper)


class MeasuredFence:
    """The boxes of all hands that are commanded by displacements and whose position is measured."""

    def __init__(self, embodiment: Embodiment) -> None:
        columns: list[int] = []
        state: list[int] = []
        lower: list[float] = []
        upper: list[float] = []
        braking: list[float] = []
        for box in embodiment.safety.workspace:
            group = next(g for g in embodiment.actions if g.name == box.group)
            if group.kind != "eef_delta" or not box.position:
                continue
            first = embodiment.channels.index(group.channels[0])
            columns += [first, first + 1, first + 2]
            state += [embodiment.state_channels.index(name) for name in box.position]
            lower += box.lower
            upper += box.upper
            braking += [v / embodiment.period_s for v in group.limits.velocity[:3]]  # m/s² of the hand
        self._columns, self._state = np.array(columns, dtype=np.intp), np.array(state, dtype=np.intp)
        self._lower, self._upper, self._braking = np.array(lower), np.array(upper), np.array(braking)
        self._period_s = embodiment.period_s
        self._count = len(embodiment.channels)

    def clip(self, target_c: np.ndarray, state_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Takes out of (c,) displacements what would carry a hand out of its box; (c,) bool says which changed.

        ``state_s``: (s,) measured state; where it is NaN the hand may not move along that axis.
        """
        changed = np.zeros(self._count, bool)
        if not len(self._columns):
            return target_c, changed
        here = state_s[self._state]
        known = np.isfinite(here)
        ahead = np.where(known, np.maximum(self._upper - here, 0.0), 0.0)
        behind = np.where(known, np.maximum(here - self._lower, 0.0), 0.0)
        most = stopping_speed(ahead, self._braking, REACTION_S) * self._period_s
        least = -stopping_speed(behind, self._braking, REACTION_S) * self._period_s
        wanted = target_c[self._columns]
        clipped = np.minimum(np.maximum(wanted, least), most)  # NaN stays NaN: the limiter holds it
        cut = (clipped < wanted) | (clipped > wanted)
        if not cut.any():
            return target_c, changed
        held = target_c.copy()
        held[self._columns] = clipped
        changed[self._columns] = cut
        return held, changed
