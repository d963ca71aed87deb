"""M6-Rec's manner: statistics as text, which count training interactions alone and never those of the question."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import polars as pl
import pytest
from task_data import (
    CLASSES,
    FAMILIES,
    example_text,
    load_templates,
    make_candidates,
    make_dataset,
    make_split,
    make_task,
    prompt_text,
    targets,
)

from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset, split
from llmrec.data.stats import Tallies, Tally
from llmrec.errors import RecipeError
from llmrec.prompts.template import Template
from llmrec.recipe.schema import RatingSection, Split
from llmrec.tasks.rating import RatingTask
from llmrec.types import Example, Item, Request
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
    """In half points, a tie to the even number of halves."""
    return f"{round(2 * sum(ratings) / len(ratings)) / 2:.1f}"


def others(data: SplitDataset, user: str, item: str) -> list[float]:
    """Ratings of an item in training, without the user's: counted from the table, not by the code under test."""
    rows = data.train.select("user_id", "item_id", "rating").iter_rows()
    return [rating for each, one, rating in rows if one == item and each != user]


def own(data: SplitDataset, user: str, item: str) -> list[float]:
    """Ratings by a user in training, without those of an item."""
    rows = data.train.select("user_id", "item_id", "rating").iter_rows()
    return [rating for each, one, rating in rows if each == user and one != item]


def lonely() -> SplitDataset:
    """Nine users rate six common items, and each one item that nobody else has; what is held out is common."""
    rows = []
    for user in range(9):
        mine = [(f"only{user}", float(1 + user % 5))] + [(f"c{n}", float(1 + (user + n) % 5)) for n in range(6)]
        rows += [(f"u{user}", item, rating, float(when), "said") for when, (item, rating) in enumerate(mine)]
    items = {item: Item(item_id=item, title=f"Title {item}") for _, item, *_ in rows}
    return split(
        Dataset(
            name="lonely",
            noun="films",
            interactions=pl.DataFrame(rows, schema=["user_id", "item_id", "rating", "timestamp", "text"], orient="row"),
            items=items,
            rating_scale=(1.0, 5.0),
        ),
        Split(),
        seed=0,
    )


# --------------------------------------------------------------------------- the set


def test_every_family_has_a_template_to_train_on_and_one_that_never_trains() -> None:
    assert {family for family, _ in NAMED} == {family for family, _ in UNSEEN} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_names_the_whole_set(family: str) -> None:
    task = make_task(family, DATA, templates=("m6",))
    trained = {row.template for row in islice(task.examples("train"), 60)}
    assert trained == {f"{family}/{name}" for each, name in NAMED if each == family}
    default = make_task(family, DATA)
    assert not any("/m6-" in row.template for row in islice(default.examples("train"), 200))


@pytest.mark.parametrize(("family", "name"), [*NAMED, *UNSEEN])
def test_no_id_and_no_code_is_shown(family: str, name: str) -> None:
    template = load_templates(family)[name]
    assert not template.names("system", "user", "lead", "target") & {"user_id", "item_id", "user_name"}
    assert not template.writes_codes


# --------------------------------------------------------------------------- what statistics count


@pytest.mark.parametrize(("family", "name"), [each for each in NAMED if each[0] in ("rating", "ctr", "stars")])
def test_the_words_of_a_row_do_not_move_with_its_rating(family: str, name: str) -> None:
    """The same rows over data in which one training rating is another: that row's question stays, its answer moves."""
    user, moved_at_all = "u03", 0
    for event in DATA.train_events(user)[:2]:
        this = (pl.col("user_id") == user) & (pl.col("item_id") == event.item_id)
        rating = pl.when(this).then(5.0 if event.rating != 5 else 1.0).otherwise(pl.col("rating"))
        moved = replace(DATA, train=DATA.train.with_columns(rating=rating))
        before, after = (
            [
                row
                for row in islice(rows_of(family, name, data), 400)
                if row.user_id == user and about(row, event.item_id)
            ]
            for data in (DATA, moved)
        )
        for one, other in zip(before, after, strict=True):
            assert one.messages == other.messages
            given = [[s.text for s in row.answer if s.kind != "target"] for row in (one, other)]
            assert given[0] == given[1]
            moved_at_all += targets(one) != targets(other)
    assert moved_at_all


def about(row: Example, item: str) -> bool:
    """Whether a row's rating of an item is learned: in a chat that of the last one."""
    learned = row.pairs[-1:] if row.ends_turn else row.pairs
    return item in {each for _, each in learned}


@pytest.mark.parametrize(("family", "name"), [each for each in NAMED if each[0] in ("rating", "ctr", "direct")])
def test_an_item_that_one_user_chose_has_no_statistics_in_that_row(family: str, name: str) -> None:
    data = lonely()
    kind, section = CLASSES[family]
    sets = make_candidates(data, count=4) if family == "direct" else None
    task = make(kind, data, section(templates=(name,)), load_templates(family), seed=0, candidates=sets)
    seen = 0
    for row in islice(task.examples("train"), 300):
        alone = f"Title only{row.user_id[1]}"
        if alone not in example_text(row):
            continue
        line = [each for each in example_text(row).splitlines() if re.search(rf"(^|: |\. ){alone}\b", each)][-1]
        assert "thers" not in line, line
        seen += 1
    assert seen > 5


@pytest.mark.parametrize(("family", "name"), [each for each in NAMED if each[0] in ("rating", "ctr", "explanation")])
def test_statistics_are_counts_and_means_of_the_other_training_interactions(family: str, name: str) -> None:
    for row in islice(rows_of(family, name), 120):
        user, item = row.pairs[-1]
        text, ratings, mine = example_text(row), others(DATA, user, item), own(DATA, user, item)
        if row.ends_turn:
            told = (
                f" Others chose it {times(ratings)} and rated it about {mean(ratings)} on average." if ratings else ""
            )
            assert f"year {1950 + int(item[1:])}).{told}\n" in text
            assert ("person chose:" in text) == bool(mine)
            assert not mine or f"person chose: {len(mine)}, rated about {mean(mine)} on average." in text
        else:
            told = f", chosen by others {times(ratings)}, rated about {mean(ratings)}" if ratings else ""
            assert f"Film #{item[1:]}! (genres Drama, year {1950 + int(item[1:])}){told}: " in text


def test_candidates_of_a_row_leave_the_user_out() -> None:
    statistics = r"chosen by others (once|\d+ times), rated about ([\d.]+) on average"
    pattern = re.compile(rf"^[A-T]\. Film #(\d\d)! \(Drama; \d+\)(?:, {statistics})?$")
    marked = 0
    for row in islice(rows_of("direct", "m6-choose"), 40):
        for line in row.messages[-1].text.splitlines():
            if match := pattern.match(line):
                ratings = others(DATA, row.user_id, f"i{match[1]}")
                assert match[2] == (times(ratings) if ratings else None)
                assert match[3] == (mean(ratings) if ratings else None)
                marked += f"i{match[1]}" == row.pairs[-1][1]
    assert marked == 40


@pytest.mark.parametrize("kind", ["leave_one_out", "user_disjoint"])
@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_interactions_are_in_no_statistic(family: str, kind: str) -> None:
    """Rows and questions stay as they are when every held-out rating is another and half of them are gone."""
    data = make_split(make_dataset(hostile=False), kind=kind)
    less = replace(data, valid=data.valid.with_columns(rating=pl.lit(1.0)), test=data.test[::2])
    tasks = [make_task(family, used, stored=False) for used in (data, less)]
    for name in [name for each, name in (*NAMED, *UNSEEN) if each == family]:
        for held in data.holdouts("test")[:4]:
            # Not the history of the test split, which shows a validation event and its rating.
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


@pytest.mark.parametrize(("family", "name"), NAMED)
def test_no_row_shows_a_held_out_pair(family: str, name: str) -> None:
    for row in islice(rows_of(family, name), 400):
        held = {item for user, item in DATA.held_out if user == row.user_id} - set(row.negatives)
        assert not any(f"Film #{item[1:]}!" in example_text(row) for item in held)
        assert row.pairs and not set(row.pairs) & DATA.held_out


def test_nothing_is_said_of_strangers() -> None:
    for family, name in (*NAMED, *UNSEEN):
        task = make_task(family, DATA, stored=False)
        request = Request(
            id="r", user_id="nobody", item="i20", candidates=("i20", "i21"), history=(), context={"review": "Fine."}
        )
        text = prompt_text(task.prompt(request, template=name))
        assert "person chose:" not in text and "How many" not in text and "None" not in text


# --------------------------------------------------------------------------- the parts


def test_a_list_may_not_show_statistics_of_the_user() -> None:
    """From line to line they would differ by the ratings of the lines."""
    for part in ("user", "lead"):
        words = {"user": "Rate.", "lead": "{{ item.title }}: ", part: "{{ user_stats.mean }}: "}
        listed = Template(
            family="rating", name="x", version=1, use="seen", shape="list", target="{{ rating }}", tail="\n", **words
        )
        with raises(RecipeError, Facts("unknown-name", "rating/x", column=part, says="'user_stats'")):
            make(RatingTask, DATA, RatingSection(), {"x": listed}, seed=0)


def test_tallies_of_repeats_and_of_no_rating() -> None:
    rows = [("a", "x", 4.0), ("a", "x", 2.0), ("b", "x", None), ("b", "y", None), ("c", "x", 5.0)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "rating"], orient="row").with_columns(
        timestamp=pl.lit(None, dtype=pl.Float64), text=pl.lit(None, dtype=pl.String)
    )
    tallies = Tallies(replace(DATA, train=frame))
    assert tallies.item("x", "c").shown == {"count": 3, "mean": "3.0"}
    assert tallies.item("x", "a").shown == {"count": 2, "mean": "5.0"}
    assert tallies.item("y", "b").shown is None
    assert tallies.item("y", "a").shown == {"count": 1, "mean": None}
    assert tallies.item("unknown", "a").shown is None
    assert tallies.user("a", ["x"]).shown is None
    assert tallies.user("b", ["y"]).shown == {"count": 1, "mean": None}
    assert tallies.user("a", []).shown == {"count": 2, "mean": "3.0"}
    assert Tally(3, 3, 11.0).shown == {"count": 3, "mean": "3.5"}
    assert Tally(7, 7, 3.7 * 7).shown == {"count": 7, "mean": "3.5"}


def test_an_example_of_a_yes_and_one_of_a_no_leave_out_the_same() -> None:
    task = make_task("direct", DATA)
    for case in task.cases("test")[:10]:
        asked = replace(case.request, candidates=case.request.candidates[:1])
        windows = task.draw_shots(asked, 2).windows
        messages = task.prompt(asked, template="m6-choose", shots=2, want="yes").messages
        for place, window in enumerate(windows):
            count = len(own(DATA, window.user_id, window.events[-1].item_id))
            assert f"person chose: {count}, rated" in messages[2 * place].text
