"""For which instruction an action is: that of the chunk being played, not the newest one."""

from __future__ import annotations

import json

import numpy as np

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_core.runtime.controller import ControlLoop
from qwen_vla_core.runtime.played import PlayedInstruction

ALOHA = load_embodiment("aloha")
START = np.array([value for group in ALOHA.actions for value in group.start])
MS = 1_000_000


def test_with_finish_the_old_plan_is_told_as_the_old_instructions_until_the_first_new_chunk() -> None:
    loop, played, t = ControlLoop(ALOHA), PlayedInstruction(), 10**12
    told: list[dict] = []
    loop.start(t)
    played.given("red", loop.buffer.epoch, "")

    def tick(chunk: bool) -> None:
        nonlocal t
        t += 20 * MS
        loop.update_state(dict(zip(ALOHA.channels, START, strict=True)), t)
        if chunk:
            assert loop.feed(ActionChunk(np.tile(START, (16, 1)), ALOHA.channels, t, 0.1), t) is None
        mode = loop.tick(t).mode
        playing = mode == "running" and not loop.buffer.empty
        event = played.now(t, loop.buffer.plan_epoch if playing else None, loop.buffer.stamp_ns)
        if event is not None:
            told.append(json.loads(event))

    tick(False)
    assert told == []  # nothing is played, and nobody was told otherwise
    tick(True)
    tick(True)
    assert [(e["playing"], e["instruction"]) for e in told] == [(True, "red")] and told[0][
        "chunk_ns"
    ] == 10**12 + 40 * MS
    t += 1
    loop.instruct(t, hold=False)
    played.given("green", loop.buffer.epoch, "finish")
    tick(False)
    assert len(told) == 1 and played.text == "red"  # still the old plan
    tick(True)
    assert (told[1]["instruction"], told[1]["on_instruction"], told[1]["t_ns"]) == ("green", "finish", t)
    loop.instruct(t + 1, hold=True)
    played.given("blue", loop.buffer.epoch, "flush")
    tick(False)
    assert told[2] == {"t_ns": t, "playing": False, "instruction": ""} and played.text == ""
    tick(True)
    assert (told[3]["instruction"], told[3]["on_instruction"]) == ("blue", "flush")
