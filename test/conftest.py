"""Before any test imports MuJoCo or Triton, which read these once.

Without a display only EGL renders; without a GPU only Triton's interpreter runs kernels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def ordinary_priority() -> Iterator[None]:
    """Fails a test that leaves the process in a real-time class: everything started after it would inherit that.

    A library did so once (SVT-AV1 as root); whole ROS graphs at the highest priority then starved the machine.
    """
    before = os.sched_getscheduler(0)
    yield
    if os.sched_getscheduler(0) != before:
        os.sched_setscheduler(0, before, os.sched_param(0))
        pytest.fail("the test left the process in another scheduling class")
