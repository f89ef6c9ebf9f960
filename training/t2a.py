#!/usr/bin/env python3
"""Text to action (stage I): the action decoder learns what movements look like, from words alone [P].

frozen    the whole backbone: no pictures, so nothing about seeing could be learnt; its reading of every prompt is
          computed once and remembered
data      whole episodes: 20 % synthetic single-arm trajectories (`qwen-vla data t2a`) and 80 % real ones without their
          pictures [P]
loss      action 1.0, over the full sequence [P]
schedule  AdamW 1e-4 [X], 2,000 steps are best [P]; flow times sigmoid(N(0, 1)) [P]

    python training/t2a.py --recipe training/recipes/generalist/t2a.yaml --from runs/generalist/requests/checkpoint …
"""

from __future__ import annotations

from qwen_vla_core.errors import UserError
from qwen_vla_core.training.frozen_prompts import FrozenPrompts
from qwen_vla_core.training.page import Page, main
from qwen_vla_core.training.stage import Stage


def check(stage: Stage) -> None:
    """Words and whole sequences, nothing else."""
    for source in stage.mixture.sources:
        if source.conversations is not None or not source.form.whole:
            raise UserError(
                f"{stage.mixture.recipe.source}: family {source.family}: T2A learns from whole episodes without "
                "pictures; write whole: true, or leave the family out"
            )
    if stage.recipe.loss.tau != "sigmoid_normal":
        raise UserError(f"{stage.recipe.source}: loss.tau: T2A draws flow times from 'sigmoid_normal' [P]")


PAGE = Page("t2a", __doc__ or "", FrozenPrompts, check)

if __name__ == "__main__":
    raise SystemExit(main(PAGE))
