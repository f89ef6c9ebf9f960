"""The rooms away from what demonstrations showed, one axis at a time; see ``shifted`` for the tables.

The same seed gives the same scene as in the unshifted world (``layout`` alone has to draw its own).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.navigation_tasks import COLOURS, LANDMARKS, NavigationTask, parse_instruction
from qwen_vla_core.sim.worlds.rooms import RoomsWorld
from qwen_vla_core.sim.worlds.rooms_domain import RoomsDomain
from qwen_vla_core.sim.worlds.rooms_layout import LayoutConfig
from qwen_vla_core.sim.worlds.shifted import UNSEEN_COLOURS, shade

AXES: tuple[str, ...] = ("colour", "layout", "background", "instruction")

# Demonstrations: 7 to 9 by 5 to 6.5 metres, doorways of 1.2 to 1.5, a third room in three of ten.
LARGER = LayoutConfig(width=(9.5, 11.5), depth=(7.0, 8.5), door=(1.55, 1.9), third_room=0.3)

# Walls, floor and light alone: landmarks, camera and dynamics as built.
BACKGROUND = RoomsDomain(
    light_turn=0.6,
    light_strength=(0.35, 1.7),
    light_tint=0.3,
    ambient=(0.5, 1.5),
    wall_rgb=(0.25, 0.9),
    floor_rgb=(0.1, 0.8),
    tint=0.25,
    landmark_hue=0.0,
    landmark_size=(1.0, 1.0),
    camera_height=0.0,
    camera_tilt=0.0,
    camera_pan=0.0,
    camera_fovy=0.0,
    speed_gain=(1.0, 1.0),
    turn_gain=(1.0, 1.0),
    pull=0.0,
    odometry_gain=(1.0, 1.0),
    delay=(0, 0),
)

UNSEEN: dict[str, tuple[str, ...]] = {
    "goto": (
        "head for the {goal}",
        "your destination is the {goal}",
        "find the {goal} and halt there",
        "I want you beside the {goal}",
    ),
    "past": (
        "visit the {via} first and end at the {goal}",
        "by way of the {via}, head for the {goal}",
        "once you are by the {via}, carry on until the {goal}",
    ),
    "through": (
        "cross the {via} and halt at the {goal}",
        "behind the {via} your destination is the {goal}",
        "use the {via}, then find the {goal}",
    ),
}


def _meanings(template: str, name: str) -> dict[str, NavigationTask]:
    ways: tuple[str | None, ...] = {
        "goto": (None,),
        "past": LANDMARKS,
        "through": tuple(f"{colour} doorway" for colour in COLOURS),
    }[name]
    return {
        template.format(goal=goal, via=via): NavigationTask(name, goal, via)
        for goal in LANDMARKS
        for via in ways
        if via != goal
    }


_KNOWN = {
    text: task for name, forms in UNSEEN.items() for form in forms for text, task in _meanings(form, name).items()
}


class ShiftedRooms(RoomsWorld):
    """The rooms along one axis; ``shift`` is one of ``AXES``, or None for no shift."""

    def __init__(self, *, shift: str | None = None, **options: Any) -> None:
        """
        Args:
            shift: the axis.
            options: of the world.

        Raises:
            UserError: there is no such axis.
        """
        if shift not in (None, *AXES):
            raise UserError(f"shift {shift!r}: use one of {', '.join(AXES)}")
        self.shift = shift
        self._words: dict[str, str] = {}
        self._form = 0
        if shift == "background":
            options["domain"] = BACKGROUND
        elif shift == "layout":
            options["layout"] = LARGER
        super().__init__(**options)

    def reset(self, seed: int, instruction: str | None = None) -> None:
        """As ``RoomsWorld.reset``; an instruction is in the words that this scene is spoken of in.

        In ``colour`` it is the landmark that the seed itself asks for whose colour is unseen.
        """
        self._words = {}
        super().reset(seed, None)
        if self.shift == "colour":
            names = [name for name in UNSEEN_COLOURS if name not in COLOURS]  # here demonstrations show yellow too
            word = names[int(np.random.default_rng([seed, 20]).integers(len(names)))]
            self._words = {self.task.goal: f"{word} {self.task.goal.split()[1]}"}
        self._form = int(np.random.default_rng([seed, 23]).integers(12))
        if instruction is not None:
            super().reset(seed, self._plain(instruction))
        for name, words in self._words.items():
            for geom in self._named.get(name, ()):
                self.model.geom_rgba[geom, :3] = shade(words.split()[0], seed)
        if self.shift == "background":
            for geoms in self._named.values():
                self.model.geom_matid[list(geoms)] = -1
        self.instruction = self._spoken(self.instruction)

    def _spoken(self, plain: str) -> str:
        if self.shift == "instruction":
            task = parse_instruction(plain)
            forms = UNSEEN[task.name]
            return forms[self._form % len(forms)].format(goal=task.goal, via=task.via)
        for name, words in self._words.items():
            plain = plain.replace(name, words)
        return plain

    def _plain(self, spoken: str) -> str:
        if self.shift == "instruction":
            task = _KNOWN.get(" ".join(spoken.split()).rstrip(".!"))
            if task is None:
                forms = "; ".join(form for forms in UNSEEN.values() for form in forms)
                raise UserError(f"instruction {spoken!r}: this world does not know it; use one of: {forms}")
            via = "" if task.via is None else f" through the {task.via}"
            if task.name == "past":
                return f"go past the {task.via} and stop at the {task.goal}"
            return f"go to the {task.goal}{via}"
        for name, words in self._words.items():
            spoken = spoken.replace(words, name)
        return spoken

    @property
    def target(self) -> str:
        """The landmark asked for, in the words of this scene."""
        return self._words.get(self.task.goal, self.task.goal)

    def chosen(self) -> str | None:
        """See ``RoomsWorld``, in the words of this scene."""
        found = super().chosen()
        return None if found is None else self._words.get(found, found)

    def other_instruction(self) -> str | None:
        """See ``RoomsWorld``, in the words of this scene."""
        shown, self.instruction = self.instruction, self._plain(self.instruction)
        other = super().other_instruction()
        self.instruction = shown
        return None if other is None else self._spoken(other)

    def about(self) -> dict[str, Any]:
        """See ``RoomsWorld``, and which unseen colour it was."""
        return {**super().about(), **({"variant": next(iter(self._words.values()))} if self._words else {})}
