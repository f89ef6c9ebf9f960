from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_vla_core.actions.normalize import Quantiles
from qwen_vla_core.errors import UserError

FINITE = st.floats(-1e4, 1e4, allow_nan=False)


@given(low=FINITE, span=st.floats(1e-2, 1e4), fraction=st.floats(0, 1))
def test_denormalize_undoes_normalize_inside_the_quantiles(low: float, span: float, fraction: float) -> None:
    quantiles = Quantiles((low,), (low + span,), ("a",))
    value = np.array([low + fraction * span])
    np.testing.assert_allclose(
        quantiles.denormalize(quantiles.normalize(value)), value, atol=1e-9 * (1 + abs(low) + span)
    )


def test_published_form_and_clipping() -> None:
    quantiles = Quantiles((0.0, -2.0), (1.0, 2.0), ("a", "b"))
    np.testing.assert_allclose(
        quantiles.normalize(np.array([[0.0, 0.0], [0.75, 1.0], [9.0, -9.0]])), [[-1, 0], [0.5, 0.5], [1, -1]]
    )
    np.testing.assert_allclose(quantiles.denormalize(np.array([5.0, -5.0])), [1.0, -2.0])


def test_a_constant_channel_maps_to_zero_and_inverts_to_q01() -> None:
    quantiles = Quantiles((3.0, 0.0), (3.0 + 1e-9, 1.0), ("still", "moves"))
    np.testing.assert_array_equal(quantiles.normalize(np.array([[3.0, 0.5], [50.0, 0.5]])), [[0, 0], [0, 0]])
    np.testing.assert_array_equal(quantiles.denormalize(np.array([0.7, 0.0])), [3.0, 0.5])


def test_fit_takes_the_quantiles_of_all_leading_axes() -> None:
    values = np.stack([np.linspace(0, 100, 101), np.full(101, 2.0)], -1).reshape(101, 1, 2)
    quantiles = Quantiles.fit(values, ("ramp", "still"))
    assert quantiles.q01 == (1.0, 2.0)
    assert quantiles.q99 == (99.0, 2.0)
    assert quantiles.constant.tolist() == [False, True]


def test_dictionary_round_trip_keeps_the_hash() -> None:
    quantiles = Quantiles((0.1,), (0.3,), ("a",))
    again = Quantiles.from_dict(quantiles.to_dict())
    assert again == quantiles
    assert again.hash == quantiles.hash
    assert again.hash != Quantiles((0.1,), (0.3,), ("b",)).hash


@pytest.mark.parametrize(
    "broken",
    [
        {"names": ["a"], "q01": [0.0]},
        {"names": ["a"], "q01": [0.0], "q99": [1.0], "mean": [0.5]},
        {"names": ["a"], "q01": [0.0, 1.0], "q99": [1.0, 2.0]},
        {"names": ["a"], "q01": [2.0], "q99": [1.0]},
        {"names": ["a"], "q01": ["x"], "q99": [1.0]},
        {"names": ["a"], "q01": [float("nan")], "q99": [1.0]},
    ],
)
def test_broken_quantiles_are_one_user_error(broken: dict[str, object]) -> None:
    with pytest.raises(UserError, match="quantiles"):
        Quantiles.from_dict(broken)


def test_no_samples_or_the_wrong_width_cannot_be_fitted() -> None:
    for values in (np.zeros((0, 2)), np.zeros((5, 3))):
        with pytest.raises(ValueError, match="2 channels"):
            Quantiles.fit(values, ("a", "b"))
