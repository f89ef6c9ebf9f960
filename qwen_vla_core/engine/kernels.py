"""``TritonOps``: the operations of ``ops.TorchOps`` in one or two CUDA kernels each.

Between matrix products a step of the decoder is a few dozen values per thread: its time is the number of kernels. These
fuse what lies between two products. They need nothing but Triton, which comes with CUDA builds of torch; shapes that
do not change the code (batch, tokens) are arguments, so one compilation serves every bucket. Tested against the torch
operations on CPUs through Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwen_vla_core.engine.ops import DeltaLayer, KeyValues, Rotary, TorchOps, Valid

CHUNK = 64


@triton.jit
def _add_norm(x, y, gate, scale, shift, total, out, width, epsilon, ADD: tl.constexpr, GATED: tl.constexpr,
              SCALED: tl.constexpr, SHIFTED: tl.constexpr, CENTRED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One row: total = x + gate·y; out = norm(total)·scale + shift, layer norm where CENTRED, else RMS norm."""
    row = tl.program_id(0).to(tl.int64) * width
    index = tl.arange(0, BLOCK)
    inside = index < width
    value = tl.load(x + row + index, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        added = tl.load(y + row + index, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            added = added * tl.load(gate + index, mask=inside, other=0.0).to(tl.float32)
        value = (value + added).to(x.dtype.element_ty).to(tl.float32)
        tl.store(total + row + index, value.to(total.dtype.element_ty), mask=inside)
    if CENTRED:
        value = tl.where(inside, value - tl.sum(value, 0) / width, 0.0)
    normed = value * tl.rsqrt(tl.sum(value * value, 0) / width + epsilon)
    if SCALED:
        normed = normed * tl.load(scale + index, mask=inside, other=0.0).to(tl.float32)
    if SHIFTED:
        normed = normed + tl.load(shift + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + index, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_product(both, out, width, BLOCK: tl.constexpr):
    """out = silu(first half) · second half of each row."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < width
    gate = tl.load(both + row * 2 * width + index, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + index, mask=inside, other=0.0).to(tl.float32)
    gate = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + index, (gate * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _convolution(x, taps, out, length, stride, channels, TAPS: tl.constexpr, TOKENS: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """Causal depthwise convolution and SiLU of (B, L, stride), the first ``channels`` of each token."""
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    for tap in tl.static_range(TAPS):
        source = token + tap - (TAPS - 1)
        seen = (source >= 0) & (source < length)
        value = tl.load(x + (batch * length + source)[:, None] * stride + channel[None, :],
                        mask=seen[:, None] & inside[None, :], other=0.0).to(tl.float32)  # fmt: skip
        weight = tl.load(taps + channel * TAPS + tap, mask=inside, other=0.0).to(tl.float32)
        total += value * weight[None, :]
    total = total * tl.sigmoid(total)
    place = (batch * length + token)[:, None] * channels + channel[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(token < length)[:, None] & inside[None, :])


@triton.jit
def _delta_chunks(mixed, projected, decay, time_bias, queries, keys, values, readers, scores, falls, length, stride,
                  gate_at, scale, HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
                  C: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """What of a chunk of C tokens does not depend on the state before it, for one value head.

    Writes decayed queries and keys, the values written to an empty state, what is read of the state to correct them,
    the scores inside the chunk, and the chunk's whole decay.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    batch, own = (head // HV).to(tl.int64), head % HV
    shared = own // (HV // HK)
    line = tl.arange(0, C)
    token = chunk * C + line
    inside = token < length
    row = (batch * length + token) * (2 * HK * DK + HV * DV)
    feature, place = tl.arange(0, DK), tl.arange(0, DV)
    kind = queries.dtype.element_ty
    source = projected + (batch * length + token) * stride + gate_at + own
    beta = tl.sigmoid(tl.load(source, mask=inside, other=0.0).to(tl.float32))
    beta = tl.where(inside, beta.to(mixed.dtype.element_ty).to(tl.float32), 0.0)
    push = tl.load(source + HV, mask=inside, other=0.0).to(tl.float32) + tl.load(time_bias + own)
    push = tl.where(push > 20.0, push, tl.log(1.0 + tl.exp(tl.minimum(push, 20.0))))
    fall = tl.cumsum(tl.where(inside, tl.load(decay + own) * push, 0.0), 0)
    whole = tl.sum(tl.where(line == C - 1, fall, 0.0), 0)
    below = line[:, None] >= line[None, :]
    between = tl.where(below, tl.exp(tl.where(below, fall[:, None] - fall[None, :], 0.0)), 0.0)
    seen = tl.exp(fall)
    at = (head.to(tl.int64) * tl.num_programs(0) + chunk) * C
    narrow = (at + line)[:, None] * DK + feature[None, :]
    tl.store(falls + head * tl.num_programs(0) + chunk, tl.exp(whole))

    key = tl.load(mixed + row[:, None] + (HK + shared) * DK + feature[None, :], mask=inside[:, None], other=0.0)
    key = key.to(tl.float32)
    key = key * tl.rsqrt(tl.sum(key * key, 1) + 1e-6)[:, None]
    tl.store(keys + narrow, (key * tl.exp(whole - fall)[:, None]).to(kind))
    query = tl.load(mixed + row[:, None] + shared * DK + feature[None, :], mask=inside[:, None], other=0.0)
    query = query.to(tl.float32)
    query = query * tl.rsqrt(tl.sum(query * query, 1) + 1e-6)[:, None] * scale
    tl.store(queries + narrow, (query * seen[:, None]).to(kind))
    turned = tl.trans(key)
    score = tl.dot(query, turned, input_precision=PRECISION) * between
    tl.store(scores + (at + line)[:, None] * C + line[None, :], score.to(kind))
    weighted = key * beta[:, None]
    system = tl.dot(weighted, turned, input_precision=PRECISION) * between
    # (1 + strictly lower system)⁻¹ by doubling diagonal blocks: as stable as substitution, and only matrix products.
    system = tl.where(line[:, None] > line[None, :], system, 0.0)
    inverse = tl.where(line[:, None] == line[None, :], 1.0, 0.0) - tl.where(
        (line[:, None] // 2 == line[None, :] // 2), system, 0.0
    )
    for level in range(1, 6):
        size = 1 << level
        corner = (line[:, None] // (2 * size) == line[None, :] // (2 * size)) & (
            line[:, None] // size != line[None, :] // size
        )
        half = tl.dot(inverse, tl.where(corner, system, 0.0), input_precision=EXACT)
        inverse -= tl.dot(half, inverse, input_precision=EXACT)
    reader = tl.dot(inverse, weighted * seen[:, None], input_precision=PRECISION)
    tl.store(readers + narrow, reader.to(kind))
    value = tl.load(mixed + row[:, None] + 2 * HK * DK + own * DV + place[None, :], mask=inside[:, None], other=0.0)
    written = tl.dot(inverse, value.to(tl.float32) * beta[:, None], input_precision=PRECISION)
    tl.store(values + (at + line)[:, None] * DV + place[None, :], written)


@triton.jit
def _delta_scan(queries, keys, values, readers, scores, falls, out, length, HV: tl.constexpr,
                DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                CHUNKS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Chunk after chunk for one head and BV of its value's dimensions: read the state, answer, write the state."""
    part, head = tl.program_id(0), tl.program_id(1)
    batch, own = (head // HV).to(tl.int64), head % HV
    line, feature, place = tl.arange(0, C), tl.arange(0, DK), part * BV + tl.arange(0, BV)
    state = tl.zeros((DK, BV), tl.float32)
    kind = queries.dtype.element_ty
    for chunk in range(CHUNKS):
        at = (head.to(tl.int64) * CHUNKS + chunk) * C
        narrow = (at + line)[:, None] * DK + feature[None, :]
        before = state.to(kind)
        value = tl.load(values + (at + line)[:, None] * DV + place[None, :])
        value -= tl.dot(tl.load(readers + narrow), before, input_precision=PRECISION)
        answer = tl.dot(tl.load(queries + narrow), before, input_precision=PRECISION)
        score = tl.load(scores + (at + line)[:, None] * C + line[None, :])
        fresh = value.to(kind)
        answer += tl.dot(score, fresh, input_precision=PRECISION)
        key = tl.load(keys + (at + line)[None, :] * DK + feature[:, None])
        state = state * tl.load(falls + head * CHUNKS + chunk) + tl.dot(key, fresh, input_precision=PRECISION)
        token = chunk * C + line
        target = ((batch * length + token) * HV + own)[:, None] * DV + place[None, :]
        tl.store(out + target, answer.to(out.dtype.element_ty), mask=(token < length)[:, None])


@triton.jit
def _gated_norm(x, gates, weight, out, stride, gate_at, epsilon, HV: tl.constexpr, DV: tl.constexpr):
    """One token: per head, RMS norm · weight · silu(gate)."""
    token = tl.program_id(0).to(tl.int64)
    head, place = tl.arange(0, HV), tl.arange(0, DV)
    at = token * HV * DV + head[:, None] * DV + place[None, :]
    value = tl.load(x + at).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 1) / DV + epsilon)[:, None]
    value = value.to(out.dtype.element_ty).to(tl.float32) * tl.load(weight + place).to(tl.float32)[None, :]
    gate = tl.load(gates + token * stride + gate_at + head[:, None] * DV + place[None, :]).to(tl.float32)
    tl.store(out + at, (value * gate * tl.sigmoid(gate)).to(out.dtype.element_ty))


@triton.jit
def _split_heads(x, weights, key_weights, cos, sin, queries, keys, values, stride, query_step, key_at, value_at, heads,
                 groups, length, period, out_batch, out_head, first, epsilon, D: tl.constexpr, R: tl.constexpr,
                 REPEAT: tl.constexpr, NORMED: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """One token and N heads of its queries, keys or values: RMS norm, rotate the first R dimensions, store by head.

    A token's row of ``stride`` values holds queries every ``query_step`` values, keys from ``key_at``, values from
    ``value_at``. Keys and values go to ``REPEAT`` neighbouring heads at slot ``first`` + token, with strides
    ``out_batch`` and ``out_head``. Rotary tables have ``period`` rows and repeat.
    """
    token, part = tl.program_id(0), tl.program_id(1)
    batch, line = (token // length).to(tl.int64), token % length
    query_parts, parts = tl.cdiv(heads, N), tl.cdiv(groups, N)
    role = tl.where(part < query_parts, 0, tl.where(part < query_parts + parts, 1, 2))
    block = tl.where(role == 0, part, tl.where(role == 1, part - query_parts, part - query_parts - parts))
    head = block * N + tl.arange(0, N)
    good = (head < tl.where(role == 0, heads, groups))[:, None]
    start = tl.where(role == 0, 0, tl.where(role == 1, key_at, value_at))
    step = tl.where(role == 0, query_step, D)
    index = tl.arange(0, D)
    base = x + token.to(tl.int64) * stride + start + head[:, None] * step
    value = tl.load(base + index[None, :], mask=good, other=0.0).to(tl.float32)
    kind = queries.dtype.element_ty
    if role < 2:
        half: tl.constexpr = R // 2
        inside = index < R
        other = tl.where(index < half, index + half, tl.where(inside, index - half, index))
        pair = tl.load(base + other[None, :], mask=good, other=0.0).to(tl.float32)
        if NORMED:
            factor = tl.rsqrt(tl.sum(value * value, 1) / D + epsilon)[:, None]
            if role == 0:
                straight, crossed = tl.load(weights + index), tl.load(weights + other)
            else:
                straight, crossed = tl.load(key_weights + index), tl.load(key_weights + other)
            value = (value * factor * straight.to(tl.float32)[None, :]).to(kind).to(tl.float32)
            pair = (pair * factor * crossed.to(tl.float32)[None, :]).to(kind).to(tl.float32)
        pair = tl.where((index < half)[None, :], -pair, pair)
        angle = (token % period).to(tl.int64) * R + index
        c = tl.load(cos + angle, mask=inside, other=1.0).to(tl.float32)
        s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
        value = value * c[None, :] + pair * s[None, :]
    if role == 0:
        target = ((batch * heads + head) * length + line)[:, None] * D + index[None, :]
        tl.store(queries + target, value.to(kind), mask=good)
    else:
        for copy in range(REPEAT):
            target = (
                batch * out_batch + (head * REPEAT + copy)[:, None] * out_head + (first + line) * D + index[None, :]
            )
            if role == 1:
                tl.store(keys + target, value.to(kind), mask=good)
            else:
                tl.store(values + target, value.to(kind), mask=good)


@triton.jit
def _attention(query, keys, values, lengths, out, tokens, prompt, context, slots, heads, scale, ACTIONS: tl.constexpr,
               BLOCKS: tl.constexpr,
               D: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Full attention of Q tokens of one head to the real ones of ``slots`` keys; online softmax.

    Slots: ``prompt`` of which the row's first length count, then perhaps a state, up to ``context``; then actions, of
    which the row's second length count.
    """
    block, pair = tl.program_id(0), tl.program_id(1)
    batch, head = pair // heads, pair % heads
    real = tl.load(lengths + batch * 2)
    acting = tl.load(lengths + batch * 2 + 1)
    line, index = block * Q + tl.arange(0, Q), tl.arange(0, D)
    own = pair.to(tl.int64)
    q = tl.load(query + (own * tokens + line)[:, None] * D + index[None, :], mask=(line < tokens)[:, None], other=0.0)
    top = tl.full((Q,), -1e30, tl.float32)
    weight = tl.zeros((Q,), tl.float32)
    total = tl.zeros((Q, D), tl.float32)
    used = slots if ACTIONS else context
    for number in range(BLOCKS):
        slot = number * K + tl.arange(0, K)
        good = (slot < real) | ((slot >= prompt) & (slot < context))
        if ACTIONS:
            good = good | ((slot >= context) & (slot < context + acting))
        good = good & (slot < used)
        at = (own * slots + slot) * D
        k = tl.load(keys + at[None, :] + index[:, None], mask=good[None, :], other=0.0)
        score = tl.dot(q, k, input_precision=PRECISION) * scale
        score = tl.where(good[None, :], score, -1e30)
        peak = tl.maximum(top, tl.max(score, 1))
        shrink = tl.exp(top - peak)
        part = tl.where(good[None, :], tl.exp(score - peak[:, None]), 0.0)
        weight = weight * shrink + tl.sum(part, 1)
        v = tl.load(values + at[:, None] + index[None, :], mask=good[:, None], other=0.0)
        total = total * shrink[:, None] + tl.dot(part.to(v.dtype), v, input_precision=PRECISION)
        top = peak
    answer = total / weight[:, None]
    target = ((batch.to(tl.int64) * tokens + line) * heads + head)[:, None] * D + index[None, :]
    tl.store(out + target, answer.to(out.dtype.element_ty), mask=(line < tokens)[:, None])


@triton.jit
def _sigmoid_product(x, gates, out, stride, HEADS: tl.constexpr, D: tl.constexpr):
    """One token and head: x · sigmoid(gate), where gates lie beside the queries, (heads, 2, D) per token."""
    token, head, index = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, D)
    gate = tl.load(gates + token * stride + head * 2 * D + D + index).to(tl.float32)
    at = (token * HEADS + head) * D + index
    value = tl.load(x + at).to(tl.float32) * tl.sigmoid(gate).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty))


def _pointer(tensor: torch.Tensor | None, fallback: torch.Tensor) -> torch.Tensor:
    return fallback if tensor is None else tensor


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


def _stages(x: torch.Tensor) -> int:
    """Stages of a software pipeline that holds 64 KiB each: as many as fit this chip's shared memory."""
    if x.device.type != "cuda" or x.dtype == torch.float32:
        return 1
    return 2 if torch.cuda.get_device_capability(x.device) in ((8, 0), (9, 0), (10, 0)) else 1


class TritonOps(TorchOps):
    """Every operation as kernels; see ``TorchOps`` for what each does."""

    name = "triton"

    def _norm(
        self,
        x: torch.Tensor,
        y: torch.Tensor | None,
        gate: torch.Tensor | None,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        epsilon: float,
        centred: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width = x.shape[-1]
        rows = x.numel() // width
        out = torch.empty_like(x)
        total = x if y is None else torch.empty_like(x)
        block = triton.next_power_of_2(width)
        _add_norm[(rows,)](
            x, _pointer(y, x), _pointer(gate, x), _pointer(scale, x), _pointer(shift, x), total, out, width, epsilon,
            ADD=y is not None, GATED=gate is not None, SCALED=scale is not None, SHIFTED=shift is not None,
            CENTRED=centred, BLOCK=block, num_warps=4 if block <= 2048 else 8,
        )  # fmt: skip
        return total, out

    def add_rms_norm(
        self, x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._norm(x, y, None, weight, None, epsilon, False)

    def add_layer_norm(
        self,
        x: torch.Tensor,
        y: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        epsilon: float = 1e-5,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._norm(x, y, gate, scale, shift, epsilon, True)

    def silu_product(self, both: torch.Tensor) -> torch.Tensor:
        width = both.shape[-1] // 2
        rows = both.numel() // (2 * width)
        out = both.new_empty(*both.shape[:-1], width)
        _silu_product[(rows, triton.cdiv(width, 1024))](both, out, width, BLOCK=1024, num_warps=4)
        return out

    def delta_net(self, projected: torch.Tensor, layer: DeltaLayer) -> torch.Tensor:
        batch, length, stride = projected.shape
        heads, chunks, channels = layer.value_heads, triton.cdiv(length, CHUNK), layer.channels
        mixed = projected.new_empty(batch, length, channels)
        _convolution[(triton.cdiv(length, 8), triton.cdiv(channels, 256), batch)](
            projected, layer.taps, mixed, length, stride, channels, TAPS=layer.taps.shape[1], TOKENS=8, BLOCK=256,
            num_warps=4,
        )  # fmt: skip

        tokens = batch * heads * chunks * CHUNK
        queries, keys, readers = (projected.new_empty(tokens * layer.key_width) for _ in range(3))
        scores = projected.new_empty(tokens * CHUNK)
        values = torch.empty(tokens * layer.value_width, dtype=torch.float32, device=projected.device)
        falls = torch.empty(tokens // CHUNK, dtype=torch.float32, device=projected.device)
        gate_at = channels + heads * layer.value_width
        precision = _precision(projected.dtype)
        _delta_chunks[(chunks, batch * heads)](
            mixed, projected, layer.decay, layer.time_bias, queries, keys, values, readers, scores, falls, length,
            stride, gate_at, layer.key_width**-0.5, HK=layer.key_heads, HV=heads, DK=layer.key_width,
            DV=layer.value_width, C=CHUNK, PRECISION=precision,
            EXACT="ieee" if precision == "ieee" else "tf32x3", num_warps=8,
        )  # fmt: skip
        out = projected.new_empty(batch, length, heads * layer.value_width)
        part = min(32, layer.value_width)
        _delta_scan[(layer.value_width // part, batch * heads)](
            queries, keys, values, readers, scores, falls, out, length, HV=heads, DK=layer.key_width,
            DV=layer.value_width, BV=part, C=CHUNK, CHUNKS=chunks, PRECISION=precision, num_warps=4,
            num_stages=_stages(projected),
        )  # fmt: skip
        gated = torch.empty_like(out)
        _gated_norm[(batch * length,)](
            out, projected, layer.norm, gated, stride, channels, layer.epsilon, HV=heads, DV=layer.value_width,
            num_warps=8,
        )  # fmt: skip
        return gated

    @staticmethod
    def _split(
        x: torch.Tensor,
        norms: tuple[torch.Tensor, torch.Tensor] | None,
        rotary: Rotary,
        heads: int,
        groups: int,
        width: int,
        gated: bool,
        into: KeyValues,
        first: int = 0,
        epsilon: float = 1e-6,
    ) -> torch.Tensor:
        """Queries (B, heads, L, width) of (B, L, …) ``x``; its keys and values go ``into`` slots from ``first``."""
        batch, length, stride = x.shape
        query = x.new_empty(batch, heads, length, width)
        keys, values = into
        step = 2 * width if gated else width
        key_at = heads * step
        weights = (x, x) if norms is None else norms
        block = 8
        parts = triton.cdiv(heads, block) + 2 * triton.cdiv(groups, block)
        turned = rotary[0].shape[-1]
        _split_heads[(batch * length, parts)](
            x, weights[0], weights[1], rotary[0], rotary[1], query, keys, values, stride, step, key_at,
            key_at + groups * width, heads, groups, length, rotary[0].numel() // turned,
            keys.stride(0), keys.stride(1), first, epsilon, D=width, R=turned,
            REPEAT=keys.shape[1] // groups, NORMED=norms is not None, N=block,
            num_warps=4 if width > 64 else 2,
        )  # fmt: skip
        return query

    def text_attention(
        self,
        projected: torch.Tensor,
        query_norm: torch.Tensor,
        key_norm: torch.Tensor,
        rotary: Rotary,
        heads: int,
        groups: int,
        epsilon: float,
    ) -> torch.Tensor:
        batch, length, stride = projected.shape
        width = query_norm.shape[0]
        key, value = (projected.new_empty(batch, heads, length, width) for _ in range(2))
        norms = (query_norm, key_norm)
        query = self._split(projected, norms, rotary, heads, groups, width, True, (key, value), epsilon=epsilon)
        seen = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        seen = seen.transpose(1, 2).contiguous()
        out = torch.empty_like(seen)
        _sigmoid_product[(batch * length, heads)](seen, projected, out, stride, HEADS=heads, D=width, num_warps=1)
        return out.flatten(2)

    def image_attention(self, projected: torch.Tensor, rotary: Rotary, heads: int) -> torch.Tensor:
        count, patches, stride = projected.shape
        width = stride // (3 * heads)
        key, value = (projected.new_empty(count, heads, patches, width) for _ in range(2))
        query = self._split(projected, None, rotary, heads, heads, width, False, (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return out.transpose(1, 2).flatten(2)

    def context_heads(
        self, projected: torch.Tensor, norms: KeyValues, rotary: Rotary, heads: int, room: int
    ) -> tuple[torch.Tensor, KeyValues]:
        batch, length, stride = projected.shape
        width = stride // (3 * heads)
        keys, values = (projected.new_empty(batch, heads, length + room, width) for _ in range(2))
        query = self._split(projected, norms, rotary, heads, heads, width, False, (keys, values))
        return query, (keys, values)

    def action_heads(
        self, projected: torch.Tensor, norms: KeyValues, rotary: Rotary, heads: int, context: KeyValues
    ) -> tuple[torch.Tensor, KeyValues]:
        width = context[0].shape[3]
        first = context[0].shape[2] - projected.shape[1]
        return self._split(projected, norms, rotary, heads, heads, width, False, context, first), context

    def attention(self, query: torch.Tensor, keys: KeyValues, valid: Valid, actions: bool) -> torch.Tensor:
        batch, heads, tokens, width = query.shape
        slots = keys[0].shape[2]
        out = query.new_empty(batch, tokens, heads * width)
        context = slots - valid.actions
        block = 16 if tokens <= 16 else 64
        _attention[(triton.cdiv(tokens, block), batch * heads)](
            query, keys[0], keys[1], valid.lengths, out, tokens, valid.prompt, context, slots, heads, width**-0.5,
            ACTIONS=actions, BLOCKS=triton.cdiv(slots if actions else context, 64), D=width, Q=block, K=64,
            PRECISION=_precision(query.dtype), num_warps=4,
        )  # fmt: skip
        return out
