"""What answers under the name of a row of the report gives the lists of that row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest

import llmrec
from llmrec import pipeline
from llmrec.answering.loaded import Loaded
from llmrec.commands.rank.options import RankOptions
from llmrec.commands.rank.run import rank_file
from llmrec.commands.serve.options import ServeOptions
from llmrec.commands.serve.run import make_service
from llmrec.data.requests import told_event
from llmrec.errors import RecipeError
from llmrec.experiment.study import build_study
from llmrec.recipe.load import load_recipe
from tests.answering.rank_cases import jsonl, lines
from tests.facts import Facts, raises

CLASSIC = (
    *("data={source: made-reviews, noun: products}", "reviews=null", "eval.arms=[]", "eval.bootstrap=20", "seed=2"),
    "tasks={sequential: {baselines: [random, popularity, {name: item-knn, history: 1}, {name: item-knn, history: 5}, "
    "content, markov-1]}}",
    *("eval.users=12", "eval.candidates.count=8"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pipeline.Run:
    """A run of classic recommenders alone."""
    recipe = load_recipe("recipes/quickstart.yaml", CLASSIC)
    return pipeline.run(recipe, tmp_path_factory.mktemp("rows") / "r", quiet=True)


@pytest.fixture(scope="module")
def rec(run: pipeline.Run) -> Iterator[Loaded]:
    with llmrec.load(str(run.folder)) as found:
        yield found


@pytest.fixture(scope="module")
def requests(run: pipeline.Run) -> list[dict[str, Any]]:
    """The requests of the test split, as users of an interface write them."""
    study = build_study(load_recipe(run.folder / "recipe.yaml"))
    return [
        {
            "id": case.request.id,
            "history": [told_event(event) for event in case.request.history],
            "candidates": list(case.request.candidates or ()),
        }
        for case in study.cases("sequential")
    ]


def measured(run: pipeline.Run, row: str) -> dict[str, list[tuple[str, float]]]:
    """Return the lists that a row was measured with, by request."""
    frame = pl.read_parquet(run.folder / "predictions.parquet").filter(pl.col("row_id") == row)
    found = {}
    for request, parsed in frame.select("request_id", "parsed").iter_rows():
        said = json.loads(parsed)
        found[request] = list(zip(said["items"], said["scores"], strict=True))
    return found


def test_every_row_of_the_report_but_chance_is_served_under_its_name(run: pipeline.Run, rec: Loaded) -> None:
    rows = {row["predictor"] for row in run.results["rows"]}
    assert {"fusion", "fusion with texts", "item-knn(history=1)", "item-knn(history=5)"} <= rows
    assert set(rec.models) == rows - {"random"}


def test_a_name_gives_the_lists_of_its_row(run: pipeline.Run, rec: Loaded, requests: list[dict[str, Any]]) -> None:
    lists = {}
    for row in run.results["rows"]:
        name, known = row["predictor"], measured(run, row["id"])
        if name == "random":
            continue
        assert len(known) == len(requests) == 12
        for request in requests:
            found = rec.rank(**request, model=name, k=100)
            wanted = known[request["id"]]
            assert [each.item_id for each in found] == [item for item, _ in wanted], name
            assert [each.score for each in found] == pytest.approx([score for _, score in wanted]), name
        lists[name] = known
    # Two fusions that differ in nothing would prove nothing.
    assert lists["fusion"] != lists["fusion with texts"]


def test_a_method_alone_means_its_first_row_and_a_row_may_be_named_by_its_id(
    run: pipeline.Run, rec: Loaded, requests: list[dict[str, Any]]
) -> None:
    asked = requests[0]
    assert rec.rank(**asked, model="item-knn") == rec.rank(**asked, model="item-knn(history=1)")
    names = ["sequential/baseline/fusion with texts", "item-knn(history=5)", "item-knn"]
    with llmrec.load(str(run.folder), models=names) as chosen:
        assert chosen.models == ("fusion with texts", "item-knn(history=5)", "item-knn(history=1)")
        assert chosen.rank(**asked) == rec.rank(**asked, model="fusion with texts")
    with raises(RecipeError, Facts("unknown-name", column="model")):
        rec.rank(**asked, model="fusion with models")


@pytest.mark.parametrize("name", ["fusion", "fusion with texts"])
def test_a_file_is_ranked_by_the_row_that_is_named(
    run: pipeline.Run, requests: list[dict[str, Any]], tmp_path: Path, name: str
) -> None:
    file = jsonl(tmp_path / "in.jsonl", requests)
    rank_file(RankOptions(baseline=name, recipe=str(run.folder), requests=file, out=tmp_path / "out.jsonl"))
    known = measured(run, f"sequential/baseline/{name}")
    for line in lines(tmp_path / "out.jsonl"):
        assert list(zip(line["items"], line["scores"], strict=True)) == known[line["request_id"]]


def test_a_service_knows_the_rows_by_their_names(
    run: pipeline.Run, rec: Loaded, requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("fastapi", reason="the serve extra is not installed")
    from llmrec.serve.app import make_app
    from llmrec.serve.gates import Auth
    from tests.serve.served import listening, wait_ready

    service = make_service(ServeOptions(model=str(run.folder), store=str(tmp_path / "store.sqlite")))
    with listening(make_app(service, Auth())) as (url,):
        wait_ready(url)
        assert [each["name"] for each in httpx.get(f"{url}/v1/models").json()["models"]] == list(rec.models)
        for name in ("fusion", "fusion with texts", "item-knn"):
            body = {**requests[0], "model": name, "k": 100}
            found = httpx.post(f"{url}/v1/rank", json=body, timeout=60).json()
            wanted = rec.rank(**requests[0], model=name, k=100)
            assert [each["item_id"] for each in found["items"]] == [each.item_id for each in wanted]
            assert found["model"]["name"] == ("item-knn(history=1)" if name == "item-knn" else name)
