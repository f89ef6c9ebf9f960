"""Any Qwen vision-language class of the installed transformers, behind one small interface.

Qwen3.5 is the published backbone [P]; Qwen3-VL and Qwen2.5-VL work the same way. Nothing of the class is rewritten:
hidden states, next-token logits, generation and M-RoPE positions are its own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

try:
    from transformers import vision_utils
except ImportError:  # of versions that lay pictures out in the classes themselves
    vision_utils = None

from qwen_vla_core.errors import UserError
from qwen_vla_core.model.attention import choose_backend, use_image_attention

LAYOUTS = 16  # of pictures in a batch, kept

# model_type in the configuration → class name in transformers
BACKBONES: dict[str, str] = {
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}


@dataclass(frozen=True)
class Encoded:
    """The backbone's reading of one batch.

    Attributes:
        hidden: (B, L, D) last layer, after the final norm [X].
        positions: (3, B, L) M-RoPE positions.
        mask: (B, L) bool, True = real token; None when nothing is padded.
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor | None


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Mutes advice about optional kernels while a model is built; warnings of the user's own calls stay."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _backbone_class(model_type: str) -> type[PreTrainedModel]:
    import transformers

    if model_type not in BACKBONES:
        raise UserError(f"backbone model_type {model_type!r} is not supported; use one of {', '.join(BACKBONES)}")
    return getattr(transformers, BACKBONES[model_type])


class Backbone(nn.Module):
    """A Qwen VL model and the few things the policy asks of it."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Wraps a built model; see ``from_config`` and ``from_pretrained``."""
        super().__init__()
        self.model: Any = model
        self._layouts: OrderedDict[tuple[Any, ...], dict[str, Any]] = OrderedDict()
        use_image_attention(model)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], initialise: bool = True) -> Backbone:
        """Random weights of the class that ``config['model_type']`` names.

        Args:
            config: a Hugging Face configuration as a dict, with ``model_type``.
            initialise: False leaves the weights undefined, for a caller that overwrites every one of them at once:
                drawing four billion random numbers takes minutes.

        Raises:
            UserError: the model type is not one of ``BACKBONES``.
        """
        values = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version")}
        model_type = str(config.get("model_type"))
        model_class = _backbone_class(model_type)
        with _quiet_transformers():
            hf_config = AutoConfig.for_model(model_type, **values)
            hf_config._attn_implementation = "sdpa"
            with contextlib.nullcontext() if initialise else no_init_weights():
                model = model_class(hf_config)
            model.tie_weights()
        backbone = cls(model)
        if initialise:
            backbone.init_vision_positions()
        return backbone

    @classmethod
    def from_pretrained(cls, name_or_path: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Backbone:
        """Published weights from a local folder or a hub name.

        Raises:
            UserError: the folder holds no supported Qwen VL model, or it cannot be fetched.
        """
        implementation = "flash_attention_2" if choose_backend(torch.device(device).type, dtype) == "flash" else "sdpa"
        with _quiet_transformers():
            try:
                config = AutoConfig.from_pretrained(name_or_path)
                model_class: Any = _backbone_class(config.model_type)
                model = model_class.from_pretrained(
                    name_or_path, config=config, dtype=dtype, attn_implementation=implementation, use_safetensors=True
                )
            except (OSError, ValueError) as error:
                first_line = str(error).strip().splitlines()[0]
                raise UserError(f"cannot load the backbone {name_or_path!r}: {first_line}") from error
        return cls(model.to(device))

    @property
    def config(self) -> PreTrainedConfig:
        """The Hugging Face configuration."""
        return self.model.config

    def config_dict(self) -> dict[str, Any]:
        """The configuration as JSON values, enough for ``from_config`` to build the same class and shape."""
        values = json.loads(self.config.to_json_string(use_diff=False))
        return {"model_type": self.config.model_type, **values}

    @property
    def hidden_size(self) -> int:
        """Width D of the hidden states."""
        return int(self.config.get_text_config().hidden_size)

    @property
    def visual(self) -> nn.Module:
        """The vision tower."""
        return self.model.model.visual

    @torch.no_grad()
    def init_vision_positions(self) -> None:
        """Writes a 2-D sin-cos table into the learned vision positions, where the class has them (not Qwen2.5-VL).

        Random positions of a tiny, untrained tower hide where a patch is; with this table small models localise within
        minutes [O]. The amplitude stays that of the configuration's initialiser times √2.
        """
        table = getattr(self.visual, "pos_embed", None)
        if not isinstance(table, nn.Embedding) or table.weight.is_meta:
            return
        side = int(table.num_embeddings**0.5)
        quarter = table.embedding_dim // 4
        frequencies = 1.0 / 100.0 ** (torch.arange(quarter, dtype=torch.float32) / quarter)
        angles = torch.arange(side, dtype=torch.float32)[:, None] * frequencies
        waves = torch.cat((angles.sin(), angles.cos()), -1)
        grid = torch.cat((waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)), -1).reshape(
            side**2, -1
        )
        table.weight[:, : grid.shape[1]] = grid.to(table.weight) * 2.0 * self.config.get_text_config().initializer_range

    def embed_patches_by_product(self) -> None:
        """Replaces the vision tower's convolution of patches, whose steps do not overlap, by the matrix product it is.

        cuDNN has no fast convolution for it, least of all backward.
        """
        embed: Any = self.visual.patch_embed
        projection = embed.proj
        if isinstance(projection, nn.Conv3d) and projection.kernel_size == projection.stride:
            embed.forward = functools.partial(_embed_patches, projection)

    def resize_vocabulary(self, size: int) -> None:
        """Grows embeddings and head so that token ids below ``size`` exist; published tables are larger already."""
        if size > self.model.get_input_embeddings().num_embeddings:
            with _quiet_transformers():
                self.model.resize_token_embeddings(size)

    @torch.no_grad()
    def positions(
        self,
        input_ids: torch.Tensor,
        mm_token_type_ids: torch.Tensor,
        image_grid_thw: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """(3, B, L) M-RoPE positions by the class's own ``get_rope_index``.

        That function walks the batch in Python, so identical rows (same layout, same image grids) are asked for once.
        """
        real = torch.ones_like(mm_token_type_ids) if mask is None else mask.to(mm_token_type_ids)
        if image_grid_thw is None:
            return (real.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
        if (image_grid_thw != image_grid_thw[0]).any():
            rows = torch.arange(input_ids.shape[0], device=input_ids.device)
            back, grids = rows, image_grid_thw
        else:
            layout = torch.stack((mm_token_type_ids, real), 1).flatten(1)
            _, back = torch.unique(layout, dim=0, return_inverse=True)
            rows = torch.stack([(back == i).nonzero()[0, 0] for i in range(int(back.max()) + 1)])
            # Every row may hold its own number of images of this one size: hand out enough, in row order.
            grids = image_grid_thw[:1].expand(image_grid_thw.shape[0], -1)
        positions, _ = self.model.model.get_rope_index(
            input_ids=input_ids[rows],
            mm_token_type_ids=mm_token_type_ids[rows],
            image_grid_thw=grids,
            attention_mask=None if mask is None else mask[rows].long(),
        )
        return positions[:, back]

    def encode(
        self,
        input_ids: torch.Tensor,
        mm_token_type_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> Encoded:
        """One forward pass without the language head.

        What says how the rows are laid out (all but ``pixel_values``) may stay on the CPU, where it is read: on a GPU
        every look at it waits for all work that was queued before.

        Args:
            input_ids: (B, L) long.
            mm_token_type_ids: (B, L) long, 1 at image tokens, else 0.
            pixel_values: (patches of all images, patch values) or None.
            image_grid_thw: (images, 3) long or None.
            attention_mask: (B, L) bool, right-padded; a mask without padding is dropped to keep the fast kernels.
        """
        device = self.model.device
        mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        positions = self.positions(input_ids, mm_token_type_ids, image_grid_thw, mask).to(device)
        mask = None if mask is None else mask.to(device)
        with _quiet_transformers():
            output = self.model.model(
                input_ids=input_ids.to(device),
                attention_mask=None if mask is None else mask.long(),
                position_ids=positions,
                use_cache=False,
                **self._seen(pixel_values, image_grid_thw, device),
            )
        return Encoded(output.last_hidden_state, positions, mask)

    def _seen(
        self, pixel_values: torch.Tensor | None, image_grid_thw: torch.Tensor | None, device: torch.device
    ) -> dict[str, Any]:
        """The arguments of the class's forward pass that stand for the pictures."""
        if pixel_values is None or image_grid_thw is None:
            return {}
        grids = image_grid_thw.cpu()
        layout = self._layout(grids, device)
        if layout is None:
            return {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw.to(device)}
        features = self.model.model.get_image_features(pixel_values, grids, return_dict=True, **layout)
        return {"mm_encoder_outputs": {"image": features}}

    def _layout(self, grids: torch.Tensor, device: torch.device) -> dict[str, Any] | None:
        """What the vision tower derives from the sizes of its pictures, picture by picture; kept, as sizes recur.

        None where the class or the installed transformers takes no such thing.
        """
        visual: Any = self.visual
        if not self._takes_layouts or not hasattr(visual, "interpolation_mode"):
            return None
        key = (str(device), grids.numpy().tobytes())
        if key not in self._layouts:
            indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
                grids,
                num_grid_per_side=visual.num_grid_per_side,
                mode=visual.interpolation_mode,
                align_corners=visual.interpolation_align_corners,
                spatial_merge_size=visual.spatial_merge_size,
            )
            tensors = {
                "image_position_ids": vision_utils.get_vision_position_ids(grids, visual.spatial_merge_size),
                "image_interp_indices": indices,
                "image_interp_weights": weights,
                "image_cu_seqlens": vision_utils.get_vision_cu_seqlens(grids),
            }
            longest = int((grids[:, 1] * grids[:, 2]).max())
            self._layouts[key] = {
                **{name: tensor.to(device) for name, tensor in tensors.items()}, "image_max_seqlen": longest
            }  # fmt: skip
        self._layouts.move_to_end(key)
        while len(self._layouts) > LAYOUTS:
            self._layouts.popitem(last=False)
        return self._layouts[key]

    @functools.cached_property
    def _takes_layouts(self) -> bool:
        return (
            vision_utils is not None and "mm_encoder_outputs" in inspect.signature(self.model.model.forward).parameters
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, D) last hidden states → (…, vocabulary) next-token logits."""
        return self.model.lm_head(hidden)

    @torch.no_grad()
    def generate(self, inputs: Mapping[str, torch.Tensor | None], max_new_tokens: int, stop: list[int]) -> torch.Tensor:
        """(B, new) greedily generated token ids; ``stop`` ids end a row."""
        given = {key: value for key, value in inputs.items() if value is not None}
        with _quiet_transformers():
            output = self.model.generate(
                **given, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop, pad_token_id=stop[0]
            )
        return output[:, given["input_ids"].shape[1] :]


def _embed_patches(projection: nn.Conv3d, patches: torch.Tensor) -> torch.Tensor:
    """(patches, values of a patch) → (patches, D)."""
    weight = projection.weight.flatten(1)
    return functional.linear(patches.to(weight.dtype), weight, projection.bias)
