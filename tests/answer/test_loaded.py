"""`llmrec.load`, and the commands `rank`, `predict` and `refresh` on a run."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import llmrec
from llmrec.answer.known import Histories, profile_lookup, with_stored_data
from llmrec.answer.language_model import LanguageModel
from llmrec.answer.listing import is_cold
from llmrec.answer.loaded import Loaded
from llmrec.answer.opening import open_models
from llmrec.answer.options import RecommenderOptions
from llmrec.answer.predict.options import PredictOptions
from llmrec.answer.predict.run import predict_file
from llmrec.answer.rank.options import RankOptions
from llmrec.answer.rank.run import rank_file
from llmrec.answer.rank.users import rank_users
from llmrec.baselines.sasrec import SASRec
from llmrec.data.dataset import Dataset, conform_to_schema
from llmrec.data.read.databases import read_query
from llmrec.data.requests import parse_request
from llmrec.data.split import split_validation_users
from llmrec.errors import DataError, LlmrecError, RecipeError
from llmrec.pipeline import bundle
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.study import Study, build_study, load_tables
from llmrec.pipeline.training import train_stage
from llmrec.recipe.load import dump_recipe, load_recipe, load_stored_recipe
from llmrec.resources import resource
from llmrec.types import Item
from tests.answer.rank_cases import jsonl, lines, options, pairs, toy_run
from tests.facts import Facts, raises

pytest.importorskip("llmrec.serve", reason="the extension is not there")

from llmrec.serve.options import RefreshOptions
from llmrec.serve.refresh import refresh

torch = pytest.importorskip("torch", reason="the train extra is not installed")


@pytest.fixture(scope="module")
def run(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_run(llama_folder, tmp_path_factory.mktemp("loaded") / "run")


@pytest.fixture(scope="module")
def rec(run: Path) -> Any:
    with llmrec.load(str(run), backend="hf", dtype="float32") as loaded:
        yield loaded


def test_lists_are_sorted_without_seen_items(rec: Loaded) -> None:
    for model in rec.models:
        ranking = rec.rank(history=["k01", "k02"], k=4, model=model)
        assert len(ranking) == 4 and not {each.item_id for each in ranking} & {"k01", "k02"}, model
        scores = [each.score for each in ranking]
        assert scores == sorted(scores, reverse=True)
    again = rec.rank(history=["k01", "k02"], k=40, model="popularity", exclude_seen=False)
    assert {"k01", "k02"} <= {each.item_id for each in again}
    # An unknown user gets the most popular items.
    assert rec.rank(user="nobody", k=3) == rec.rank(history=["k01"], k=3, model="popularity", exclude_seen=False)


def test_known_users_have_their_history(rec: Loaded) -> None:
    events = rec.known.histories.of_user("u01")
    items = [event.item_id for event in events]
    history = [{"item_id": event.item_id, "rating": event.rating, "timestamp": event.timestamp} for event in events]
    assert items and rec.rank(user="u01", k=5) == rec.rank(user="u01", history=history, k=5)
    assert not {each.item_id for each in rec.rank(user="u01", k=30)} & set(items)


def test_saved_language_model_gives_same_results(rec: Loaded, tmp_path: Path) -> None:
    folder = rec.save(tmp_path / "saved")
    names = ("tuned", "popularity")
    with llmrec.load(folder, models=names, backend="hf", dtype="float32") as again:
        assert again.users == rec.users and again.items == rec.items
        for name in names:
            assert again.rank(user="u01", k=4, model=name) == rec.rank(user="u01", k=4, model=name)


def test_saving_replaces_the_previous_model(rec: Loaded, tmp_path: Path) -> None:
    rows = pl.DataFrame([(f"u{n % 7}", f"i{n % 5}") for n in range(30)], ["user_id", "item_id"], orient="row")
    classic = llmrec.fit(rows, model="popularity")
    folder = classic.save(tmp_path / "saved")
    classic_files = {path.name for path in folder.iterdir()}
    (folder / "notes.txt").write_text("mine")
    rec.save(folder)
    with llmrec.load(folder, backend="hf", dtype="float32") as again:
        assert again.models[0] == "tuned"
        # The notes are not part of the model that is saved over itself.
        again.save(folder)
    classic.save(folder)
    assert {path.name for path in folder.iterdir()} == {*classic_files, "notes.txt"}


def test_rules_filter_lists(rec: Loaded) -> None:
    free = rec.rank(history=["k01"], k=5)
    barred = [free[0].item_id, free[2].item_id]
    kept = rec.rank(history=["k01"], k=5, where={"block": barred})
    assert len(kept) == 5 and not set(barred) & {each.item_id for each in kept}
    with raises(DataError, Facts(kind="unknown-name", column="only.colour")):
        rec.rank(history=["k01"], where={"only": {"colour": ["red"]}})
    with raises(DataError, Facts(kind="empty", column="rules")):
        rec.rank(history=["k01"], candidates=["k05"], where={"block": ["k05"]})


@pytest.mark.parametrize("make", [pl.DataFrame, pd.DataFrame, pa.table, lambda rows: pl.DataFrame(rows).to_dicts()])
def test_recommend_returns_the_same_kind_of_frame(rec: Loaded, make: Any) -> None:
    rows = {"user_id": ["u01", "nobody", None], "history": [None, None, ["k03"]], "id": ["a", "b", "c"]}
    frame = make(rows)
    result = rec.recommend(frame, k=2, model="item-knn")
    assert type(result) is type(frame)
    table = pl.DataFrame(result) if not isinstance(result, pl.DataFrame) else result
    assert table["id"].to_list() == ["a", "a", "b", "b", "c", "c"] and table["rank"].to_list() == [1, 2] * 3
    alone = rec.rank(history=["k03"], k=2, model="item-knn")
    assert table.filter(pl.col("id") == "c")["item_id"].to_list() == [each.item_id for each in alone]


def test_float_user_ids_match_integers() -> None:
    """In pandas a column of integers with a missing value has floats."""
    rows = pl.DataFrame(
        {"user_id": ["1"], "item_id": ["x"], "rating": [4.0], "timestamp": [1.0], "text": [None]},
        schema_overrides={"text": pl.String},
    )
    items = {"x": Item(item_id="x", title="X")}
    past = Histories.of(Dataset(name="toy", noun="items", interactions=conform_to_schema(rows), items=items), 0)
    for user in (1.0, 1, "1"):
        request, known = with_stored_data({"user_id": user}, past.of_user, items, lambda user: f"it is {user}")
        assert request["history"] and request["profile"] == "it is 1" and known


def test_prompts_show_fields_of_known_users(llama_folder: Path, tmp_path: Path) -> None:
    users = _csv(tmp_path / "users.csv", "user_id,age,gender\n" + "\n".join(f"u{n:02d},{30 + n},F" for n in range(40)))
    rows = [f"u{user:02d},k{(user + step) % 30:02d},{1 + step % 5},{step}" for user in range(40) for step in range(6)]
    table = _csv(tmp_path / "table.csv", "\n".join(["user_id,item_id,rating,timestamp", *rows]))
    data = f"data={{source: table, path: {table}, users: {users}, columns: {{user_fields: [age, gender]}}}}"
    tasks = "tasks={direct: {eval_templates: [with-profile]}}"
    more = [f"model.name={llama_folder}", data, tasks, "reviews=null", "eval.candidates.count=5"]
    recipe = load_recipe("recipes/movielens-100k/four-tasks.yaml", more)
    run = tmp_path / "run"
    shutil.copytree(llama_folder, run / "merged")
    study = build_study(recipe)
    bundle.write(study, run / "merged")
    (run / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    case = study.cases("direct")[0].request
    user = str(case.user_id)
    profile_of = profile_lookup(str(run))
    assert profile_of is not None and profile_of("unknown") == {}
    assert profile_of(user) == {"age": str(30 + int(user[1:])), "gender": "F"}
    shown = {"id": "1", "user_id": user, "history": [], "candidates": list(case.candidates or ())}
    request = parse_request({**shown, "profile": profile_of(user)}, 1, study.data.dataset.items)
    view = study.tasks["direct"]._view
    assert view.user("somebody", request.context)["profile"] == view.user(user)["profile"] != []
    assert not is_cold(request) and is_cold(parse_request(shown, 1, study.data.dataset.items))
    named = parse_request({**shown, "profile": {"name": "Ann", "age": 30.0}}, 1, study.data.dataset.items)
    assert view.user("u1", named.context)["user_name"] == "Ann"
    with raises(DataError, Facts("bad-value", column="profile")):
        parse_request({**shown, "profile": {"age": [1]}}, 1, study.data.dataset.items)


def test_bad_row_is_an_error_in_its_row(rec: Loaded) -> None:
    results = rec.recommend([{"history": ["k01"]}, {"candidates": ["nowhere"]}, {"history": ["k02"]}], k=1)
    assert [row["error"] is None for row in results] == [True, False, True] and "nowhere" in results[1]["error"]
    assert [row["id"] for row in results] == ["1", "2", "3"]


def test_frame_needs_a_known_column(rec: Loaded) -> None:
    user = rec.users[0]
    same = [rec.recommend([{name: user}], k=3, model="popularity") for name in ("user", "user_id")]
    assert same[0] == same[1] and same[0][0]["user_id"] == user
    for name in ("userid", "usr"):
        with raises(DataError, Facts("missing-column", column="user_id", says=f"rename {name!r} (did you mean")):
            rec.recommend([{name: user}], k=3)
    (first, *_) = rec.recommend(
        [{"history": [rec.known.items and min(rec.known.items), "no such"], "candidate": ["x"]}], k=2
    )
    assert "'no such'" in first["notes"] and "'candidate' was ignored (did you mean 'candidates'?)" in first["notes"]


def test_k_must_be_a_positive_integer(rec: Loaded) -> None:
    calls: tuple[tuple[Any, Any], ...] = ((rec.rank, "3"), (rec.rank, 0), (rec.recommend, 2.5), (rec.similar, -5))
    for ask, k in calls:
        with raises(DataError, Facts("bad-value", column="k")):
            ask([], k=k)


@pytest.mark.parametrize("users", [["u01", ["k01", "k02"]], [["k01"], None]])
def test_ids_and_histories_cannot_be_mixed(rec: Loaded, users: Any) -> None:
    with raises(DataError, Facts(kind="bad-value", column="users")):
        rec.recommend(users, k=3, model="popularity")


def test_invalid_requests_are_refused(rec: Loaded) -> None:
    with raises(RecipeError, Facts(kind="unknown-name", column="model")):
        rec.rank(history=["k01"], model="markow")
    with raises(RecipeError, Facts(kind="unsupported", column="strategy")):
        rec.rank(history=["k01"], model="popularity", strategy="list")
    with raises(DataError, Facts(kind="unknown-name", column="item_id")):
        rec.similar(["nowhere"])
    with raises(LlmrecError, Facts(kind="unknown-key")):
        llmrec.load("runs/x", colour="red")


def test_rank_file_uses_stored_history(rec: Loaded, run: Path, tmp_path: Path) -> None:
    pool = ["k03", "k05", "k07", "k11"]
    requests = [
        {"id": "known", "user_id": "u01", "candidates": pool},
        {"id": "own", "user_id": "u01", "history": ["k09"], "candidates": pool},
        {"id": "strange", "user_id": "nobody", "candidates": pool},
        {"id": "none", "user_id": "u01", "history": [], "candidates": pool},
    ]
    rank_file(options(run, jsonl(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl", batch=1))
    known, given_history, strange, none = lines(tmp_path / "out.jsonl")
    events = len(rec.known.histories.of_user("u01"))
    assert known["notes"] == [f"history: {events} interactions of this user in the data"]
    assert strange["notes"] == ["unknown user 'nobody'", "no history"]
    assert given_history["notes"] == [] and none["notes"] == ["no history"]

    def listed(**who: Any) -> list[tuple[str, float]]:
        return [(each.item_id, each.score) for each in rec.rank(candidates=pool, k=9, **who)]

    assert pairs(known) == listed(user="u01", id="known") != listed(id="known", history=[])
    assert pairs(given_history) == listed(history=["k09"], id="own")


def test_every_family_answers(rec: Loaded) -> None:
    history = [{"item_id": "k01", "rating": 5.0}, {"item_id": "k02", "rating": 2.0}]
    assert 1.0 <= rec.rate("k03", history=history) <= 5.0
    assert 0.0 <= rec.predict("k03", history=history) <= 1.0
    assert isinstance(rec.explain("k03", history=history), str)
    assert "k03" not in {each.item_id for each in rec.similar(["k03"], k=3, by="text")}
    with raises(RecipeError, Facts(kind="unsupported", column="model")):
        rec.rate("k03", history=history, model="popularity")


def test_plain_model_with_items(llama_folder: Path, tmp_path: Path) -> None:
    from tests.answer.rank_cases import items_csv

    with llmrec.load(str(llama_folder), items=items_csv(tmp_path), backend="hf", dtype="float32") as plain:
        assert plain.models == ("model",)
        assert len(plain.rank(history=["1"], k=3)) == 3
        assert plain.similar(["1"], k=2, by="text")
        with raises(DataError, Facts(kind="unsupported", column="by")):
            plain.similar(["1"])


def test_predict_file(rec: Loaded, run: Path, tmp_path: Path) -> None:
    requests = [
        {"id": "a", "user_id": "u01", "history": [{"item_id": "k01", "rating": 5}], "item": "k03"},
        {"id": "b", "history": ["k01"]},
        {"id": "c", "history": ["k01"], "item": "nowhere"},
        {"id": "d", "user_id": "u01", "item": "k03"},
    ]
    out = tmp_path / "a.jsonl"
    settings = PredictOptions(
        requests=jsonl(tmp_path / "q.jsonl", requests),
        out=out,
        model=str(run),
        family="rating",
        backend="hf",
        dtype="float32",
    )
    summary = predict_file(settings)
    assert (summary["answered"], summary["failed"]) == (2, 2)
    first, none, strange, known = lines(out)
    assert first["value"] == rec.rate("k03", history=[{"item_id": "k01", "rating": 5}], user="u01")
    assert (first["item_id"], first["error"], first["request_id"]) == ("k03", None, "a")
    assert "'item' is missing" in none["error"] and "nowhere" in strange["error"]
    # A known user without a history in the file gets the stored history.
    assert known["value"] == rec.rate("k03", user="u01") != first["value"]
    assert not list(tmp_path.glob("*.sqlite*"))


def test_predict_refuses_untuned_family(run: Path, tmp_path: Path) -> None:
    requests = jsonl(tmp_path / "q.jsonl", [{"item": "k01"}])
    settings = {"requests": requests, "out": tmp_path / "a.csv", "model": str(run), "backend": "hf"}
    with raises(DataError, Facts(kind="ambiguous", column="--family")):
        predict_file(PredictOptions(**settings))
    with raises(RecipeError, Facts(kind="unsupported", column="family")):
        predict_file(PredictOptions(**settings, family="stars"))


def test_rank_users_writes_parquet(rec: Loaded, run: Path, tmp_path: Path) -> None:
    to = tmp_path / "lists.parquet"
    result = rank_users(RankOptions(model=str(run), all_users=True, to=str(to), by="item-knn", top=3, backend="hf"))
    rows = pl.read_parquet(to).to_dicts()
    assert [row["rank"] for row in rows[:3]] == [1, 2, 3]
    assert result["failed"] == 0 and len(rows) == 3 * int(result["users"])
    items = [row["item_id"] for row in rows if row["user_id"] == "u02"]
    assert items == [each.item_id for each in rec.rank(user="u02", k=3, model="item-knn", id="u02")]
    assert not list(tmp_path.glob("*.parts"))


def test_parts_of_other_options_do_not_allow_overwriting(run: Path, tmp_path: Path) -> None:
    to, parts = tmp_path / "lists.csv", tmp_path / "lists.csv.parts"
    options = RankOptions(model=str(run), all_users=True, to=str(to), by="popularity", top=2, backend="hf")
    parts.mkdir()
    (parts / "part-000000-0123456789abcdef.parquet").write_bytes(b"of a killed call")
    rank_users(options)
    assert not parts.exists()
    to.write_text("edited by hand")
    with raises(DataError, Facts(kind="exists", column="--to")):
        rank_users(options)


def test_rank_users_replaces_table_only_with_restart(rec: Loaded, run: Path, tmp_path: Path) -> None:
    to = tmp_path / "lists.db"
    options = RankOptions(model=str(run), all_users=True, to=str(to), by="item-knn", top=2, backend="hf")

    def rows() -> list[tuple[str, int, str]]:
        with closing(sqlite3.connect(to)) as database:
            return database.execute("SELECT user_id, rank, item_id FROM recommendations ORDER BY rowid").fetchall()

    rank_users(options)
    before = rows()
    expected = rec.rank(user="u02", k=2, model="item-knn", id="u02")
    assert [item for user, _, item in before if user == "u02"] == [each.item_id for each in expected]
    with raises(DataError, Facts(kind="exists", column="--to", says="--restart")):
        rank_users(replace(options, top=1))
    assert rows() == before
    rank_users(replace(options, top=1, restart=True))
    assert rows() == [row for row in before if row[1] == 1]


def test_rank_and_predict_into_sqlite(rec: Loaded, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    to = f"sqlite:///{tmp_path}/shop.db"
    requests = [{"id": "a", "history": ["k01"], "candidates": ["k03", "k04"]}, {"id": "b", "candidates": ["nowhere"]}]
    ranking = RankOptions(requests=jsonl(tmp_path / "q.jsonl", requests), to=to, model=str(run), by="item-knn")
    summary = rank_file(ranking)
    assert (summary["ranked"], summary["failed"], summary["out"]) == (1, 1, f"{tmp_path}/shop.db")
    results = read_query(to, "SELECT user_id, rank, item_id, title, error FROM recommendations").frame.rows()
    best = [each.item_id for each in rec.rank(["k03", "k04"], history=["k01"], model="item-knn", id="a")]
    assert [(row[0], row[2]) for row in results[:2]] == [("a", item) for item in best] and results[0][3]
    assert results[2][:4] == ("b", None, None, None) and "nowhere" in results[2][4]
    questions = [{"id": "a", "user_id": "u01", "item": "k03"}, {"id": "b"}]
    about = PredictOptions(
        requests=jsonl(tmp_path / "p.jsonl", questions), to=to, model=str(run), family="rating", backend="hf"
    )
    about = replace(about, dtype="float32")
    predict_file(about)
    rows = read_query(to, "SELECT request_id, user_id, item_id, value FROM predictions").frame.rows()
    assert rows == [("a", "u01", "k03", pytest.approx(rec.rate("k03", user="u01"))), ("b", None, None, None)]
    assert not list((tmp_path / "here").iterdir())
    # Neither is overwritten without --restart.
    exists = Facts(kind="exists", column="--to", says="--restart")
    with raises(DataError, exists):
        rank_file(ranking)
    with raises(DataError, exists):
        predict_file(about)
    predict_file(replace(about, restart=True, limit=1))
    assert read_query(to, "SELECT count(*) AS n FROM predictions").frame.rows() == [(1,)]
    with raises(DataError, Facts(kind="wrong-format", column="--to")):
        rank_file(replace(ranking, to="lists.csv"))
    with raises(RecipeError, Facts(kind="contradiction", column="--to")):
        predict_file(replace(about, out=tmp_path / "x.csv"))
    with raises(RecipeError, Facts(kind="missing-key", column="--out")):
        predict_file(replace(about, to=None))
    twice = jsonl(tmp_path / "twice.jsonl", [{"id": n, "user_id": "u01", "candidates": ["k03"]} for n in "ab"])
    with raises(DataError, Facts(kind="duplicate", column="user_id")):
        rank_file(replace(ranking, requests=twice, restart=True))


def test_rank_users_refuses_bad_targets(run: Path, tmp_path: Path) -> None:
    with raises(DataError, Facts(kind="missing-key", column="--to")):
        rank_users(RankOptions(model=str(run), all_users=True))
    with raises(DataError, Facts(kind="wrong-format", column="--to")):
        rank_users(RankOptions(model=str(run), all_users=True, to=str(tmp_path / "lists.xlsx")))
    for address in ("mysql:///lists.db", "sqlite://lists.db", "sqlite:///", "https://example.org/lists.csv"):
        with raises(DataError, Facts(kind="wrong-format", column="--to", says="sqlite:///FILE")):
            rank_users(RankOptions(model=str(run), all_users=True, to=address))


def _csv(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_refresh_adds_events_and_items(rec: Loaded, run: Path, tmp_path: Path) -> None:
    events = _csv(tmp_path / "new.csv", "user_id,item_id,timestamp\nfresh,k01,9000000000\nfresh,n1,9000000001\n")
    with raises(DataError, Facts(kind="unknown-name", column="--items")):
        refresh(RefreshOptions(model=str(run), events=str(events), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out-*"))
    items = _csv(tmp_path / "items.csv", "item_id,title\nn1,A new kettle\n")
    result = refresh(RefreshOptions(model=str(run), events=str(events), items=items, out=tmp_path / "out"))
    assert (result["new interactions"], result["new items"]) == (2, 1)
    again = refresh(RefreshOptions(model=str(tmp_path / "out"), events=str(events)))
    assert again["new interactions"] == 0
    with llmrec.load(str(tmp_path / "out"), backend="hf", dtype="float32") as new:
        assert [event.item_id for event in new.known.histories.of_user("fresh")] == ["k01", "n1"]
        # Held-out interactions of the run are training data too, because this folder is not evaluated.
        assert (
            new.rank(history=["k02"], k=1, model="popularity")[0].score
            >= rec.rank(history=["k02"], k=1, model="popularity")[0].score
        )
        names = [each.item_id for each in new.rank(user="fresh", k=5)]
        assert names and not {"k01", "n1"} & set(names)
        # The weights of the model have not changed.
        lists = [each.rank(history=["k02"], candidates=["k03", "k05", "k07"]) for each in (rec, new)]
        assert lists[0] == lists[1]


def test_refresh_of_classic_run_ranks_new_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classic = tmp_path / "run"
    classic.mkdir()
    page = load_recipe(str(resource("recipes", "made") / "classic.yaml"))
    (classic / "recipe.yaml").write_text(dump_recipe(page), encoding="utf-8")
    items = _csv(tmp_path / "items.csv", "item_id,title\nn1,A new kettle\nn2,A kettle for tea\n")
    # Files in the working folder have no effect.
    monkeypatch.chdir(tmp_path)
    result = refresh(RefreshOptions(model=str(classic), items=items, out=tmp_path / "live"))
    assert result["new items"] == 2
    names = {"fusions.json", "interactions.parquet", "items.parquet", "recipe.yaml", "refreshed.json"}
    assert {path.name for path in (tmp_path / "live").iterdir()} == names
    again = refresh(RefreshOptions(model=str(tmp_path / "live"), items=_csv(items, "item_id,title\nn3,A pot\n")))
    assert (again["new items"], again["interactions"]) == (1, result["interactions"])
    with llmrec.load(str(tmp_path / "live"), models=["content", "popularity"]) as new:
        user = new.users[0]
        texts, counts = ([each.item_id for each in new.rank(user=user, k=60, model=name)] for name in new.models)
        assert {"n1", "n2", "n3"} <= set(texts)
        # The new items have no interactions.
        assert {"n1", "n2", "n3"}.isdisjoint(counts[:10])


def test_refresh_trains_on_all_events(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"""
name: more
data: {{source: made-reviews, noun: products}}
tasks: {{sequential: {{}}, direct: {{templates: [shortlist]}}, ctr: {{calibrate: valid}}}}
model: {{name: {llama_folder}, dtype: float32, device: cpu}}
eval: {{arms: [tuned], users: 10, candidates: {{count: 5}}}}
train: {{steps: 1, batch_tokens: 256, valid_rows: 4, judge: {{users: 4}}}}
"""
    page = load_recipe(str(_csv(tmp_path / "page.yaml", text)))
    trained = tmp_path / "run"
    pipeline.train(page, trained, quiet=True)
    before = load_tables(page)[0]
    user, *_ = before.users()
    new = sorted(set(before.dataset.items) - {event.item_id for event in before.history(user, "test")})[:2]
    events = _csv(
        tmp_path / "new.csv", f"user_id,item_id,timestamp\n{user},{new[0]},9000000000\n{user},{new[1]},9000000001\n"
    )
    seen: list[Study] = []

    def stage(study: Study, *rest: Any, **more: Any) -> dict[str, Any]:
        seen.append(study)
        return train_stage(study, *rest, **more)

    monkeypatch.setattr("llmrec.pipeline.run.train_stage", stage)
    result = refresh(RefreshOptions(model=str(trained), events=str(events), out=tmp_path / "live", train=1))
    (study,) = seen
    learned = study.data.train.select("user_id", "item_id").cast(pl.String)
    known = before.dataset.interactions.select("user_id", "item_id").cast(pl.String)
    assert learned.height == known.height + 2 == result["interactions"]
    assert {(user, item) for item in new} | before.held_out <= set(learned.iter_rows())
    assert not study.data.valid.height and not study.data.test.height
    from safetensors.torch import load_file

    weights = [load_file(folder / "model.safetensors") for folder in (trained / "merged", tmp_path / "live")]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_refresh_keeps_validation_interactions_of_networks(tmp_path: Path) -> None:
    page = load_recipe(
        str(resource("recipes", "made") / "classic.yaml"),
        [
            "tasks.sequential.baselines=[random, popularity, item-knn, markov-1, {name: gru4rec, epochs: 1, dim: 4}]",
            "eval.users=10",
            "eval.bootstrap=20",
        ],
    )
    run = llmrec.run(page, out=tmp_path / "run").folder
    events = _csv(tmp_path / "new.csv", "user_id,item_id\nfresh,i001\n")
    items = _csv(tmp_path / "items.csv", "item_id,title\ni001,A new kettle\n")
    refresh(RefreshOptions(model=str(run), events=str(events), items=items, out=tmp_path / "live"))
    rows = pl.read_parquet(tmp_path / "live" / "interactions.parquet")
    data = build_study(load_stored_recipe(run)).data
    choosing = split_validation_users(data, load_stored_recipe(run).eval.fusion.reserved)[0].valid
    kept = rows.filter(pl.col("part") == "valid").select("user_id", "item_id")
    assert set(kept.iter_rows()) == set(choosing.select("user_id", "item_id").iter_rows()) and kept.height
    # The full log plus an earlier event of a held-out pair; the event is in neither part.
    user, item = next(iter(kept.iter_rows()))
    log = data.dataset.interactions.select(pl.col("user_id", "item_id").cast(pl.String), "timestamp").write_csv()
    events = _csv(tmp_path / "log.csv", f"{log}{user},{item},1\n")
    result = refresh(RefreshOptions(model=str(tmp_path / "live"), events=str(events)))
    assert result["new interactions"] == 0


def test_refresh_keeps_validation_interactions_of_single_network(tmp_path: Path) -> None:
    rows = pl.DataFrame([{"user_id": f"u{n % 30}", "item_id": f"i{n * n % 13}", "timestamp": n} for n in range(240)])
    saved = llmrec.fit(rows, model=SASRec(quiet=True, dim=4, epochs=1)).save(tmp_path / "saved")
    events = _csv(tmp_path / "new.csv", "user_id,item_id,timestamp\nu1,i3,999\n")
    refresh(RefreshOptions(model=str(saved), events=str(events), out=tmp_path / "live"))
    before, after = (
        pl.read_parquet(folder / "interactions.parquet").filter(pl.col("part") == "valid").select("user_id", "item_id")
        for folder in (saved, tmp_path / "live")
    )
    assert before.height and set(after.iter_rows()) == set(before.iter_rows())


@pytest.mark.parametrize("unit", [1, 10**9])
def test_refresh_converts_time_units(unit: int, tmp_path: Path) -> None:
    classic = tmp_path / "run"
    classic.mkdir()
    begin = 1_700_000_000
    log = [f"u{user},i{(user + step) % 9},{(begin + 100 * step) * unit}" for user in range(12) for step in range(4)]
    _csv(tmp_path / "log.csv", "\n".join(["user_id,item_id,timestamp", *log]))
    page = load_recipe(
        str(resource("recipes", "made") / "classic.yaml"), [f"data={{source: table, path: {tmp_path / 'log.csv'}}}"]
    )
    (classic / "recipe.yaml").write_text(dump_recipe(page), encoding="utf-8")
    for number, text in enumerate(
        (
            "user_id,item_id\nu0,i7\nu0,i8\n",
            "user_id,item_id,timestamp\nu0,i7,2024-01-01\nu0,i8,2024-01-02\n",
            f"user_id,item_id,timestamp\nu0,i7,{(begin + 10**6) * 1000}\nu0,i8,{(begin + 10**6 + 1) * 1000}\n",
        )
    ):
        events, out = _csv(tmp_path / "new.csv", text), tmp_path / f"live{number}"
        assert refresh(RefreshOptions(model=str(classic), events=str(events), out=out))["new interactions"] == 2
        assert refresh(RefreshOptions(model=str(out), events=str(events)))["new interactions"] == 0
        with llmrec.load(str(out), models=["popularity"]) as new:
            history = [event.item_id for event in new.known.histories.of_user("u0")]
            assert history == ["i0", "i1", "i2", "i3", "i7", "i8"]
            assert new.known.histories.per_second == unit


def test_refresh_does_not_overwrite_other_files(run: Path, tmp_path: Path) -> None:
    events = _csv(tmp_path / "new.csv", "user_id,item_id\nu01,k05\n")
    bad = _csv(tmp_path / "bad.csv", "user,item_id\nu01,k05\n")
    with raises(DataError, Facts(kind="missing-column", column="user_id", file="bad.csv")):
        refresh(RefreshOptions(model=str(run), events=str(bad), out=tmp_path / "out"))
    with raises(DataError, Facts(kind="missing-key", column="--out")):
        refresh(RefreshOptions(model=str(run), events=str(events)))
    with raises(DataError, Facts(kind="missing-key", column="--events")):
        refresh(RefreshOptions(model=str(run), out=tmp_path / "out"))
    folder = tmp_path / "mine"
    folder.mkdir()
    _csv(folder / "notes.txt", "keep")
    with raises(DataError, Facts(kind="exists", column="--out")):
        refresh(RefreshOptions(model=str(run), events=str(events), out=folder))
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_histories_have_the_order_of_the_split(rec: Loaded) -> None:
    data = rec._models.data
    assert data is not None
    for user in data.users()[:20]:
        learned = [event.item_id for event in data.train_events(user)]
        assert [event.item_id for event in rec.known.histories.of_user(user)][: len(learned)] == learned


def test_hash_of_histories_covers_every_value() -> None:
    base = Histories(
        pl.Series(["u1", "u2"]), np.array([0, 1, 2]), pl.Series(["i1", "i2"]), np.array([1.0, np.nan]), np.ones(2)
    )
    changed = (
        replace(base, users=pl.Series(["u1", "u3"])),
        replace(base, starts=np.array([0, 2, 2])),
        replace(base, items=pl.Series(["i1i", "2"])),
        replace(base, ratings=np.array([1.0, 2.0])),
        replace(base, times=np.array([1.0, 2.0])),
    )
    assert len({each.digest for each in (base, replace(base), Histories.none(), *changed)}) == 2 + len(changed)


def test_refresh_adds_repeated_event_once(rec: Loaded, run: Path, tmp_path: Path) -> None:
    before = len(rec.known.histories.items)
    # The new event is older than all others.
    events = _csv(tmp_path / "new.csv", "user_id,item_id,timestamp\nu01,k40,1\nu01,k40,1\n")
    result = refresh(RefreshOptions(model=str(run), events=str(events), out=tmp_path / "out"))
    assert result["new interactions"] == 1 and result["interactions"] == before + 1
    rows = pl.read_parquet(tmp_path / "out" / "interactions.parquet")
    times = rows["timestamp"].to_list()
    assert times == sorted(times) and rows.filter(pl.col("user_id") == "u01")["item_id"][0] == "k40"


@pytest.mark.parametrize("model", ["tuned", "item-knn"])
def test_items_seen_by_title_are_excluded(rec: Loaded, model: str) -> None:
    titles = [rec._models.items[item].title for item in ("k01", "k02")]
    ranking = rec.rank(history=[{"title": title} for title in titles], k=40, model=model)
    assert not {each.item_id for each in ranking} & {"k01", "k02"}


def test_models_share_the_hash_of_the_catalogue(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr("llmrec.answer.known.digest_items", lambda items: sizes.append(len(items)) or str(len(items)))
    options = RecommenderOptions(model=str(run), backend="hf")
    models = open_models(options, ["tuned", "popularity", "item-knn"])
    before, size = models.cards(), len(models.items)
    after = models.change_items({"new": Item(item_id="new", title="New")})
    models.close()
    assert sizes == [size, size + 1]
    assert all(old.signature != new.signature for old, new in zip(before, after, strict=True))


def test_request_cannot_change_fields_of_rules(rec: Loaded) -> None:
    item = next(item for item in rec._models.items.values() if item.fields)
    name, value = next(iter(item.fields.items()))
    with raises(DataError, Facts(kind="empty", column="rules")):
        rec.rank(
            history=["k01"],
            candidates=[{"item_id": item.item_id, name: "something else"}],
            where={"without": {name: [value]}},
        )


def test_too_many_candidates(rec: Loaded) -> None:
    many = [{"title": f"thing {n}"} for n in range(300)]
    with raises(DataError, Facts(kind="failed", says="200")):
        rec.rank(history=["k01"], candidates=many)
    assert len(rec.rank(history=["k01"], candidates=many, model="popularity", k=5)) == 5


def test_search_width_follows_depth(rec: Loaded) -> None:
    model = rec._models.get("tuned")
    assert isinstance(model, LanguageModel)
    widths = {}
    for depth in (1, 20, 21, 160, 161, 1000):
        searching = model._searching(depth)
        assert searching is not None
        widths[depth] = searching.options.beams
    assert widths == {1: 20, 20: 20, 21: 40, 160: 160, 161: 160, 1000: 160}


def test_does_not_overwrite_other_files(run: Path, tmp_path: Path) -> None:
    existing = _csv(tmp_path / "mine.csv", "keep")
    with raises(DataError, Facts(kind="exists", column="--to")):
        rank_users(RankOptions(model=str(run), all_users=True, to=str(existing), by="popularity", backend="hf"))
    requests = jsonl(tmp_path / "q.jsonl", [{"item": "k01"}])
    for out in (requests, jsonl(tmp_path / "other.jsonl", [{}])):
        with raises(DataError, Facts(kind="exists", column="--out")):
            predict_file(PredictOptions(requests=requests, out=out, model=str(run), family="rating", backend="hf"))
    theirs = tmp_path / "theirs.db"
    with closing(sqlite3.connect(theirs)) as database, database:
        database.execute("CREATE TABLE recommendations (what TEXT)")
    (tmp_path / "theirs.db.summary.json").write_text("{}")
    with raises(DataError, Facts(kind="exists", column="--to")):
        rank_users(RankOptions(model=str(run), all_users=True, to=str(theirs), by="popularity", backend="hf"))
    with raises(DataError, Facts(kind="contradiction", column="--retrieve")):
        rank_users(RankOptions(model=str(run), all_users=True, to=str(tmp_path / "x.csv"), retrieve="markov"))
