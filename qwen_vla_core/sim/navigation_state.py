"""A snapshot of a walk that survives without the simulator: what navigation questions are answered from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from qwen_vla_core.sim.state import Pixel


@dataclass(frozen=True)
class PlaceState:
    """One landmark or doorway, as seen from the base.

    Attributes:
        name: "red ball", "blue doorway".
        ahead: metres in front of the base (negative: behind).
        left: metres to its left.
        pixels: view → (u, v) in 0..1 (right, down) of its middle, only where that lies inside the picture.
        visible: the views in which enough of it is to be seen.
    """

    name: str
    ahead: float
    left: float
    pixels: Mapping[str, Pixel]
    visible: tuple[str, ...]

    @property
    def doorway(self) -> bool:
        """Whether it is a doorway."""
        return self.name.endswith("doorway")


@dataclass(frozen=True)
class NavigationState:
    """The whole scene, and what was asked for.

    Attributes:
        task: goto, past or through.
        goal: where to stop.
        via: what to pass or go through before; None where nothing was named.
        passed: whether that has happened.
        stopped: whether the base has stopped for good.
        near_goal: whether a stop here would count for the goal.
        places: landmarks, then doorways.
        clearance: metres to the nearest obstacle 40° left of ahead, ahead, and 40° right of it.
    """

    task: str
    goal: str
    via: str | None
    passed: bool
    stopped: bool
    near_goal: bool
    places: tuple[PlaceState, ...]
    clearance: tuple[float, float, float]

    @property
    def next(self) -> str:
        """What to drive to now: what is to be passed first, then the goal."""
        return self.via if self.via is not None and not self.passed else self.goal

    def place(self, name: str) -> PlaceState | None:
        """By name, or None where the scene has none."""
        return next((place for place in self.places if place.name == name), None)

    def seen_in(self, views: Sequence[str]) -> NavigationState:
        """What is left of the scene when only these pictures are shown."""
        places = tuple(
            replace(place, visible=tuple(view for view in place.visible if view in views)) for place in self.places
        )
        return replace(self, places=places)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``from_dict`` restores it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> NavigationState:
        """Restores what ``to_dict`` gave, also after a journey through JSON."""
        places = tuple(
            PlaceState(
                **{
                    **place,
                    "pixels": {view: tuple(uv) for view, uv in place["pixels"].items()},
                    "visible": tuple(place["visible"]),
                }
            )
            for place in value["places"]
        )
        return cls(**{**value, "places": places, "clearance": tuple(value["clearance"])})
