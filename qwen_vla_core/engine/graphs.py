"""CUDA graphs: one for everything that is done once per observation, one for all Euler steps."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qwen_vla_core.engine.buckets import Arrangement, Bucket, Packed
from qwen_vla_core.engine.network import Network, Prefix
from qwen_vla_core.engine.ops import PackedOps, TorchOps

KEPT_BUCKETS = 16
WARM_UPS = 2  # calls before a capture: libraries choose their kernels, kernels are compiled


def make_ops(kernels: bool, packed: bool) -> TorchOps:
    """The project's CUDA kernels, or torch with or without packed weights."""
    if kernels:
        from qwen_vla_core.engine.triton_ops import TritonOps

        return TritonOps()
    return PackedOps() if packed and PackedOps.available() else TorchOps()


def copy_into(target: Any, source: Any) -> None:
    """Copies every tensor of nested sequences and dataclasses into its namesake; shapes are equal."""
    if isinstance(target, torch.Tensor):
        target.copy_(source, non_blocking=True)
    elif isinstance(target, (tuple, list)):
        for left, right in zip(target, source, strict=True):
            copy_into(left, right)
    elif dataclasses.is_dataclass(target) and not isinstance(target, Bucket):
        for field in dataclasses.fields(target):
            copy_into(getattr(target, field.name), getattr(source, field.name))


def clone(value: Any) -> Any:
    """A deep copy of the tensors in nested tuples and dataclasses."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return tuple(clone(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Bucket)):
        fields = {field.name: clone(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


class Recorded:
    """A function of static buffers, captured as a CUDA graph.

    Without CUDA it is called each time and its answer copied to where the first one lies: the same promises, so that
    everything around a capture is tested on CPUs.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device, pool: Any) -> None:
        """Calls ``function`` to warm it up, then captures it. Nothing in it may ask the device for a number."""
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type != "cuda":
            self.output = function()
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function()
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self.output = function()

    def __call__(self) -> Any:
        """Runs it; the answer is in the same tensors every time."""
        if self._graph is None:
            copy_into(self.output, self._function())
        else:
            self._graph.replay()
        return self.output


@dataclass
class Slot:
    """The static buffers and graphs of one bucket."""

    arrangement: Arrangement
    shown: Arrangement  # whose values the buffers hold
    pictures: tuple[torch.Tensor, ...]
    state: torch.Tensor | None
    noise: torch.Tensor
    staging: tuple[torch.Tensor, ...]  # the pictures in pinned memory, from where they are copied without a wait
    prefill: Recorded | None = None
    integrate: dict[int, Recorded] = dataclasses.field(default_factory=dict)


class Captured:
    """Runs a network through graphs, one pair per bucket, the least recently used dropped first."""

    def __init__(self, network: Network, compile: bool = False) -> None:
        """
        Args:
            network: on its device.
            compile: torch.compile what is recorded.
        """
        self.network, self._compile = network, compile
        self.device = network.policy.device
        self._slots: OrderedDict[Bucket, Slot] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def prefill(self, packed: Packed) -> Prefix:
        """As ``Network.prefill``; the answer is overwritten by the bucket's next call."""
        slot = self._slot(packed)
        self._upload(slot, packed)
        if self.network.fast is None:
            return self.network.prefill(slot.arrangement, slot.pictures, slot.state)
        if slot.prefill is None:
            slot.prefill = self._record(lambda: self.network.prefill(slot.arrangement, slot.pictures, slot.state))
        prefix: Prefix = slot.prefill()
        return prefix

    def integrate(self, packed: Packed, prefix: Prefix, noise_bhk: torch.Tensor, steps: int) -> torch.Tensor:
        """As ``Network.integrate``, for the prefix of the bucket's last ``prefill``."""
        slot = self._slot(packed)
        slot.noise.copy_(noise_bhk, non_blocking=True)
        if self.network.fast is None:
            return self.network.integrate(slot.arrangement, prefix, slot.noise, steps)
        if steps not in slot.integrate:
            self.network.warm(slot.arrangement, steps)
            slot.integrate[steps] = self._record(
                lambda: self.network.integrate(slot.arrangement, prefix, slot.noise, steps)
            )
        chunk: torch.Tensor = slot.integrate[steps]()
        return chunk

    def _record(self, function: Callable[[], Any]) -> Recorded:
        # The tensors a function closes over are the bucket's own, so it is compiled once per bucket.
        made = torch.compile(function, dynamic=False) if self._compile else function
        return Recorded(made, self.device, self._pool)

    def _slot(self, packed: Packed) -> Slot:
        bucket = packed.arrangement.bucket
        slot = self._slots.get(bucket)
        if slot is None:
            self.network.warm(packed.arrangement, 1)
            channels = self.network.policy.config.decoder.channels
            slot = Slot(
                arrangement=clone(packed.arrangement),
                shown=packed.arrangement,
                pictures=tuple(group.to(self.device, copy=True) for group in packed.pictures),
                state=None if packed.state is None else packed.state.to(self.device, copy=True),
                noise=torch.zeros(bucket.batch, bucket.horizon, channels, device=self.device),
                staging=tuple(group.pin_memory() for group in packed.pictures) if self._pool is not None else (),
            )
            self._slots[bucket] = slot
            if len(self._slots) > KEPT_BUCKETS:
                self._slots.popitem(last=False)
        self._slots.move_to_end(bucket)
        if slot.shown is not packed.arrangement:
            copy_into(slot.arrangement, packed.arrangement)
            slot.shown = packed.arrangement
        return slot

    def _upload(self, slot: Slot, packed: Packed) -> None:
        for index, (target, source) in enumerate(zip(slot.pictures, packed.pictures, strict=True)):
            if slot.staging:
                source = slot.staging[index].copy_(source)
            target.copy_(source, non_blocking=True)
        if slot.state is not None and packed.state is not None:
            slot.state.copy_(packed.state, non_blocking=True)
