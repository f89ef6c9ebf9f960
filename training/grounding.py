#!/usr/bin/env python3
"""Stage 0, second part: a backbone with random weights learns to answer about pictures; stands in for Qwen's own
pretraining [O]. Leave it out with published weights.

frozen    the action decoder
data      conversations: where things are in the reference view (`ask: where`), then what every possible instruction
          would mean in a picture (`ask: requests`)
loss      next token, on the answers only
schedule  AdamW, linear warm-up, constant

    python training/grounding.py --recipe training/recipes/generalist/where.yaml --from runs/…/vision/checkpoint …
"""

from __future__ import annotations

from qwen_vla_core.errors import UserError
from qwen_vla_core.training.page import Page, main
from qwen_vla_core.training.stage import PolicyTask, Stage


def check(stage: Stage) -> None:
    """Conversations only."""
    acting = [source.family for source in stage.mixture.sources if source.conversations is None]
    if acting:
        raise UserError(
            f"{stage.mixture.recipe.source}: family {acting[0]}: this stage learns from conversations alone; "
            "leave it out"
        )


PAGE = Page("grounding", __doc__ or "", PolicyTask, check)

if __name__ == "__main__":
    raise SystemExit(main(PAGE))
