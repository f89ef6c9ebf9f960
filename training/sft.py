#!/usr/bin/env python3
"""Supervised fine-tuning (stage III): fewer, better demonstrations, every robot and every task equally often [P].

frozen    nothing, or the backbone's own weights under LoRA adapters; each part has its own rate
data      two tracks [P]: multi-task (manipulation, navigation, questions, grounding) or one real robot's teleoperation;
          which one is the mixture's business: `balance: [embodiment, task]` or `[dataset]`
loss      action 1.0 + navigation 1.0 + next token 0.1; with `loss.prefix` the first actions of a chunk may be given, so
          that the policy learns to go on from what is already being executed (trained real-time chunking)
schedule  AdamW, linear warm-up, cosine to zero; flow times from a Beta distribution that favours noise

    python training/sft.py --recipe training/recipes/generalist/sft.yaml --from runs/generalist/cpt/checkpoint --out …
"""

from __future__ import annotations

from qwen_vla_core.errors import UserError
from qwen_vla_core.training.page import Page, main
from qwen_vla_core.training.stage import PolicyTask, Stage


def check(stage: Stage) -> None:
    """Balanced sampling, from a pretrained policy."""
    if stage.recipe.start is None:
        raise UserError(f"{stage.recipe.source}: start: SFT goes on from a policy; name its checkpoint (--from)")
    if stage.recipe.loss.tau != "beta":
        raise UserError(f"{stage.recipe.source}: loss.tau: SFT draws flow times from 'beta' [P]")
    for family in stage.mixture.recipe.families:
        if family.name in ("manipulation", "navigation") and not family.balance:
            raise UserError(
                f"{stage.mixture.recipe.source}: family {family.name}: balance: SFT samples robots and tasks equally "
                "often [P]; write balance: [embodiment, task] or [dataset]"
            )


PAGE = Page("sft", __doc__ or "", PolicyTask, check)

if __name__ == "__main__":
    raise SystemExit(main(PAGE))
