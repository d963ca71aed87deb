from __future__ import annotations

import math

import pytest

from llmrec.metrics.rating import absolute_error, rmse, squared_error


def test_errors_by_hand() -> None:
    predicted, truth = [3.0, 5.0, 1.0, 4.0], [4.0, 5.0, 4.0, 2.0]
    assert squared_error(predicted, truth).tolist() == [1.0, 0.0, 9.0, 4.0]
    assert absolute_error(predicted, truth).tolist() == [1.0, 0.0, 3.0, 2.0]
    assert rmse(predicted, truth) == pytest.approx(math.sqrt(14 / 4))


def test_rejects_malformed_values() -> None:
    with pytest.raises(ValueError, match="not finite"):
        squared_error([math.nan], [3.0])
    with pytest.raises(ValueError, match="not finite"):
        absolute_error([3.0], [math.inf])
    with pytest.raises(ValueError, match="same shape"):
        rmse([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="without requests"):
        rmse([], [])
