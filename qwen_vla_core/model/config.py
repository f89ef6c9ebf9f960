"""The model's configuration: frozen, JSON-able, and strict about unknown keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qwen_vla_core.errors import UserError
from qwen_vla_core.model.flow import FlowConfig

ContextMode = Literal["cached", "joint"]
StateMode = Literal["none", "prompt", "dit_token"]


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of the action decoder; defaults are the paper's.

    Attributes:
        width: model width, 1536 [I].
        depth: number of DiT blocks, 16 [P].
        heads: attention heads, 24 [I].
        head_dim: 64 [I]; equals the rotary dimension of Qwen3.5, so both use the same frequencies.
        ffn: SwiGLU hidden size, 10240 [I].
        channels: K, padded channels of the action tensor, 64 [I].
        state_channels: padded length of the state vector.
        time_embedding: sinusoid size of the flow time, 256 [P].
        rope_theta: base of the rotary frequencies; the backbone's.
        mrope_section: frequencies given to time, height and width; sums to head_dim / 2.
        context: ``cached`` = context tokens are not modulated by τ and do not see actions, so their keys and values are
            computed once per observation [O]; ``joint`` = one sequence, as published [P]. Weights do not interchange.
    """

    width: int = 1536
    depth: int = 16
    heads: int = 24
    head_dim: int = 64
    ffn: int = 10240
    channels: int = 64
    state_channels: int = 64
    time_embedding: int = 256
    rope_theta: float = 1e7
    mrope_section: tuple[int, int, int] = (11, 11, 10)
    context: ContextMode = "cached"

    def __post_init__(self) -> None:
        if sum(self.mrope_section) * 2 != self.head_dim:
            raise UserError(
                f"decoder.mrope_section {self.mrope_section} must sum to head_dim / 2 = {self.head_dim // 2}"
            )
        if self.context not in ("cached", "joint"):
            raise UserError(f"decoder.context is {self.context!r}: use 'cached' or 'joint'")


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build the network, apart from weights.

    Attributes:
        backbone: the Hugging Face configuration as a dict; its ``model_type`` names the class.
        decoder: the action decoder's shape.
        flow: flow-matching choices.
        state_mode: how proprioception enters [P]: ``none`` (default), ``prompt`` (256-bin text) or ``dit_token``.
        preset: name it was built from, for people.
    """

    backbone: Mapping[str, Any]
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    state_mode: StateMode = "none"
    preset: str = "custom"

    def __post_init__(self) -> None:
        if self.state_mode not in ("none", "prompt", "dit_token"):
            raise UserError(f"state_mode is {self.state_mode!r}: use 'none', 'prompt' or 'dit_token'")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """The inverse of ``to_dict``; a missing or unknown key is a UserError that names it."""
        values = _checked(cls, data, "model")
        decoder = _checked(DecoderConfig, values["decoder"], "model.decoder")
        decoder["mrope_section"] = tuple(decoder["mrope_section"])
        values["decoder"] = DecoderConfig(**decoder)
        values["flow"] = FlowConfig(**_checked(FlowConfig, values["flow"], "model.flow"))
        return cls(**values)


def _checked(cls: type[Any], data: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise UserError(f"config.json: {where} must be an object")
    known = {item.name for item in dataclasses.fields(cls)}
    for key in sorted(set(data) - known):
        raise UserError(f"config.json: unknown key {where}.{key}; remove it or use the version that wrote it")
    for key in sorted(known - set(data)):
        raise UserError(f"config.json: missing key {where}.{key}")
    return dict(data)
