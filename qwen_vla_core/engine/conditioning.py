"""Requests that say what is committed: from absolute actions to a conditioned sampler.

The committed actions are absolute. Where the robot's convention is relative they are taken relative to the **new**
observation's state, the frame in which the new chunk is predicted, before they are normalised.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qwen_vla_core.actions.conventions import relative_parts, to_relative
from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import Committed, CommittedUse, Request
from qwen_vla_core.model.action_decoder import Context
from qwen_vla_core.model.guidance import integrate_clamped, integrate_guided, soft_mask
from qwen_vla_core.model.policy import Batch, QwenVLA


def use_of(request: Request) -> CommittedUse | None:
    """How a request's sampler is to be conditioned; None: not at all."""
    committed = request.committed
    return None if committed is None or not len(committed.actions_hc) else committed.use


def overlap_of(committed: Committed, horizon: int) -> int:
    """How many rows the sampler is pulled towards: half a chunk at most, beyond that only what is frozen.

    As published, where half of a chunk is executed before the next. Looks are closer together here; pulled towards all
    that is left, every chunk would repeat the one before and the robot would hardly react to what it sees [O].
    """
    return min(len(committed.actions_hc), max(committed.frozen, horizon // 2))


def normalised_target(policy: QwenVLA, request: Request, horizon: int) -> np.ndarray:
    """(H, K) the committed actions as the decoder sees them, zero where nothing is committed.

    Raises:
        UserError: more rows than the horizon, other columns than the robot's, or more frozen rows than there are.
    """
    assert request.committed is not None
    robot = policy.embodiment(request.embodiment)
    actions_hc = np.asarray(request.committed.actions_hc, dtype=np.float64)
    channels = len(robot.channels)
    if actions_hc.ndim != 2 or actions_hc.shape[1] != channels or not 0 < len(actions_hc) <= horizon:
        raise UserError(f"committed actions of {robot.name} must be (1…{horizon}, {channels}), got {actions_hc.shape}")
    if not 0 <= request.committed.frozen <= len(actions_hc):
        raise UserError(f"committed.frozen is {request.committed.frozen}: give 0 … {len(actions_hc)}")
    if not np.isfinite(actions_hc).all():
        raise UserError(f"committed actions of {robot.name} must be finite")
    parts = relative_parts(robot.control.convention, robot.actions, robot.state)
    relative_hc = to_relative(parts, actions_hc, np.asarray(request.observation.state, dtype=np.float64))
    target_hk = np.zeros((horizon, policy.config.decoder.channels))
    target_hk[: len(actions_hc), :channels] = policy.embodiment_stats(robot.name).action.normalize(relative_hc)
    return target_hk


def denoise_continued(
    policy: QwenVLA,
    context: Context,
    inputs: Batch,
    requests: Sequence[Request],
    horizon: int,
    steps: int | None = None,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """``QwenVLA.denoise`` for requests that all use what is committed in the same way.

    Args:
        policy: in evaluation mode.
        context: from ``policy.encode``, under ``no_grad`` (not ``inference_mode``: the Jacobian goes through it).
        inputs: the collated observations of ``requests``, one robot's.
        requests: B of them, each with committed actions.
        horizon: H.
        steps: Euler steps; None: the checkpoint's.
        noise: (B, H, K); None: drawn.

    Returns:
        (B, H, K) normalised chunks; padded channels are zero.
    """
    use, channel_mask = use_of(requests[0]), inputs["channel_mask"]
    count = policy.config.flow.steps if steps is None else steps
    shape = (len(requests), horizon, policy.config.decoder.channels)
    start = torch.where(
        channel_mask[:, None], torch.randn(shape, device=policy.device) if noise is None else noise, 0.0
    )
    targets = np.stack([normalised_target(policy, request, horizon) for request in requests])
    target = torch.as_tensor(targets, dtype=start.dtype, device=start.device)
    committed = [request.committed for request in requests if request.committed is not None]

    def velocity(noisy: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        return policy.decoder.denoise_step(context, noisy, tau, channel_mask)

    if use == "prefix":
        frozen = torch.tensor([each.frozen for each in committed], device=start.device)
        given = torch.arange(horizon, device=start.device) < frozen[:, None]
        return integrate_clamped(velocity, start, count, target, given)
    masks = torch.stack([soft_mask(horizon, each.frozen, overlap_of(each, horizon)) for each in committed])
    weight = masks.to(start)[..., None] * channel_mask[:, None].to(start)
    return integrate_guided(velocity, start, count, target, weight, jacobian=use == "guided_jacobian")
