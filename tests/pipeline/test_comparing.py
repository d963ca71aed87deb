"""Planned comparisons of a run, and their joint test over all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from llmrec.errors import RecipeError
from llmrec.evaluate.figures import metric_statistic
from llmrec.metrics.significance import holm_p_values
from llmrec.pipeline.comparing import check_planned_models, compare_rows, planned_comparisons
from llmrec.pipeline.evaluation import ResultRow
from llmrec.pipeline.row_specs import RowSpec, specs_for_arm
from llmrec.pipeline.study import Study, build_study
from llmrec.recipe.load import load_recipe
from llmrec.results import Comparison, FusionWeights, Metric, PartWeight, Prediction, Row
from llmrec.tasks.family import family_of

SMALL = (
    *("reviews=null", "tasks={rating: {strategies: [expected, parsed]}, sequential: {strategies: [likelihood]}}"),
    *("eval.users=40", "eval.bootstrap=200", "eval.backend=hf"),
)
USERS = 40
TUNED = {"rating": "rating/tuned/expected/list-ratings", "sequential": "sequential/tuned/likelihood/continue-list"}


def study(*more: str) -> Study:
    return build_study(load_recipe("recipes/movielens-100k/four-tasks.yaml", [*SMALL, *more]))


def rows_of(built: Study, levels: dict[str, float]) -> list[ResultRow]:
    """Return a row for each specification; its level is that of the first matching prefix of its id."""
    specs = [spec for arm in ("baseline", "zero-shot", "few-shot", "tuned") for spec in specs_for_arm(built, arm)]
    return [_row(built, spec, next((v for k, v in levels.items() if spec.id.startswith(k)), 0.5)) for spec in specs]


def _row(built: Study, spec: RowSpec, level: float) -> ResultRow:
    metric = family_of(spec.family).headline_at(built.recipe.eval.cutoffs)
    rng = np.random.default_rng(sum(map(ord, spec.id)))
    values = np.abs(level + rng.normal(0, 0.05, USERS))
    value = float(values.mean() if metric_statistic(metric) == "mean" else np.sqrt(values.mean()))
    figures = Row(
        id=spec.id, task=spec.family, arm=spec.arm, predictor=spec.predictor, n=USERS, engine="x",
        template=spec.template.id if spec.template else None, metrics={metric: Metric(value=value, signature="x")},
    )  # fmt: skip
    records = [
        Prediction(
            request_id=str(user), user_id=str(user), truth="", parsed="null", raw=None, prompt_hash=None, rank=None,
            error=None, prompt_tokens=0, completion_tokens=0,
        )
        for user in range(USERS)
    ]  # fmt: skip
    return ResultRow(figures, {metric: values}, records)


def with_verdict(comparisons: Sequence[Comparison]) -> dict[tuple[str, str], Comparison]:
    return {(entry.a, entry.b): entry for entry in comparisons if entry.verdict is not None}


@pytest.fixture(scope="module")
def built() -> Study:
    return study()


def test_tuned_rows_are_compared_with_untuned_and_best_control(built: Study) -> None:
    levels = {"sequential/baseline/markov": 0.9, "rating/baseline/user-item-bias": 0.2}
    pairs = [(pair.a.figures.id, pair.b.figures.id) for pair in planned_comparisons(built, rows_of(built, levels))]
    first = {family: tuned.replace("/tuned/", "/zero-shot/") for family, tuned in TUNED.items()}
    assert {pair for pair in pairs if "zero-shot" in pair[1]} == {(TUNED[name], first[name]) for name in TUNED}
    rivals = {b for _, b in pairs if "/baseline/" in b}
    assert rivals == {"rating/baseline/user-item-bias", next(b for b in rivals if b.startswith("sequential"))}
    assert len(pairs) == 4 and "markov" in str(rivals)


def test_only_planned_comparisons_have_p_values(built: Study) -> None:
    rows = rows_of(built, {"sequential/tuned": 0.9, "rating/tuned": 0.49})
    comparisons, lines = compare_rows(built, rows)
    planned = with_verdict(comparisons)
    assert len(planned) == 4 and comparisons[: len(planned)] == list(planned.values())
    raw = [entry.p_raw for entry in planned.values()]
    assert [entry.p for entry in planned.values()] == holm_p_values([p for p in raw if p is not None])
    for entry in planned.values():
        assert entry.low is not None and entry.high is not None and entry.p is not None
        assert (entry.low <= 0 <= entry.high) == (entry.p > 0.05) == (entry.verdict == "not shown")
    assert planned[TUNED["sequential"], TUNED["sequential"].replace("tuned", "zero-shot")].verdict == "shown"
    others = [entry for entry in comparisons if entry.verdict is None]
    assert others and not any({"p", "p_raw", "verdict"} & set(entry.as_json()) for entry in others)
    assert {entry.a.split("/")[1] for entry in others} == {"tuned", "few-shot", "zero-shot"}
    assert {entry.b for entry in comparisons if entry.a == TUNED["rating"]} >= {
        row.figures.id for row in rows if row.figures.id.startswith("rating/baseline/")
    }
    assert not set(planned) & {(entry.a, entry.b) for entry in others}
    assert set(lines) == {"rating", "sequential"}
    assert all("4 planned comparisons" in line and "an unadjusted 95 %" in line for line in lines.values())


def test_fusion_is_compared_with_best_baseline(built: Study) -> None:
    levels = {"sequential/baseline/markov": 0.7, "sequential/baseline/popularity": 0.9}
    rows = [row for row in rows_of(built, levels) if row.figures.id.startswith("sequential/baseline/")]
    best, other = (next(row for row in rows if row.figures.id.endswith(name)) for name in ("popularity", "random"))
    weights = FusionWeights(form="logit", parts=(PartWeight(name="popularity", weight=1.0),))
    joined = replace(other, figures=other.figures.model_copy(update={"fusion": weights}))
    comparisons, lines = compare_rows(built, [*(row for row in rows if row is not other), joined])
    assert [(entry.a, entry.b, entry.verdict) for entry in comparisons] == [(joined.figures.id, best.figures.id, None)]
    assert "0 planned" not in lines["sequential"]


def test_recipe_plans_other_pairs() -> None:
    pairs = [["rating/few-shot/parsed/list-ratings", "rating/best-baseline"]]
    pairs += [[TUNED["sequential"], "sequential/baseline/popularity"]]
    planned = study(f"eval.planned={pairs}".replace("'", '"'))
    check_planned_models(planned)
    rows = rows_of(planned, {"rating/baseline/user-mean": 0.1, "sequential/tuned": 0.9})
    comparisons, _ = compare_rows(planned, rows)
    assert set(with_verdict(comparisons)) == {
        ("rating/few-shot/parsed/list-ratings", "rating/baseline/user-mean"),
        (TUNED["sequential"], "sequential/baseline/popularity"),
    }
    none = study("eval.planned=[]")
    comparisons, lines = compare_rows(none, rows_of(none, {}))
    assert comparisons and not with_verdict(comparisons) and "planned" not in str(lines)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            ["rating/tuned/expectd/list-ratings", "rating/best-baseline"],
            "did you mean 'rating/tuned/expected/list-ratings'",
        ),
        (["rating/tuned/expected/list-ratings", "sequential/best-baseline"], "models of different tasks"),
        (["rating/tuned/expected/list-ratings", "explanation/best-baseline"], "there is no model 'explanation/best-b"),
    ],
)
def test_rejects_comparison_of_unknown_rows(pair: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_planned_models(study(f"eval.planned=[{pair}]".replace("'", '"')))


def test_nothing_is_planned_without_tuned_rows(built: Study) -> None:
    rows = [row for row in rows_of(built, {}) if row.figures.arm != "tuned"]
    assert list(planned_comparisons(built, rows)) == []
    comparisons, _ = compare_rows(built, rows)
    assert comparisons and not with_verdict(comparisons)
