"""May a checkpoint drive this robot? The first thing that says no, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_vla_core.embodiment.spec import Embodiment


def contract_difference(
    given: Embodiment | Mapping[str, Any], trained: Embodiment | Mapping[str, Any], where: str = "the checkpoint"
) -> str | None:
    """The first field in which two robots differ for a policy, with both values; None where there is none.

    Args:
        given: the robot at hand, or its ``policy_contract``.
        trained: the robot a policy was trained with, or its contract.
        where: what the message calls the place of the second one.
    """
    ours = given.policy_contract if isinstance(given, Embodiment) else given
    theirs = trained.policy_contract if isinstance(trained, Embodiment) else trained
    for field in {**theirs, **ours}:
        if field not in ours or field not in theirs or ours[field] != theirs[field]:
            here, there = (repr(contract[field]) if field in contract else "absent" for contract in (ours, theirs))
            return f"{field} is {here}, but {there} in {where}"
    return None
