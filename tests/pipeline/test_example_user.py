"""The example user of a report: drawn by the seed, with the list of the main row."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llmrec.pipeline import run as pipeline
from llmrec.pipeline.examples import example_user
from llmrec.pipeline.study import Study, build_study
from llmrec.recipe.load import load_recipe
from llmrec.results import FusionWeights

RECIPE = """\
name: shop
data: {source: made-reviews, noun: products, split: {kind: last_share, valid: 0.2, test: 0.4}}
tasks: {rating: {}, sequential: {baselines: [random, popularity, item-knn, markov-1]}}
eval: {arms: [], users: 12, bootstrap: 50, candidates: {count: 5}, fusion: {controls: false}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, pipeline.Run]:
    folder: Path = tmp_path_factory.mktemp("shop")
    (folder / "page.yaml").write_text(RECIPE)
    run = pipeline.run(folder / "page.yaml", folder / "run", quiet=True)
    return build_study(load_recipe(folder / "page.yaml")), run


def test_example_shows_list_of_best_row(finished: tuple[Study, pipeline.Run]) -> None:
    study, run = finished
    shown = run.results["example"]
    rows = [row for row in run.results["rows"] if row["task"] == "sequential"]
    assert shown["row"] == max(rows, key=lambda row: row["metrics"]["NDCG@10"]["value"])["id"]
    items = study.data.dataset.items
    case = next(
        case
        for case in study.cases("sequential")
        if case.request.user_id == shown["user"]["id"] and items[str(case.truth)].title == shown["truth"]
    )
    history = [items[event.item_id].title for event in case.request.history]
    assert shown["history"] == history[-8:] and shown["events"] == len(history)
    row = next(row for row in run.rows if row.figures.id == shown["row"])
    record = row.records[study.cases("sequential").index(case)]
    listed = json.loads(record.parsed)["items"]
    assert shown["listed"] == [items[item].title for item in listed[:5]]
    assert shown["hit"] == (listed.index(case.truth) + 1 if case.truth in listed[:5] else None)
    assert (shown["rank"], shown["pool"]) == (record.rank, 5)
    assert "One user" in run.report.read_text(encoding="utf-8")


def test_example_prefers_tuned_model_and_skips_ensembles(finished: tuple[Study, pipeline.Run]) -> None:
    study, run = finished
    headline = run.results["headline"]
    worst = min(
        (row for row in run.rows if row.figures.task == "sequential"),
        key=lambda row: row.figures.metrics["NDCG@10"].value or 0.0,
    )
    tuned = replace(worst, figures=worst.figures.model_copy(update={"id": "tuned", "arm": "tuned"}))
    joined = {"id": "joined", "fusion": FusionWeights(form="alone", parts=())}
    ensemble = replace(tuned, figures=tuned.figures.model_copy(update=joined))
    example = example_user(study, [*run.rows, ensemble, tuned], headline)
    assert example is not None and example.row == "tuned" and example.user.id == run.results["example"]["user"]["id"]
    assert example_user(study, [row for row in run.rows if row.figures.task == "rating"], headline) is None
