"""Two short, real demonstrations, recorded once: one pushed off its path, one not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qwen_vla_core.sim  # noqa: F401 - before mujoco: it chooses the GL back-end

pytest.importorskip("mujoco")

from qwen_vla_core.data.contract import DataContract
from qwen_vla_core.data.lerobot import LeRobotWriter
from qwen_vla_core.embodiment import Embodiment, load_embodiment
from qwen_vla_core.sim.demonstration import EXTRAS, Demonstration
from qwen_vla_core.sim.demos import STORED_SIZE, NoiseConfig, record
from qwen_vla_core.sim.worlds.aloha import AlohaWorld

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def aloha() -> Embodiment:
    return load_embodiment("aloha")


@pytest.fixture(scope="session")
def episodes() -> list[Demonstration]:
    world = AlohaWorld(tasks=("pick",))
    calm = record(world, "aloha", 0)
    pushed = record(world, "aloha", 1, noise=1.0, pushes=NoiseConfig(start=0.5))
    world.close()
    assert calm.success and not calm.rows.perturbed.any() and pushed.rows.perturbed.any()
    return [calm, pushed]


@pytest.fixture(scope="session")
def folder(episodes: list[Demonstration], aloha: Embodiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same demonstrations as a dataset."""
    path = tmp_path_factory.mktemp("demos")
    contract = DataContract.of(aloha)
    views = dict.fromkeys(contract.views, STORED_SIZE)
    with LeRobotWriter(path, contract, family="synthetic", views=views, extras=EXTRAS) as writer:
        for episode in episodes:
            writer.add_episode(episode.rows, [episode.instruction], episode.images, episode.noted)
    return path
