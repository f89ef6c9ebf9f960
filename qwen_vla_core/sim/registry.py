"""World and expert by the name an embodiment's ``simulation.world`` gives. Imported only when one is asked for."""

from __future__ import annotations

import importlib
from typing import Any

from qwen_vla_core.errors import UserError

# name → ((module, class) of the world, (module, class) of its expert)
WORLDS: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "aloha": (
        ("qwen_vla_core.sim.worlds.aloha", "AlohaWorld"),
        ("qwen_vla_core.sim.experts", "ScriptedExpert"),
    ),
    "widowx": (
        ("qwen_vla_core.sim.worlds.widowx", "WidowXWorld"),
        ("qwen_vla_core.sim.worlds.widowx_expert", "PlateAndBeltExpert"),
    ),
    "rooms": (
        ("qwen_vla_core.sim.worlds.rooms", "RoomsWorld"),
        ("qwen_vla_core.sim.navigation_expert", "NavigationExpert"),
    ),
}
# The same worlds away from what demonstrations showed: ``make_world(name, shift=AXIS)``.
SHIFTED: dict[str, tuple[str, str]] = {
    "aloha": ("qwen_vla_core.sim.worlds.shifted", "ShiftedAloha"),
    "widowx": ("qwen_vla_core.sim.worlds.shifted", "ShiftedWidowX"),
    "rooms": ("qwen_vla_core.sim.worlds.shifted_rooms", "ShiftedRooms"),
}


def _look_up(name: str | None) -> tuple[tuple[str, str], tuple[str, str]]:
    if name not in WORLDS:
        raise UserError(f"simulation.world: {name!r} is not a world; use one of {', '.join(sorted(WORLDS))}")
    return WORLDS[name]


def _load(place: tuple[str, str]) -> Any:
    try:
        return getattr(importlib.import_module(place[0]), place[1])
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "qwen_vla_core":
            raise
        raise UserError(f"simulation needs {error.name}: pip install 'qwen_vla_ros[sim]'") from None


def world_class(name: str | None) -> Any:
    """The class behind a name: its task names, views and rates can be read without building it."""
    return _load(_look_up(name)[0])


def make_world(name: str | None, *, shift: str | None = None, **options: Any) -> Any:
    """A new world.

    Args:
        name: as in the embodiment's ``simulation.world``.
        shift: the axis along which it differs from what demonstrations showed; None: it does not.
        options: of the world's constructor (``tasks``, ``randomize``).

    Raises:
        UserError: unknown name, or the simulator is not installed.
    """
    world = world_class(name)
    return world(**options) if shift is None else _load(SHIFTED[str(name)])(shift=shift, **options)


def make_expert(name: str | None, world: Any) -> Any:
    """The scripted expert for a world that has just been reset: ``action()`` gives the target ``decision_s`` ahead."""
    _, expert = _look_up(name)
    return _load(expert)(world)
