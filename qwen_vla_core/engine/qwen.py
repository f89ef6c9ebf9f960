"""The forward pass of Qwen3.5 and Qwen3-VL with fixed shapes: weights and answers of transformers' classes.

transformers' own forward asks the device for numbers (picture grids, mask checks, placeholder counts), so it cannot be
captured in a CUDA graph, and small models spend most of their time in its bookkeeping. Here everything that depends on
shapes only (interpolated position table, rotary angles, where the pictures' tokens go) is an input or made once per
picture grid, and projections that read the same tokens are one matrix product. The class's parameters become views of
those joined matrices: nothing is stored twice, and the class keeps working.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn

from qwen_vla_core.engine.ops import DeltaLayer, Rotary, TorchOps
from qwen_vla_core.model.backbone import Backbone
from qwen_vla_core.model.processor import ImageConfig

Grid = tuple[int, int]  # rows and columns of patches


def join(linears: Sequence[nn.Linear]) -> torch.Tensor:
    """One weight from several, whose own weights become views of it; bias-free layers only."""
    joined = torch.cat([linear.weight.data for linear in linears])
    for linear, part in zip(linears, joined.split([linear.out_features for linear in linears]), strict=True):
        linear.weight.data = part
    return joined


@dataclass(frozen=True)
class TextLayer:
    """One decoder layer: a delta net or gated attention, then the feed-forward."""

    norms: tuple[torch.Tensor, torch.Tensor]  # before the mixer and before the feed-forward, float32 with the 1
    mixer_in: torch.Tensor
    mixer_out: torch.Tensor
    delta: DeltaLayer | None
    head_norms: torch.Tensor | None  # of queries and keys, (2, d) float32 with the 1
    up: torch.Tensor  # gate and up
    down: torch.Tensor


@dataclass(frozen=True)
class VisionGrid:
    """What the tower needs of one picture size.

    Attributes:
        start: (patches, width) position table at this size plus the patch embedding's bias.
        rotary: cos and sin, (patches, 1, d) float32.
    """

    start: torch.Tensor
    rotary: Rotary


class FastQwen:
    """Pictures and token ids → last hidden states, without asking the device anything."""

    def __init__(self, backbone: Backbone, image: ImageConfig, ops: TorchOps) -> None:
        """
        Args:
            backbone: a ``qwen3_5`` or ``qwen3_vl`` model on its device; its parameters are joined in place.
            image: the processor's picture settings.
            ops: torch or CUDA kernels.
        """
        self.ops, self.image = ops, image
        model: Any = backbone.model.model
        self.visual, text = model.visual, model.language_model
        config = text.config
        self._one = 1.0 if backbone.config.model_type == "qwen3_5" else 0.0  # Qwen3.5's norms store weight − 1
        self.gated = backbone.config.model_type == "qwen3_5"
        self.epsilon, self.heads, self.groups = (
            config.rms_norm_eps,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.embedding: torch.Tensor = text.embed_tokens.weight
        self.layers = [self._layer(layer) for layer in text.layers]
        self.final_norm = self._one + text.norm.weight.data.float()
        self._patch_weight, self._patch_bias = self._patch_embedding()
        self._text_rotary = text.rotary_emb
        self._grids: dict[Grid, VisionGrid] = {}

    @staticmethod
    def supports(backbone: Backbone) -> bool:
        """Whether this forward pass is that of ``backbone``'s class and configuration."""
        config: Any = backbone.config
        if config.model_type not in ("qwen3_5", "qwen3_vl"):
            return False
        text = config.get_text_config()
        tower = config.vision_config
        return text.hidden_act == "silu" and tower.hidden_act == "gelu_pytorch_tanh" and not text.attention_bias

    def _layer(self, layer: Any) -> TextLayer:
        norms = tuple(
            self._one + norm.weight.data.float() for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        )
        delta, head_norms = None, None
        if hasattr(layer, "linear_attn"):
            net = layer.linear_attn
            mixer_in = join([net.in_proj_qkv, net.in_proj_z, net.in_proj_b, net.in_proj_a])
            mixer_out = net.out_proj.weight.data
            delta = DeltaLayer(
                key_heads=net.num_k_heads,
                value_heads=net.num_v_heads,
                key_width=net.head_k_dim,
                value_width=net.head_v_dim,
                taps=net.conv1d.weight.data.squeeze(1).contiguous(),
                decay=-net.A_log.data.float().exp(),
                time_bias=net.dt_bias.data.float(),
                norm=net.norm.weight.data,
                epsilon=net.layer_norm_epsilon,
            )
        else:
            net = layer.self_attn
            mixer_in = join([net.q_proj, net.k_proj, net.v_proj])
            mixer_out = net.o_proj.weight.data
            head_norms = self._one + torch.stack((net.q_norm.weight.data, net.k_norm.weight.data)).float()
        up = join([layer.mlp.gate_proj, layer.mlp.up_proj])
        return TextLayer(
            (norms[0], norms[1]), mixer_in, mixer_out, delta, head_norms, up, layer.mlp.down_proj.weight.data
        )

    def _patch_embedding(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The patch embedding as one matrix over grey levels minus 128, which bfloat16 holds exactly.

        A still picture is repeated over the patch's frames, so their weights add up; the normalisation of grey levels
        goes into weight and bias.
        """
        projection = self.visual.patch_embed.proj
        weight = projection.weight.data.float().sum(2)  # (width, 3, patch, patch)
        device = weight.device
        mean = torch.tensor(self.image.image_mean, device=device)[:, None, None]
        std = torch.tensor(self.image.image_std, device=device)[:, None, None]
        bias = projection.bias.data.float() + (weight * ((128.0 / 255.0 - mean) / std)).sum((1, 2, 3))
        weight = weight / (255.0 * std)
        flat = weight.permute(0, 2, 3, 1).flatten(1)
        return flat.to(projection.weight.dtype).contiguous(), bias

    @torch.no_grad()
    def grid(self, grid: Grid) -> VisionGrid:
        """The constants of one picture size, made at its first use."""
        if grid not in self._grids:
            self._grids[grid] = self._make_grid(grid)
        return self._grids[grid]

    def _make_grid(self, grid: Grid) -> VisionGrid:
        rows, columns = grid
        merge = self.image.merge_size

        def blocks(x: torch.Tensor) -> torch.Tensor:
            """(rows, columns, n) → (patches, n) in the tower's order: the patches of one token together."""
            x = x.reshape(rows // merge, merge, columns // merge, merge, -1)
            return x.permute(0, 2, 1, 3, 4).reshape(rows * columns, -1)

        table = self.visual.pos_embed.weight.data
        side = int(table.shape[0] ** 0.5)
        square = table.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
        at_size = functional.interpolate(square, (rows, columns), mode="bilinear", align_corners=True)
        start = blocks(at_size[0].permute(1, 2, 0)) + self._patch_bias
        config = self.visual.config
        width = config.hidden_size // config.num_heads
        theta = float((getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0))
        inverse = theta ** -(torch.arange(0, width // 2, 2, device=table.device, dtype=torch.float32) / (width // 2))
        row = torch.arange(rows, device=table.device)[:, None, None].expand(rows, columns, 1)
        column = torch.arange(columns, device=table.device)[None, :, None].expand(rows, columns, 1)
        angles = torch.cat((blocks(row).float() * inverse, blocks(column).float() * inverse), -1)
        angles = torch.cat((angles, angles), -1)[:, None]
        return VisionGrid(start.to(table.dtype), (angles.cos(), angles.sin()))

    def text_rotary(self, positions_3bl: torch.Tensor) -> Rotary:
        """cos and sin of M-RoPE positions (3, B, L) → (B, L, 1, r); the class's own angles."""
        cos, sin = self._text_rotary(self.embedding.new_empty(1, 1, 1), positions_3bl)
        return cos[:, :, None], sin[:, :, None]

    def patches(self, pictures_nhwc: torch.Tensor) -> torch.Tensor:
        """(N, height, width, 3) uint8 → (N, patches, 3 · patch²) grey levels minus 128, in the tower's order."""
        patch, merge = self.image.patch_size, self.image.merge_size
        count, height, width, _ = pictures_nhwc.shape
        rows, columns = height // patch, width // patch
        blocks = pictures_nhwc.view(count, rows // merge, merge, patch, columns // merge, merge, patch, 3)
        blocks = blocks.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(count, rows * columns, -1)
        return blocks.to(self._patch_weight.dtype) - 128.0

    def see(self, pictures_nhwc: torch.Tensor, grid: VisionGrid) -> tuple[torch.Tensor, ...]:
        """Pictures of one size → their tokens, (N · tokens, hidden).

        Qwen3-VL adds more such tensors, of blocks in between: they are added to the pictures' tokens after the first
        text layers.
        """
        ops = self.ops
        heads, deep = self.visual.config.num_heads, []
        marked = list(getattr(self.visual, "deepstack_visual_indexes", ()))
        x = ops.linear(self.patches(pictures_nhwc), self._patch_weight) + grid.start
        y: torch.Tensor | None = None
        for index, block in enumerate(self.visual.blocks):
            x, normed = ops.add_layer_norm(x, y, None, block.norm1.weight, block.norm1.bias, block.norm1.eps)
            attention = block.attn
            seen = ops.image_attention(ops.linear(normed, attention.qkv.weight, attention.qkv.bias), grid.rotary, heads)
            y = ops.linear(seen, attention.proj.weight, attention.proj.bias)
            x, normed = ops.add_layer_norm(x, y, None, block.norm2.weight, block.norm2.bias, block.norm2.eps)
            mlp = block.mlp
            hidden = ops.linear_gelu(normed, mlp.linear_fc1.weight, mlp.linear_fc1.bias)
            y = ops.linear(hidden, mlp.linear_fc2.weight, mlp.linear_fc2.bias)
            if index in marked:
                deep.append(self._merge(x + y, self.visual.deepstack_merger_list[marked.index(index)]))
        assert y is not None
        return (self._merge(x + y, self.visual.merger), *deep)

    def _merge(self, x: torch.Tensor, merger: Any) -> torch.Tensor:
        """The patches of each token side by side, normed before or after, through two layers."""
        ops, norm = self.ops, merger.norm
        if merger.use_postshuffle_norm:
            x = x.reshape(-1, merger.hidden_size)
        _, normed = ops.add_layer_norm(x, None, None, norm.weight, norm.bias, norm.eps)
        merged = normed.reshape(-1, merger.hidden_size)
        hidden = merger.act_fn(ops.linear(merged, merger.linear_fc1.weight, merger.linear_fc1.bias))
        return ops.linear(hidden, merger.linear_fc2.weight, merger.linear_fc2.bias)

    def read(
        self, ids_bl: torch.Tensor, seen: tuple[torch.Tensor, ...], slots: torch.Tensor, rotary: Rotary
    ) -> torch.Tensor:
        """Token ids and picture tokens → last hidden states (B, L, D), after the final norm.

        Padding on the right needs no mask: the model is causal, so real tokens never see it.

        Args:
            ids_bl: (B, L) long.
            seen: from ``see``, (n, D) each, of all pictures; empty without pictures.
            slots: (n,) long, where they go in the flattened (B · L).
            rotary: from ``text_rotary``.
        """
        ops = self.ops
        x = functional.embedding(ids_bl, self.embedding)
        if seen:
            x = x.flatten(0, 1).index_copy(0, slots, seen[0].to(x.dtype)).view_as(x)
        y: torch.Tensor | None = None
        for index, layer in enumerate(self.layers):
            x, normed = ops.add_rms_norm(x, y, layer.norms[0], self.epsilon)
            projected = ops.linear(normed, layer.mixer_in)
            if layer.delta is not None:
                mixed = ops.delta_net(projected, layer.delta)
            else:
                assert layer.head_norms is not None
                mixed = ops.text_attention(
                    projected, layer.head_norms, rotary, self.heads, self.groups, self.epsilon, self.gated
                )
            x, normed = ops.add_rms_norm(x, ops.linear(mixed, layer.mixer_out), layer.norms[1], self.epsilon)
            y = ops.linear(ops.silu_product(ops.linear(normed, layer.up)), layer.down)
            if 0 < index + 1 < len(seen):
                x, y = (x + y).flatten(0, 1).index_add(0, slots, seen[index + 1].to(x.dtype)).view_as(x), None
        return ops.add_rms_norm(x, y, self.final_norm, self.epsilon)[1]
