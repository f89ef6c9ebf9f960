"""Open-loop errors in the middle of training, on the episodes that a mixture leaves out (`leave_out`)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from qwen_vla_core.data.dataset import ActionDataset
from qwen_vla_core.data.held_out import Episodes
from qwen_vla_core.data.mixture import Mixture, Source
from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.open_loop import compare
from qwen_vla_core.model.policy import QwenVLA
from qwen_vla_core.training.run_log import append_rows

OPEN_LOOP = "open_loop.jsonl"


class LeftOut:
    """What every saved state is asked.

    Args:
        mixture: opened.
        policy: in training; asked in evaluation mode, with the weights it has at that moment.
        out: folder of the run; rows are appended to ``open_loop.jsonl``.
        stage: for the rows.
        frames: questions per dataset.

    Raises:
        UserError: no dataset of the mixture leaves anything out.
    """

    def __init__(self, mixture: Mixture, policy: QwenVLA, out: Path, stage: str, frames: int) -> None:
        self.policy, self.out, self.stage, self.frames = policy, out, stage, frames
        self.parts = [(source, rest_of(source)) for source in mixture.sources if _leaves_out(source)]
        if not self.parts:
            raise UserError(
                f"{mixture.recipe.source}: open_loop: no dataset has `leave_out: N`, so there is nothing to ask"
            )
        self._began = time.monotonic()

    def ask(self, step: int) -> list[dict[str, Any]]:
        """One row per dataset, also written: ``stage``, ``step``, ``seconds`` since the run (re)started, ``errors``."""
        training = self.policy.training
        self.policy.eval()
        try:
            reports = [
                compare(self.policy, source.embodiment, data, self.frames, hold_at_end=source.form.hold_at_end)
                for source, data in self.parts
            ]
        finally:
            self.policy.train(training)
        about = {"stage": self.stage, "step": step, "seconds": round(time.monotonic() - self._began, 1)}
        rows = [{**about, **{key: report[key] for key in ("embodiment", "dataset", "errors")}} for report in reports]
        append_rows(self.out / OPEN_LOOP, rows)
        return rows


def rest_of(source: Source) -> Episodes:
    """The episodes that a source leaves out."""
    learned = cast(Episodes, source.actions)
    whole: ActionDataset = learned.dataset
    return Episodes(whole, learned.count, source.form.leave_out)


def _leaves_out(source: Source) -> bool:
    return source.conversations is None and source.form.leave_out > 0


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """What to think of it, a line per dataset: how the error compares with staying and with repeating."""
    lines = []
    for row in rows:
        mine = row["errors"]["policy"]["chunk"]
        low, high = row["errors"]["policy"]["interval_95"]
        text = f"open loop, step {row['step']}, {row['dataset']}: error {mine:.4f} [{low:.4f}, {high:.4f}]"
        for name, words in (("stay", "holding still"), ("repeat", "repeating the last action")):
            if name in row["errors"]:
                text += f"; {mine / row['errors'][name]['chunk']:.2f} × {words} ({row['errors'][name]['chunk']:.4f})"
        lines.append(text)
        knows_nothing = [errors["chunk"] for name, errors in row["errors"].items() if name != "policy"]
        if knows_nothing and high >= min(knows_nothing):
            lines.append("  no better than a policy that sees nothing yet")
    return "\n".join(lines)
