"""Benchmarks: runs beside each other, averaged over seeds, compared on the same users, with a page and pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from llmrec.bench.engine import compared
from llmrec.bench.leaderboard import rewrite
from llmrec.bench.pages import benchmark_pages
from llmrec.bench.recipes import Line, _add, combined, points, recipe_of
from llmrec.bench.records import BenchmarkResult, BenchmarkRow, BenchmarkTable, RowFigures
from llmrec.bench.run import check_page, run_benchmark
from llmrec.errors import RecipeError
from llmrec.evaluate.compare import compare
from llmrec.metrics.significance import holm
from llmrec.recipe.load import kind_of_page, load_benchmark
from llmrec.resources import resource
from llmrec.results import Cost, Figure, Metric, Row
from tests.facts import Facts, raises
from tests.tasks.task_data import make_split

DATA = make_split()


def write(folder: Path, runs: str, more: str = "") -> Path:
    DATA.dataset.interactions.select("user_id", "item_id", "rating", "timestamp").write_csv(folder / "rows.csv")
    (folder / "recipe.yaml").write_text(
        "name: base\n"
        f"data: {{source: table, path: {folder / 'rows.csv'}, columns: {{rating: rating, time: timestamp}}}}\n"
        "tasks: {direct: {strategies: [label, pointwise-yes]}, rating: {strategies: [expected]}}\n"
        "eval: {arms: [zero-shot], backend: fake, scorer: fake, users: 20, bootstrap: 50, candidates: {count: 5}}\n",
        encoding="utf-8",
    )
    page = folder / "bench.yaml"
    page.write_text(
        f"benchmark: small\nrecipe: {folder / 'recipe.yaml'}\nbootstrap: 200\n{more}runs:\n{runs}", encoding="utf-8"
    )
    return page


RUNS = """\
  - {name: zero-shot}
  - name: few-shot
    overrides: ["eval.arms=[few-shot]"]
    grid: {eval.shots.k: [1, 2], eval.shots.choice: [random, recent]}
"""


def test_a_grid_is_every_combination_and_every_seed(tmp_path: Path) -> None:
    page = write(tmp_path, RUNS + "  - {name: tuned, seeds: [3, 4]}\n")
    assert kind_of_page(page) == "benchmark"
    found = list(points(load_benchmark(page)))
    assert [point.label for point in found] == [
        "zero-shot",
        *(f"few-shot, k={k}, choice={choice}" for k in (1, 2) for choice in ("random", "recent")),
        *("tuned", "tuned"),
    ]
    assert [point.seed for point in found[-2:]] == [3, 4]
    assert len({point.folder for point in found}) == len(found)


def test_rows_stand_beside_each_other_with_their_cost(tmp_path: Path) -> None:
    page = write(
        tmp_path, RUNS, 'pairs: [["pointwise-yes · after-history · zero-shot", "label · after-history · zero-shot"], '
        '["expected · list-ratings · zero-shot", "global-mean"]]\n'
    )  # fmt: skip
    told: list[str] = []
    made = run_benchmark(
        load_benchmark(page), out=tmp_path / "runs", results=tmp_path / "eval" / "results", say=told.append
    ).files
    results = json.loads(made["results"].read_text(encoding="utf-8"))
    assert len(told) == 5 and {table["task"] for table in results["tables"]} == {"direct", "rating"}
    table, rating = (next(each for each in results["tables"] if each["name"] == name) for name in ("direct", "rating"))
    rows = [row for row in results["rows"] if "direct" in row["tables"]]
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names) == 6 + 2 * 5  # each baseline and their fusion once, each strategy in each run
    assert sum(name.endswith("k=2, choice=recent") for name in names) == 2
    few = {row["name"]: row["tables"]["direct"] for row in rows}
    one, two = (few[f"label · after-history · few-shot, k={k}, choice=random"] for k in (1, 2))
    assert (
        two["tokens_per_request"]
        > one["tokens_per_request"]
        > few["label · after-history · zero-shot"]["tokens_per_request"]
    )
    assert few["pointwise-yes · after-history · zero-shot"]["forwards_per_request"] == 5
    assert "uniform-5" in table["signature"] and len(table["candidates"]) > 10
    against = [pair for pair in results["comparisons"] if pair["table"] == "direct"]
    assert {pair["b"] for pair in against} == {table["best_baseline"]} <= set(names) and len(against) == 10
    (pair,) = [pair for pair in results["pairs"] if pair["table"] == "direct"]
    assert pair["value"] == pytest.approx(
        few[pair["a"]]["metrics"]["NDCG@10"]["value"] - few[pair["b"]]["metrics"]["NDCG@10"]["value"]
    )
    assert not any({"p", "verdict"} & set(entry) for entry in against)
    tested = results["pairs"]
    assert [one["p"] for one in tested] == holm([one["p_raw"] for one in tested])  # one family over both tables
    assert all((one["low"] <= 0 <= one["high"]) == (one["p"] > 0.05) for one in tested)
    assert all("2 planned comparisons" in each["detectable"] for each in (table, rating))
    text = made["page"].read_text(encoding="utf-8")
    for heading in ("## Direct", "## Rating"):
        shown = [line for line in text.partition(heading)[2].partition("\n## ")[0].splitlines() if " [" in line]
        values = [float(line.split(" | ")[1].split(" ")[0].strip("*")) for line in shown if line.startswith("| ")]
        assert values == sorted(values, reverse=heading == "## Direct")
    assert "exploratory and has an unadjusted 95 % interval" in text and table["detectable"] in text
    assert rewrite(tmp_path / "eval" / "results")[0].read_text(encoding="utf-8") == text
    assert "label · after-history · zero-shot" in text
    assert results["missing"] == 0 and "runs are missing" not in text


@pytest.mark.slow
def test_what_was_done_before_a_kill_is_there(tmp_path: Path) -> None:
    def killed(line: str) -> None:
        if "k-2" in line:
            raise KeyboardInterrupt

    page = load_benchmark(write(tmp_path, RUNS))
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(page, out=tmp_path / "runs", results=tmp_path / "eval" / "results", say=killed)
    results = json.loads((tmp_path / "eval" / "results" / "small.json").read_text(encoding="utf-8"))
    assert results["missing"] == 1
    assert "1 runs are missing" in (tmp_path / "eval" / "small.md").read_text(encoding="utf-8")


def test_settings_of_one_run_are_rows_of_their_own(tmp_path: Path) -> None:
    both = '  - {name: both, overrides: ["eval.arms=[zero-shot, few-shot]"]}\n'
    names = [f"label · after-history · both · {arm}" for arm in ("zero-shot", "few-shot")]
    page = load_benchmark(write(tmp_path, both, f"pairs: [{json.dumps(names, ensure_ascii=False)}]\n"))
    made = run_benchmark(page, out=tmp_path / "runs", results=tmp_path / "results").files
    results = json.loads(made["results"].read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in results["rows"] if row["arm"] != "baseline"}
    assert all(rows[name]["arm"] == arm for name, arm in zip(names, ("zero-shot", "few-shot"), strict=True))
    assert all(row["seeds"] == 1 for row in rows.values())
    assert [[pair["a"], pair["b"]] for pair in results["pairs"]] == [names]


def test_a_second_call_reuses_every_run(tmp_path: Path) -> None:
    page = load_benchmark(write(tmp_path, "  - {name: zero-shot}\n"))
    first = run_benchmark(page, out=tmp_path / "runs", results=tmp_path / "results").files
    before = json.loads(first["results"].read_text(encoding="utf-8"))
    rows = sorted((tmp_path / "runs" / "zero-shot" / "rows").iterdir())
    stamps = [row.stat().st_mtime_ns for row in rows]
    second = run_benchmark(page, out=tmp_path / "runs", results=tmp_path / "results").files
    assert [row.stat().st_mtime_ns for row in rows] == stamps
    assert json.loads(second["results"].read_text(encoding="utf-8"))["rows"] == before["rows"]


def test_seeds_are_averaged_before_rows_are_compared() -> None:
    def figures(value: float) -> Row:
        metric = Metric(value=value, low=value - 1, high=value + 1, signature="NDCG@10|x")
        cost = Cost(prompt_tokens=10, completion_tokens=0, forwards=2, seconds=1.0)
        return Row(
            id="r", task="direct", arm="tuned", predictor="label", template="direct/x", shots=0, engine="fake", n=2,
            parse_rate=1.0, metrics={"NDCG@10": metric}, cost=cost,
        )  # fmt: skip

    line = Line(
        ("direct", "NDCG@10", "", None), "label", "tuned", "tuned", [figures(0.2), figures(0.4)],
        [{"NDCG@10": [0.0, 0.4]}, {"NDCG@10": [0.2, 0.6]}], ["a", "b"], ["a", "b"],
    )  # fmt: skip
    (made,) = combined([line], 100).rows
    found = made.row.tables["direct"]
    assert found.metrics["NDCG@10"].value == pytest.approx(0.3)
    assert found.metrics["NDCG@10"].sd == pytest.approx(0.1 * 2**0.5)
    assert "signature" not in found.metrics["NDCG@10"].as_json()
    assert made.row.seeds == 2 and found.tokens_per_request == 5
    values = made.samples["direct"].values
    assert compare("NDCG@10", values, np.array([0.0, 0.2]), line.users, resamples=9, seed=0).value == (
        pytest.approx(0.2)
    )


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("label · after-history · zero-sho", "label · after-history · zero-shot"),
        ("label · after-histories · zero-shot", "label · after-history · zero-shot"),
        ("labels · after-history · zero-shot", "label · after-history · zero-shot"),
        ("popularitY", "popularity"),
    ],
)
def test_a_pair_with_an_unknown_model_is_an_error_before_anything_runs(tmp_path: Path, name: str, near: str) -> None:
    page = write(tmp_path, "  - {name: zero-shot}\n", f'pairs: [["{name}", "popularity"]]\n')
    expected = Facts("unknown-name", column="pairs", says=f"did you mean {near!r}")
    with raises(RecipeError, expected):
        check_page("benchmark", str(page), [])
    with raises(RecipeError, expected):
        run_benchmark(load_benchmark(page), out=tmp_path / "runs", results=tmp_path / "eval" / "results")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "eval").exists()


def test_a_pair_whose_models_are_in_no_common_table_is_named(tmp_path: Path) -> None:
    page = load_benchmark(write(tmp_path, "  - {name: zero-shot}\n", 'pairs: [["markov", "global-mean"]]\n'))
    with raises(RecipeError, Facts("mismatch", column="pairs", says="no table contains both")):
        run_benchmark(page, out=tmp_path / "runs", results=tmp_path / "eval" / "results")
    assert json.loads((tmp_path / "eval" / "results" / "small.json").read_text(encoding="utf-8"))["missing"] == 0


@pytest.mark.parametrize(
    "page",
    [page for page in sorted(resource("eval/suites").glob("*.yaml")) if kind_of_page(page) == "benchmark"],
    ids=lambda page: page.stem,
)
def test_committed_benchmarks_compare_models_that_they_have(page: Path) -> None:
    check_page("benchmark", str(page), [])


def test_a_figure_that_is_not_defined_stands_in_the_table_and_in_no_picture(tmp_path: Path) -> None:
    rated = DATA.dataset.interactions.with_columns(rating=pl.lit(5.0))
    page = write(tmp_path, "  - {name: a}\n  - {name: b, overrides: [tasks.ctr.history=3]}\n")
    rated.select("user_id", "item_id", "rating", "timestamp").write_csv(tmp_path / "rows.csv")
    text = (tmp_path / "recipe.yaml").read_text(encoding="utf-8")
    head, tail = text.split("tasks:")[0], text.partition("\neval:")[2]
    (tmp_path / "recipe.yaml").write_text(f"{head}tasks: {{ctr: {{liked: 4}}}}\neval:{tail}", encoding="utf-8")
    made = run_benchmark(load_benchmark(page), out=tmp_path / "runs", results=tmp_path / "eval" / "results").files
    rows = json.loads(made["results"].read_text(encoding="utf-8"))["rows"]
    assert [row["tables"]["ctr"]["metrics"]["AUC"]["value"] for row in rows] == [None] * 5
    assert set(made) == {"results", "page"} and "yes-no" in made["page"].read_text(encoding="utf-8")


def test_rows_about_other_items_of_the_same_users_are_no_seeds_of_one() -> None:
    lines: dict[Any, Line] = {}
    _add(lines, Line(("rating", "RMSE", "", None), "a", "a", users=["u", "u"], requests=["u|1", "u|2"]))
    with raises(RecipeError, Facts("mismatch", says="eval.users")):
        _add(lines, Line(("rating", "RMSE", "", None), "a", "a", users=["u", "u"], requests=["u|2", "u|3"]))


def test_baselines_of_one_name_that_answer_otherwise_are_two_rows() -> None:
    lines: dict[Any, Line] = {}
    for run, value in (("a", 1.0), ("b", 1.0 + 1e-9), ("c", 2.0), ("c", 2.0)):
        values = [{"RMSE": np.array([value])}]
        _add(lines, Line(("rating", "RMSE", "", None), "fusion", "", run, values=values, users=["u"], requests=["u|1"]))
    assert [name for _, name in lines] == ["fusion", "fusion · c"]
    assert [len(line.values) for line in lines.values()] == [1, 1]


def test_comparisons_of_runs_that_are_still_to_come_count_in_the_family(tmp_path: Path) -> None:
    row = Row(
        id="r", task="direct", arm="tuned", predictor="label", template="direct/x", shots=0, engine="fake", n=40,
        parse_rate=1.0, metrics={"NDCG@10": Metric(value=0.5, low=0, high=1, signature="NDCG@10|x")},
        cost=Cost(prompt_tokens=1, completion_tokens=0, forwards=1, seconds=1.0),
    )  # fmt: skip
    users = [f"u{n}" for n in range(40)]
    rng = np.random.default_rng(0)
    better = [{"NDCG@10": rng.random(40)} for _ in range(2)]
    own = [
        Line(("direct", "NDCG@10", "", None), name, name, "", [row], [values], users, users)
        for name, values in zip("ab", better, strict=True)
    ]
    page = load_benchmark(write(tmp_path, "  - {name: a}\n", 'pairs: [["a", "b"], ["a", "c"], ["b", "c"]]\n'))
    (early,), (late,) = (compared(page, combined(own, 100, missing=missing))["pairs"] for missing in (1, 0))
    assert (late.level, early.level) == (0.95, pytest.approx(1 - 0.05 / 3))
    assert late.p == late.p_raw and early.p == pytest.approx(min(1.0, 3 * (early.p_raw or 0.0)))


def test_runs_of_different_cases_do_not_share_a_table(tmp_path: Path) -> None:
    runs = "  - {name: few, overrides: [eval.users=10]}\n  - {name: many}\n"
    with raises(RecipeError, Facts("mismatch", says="eval.users")):
        run_benchmark(load_benchmark(write(tmp_path, runs)), out=tmp_path / "runs", results=tmp_path / "results")


@pytest.mark.parametrize(
    ("runs", "facts"),
    [
        ("  - {name: a}\n  - {name: a}\n", Facts("contradiction", "bench.yaml", column="runs", says="'a'")),
        (
            "  - {name: a, grid: {eval.shots.k: []}}\n",
            Facts("contradiction", "bench.yaml", column="runs", says=("grid of 'a'", "eval.shots.k")),
        ),
        ("  - {name: a b}\n  - {name: a-b}\n", Facts("duplicate", column="runs", says=("'a b'", "'a-b'"))),
        ("  - {name: a, seeds: [1, 1]}\n", Facts("duplicate", column="runs", says="a-seed1")),
        (
            "  - {name: a, overrides: [eval.shot.k=1]}\n",
            Facts("unknown-key", "recipe.yaml", column="eval.shot", says=("run 'a'", "did you mean 'shots'")),
        ),
    ],
)
def test_mistakes_are_found_before_anything_runs(runs: str, facts: Facts, tmp_path: Path) -> None:
    with raises(RecipeError, facts):
        run_benchmark(load_benchmark(write(tmp_path, runs)), out=tmp_path / "runs", results=tmp_path)
    assert not (tmp_path / "runs").exists()


def row(name: str, tokens: float, value: float, **more: Any) -> BenchmarkRow:
    metrics = {metric: Figure(value=value) for metric in ("HR@1", "RMSE")}
    figures = RowFigures(metrics=metrics, tokens_per_request=tokens, members=more.pop("members", ()))
    return BenchmarkRow(name=name, tables={"direct": figures}, **{"arm": "zero-shot", **more})


def result(metric: str, rows: Sequence[BenchmarkRow], **more: Any) -> BenchmarkResult:
    shown = BenchmarkTable(
        name="direct", task="direct", metric=metric, metrics=(metric,), signature="s", requests=5, users=5, **more
    )
    return BenchmarkResult(
        kind="benchmark", benchmark="b", description="<b>", command="llmrec eval x", tables=(shown,), rows=tuple(rows)
    )


def test_no_name_becomes_markup() -> None:
    found = benchmark_pages(result("HR@1", [row("<script>x</script> | *a*", 10.0, 0.5), row("b&b", 20.0, 0.5)]), {})
    assert "<script>" not in found["b.md"] and "<b>" not in found["b.md"]


def test_a_run_starts_from_that_of_its_seed(tmp_path: Path) -> None:
    page = write(tmp_path, "  - {name: SFT, seeds: [3, 4]}\n  - {name: one}\n", "")
    more = "  - {name: further, start: SFT, seeds: [4]}\n  - {name: from one, start: one, seeds: [5]}\n"
    more += "  - {name: taught, teacher: SFT, seeds: [3], overrides: [train.teacher.share=1]}\n"
    page.write_text(page.read_text(encoding="utf-8") + more, encoding="utf-8")
    benchmark = load_benchmark(page)
    made = {point.label: recipe_of(benchmark, point, Path("out")).train for point in points(benchmark)}
    found = {label: train.start for label, train in made.items() if train.teacher is None}
    assert found == {"SFT": None, "one": None, "further": "out/SFT-seed4", "from one": "out/one"}
    teacher = made["taught"].teacher
    assert teacher is not None and (teacher.run, teacher.share) == ("out/SFT-seed3", 1.0)
    for wrong in ("start: nothing", "start: SFT, seeds: [9]", "start: SFT", "teacher: nothing", "teacher: SFT"):
        page = write(tmp_path, "  - {name: SFT, seeds: [3, 4]}\n  - {name: further, " + wrong + "}\n")
        with pytest.raises(RecipeError, match="an earlier run"):
            load_benchmark(page)


def test_an_ensemble_costs_what_its_members_cost() -> None:
    model = row("label · list · tuned", 500, 0.4, arm="tuned")
    other = row("label · list · longer", 700, 0.4, arm="tuned")
    joined = row("fusion with models · list · tuned", 0, 0.5, arm="tuned", members=("label · list · tuned", "markov"))
    text = benchmark_pages(result("HR@1", [joined, model, other, row("markov", 0, 0.3, arm="baseline")]), {})["b.md"]
    costs = {line.split(" | ")[0].strip("| "): line.split(" | ")[2] for line in text.splitlines() if line[:2] == "| "}
    assert costs["fusion with models · list · tuned"] == costs["label · list · tuned"] == "500"
    assert "The cost of an ensemble is the sum over its members." in text
