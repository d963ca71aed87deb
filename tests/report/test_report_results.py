"""Reading a run: what is refused, and what the refusal says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from llmrec.errors import DataError, ErrorKind, LlmrecError
from llmrec.report.page import write
from llmrec.report.results import failure_reasons, read, results_of
from llmrec.tasks.family import family_of
from tests.facts import Facts, raises
from tests.report.made import HEADLINE

ROOT = Path(__file__).resolve().parents[2]
Save = Callable[[dict[str, Any]], Path]


def test_missing_results_name_the_file_and_the_command(tmp_path: Path) -> None:
    with raises(
        DataError, Facts("missing-file", tmp_path / "results.json", says=f"llmrec eval RECIPE --out {tmp_path}")
    ):
        write(tmp_path)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("content", "kind", "key"),
    [
        (b"", "syntax", None),
        (b'{"rows": [', "syntax", None),
        (b"\xff\xfe\x00", "syntax", None),
        (b"[" * 100_000, "syntax", None),
        (b"[]", "wrong-format", None),
        (b"null", "wrong-format", None),
        (b"{}", "missing-key", "llmrec"),
    ],
)
def test_corrupt_results(run_dir: Path, content: bytes, kind: ErrorKind, key: str | None) -> None:
    (run_dir / "results.json").write_bytes(content)
    with raises(DataError, Facts(kind, run_dir / "results.json", column=key, says="llmrec eval")):
        write(run_dir)


def test_wrong_key_is_named_with_its_place(results: dict[str, Any], save: Save) -> None:
    results["rows"][3]["metrics"]["RMSE"]["value"] = "much"
    with raises(DataError, Facts("bad-value", "results.json", column="rows[3].metrics.RMSE.value")):
        write(save(results))


RUNS = ("four-tasks", "p5-decoder")


@pytest.mark.parametrize("name", RUNS)
def test_results_of_earlier_versions_are_read_and_nothing_of_them_is_lost(name: str) -> None:
    content = json.loads((ROOT / "eval" / "results" / f"{name}.json").read_text("utf-8"))
    found = results_of(content).as_json()
    # `recipe_page` is what `make bench NAME=record` adds, for the test of the README's table.
    assert {key for key in content if key not in found} <= {"kind", "recipe_page"}
    # The former test of position bias saw monotone trends only, and is not shown any more.
    rows = [{key: value for key, value in row.items() if key != "position_trend"} for row in content["rows"]]
    assert found["rows"] == rows and found["comparisons"] == content["comparisons"]
    assert found["training"] == content["training"] and found["machine"] == content["machine"]


def test_results_that_are_too_early_are_refused_in_one_line() -> None:
    content = json.loads((ROOT / "eval" / "results" / "four-tasks.json").read_text("utf-8"))
    del content["rows"][0]["metrics"]
    with raises(DataError, Facts("missing-key", "results.json", column="rows[0].metrics")):
        results_of(content)


def test_missing_predictions(run_dir: Path) -> None:
    (run_dir / "predictions.parquet").unlink()
    with raises(DataError, Facts("missing-file", run_dir / "predictions.parquet", says="llmrec eval")):
        write(run_dir)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all" * 100])
def test_corrupt_predictions(run_dir: Path, content: bytes) -> None:
    (run_dir / "predictions.parquet").write_bytes(content)
    with raises(DataError, Facts("damaged", run_dir / "predictions.parquet", says="llmrec eval")):
        write(run_dir)


def test_predictions_without_their_columns(run_dir: Path) -> None:
    pl.DataFrame({"row_id": ["a"]}).write_parquet(run_dir / "predictions.parquet")
    with raises(DataError, Facts("damaged", run_dir / "predictions.parquet", says='"error"')):
        write(run_dir)


def test_predictions_of_another_run(run_dir: Path, results: dict[str, Any]) -> None:
    results["rows"][0]["n"] = 199
    (run_dir / "results.json").write_text(json.dumps(results))
    with raises(
        DataError,
        Facts("mismatch", run_dir / "predictions.parquet", says=("200 predictions", "n = 199", "llmrec eval")),
    ):
        write(run_dir)


def test_reasons_are_counted_from_the_predictions(run_dir: Path) -> None:
    results = read(run_dir)
    reasons = failure_reasons(run_dir, results)
    assert reasons
    for row in results.rows:
        assert row.parse_rate is not None
        assert sum(reasons.get(row.id, {}).values()) == round((1 - row.parse_rate) * row.n)


# --------------------------------------------------------------------------- protocols and baselines


@pytest.mark.parametrize("field", ["ties:best", "cand:full", "seen:included", "split:global-time", "llmrec:0.0.9"])
def test_rows_of_different_protocols_are_refused(results: dict[str, Any], save: Save, field: str) -> None:
    row = next(row for row in results["rows"] if row["task"] == "sequential" and row["arm"] == "tuned")
    key = field.partition(":")[0]
    for metric in row["metrics"].values():
        metric["signature"] = re.sub(rf"\|{key}:[^|]*", f"|{field}", metric["signature"])
    with raises(LlmrecError, Facts("mismatch", "results.json", says=(field, row["id"]))):
        write(save(results))


def test_rows_that_share_no_metric_cannot_hide_a_protocol(results: dict[str, Any]) -> None:
    row = next(row for row in results["rows"] if row["task"] == "direct" and row["arm"] == "tuned")
    signature = row["metrics"]["NDCG@10"]["signature"].replace("cand:uniform-20-5f3c1a9b", "cand:full")
    row["metrics"] = {"HR@20": {"value": 0.9, "low": 0.8, "high": 1.0, "signature": signature}}
    with raises(LlmrecError, Facts("mismatch", "results.json", says=(row["id"], "cand:full"))):
        results_of(results)


def test_two_conventions_are_fine_when_every_row_has_both(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        if row["task"] == "direct":
            metric = row["metrics"]["NDCG@10"]
            row["metrics"]["NDCG@10 seen"] = {
                **metric,
                "signature": metric["signature"].replace("excluded", "included"),
            }
    assert "NDCG@10 seen" in results_of(results).metrics("direct")


def test_a_task_without_its_baselines_is_refused(results: dict[str, Any], save: Save) -> None:
    results["rows"] = [row for row in results["rows"] if row["task"] != "direct" or row["arm"] != "baseline"]
    results["comparisons"] = []
    folder = save(results)
    with raises(LlmrecError, Facts("missing-value", "results.json", column="tasks.direct.baselines")):
        write(folder)
    assert not (folder / "report" / "index.html").exists()


@pytest.mark.parametrize(("family", "name"), [(f, name) for f in HEADLINE for name in family_of(f).controls])
def test_a_task_that_lacks_one_control_is_refused(results: dict[str, Any], family: str, name: str) -> None:
    results["rows"] = [row for row in results["rows"] if row["task"] != family or row["predictor"] != name]
    results["comparisons"] = []
    with raises(
        LlmrecError,
        Facts("missing-value", "results.json", column=f"tasks.{family}.baselines", says=f"no baseline {name} "),
    ):
        results_of(results)


def test_rows_on_different_candidates_are_refused(results: dict[str, Any], save: Save) -> None:
    row = next(row for row in results["rows"] if row["task"] == "direct" and row["arm"] == "tuned")
    row["candidates"] = "0123456789abcdef" * 4
    folder = save(results)
    with raises(
        LlmrecError,
        Facts(
            "mismatch",
            folder / "results.json",
            column="candidates",
            says=(row["id"], "0123456789ab", "direct/zero-shot/label/pick-one", "5f3c1a9b5f3c"),
        ),
    ):
        write(folder)
    assert not (folder / "report").exists()


def test_a_row_that_does_not_say_its_candidates_cannot_hide_among_those_that_do(results: dict[str, Any]) -> None:
    row = next(row for row in results["rows"] if row["task"] == "direct" and row["arm"] == "baseline")
    row["candidates"] = None
    with raises(LlmrecError, Facts("mismatch", "results.json", column="candidates", says=f"{row['id']}' (no digest)")):
        results_of(results)


def test_candidates_that_the_run_does_not_describe_are_refused(results: dict[str, Any]) -> None:
    results["candidates"]["main"]["digest"] = "77" * 32
    with raises(
        LlmrecError,
        Facts("mismatch", "results.json", column="candidates", says=("sequential/zero-shot/", "digest 5f3c1a9b5f3c")),
    ):
        results_of(results)
    results["candidates"] = {}
    assert results_of(results).rows[9].candidates == "5f3c1a9b" * 8


def test_a_baseline_without_the_headline_metric_is_no_control(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        if row["task"] == "direct" and row["arm"] == "baseline":
            del row["metrics"]["NDCG@10"]
    with raises(
        LlmrecError,
        Facts("missing-value", "results.json", column="tasks.direct.baselines", says=("random", "'NDCG@10'")),
    ):
        results_of(results)


@pytest.mark.parametrize(
    ("change", "kind", "key", "says"),
    [
        (lambda results: results.update(rows=[]), "empty", "rows", ()),
        (lambda results: results["rows"].append(results["rows"][0]), "duplicate", "rows", "rating/zero-shot"),
        (lambda results: results["headline"].pop("rating"), "bad-value", "headline", "'rating'"),
        (lambda results: results["headline"].update(rating="NDCG@10"), "bad-value", "headline", "'NDCG@10'"),
        (
            lambda results: results["comparisons"][0].update(a="nobody"),
            "unknown-name",
            "comparisons",
            ("comparisons[0]", "'nobody'"),
        ),
        (
            lambda results: results["comparisons"][0].update(task="direct"),
            "unknown-name",
            "comparisons",
            ("comparisons[0]", "'direct'"),
        ),
    ],
)
def test_parts_that_do_not_fit(
    results: dict[str, Any],
    change: Callable[[dict[str, Any]], None],
    kind: ErrorKind,
    key: str,
    says: str | tuple[str, ...],
) -> None:
    change(results)
    with raises(LlmrecError, Facts(kind, "results.json", column=key, says=says)):
        results_of(results)


# --------------------------------------------------------------------------- order


def test_best_row_is_first_in_either_direction(results: dict[str, Any]) -> None:
    found = results_of(results)
    rating = [row.metrics["RMSE"].value for row in found.standings("rating")]
    ranking = [row.metrics["NDCG@10"].value for row in found.standings("sequential")]
    assert rating == sorted(value for value in rating if value is not None)
    assert ranking == sorted((value for value in ranking if value is not None), reverse=True)
    assert found.best("rating", "MAE") == min(
        r["metrics"]["MAE"]["value"] for r in results["rows"] if r["task"] == "rating"
    )


def test_rows_without_a_value_come_last_and_nan_is_no_value(results: dict[str, Any], save: Save) -> None:
    results["rows"][0]["metrics"]["RMSE"]["value"] = float("nan")
    found = read(save(results))
    assert found.standings("rating")[-1].id == results["rows"][0]["id"]
    assert found.standings("rating")[-1].metrics["RMSE"].value is None
    assert write(save(results))["html"].read_text().count("NaN") == 0


def test_unknown_keys_and_lone_surrogates_are_no_obstacle(results: dict[str, Any], save: Save) -> None:
    results["later"] = {"version": 2}
    results["notes"].append("half an emoji \ud83c here")
    text = write(save(results))["html"].read_text("utf-8")
    assert "half an emoji \ufffd here" in text
