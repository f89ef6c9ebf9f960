"""A robot's topics inside its namespace: what the YAML writes absolute becomes relative, so that two may run."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from qwen_vla_core.embodiment.spec import Embodiment
from qwen_vla_core.errors import UserError


def namespaced(robot: Embodiment) -> Embodiment:
    """The robot with every topic relative; nothing else, its hash and text included, changes.

    Raises:
        UserError: two topics differ by the first slash alone.
    """
    safety = robot.safety
    if safety.obstacle_stop is not None:
        stop = replace(safety.obstacle_stop, topic=_relative(safety.obstacle_stop.topic))
        safety = replace(safety, obstacle_stop=stop)
    given = {camera.topic for camera in robot.cameras} | {group.topic for group in robot.state}
    given |= {group.command.topic for group in robot.actions}
    twice = [topic for topic, count in Counter(_relative(topic) for topic in given).items() if count > 1]
    if twice:
        raise UserError(f"topics '/{twice[0]}' and '{twice[0]}' of '{robot.name}' are one in a namespace; rename one")
    return replace(
        robot,
        cameras=tuple(replace(camera, topic=_relative(camera.topic)) for camera in robot.cameras),
        state=tuple(replace(group, topic=_relative(group.topic)) for group in robot.state),
        actions=tuple(
            replace(group, command=replace(group.command, topic=_relative(group.command.topic)))
            for group in robot.actions
        ),
        safety=safety,
    )


def _relative(topic: str) -> str:
    return topic.removeprefix("/")
