"""What a mobile base adds to the embodiment file: how poses become twists, and when a scanner stops it.

Kept apart from ``spec.py``, which holds everything else and imports this.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def doc(text: str, **extra: Any) -> dict[str, Any]:
    """Field metadata: one sentence for errors, schema and docs; ``extra`` may hold minimum, maximum, unit, …

    ``robot``: required of every embodiment but those for training only.
    """
    return {"doc": text, **extra}


@dataclass(frozen=True)
class TrackerSpec:
    """How waypoints become a twist: limits of the base, and the law that follows the plan (docs/mobile_base.md)."""

    max_speed: float = field(metadata=doc("Largest speed ahead, m/s.", unit="m/s", exclusive_minimum=0.0))
    max_turn: float = field(metadata=doc("Largest turning rate, rad/s.", unit="rad/s", exclusive_minimum=0.0))
    acceleration: float = field(metadata=doc("Of the speed, m/s².", unit="m/s²", exclusive_minimum=0.0))
    turn_acceleration: float = field(metadata=doc("Of the turning rate, rad/s².", unit="rad/s²", exclusive_minimum=0.0))
    max_reverse: float = field(
        default=0.0, metadata=doc("Largest speed back, m/s; 0: it never reverses.", unit="m/s", minimum=0.0)
    )
    jerk: float | None = field(
        default=None,
        metadata=doc(
            "Of the speed, m/s³; left out: full acceleration within one tick.", unit="m/s³", exclusive_minimum=0.0
        ),
    )
    turn_jerk: float | None = field(
        default=None,
        metadata=doc("Of the turning rate, rad/s³; left out as above.", unit="rad/s³", exclusive_minimum=0.0),
    )
    law: Literal["kanayama", "holonomic"] = field(
        default="kanayama",
        metadata=doc("kanayama: bases that drive where they look; holonomic: those that also drive sideways."),
    )
    along: float = field(default=2.5, metadata=doc("Gain on the distance ahead, 1/s.", exclusive_minimum=0.0))
    across: float = field(default=16.0, metadata=doc("Gain on the distance to the side, 1/m².", minimum=0.0))
    heading: float = field(default=4.0, metadata=doc("Gain on the heading, 1/s.", exclusive_minimum=0.0))
    near: float = field(
        default=0.15,
        metadata=doc(
            "A base that has been far from the plan is back at this distance.", unit="m", exclusive_minimum=0.0
        ),
    )
    far: float = field(
        default=0.4,
        metadata=doc(
            "Further from the plan than this a base looks at its point, until it is near.",
            unit="m",
            exclusive_minimum=0.0,
        ),
    )
    tolerance: float = field(
        default=0.01, metadata=doc("Closer to a plan that stands still than this, in m and rad: stand.", minimum=0.0)
    )


@dataclass(frozen=True)
class FootprintSpec:
    """The rectangle that a base covers on the ground, seen from the origin of its frame."""

    front: float = field(metadata=doc("From the origin to the front edge.", unit="m", exclusive_minimum=0.0))
    rear: float = field(metadata=doc("From the origin to the rear edge.", unit="m", exclusive_minimum=0.0))
    side: float = field(metadata=doc("From the origin to either side.", unit="m", exclusive_minimum=0.0))


@dataclass(frozen=True)
class ObstacleStopSpec:
    """A LaserScan that slows the base down and stops it, whatever commands it. No fresh scan: no motion."""

    topic: str = field(metadata=doc("Topic of the sensor_msgs/LaserScan."))
    footprint: FootprintSpec = field(metadata=doc("What the base covers."))
    stop_distance: float = field(
        metadata=doc("The base comes to a stand this far from what is in its way.", unit="m", exclusive_minimum=0.0)
    )
    slow_distance: float = field(
        metadata=doc("From this distance on its speed falls with the distance.", unit="m", exclusive_minimum=0.0)
    )
    margin: float = field(
        default=0.05,
        metadata=doc("The swept corridor is wider than the base by this on each side.", unit="m", minimum=0.0),
    )
    max_age_ms: float = field(default=300.0, metadata=doc("An older scan is none: stop.", exclusive_minimum=0.0))
    mount: tuple[float, float, float] = field(
        default=(0.0, 0.0, 0.0), metadata=doc("x, y (m) and yaw (rad) of the scanner in the base's frame.")
    )
