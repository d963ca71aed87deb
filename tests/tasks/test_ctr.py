"""The yes/no task: what is asked, what balanced sets leave to know, and what a prompt must not show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from task_data import example_text, load_templates, make_dataset, make_task, prompt_text, targets

from llmrec.baselines.yes_no import LikeRatio
from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset, split
from llmrec.errors import DataError, RecipeError
from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.predictor import Evaluated, evaluate
from llmrec.prompts.template import Template
from llmrec.recipe.schema import CtrSection, Split
from llmrec.tasks.ctr import CtrTask, read_choice
from llmrec.tasks.family import family_of
from llmrec.tasks.pool import pool
from llmrec.types import Answer, Case, Event, Item, Probability, Request, Unparsed
from tests.facts import Facts, raises
from tests.tasks.making import make

DATA = split(make_dataset(hostile=False), Split(kind="last_share", valid=0.2, test=0.3), seed=0)
PROTOCOL = EvalProtocol(split="last_share/test", candidates="full", cutoffs=(10,), resamples=50, seed=0, catalogue=60)


def balanced(data: SplitDataset = DATA, **section: Any) -> CtrTask:
    return make_task("ctr", data, balance="user", **section)  # type: ignore[no-any-return]


class Oracle:
    """Answers from what it is told of each request."""

    name = "oracle"

    def __init__(self, say: Callable[[Request], float | None]) -> None:
        self._say = say

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        found = [(request.id, self._say(request)) for request in requests]
        return [
            Unparsed(request_id=name, reason="mute") if said is None else Probability(request_id=name, value=said)
            for name, said in found
        ]


def measured(cases: Sequence[Case], predictor: Any) -> Evaluated:
    return evaluate(predictor, cases, name="ctr", kind=family_of("ctr").answer, protocol=PROTOCOL)


def value(found: Evaluated, metric: str) -> float:
    return float(found.figures.metrics[metric].value)


# --------------------------------------------------------------------------- cases


def test_a_truth_is_whether_the_rating_reaches_the_border() -> None:
    ratings = {row[:2]: row[2] for row in DATA.dataset.interactions.select("user_id", "item_id", "rating").iter_rows()}
    for task, border in ((make_task("ctr", DATA), 4.0), (make_task("ctr", DATA, liked=2.0), 2.0)):
        cases = task.cases("test")
        assert len(cases) == len(DATA.test)
        for case in cases:
            rated = ratings[case.request.user_id, str(case.request.item)]
            assert case.truth == float(rated >= border)
            assert case.request.history == DATA.history(case.request.user_id, "test")


@pytest.mark.parametrize("per_user", [None, 2, 4, 5])
def test_balanced_cases_have_as_many_yes_as_no_of_each_user(per_user: int | None) -> None:
    everything = Counter((c.request.user_id, c.truth) for c in make_task("ctr", DATA).cases("test"))
    found = Counter((c.request.user_id, c.truth) for c in balanced(per_user=per_user).cases("test"))
    users = {user for user, _ in everything}
    assert sum(found.values()) > 20
    for user in users:
        rarer = min(everything[user, 0.0], everything[user, 1.0])
        assert found[user, 0.0] == found[user, 1.0] == min(rarer, (per_user or 999) // 2)


def test_balanced_cases_are_a_part_of_all_cases_in_the_same_order() -> None:
    names = [case.request.id for case in make_task("ctr", DATA).cases("test")]
    kept = [case.request.id for case in balanced().cases("test")]
    assert kept == [name for name in names if name in set(kept)]
    few = [case.request.id for case in make_task("ctr", DATA, per_user=2).cases("test")]
    assert max(Counter(name.partition("|")[0] for name in few).values()) == 2


def test_an_interaction_without_a_rating_is_no_case() -> None:
    frame = DATA.dataset.interactions.with_columns(
        rating=pl.when(pl.col("item_id") < "i30").then(pl.col("rating")).otherwise(None)
    )
    data = split(DATA.dataset.restrict(frame), Split(kind="last_share", valid=0.2, test=0.3), seed=0)
    task = make_task("ctr", data)
    assert {case.request.item for case in task.cases("test")} < {row for row in data.test["item_id"]}
    assert all(str(case.request.item) < "i30" for case in task.cases("test"))
    assert all(item < "i30" for row in islice(task.examples("train"), 200) for _, item in row.pairs)


def test_a_balanced_set_takes_several_events_a_user() -> None:
    data = split(make_dataset(hostile=False), Split(), seed=0)
    with raises(DataError, Facts("too-few", column="tasks.ctr.balance", says="data.split.kind=last_share")):
        balanced(data).cases("test")
    bare = make_dataset().restrict(make_dataset().interactions.with_columns(rating=pl.lit(None, pl.Float64)))
    with raises(DataError, Facts("missing-column", "small", column="rating", says="data.columns.rating")):
        make_task("ctr", split(bare, Split(), seed=0))


# --------------------------------------------------------------------------- what balanced figures mean


def test_the_like_ratio_knows_nothing_of_balanced_sets() -> None:
    ratio = LikeRatio()
    ratio.fit(DATA)
    found = measured(balanced().cases("test"), ratio)
    assert value(found, "GAUC") == 0.5
    assert value(found, "AUC") == pytest.approx(0.5, abs=1e-12)
    assert found.figures.users_left_out == 0
    # Where sets are not balanced it does know something, or the test above would say nothing about balance. A user's
    # ratings are drawn from one distribution here, so that this takes users of different levels.
    frame = DATA.dataset.interactions.with_columns(
        rating=pl.when(pl.col("user_id") < "u20").then(pl.max_horizontal("rating", pl.lit(3.0)) + 1).otherwise("rating")
    )
    levels = split(DATA.dataset.restrict(frame), Split(kind="last_share", valid=0.2, test=0.3), seed=0)
    ratio.fit(levels)
    assert value(measured(make_task("ctr", levels).cases("test"), ratio), "AUC") > 0.7
    assert value(measured(balanced(levels).cases("test"), ratio), "AUC") == pytest.approx(0.5, abs=1e-12)


def test_an_oracle_a_yes_sayer_and_one_who_says_nothing() -> None:
    cases = balanced().cases("test")
    truth = {case.request.id: float(case.truth) for case in cases}
    oracle = measured(cases, Oracle(lambda request: 0.5 + 0.1 * (truth[request.id] - 0.5)))
    assert value(oracle, "AUC") == value(oracle, "GAUC") == 1.0
    for said in (1.0, 0.3, None):
        found = measured(cases, Oracle(lambda request, said=said: said))  # type: ignore[misc]
        assert value(found, "AUC") == value(found, "GAUC") == 0.5
        assert found.figures.parse_rate == (0.0 if said is None else 1.0)
    # One who is right wherever it answers and mute elsewhere has half of the comparisons with the mute ones, no more.
    halves = measured(cases, Oracle(lambda request: truth[request.id] if request.id < "u20" else None))
    assert 0.5 < value(halves, "AUC") < 1.0
    assert halves.figures.n == len(cases)


# --------------------------------------------------------------------------- rows and prompts


def test_rows_show_likes_and_dislikes_and_never_the_item_that_is_judged() -> None:
    task = make_task("ctr", DATA, history=6)
    seen = Counter[str]()
    for row in islice(task.examples("train"), 600):
        rated = {event.item_id: float(event.rating or 0) for event in DATA.train_events(row.user_id)}
        (*past, asked) = [item for _, item in row.pairs]
        assert asked not in past and len(past) <= 6
        assert targets(row) == ["Yes" if rated[asked] >= 4 else "No"]
        assert task.kind(row) == targets(row)[0]
        seen[targets(row)[0]] += 1
        text = example_text(row)
        assert text.count(f"Film #{asked[1:]}!") == 1
        if row.template == "ctr/by-taste":
            lists = text.partition("Disliked films")
            assert [item for item in past if f"Film #{item[1:]}!" in lists[0]] == [i for i in past if rated[i] >= 4]
            assert [i for i in past if f"- Film #{i[1:]}!" in lists[2]] == [i for i in past if rated[i] < 4]
    assert min(seen.values()) > 100 and set(seen) == {"Yes", "No"}


def test_every_template_of_a_request_shows_the_same_likes_and_no_held_out_pair() -> None:
    task = balanced(history=8)
    for case in task.cases("test"):
        held = {item for user, item in DATA.held_out if user == case.request.user_id}
        known = {event.item_id for event in DATA.history(case.request.user_id, "test")}
        for name, template in load_templates("ctr").items():
            text = prompt_text(task.prompt(case.request, template=name))
            shown = {f"i{n:02d}" for n in range(60) if f"Film #{n:02d}!" in text}
            assert shown - {case.request.item} <= known
            asked = {case.request.item} if template.writes_titles else set()
            assert shown & (held - known) == asked


def test_a_request_that_knows_its_own_answer_does_not_show_it() -> None:
    task = make_task("ctr", DATA)
    request = Request(
        id="r", user_id="u00", item="i01",
        history=(Event(item_id="i01", rating=5.0), Event(item_id="i02", rating=1.0), Event(item_id="i03")),
    )  # fmt: skip
    text = prompt_text(task.prompt(request, template="by-taste"))
    assert "Liked" not in text and text.count("Film #01!") == 1
    assert "Film #02!" in text and "Film #03!" not in text


def test_a_title_that_is_rated_again_is_not_shown_before_the_question() -> None:
    rows = [("u", "a", 5.0, 1.0), ("u", "b", 1.0, 2.0), ("u", "a", 2.0, 3.0)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "rating", "timestamp"], orient="row")
    whole = DATA.dataset.interactions.with_columns(pl.col("user_id", "item_id").cast(pl.String))
    frame = pl.concat([whole, frame.with_columns(text=None).select(whole.columns)])
    items = {**DATA.dataset.items, "a": Item(item_id="a", title="Again"), "b": Item(item_id="b", title="Between")}
    data = split(
        replace(DATA.dataset, interactions=frame, items=items), Split(kind="last_share", valid=0, test=0.01), seed=0
    )
    task = make_task("ctr", data)
    mine = [row for row in islice(task.examples("train"), 400) if row.user_id == "u"]
    assert mine
    for row in mine:
        (*past, asked) = [item for _, item in row.pairs]
        assert asked not in past


def test_answers_are_what_the_template_writes() -> None:
    def template(target: str, name: str = "own") -> dict[str, Template]:
        return {name: Template("ctr", name, 1, "seen", "chat", "{{ item.title }}?", target)}

    task = make(CtrTask, DATA, CtrSection(), template("I say {{ answer }}."), seed=0)
    request = task.cases("test")[0].request
    assert task.continuations(request, template="own") == ("I say Yes.", "I say No.")
    row = next(task.examples("train"))
    assert targets(row)[0] in ("I say Yes.", "I say No.") and task.kind(row) in targets(row)[0]
    said = task.parse("I say no.", request, template="own")
    assert isinstance(said, Probability) and said.value == 0.0
    with raises(RecipeError, Facts("bad-value", "ctr/own", column="target", says="{{ answer }}")):
        make(CtrTask, DATA, CtrSection(), template("Perhaps"), seed=0).continuations(request, template="own")
    with raises(RecipeError, Facts("unknown-name", "ctr/own", column="target", says="'item'")):
        make(CtrTask, DATA, CtrSection(), template("{{ item.title }} {{ answer }}"), seed=0)


# --------------------------------------------------------------------------- lists


def test_every_line_of_a_list_teaches_an_answer() -> None:
    task = make_task("ctr", DATA, templates=["list-likes"], window=5)
    kinds = Counter()
    for row in islice(task.examples("train"), 100):
        said = targets(row)
        events = {event.item_id: event for event in DATA.train_events(row.user_id)}
        assert len(said) == len(row.pairs) <= 5
        assert said == ["Yes\n" if (events[item].rating or 0) >= task.liked else "No\n" for _, item in row.pairs]
        assert task.kind(row) == said[-1].strip()
        kinds[task.kind(row)] += 1
    assert min(kinds["Yes"], kinds["No"]) > 10


def test_a_question_continues_the_list_with_the_item() -> None:
    task = balanced(templates=["list-likes"], eval_templates=["list-likes", "list-verdicts"], history=4)
    for case in task.cases("test"):
        for template, mark in (("list-likes", ": "), ("list-verdicts", " - ")):
            asked = task.prompt(case.request, template=template)
            lines = "".join(segment.text for segment in asked.answer_prefix).split("\n")
            assert asked.stop == "\n" and len(lines) == min(4, len(case.request.history)) + 1
            assert lines[-1].endswith(f"Film #{case.request.item[1:]}!{mark}")
            assert all(line.endswith((f"{mark}Yes", f"{mark}No")) for line in lines[:-1])
            assert task.continuations(case.request, template=template) == ("Yes", "No")


def test_a_list_that_holds_an_item_twice_keeps_the_last_rating() -> None:
    rows = [("u", f"i{n % 6}", float(1 + n % 5), float(n)) for n in range(12)]
    data = split(
        Dataset(
            name="again",
            noun="films",
            interactions=pl.DataFrame(rows, schema=["user_id", "item_id", "rating", "timestamp"], orient="row"),
            items={f"i{n}": Item(item_id=f"i{n}", title=f"Film {n}") for n in range(6)},
            rating_scale=(1.0, 5.0),
        ),
        Split(kind="last_share", valid=0.1, test=0.1),
        seed=0,
    )
    row = next(make_task("ctr", data, templates=["list-likes"]).examples("train"))
    last = {event.item_id: event.rating for event in data.train_events("u")}
    assert len(data.train_events("u")) > len(row.pairs) == len(set(row.pairs)) == len(last) > 2
    assert targets(row) == ["Yes\n" if (last[item] or 0) >= 4 else "No\n" for _, item in row.pairs]


def test_a_pool_of_lists_ends_with_as_many_yes_as_no() -> None:
    task = make_task("ctr", DATA, templates=["list-likes"], window=5)
    assert Counter(task.kind(row) for row in pool(task, 20)) == {"Yes": 10, "No": 10}


# --------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", 0),
        ("yes.", 0),
        ("**Yes**, they will", 0),
        ("\n Yes\nBecause the user liked Heat", 0),
        ("The answer is: Yes!", 0),
        ("Answer: No", 1),
        ("No", 1),
        ("No.", 1),
        ("NO\nThe user dislikes dramas", 1),
        ('"No", they will not', 1),
        # Refusals, and beginnings of other phrases.
        ("", None),
        ("No idea", None),
        ("No way to tell", None),
        ("I cannot say yes to that", None),
        ("I'm sorry, but no.", None),
        ("Not sure", None),
        ("Yesterday", None),
        ("Nothing", None),
        ("Maybe", None),
        # Both.
        ("Yes or No", None),
        ("Yes and no", None),
        ("No, yes", None),
        # Other languages and signs.
        ("Oui", None),
        ("Sí", None),
        ("Ja", None),
        ("да", None),
        ("はい", None),
        ("1", None),
        ("true", None),
        ("👍", None),
        ("Y", None),
    ],
)
def test_what_counts_as_a_yes_or_a_no(text: str, said: int | None) -> None:
    assert read_choice(text, ("Yes", "No")) == said


@given(st.text(max_size=60))
def test_reading_never_fails_and_needs_the_word(text: str) -> None:
    place = read_choice(text, ("Yes", "No"))
    assert place in (None, 0, 1)
    if place is not None:
        assert ("yes", "no")[place] in text.casefold()


def test_rewards() -> None:
    task = make_task("ctr", DATA)
    case = Case(request=Request(id="r", user_id="u00", item="i01"), truth=1.0)
    assert task.reward(Probability(request_id="r", value=1.0), case) == 1.0
    assert task.reward(Probability(request_id="r", value=0.5), case) == 0.75
    assert task.reward(Probability(request_id="r", value=0.0), case) == 0.0
    assert task.reward(Unparsed(request_id="r", reason="x"), case) == 0.0
