"""Landmarks of hand-written room scenes."""

from __future__ import annotations

from qwen_vla_core.sim.navigation_state import PlaceState


def landmark(name: str, ahead: float, left: float, uv: tuple[float, float] | None, hidden: bool = False) -> PlaceState:
    """Something ``ahead`` and ``left`` of the base, in metres; ``uv`` where the ego picture shows it."""
    pixels = {} if uv is None else {"ego": uv}
    return PlaceState(name, ahead, left, pixels, () if hidden else tuple(pixels))
