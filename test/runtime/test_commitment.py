"""What is committed is aligned with the observation, whichever messages it has to be read from."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_vla_core.runtime.commitment import PlanHistory, PlanRest

MS = 1_000_000


def rest(t_ms: int, first: float, count: int = 6) -> PlanRest:
    """A plan that rises by 1 per period of 100 ms in channel 0; channel 1 is a displacement per period."""
    rows = first + np.arange(count + 1.0)
    return PlanRest(t_ms * MS, np.column_stack([rows, 10 * np.ceil(rows)]))


def history(*rests: PlanRest) -> PlanHistory:
    plans = PlanHistory(0.1, np.array([False, True]))
    for each in rests:
        plans.add(each)
    return plans


def test_rows_line_up_with_the_new_observation() -> None:
    committed = history(rest(1000, 0.0)).committed(1030 * MS, horizon=16, latency_s=0.25)
    assert committed is not None and committed.frozen == 3
    np.testing.assert_allclose(committed.actions_hc[:, 0], [1.3, 2.3, 3.3, 4.3, 5.3])
    np.testing.assert_allclose(committed.actions_hc[:, 1], [10, 20, 30, 40, 50])
    assert history(rest(1000, 0.0)).committed(1030 * MS, horizon=3, latency_s=9.0).frozen == 3


def test_what_changed_after_the_observation_is_read_from_what_was_told_last() -> None:
    """Seen at 1000; at 1150 another chunk took over: row 0 was played from the old plan, the rest is the new one's."""
    plans = history(rest(1000, 0.0), rest(1150, 50.0))
    committed = plans.committed(1000 * MS, horizon=16, latency_s=0.1)
    np.testing.assert_allclose(committed.actions_hc[:, 0], [1.0, 50.5, 51.5, 52.5, 53.5, 54.5, 55.5])


@pytest.mark.parametrize(
    ("plans", "stamp_ms"),
    [
        (history(), 1000),
        (history(rest(1000, 0.0, count=0)), 1000),  # the plan has ended
        (history(rest(1000, 0.0), rest(1500, 0.0, count=0)), 1450),  # and so did this one
        (history(rest(1000, 0.0)), 1550),  # seen when less than a period was left
        (history(rest(1200, 0.0)), 1000),  # seen before anything was told
    ],
)
def test_nothing_is_committed_where_nothing_is_known(plans: PlanHistory, stamp_ms: int) -> None:
    assert plans.committed(stamp_ms * MS, horizon=16, latency_s=0.1) is None


def test_old_news_is_ignored_and_clearing_forgets() -> None:
    plans = history(rest(1000, 0.0), rest(900, 70.0))
    assert plans.end_ns == 1600 * MS
    plans.clear()
    assert plans.end_ns is None and plans.committed(1000 * MS, 16, 0.1) is None
