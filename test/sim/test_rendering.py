"""Pictures and torch's compiler get along in one process, whichever comes first."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

CODE = """
import mujoco
from qwen_vla_core.sim.worlds.rendering import Cameras
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><camera name='c' pos='0 0 1'/>"
                                       "<geom type='plane' size='1 1 1' rgba='1 0 0 1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
def picture():
    return Cameras(model, {"view": "c"}).render(data, "view", 32, 32).mean()
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("order", ["print(picture() > 0); import triton", "import triton; print(picture() > 0)"])
def test_triton_and_pictures_in_either_order(order: str) -> None:
    done = subprocess.run([sys.executable, "-c", CODE + order], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr[-2000:]
