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
    assert found.weights.tolist() == [1.0, 1.0, 0.0]
    weighed = gauc([0.9, 0.1, 0.5, 0.5, 0.6, 0.7], [1, 0, 1, 0, 0, 1], users, "requests")
    assert weighed.value == pytest.approx((2 * 1 + 3 * 0.25) / 5)
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


def test_calibration_by_hand() -> None:
    said, so = [0.05, 0.15, 0.95, 0.95], [0, 1, 1, 0]
    # Widths of a tenth: (.05, no), (.15, yes), two of .95 of which one is yes.
    assert calibration_error(said, so, binning="width") == pytest.approx((0.05 + 0.85 + 2 * 0.45) / 4)
    # Two halves: means .1 and .95, shares .5 and .5.
    assert calibration_error(said, so, bins=2) == pytest.approx((2 * 0.4 + 2 * 0.45) / 4)
    assert calibration_error([1.0, 0.0], [1, 0], binning="width") == 0.0
    assert calibration_error([0.3] * 10, [1] * 3 + [0] * 7) == pytest.approx(0.0)


@given(answers=_ANSWERS, bins=st.integers(1, 15), binning=st.sampled_from(["width", "mass"]), seed=st.integers(0, 9))
def test_calibration_is_a_share_and_has_no_order(
    answers: list[tuple[float, int]], bins: int, binning: str, seed: int
) -> None:
    said, so = (np.array(each) for each in zip(*answers, strict=True))
    value = calibration_error(said, so, bins=bins, binning=binning)
    assert 0 <= value <= 1
    order = np.random.default_rng(seed).permutation(len(said))
    assert calibration_error(said[order], so[order], bins=bins, binning=binning) == pytest.approx(value, abs=1e-12)
    assert calibration_error(said, so, bins=1, binning=binning) == pytest.approx(
        abs(said.mean() - so.mean()), abs=1e-12
    )


def test_bins_of_equal_mass_hold_equally_many() -> None:
    said = np.linspace(0, 1, 100, endpoint=False)
    so = np.zeros(100)
    so[45:] = 1
    by_hand = np.mean([abs(said[n : n + 10].mean() - so[n : n + 10].mean()) for n in range(0, 100, 10)])
    assert calibration_error(said, so) == pytest.approx(by_hand)


def test_reliability_by_hand_and_as_what_the_error_sums() -> None:
    said, so = [0.05, 0.15, 0.95, 0.95], [0, 1, 1, 0]
    assert reliability(said, so, binning="width") == (Bin(1, 0.05, 0.0), Bin(1, 0.15, 1.0), Bin(2, 0.95, 0.5))
    halves = reliability(said, so, bins=2)
    assert [each.n for each in halves] == [2, 2] and halves[0].said == pytest.approx(0.1)
    rng = np.random.default_rng(0)
    guess, truth = rng.random(500), rng.integers(0, 2, 500)
    for binning in ("width", "mass"):
        found = reliability(guess, truth, binning=binning)  # type: ignore[arg-type]
        assert sum(each.n for each in found) == 500
        total = sum(each.n / 500 * abs(each.said - each.so) for each in found)
        assert total == pytest.approx(calibration_error(guess, truth, binning=binning))  # type: ignore[arg-type]


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
    with pytest.raises(ValueError, match="bins must"):
        calibration_error([0.2], [1], bins=0)
    with pytest.raises(ValueError, match="1 answers, but 2 users"):
        gauc([0.2], [1], ["a", "b"])
