"""``QwenVLA``: backbone, action decoder, processor and statistics as one policy.

Three levels: tensors (``loss``, ``sample``), robots (``predict``), and their parts for benchmarks and the runtime
(``preprocess`` → ``encode`` → ``denoise`` → ``postprocess``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional
from torch import nn

from qwen_vla_core.actions.conventions import relative_parts, to_absolute
from qwen_vla_core.actions.normalize import Quantiles
from qwen_vla_core.embodiment import Embodiment, build_prompt
from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import ActionChunk, Observation
from qwen_vla_core.model import flow
from qwen_vla_core.model.action_decoder import ActionDecoder, Context
from qwen_vla_core.model.backbone import Backbone, Encoded
from qwen_vla_core.model.batching import KINDS, ActionRow, collate_rows, kind_of
from qwen_vla_core.model.config import ModelConfig
from qwen_vla_core.model.processor import IGNORED_LABEL, Processor

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Stats:
    """Normalisation of one embodiment's (or dataset's) data.

    Attributes:
        action: quantiles of the c action channels.
        state: quantiles of the state channels.
    """

    action: Quantiles
    state: Quantiles


class QwenVLA(nn.Module):
    """Vision-language-action model; satisfies ``interfaces.Policy``."""

    def __init__(
        self,
        config: ModelConfig,
        backbone: Backbone,
        processor: Processor,
        embodiments: Mapping[str, Embodiment] | None = None,
        stats: Mapping[str, Stats] | None = None,
    ) -> None:
        """
        Args:
            config: shapes and choices; ``config.backbone`` describes ``backbone``.
            backbone: vision-language model.
            processor: its tokenizer and picture settings; view tokens of ``embodiments`` are added to it.
            embodiments: name → robot.
            stats: name → quantiles; needed for training on and predicting for that robot.
        """
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.decoder = ActionDecoder(config.decoder, backbone.hidden_size, config.state_mode == "dit_token")
        self.processor = processor
        self.embodiments: dict[str, Embodiment] = {}
        self.stats: dict[str, Stats] = {}
        for embodiment in (embodiments or {}).values():
            self.add_embodiment(embodiment, (stats or {}).get(embodiment.name))

    def add_embodiment(self, embodiment: Embodiment, stats: Stats | None = None) -> None:
        """Teaches the processor a robot's view tokens and keeps its statistics.

        Raises:
            UserError: it has more channels than the model's padded tensors, or the statistics name other channels.
        """
        decoder = self.config.decoder
        for what, names, room in (
            ("actions", embodiment.channels, decoder.channels),
            ("state", embodiment.state_channels, decoder.state_channels),
        ):
            if len(names) > room:
                raise UserError(
                    f"embodiment {embodiment.name}: {len(names)} {what} channels, the model has room for {room}"
                )
        if stats is not None:
            for what, quantiles, names in (
                ("action", stats.action, embodiment.channels),
                ("state", stats.state, embodiment.state_channels),
            ):
                if quantiles.names != tuple(names):
                    raise UserError(f"stats.json: {what} channels of {embodiment.name} differ from the embodiment's")
            self.stats[embodiment.name] = stats
        self.embodiments[embodiment.name] = embodiment
        self.processor.add_views(embodiment.views)
        self.backbone.resize_vocabulary(len(self.processor.tokenizer))

    @property
    def device(self) -> torch.device:
        """Where the decoder's weights are."""
        return self.decoder.context_in.weight.device

    # ---- building batches -------------------------------------------------------------------------------------------

    def embodiment(self, name: str | None = None) -> Embodiment:
        """The named robot, or the only one."""
        if name is None:
            if len(self.embodiments) != 1:
                raise UserError(f"embodiment: name one of {', '.join(self.embodiments) or 'none'} (--embodiment)")
            return next(iter(self.embodiments.values()))
        if name not in self.embodiments:
            raise UserError(
                f"embodiment {name!r} is not in this checkpoint: it has {', '.join(self.embodiments) or 'none'}"
            )
        return self.embodiments[name]

    def embodiment_stats(self, name: str) -> Stats:
        """The robot's quantiles; a UserError if the checkpoint has none."""
        if name not in self.stats:
            raise UserError(f"stats.json has no entry for embodiment {name!r}: fit it on that robot's data first")
        return self.stats[name]

    def collate(
        self,
        observations: Sequence[Observation],
        embodiment: str | None = None,
        actions_bhc: np.ndarray | None = None,
        step_mask_bh: np.ndarray | None = None,
        turns: Sequence[tuple[tuple[str, str], ...]] | None = None,
        told: str | None = None,
    ) -> dict[str, torch.Tensor]:
        """Observations of one robot → a batch on the model's device; the same code for training and inference.

        Args:
            observations: B observations.
            embodiment: name; None = the only one.
            actions_bhc: (B, H, c) targets in channel units (training).
            step_mask_bh: (B, H) bool, False where a target lies behind the episode's end; default all real.
            turns: per observation, (question, answer) pairs that follow the prompt (see ``Sample``).
            told: name of the robot that the prompt speaks of; None = the same. Another one is a wrong prompt, to see
                whether prompts matter.

        Raises:
            UserError: a view of the embodiment is missing, or the state has another length.
        """
        robot = self.embodiment(embodiment)
        stats = self.embodiment_stats(robot.name)
        targets = None if actions_bhc is None else stats.action.normalize(actions_bhc)
        rows = []
        for index, observation in enumerate(observations):
            rows.append(
                ActionRow(
                    images=self.checked_views(observation, robot),
                    prompt=build_prompt(robot if told is None else self.embodiment(told), observation.instruction),
                    state=stats.state.normalize(self.checked_state(observation, robot)),
                    channels=len(robot.channels),
                    actions_hc=None if targets is None else targets[index],
                    step_mask_h=None if step_mask_bh is None else step_mask_bh[index],
                    turns=() if turns is None else tuple(turns[index]),
                    kind=kind_of(robot.control.convention),
                )
            )
        batch = collate_rows(self.processor, self.config, rows)
        return {key: value.to(self.device) for key, value in batch.items()}

    @staticmethod
    def checked_views(observation: Observation, robot: Embodiment) -> dict[str, np.ndarray]:
        """The robot's pictures in model order; a UserError that names the view where one is missing."""
        for view in robot.views:
            if view not in observation.images:
                raise UserError(
                    f"view {view!r} of embodiment {robot.name} is missing from the observation; "
                    "a missing camera is a fault, it is never replaced by a black picture"
                )
        return {view: observation.images[view] for view in robot.views}

    @staticmethod
    def checked_state(observation: Observation, robot: Embodiment) -> np.ndarray:
        """The robot's state as float64; a UserError where it has another length or is not finite."""
        state = np.asarray(observation.state, dtype=np.float64)
        if state.shape != (len(robot.state_channels),) or not np.all(np.isfinite(state)):
            raise UserError(
                f"state of embodiment {robot.name} needs {len(robot.state_channels)} finite channels, got {state.shape}"
            )
        return state

    # ---- training ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        batch: Batch,
        repeat: int = 1,
        noise: torch.Tensor | None = None,
        tau: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        prefix: torch.Tensor | None = None,
        hidden: Encoded | None = None,
    ) -> dict[str, torch.Tensor]:
        """Sums of the losses of one batch, from one backbone pass; see ``loss_counts`` for what to divide them by.

        Sums, because a batch may be spread over ranks and micro-batches: only their counts together make a mean.

        Args:
            batch: from ``collate_rows``, on the model's device.
            repeat: noise draws per observation; draws 2, 3, … are nearly free [X].
            noise: (B·repeat, H, K); default: drawn with ``generator``.
            tau: (B·repeat, H) or (B·repeat, 1) flow times; default: one per draw, from the configured sampler.
            generator: makes the default draws reproducible.
            prefix: (B·repeat,) long, how many first actions of each draw are given instead of predicted: their flow
                time is 0 and they are in no loss (trained real-time chunking [X]). Default: none.
            hidden: the backbone's reading of this batch, where it is known already (T2A, frozen backbone).

        Returns:
            ``action`` and ``navigation``: sum over samples of their masked squared error [P]; ``text``: sum over answer
            tokens of the cross-entropy. Only those the batch has.
        """
        encoded = self._encode(batch) if hidden is None else hidden
        sums: dict[str, torch.Tensor] = {}
        if "actions" in batch:
            error = self._action_errors(batch, encoded, repeat, noise, tau, generator, prefix)
            for number, kind in enumerate(KINDS):
                of_kind = (batch["kind"] == number).to(error)
                if bool(of_kind.any()):
                    sums[kind] = (error * of_kind).sum()
        if "labels" in batch:
            sums["text"] = self._answer_sum(encoded.hidden, batch["labels"])
        return sums

    def loss(
        self,
        batch: Batch,
        repeat: int = 1,
        noise: torch.Tensor | None = None,
        tau: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, torch.Tensor]:
        """Mean losses of one batch; arguments as ``forward``. ``action`` holds all robots' actions, also waypoints."""
        sums = self(batch, repeat, noise, tau, generator)
        if not sums:
            raise ValueError("the batch has neither actions nor labels")
        counts = loss_counts(batch)
        losses = {}
        acting = [kind for kind in KINDS if kind in sums]
        if acting:
            losses["action"] = torch.stack([sums[kind] for kind in acting]).sum() / max(
                sum(counts[kind] for kind in acting), 1
            )
        if "text" in sums:
            losses["text"] = sums["text"] / max(counts["text"], 1)
        return losses

    def text_loss(self, batch: Batch) -> torch.Tensor:
        """Next-token loss on the answers of a VQA-type batch."""
        return self.loss({key: value for key, value in batch.items() if key != "actions"})["text"]

    def _action_errors(
        self,
        batch: Batch,
        encoded: Encoded,
        repeat: int,
        noise: torch.Tensor | None,
        tau: torch.Tensor | None,
        generator: torch.Generator | None,
        prefix: torch.Tensor | None,
    ) -> torch.Tensor:
        """(B,) squared error of each action row, averaged over its noise draws."""
        context = self.decoder.encode_context(self._context(batch, encoded)).repeat(repeat)
        data = batch["actions"].repeat_interleave(repeat, 0)
        channel_mask = batch["channel_mask"].repeat_interleave(repeat, 0)
        step_mask = batch["step_mask"].repeat_interleave(repeat, 0) if "step_mask" in batch else None
        data = torch.where(channel_mask[:, None], data, 0.0)
        if noise is None:
            noise = torch.randn(data.shape, generator=generator, device=data.device)
        noise = torch.where(channel_mask[:, None], noise, 0.0)
        if tau is None:
            tau = flow.sample_tau(data.shape[0], self.config.flow, generator, data.device)[:, None]
        counted = torch.ones(data.shape[:2], dtype=torch.bool, device=data.device) if step_mask is None else step_mask
        if prefix is not None:
            given = torch.arange(data.shape[1], device=data.device) < prefix[:, None]
            tau = torch.where(given, 0.0, tau)
            counted = counted & ~given
        predicted = self.decoder.denoise_step(context, flow.interpolate(data, noise, tau), tau, channel_mask, step_mask)
        errors = flow.sample_mse(predicted, flow.velocity_target(data, noise), channel_mask, counted)
        return errors.view(-1, repeat).mean(1)

    def _answer_sum(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        targets = labels[:, 1:]
        asked = targets != IGNORED_LABEL
        if not bool(asked.any()):
            return hidden.sum() * 0.0
        # Only the answers' positions go through the head: vocabularies are large.
        logits = self.backbone.logits(hidden[:, :-1][asked]).float()
        return functional.cross_entropy(logits, targets[asked], reduction="sum")

    # ---- inference --------------------------------------------------------------------------------------------------

    def _encode(self, batch: Batch) -> Encoded:
        return self.backbone.encode(
            batch["input_ids"],
            batch["mm_token_type_ids"],
            batch.get("pixel_values"),
            batch.get("image_grid_thw"),
            batch.get("attention_mask"),
        )

    def _context(self, batch: Batch, encoded: Encoded) -> Context:
        """The decoder's context: everything before the first answer."""
        hidden, positions, mask = encoded.hidden, encoded.positions, encoded.mask
        shown = batch.get("context_mask")
        if "action_rows" in batch:
            rows = batch["action_rows"]
            hidden, positions = hidden[rows], positions[:, rows]
            mask = None if mask is None else mask[rows]
            shown = None if shown is None else shown[rows]
        if shown is not None:
            mask = shown
            length = int(mask.sum(1).max())
            hidden, positions, mask = hidden[:, :length], positions[:, :, :length], mask[:, :length]
            mask = None if bool(mask.all()) else mask
        hidden = hidden.to(self.decoder.context_in.weight.dtype)
        return self.decoder.embed_context(hidden, positions, mask, batch.get("state"))

    def preprocess(
        self, observation: Observation, embodiment: str | None = None, told: str | None = None
    ) -> dict[str, torch.Tensor]:
        """One observation → inputs on the model's device; ``told`` as in ``collate``."""
        return self.collate([observation], embodiment, told=told)

    def encode(self, inputs: Batch) -> Context:
        """Backbone, then the decoder's cached keys and values."""
        return self.decoder.encode_context(self._context(inputs, self._encode(inputs)))

    def denoise(
        self,
        context: Context,
        inputs: Batch,
        horizon: int,
        steps: int | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Euler integration from noise to a normalised chunk, (B, horizon, K); padded channels are zero."""
        channel_mask = inputs["channel_mask"]
        if noise is None:
            shape = (channel_mask.shape[0], horizon, self.config.decoder.channels)
            noise = torch.randn(shape, generator=generator, device=self.device)
        start = torch.where(channel_mask[:, None], noise, 0.0)
        return flow.integrate(
            lambda noisy, tau: self.decoder.denoise_step(context, noisy, tau, channel_mask),
            start,
            self.config.flow.steps if steps is None else steps,
        )

    @torch.no_grad()
    def sample(
        self,
        inputs: Batch,
        steps: int | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        horizon: int | None = None,
    ) -> torch.Tensor:
        """Normalised chunks for a batch.

        Args:
            inputs: from ``collate``.
            steps: Euler steps; default from the configuration.
            noise: (B, H, K) starting noise; default drawn with ``generator``.
            generator: makes the default noise reproducible.
            horizon: H; default: that of ``noise``, else of the only embodiment.

        Returns:
            (B, H, K); padded channels are zero.
        """
        if horizon is None:
            horizon = noise.shape[1] if noise is not None else self.embodiment().control.horizon
        return self.denoise(self.encode(inputs), inputs, horizon, steps, noise, generator)

    def postprocess(
        self, chunk_hk: torch.Tensor, observation: Observation, embodiment: str | None = None
    ) -> ActionChunk:
        """One normalised chunk (H, K) → absolute actions in the robot's channel units, whatever the convention."""
        robot = self.embodiment(embodiment)
        quantiles = self.embodiment_stats(robot.name).action
        actions = quantiles.denormalize(chunk_hk[:, : len(robot.channels)].double().cpu().numpy())
        parts = relative_parts(robot.control.convention, robot.actions, robot.state)
        actions = to_absolute(parts, actions, observation.state)
        return ActionChunk(actions, tuple(robot.channels), observation.stamp_ns, 1.0 / robot.control.frequency_hz)

    @torch.no_grad()
    def predict(
        self,
        observation: Observation,
        embodiment: str | None = None,
        steps: int | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        told: str | None = None,
    ) -> ActionChunk:
        """From pictures, state and instruction to H actions.

        Args:
            observation: every view of the embodiment and its state.
            embodiment: name; None = the checkpoint's only one.
            steps: Euler steps; default from the configuration.
            noise: (1, H, K) starting noise.
            generator: makes the default noise reproducible.
            told: as in ``collate``.

        Raises:
            UserError: a view is missing, the state has another length, or the robot is unknown.
        """
        inputs = self.preprocess(observation, embodiment, told)
        horizon = self.embodiment(embodiment).control.horizon
        chunk = self.denoise(self.encode(inputs), inputs, horizon, steps, noise, generator)
        return self.postprocess(chunk[0], observation, embodiment)

    def generate_text(self, images: Mapping[str, np.ndarray], question: str, max_new_tokens: int = 64) -> str:
        """Answers a question about pictures (view → (height, width, 3) uint8) greedily; the model is still a VLM."""
        inputs = {key: value.to(self.device) for key, value in self.processor.question(images, question).items()}
        stop = [self.processor.token_id("<|im_end|>"), self.processor.token_id("<|endoftext|>")]
        ids = self.backbone.generate(inputs, max_new_tokens, stop)
        return str(self.processor.tokenizer.decode(ids[0], skip_special_tokens=True)).strip()


def loss_counts(batch: Batch) -> dict[str, int]:
    """What the sums of ``QwenVLA.forward`` are to be divided by: samples with a real step, and answer tokens."""
    counts = {"action": 0, "navigation": 0, "text": 0}
    if "actions" in batch:
        real = batch["step_mask"].any(1) if "step_mask" in batch else torch.ones_like(batch["kind"], dtype=torch.bool)
        for number, kind in enumerate(KINDS):
            counts[kind] = int((real & (batch["kind"] == number)).sum())
    if "labels" in batch:
        counts["text"] = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
    return counts


def parameter_counts(backbone: Backbone, decoder: ActionDecoder) -> dict[str, int]:
    """Parameters per part, in the paper's division; works on the meta device."""
    return {
        "backbone": count(backbone),
        "vision": count(backbone.visual),
        "decoder": count(decoder),
        "dit_blocks": count(decoder.blocks),
        "dit_block": count(decoder.blocks[0]),
        "vlm_to_dit": count(decoder.context_in),
        "action_mlps": count(decoder.action_in) + count(decoder.action_out),
        "timestep_mlp": count(decoder.time_in),
        "output_adaln": count(decoder.output_modulation),
        "state_token": count(decoder.state_in),
        "total": count(backbone) + count(decoder),
    }


def count(module: nn.Module | None) -> int:
    """Parameters of a module, shared ones once."""
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())
