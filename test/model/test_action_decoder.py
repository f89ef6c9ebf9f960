from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as functional

from qwen_vla_core.errors import UserError
from qwen_vla_core.model import attention
from qwen_vla_core.model.action_decoder import ActionDecoder, Context, modulate, sinusoid
from qwen_vla_core.model.config import DecoderConfig
from qwen_vla_core.model.presets import TINY_DECODER

REAL = 5


def build(context: str = "cached", state: bool = True) -> ActionDecoder:
    torch.manual_seed(0)
    config = dataclasses.replace(TINY_DECODER, depth=2, channels=8, state_channels=6, context=context)  # type: ignore[arg-type]
    decoder = ActionDecoder(config, 24, state)
    decoder.reset_parameters()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder


def inputs(padded: bool = False) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 7, dtype=torch.bool)
    if padded:
        mask[1, 5:] = False
    return {
        "hidden_bld": torch.randn(2, 7, 24, generator=generator),
        "positions_3bl": torch.arange(7).expand(3, 2, -1).clone(),
        "mask_bl": mask if padded else None,
        "state_bs": torch.randn(2, 6, generator=generator),
    }


def chunk() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    channel_mask = (torch.arange(8) < REAL).expand(2, -1)
    return torch.randn(2, 4, 8, generator=generator), torch.rand(2, 4, generator=generator), channel_mask


def one_sequence(
    decoder: ActionDecoder, context: Context, noisy: torch.Tensor, tau: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The same network written as one masked sequence, nothing cached: context tokens see context tokens only."""
    length, horizon = context.tokens.shape[1], noisy.shape[1]
    index = torch.arange(horizon)
    actions = decoder.action_in(noisy * mask[:, None]) + sinusoid(index.float(), decoder.config.width)
    x = torch.cat((context.tokens, actions), 1)
    action_rotary = decoder.rotary((context.next_position[:, None] + index).expand(3, -1, -1), x.dtype)
    rotary = tuple(torch.cat(pair, 2) for pair in zip(context.rotary, action_rotary, strict=True))
    allowed = torch.ones(2, 1, length + horizon, length + horizon, dtype=torch.bool)
    allowed[:, :, :length, length:] = False
    if context.mask is not None:
        allowed[..., :length] &= context.mask
    condition = decoder.time_condition(tau, x.dtype)
    for block in decoder.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = block.times(condition)
        quiet, full = torch.zeros_like(context.tokens), torch.ones_like(context.tokens)
        times = tuple(
            torch.cat((full if term is gate1 or term is gate2 else quiet, term), 1)
            for term in (shift1, scale1, gate1, shift2, scale2, gate2)
        )
        x = block(x, times, rotary, allowed)
    shift, scale = decoder.output_modulation(functional.silu(condition)).chunk(2, dim=-1)
    return decoder.action_out(modulate(x[:, length:], shift, scale)) * mask[:, None]


@pytest.mark.parametrize("padded", [False, True])
def test_cached_context_equals_recomputed_context(padded: bool) -> None:
    decoder, (noisy, tau, mask) = build(), chunk()
    plain = decoder.embed_context(**inputs(padded))  # type: ignore[arg-type]
    cached = decoder.encode_context(plain)
    assert len(cached.layers) == 2
    assert not plain.layers
    reference = one_sequence(decoder, plain, noisy, tau, mask)
    for context in (cached, cached, plain):
        torch.testing.assert_close(decoder.denoise_step(context, noisy, tau, mask), reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("context", ["cached", "joint"])
def test_padded_channels_change_neither_output_nor_gradients(context: str) -> None:
    decoder, (noisy, tau, mask) = build(context), chunk()
    results = []
    for garbage in (0.0, 1e4, float("nan")):
        noisy = noisy.clone()
        noisy[..., REAL:] = garbage
        decoder.zero_grad()
        out = decoder.denoise_step(decoder.encode_context(decoder.embed_context(**inputs())), noisy, tau, mask)  # type: ignore[arg-type]
        out.square().sum().backward()
        results.append((out.detach(), [parameter.grad.clone() for parameter in decoder.parameters()]))  # type: ignore[union-attr]
    for out, gradients in results[1:]:
        assert torch.equal(out, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(gradients, results[0][1], strict=True))
    assert torch.equal(results[0][0][..., REAL:], torch.zeros(2, 4, 8 - REAL))
    assert results[0][0][..., :REAL].abs().min() > 0


@pytest.mark.parametrize("context", ["cached", "joint"])
def test_padded_context_and_padded_steps_change_nothing(context: str) -> None:
    decoder, (noisy, tau, mask) = build(context), chunk()
    given = inputs(padded=True)
    steps = torch.tensor([[True] * 4, [True, True, False, False]])

    def run() -> torch.Tensor:
        made = decoder.encode_context(decoder.embed_context(**given))  # type: ignore[arg-type]
        return decoder.denoise_step(made, noisy, tau, mask, steps)

    before = run()
    given["hidden_bld"][1, 5:] = 1e3  # type: ignore[index]
    noisy[1, 2:] = float("nan")
    torch.testing.assert_close(run(), before, atol=1e-6, rtol=0)
    assert before[1, 2:].abs().max() == 0


def test_padding_gives_the_same_answer_as_no_padding() -> None:
    decoder, (noisy, tau, mask) = build(), chunk()
    padded = inputs(padded=True)
    batch = decoder.denoise_step(decoder.embed_context(**padded), noisy, tau, mask)  # type: ignore[arg-type]
    alone = decoder.embed_context(
        padded["hidden_bld"][1:, :5],  # type: ignore[index]
        padded["positions_3bl"][:, 1:, :5],  # type: ignore[index]
        None,
        padded["state_bs"][1:],  # type: ignore[index]
    )
    torch.testing.assert_close(batch[1:], decoder.denoise_step(alone, noisy[1:], tau[1:], mask[1:]), atol=1e-5, rtol=0)


def test_flow_time_is_per_action_token() -> None:
    decoder, (noisy, _, mask) = build(), chunk()
    context = decoder.encode_context(decoder.embed_context(**inputs()))  # type: ignore[arg-type]
    shared = decoder.denoise_step(context, noisy, torch.full((2, 1), 0.5), mask)
    torch.testing.assert_close(decoder.denoise_step(context, noisy, torch.full((2, 4), 0.5), mask), shared)
    changed = torch.full((2, 4), 0.5)
    changed[:, 0] = 0.0
    difference = (decoder.denoise_step(context, noisy, changed, mask) - shared).abs().amax(-1)
    assert difference[:, 0].min() > 1e-3


def test_joint_context_caches_nothing() -> None:
    joint = build("joint")
    assert joint.encode_context(joint.embed_context(**inputs())).layers == ()  # type: ignore[arg-type]


def test_action_positions_continue_after_the_context() -> None:
    decoder = build(state=False)
    given = inputs(padded=True)
    given["positions_3bl"][1, 0, 3] = 40  # type: ignore[index]  # an image taller than its token count
    given.pop("state_bs")
    assert decoder.embed_context(**given).next_position.tolist() == [41, 5]  # type: ignore[arg-type]


def test_a_state_token_takes_one_position() -> None:
    made = build().embed_context(**inputs())  # type: ignore[arg-type]
    assert made.tokens.shape[1] == 8
    assert made.next_position.tolist() == [8, 8]


def test_state_must_match_the_configuration() -> None:
    given = inputs()
    given["state_bs"] = None
    with pytest.raises(ValueError, match="state"):
        build().embed_context(**given)  # type: ignore[arg-type]


def test_repeat_keeps_each_observation_together() -> None:
    made = build().encode_context(build().embed_context(**inputs(padded=True)))  # type: ignore[arg-type]
    twice: Context = made.repeat(2)
    assert torch.equal(twice.tokens[0], twice.tokens[1])
    assert torch.equal(twice.layers[0][0][2], made.layers[0][0][1])
    assert twice.next_position.tolist() == made.next_position.repeat_interleave(2).tolist()


def test_rotary_sections_must_fill_the_head() -> None:
    with pytest.raises(UserError, match="mrope_section"):
        DecoderConfig(head_dim=64, mrope_section=(1, 2, 3))


def test_attention_uses_sdpa_here_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    attention.choose_backend.cache_clear()
    with caplog.at_level("INFO", logger=attention.__name__):
        assert [attention.choose_backend("cpu", torch.float32) for _ in range(3)] == ["sdpa"] * 3
        assert attention.choose_backend("cuda", torch.float32) == "sdpa"
    assert len(caplog.records) == 2
    assert "cpu" in caplog.records[0].message
    assert "float32" in caplog.records[1].message


@pytest.mark.parametrize("installed", [True, False])
def test_flash_is_chosen_where_it_can_run(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object() if installed else None)
    attention.choose_backend.cache_clear()
    assert attention.choose_backend("cuda", torch.bfloat16) == ("flash" if installed else "sdpa")
    attention.choose_backend.cache_clear()


def test_attention_under_cpu_autocast_equals_float32_attention() -> None:
    query, key, value = torch.randn(3, 1, 2, 5, 8).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention.attend(query, key, value)
    exact = functional.scaled_dot_product_attention(query.float(), key.float(), value.float())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.to(torch.bfloat16))
