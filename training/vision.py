#!/usr/bin/env python3
"""Stage 0, first part: a vision tower with random weights learns to see; stands in for Qwen's own pretraining [O].
Leave it out with published weights.

frozen    everything but the tower
data      pictures of simulated demonstrations; their answers come from the simulator's state
loss      for every picture token: which things lie in its cell (cross-entropy) and where in it (squared error), through
          a head that is thrown away. Learning to see through next-token losses alone takes a tiny tower very long
schedule  AdamW, linear warm-up, constant

    python training/vision.py --recipe training/recipes/generalist/vision.yaml --out runs/generalist/vision
"""

from __future__ import annotations

from qwen_vla_core.errors import UserError
from qwen_vla_core.training.page import Page, main
from qwen_vla_core.training.seeing import SeeingTask
from qwen_vla_core.training.stage import Stage


def check(stage: Stage) -> None:
    """Demonstrations only; the tower alone has a rate."""
    rates = stage.recipe.optim.rates
    if rates.language or rates.decoder:
        raise UserError(f"{stage.recipe.source}: optim.rates: this stage trains the vision tower alone")
    talking = [source.family for source in stage.mixture.sources if source.conversations is not None]
    if talking:
        raise UserError(f"{stage.mixture.recipe.source}: family {talking[0]}: this stage learns from demonstrations")


PAGE = Page("vision", __doc__ or "", SeeingTask, check)

if __name__ == "__main__":
    raise SystemExit(main(PAGE))
