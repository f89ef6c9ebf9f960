"""The control law of one robot, without clocks, threads or ROS: time comes in, commands go out.

Modes::

    idle ──start──► holding ◄──► running        holding: no plan, no fresh chunk, or stale state
      ▲               │  ▲ stop    │
      └───────────────┴──┴─────────┘
    any ──estop──► estopped ──reset──► idle
    any ──impossible measured pose, internal error──► fault ──reset──► idle

Nothing is published before every state channel has been measured once: the first command is the measured pose.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from qwen_vla_core.actions.conventions import continue_headings
from qwen_vla_core.embodiment.commanded import commanded_robot
from qwen_vla_core.embodiment.spec import DELTA_KINDS, Embodiment
from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_core.runtime.base_drive import BaseDrive
from qwen_vla_core.runtime.chunk_buffer import ChunkBuffer
from qwen_vla_core.runtime.continuity import DEFAULT_STRATEGY, STRATEGIES, Strategy
from qwen_vla_core.runtime.intake import Intake
from qwen_vla_core.runtime.obstacles import Scan
from qwen_vla_core.runtime.plan_clock import NANO
from qwen_vla_core.runtime.safety import SafetyLimiter
from qwen_vla_core.runtime.tally import Tally
from qwen_vla_core.runtime.targets import Targets
from qwen_vla_core.runtime.watchdog import Verdict, Watchdog
from qwen_vla_core.runtime.workspace import MeasuredFence

Mode = Literal["idle", "running", "holding", "estopped", "fault"]
MILLI = 1_000_000
# A measured pose may lie outside its limits by what the channel covers in this time at its velocity limit (encoder
# offset, soft stops). Beyond that the first command, which must be inside, would be a jump.
START_TOLERANCE_S = 0.1
CLOCK_JUMP_NS = 100 * MILLI
PLAYING = "playing chunks"
SLOWED = "slowed to"  # how the reason begins while the plan is slowed down


def held_channels(embodiment: Embodiment) -> np.ndarray:
    """(c,) bool, True for displacements per period, which are held for it instead of interpolated."""
    return np.array([group.kind in DELTA_KINDS for group in embodiment.actions for _ in group.channels])


@dataclass(frozen=True)
class GroupCommand:
    """One group's command in message units and message order: values, and their rate of change per second."""

    values: np.ndarray
    velocities: np.ndarray


@dataclass(frozen=True)
class ControlOutput:
    """What one tick decided. ``commands`` (group name → command) is empty when nothing may be published."""

    mode: Mode
    reason: str
    commands: Mapping[str, GroupCommand] = field(default_factory=dict)


class ControlLoop:
    """Plays chunks under the safety limits, and holds the robot whenever it should not.

    Every method takes the current ROS time in nanoseconds. Not thread-safe: the node serialises the calls.

    Attributes:
        commanded: the robot as it is commanded; another than ``embodiment`` where hand poses become joints.
        buffer: the plan, in the policy's channels; limiter: the limits, in those that are commanded; both count.
        targets: what turns the first into the second; None where they are the same.
        asked_c: (c,) what the plan last asked of the limiter.
        refused: which channels made chunks be refused, as far as a channel is to blame.
        mode, reason: as of the last tick or request.
        counters: holds, group_timeouts (of a part of the robot), estops, faults, clock_jumps, bad_states,
            chunks_ignored (those sent while not started), slowed (how often the plan was slowed down because a chunk
            was late).
        base: what drives a mobile base, and what stops it before obstacles.
    """

    def __init__(
        self,
        embodiment: Embodiment,
        *,
        strategy: Strategy = STRATEGIES[DEFAULT_STRATEGY],
        simulated: bool = False,
    ) -> None:
        self.embodiment = embodiment
        self.buffer = ChunkBuffer(
            embodiment.channels,
            embodiment.control.horizon,
            embodiment.period_s,
            strategy=strategy,
            patience_s=embodiment.safety.watchdog_ms / 1000,
            held_c=held_channels(embodiment),
        )
        self.commanded = commanded_robot(embodiment)
        self.targets = None if self.commanded is embodiment else Targets(embodiment, self.commanded)
        self.limiter = SafetyLimiter(self.commanded)
        self.base = BaseDrive(self.commanded, self.limiter, simulated)
        self.refused = Tally(embodiment)
        self._intake = Intake(embodiment)
        self._fence = MeasuredFence(embodiment)
        self._watchdog = Watchdog(self.commanded)
        self.mode: Mode = "idle"
        self.reason = "not started"
        self.counters: Counter[str] = Counter()
        self._started = False
        self._seeded = False
        self._restarting = False
        self._last_tick_ns: int | None = None
        self._run_start_ns = 0
        self.asked_c = np.zeros(len(self.commanded.channels))
        self._hold_target_c: np.ndarray | None = None
        self._late_c = np.zeros(len(self.commanded.channels), bool)
        self._late_target_c = np.zeros(len(self.commanded.channels))

        self._state_index = {name: i for i, name in enumerate(embodiment.state_channels)}
        self._state_s = np.full(len(self._state_index), np.nan)
        self._state_stamp_ns: list[int | None] = [None] * len(self._state_index)
        self._state_groups = [
            (group.name, [self._state_index[name] for name in group.channels], int(group.max_age_ms * MILLI))
            for group in embodiment.state
        ]
        is_velocity_c = self.limiter.is_velocity_c
        self._measured_columns = np.array(
            [
                self._state_index.get(name, -1) if not is_velocity_c[i] else -1
                for i, name in enumerate(self.commanded.channels)
            ]
        )
        unmeasured = (self._measured_columns < 0) & ~is_velocity_c
        if unmeasured.any():
            raise ValueError(f"no measured state for {self.commanded.channels[int(np.argmax(unmeasured))]}")
        # An odometer's heading is known up to whole turns: measured headings and those of chunks are counted on.
        self._headings = tuple(
            (group.channels[-1], self._state_index[group.channels[-1]])
            for group in embodiment.actions
            if group.kind == "waypoint" and group.unit == "m,rad"
        )
        self._keeps_command_c = np.array([g.kind == "gripper" for g in self.commanded.actions for _ in g.channels])
        self._slices: list[tuple[str, slice, float, float]] = []
        self._poses = Intake(self.commanded)
        start = 0
        for group in self.commanded.actions:
            stop = start + len(group.channels)
            self._slices.append((group.name, slice(start, stop), group.command.map.scale, group.command.map.offset))
            start = stop

    @property
    def at_rest(self) -> bool:
        """Whether the commands no longer change (or none are published)."""
        return not self._seeded or (self.limiter.at_rest and self.base.at_rest)

    @property
    def position_c(self) -> np.ndarray:
        """(c,) the last command as the policy would say it, in its channels."""
        command = self.limiter.position_c
        return command if self.targets is None else self.targets.plan_now(command)

    # ---- inputs -----------------------------------------------------------------------------------------------------

    def feed(self, chunk: ActionChunk, t_ns: int) -> str | None:
        """Offers a chunk; returns None when it became the plan, else the counted reason for refusing it."""
        if not self._started:
            self.counters["chunks_ignored"] += 1
            return "not_started"
        pose_c = self.position_c.copy() if self._seeded else None
        try:
            chunk = self._intake.take(chunk, self._playing(t_ns, pose_c))
        except ValueError:
            self.buffer.rejections["no_rotation"] += 1
            return "no_rotation"
        reason = self.buffer.push(self._counted_on(chunk), t_ns, pose_c)
        if reason is None:
            self._watchdog.fresh(t_ns, chunk.stamp_ns)
        elif reason == "non_finite":
            broken = ~np.all(np.isfinite(np.asarray(chunk.actions_hc, dtype=np.float64)), axis=0)
            of_channel = dict(zip(chunk.channels, broken, strict=True))
            self.refused.add(reason, np.array([of_channel[name] for name in self.embodiment.channels]))
        return reason

    def _playing(self, t_ns: int, pose_c: np.ndarray | None) -> np.ndarray | None:
        """(c,) what the plan says now, else what is commanded: rotations of a chunk are written close to it."""
        return pose_c if self.buffer.empty else self.buffer.now()

    def _counted_on(self, chunk: ActionChunk) -> ActionChunk:
        """The chunk with its headings within half a turn of the measured one, and of each other."""
        if not self._headings or np.ndim(chunk.actions_hc) != 2:
            return chunk
        from_c = np.zeros(len(chunk.channels))
        columns = []
        for name, state_column in self._headings:
            if name in chunk.channels and np.isfinite(self._state_s[state_column]):
                columns.append(chunk.channels.index(name))
                from_c[columns[-1]] = self._state_s[state_column]
        if len(chunk.channels) != np.shape(chunk.actions_hc)[1]:
            return chunk
        return replace(chunk, actions_hc=continue_headings(chunk.actions_hc, from_c, columns))

    def update_state(self, values: Mapping[str, float], t_ns: int) -> None:
        """Takes measured channels (channel units) received at ``t_ns``; non-finite values are counted and ignored."""
        for name, value in values.items():
            column = self._state_index[name]
            if np.isfinite(value):
                if any(column == heading for _, heading in self._headings) and np.isfinite(self._state_s[column]):
                    before = self._state_s[column]
                    value = before + math.remainder(value - before, 2 * math.pi)
                self._state_s[column] = value
                self._state_stamp_ns[column] = t_ns
            else:
                self.counters["bad_states"] += 1

    def update_scan(self, scan: Scan, t_ns: int) -> None:
        """Takes a laser scan received at ``t_ns``; without an obstacle stop in the YAML it means nothing."""
        self.base.take(scan, t_ns)

    def start(self, t_ns: int) -> tuple[bool, str]:
        """Begins (or resumes) playing chunks observed from now on. Refused while latched."""
        if self.mode in ("estopped", "fault"):
            return False, f"{self.mode} ({self.reason}): call reset first"
        if not self._started:
            self._started = True
            self._restarting = True
            self._new_epoch(t_ns)
            self._enter("holding", "waiting for the first chunk")
        return True, "started"

    def stop(self, t_ns: int) -> tuple[bool, str]:
        """Brings the robot to rest under the limits, then falls silent. A latched stop stays latched."""
        self._started = False
        self._new_epoch(t_ns)
        if self.mode not in ("estopped", "fault"):
            self._enter("idle", "stopped")
        return True, "stopped"

    def estop(self, t_ns: int, reason: str = "emergency stop requested") -> tuple[bool, str]:
        """Stops at full deceleration, holds, and ignores everything until ``reset``."""
        self.counters["estops"] += 1
        self._latch("estopped", reason, t_ns)
        return True, "emergency stop latched"

    def fault(self, reason: str, t_ns: int) -> None:
        """Like ``estop``, for an internal error or an impossible measurement."""
        self.counters["faults"] += 1
        if self.mode != "estopped":
            self._latch("fault", reason, t_ns)

    def reset(self, t_ns: int) -> tuple[bool, str]:
        """Leaves estopped or fault for idle; moving again needs an explicit ``start``."""
        if self.mode in ("estopped", "fault"):
            self._new_epoch(t_ns)
            self._enter("idle", "reset: call start to move")
            return True, "reset; call start to move again"
        return True, "nothing to reset"

    def instruct(self, t_ns: int, hold: bool) -> None:
        """A new instruction: what was observed before it will not be played any more.

        Args:
            t_ns: when it came.
            hold: stop at once; otherwise the plan goes on until the first chunk for the new instruction, or the
                watchdog, ends it.
        """
        if hold:
            self._new_epoch(t_ns)
        else:
            self.buffer.begin_epoch(t_ns)

    # ---- the tick ---------------------------------------------------------------------------------------------------

    def tick(self, t_ns: int) -> ControlOutput:
        """Decides the mode at ``t_ns`` and the next command of every group."""
        dt_s = self._elapsed(t_ns)
        self.base.clear_note()
        if self.mode in ("estopped", "fault", "idle"):
            return self._rest(dt_s)
        problem = self._state_problem(t_ns) or self.base.problem(t_ns)
        if problem is not None:
            self.buffer.hold(t_ns)
            if self.base.tracks:  # by when it may go on, the base has rolled past where the plan stopped
                self.buffer.clear()
            self._hold(problem, None)
            return self._rest(dt_s)
        measured_c = self._measured()
        if self._restarting and self._seeded:
            if not (self.at_rest or self._far_from(measured_c)):
                return self._rest(dt_s)
            self._seeded = False
        self._restarting = False
        if not self._seeded and not self._seed(measured_c, t_ns):
            return ControlOutput(self.mode, self.reason)
        target_c = None
        verdict = self._watchdog.check(t_ns)
        self._time_out(verdict, measured_c, t_ns)
        if verdict.everything:
            self.buffer.clear()
            self._hold(verdict.reason, measured_c)
        else:
            target_c = self.buffer.sample(t_ns)
            if target_c is None:
                self._hold("waiting for the first chunk", measured_c)
        if target_c is None:
            assert self._hold_target_c is not None
            command_c = self.limiter.step(self.base.standing(self._hold_target_c), measured_c, dt_s)
            self.base.stand(measured_c, dt_s)
            return self._output(command_c)
        if self.mode != "running":
            self._run_start_ns = t_ns
            self._enter("running", PLAYING)
            if self.targets is not None:
                self.targets.reset(self.limiter.position_c)
            self.base.begin(measured_c)
        self._tell_whether_late(t_ns)
        target_c, fenced_c = self._fence.clip(target_c, self._state_s)
        soft_ns = self.embodiment.safety.soft_start_s * NANO
        scale = 1.0 if soft_ns <= 0 else min(1.0, (t_ns - self._run_start_ns) / soft_ns)
        if self.targets is not None:
            fenced_c = self.targets.mask(fenced_c)
            target_c = self.targets.step(target_c, self.limiter.position_c, self._late_c, dt_s, scale)
        if verdict.reason:
            self.reason = verdict.reason
            target_c = np.where(self._late_c, self._late_target_c, target_c)
        self.limiter.tally.add("workspace", fenced_c)
        target_c = self.base.clip(target_c, t_ns)
        self.asked_c = target_c
        command_c = self.limiter.step(target_c, measured_c, dt_s, scale)
        self.base.follow(measured_c, self._late_c, dt_s, t_ns)
        if self.base.note:
            self.reason = self.base.note
            self.limiter.tally.add("obstacle", self.base.guarded_c)
        return self._output(command_c)

    def _tell_whether_late(self, t_ns: int) -> None:
        late_ms = self.buffer.late_ms(t_ns)
        if late_ms is None:
            self.reason = PLAYING
            return
        if not self.reason.startswith(SLOWED):
            self.counters["slowed"] += 1
        self.reason = f"{SLOWED} {self.buffer.clock.rate:.0%}: chunk late by {late_ms:.0f} ms"

    # ---- helpers ----------------------------------------------------------------------------------------------------

    def _enter(self, mode: Mode, reason: str) -> None:
        self.mode, self.reason = mode, reason
        self._hold_target_c = None

    def _hold(self, reason: str, measured_c: np.ndarray | None) -> None:
        """Holds; the target is fixed at the first tick it is known, so that gravity sag is not chased.

        Grippers keep their last command instead of the measured opening: the difference is the force that carries an
        object. Velocity-like channels go to zero.
        """
        if self.mode != "holding":
            self.counters["holds"] += 1
            self._enter("holding", reason)
        self.reason = reason
        if measured_c is None:
            self._hold_target_c = None
        elif self._hold_target_c is None:
            self._hold_target_c = np.where(self._late_c, self._late_target_c, self._stay(measured_c))

    def _stay(self, measured_c: np.ndarray) -> np.ndarray:
        """(c,) what a time-out commands: arms where they are, grippers as they were told, velocities zero."""
        target_c = np.where(self._keeps_command_c, self.limiter.position_c, measured_c)
        return np.where(self.limiter.is_velocity_c, 0.0, target_c)

    def _time_out(self, verdict: Verdict, measured_c: np.ndarray, t_ns: int) -> None:
        """Fixes what each group that has just timed out is to hold, so that gravity sag is not chased."""
        newly_c = verdict.late_c & ~self._late_c
        if newly_c.any():
            self._late_target_c = np.where(newly_c, self._stay(measured_c), self._late_target_c)
            self.counters["group_timeouts"] += not verdict.everything
        elif (self._late_c & ~verdict.late_c).any():
            self._run_start_ns = t_ns  # what comes back from its time-out ramps up
        self._late_c = verdict.late_c

    def _rest(self, dt_s: float) -> ControlOutput:
        """Comes to rest. Idle falls silent once at rest, so that a teleoperator or another node may take over."""
        if not self._seeded:
            return ControlOutput(self.mode, self.reason)
        command_c = self.limiter.stop(dt_s)
        self.base.stand(None, dt_s)
        output = self._output(command_c)
        if self.mode == "idle" and self.at_rest:
            self._seeded = False
        return output

    def _seed(self, measured_c: np.ndarray, t_ns: int) -> bool:
        """The first command is the measured pose; refuses to begin far outside the limits."""
        limiter = self.limiter
        pose_c = np.where(limiter.is_velocity_c, 0.0, measured_c)
        outside_c = np.maximum(limiter.lower_c - pose_c, pose_c - limiter.upper_c)
        worst = int(np.argmax(outside_c - START_TOLERANCE_S * limiter.velocity_c))
        if outside_c[worst] > START_TOLERANCE_S * limiter.velocity_c[worst]:
            name = self.commanded.channels[worst]
            low, high = limiter.lower_c[worst], limiter.upper_c[worst]
            self.fault(f"measured {name} = {pose_c[worst]:.3f} is outside its limits {low:g} … {high:g}", t_ns)
            return False
        limiter.reset(pose_c)
        self._seeded = True
        return True

    def _far_from(self, measured_c: np.ndarray) -> bool:
        """Whether someone else has moved the robot: the old command then says nothing about where it is."""
        apart_c = np.abs(self.limiter.position_c - measured_c)[~self.limiter.is_velocity_c]
        return bool((apart_c > self.embodiment.safety.max_jump).any())

    def _output(self, command_c: np.ndarray) -> ControlOutput:
        rate_c = self.limiter.rate_c
        commands = {
            name: GroupCommand(command_c[part] * scale + offset, rate_c[part] * scale)
            for name, part, scale, offset in self._slices
        }
        commands |= {name: GroupCommand(*told) for name, told in self.base.told().items()}
        return ControlOutput(self.mode, self.reason, commands)

    def _measured(self) -> np.ndarray:
        """(c,) measured pose of the action channels; NaN for velocity-like ones."""
        measured_c = np.where(self._measured_columns >= 0, self._state_s[self._measured_columns], np.nan)
        return self._poses.near(measured_c, self.limiter.position_c) if self._seeded else measured_c

    def _state_problem(self, t_ns: int) -> str | None:
        for name, columns, max_age_ns in self._state_groups:
            stamps = [self._state_stamp_ns[column] for column in columns]
            known = [stamp for stamp in stamps if stamp is not None]
            if len(known) < len(stamps):
                return f"no state yet: {name}"
            if t_ns - min(known) > max_age_ns:
                return f"stale state: {name} is {(t_ns - min(known)) / MILLI:.0f} ms old"
        return None

    def _elapsed(self, t_ns: int) -> float:
        """Seconds since the last tick; a clock that went back (restarted simulation) voids all that was stamped."""
        last_ns, self._last_tick_ns = self._last_tick_ns, t_ns
        if last_ns is None:
            return 0.0
        if t_ns < last_ns - CLOCK_JUMP_NS:
            self.counters["clock_jumps"] += 1
            self._state_stamp_ns = [None] * len(self._state_stamp_ns)
            if self.base.guard is not None:
                self.base.guard.forget()
            self._run_start_ns = t_ns
            self._new_epoch(t_ns)
        return max(t_ns - last_ns, 0) / NANO

    def _new_epoch(self, t_ns: int) -> None:
        self.buffer.flush(t_ns)
        self._watchdog.clear()

    def _latch(self, mode: Mode, reason: str, t_ns: int) -> None:
        self._started = False
        self._new_epoch(t_ns)
        self._enter(mode, reason)
