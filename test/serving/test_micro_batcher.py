"""Questions that wait together are answered together, and one that fails costs the others nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving_support import TIMEOUT_S, WIDOWX, FakeEngine, observation, request

from qwen_vla_core.interfaces import Request
from qwen_vla_core.serving.batching import MicroBatcher


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def batcher(engine: FakeEngine) -> Iterator[MicroBatcher]:
    made = MicroBatcher(engine, max_batch=3)
    yield made
    engine.gate.set()
    made.close(TIMEOUT_S)


def busy(engine: FakeEngine, batcher: MicroBatcher) -> None:
    """The engine is in a batch of its own, so that what follows queues up."""
    engine.gate.clear()
    batcher.submit([request(99.0)])
    assert engine.entered.wait(TIMEOUT_S)


def test_what_waits_together_is_one_call_and_everyone_gets_his_own(engine: FakeEngine, batcher: MicroBatcher) -> None:
    busy(engine, batcher)
    futures = [batcher.submit([request(1.0)]), batcher.submit([request(2.0, WIDOWX), request(3.0)])]
    futures.append(batcher.submit([request(4.0)]))
    engine.gate.set()
    answers = [future.result(TIMEOUT_S) for future in futures]
    assert [[p.chunk.actions_hc[0, 0] for p in a.predictions] for a in answers] == [[1.0], [2.0, 3.0], [4.0]]
    assert [len(call) for call in engine.calls] == [1, 3, 1]  # max_batch is 3
    assert [answer.batch for answer in answers] == [3, 3, 1]
    assert all(answer.queue_s > 0 and answer.inference_s > 0 for answer in answers)
    assert batcher.batches == {1: 2, 3: 1}


def test_different_steps_never_share_a_call(engine: FakeEngine, batcher: MicroBatcher) -> None:
    busy(engine, batcher)
    futures = [batcher.submit([request()], steps) for steps in (2, 7, 2)]
    engine.gate.set()
    for future in futures:
        future.result(TIMEOUT_S)
    assert engine.steps_seen == [None, 2, 7] and [len(call) for call in engine.calls] == [1, 2, 1]


def test_a_failing_request_fails_alone(engine: FakeEngine, batcher: MicroBatcher) -> None:
    busy(engine, batcher)
    good = batcher.submit([request(1.0)])
    bad = batcher.submit([Request(observation(instruction="fail"), "aloha")])
    engine.gate.set()
    assert good.result(TIMEOUT_S).predictions[0].chunk.actions_hc[0, 0] == 1.0
    with pytest.raises(RuntimeError, match="no memory left"):
        bad.result(TIMEOUT_S)


def test_what_is_withdrawn_while_it_waits_is_never_computed(engine: FakeEngine, batcher: MicroBatcher) -> None:
    busy(engine, batcher)
    withdrawn, kept = batcher.submit([request(1.0)]), batcher.submit([request(2.0)])
    assert withdrawn.cancel()
    engine.gate.set()
    kept.result(TIMEOUT_S)
    assert [[r.observation.state[0] for r in call] for call in engine.calls] == [[99.0], [2.0]]


def test_a_free_engine_waits_for_the_other_client_but_not_for_nobody(engine: FakeEngine) -> None:
    batcher = MicroBatcher(engine, max_batch=8, max_wait_s=TIMEOUT_S, clients=lambda: 2)
    futures = [batcher.submit([request(1.0)]), batcher.submit([request(2.0)])]
    assert [future.result(TIMEOUT_S / 2).batch for future in futures] == [2, 2]
    batcher.close(TIMEOUT_S)


def test_impossible_sizes_and_a_closed_batcher_are_refused(engine: FakeEngine, batcher: MicroBatcher) -> None:
    with pytest.raises(ValueError):
        MicroBatcher(engine, max_batch=0)
    for count in (0, 4):
        with pytest.raises(ValueError, match="from 1 to 3"):
            batcher.submit([request()] * count)
    busy(engine, batcher)
    waiting = batcher.submit([request()])
    engine.gate.set()
    batcher.close(TIMEOUT_S)
    assert waiting.cancelled() or waiting.done()
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit([request()])
