"""A mobile base in generated rooms, measured as in VLN-CE: NE, OSR, SR, SPL, nDTW."""

from __future__ import annotations

from qwen_vla_core.evaluation.suites.embedded import IN_DISTRIBUTION, EmbeddedSuite
from qwen_vla_core.evaluation.suites.protocol import PublishedProtocol

AXES = {
    IN_DISTRIBUTION: "rooms drawn like those of the demonstrations, other seeds",
    "colour": "the landmark asked for has a colour never shown or named",
    "layout": "rooms and doorways larger than any of the demonstrations",
    "background": "tinted and patterned walls and floor, light outside the range of the demonstrations",
    "instruction": "sentences that no demonstration used",
}


class NavigationSuite(EmbeddedSuite):
    """Every seed is a scene that no demonstration showed, as in R2R's val-unseen; the axes go further."""

    name = "navigation"
    title = "Navigation (embedded): go to, past and through, measured as R2R-CE"
    embodiment = "mobile_base"
    world = "rooms"
    axes = AXES
    tasks = ("goto", "past", "through")
    metrics = ("progress", "navigation_error_m", "oracle_success", "spl", "ndtw", "path_m", "bumps")
    shifts = ("colour", "layout", "background", "instruction")
    protocol = PublishedProtocol(
        source="R2R-CE / VLN-CE val-unseen (Krantz et al. 2020): NE, OSR, SR, SPL (Anderson et al. 2018), "
        "nDTW (Ilharco et al. 2019)",
        tag="X",
        trials_per_task=50,
        horizon_steps={"*": 800},
        control_hz=20.0,
        seeds="100000, 100001, …: one scene each, the same for every axis (layout draws its own)",
        success="the base stops by itself within 1 m of the named landmark, having passed what was named",
        preprocessing=("one view at 256×192, resized by the checkpoint's processor", "5 of 8 waypoints executed"),
        deviations=(
            "generated rooms of 7 to 9 m instead of scanned flats, so reached means 1 m and not 3 m",
            "short closed-form instructions instead of R2R's sentences",
        ),
    )
