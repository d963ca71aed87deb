from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.metrics.rating import absolute_error, rmse, squared_error


def test_worked_by_hand() -> None:
    predicted, truth = [3.0, 5.0, 1.0, 4.0], [4.0, 5.0, 4.0, 2.0]
    assert squared_error(predicted, truth).tolist() == [1.0, 0.0, 9.0, 4.0]
    assert absolute_error(predicted, truth).tolist() == [1.0, 0.0, 3.0, 2.0]
    assert rmse(predicted, truth) == pytest.approx(math.sqrt(14 / 4))


_RATINGS = st.lists(st.tuples(st.floats(1, 5), st.floats(1, 5)), min_size=1, max_size=40)


@given(pairs=_RATINGS, seed=st.integers(0, 99))
def test_bounds_and_order(pairs: list[tuple[float, float]], seed: int) -> None:
    predicted, truth = np.array(pairs).T
    assert 0 <= absolute_error(predicted, truth).mean() <= rmse(predicted, truth) + 1e-12 <= 4 + 1e-9
    order = np.random.default_rng(seed).permutation(len(truth))
    assert rmse(predicted[order], truth[order]) == pytest.approx(rmse(predicted, truth), abs=1e-12)
    assert rmse(truth, truth) == absolute_error(truth, truth).max() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_errors(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        squared_error([bad], [3.0])
    with pytest.raises(ValueError, match="not finite"):
        absolute_error([3.0], [bad])


def test_lengths_must_agree_and_be_positive() -> None:
    with pytest.raises(ValueError, match="same shape"):
        rmse([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="without requests"):
        rmse([], [])
