"""Worlds in this process, in spawned processes and as Ray actors obey alike; what goes wrong there is said here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reach_world import ReachWorld, make_broken, make_reach

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.closed_loop import observe, run_episode
from qwen_vla_core.interfaces import ActionChunk, Observation
from qwen_vla_core.training.world_host import Look, Play, Start, WorldHost, shares
from qwen_vla_core.training.world_pool import WorldPool, _Processes, open_pool

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def no_such_world() -> None:
    raise UserError("simulation.world: 'none' is not a world")


def play(pool: WorldPool, slots: int) -> list[tuple]:
    """Two chunks in every slot, then a new episode in the first; everything that was seen."""
    seen = []
    looks = pool.obey({slot: Start(slot) for slot in range(slots)})
    for fraction in (0.5, 1.0):
        orders = {}
        for slot, look in looks.items():
            assert look.observation is not None
            goal = look.observation.state[2:]
            orders[slot] = Play(np.linspace(0.4, 1, 4)[:, None] * fraction * goal, 0.2)
        looks = pool.obey(orders)
        seen += [flat(slot, look) for slot, look in looks.items()]
    looks = pool.obey({0: Start(99, "go")})
    return [*seen, *(flat(slot, look) for slot, look in looks.items())]


def flat(slot: int, look: Look) -> tuple:
    picture = None if look.observation is None else int(look.observation.images["ego"].sum())
    state = () if look.observation is None else tuple(look.observation.state)
    return slot, picture, state, look.instruction, look.ended, look.success, look.seconds, tuple(look.metrics.items())


def test_worlds_behind_processes_are_the_worlds_of_this_process() -> None:
    with open_pool([make_reach] * 3, 0) as here, open_pool([make_reach] * 3, 2) as there:
        expected = play(here, 3)
        assert expected == play(there, 3)
    assert [entry[5] for entry in expected[3:6]] == [True] * 3 and expected[-1][3] == "go"


def test_local_ray_actors_are_the_worlds_of_this_process() -> None:
    pytest.importorskip("ray")
    script = (
        "import reach_world, test_world_pool as t\n"
        "from qwen_vla_core.training.world_pool import open_pool\n"
        "with open_pool([reach_world.make_reach] * 3, 0) as here:\n"
        "    expected = t.play(here, 3)\n"
        "with open_pool([reach_world.make_reach] * 3, 2, 'ray') as there:\n"
        "    assert t.play(there, 3) == expected\n"
        "print('same')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(HERE), str(ROOT))), "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=HERE, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0 and done.stdout.strip().endswith("same"), done.stderr


def test_a_chunk_is_executed_as_the_evaluation_does_it() -> None:
    class Half:
        """Goes half of what is left."""

        def predict(self, observation: Observation) -> ActionChunk:
            point, goal = observation.state[:2], observation.state[2:]
            way = np.linspace(0.1, 0.5, 4)[:, None] * (goal - point)
            return ActionChunk(point + way, ("x", "y"), observation.stamp_ns, 0.2)

    policy, world = Half(), ReachWorld()
    result = run_episode(world, policy, seed=5, execute_steps=2, timeout_s=world.limit_s)
    host = WorldHost({7: make_reach})
    look, chunks = host.obey({7: Start(5)})[7], 0
    while look.observation is not None and not look.late:
        chunk = policy.predict(look.observation)
        look = host.obey({7: Play(chunk.actions_hc[:2], chunk.period_s)})[7]
        chunks += 1
    assert (chunks, look.success, look.seconds) == (result.inferences, result.success, result.seconds)
    assert look.metrics == result.metrics


def test_the_end_needs_no_picture_and_the_worlds_limit_is_kept() -> None:
    host = WorldHost({0: make_reach})
    first = host.obey({0: Start(3)})[0]
    assert first.observation is not None and first.observation.images["ego"].dtype == np.uint8
    assert np.array_equal(first.observation.images["ego"], observe(host.worlds[0]).images["ego"])
    there = host.obey({0: Play(np.tile(first.observation.state[2:], (4, 1)), 0.2)})[0]
    assert there.ended and there.observation is None and not there.late
    host.obey({0: Start(3)})
    late = host.obey({0: Play(np.zeros((30, 2)), 0.2)})[0]
    assert late.late and not late.ended and late.seconds == pytest.approx(ReachWorld.limit_s)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_a_world_is_said_here(workers: int) -> None:
    with pytest.raises(UserError, match="'none' is not a world"), open_pool([no_such_world], workers) as pool:  # type: ignore[list-item]
        pool.obey({0: Start(0)})
    with (
        pytest.raises((RuntimeError, ArithmeticError), match="the world broke"),
        open_pool([make_broken], workers) as p,
    ):
        p.obey({0: Start(0)})
        p.obey({0: Play(np.zeros((4, 2)), 0.2)})


def test_a_worker_that_dies_is_one_clear_line_and_leaves_no_process() -> None:
    with pytest.raises(UserError, match="a process with worlds died") as caught, open_pool([make_reach] * 2, 2) as pool:
        assert isinstance(pool, _Processes)
        processes = pool.processes
        pool.obey({0: Start(0), 1: Start(1)})
        os.kill(processes[1].pid, signal.SIGKILL)
        pool.obey({0: Start(0), 1: Start(1)})
    assert "\n" not in str(caught.value)
    assert not any(process.is_alive() for process in processes)


def test_slots_are_dealt_in_turn() -> None:
    assert [list(own) for own in shares(5, 2)] == [[0, 2, 4], [1, 3]]
    assert [list(own) for own in shares(2, 4)] == [[0], [1]]


def test_a_process_with_worlds_does_not_import_torch() -> None:
    code = (
        "import sys, qwen_vla_core.training.world_pool, qwen_vla_core.training.rl_page; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
