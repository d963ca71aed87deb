"""Tests that every baseline must pass: it answers like any predictor, and learns from training data only."""

from __future__ import annotations

import math
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError

from llmrec.baselines import base as ranked
from llmrec.baselines.base import Trainable
from llmrec.baselines.parameters import create_baseline
from llmrec.data.dataset import Dataset, Review
from llmrec.data.split import SplitDataset, request_id, split_dataset
from llmrec.errors import DataError, RecipeError
from llmrec.evaluate.catalogue import rank_catalogue
from llmrec.recipe.schema import Split
from llmrec.registry import BASELINES, import_component
from llmrec.tasks.family import family_of
from llmrec.types import (
    Answer,
    Case,
    CatalogueScorer,
    Event,
    Item,
    Predictor,
    Probability,
    Ranking,
    Rating,
    Request,
    Text,
    Unparsed,
)
from tests.encoders import tiny_encoder
from tests.facts import Facts, raises

HOSTS = ("din", "deepfm", "dcn", "autoint")
# CTR hosts differ in one function (see tests/systems); their shared code is tested with one of them.
ALIKE = {"din", "dcn", "autoint"}
# Baselines that read tokens with a model are tested in tests/systems.
ELSEWHERE = ALIKE | {"late-interaction", "llm-sequence", "ubert", "state-tower"}
# Baselines that need a missing package of the extra `baselines` are left out.
ALL = tuple(
    name for name, entry in BASELINES.items() if find_spec(entry.needs or "numpy") is not None and name not in ELSEWHERE
)
RANKING = tuple(name for name in family_of("sequential").baselines if name in ALL)
# Baselines that read the review in a request.
REVIEWED = ("text-ridge", "first-sentence")
RATERS = dict.fromkeys([*family_of("rating").baselines, *family_of("stars").baselines])
RATING = tuple(name for name in RATERS if name in ALL)
TEXT = tuple(dict.fromkeys([*family_of("explanation").baselines, *family_of("review").baselines]))
JUDGING = tuple(name for name in family_of("ctr").baselines if name in ALL)
# Baselines with early stopping on the validation split.
STOPPING = {"sasrec", "sasrec-text", "gru4rec", "transitions-tuned", "unisrec", *HOSTS}
# Small settings for a fast suite; all other baselines use their defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "als": {"factors": 8, "iterations": 4},
    "bpr": {"factors": 8, "iterations": 5},
    "sasrec": {"dim": 8, "epochs": 2, "patience": 1, "quiet": True},
    "sasrec-text": {"dim": 8, "epochs": 2, "patience": 1, "quiet": True},
    "gru4rec": {"dim": 8, "epochs": 2, "patience": 1, "quiet": True},
    "transitions-tuned": {"steps": 5, "batch": 16, "epochs": 2, "patience": 1, "learning_rate": 1e-2, "quiet": True},
    "unisrec": {"dim": 8, "experts": 2, "layers": 1, "epochs": 2, "patience": 1, "quiet": True},
    **{name: {"dim": 4, "hidden": "8", "epochs": 2, "patience": 1} for name in HOSTS},
    "mf": {"rounds": 5},
    "svd": {"epochs": 5},
}
# Their last step is a dense product in single precision, whose last bits depend on how many rows it has.
DENSE = {"als", "bpr", "content", "sasrec", "sasrec-text", "gru4rec", "unisrec"}
READING = {
    "content",
    "transitions-text",
    "transitions-tuned",
    "unisrec",
    "sasrec-text",
}  # they represent items by their texts
# They tune a text encoder.
TUNING = {"transitions-tuned"}
STOCHASTIC = {name for name in ALL if import_component(BASELINES, name, "baseline").stochastic}
KINDS = ("leave_one_out", "last_share", "global_time", "user_disjoint")
WORDS = ("fine", "dull", "long", "warm", "odd", "quick")


def _dataset(order_seed: int | None = None) -> Dataset:
    """Return 40 users, 30 items of decreasing popularity, tied times, ratings, and texts on two of three rows."""
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
        rows = [rows[n] for n in np.random.default_rng(order_seed).permutation(len(rows))]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "rating", "timestamp", "text"], orient="row")
    items = {f"i{n}": Item(item_id=f"i{n}", title=f"Title {WORDS[n % 6]} {n}") for n in range(30)}
    reviews = {(row[0], row[1]): Review(text=f"It is {row[4]}. {WORDS[int(row[2])]}!") for row in rows if row[4]}
    return Dataset(name="toy", noun="things", interactions=frame, items=items, rating_scale=(1.0, 5.0), reviews=reviews)


@cache
def _split(kind: str, order_seed: int | None = None) -> SplitDataset:
    return split_dataset(_dataset(order_seed), Split(kind=kind, valid=0.2, test=0.2), seed=3)  # type: ignore[arg-type]


@pytest.fixture
def data(request: pytest.FixtureRequest) -> SplitDataset:
    return _split(getattr(request, "param", "leave_one_out"))


# For tests about held-out interactions.
all_splits = pytest.mark.parametrize("data", KINDS, indirect=True)


def _settings(name: str) -> dict[str, Any]:
    settings = SETTINGS.get(name, {})
    return settings | {"encoder": tiny_encoder()} if name in TUNING else settings


def _fitted(name: str, data: SplitDataset, *, seed: int = 5, **settings: Any) -> Any:
    predictor = create_baseline(name, _settings(name) | settings, seed=seed)
    predictor.learn(data)
    return predictor


@cache
def _shared(name: str, kind: str = "leave_one_out", *, blind: bool = False) -> Any:
    """A fitted baseline for tests that do not change it; ``blind`` ignores the validation split."""
    return _fitted(name, _split(kind), **(_blind(name) if blind else {}))


def _same(name: str, answers: list[Answer], expected: list[Answer]) -> bool:
    """Whether two lists of answers are equal, for products of dense matrices up to rounding."""
    if name not in DENSE:
        return answers == expected
    assert len(answers) == len(expected)
    for one, other in zip(answers, expected, strict=True):
        if not (isinstance(one, Ranking) and isinstance(other, Ranking)):
            assert one == other
            continue
        assert one.request_id == other.request_id and set(one.items) == set(other.items)
        scores = dict(zip(other.items, other.scores, strict=True))
        assert one.scores == pytest.approx([scores[item] for item in one.items], abs=1e-5)
    return True


def _requests(name: str, data: SplitDataset) -> list[Request]:
    """One request per held-out test interaction, as the tasks make them."""
    requests = []
    for n, held in enumerate(data.holdouts("test")):
        base = Request(
            id=request_id(held.user_id, held.item_id),
            user_id=held.user_id,
            history=data.history(held.user_id, "test"),
        )
        if name in RANKING:
            others = [f"i{(n * 7 + step) % 30}" for step in range(1, 12)]
            candidates = dict.fromkeys([*others[:5], held.item_id, *others[5:]])
            requests.append(replace(base, candidates=tuple(candidates) if n % 3 else None))
        else:
            context = {"review": f"A {WORDS[n % 6]} {WORDS[n % 5]} thing. Odd!"} if name in REVIEWED else {}
            requests.append(replace(base, item=held.item_id, context=context))
    assert len(requests) >= 7
    return requests


def _one(predictor: Any, request: Request) -> Answer:
    answers = predictor.answer([request])
    assert len(answers) == 1
    answer: Answer = answers[0]
    return answer


def _for(name: str, **fields: Any) -> Request:
    """A plain request of the kind that a baseline answers."""
    defaults: dict[str, Any] = {"candidates": ("i3", "i1", "i2")} if name in RANKING else {"item": "i1"}
    return Request(**({"id": "r", "user_id": "u1"} | defaults | fields))


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
    elif name in JUDGING:
        assert isinstance(answer, Probability)
        assert 0.0 < answer.value < 1.0
    else:
        assert isinstance(answer, Text)
        assert answer.text.strip() == answer.text != ""


def test_every_baseline_is_tested() -> None:
    assert {*RANKING, *RATING, *TEXT, *JUDGING} == set(ALL)
    assert set(BASELINES) - set(ALL) <= {name for name, entry in BASELINES.items() if entry.needs} | ELSEWHERE
    assert ALIKE < set(HOSTS) < set(family_of("ctr").baselines)


@pytest.mark.parametrize("name", ALL)
def test_baseline_is_a_trainable_predictor(name: str) -> None:
    predictor = import_component(BASELINES, name, "baseline")()
    assert isinstance(predictor, Predictor) and isinstance(predictor, Trainable)
    assert predictor.name == name == import_component(BASELINES, name, "baseline").name
    with pytest.raises(RuntimeError, match=rf"{name}.*fit"):
        predictor.answer([_for(name)])
    assert _shared(name).answer([]) == []


@pytest.mark.parametrize("name", RANKING)
def test_catalogue_scores(name: str, data: SplitDataset) -> None:
    predictor, requests = _shared(name), _requests(name, data)
    assert isinstance(predictor, CatalogueScorer)
    assert predictor.items == tuple(sorted(data.dataset.items))
    scores = predictor.scores(requests)
    assert scores.shape == (len(requests), 30) and scores.dtype.kind == "f"
    assert np.isfinite(scores).all()
    assert predictor.scores([]).shape == (0, 30)


@pytest.mark.parametrize("name", BASELINES)
def test_config_and_grid(name: str) -> None:
    baseline = import_component(BASELINES, name, "baseline")
    config = baseline.Config()
    assert isinstance(baseline.stochastic, bool) and baseline.Config(**config.model_dump()) == config
    for key, field in baseline.Config.model_fields.items():
        assert field.description, key
        with pytest.raises(ValidationError, match="frozen"):
            setattr(config, key, None)
    for key, values in baseline.GRID.items():
        assert getattr(config, key) in values and len(set(values)) == len(values) > 1
        if not all(isinstance(value, str) for value in values):
            assert list(values) == sorted(values)
        for value in values:
            assert getattr(baseline.Config(**{key: value}), key) == value
    assert set(baseline.Config.model_fields) >= baseline.AT_ANSWER


def _others(name: str) -> list[dict[str, Any]]:
    """Return two configs in which all parameters of `AT_ANSWER` differ from the defaults of the suite."""
    grid = import_component(BASELINES, name, "baseline").GRID
    answering = import_component(BASELINES, name, "baseline").AT_ANSWER
    return [{key: grid[key][end] for key in grid if key in answering} for end in (0, -1)]


# The answers of `transitions-tuned` are computed by the code of `transitions-text`.
@pytest.mark.parametrize("name", [name for name in ALL if name != "transitions-tuned"])
def test_with_config_equals_another_fit(name: str, data: SplitDataset) -> None:
    requests, predictor = _requests(name, data), _shared(name)
    before = predictor.answer(requests)
    # Otherwise a parameter of the answers would not be tested.
    assert import_component(BASELINES, name, "baseline").GRID.keys() >= predictor.AT_ANSWER
    differs = False
    for parameters in _others(name) if predictor.AT_ANSWER else ():
        config = type(predictor._config)(**_settings(name) | parameters)
        answers = predictor.with_config(config).answer(requests)
        assert answers == _fitted(name, data, **parameters).answer(requests)
        differs = differs or answers != before
    assert differs == bool(predictor.AT_ANSWER)
    assert predictor.answer(requests) == before


@pytest.mark.parametrize("name", ALL)
def test_with_config_rejects_parameters_of_the_fit(name: str) -> None:
    predictor = _shared(name)
    grid, config = predictor.GRID, predictor._config
    for key in sorted(set(grid) - predictor.AT_ANSWER):
        other = next(value for value in grid[key] if value != getattr(config, key))
        with raises(RecipeError, Facts("contradiction", column=key, says=f"{name}' was fitted with {key}=")):
            predictor.with_config(config.model_copy(update={key: other}))
    unfitted = type(predictor)(config).with_config(config)
    with pytest.raises(RuntimeError, match="fit"):
        unfitted.answer([_for(name)])


@pytest.mark.parametrize(
    ("name", "parameters", "kind", "says"),
    [
        ("markov", {"decai": 0.5}, "unknown-key", ("'decai' (did you mean 'decay'?)", "it takes order, ")),
        ("popularity", {"decay": 0.5}, "unknown-key", ("'decay'", "it takes none")),
        ("markov", {"decay": 2, "order": 0}, "bad-value", ("order of 'markov'", "got 0", "decay of 'markov'", "got 2")),
        ("ease", {"dtype": "int8"}, "bad-value", ("dtype of 'ease'", "'float32' or 'float64'", "got 'int8'")),
        ("sasrec", {"dim": 9}, "bad-value", ("dim must be a multiple of heads", "9 and 2")),
    ],
)
def test_rejects_invalid_parameters(name: str, parameters: dict[str, Any], kind: Any, says: tuple[str, ...]) -> None:
    with raises(RecipeError, Facts(kind, column="here", says=says)):
        create_baseline(name, parameters, seed=0, where="here")
    with raises(RecipeError, Facts("unknown-name", says="(did you mean 'markov'?)")):
        create_baseline("markof", parameters, seed=0, where="here")


@pytest.mark.parametrize("name", ALL)
@all_splits
def test_every_request_is_answered_in_order(name: str, data: SplitDataset) -> None:
    requests = _requests(name, data)
    answers = _shared(name, data.kind).answer(requests)
    assert len(answers) == len(requests)
    for answer, request in zip(answers, requests, strict=True):
        _check(name, answer, request)


@pytest.mark.parametrize("name", ALL)
def test_batch_of_requests_does_not_matter(name: str, data: SplitDataset) -> None:
    requests, predictor = _requests(name, data), _shared(name)
    answers = predictor.answer(requests)
    assert _same(name, predictor.answer(requests[::-1]), answers[::-1])
    assert _same(name, [_one(predictor, request) for request in requests], answers)


def test_order_of_rows_does_not_matter() -> None:
    first, second = _split("leave_one_out"), _split("leave_one_out", order_seed=1)
    assert first.train.equals(second.train) and first.known.equals(second.known)
    assert _requests(RANKING[0], second) == _requests(RANKING[0], first)


@pytest.mark.parametrize("name", RANKING)
def test_answers_have_the_scores_of_the_catalogue(name: str, data: SplitDataset) -> None:
    predictor, requests = _shared(name), _requests(name, data)
    column = {item: n for n, item in enumerate(predictor.items)}
    for scores, answer in zip(predictor.scores(requests), predictor.answer(requests), strict=True):
        assert isinstance(answer, Ranking)
        expected = [float(scores[column[item]]) for item in answer.items]
        assert list(answer.scores) == (pytest.approx(expected, abs=1e-5) if name in DENSE else expected)


@pytest.mark.parametrize("name", ALL)
def test_only_stochastic_baselines_depend_on_the_seed(name: str, data: SplitDataset) -> None:
    requests = _requests(name, data)
    differs = _fitted(name, data, seed=6).answer(requests) != _shared(name).answer(requests)
    assert differs == (name in STOCHASTIC)


@pytest.mark.parametrize("name", ALL)
def test_fit_forgets_earlier_data_and_changes_no_input(name: str, data: SplitDataset) -> None:
    frames = [frame.clone() for frame in (data.train, data.valid, data.test, data.known, data.dataset.interactions)]
    predictor, requests = _fitted(name, _permuted(data)), _requests(name, data)
    predictor.fit(data)
    answers = predictor.answer(requests)
    assert answers == _shared(name).answer(requests)
    if name in RANKING:
        predictor.scores(requests)[:] = -1.0
    assert predictor.answer(requests) == answers
    after = (data.train, data.valid, data.test, data.known, data.dataset.interactions)
    assert all(one.equals(other) for one, other in zip(frames, after, strict=True))


def _renamed(data: SplitDataset, column: str, names: dict[str, str]) -> SplitDataset:
    """The same split with other ids of users or items, each user's rows in their order."""

    def rename(frame: pl.DataFrame) -> pl.DataFrame:
        other = pl.col(column).cast(pl.String).replace_strict(names)
        return frame.with_columns(other).sort("user_id", maintain_order=True)

    items, reviews = data.dataset.items, data.dataset.reviews
    reviews = {
        (names.get(user, user), item) if column == "user_id" else (user, names[item]): review
        for (user, item), review in reviews.items()
    }
    if column == "item_id":
        items = {names[item]: replace(entry, item_id=names[item]) for item, entry in items.items()}
    frames: dict[str, Any] = {name: rename(getattr(data, name)) for name in ("train", "valid", "test", "known")}
    dataset = replace(data.dataset, interactions=rename(data.dataset.interactions), items=items, reviews=reviews)
    return replace(data, dataset=dataset, held_out=frozenset(), **frames)


@pytest.mark.parametrize("name", [name for name in (*RANKING, *RATING, *JUDGING) if name not in STOCHASTIC])
def test_user_ids_do_not_matter(name: str, data: SplitDataset) -> None:
    names = {user: f"person {999 - n}" for n, user in enumerate(data.users())}
    requests = [replace(request, candidates=None) for request in _requests(name, data)]
    renamed = [replace(request, user_id=names[request.user_id]) for request in requests]
    one, other = _shared(name), _fitted(name, _renamed(data, "user_id", names))
    if name in RANKING:
        np.testing.assert_allclose(other.scores(renamed), one.scores(requests), rtol=0, atol=1e-9)
    else:
        values = [answer.value for answer in one.answer(requests)]
        assert [answer.value for answer in other.answer(renamed)] == pytest.approx(values, abs=1e-7)


@pytest.mark.parametrize("name", [name for name in RANKING if name not in STOCHASTIC])
def test_item_ids_do_not_matter(name: str, data: SplitDataset) -> None:
    names = {item: f"thing {(n * 7) % 30:02d}" for n, item in enumerate(sorted(data.dataset.items))}
    requests = [replace(request, candidates=None) for request in _requests(name, data)]
    renamed = [
        replace(r, history=tuple(replace(event, item_id=names[event.item_id]) for event in r.history)) for r in requests
    ]
    one, other = _shared(name), _fitted(name, _renamed(data, "item_id", names))
    assert sorted(names.values()) == list(other.items) != [names[item] for item in one.items]
    order = [other.items.index(names[item]) for item in one.items]
    np.testing.assert_allclose(other.scores(renamed)[:, order], one.scores(requests), rtol=0, atol=1e-9)


def _permuted(data: SplitDataset) -> SplitDataset:
    """Permute the held-out items, ratings and texts over users, in the frames and in the dataset."""

    def turn(frame: pl.DataFrame) -> pl.DataFrame:
        columns = ["item_id", "rating", "text"]
        renamed = frame.select(pl.col(columns).gather((pl.int_range(pl.len()) + 1) % pl.len()))
        return frame.select("user_id", "timestamp").hstack(renamed).select(frame.columns)

    valid, test, held = turn(data.valid), turn(data.test), data.held_out
    return replace(
        data,
        dataset=replace(
            data.dataset,
            interactions=pl.concat([data.train, data.known, valid, test]),
            reviews={
                pair: Review(text="warm warm odd") if pair in held else r for pair, r in data.dataset.reviews.items()
            },
        ),
        valid=valid,
        test=test,
        held_out=frozenset(pl.concat([valid, test]).select("user_id", "item_id").iter_rows()),
    )


def _blind(name: str) -> dict[str, Any]:
    """Settings with which a baseline ignores the validation split."""
    return {"patience": None} if name in STOPPING else {}


@pytest.mark.parametrize("name", sorted(STOPPING & set(ALL)))
@pytest.mark.parametrize("data", ["leave_one_out", "user_disjoint"], indirect=True)
def test_early_stopping_does_not_use_the_test_split(name: str, data: SplitDataset) -> None:
    settings: dict[str, Any] = {"epochs": 6, "patience": 6, "learning_rate": 0.05}
    requests = _requests(name, data)
    other = replace(_permuted(data), valid=data.valid)
    assert not other.test.equals(data.test) and other.valid.equals(data.valid)
    one, two = _fitted(name, data, **settings), _fitted(name, other, **settings)
    assert two.answer(requests) == one.answer(requests)


class _Sealed:
    """Has only some attributes of an object; access to any other fails the test."""

    def __init__(self, **allowed: object) -> None:
        self.__dict__.update(allowed)

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"fit() read {name!r}")


@pytest.mark.parametrize("name", ALL)
@all_splits
def test_fit_reads_training_data_and_catalogue_only(name: str, data: SplitDataset) -> None:
    dataset = data.dataset
    trained = set(data.train.select("user_id", "item_id").iter_rows())
    catalogue = _Sealed(
        name=dataset.name,
        items=dataset.items,
        users=dataset.users,
        rating_scale=dataset.rating_scale,
        reviews={pair: review for pair, review in dataset.reviews.items() if pair in trained},
    )
    # Interactions that are only history are not held out.
    sealed: Any = _Sealed(dataset=catalogue, kind=data.kind, seed=data.seed, train=data.train, known=data.known)
    requests, expected = _requests(name, data), _shared(name, data.kind, blind=name in STOPPING)
    predictor = _fitted(name, sealed, **_blind(name))
    assert predictor.answer(requests) == expected.answer(requests)
    if name in RANKING:
        assert np.array_equal(predictor.scores(requests), expected.scores(requests))


@pytest.mark.parametrize("name", ALL)
def test_unknown_users_items_and_histories_are_answered(name: str) -> None:
    predictor = _shared(name)
    known = (Event(item_id="i1", rating=4.0), Event(item_id="i2", text="A dull thing"))
    unknown: dict[str, Any] = {"candidates": ("i3", "new", "i1")} if name in RANKING else {"item": "new"}
    for request in (
        _for(name, user_id="unknown"),
        _for(name, user_id="unknown", history=known),
        _for(name, history=()),
        _for(name, history=(Event(item_id="unknown"),)),
        _for(name, **unknown),
    ):
        _check(name, _one(predictor, request), request)


@pytest.mark.parametrize("name", RANKING)
def test_candidates_of_a_request(name: str) -> None:
    predictor, single = _shared(name), _for(name, candidates=("i2",))
    _check(name, _one(predictor, single), single)
    past = (Event(item_id="i4"),)
    forward, backward = (tuple(f"i{n}" for n in order) for order in (range(30), reversed(range(30))))
    answers = [_one(predictor, _for(name, candidates=candidates, history=past)) for candidates in (forward, backward)]
    assert _same(name, answers[:1], answers[1:])
    duplicate = _one(predictor, _for(name, candidates=("i3", "i1", "i3")))
    assert isinstance(duplicate, Unparsed) and "duplicate" in duplicate.reason
    history = tuple(Event(item_id=item) for item in ("i0", "i5", "unknown", "i5"))
    catalogue = _one(predictor, _for(name, candidates=None, history=history))
    assert isinstance(catalogue, Ranking)
    assert sorted(catalogue.items) == sorted(f"i{n}" for n in range(30) if n not in (0, 5))


@pytest.mark.parametrize("name", [name for name in RANKING if name != "random"])
def test_unknown_candidates_score_lowest(name: str) -> None:
    predictor = _shared(name)
    everything = (*(f"i{n}" for n in range(30)), "new", "newer")
    for history in ((), (Event(item_id="i0"), Event(item_id="new"))):
        answer = _one(predictor, _for(name, candidates=everything, history=history))
        assert isinstance(answer, Ranking)
        scores = dict(zip(answer.items, answer.scores, strict=True))
        assert scores["new"] == scores["newer"] == min(scores.values()) < scores["i0"]


def _with_cold() -> SplitDataset:
    """The leave-one-out split with items in the catalogue without training interactions."""
    data = _split("leave_one_out")
    more = {item: Item(item_id=item, title=item) for item in ("cold", "i01", "zero")}
    return replace(data, dataset=replace(data.dataset, items={**data.dataset.items, **more}))


@pytest.mark.parametrize("name", [name for name in RANKING if name not in {"random", *READING}])
def test_items_without_training_interactions_score_lowest(name: str) -> None:
    data = _with_cold()
    predictor = _fitted(name, data)
    trained = set(data.train["item_id"])
    cold = np.array([item not in trained for item in predictor.items])
    assert 3 <= cold.sum() < 30
    requests = [
        *_requests(name, data),
        _for(name, history=()),
        _for(name, history=(Event(item_id="cold"),)),
        _for(name, history=(Event(item_id="i0"), Event(item_id="cold"))),
    ]
    scores = predictor.scores(requests)
    assert (scores[:, cold].max(axis=1) < scores[:, ~cold].min(axis=1)).all()
    assert (scores[:, cold].max(axis=1) == scores[:, cold].min(axis=1)).all()


@pytest.mark.parametrize("name", [name for name in RANKING if name != "random"])
def test_unknown_history_is_ranked_by_popularity(name: str, data: SplitDataset) -> None:
    predictor = _shared(name)
    popular = data.train["item_id"].value_counts(sort=True)
    most = set(popular.filter(pl.col("count") == popular["count"].max())["item_id"])
    for history in ((), (Event(item_id="never seen"),)):
        answer = _one(predictor, _for(name, history=history, candidates=tuple(f"i{n}" for n in range(30))))
        assert isinstance(answer, Ranking)
        if name != "recent-popularity":
            assert answer.items[0] in most


# All baselines share the loop over blocks of requests.
@pytest.mark.parametrize("name", sorted({"item-knn", "sasrec"} & set(RANKING)))
def test_memory_does_not_grow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    items = {f"i{n}": Item(item_id=f"i{n}", title="t") for n in range(2000)}
    data = _split("leave_one_out")
    predictor = _fitted(name, replace(data, dataset=replace(data.dataset, items=items)))
    monkeypatch.setattr(ranked, "_BLOCK_SCORES", 2000 * 16)

    def peak(count: int) -> int:
        requests = [_for(name, id=f"r{n}", history=(Event(item_id=f"i{n % 30}"),)) for n in range(count)]
        tracemalloc.start()
        answers = predictor.answer(requests)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(answers) == count
        return most

    peak(16)
    # All scores at once would need 4 MB in single precision.
    assert peak(512) < peak(16) + (1 << 20)


@pytest.mark.parametrize("name", ALL)
def test_invalid_request_is_unparsed(name: str) -> None:
    broken = _for(name, id="broken", **({"candidates": ()} if name in RANKING else {"item": None}))
    first, middle, last = _shared(name).answer([_for(name, id="a"), broken, _for(name, id="b")])
    assert isinstance(middle, Unparsed) and middle.request_id == "broken" and middle.reason
    assert (first.request_id, last.request_id) == ("a", "b")
    assert not isinstance(first, Unparsed) and not isinstance(last, Unparsed)


def _without(column: str) -> SplitDataset:
    data = _split("leave_one_out")
    return replace(data, train=data.train.with_columns(pl.lit(None, dtype=data.train.schema[column]).alias(column)))


@pytest.mark.parametrize(
    ("name", "column"),
    [*((name, "rating") for name in (*RATING, *JUDGING)), *((name, "text") for name in TEXT)],
)
def test_missing_columns_are_named(name: str, column: str) -> None:
    with raises(DataError, Facts("missing-column", "toy", column=column, says=(f"'{name}'", f"data.columns.{column}"))):
        _fitted(name, _without(column))


@pytest.mark.parametrize("name", RANKING)
def test_ranking_needs_no_ratings(name: str) -> None:
    request = _for(name)
    _check(name, _one(_fitted(name, _without("rating")), request), request)


@pytest.mark.parametrize("name", RANKING)
def test_full_ranking(name: str, data: SplitDataset) -> None:
    cases = [
        Case(
            request=Request(id=held.item_id, user_id=held.user_id, history=data.history(held.user_id, "test")),
            truth=held.item_id,
        )
        for held in data.holdouts("test")
    ]
    predictor = _shared(name)
    results = rank_catalogue(predictor, cases, cutoffs=(10,))
    scores = predictor.scores([case.request for case in cases])
    targets = scores[np.arange(len(cases)), [predictor.items.index(str(case.truth)) for case in cases]]
    if name not in DENSE:
        assert results["included"].greater.tolist() == (scores > targets[:, None]).sum(axis=1).tolist()
    assert (results["excluded"].greater <= results["included"].greater).all()


def test_baselines_and_metrics_import_no_deep_learning() -> None:
    modules = sorted({entry.address.split(":")[0] for entry in BASELINES.values()})
    metrics = [f"llmrec.metrics.{name}" for name in ("ranking", "rating", "text", "stats", "signature")]
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {[*modules, *metrics]}]; "
        "heavy = ('torch', 'implicit', 'transformers', 'datasets', 'pandas', 'vllm'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
