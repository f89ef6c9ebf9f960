"""Closed-loop episodes for reinforcement learning: many worlds at once, one batched forward pass per robot.

All worlds move in lockstep: those that wait for a chunk are answered together, in the order of their slots. What is
drawn – scenes, starting noise, which denoising step is stochastic and how – is a function of (seed, iteration, episode,
decision) alone, so that an iteration can be repeated from the weights it began with, on any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import Observation
from qwen_vla_core.training.actor_critic import ActorCritic, Reading
from qwen_vla_core.training.flow_sde import SdeConfig, Transition
from qwen_vla_core.training.world_host import Look, Order, Play, Start
from qwen_vla_core.training.world_pool import WorldPool

# Training demonstrations count their seeds from 0, evaluations from 100,000: neither meets these.
_FIRST_SEED, _LAST_SEED = 10_000_000, 2**31 - 1


@dataclass(frozen=True)
class Seat:
    """Who acts in the world of one slot, and for how long.

    Attributes:
        robot: embodiment of the policy.
        execute_steps: actions of each chunk that are executed.
        chunks: decisions after which an episode is over, a time-out.
    """

    robot: str
    execute_steps: int
    chunks: int


@dataclass(frozen=True)
class Decision:
    """One chunk: what it was decided from, how it was drawn, how likely that was and what was expected.

    Attributes:
        robot: whose it is.
        executed: steps of it that count.
        seen: the observation, or what the (frozen) backbone made of it.
        index, before_hk, after_hk: the stochastic step, see ``flow_sde.Transition``.
        log_prob: of that step.
        value: before it.
    """

    robot: str
    executed: int
    seen: Observation | Reading
    index: int
    before_hk: torch.Tensor
    after_hk: torch.Tensor
    log_prob: float
    value: float


@dataclass
class Episode:
    """One episode, while it runs and after.

    Attributes:
        slot, number, seed: where, which of the iteration, and its scene.
        seat: who acted.
        decisions: in order.
        success: at the end; the only reward there is [P].
        timed_out: whether only the time ended it; then ``last_value`` is what was still expected.
    """

    slot: int
    number: int
    seed: int
    seat: Seat
    instruction: str = ""
    decisions: list[Decision] = field(default_factory=list)
    success: bool = False
    timed_out: bool = False
    last_value: float = 0.0
    seconds: float = 0.0
    chosen: str | None = None

    @property
    def rewards(self) -> list[float]:
        """Per decision: 1 for the one that brought success, else 0 [P]."""
        return [0.0] * (len(self.decisions) - 1) + [float(self.success)]

    @property
    def values(self) -> list[float]:
        """Expected before each decision."""
        return [decision.value for decision in self.decisions]


def scene_seeds(seed: int, iteration: int, count: int) -> list[int]:
    """Scenes of an iteration's episodes."""
    draws = np.random.default_rng([seed, 4, iteration]).integers(_FIRST_SEED, _LAST_SEED, count)
    return [int(draw) for draw in draws]


@torch.no_grad()
def collect(
    model: ActorCritic,
    pool: WorldPool,
    seats: Sequence[Seat],
    scenes: Sequence[int],
    noise_seed: tuple[int, ...],
    sde: SdeConfig,
    *,
    keep_readings: bool,
    forward_batch: int = 128,
    on_episode: Callable[[Episode], None] | None = None,
) -> list[Episode]:
    """Plays one episode per scene, whole ones only: cutting slow ones short would make failures look rare.

    Args:
        model: in eval mode.
        pool: worlds, one per seat.
        seats: who acts in which slot; slot s plays the scenes s, s + slots, s + 2·slots, …
        scenes: world seeds.
        noise_seed: decides all noise, together with the numbers of episode and decision.
        sde: how chunks are drawn; with noise level 0 they are those of ordinary inference.
        keep_readings: keep the backbone's hidden states instead of the pictures, for a backbone that does not change.
        forward_batch: observations per forward pass at most.
        on_episode: called when an episode is over.

    Returns:
        The episodes, in the order of the scenes.
    """
    table = _Table(model, seats, noise_seed, sde, keep_readings, forward_batch)
    waiting: dict[int, list[int]] = {slot: list(range(slot, len(scenes), len(seats))) for slot in range(len(seats))}
    running: dict[int, Episode] = {}
    done: list[Episode] = []

    def begin(slot: int) -> dict[int, Order]:
        if not waiting[slot]:
            return {}
        number = waiting[slot].pop(0)
        running[slot] = Episode(slot, number, scenes[number], seats[slot])
        return {slot: Start(scenes[number])}

    orders: dict[int, Order] = {}
    for slot in range(len(seats)):
        orders |= begin(slot)
    while orders:
        looks = pool.obey(orders)
        orders = {}
        deciding: list[tuple[Episode, Look]] = []
        late: list[tuple[Episode, Look]] = []
        over: list[Episode] = []
        for slot, look in looks.items():
            episode = running[slot]
            episode.instruction = look.instruction
            if not (look.ended or look.late or len(episode.decisions) >= episode.seat.chunks):
                deciding.append((episode, look))
                continue
            if not episode.decisions:
                raise UserError(f"the world of {episode.seat.robot} is over before it began (seed {episode.seed})")
            episode.success, episode.seconds, episode.chosen = look.success, look.seconds, look.chosen
            episode.timed_out = not look.ended
            if episode.timed_out:
                late.append((episode, look))
            over.append(episode)
            orders |= begin(slot)
        orders |= table.decide(deciding)
        table.value(late)
        for episode in over:
            if on_episode is not None:
                on_episode(episode)
        done += over
    return sorted(done, key=lambda episode: episode.number)


class _Table:
    """Where the policy sits: answers all that wait, robot by robot."""

    def __init__(
        self,
        model: ActorCritic,
        seats: Sequence[Seat],
        noise_seed: tuple[int, ...],
        sde: SdeConfig,
        keep_readings: bool,
        forward_batch: int,
    ) -> None:
        self.model, self.noise_seed, self.sde = model, noise_seed, sde
        self.keep_readings, self.forward_batch = keep_readings, forward_batch
        self.robots = list(dict.fromkeys(seat.robot for seat in seats))

    def decide(self, askers: Sequence[tuple[Episode, Look]]) -> dict[int, Order]:
        """A chunk for each; the decisions are noted in the episodes."""
        orders: dict[int, Order] = {}
        for group in self._groups(askers):
            orders |= self._decide(group)
        return orders

    def value(self, askers: Sequence[tuple[Episode, Look]]) -> None:
        """Notes what is still expected where the time ran out."""
        for group in self._groups(askers):
            observations = [look.observation for _, look in group if look.observation is not None]
            reading = self.model.read(observations, group[0][0].seat.robot)
            for (episode, _), value in zip(group, self.model.expected(reading).tolist(), strict=True):
                episode.last_value = value

    def _groups(self, askers: Sequence[tuple[Episode, Look]]) -> list[list[tuple[Episode, Look]]]:
        """Batches of one robot with one number of executed steps."""
        kinds = dict.fromkeys((episode.seat.robot, episode.seat.execute_steps) for episode, _ in askers)
        groups = []
        for kind in kinds:
            own = [a for a in askers if (a[0].seat.robot, a[0].seat.execute_steps) == kind]
            groups += [own[i : i + self.forward_batch] for i in range(0, len(own), self.forward_batch)]
        return groups

    def _decide(self, group: Sequence[tuple[Episode, Look]]) -> dict[int, Order]:
        model, seat = self.model, group[0][0].seat
        robot = model.policy.embodiment(seat.robot)
        observations = [look.observation for _, look in group if look.observation is not None]
        shape = (2, robot.control.horizon, model.policy.config.decoder.channels)
        noises, indices = [], []
        for episode, _ in group:
            rng = np.random.default_rng([*self.noise_seed, episode.number, len(episode.decisions)])
            indices.append(int(rng.integers(self.sde.steps)))
            noises.append(rng.standard_normal(shape, dtype=np.float32))
        device = model.policy.device
        noise_2bhk = torch.from_numpy(np.stack(noises, 1)).to(device)
        reading = model.read(observations, seat.robot)
        draw = model.act(
            reading, noise_2bhk[0], noise_2bhk[1], torch.tensor(indices, device=device), seat.execute_steps, self.sde
        )
        values, likely = model.expected(reading).tolist(), draw.log_prob.tolist()
        before, after, chunks = draw.transition.before.cpu(), draw.transition.after.cpu(), draw.chunk.cpu()
        rows = reading.rows() if self.keep_readings else []
        orders: dict[int, Order] = {}
        for i, (episode, _) in enumerate(group):
            seen = rows[i] if self.keep_readings else observations[i]
            episode.decisions.append(
                Decision(
                    *(seat.robot, seat.execute_steps, seen, indices[i]),
                    *(before[i].clone(), after[i].clone(), likely[i], values[i]),
                )
            )
            chunk = model.policy.postprocess(chunks[i], observations[i], seat.robot)
            orders[episode.slot] = Play(chunk.actions_hc[: seat.execute_steps], chunk.period_s)
        return orders


def judge_again(model: ActorCritic, decisions: Sequence[Decision], sde: SdeConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) log-probabilities and values of decisions of one robot under the current weights, with gradient."""
    device = model.policy.device
    first = decisions[0]
    readings = [decision.seen for decision in decisions if isinstance(decision.seen, Reading)]
    if len(readings) == len(decisions):
        reading = Reading.stack(readings, device)
    else:
        observations = [decision.seen for decision in decisions if isinstance(decision.seen, Observation)]
        reading = model.read(observations, first.robot)
    transition = Transition(
        torch.tensor([decision.index for decision in decisions], device=device),
        torch.stack([decision.before_hk for decision in decisions]).to(device),
        torch.stack([decision.after_hk for decision in decisions]).to(device),
    )
    return model.judge(reading, transition, first.executed, sde)
