"""A WidowX before a plate: in distribution, and along the same five axes as ALOHA."""

from __future__ import annotations

from qwen_vla_core.evaluation.suites.aloha import TABLE_AXES
from qwen_vla_core.evaluation.suites.embedded import IN_DISTRIBUTION, EmbeddedSuite
from qwen_vla_core.evaluation.suites.protocol import PublishedProtocol


class WidowXSuite(EmbeddedSuite):
    """In the manner of Simpler-WidowX (pick and place by displacements of the hand at 5 Hz), in our own simulator."""

    name = "widowx"
    title = "WidowX (embedded): put a cube on the plate, with five axes out of distribution"
    embodiment = "widowx"
    world = "widowx"
    axes = TABLE_AXES
    tasks = ("place",)
    shifts = tuple(axis for axis in TABLE_AXES if axis != IN_DISTRIBUTION)
    protocol = PublishedProtocol(
        source="ours; the axes are those of arXiv 2605.30280 for ALOHA",
        tag="O",
        trials_per_task=50,
        horizon_steps={"*": 750},
        control_hz=50.0,
        seeds="100000, 100001, …: one scene each, the same for every axis (position draws its own)",
        success="the named cube lies flat on the plate, ≤ 5 cm from its middle, and no finger touches it, for 0.2 s",
        preprocessing=("two views at 256×192, resized by the checkpoint's processor", "5 of 8 actions executed"),
        deviations=("not Simpler-WidowX: other scenes, other pictures, 75 decisions instead of 120",),
    )
