"""A task in words and numbers.

The text names everything the motion depends on: colour, kind, width, place and turn of the things, goals, heights,
angles, strokes and pace [P: the full sequence is predicted from instruction and embodiment prompt; O: places as
coordinates in the text]. Wording, order and number style vary and carry no meaning.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qwen_vla_core.data.t2a.scenes import TURNED, Spec, Thing

Place = Callable[[float, float], str]


def _pair(x: float, y: float) -> str:
    return f"({x:.2f}, {y:.2f})"


def _named(x: float, y: float) -> str:
    return f"x {x:.2f} m, y {y:.2f} m"


def _spoken(x: float, y: float) -> str:
    side = f" and {abs(y) * 100:.0f} cm to the {'left' if y > 0 else 'right'}" if y else ""
    return f"{abs(x) * 100:.0f} cm {'ahead' if x >= 0 else 'behind'}{side}"


_PLACES: tuple[Place, ...] = (_pair, _named, _spoken)

# Filled with the fields of `_words`; {pace} is an adverb with a leading space, or nothing.
_FORMS: dict[str, tuple[str, ...]] = {
    "reach": (
        "move the gripper{pace} to {goal} at a height of {height}, fingers pointing {pointing}",
        "reach{pace} for the point {goal}, {height} above the table, with the fingers {pointing}",
        "bring the fingers{pace} to {goal} and {height} up, pointing {pointing}",
    ),
    "hover": (
        "hover{pace} over {thing} with the fingers {height} above the table",
        "move the gripper{pace} above {thing}, {height} over the table",
        "bring the fingers{pace} {height} high over {thing}",
    ),
    "pick": (
        "pick up {thing}{pace} and lift it by {lift}",
        "grasp {thing} and raise it{pace} {lift}",
        "take {thing} and lift it{pace} by {lift}",
        "grab {thing}{pace}, then lift it {lift}",
    ),
    "place": (
        "place the {held} you hold{pace} at {goal}{turned}",
        "put the {held} from the gripper{pace} down at {goal}{turned}",
        "set the {held} in your hand down{pace} at {goal}{turned}",
    ),
    "into": (
        "place the {held} you hold{pace} into {vessel}",
        "drop the {held} from the gripper{pace} into {vessel}",
        "put the {held} in your hand{pace} into {vessel}",
    ),
    "push": (
        "push {thing}{pace} to {goal}",
        "slide {thing}{pace} over the table to {goal}",
        "shove {thing}{pace} until it is at {goal}",
    ),
    "pour": (
        "pour from the {held} you hold{pace} into {vessel}, gripper {height} above the table, tilted {tilt}",
        "empty the {held} in your hand{pace} into {vessel}: hold it {height} high and tilt it {tilt}",
        "tip the {held} from the gripper{pace} over {vessel}, {tilt}, at a height of {height}",
    ),
    "wipe": (
        "wipe{pace} the {extent} area around {goal} with the {held} in {strokes} strokes along {along}",
        "clean{pace} the table around {goal}, {extent}, with the {held}: {strokes} strokes along {along}",
        "sweep{pace} the {held} over the {extent} rectangle at {goal}, {strokes} strokes along {along}",
    ),
}
_TABLE = (
    "the table holds {things}; {order}",
    "there is {things} on the table; {order}",
    "on the table: {things}; {order}",
)


def instruction(spec: Spec, rng: np.random.Generator) -> str:
    """One sentence for a task; ``rng`` chooses wording and number style."""
    place = _PLACES[int(rng.integers(len(_PLACES)))]
    name = spec.template
    form = {"reach": "hover" if spec.thing else "reach", "place": "into" if spec.into else "place"}.get(name, name)
    forms = _FORMS[form]
    sentence = forms[int(rng.integers(len(forms)))]
    on_table = [thing for thing in (_acted_on(spec), *spec.others) if thing is not None]
    told_first = bool(spec.others) and (len(on_table) > 1 or rng.random() < 0.4)
    order = sentence.format(**_words(spec, place, told_first))
    if not told_first:
        return order
    listed = [_full(on_table[i], place) for i in rng.permutation(len(on_table))]
    things = ", ".join(listed[:-1]) + (" and " if len(listed) > 1 else "") + listed[-1]
    return _TABLE[int(rng.integers(len(_TABLE)))].format(things=things, order=order)


def _acted_on(spec: Spec) -> Thing | None:
    """The thing, if it is on the table rather than in the gripper."""
    return spec.thing if spec.template in ("reach", "pick", "push") else None


def _words(spec: Spec, place: Place, told_first: bool) -> dict[str, str]:
    """Every field that a form may use."""
    thing, goal = spec.thing, place(*spec.goal[:2])
    known = _short if told_first else _definite
    side = "left" if spec.amount > 0 else "right"
    return {
        "pace": f" {spec.speed}" if spec.speed else "",
        "thing": known(thing, place) if thing else "",
        "held": _held(thing) if thing else "",
        "goal": goal,
        "height": f"{spec.goal[2]:.2f} m" if place is not _spoken else f"{spec.goal[2] * 100:.0f} cm",
        "pointing": spec.pointing,
        "lift": f"{spec.amount * 100:.0f} cm",
        "turned": _turned(thing) if thing else "",
        "vessel": known(spec.others[0], place) if spec.into else "",
        "tilt": f"{abs(spec.amount):.0f} degrees to the {side}",
        "extent": f"{spec.extent[0] * 100:.0f} by {spec.extent[1] * 100:.0f} cm",
        "strokes": f"{spec.amount:.0f}",
        "along": spec.along,
    }


def _turned(thing: Thing) -> str:
    return f", turned {thing.yaw} degrees" if thing.kind in TURNED and thing.yaw else ""


def _held(thing: Thing) -> str:
    return f"{thing.width * 100:.0f} cm wide {thing.colour} {thing.kind}"


def _short(thing: Thing, place: Place) -> str:
    return f"the {thing.colour} {thing.kind}"


def _definite(thing: Thing, place: Place) -> str:
    return f"the {_held(thing)} at {place(thing.x, thing.y)}{_turned(thing)}"


def _full(thing: Thing, place: Place) -> str:
    held = _held(thing)  # begins with a number, and only 8 begins with a vowel
    return f"{'an' if held[0] == '8' else 'a'} {held} at {place(thing.x, thing.y)}{_turned(thing)}"
