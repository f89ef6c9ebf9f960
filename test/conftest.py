"""Before any test imports MuJoCo: without a display only EGL renders, and MuJoCo reads this once."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("MUJOCO_GL", "egl")


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
