"""The model in this process: requests in, chunks out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from qwen_vla_core.engine.buckets import Packed, Packer
from qwen_vla_core.engine.conditioning import predict_continued, use_of
from qwen_vla_core.engine.graphs import Captured, make_ops
from qwen_vla_core.engine.inputs import Preparer, Ready
from qwen_vla_core.engine.network import Network, Prefix
from qwen_vla_core.interfaces import Prediction, Request
from qwen_vla_core.model.policy import QwenVLA


class Clock:
    """Seconds between marks; on CUDA, where calls return before their work is done, by events on the stream."""

    def __init__(self, device: torch.device) -> None:
        """Starts."""
        self._cuda = device.type == "cuda"
        self._marks: list[float] = [time.monotonic()]
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """Ends a part and begins the next."""
        self._marks.append(time.monotonic())
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)

    def seconds(self) -> list[float]:
        """One duration per part; on CUDA only after the device was waited for."""
        host = [end - start for start, end in zip(self._marks, self._marks[1:], strict=False)]
        device = [start.elapsed_time(end) / 1000.0 for start, end in zip(self._events, self._events[1:], strict=False)]
        return [host[0], *device] if self._cuda else host


class LocalEngine:
    """Runs a policy on this machine; satisfies ``interfaces.Engine``.

    Requests of one call are answered together, whatever their robots and sentences; on CUDA those whose pictures and
    horizons have the same shapes. Requests that continue committed actions take the eager path (see ``conditioning``).
    """

    def __init__(
        self,
        policy: QwenVLA,
        *,
        steps: int | None = None,
        compile: bool = False,
        graphs: bool | None = None,
        kernels: bool | None = None,
    ) -> None:
        """
        Args:
            policy: in evaluation mode, on its device; its projections are joined in place, its answers stay the same.
            steps: Euler steps; None: the checkpoint's. May be changed between calls.
            compile: torch.compile the network once per bucket: the first answer in each takes one to two minutes.
            graphs: static buffers and, on CUDA, graphs captured over them; None: on CUDA.
            kernels: the project's CUDA kernels between the matrix products; None: on CUDA in half precision.
        """
        self.policy = policy
        self.steps = steps
        on_cuda = policy.device.type == "cuda"
        recorded = compile or (on_cuda if graphs is None else graphs)
        dtype = policy.decoder.context_in.weight.dtype
        use_kernels = on_cuda and dtype in (torch.bfloat16, torch.float16) if kernels is None else kernels
        packed = policy.device.type == "cpu" and dtype == torch.float32 and not compile
        self.network = Network(policy, make_ops(use_kernels, packed))
        self.network.tune(max((robot.control.horizon for robot in policy.embodiments.values()), default=1))
        self._captured = Captured(self.network, compile) if recorded else None
        self._prepare = Preparer(policy)
        self._pack = Packer(policy, self.network.text_rotary, fixed=recorded)

    def predict(self, requests: Sequence[Request]) -> list[Prediction]:
        """One prediction per request, in order.

        Raises:
            UserError: a view is missing, the state has another length, the robot is unknown, or committed actions do
                not fit it.
        """
        answers: dict[int, Prediction] = {}
        continuing = [index for index, request in enumerate(requests) if use_of(request) is not None]
        continued = predict_continued(self.policy, [requests[index] for index in continuing], self.steps)
        answers |= dict(zip(continuing, continued, strict=True))
        with torch.inference_mode():
            free = [index for index in range(len(requests)) if index not in answers]
            started = time.monotonic()
            ready = {index: self._prepare(requests[index].observation, requests[index].embodiment) for index in free}
            spent = time.monotonic() - started
            for indices in self._batches(ready):
                batch = [requests[index] for index in indices]
                predictions = self._answer(batch, [ready[index] for index in indices], spent)
                answers |= dict(zip(indices, predictions, strict=True))
        return [answers[index] for index in range(len(requests))]

    def _batches(self, ready: Mapping[int, Ready]) -> list[list[int]]:
        """Which requests are answered together.

        Padded shapes cost little, so without fixed shapes all of them (six requests of three robots: 33 ms, 38 ms by
        robot, 54 ms one by one). Recorded programs are per shape: mixing would make a new one for every mixture.
        """
        if self._captured is None:
            return [list(ready)] if ready else []
        groups: dict[object, list[int]] = {}
        for index, request in ready.items():
            groups.setdefault((request.row.sizes, request.row.horizon), []).append(index)
        return list(groups.values())

    def _answer(self, requests: Sequence[Request], ready: Sequence[Ready], spent: float) -> list[Prediction]:
        clock = Clock(self.policy.device)
        packed = self._pack(ready)
        noise_bhk = self._noise(requests, packed)
        clock.mark()
        prefix = self._see(packed)
        clock.mark()
        chunks_bhk = self._sample(packed, prefix, noise_bhk)
        clock.mark()
        chunks_bhk = chunks_bhk.float().cpu()
        chunks = [
            self.policy.postprocess(chunk[: item.row.horizon], request.observation, request.embodiment)
            for chunk, item, request in zip(chunks_bhk, ready, requests, strict=False)
        ]
        preprocess, backbone, denoise = clock.seconds()
        seconds = {"preprocess": spent + preprocess, "backbone": backbone, "denoise": denoise}
        return [Prediction(chunk, seconds) for chunk in chunks]

    def _see(self, packed: Packed) -> Prefix:
        """Everything that is done once per observation."""
        if self._captured is not None:
            return self._captured.prefill(packed)
        device = self.policy.device
        pictures = tuple(group.to(device) for group in packed.pictures)
        state = None if packed.state is None else packed.state.to(device)
        return self.network.prefill(packed.arrangement, pictures, state)

    def _sample(self, packed: Packed, prefix: Prefix, noise_bhk: torch.Tensor) -> torch.Tensor:
        """The Euler loop: noise → normalised chunks (B, H, K).

        A sampler that needs the velocity at every step (guided, or with its own flow time per action token) starts from
        ``prefix.context(packed.arrangement)`` and calls the eager ``ActionDecoder.denoise_step``.
        """
        steps = self.policy.config.flow.steps if self.steps is None else self.steps
        if self._captured is not None:
            return self._captured.integrate(packed, prefix, noise_bhk, steps)
        return self.network.integrate(packed.arrangement, prefix, noise_bhk.to(self.policy.device), steps)

    def _noise(self, requests: Sequence[Request], packed: Packed) -> torch.Tensor:
        """(B, H, K) float32 on the CPU; what a request brings, else drawn."""
        bucket = packed.arrangement.bucket
        noise = torch.randn(bucket.batch, bucket.horizon, self.policy.config.decoder.channels)
        for line, request in zip(noise, requests, strict=False):
            if request.noise_hk is not None:
                given = torch.from_numpy(np.asarray(request.noise_hk, dtype=np.float32))
                line[: given.shape[0]] = given
        return noise
