"""CUDA kernels, in Triton, for what lies between matrix products, and for products with few rows.

Triton comes with CUDA builds of torch. Shapes that do not change the code (batch, tokens) are arguments, so one
compilation serves most buckets. ``triton_ops.py`` calls them; each is tested against ``ops.TorchOps`` on CPUs through
Triton's interpreter. Norms, softmax and sums are float32; values are rounded where the eager path rounds them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_norm(x, y, gate, scale, shift, total, out, width, epsilon, PARTS: tl.constexpr, GATED: tl.constexpr,
              SCALED: tl.constexpr, SHIFTED: tl.constexpr, CENTRED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One row: total = x + gate·(sum of y's parts); out = norm(total)·scale + shift, layer norm where CENTRED."""
    line, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    row = line * width
    index = tl.arange(0, BLOCK)
    inside = index < width
    value = tl.load(x + row + index, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        added = tl.load(y + row + index, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            added += tl.load(y + (part * rows + line) * width + index, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            added = added.to(x.dtype.element_ty).to(tl.float32)
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
def silu_product(both, out, width, BLOCK: tl.constexpr):
    """out = silu(first half) · second half of each row."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < width
    gate = tl.load(both + row * 2 * width + index, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + index, mask=inside, other=0.0).to(tl.float32)
    gate = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + index, (gate * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def convolution(x, taps, out, length, stride, channels, TAPS: tl.constexpr, TOKENS: tl.constexpr,
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
def delta_chunks(mixed, projected, decay, time_bias, queries, keys, values, readers, scores, falls, length, stride,
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
def delta_scan(queries, keys, values, readers, scores, falls, out, length, HV: tl.constexpr,
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
def gated_norm(x, gates, weight, out, stride, gate_at, epsilon, HV: tl.constexpr, DV: tl.constexpr):
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
def split_heads(x, weights, key_weights, cos, sin, queries, keys, values, stride, query_step, key_at, value_at, heads,
                 groups, length, period, epsilon, D: tl.constexpr, R: tl.constexpr,
                 REPEAT: tl.constexpr, NORMED: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """One token and N heads of its queries, keys or values: RMS norm, rotate the first R dimensions, store by head.

    A token's row of ``stride`` values holds queries every ``query_step`` values, keys from ``key_at``, values from
    ``value_at``. Keys and values go to ``REPEAT`` neighbouring heads. Rotary tables have ``period`` rows and repeat.
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
            other_head = (batch * groups + head) * REPEAT + copy
            target = (other_head[:, None] * length + line) * D + index[None, :]
            if role == 1:
                tl.store(keys + target, value.to(kind), mask=good)
            else:
                tl.store(values + target, value.to(kind), mask=good)


@triton.jit
def _soften(score, good, v, top, weight, total, PRECISION: tl.constexpr):
    """One block of online softmax: scores (Q, K) of keys that are ``good`` (K,), and their values (K, D)."""
    score = tl.where(good[None, :], score, -1e30)
    peak = tl.maximum(top, tl.max(score, 1))
    shrink = tl.exp(top - peak)
    part = tl.where(good[None, :], tl.exp(score - peak[:, None]), 0.0)
    weight = weight * shrink + tl.sum(part, 1)
    total = total * shrink[:, None] + tl.dot(part.to(v.dtype), v, input_precision=PRECISION)
    return peak, weight, total


@triton.jit
def context_attention(query, keys, values, lengths, out, tokens, prompt, heads, scale, BLOCKS: tl.constexpr,
                       D: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Q context tokens of one head to the real ones: a row's first length of ``prompt`` slots, and all behind them."""
    block, pair = tl.program_id(0), tl.program_id(1)
    batch, head = pair // heads, pair % heads
    real = tl.load(lengths + batch * 2)
    line, index = block * Q + tl.arange(0, Q), tl.arange(0, D)
    own = pair.to(tl.int64) * tokens
    q = tl.load(query + (own + line)[:, None] * D + index[None, :], mask=(line < tokens)[:, None], other=0.0)
    top = tl.full((Q,), -1e30, tl.float32)
    weight = tl.zeros((Q,), tl.float32)
    total = tl.zeros((Q, D), tl.float32)
    for number in range(BLOCKS):
        slot = number * K + tl.arange(0, K)
        good = ((slot < real) | (slot >= prompt)) & (slot < tokens)
        at = (own + slot) * D
        k = tl.load(keys + at[None, :] + index[:, None], mask=(slot < tokens)[None, :], other=0.0)
        v = tl.load(values + at[:, None] + index[None, :], mask=(slot < tokens)[:, None], other=0.0)
        score = tl.dot(q, k, input_precision=PRECISION) * scale
        top, weight, total = _soften(score, good, v, top, weight, total, PRECISION)
    target = ((batch.to(tl.int64) * tokens + line) * heads + head)[:, None] * D + index[None, :]
    tl.store(out + target, (total / weight[:, None]).to(out.dtype.element_ty), mask=(line < tokens)[:, None])


@triton.jit
def _turned(base, weights, cos, sin, good, line, index, kind, D: tl.constexpr):
    """Normed and rotated (Q, D) rows at ``base`` (Q, 1); ``cos`` and ``sin`` point to this row's table."""
    half: tl.constexpr = D // 2
    other = tl.where(index < half, index + half, index - half)
    value = tl.load(base + index[None, :], mask=good, other=0.0).to(tl.float32)
    pair = tl.load(base + other[None, :], mask=good, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value, 1) / D + 1e-6)[:, None]
    value = (value * factor * tl.load(weights + index).to(tl.float32)[None, :]).to(kind).to(tl.float32)
    pair = (pair * factor * tl.load(weights + other).to(tl.float32)[None, :]).to(kind).to(tl.float32)
    pair = tl.where((index < half)[None, :], -pair, pair)
    angle = line[:, None] * D + index[None, :]
    c = tl.load(cos + angle, mask=good, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=good, other=0.0).to(tl.float32)
    return (value * c + pair * s).to(kind)


@triton.jit
def action_attention(x, query_weights, key_weights, cos, sin, keys, values, lengths, out, tokens, prompt, context,
                      heads, scale, BLOCKS: tl.constexpr, D: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
                      PRECISION: tl.constexpr):  # fmt: skip
    """All action tokens of one row and head to the context's keys and to each other.

    ``x`` is the projection, (3, heads, D) per token; queries and keys are normed and rotated here. Of the context a
    row's first length of ``prompt`` slots counts, and all between ``prompt`` and ``context``.
    """
    pair = tl.program_id(0)
    batch, head = (pair // heads).to(tl.int64), pair % heads
    real = tl.load(lengths + batch * 2)
    acting = tl.load(lengths + batch * 2 + 1)
    line, index = tl.arange(0, Q), tl.arange(0, D)
    kind = out.dtype.element_ty
    inside = (line < tokens)[:, None]
    base = x + ((batch * tokens + line) * 3 * heads + head)[:, None] * D
    table = batch * tokens * D
    q = _turned(base, query_weights, cos + table, sin + table, inside, line, index, kind, D)
    own_key = _turned(base + heads * D, key_weights, cos + table, sin + table, inside, line, index, kind, D)
    own_value = tl.load(base + 2 * heads * D + index[None, :], mask=inside, other=0.0)
    top = tl.full((Q,), -1e30, tl.float32)
    weight = tl.zeros((Q,), tl.float32)
    total = tl.zeros((Q, D), tl.float32)
    among = tl.dot(q, tl.trans(own_key), input_precision=PRECISION) * scale
    top, weight, total = _soften(among, line < acting, own_value, top, weight, total, PRECISION)
    own = pair.to(tl.int64) * context
    for number in range(BLOCKS):
        slot = number * K + tl.arange(0, K)
        good = ((slot < real) | (slot >= prompt)) & (slot < context)
        at = (own + slot) * D
        k = tl.load(keys + at[None, :] + index[:, None], mask=(slot < context)[None, :], other=0.0)
        v = tl.load(values + at[:, None] + index[None, :], mask=(slot < context)[:, None], other=0.0)
        score = tl.dot(q, k, input_precision=PRECISION) * scale
        top, weight, total = _soften(score, good, v, top, weight, total, PRECISION)
    target = ((batch * tokens + line) * heads + head)[:, None] * D + index[None, :]
    tl.store(out + target, (total / weight[:, None]).to(kind), mask=inside)


@triton.jit
def few(x, w, out, rows, width, depth, GATED: tl.constexpr, SPLIT: tl.constexpr, STEPS: tl.constexpr,
         M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """x (rows, depth) @ wᵀ for so few rows that reading w is all the time; w is (width, depth).

    GATED: w holds gate above up, and silu(gate)·up is stored. SPLIT > 1: part p of the depth is stored as float32 at
    out[p]; its STEPS blocks of K are neighbours in memory.
    """
    block, part = tl.program_id(0), tl.program_id(1)
    row, column, inner = tl.arange(0, M), block * N + tl.arange(0, N), tl.arange(0, K)
    first = part * STEPS * K
    left = x + row[:, None] * depth + (first + inner)[None, :]
    right = w + column[None, :].to(tl.int64) * depth + (first + inner)[:, None]
    below = right + width.to(tl.int64) * depth
    total = tl.zeros((M, N), tl.float32)
    second = tl.zeros((M, N), tl.float32)
    for step in range(STEPS):
        a = tl.load(left + step * K, mask=(row < rows)[:, None], other=0.0)
        b = tl.load(right + step * K, eviction_policy="evict_first")
        total = tl.dot(a, b, total, input_precision=PRECISION)
        if GATED:
            c = tl.load(below + step * K, eviction_policy="evict_first")
            second = tl.dot(a, c, second, input_precision=PRECISION)
    kind = out.dtype.element_ty
    if GATED:
        gate = total.to(kind).to(tl.float32)
        total = (gate * tl.sigmoid(gate)).to(kind).to(tl.float32) * second.to(kind).to(tl.float32)
    target = out + (part * rows + row[:, None]) * width + column[None, :]
    tl.store(target, total.to(kind), mask=(row < rows)[:, None])


@triton.jit
def sigmoid_product(x, gates, out, stride, HEADS: tl.constexpr, D: tl.constexpr):
    """One token and head: x · sigmoid(gate), where gates lie beside the queries, (heads, 2, D) per token."""
    token, head, index = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, D)
    gate = tl.load(gates + token * stride + head * 2 * D + D + index).to(tl.float32)
    at = (token * HEADS + head) * D + index
    value = tl.load(x + at).to(tl.float32) * tl.sigmoid(gate).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty))
