"""`llmrec score`: metrics by hand, all forms of lists, and errors with their row."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from typer.testing import CliRunner

import llmrec
from llmrec.answer.rank.options import RankOptions
from llmrec.answer.rank.run import rank_file
from llmrec.baselines.popular import Popularity
from llmrec.cli import console
from llmrec.cli import main as cli
from llmrec.data.ranked import RankingRecord, write_lists, write_records
from llmrec.errors import DataError, RecipeError
from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.predictor import evaluate
from llmrec.evaluate.scoring import Scores
from llmrec.pipeline.study import build_study
from llmrec.recipe.load import dump_recipe, load_recipe
from llmrec.types import Ranking
from tests.answer.rank_cases import jsonl
from tests.cli.test_rank_classic import BASELINES, CHANGES, records_of
from tests.facts import Facts, raises

LISTS = {"u1": ["a", "b", "c"], "u2": ["d", "a"], "u3": ["b"], "u9": ["a"]}
TRUTH = {"u1": ["b", "c", "x"], "u2": ["a"], "u4": ["a"]}
RECORDS = [
    RankingRecord(
        request_id=f"r-{n}", user_id=user, line=n, items=tuple(items), scores=tuple(3.0 - k for k in range(len(items)))
    )
    for n, (user, items) in enumerate(LISTS.items(), start=1)
]
ROWS = [(user, item, k + 1, 3.0 - k) for user, items in LISTS.items() for k, item in enumerate(items)]
PAIRS = [(user, item) for user, items in TRUTH.items() for item in items]
ROWS_FRAME = pl.DataFrame(ROWS, schema=["user", "item", "rank", "score"], orient="row")


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    path = tmp_path / "truth.csv"
    pl.DataFrame(PAIRS, schema=["user", "item"], orient="row").write_csv(path)
    return path


def values(found: Scores) -> dict[str, float | None]:
    return {name: metric.value for name, metric in found.metrics.items()}


def score(ranked: Any, truth: Any, **given: Any) -> Scores:
    result: Scores = llmrec.score(ranked, truth, **{"k": (1, 2), "resamples": 50} | given)
    return result


def test_knows_common_column_names(tmp_path: Path) -> None:
    user, item = "Kundennummer", "SKU"
    lists = pl.DataFrame([row[:3] for row in ROWS], schema=[user, item, "rank"], orient="row")
    truth = pl.DataFrame(PAIRS, schema=[user, item], orient="row").with_columns(pl.lit(7).alias("timestamp"))
    plain = score(ROWS_FRAME, truth)
    lists.write_csv(tmp_path / "lists.csv")
    truth.write_csv(tmp_path / "truth.csv")
    for result in (score(lists, truth), score(tmp_path / "lists.csv", tmp_path / "truth.csv")):
        assert values(result) == values(plain)
    records = [{user: name, "items": items} for name, items in LISTS.items()]
    assert values(score(jsonl(tmp_path / "lists.jsonl", records), truth)) == values(plain)
    pl.DataFrame(records).write_parquet(tmp_path / "lists.parquet")
    assert values(score(tmp_path / "lists.parquet", truth)) == values(plain)


def test_column_options(tmp_path: Path, truth: Path) -> None:
    plain = score(ROWS_FRAME, truth)
    odd = pl.DataFrame(ROWS, schema=["who", "what", "rank", "score"], orient="row")
    odd.write_csv(tmp_path / "odd.csv")
    with raises(DataError, Facts("missing-column", says="Name it with")):
        score(odd, truth)
    # The ground truth has different column names, which are recognised.
    assert values(score(odd, truth, user="who", item="what")) == values(plain)
    arguments = [
        "score",
        str(tmp_path / "odd.csv"),
        "--truth",
        str(truth),
        "--user",
        "who",
        "--item",
        "what",
        "--k",
        "1,2",
    ]
    assert CliRunner().invoke(cli.app, arguments, catch_exceptions=False).exit_code == 0
    with raises(DataError, Facts("missing-column", column="user", says="did you mean 'who'")):
        score(odd.rename({"what": "item"}).with_columns(user=pl.col("who")), truth, user="whoo")
    both = odd.rename({"who": "customer", "what": "item"}).with_columns(buyer=pl.col("customer"))
    with raises(DataError, Facts("missing-column", says="Name it with")):
        score(both, truth)


def test_metrics_by_hand(truth: Path) -> None:
    result = score(ROWS_FRAME, truth)
    # u1 finds b at rank 2 and c at 3 of three relevant items, u2 finds a at rank 2, u4 has no list.
    second = 1 / math.log2(3)
    expected = {
        "HR@1": 0.0,
        "HR@2": 2 / 3,
        "Recall@2": (1 / 3 + 1) / 3,
        "Precision@2": (1 / 2 + 1 / 2) / 3,
        "NDCG@2": (second / (1 + second) + second) / 3,
        "MRR": (1 / 2 + 1 / 2) / 3,
        "MAP": ((1 / 2 + 2 / 3) / 3 + 1 / 2) / 3,
    }
    actual = values(result)
    assert {name: actual[name] for name in expected} == pytest.approx(expected)
    output = result.lists[0]
    assert (output.judged, output.without_list, output.without_truth, output.short) == (3, 1, 2, 0)
    assert (result.users, result.relevant, result.unit, output.order, output.tied) == (3, 5, "user", "score", 0.0)
    assert all(metric.low <= metric.value <= metric.high for metric in result.metrics.values())  # type: ignore[operator]
    assert result.metrics["NDCG@2"].signature.startswith("NDCG@2|gain:binary|ties:expected|cand:given")
    dropped = [score(ROWS_FRAME.drop(columns), truth) for columns in ([], ["score"], ["rank"], ["rank", "score"])]
    assert [each.lists[0].order for each in dropped] == ["score", "rank", "score", "order"]
    assert all(values(each) == actual for each in dropped)


def test_graded_relevance_is_optional(tmp_path: Path) -> None:
    qrels = tmp_path / "t.qrels"
    qrels.write_text("q1 0 a 0\nq1 0 b 3\nq1 0 c 1\nq2 0 a 0\n")
    run = tmp_path / "s.run"
    run.write_text("q1 Q0 c 1 2.5 mine\nq1  Q0\tb 2 1.5 mine\n")
    graded, plain = (score(run, qrels, graded=graded) for graded in (True, False))
    second = 1 / math.log2(3)
    assert values(graded)["NDCG@2"] == pytest.approx((1 + 3 * second) / (3 + second))
    assert values(plain)["NDCG@2"] == pytest.approx(1.0) and plain.barren == 1 and plain.users == 1
    assert "gain:graded" in graded.metrics["NDCG@2"].signature


def test_metrics_of_ranked_requests_equal_those_of_the_evaluation(tmp_path: Path) -> None:
    recipe = load_recipe("recipes/movielens-100k/four-tasks.yaml", [*CHANGES, *BASELINES])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    study = build_study(recipe)
    cases = study.cases("sequential")
    requests = records_of(cases)
    out = tmp_path / "out.parquet"
    page = str(tmp_path / "recipe.yaml")
    file = jsonl(tmp_path / "in.jsonl", requests)
    rank_file(RankOptions(baseline="popularity", recipe=page, requests=file, out=out))
    truth = [
        {"request_id": case.request.id, "user_id": case.request.user_id, "item_id": str(case.truth)} for case in cases
    ]
    result = score(out, truth, k=(1, 5), resamples=200)
    model = Popularity(seed=recipe.seed)
    model.fit(study.data)
    protocol = EvalProtocol(split="s", candidates="c", cutoffs=(1, 5), resamples=200, seed=0, catalogue=5)
    expected = evaluate(model, cases, name="sequential", kind=Ranking, protocol=protocol).figures.metrics
    assert result.unit == "request" and len(result.metrics) > 10
    for name in ("HR@1", "HR@5", "NDCG@5", "MRR"):
        actual = result.metrics[name]
        assert (actual.value, actual.low, actual.high) == pytest.approx(
            (expected[name].value, expected[name].low, expected[name].high)
        ), name


def test_all_forms_have_the_same_metrics(truth: Path, tmp_path: Path) -> None:
    expected = values(score(ROWS_FRAME, truth))
    files = [tmp_path / name for name in ("r.jsonl", "r.csv", "r.parquet", "r.jsonl.gz")]
    for file in files:
        write_records(file, RECORDS)
    longs = [tmp_path / name for name in ("l.jsonl", "l.csv", "l.tsv", "l.parquet")]
    for file in longs:
        write_lists(file, RECORDS, "long")
    write_lists(tmp_path / "x.run", RECORDS, "trec")
    write_lists(tmp_path / "x.txt", RECORDS, "trec")
    for form, name in (("recbole", "b.inter"), ("rectools", "t.csv"), ("rectools", "t.parquet")):
        write_lists(tmp_path / name, RECORDS, form)  # type: ignore[arg-type]
        longs.append(tmp_path / name)
    atomic = tmp_path / "recbole.inter"
    lines = ["user_id:token\titem_id:token\tscore:float", *(f"{u}\t{i}\t{s}" for u, i, _, s in ROWS)]
    atomic.write_text("\n".join(lines) + "\n")
    (tmp_path / "recbole.csv").write_text("\n".join(line.replace("\t", ",") for line in lines) + "\n")
    every = [*files, *longs, tmp_path / "x.run", tmp_path / "x.txt", atomic, tmp_path / "recbole.csv"]
    for file in every:
        assert values(score(file, truth)) == expected, file.name


@pytest.mark.parametrize("make", [pd.DataFrame, pl.DataFrame, pa.Table.from_pylist, list])
def test_accepts_frames_of_other_libraries(truth: Path, make: Any) -> None:
    rows = [{"userId": user, "itemId": item, "score": value} for user, item, _, value in ROWS]
    pairs = [{"user": user, "item": item} for user, item in PAIRS]
    assert values(score(make(rows), make(pairs))) == values(score(rows, truth))
    lists = [{"user_id": each.user_id, "items": list(each.items), "scores": list(each.scores)} for each in RECORDS]
    assert values(score(make(lists), truth)) == values(score(rows, truth))


def test_unusual_ids(tmp_path: Path) -> None:
    record = RankingRecord(request_id="1", user_id="=u", line=1, items=("-1", "b"), scores=(2.0, 1.0))
    for name, form in (("r.csv", "records"), ("l.csv", "long"), ("L.CSV", "long")):
        write_lists(tmp_path / name, [record], form)  # type: ignore[arg-type]
        assert "'=u" in (tmp_path / name).read_text()
        assert values(score(tmp_path / name, [{"user": "=u", "item": "-1"}]))["HR@1"] == 1.0
    for form, changes, column in (("recbole", {"items": ("i\t",)}, "item"), ("trec", {"user_id": "a b"}, "user")):
        with raises(DataError, Facts(kind="bad-value", column=column)):
            write_lists(tmp_path / "lists", [replace(RECORDS[3], **changes)], form)  # type: ignore[arg-type]


def test_failed_requests_have_no_list(truth: Path, tmp_path: Path) -> None:
    rows = [{"user_id": u, "rank": r, "item_id": i, "score": s, "error": None} for u, i, r, s in ROWS]
    rows.insert(1, {"user_id": "u4", "rank": None, "item_id": None, "score": None, "error": "no"})
    pl.DataFrame(rows, infer_schema_length=None).write_csv(tmp_path / "all.csv")
    assert values(score(tmp_path / "all.csv", truth)) == values(score(ROWS_FRAME, truth))
    failed = RankingRecord(request_id="r-4", user_id="u4", line=9, error="no")
    write_records(tmp_path / "r.jsonl", [*RECORDS, failed])
    assert values(score(tmp_path / "r.jsonl", truth)) == values(score(ROWS_FRAME, truth))
    rows[2]["score"] = math.inf
    pl.DataFrame(rows, infer_schema_length=None).write_csv(tmp_path / "all.csv")
    with raises(DataError, Facts(kind="bad-value", row=3, column="score")):
        score(tmp_path / "all.csv", truth)


def test_two_lists_are_paired_by_user(truth: Path) -> None:
    other = ROWS_FRAME.filter(pl.col("user") != "u2")
    result = score(ROWS_FRAME, truth, against=other)
    pair = result.comparisons["HR@2"]
    assert pair.value == pytest.approx(1 / 3) and pair.p is None and pair.low <= pair.value <= pair.high  # type: ignore[operator]
    assert set(result.comparisons) == set(result.metrics) and [each.without_list for each in result.lists] == [1, 2]
    tested = score(ROWS_FRAME, truth, against=other, planned="HR@2").comparisons
    assert tested["HR@2"].verdict == "not shown" and tested["HR@2"].p is not None and tested["MRR"].verdict is None
    same = score(ROWS_FRAME, truth, against=ROWS_FRAME).comparisons["MAP"]
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_command_output(truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "facts", {})
    write_records(tmp_path / "r.jsonl", RECORDS)
    write_lists(tmp_path / "x.run", RECORDS[:1], "trec")
    request = ["score", str(tmp_path / "r.jsonl"), "--truth", str(truth), "--k", "2", "--resamples", "50"]
    output = CliRunner().invoke(cli.app, request).output
    assert (
        "without a list, scored as 0: 1 of 3 users" in output
        and "with a list but no relevant items, excluded: 2 users" in output
    )
    both = CliRunner().invoke(cli.app, [request[0], request[1], str(tmp_path / "x.run"), *request[2:]]).output
    assert "A - B" in both
    result = json.loads(console.format_json(console.facts))
    assert result["lists"][0]["metrics"]["HR@2"]["value"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("user,item,score\nu1,a,1\nu1,a,2\n", Facts(kind="duplicate", row=2, column="item")),
        ("user,item,score\nu1,a,1\n,b,2\n", Facts(kind="missing-value", row=2, column="user")),
        ("user,item,score\nu1,a,1\nu1,b,nan\n", Facts(kind="bad-value", row=2, column="score")),
        ("user,item,score\nu1,a,high\n", Facts(kind="bad-value", row=1, column="score")),
        ("user,thing\nu1,a\n", Facts(kind="missing-column", column="item")),
        ("person,item\nu1,a\n", Facts(kind="missing-column", column="user")),
        ("user,item\nnobody,a\n", Facts(kind="mismatch", column="user")),
        ('user,items,scores\nu1,"[""a""]","[1, 2]"\n', Facts(kind="mismatch", row=1, column="scores")),
        ('user,items,scores\nu1,"[""a""]","[NaN]"\n', Facts(kind="bad-value", row=1, column="scores")),
        ("user,items\nu1,a|b\n", Facts(kind="syntax", row=1, column="items")),
    ],
)
def test_error_has_file_and_row(truth: Path, tmp_path: Path, text: str, facts: Facts) -> None:
    path = tmp_path / "ranked.csv"
    path.write_text(text)
    with raises(DataError, facts) as caught:
        score(path, truth)
    assert caught.value.file == str(path)


def test_other_errors(truth: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "r.jsonl", [RECORDS[0], RECORDS[0]])
    with raises(DataError, Facts(kind="duplicate", file=str(tmp_path / "r.jsonl"), row=2, column="user_id")):
        score(tmp_path / "r.jsonl", truth)
    (tmp_path / "x.run").write_text("q1 Q0 c 1 2.5 mine\nq1 Q0 b\n")
    with raises(DataError, Facts(kind="ragged-row", row=2, line=2)):
        score(tmp_path / "x.run", truth)
    with raises(DataError, Facts(kind="missing-file")):
        score(tmp_path / "nothing.csv", truth)
    with raises(DataError, Facts(kind="duplicate", row=6, column="item")):
        score(ROWS_FRAME, [*({"user": u, "item": i} for u, i in PAIRS), {"user": "u1", "item": "b"}])
    with raises(DataError, Facts(kind="empty", column="rel")):
        score(ROWS_FRAME, [{"user": "u1", "item": "b", "rel": 0}])
    with raises(DataError, Facts(kind="wrong-format")):
        score(ROWS_FRAME, [{"user": "u1", "items": ["b"]}])
    for changes, facts in (
        ({"k": (0,)}, Facts(kind="bad-value", column="k")),
        ({"planned": "HR@2"}, Facts(kind="contradiction", column="planned")),
        ({"planned": "HR@3", "against": ROWS_FRAME}, Facts(kind="unknown-name", column="planned")),
    ):
        with raises(RecipeError, facts):
            score(ROWS_FRAME, truth, **changes)
