"""All values of results.json can be recomputed from the other files of a run, without llmrec."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from llmrec.pipeline import run as pipeline
from llmrec.pipeline.audit import audit
from llmrec.pipeline.results import ITEM_COLUMNS, PREDICTION_SCHEMA
from llmrec.recipe.load import load_recipe
from llmrec.report import page as report
from llmrec.results import Prediction
from tests.pipeline import given_table, recompute
from tests.review_files import records, write

ROOT = Path(__file__).parent.parent.parent
ANSWERS = {
    **dict.fromkeys(("sequential", "direct", "alignment"), "ranking"),
    **dict.fromkeys(("rating", "stars"), "rating"),
    **dict.fromkeys(("explanation", "review"), "text"),
    "ctr": "probability",
}
TASKS = (
    "tasks={rating: {strategies: [expected, parsed]}, ctr: {liked: 4, strategies: [yes-no, parsed-yes-no]}, "
    "sequential: {baselines: [random, popularity, item-knn, markov-1]}, direct: {}, explanation: {}}",
    "eval={arms: [zero-shot, few-shot], backend: fake, scorer: fake, users: 20, bootstrap: 50, cutoffs: [1, 3, 10], "
    "candidates: {count: 10}, shots: {k: 1}}",
)
CATALOGUE = (
    "tasks={sequential: {strategies: [search]}}",
    "eval={arms: [zero-shot], backend: fake, scorer: fake, users: 20, bootstrap: 50, beams: 6, cutoffs: [5, 10], "
    "candidates: {kind: catalogue}}",
)
RETRIEVED = (
    "tasks={direct: {strategies: [label]}, ctr: {liked: 4, calibrate: valid}}",
    "eval={arms: [zero-shot], backend: fake, users: 20, bootstrap: 50, cutoffs: [5, 10], "
    "candidates: {kind: retrieved, retriever: popularity, count: 8}}",
)
REVIEWS = (
    "eval={arms: [zero-shot], backend: fake, scorer: fake, users: 10, bootstrap: 50}",
    "tasks.explanation.max_tokens=8",
    "tasks.review.max_tokens=4",
)
ALIGNED = (
    "index={scheme: random}",
    "tasks={alignment: {weight: 0, held_out: 0.8}}",
    "eval={arms: [zero-shot], backend: fake, scorer: fake, users: 12, bootstrap: 50, candidates: {count: 8}}",
)
TABLES = {"aligned": ALIGNED, "tasks": TASKS, "catalogue": CATALOGUE, "retrieved": RETRIEVED}
RUNS = (*TABLES, "reviews")


@pytest.fixture(scope="module")
def runs(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, pipeline.Run]]:
    folder = given_table.write(tmp_path_factory.mktemp("table"))
    page = folder / "page.yaml"
    page.write_text(given_table.PAGE.format(folder=folder, model=llama_folder), encoding="utf-8")
    done = {
        name: pipeline.run(load_recipe(str(page), list(changes)), folder / name, quiet=True)
        for name, changes in TABLES.items()
    }
    path = write(folder / "reviews.jsonl.gz", records())
    changes = [f"model.name={llama_folder}", "model.dtype=float32", f"data.path={path}", *REVIEWS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMREC_CACHE", str(folder))
        recipe = load_recipe(str(ROOT / "recipes" / "reviews" / "musical-instruments.yaml"), changes)
        done["reviews"] = pipeline.run(recipe, folder / "reviews", quiet=True)
        yield done


def close(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9)


def stored(run: pipeline.Run) -> tuple[dict[str, Any], dict[str, recompute.Columns]]:
    results = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
    return results, recompute.rows_of(recompute.read(run.folder / "predictions.parquet"))


def test_recomputation_shares_no_code() -> None:
    source = Path(recompute.__file__).read_text(encoding="utf-8")
    assert not re.search(r"^\s*(?:from|import) +(?:llmrec|tests|eval|\.)", source, re.MULTILINE)


@pytest.mark.parametrize("name", RUNS)
def test_metrics_of_rows(runs: dict[str, pipeline.Run], name: str) -> None:
    results, rows = stored(runs[name])
    assert [row["id"] for row in results["rows"]] == list(rows)
    for row in results["rows"]:
        signatures = {metric: figure["signature"] for metric, figure in row["metrics"].items()}
        values = recompute.metrics(rows[row["id"]], ANSWERS[row["task"]], signatures)
        assert values.keys() == signatures.keys(), row["id"]
        for metric, value in values.items():
            assert close(value, row["metrics"][metric]["value"]), (row["id"], metric)


@pytest.mark.parametrize("name", RUNS)
def test_counts_rates_and_costs_of_rows(runs: dict[str, pipeline.Run], name: str) -> None:
    results, rows = stored(runs[name])
    for row in results["rows"]:
        values = recompute.rates(rows[row["id"]], ANSWERS[row["task"]])
        stated = row | row["cost"]
        if "reliability" in values:
            curve = np.array([(each["n"], each["said"], each["so"]) for each in stated["reliability"]])
            assert np.allclose(np.array(values.pop("reliability")), curve, rtol=1e-9, atol=1e-9)
        for key, value in values.items():
            assert close(value, stated[key]), (row["id"], key)
        rest = {"fallbacks", "users_left_out", "truth_copy_rate", "truth_hallucination_rate", "features_asked"}
        assert (rest | {"features_named"}) & row.keys() <= values.keys()


@pytest.mark.parametrize("name", RUNS)
def test_slices_positions_and_comparisons(runs: dict[str, pipeline.Run], name: str) -> None:
    results, rows = stored(runs[name])
    items = recompute.read(runs[name].folder / "items.parquet")
    checked: set[str] = set()
    for row in results["rows"]:
        records, table = rows[row["id"]], results["tables"][row["task"]]
        indices = [index for index, each in enumerate(items["table"]) if each == table]
        training = np.array(items["training"])[indices]
        for part in row["slices"]:
            member = recompute.in_slice(records, part["name"], training)
            users = {user for user, inside in zip(records["user_id"], member, strict=True) if inside}
            assert (int(member.sum()), len(users)) == (part["n"], part["users"]), (row["id"], part["name"])
            for metric, figure in part["metrics"].items():
                mean = float(recompute.sliced(records, metric)[member].mean())
                value = mean**0.5 if metric == "RMSE" else mean
                assert close(value, figure["value"]), (row["id"], part["name"])
                checked.add(part["name"].partition(":")[0])
        if "by_position" in row:
            values = recompute.by_position(records)
            assert [each["position"] for each in values] == [each["position"] for each in row["by_position"]]
            for one, other in zip(values, row["by_position"], strict=True):
                assert all(close(one[key], other.get(key)) for key in one), row["id"]
            checked.add("by_position")
        if "position_bias" in row:
            stated = row["position_bias"]
            assert all(map(close, recompute.bias(records), (stated["share"], stated["rho"]))), row["id"]
    assert {"history", "activity"} <= checked
    assert name not in ("tasks", "retrieved") or {"item", "by_position"} <= checked
    figures = {row["id"]: row["metrics"] for row in results["rows"]}
    assert results["comparisons"]
    for pair in results["comparisons"]:
        a, b = (figures[pair[side]][pair["metric"]]["value"] for side in ("a", "b"))
        assert close(pair["value"], a - b), pair


def test_runs_contain_special_cases(runs: dict[str, pipeline.Run]) -> None:
    """Ties, missing targets, unparsed answers with and without substitutes, texts with features."""
    _, rows = stored(runs["tasks"])
    every = recompute.read(runs["tasks"].folder / "predictions.parquet")
    assert any(tied is not None and tied > 1 for tied in every["tied"])
    assert 0 in every["tied"] and any(error is not None for error in every["error"])
    tied = rows["sequential/baseline/popularity"]
    naive = np.mean([1 / np.log2(rank + 1) if rank <= 3 else 0 for rank in tied["rank"]])
    assert abs(naive - recompute.per_request(tied, "NDCG@3").mean()) > 1e-3  # the mean rank is not enough
    unread = rows["ctr/zero-shot/parsed-yes-no/by-taste"]
    assert any(e is not None and v == 0.5 for e, v in zip(unread["error"], unread["value"], strict=True))
    _, rows = stored(runs["catalogue"])
    assert 0 in rows["sequential/zero-shot/search/continue-list"]["tied"]
    assert all(tied > 10 for tied in rows["sequential/baseline/random"]["tied"])
    reviews = recompute.read(runs["reviews"].folder / "predictions.parquet")
    assert any(reviews["feature"]) and any(reviews["features"]) and True in reviews["feature_named"]
    assert None in recompute.read(runs["retrieved"].folder / "predictions.parquet")["position"]


# --------------------------------------------------------------------------- the files


def columns(page: str, heading: str) -> dict[str, str]:
    """Return the columns described in a section of a page, with the last cell of their rows."""
    section = page.partition(f"### {heading}\n")[2].partition("\n#")[0]
    rows = re.findall(r"^\| (`[^|]+`) \|.* \|([^|]*)\|$", section, re.MULTILINE)
    return {name: last.strip() for names, last in rows for name in re.findall(r"`(\w+)`", names)}


def test_columns_match_documentation(runs: dict[str, pipeline.Run]) -> None:
    page = (ROOT / "docs" / "datasets-and-output-files.md").read_text(encoding="utf-8")
    first, second = columns(page, "predictions.parquet"), columns(page, "items.parquet")
    assert sorted(first) == sorted(PREDICTION_SCHEMA) and sorted(second) == sorted(ITEM_COLUMNS)
    for run in runs.values():
        assert list(pl.read_parquet_schema(run.folder / "predictions.parquet")) == list(PREDICTION_SCHEMA)
        assert dict(pl.read_parquet_schema(run.folder / "items.parquet")) == dict(ITEM_COLUMNS)
    never = [name for name, null in first.items() if not null]
    assert len(never) > 10
    for run in runs.values():
        frame = pl.read_parquet(run.folder / "predictions.parquet")
        assert {name: frame[name].null_count() for name in never} == dict.fromkeys(never, 0)
        baselines = frame.filter(pl.col("arm") == "baseline")
        for name in ("template", "prompt_hash"):
            assert baselines[name].null_count() == baselines.height
            assert frame[name].null_count() == baselines.height
    assert Prediction.model_fields.keys() <= PREDICTION_SCHEMA.keys()


def test_items_match_the_data(runs: dict[str, pipeline.Run]) -> None:
    results, _ = stored(runs["tasks"])
    items = pl.read_parquet(runs["tasks"].folder / "items.parquet")
    main = results["data"]["main"]
    assert items.height == main["items"] and items["training"].sum() == main["train"]
    assert items.filter(pl.col("item_id") == "new").rows() == [("main", "new", 0, 0)]


def test_older_run_without_columns_is_read(runs: dict[str, pipeline.Run], tmp_path: Path) -> None:
    old = ["row_id", "task", "arm", "predictor", "template", "request_id", "user_id", "truth", "parsed", "raw"]
    old += ["prompt_hash", "rank", "error", "prompt_tokens", "completion_tokens"]
    folder = tmp_path / "old"
    shutil.copytree(runs["tasks"].folder, folder)
    pl.read_parquet(folder / "predictions.parquet").select(old).write_parquet(folder / "predictions.parquet")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    results.pop("files")
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (folder / "items.parquet").unlink()
    for path in (folder / "rows").glob("*.json"):
        row = json.loads(path.read_text(encoding="utf-8"))
        kept = [{key: value for key, value in record.items() if key in old} for record in row["records"]]
        path.write_text(json.dumps({**row, "records": kept}), encoding="utf-8")
    assert Prediction.model_validate(kept[0]).above is None
    assert not [check for check in audit(folder) if check.verdict == "leak"]
    report.write_report(folder)
    assert (folder / "report" / "index.html").is_file()
