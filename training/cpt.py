#!/usr/bin/env python3
"""Continued pretraining (stage II): all robots, all families, everything learns [P].

frozen    nothing: vision tower, language model and action decoder learn, each at its own rate
data      the whole mixture: manipulation, human hands, navigation, synthetic, conversations; each family has its share
          in every batch
loss      action 1.0 (velocity of the flow, padded channels and steps masked) + navigation 1.0 + next token 0.1
schedule  AdamW, linear warm-up, cosine; flow times from a Beta distribution that favours noise

    python training/cpt.py --recipe training/recipes/generalist/cpt.yaml --out runs/generalist/cpt
    torchrun --standalone --nproc_per_node 2 training/cpt.py --recipe … --out …      # the same run on two ranks
"""

from __future__ import annotations

from qwen_vla_core.errors import UserError
from qwen_vla_core.training.page import Page, main
from qwen_vla_core.training.stage import PolicyTask, Stage


def check(stage: Stage) -> None:
    """Every part learns; there is something to act on."""
    if not any(source.conversations is None for source in stage.mixture.sources):
        raise UserError(f"{stage.recipe.mixture}: has no family with actions, which CPT learns")
    if stage.recipe.loss.tau != "beta":
        raise UserError(f"{stage.recipe.source}: loss.tau: CPT draws flow times from 'beta' [P]")


PAGE = Page("cpt", __doc__ or "", PolicyTask, check)

if __name__ == "__main__":
    raise SystemExit(main(PAGE))
