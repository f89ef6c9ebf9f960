"""What a run of reinforcement learning is built from: seats, worlds, parameter groups, optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from qwen_vla_core.errors import UserError
from qwen_vla_core.model.checkpoint import load_checkpoint
from qwen_vla_core.model.policy import QwenVLA, count
from qwen_vla_core.sim.registry import make_world, world_class
from qwen_vla_core.training.actor_critic import ActorCritic
from qwen_vla_core.training.optim import part_of
from qwen_vla_core.training.rl_recipe import RlRecipe, WorldsSpec
from qwen_vla_core.training.rollouts import Seat
from qwen_vla_core.training.world_host import WorldFactory


def describe(recipe: RlRecipe) -> list[str]:
    """What a run would do, for ``--dry-run``: parameters and rate of every group, episodes, decisions, memory.

    Raises:
        UserError: the recipe does not fit its checkpoint or its worlds.
    """
    policy = load_checkpoint(recipe.start_folder())
    seats, _ = places(recipe, policy, {})
    model = ActorCritic(policy)
    lines = []
    trained = 0
    for name, parameters, rate in groups(recipe, model):
        size = sum(p.numel() for p in parameters)
        trained += size if rate else 0
        lines.append(f"{name:<9} {size:>13,} parameters  {f'rate {rate:g}' if rate else 'frozen'}")
    episodes = len(seats) * recipe.rounds
    most = sum(seat.chunks for seat in seats) * recipe.rounds
    lines.append(
        f"{len(seats)} worlds × {recipe.rounds} episodes = {episodes} episodes an iteration, "
        f"at most {most} decisions; {recipe.iterations} iterations: {episodes * recipe.iterations} episodes"
    )
    lines.append(f"weights, gradients and moments: about {(4 * count(model) + 12 * trained) / 2**20:,.0f} MiB")
    return lines


def places(
    recipe: RlRecipe, policy: QwenVLA, worlds: Mapping[str, WorldFactory]
) -> tuple[list[Seat], list[WorldFactory]]:
    """Who acts in which slot, and how each slot's world is built."""
    seats: list[Seat] = []
    factories: list[WorldFactory] = []
    for index, spec in enumerate(recipe.worlds):
        key = f"{recipe.source}: worlds[{index}]"
        robot = policy.embodiment(spec.embodiment)
        policy.embodiment_stats(robot.name)
        horizon = robot.control.horizon
        executed = horizon if spec.execute_steps is None else spec.execute_steps
        if executed > horizon:
            raise UserError(f"{key}.execute_steps: {executed} of a chunk of {horizon}; use at most {horizon}")
        factory = worlds.get(robot.name) or _world(spec, robot.simulation.world if robot.simulation else None, key)
        seats += [Seat(robot.name, executed, spec.chunks)] * spec.worlds
        factories += [factory] * spec.worlds
    return seats, factories


def _world(spec: WorldsSpec, world: str | None, key: str) -> WorldFactory:
    if world is None:
        raise UserError(f"{key}.embodiment: {spec.embodiment} names no `simulation.world` to learn in")
    known = world_class(world).task_names
    for task in spec.tasks:
        if task not in known:
            raise UserError(f"{key}.tasks: {task!r} is not a task of {world}; use {', '.join(known)}")
    return partial(make_world, world, tasks=spec.tasks or known)


def groups(recipe: RlRecipe, model: ActorCritic) -> list[tuple[str, list[torch.nn.Parameter], float]]:
    """(name, parameters, rate) of every part."""
    rates = recipe.rates
    own: dict[str, list[torch.nn.Parameter]] = {"vision": [], "language": [], "decoder": []}
    for name, parameter in model.policy.named_parameters():
        own[part_of(name)].append(parameter)
    own["value"] = list(model.value.parameters())
    return [(name, parameters, getattr(rates, name)) for name, parameters in own.items()]


def build_optimizer(recipe: RlRecipe, model: ActorCritic) -> torch.optim.AdamW:
    """AdamW (0.9, 0.999) [X] without weight decay, which would pull a cloned policy away from what it knows [O]."""
    trained: list[dict[str, Any]] = []
    for name, parameters, rate in groups(recipe, model):
        for parameter in parameters:
            parameter.requires_grad_(rate > 0)
        if rate > 0:
            trained.append({"params": parameters, "lr": rate, "name": name})
    return torch.optim.AdamW(trained, betas=(0.9, 0.999), weight_decay=0.0)
