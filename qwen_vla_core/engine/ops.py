"""The operations between matrix products, in plain torch: the reference of the CUDA kernels, and what CPUs run.

``kernels.py`` has a class with the same methods that does each of them in one or two kernels. Both compute norms and
the delta rule in float32 and return the dtype they were given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as functional

from qwen_vla_core.model.attention import attend

Rotary = tuple[torch.Tensor, torch.Tensor]
KeyValues = tuple[torch.Tensor, torch.Tensor]
CHUNK = 64  # tokens of the delta rule that are solved at once where a sequence has more than ONE_CHUNK
ONE_CHUNK = 256


@dataclass(frozen=True)
class Valid:
    """Which tokens of the decoder's sequence are real; the same thing for two kinds of kernel.

    Attributes:
        context_mask: (B, 1, 1, C) bool over the context, None where nothing is padded.
        key_mask: (B, 1, 1, C + H) bool over context and actions, None where nothing is padded.
        lengths: (B, 2) int32, real prompt tokens and real action tokens of each row.
        prompt: L, where the prompt's slots end; a slot for the state may follow, then the actions.
        actions: H, the actions' slots.
    """

    context_mask: torch.Tensor | None
    key_mask: torch.Tensor | None
    lengths: torch.Tensor
    prompt: int
    actions: int


@dataclass(frozen=True)
class DeltaLayer:
    """The parameters of a gated delta net between its projections, in float32 unless said otherwise.

    Attributes:
        key_heads: heads of queries and keys.
        value_heads: heads of values; a multiple of ``key_heads``.
        key_width: of a query or key.
        value_width: of a value.
        taps: (channels, taps) of the causal convolution, in the model's dtype.
        decay: (value heads,) −exp(A_log).
        time_bias: (value heads,) added to the decay's input.
        norm: (value width,) of the gated norm, in the model's dtype.
        epsilon: of the gated norm.
    """

    key_heads: int
    value_heads: int
    key_width: int
    value_width: int
    taps: torch.Tensor
    decay: torch.Tensor
    time_bias: torch.Tensor
    norm: torch.Tensor
    epsilon: float

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries, keys and values side by side."""
        return 2 * self.key_heads * self.key_width + self.value_heads * self.value_width


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotates the first dimensions of (…, d), as many as ``rotary`` has; halves are pairs."""
    width = rotary[0].shape[-1]
    turned = x if width == x.shape[-1] else x[..., :width]
    first, second = turned.chunk(2, -1)
    turned = torch.addcmul(turned * rotary[0], torch.cat((-second, first), -1), rotary[1])
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), -1)


def causal_convolution(x_blc: torch.Tensor, taps_cn: torch.Tensor) -> torch.Tensor:
    """Depthwise convolution over the tokens that looks back only, then SiLU; (B, L, C)."""
    count = taps_cn.shape[1]
    padded = functional.pad(x_blc, (0, 0, count - 1, 0))
    length = x_blc.shape[1]
    total = padded[:, :length] * taps_cn[:, 0]
    for tap in range(1, count):
        total = torch.addcmul(total, padded[:, tap : tap + length], taps_cn[:, tap])
    return functional.silu(total)


def delta_rule(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_decay: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """The gated delta rule over a whole sequence from an empty state.

    Short sequences are one triangular system; longer ones go chunk by chunk with a state between them.

    Args:
        query: (B, heads, L, d) float32, normalised and scaled.
        key: (B, heads, L, d) float32, normalised.
        value: (B, heads, L, e) float32.
        log_decay: (B, heads, L) float32, ≤ 0.
        beta: (B, heads, L) float32, how much of a token's correction is written.

    Returns:
        (B, heads, L, e) float32.
    """
    length = query.shape[2]
    size = length if length <= ONE_CHUNK else CHUNK
    upper = torch.ones(size, size, dtype=torch.bool, device=query.device).triu(1)
    state: torch.Tensor | None = None
    outputs = []
    for start in range(0, length, size):
        q, k, v, g, b = (x[:, :, start : start + size] for x in (query, key, value, log_decay, beta))
        hidden = upper[: q.shape[2], : q.shape[2]]
        total = g.cumsum(-1)
        between = (total[..., :, None] - total[..., None, :]).masked_fill(hidden, float("-inf")).exp()
        b = b[..., None]
        weighted = k * b
        system = (weighted @ k.transpose(-1, -2)) * between
        seen = total.exp()[..., None]
        wanted = v * b
        if state is not None:
            wanted = wanted - (weighted * seen) @ state
        written = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
        out = ((q @ k.transpose(-1, -2)) * between) @ written
        if state is not None:
            out = out + (q * seen) @ state
        outputs.append(out)
        if start + size < length:
            kept = (total[..., -1:] - total).exp()[..., None]
            update = (k * kept).transpose(-1, -2) @ written
            state = update if state is None else state * seen[..., -1:, :] + update
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


class TorchOps:
    """Every operation in torch."""

    name = "torch"

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x @ weightᵀ + bias."""
        return functional.linear(x, weight, bias)

    def linear_gelu(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """``linear``, then the tanh form of GELU."""
        return functional.gelu(self.linear(x, weight, bias), approximate="tanh")

    def add_rms_norm(
        self, x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + y, its RMS norm times ``weight``); ``weight`` is float32 and holds the 1 that Qwen3.5 adds."""
        x = x if y is None else x + y
        return x, functional.rms_norm(x.float(), weight.shape, weight, epsilon).to(x.dtype)

    def add_layer_norm(
        self,
        x: torch.Tensor,
        y: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        epsilon: float = 1e-5,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + gate·y, its layer norm times ``scale`` plus ``shift``); every vector has the model's width."""
        if y is not None:
            x = x + y if gate is None else torch.addcmul(x, gate, y)
        return x, functional.layer_norm(x, x.shape[-1:], scale, shift, epsilon)

    def add_gated(self, x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """x + gate·y."""
        return torch.addcmul(x, gate, y)

    def silu_product(self, both: torch.Tensor) -> torch.Tensor:
        """(…, 2 n) gate and up side by side → silu(gate) · up."""
        gate, up = both.chunk(2, -1)
        return functional.silu(gate) * up

    def delta_net(self, projected: torch.Tensor, layer: DeltaLayer) -> torch.Tensor:
        """All of a gated delta net between its input and output projections.

        Args:
            projected: (B, L, channels + value heads · value width + 2 value heads): queries, keys and values; the
                output gate; the inputs of beta and of the decay.
            layer: parameters.

        Returns:
            (B, L, value heads · value width).
        """
        batch, length, _ = projected.shape
        heads, width = layer.value_heads, layer.value_width
        mixed, gate, b, a = projected.split((layer.channels, heads * width, heads, heads), -1)
        mixed = causal_convolution(mixed, layer.taps).float()
        size = layer.key_heads * layer.key_width
        query, key, value = mixed.split((size, size, heads * width), -1)
        query = query.unflatten(-1, (layer.key_heads, -1))
        key = key.unflatten(-1, (layer.key_heads, -1))
        query = query * torch.rsqrt(query.square().sum(-1, keepdim=True) + 1e-6) * layer.key_width**-0.5
        key = key * torch.rsqrt(key.square().sum(-1, keepdim=True) + 1e-6)
        if layer.key_heads != heads:
            query, key = (x.repeat_interleave(heads // layer.key_heads, 2) for x in (query, key))
        decay = layer.decay * functional.softplus(a.float() + layer.time_bias)
        out = delta_rule(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.unflatten(-1, (heads, width)).transpose(1, 2),
            decay.transpose(1, 2),
            b.sigmoid().float().transpose(1, 2),
        ).to(projected.dtype)
        normed = functional.rms_norm(out.transpose(1, 2).float(), (width,), None, layer.epsilon).to(projected.dtype)
        gated = (normed * layer.norm) * functional.silu(gate.unflatten(-1, (heads, width)).float())
        return gated.to(projected.dtype).reshape(batch, length, heads * width)

    def text_attention(
        self,
        projected: torch.Tensor,
        norms: torch.Tensor,
        rotary: Rotary,
        heads: int,
        groups: int,
        epsilon: float,
        gated: bool,
    ) -> torch.Tensor:
        """The backbone's causal attention between its projections.

        Args:
            projected: (B, L, (heads or, gated, 2 heads, + 2 groups) d): per head a query and perhaps its gate; keys;
                values.
            norms: of queries and of keys, (2, d) float32.
            rotary: cos and sin, (B, L, 1, r) with r ≤ d.
            heads: of queries.
            groups: of keys and values.
            epsilon: of the norms.
            gated: whether the answer is multiplied by a sigmoid of the gates (Qwen3.5).

        Returns:
            (B, L, heads · d).
        """
        width = norms[0].shape[0]
        sizes = ((2 if gated else 1) * heads * width, groups * width, groups * width)
        first, keys, values = projected.split(sizes, -1)
        query = first.unflatten(-1, (heads, -1))
        gate = None
        if gated:
            query, gate = query.chunk(2, -1)
        if gated:
            query = functional.rms_norm(query.float(), (width,), norms[0], epsilon).to(projected.dtype)
            key = functional.rms_norm(keys.unflatten(-1, (groups, width)).float(), (width,), norms[1], epsilon)
            query, key = rotate(query, rotary), rotate(key.to(projected.dtype), rotary)
        else:  # queries and keys lie side by side: both at once
            both = projected[..., : (heads + groups) * width].unflatten(-1, (heads + groups, width))
            weights = torch.cat((norms[:1].expand(heads, -1), norms[1:].expand(groups, -1)))
            both = (functional.rms_norm(both.float(), (width,), None, epsilon) * weights).to(projected.dtype)
            query, key = rotate(both, rotary).split((heads, groups), 2)
        seen = self.causal(query, key, values.unflatten(-1, (groups, width))).flatten(2)
        return seen if gate is None else seen * gate.flatten(2).sigmoid()

    @staticmethod
    def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal attention of (B, L, heads, d); fewer keys than queries are shared in groups."""
        shared = query.shape[2] // key.shape[2]
        if shared > 1:  # written out: torch's own grouping leaves the fast kernels on some devices
            key, value = (x[:, :, :, None].expand(-1, -1, -1, shared, -1).flatten(2, 3) for x in (key, value))
        out = functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True
        )
        return out.transpose(1, 2)

    def image_attention(self, projected: torch.Tensor, rotary: Rotary, heads: int) -> torch.Tensor:
        """Full attention inside each picture.

        Args:
            projected: (pictures, patches, 3 heads d).
            rotary: cos and sin, (patches, 1, d) float32.
            heads: of the tower.

        Returns:
            (pictures, patches, heads · d).
        """
        split = projected.unflatten(-1, (3, heads, -1))
        query, key = rotate(split[:, :, :2].float(), (rotary[0][:, None], rotary[1][:, None])).unbind(2)
        query, key = (x.to(projected.dtype).transpose(1, 2) for x in (query, key))
        value = split[:, :, 2]
        out = functional.scaled_dot_product_attention(query, key, value.transpose(1, 2))
        return out.transpose(1, 2).flatten(2)

    def context_heads(
        self, projected: torch.Tensor, norms: torch.Tensor, rotary: Rotary, heads: int
    ) -> tuple[torch.Tensor, KeyValues]:
        """Queries, and keys and values, of tokens of the decoder.

        Args:
            projected: (B, C, 3 heads d).
            norms: of queries and of keys, (2, d).
            rotary: cos and sin, (B, 1, C, d).
            heads: of the decoder.

        Returns:
            (B, heads, C, d) queries, and as many keys and values.
        """
        both = projected.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        width = both.shape[-1]
        weights = norms[:, None, None, None]
        query, key = rotate(functional.rms_norm(both[:2], (width,), None, 1e-6) * weights, rotary).unbind(0)
        value = both[2]
        return query, (key, value)

    def context_attention(self, query: torch.Tensor, keys: KeyValues, valid: Valid) -> torch.Tensor:
        """Full attention of context tokens to the real ones: (B, heads, C, d) → (B, C, heads · d)."""
        return attend(query, keys[0], keys[1], valid.context_mask).transpose(1, 2).flatten(2)

    def action_attention(
        self, projected: torch.Tensor, norms: torch.Tensor, rotary: Rotary, heads: int, context: KeyValues, valid: Valid
    ) -> torch.Tensor:
        """Action tokens, (B, H, 3 heads d) as projected, attending to context and themselves → (B, H, heads · d)."""
        query, (key, value) = self.context_heads(projected, norms, rotary, heads)
        keys, values = torch.cat((context[0], key), 2), torch.cat((context[1], value), 2)
        return attend(query, keys, values, valid.key_mask).transpose(1, 2).flatten(2)

    def few(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x @ weightᵀ for few tokens."""
        return functional.linear(x, weight)

    def few_gated(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """silu(gate) · up of few tokens, with both weights one above the other."""
        return self.silu_product(functional.linear(x, weight))

    def few_summed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """As ``few``, for ``add_layer_norm`` only: kernels may leave the sum over parts of the product to it."""
        return functional.linear(x, weight)


PACKED_ROWS = 32  # fewer tokens gain nothing from a packed weight


class PackedOps(TorchOps):
    """For CPUs in float32: weights of products with many rows are packed once for oneDNN.

    Half of the time of torch's own product on an AMD EPYC core (82 × 128 × 512: 51 µs against 99 µs). The packed copies
    double the memory of these weights and do not follow them: an engine is for weights that do not change.
    """

    name = "packed"

    def __init__(self) -> None:
        self._packed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @staticmethod
    def available() -> bool:
        """Whether this torch can pack weights."""
        return bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        if rows < PACKED_ROWS:
            return functional.linear(x, weight, bias)
        kept = self._packed.get(id(weight))
        if kept is None:
            # The weight is kept beside its packed copy, so that its id cannot become another's.
            kept = (weight, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows))
            self._packed[id(weight)] = kept
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, kept[1], bias, "none", [], "")
        return product
