"""Episodes for reinforcement learning: repeatable, whole, executed as in the evaluation, and judged again alike."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from reach_policy import build_policy
from reach_world import EMBODIMENT, ReachWorld, make_reach

from qwen_vla_core.actions.normalize import Quantiles
from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.embodiment.load import parse_embodiment
from qwen_vla_core.evaluation.closed_loop import run_episode
from qwen_vla_core.interfaces import ActionChunk, Observation
from qwen_vla_core.model.policy import QwenVLA, Stats
from qwen_vla_core.model.presets import build_tiny
from qwen_vla_core.sim.registry import make_world, world_class
from qwen_vla_core.training.actor_critic import ActorCritic, Reading
from qwen_vla_core.training.flow_sde import SdeConfig
from qwen_vla_core.training.rollouts import Episode, Seat, collect, judge_again, scene_seeds
from qwen_vla_core.training.world_pool import open_pool

torch.set_num_threads(1)
NOISY, STILL = SdeConfig(4, 0.5), SdeConfig(4, 0.0)
SEAT = Seat("reacher", 4, 2)


def awake_policy() -> QwenVLA:
    """Fresh AdaLN gates are zero and would hide every effect."""
    policy = build_policy()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.decoder.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.fixture(scope="module")
def model() -> ActorCritic:
    model = ActorCritic(awake_policy()).eval()
    with torch.no_grad():
        model.value.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return model


def play(
    model: ActorCritic,
    scenes: Sequence[int] = tuple(range(6)),
    sde: SdeConfig = NOISY,
    seats: Sequence[Seat] = (SEAT,) * 4,
    workers: int = 0,
    noise_seed: tuple[int, ...] = (0, 1),
    keep_readings: bool = True,
) -> list[Episode]:
    with open_pool([make_reach] * len(seats), workers) as pool:
        return collect(model, pool, seats, scenes, noise_seed, sde, keep_readings=keep_readings)


def numbers(episodes: Sequence[Episode]) -> list[tuple]:
    return [
        (e.number, e.seed, e.success, e.timed_out, e.last_value, e.seconds, d.index, d.log_prob, d.value)
        for e in episodes
        for d in e.decisions
    ]


def test_episodes_are_a_function_of_weights_and_seeds_on_any_number_of_workers(model: ActorCritic) -> None:
    first = numbers(play(model))
    assert first == numbers(play(model)) == numbers(play(model, workers=2))
    assert first != numbers(play(model, noise_seed=(0, 2)))
    assert scene_seeds(0, 1, 5) == scene_seeds(0, 1, 5) != scene_seeds(0, 2, 5) != scene_seeds(1, 2, 5)


def test_every_scene_is_played_once_and_to_its_end(model: ActorCritic) -> None:
    episodes = play(model, scenes=tuple(range(10, 17)))
    assert [e.number for e in episodes] == list(range(7)) and [e.seed for e in episodes] == list(range(10, 17))
    for episode in episodes:
        assert episode.instruction == "go to the goal"
        assert episode.success != episode.timed_out
        assert len(episode.decisions) == 2 or episode.success
        assert sum(episode.rewards) == float(episode.success) and len(episode.rewards) == len(episode.values)
        assert (episode.last_value != 0.0) == episode.timed_out


def test_the_worlds_own_limit_is_a_time_out_too(model: ActorCritic) -> None:
    episodes = play(model, sde=STILL, seats=(Seat("reacher", 4, 99),) * 4)
    late = [episode for episode in episodes if not episode.success]
    assert late and all(e.timed_out and e.seconds == pytest.approx(ReachWorld.limit_s) for e in late)


def test_without_exploration_it_is_the_evaluations_episode(model: ActorCritic) -> None:
    """The same noise given to ``predict`` leads through the same chunks to the same end."""
    seat = Seat("reacher", 3, 5)
    [episode] = play(model, scenes=(4,), sde=STILL, seats=(seat,))
    policy = model.policy

    class Same:
        asked = 0

        def predict(self, observation: Observation) -> ActionChunk:
            rng = np.random.default_rng([0, 1, 0, self.asked])
            rng.integers(STILL.steps)
            noise = torch.from_numpy(rng.standard_normal((2, 4, 8), dtype=np.float32))[:1]
            self.asked += 1
            return policy.predict(observation, "reacher", noise=noise)

    result = run_episode(ReachWorld(), Same(), seed=4, execute_steps=3, timeout_s=3.0)
    assert (result.inferences, result.success) == (len(episode.decisions), episode.success)
    assert result.seconds == pytest.approx(episode.seconds)


@pytest.mark.parametrize("keep_readings", [True, False])
def test_judged_again_every_decision_is_as_likely_and_as_good_as_it_was(
    model: ActorCritic, keep_readings: bool
) -> None:
    decisions = [d for e in play(model, keep_readings=keep_readings) for d in e.decisions]
    assert all(isinstance(d.seen, Reading) == keep_readings for d in decisions)
    order = decisions[3:] + decisions[:3]  # other neighbours in the batch
    likely, value = judge_again(model, order, NOISY)
    torch.testing.assert_close(likely, torch.tensor([d.log_prob for d in order]), rtol=0, atol=1e-4)
    torch.testing.assert_close(value, torch.tensor([d.value for d in order]), rtol=0, atol=1e-5)
    assert len({d.index for d in decisions}) > 1


def test_gradients_reach_what_they_should(model: ActorCritic) -> None:
    """The log-probability moves policy and backbone; the value moves its head alone (stop-gradient [P])."""
    decisions = [d for e in play(model, keep_readings=False) for d in e.decisions]
    for part, moved in (("log_prob", {"policy.backbone", "policy.decoder"}), ("value", {"value"})):
        model.zero_grad(set_to_none=True)
        likely, value = judge_again(model, decisions, NOISY)
        (likely if part == "log_prob" else value).sum().backward()
        with_gradient = {
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and parameter.grad.abs().max() > 0
        }
        assert {".".join(name.split(".")[: 2 if name[0] == "p" else 1]) for name in with_gradient} == moved
    model.zero_grad(set_to_none=True)


def test_more_likely_means_a_gradient_step_towards_what_was_done() -> None:
    model = ActorCritic(awake_policy()).eval()
    decisions = [d for e in play(model) for d in e.decisions]
    optimizer = torch.optim.SGD(model.policy.decoder.parameters(), lr=1e-3)
    before, _ = judge_again(model, decisions, NOISY)
    (-before.mean()).backward()
    optimizer.step()
    after, _ = judge_again(model, decisions, NOISY)
    assert after.mean() > before.mean()


def test_several_robots_are_each_answered_in_their_own_batch() -> None:
    policy = awake_policy()
    other = parse_embodiment(EMBODIMENT.replace("name: reacher", "name: hasty").replace("horizon: 4", "horizon: 2"))
    spread = Quantiles((-1.2,) * 2, (1.2,) * 2, other.channels)
    policy.add_embodiment(other, Stats(spread, Quantiles((-1.2,) * 4, (1.2,) * 4, other.state_channels)))
    model = ActorCritic(policy).eval()
    mixed = play(model, seats=(SEAT, Seat("hasty", 2, 3)) * 2)
    assert {e.seat.robot: e.decisions[0].before_hk.shape[0] for e in mixed} == {"reacher": 4, "hasty": 2}
    assert [e.seat.robot for e in mixed] == ["reacher", "hasty"] * 3
    alone = play(model, scenes=(0, 2, 4), seats=(SEAT,) * 2)
    assert [e.seed for e in mixed if e.seat.robot == "reacher"] == [e.seed for e in alone]


def test_the_shipped_robots_act_side_by_side_in_their_worlds() -> None:
    """Three simulators, one policy, one process with worlds; what they see is what their embodiments promise."""
    pytest.importorskip("mujoco")
    robots = [load_embodiment(name) for name in ("aloha", "widowx", "mobile_base")]

    def spread(names: tuple[str, ...]) -> Quantiles:
        return Quantiles((-0.3,) * len(names), (0.3,) * len(names), names)

    stats = {robot.name: Stats(spread(robot.channels), spread(robot.state_channels)) for robot in robots}
    model = ActorCritic(build_tiny(robots, stats)).eval()
    seats = [Seat(robot.name, 2, 2) for robot in robots]
    worlds = [robot.simulation.world for robot in robots if robot.simulation is not None]
    factories = [partial(make_world, world, tasks=world_class(world).task_names[:1]) for world in worlds]
    with open_pool(factories, 1) as pool:
        episodes = collect(model, pool, seats, [1, 2, 3], (0,), NOISY, keep_readings=False)
    for robot, episode in zip(robots, episodes, strict=True):
        assert episode.seat.robot == robot.name and episode.instruction
        assert episode.seconds == pytest.approx(4 * robot.period_s, abs=0.05) or not episode.timed_out
        for decision in episode.decisions:
            assert isinstance(decision.seen, Observation) and set(decision.seen.images) == set(robot.views)
            assert decision.before_hk.shape == (robot.control.horizon, 64)
            assert (decision.after_hk[:, len(robot.channels) :] == 0).all() and np.isfinite(decision.log_prob)


def test_rows_of_a_padded_batch_come_back_as_they_were(model: ActorCritic) -> None:
    observations = [
        Observation({"ego": np.full((32, 32, 3), 9, np.uint8)}, np.zeros(4), text) for text in ("go", "walk to it")
    ]
    with torch.no_grad():
        reading = model.read(observations, "reacher")
        rows = reading.rows()
        assert rows[0].hidden.shape[1] < rows[1].hidden.shape[1]
        again = Reading.stack(rows, torch.device("cpu"))
        torch.testing.assert_close(model.expected(again), model.expected(reading))
        alone = model.read(observations[:1], "reacher")
    torch.testing.assert_close(rows[0].hidden, alone.hidden, rtol=0, atol=1e-4)
