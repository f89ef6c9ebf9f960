"""What Qwen3.5's linear layers are made of as CUDA kernels, in Triton, forward and backward, for training.

A short convolution (``convolve`` and two backward), and the gated delta rule. Of the latter, one chunk of C tokens of
one value head, with normalised queries q (already scaled) and keys k (C, d), values v (C, e), what is written of each
correction b (C,), decays γ = exp(cumulated g) inside the chunk, D_ij = γ_i / γ_j for j ≤ i, κ = γ_C / γ, and the state
S (d, e) before it (Yang et al., arXiv 2412.06464, in the chunked form of section 3.3):

    A = strictly lower part of b_i (k kᵀ)_ij D_ij        T = (1 + A)⁻¹        P = (q kᵀ) D
    R = b (v − γ (k S))                                  U = T R, the corrections that are written
    out = P U + γ (q S)                                  S' = γ_C S + kᵀ (κ U)

Backward, from G = dS' and dout: dU = Pᵀ dout + κ (k G); dR = Tᵀ dU; dP = dout Uᵀ; dA = −dR Uᵀ below the diagonal; the
rest follows product by product. The systems are inverted by doubling diagonal blocks: as stable as substitution.

``prepare`` and ``local_back`` do all chunks at once, ``scan`` and ``scan_back`` walk through them with the state in
registers. Only inputs are kept for the backward pass; what it needs of the forward one is computed again. Products
take operands in the dtype of the queries and sum in float32. ``delta_op.py`` calls them; they are tested against
transformers' function on CPUs through Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _shifted(x, token, channel, good, x_token, length):
    """Values of tokens (T, 1) and channels (1, N), 0 outside the sequence."""
    inside = (token >= 0) & (token < length) & good
    return tl.load(x + token * x_token + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def convolve(x, weight, out, length, channels, x_batch, x_token, TAPS: tl.constexpr, T: tl.constexpr,
              N: tl.constexpr):  # fmt: skip
    """silu of each channel's last TAPS tokens times its weights, (TAPS, channels), the last for the token itself."""
    token = (tl.program_id(0) * T + tl.arange(0, T))[:, None]
    channel = (tl.program_id(1) * N + tl.arange(0, N))[None, :]
    batch = tl.program_id(2).to(tl.int64)
    good = channel < channels
    total = tl.zeros((T, N), tl.float32)
    for tap in tl.static_range(TAPS):
        taps = tl.load(weight + tap * channels + channel, mask=good, other=0.0).to(tl.float32)
        total += taps * _shifted(x + batch * x_batch, token + (tap - TAPS + 1), channel, good, x_token, length)
    target = out + (batch * length + token) * channels + channel
    tl.store(target, (total * tl.sigmoid(total)).to(out.dtype.element_ty), mask=(token < length) & good)


@triton.jit
def convolve_back(x, weight, grad_out, grad_sum, grad_weight, length, channels, x_batch, x_token, TAPS: tl.constexpr,
                   T: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Gradients of the sums before silu and, from this block's tokens, of the weights: (blocks, TAPS, channels)."""
    token = (tl.program_id(0) * T + tl.arange(0, T))[:, None]
    channel = (tl.program_id(1) * N + tl.arange(0, N))[None, :]
    batch = tl.program_id(2).to(tl.int64)
    good = channel < channels
    base = x + batch * x_batch
    total = tl.zeros((T, N), tl.float32)
    for tap in tl.static_range(TAPS):
        taps = tl.load(weight + tap * channels + channel, mask=good, other=0.0).to(tl.float32)
        total += taps * _shifted(base, token + (tap - TAPS + 1), channel, good, x_token, length)
    gate = tl.sigmoid(total)
    target = (batch * length + token) * channels + channel
    inside = (token < length) & good
    grad = tl.load(grad_out + target, mask=inside, other=0.0).to(tl.float32) * gate * (1.0 + total * (1.0 - gate))
    tl.store(grad_sum + target, grad.to(grad_sum.dtype.element_ty), mask=inside)
    block = (batch * tl.num_programs(0) + tl.program_id(0)) * TAPS
    for tap in tl.static_range(TAPS):  # read again from the cache: fewer registers
        seen = _shifted(base, token + (tap - TAPS + 1), channel, good, x_token, length)
        tl.store(grad_weight + (block + tap) * channels + channel, tl.sum(grad * seen, 0)[None, :], mask=good)


@triton.jit
def convolve_input(grad_sum, weight, grad_x, length, channels, TAPS: tl.constexpr, T: tl.constexpr,
                    N: tl.constexpr):  # fmt: skip
    """Gradient of x: a token counts in its own sum and in those of TAPS − 1 later ones."""
    token = (tl.program_id(0) * T + tl.arange(0, T))[:, None]
    channel = (tl.program_id(1) * N + tl.arange(0, N))[None, :]
    batch = tl.program_id(2).to(tl.int64)
    good = channel < channels
    base = batch * length * channels
    grad = tl.zeros((T, N), tl.float32)
    for later in tl.static_range(TAPS):
        taps = tl.load(weight + (TAPS - 1 - later) * channels + channel, mask=good, other=0.0).to(tl.float32)
        grad += taps * _shifted(grad_sum + base, token + later, channel, good, channels, length)
    target = grad_x + base + token * channels + channel
    tl.store(target, grad.to(grad_x.dtype.element_ty), mask=(token < length) & good)


@triton.jit
def _decays(g, beta, at, inside):
    """Cumulated logarithm of the decay and what is written, (C,) each; tokens behind the end change nothing."""
    fall = tl.cumsum(tl.load(g + at, mask=inside, other=0.0).to(tl.float32), 0)
    return fall, tl.load(beta + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _fallen(g, beta, at, inside, C: tl.constexpr):
    """As ``_decays``, and the logarithm of the whole chunk's decay."""
    fall, write = _decays(g, beta, at, inside)
    return fall, write, tl.sum(tl.where(tl.arange(0, C) == C - 1, fall, 0.0), 0)


@triton.jit
def _places(chunk, head, length, chunks, HK: tl.constexpr, HV: tl.constexpr, C: tl.constexpr):
    """One value head's chunk: its tokens, which of them there are, where they stand in (batch, length, HV), and the
    first line of the chunk in (batch, HV, chunks · C) and, of the key head it shares, in (batch, HK, chunks · C).
    """
    batch, own = (head // HV).to(tl.int64), head % HV
    token = chunk * C + tl.arange(0, C)
    at = (head.to(tl.int64) * chunks + chunk) * C
    shared = ((batch * HK + own // (HV // HK)) * chunks + chunk) * C
    return token, token < length, (batch * length + token) * HV + own, at, shared


@triton.jit
def _between(fall, lower):
    """D: exp(fall_i − fall_j) where ``lower``, else 0."""
    return tl.where(lower, tl.exp(tl.where(lower, fall[:, None] - fall[None, :], 0.0)), 0.0)


@triton.jit
def _normed(x, factors, at, inside, scale, first, target, line, D: tl.constexpr):
    """Rows of one head over their lengths, times ``scale``, as (C, D); ``first`` writes them and the factors."""
    feature = tl.arange(0, D)
    raw = tl.load(x + at[:, None] + feature[None, :], mask=inside[:, None], other=0.0)
    wide = raw.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 1) + 1e-6)
    normed = (wide * (factor * scale)[:, None]).to(raw.dtype)
    if first:
        tl.store(target + line[:, None] * D + feature[None, :], normed)
        tl.store(factors + line, factor)
    return normed


@triton.jit
def prepare(query, key, g, beta, queries, keys, query_factors, key_factors, inverses, scores, length, query_batch,
             query_token, key_batch, key_token, scale, HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr,
             C: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """What of a chunk depends on no state: q and k (heads of keys, tokens, d), T and P (heads, chunks, C, C)."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    batch, own = (head // HV).to(tl.int64), head % HV
    shared = own // (HV // HK)
    first = own % (HV // HK) == 0
    kind = inverses.dtype.element_ty
    line = tl.arange(0, C)
    token = chunk * C + line
    inside = token < length
    fall, write = _decays(g, beta, (batch * length + token) * HV + own, inside)
    place = ((batch * HK + shared) * tl.num_programs(0) + chunk) * C
    at = batch * key_batch + token * key_token + shared * DK
    k = _normed(key, key_factors + place, at, inside, 1.0, first, keys + place * DK, line, DK)
    turned = tl.trans(k)
    target = ((head.to(tl.int64) * tl.num_programs(0) + chunk) * C + line)[:, None] * C + line[None, :]
    lower = line[:, None] >= line[None, :]
    between = _between(fall, lower)
    at = batch * query_batch + token * query_token + shared * DK
    q = _normed(query, query_factors + place, at, inside, scale, first, queries + place * DK, line, DK)
    tl.store(scores + target, (tl.dot(q, turned, input_precision=PRECISION) * between).to(kind))

    strict = line[:, None] > line[None, :]
    system = tl.where(strict, tl.dot(k, turned, input_precision=PRECISION) * between * write[:, None], 0.0)
    inverse = tl.where(line[:, None] == line[None, :], 1.0, 0.0)
    inverse -= tl.where(line[:, None] // 2 == line[None, :] // 2, system, 0.0)
    for level in range(1, 6):
        size = 1 << level
        corner = (line[:, None] // (2 * size) == line[None, :] // (2 * size)) & (
            line[:, None] // size != line[None, :] // size
        )
        half = tl.dot(inverse, tl.where(corner, system, 0.0), input_precision=PRECISION)
        inverse -= tl.dot(half, inverse, input_precision=PRECISION)
    tl.store(inverses + target, inverse.to(kind))


@triton.jit
def scan(queries, keys, value, g, beta, inverses, scores, out, states, written, length, value_batch, value_token,
          HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
          CHUNKS: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Chunk after chunk for one head and BV of its value's dimensions.

    Answers to ``out``; with KEEP no answers, but the states before each chunk and U, for the backward pass.
    """
    part, head = tl.program_id(0), tl.program_id(1)
    batch, own = (head // HV).to(tl.int64), head % HV
    kind = inverses.dtype.element_ty
    line, feature, place = tl.arange(0, C), tl.arange(0, DK), part * BV + tl.arange(0, BV)
    narrow = line[:, None] * DK + feature[None, :]
    square = line[:, None] * C + line[None, :]
    state = tl.zeros((DK, BV), tl.float32)
    for chunk in range(CHUNKS):
        token, inside, row, at, shared = _places(chunk, head, length, CHUNKS, HK, HV, C)
        fall, write, whole = _fallen(g, beta, row, inside, C)
        seen = tl.exp(fall)
        k = tl.load(keys + shared * DK + narrow)
        before = state.to(kind)
        v = tl.load(
            value + batch * value_batch + token[:, None] * value_token + own * DV + place[None, :],
            mask=inside[:, None], other=0.0,
        ).to(tl.float32)  # fmt: skip
        rest = write[:, None] * (v - seen[:, None] * tl.dot(k, before, input_precision=PRECISION))
        inverse = tl.load(inverses + at * C + square)
        fresh = tl.dot(inverse, rest.to(kind), input_precision=PRECISION)
        narrow_fresh = fresh.to(kind)
        if KEEP:
            tl.store(states + (at // C * DK + feature)[:, None] * DV + place[None, :], before)
            tl.store(written + (at + line)[:, None] * DV + place[None, :], narrow_fresh)
        else:
            q = tl.load(queries + shared * DK + narrow)
            answer = tl.dot(q, before, input_precision=PRECISION) * seen[:, None]
            answer += tl.dot(tl.load(scores + at * C + square), narrow_fresh, input_precision=PRECISION)
            tl.store(out + row[:, None] * DV + place[None, :], answer.to(out.dtype.element_ty), mask=inside[:, None])
        kept = (fresh * tl.exp(whole - fall)[:, None]).to(kind)
        state = state * tl.exp(whole) + tl.dot(tl.trans(k), kept, input_precision=PRECISION)


@triton.jit
def scan_back(queries, keys, g, beta, inverses, scores, grad_out, grad_states, grad_rest, length, HK: tl.constexpr,
               HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
               CHUNKS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """From the last chunk to the first: the gradients of the states behind them (G) and of R."""
    part, head = tl.program_id(0), tl.program_id(1)
    kind = inverses.dtype.element_ty
    line, feature, place = tl.arange(0, C), tl.arange(0, DK), part * BV + tl.arange(0, BV)
    narrow = line[:, None] * DK + feature[None, :]
    square = line[:, None] * C + line[None, :]
    grad = tl.zeros((DK, BV), tl.float32)
    for step in range(CHUNKS):
        chunk = CHUNKS - 1 - step
        _, inside, row, at, shared = _places(chunk, head, length, CHUNKS, HK, HV, C)
        fall, write, whole = _fallen(g, beta, row, inside, C)
        seen = tl.exp(fall)
        behind = grad.to(kind)
        tl.store(grad_states + (at // C * DK + feature)[:, None] * DV + place[None, :], behind)
        k = tl.load(keys + shared * DK + narrow)
        fresh = tl.dot(k, behind, input_precision=PRECISION) * tl.exp(whole - fall)[:, None]
        asked = tl.load(grad_out + row[:, None] * DV + place[None, :], mask=inside[:, None], other=0.0).to(kind)
        score = tl.load(scores + at * C + square)
        fresh += tl.dot(tl.trans(score), asked, input_precision=PRECISION)
        inverse = tl.load(inverses + at * C + square)
        rest = tl.dot(tl.trans(inverse), fresh.to(kind), input_precision=PRECISION)
        tl.store(grad_rest + (at + line)[:, None] * DV + place[None, :], rest.to(kind))
        q = tl.load(queries + shared * DK + narrow)
        asked = (asked.to(tl.float32) * seen[:, None]).to(kind)
        grad = grad * tl.exp(whole) + tl.dot(tl.trans(q), asked, input_precision=PRECISION)
        read = (rest * (-write * seen)[:, None]).to(kind)
        grad += tl.dot(tl.trans(k), read, input_precision=PRECISION)


@triton.jit
def local_back(queries, keys, query_factors, key_factors, value, g, beta, states, written, grad_out, grad_states,
                grad_rest, grad_query, grad_key, grad_value, grad_g, grad_beta, length, value_batch, value_token, scale,
                HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
                C: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Gradients of one chunk's inputs; those of queries and keys per value head, still to be summed over heads.

    One (C, d) sum after the other, so that they fit in registers: the blocks are read again from the cache.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    chunks = tl.num_programs(0)
    batch, own = (head // HV).to(tl.int64), head % HV
    kind = states.dtype.element_ty
    line, feature, column = tl.arange(0, C), tl.arange(0, DK), tl.arange(0, BV)
    token, inside, row, at, shared = _places(chunk, head, length, chunks, HK, HV, C)
    narrow = shared * DK + line[:, None] * DK + feature[None, :]
    tall = at * DV + line[:, None] * DV + column[None, :]
    square = at // C * DK * DV + feature[:, None] * DV + column[None, :]
    rows = row[:, None] * DV + column[None, :]
    fall, write, whole = _fallen(g, beta, row, inside, C)
    seen = tl.exp(fall)

    scores = tl.zeros((C, C), tl.float32)  # dP
    systems = tl.zeros((C, C), tl.float32)  # dA
    grad_write = tl.zeros((C,), tl.float32)
    for part in range(DV // BV):
        rest = tl.load(grad_rest + tall + part * BV)
        turned = tl.trans(tl.load(written + tall + part * BV))
        out = tl.load(grad_out + rows + part * BV, mask=inside[:, None], other=0.0).to(kind)
        scores += tl.dot(out, turned, input_precision=PRECISION)
        systems -= tl.dot(rest, turned, input_precision=PRECISION)
        v = tl.load(
            value + batch * value_batch + token[:, None] * value_token + own * DV + part * BV + column[None, :],
            mask=inside[:, None], other=0.0,
        ).to(tl.float32)  # fmt: skip
        wide = rest.to(tl.float32)
        grad_write += tl.sum(wide * v, 1)
        wide = wide * write[:, None]
        tl.store(grad_value + rows + part * BV, wide.to(grad_value.dtype.element_ty), mask=inside[:, None])
    lower = line[:, None] >= line[None, :]
    decays = _between(fall, lower)
    k = tl.load(keys + narrow)
    turned = tl.trans(k)
    systems = tl.where(line[:, None] > line[None, :], systems, 0.0) * decays
    alike = systems * tl.dot(k, turned, input_precision=PRECISION)
    grad_write += tl.sum(alike, 1)
    alike *= write[:, None]
    grad_fall = tl.sum(alike, 1) - tl.sum(alike, 0)
    narrow_systems = (systems * write[:, None]).to(kind)
    scores *= decays
    q = tl.load(queries + narrow)
    alike = scores * tl.dot(q, turned, input_precision=PRECISION)
    grad_fall += tl.sum(alike, 1) - tl.sum(alike, 0)
    narrow_scores = scores.to(kind)

    grad = tl.zeros((C, DK), tl.float32)
    for part in range(DV // BV):
        out = tl.load(grad_out + rows + part * BV, mask=inside[:, None], other=0.0).to(kind)
        grad += tl.dot(out, tl.trans(tl.load(states + square + part * BV)), input_precision=PRECISION)
    grad = grad * seen[:, None]
    wide = q.to(tl.float32)
    grad_fall += tl.sum(wide * grad, 1)
    grad += tl.dot(narrow_scores, k, input_precision=PRECISION)
    factor = tl.load(query_factors + shared + line)
    grad = (grad * scale - wide * (tl.sum(wide * grad, 1) / scale)[:, None]) * factor[:, None]
    target = row[:, None] * DK + feature[None, :]
    tl.store(grad_query + target, grad.to(grad_query.dtype.element_ty), mask=inside[:, None])

    through = 0.0
    grad = tl.zeros((C, DK), tl.float32)
    for part in range(DV // BV):
        fresh = tl.load(written + tall + part * BV)
        behind = tl.load(grad_states + square + part * BV)
        grad += tl.dot(fresh, tl.trans(behind), input_precision=PRECISION)
        state = tl.load(states + square + part * BV).to(tl.float32)
        through += tl.sum(tl.sum(state * behind.to(tl.float32), 1), 0)
    grad = grad * tl.exp(whole - fall)[:, None]
    wide = k.to(tl.float32)
    of_kept = tl.sum(wide * grad, 1)
    grad_fall -= of_kept
    grad_fall += tl.where(line == C - 1, tl.sum(of_kept, 0) + tl.exp(whole) * through, 0.0)
    read = tl.zeros((C, DK), tl.float32)
    for part in range(DV // BV):
        rest = tl.load(grad_rest + tall + part * BV)
        read += tl.dot(rest, tl.trans(tl.load(states + square + part * BV)), input_precision=PRECISION)
    of_read = seen * tl.sum(wide * read, 1)
    grad_write -= of_read
    grad_fall -= write * of_read
    grad -= read * (write * seen)[:, None]
    grad += tl.dot(narrow_systems, k, input_precision=PRECISION)
    grad += tl.dot(tl.trans(narrow_systems), k, input_precision=PRECISION)
    grad += tl.dot(tl.trans(narrow_scores), q, input_precision=PRECISION)
    grad = (grad - wide * tl.sum(wide * grad, 1)[:, None]) * tl.load(key_factors + shared + line)[:, None]
    tl.store(grad_key + target, grad.to(grad_key.dtype.element_ty), mask=inside[:, None])

    tl.store(grad_g + row, tl.cumsum(grad_fall, 0, reverse=True), mask=inside)
    tl.store(grad_beta + row, grad_write, mask=inside)
