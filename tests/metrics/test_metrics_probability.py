from __future__ import annotations

import math
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.metrics import probability
from llmrec.metrics.probability import (
    auc,
    auc_statistic,
    calibration_error,
    gauc,
    log_loss,
    reliability_curve,
)
from llmrec.records import Reliability

_ANSWERS = st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]), st.integers(0, 1)), min_size=1, max_size=25)


def _by_pairs(scores: list[float], labels: list[int]) -> float:
    yes = [score for score, label in zip(scores, labels, strict=True) if label]
    no = [score for score, label in zip(scores, labels, strict=True) if not label]
    return float(np.mean([(a > b) + (a == b) / 2 for a in yes for b in no])) if yes and no else math.nan


# ------------------------------------------------------------------ AUC


def test_auc_by_hand() -> None:
    # Pairs: .9 beats both, .4 loses to .5 and ties with .4.
    assert auc([0.9, 0.4, 0.5, 0.4], [1, 1, 0, 0]) == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert auc([1.0, 0.0], [1, 0]) == 1.0
    assert auc([0.3, 0.3, 0.3], [1, 0, 0]) == 0.5
    assert math.isnan(auc([0.3, 0.4], [1, 1]))


@given(answers=_ANSWERS)
def test_auc_equals_counting_pairs(answers: list[tuple[float, int]]) -> None:
    scores, labels = (list(each) for each in zip(*answers, strict=True))
    assert auc(scores, labels) == pytest.approx(_by_pairs(scores, labels), nan_ok=True, abs=1e-12)


# ------------------------------------------------------------------ within users


def test_gauc_by_hand() -> None:
    users = ["a", "a", "b", "b", "b", "c"]
    result = gauc([0.9, 0.1, 0.5, 0.5, 0.6, 0.7], [1, 0, 1, 0, 0, 1], users)
    assert result.users == ("a", "b", "c")
    assert result.values.tolist() == pytest.approx([1.0, 0.25, math.nan], nan_ok=True)
    assert (result.value, result.left_out) == (pytest.approx((1 + 0.25) / 2), 1)
    none = gauc([0.1, 0.2], [1, 0], ["a", "b"])
    assert math.isnan(none.value) and none.left_out == 2


@given(answers=_ANSWERS, seed=st.integers(0, 99))
def test_gauc_equals_loop_over_users(answers: list[tuple[float, int]], seed: int) -> None:
    scores, labels = (list(each) for each in zip(*answers, strict=True))
    users = [f"u{n}" for n in np.random.default_rng(seed).integers(0, 4, len(scores))]
    result = gauc(scores, labels, users)
    for name, value in zip(result.users, result.values, strict=True):
        rows = [row for row, user in enumerate(users) if user == name]
        expected = _by_pairs([scores[row] for row in rows], [labels[row] for row in rows])
        assert value == pytest.approx(expected, nan_ok=True, abs=1e-12)
    assert result.left_out == int(np.isnan(result.values).sum())


# ------------------------------------------------------------------ log loss and calibration


def test_log_loss_by_hand() -> None:
    result = log_loss([0.8, 0.8, 1.0, 0.0, 1.0], [1, 0, 1, 0, 0])
    assert result.tolist() == pytest.approx([-math.log(0.8), -math.log(0.2), 0, 0, -math.log(1e-15)], abs=1e-14)
    assert (result >= 0).all()


def test_calibration_and_reliability_by_hand() -> None:
    # Two answers of each probability share a bin: means .1 and .9, shares 0.5 and 1.
    scores, labels = [0.1, 0.1, 0.9, 0.9], [0, 1, 1, 1]
    assert calibration_error(scores, labels) == pytest.approx((2 * 0.4 + 2 * 0.1) / 4)
    assert reliability_curve(scores, labels) == (Reliability(n=2, said=0.1, so=0.5), Reliability(n=2, said=0.9, so=1.0))
    assert calibration_error([1.0, 0.0], [1, 0]) == 0.0
    assert calibration_error([0.3] * 10, [1] * 3 + [0] * 7) == pytest.approx(0.0)


@given(answers=_ANSWERS, seed=st.integers(0, 9))
def test_calibration_does_not_depend_on_order(answers: list[tuple[float, int]], seed: int) -> None:
    scores, labels = (np.array(each) for each in zip(*answers, strict=True))
    value = calibration_error(scores, labels)
    assert 0 <= value <= 1
    order = np.random.default_rng(seed).permutation(len(scores))
    assert calibration_error(scores[order], labels[order]) == pytest.approx(value, abs=1e-12)
    bins = reliability_curve(scores, labels)
    assert sum(each.n for each in bins) == len(scores)
    total = sum(each.n / len(scores) * abs(each.said - each.so) for each in bins)
    assert total == pytest.approx(value, abs=1e-12)


def test_bins_have_equal_mass() -> None:
    scores = np.linspace(0, 1, 100, endpoint=False)
    labels = np.zeros(100)
    labels[45:] = 1
    assert [each.n for each in reliability_curve(scores, labels)] == [10] * 10
    by_hand = np.mean([abs(scores[n : n + 10].mean() - labels[n : n + 10].mean()) for n in range(0, 100, 10)])
    assert calibration_error(scores, labels) == pytest.approx(by_hand)


# ------------------------------------------------------------------ resampling and errors


@given(seed=st.integers(0, 99))
def test_statistic_equals_auc_of_every_resample(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 5, 30) / 4, rng.integers(0, 2, 30)
    users = [f"u{n:02d}" for n in rng.integers(0, 8, 30)]
    names = sorted(set(users))
    rows = rng.integers(0, len(names), size=(20, len(names)))
    with patch.object(probability, "_BLOCK_VALUES", 90):  # blocks of three resamples
        result = auc_statistic(scores, labels, users)(rows)
    for row, value in zip(rows, result, strict=True):
        drawn = [answer for user in row for answer in range(30) if users[answer] == names[user]]
        expected = _by_pairs([scores[answer] for answer in drawn], [labels[answer] for answer in drawn])
        assert value == pytest.approx(0.5 if math.isnan(expected) else expected)
    if 0 < labels.sum() < 30:
        assert auc_statistic(scores, labels)(np.arange(30)[None, :])[0] == pytest.approx(auc(scores, labels))


def test_rejects_malformed_answers() -> None:
    for metric in (auc, log_loss, calibration_error):
        with pytest.raises(ValueError, match="same shape"):
            metric([0.1, 0.2], [1])
        with pytest.raises(ValueError, match="without answers"):
            metric([], [])
        with pytest.raises(ValueError, match="0 or 1"):
            metric([0.1], [2])
        with pytest.raises(ValueError, match="NaN"):
            metric([math.nan], [1])
    for metric in (log_loss, calibration_error):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            metric([1.2], [1])
    with pytest.raises(ValueError, match="1 answers, but 2 users"):
        gauc([0.2], [1], ["a", "b"])
