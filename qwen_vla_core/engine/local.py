"""The model in this process: requests in, chunks out."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from qwen_vla_core.engine.conditioning import predict_continued, use_of
from qwen_vla_core.interfaces import Prediction, Request
from qwen_vla_core.model.policy import QwenVLA


class LocalEngine:
    """Runs a policy on this machine; satisfies ``interfaces.Engine``.

    Requests of one robot are answered in one batch; several robots take one batch each, and so do requests that
    continue committed actions (see ``conditioning``).
    """

    def __init__(self, policy: QwenVLA, *, steps: int | None = None) -> None:
        """
        Args:
            policy: in evaluation mode, on its device.
            steps: Euler steps; None: the checkpoint's. May be changed between calls.
        """
        self.policy = policy
        self.steps = steps

    @torch.no_grad()
    def predict(self, requests: Sequence[Request]) -> list[Prediction]:
        """One prediction per request, in order.

        Raises:
            UserError: a view is missing, the state has another length, or the robot is unknown.
        """
        answers: list[Prediction | None] = [None] * len(requests)
        continuing = [index for index, request in enumerate(requests) if use_of(request) is not None]
        continued = predict_continued(self.policy, [requests[index] for index in continuing], self.steps)
        for index, prediction in zip(continuing, continued, strict=True):
            answers[index] = prediction
        free = [index for index in range(len(requests)) if index not in continuing]
        for name in dict.fromkeys(requests[index].embodiment for index in free):
            indices = [index for index in free if requests[index].embodiment == name]
            batch = self._predict_one_robot(name, [requests[index] for index in indices])
            for index, prediction in zip(indices, batch, strict=True):
                answers[index] = prediction
        return [answer for answer in answers if answer is not None]

    def _predict_one_robot(self, name: str, requests: Sequence[Request]) -> list[Prediction]:
        policy, horizon = self.policy, self.policy.embodiment(name).control.horizon
        marks = [time.monotonic()]
        inputs = policy.collate([request.observation for request in requests], name)
        marks.append(time.monotonic())
        context = policy.encode(inputs)
        marks.append(time.monotonic())
        chunks_bhk = policy.denoise(context, inputs, horizon, self.steps, self._noise(requests, horizon))
        chunks = [policy.postprocess(chunks_bhk[i], request.observation, name) for i, request in enumerate(requests)]
        marks.append(time.monotonic())
        parts = ("preprocess", "backbone", "denoise")
        seconds = {part: end - start for part, start, end in zip(parts, marks, marks[1:], strict=False)}
        return [Prediction(chunk, seconds) for chunk in chunks]

    def _noise(self, requests: Sequence[Request], horizon: int) -> torch.Tensor | None:
        if all(request.noise_hk is None for request in requests):
            return None
        shape = (horizon, self.policy.config.decoder.channels)
        rows = [
            torch.randn(shape) if request.noise_hk is None else torch.as_tensor(request.noise_hk, dtype=torch.float32)
            for request in requests
        ]
        return torch.stack(rows).to(self.policy.device)
