"""The suite that every baseline must pass: it answers as any predictor does, and learns from training data alone."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest

from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset, request_id, split
from llmrec.errors import DataError
from llmrec.recipe import Split
from llmrec.registry import BASELINES, lookup
from llmrec.types import Answer, Event, Item, Predictor, Ranking, Rating, Request, Text, Trainable, Unparsed

RANKING = ("random", "popularity", "item-knn", "markov-1", "markov")
RATING = ("global-mean", "user-mean", "item-mean", "user-item-bias")
TEXT = ("frequent-text", "nearest-text")
KINDS = ("leave_one_out", "global_time", "user_disjoint")
WORDS = ("fine", "dull", "long", "warm", "odd", "quick")


def _dataset(order_seed: int | None = None) -> Dataset:
    """40 users, 30 items of falling popularity, ties in time, ratings, texts on two rows of three."""
    rng = np.random.default_rng(7)
    rows = []
    for user in range(40):
        size = int(rng.integers(4, 13))
        chosen = rng.choice(30, size=size, replace=False, p=np.arange(30, 0, -1) / 465)
        for item in chosen:
            words = " ".join(rng.choice(WORDS, 2))
            text = f"A {words} thing" if rng.random() < 2 / 3 else None
            when = float(user // 4 * 3 + rng.integers(0, 6))
            rows.append((f"u{user}", f"i{item}", float(rng.integers(1, 6)), when, text))
    if order_seed is not None:
        rows = [rows[place] for place in np.random.default_rng(order_seed).permutation(len(rows))]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "rating", "timestamp", "text"], orient="row")
    items = {f"i{n}": Item(item_id=f"i{n}", title=f"Title {WORDS[n % 6]} {n}") for n in range(30)}
    return Dataset(name="toy", noun="things", interactions=frame, items=items, rating_scale=(1.0, 5.0))


def _split(kind: str, order_seed: int | None = None) -> SplitDataset:
    return split(_dataset(order_seed), Split(kind=kind, valid=0.2, test=0.2), seed=3)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=KINDS)
def data(request: pytest.FixtureRequest) -> SplitDataset:
    return _split(request.param)


def _fitted(name: str, data: SplitDataset) -> Any:
    predictor = lookup(BASELINES, name, "baseline")(seed=5)
    predictor.fit(data)
    return predictor


def _requests(name: str, data: SplitDataset) -> list[Request]:
    """One request per held-out test interaction, as the tasks make them."""
    requests = []
    for place, held in enumerate(data.holdouts("test")):
        base = Request(
            id=request_id(held.user_id, held.item_id),
            user_id=held.user_id,
            history=data.history(held.user_id, "test"),
        )
        if name in RANKING:
            others = [f"i{(place * 7 + step) % 30}" for step in range(1, 12)]
            candidates = dict.fromkeys([*others[:5], held.item_id, *others[5:]])
            requests.append(replace(base, candidates=tuple(candidates) if place % 3 else None))
        else:
            requests.append(replace(base, item=held.item_id))
    assert len(requests) >= 7
    return requests


def _one(predictor: Any, request: Request) -> Answer:
    answers = predictor.answer([request])
    assert len(answers) == 1
    answer: Answer = answers[0]
    return answer


def _for(name: str, **fields: Any) -> Request:
    """A plain request of the kind that a baseline answers."""
    asked: dict[str, Any] = {"candidates": ("i3", "i1", "i2")} if name in RANKING else {"item": "i1"}
    return Request(**({"id": "r", "user_id": "u1"} | asked | fields))


def _check(name: str, answer: Answer, request: Request) -> None:
    assert answer.request_id == request.id
    if name in RANKING:
        assert isinstance(answer, Ranking)
        assert len(answer.items) == len(answer.scores) == len(set(answer.items))
        assert all(math.isfinite(score) for score in answer.scores)
        assert list(answer.scores) == sorted(answer.scores, reverse=True)
        if request.candidates is not None:
            assert sorted(answer.items) == sorted(request.candidates)
    elif name in RATING:
        assert isinstance(answer, Rating)
        assert 1.0 <= answer.value <= 5.0
    else:
        assert isinstance(answer, Text)
        assert answer.text.strip() == answer.text != ""


# ------------------------------------------------------------------ shape


def test_the_suite_covers_every_baseline() -> None:
    assert {*RANKING, *RATING, *TEXT} == set(BASELINES)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_a_trainable_predictor_under_its_own_name(name: str) -> None:
    predictor = lookup(BASELINES, name, "baseline")()
    assert isinstance(predictor, Predictor) and isinstance(predictor, Trainable)
    assert predictor.name == name


@pytest.mark.parametrize("name", BASELINES)
def test_every_request_is_answered_in_order(name: str, data: SplitDataset) -> None:
    requests = _requests(name, data)
    answers = _fitted(name, data).answer(requests)
    assert len(answers) == len(requests)
    for answer, request in zip(answers, requests, strict=True):
        _check(name, answer, request)


@pytest.mark.parametrize("name", BASELINES)
def test_no_requests_give_no_answers(name: str, data: SplitDataset) -> None:
    assert _fitted(name, data).answer([]) == []


@pytest.mark.parametrize("name", BASELINES)
def test_asking_before_fitting_is_an_error(name: str) -> None:
    with pytest.raises(RuntimeError, match=rf"{name}.*fit"):
        lookup(BASELINES, name, "baseline")().answer([_for(name)])


# ------------------------------------------------------------------ what may not matter


@pytest.mark.parametrize("name", BASELINES)
def test_answers_do_not_depend_on_the_order_or_number_of_requests(name: str, data: SplitDataset) -> None:
    requests, predictor = _requests(name, data), _fitted(name, data)
    answers = predictor.answer(requests)
    assert predictor.answer(requests[::-1]) == answers[::-1]
    assert [_one(predictor, request) for request in requests] == answers
    assert _fitted(name, data).answer(requests) == answers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BASELINES)
def test_answers_do_not_depend_on_the_order_of_rows(name: str, kind: str) -> None:
    first, second = _split(kind), _split(kind, order_seed=1)
    assert first.train.equals(second.train)
    requests = _requests(name, first)
    assert _requests(name, second) == requests
    assert _fitted(name, second).answer(requests) == _fitted(name, first).answer(requests)


@pytest.mark.parametrize("name", RANKING)
def test_the_order_of_candidates_does_not_matter(name: str, data: SplitDataset) -> None:
    predictor = _fitted(name, data)
    request = _for(name, candidates=tuple(f"i{n}" for n in range(30)), history=(Event(item_id="i4"),))
    turned = replace(request, candidates=request.candidates[::-1] if request.candidates else None)
    assert _one(predictor, turned) == _one(predictor, request)


# ------------------------------------------------------------------ held-out pairs stay unseen


def _permuted(data: SplitDataset) -> SplitDataset:
    """Hand the held-out items, ratings and texts to other users, in the frames and in the dataset itself."""

    def turn(frame: pl.DataFrame) -> pl.DataFrame:
        columns = ["item_id", "rating", "text"]
        turned = frame.select(pl.col(columns).gather((pl.int_range(pl.len()) + 1) % pl.len()))
        return frame.select("user_id", "timestamp").hstack(turned).select(frame.columns)

    valid, test = turn(data.valid), turn(data.test)
    return replace(
        data,
        dataset=replace(data.dataset, interactions=pl.concat([data.train, data.known, valid, test])),
        valid=valid,
        test=test,
        held_out=frozenset(pl.concat([valid, test]).select("user_id", "item_id").iter_rows()),
    )


@pytest.mark.parametrize("name", BASELINES)
def test_permuting_the_held_out_interactions_changes_no_answer(name: str, data: SplitDataset) -> None:
    requests, other = _requests(name, data), _permuted(data)
    assert not other.test.equals(data.test) and other.train.equals(data.train)
    assert _fitted(name, other).answer(requests) == _fitted(name, data).answer(requests)


class _Sealed:
    """Passes on some attributes of an object, and fails the test on any other."""

    def __init__(self, **allowed: object) -> None:
        self.__dict__.update(allowed)

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"fit() looked at {name!r}")


@pytest.mark.parametrize("name", BASELINES)
def test_fit_looks_at_training_rows_and_the_catalogue_only(name: str, data: SplitDataset) -> None:
    whole = data.dataset
    catalogue = _Sealed(name=whole.name, items=whole.items, users=whole.users, rating_scale=whole.rating_scale)
    sealed: Any = _Sealed(dataset=catalogue, kind=data.kind, seed=data.seed, train=data.train)
    requests = _requests(name, data)
    assert _fitted(name, sealed).answer(requests) == _fitted(name, data).answer(requests)


# ------------------------------------------------------------------ edges


@pytest.mark.parametrize("name", BASELINES)
def test_unknown_users_and_empty_histories_are_answered(name: str, data: SplitDataset) -> None:
    predictor = _fitted(name, data)
    known = (Event(item_id="i1", rating=4.0), Event(item_id="i2", text="A dull thing"))
    for request in (
        _for(name, user_id="nobody"),
        _for(name, user_id="nobody", history=known),
        _for(name, history=()),
        _for(name, history=(Event(item_id="never seen"),)),
    ):
        _check(name, _one(predictor, request), request)


@pytest.mark.parametrize("name", BASELINES)
def test_unknown_items_are_answered(name: str, data: SplitDataset) -> None:
    asked: dict[str, Any] = {"candidates": ("i3", "new", "i1")} if name in RANKING else {"item": "new"}
    request = _for(name, **asked)
    _check(name, _one(_fitted(name, data), request), request)


@pytest.mark.parametrize("name", [name for name in RANKING if name != "random"])
def test_unknown_candidates_score_lowest(name: str, data: SplitDataset) -> None:
    predictor = _fitted(name, data)
    everything = (*(f"i{n}" for n in range(30)), "new", "newer")
    for history in ((), (Event(item_id="i0"), Event(item_id="new"))):
        answer = _one(predictor, _for(name, candidates=everything, history=history))
        assert isinstance(answer, Ranking)
        scores = dict(zip(answer.items, answer.scores, strict=True))
        assert scores["new"] == scores["newer"] == min(scores.values()) < scores["i0"]


@pytest.mark.parametrize("name", RANKING)
def test_a_single_candidate_is_ranked(name: str, data: SplitDataset) -> None:
    request = _for(name, candidates=("i2",))
    answer = _one(_fitted(name, data), request)
    _check(name, answer, request)


@pytest.mark.parametrize("name", RANKING)
def test_the_whole_catalogue_is_ranked_less_the_history(name: str, data: SplitDataset) -> None:
    history = tuple(Event(item_id=item) for item in ("i0", "i5", "gone", "i5"))
    answer = _one(_fitted(name, data), _for(name, candidates=None, history=history))
    assert isinstance(answer, Ranking)
    assert sorted(answer.items) == sorted(f"i{n}" for n in range(30) if n not in (0, 5))


@pytest.mark.parametrize("name", BASELINES)
def test_what_cannot_be_answered_is_unparsed_in_its_place(name: str, data: SplitDataset) -> None:
    broken = _for(name, id="broken", **({"candidates": ()} if name in RANKING else {"item": None}))
    first, middle, last = _fitted(name, data).answer([_for(name, id="a"), broken, _for(name, id="b")])
    assert isinstance(middle, Unparsed) and middle.request_id == "broken" and middle.reason
    assert (first.request_id, last.request_id) == ("a", "b")
    assert not isinstance(first, Unparsed) and not isinstance(last, Unparsed)


def _without(column: str) -> SplitDataset:
    data = _split("leave_one_out")
    return replace(data, train=data.train.with_columns(pl.lit(None, dtype=data.train.schema[column]).alias(column)))


@pytest.mark.parametrize(
    ("name", "column"), [*((name, "rating") for name in RATING), *((name, "text") for name in TEXT)]
)
def test_missing_columns_are_named_with_the_mend(name: str, column: str) -> None:
    with pytest.raises(DataError, match=rf"{name}.*toy.*data\.columns\.{column}"):
        _fitted(name, _without(column))


@pytest.mark.parametrize("name", RANKING)
def test_ranking_needs_neither_ratings_nor_texts(name: str) -> None:
    request = _for(name)
    _check(name, _one(_fitted(name, _without("rating")), request), request)


def test_baselines_and_metrics_load_no_deep_learning() -> None:
    modules = sorted({target.split(":")[0] for target in BASELINES.values()})
    metrics = [f"llmrec.metrics.{name}" for name in ("ranking", "rating", "text", "stats", "signature")]
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {[*modules, *metrics]}]; "
        "print([name for name in ('torch', 'transformers', 'datasets', 'pandas', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
