"""One world per test run: building it and its GL context costs more than most tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import qwen_vla_core.sim  # noqa: F401 - before mujoco: it chooses the GL back-end

pytest.importorskip("mujoco")

from qwen_vla_core.sim.worlds.aloha import AlohaWorld


@pytest.fixture(scope="session")
def world() -> Iterator[AlohaWorld]:
    shared = AlohaWorld()
    yield shared
    shared.close()
