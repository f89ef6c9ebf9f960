"""For which instruction the actions being commanded are: not always the newest one.

With ``finish`` the plan of the last instruction is played on until the first chunk for the new one has come. Whoever
learns from a recording has to know, frame by frame, which of the two an action belongs to.
"""

from __future__ import annotations

import json


class PlayedInstruction:
    """Keeps what was asked in which epoch of the plan, and tells when that of the plan changes.

    Attributes:
        text: the instruction of the plan being played; empty where nothing is.
    """

    def __init__(self) -> None:
        self.text = ""
        self._asked: list[tuple[int, str, str]] = []  # first epoch, instruction, how it was taken
        self._told: tuple[str, int] | None = None

    def given(self, text: str, epoch: int, how: str) -> None:
        """An instruction that began an epoch; ``how``: finish or flush, empty for what was asked from the start."""
        self._asked = [*self._asked[-7:], (epoch, text, how)]

    def now(self, t_ns: int, epoch: int | None, chunk_ns: int | None) -> str | None:
        """JSON for ``qwen_vla/playing`` where something else is played than was told last; else None.

        Args:
            t_ns: the time.
            epoch: of the plan being played; None: nothing is.
            chunk_ns: the stamp of its newest chunk.
        """
        self.text, how, began = "", "", 0
        if epoch is not None:
            for first, text, taken in self._asked:
                if first <= epoch:
                    self.text, how, began = text, taken, first
        key = (self.text, began) if epoch is not None else ("", -1)
        if key == self._told or (self._told is None and epoch is None):
            return None
        self._told = key
        event = {"t_ns": t_ns, "playing": epoch is not None, "instruction": self.text}
        if epoch is not None:
            event |= {"chunk_ns": chunk_ns, "on_instruction": how}
        return json.dumps(event, ensure_ascii=False)
