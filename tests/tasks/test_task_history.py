"""Events of a long history that a prompt shows, and few-shot examples selected by text, time and answer."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmrec.errors import DataError, RecipeError
from llmrec.recipe.schema import RatingSection
from llmrec.tasks.fewshot import ShotPool
from llmrec.tasks.history import HistorySelector, ItemVectors
from llmrec.types import Event, Item, Request
from tests.facts import Facts, raises
from tests.tasks.making import make
from tests.tasks.task_data import CLASSES, load_templates, make_split, prompt_text

DATA = make_split()
ITEMS = DATA.dataset.items


def circle(items: Sequence[Item]) -> np.ndarray:
    """Return a vector for each item; items with adjacent numbers have similar vectors."""
    angles = np.array([int(item.item_id[1:]) for item in items]) / 60 * np.pi
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


VECTORS = ItemVectors(ITEMS, circle)


def events(*numbers: int, ratings: Sequence[float] | None = None) -> tuple[Event, ...]:
    return tuple(
        Event(item_id=f"i{n:02d}", rating=None if ratings is None else ratings[index], timestamp=float(index))
        for index, n in enumerate(numbers)
    )


def past(rule: str, history: int = 3, templates: Sequence[Any] = ()) -> HistorySelector:
    return HistorySelector(RatingSection(past=rule, history=history), DATA.dataset, VECTORS, templates)  # type: ignore[arg-type]


def shown(history: Any) -> list[str]:
    return [event.item_id for event in history.events]


def test_latest_shows_the_last_events() -> None:
    assert shown(past("latest").show(events(1, 2, 3, 4, 5))) == ["i03", "i04", "i05"]
    assert past("latest").show(events(1, 2, 3, 4, 5)).summary == ""


def test_relevant_shows_nearest_and_latest_events() -> None:
    history = past("relevant").show(events(30, 9, 50, 11, 40, 20, 55), about=["i10"])
    assert shown(history) == ["i09", "i11", "i55"]
    # Without an item in the question, events similar to the latest one are shown.
    assert shown(past("relevant").show(events(30, 9, 50, 11, 40, 20, 12))) == ["i09", "i11", "i12"]
    # Similar to any of several items.
    assert shown(past("relevant").show(events(30, 9, 50, 20, 55), about=["i10", "i49"])) == ["i09", "i50", "i55"]


def test_short_history_is_shown_completely() -> None:
    for rule in ("latest", "relevant", "summary"):
        history = past(rule).show(events(5, 6, 7), about=["i01"])
        assert shown(history) == ["i05", "i06", "i07"] and history.summary == ""


def test_summary_describes_hidden_events() -> None:
    history = past("summary", 2).show(events(1, 2, 9, 10, 11, ratings=[5, 1, 3, 5, 1]))
    assert shown(history) == ["i10", "i11"]
    assert history.summary == (
        "3 earlier films; mostly Drama (3); rated 3.0 on average; liked best: Film #01!, Film #09!, Film #02!"
    )


def test_rules_that_lack_a_template_or_an_encoder_are_refused() -> None:
    templates = load_templates("direct")
    past("summary", templates=[templates["with-profile"]])
    with raises(RecipeError, Facts("contradiction", "direct/after-history", column="past", says="past=summary")):
        past("summary", templates=[templates["with-profile"], templates["after-history"]])
    with raises(RecipeError, Facts("unsupported", column="past", says="past=relevant")):
        HistorySelector(RatingSection(past="relevant"), DATA.dataset, None, ())


@pytest.mark.parametrize("family", ["rating", "direct", "sequential", "explanation", "ctr"])
def test_every_family_follows_the_rule(family: str) -> None:
    task, section = CLASSES[family]
    names = {"rating": "rate-next", "direct": "after-history", "sequential": "next-title"}
    chosen = {"templates": [names[family]]} if family in names else {}
    made = make(
        task, DATA, section(past="relevant", history=2, **chosen), load_templates(family), seed=0, vectors=VECTORS
    )
    request = Request(
        id="q",
        user_id="u01",
        history=tuple(Event(item_id=f"i{n}", rating=4.0, text=f"words {n}") for n in (21, 40, 41, 42, 22, 43, 44, 45)),
        item="i20",
        candidates=("i20", "i19") if family in ("direct", "sequential") else None,
    )
    text = prompt_text(made.prompt(request, template=made.eval_templates[0]))
    near = "44" if family == "sequential" else "21"
    assert f"Film #{near}!" in text and "Film #45!" in text
    assert not any(f"Film #{n}!" in text for n in (40, 41, 42, 43))


def test_training_rows_follow_the_rule() -> None:
    task, section = CLASSES["rating"]
    made = make(
        task,
        DATA,
        section(past="relevant", history=2, templates=["rate-next"]),
        load_templates("rating"),
        seed=0,
        vectors=VECTORS,
    )
    ratings = {(user, event.item_id): n for user in DATA.users() for n, event in enumerate(DATA.train_events(user))}
    jumped = 0
    for example in made.examples("train", 60):
        positions = [ratings[pair] for pair in example.pairs]
        assert positions == sorted(positions) and len(positions) <= 3
        jumped += len(positions) == 3 and positions[0] < positions[1] - 1
    assert jumped > 10


POOL = {
    "tens": events(9, 10, 11, 12),
    "also": events(10, 11, 12, 13),
    "forties": events(40, 41, 42, 43),
    "fifties": events(50, 51, 52, 53),
    "me": events(10, 11, 12, 13),
}


def pool(choice: str, pool: Any = POOL, **options: Any) -> ShotPool:
    return ShotPool("rating", pool, seed=0, choice=choice, least=1, vectors=VECTORS, **options)


def ask(user: str = "me") -> tuple[Request, tuple[Event, ...]]:
    history = events(10, 11, 12)
    return Request(id=f"{user}|z", user_id=user, history=history), history


def users(drawn: Any) -> list[str]:
    return [window.user_id for window in drawn.windows]


def test_nearest_and_diverse_begin_with_similar_users() -> None:
    assert set(users(pool("nearest").draw(*ask(), 2, 4))) == {"tens", "also"}
    first, second = users(pool("diverse").draw(*ask(), 2, 4))
    assert first in ("tens", "also") and second in ("forties", "fifties")


def test_recent_takes_latest_events() -> None:
    late = {
        user: tuple(Event(item_id=e.item_id, timestamp=100.0 * k + e.timestamp) for e in history)
        for k, (user, history) in enumerate(POOL.items())
    }
    drawn = pool("recent", late).draw(*ask(), 2, 4)
    assert users(drawn) == ["fifties", "forties"]
    assert [window.events[-1].item_id for window in drawn.windows] == ["i53", "i43"]


def test_balanced_takes_each_answer_equally_often() -> None:
    rated = {
        f"u{k}": events(*range(k, k + 6), ratings=[1.0 + (k + index) % 5 for index in range(6)]) for k in range(40)
    }
    balanced = pool("balanced", rated, label=lambda event: event.rating)
    firsts = set()
    for number in range(20):
        _, history = ask("u3")
        drawn = balanced.draw(Request(id=str(number), user_id="u3", history=history), history, 10, 4)
        answers = [window.events[-1].rating for window in drawn.windows]
        assert set(Counter(answers).values()) == {2} and "u3" not in users(drawn)
        firsts.add(answers[0])
    assert len(firsts) > 1


def test_balanced_skips_answers_without_examples() -> None:
    rated = {f"u{k}": events(1, 2, 3, ratings=[2.0, 4.0, 2.0]) for k in range(6)}
    rated["me"] = events(1, 2, 3, ratings=[1.0, 1.0, 1.0])
    balanced = pool("balanced", rated, label=lambda event: event.rating)
    _, history = ask()
    drawn = balanced.draw(Request(id="r", user_id="me", history=history), history, 4, 4)
    answers = [window.events[-1].rating for window in drawn.windows]
    assert Counter(answers) == {2.0: 2, 4.0: 2}
    with raises(DataError, Facts("too-few", column="eval.shots.k")):
        balanced.draw(Request(id="r", user_id="me", history=history), history, 7, 4)


def test_balanced_finds_the_only_other_user() -> None:
    rated = {"me": events(*range(50), ratings=[1.0] * 50), "other": events(1, ratings=[1.0])}
    balanced = pool("balanced", rated, label=lambda event: event.rating)
    _, history = ask()
    for number in range(40):
        drawn = balanced.draw(Request(id=str(number), user_id="me", history=history), history, 1, 4)
        assert users(drawn) == ["other"]


@pytest.mark.parametrize("choice", ["nearest", "diverse"])
def test_no_other_user_is_an_error(choice: str) -> None:
    with raises(DataError, Facts("too-few", column="eval.shots.k")):
        pool(choice, {"me": POOL["me"]}).draw(*ask(), 1, 4)


def test_unsupported_choices_are_refused() -> None:
    with raises(RecipeError, Facts("contradiction", column="eval.shots.choice", says="'balanced'")):
        pool("balanced")
    with raises(RecipeError, Facts("unsupported", column="eval.shots.choice", says="'nearest'")):
        ShotPool("rating", POOL, seed=0, choice="nearest", least=1)


@pytest.mark.parametrize("choice", ["nearest", "diverse", "recent"])
def test_users_are_no_examples_of_themselves(choice: str) -> None:
    for shots in (1, 4):
        assert "me" not in users(pool(choice).draw(*ask(), shots, 4))


def named_events(*items: str) -> tuple[Event, ...]:
    return tuple(Event(item_id=item) for item in items)


NAMED_POOL = {
    "near": named_events("a", "b", "c", "x"),
    "half": named_events("a", "b", "p", "q", "r"),
    "far": named_events("s", "t", "u"),
    "short": named_events("a"),
    "me": named_events("a", "b", "c", "d", "e", "f"),
}


def named_pool(choice: str, least: int = 2) -> ShotPool:
    return ShotPool("sequential", NAMED_POOL, seed=0, choice=choice, least=least)


def named_request(items: str = "abc", user: str = "me") -> tuple[Request, tuple[Event, ...]]:
    past = named_events(*items)
    return Request(id=f"{user}|z", user_id=user, history=past), past


def test_no_shots_show_the_latest_history() -> None:
    drawn = named_pool("own").draw(*named_request("abcdef"), 0, 3)
    assert drawn.windows == () and drawn.history == named_events("d", "e", "f")


def test_similar_takes_the_largest_overlap_first() -> None:
    drawn = named_pool("similar").draw(*named_request(), 2, 4)
    assert [window.user_id for window in drawn.windows] == ["near", "half"]
    # Jaccard: near 3/4, half 2/6; far shares nothing, so a third one is drawn at random from the rest.
    third = named_pool("similar").draw(*named_request(), 3, 4)
    assert [window.user_id for window in third.windows] == ["near", "half", "far"]
    unrelated = named_pool("similar").draw(*named_request("zzz", user="new"), 3, 4)
    assert len({window.user_id for window in unrelated.windows}) == 3


def test_own_cuts_earlier_windows_off_the_history() -> None:
    drawn = named_pool("own").draw(*named_request("abcdef"), 1, 4)
    (window,) = drawn.windows
    assert window.user_id == "me"
    assert window.events == named_events("a", "b", "c") and drawn.history == named_events("d", "e", "f")


def test_own_never_solves_an_event_outside_training() -> None:
    request, past = named_request("abcdefVW")
    drawn = named_pool("own").draw(request, past, 2, 4)
    windows = [window for window in drawn.windows if window.user_id == "me"]
    assert windows and not {"V", "W"} & {event.item_id for window in windows for event in window.events}
    stranger = named_pool("own").draw(replace(request, user_id="new"), past, 2, 4)
    assert all(window.user_id != "new" for window in stranger.windows) and stranger.history == past[-4:]


@pytest.mark.parametrize("choice", ["random", "own", "similar"])
def test_every_choice_gives_as_many_shots_as_asked(choice: str) -> None:
    for shots, length in itertools.product((1, 2, 3), range(7)):
        drawn = named_pool(choice).draw(*named_request("abcdef"[:length]), shots, 4)
        assert len(drawn.windows) == shots and len(drawn.history) <= 4
        assert all(2 <= len(window.events) <= 3 for window in drawn.windows)
        shown = [event for window in drawn.windows if window.user_id == "me" for event in window.events]
        assert len({*shown, *drawn.history}) == len(shown) + len(drawn.history)
        others = [window for window in drawn.windows if window.user_id != "me"]
        assert len({window.user_id for window in others}) == len(others)
        assert all(len(window.events) == 3 and window.user_id != "short" for window in others)
