"""How an episode went, as an operator says it on a topic. No rclpy in here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from qwen_vla_core.errors import UserError
from qwen_vla_core.rollouts.index import OUTCOMES, label, read_rollout


@dataclass(frozen=True)
class Verdict:
    """What was said; empty: nothing of that kind."""

    outcome: str = ""
    reason: str = ""
    note: str = ""


def verdict_of(text: str) -> Verdict:
    """A message on ``qwen_vla/outcome``: JSON with ``outcome``, ``reason`` and ``note``, or an outcome alone.

    Raises:
        UserError: neither of them.
    """
    word = text.strip()
    if word in OUTCOMES:
        return Verdict(word)
    try:
        said = json.loads(word)
        if not isinstance(said, dict) or not set(said) <= {"outcome", "reason", "note"}:
            raise ValueError
    except ValueError:
        raise UserError(
            f"no verdict: {word[:80]!r}; send {', '.join(OUTCOMES)}, or JSON with outcome, reason, note"
        ) from None
    values = {key: str(value or "").strip() for key, value in said.items()}
    if values.get("outcome") and values["outcome"] not in OUTCOMES:
        raise UserError(f"outcome '{values['outcome']}': use one of {', '.join(OUTCOMES)}")
    return Verdict(**values)


def attach(last: tuple[Path, str] | None, verdict: Verdict) -> tuple[Path, str]:
    """Changes the label of the episode that was closed last; a note is added to what was noted before.

    Args:
        last: its folder and outcome; None: there is none.
        verdict: what was said.

    Returns:
        its folder and its outcome now.

    Raises:
        UserError: there is none, or it cannot be written.
    """
    if last is None:
        raise UserError("a verdict or note came, but no episode has been recorded yet")
    rollout = read_rollout(last[0])
    note = "\n".join(filter(None, [rollout.note, verdict.note])) if verdict.note else None
    now = label(rollout, verdict.outcome or None, note, verdict.reason or None, by="operator")
    return last[0], now.outcome
