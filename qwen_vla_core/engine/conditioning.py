"""Requests that say what is committed: from absolute actions to a conditioned sampler.

The committed actions are absolute. Where the robot's convention is relative they are taken relative to the **new**
observation's state, the frame in which the new chunk is predicted, before they are normalised.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from qwen_vla_core.actions.conventions import relative_parts, to_relative
from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import Committed, CommittedUse, Prediction, Request
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


def predict_continued(policy: QwenVLA, requests: Sequence[Request], steps: int | None = None) -> list[Prediction]:
    """Answers requests that all have committed actions, on the eager path; one answer each, in order.

    Requests of one robot that use what is committed in the same way are answered in one batch.

    Args:
        policy: in evaluation mode, on its device.
        requests: each with ``use_of`` not None.
        steps: Euler steps; None: the checkpoint's.

    Raises:
        UserError: a view is missing, the state has another length, the robot is unknown, or the committed actions do
            not fit it.
    """
    answers: list[Prediction | None] = [None] * len(requests)
    kinds = [(request.embodiment, use_of(request)) for request in requests]
    for kind in dict.fromkeys(kinds):
        indices = [index for index, other in enumerate(kinds) if other == kind]
        # Never in inference mode: the Jacobian goes through the context, which then could not be kept for it.
        with torch.inference_mode(False), torch.no_grad():
            batch = _predict_alike(policy, kind[0], [requests[index] for index in indices], steps)
        for index, prediction in zip(indices, batch, strict=True):
            answers[index] = prediction
    return [answer for answer in answers if answer is not None]


def _predict_alike(policy: QwenVLA, name: str, requests: Sequence[Request], steps: int | None) -> list[Prediction]:
    horizon, marks = policy.embodiment(name).control.horizon, [time.monotonic()]
    inputs = policy.collate([request.observation for request in requests], name)
    marks.append(time.monotonic())
    context = policy.encode(inputs)
    marks.append(time.monotonic())
    chunks_bhk = _denoise(policy, context, inputs, requests, horizon, steps)
    chunks = [policy.postprocess(chunks_bhk[i], request.observation, name) for i, request in enumerate(requests)]
    marks.append(time.monotonic())
    parts = ("preprocess", "backbone", "denoise")
    seconds = {part: end - start for part, start, end in zip(parts, marks, marks[1:], strict=False)}
    return [Prediction(chunk, seconds) for chunk in chunks]


def _denoise(
    policy: QwenVLA,
    context: Context,
    inputs: Batch,
    requests: Sequence[Request],
    horizon: int,
    steps: int | None,
) -> torch.Tensor:
    """(B, H, K) ``QwenVLA.denoise``, conditioned; padded channels are zero."""
    use, channel_mask = use_of(requests[0]), inputs["channel_mask"]
    count = policy.config.flow.steps if steps is None else steps
    shape = (horizon, policy.config.decoder.channels)
    noise = [
        torch.randn(shape) if request.noise_hk is None else torch.tensor(request.noise_hk, dtype=torch.float32)
        for request in requests
    ]
    start = torch.where(channel_mask[:, None], torch.stack(noise).to(policy.device), 0.0)
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
