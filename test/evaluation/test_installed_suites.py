"""The same adapters against the simulators themselves, where they are installed (docs/suites.md says how).

One reset, a few steps and a picture each: what the simulator gives has to be what the embodiment YAML says. SimplerEnv
runs with stand-in assets, so that only its package is needed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from simpler_assets import write_assets

from qwen_vla_core.evaluation.closed_loop import observe
from qwen_vla_core.evaluation.suites import make_suite
from qwen_vla_core.evaluation.suites.external import ExternalWorld

STEPS = 4


@pytest.mark.parametrize("name", ["libero", "simpler_widowx", "robotwin", "domino", "robocasa_gr1", "r2r", "rxr"])
def test_a_world_of_the_real_simulator(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = make_suite(name)
    if name == "simpler_widowx":  # read when mani_skill is imported, which nothing has done yet
        write_assets(tmp_path)
        monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path))
    missing = suite.missing()
    if missing:
        pytest.skip(f"not installed: {missing}")
    trial = next(t for t in suite.trials(1, 0) if t.task in ("spoon_on_towel", suite.tasks[0]))
    world = suite.make_world(trial)
    try:
        assert isinstance(world, ExternalWorld)
        world.reset(trial.seed, trial.instruction)
        first = observe(world)
        assert first.instruction and not world.ended()
        assert np.isfinite(first.state).all() and len(first.state) == len(world.embodiment.state_channels)
        for view, image in first.images.items():
            assert image.std() > 0, view  # not one colour
        upper = np.concatenate([group.limits.upper for group in world.embodiment.actions])
        for _ in range(STEPS):
            world.step(np.where(world.held_c, 0.3 * upper, world.command()))
        assert world.time_s == pytest.approx(STEPS / world.control_hz)
        moved = np.abs(world.state() - first.state).max()
        assert moved > 1e-4 or not world.held_c.any()  # displacements have moved the hand
        assert set(world.metrics()) == set(suite.metrics)
        world.reset(trial.seed, trial.instruction)
        np.testing.assert_allclose(world.state(), first.state, atol=1e-3)  # the same trial is the same scene
    finally:
        world.close()
