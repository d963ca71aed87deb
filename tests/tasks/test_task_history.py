"""What of a long history a prompt shows, and few-shot examples chosen by text, by time and by answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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
    """A direction for each item, so that items of neighbouring numbers lie near each other."""
    angles = np.array([int(item.item_id[1:]) for item in items]) / 60 * np.pi
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


VECTORS = ItemVectors(ITEMS, circle)


def events(*numbers: int, ratings: Sequence[float] | None = None) -> tuple[Event, ...]:
    return tuple(
        Event(item_id=f"i{n:02d}", rating=None if ratings is None else ratings[place], timestamp=float(place))
        for place, n in enumerate(numbers)
    )


def past(rule: str, history: int = 3, templates: Sequence[Any] = ()) -> HistorySelector:
    return HistorySelector(RatingSection(past=rule, history=history), DATA.dataset, VECTORS, templates)  # type: ignore[arg-type]


def shown(found: Any) -> list[str]:
    return [event.item_id for event in found.events]


def test_latest_shows_whole_events_from_the_end() -> None:
    assert shown(past("latest").show(events(1, 2, 3, 4, 5))) == ["i03", "i04", "i05"]
    assert past("latest").show(events(1, 2, 3, 4, 5)).summary == ""


def test_relevant_shows_the_nearest_and_the_latest_in_order_of_time() -> None:
    found = past("relevant").show(events(30, 9, 50, 11, 40, 20, 55), about=["i10"])
    assert shown(found) == ["i09", "i11", "i55"]
    # Without an item in the question, what is near the latest event.
    assert shown(past("relevant").show(events(30, 9, 50, 11, 40, 20, 12))) == ["i09", "i11", "i12"]
    # Near any of several items.
    assert shown(past("relevant").show(events(30, 9, 50, 20, 55), about=["i10", "i49"])) == ["i09", "i50", "i55"]


def test_a_short_history_is_shown_whole_by_every_rule() -> None:
    for rule in ("latest", "relevant", "summary"):
        found = past(rule).show(events(5, 6, 7), about=["i01"])
        assert shown(found) == ["i05", "i06", "i07"] and found.summary == ""


def test_summary_tells_of_the_events_that_are_not_shown_and_of_no_other() -> None:
    found = past("summary", 2).show(events(1, 2, 9, 10, 11, ratings=[5, 1, 3, 5, 1]))
    assert shown(found) == ["i10", "i11"]
    assert found.summary == (
        "3 earlier films; mostly Drama (3); rated 3.0 on average; liked best: Film #01!, Film #09!, Film #02!"
    )


def test_summary_needs_a_place_in_the_templates() -> None:
    templates = load_templates("direct")
    past("summary", templates=[templates["with-profile"]])
    with raises(RecipeError, Facts("contradiction", "direct/after-history", column="past", says="past=summary")):
        past("summary", templates=[templates["with-profile"], templates["after-history"]])


def test_relevant_needs_an_encoder() -> None:
    with raises(RecipeError, Facts("unsupported", column="past", says="past=relevant")):
        HistorySelector(RatingSection(past="relevant"), DATA.dataset, None, ())


@pytest.mark.parametrize("family", ["rating", "direct", "sequential", "explanation", "ctr"])
def test_every_family_shows_what_the_rule_chooses(family: str) -> None:
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


def test_training_rows_follow_the_rule_too() -> None:
    task, section = CLASSES["rating"]
    made = make(
        task,
        DATA,
        section(past="relevant", history=2, templates=["rate-next"]),
        load_templates("rating"),
        seed=0,
        vectors=VECTORS,
    )
    ratings = {
        (user, event.item_id): place for user in DATA.users() for place, event in enumerate(DATA.train_events(user))
    }
    jumped = 0
    for example in made.examples("train", 60):
        places = [ratings[pair] for pair in example.pairs]
        assert places == sorted(places) and len(places) <= 3
        jumped += len(places) == 3 and places[0] < places[1] - 1
    assert jumped > 10


# --------------------------------------------------------------------------- few-shot choices

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


def test_nearest_takes_the_users_whose_items_read_alike() -> None:
    assert set(users(pool("nearest").draw(*ask(), 2, 4))) == {"tens", "also"}


def test_diverse_begins_with_the_nearest_and_goes_on_with_others() -> None:
    found = users(pool("diverse").draw(*ask(), 2, 4))
    assert found[0] in ("tens", "also") and found[1] in ("forties", "fifties")


def test_recent_ends_with_the_latest_events_of_all() -> None:
    late = {
        user: tuple(Event(item_id=e.item_id, timestamp=100.0 * k + e.timestamp) for e in own)
        for k, (user, own) in enumerate(POOL.items())
    }
    found = pool("recent", late).draw(*ask(), 2, 4)
    assert users(found) == ["fifties", "forties"]
    assert [window.events[-1].item_id for window in found.windows] == ["i53", "i43"]


def test_balanced_has_every_answer_equally_often_and_in_no_fixed_order() -> None:
    rated = {
        f"u{k}": events(*range(k, k + 6), ratings=[1.0 + (k + place) % 5 for place in range(6)]) for k in range(40)
    }
    made = pool("balanced", rated, label=lambda event: event.rating)
    firsts = set()
    for number in range(20):
        _, history = ask("u3")
        drawn = made.draw(Request(id=str(number), user_id="u3", history=history), history, 10, 4)
        answers = [window.events[-1].rating for window in drawn.windows]
        assert set(Counter(answers).values()) == {2} and "u3" not in users(drawn)
        firsts.add(answers[0])
    assert len(firsts) > 1


def test_an_answer_that_nobody_else_gives_leaves_its_turn_to_the_next() -> None:
    rated = {f"u{k}": events(1, 2, 3, ratings=[2.0, 4.0, 2.0]) for k in range(6)}
    rated["me"] = events(1, 2, 3, ratings=[1.0, 1.0, 1.0])
    made = pool("balanced", rated, label=lambda event: event.rating)
    _, history = ask()
    answers = [
        w.events[-1].rating for w in made.draw(Request(id="r", user_id="me", history=history), history, 4, 4).windows
    ]
    assert Counter(answers) == {2.0: 2, 4.0: 2}
    with raises(DataError, Facts("too-few", column="eval.shots.k")):
        made.draw(Request(id="r", user_id="me", history=history), history, 7, 4)


def test_balanced_finds_the_few_others_beside_one_who_has_nearly_all() -> None:
    rated = {"me": events(*range(50), ratings=[1.0] * 50), "other": events(1, ratings=[1.0])}
    made = pool("balanced", rated, label=lambda event: event.rating)
    _, history = ask()
    for number in range(40):
        drawn = made.draw(Request(id=str(number), user_id="me", history=history), history, 1, 4)
        assert users(drawn) == ["other"]


@pytest.mark.parametrize("choice", ["nearest", "diverse"])
def test_texts_of_nobody_else_are_too_few(choice: str) -> None:
    with raises(DataError, Facts("too-few", column="eval.shots.k")):
        pool(choice, {"me": POOL["me"]}).draw(*ask(), 1, 4)


def test_balanced_needs_few_answers_and_texts_need_an_encoder() -> None:
    with raises(RecipeError, Facts("contradiction", column="eval.shots.choice", says="'balanced'")):
        pool("balanced")
    with raises(RecipeError, Facts("unsupported", column="eval.shots.choice", says="'nearest'")):
        ShotPool("rating", POOL, seed=0, choice="nearest", least=1)


@pytest.mark.parametrize("choice", ["nearest", "diverse", "recent"])
def test_a_user_is_never_an_example_of_their_own_question(choice: str) -> None:
    for shots in (1, 4):
        assert "me" not in users(pool(choice).draw(*ask(), shots, 4))
