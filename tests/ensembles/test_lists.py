"""Fusion of lists: planted parts get the weights they deserve, whatever else is asked beside a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from llmrec.ensembles import base as module
from llmrec.ensembles.base import _Base
from llmrec.ensembles.cells import Cells, Kind
from llmrec.ensembles.rankers import ListEnsemble, ListMember
from llmrec.ensembles.trees import Setting
from llmrec.ensembles.weights import Form, Tried, Weights, onto, preferred, ranker
from llmrec.errors import LlmrecError
from llmrec.types import Answer, Case, Event, Ranking, Request, Unparsed
from tests.facts import Facts, raises

USERS, SIZE = 400, 12


@dataclass
class _Says:
    """Ranks by scores that stand in a table, a row a request; what is left out of a list is its worst."""

    name: str
    rows: NDArray[np.float64]
    bare: bool = False
    keeps: int = SIZE
    mute: frozenset[str] = frozenset()

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        found: list[Answer] = []
        for request in requests:
            if request.id in self.mute:
                found.append(Unparsed(request_id=request.id, reason="mute"))
                continue
            known = {f"i{place:02d}": score for place, score in enumerate(self.rows[int(request.id)])}
            pool = list(request.candidates or known)
            order = sorted(pool, key=lambda item: -known[item])[: self.keeps]
            scores = () if self.bare else tuple(float(known[item]) for item in order)
            found.append(Ranking(request_id=request.id, items=tuple(order), scores=scores))
        return found


def _cases(rng: np.random.Generator, logits: NDArray[np.float64], *, whole: bool = False) -> list[Case]:
    cases = []
    for row, each in enumerate(logits):
        chances = np.exp(each - each.max())
        truth = int(rng.choice(SIZE, p=chances / chances.sum()))
        # Sets of several sizes, in an order that says nothing.
        others = [place for place in rng.permutation(SIZE).tolist() if place != truth]
        pool = [truth, *others[: SIZE - 1 - row % 3]]
        candidates = tuple(f"i{place:02d}" for place in sorted(pool, key=lambda place: (place * 7) % SIZE))
        request = Request(
            id=str(row), user_id=f"u{row}", history=(Event(item_id="x"),), candidates=None if whole else candidates
        )
        cases.append(Case(request=request, truth=f"i{truth:02d}"))
    return cases


def _voice(name: str, rows: NDArray[np.float64], kind: Kind = "logits", **more: bool) -> ListMember:
    return ListMember(name, _Says(name, rows, **more), kind)


def test_a_part_that_knows_nothing_gets_no_weight_and_the_truth_gets_all_of_it() -> None:
    rng = np.random.default_rng(0)
    truth, noise = rng.normal(0, 2, (USERS, SIZE)), rng.normal(0, 2, (USERS, SIZE))
    cases = _cases(rng, truth)
    fusion = ListEnsemble("both", [_voice("truth", truth), _voice("noise", noise)])
    fusion.fit(cases, dissect=True)
    weights = fusion.fitted
    assert weights.form in ("logit", "pool", "alone")
    assert weights.parts[0] > 0.8 and abs(weights.parts[1]) < 0.15
    known = {each.name: each.value for each in fusion.tried}
    assert known["truth"] > known["noise"] + 0.2
    if fusion.without:
        assert fusion.without[0].loss > 0.2 and abs(fusion.without[1].loss) < 0.02


def _halves(rng: np.random.Generator, count: int) -> list[NDArray[np.float64]]:
    return [rng.normal(0, 1.2, (count, SIZE)) for _ in range(3)]


@pytest.mark.parametrize("form", ["logit", "pool"])
def test_a_part_that_few_cases_weigh_is_put_onto_a_fusion_that_many_have_weighed(form: Form) -> None:
    """What is new counts; the weights of the others keep their proportions, and rank as the joined scores do."""
    rng = np.random.default_rng(1)
    one, two, new = _halves(rng, 4 * USERS)
    cases = _cases(rng, one + two + new)
    base = ListEnsemble("base", [_voice("one", one), _voice("two", two)])
    base.fit(cases)
    base.weights = base.fitted if form == "logit" else Weights("pool", (0.3, 0.7))
    base._fits_without = {frozenset(): base.weights}
    joined = ListEnsemble("joined", [_voice("one", one), _voice("two", two), _voice("new", new)])
    few = cases[:80]
    joined.fit(few, dissect=True, onto=[base])
    # That the base is better than its parts alone has been said by more cases.
    assert {each.name for each in joined.tried} == {"logit", "pool", "new", "base", "base and new"}
    known, _ = joined.known(few)
    whole = _Base(base, joined.names, [case.request.user_id for case in few])
    before = whole.as_is(np.arange(len(few)))
    weights = onto(known, before, [2])
    assert weights.form == form and weights.parts[2] > 0.1
    assert weights.parts[0] / weights.parts[1] == pytest.approx(base.fitted.parts[0] / base.fitted.parts[1])
    assert known.ndcg(weights.scores(known)).mean() > known.ndcg(before.scores(known)).mean() + 0.03


def test_new_trees_need_the_margin_also_where_a_smaller_ensemble_is_a_ranker(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, setting, passed = np.random.default_rng(1), Setting("lambdarank", 5), []
    one, two, new = _halves(rng, USERS)
    cases = _cases(rng, one + two + new)
    base = ListEnsemble("base", [_voice("one", one), _voice("two", two)])
    base.fit(cases)
    base.weights = ranker(base.known(cases)[0], setting=setting)
    monkeypatch.setattr(module, "learned", lambda cells, folds: (setting, np.zeros(len(cells.starts) - 1)))
    monkeypatch.setattr(
        module, "preferred", lambda values, trees, users: (passed.append(trees), preferred(values, trees, users))[1]
    )
    joined = ListEnsemble("joined", [_voice("one", one), _voice("two", two), _voice("new", new)])
    joined.fit(cases, onto=[base])
    assert ("ranker", "base") in {(each.form, each.name) for each in joined.tried}
    assert passed == [("ranker", setting.name)]


def test_who_judges_a_fusion_has_no_say_in_it() -> None:
    """The figure of a fusion that parts are put onto is that of users whom its weights do not know."""
    rng = np.random.default_rng(5)
    parts = [rng.normal(0, 1.2, (USERS, SIZE)) for _ in range(8)]
    cases = _cases(rng, np.zeros((USERS, SIZE)))
    voices = [_voice(str(n), each) for n, each in enumerate(parts)]
    base = ListEnsemble("base", voices[:6])
    base.fit(cases)
    own = {each.name: each.value for each in base.tried}
    users = [case.request.user_id for case in cases]
    known, _ = base.known(cases)
    base._fits_without.clear()
    base._choose(known, users, repeats=False, dissect=False, only=Tried("logit", "logit", 0.0))
    joined = ListEnsemble("joined", voices)
    joined.fit(cases, dissect=True, onto=[base])
    found = {each.name: each.value for each in joined.tried}
    assert found["base"] == pytest.approx(own["logit"], abs=1e-3)
    assert known.ndcg(base.fitted.scores(known)).mean() > own["logit"] + 0.005


def test_a_part_that_knows_nothing_leaves_the_fusion_as_it_is() -> None:
    rng = np.random.default_rng(2)
    one, two, noise = _halves(rng, 4 * USERS)
    cases = _cases(rng, one + two)
    base = ListEnsemble("base", [_voice("one", one), _voice("two", two)])
    base.fit(cases)
    joined = ListEnsemble("joined", [_voice("one", one), _voice("two", two), _voice("noise", noise)])
    joined.fit(cases[:60], dissect=True, onto=[base])
    figures = {each.name: each.value for each in joined.tried}
    assert figures["base"] > figures["noise"] + 0.2
    assert abs(joined.fitted.parts[2]) < 0.15
    requests = [case.request for case in cases[60:]]
    same = [
        getattr(one, "items", ())[:3] == getattr(two, "items", ())[:3]
        for one, two in zip(joined.answer(requests), base.answer(requests), strict=True)
    ]
    assert np.mean(same) > 0.8


def test_what_a_part_put_onto_a_fusion_is_worth_is_said_of_it_alone() -> None:
    rng = np.random.default_rng(3)
    one, two, new, *others = (rng.normal(0, 1.2, (4 * USERS, SIZE)) for _ in range(9))
    cases = _cases(rng, one + two + new + sum(others, np.zeros_like(one)) / 3)
    known = [_voice("one", one), _voice("two", two), *(_voice(str(n), each) for n, each in enumerate(others))]
    base = ListEnsemble("base", known)
    base.fit(cases)
    joined = ListEnsemble("joined", [*known, _voice("new", new)])
    joined.fit(cases[:60], dissect=True, onto=[base])
    assert max(joined.tried, key=lambda each: each.value).name == "base and new"
    (without,) = joined.without
    assert without.name == "new" and without.low > 0


def test_two_halves_of_the_truth_are_better_than_either_also_by_their_places_alone() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.normal(0, 1.5, (USERS, SIZE)), rng.normal(0, 1.5, (USERS, SIZE))
    cases = _cases(rng, one + other)
    for bare in (False, True):
        fusion = ListEnsemble("both", [_voice("one", one, bare=bare), _voice("other", other, bare=bare)])
        fusion.fit(cases)
        known = {each.name: each.value for each in fusion.tried}
        assert max(known["logit"], known["pool"]) > max(known["one"], known["other"]) + 0.03
        assert fusion.fitted.form != "alone"


def test_neither_other_requests_nor_the_order_of_candidates_change_a_digit() -> None:
    rng = np.random.default_rng(2)
    one, other = rng.normal(0, 1.5, (USERS, SIZE)), rng.gamma(1.0, 1.0, (USERS, SIZE))
    cases = _cases(rng, one)
    fusion = ListEnsemble("both", [_voice("one", one), _voice("other", other, "counts")])
    for weights in (Weights("logit", (0.9, 0.4), -0.3), Weights("pool", (0.7, 0.3), 0.0)):
        fusion.weights = weights
        requests = [case.request for case in cases[:60]]
        together = fusion.answer(requests)
        assert [fusion.answer([request])[0] for request in requests] == together
        turned = [replace(each, candidates=tuple(reversed(each.candidates or ()))) for each in requests]
        assert fusion.answer(turned) == together


def test_parts_are_normalised_over_the_candidates() -> None:
    counts, logits = np.array([[8.0, 0.0, 2.0, 0.0, *[5.0] * 8]]), np.linspace(0, 1, SIZE)[None]
    parts = [_voice("counts", counts, "counts"), _voice("logits", logits)]
    fusion = ListEnsemble("both", parts, Weights("pool", (0.5, 0.5)))
    (answer,) = fusion.answer([Request(id="0", user_id="u", history=(), candidates=("i02", "i00", "i03"))])
    assert isinstance(answer, Ranking) and answer.items == ("i00", "i02", "i03")
    chances = np.exp(logits[0, [0, 2, 3]]) / np.exp(logits[0, [0, 2, 3]]).sum()
    assert np.exp(answer.scores) == pytest.approx(0.5 * np.array([0.8, 0.2, 0.0]) + 0.5 * chances)


def test_without_candidates_all_that_a_part_names_is_ranked() -> None:
    rng = np.random.default_rng(3)
    one, other = rng.normal(0, 2, (USERS, SIZE)), rng.normal(0, 2, (USERS, SIZE))
    cases = _cases(rng, one + other, whole=True)
    parts = [ListMember(name, _Says(name, rows, keeps=5), "logits") for name, rows in (("one", one), ("other", other))]
    fusion = ListEnsemble("both", parts)
    fusion.fit(cases)
    (answer,) = fusion.answer([cases[0].request])
    assert isinstance(answer, Ranking)
    lists = [each.predictor.answer([cases[0].request])[0] for each in parts]
    named = {item for each in lists if isinstance(each, Ranking) for item in each.items}
    assert set(answer.items) == named and 5 <= len(named) <= 10


@pytest.mark.parametrize(("kind", "left_out"), [("counts", 1.0), ("logits", 2.0), ("beams", 0.0)])
def test_what_a_list_leaves_out_stands_behind_its_last_item(kind: Kind, left_out: float) -> None:
    first, second = np.array([[8.0, 4.0, 2.0] + [0.5] * 9]), np.array([[0.5] * 9 + [8.0, 4.0, 2.0]])
    whole = Request(id="0", user_id="u", history=(), candidates=None)
    weights = Weights("pool", (0.7, 0.3), 0.0)
    parts = [
        ListMember("first", _Says("first", first, keeps=3), kind),
        ListMember("second", _Says("second", second, keeps=3), kind),
    ]
    (found,) = ListEnsemble("joined", parts, weights).answer([whole])
    # As if each had named the three items of the other with that score.
    told = [
        np.array([[*([8.0, 4.0, 2.0] + [left_out] * 3)[turn:], *([8.0, 4.0, 2.0] + [left_out] * 3)[:turn]]])
        for turn in (0, 3)
    ]
    scores = np.concatenate(told).astype(np.float32)
    cells = Cells(("first", "second"), (kind, kind), np.array([0, 6]), scores, np.zeros(6, dtype=bool))
    expected = weights.scores(cells)
    assert isinstance(found, Ranking)
    ranked = dict(zip(found.items, found.scores, strict=True))
    assert [ranked[item] for item in ("i00", "i01", "i02", "i09", "i10", "i11")] == pytest.approx(expected.tolist())


def test_a_mute_part_says_the_same_of_all_and_a_request_without_any_list_is_not_answered() -> None:
    rng = np.random.default_rng(4)
    one, other = rng.normal(0, 2, (USERS, SIZE)), rng.normal(0, 2, (USERS, SIZE))
    cases = _cases(rng, one)
    mute = ListMember("other", _Says("other", other, mute=frozenset({"0", "1"})), "logits")
    fusion = ListEnsemble("both", [_voice("one", one), mute], Weights("logit", (1.0, 1.0)))
    (answer,) = fusion.answer([cases[0].request])
    (alone,) = fusion.parts[0].predictor.answer([cases[0].request])
    assert isinstance(answer, Ranking) and isinstance(alone, Ranking) and answer.items == alone.items
    silent = ListEnsemble("none", [mute, mute], Weights("logit", (1.0, 1.0)))
    (left,) = silent.answer([replace(cases[1].request, candidates=None)])
    assert isinstance(left, Unparsed)


@pytest.mark.parametrize(("form", "weights"), [("logit", (2.0, -1.5)), ("logit", (-1.0, -1.0)), ("pool", (0.6, 0.4))])
def test_what_no_part_knows_comes_last_whatever_the_signs_of_the_weights(
    form: Form, weights: tuple[float, float]
) -> None:
    rng = np.random.default_rng(5)
    rows = [rng.normal(0, 2, (1, SIZE)) for _ in range(2)]
    # A recommender gives an item that it does not know less than all others.
    for each in rows:
        each[0, :2] = each.min() - 5
    known = frozenset(f"i{place:02d}" for place in range(2, SIZE))
    asked = Request(id="0", user_id="u", history=(), candidates=tuple(f"i{place:02d}" for place in range(SIZE)))
    parts = [ListMember(name, _Says(name, each), "logits", known) for name, each in zip("ab", rows, strict=True)]
    (answer,) = ListEnsemble("both", parts, Weights(form, weights)).answer([asked])
    assert isinstance(answer, Ranking) and set(answer.items[-2:]) == {"i00", "i01"}
    # The others stand as they do without these.
    (less,) = ListEnsemble("both", parts, Weights(form, weights)).answer([replace(asked, candidates=tuple(known))])
    assert isinstance(less, Ranking) and less.items == answer.items[:-2]


def test_a_part_that_reads_titles_places_what_the_others_do_not_know() -> None:
    one, other = np.zeros((1, SIZE)), np.linspace(0, 1, SIZE)[None]
    parts = [ListMember("events", _Says("events", one), "logits", frozenset({"i00"})), _voice("titles", other)]
    (answer,) = ListEnsemble("both", parts, Weights("logit", (-1.0, 1.0))).answer(
        [Request(id="0", user_id="u", history=(), candidates=("i00", "i05", "i11"))]
    )
    assert isinstance(answer, Ranking) and answer.items == ("i11", "i05", "i00")


def test_cases_whose_target_is_no_candidate_say_nothing() -> None:
    rows = np.random.default_rng(5).normal(0, 1, (USERS, SIZE))
    missed = [replace(case, truth="i99") for case in _cases(np.random.default_rng(5), rows)[:20]]
    fusion = ListEnsemble("both", [_voice("one", rows), _voice("other", rows)])
    cells, able = fusion.known(missed)
    assert able == [] and len(cells.hits) == len(cells.had) == 0
    with raises(LlmrecError, Facts(kind="too-few")):
        fusion.fit(missed)


def test_too_few_users_or_parts_are_refused() -> None:
    rng = np.random.default_rng(5)
    rows = rng.normal(0, 1, (USERS, SIZE))
    with raises(LlmrecError, Facts(kind="mismatch")):
        ListEnsemble("one", [_voice("one", rows)])
    with raises(LlmrecError, Facts(kind="mismatch")):
        ListEnsemble("two", [_voice("one", rows), _voice("other", rows)], Weights("logit", (1.0,)))
    fusion = ListEnsemble("few", [_voice("one", rows), _voice("other", rows)])
    with raises(LlmrecError, Facts(kind="too-few")):
        fusion.fit(_cases(rng, rows)[:9])
