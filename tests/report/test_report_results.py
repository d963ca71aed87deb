"""Reading the results of a run, and errors of wrong results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from llmrec.errors import DataError, ErrorKind, LlmrecError
from llmrec.report.page import write_report
from llmrec.report.results import failure_reasons, parse_results, read_results
from llmrec.tasks.family import family_of
from tests.facts import Facts, raises

ROOT = Path(__file__).resolve().parents[2]
Save = Callable[[dict[str, Any]], Path]


def test_missing_results_name_the_file_and_the_command(tmp_path: Path) -> None:
    says = f"llmrec eval RECIPE --out {tmp_path}"
    with raises(DataError, Facts("missing-file", tmp_path / "results.json", says=says)):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("content", "kind", "key"),
    [
        (b'{"rows": [', "syntax", None),
        (b"\xff\xfe\x00", "syntax", None),
        (b"[" * 100_000, "syntax", None),
        (b"[]", "wrong-format", None),
        (b"{}", "missing-key", "llmrec"),
    ],
)
def test_rejects_corrupt_results(tmp_path: Path, content: bytes, kind: ErrorKind, key: str | None) -> None:
    (tmp_path / "results.json").write_bytes(content)
    with raises(DataError, Facts(kind, tmp_path / "results.json", column=key, says="llmrec eval")):
        write_report(tmp_path)


def test_reads_all_values_of_committed_results() -> None:
    content = json.loads((ROOT / "eval" / "results" / "four-tasks.json").read_text("utf-8"))
    result = parse_results(content).as_json()
    # `make bench NAME=record` adds `recipe_page`, for the test of the table in the README.
    assert {key for key in content if key not in result} <= {"kind", "recipe_page"}
    # Earlier versions had another test of position bias.
    rows = [{key: value for key, value in row.items() if key != "position_trend"} for row in content["rows"]]
    assert result["rows"] == rows and result["comparisons"] == content["comparisons"]
    assert result["training"] == content["training"] and result["machine"] == content["machine"]


def test_errors_name_the_key(results: dict[str, Any]) -> None:
    results["rows"][3]["metrics"]["RMSE"]["value"] = "much"
    with raises(DataError, Facts("bad-value", "results.json", column="rows[3].metrics.RMSE.value")):
        parse_results(results)
    del results["rows"][0]["metrics"]
    with raises(DataError, Facts("missing-key", "results.json", column="rows[0].metrics")):
        parse_results(results)


def test_rejects_wrong_predictions(run_dir: Path, results: dict[str, Any]) -> None:
    path = run_dir / "predictions.parquet"
    results["rows"][0]["n"] = 199
    (run_dir / "results.json").write_text(json.dumps(results))
    with raises(DataError, Facts("mismatch", path, says=("200 predictions", "n = 199", "llmrec eval"))):
        write_report(run_dir)
    pl.DataFrame({"row_id": ["a"]}).write_parquet(path)
    with raises(DataError, Facts("damaged", path, says='"error"')):
        write_report(run_dir)
    path.write_bytes(b"not parquet at all" * 100)
    with raises(DataError, Facts("damaged", path, says="llmrec eval")):
        write_report(run_dir)
    path.unlink()
    with raises(DataError, Facts("missing-file", path, says="llmrec eval")):
        write_report(run_dir)


def test_reasons_are_counted_from_the_predictions(run_dir: Path) -> None:
    results = read_results(run_dir)
    reasons = failure_reasons(run_dir, results)
    assert reasons
    for row in results.rows:
        assert row.parse_rate is not None
        assert sum(reasons.get(row.id, {}).values()) == round((1 - row.parse_rate) * row.n)


# --------------------------------------------------------------------------- protocols and baselines


@pytest.mark.parametrize("field", ["ties:best", "llmrec:0.0.9"])
def test_rejects_rows_of_different_protocols(results: dict[str, Any], field: str) -> None:
    row = next(row for row in results["rows"] if row["task"] == "sequential" and row["arm"] == "tuned")
    key = field.partition(":")[0]
    for metric in row["metrics"].values():
        metric["signature"] = re.sub(rf"\|{key}:[^|]*", f"|{field}", metric["signature"])
    with raises(LlmrecError, Facts("mismatch", "results.json", says=(field, row["id"]))):
        parse_results(results)


def test_rejects_different_protocols_without_a_common_metric(results: dict[str, Any]) -> None:
    row = next(row for row in results["rows"] if row["task"] == "direct" and row["arm"] == "tuned")
    signature = row["metrics"]["NDCG@10"]["signature"].replace("cand:uniform-20-5f3c1a9b", "cand:full")
    row["metrics"] = {"HR@20": {"value": 0.9, "low": 0.8, "high": 1.0, "signature": signature}}
    with raises(LlmrecError, Facts("mismatch", "results.json", says=(row["id"], "cand:full"))):
        parse_results(results)


def test_accepts_two_protocols_of_every_row(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        if row["task"] == "direct":
            metric = row["metrics"]["NDCG@10"]
            signature = metric["signature"].replace("excluded", "included")
            row["metrics"]["NDCG@10 seen"] = metric | {"signature": signature}
    assert "NDCG@10 seen" in parse_results(results).metrics("direct")


def test_rejects_task_without_baselines(results: dict[str, Any], save: Save) -> None:
    results["rows"] = [row for row in results["rows"] if row["task"] != "direct" or row["arm"] != "baseline"]
    results["comparisons"] = []
    folder = save(results)
    with raises(LlmrecError, Facts("missing-value", "results.json", column="tasks.direct.baselines")):
        write_report(folder)
    assert not (folder / "report" / "index.html").exists()


def test_rejects_task_without_one_control(results: dict[str, Any]) -> None:
    name = family_of("rating").controls[-1]
    rows = [row for row in results["rows"] if row["task"] != "rating" or row["predictor"] != name]
    expected = Facts("missing-value", "results.json", column="tasks.rating.baselines", says=f"no baseline {name} ")
    with raises(LlmrecError, expected):
        parse_results(results | {"rows": rows, "comparisons": []})
    # A baseline without the main metric is not a control.
    for row in results["rows"]:
        if row["task"] == "direct" and row["arm"] == "baseline":
            del row["metrics"]["NDCG@10"]
    says = ("random", "'NDCG@10'")
    with raises(LlmrecError, Facts("missing-value", "results.json", column="tasks.direct.baselines", says=says)):
        parse_results(results)


@pytest.mark.parametrize(
    ("arm", "digest", "says"),
    [
        ("tuned", "0123456789abcdef" * 4, ("0123456789ab", "direct/zero-shot/label/pick-one", "5f3c1a9b5f3c")),
        ("baseline", None, ("' (no digest)",)),
    ],
)
def test_rejects_rows_on_different_candidates(
    results: dict[str, Any], arm: str, digest: str | None, says: tuple[str, ...]
) -> None:
    row = next(row for row in results["rows"] if row["task"] == "direct" and row["arm"] == arm)
    row["candidates"] = digest
    with raises(LlmrecError, Facts("mismatch", "results.json", column="candidates", says=(row["id"], *says))):
        parse_results(results)


def test_rejects_candidates_that_differ_from_those_of_the_run(results: dict[str, Any]) -> None:
    results["candidates"]["main"]["digest"] = "77" * 32
    says = ("sequential/zero-shot/", "digest 5f3c1a9b5f3c")
    with raises(LlmrecError, Facts("mismatch", "results.json", column="candidates", says=says)):
        parse_results(results)
    results["candidates"] = {}
    assert parse_results(results).rows[9].candidates == "5f3c1a9b" * 8


def test_rejects_parts_that_do_not_match(results: dict[str, Any]) -> None:
    rows, headline, entry = results["rows"], results["headline"], results["comparisons"][0]
    three = {task: headline[task] for task in headline if task != "rating"}
    changes: list[tuple[dict[str, Any], ErrorKind, tuple[str, ...]]] = [
        ({"rows": []}, "empty", ()),
        ({"rows": [*rows, rows[0]]}, "duplicate", ("rating/zero-shot",)),
        ({"headline": three}, "bad-value", ("'rating'",)),
        ({"headline": headline | {"rating": "NDCG@10"}}, "bad-value", ("'NDCG@10'",)),
        ({"comparisons": [entry | {"a": "missing"}]}, "unknown-name", ("comparisons[0]", "'missing'")),
        ({"comparisons": [entry | {"task": "direct"}]}, "unknown-name", ("comparisons[0]", "'direct'")),
    ]
    for change, kind, says in changes:
        (column,) = change
        with raises(LlmrecError, Facts(kind, "results.json", column=column, says=says)):
            parse_results(results | change)


# --------------------------------------------------------------------------- order


def test_best_row_is_first_in_either_direction(results: dict[str, Any]) -> None:
    result = parse_results(results)
    rating = [row.metrics["RMSE"].value for row in result.standings("rating")]
    ranking = [row.metrics["NDCG@10"].value for row in result.standings("sequential")]
    assert rating == sorted(value for value in rating if value is not None)
    assert ranking == sorted((value for value in ranking if value is not None), reverse=True)
    assert result.best("rating", "MAE") == min(
        r["metrics"]["MAE"]["value"] for r in results["rows"] if r["task"] == "rating"
    )


def test_rows_without_a_value_are_last(results: dict[str, Any], save: Save) -> None:
    results["rows"][0]["metrics"]["RMSE"]["value"] = float("nan")
    result = read_results(save(results))
    assert result.standings("rating")[-1].id == results["rows"][0]["id"]
    assert result.standings("rating")[-1].metrics["RMSE"].value is None
    assert write_report(save(results))["html"].read_text().count("NaN") == 0


def test_accepts_unknown_keys_and_lone_surrogates(results: dict[str, Any], save: Save) -> None:
    results["later"] = {"version": 2}
    results["notes"].append("half an emoji \ud83c here")
    text = write_report(save(results))["html"].read_text("utf-8")
    assert "half an emoji \ufffd here" in text
