"""One held-out set for all tasks, and keys that depend on everything that can change an adapter."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmrec.data.candidates import sample_candidates
from llmrec.errors import DataError, RecipeError
from llmrec.pipeline.evaluation import Evaluation, ResultRow
from llmrec.pipeline.resume import StageTimer
from llmrec.pipeline.study import Study, build_study
from llmrec.pipeline.training import plan_training
from llmrec.recipe.load import dump_recipe, load_recipe, recipe_hash
from llmrec.recipe.schema import Recipe
from tests.facts import Facts, raises

BASE = ("reviews=null", "data={source: made-reviews}", "eval.candidates.count=5", "eval.backend=hf")


def recipe(*overrides: str) -> Recipe:
    return load_recipe("recipes/movielens-100k/four-tasks.yaml", [*BASE, *overrides])


def test_two_tables_share_held_out_pairs() -> None:
    """The second table is filtered, so its held-out pairs differ."""
    study = build_study(recipe("reviews={source: made-reviews, filter: {min_rating: 4}}"))
    assert study.reviews is not None
    held = study.data.held_out | study.reviews.held_out
    assert study.data.held_out != study.reviews.held_out
    for data in (study.data, study.reviews):
        assert not held & set(data.train.select("user_id", "item_id").iter_rows())
    for family, task in study.tasks.items():
        for example in islice(task.examples("train"), 500):
            assert not held & set(example.pairs), family


def test_candidates_are_drawn_for_evaluated_users_only() -> None:
    every = build_study(recipe("eval.users=1000"))
    some = build_study(recipe("tasks.sequential.users=3", "tasks.direct.users=7", "tasks.rating.users=9"))
    assert some.candidates and every.candidates
    users = [each.user_id for each in every.data.holdouts("test")]
    assert some.candidates.users == set(dict.fromkeys(users[:7])) and every.candidates.users is None
    for family, count in (("sequential", 3), ("direct", 7)):
        assert [case.request for case in some.cases(family)] == [case.request for case in every.cases(family)][:count]
    assert set(some.candidates.sets) == {case.request.id for case in some.cases("direct")}
    assert every.candidates == sample_candidates(every.data, "test", every.recipe.eval.candidates, seed=0)


def test_training_seed_changes_rows_but_no_questions() -> None:
    one, two, same = (build_study(recipe(*more)) for more in ((), ("train.seed=5",), ("train.seed=0",)))
    for family in one.tasks:
        assert one.cases(family) == two.cases(family)
        rows = [[e.id for e in islice(study.training_examples(family), 30)] for study in (one, two, same)]
        assert rows[0] != rows[1] and rows[0] == rows[2], family
    assert one.candidates is not None and two.candidates is not None
    assert one.candidates.digest == two.candidates.digest and one.data.fingerprint == two.data.fingerprint
    shots = [
        study.tasks["rating"].prompt(study.cases("rating")[0].request, template="list-ratings", shots=1)
        for study in (one, two)
    ]
    assert shots[0] == shots[1]


def test_rejects_rows_that_never_fit(encoder: Any) -> None:
    study = build_study(recipe("tasks={direct: {}}", "train.max_row_tokens=20"))
    with raises(
        RecipeError, Facts("too-large", column="train.max_row_tokens", says=("train.max_row_tokens=20", "tasks.direct"))
    ):
        plan_training(study, encoder)


def test_rejects_split_without_cases() -> None:
    with raises(
        DataError, Facts("empty", "made-reviews", column="eval.split", says=("tasks.rating", "valid", "data.split"))
    ):
        build_study(recipe("data.split={kind: user_disjoint, valid: 0.0, test: 0.2}", "eval.split=valid"))


@pytest.mark.parametrize(
    ("override", "facts"),
    [
        (
            "tasks.sequential.strategies=[expected]",
            Facts("unknown-name", column="tasks.sequential.strategies", says=("'expected'", "choose from likelihood")),
        ),
        (
            "tasks.rating.baselines=[user-mean, user-item-bias]",
            Facts("missing-value", column="tasks.rating.baselines", says="global-mean, item-mean"),
        ),
        (
            "tasks.rating.baselines=[global-mean, user-mean, item-mean, {name: user-item-bias, user_penaltie: 1}]",
            Facts(
                "unknown-key",
                column="tasks.rating.baselines",
                says=("'user-item-bias'", "'user_penaltie' (did you mean 'user_penalty'?)"),
            ),
        ),
        (
            "tasks.rating.baselines=[global-mean, user-mean, item-mean, {name: user-item-bias, user_penalty: 0}]",
            Facts("bad-value", column="tasks.rating.baselines", says=("user_penalty of 'user-item-bias'", "got 0")),
        ),
        (
            "tasks={ctr: {baselines: [{name: like-ratio, liked: 3}]}}",
            Facts("contradiction", column="tasks.ctr.baselines", says="set tasks.ctr.liked"),
        ),
        ("tasks.rating.baselines=[{user_penalty: 1}]", Facts("bad-value", column="tasks.rating.baselines.0.name")),
        (
            "tasks.rating.baselines=[{name: mf, factors: 3, rounds: 2}, {name: mf, rounds: 2, factors: 3}]",
            Facts("contradiction", column="tasks.rating.baselines", says="'mf(factors=3, rounds=2)'"),
        ),
        ("tasks.direct.strategies=[label, label]", Facts("contradiction", column="tasks.direct.strategies")),
        ("eval.cutoffs=[]", Facts("bad-value", column="eval.cutoffs")),
        ("eval.arms=[tuned, tuned]", Facts("contradiction", column="eval.arms")),
    ],
)
def test_rejects_contradicting_settings(override: str, facts: Facts) -> None:
    with raises(RecipeError, facts):
        build_study(recipe(override))


def test_rejects_unused_second_table() -> None:
    assert set(build_study(recipe("tasks={rating: {}}")).tasks) == {"rating"}
    with raises(RecipeError, Facts("contradiction", column="reviews", says="tasks.explanation")):
        load_recipe("recipes/movielens-100k/four-tasks.yaml", ["tasks={rating: {}}"])


def test_baseline_with_parameters_has_another_row_and_key(tmp_path: Path) -> None:
    names = "global-mean, user-mean, item-mean, user-item-bias"
    study = build_study(
        recipe(f"tasks={{rating: {{baselines: [{names}, {{name: user-item-bias, user_penalty: 500}}]}}}}")
    )

    def rows(study: Study) -> dict[str, ResultRow]:
        results = Evaluation(study, None, tmp_path, StageTimer(), quiet=True).baselines()
        return {row.figures.predictor: row for row in results}

    results = rows(study)
    plain, other = results["user-item-bias"], results["user-item-bias(user_penalty=500)"]
    assert other.figures.id == "rating/baseline/user-item-bias(user_penalty=500)"
    assert plain.figures.metrics["RMSE"].value != other.figures.metrics["RMSE"].value
    stored = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "rows").iterdir()}
    assert len({row["key"] for row in stored.values()}) == len(stored) == 6
    # The default penalty, stated explicitly, gives the same model.
    same = rows(
        build_study(recipe(f"tasks={{rating: {{baselines: [{names}, {{name: user-item-bias, user_penalty: 5}}]}}}}"))
    )
    assert same["user-item-bias(user_penalty=5)"].figures.metrics == plain.figures.metrics


def test_baseline_name_equals_mapping_without_parameters() -> None:
    names = ("global-mean", "user-mean", "item-mean", "user-item-bias", "svd")
    plain = recipe(f"tasks={{rating: {{baselines: [{', '.join(names)}]}}}}")
    mapped = recipe(f"tasks={{rating: {{baselines: [{', '.join(f'{{name: {name}}}' for name in names)}]}}}}")
    assert plain == mapped == recipe("tasks={rating: {}}") and recipe_hash(plain) == recipe_hash(mapped)
    assert plain.model_dump()["tasks"]["rating"]["baselines"] == names
    tuned = recipe(f"tasks={{rating: {{baselines: [{', '.join(names)}, {{name: mf, rounds: 3}}]}}}}")
    assert Recipe.model_validate(yaml.safe_load(dump_recipe(tuned))) == tuned
