from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.metrics.probability import Bin, auc, auc_statistic, calibration_error, gauc, log_loss, reliability
from llmrec.metrics.stats import interval_of, paired_of

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


@given(answers=_ANSWERS, seed=st.integers(0, 99))
def test_auc_depends_on_order_alone(answers: list[tuple[float, int]], seed: int) -> None:
    scores, labels = (np.array(each) for each in zip(*answers, strict=True))
    value = auc(scores, labels)
    order = np.random.default_rng(seed).permutation(len(scores))
    assert auc(np.exp(3 * scores[order]), labels[order]) == pytest.approx(value, nan_ok=True, abs=1e-12)
    assert auc(-scores, labels) == pytest.approx(1 - value, nan_ok=True, abs=1e-12)
    assert auc(scores, 1 - labels) == pytest.approx(1 - value, nan_ok=True, abs=1e-12)
    assert math.isnan(value) or 0 <= value <= 1


# ------------------------------------------------------------------ within users


def test_gauc_by_hand() -> None:
    users = ["a", "a", "b", "b", "b", "c"]
    found = gauc([0.9, 0.1, 0.5, 0.5, 0.6, 0.7], [1, 0, 1, 0, 0, 1], users)
    assert found.users == ("a", "b", "c")
    assert found.values.tolist() == pytest.approx([1.0, 0.25, math.nan], nan_ok=True)
    assert (found.value, found.left_out) == (pytest.approx((1 + 0.25) / 2), 1)
    none = gauc([0.1, 0.2], [1, 0], ["a", "b"])
    assert math.isnan(none.value) and none.left_out == 2


def test_a_rule_that_knows_users_only_has_no_gauc() -> None:
    rng = np.random.default_rng(0)
    liking = rng.random(60)
    users = [f"u{n}" for n in range(60) for _ in range(20)]
    said = np.repeat(liking, 20)
    labels = rng.random(1200) < said
    assert auc(said, labels) > 0.7
    assert gauc(said, labels, users).value == pytest.approx(0.5)


@given(answers=_ANSWERS, seed=st.integers(0, 99))
def test_gauc_equals_taking_users_one_by_one(answers: list[tuple[float, int]], seed: int) -> None:
    scores, labels = (list(each) for each in zip(*answers, strict=True))
    users = [f"u{n}" for n in np.random.default_rng(seed).integers(0, 4, len(scores))]
    found = gauc(scores, labels, users)
    for name, value in zip(found.users, found.values, strict=True):
        own = [place for place, user in enumerate(users) if user == name]
        expected = _by_pairs([scores[place] for place in own], [labels[place] for place in own])
        assert value == pytest.approx(expected, nan_ok=True, abs=1e-12)
    assert found.left_out == int(np.isnan(found.values).sum())


# ------------------------------------------------------------------ log loss and calibration


def test_log_loss_by_hand() -> None:
    found = log_loss([0.8, 0.8, 1.0, 0.0, 1.0], [1, 0, 1, 0, 0])
    assert found.tolist() == pytest.approx([-math.log(0.8), -math.log(0.2), 0, 0, -math.log(1e-15)], abs=1e-14)
    assert (found >= 0).all()


def test_calibration_and_reliability_by_hand() -> None:
    # Two answers of each probability share a bin: means .1 and .9, shares 0.5 and 1.
    said, so = [0.1, 0.1, 0.9, 0.9], [0, 1, 1, 1]
    assert calibration_error(said, so) == pytest.approx((2 * 0.4 + 2 * 0.1) / 4)
    assert reliability(said, so) == (Bin(2, 0.1, 0.5), Bin(2, 0.9, 1.0))
    assert calibration_error([1.0, 0.0], [1, 0]) == 0.0
    assert calibration_error([0.3] * 10, [1] * 3 + [0] * 7) == pytest.approx(0.0)


@given(answers=_ANSWERS, seed=st.integers(0, 9))
def test_calibration_is_a_share_and_has_no_order(answers: list[tuple[float, int]], seed: int) -> None:
    said, so = (np.array(each) for each in zip(*answers, strict=True))
    value = calibration_error(said, so)
    assert 0 <= value <= 1
    order = np.random.default_rng(seed).permutation(len(said))
    assert calibration_error(said[order], so[order]) == pytest.approx(value, abs=1e-12)
    bins = reliability(said, so)
    assert sum(each.n for each in bins) == len(said)
    total = sum(each.n / len(said) * abs(each.said - each.so) for each in bins)
    assert total == pytest.approx(value, abs=1e-12)


def test_bins_of_equal_mass_hold_equally_many() -> None:
    said = np.linspace(0, 1, 100, endpoint=False)
    so = np.zeros(100)
    so[45:] = 1
    assert [each.n for each in reliability(said, so)] == [10] * 10
    by_hand = np.mean([abs(said[n : n + 10].mean() - so[n : n + 10].mean()) for n in range(0, 100, 10)])
    assert calibration_error(said, so) == pytest.approx(by_hand)


# ------------------------------------------------------------------ resampling and errors


@given(seed=st.integers(0, 99))
def test_the_statistic_is_auc_on_every_resample(seed: int) -> None:
    rng = np.random.default_rng(seed)
    said, so = rng.integers(0, 5, 30) / 4, rng.integers(0, 2, 30)
    users = [f"u{n:02d}" for n in rng.integers(0, 8, 30)]
    names = sorted(set(users))
    rows = rng.integers(0, len(names), size=(20, len(names)))
    found = auc_statistic(said, so, users)(rows)
    for row, value in zip(rows, found, strict=True):
        places = [place for user in row for place in range(30) if users[place] == names[user]]
        expected = _by_pairs([said[place] for place in places], [so[place] for place in places])
        assert value == pytest.approx(0.5 if math.isnan(expected) else expected)


def test_intervals_of_an_auc() -> None:
    rng = np.random.default_rng(0)
    so = rng.integers(0, 2, 400)
    said = np.clip(0.5 + 0.2 * (so - 0.5) + rng.normal(0, 0.2, 400), 0, 1)
    better = auc_statistic(said, so)
    found = interval_of(better, 400, resamples=500, seed=0)
    assert found.value == pytest.approx(auc(said, so))
    # The standard error of Hanley and McNeil (1982) is about .026 here.
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.026, rel=0.15)
    chance = auc_statistic(rng.random(400), so)
    lead = paired_of(lambda rows: better(rows) - chance(rows), 400, resamples=500, seed=0).at()
    assert lead.low > 0


def test_malformed_answers_are_errors() -> None:
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
