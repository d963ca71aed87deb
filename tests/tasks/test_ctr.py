"""The yes/no task: cases, balanced sets, prompts and answers."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import polars as pl
import pytest
from task_data import example_text, make_dataset, make_task, prompt_text, targets

from llmrec.baselines.ctr import LikeRatio
from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset, split_dataset
from llmrec.errors import DataError, RecipeError
from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.predictor import evaluate
from llmrec.prompts.template import Template
from llmrec.recipe.schema import CtrSection, Split
from llmrec.tasks.ctr import CtrTask, parse_choice
from llmrec.tasks.family import family_of
from llmrec.types import Case, Event, Item, Probability, Request, Unparsed
from tests.facts import Facts, raises
from tests.tasks.making import make

DATA = split_dataset(make_dataset(hostile=False), Split(kind="last_share", valid=0.2, test=0.3), seed=0)


def balanced(data: SplitDataset = DATA, **section: Any) -> CtrTask:
    return make_task("ctr", data, balance="user", **section)  # type: ignore[no-any-return]


def test_truth_is_rating_at_or_above_threshold() -> None:
    ratings = {row[:2]: row[2] for row in DATA.dataset.interactions.select("user_id", "item_id", "rating").iter_rows()}
    for task, border in ((make_task("ctr", DATA), 4.0), (make_task("ctr", DATA, liked=2.0), 2.0)):
        cases = task.cases("test")
        assert len(cases) == len(DATA.test)
        for case in cases:
            rated = ratings[case.request.user_id, str(case.request.item)]
            assert case.truth == float(rated >= border)
            assert case.request.history == DATA.history(case.request.user_id, "test")


@pytest.mark.parametrize("per_user", [None, 5])
def test_balanced_cases_have_equal_classes_per_user(per_user: int | None) -> None:
    everything = Counter((c.request.user_id, c.truth) for c in make_task("ctr", DATA).cases("test"))
    counts = Counter((c.request.user_id, c.truth) for c in balanced(per_user=per_user).cases("test"))
    users = {user for user, _ in everything}
    assert sum(counts.values()) > 20
    for user in users:
        rarer = min(everything[user, 0.0], everything[user, 1.0])
        assert counts[user, 0.0] == counts[user, 1.0] == min(rarer, (per_user or 999) // 2)


def test_balanced_cases_keep_the_order() -> None:
    names = [case.request.id for case in make_task("ctr", DATA).cases("test")]
    kept = [case.request.id for case in balanced().cases("test")]
    assert kept == [name for name in names if name in set(kept)]
    few = [case.request.id for case in make_task("ctr", DATA, per_user=2).cases("test")]
    assert max(Counter(name.partition("|")[0] for name in few).values()) == 2


def test_unrated_interactions_are_no_cases() -> None:
    frame = DATA.dataset.interactions.with_columns(
        rating=pl.when(pl.col("item_id") < "i30").then(pl.col("rating")).otherwise(None)
    )
    data = split_dataset(DATA.dataset.restrict(frame), Split(kind="last_share", valid=0.2, test=0.3), seed=0)
    task = make_task("ctr", data)
    assert {case.request.item for case in task.cases("test")} < {row for row in data.test["item_id"]}
    assert all(str(case.request.item) < "i30" for case in task.cases("test"))
    assert all(item < "i30" for row in islice(task.examples("train"), 200) for _, item in row.pairs)


def test_balance_needs_several_events_per_user() -> None:
    data = split_dataset(make_dataset(hostile=False), Split(), seed=0)
    with raises(DataError, Facts("too-few", column="tasks.ctr.balance", says="data.split.kind=last_share")):
        balanced(data).cases("test")
    bare = make_dataset().restrict(make_dataset().interactions.with_columns(rating=pl.lit(None, pl.Float64)))
    with raises(DataError, Facts("missing-column", "small", column="rating", says="data.columns.rating")):
        make_task("ctr", split_dataset(bare, Split(), seed=0))


def test_like_ratio_is_chance_on_balanced_cases() -> None:
    ratio = LikeRatio()
    ratio.fit(DATA)
    protocol = EvalProtocol(
        split="last_share/test", candidates="full", cutoffs=(10,), resamples=50, seed=0, catalogue=60
    )
    result = evaluate(ratio, balanced().cases("test"), name="ctr", kind=family_of("ctr").answer, protocol=protocol)
    assert result.figures.metrics["GAUC"].value == 0.5
    assert result.figures.metrics["AUC"].value == pytest.approx(0.5, abs=1e-12)
    assert result.figures.users_left_out == 0


def test_rows_show_likes_and_dislikes_but_not_the_target() -> None:
    task = make_task("ctr", DATA, history=6)
    seen = Counter[str]()
    for row in islice(task.examples("train"), 600):
        rated = {event.item_id: float(event.rating or 0) for event in DATA.train_events(row.user_id)}
        (*past, target) = [item for _, item in row.pairs]
        assert target not in past and len(past) <= 6
        assert targets(row) == ["Yes" if rated[target] >= 4 else "No"]
        assert task.kind(row) == targets(row)[0]
        seen[targets(row)[0]] += 1
        text = example_text(row)
        assert text.count(f"Film #{target[1:]}!") == 1
        if row.template == "ctr/by-taste":
            lists = text.partition("Disliked films")
            assert [item for item in past if f"Film #{item[1:]}!" in lists[0]] == [i for i in past if rated[i] >= 4]
            assert [i for i in past if f"- Film #{i[1:]}!" in lists[2]] == [i for i in past if rated[i] < 4]
    assert min(seen.values()) > 100 and set(seen) == {"Yes", "No"}


def test_history_with_the_target_item_is_not_shown() -> None:
    task = make_task("ctr", DATA)
    request = Request(
        id="r", user_id="u00", item="i01",
        history=(Event(item_id="i01", rating=5.0), Event(item_id="i02", rating=1.0), Event(item_id="i03")),
    )  # fmt: skip
    text = prompt_text(task.prompt(request, template="by-taste"))
    assert "Liked" not in text and text.count("Film #01!") == 1
    assert "Film #02!" in text and "Film #03!" not in text


def test_answers_follow_the_template() -> None:
    def template(target: str, name: str = "own") -> dict[str, Template]:
        return {name: Template("ctr", name, 1, "seen", "chat", "{{ item.title }}?", target)}

    task = make(CtrTask, DATA, CtrSection(), template("I say {{ answer }}."), seed=0)
    request = task.cases("test")[0].request
    assert task.continuations(request, template="own") == ("I say Yes.", "I say No.")
    row = next(task.examples("train"))
    assert targets(row)[0] in ("I say Yes.", "I say No.") and task.kind(row) in targets(row)[0]
    answer = task.parse("I say no.", request, template="own")
    assert isinstance(answer, Probability) and answer.value == 0.0
    with raises(RecipeError, Facts("bad-value", "ctr/own", column="target", says="{{ answer }}")):
        make(CtrTask, DATA, CtrSection(), template("Perhaps"), seed=0).continuations(request, template="own")
    with raises(RecipeError, Facts("unknown-name", "ctr/own", column="target", says="'item'")):
        make(CtrTask, DATA, CtrSection(), template("{{ item.title }} {{ answer }}"), seed=0)


def test_every_line_of_a_list_has_a_target() -> None:
    task = make_task("ctr", DATA, templates=["list-likes"], window=5)
    kinds = Counter()
    for row in islice(task.examples("train"), 100):
        answers = targets(row)
        events = {event.item_id: event for event in DATA.train_events(row.user_id)}
        assert len(answers) == len(row.pairs) <= 5
        assert answers == ["Yes\n" if (events[item].rating or 0) >= task.liked else "No\n" for _, item in row.pairs]
        assert task.kind(row) == answers[-1].strip()
        kinds[task.kind(row)] += 1
    assert min(kinds["Yes"], kinds["No"]) > 10


def test_a_repeated_item_counts_by_its_last_rating() -> None:
    data = split_dataset(
        Dataset(
            name="again",
            noun="films",
            interactions=pl.DataFrame(
                [("u", f"i{n % 6}", float(1 + n % 5), float(n)) for n in range(12)],
                schema=["user_id", "item_id", "rating", "timestamp"],
                orient="row",
            ),
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
    # A question does not show an earlier rating of the item.
    chats = islice(make_task("ctr", data, templates=["by-taste"]).examples("train"), 40)
    shown = [[item for _, item in row.pairs] for row in chats]
    assert any(len(items) > 1 for items in shown) and all(items[-1] not in items[:-1] for items in shown)


def test_list_prompt_ends_with_the_item() -> None:
    task = balanced(templates=["list-likes"], eval_templates=["list-likes", "list-verdicts"], history=4)
    for case in task.cases("test"):
        for template, mark in (("list-likes", ": "), ("list-verdicts", " - ")):
            prompt = task.prompt(case.request, template=template)
            lines = "".join(segment.text for segment in prompt.answer_prefix).split("\n")
            assert prompt.stop == "\n" and len(lines) == min(4, len(case.request.history)) + 1
            assert lines[-1].endswith(f"Film #{case.request.item[1:]}!{mark}")
            assert all(line.endswith((f"{mark}Yes", f"{mark}No")) for line in lines[:-1])
            assert task.continuations(case.request, template=template) == ("Yes", "No")


@pytest.mark.parametrize(("text", "choice"), [
    ("Yes", 0), ("**Yes**, they will", 0), ("\n Yes\nBecause the user liked Heat", 0), ("The answer is: Yes!", 0),
    ("NO\nThe user dislikes dramas", 1), ('"No", they will not', 1), ("", None), ("No idea", None),
    ("I cannot say yes to that", None), ("Yesterday", None), ("Yes or No", None), ("No, yes", None), ("да", None),
    ("1", None), ("Y", None),
])  # fmt: skip
def test_reads_yes_and_no(text: str, choice: int | None) -> None:
    assert parse_choice(text, ("Yes", "No")) == choice


def test_rewards() -> None:
    task = make_task("ctr", DATA)
    case = Case(request=Request(id="r", user_id="u00", item="i01"), truth=1.0)
    assert task.reward(Probability(request_id="r", value=1.0), case) == 1.0
    assert task.reward(Probability(request_id="r", value=0.5), case) == 0.75
    assert task.reward(Probability(request_id="r", value=0.0), case) == 0.0
    assert task.reward(Unparsed(request_id="r", reason="x"), case) == 0.0
