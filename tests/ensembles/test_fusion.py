"""Ensembles of rankers: planted members get the weights that they deserve, and none is below its best member."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmrec.baselines.popular import Popularity
from llmrec.baselines.sasrec import SASRec
from llmrec.baselines.tune import tune
from llmrec.baselines.validation import ranking_cases
from llmrec.data.split import split_validation_users
from llmrec.ensembles.cells import CandidateScores, ScoreScale
from llmrec.ensembles.rankers import CatalogueEnsemble, CatalogueMember
from llmrec.ensembles.weights import EnsembleTrial, Weights, fit_logit, fit_pool, with_confidence_limits
from llmrec.errors import LlmrecError
from llmrec.evaluate.catalogue import rank_catalogue
from llmrec.metrics.ranking import ndcg
from llmrec.pipeline.study import load_split
from llmrec.recipe.schema import DataSection
from llmrec.types import Answer, Case, Event, Request
from tests.facts import Facts, raises

ITEMS = tuple(f"i{n:02d}" for n in range(40))
USERS = 400


@dataclass
class _Table:
    """Scores from a table with a row per request."""

    name: str
    rows: dict[str, NDArray[np.float64]]
    items: tuple[str, ...] = ITEMS

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        return np.array([self.rows[request.id] for request in requests])

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        raise NotImplementedError


def _cases(rng: np.random.Generator, probabilities: NDArray[np.float64], *, had: int = 3) -> list[Case]:
    """Cases whose target is drawn by these probabilities, shape (n, items), among items outside the history."""
    cases = []
    for row, each in enumerate(probabilities):
        history = rng.choice(len(ITEMS), size=had, replace=False)
        free = each.copy()
        free[history] = 0
        truth = rng.choice(len(ITEMS), p=free / free.sum())
        events = tuple(Event(item_id=ITEMS[index]) for index in history)
        cases.append(Case(request=Request(id=f"r{row}", user_id=f"u{row}", history=events), truth=ITEMS[truth]))
    return cases


def _softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    result = np.exp(values - values.max(axis=1, keepdims=True))
    return np.asarray(result / result.sum(axis=1, keepdims=True))


def _member(name: str, values: NDArray[np.float64], kind: ScoreScale = "logits") -> CatalogueMember:
    return CatalogueMember(name, _Table(name, {f"r{row}": each for row, each in enumerate(values)}), kind)


def _cells(
    raw: Sequence[NDArray[np.float64]],
    kinds: Sequence[ScoreScale] = ("logits", "logits"),
    *,
    truth: NDArray[np.int64] | None = None,
    had: NDArray[np.bool_] | None = None,
) -> CandidateScores:
    """Cells of full tables of scores, shape (n, items)."""
    many, items = raw[0].shape
    starts = np.arange(many + 1) * items
    seen = np.zeros(many * items, dtype=bool) if had is None else had.ravel()
    scores = np.stack([values.ravel() for values in raw]).astype(np.float32)
    names = tuple(f"m{n}" for n in range(len(raw)))
    return CandidateScores(names, tuple(kinds), starts, scores, seen, None if truth is None else truth + starts[:-1])


def _value(scorer: CatalogueEnsemble, cases: Sequence[Case], seen: str) -> float:
    result = rank_catalogue(scorer, cases, cutoffs=(), seen=(seen,))[seen]  # type: ignore[arg-type]
    return float(ndcg(result.greater, result.tied, 10).mean())


def test_noise_gets_no_weight() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (USERS, len(ITEMS)))
    cases = _cases(rng, _softmax(logits))
    noise = rng.normal(0, 1.5, (USERS, len(ITEMS)))
    fusion = CatalogueEnsemble("both", [_member("truth", logits), _member("noise", noise)], filtered=True)
    fusion.fit(cases)
    weights = fusion.weights
    assert weights is not None
    known = {each.name: each.value for each in fusion.tried}
    assert known["logit"] > known["noise"] + 0.1
    if weights.form == "logit":
        assert weights.low[1] < 0 < weights.high[1] and weights.low[0] < 1 < weights.high[0]
    else:
        assert weights.parts[1] < 0.1 * weights.parts[0]


def test_contribution_of_each_member() -> None:
    rng = np.random.default_rng(4)
    one, other, noise = (rng.normal(0, 1.5, (800, len(ITEMS))) for _ in range(3))
    cases = _cases(rng, _softmax(one + 0.5 * other))
    fusion = CatalogueEnsemble(
        "all", [_member("one", one), _member("other", other), _member("noise", noise)], filtered=True, learns=False
    )
    fusion.fit(cases)
    assert fusion.without == ()
    fusion.fit(cases, ablate=True)
    (first, second, third) = fusion.without
    assert [each.name for each in fusion.without] == ["one", "other", "noise"]
    assert first.loss > second.loss > 0.02 and first.low > 0 and second.low > 0
    assert third.low < 0.005 and abs(third.loss) < 0.01
    # Without its strongest member, the ensemble equals an ensemble of the others.
    rest = CatalogueEnsemble("rest", fusion.parts[1:], filtered=True, learns=False)
    rest.fit(cases)
    values = {each.form: each.value for each in rest.tried}
    complete = {each.form: each.value for each in fusion.tried}
    form = fusion.fitted.form
    assert first.loss == pytest.approx(complete[form] - values[form], abs=1e-4)


def test_chosen_form_is_fitted_alone() -> None:
    rng = np.random.default_rng(5)
    one, other = (rng.normal(0, 1.5, (300, len(ITEMS))) for _ in range(2))
    cases = _cases(rng, _softmax(one + other))
    fusion = CatalogueEnsemble("both", [_member("one", one), _member("other", other)], filtered=True, learns=False)
    fusion.fit(cases)
    best = max(fusion.tried, key=lambda each: each.value)
    chosen = fusion.fitted
    fusion.fit(cases, only=best)
    assert fusion.tried == (best,) and fusion.fitted == chosen
    for each in (EnsembleTrial("pool", "pool", 0.0), EnsembleTrial("alone", "other", 0.0)):
        fusion.fit(cases, only=each)
        assert fusion.fitted.form == each.form and fusion.tried == (each,)
    assert fusion.fitted.parts == (0.0, 1.0)
    # A member without a weight is not called.
    mute = CatalogueMember("one", _Table("one", {}), "logits")
    alone = CatalogueEnsemble("both", [mute, fusion.parts[1]], filtered=True)
    alone.weights = fusion.weights
    assert np.array_equal(alone.scores([cases[0].request]), fusion.scores([cases[0].request]))


def test_rejects_users_that_selected_a_member() -> None:
    data = load_split(DataSection(source="made-reviews"), 0)
    choose, weigh = split_validation_users(data, 0.5)
    config = SASRec.Config(dim=8, layers=1, heads=1, epochs=2, quiet=True)
    for shared in (True, False):
        network = SASRec(config, seed=0)
        network.fit(data if shared else choose)
        tuned = (
            tune("item-knn", data if shared else choose, seed=0, grid={"decay": (0.5, 1.0)}).choices["excluded"].model
        )
        for name, part in (("network", network), ("tuned", tuned)):
            counting = Popularity(seed=0)
            counting.fit(data)
            fusion = CatalogueEnsemble(
                "both",
                [CatalogueMember("popularity", counting, "counts"), CatalogueMember(name, part, "logits")],
                filtered=True,
            )
            if shared:
                with raises(LlmrecError, Facts(kind="leak", says=(name, "reserve other users"))):
                    fusion.fit(ranking_cases(weigh))
            else:
                fusion.fit(ranking_cases(weigh))


@pytest.mark.parametrize("form", ["logit", "pool"])
def test_maximum_likelihood_recovers_the_weights(form: str) -> None:
    rng = np.random.default_rng(1)
    many = 3000
    one, other = rng.normal(0, 1.5, (many, len(ITEMS))), rng.normal(0, 1.5, (many, len(ITEMS)))
    probabilities = (
        _softmax(1.2 * one + 0.6 * other) if form == "logit" else 0.7 * _softmax(one) + 0.3 * _softmax(other)
    )
    # Without a history no item is excluded, so the probabilities are those of the form.
    cases = _cases(rng, probabilities, had=0)
    fusion = CatalogueEnsemble("both", [_member("one", one), _member("other", other)], filtered=True, learns=False)
    fusion.fit(cases)
    column = {item: index for index, item in enumerate(ITEMS)}
    known = _cells([one, other], truth=np.array([column[str(case.truth)] for case in cases]))
    result = (fit_logit if form == "logit" else fit_pool)(known, repeats=False)
    assert result.parts == pytest.approx((1.2, 0.6) if form == "logit" else (0.7, 0.3), abs=0.06)
    if form == "logit":
        result = with_confidence_limits(known, result, [case.request.user_id for case in cases], repeats=False)
        low, high = result.low, result.high
        assert low[0] < 1.2 < high[0] and low[1] < 0.6 < high[1] and high[0] - low[0] < 0.2


def test_weight_of_repeated_items_is_fitted() -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 1.0, (2000, len(ITEMS)))
    cases = _cases(rng, _softmax(logits), had=5)
    # The members rank items of the history first; no target is one.
    had = np.zeros_like(logits, dtype=bool)
    for row, case in enumerate(cases):
        had[row, [ITEMS.index(event.item_id) for event in case.request.history]] = True
    parts = [_member("one", logits + 4 * had), _member("noise", rng.normal(0, 1, logits.shape) + 2 * had)]
    open_, filtered = (
        CatalogueEnsemble("open", parts, filtered=False, learns=False),
        CatalogueEnsemble("filtered", parts, filtered=True, learns=False),
    )
    open_.fit(cases[:1000])
    filtered.fit(cases[:1000])
    assert open_.weights is not None and open_.weights.repeat < -3
    assert filtered.weights is not None and filtered.weights.repeat == 0
    gap = _value(open_, cases[1000:], "included") - _value(filtered, cases[1000:], "excluded")
    assert abs(gap) < 0.01


@given(seed=st.integers(0, 50), noise=st.floats(0.2, 4))
@settings(max_examples=12)
def test_no_ensemble_is_below_its_best_member(seed: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (100, len(ITEMS)))
    cases = _cases(rng, _softmax(logits))
    parts = [
        _member("one", logits + rng.normal(0, noise, logits.shape)),
        _member("two", rng.normal(0, 1, logits.shape)),
    ]
    parts.append(_member("counts", np.floor(_softmax(logits + rng.normal(0, 1, logits.shape)) * 20), "counts"))
    fusion = CatalogueEnsemble("all", parts, filtered=True)
    fusion.fit(cases)
    best = max(form.value for form in fusion.tried)
    assert best >= max(form.value for form in fusion.tried if form.form == "alone")
    assert fusion.fitted.form == next(form for form in fusion.tried if form.value == best).form


def test_missing_items_of_a_search_share_its_last_score() -> None:
    cells = _cells([np.array([[0.5, 0.2, 0.0, 0.0]])], ["beams"])
    assert np.exp(cells.scores(0)) == pytest.approx(np.array([0.5, 0.2, 0.2, 0.2]))
    assert cells.shares(0) == pytest.approx(np.array([0.5, 0.2, 0.2, 0.2]) / 1.1)
    assert _cells([np.zeros((1, 4))], ["counts"]).shares(0) == pytest.approx(np.full(4, 0.25))


def test_scores_do_not_depend_on_the_batch() -> None:
    rng = np.random.default_rng(5)
    one, two = rng.normal(0, 1, (6, 40)), rng.random((6, 40))
    had = rng.random((6, 40)) < 0.1
    for weights in (Weights("logit", (0.7, 0.4), -2.0), Weights("pool", (0.6, 0.4), -2.0)):
        together = weights.scores(_cells([one, two], ["logits", "counts"], had=had)).reshape(6, 40)
        alone = weights.scores(_cells([one[2:3], two[2:3]], ["logits", "counts"], had=had[2:3]))
        assert np.array_equal(together[2], alone)


def test_rejects_too_few_users_and_members() -> None:
    rng = np.random.default_rng(6)
    logits = rng.normal(0, 1, (5, len(ITEMS)))
    fusion = CatalogueEnsemble("both", [_member("one", logits), _member("two", logits)], filtered=True)
    with raises(LlmrecError, Facts("too-few")):
        fusion.fit(_cases(rng, _softmax(logits)))
    with raises(LlmrecError, Facts("mismatch")):
        CatalogueEnsemble("both", [_member("one", logits)], filtered=True)
    with pytest.raises(RuntimeError, match="call fit"):
        fusion.scores([])
