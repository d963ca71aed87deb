"""Ensembles of lists: planted members get the weights that they deserve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmrec.ensembles import base as module
from llmrec.ensembles.base import _BaseEnsemble
from llmrec.ensembles.cells import CandidateScores, ScoreScale
from llmrec.ensembles.rankers import ListEnsemble, ListMember
from llmrec.ensembles.trees import TreeSetting
from llmrec.ensembles.weights import EnsembleTrial, Form, Weights, extend_base, fit_ranker, select_form
from llmrec.errors import LlmrecError
from llmrec.types import Answer, Case, Event, Ranking, Request, Unparsed
from tests.facts import Facts, raises

USERS, SIZE = 400, 12


@dataclass
class _Table:
    """Ranks by a table of scores with a row per request."""

    name: str
    rows: NDArray[np.float64]
    bare: bool = False
    keeps: int = SIZE
    mute: frozenset[str] = frozenset()

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        results: list[Answer] = []
        for request in requests:
            if request.id in self.mute:
                results.append(Unparsed(request_id=request.id, reason="mute"))
                continue
            known = {f"i{n:02d}": score for n, score in enumerate(self.rows[int(request.id)])}
            pool = list(request.candidates or known)
            order = sorted(pool, key=lambda item: -known[item])[: self.keeps]
            scores = () if self.bare else tuple(float(known[item]) for item in order)
            results.append(Ranking(request_id=request.id, items=tuple(order), scores=scores))
        return results


def _cases(rng: np.random.Generator, logits: NDArray[np.float64], *, catalogue: bool = False) -> list[Case]:
    cases = []
    for row, each in enumerate(logits):
        odds = np.exp(each - each.max())
        truth = int(rng.choice(SIZE, p=odds / odds.sum()))
        # Sets of several sizes, in an order without information.
        others = [n for n in rng.permutation(SIZE).tolist() if n != truth]
        pool = [truth, *others[: SIZE - 1 - row % 3]]
        candidates = tuple(f"i{n:02d}" for n in sorted(pool, key=lambda n: (n * 7) % SIZE))
        request = Request(
            id=str(row), user_id=f"u{row}", history=(Event(item_id="x"),), candidates=None if catalogue else candidates
        )
        cases.append(Case(request=request, truth=f"i{truth:02d}"))
    return cases


def _member(name: str, rows: NDArray[np.float64], kind: ScoreScale = "logits", **more: Any) -> ListMember:
    return ListMember(name, _Table(name, rows, **more), kind)


@pytest.fixture
def no_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try linear ensembles only: trees take most of the time of a fit."""
    monkeypatch.setattr(module, "tune_ranker", lambda cells, folds: None)


def _three(rng: np.random.Generator, count: int) -> list[NDArray[np.float64]]:
    return [rng.normal(0, 1.2, (count, SIZE)) for _ in range(3)]


@pytest.mark.usefixtures("no_trees")
def test_member_with_few_cases_is_added_to_a_fitted_ensemble() -> None:
    """The new member counts, and the weights of the others keep their proportions."""
    rng = np.random.default_rng(1)
    one, two, new = _three(rng, 4 * USERS)
    cases = _cases(rng, one + two + new)
    base = ListEnsemble("base", [_member("one", one), _member("two", two)])
    base.fit(cases)
    few, fitted = cases[:80], base.fitted
    for weights in (fitted, Weights("pool", (0.3, 0.7))):
        base.weights, base._fits_without = weights, {frozenset(): weights}
        joined = ListEnsemble("joined", [*base.parts, _member("new", new)])
        joined.fit(few, ablate=True, base_ensembles=[base])
        # Members of the base are not tried alone.
        assert {each.name for each in joined.tried} == {"logit", "pool", "new", "base", "base and new"}
        known, _ = joined.known(few)
        before = _BaseEnsemble(base, joined.names, [case.request.user_id for case in few]).as_is(np.arange(len(few)))
        extended = extend_base(known, before, [2])
        assert extended.form == weights.form and extended.parts[2] > 0.1
        assert extended.parts[0] / extended.parts[1] == pytest.approx(weights.parts[0] / weights.parts[1])
        assert known.ndcg(extended.scores(known)).mean() > known.ndcg(before.scores(known)).mean() + 0.03
    assert fitted.form == "logit"


@pytest.mark.usefixtures("no_trees")
def test_only_new_trees_need_the_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ensemble that is extended may be a ranker too."""
    pytest.importorskip("lightgbm", reason="the ranker extra is not installed")
    rng, setting, passed = np.random.default_rng(1), TreeSetting("lambdarank", 5), []
    one, two, new = _three(rng, USERS)
    cases = _cases(rng, one + two + new)
    base = ListEnsemble("base", [_member("one", one), _member("two", two)])
    base.fit(cases)
    base.weights = fit_ranker(base.known(cases)[0], setting=setting)

    def recorded(values: Any, trees: Any, users: Sequence[str]) -> Any:
        passed.append(trees)
        return select_form(values, trees, users)

    monkeypatch.setattr(module, "tune_ranker", lambda cells, folds: (setting, np.zeros(len(cells.starts) - 1)))
    monkeypatch.setattr(module, "select_form", recorded)
    joined = ListEnsemble("joined", [*base.parts, _member("new", new)])
    joined.fit(cases, base_ensembles=[base])
    assert ("ranker", "base") in {(each.form, each.name) for each in joined.tried}
    assert passed == [("ranker", setting.name)]


@pytest.mark.usefixtures("no_trees")
def test_base_is_evaluated_on_other_users() -> None:
    """The result of a base that is extended is that of users to whom its weights were not fitted."""
    rng = np.random.default_rng(5)
    parts = [rng.normal(0, 1.2, (USERS, SIZE)) for _ in range(8)]
    cases = _cases(rng, np.zeros((USERS, SIZE)))
    members = [_member(str(n), each) for n, each in enumerate(parts)]
    base = ListEnsemble("base", members[:6])
    base.fit(cases)
    alone = {each.name: each.value for each in base.tried}
    users = [case.request.user_id for case in cases]
    known, _ = base.known(cases)
    base._fits_without.clear()
    base._choose(known, users, repeats=False, ablate=False, only=EnsembleTrial("logit", "logit", 0.0))
    joined = ListEnsemble("joined", members)
    joined.fit(cases, base_ensembles=[base])
    results = {each.name: each.value for each in joined.tried}
    assert results["base"] == pytest.approx(alone["logit"], abs=1e-3)
    assert known.ndcg(base.fitted.scores(known)).mean() > alone["logit"] + 0.005


@pytest.mark.usefixtures("no_trees")
def test_added_noise_changes_little() -> None:
    rng = np.random.default_rng(2)
    one, two, noise = _three(rng, 4 * USERS)
    cases = _cases(rng, one + two)
    base = ListEnsemble("base", [_member("one", one), _member("two", two)])
    base.fit(cases)
    joined = ListEnsemble("joined", [*base.parts, _member("noise", noise)])
    joined.fit(cases[:60], ablate=True, base_ensembles=[base])
    figures = {each.name: each.value for each in joined.tried}
    assert figures["base"] > figures["noise"] + 0.2
    assert abs(joined.fitted.parts[2]) < 0.15
    requests = [case.request for case in cases[60:460]]
    same = [
        getattr(one, "items", ())[:3] == getattr(two, "items", ())[:3]
        for one, two in zip(joined.answer(requests), base.answer(requests), strict=True)
    ]
    assert np.mean(same) > 0.8


@pytest.mark.usefixtures("no_trees")
def test_contribution_of_an_added_member() -> None:
    rng = np.random.default_rng(3)
    one, two, new, *others = (rng.normal(0, 1.2, (4 * USERS, SIZE)) for _ in range(9))
    cases = _cases(rng, one + two + new + sum(others, np.zeros_like(one)) / 3)
    known = [_member("one", one), _member("two", two), *(_member(str(n), each) for n, each in enumerate(others))]
    base = ListEnsemble("base", known)
    base.fit(cases)
    joined = ListEnsemble("joined", [*known, _member("new", new)])
    joined.fit(cases[:60], ablate=True, base_ensembles=[base])
    assert max(joined.tried, key=lambda each: each.value).name == "base and new"
    (without,) = joined.without
    assert without.name == "new" and without.low > 0


@pytest.mark.usefixtures("no_trees")
def test_two_members_are_better_than_one_also_by_rank_alone() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.normal(0, 1.5, (USERS, SIZE)), rng.normal(0, 1.5, (USERS, SIZE))
    cases = _cases(rng, one + other)
    for bare in (False, True):
        fusion = ListEnsemble("both", [_member("one", one, bare=bare), _member("other", other, bare=bare)])
        fusion.fit(cases)
        known = {each.name: each.value for each in fusion.tried}
        assert max(known["logit"], known["pool"]) > max(known["one"], known["other"]) + 0.03
        assert fusion.fitted.form != "alone"


def test_batch_and_order_of_candidates_do_not_matter() -> None:
    rng = np.random.default_rng(2)
    one, other = rng.normal(0, 1.5, (USERS, SIZE)), rng.gamma(1.0, 1.0, (USERS, SIZE))
    cases = _cases(rng, one)
    fusion = ListEnsemble("both", [_member("one", one), _member("other", other, "counts")])
    for weights in (Weights("logit", (0.9, 0.4), -0.3), Weights("pool", (0.7, 0.3), 0.0)):
        fusion.weights = weights
        requests = [case.request for case in cases[:60]]
        together = fusion.answer(requests)
        assert [fusion.answer([request])[0] for request in requests] == together
        turned = [replace(each, candidates=tuple(reversed(each.candidates or ()))) for each in requests]
        assert fusion.answer(turned) == together


def test_members_are_normalised_over_the_candidates() -> None:
    counts, logits = np.array([[8.0, 0.0, 2.0, 0.0, *[5.0] * 8]]), np.linspace(0, 1, SIZE)[None]
    parts = [_member("counts", counts, "counts"), _member("logits", logits)]
    fusion = ListEnsemble("both", parts, Weights("pool", (0.5, 0.5)))
    (answer,) = fusion.answer([Request(id="0", user_id="u", history=(), candidates=("i02", "i00", "i03"))])
    assert isinstance(answer, Ranking) and answer.items == ("i00", "i02", "i03")
    shares = np.exp(logits[0, [0, 2, 3]]) / np.exp(logits[0, [0, 2, 3]]).sum()
    assert np.exp(answer.scores) == pytest.approx(0.5 * np.array([0.8, 0.2, 0.0]) + 0.5 * shares)


@pytest.mark.usefixtures("no_trees")
def test_union_of_lists_is_ranked_without_candidates() -> None:
    rng = np.random.default_rng(3)
    one, other = rng.normal(0, 2, (USERS, SIZE)), rng.normal(0, 2, (USERS, SIZE))
    cases = _cases(rng, one + other, catalogue=True)
    parts = [_member(name, rows, keeps=5) for name, rows in (("one", one), ("other", other))]
    fusion = ListEnsemble("both", parts)
    fusion.fit(cases)
    (answer,) = fusion.answer([cases[0].request])
    assert isinstance(answer, Ranking)
    lists = [each.predictor.answer([cases[0].request])[0] for each in parts]
    named = {item for each in lists if isinstance(each, Ranking) for item in each.items}
    assert set(answer.items) == named and 5 <= len(named) <= 10


@pytest.mark.parametrize(("kind", "left_out"), [("counts", 1.0), ("logits", 2.0), ("beams", 0.0)])
def test_missing_items_rank_below_the_last_item(kind: ScoreScale, left_out: float) -> None:
    first, second = np.array([[8.0, 4.0, 2.0] + [0.5] * 9]), np.array([[0.5] * 9 + [8.0, 4.0, 2.0]])
    request = Request(id="0", user_id="u", history=(), candidates=None)
    weights = Weights("pool", (0.7, 0.3), 0.0)
    parts = [
        _member("first", first, kind, keeps=3),
        _member("second", second, kind, keeps=3),
    ]
    (answer,) = ListEnsemble("joined", parts, weights).answer([request])
    # As if each list contained the items of the other with that score.
    lists = [
        np.array([[*([8.0, 4.0, 2.0] + [left_out] * 3)[turn:], *([8.0, 4.0, 2.0] + [left_out] * 3)[:turn]]])
        for turn in (0, 3)
    ]
    scores = np.concatenate(lists).astype(np.float32)
    cells = CandidateScores(("first", "second"), (kind, kind), np.array([0, 6]), scores, np.zeros(6, dtype=bool))
    expected = weights.scores(cells)
    assert isinstance(answer, Ranking)
    ranked = dict(zip(answer.items, answer.scores, strict=True))
    assert [ranked[item] for item in ("i00", "i01", "i02", "i09", "i10", "i11")] == pytest.approx(expected.tolist())


def test_member_without_an_answer() -> None:
    rng = np.random.default_rng(4)
    one, other = rng.normal(0, 2, (USERS, SIZE)), rng.normal(0, 2, (USERS, SIZE))
    cases = _cases(rng, one)
    mute = _member("other", other, mute=frozenset({"0", "1"}))
    fusion = ListEnsemble("both", [_member("one", one), mute], Weights("logit", (1.0, 1.0)))
    (answer,) = fusion.answer([cases[0].request])
    (alone,) = fusion.parts[0].predictor.answer([cases[0].request])
    assert isinstance(answer, Ranking) and isinstance(alone, Ranking) and answer.items == alone.items
    silent = ListEnsemble("none", [mute, mute], Weights("logit", (1.0, 1.0)))
    (left,) = silent.answer([replace(cases[1].request, candidates=None)])
    assert isinstance(left, Unparsed)


@pytest.mark.parametrize(("form", "weights"), [("logit", (2.0, -1.5)), ("pool", (0.6, 0.4))])
def test_unknown_items_come_last(form: Form, weights: tuple[float, float]) -> None:
    rng = np.random.default_rng(5)
    rows = [rng.normal(0, 2, (1, SIZE)) for _ in range(2)]
    # Recommenders score unknown items below all others.
    for each in rows:
        each[0, :2] = each.min() - 5
    known = frozenset(f"i{n:02d}" for n in range(2, SIZE))
    request = Request(id="0", user_id="u", history=(), candidates=tuple(f"i{n:02d}" for n in range(SIZE)))
    parts = [ListMember(name, _Table(name, each), "logits", known) for name, each in zip("ab", rows, strict=True)]
    (answer,) = ListEnsemble("both", parts, Weights(form, weights)).answer([request])
    assert isinstance(answer, Ranking) and set(answer.items[-2:]) == {"i00", "i01"}
    # The order of the others does not change.
    (less,) = ListEnsemble("both", parts, Weights(form, weights)).answer([replace(request, candidates=tuple(known))])
    assert isinstance(less, Ranking) and less.items == answer.items[:-2]


def test_member_that_reads_titles_ranks_unknown_items() -> None:
    one, other = np.zeros((1, SIZE)), np.linspace(0, 1, SIZE)[None]
    parts = [ListMember("events", _Table("events", one), "logits", frozenset({"i00"})), _member("titles", other)]
    (answer,) = ListEnsemble("both", parts, Weights("logit", (-1.0, 1.0))).answer(
        [Request(id="0", user_id="u", history=(), candidates=("i00", "i05", "i11"))]
    )
    assert isinstance(answer, Ranking) and answer.items == ("i11", "i05", "i00")


def test_cases_without_their_target_are_ignored() -> None:
    rows = np.random.default_rng(5).normal(0, 1, (USERS, SIZE))
    missed = [replace(case, truth="i99") for case in _cases(np.random.default_rng(5), rows)[:20]]
    fusion = ListEnsemble("both", [_member("one", rows), _member("other", rows)])
    cells, able = fusion.known(missed)
    assert able == [] and len(cells.hits) == len(cells.in_history) == 0
    with raises(LlmrecError, Facts(kind="too-few")):
        fusion.fit(missed)


def test_rejects_too_few_users_or_members() -> None:
    rng = np.random.default_rng(5)
    rows = rng.normal(0, 1, (USERS, SIZE))
    with raises(LlmrecError, Facts(kind="mismatch")):
        ListEnsemble("one", [_member("one", rows)])
    with raises(LlmrecError, Facts(kind="mismatch")):
        ListEnsemble("two", [_member("one", rows), _member("other", rows)], Weights("logit", (1.0,)))
    fusion = ListEnsemble("few", [_member("one", rows), _member("other", rows)])
    with raises(LlmrecError, Facts(kind="too-few")):
        fusion.fit(_cases(rng, rows)[:9])
