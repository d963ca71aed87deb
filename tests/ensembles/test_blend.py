"""Ensembles of ratings and of probabilities: planted members get the weights that they deserve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit, logit

from llmrec.ensembles.blend import PredictionEnsemble
from llmrec.ensembles.weights import EnsembleTrial
from llmrec.errors import LlmrecError
from llmrec.types import Answer, Case, Probability, Rating, Request, Unparsed
from tests.facts import Facts, raises

MANY = 3000


@dataclass
class _Table:
    """Answers with a number per request; NaN is an unreadable answer."""

    name: str
    values: NDArray[np.float64]
    predicts_probability: bool

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        kind = Probability if self.predicts_probability else Rating
        values = [(request.id, float(self.values[int(request.id)])) for request in requests]
        return [
            Unparsed(request_id=name, reason="mute") if np.isnan(value) else kind(request_id=name, value=value)
            for name, value in values
        ]


def _cases(truth: NDArray[np.float64]) -> list[Case]:
    return [
        Case(request=Request(id=str(row), user_id=f"u{row // 2}", item="i"), truth=float(value))
        for row, value in enumerate(truth)
    ]


def _blend(parts: dict[str, NDArray[np.float64]], *, predicts_probability: bool) -> PredictionEnsemble:
    return PredictionEnsemble(
        "all",
        [(name, _Table(name, values, predicts_probability)) for name, values in parts.items()],
        predicts_probability=predicts_probability,
    )


def _ratings(rng: np.random.Generator) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    one, two = rng.normal(3.5, 0.6, MANY), rng.normal(3.5, 0.6, MANY)
    truth = 0.7 * one + 0.4 * two - 0.3 + rng.normal(0, 0.5, MANY)
    return truth, {"one": one, "two": two, "noise": rng.normal(3.5, 0.6, MANY)}


def test_weights_of_ratings() -> None:
    truth, parts = _ratings(np.random.default_rng(0))
    blend = _blend(parts, predicts_probability=False)
    blend.fit(_cases(truth))
    weights = blend.fitted
    assert weights.form == "ridge" and weights.parts == pytest.approx((0.7, 0.4, 0.0), abs=0.05)
    assert weights.low[2] < 0 < weights.high[2] and weights.low[0] < 0.7 < weights.high[0]
    errors = {each.name: -each.value for each in blend.tried}
    assert min(errors.values()) ** 2 < 0.8 * errors["one"] ** 2
    # The values are RMSE, not squared errors.
    assert errors["one"] == pytest.approx(np.sqrt(np.mean((parts["one"] - truth) ** 2)), rel=0.02)


def test_weights_of_probabilities() -> None:
    rng = np.random.default_rng(1)
    one, two, noise = (rng.normal(0, 1.5, MANY) for _ in range(3))
    truth = (rng.random(MANY) < expit(0.9 * one + 0.5 * two - 0.4)).astype(np.float64)
    blend = _blend({"one": expit(one), "two": expit(two), "noise": expit(noise)}, predicts_probability=True)
    blend.fit(_cases(truth))
    weights = blend.fitted
    assert weights.form == "logit" and weights.parts == pytest.approx((0.9, 0.5, 0.0), abs=0.12)
    assert weights.low[2] < 0 < weights.high[2]
    (answer,) = blend.answer([Request(id="0", user_id="u", item="i")])
    assert isinstance(answer, Probability)
    assert logit(answer.value) == pytest.approx(0.9 * one[0] + 0.5 * two[0] - 0.4, abs=0.4)


@pytest.mark.parametrize("predicts_probability", [False, True])
def test_member_with_few_cases_is_added_to_a_fitted_blend(predicts_probability: bool) -> None:
    rng = np.random.default_rng(4)
    known = {name: rng.normal(0, 1, MANY) for name in ("one", "two", *map(str, range(8)))}
    new, noise = rng.normal(0, 1, MANY), rng.normal(0, 1, MANY)
    total = 0.6 * known["one"] + 0.4 * known["two"] + 0.8 * new
    truth = (
        (rng.random(MANY) < expit(2 * total)).astype(float)
        if predicts_probability
        else total + rng.normal(0, 0.5, MANY)
    )

    def blend_of(parts: dict[str, NDArray[np.float64]]) -> PredictionEnsemble:
        return _blend(
            {name: expit(each) if predicts_probability else each for name, each in parts.items()},
            predicts_probability=predicts_probability,
        )

    base, few = blend_of(known), _cases(truth)[:120]
    base.name = "base"
    base.fit(_cases(truth))
    for last, worth in ((new, True), (noise, False)):
        joined = blend_of({**known, "last": last})
        joined.fit(few, ablate=True, base_ensembles=[base])
        best = max(joined.tried, key=lambda each: each.value).name
        assert best.startswith("base")
        assert best.startswith("base and last") == worth
        ratio = joined.fitted.parts[0] / joined.fitted.parts[1]
        assert ratio == pytest.approx(base.fitted.parts[0] / base.fitted.parts[1])
        if worth:
            (without,) = joined.without
            assert without.name == "last" and without.low > 0
        else:
            requests = [case.request for case in _cases(truth)[120:140]]
            assert [a.value for a in joined.answer(requests)] == [  # type: ignore[union-attr]
                a.value
                for a in base.answer(requests)  # type: ignore[union-attr]
            ]


@pytest.mark.parametrize("predicts_probability", [False, True])
def test_base_is_evaluated_on_other_users(predicts_probability: bool) -> None:
    rng = np.random.default_rng(6)
    known = {str(n): rng.normal(0, 1, 200) for n in range(8)}
    truth = (rng.random(200) < 0.5).astype(float) if predicts_probability else rng.normal(0, 1, 200)
    parts = {name: expit(each) if predicts_probability else each for name, each in known.items()}
    cases = _cases(truth)
    base = _blend({name: parts[name] for name in "012345"}, predicts_probability=predicts_probability)
    base.name = "base"
    base.fit(cases, only=EnsembleTrial("logit" if predicts_probability else "ridge", "penalty 0.0001", 0.0))
    (alone,) = base.tried
    joined = _blend(parts, predicts_probability=predicts_probability)
    joined.fit(cases, base_ensembles=[base])
    values = {each.name: each.value for each in joined.tried}
    assert values["base"] == pytest.approx(alone.value)


def test_answers_are_in_range_and_missing_ones_count_as_mean() -> None:
    truth, parts = _ratings(np.random.default_rng(3))
    truth = np.clip(truth, 1, 5)
    mute = parts["two"].copy()
    mute[::5] = np.nan
    blend = _blend({"one": parts["one"], "two": mute}, predicts_probability=False)
    blend.fit(_cases(truth))
    values = [
        answer.value for answer in blend.answer([case.request for case in _cases(truth)]) if isinstance(answer, Rating)
    ]
    assert len(values) == MANY and truth.min() <= min(values) and max(values) <= truth.max()
    assert blend.answer([]) == []


def test_rejects_too_few_users_or_members() -> None:
    truth, parts = _ratings(np.random.default_rng(4))
    with raises(LlmrecError, Facts("too-few")):
        _blend(parts, predicts_probability=False).fit(_cases(truth[:6]))
    with raises(LlmrecError, Facts("mismatch")):
        _blend({"one": parts["one"]}, predicts_probability=False)
    with pytest.raises(RuntimeError, match="call fit"):
        _blend(parts, predicts_probability=False).answer([])
