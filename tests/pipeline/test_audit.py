"""The audit finds every planted leak and none in a clean run."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

from eval.benchmarks.negatives import Knowing
from llmrec.backends.fake import FakeBackend
from llmrec.baselines.popular import Popularity
from llmrec.baselines.rating import GlobalMean
from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset, request_id, split_dataset
from llmrec.durable import write_json
from llmrec.errors import LlmrecError
from llmrec.pipeline import audit, leaks
from llmrec.pipeline.leaks import Check, _audit_candidate_order, _HeldOutTexts, with_random_holdouts
from llmrec.pipeline.study import Study, _build_tasks, build_study
from llmrec.prompts.template import Template
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Split
from llmrec.report.results import read_results
from llmrec.tasks.fewshot import FewShotDraw, Window
from llmrec.tasks.pool import NegativeSampler
from llmrec.tasks.sequential import SequentialTask
from llmrec.tasks.task import Want
from llmrec.types import Case, Event, Example, Item, Message, Prompt, Request, Segment
from tests.facts import Facts, raises

SETTINGS = (
    *("data={source: made-reviews, noun: products}", "reviews=null", "eval.candidates.count=5", "eval.users=40"),
    *("tasks.sequential.users=null", "tasks.rating.users=null", "tasks.rating.arms=null", "tasks.direct.arms=null"),
    *("tasks.direct.strategies=[label, list]", "tasks.direct.users=null", "tasks.explanation.users=null"),
)
# An audit fits every baseline twice, so these audits have controls only. One audit has all baselines.
FEW = (
    "tasks.rating.baselines=[global-mean, user-mean, item-mean, user-item-bias]",
    "tasks.sequential.baselines=[random, popularity, item-knn, markov-1]",
    *("tasks.direct.baselines=[random, popularity, item-knn, markov-1]", "tasks.explanation.baselines=[frequent-text]"),
)
ROWS = 30


@pytest.fixture(scope="module")
def study() -> Study:
    return build_study(load_recipe("recipes/movielens-100k/four-tasks.yaml", [*SETTINGS, *FEW]))


def results_of(study: Study) -> dict[str, Any]:
    """Return the results of a run without leaks."""
    rows = [
        {"id": f"{family}/baseline/{n}", "task": family, "candidates": digest_of(study, family)}
        for family in study.tasks
        for n in (1, 2)
    ]
    return {"training": {"rows": dict.fromkeys(study.tasks, ROWS), "dropped": {}}, "rows": rows}


def digest_of(study: Study, family: str) -> str | None:
    return study.candidates.digest if study.candidates and family in ("sequential", "direct") else None


def predictions_of(study: Study) -> pl.DataFrame:
    lines = []
    for family in study.tasks:
        for n in (1, 2):
            for case in study.cases(family):
                items = list(case.request.candidates or ())
                parsed = {"items": items, "scores": [0.0] * len(items)} if items else 3.0
                lines.append(
                    {
                        "row_id": f"{family}/baseline/{n}",
                        "task": family,
                        "request_id": case.request.id,
                        "parsed": json.dumps(parsed),
                        "error": None,
                    }
                )
    return pl.DataFrame(lines, schema_overrides={"error": pl.String})


def examine(study: Study, **changes: Any) -> dict[str, Check]:
    inputs = {"results": results_of(study), "predictions": predictions_of(study)} | changes
    return {check.name: check for check in audit.run_checks(study, inputs["results"], inputs["predictions"])}


def leaking(checks: Mapping[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.verdict == "leak"}


def leaks_at(name: str, study: Study, **changes: Any) -> bool:
    """Run the checks up to the named one, and return whether it reports a leak."""
    inputs = {"results": results_of(study), "predictions": predictions_of(study)} | changes
    checks = audit.run_checks(study, inputs["results"], inputs["predictions"])
    return next(check for check in checks if check.name == name).verdict == "leak"


def test_clean_run_has_no_leaks() -> None:
    checks = examine(build_study(load_recipe("recipes/movielens-100k/four-tasks.yaml", SETTINGS)))
    assert leaking(checks) == set()
    assert len(checks) >= 20 and BASELINES in checks
    assert all(check.found for check in checks.values())


def test_statistics_in_words_are_no_leak() -> None:
    named = [f"tasks.{family}.templates=[m6]" for family in ("rating", "sequential", "direct", "explanation")]
    study = build_study(load_recipe("recipes/movielens-100k/four-tasks.yaml", [*SETTINGS, *FEW, *named]))
    assert {template.set for family in study.tasks for template in study.eval_templates(family)} == {"m6"}
    assert leaking(examine(study)) == set()


# --------------------------------------------------------------------------- planted leaks

BASELINES = "baselines that learned from held-out interactions"
INTERACTIONS = "training interactions of made-reviews"


class Tampered:
    """A task with one method replaced."""

    def __init__(self, task: Any, **methods: Any) -> None:
        self._task, self._methods = task, methods

    def __getattr__(self, name: str) -> Any:
        return self._methods.get(name) or getattr(self._task, name)


def with_task(study: Study, family: str, **methods: Any) -> Study:
    """Return a study of one task with some methods replaced."""
    return replace(study, tasks={family: Tampered(study.tasks[family], **methods)})


def only(study: Study, family: str) -> Study:
    return replace(study, tasks={family: study.tasks[family]})


def held(study: Study) -> tuple[str, str]:
    """Return a held-out pair."""
    first = study.data.holdouts("test")[0]
    return first.user_id, first.item_id


def title(study: Study, item: str) -> str:
    return study.data.dataset.items[item].title


def rows_with(study: Study, family: str, change: Callable[[Example], Example], row: int | None = 7) -> Study:
    """Change one training row, or all."""

    def examples(split: str, limit: int | None = None) -> Iterator[Example]:
        for n, example in enumerate(study.tasks[family].examples(split, limit)):  # type: ignore[arg-type]
            yield change(example) if row in (n, None) else example

    return with_task(study, family, examples=examples)


def prompts_with(study: Study, family: str, hint: Callable[[Request, str], str]) -> Study:
    """Append a hint to each prompt, unless the hint is empty."""

    def prompt(request: Request, *, template: str, shots: int = 0, want: Want = "one") -> Prompt:
        plain = study.tasks[family].prompt(request, template=template, shots=shots, want=want)
        text = hint(request, template)
        last = plain.messages[-1]
        hinted = replace(last, segments=(*last.segments, Segment("item", text))) if text else last
        return replace(plain, messages=(*plain.messages[:-1], hinted))

    return with_task(study, family, prompt=prompt)


def test_held_out_pair_among_training_interactions(study: Study) -> None:
    more = pl.concat([study.data.train, study.data.test[:1].select(study.data.train.columns)])
    assert leaks_at(INTERACTIONS, replace(study, data=replace(study.data, train=more)))


def test_training_interaction_later_than_held_out_one(study: Study) -> None:
    data = study.data
    user, _ = held(study)
    late = data.train.with_columns(
        pl.when(pl.col("user_id") == user).then(pl.col("timestamp") + 1e12).otherwise(pl.col("timestamp"))
    )
    assert leaks_at(INTERACTIONS, replace(study, data=replace(data, train=late)))


def test_shares_of_histories_are_not_later_than_held_out_ones(study: Study) -> None:
    data = split_dataset(study.data.dataset, Split(kind="last_share", valid=0.1, test=0.2), seed=0)
    assert leaks.audit_training_interactions(data).verdict == "clean"
    row = data.train.filter(pl.col("user_id").is_in(data.test["user_id"].to_list()))[:1]
    late = row.with_columns(timestamp=pl.lit(data.test["timestamp"].max()) + 1)
    check = leaks.audit_training_interactions(replace(data, train=pl.concat([data.train, late])))
    assert check.verdict == "leak" and "later than a held-out interaction" in check.examples[0]


def test_training_row_declares_held_out_pair(study: Study) -> None:
    leaky = rows_with(study, "sequential", lambda example: replace(example, pairs=(*example.pairs, held(study))))
    assert leaks_at("training rows of sequential", leaky)


def test_training_row_shows_undeclared_held_out_title(study: Study) -> None:
    user, item = held(study)

    def change(example: Example) -> Example:
        return replace(example, user_id=user, answer=(*example.answer, Segment("item", title(study, item))))

    assert leaks_at("training rows of direct", rows_with(study, "direct", change))


def test_training_row_shows_held_out_code_as_id() -> None:
    changes = ("tasks={rating: {templates: [user-item]}}", "index.ids=codes", "index.scheme=random")
    study = build_study(load_recipe("recipes/movielens-100k/four-tasks.yaml", [*SETTINGS[:4], *changes]))
    assert study.index is not None
    user, item = held(study)
    shown = Segment("item", study.index.encode(item))

    def show(example: Example) -> Example:
        return replace(example, user_id=user, messages=(*example.messages, Message("user", (shown,))))

    assert not leaks_at("training rows of rating", study)
    assert leaks_at("training rows of rating", rows_with(study, "rating", show))


def test_training_row_quotes_held_out_review(study: Study) -> None:
    row = next(r for r in study.data.holdouts("test") if r.text and len(r.text) > 40)

    def change(example: Example) -> Example:
        quote = Segment("item", f"Earlier: {row.text}")
        return replace(example, user_id=row.user_id, answer=(quote, *example.answer))

    assert leaks_at("training rows of explanation", rows_with(study, "explanation", change))


@pytest.mark.parametrize(("last", "secret"), [("It does what it says, and it came quickly.", False), ("x" * 40, True)])
def test_repeated_sentence_is_no_secret(last: str, secret: bool) -> None:
    same = "It does what it says, and it came quickly."
    rows = [("u", f"i{n}", float(n), f"On item {n}: {same} Thanks!" if n < 5 else last) for n in range(6)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "text"], orient="row")
    frame = frame.with_columns(rating=pl.lit(None, pl.Float64))
    items = {f"i{n}": Item(item_id=f"i{n}", title=f"Thing {n}") for n in range(6)}
    data = split_dataset(Dataset(name="same", noun="things", interactions=frame, items=items), Split(), seed=0)
    assert (last in _HeldOutTexts(data).texts["u"]) == secret


def test_few_shot_example_has_held_out_pair(study: Study) -> None:
    user, item = held(study)

    def draw_shots(request: Request, k: int) -> FewShotDraw:
        return FewShotDraw((Window(user, (Event(item_id=item),)),), request.history)

    assert leaks_at("few-shot examples of rating", with_task(study, "rating", draw_shots=draw_shots))


def test_history_contains_target(study: Study) -> None:
    def cases(split: str) -> list[Case]:
        first, *rest = study.tasks["sequential"].cases(split)  # type: ignore[arg-type]
        past = (*first.request.history, Event(item_id=str(first.truth)))
        return [replace(first, request=replace(first.request, history=past)), *rest]

    assert leaks_at("questions of sequential", with_task(study, "sequential", cases=cases))


def test_prompt_names_target(study: Study) -> None:
    targets = {case.request.id: str(case.truth) for case in study.cases("sequential")}
    hinted = prompts_with(study, "sequential", lambda request, _: f"likes such as {title(study, targets[request.id])}")
    assert leaks_at("questions of sequential", hinted)


def test_users_with_leaking_profiles_are_excluded(study: Study) -> None:
    user, item = held(study)
    profile = {"likes": f"everything like {title(study, item)}"}
    dataset = replace(study.data.dataset, users={user: profile, "another": {"likes": "nothing"}})
    changed = build_study(study.recipe, replace(study.data, dataset=dataset))
    checks = examine(only(changed, "direct"))
    check = checks["user profiles of made-reviews"]
    assert leaking(checks) == set() and check.verdict == "notice" and check.figures == {"users": 1}
    assert check.found.startswith("1 user is excluded from the evaluation, of 2 with a profile in made-reviews")
    assert check.examples == (f"user {user}: field 'likes' names held-out item {item}",)
    for family in study.tasks:
        assert user in {case.request.user_id for case in study.cases(family)}
        assert user not in {case.request.user_id for case in changed.cases(family)}
        assert changed.set_aside(family) == {user}


def test_next_user_replaces_excluded_one(study: Study) -> None:
    recipe = study.recipe.model_copy(update={"eval": study.recipe.eval.model_copy(update={"users": 5})})
    first, *_ = before = [case.request.user_id for case in build_study(recipe).cases("sequential")]
    (target,) = [held for held in study.data.holdouts("test") if held.user_id == first]
    users = {first: {"likes": f"most of all {title(study, target.item_id)}"}}
    changed = build_study(recipe, replace(study.data, dataset=replace(study.data.dataset, users=users)))
    after = [case.request.user_id for case in changed.cases("sequential")]
    assert len(after) == len(before) == 5 and after[:4] == before[1:]


def tampered_sets(study: Study, change: Any) -> Study:
    assert study.candidates is not None
    targets = {request_id(h.user_id, h.item_id): h for h in study.data.holdouts("test")}
    sets = {name: change(items, targets[name]) for name, items in study.candidates.sets.items()}
    return only(replace(study, candidates=replace(study.candidates, sets=sets)), "sequential")


def without_target(items: Sequence[str], target: Any) -> tuple[str, ...]:
    return tuple(item for item in items if item != target.item_id)


def test_order_of_equally_popular_candidates_is_clean(study: Study) -> None:
    items, rng = sorted(study.data.dataset.items), random.Random(0)
    # Two items are popular and all others equally rare, as in a sparse catalogue.
    train = pl.DataFrame({"item_id": [*items, *items[:2] * 9]})
    data: Any = SimpleNamespace(train=train, dataset=study.data.dataset)
    sets = {str(n): tuple(rng.sample(items, 20)) for n in range(400)}
    assert _audit_candidate_order(replace(study, data=data), sets).verdict == "clean"
    # Random pairs of sets can agree.
    pairs = ({name: sets[name] for name in (str(n), str(n + 1))} for n in range(0, 400, 2))
    assert all(_audit_candidate_order(replace(study, data=data), pair).verdict == "clean" for pair in pairs)
    by_count = {name: tuple(sorted(them, key=items[:2].count)) for name, them in sets.items()}
    assert _audit_candidate_order(replace(study, data=data), by_count).verdict == "leak"


def test_candidate_sets_reveal_target(study: Study) -> None:
    def shows_interaction(items: Sequence[str], target: Any) -> tuple[str, ...]:
        return (*without_target(items, target)[:-1], study.data.train_events(target.user_id)[0].item_id, target.item_id)

    for name, change in (
        ("candidate sets without the target", without_target),
        ("duplicate candidates", lambda items, target: (*items[:-1], items[0])),
        (
            "position of the target among its candidates",
            lambda items, target: (target.item_id, *without_target(items, target)),
        ),
        ("order of the candidates", lambda items, target: tuple(sorted(items))),
        ("negatives with interactions of the user", shows_interaction),
    ):
        assert leaks_at(name, tampered_sets(study, change)), name


def test_rows_of_a_table_answer_different_requests(study: Study) -> None:
    study = only(study, "direct")
    results, predictions = results_of(study), predictions_of(study)
    results["rows"][0]["candidates"] = "another"
    assert leaks_at("models of one table with different candidates", study, results=results)
    assert leaks_at("models of one table with different requests", study, predictions=predictions[1:])
    foreign = predictions.with_columns(parsed=pl.lit('{"items": ["no candidate"], "scores": [1.0]}'))
    assert leaks_at("ranked items that are not candidates", study, predictions=foreign)


# The mean of all ratings changes only with ratings, not with items.
@pytest.mark.parametrize(("kind", "family"), [(Popularity, "sequential"), (GlobalMean, "rating")])
def test_baseline_learned_from_held_out_interactions(
    study: Study, kind: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, honest = only(study, family), kind.fit

    def fit(self: Any, data: SplitDataset) -> None:
        honest(self, replace(data, train=pl.concat([data.train, data.test.select(data.train.columns)])))

    monkeypatch.setattr(kind, "fit", fit)
    assert leaks.audit_baselines(study).verdict == "leak"
    monkeypatch.setattr(leaks, "fit_baseline", _stored_fit)
    assert leaks.audit_baselines(study).verdict == "leak"


def _stored_fit(name: str, parameters: Mapping[str, Any], data: SplitDataset, *, seed: int) -> Any:
    """Return a stored fit whose answers differ from those of a new fit."""
    model = leaks.create_baseline(name, parameters, seed=seed)
    model.fit(replace(data, train=data.train.tail(10)))
    model.recalled = 1.0
    return model


def test_stored_fit_with_other_answers_is_no_leak(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "fit_baseline", _stored_fit)
    assert leaks.audit_baselines(study).verdict == "clean"


# --------------------------------------------------------------------------- dependence on held-out interactions

DRAWN = "training rows of direct that depend on held-out interactions"
SHOTS = "few-shot examples of direct that depend on held-out interactions"
VALID = "validation rows of direct that depend on test interactions"
POSITIONS = "position questions of direct that depend on held-out interactions"


def rebuilt(*changes: str) -> Study:
    """Build the study again with the patched code."""
    return build_study(load_recipe("recipes/movielens-100k/four-tasks.yaml", [*SETTINGS, *FEW, *changes]))


def test_negatives_avoid_held_out_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that never show a held-out item reveal the held-out items."""
    monkeypatch.setattr("llmrec.tasks.direct.NegativeSampler", Knowing)
    knowing = rebuilt("eval.arms=[zero-shot, few-shot]", "eval.debias=measured")
    checks = examine(knowing)
    assert leaking(checks) == {DRAWN, SHOTS, VALID, POSITIONS}
    assert checks["training rows of direct"].verdict == "clean"
    # New held-out items are drawn among the negatives of rows, so few rows are enough.
    assert leaks.audit_training_row_independence(knowing, "direct", 2).verdict == "leak"
    for family in ("sequential", "rating", "explanation"):
        assert leaks.audit_training_row_independence(knowing, family, ROWS).verdict == "clean"


def test_no_answers_avoid_held_out_items(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every other example is a no.
    yes_no = "tasks={direct: {templates: [user-title], strategies: [pointwise-yes]}}"
    changes = (yes_no, "eval.arms=[zero-shot, few-shot]", "eval.shots.k=2")
    plain = built(*changes)
    assert not leaks_at(DRAWN, plain) and not leaks_at(SHOTS, plain)
    monkeypatch.setattr("llmrec.tasks.direct.NegativeSampler", Knowing)
    assert {DRAWN, SHOTS} <= leaking(examine(built(*changes)))


def built(*changes: str) -> Study:
    return build_study(load_recipe("recipes/movielens-100k/four-tasks.yaml", [*SETTINGS[:4], *changes]))


def test_packed_rows_depend_on_held_out_items(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = ", ".join(f"{family}: {{templates: [one-history]}}" for family in ("sequential", "rating"))
    packed, name = (f"tasks={{{tasks}}}", "train.packing=tree"), DRAWN.replace("direct", "sequential")
    assert not leaks_at(name, built(*packed))
    honest = SequentialTask.branch

    def branch(self: SequentialTask, number: int, user: str) -> Example | None:
        row, last = honest(self, number, user), dict(self._data.test.select("user_id", "item_id").iter_rows())
        return row and replace(row, user_id=f"{user} {last.get(user, '')}")

    monkeypatch.setattr(SequentialTask, "branch", branch)
    assert leaks_at(name, built(*packed))


def test_popular_negatives_count_held_out_interactions(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(NegativeSampler):
        def __init__(self, data: SplitDataset, kind: Any) -> None:
            super().__init__(data, kind)
            self._bag = sorted([*self._bag, *data.dataset.interactions["item_id"].to_list()])

    popular = "eval.candidates.kind=popularity"
    assert leaks.audit_training_row_independence(rebuilt(popular), "direct", ROWS).verdict == "clean"
    monkeypatch.setattr("llmrec.tasks.direct.NegativeSampler", Counting)
    assert leaks.audit_training_row_independence(rebuilt(popular), "direct", ROWS).verdict == "leak"


def test_order_of_training_rows_depends_on_held_out_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal rows in another order."""
    honest = SequentialTask.examples

    def examples(self: SequentialTask, split: Any, limit: int | None = None) -> Iterator[Example]:
        last = dict(self._data.test.select("user_id", "item_id").iter_rows())
        rows = [*islice(honest(self, "train"), ROWS)]
        yield from sorted(rows, key=lambda row: str(last.get(row.user_id, "")))

    monkeypatch.setattr(SequentialTask, "examples", examples)
    assert leaks.audit_training_row_independence(rebuilt(), "sequential", ROWS).verdict == "leak"


def test_second_table_with_other_items_is_clean(study: Study) -> None:
    data = study.data
    items = {f"other {item}": replace(entry, item_id=f"other {item}") for item, entry in data.dataset.items.items()}
    frame = data.dataset.interactions.with_columns(pl.concat_str(pl.lit("other "), "item_id").alias("item_id"))
    renamed = split_dataset(replace(data.dataset, name="other", interactions=frame, items=items), Split(), seed=0)
    both = replace(study, reviews=renamed)
    assert both.task_data("explanation").dataset.items is items
    for family in study.tasks:
        assert (
            leaks.audit_training_row_independence(replace(both, tasks=_build_tasks(both, 0)), family, 20).verdict
            == "clean"
        )


def drawn_held_out(study: Study) -> tuple[int, Example, str]:
    """Return the first row of direct with a held-out item as a negative: its index, the row and the item."""
    return next(
        (index, row, item)
        for index, row in enumerate(islice(study.training_examples("direct"), ROWS))
        for item in row.negatives
        if (row.user_id, item) in study.data.held_out
    )


def test_held_out_item_may_only_be_a_negative(study: Study) -> None:
    index, row, item = drawn_held_out(study)
    name, turn = Segment("item", title(study, item)), row.messages[-1]
    assert name in turn.segments
    twice = replace(turn, segments=(*turn.segments, name))

    def checked(changed: Example) -> Check:
        return leaks.audit_training_rows(rows_with(study, "direct", lambda _: changed, index), "direct", index + 1)

    assert checked(row).verdict == "clean"
    shown = f"user {row.user_id}, title of held-out item {item}"
    for changed in (
        replace(row, messages=(*row.messages[:-1], twice)),
        replace(row, answer=(name, *row.answer)),
        replace(row, negatives=tuple(each for each in row.negatives if each != item)),
        replace(row, pairs=(*row.pairs, (row.user_id, item))),
    ):
        check = checked(changed)
        pair = f"row {row.id}: pair {(row.user_id, item)}"
        assert check.verdict == "leak" and check.examples[0] in (f"row {row.id}: {shown}", pair)


def test_text_about_held_out_negative_is_a_leak(study: Study) -> None:
    index, row, item = drawn_held_out(study)
    text = "I had waited for this one, and it was worth the wait."
    data = study.data
    written = pl.when((pl.col("user_id") == row.user_id) & (pl.col("item_id") == item)).then(pl.lit(text))
    valid, test = (frame.with_columns(text=written.otherwise(pl.col("text"))) for frame in (data.valid, data.test))
    quoted = (*row.messages, Message("user", (Segment("item", f"Earlier: {text}"),)))
    changed = replace(study, data=replace(data, valid=valid, test=test))
    changed = rows_with(changed, "direct", lambda row: replace(row, messages=quoted), index)
    check = leaks.audit_training_rows(changed, "direct", index + 1)
    assert check.examples == (f"row {row.id}: user {row.user_id}, text about held-out item {item}",)


def test_template_may_name_a_negative_twice(study: Study) -> None:
    twice = "Would {{ user_name }} take {{ item.title }}? Think of {{ item.title }}."
    words = {"family": "direct", "version": 1, "use": "seen", "shape": "chat"}
    template = Template(name="twice", user=twice, target="{{ answer }}", **words)  # type: ignore[arg-type]
    user, item = held(study)
    name = Segment("item", title(study, item))

    def repeated(times: int) -> list[str]:
        turn = Message("user", (Segment("text", "Would "), *[name] * times))
        row = Example(
            id="r", user_id=user, task="direct", template=template.id, messages=(turn,), ends_turn=True,
            answer=(Segment("target", "No"),), negatives=(item,),
        )  # fmt: skip
        return list(leaks._held_out_mentions(row, leaks._HeldOutTexts(study.data), template))

    assert repeated(2) == [] and len(repeated(3)) == 1


def test_rejected_item_in_a_question_is_a_leak(study: Study) -> None:
    (user, item), template = held(study), study.templates["sequential"][study.tasks["sequential"].eval_templates[0]]
    name = title(study, item)
    shown = Message("user", (Segment("text", "After "), Segment("item", name)))

    def revealed(message: Message, *rejected: str) -> list[str]:
        row = Example(
            id="r", user_id=user, task="sequential", template=template.id, messages=(message,), ends_turn=False,
            answer=(Segment("target", "x"),), negatives=(item,), rejected=rejected,
        )  # fmt: skip
        return list(leaks._held_out_mentions(row, leaks._HeldOutTexts(study.data), template))

    plain = Message("user", (Segment("text", "What next?"),))
    assert revealed(plain, f"{name}\n") == [] and len(revealed(shown, f"{name}\n")) == 1
    assert len(revealed(plain, f"{name}\n", f"{name}\n")) == 1


def test_redrawn_holdouts_keep_their_users(study: Study) -> None:
    data = study.data
    (user, _), item = held(study), min(data.dataset.items)
    other = with_random_holdouts(data, "test", toward={user: [item]})
    assert other.test["user_id"].equals(data.test["user_id"]) and other.test.schema == data.test.schema
    for column in ("item_id", "rating", "text"):
        moved = (other.test[column] != data.test[column]).mean()
        assert moved is not None and moved > 0.5, column
    assert dict(other.test.select("user_id", "item_id").iter_rows())[user] == item
    assert other.train.equals(data.train) and other.valid.equals(data.valid)
    assert other.held_out == {
        *other.valid["user_id", "item_id"].iter_rows(),
        *other.test["user_id", "item_id"].iter_rows(),
    }


# --------------------------------------------------------------------------- probes


def sequences(numbering: str) -> SplitDataset:
    """Return 300 users with 6 items each; ids are numbered by complete histories, or drawn."""
    rng = random.Random(0)
    histories = [[f"item-{user}-{n}" for n in range(4)] + rng.sample(["a", "b", "c", "d"], 2) for user in range(300)]
    for history in histories:
        rng.shuffle(history)
    items = list(dict.fromkeys(item for history in histories for item in history))
    numbers = list(range(1000, 1000 + len(items)))
    if numbering == "drawn":
        rng.shuffle(numbers)
    names = {item: str(number) for item, number in zip(items, numbers, strict=True)}
    events = [
        {"user_id": f"u{user}", "item_id": names[item], "timestamp": float(n)}
        for user, history in enumerate(histories)
        for n, item in enumerate(history)
    ]
    words = ["quiet", "amber", "north", "velvet", "copper", "silent", "hollow", "winter", "crimson", "paper"]
    titles = {name: " ".join(words[int(digit)] for digit in name) for name in names.values()}
    catalogue = {name: Item(item_id=name, title=title) for name, title in titles.items()}
    return split_dataset(Dataset("numbered", "items", pl.DataFrame(events), catalogue), Split(), seed=0)


def test_id_probe_finds_numbers_that_follow_histories() -> None:
    leaky = audit.audit_id_arithmetic(sequences("histories"), "test")
    assert leaky.figures["HR@5"] > 0.5 and leaky.figures["chance"] < 0.05
    drawn = audit.audit_id_arithmetic(sequences("drawn"), "test")
    assert abs(drawn.figures["HR@5"] - drawn.figures["chance"]) < 0.02


def test_planted_duplicates_are_found() -> None:
    rng = random.Random(0)
    sets = [frozenset(f"w{rng.randrange(4000)}" for _ in range(40)) for _ in range(1500)]
    exact = [(n, 1500 + n) for n in range(100)]
    near = [(100 + n, 1600 + n) for n in range(100)]
    sets += [sets[a] for a, _ in exact]
    sets += [frozenset([*sorted(sets[a])[1:], f"other {a}"]) for a, _ in near]
    similarities = {(a, b): similarity for a, b, similarity in audit.find_near_duplicates(sets, 0.9)}
    assert sum(pair in similarities for pair in exact) >= 99
    assert sum(pair in similarities for pair in near) >= 90
    assert similarities.keys() <= {*exact, *near}
    assert all(
        similarity == len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for (a, b), similarity in similarities.items()
    )


def test_near_equal_titles_are_reported(study: Study) -> None:
    data = study.data
    items = dict(data.dataset.items)
    first, second, third = sorted(items)[:3]
    items[first] = replace(items[first], title="The Remarkable Kettle of Stainless Steel, 2 litres")
    items[second] = replace(items[second], title="The Remarkable Kettle of Stainless Steel 3 litres")
    items[third] = replace(items[third], title="the remarkable kettle of stainless steel 2 litres")
    check = audit.audit_duplicate_items(replace(data, dataset=replace(data.dataset, items=items)))
    assert check.verdict == "notice"
    assert check.figures["equal"] >= 2 and check.figures["near_pairs"] >= 1


def test_twin_with_held_out_item_is_reported(study: Study) -> None:
    data = study.data
    user, item = next((h.user_id, h.item_id) for h in data.holdouts("test") if len(data.train_events(h.user_id)) >= 6)
    parts = (data.train, data.valid, data.test)
    plain = [part.select(data.train.columns).with_columns(pl.col("user_id").cast(pl.String)) for part in parts]
    twin = [part.filter(pl.col("user_id") == user).with_columns(user_id=pl.lit("twin")) for part in plain]
    train = pl.concat([plain[0], twin[0], twin[2]])
    every = pl.concat([train, *plain[1:]])
    planted = replace(data, train=train, dataset=replace(data.dataset, interactions=every))
    check = audit.audit_duplicate_users(planted, "test")
    assert any(user in line and "twin" in line for line in check.examples), item


def test_memorisation_probe_detects_recited_titles() -> None:
    data = sequences("drawn")
    by_head = {entry.title.rsplit(" ", 2)[0]: entry for entry in data.dataset.items.values()}
    items = {entry.item_id: entry for entry in by_head.values()}
    alone = replace(data, dataset=SimpleNamespace(name="numbered", noun="items", items=items))  # type: ignore[arg-type]

    def recite(text: str) -> str:
        head = text.rsplit("\n", 1)[-1].removesuffix("|").strip()
        return by_head[head].title.removeprefix(head)

    knowing = audit.audit_memorisation(FakeBackend(complete=recite), alone, seed=0)
    assert knowing.figures["completed"] > 0.5 and knowing.verdict == "notice"
    assert knowing.figures["control"] < 0.1
    ignorant = audit.audit_memorisation(FakeBackend(complete=lambda text: "no idea"), alone, seed=0)
    assert ignorant.figures["completed"] <= 0.01 and ignorant.verdict == "clean"


# --------------------------------------------------------------------------- the gate


def test_memorisation_probe_uses_device_of_recipe(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[Any] = []
    monkeypatch.setattr("llmrec.models.load.device", lambda section: "meta")
    monkeypatch.setattr(
        audit, "audit_memorisation", lambda backend, data, seed: devices.append(backend.model.device.type)
    )
    audit._run_memorisation_probe(study)
    assert devices == ["meta"]


def test_results_of_leaking_run_cannot_be_read(tmp_path: Path) -> None:
    of = write_json(tmp_path / "results.json", {})
    audit.write(tmp_path, [Check("candidates", "3 in 10 sets", "leak", ("request a|b",))], of=of)
    with raises(
        LlmrecError,
        Facts("leak", "audit.json", says=("this run leaks held-out data", "candidates: 3 in 10 sets", "a|b")),
    ):
        read_results(tmp_path)


def test_unfinished_run_cannot_be_audited(tmp_path: Path) -> None:
    with raises(LlmrecError, Facts("missing-file", tmp_path, says="`llmrec run`")):
        audit.audit(tmp_path)
