"""Planned trajectories respect every limit, do what their text says, and the judge notices when they do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from qwen_vla_core.data.t2a.checks import check
from qwen_vla_core.data.t2a.corpus import BLOCK, Block, Job, contract, make_block, parse_templates
from qwen_vla_core.data.t2a.kinematics import forward
from qwen_vla_core.data.t2a.language import instruction
from qwen_vla_core.data.t2a.planner import HORIZON, NODES, PEAK_ACCELERATION, PEAK_SPEED, plan, time_law
from qwen_vla_core.data.t2a.robots import ARMS
from qwen_vla_core.data.t2a.scenes import TEMPLATES, Spec, Thing, draw
from qwen_vla_core.errors import UserError

ARM = ARMS["panda"]
CUBE = Thing("cube", "red", 0.5, 0.1, 0.05, 30)
BOWL = Thing("bowl", "blue", 0.5, -0.1, 0.16)
EXAMPLES: dict[str, Spec] = {
    "reach": Spec("reach", "", None, (0.5, 0.2, 0.3)),
    "pick": Spec("pick", "", CUBE, (0.5, 0.1, 0.0), amount=0.15),
    "place": Spec("place", "", replace(CUBE, x=0.0, y=0.0), (0.5, 0.1, 0.0)),
    "push": Spec("push", "", replace(CUBE, yaw=0), (0.6, 0.1, 0.0)),
    "pour": Spec("pour", "quickly", Thing("cup", "red", 0, 0, 0.06), (0.5, -0.1, 0.35), (BOWL,), True, amount=-60.0),
    "wipe": Spec(
        "wipe", "", Thing("sponge", "red", 0, 0, 0.05), (0.5, 0, 0), amount=3.0, extent=(0.08, 0.16), along="y"
    ),
}


def rows(spec: Spec) -> np.ndarray:
    """(T + 1, n + 1) float32 of an example."""
    planned = plan(ARM, [spec])[0]
    assert not isinstance(planned, str), planned
    return np.column_stack([planned.q, planned.gripper]).astype(np.float32)


def faults(spec: Spec, made: np.ndarray) -> list[str]:
    return check(ARM, spec, made[:-1], made[1:])


@pytest.fixture(scope="module")
def blocks() -> dict[str, Block]:
    """A block of every robot."""
    return {name: make_block(Job(name, TEMPLATES, 3, 0)) for name in ARMS}


def test_every_robot_does_every_template_within_its_limits(blocks: dict[str, Block]) -> None:
    """Limits are judged here again, without the checks' own code."""
    for name, block in blocks.items():
        assert len(block.samples) == BLOCK
        assert set(block.tally.kept) == set(TEMPLATES) and sum(block.tally.kept.values()) == BLOCK
        low, high, velocity, acceleration = ARMS[name].limits
        for sample in block.samples:
            q = sample.rows[:, :-1].astype(np.float64)
            assert np.isfinite(sample.rows).all() and 1 <= len(q) - 1 <= HORIZON
            assert (q >= low - 1e-5).all() and (q <= high + 1e-5).all()
            assert (np.abs(np.diff(q, axis=0)) * 50 <= velocity * 1.001 + 1e-4).all()
            assert (np.abs(np.diff(q, 2, axis=0)) * 2500 <= acceleration * 1.001 + 5e-3).all()
            assert (sample.rows[:, -1] >= 0).all() and (sample.rows[:, -1] <= 1).all()
            assert sample.phases[0][1] == 0 and sample.phases[-1][2] == len(q) - 1
            assert all(one[2] == two[1] for one, two in zip(sample.phases, sample.phases[1:], strict=False))


def test_motion_begins_and_ends_at_rest_and_never_jumps(blocks: dict[str, Block]) -> None:
    for name, block in blocks.items():
        _, _, _, acceleration = ARMS[name].limits
        for sample in block.samples:
            q = sample.rows[:, :-1].astype(np.float64)
            for step in (q[1] - q[0], q[-1] - q[-2]):
                assert (np.abs(step) * 2500 <= acceleration * 1.001 + 5e-3).all()


def test_straight_motions_are_straight(blocks: dict[str, Block]) -> None:
    """Between its Chebyshev points too: the polynomial stays within a tenth of a millimetre of the line."""
    worst = 0.0
    for name, block in blocks.items():
        for sample in block.samples:
            place = forward(ARMS[name], sample.rows[:, :-1].astype(np.float64)).position
            for label, begin, end in sample.phases:
                if label in ("descend", "lift", "lower", "push", "carry") and end - begin > 2:
                    if label == "carry" and sample.spec.template != "pour":
                        continue  # a free motion
                    line = (place[end] - place[begin]) / np.linalg.norm(place[end] - place[begin])
                    off = place[begin : end + 1] - place[begin]
                    off = off - np.outer(off @ line, line)
                    worst = max(worst, float(np.linalg.norm(off, axis=1).max()))
    assert worst < 2e-3
    assert NODES == 9


def test_the_time_law_is_a_rest_to_rest_law_with_the_stated_peaks() -> None:
    tau = np.linspace(0, 1, 20001)
    value, first, second = time_law(tau)
    assert value[0] == 0 and value[-1] == 1 and first[0] == first[-1] == 0
    np.testing.assert_allclose(np.gradient(value, tau)[1:-1], first[1:-1], atol=1e-3)
    np.testing.assert_allclose(np.gradient(first, tau)[1:-1], second[1:-1], atol=2e-2)
    np.testing.assert_allclose([first.max(), np.abs(second).max()], [PEAK_SPEED, PEAK_ACCELERATION], rtol=1e-6)


@pytest.mark.parametrize("template", TEMPLATES)
def test_examples_pass(template: str) -> None:
    spec = EXAMPLES[template]
    assert faults(spec, rows(spec)) == []
    assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


OTHERS: list[tuple[str, Callable[[Spec], Spec], str]] = [
    ("reach", lambda s: replace(s, goal=(0.5, 0.21, 0.3)), "does not end at the point"),
    ("reach", lambda s: replace(s, pointing="forward"), "do not point forward"),
    ("pick", lambda s: replace(s, thing=replace(CUBE, x=0.51)), "closes elsewhere"),
    ("pick", lambda s: replace(s, thing=replace(CUBE, yaw=45)), "not aligned"),
    ("pick", lambda s: replace(s, thing=replace(CUBE, width=0.06)), "does not close on the thing"),
    ("pick", lambda s: replace(s, amount=0.16), "lift"),
    ("place", lambda s: replace(s, goal=(0.5, 0.11, 0.0)), "lets go elsewhere"),
    ("place", lambda s: replace(s, thing=replace(CUBE, yaw=15)), "set it down"),
    ("push", lambda s: replace(s, goal=(0.61, 0.1, 0.0)), "as far as said"),
    ("push", lambda s: replace(s, goal=(0.6, 0.12, 0.0)), "push"),
    ("pour", lambda s: replace(s, amount=-75.0), "not tilted as said"),
    ("pour", lambda s: replace(s, amount=60.0), "other side"),
    ("pour", lambda s: replace(s, goal=(0.5, -0.12, 0.35)), "vessel"),
    ("pour", lambda s: replace(s, goal=(0.5, -0.1, 0.36)), "height"),
    ("wipe", lambda s: replace(s, amount=2.0), "strokes"),
    ("wipe", lambda s: replace(s, along="x"), "strokes"),
    ("wipe", lambda s: replace(s, extent=(0.08, 0.14)), "outside"),
    ("wipe", lambda s: replace(s, goal=(0.5, 0.02, 0.0)), "corner"),
]


@pytest.mark.parametrize(("template", "other", "fault"), OTHERS)
def test_a_trajectory_of_another_task_is_noticed(template: str, other: Callable[[Spec], Spec], fault: str) -> None:
    found = faults(other(EXAMPLES[template]), rows(EXAMPLES[template]))
    assert any(fault in one for one in found), found


def damaged(how: str) -> tuple[Spec, np.ndarray]:
    """An example with one thing wrong in its numbers."""
    template = {"bent": "push", "low": "push", "early": "pick", "spill": "pour", "drop": "wipe"}.get(how, "pick")
    spec = EXAMPLES[template]
    made = rows(spec).astype(np.float64)
    planned = plan(ARM, [spec])[0]
    assert not isinstance(planned, str)
    phase = {label: slice(begin, end + 1) for label, begin, end in planned.phases}
    if how == "nan":
        made[10, 2] = np.nan
    elif how == "fast":
        made = np.concatenate([made[:20], made[30:]])
    elif how == "jerk":
        made[30, 3] += 0.03
    elif how == "range":
        made[:, 3] += 3.0
    elif how == "start":
        made[:, 0] += 0.01
    elif how == "early":
        made[phase["descend"], -1] = made[-1, -1]
    elif how == "low":  # dips in the middle of the push
        bump = np.sin(np.linspace(0, np.pi, len(made[phase["push"]])))
        made[phase["push"], 1] += 0.02 * bump
    elif how == "bent":
        made[phase["push"], 0] += 0.02 * np.sin(np.linspace(0, np.pi, len(made[phase["push"]])))
    elif how == "spill":
        made[phase["carry"], 6] += 0.1 * np.sin(np.linspace(0, np.pi, len(made[phase["carry"]])))
    elif how == "drop":
        made[:, -1] = 1.0
    return spec, made.astype(np.float32)


@pytest.mark.parametrize(
    ("how", "fault"),
    [
        ("nan", "not finite"),
        ("fast", "speed limit"),
        ("jerk", "acceleration limit of joint_4"),
        ("range", "position limit of joint_4"),
        ("start", "start pose"),
        ("early", "closes elsewhere"),
        ("low", "height in contact"),
        ("bent", "line of the push"),
        ("spill", "spills"),
        ("drop", "lets go of the sponge"),
    ],
)
def test_damage_is_noticed(how: str, fault: str) -> None:
    spec, made = damaged(how)
    found = faults(spec, made)
    assert any(fault in one for one in found), found


def test_impossible_tasks_are_refused_with_a_reason() -> None:
    far = replace(EXAMPLES["reach"], goal=(2.0, 0.0, 0.3))
    slow = replace(EXAMPLES["wipe"], speed="slowly", amount=9.0, extent=(0.32, 0.3))
    answers = plan(ARM, [far, EXAMPLES["reach"], slow])
    assert answers[0] == "reach: out of reach" and answers[2] == f"longer than {HORIZON} steps"
    assert not isinstance(answers[1], str)


def test_blocks_are_the_same_every_time_and_differ_between_seeds_robots_and_numbers(blocks: dict[str, Block]) -> None:
    again = make_block(Job("xarm7", TEMPLATES, 3, 0))
    for one, two in zip(blocks["xarm7"].samples, again.samples, strict=True):
        assert one.spec == two.spec and one.text == two.text
        np.testing.assert_array_equal(one.rows, two.rows)
    others = [make_block(Job("xarm7", TEMPLATES, 4, 0)), make_block(Job("xarm7", TEMPLATES, 3, 1)), blocks["xarm6"]]
    for other in others:
        assert not {s.text for s in other.samples} & {s.text for s in again.samples}
    wanted = [TEMPLATES[i % 6] for i in range(BLOCK)]
    assert [sample.spec.template for sample in again.samples] == wanted


def test_texts_hold_every_number_of_the_task() -> None:
    """Two tasks that differ in one field never share a sentence, in any wording or number style."""
    rng = np.random.default_rng(0)
    for template in TEMPLATES:
        for _ in range(20):
            spec = draw(template, ARM, rng)
            for other in variants(spec):
                for seed in range(6):
                    one = instruction(spec, np.random.default_rng(seed))
                    assert one != instruction(other, np.random.default_rng(seed)), (one, other)


def variants(spec: Spec) -> list[Spec]:
    """The task with one field changed each."""
    x, y, z = spec.goal
    made = [replace(spec, speed="quickly" if spec.speed != "quickly" else "slowly")]
    if spec.template in ("reach", "pour"):
        made.append(replace(spec, goal=(x, y, z + 0.01)))
    if spec.template in ("push", "wipe") or (spec.template == "place" and not spec.into):
        made += [replace(spec, goal=(x + 0.01, y, z)), replace(spec, goal=(x, y - 0.01, z))]
    if spec.template == "reach" and spec.thing is None:
        made += [replace(spec, goal=(x, y, z), pointing="down" if spec.pointing != "down" else "forward")]
    if spec.thing is not None:
        made += [replace(spec, thing=replace(spec.thing, width=spec.thing.width + 0.01))]
        made += [replace(spec, thing=replace(spec.thing, colour="brown"))]
        if spec.template in ("reach", "pick", "push"):
            made += [replace(spec, thing=replace(spec.thing, x=spec.thing.x + 0.01))]
            made += [replace(spec, thing=replace(spec.thing, y=spec.thing.y + 0.01))]
        if spec.thing.kind in ("cube", "block") and spec.template in ("pick", "place") and not spec.into:
            made += [replace(spec, thing=replace(spec.thing, yaw=spec.thing.yaw + 15))]
    if spec.into:
        made += [replace(spec, others=(replace(spec.others[0], x=spec.others[0].x + 0.01), *spec.others[1:]))]
    if spec.template == "pick":
        made.append(replace(spec, amount=spec.amount + 0.01))
    if spec.template == "pour":
        made += [replace(spec, amount=-spec.amount), replace(spec, amount=spec.amount + 15)]
    if spec.template == "wipe":
        made += [replace(spec, amount=spec.amount + 1), replace(spec, along="y" if spec.along == "x" else "x")]
        made += [replace(spec, extent=(spec.extent[0] + 0.01, spec.extent[1]))]
    return made


def test_contracts_name_the_robot_and_its_channels() -> None:
    for arm in ARMS.values():
        made = contract(arm)
        assert made.prompt.robot_tag == arm.tag and made.prompt.arms == "single arm"
        assert made.frequency_hz == 50 and made.horizon == HORIZON and made.views == ()
        assert made.action_channels == made.state_channels == arm.channels and len(arm.channels) == arm.dof + 1


def test_template_names_are_checked_and_ordered() -> None:
    assert parse_templates([]) == TEMPLATES
    assert parse_templates(["wipe", "pick"]) == ("pick", "wipe")
    with pytest.raises(UserError, match=r"--templates dance.*pour"):
        parse_templates(["dance"])
    with pytest.raises(UserError, match="twice"):
        parse_templates(["pick", "pick"])
