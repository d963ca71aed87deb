"""Benchmarks of runs: averaged over seeds and compared on the same users, with a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from llmrec.bench.engine import FinishedBenchmark, compare_models
from llmrec.bench.leaderboard import rewrite
from llmrec.bench.pages import benchmark_pages
from llmrec.bench.recipes import VariantRow, _add_row, combine_rows, iterate_variants, load_variant_recipe
from llmrec.bench.records import BenchmarkResult, BenchmarkRow, BenchmarkTable, RowFigures
from llmrec.bench.run import check_page, run_benchmark
from llmrec.errors import RecipeError
from llmrec.evaluate.compare import compare_values
from llmrec.metrics.significance import holm_p_values
from llmrec.recipe.load import detect_page_kind, load_benchmark
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
  - {name: few-shot, overrides: ["eval.arms=[few-shot]"], grid: {eval.shots.k: [1, 2]}}
"""
PAIRS = """\
pairs:
  - ["pointwise-yes · after-history · zero-shot", "label · after-history · zero-shot"]
  - ["expected · list-ratings · zero-shot", "global-mean"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def ran(folder: Path) -> tuple[list[str], FinishedBenchmark]:
    """The messages and the result of a benchmark with three runs."""
    messages: list[str] = []
    page = load_benchmark(write(folder, RUNS, PAIRS))
    return messages, run_benchmark(page, out=folder / "runs", results=folder / "eval" / "results", say=messages.append)


def test_grid_has_every_combination_and_seed(tmp_path: Path) -> None:
    grid = "  - {name: few-shot, grid: {eval.shots.k: [1, 2], eval.shots.choice: [random, recent]}}\n"
    page = write(tmp_path, "  - {name: zero-shot}\n" + grid + "  - {name: tuned, seeds: [3, 4]}\n")
    assert detect_page_kind(page) == "benchmark"
    found = list(iterate_variants(load_benchmark(page)))
    assert [point.label for point in found] == [
        "zero-shot",
        *(f"few-shot, k={k}, choice={choice}" for k in (1, 2) for choice in ("random", "recent")),
        *("tuned", "tuned"),
    ]
    assert [point.seed for point in found[-2:]] == [3, 4]
    assert len({point.folder for point in found}) == len(found)


def test_table_has_every_run_with_its_cost(folder: Path, ran: tuple[list[str], FinishedBenchmark]) -> None:
    messages, files = ran[0], ran[1].files
    results = json.loads(files["results"].read_text(encoding="utf-8"))
    assert len(messages) == 3 and {table["task"] for table in results["tables"]} == {"direct", "rating"}
    table, rating = (next(each for each in results["tables"] if each["name"] == name) for name in ("direct", "rating"))
    rows = [row for row in results["rows"] if "direct" in row["tables"]]
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names) == 6 + 2 * 3  # each baseline and their ensemble once, each strategy per run
    few = {row["name"]: row["tables"]["direct"] for row in rows}
    one, two = (few[f"label · after-history · few-shot, k={k}"] for k in (1, 2))
    assert (
        two["tokens_per_request"]
        > one["tokens_per_request"]
        > few["label · after-history · zero-shot"]["tokens_per_request"]
    )
    assert few["pointwise-yes · after-history · zero-shot"]["forwards_per_request"] == 5
    assert "uniform-5" in table["signature"] and len(table["candidates"]) > 10
    against = [pair for pair in results["comparisons"] if pair["table"] == "direct"]
    assert {pair["b"] for pair in against} == {table["best_baseline"]} <= set(names) and len(against) == 6
    (pair,) = [pair for pair in results["pairs"] if pair["table"] == "direct"]
    assert pair["value"] == pytest.approx(
        few[pair["a"]]["metrics"]["NDCG@10"]["value"] - few[pair["b"]]["metrics"]["NDCG@10"]["value"]
    )
    assert not any({"p", "verdict"} & set(entry) for entry in against)
    tested = results["pairs"]
    assert [one["p"] for one in tested] == holm_p_values(
        [one["p_raw"] for one in tested]
    )  # one family across both tables
    assert all((one["low"] <= 0 <= one["high"]) == (one["p"] > 0.05) for one in tested)
    assert all("2 planned comparisons" in each["detectable"] for each in (table, rating))
    text = files["page"].read_text(encoding="utf-8")
    for heading in ("## Direct", "## Rating"):
        shown = [line for line in text.partition(heading)[2].partition("\n## ")[0].splitlines() if " [" in line]
        values = [float(line.split(" | ")[1].split(" ")[0].strip("*")) for line in shown if line.startswith("| ")]
        assert values == sorted(values, reverse=heading == "## Direct")
    assert "exploratory and has an unadjusted 95 % interval" in text and table["detectable"] in text
    assert rewrite(folder / "eval" / "results")[0].read_text(encoding="utf-8") == text
    assert "label · after-history · zero-shot" in text
    assert results["missing"] == 0 and "runs are missing" not in text


def test_second_call_reuses_every_run(folder: Path, ran: tuple[list[str], FinishedBenchmark], tmp_path: Path) -> None:
    rows = sorted((folder / "runs" / "zero-shot" / "rows").iterdir())
    times = [row.stat().st_mtime_ns for row in rows]
    # No table contains both models of this pair.
    page = load_benchmark(write(folder, RUNS, 'pairs: [["markov", "global-mean"]]\n'))
    with raises(RecipeError, Facts("mismatch", column="pairs", says="no table contains both")):
        run_benchmark(page, out=folder / "runs", results=tmp_path)
    assert [row.stat().st_mtime_ns for row in rows] == times
    results = json.loads((tmp_path / "small.json").read_text(encoding="utf-8"))
    assert results["missing"] == 0 and results["rows"] == json.loads(ran[1].files["results"].read_text())["rows"]


def test_runs_of_different_cases_do_not_share_a_table(
    folder: Path, ran: tuple[list[str], FinishedBenchmark], tmp_path: Path
) -> None:
    page = load_benchmark(write(folder, "  - {name: zero-shot}\n  - {name: few, overrides: [eval.users=10]}\n"))
    with raises(RecipeError, Facts("mismatch", says="eval.users")):
        run_benchmark(page, out=folder / "runs", results=tmp_path)


@pytest.mark.slow
def test_killed_benchmark_keeps_finished_runs(tmp_path: Path) -> None:
    def killed(line: str) -> None:
        if "k-1" in line:
            raise KeyboardInterrupt

    page = load_benchmark(write(tmp_path, RUNS))
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(page, out=tmp_path / "runs", results=tmp_path / "eval" / "results", say=killed)
    results = json.loads((tmp_path / "eval" / "results" / "small.json").read_text(encoding="utf-8"))
    assert results["missing"] == 1
    assert "1 runs are missing" in (tmp_path / "eval" / "small.md").read_text(encoding="utf-8")


def test_settings_of_one_run_are_separate_rows(tmp_path: Path) -> None:
    both = '  - {name: both, overrides: ["eval.arms=[zero-shot, few-shot]"]}\n'
    names = [f"label · after-history · both · {arm}" for arm in ("zero-shot", "few-shot")]
    page = load_benchmark(write(tmp_path, both, f"pairs: [{json.dumps(names, ensure_ascii=False)}]\n"))
    added = run_benchmark(page, out=tmp_path / "runs", results=tmp_path / "results").files
    results = json.loads(added["results"].read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in results["rows"] if row["arm"] != "baseline"}
    assert all(rows[name]["arm"] == arm for name, arm in zip(names, ("zero-shot", "few-shot"), strict=True))
    assert all(row["seeds"] == 1 for row in rows.values())
    assert [[pair["a"], pair["b"]] for pair in results["pairs"]] == [names]


def figures(value: float, n: int = 2) -> Row:
    metric = Metric(value=value, low=value - 1, high=value + 1, signature="NDCG@10|x")
    cost = Cost(prompt_tokens=10, completion_tokens=0, forwards=2, seconds=1.0)
    return Row(
        id="r", task="direct", arm="tuned", predictor="label", template="direct/x", shots=0, engine="fake", n=n,
        parse_rate=1.0, metrics={"NDCG@10": metric}, cost=cost,
    )  # fmt: skip


def test_seeds_are_averaged_before_rows_are_compared() -> None:
    line = VariantRow(
        ("direct", "NDCG@10", "", None), "label", "tuned", "tuned", [figures(0.2), figures(0.4)],
        [{"NDCG@10": [0.0, 0.4]}, {"NDCG@10": [0.2, 0.6]}], ["a", "b"], ["a", "b"],
    )  # fmt: skip
    (added,) = combine_rows([line], 100).rows
    found = added.row.tables["direct"]
    assert found.metrics["NDCG@10"].value == pytest.approx(0.3)
    assert found.metrics["NDCG@10"].sd == pytest.approx(0.1 * 2**0.5)
    assert "signature" not in found.metrics["NDCG@10"].as_json()
    assert added.row.seeds == 2 and found.tokens_per_request == 5
    values = added.samples["direct"].values
    assert compare_values("NDCG@10", values, np.array([0.0, 0.2]), line.users, resamples=9, seed=0).value == (
        pytest.approx(0.2)
    )


@pytest.mark.parametrize(
    ("name", "near"),
    [("label · after-history · zero-sho", "label · after-history · zero-shot"), ("popularitY", "popularity")],
)
def test_rejects_unknown_model_of_a_pair_before_the_first_run(tmp_path: Path, name: str, near: str) -> None:
    page = write(tmp_path, "  - {name: zero-shot}\n", f'pairs: [["{name}", "popularity"]]\n')
    expected = Facts("unknown-name", column="pairs", says=f"did you mean {near!r}")
    with raises(RecipeError, expected):
        check_page("benchmark", str(page), [])
    with raises(RecipeError, expected):
        run_benchmark(load_benchmark(page), out=tmp_path / "runs", results=tmp_path / "eval" / "results")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "eval").exists()


@pytest.mark.parametrize(
    "page",
    [page for page in sorted(resource("eval/suites").glob("*.yaml")) if detect_page_kind(page) == "benchmark"],
    ids=lambda page: page.stem,
)
def test_committed_benchmarks_are_valid(page: Path) -> None:
    check_page("benchmark", str(page), [])
    assert load_benchmark(page).benchmark == page.stem


def test_undefined_value_is_in_the_table(tmp_path: Path) -> None:
    rated = DATA.dataset.interactions.with_columns(rating=pl.lit(5.0))
    page = write(tmp_path, "  - {name: a}\n")
    rated.select("user_id", "item_id", "rating", "timestamp").write_csv(tmp_path / "rows.csv")
    text = (tmp_path / "recipe.yaml").read_text(encoding="utf-8")
    head, tail = text.split("tasks:")[0], text.partition("\neval:")[2]
    (tmp_path / "recipe.yaml").write_text(f"{head}tasks: {{ctr: {{liked: 4}}}}\neval:{tail}", encoding="utf-8")
    added = run_benchmark(load_benchmark(page), out=tmp_path / "runs", results=tmp_path / "eval" / "results").files
    rows = json.loads(added["results"].read_text(encoding="utf-8"))["rows"]
    assert [row["tables"]["ctr"]["metrics"]["AUC"]["value"] for row in rows] == [None] * 4
    assert set(added) == {"results", "page"} and "yes-no" in added["page"].read_text(encoding="utf-8")


def test_rejects_seeds_with_different_requests() -> None:
    lines: dict[Any, VariantRow] = {}
    _add_row(lines, VariantRow(("rating", "RMSE", "", None), "a", "a", users=["u", "u"], requests=["u|1", "u|2"]))
    with raises(RecipeError, Facts("mismatch", says="eval.users")):
        _add_row(lines, VariantRow(("rating", "RMSE", "", None), "a", "a", users=["u", "u"], requests=["u|2", "u|3"]))


def test_baselines_with_different_answers_are_separate_rows() -> None:
    lines: dict[Any, VariantRow] = {}
    for run, value in (("a", 1.0), ("b", 1.0 + 1e-9), ("c", 2.0), ("c", 2.0)):
        values = [{"RMSE": np.array([value])}]
        _add_row(
            lines,
            VariantRow(("rating", "RMSE", "", None), "fusion", "", run, values=values, users=["u"], requests=["u|1"]),
        )
    assert [name for _, name in lines] == ["fusion", "fusion · c"]
    assert [len(line.values) for line in lines.values()] == [1, 1]


def test_comparisons_of_missing_runs_count_in_the_family(tmp_path: Path) -> None:
    users = [f"u{n}" for n in range(40)]
    rng = np.random.default_rng(0)
    better = [{"NDCG@10": rng.random(40)} for _ in range(2)]
    lines = [
        VariantRow(("direct", "NDCG@10", "", None), name, name, "", [figures(0.5, 40)], [values], users, users)
        for name, values in zip("ab", better, strict=True)
    ]
    page = load_benchmark(write(tmp_path, "  - {name: a}\n", 'pairs: [["a", "b"], ["a", "c"], ["b", "c"]]\n'))
    (early,), (late,) = (compare_models(page, combine_rows(lines, 100, missing=missing))["pairs"] for missing in (1, 0))
    assert (late.level, early.level) == (0.95, pytest.approx(1 - 0.05 / 3))
    assert late.p == late.p_raw and early.p == pytest.approx(min(1.0, 3 * (early.p_raw or 0.0)))


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
def test_rejects_wrong_runs_before_the_first_run(runs: str, facts: Facts, tmp_path: Path) -> None:
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


def test_escapes_names() -> None:
    found = benchmark_pages(result("HR@1", [row("<script>x</script> | *a*", 10.0, 0.5), row("b&b", 20.0, 0.5)]), {})
    assert "<script>" not in found["b.md"] and "<b>" not in found["b.md"]


def test_run_starts_from_the_run_of_its_seed(tmp_path: Path) -> None:
    page = write(tmp_path, "  - {name: SFT, seeds: [3, 4]}\n  - {name: one}\n", "")
    more = "  - {name: further, start: SFT, seeds: [4]}\n  - {name: from one, start: one, seeds: [5]}\n"
    more += "  - {name: taught, teacher: SFT, seeds: [3], overrides: [train.teacher.share=1]}\n"
    page.write_text(page.read_text(encoding="utf-8") + more, encoding="utf-8")
    benchmark = load_benchmark(page)
    sections = {
        point.label: load_variant_recipe(benchmark, point, Path("out")).train for point in iterate_variants(benchmark)
    }
    starts = {label: train.start for label, train in sections.items() if train.teacher is None}
    assert starts == {"SFT": None, "one": None, "further": "out/SFT-seed4", "from one": "out/one"}
    teacher = sections["taught"].teacher
    assert teacher is not None and (teacher.run, teacher.share) == ("out/SFT-seed3", 1.0)
    for wrong in ("start: nothing", "start: SFT, seeds: [9]", "start: SFT", "teacher: nothing", "teacher: SFT"):
        page = write(tmp_path, "  - {name: SFT, seeds: [3, 4]}\n  - {name: further, " + wrong + "}\n")
        with pytest.raises(RecipeError, match="an earlier run"):
            load_benchmark(page)


def test_cost_of_an_ensemble_is_that_of_its_members() -> None:
    model = row("label · list · tuned", 500, 0.4, arm="tuned")
    other = row("label · list · longer", 700, 0.4, arm="tuned")
    joined = row("fusion with models · list · tuned", 0, 0.5, arm="tuned", members=("label · list · tuned", "markov"))
    text = benchmark_pages(result("HR@1", [joined, model, other, row("markov", 0, 0.3, arm="baseline")]), {})["b.md"]
    costs = {line.split(" | ")[0].strip("| "): line.split(" | ")[2] for line in text.splitlines() if line[:2] == "| "}
    assert costs["fusion with models · list · tuned"] == costs["label · list · tuned"] == "500"
    assert "The cost of an ensemble is the sum over its members." in text
