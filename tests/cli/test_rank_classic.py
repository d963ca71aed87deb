"""A request file ranked by a classic recommender: the lists of evaluation and service, in every format."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import llmrec
from llmrec.answer.rank.options import RankOptions
from llmrec.answer.rank.run import STDOUT, rank_file
from llmrec.answer.rank.users import rank_users
from llmrec.baselines.parameters import create_baseline
from llmrec.cli import main as cli
from llmrec.data.cells import unescape_cells
from llmrec.data.requests import history_entry
from llmrec.errors import DataError, RecipeError
from llmrec.pipeline.study import build_study
from llmrec.recipe.load import dump_recipe, load_recipe
from llmrec.types import Case, Ranking
from tests.answer.rank_cases import jsonl, lines, toy_run
from tests.facts import Facts, raises

CHANGES = ["data={source: made-reviews, noun: products}", "reviews=null", "eval.candidates.count=5"]
BASELINES = ["tasks.sequential.baselines=[{name: markov, decay: 0.31}, item-knn, popularity, random, markov-1]"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classic") / "recipe.yaml"
    path.write_text(
        dump_recipe(load_recipe("recipes/movielens-100k/four-tasks.yaml", [*CHANGES, *BASELINES])), encoding="utf-8"
    )
    return path


def options_of(recipe: Path, requests: Path, out: Path, **changes: Any) -> RankOptions:
    values: dict[str, Any] = {"baseline": "markov"}
    return RankOptions(recipe=str(recipe), requests=requests, out=out, **values | changes)


def ranked(rows: list[dict[str, Any]]) -> list[list[tuple[str, float]]]:
    return [list(zip(row["items"], row["scores"], strict=True)) for row in rows]


def records_of(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Return the requests of an evaluation in the format of a request file."""
    return [
        {
            "id": case.request.id,
            "user_id": case.request.user_id,
            "history": [history_entry(event) for event in case.request.history],
            "candidates": list(case.request.candidates or ()),
        }
        for case in cases
    ]


def test_lists_equal_those_of_the_evaluation(recipe: Path, tmp_path: Path) -> None:
    study = build_study(load_recipe(str(recipe)))
    cases = study.cases("sequential")[:12]
    requests = records_of(cases)
    rank_file(options_of(recipe, jsonl(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"))
    result = ranked(lines(tmp_path / "out.jsonl"))
    models = [
        create_baseline("markov", parameters, seed=study.recipe.seed)
        for parameters in (study.baselines("sequential")[0].parameters, {})
    ]
    answers = []
    for model in models:
        model.fit(study.data)
        output = model.answer([case.request for case in cases])
        answers.append(
            [list(zip(each.items, each.scores, strict=True)) for each in output if isinstance(each, Ranking)]
        )
    assert result == answers[0] and result != answers[1]


def test_lists_equal_those_of_the_loaded_recommender(llama_folder: Path, tmp_path: Path) -> None:
    run = toy_run(llama_folder, tmp_path / "run")
    requests = [
        {"id": "known", "user_id": "u01"},
        {"id": "told", "history": ["k01", "k02"]},
        {"id": "cold"},
        {"id": "set", "history": ["k03"], "candidates": ["k05", "k07", {"title": "Something New"}]},
        {"id": "both", "user_id": "u01", "candidates": ["k05", "k07"]},
        {"id": "nobody", "user_id": "nobody"},
    ]
    file = jsonl(tmp_path / "in.jsonl", requests)
    summary = rank_file(options_of(run, file, tmp_path / "out.jsonl", baseline="item-knn", top=4))
    rows = lines(tmp_path / "out.jsonl")
    assert (summary["ranked"], summary["failed"], summary["baseline"]) == (6, 0, "item-knn")
    with llmrec.load(str(run), models=["item-knn"]) as rec:
        for row, request in zip(rows, requests, strict=True):
            output = {{"user_id": "user"}.get(key, key): value for key, value in request.items()}
            expected = rec.rank(**output, k=4)
            assert list(zip(row["items"], row["titles"], row["scores"], strict=True)) == [
                (each.item_id, each.title, each.score) for each in expected
            ]
    assert "of this user in the data" in rows[0]["notes"][0]
    assert "no history" in rows[5]["notes"] and rows[5]["items"] == rows[2]["items"]


def test_requests_without_candidates_in_csv_and_parquet(recipe: Path, tmp_path: Path) -> None:
    frame = pl.DataFrame({"id": ["a", "b"], "user_id": ["u01", None], "history": [None, '["k01"]']})
    frame.write_csv(tmp_path / "in.csv")
    frame.write_parquet(tmp_path / "in.parquet")
    result = []
    for suffix in ("csv", "parquet"):
        rank_file(options_of(recipe, tmp_path / f"in.{suffix}", tmp_path / suffix / "out.jsonl", top=3))
        result.append(ranked(lines(tmp_path / suffix / "out.jsonl")))
    assert result[0] == result[1] and [len(each) for each in result[0]] == [3, 3]


def test_whole_catalogue_ignores_candidates(recipe: Path, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "in.jsonl", [{"id": "a", "history": ["k01"], "candidates": ["k02"]}])
    rank_file(options_of(recipe, file, tmp_path / "out.jsonl", candidates="all"))
    (row,) = lines(tmp_path / "out.jsonl")
    assert len(row["items"]) == 20 and "k01" not in row["items"] and "ignored" in row["notes"][0]


def test_lists_of_all_users_without_a_run(recipe: Path, tmp_path: Path) -> None:
    read = {}
    for name in ("all.csv", "all.run", "all.inter"):
        options = RankOptions(baseline="markov", recipe=str(recipe), all_users=True, to=str(tmp_path / name), limit=3)
        assert rank_users(options)["users"] == 3
        separator = {".csv": ",", ".run": " ", ".inter": "\t"}[(tmp_path / name).suffix]
        read[name] = pl.read_csv(tmp_path / name, separator=separator, has_header=name != "all.run")
    lists = read["all.csv"].select("user_id", "item_id", "rank", "score")
    assert lists["user_id"].n_unique() == 3
    assert read["all.inter"].columns == ["user_id:token", "item_id:token", "rank:float", "score:float"]
    assert read["all.inter"].rows() == lists.rows()
    assert read["all.run"].select(pl.nth(0, 2, 3, 4)).rows() == lists.rows()


def test_writes_to_a_database_url(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for address in ("sqlite:///../lists.db", f"sqlite:///{tmp_path}/lists"):
        rank_users(RankOptions(baseline="markov", recipe=str(recipe), all_users=True, to=address, limit=1, top=2))
    assert {path.name for path in tmp_path.iterdir()} == {"here", "lists.db", "lists", *SUMMARIES}
    assert not list((tmp_path / "here").iterdir())


SUMMARIES = ("lists.db.summary.json", "lists.summary.json")


@pytest.mark.parametrize("form", ["all-users", "records"])
def test_csv_guards_against_formulas(tmp_path: Path, form: str) -> None:
    hostile = ["=1+1", "+1", "-2+3", "@SUM(1)", "'=1", " =1+1", "plain"]
    items = [f"{mark}I{n}" for n, mark in enumerate(hostile)]
    rows = [
        f'"{user}","{items[(position + n) % 7]}",{n + 1}\n' for position, user in enumerate(hostile) for n in range(4)
    ]
    (tmp_path / "events.csv").write_text("user_id,item_id,timestamp\n" + "".join(rows))
    page = tmp_path / "page.yaml"
    page.write_text(
        f"name: shop\ndata: {{source: table, path: {tmp_path}/events.csv, filter: {{user_core: 1, item_core: 1}}}}\n"
        "tasks: {sequential: {baselines: [popularity, random, item-knn, markov-1]}}\neval: {arms: [], backend: fake}\n"
    )
    out = tmp_path / "out.csv"
    if form == "all-users":
        rank_users(RankOptions(baseline="popularity", recipe=str(page), all_users=True, to=str(out)))
    else:
        requests = [{"id": user, "user_id": user, "history": items[:1]} for user in hostile]
        file = jsonl(tmp_path / "in.jsonl", requests)
        rank_file(RankOptions(baseline="popularity", recipe=str(page), requests=file, out=out, form=form))
    with out.open(newline="", encoding="utf-8") as stream:
        head, *result = list(csv.reader(stream))
    texts = {
        name: {row[position] for row in result} for position, name in enumerate(head) if name not in ("rank", "score")
    }
    assert not [cell for column in texts.values() for cell in column if cell.lstrip().startswith(("=", "+", "-", "@"))]
    users = pl.Series(sorted(texts["user_id"]))
    assert set(unescape_cells(users)) == set(hostile)


def test_forms_have_the_same_lists(recipe: Path, tmp_path: Path) -> None:
    requests = [{"id": "a", "user_id": "u01"}, {"id": "b", "history": ["k01"]}, {"id": "bad", "candidates": []}]
    file = jsonl(tmp_path / "in.jsonl", requests)
    rank_file(options_of(recipe, file, tmp_path / "out.jsonl", top=3))
    names = ["u01", "b"]
    expected = [
        (user, item, position, score)
        for user, row in zip(names, lines(tmp_path / "out.jsonl"), strict=False)
        for position, (item, score) in enumerate(zip(row["items"], row["scores"], strict=True), start=1)
    ]
    readers = {"long.csv": pl.read_csv, "long.parquet": pl.read_parquet, "long.jsonl": pl.read_ndjson}
    for name, read in readers.items():
        rank_file(options_of(recipe, file, tmp_path / name, top=3, form="long"))
        frame = read(tmp_path / name)
        assert frame.columns == ["user", "item", "rank", "score"] and frame.rows() == expected
    # A finished file can be written again in another format.
    rank_file(options_of(recipe, file, tmp_path / "long.csv", top=3, form="rectools"))
    tools = pl.read_csv(tmp_path / "long.csv")
    assert tools.columns == ["user_id", "item_id", "rank", "score"] and tools.rows() == expected
    rank_file(options_of(recipe, file, tmp_path / "list.inter", top=3))
    bole = pl.read_csv(tmp_path / "list.inter", separator="\t")
    assert bole.columns[0] == "user_id:token" and bole.rows() == expected
    rank_file(options_of(recipe, file, tmp_path / "list.run", top=3))
    output = [line.split(" ") for line in (tmp_path / "list.run").read_text().splitlines()]
    assert [(u, i, int(r), float(s)) for u, _, i, r, s, _ in output] == expected and output[0][5] == "markov"


def test_long_form_rejects_two_lists_of_one_user(recipe: Path, tmp_path: Path) -> None:
    requests = [{"id": "a", "user_id": "u01", "history": ["k01"]}, {"id": "b", "user_id": "u01", "history": ["k02"]}]
    file = jsonl(tmp_path / "in.jsonl", requests)
    with raises(DataError, Facts(kind="duplicate", file=str(file), line=2, column="user_id")):
        rank_file(options_of(recipe, file, tmp_path / "out.csv", form="long"))
    assert rank_file(options_of(recipe, file, tmp_path / "out.csv"))["from_earlier_run"] == 2


def test_stdout_has_only_lists(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = jsonl(tmp_path / "in.jsonl", [{"id": "a", "history": ["k01"]}, {"id": "bad", "candidates": []}])
    arguments = ["rank", "--baseline", "markov", "--recipe", str(recipe), "--in", str(file), "--out", "-", "--top", "2"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["llmrec", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    output = capfd.readouterr()
    rows = [json.loads(line) for line in output.out.splitlines()]
    assert end.value.code == 1 and [row["request_id"] for row in rows] == ["a", "bad"]
    assert len(rows[0]["items"]) == 2 and "ranked" in output.err and sorted(tmp_path.iterdir()) == [file]
    summary = rank_file(options_of(recipe, file, STDOUT, form="trec", top=1))
    assert capfd.readouterr().out.split()[:2] == ["a", "Q0"] and summary["out"] == "-"


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"baseline": "markow"}, Facts(kind="unknown-name", column="--baseline")),
        ({"recipe": None}, Facts(kind="missing-key", column="--recipe")),
        ({"model": "runs/quickstart"}, Facts(kind="contradiction", column="--model")),
        ({"strategy": "label"}, Facts(kind="contradiction", column="--strategy")),
        ({"baseline": None, "recipe": None}, Facts(kind="missing-key", column="--model")),
        ({"baseline": None, "model": "runs/quickstart"}, Facts(kind="contradiction", column="--recipe")),
        ({"form": "long", "out": Path("out.trec")}, Facts(kind="contradiction", column="--form")),
    ],
)
def test_rejects_contradicting_options(recipe: Path, tmp_path: Path, changes: dict[str, Any], facts: Facts) -> None:
    file = jsonl(tmp_path / "in.jsonl", [{"id": "a", "history": ["k01"]}])
    values: dict[str, Any] = {"recipe": str(recipe), "baseline": "markov", "out": Path("out.jsonl")} | changes
    out = tmp_path / values.pop("out")
    with raises(RecipeError, facts):
        rank_file(RankOptions(requests=file, out=out, **values))
    assert sorted(tmp_path.iterdir()) == [file]
