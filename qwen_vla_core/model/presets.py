"""Three sizes of one architecture: ``paper``, ``small`` (one consumer GPU), ``tiny`` (a laptop's CPU)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.model.action_decoder import ActionDecoder
from qwen_vla_core.model.backbone import Backbone
from qwen_vla_core.model.config import ContextMode, DecoderConfig, ModelConfig, StateMode
from qwen_vla_core.model.flow import FlowConfig
from qwen_vla_core.model.policy import QwenVLA, Stats
from qwen_vla_core.model.processor import AREA, ImageConfig, Processor
from qwen_vla_core.model.tokenizer import train_tokenizer

PRESETS = ("paper", "small", "tiny")

# Parameter counts of the paper [P], by the names of ``QwenVLA.parameter_counts``.
PUBLISHED: dict[str, float] = {
    "decoder": 1.15e9,
    "dit_block": 70.8e6,
    "vlm_to_dit": 3.9e6,
    "action_mlps": 4.9e6,
    "timestep_mlp": 2.8e6,
    "output_adaln": 4.7e6,
}

# Published weights that belong to a preset's backbone.
PUBLISHED_BACKBONE = {"paper": "Qwen/Qwen3.5-4B", "small": "Qwen/Qwen3.5-0.8B"}

TINY_IMAGE = ImageConfig(
    patch_size=16, merge_size=2, temporal_patch_size=1, min_pixels=128 * 96, max_pixels=128 * 96, resample=AREA
)


def _qwen3_5(
    hidden: int, layers: int, ffn: int, heads: int, kv: int, value_heads: int, vision: int, depth: int
) -> dict[str, Any]:
    """A Qwen3.5 configuration of published proportions: 3 gated linear layers to 1 of full attention."""
    text = {
        "vocab_size": 248320,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads,
        "tie_word_embeddings": True,
        "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10],
            "mrope_interleaved": True,
        },
    }
    tower = {
        "depth": depth,
        "hidden_size": vision,
        "intermediate_size": 4 * vision,
        "num_heads": 16 if vision >= 1024 else 12,
        "out_hidden_size": hidden,
    }
    return {"model_type": "qwen3_5", "text_config": text, "vision_config": tower, "tie_word_embeddings": True}


def tiny_backbone(vocabulary: int, token_ids: Mapping[str, int], model_type: str = "qwen3_5") -> dict[str, Any]:
    """The tiny preset's backbone: one million parameters of a published class.

    Why Qwen3.5: measured on one thread, B = 32, three 128×96 views, L = 120, forward and backward of the backbone take
    594–630 ms against 481 ms for the Qwen3-VL class, so the published class is affordable. Patches of 16 pixels merged
    2×2 give 12 tokens per view; with patches of 8 (48 tokens per view) the backbone took 2.9× longer. Two things let so
    small a model learn to see [O]: ``initializer_range`` 0.1, and full attention in every second layer instead of every
    fourth, with which "where is the red cube?" was learnt sooner (250 episodes, 400 steps: loss 0.31 against 0.44).

    Args:
        vocabulary: embedding rows.
        token_ids: special token → id.
        model_type: ``qwen3_5``, ``qwen3_vl`` or ``qwen2_5_vl``.
    """
    hidden = 128
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "rope_parameters": rope,
    }
    vision: dict[str, Any] = {
        "depth": 3,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_heads": 4,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "out_hidden_size": hidden,
        "initializer_range": 0.1,
    }
    if model_type == "qwen3_5":
        rope["partial_rotary_factor"] = 1.0
        text |= {
            "head_dim": 32,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 64,
        }
        vision["num_position_embeddings"] = 256
    elif model_type == "qwen3_vl":
        text["head_dim"] = 32
        vision |= {"num_position_embeddings": 256, "deepstack_visual_indexes": [1]}
    elif model_type == "qwen2_5_vl":
        rope.pop("mrope_interleaved")
        vision |= {"window_size": 64, "fullatt_block_indexes": [2], "tokens_per_second": 2}
    else:
        raise UserError(f"tiny backbone: unknown model_type {model_type!r}")
    return {
        "model_type": model_type,
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": True,
        "image_token_id": token_ids["<|image_pad|>"],
        "video_token_id": token_ids["<|video_pad|>"],
        "vision_start_token_id": token_ids["<|vision_start|>"],
        "vision_end_token_id": token_ids["<|vision_end|>"],
    }


def preset_config(name: str) -> ModelConfig:
    """The configuration of ``paper`` or ``small`` (``tiny`` needs a tokenizer first: ``build_tiny``).

    Raises:
        UserError: unknown name.
    """
    if name == "paper":
        backbone = _qwen3_5(hidden=2560, layers=32, ffn=9216, heads=16, kv=4, value_heads=32, vision=1024, depth=24)
        return ModelConfig(backbone, DecoderConfig(), preset="paper")
    if name == "small":
        backbone = _qwen3_5(hidden=1024, layers=24, ffn=3584, heads=8, kv=2, value_heads=16, vision=768, depth=12)
        decoder = DecoderConfig(width=768, depth=12, heads=12, ffn=3072)
        return ModelConfig(backbone, decoder, preset="small")
    raise UserError(f"unknown preset {name!r}: use one of {', '.join(PRESETS)} (--preset)")


TINY_DECODER = DecoderConfig(
    width=128,
    depth=4,
    heads=4,
    head_dim=32,
    ffn=256,
    channels=64,
    state_channels=64,
    time_embedding=64,
    rope_theta=10000.0,
    mrope_section=(6, 5, 5),
)


def preset_network(name: str) -> tuple[ModelConfig, Backbone, ActionDecoder]:
    """Backbone and decoder without processor or robots, for counting inside ``torch.device('meta')``."""
    if name == "tiny":
        with torch.device("cpu"):
            tokenizer = train_tokenizer(("ego", "cam_left_wrist", "cam_right_wrist"))
        config = _tiny_config(len(tokenizer), tokenizer.get_vocab())
    else:
        config = preset_config(name)
    backbone = Backbone.from_config(config.backbone)
    return config, backbone, ActionDecoder(config.decoder, backbone.hidden_size, config.state_mode == "dit_token")


def _tiny_config(
    vocabulary: int,
    token_ids: Mapping[str, int],
    context: ContextMode = "cached",
    state_mode: StateMode = "dit_token",
    model_type: str = "qwen3_5",
    flow: FlowConfig | None = None,
) -> ModelConfig:
    return ModelConfig(
        backbone=tiny_backbone(vocabulary, token_ids, model_type),
        decoder=replace(TINY_DECODER, context=context),
        flow=flow or FlowConfig(steps=4),
        state_mode=state_mode,
        preset="tiny",
    )


def build_tiny(
    embodiments: Sequence[Embodiment],
    stats: Mapping[str, Stats] | None = None,
    seed: int = 0,
    extra_text: Sequence[str] = (),
    context: ContextMode = "cached",
    state_mode: StateMode = "dit_token",
    model_type: str = "qwen3_5",
    flow: FlowConfig | None = None,
) -> QwenVLA:
    """A randomly initialised tiny policy, ready to train.

    Args:
        embodiments: robots; their views become tokens.
        stats: per embodiment name; may also be given later with ``add_embodiment``.
        seed: of the weights; the caller's global random state is left alone.
        extra_text: sentences the tokenizer should know, e.g. grounding questions.
        context: ``cached`` or ``joint``.
        state_mode: ``none``, ``prompt`` or ``dit_token``.
        model_type: backbone class.
        flow: flow-matching choices.
    """
    views = list(dict.fromkeys(view for embodiment in embodiments for view in embodiment.views))
    tags = [embodiment.prompt.robot_tag for embodiment in embodiments]
    processor = Processor(train_tokenizer(views, extra_text, robots=tags), TINY_IMAGE)
    vocabulary = processor.tokenizer.get_vocab()
    config = _tiny_config(len(processor.tokenizer), vocabulary, context, state_mode, model_type, flow)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = QwenVLA(
            config, Backbone.from_config(config.backbone), processor, {e.name: e for e in embodiments}, stats
        )
        policy.decoder.reset_parameters()
    return policy


def build_from_pretrained(
    name_or_path: str,
    embodiments: Sequence[Embodiment],
    stats: Mapping[str, Stats] | None = None,
    decoder: DecoderConfig | None = None,
    state_mode: StateMode = "none",
    pixels: int | None = 224 * 224,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> QwenVLA:
    """A published Qwen VL backbone with a new action decoder.

    Args:
        name_or_path: local folder or hub name, e.g. ``PUBLISHED_BACKBONE['paper']``.
        embodiments: robots; their view tokens are added and the embeddings grown if needed.
        stats: per embodiment name.
        decoder: shape of the new decoder; default the paper's, with the backbone's rotary base.
        state_mode: ``none`` (published default), ``prompt`` or ``dit_token``.
        pixels: area every picture is brought to; None keeps the folder's limits.
        dtype: of all weights.
        device: of all weights.
        seed: of the new decoder.
    """
    processor = Processor.from_pretrained(name_or_path, pixels)
    backbone = Backbone.from_pretrained(name_or_path, dtype, device)
    if decoder is None:
        rope = getattr(backbone.config.get_text_config(), "rope_parameters", {})
        decoder = DecoderConfig(rope_theta=float(rope.get("rope_theta", DecoderConfig.rope_theta)))
    config = ModelConfig(backbone.config_dict(), decoder, state_mode=state_mode)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = QwenVLA(config, backbone, processor, {e.name: e for e in embodiments}, stats)
        policy.decoder.reset_parameters()
    policy.decoder.to(device=device, dtype=dtype)
    return policy
