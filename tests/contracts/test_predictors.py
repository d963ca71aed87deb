"""The suite that every baseline must pass: it answers as any predictor does, and learns from training data alone."""

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
from llmrec.baselines.parameters import make
from llmrec.data.dataset import Dataset, Review
from llmrec.data.split import SplitDataset, request_id, split
from llmrec.errors import DataError, RecipeError
from llmrec.evaluate.catalogue import rank_catalogue
from llmrec.recipe.schema import Split
from llmrec.registry import BASELINES, lookup
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
# CTR hosts differ in one function (tests/systems); what they share is tested of one.
ALIKE = {"din", "dcn", "autoint"}
# They read tokens by a model: tests/systems.
ELSEWHERE = ALIKE | {"late-interaction", "llm-sequence", "ubert", "state-tower"}
# What needs a package of the extra `baselines` is left out where that is not installed.
ALL = tuple(
    name for name, entry in BASELINES.items() if find_spec(entry.needs or "numpy") is not None and name not in ELSEWHERE
)
RANKING = tuple(name for name in family_of("sequential").baselines if name in ALL)
# What reads the review that a request shows.
REVIEWED = ("text-ridge", "first-sentence")
RATERS = dict.fromkeys([*family_of("rating").baselines, *family_of("stars").baselines])
RATING = tuple(name for name in RATERS if name in ALL)
TEXT = tuple(dict.fromkeys([*family_of("explanation").baselines, *family_of("review").baselines]))
JUDGING = tuple(name for name in family_of("ctr").baselines if name in ALL)
# Their validation split chooses when to stop.
STOPPING = {"sasrec", "gru4rec", "transitions-tuned", "unisrec", *HOSTS}
# Small and short, so that the suite stays quick; everything else runs with its defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "als": {"factors": 8, "iterations": 4},
    "bpr": {"factors": 8, "iterations": 5},
    "sasrec": {"dim": 8, "epochs": 2, "patience": 1, "quiet": True},
    "gru4rec": {"dim": 8, "epochs": 2, "patience": 1, "quiet": True},
    "transitions-tuned": {"steps": 5, "batch": 16, "epochs": 2, "patience": 1, "learning_rate": 1e-2, "quiet": True},
    "unisrec": {"dim": 8, "experts": 2, "layers": 1, "epochs": 2, "patience": 1, "quiet": True},
    **{name: {"dim": 4, "hidden": "8", "epochs": 2, "patience": 1} for name in HOSTS},
    "mf": {"rounds": 5},
    "svd": {"epochs": 5},
}
# Their last step is a dense product in single precision, whose last bits depend on how many rows it has.
DENSE = {"als", "bpr", "content", "sasrec", "gru4rec", "unisrec"}
READING = {
    "content",
    "transitions-text",
    "transitions-tuned",
    "unisrec",
}  # they know items by their texts
# They tune a text encoder.
TUNING = {"transitions-tuned"}
STOCHASTIC = {name for name in ALL if lookup(BASELINES, name, "baseline").stochastic}
KINDS = ("leave_one_out", "last_share", "global_time", "user_disjoint")
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
    reviews = {(row[0], row[1]): Review(text=f"It is {row[4]}. {WORDS[int(row[2])]}!") for row in rows if row[4]}
    return Dataset(name="toy", noun="things", interactions=frame, items=items, rating_scale=(1.0, 5.0), reviews=reviews)


@cache
def _split(kind: str, order_seed: int | None = None) -> SplitDataset:
    return split(_dataset(order_seed), Split(kind=kind, valid=0.2, test=0.2), seed=3)  # type: ignore[arg-type]


@pytest.fixture
def data(request: pytest.FixtureRequest) -> SplitDataset:
    return _split(getattr(request, "param", "leave_one_out"))


# For what concerns held-out interactions.
every_split = pytest.mark.parametrize("data", KINDS, indirect=True)


def _settings(name: str) -> dict[str, Any]:
    settings = SETTINGS.get(name, {})
    return settings | {"encoder": tiny_encoder()} if name in TUNING else settings


def _fitted(name: str, data: SplitDataset, *, seed: int = 5, **settings: Any) -> Any:
    predictor = make(name, _settings(name) | settings, seed=seed)
    predictor.learn(data)
    return predictor


@cache
def _shared(name: str) -> Any:
    """A fitted baseline for tests that only ask it."""
    return _fitted(name, _split("leave_one_out"))


def _same(name: str, found: list[Answer], expected: list[Answer]) -> bool:
    """Whether two lists of answers are equal; for products of dense matrices, but for their last bits."""
    if name not in DENSE:
        return found == expected
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
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
            context = {"review": f"A {WORDS[place % 6]} {WORDS[place % 5]} thing. Odd!"} if name in REVIEWED else {}
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
    elif name in JUDGING:
        assert isinstance(answer, Probability)
        assert 0.0 < answer.value < 1.0
    else:
        assert isinstance(answer, Text)
        assert answer.text.strip() == answer.text != ""


# ------------------------------------------------------------------ shape


def test_the_suite_covers_every_baseline() -> None:
    assert {*RANKING, *RATING, *TEXT, *JUDGING} == set(ALL)
    assert set(BASELINES) - set(ALL) <= {name for name, entry in BASELINES.items() if entry.needs} | ELSEWHERE
    assert ALIKE < set(HOSTS) < set(family_of("ctr").baselines)


@pytest.mark.parametrize("name", ALL)
def test_a_baseline_is_a_trainable_predictor_under_its_own_name(name: str) -> None:
    predictor = lookup(BASELINES, name, "baseline")()
    assert isinstance(predictor, Predictor) and isinstance(predictor, Trainable)
    assert predictor.name == name == lookup(BASELINES, name, "baseline").name


@pytest.mark.parametrize("name", RANKING)
def test_a_ranking_baseline_scores_the_catalogue(name: str, data: SplitDataset) -> None:
    predictor, requests = _shared(name), _requests(name, data)
    assert isinstance(predictor, CatalogueScorer)
    assert predictor.items == tuple(sorted(data.dataset.items))
    scores = predictor.scores(requests)
    assert scores.shape == (len(requests), 30) and scores.dtype.kind == "f"
    assert np.isfinite(scores).all()
    assert predictor.scores([]).shape == (0, 30)


@pytest.mark.parametrize("name", BASELINES)
def test_a_grid_is_a_ladder_through_the_default_inside_the_bounds(name: str) -> None:
    made = lookup(BASELINES, name, "baseline")
    assert isinstance(made.stochastic, bool)
    for key, values in made.GRID.items():
        assert getattr(made.Config(), key) in values
        assert len(set(values)) == len(values) > 1
        if not all(isinstance(value, str) for value in values):
            assert list(values) == sorted(values)
        for value in values:
            assert getattr(made.Config(**{key: value}), key) == value
    assert set(made.Config.model_fields) >= made.AT_ANSWER


def _others(name: str) -> list[dict[str, Any]]:
    """Configs that differ from that of the suite in one parameter of the answers each, and one in all of them."""
    made = lookup(BASELINES, name, "baseline")
    ends = [{key: made.GRID[key][place] for key in made.GRID if key in made.AT_ANSWER} for place in (0, -1)]
    return [{key: value} for end in ends for key, value in end.items()] + ends


# What is tuned answers by the code of `transitions-text`, and each of some sixty fits would read texts anew.
@pytest.mark.parametrize("name", [name for name in ALL if name != "transitions-tuned"])
def test_another_config_of_the_answers_is_another_fit_exactly(name: str, data: SplitDataset) -> None:
    requests, predictor = _requests(name, data), _shared(name)
    before = predictor.answer(requests)
    # What is not tuned and yet read when answering would go untested.
    assert lookup(BASELINES, name, "baseline").GRID.keys() >= predictor.AT_ANSWER
    moved = False
    for parameters in _others(name):
        config = type(predictor._config)(**_settings(name) | parameters)
        found = predictor.with_config(config).answer(requests)
        assert found == _fitted(name, data, **parameters).answer(requests)
        moved = moved or found != before
    assert moved == bool(predictor.AT_ANSWER)
    assert predictor.answer(requests) == before


@pytest.mark.parametrize("name", ALL)
def test_a_parameter_of_the_fit_takes_another_fit(name: str) -> None:
    predictor = _shared(name)
    grid, config = predictor.GRID, predictor._config
    for key in sorted(set(grid) - predictor.AT_ANSWER):
        other = next(value for value in grid[key] if value != getattr(config, key))
        with raises(RecipeError, Facts("contradiction", column=key, says=f"{name}' was fitted with {key}=")):
            predictor.with_config(config.model_copy(update={key: other}))
    unfitted = type(predictor)(config).with_config(config)
    with pytest.raises(RuntimeError, match="fit"):
        unfitted.answer([_for(name)])


@pytest.mark.parametrize("name", BASELINES)
def test_a_config_is_frozen_described_and_valid_as_it_stands(name: str) -> None:
    config = lookup(BASELINES, name, "baseline").Config()
    assert type(config)(**config.model_dump()) == config
    assert [key for key, field in type(config).model_fields.items() if not field.description] == []
    for key in type(config).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(config, key, None)


@pytest.mark.parametrize(
    ("name", "parameters", "facts"),
    [
        (
            "markov",
            {"decai": 0.5},
            Facts("unknown-key", column="here", says=("'decai' (did you mean 'decay'?)", "it takes order, ")),
        ),
        ("popularity", {"decay": 0.5}, Facts("unknown-key", column="here", says=("'decay'", "it takes none"))),
        (
            "markov",
            {"decay": 2, "order": 0},
            Facts("bad-value", column="here", says=("order of 'markov'", "got 0", "decay of 'markov'", "got 2")),
        ),
        (
            "ease",
            {"dtype": "int8"},
            Facts("bad-value", column="here", says=("dtype of 'ease'", "'float32' or 'float64'", "got 'int8'")),
        ),
        ("sasrec", {"dim": 9}, Facts("bad-value", column="here", says=("dim must be a multiple of heads", "9 and 2"))),
        ("markof", {}, Facts("unknown-name", says="(did you mean 'markov'?)")),
    ],
)
def test_parameters_that_do_not_fit_are_named(name: str, parameters: dict[str, Any], facts: Facts) -> None:
    with raises(RecipeError, facts):
        make(name, parameters, seed=0, where="here")


@pytest.mark.parametrize("name", ALL)
@every_split
def test_every_request_is_answered_in_order(name: str, data: SplitDataset) -> None:
    requests = _requests(name, data)
    answers = _fitted(name, data).answer(requests)
    assert len(answers) == len(requests)
    for answer, request in zip(answers, requests, strict=True):
        _check(name, answer, request)


@pytest.mark.parametrize("name", ALL)
def test_no_requests_give_no_answers(name: str) -> None:
    assert _shared(name).answer([]) == []


@pytest.mark.parametrize("name", ALL)
def test_asking_before_fitting_is_an_error(name: str) -> None:
    with pytest.raises(RuntimeError, match=rf"{name}.*fit"):
        lookup(BASELINES, name, "baseline")().answer([_for(name)])


# ------------------------------------------------------------------ what may not matter


@pytest.mark.parametrize("name", ALL)
def test_answers_do_not_depend_on_the_order_or_number_of_requests(name: str, data: SplitDataset) -> None:
    requests, predictor = _requests(name, data), _shared(name)
    answers = predictor.answer(requests)
    assert _same(name, predictor.answer(requests[::-1]), answers[::-1])
    assert _same(name, [_one(predictor, request) for request in requests], answers)


@pytest.mark.parametrize("name", ALL)
def test_answers_do_not_depend_on_the_order_of_rows(name: str) -> None:
    first, second = _split("leave_one_out"), _split("leave_one_out", order_seed=1)
    assert first.train.equals(second.train)
    requests = _requests(name, first)
    assert _requests(name, second) == requests
    assert _fitted(name, second).answer(requests) == _shared(name).answer(requests)


@pytest.mark.parametrize("name", RANKING)
def test_the_order_of_candidates_does_not_matter(name: str) -> None:
    predictor = _shared(name)
    request = _for(name, candidates=tuple(f"i{n}" for n in range(30)), history=(Event(item_id="i4"),))
    turned = replace(request, candidates=request.candidates[::-1] if request.candidates else None)
    assert _same(name, [_one(predictor, turned)], [_one(predictor, request)])


@pytest.mark.parametrize("name", RANKING)
def test_scores_are_those_of_the_answers(name: str, data: SplitDataset) -> None:
    predictor, requests = _shared(name), _requests(name, data)
    column = {item: place for place, item in enumerate(predictor.items)}
    for scores, answer in zip(predictor.scores(requests), predictor.answer(requests), strict=True):
        assert isinstance(answer, Ranking)
        expected = [float(scores[column[item]]) for item in answer.items]
        assert list(answer.scores) == (pytest.approx(expected, abs=1e-5) if name in DENSE else expected)


@pytest.mark.parametrize("name", ALL)
def test_the_seed_fixes_every_answer(name: str, data: SplitDataset) -> None:
    requests = _requests(name, data)
    answers = _shared(name).answer(requests)
    assert _fitted(name, data).answer(requests) == answers
    moved = _fitted(name, data, seed=6).answer(requests) != answers
    assert moved == (name in STOCHASTIC)


@pytest.mark.parametrize("name", ALL)
def test_fitting_again_forgets_what_was_learned_before(name: str, data: SplitDataset) -> None:
    requests, predictor = _requests(name, data), _fitted(name, _permuted(data))
    for _ in range(2):
        predictor.fit(data)
        assert predictor.answer(requests) == _shared(name).answer(requests)


@pytest.mark.parametrize("name", ALL)
def test_nothing_that_is_handed_in_or_out_is_changed(name: str, data: SplitDataset) -> None:
    frames = [frame.clone() for frame in (data.train, data.valid, data.test, data.known, data.dataset.interactions)]
    predictor, requests = _fitted(name, data), _requests(name, data)
    answers = predictor.answer(requests)
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
    whole = replace(data.dataset, interactions=rename(data.dataset.interactions), items=items, reviews=reviews)
    return replace(data, dataset=whole, held_out=frozenset(), **frames)


@pytest.mark.parametrize("name", [name for name in RANKING if name not in STOCHASTIC])
def test_other_names_of_users_change_no_score(name: str, data: SplitDataset) -> None:
    names = {user: f"person {999 - place}" for place, user in enumerate(data.users())}
    requests = [replace(request, candidates=None) for request in _requests(name, data)]
    turned = [replace(request, user_id=names[request.user_id]) for request in requests]
    found = _fitted(name, _renamed(data, "user_id", names)).scores(turned)
    np.testing.assert_allclose(found, _shared(name).scores(requests), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in (*RATING, *JUDGING) if name not in STOCHASTIC])
def test_other_names_of_users_change_no_rating(name: str, data: SplitDataset) -> None:
    names = {user: f"person {999 - place}" for place, user in enumerate(data.users())}
    requests = _requests(name, data)
    turned = [replace(request, user_id=names[request.user_id]) for request in requests]
    found = _fitted(name, _renamed(data, "user_id", names)).answer(turned)
    assert [a.value for a in found] == pytest.approx([a.value for a in _shared(name).answer(requests)], abs=1e-7)


@pytest.mark.parametrize("name", [name for name in RANKING if name not in STOCHASTIC])
def test_other_names_of_items_move_their_scores_along(name: str, data: SplitDataset) -> None:
    names = {item: f"thing {(place * 7) % 30:02d}" for place, item in enumerate(sorted(data.dataset.items))}
    requests = [replace(request, candidates=None) for request in _requests(name, data)]
    turned = [
        replace(r, history=tuple(replace(event, item_id=names[event.item_id]) for event in r.history)) for r in requests
    ]
    one, other = _shared(name), _fitted(name, _renamed(data, "item_id", names))
    assert sorted(names.values()) == list(other.items) != [names[item] for item in one.items]
    order = [other.items.index(names[item]) for item in one.items]
    np.testing.assert_allclose(other.scores(turned)[:, order], one.scores(requests), rtol=0, atol=1e-9)


# ------------------------------------------------------------------ held-out pairs stay unseen


def _permuted(data: SplitDataset) -> SplitDataset:
    """Hand the held-out items, ratings and texts to other users, in the frames and in the dataset itself."""

    def turn(frame: pl.DataFrame) -> pl.DataFrame:
        columns = ["item_id", "rating", "text"]
        turned = frame.select(pl.col(columns).gather((pl.int_range(pl.len()) + 1) % pl.len()))
        return frame.select("user_id", "timestamp").hstack(turned).select(frame.columns)

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
    """Settings with which a baseline has no use for the validation split."""
    return {"patience": None} if name in STOPPING else {}


@pytest.mark.parametrize("name", ALL)
@every_split
def test_permuting_the_held_out_interactions_changes_no_answer(name: str, data: SplitDataset) -> None:
    requests, other = _requests(name, data), _permuted(data)
    assert not other.test.equals(data.test) and other.train.equals(data.train)
    one, two = _fitted(name, data, **_blind(name)), _fitted(name, other, **_blind(name))
    assert two.answer(requests) == one.answer(requests)
    if name in RANKING:
        assert np.array_equal(two.scores(requests), one.scores(requests))


@pytest.mark.parametrize("name", sorted(STOPPING & set(ALL)))
@every_split
def test_early_stopping_sees_the_validation_split_and_not_the_test_split(name: str, data: SplitDataset) -> None:
    settings: dict[str, Any] = {"epochs": 6, "patience": 6, "learning_rate": 0.05}
    requests = _requests(name, data)
    other = replace(_permuted(data), valid=data.valid)
    assert not other.test.equals(data.test) and other.valid.equals(data.valid)
    one, two = _fitted(name, data, **settings), _fitted(name, other, **settings)
    assert two.answer(requests) == one.answer(requests)


class _Sealed:
    """Passes on some attributes of an object, and fails the test on any other."""

    def __init__(self, **allowed: object) -> None:
        self.__dict__.update(allowed)

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"fit() looked at {name!r}")


@pytest.mark.parametrize("name", ALL)
@every_split
def test_fit_looks_at_training_rows_and_the_catalogue_only(name: str, data: SplitDataset) -> None:
    whole = data.dataset
    trained = set(data.train.select("user_id", "item_id").iter_rows())
    catalogue = _Sealed(
        name=whole.name,
        items=whole.items,
        users=whole.users,
        rating_scale=whole.rating_scale,
        reviews={pair: review for pair, review in whole.reviews.items() if pair in trained},
    )
    # What is shown as history alone is held out from nobody.
    sealed: Any = _Sealed(dataset=catalogue, kind=data.kind, seed=data.seed, train=data.train, known=data.known)
    requests, settings = _requests(name, data), _blind(name)
    assert _fitted(name, sealed, **settings).answer(requests) == _fitted(name, data, **settings).answer(requests)


# ------------------------------------------------------------------ edges


@pytest.mark.parametrize("name", ALL)
def test_unknown_users_and_empty_histories_are_answered(name: str) -> None:
    predictor = _shared(name)
    known = (Event(item_id="i1", rating=4.0), Event(item_id="i2", text="A dull thing"))
    for request in (
        _for(name, user_id="nobody"),
        _for(name, user_id="nobody", history=known),
        _for(name, history=()),
        _for(name, history=(Event(item_id="never seen"),)),
    ):
        _check(name, _one(predictor, request), request)


@pytest.mark.parametrize("name", ALL)
def test_unknown_items_are_answered(name: str) -> None:
    asked: dict[str, Any] = {"candidates": ("i3", "new", "i1")} if name in RANKING else {"item": "new"}
    request = _for(name, **asked)
    _check(name, _one(_shared(name), request), request)


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
    """The leave-one-out split with items in the catalogue that nobody had in training."""
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
def test_without_a_known_history_popularity_decides(name: str, data: SplitDataset) -> None:
    predictor = _shared(name)
    popular = data.train["item_id"].value_counts(sort=True)
    most = set(popular.filter(pl.col("count") == popular["count"].max())["item_id"])
    for history in ((), (Event(item_id="never seen"),)):
        answer = _one(predictor, _for(name, history=history, candidates=tuple(f"i{n}" for n in range(30))))
        assert isinstance(answer, Ranking)
        if name != "recent-popularity":
            assert answer.items[0] in most


@pytest.mark.parametrize("name", RANKING)
def test_a_candidate_that_stands_twice_is_refused(name: str) -> None:
    answer = _one(_shared(name), _for(name, candidates=("i3", "i1", "i3")))
    assert isinstance(answer, Unparsed) and "duplicate" in answer.reason


@pytest.mark.parametrize("name", RANKING)
def test_memory_does_not_grow_with_the_number_of_requests(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    items = {f"i{n}": Item(item_id=f"i{n}", title="t") for n in range(2000)}
    data = _split("leave_one_out")
    predictor = _fitted(name, replace(data, dataset=replace(data.dataset, items=items)))
    monkeypatch.setattr(ranked, "_CELLS", 2000 * 16)

    def peak(count: int) -> int:
        requests = [_for(name, id=f"r{n}", history=(Event(item_id=f"i{n % 30}"),)) for n in range(count)]
        tracemalloc.start()
        answers = predictor.answer(requests)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(answers) == count
        return most

    peak(16)
    # Answers and what the blocks leave behind are small; all scores at once would be 4 MB in single precision.
    assert peak(512) < peak(16) + (1 << 20)


@pytest.mark.parametrize("name", RANKING)
def test_a_single_candidate_is_ranked(name: str) -> None:
    request = _for(name, candidates=("i2",))
    answer = _one(_shared(name), request)
    _check(name, answer, request)


@pytest.mark.parametrize("name", RANKING)
def test_the_whole_catalogue_is_ranked_less_the_history(name: str) -> None:
    history = tuple(Event(item_id=item) for item in ("i0", "i5", "gone", "i5"))
    answer = _one(_shared(name), _for(name, candidates=None, history=history))
    assert isinstance(answer, Ranking)
    assert sorted(answer.items) == sorted(f"i{n}" for n in range(30) if n not in (0, 5))


@pytest.mark.parametrize("name", ALL)
def test_what_cannot_be_answered_is_unparsed_in_its_place(name: str) -> None:
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
def test_missing_columns_are_named_with_the_mend(name: str, column: str) -> None:
    with raises(DataError, Facts("missing-column", "toy", column=column, says=(f"'{name}'", f"data.columns.{column}"))):
        _fitted(name, _without(column))


@pytest.mark.parametrize("name", RANKING)
def test_ranking_needs_neither_ratings_nor_texts(name: str) -> None:
    request = _for(name)
    _check(name, _one(_fitted(name, _without("rating")), request), request)


@pytest.mark.parametrize("name", RANKING)
def test_full_ranking_takes_every_ranking_baseline(name: str, data: SplitDataset) -> None:
    cases = [
        Case(
            request=Request(id=held.item_id, user_id=held.user_id, history=data.history(held.user_id, "test")),
            truth=held.item_id,
        )
        for held in data.holdouts("test")
    ]
    predictor = _shared(name)
    found = rank_catalogue(predictor, cases, cutoffs=(10,))
    scores = predictor.scores([case.request for case in cases])
    own = scores[np.arange(len(cases)), [predictor.items.index(str(case.truth)) for case in cases]]
    if name not in DENSE:
        assert found["included"].greater.tolist() == (scores > own[:, None]).sum(axis=1).tolist()
    assert (found["excluded"].greater <= found["included"].greater).all()


def test_baselines_and_metrics_load_no_deep_learning() -> None:
    modules = sorted({entry.address.split(":")[0] for entry in BASELINES.values()})
    metrics = [f"llmrec.metrics.{name}" for name in ("ranking", "rating", "text", "stats", "signature")]
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {[*modules, *metrics]}]; "
        "heavy = ('torch', 'implicit', 'transformers', 'datasets', 'pandas', 'vllm'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
