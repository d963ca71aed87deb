"""Templates like M6-Rec's: statistics as text, which count only training interactions and never the one in question."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import polars as pl
import pytest
from task_data import FAMILIES, example_text, load_templates, make_dataset, make_split, make_task, prompt_text, targets

from llmrec.data.split import SplitDataset
from llmrec.data.stats import RatingSummaries, RatingSummary
from llmrec.errors import RecipeError
from llmrec.prompts.template import Template
from llmrec.recipe.schema import RatingSection
from llmrec.tasks.rating import RatingTask
from llmrec.types import Example, Request
from tests.facts import Facts, raises
from tests.tasks.making import make

DATA = make_split(make_dataset(hostile=False))
M6 = [template for family in FAMILIES for template in load_templates(family).values() if template.set == "m6"]
NAMED, UNSEEN = ([(t.family, t.name) for t in M6 if t.use == use] for use in ("named", "unseen"))


def rows_of(family: str, name: str, data: SplitDataset = DATA, **section: Any) -> Iterator[Example]:
    return make_task(family, data, templates=(name,), **section).examples("train")


def times(ratings: list[float]) -> str:
    return "once" if len(ratings) == 1 else f"{len(ratings)} times"


def mean(ratings: list[float]) -> str:
    """Return the mean, rounded to half points; a tie goes to the even number of halves."""
    return f"{round(2 * sum(ratings) / len(ratings)) / 2:.1f}"


def ratings_of(data: SplitDataset, user: str, item: str) -> list[float]:
    """Return the training ratings of an item without the user's, from the table and not by the code under test."""
    rows = data.train.select("user_id", "item_id", "rating").iter_rows()
    return [rating for each, one, rating in rows if one == item and each != user]


def ratings_by(data: SplitDataset, user: str, item: str) -> list[float]:
    """Return the training ratings of a user, without those of an item."""
    rows = data.train.select("user_id", "item_id", "rating").iter_rows()
    return [rating for each, one, rating in rows if each == user and one != item]


def test_set_trains_its_named_templates_and_shows_no_ids_or_held_out_pairs() -> None:
    for family in FAMILIES:
        task = make_task(family, DATA, templates=("m6",))
        rows = list(islice(task.examples("train"), 60))
        assert {row.template for row in rows} == {f"{family}/{name}" for other, name in NAMED if other == family}
        for row in rows:
            held = {item for user, item in DATA.held_out if user == row.user_id} - set(row.negatives)
            assert not any(f"Film #{item[1:]}!" in example_text(row) for item in held)
            assert row.pairs and not set(row.pairs) & DATA.held_out
        assert any(user == row.user_id for user, _ in DATA.held_out for row in rows)
    for template in M6:
        assert not template.names("system", "user", "lead", "target") & {"user_id", "item_id", "user_name"}
        assert not template.writes_codes


@pytest.mark.parametrize(("family", "name"), [each for each in NAMED if each[0] in ("rating", "ctr", "stars")])
def test_row_text_does_not_depend_on_its_rating(family: str, name: str) -> None:
    """A different rating in the training data changes the answer of a row, but not its prompt."""
    user, moved_at_all = "u03", 0
    for event in DATA.train_events(user)[:2]:
        this = (pl.col("user_id") == user) & (pl.col("item_id") == event.item_id)
        rating = pl.when(this).then(5.0 if event.rating != 5 else 1.0).otherwise(pl.col("rating"))
        moved = replace(DATA, train=DATA.train.with_columns(rating=rating))
        before, after = (
            [
                row
                for row in islice(rows_of(family, name, data), 120 if "lines" in name else 400)
                if row.user_id == user and about(row, event.item_id)
            ]
            for data in (DATA, moved)
        )
        for one, other in zip(before, after, strict=True):
            assert one.messages == other.messages
            texts = [[s.text for s in row.answer if s.kind != "target"] for row in (one, other)]
            assert texts[0] == texts[1]
            moved_at_all += targets(one) != targets(other)
    assert moved_at_all


def about(row: Example, item: str) -> bool:
    """Whether a row trains on the rating of an item; a chat row trains only on its last one."""
    learned = row.pairs[-1:] if row.ends_turn else row.pairs
    return item in {each for _, each in learned}


@pytest.mark.parametrize(("family", "name"), [each for each in NAMED if each[0] in ("rating", "ctr", "explanation")])
def test_statistics_leave_out_own_interaction(family: str, name: str) -> None:
    for row in islice(rows_of(family, name), 120):
        user, item = row.pairs[-1]
        text, ratings, user_ratings = example_text(row), ratings_of(DATA, user, item), ratings_by(DATA, user, item)
        if row.ends_turn:
            statistics = (
                f" Others chose it {times(ratings)} and rated it about {mean(ratings)} on average." if ratings else ""
            )
            assert f"year {1950 + int(item[1:])}).{statistics}\n" in text
            assert ("person chose:" in text) == bool(user_ratings)
            if user_ratings:
                assert f"person chose: {len(user_ratings)}, rated about {mean(user_ratings)} on average." in text
        else:
            statistics = f", chosen by others {times(ratings)}, rated about {mean(ratings)}" if ratings else ""
            assert f"Film #{item[1:]}! (genres Drama, year {1950 + int(item[1:])}){statistics}: " in text


def test_candidate_statistics_leave_out_the_user() -> None:
    statistics = r"chosen by others (once|\d+ times), rated about ([\d.]+) on average"
    pattern = re.compile(rf"^[A-T]\. Film #(\d\d)! \(Drama; \d+\)(?:, {statistics})?$")
    marked = 0
    for row in islice(rows_of("direct", "m6-choose"), 40):
        for line in row.messages[-1].text.splitlines():
            if match := pattern.match(line):
                ratings = ratings_of(DATA, row.user_id, f"i{match[1]}")
                assert match[2] == (times(ratings) if ratings else None)
                assert match[3] == (mean(ratings) if ratings else None)
                marked += f"i{match[1]}" == row.pairs[-1][1]
    assert marked == 40


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_leave_out_held_out_interactions(family: str) -> None:
    """Rows and prompts do not depend on ratings of the validation split and on interactions of the test split."""
    data, less = DATA, replace(DATA, valid=DATA.valid.with_columns(rating=pl.lit(1.0)), test=DATA.test[::2])
    tasks = [make_task(family, used, stored=False) for used in (data, less)]
    for name in [name for each, name in (*NAMED, *UNSEEN) if each == family]:
        for held in data.holdouts("test")[:4]:
            # Not the history of the test split, which contains a validation event and its rating.
            request = Request(
                id="r",
                user_id=held.user_id,
                history=data.history(held.user_id, "valid"),
                item=held.item_id,
                candidates=("i07", held.item_id, "i08"),
                context={"review": "Fine."},
            )
            first, second = (prompt_text(task.prompt(request, template=name)) for task in tasks)
            assert first == second
    chosen = [name for each, name in NAMED if each == family]
    rows = [list(islice(rows_of(family, name, used), 60)) for used in (data, less) for name in chosen]
    assert rows[: len(chosen)] == rows[len(chosen) :]


def test_list_cannot_show_user_statistics() -> None:
    """They would differ between lines, and so reveal the ratings of the lines."""
    for part in ("user", "lead"):
        words = {"user": "Rate.", "lead": "{{ item.title }}: ", part: "{{ user_stats.mean }}: "}
        listed = Template(
            family="rating", name="x", version=1, use="seen", shape="list", target="{{ rating }}", tail="\n", **words
        )
        with raises(RecipeError, Facts("unknown-name", "rating/x", column=part, says="'user_stats'")):
            make(RatingTask, DATA, RatingSection(), {"x": listed}, seed=0)


def test_tallies_with_repeats_and_missing_ratings() -> None:
    rows = [("a", "x", 4.0), ("a", "x", 2.0), ("b", "x", None), ("b", "y", None), ("c", "x", 5.0)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "rating"], orient="row").with_columns(
        timestamp=pl.lit(None, dtype=pl.Float64), text=pl.lit(None, dtype=pl.String)
    )
    tallies = RatingSummaries(replace(DATA, train=frame))
    assert tallies.item("x", "c").shown == {"count": 3, "mean": "3.0"}
    assert tallies.item("x", "a").shown == {"count": 2, "mean": "5.0"}
    assert tallies.item("y", "b").shown is None
    assert tallies.item("y", "a").shown == {"count": 1, "mean": None}
    assert tallies.item("unknown", "a").shown is None
    assert tallies.user("a", ["x"]).shown is None
    assert tallies.user("b", ["y"]).shown == {"count": 1, "mean": None}
    assert tallies.user("a", []).shown == {"count": 2, "mean": "3.0"}
    assert RatingSummary(3, 3, 11.0).shown == {"count": 3, "mean": "3.5"}
    assert RatingSummary(7, 7, 3.7 * 7).shown == {"count": 7, "mean": "3.5"}


def test_yes_and_no_examples_leave_out_the_same() -> None:
    task = make_task("direct", DATA)
    for case in task.cases("test")[:10]:
        request = replace(case.request, candidates=case.request.candidates[:1])
        windows = task.draw_shots(request, 2).windows
        messages = task.prompt(request, template="m6-choose", shots=2, want="yes").messages
        for index, window in enumerate(windows):
            count = len(ratings_by(DATA, window.user_id, window.events[-1].item_id))
            assert f"person chose: {count}, rated" in messages[2 * index].text
