"""What is published, where that is not what the policy says: the same robot, commanded by positions.

A group whose command has ``ik`` or ``integrate`` is commanded by positions of measured channels, under limits of their
own. ``commanded_robot`` is the robot with such groups replaced: limits, watchdog, workspace boxes and the command
messages are all about these positions; what turns the policy's channels into them is ``runtime/targets.py``.
"""

from __future__ import annotations

from dataclasses import replace

from qwen_vla_core.embodiment.spec import (
    ActionGroup,
    Embodiment,
    InverseKinematics,
    Kinematics,
    StateGroup,
    Workspace,
)


def measured_by(embodiment: Embodiment, channels: tuple[str, ...]) -> StateGroup | None:
    """The one state group that has all these channels; None where there is none."""
    wanted = set(channels)
    return next((group for group in embodiment.state if wanted and wanted <= set(group.channels)), None)


def commanded_robot(embodiment: Embodiment) -> Embodiment:
    """The robot as it is commanded; the very same object where every group is commanded as the policy says."""
    if not any(group.command.ik or group.command.integrate for group in embodiment.actions):
        return embodiment
    safety = replace(embodiment.safety, workspace=tuple(_box(embodiment, box) for box in embodiment.safety.workspace))
    return replace(embodiment, actions=tuple(_group(embodiment, group) for group in embodiment.actions), safety=safety)


def _group(embodiment: Embodiment, group: ActionGroup) -> ActionGroup:
    part = group.command.ik or group.command.integrate
    if part is None:
        return group
    state = measured_by(embodiment, part.channels)
    assert state is not None  # a rule of the YAML
    return replace(
        group,
        kind="joint_position" if state.kind in ("joint_position", "hand") else "eef_pose",
        channels=part.channels,
        unit=state.unit,
        limits=part.limits,
        command=replace(group.command, ik=None, integrate=None),
        start=part.start if isinstance(part, InverseKinematics) else (),
        frame="",
    )


def _box(embodiment: Embodiment, box: Workspace) -> Workspace:
    """A box round a hand that is commanded through its joints is kept by the joints' forward kinematics."""
    group = next(group for group in embodiment.actions if group.name == box.group)
    ik = group.command.ik
    if group.command.integrate is not None:
        return replace(box, position=())
    if ik is None:
        return box
    given = box.kinematics or Kinematics(ik.model, ik.tip, ik.base, ik.offset, joints=ik.joints)
    return replace(box, position=(), kinematics=given)
