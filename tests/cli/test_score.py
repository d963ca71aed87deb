"""Lists of any system against what is relevant: figures worked by hand, every form alike, and faults with their row."""

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
from llmrec.cli import main as cli
from llmrec.data.ranked import Ranked, write_lists, write_records
from llmrec.errors import DataError, RecipeError
from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.predictor import evaluate
from llmrec.evaluate.scoring import Scores
from llmrec.pipeline.study import build_study
from llmrec.recipe.load import dump, load_recipe
from llmrec.types import Ranking
from tests.answer.rank_cases import jsonl
from tests.cli.test_rank_classic import BASELINES, CHANGES, records_of
from tests.command import llmrec as command
from tests.facts import Facts, raises

LISTS = {"u1": ["a", "b", "c"], "u2": ["d", "a"], "u3": ["b"], "u9": ["a"]}
TRUTH = {"u1": ["b", "c", "x"], "u2": ["a"], "u4": ["a"]}
RECORDS = [
    Ranked(
        request_id=f"r-{n}", user_id=user, line=n, items=tuple(items), scores=tuple(3.0 - k for k in range(len(items)))
    )
    for n, (user, items) in enumerate(LISTS.items(), start=1)
]
ROWS = [(user, item, k + 1, 3.0 - k) for user, items in LISTS.items() for k, item in enumerate(items)]
PAIRS = [(user, item) for user, items in TRUTH.items() for item in items]


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    path = tmp_path / "truth.csv"
    pl.DataFrame(PAIRS, schema=["user", "item"], orient="row").write_csv(path)
    return path


def values(found: Scores) -> dict[str, float | None]:
    return {name: metric.value for name, metric in found.metrics.items()}


def score(ranked: Any, truth: Any, **given: Any) -> Scores:
    found: Scores = llmrec.score(ranked, truth, **{"k": (1, 2), "resamples": 50} | given)
    return found


# --------------------------------------------------------------------------- columns


@pytest.mark.parametrize(("user", "item"), [("userId", "movieId"), ("Customer ID", "SKU"), ("kundennummer", "artikel")])
def test_columns_are_known_by_the_names_that_init_knows(tmp_path: Path, user: str, item: str) -> None:
    lists = pl.DataFrame([row[:3] for row in ROWS], schema=[user, item, "rank"], orient="row")
    truth = pl.DataFrame(PAIRS, schema=[user, item], orient="row").with_columns(pl.lit(7).alias("timestamp"))
    plain = score(pl.DataFrame(ROWS, schema=["user", "item", "rank", "score"], orient="row"), truth)
    lists.write_csv(tmp_path / "lists.csv")
    truth.write_csv(tmp_path / "truth.csv")
    for found in (score(lists, truth), score(tmp_path / "lists.csv", tmp_path / "truth.csv")):
        assert values(found) == values(plain)
    records = [{user: name, "items": items} for name, items in LISTS.items()]
    assert values(score(jsonl(tmp_path / "lists.jsonl", records), truth)) == values(plain)
    pl.DataFrame(records).write_parquet(tmp_path / "lists.parquet")
    assert values(score(tmp_path / "lists.parquet", truth)) == values(plain)


def test_columns_can_be_named(tmp_path: Path, truth: Path) -> None:
    plain = score(pl.DataFrame(ROWS, schema=["user", "item", "rank", "score"], orient="row"), truth)
    odd = pl.DataFrame(ROWS, schema=["who", "what", "rank", "score"], orient="row")
    odd.write_csv(tmp_path / "odd.csv")
    with raises(DataError, Facts("missing-column", says="Name it with")):
        score(odd, truth)
    # The truth has other names, which are known.
    assert values(score(odd, truth, user="who", item="what")) == values(plain)
    given = ["score", str(tmp_path / "odd.csv"), "--truth", str(truth), "--user", "who", "--item", "what", "--k", "1,2"]
    assert CliRunner().invoke(cli.app, given, catch_exceptions=False).exit_code == 0
    with raises(DataError, Facts("missing-column", column="user", says="did you mean 'who'")):
        score(odd.rename({"what": "item"}).with_columns(user=pl.col("who")), truth, user="whoo")
    both = odd.rename({"who": "customer", "what": "item"}).with_columns(buyer=pl.col("customer"))
    with raises(DataError, Facts("missing-column", says="Name it with")):
        score(both, truth)


# --------------------------------------------------------------------------- figures


def test_figures_are_those_worked_by_hand(truth: Path) -> None:
    found = score(pl.DataFrame(ROWS, schema=["user", "item", "rank", "score"], orient="row"), truth)
    # u1 finds b at rank 2 and c at 3 of three relevant items, u2 finds a at rank 2, u4 has no list.
    second = 1 / math.log2(3)
    wanted = {
        "HR@1": 0.0,
        "HR@2": 2 / 3,
        "Recall@2": (1 / 3 + 1) / 3,
        "Precision@2": (1 / 2 + 1 / 2) / 3,
        "NDCG@2": (second / (1 + second) + second) / 3,
        "MRR": (1 / 2 + 1 / 2) / 3,
        "MAP": ((1 / 2 + 2 / 3) / 3 + 1 / 2) / 3,
    }
    own = values(found)
    assert {name: own[name] for name in wanted} == pytest.approx(wanted)
    told = found.lists[0]
    assert (told.judged, told.without_list, told.without_truth, told.short) == (3, 1, 2, 0)
    assert (found.users, found.relevant, found.unit, told.order, told.tied) == (3, 5, "user", "score", 0.0)
    assert all(metric.low <= metric.value <= metric.high for metric in found.metrics.values())  # type: ignore[operator]
    assert found.metrics["NDCG@2"].signature.startswith("NDCG@2|gain:binary|ties:expected|cand:given")


def test_ties_are_expected_over_their_orders(truth: Path) -> None:
    rows = [("u2", "d", 1.0), ("u2", "a", 1.0), ("u2", "e", 1.0), ("u2", "f", 0.0)]
    found = score(pl.DataFrame(rows, schema=["user", "item", "score"], orient="row"), truth)
    assert values(found)["HR@2"] == pytest.approx(2 / 3 / 3) and found.lists[0].tied == pytest.approx(1 / 3)
    turned = score(pl.DataFrame(rows[::-1], schema=["user", "item", "score"], orient="row"), truth)
    assert values(turned) == values(found)


def test_a_rank_or_the_order_of_rows_stand_in_for_a_score(truth: Path) -> None:
    whole = pl.DataFrame(ROWS, schema=["user", "item", "rank", "score"], orient="row")
    found = [score(whole.drop(dropped), truth) for dropped in ([], ["score"], ["rank"], ["rank", "score"])]
    assert [each.lists[0].order for each in found] == ["score", "rank", "score", "order"]
    assert all(values(each) == values(found[0]) for each in found)


def test_graded_relevance_is_a_gain_where_it_is_asked_for(tmp_path: Path) -> None:
    qrels = tmp_path / "t.qrels"
    qrels.write_text("q1 0 a 0\nq1 0 b 3\nq1 0 c 1\nq2 0 a 0\n")
    run = tmp_path / "s.run"
    run.write_text("q1 Q0 c 1 2.5 mine\nq1  Q0\tb 2 1.5 mine\n")
    graded, plain = (score(run, qrels, graded=graded) for graded in (True, False))
    second = 1 / math.log2(3)
    assert values(graded)["NDCG@2"] == pytest.approx((1 + 3 * second) / (3 + second))
    assert values(plain)["NDCG@2"] == pytest.approx(1.0) and plain.barren == 1 and plain.users == 1
    assert "gain:graded" in graded.metrics["NDCG@2"].signature


def test_figures_of_ranked_requests_are_those_of_the_evaluation(tmp_path: Path) -> None:
    recipe = load_recipe("recipes/movielens-100k/four-tasks.yaml", [*CHANGES, *BASELINES])
    (tmp_path / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
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
    found = score(out, truth, k=(1, 5), resamples=200)
    model = Popularity(seed=recipe.seed)
    model.fit(study.data)
    protocol = EvalProtocol(split="s", candidates="c", cutoffs=(1, 5), resamples=200, seed=0, catalogue=5)
    wanted = evaluate(model, cases, name="sequential", kind=Ranking, protocol=protocol).figures.metrics
    assert found.unit == "request" and len(found.metrics) > 10
    for name in ("HR@1", "HR@5", "NDCG@5", "MRR"):
        own = found.metrics[name]
        assert (own.value, own.low, own.high) == pytest.approx(
            (wanted[name].value, wanted[name].low, wanted[name].high)
        ), name


# --------------------------------------------------------------------------- forms


def test_every_form_gives_the_same_figures(truth: Path, tmp_path: Path) -> None:
    frame = pl.DataFrame(ROWS, schema=["user", "item", "rank", "score"], orient="row")
    wanted = values(score(frame, truth))
    files = [tmp_path / name for name in ("r.jsonl", "r.csv", "r.tsv", "r.parquet", "r.jsonl.gz", "r.csv.gz")]
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
        assert values(score(file, truth)) == wanted, file.name


@pytest.mark.parametrize("make", [pd.DataFrame, pl.DataFrame, pa.Table.from_pylist, list])
def test_frames_of_every_library_are_taken(truth: Path, make: Any) -> None:
    rows = [{"userId": user, "itemId": item, "score": value} for user, item, _, value in ROWS]
    pairs = [{"user": user, "item": item} for user, item in PAIRS]
    assert values(score(make(rows), make(pairs))) == values(score(rows, truth))
    lists = [{"user_id": each.user_id, "items": list(each.items), "scores": list(each.scores)} for each in RECORDS]
    assert values(score(make(lists), truth)) == values(score(rows, truth))


def test_ids_that_look_like_formulas_are_those_of_the_truth(tmp_path: Path) -> None:
    record = Ranked(request_id="1", user_id="=u", line=1, items=("-1", "b"), scores=(2.0, 1.0))
    for name, form in (("r.csv", "records"), ("l.csv", "long")):
        write_lists(tmp_path / name, [record], form)  # type: ignore[arg-type]
        assert "'=u" in (tmp_path / name).read_text()
        assert values(score(tmp_path / name, [{"user": "=u", "item": "-1"}]))["HR@1"] == 1.0


def test_an_id_of_recbole_has_no_tab(tmp_path: Path) -> None:
    record = Ranked(request_id="1", user_id="a b", line=1, items=("=i",), scores=(1.0,))
    write_lists(tmp_path / "l.inter", [record], "recbole")
    assert values(score(tmp_path / "l.inter", [{"user": "a b", "item": "=i"}]))["HR@1"] == 1.0
    with raises(DataError, Facts(kind="bad-value", column="item")):
        write_lists(tmp_path / "l.inter", [replace(record, items=("i\t",))], "recbole")


def test_a_failed_request_counts_as_zero(truth: Path, tmp_path: Path) -> None:
    failed = Ranked(request_id="r-4", user_id="u4", line=9, error="no")
    write_records(tmp_path / "r.jsonl", [*RECORDS, failed])
    found = score(tmp_path / "r.jsonl", truth)
    assert values(found) == values(score(ROWS_FRAME, truth)) and found.lists[0].without_list == 1


def test_a_row_that_says_why_there_is_no_list_is_none(truth: Path, tmp_path: Path) -> None:
    rows = [{"user_id": u, "rank": r, "item_id": i, "score": s, "error": None} for u, i, r, s in ROWS]
    rows.insert(1, {"user_id": "u4", "rank": None, "item_id": None, "score": None, "error": "no"})
    for suffix in ("csv", "parquet"):
        frame = pl.DataFrame(rows, infer_schema_length=None)
        frame.write_csv(tmp_path / "all.csv") if suffix == "csv" else frame.write_parquet(tmp_path / "all.parquet")
        assert values(score(tmp_path / f"all.{suffix}", truth)) == values(score(ROWS_FRAME, truth))
    rows[2]["score"] = math.inf
    pl.DataFrame(rows, infer_schema_length=None).write_csv(tmp_path / "all.csv")
    with raises(DataError, Facts(kind="bad-value", row=3, column="score")):
        score(tmp_path / "all.csv", truth)


ROWS_FRAME = pl.DataFrame(ROWS, schema=["user", "item", "rank", "score"], orient="row")

# --------------------------------------------------------------------------- two lists


def test_two_lists_are_paired_by_user(truth: Path) -> None:
    other = ROWS_FRAME.filter(pl.col("user") != "u2")
    found = score(ROWS_FRAME, truth, against=other)
    pair = found.comparisons["HR@2"]
    assert pair.value == pytest.approx(1 / 3) and pair.p is None and pair.low <= pair.value <= pair.high  # type: ignore[operator]
    assert set(found.comparisons) == set(found.metrics) and [each.without_list for each in found.lists] == [1, 2]
    tested = score(ROWS_FRAME, truth, against=other, planned="HR@2").comparisons
    assert tested["HR@2"].verdict == "not shown" and tested["HR@2"].p is not None and tested["MRR"].verdict is None
    same = score(ROWS_FRAME, truth, against=ROWS_FRAME).comparisons["MAP"]
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_the_command_prints_lines_or_json(truth: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "r.jsonl", RECORDS)
    write_lists(tmp_path / "x.run", RECORDS[:1], "trec")
    asked = ["score", str(tmp_path / "r.jsonl"), "--truth", str(truth), "--k", "2", "--resamples", "50"]
    told = CliRunner().invoke(cli.app, asked).output
    assert (
        "without a list, scored as 0: 1 of 3 users" in told
        and "with a list but no relevant items, excluded: 2 users" in told
    )
    both = CliRunner().invoke(cli.app, [asked[0], asked[1], str(tmp_path / "x.run"), *asked[2:]]).output
    assert "A - B" in both
    found = json.loads(command(*asked, "--json").stdout)
    assert found["lists"][0]["metrics"]["HR@2"]["value"] == pytest.approx(2 / 3)


# --------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("user,item,score\nu1,a,1\nu1,a,2\n", Facts(kind="duplicate", row=2, column="item")),
        ("user,item,score\nu1,a,1\n,b,2\n", Facts(kind="missing-value", row=2, column="user")),
        ("user,item,score\nu1,a,1\nu1,b,nan\n", Facts(kind="bad-value", row=2, column="score")),
        ("user,item,score\nu1,a,inf\n", Facts(kind="bad-value", row=1, column="score")),
        ("user,item,score\nu1,a,high\n", Facts(kind="bad-value", row=1, column="score")),
        ("user,thing\nu1,a\n", Facts(kind="missing-column", column="item")),
        ("person,item\nu1,a\n", Facts(kind="missing-column", column="user")),
        ("user,item\nnobody,a\n", Facts(kind="mismatch", column="user")),
        ('user,items,scores\nu1,"[""a""]","[1, 2]"\n', Facts(kind="mismatch", row=1, column="scores")),
        ('user,items,scores\nu1,"[""a""]","[NaN]"\n', Facts(kind="bad-value", row=1, column="scores")),
        ("user,items\nu1,a|b\n", Facts(kind="syntax", row=1, column="items")),
    ],
)
def test_a_fault_names_its_file_and_row(truth: Path, tmp_path: Path, text: str, facts: Facts) -> None:
    path = tmp_path / "ranked.csv"
    path.write_text(text)
    with raises(DataError, facts) as caught:
        score(path, truth)
    assert caught.value.file == str(path)


def test_other_faults_are_told(truth: Path, tmp_path: Path) -> None:
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
