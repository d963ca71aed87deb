"""A model in three lines of Python, and the commands that ask it: many users, questions about one item, new events."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import llmrec
from llmrec.answer.known import Histories, profiles_of, with_history
from llmrec.answer.language_model import LanguageModel
from llmrec.answer.listing import is_cold
from llmrec.answer.loaded import Loaded
from llmrec.answer.predict.options import PredictOptions
from llmrec.answer.predict.run import predict_file
from llmrec.answer.rank.options import RankOptions
from llmrec.answer.rank.run import rank_file
from llmrec.answer.rank.users import rank_users
from llmrec.data.dataset import Dataset, conform
from llmrec.data.read.databases import read_query
from llmrec.data.requests import read_request
from llmrec.data.split import halves
from llmrec.errors import DataError, LlmrecError, RecipeError
from llmrec.pipeline import bundle
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.study import Study, build_study, load_tables
from llmrec.pipeline.training import train_stage
from llmrec.recipe.load import dump, load_recipe, load_stored
from llmrec.resources import resource
from llmrec.types import Item
from tests.answer.rank_cases import jsonl, lines, options, toy_run
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
    with llmrec.load(str(run), backend="hf", dtype="float32") as found:
        yield found


# --------------------------------------------------------------------------- rank


def test_a_list_holds_no_seen_item_and_is_best_first(rec: Loaded) -> None:
    for model in rec.models:
        found = rec.rank(history=["k01", "k02"], k=4, model=model)
        assert len(found) == 4 and not {each.item_id for each in found} & {"k01", "k02"}, model
        scores = [each.score for each in found]
        assert scores == sorted(scores, reverse=True)
    again = rec.rank(history=["k01", "k02"], k=40, model="popularity", exclude_seen=False)
    assert {"k01", "k02"} <= {each.item_id for each in again}


def test_known_users_bring_their_history(rec: Loaded) -> None:
    events = rec.known.histories.of_user("u01")
    own = [event.item_id for event in events]
    told = [{"item_id": event.item_id, "rating": event.rating, "timestamp": event.timestamp} for event in events]
    assert own and rec.rank(user="u01", k=5) == rec.rank(user="u01", history=told, k=5)
    assert not {each.item_id for each in rec.rank(user="u01", k=30)} & set(own)


def test_a_saved_language_model_answers_the_same(rec: Loaded, tmp_path: Path) -> None:
    folder = rec.save(tmp_path / "saved")
    names = ("tuned", "popularity")
    with llmrec.load(folder, models=names, backend="hf", dtype="float32") as again:
        assert again.users == rec.users and again.items == rec.items
        for name in names:
            assert again.rank(user="u01", k=4, model=name) == rec.rank(user="u01", k=4, model=name)


def test_nobody_gets_the_most_popular_items(rec: Loaded) -> None:
    popular = rec.rank(history=["k01"], k=3, model="popularity", exclude_seen=False)
    assert rec.rank(user="nobody", k=3) == popular


def test_rules_hold_and_leave_enough(rec: Loaded) -> None:
    free = rec.rank(history=["k01"], k=5)
    barred = [free[0].item_id, free[2].item_id]
    kept = rec.rank(history=["k01"], k=5, where={"block": barred})
    assert len(kept) == 5 and not set(barred) & {each.item_id for each in kept}
    with raises(DataError, Facts(kind="unknown-name", column="only.colour")):
        rec.rank(history=["k01"], where={"only": {"colour": ["red"]}})
    with raises(DataError, Facts(kind="empty", column="rules")):
        rec.rank(history=["k01"], candidates=["k05"], where={"block": ["k05"]})


@pytest.mark.parametrize("make", [pl.DataFrame, pd.DataFrame, pa.table, lambda rows: pl.DataFrame(rows).to_dicts()])
def test_frames_in_are_frames_of_the_same_library_out(rec: Loaded, make: Any) -> None:
    rows = {"user_id": ["u01", "nobody", None], "history": [None, None, ["k03"]], "id": ["a", "b", "c"]}
    frame = make(rows)
    found = rec.recommend(frame, k=2, model="item-knn")
    assert type(found) is type(frame)
    table = pl.DataFrame(found) if not isinstance(found, pl.DataFrame) else found
    assert table["id"].to_list() == ["a", "a", "b", "b", "c", "c"] and table["rank"].to_list() == [1, 2] * 3
    alone = rec.rank(history=["k03"], k=2, model="item-knn")
    assert table.filter(pl.col("id") == "c")["item_id"].to_list() == [each.item_id for each in alone]


def test_ids_of_a_frame_are_those_that_it_has(rec: Loaded) -> None:
    rows = {"id": [0, 1, 2], "user_id": ["u01", "u02", None], "history": [None, None, ["k03"]]}
    found = rec.recommend(pd.DataFrame(rows), k=1, model="popularity")
    assert list(found["id"]) == ["0", "1", "2"]


def test_a_user_is_known_by_whole_numbers_that_became_floats() -> None:
    """A column of whole numbers with a gap is one of floats in pandas."""
    rows = pl.DataFrame(
        {"user_id": ["1"], "item_id": ["x"], "rating": [4.0], "timestamp": [1.0], "text": [None]},
        schema_overrides={"text": pl.String},
    )
    items = {"x": Item(item_id="x", title="X")}
    past = Histories.of(Dataset(name="toy", noun="items", interactions=conform(rows), items=items), 0)
    for user in (1.0, 1, "1"):
        told, known = with_history({"user_id": user}, past.of_user, items, lambda user: f"it is {user}")
        assert told["history"] and told["profile"] == "it is 1" and known


def test_prompts_of_a_known_user_show_the_fields_that_the_evaluation_shows(llama_folder: Path, tmp_path: Path) -> None:
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
    (run / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    case = study.cases("direct")[0].request
    user = str(case.user_id)
    said = profiles_of(str(run))
    assert said is not None and said(user) == {"age": str(30 + int(user[1:])), "gender": "F"} and said("nobody") == {}
    shown = {"id": "1", "user_id": user, "history": [], "candidates": list(case.candidates or ())}
    request = read_request({**shown, "profile": said(user)}, 1, study.data.dataset.items)
    view = study.tasks["direct"]._view
    assert view.user("somebody", request.context)["profile"] == view.user(user)["profile"] != []
    assert not is_cold(request) and is_cold(read_request(shown, 1, study.data.dataset.items))
    named = read_request({**shown, "profile": {"name": "Ann", "age": 30.0}}, 1, study.data.dataset.items)
    assert view.user("u1", named.context)["user_name"] == "Ann"
    with raises(DataError, Facts("bad-value", column="profile")):
        read_request({**shown, "profile": {"age": [1]}}, 1, study.data.dataset.items)


def test_a_bad_row_of_a_frame_is_an_error_in_its_place(rec: Loaded) -> None:
    found = rec.recommend([{"history": ["k01"]}, {"candidates": ["nowhere"]}, {"history": ["k02"]}], k=1)
    assert [row["error"] is None for row in found] == [True, False, True] and "nowhere" in found[1]["error"]
    assert [row["id"] for row in found] == ["1", "2", "3"]


def test_a_frame_says_whom_it_asks_about_or_is_refused(rec: Loaded) -> None:
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


@pytest.mark.parametrize("k", ["3", 0, -5, 2.5])
def test_a_list_has_a_whole_number_of_items(rec: Loaded, k: Any) -> None:
    for ask in (rec.rank, rec.recommend, rec.similar):
        with raises(DataError, Facts("bad-value", column="k")):
            ask([], k=k)


def test_what_cannot_be_asked_is_refused(rec: Loaded) -> None:
    with raises(RecipeError, Facts(kind="unknown-name", column="model")):
        rec.rank(history=["k01"], model="markow")
    with raises(RecipeError, Facts(kind="unsupported", column="strategy")):
        rec.rank(history=["k01"], model="popularity", strategy="list")
    with raises(DataError, Facts(kind="unknown-name", column="item_id")):
        rec.similar(["nowhere"])
    with raises(LlmrecError, Facts(kind="unknown-key")):
        llmrec.load("runs/x", colour="red")


def test_a_file_is_ranked_by_the_stored_history_of_a_known_user(rec: Loaded, run: Path, tmp_path: Path) -> None:
    pool = ["k03", "k05", "k07", "k11"]
    asked = [
        {"id": "known", "user_id": "u01", "candidates": pool},
        {"id": "own", "user_id": "u01", "history": ["k09"], "candidates": pool},
        {"id": "strange", "user_id": "nobody", "candidates": pool},
        {"id": "none", "user_id": "u01", "history": [], "candidates": pool},
    ]
    rank_file(options(run, jsonl(tmp_path / "in.jsonl", asked), tmp_path / "out.jsonl", batch=1))
    known, own, strange, none = lines(tmp_path / "out.jsonl")
    events = len(rec.known.histories.of_user("u01"))
    assert known["notes"] == [f"history: {events} interactions of this user in the data"]
    assert strange["notes"] == ["unknown user 'nobody'", "no history"]
    assert own["notes"] == [] and none["notes"] == ["no history"]

    def pairs(line: dict[str, Any]) -> list[tuple[str, float]]:
        return list(zip(line["items"], line["scores"], strict=True))

    def listed(**who: Any) -> list[tuple[str, float]]:
        return [(each.item_id, each.score) for each in rec.rank(candidates=pool, k=9, **who)]

    assert pairs(known) == listed(user="u01", id="known") != listed(id="known", history=[])
    assert pairs(own) == listed(history=["k09"], id="own")


# --------------------------------------------------------------------------- one item


def test_every_family_answers(rec: Loaded) -> None:
    history = [{"item_id": "k01", "rating": 5.0}, {"item_id": "k02", "rating": 2.0}]
    assert 1.0 <= rec.rate("k03", history=history) <= 5.0
    assert 0.0 <= rec.predict("k03", history=history) <= 1.0
    assert isinstance(rec.explain("k03", history=history), str)
    assert "k03" not in {each.item_id for each in rec.similar(["k03"], k=3, by="text")}
    with raises(RecipeError, Facts(kind="unsupported", column="model")):
        rec.rate("k03", history=history, model="popularity")


def test_a_plain_model_with_a_table_of_items(llama_folder: Path, tmp_path: Path) -> None:
    from tests.answer.rank_cases import items_csv

    with llmrec.load(str(llama_folder), items=items_csv(tmp_path), backend="hf", dtype="float32") as plain:
        assert plain.models == ("model",)
        assert len(plain.rank(history=["1"], k=3)) == 3
        assert plain.similar(["1"], k=2, by="text")
        with raises(DataError, Facts(kind="unsupported", column="by")):
            plain.similar(["1"])


def test_a_file_of_questions(rec: Loaded, run: Path, tmp_path: Path) -> None:
    asked = [
        {"id": "a", "user_id": "u01", "history": [{"item_id": "k01", "rating": 5}], "item": "k03"},
        {"id": "b", "history": ["k01"]},
        {"id": "c", "history": ["k01"], "item": "nowhere"},
    ]
    out = tmp_path / "a.jsonl"
    given = PredictOptions(
        requests=jsonl(tmp_path / "q.jsonl", asked),
        out=out,
        model=str(run),
        family="rating",
        backend="hf",
        dtype="float32",
    )
    told = predict_file(given)
    assert (told["answered"], told["failed"]) == (1, 2)
    first, none, strange = lines(out)
    assert first["value"] == rec.rate("k03", history=[{"item_id": "k01", "rating": 5}], user="u01")
    assert (first["item_id"], first["error"], first["request_id"]) == ("k03", None, "a")
    assert "'item' is missing" in none["error"] and "nowhere" in strange["error"]
    assert not list(tmp_path.glob("*.sqlite*"))


def test_a_family_must_be_one_that_was_tuned(run: Path, tmp_path: Path) -> None:
    asked = jsonl(tmp_path / "q.jsonl", [{"item": "k01"}])
    given = {"requests": asked, "out": tmp_path / "a.csv", "model": str(run), "backend": "hf"}
    with raises(DataError, Facts(kind="ambiguous", column="--family")):
        predict_file(PredictOptions(**given))
    with raises(RecipeError, Facts(kind="unsupported", column="family")):
        predict_file(PredictOptions(**given, family="stars"))


# --------------------------------------------------------------------------- every user


@pytest.mark.parametrize("name", ["lists.parquet", "lists.csv", "lists.jsonl", "lists.db"])
def test_lists_of_every_user(rec: Loaded, run: Path, tmp_path: Path, name: str) -> None:
    given = RankOptions(model=str(run), all_users=True, to=str(tmp_path / name), by="item-knn", top=3, backend="hf")
    told = rank_users(given)
    assert told["failed"] == 0
    rows = _rows(tmp_path / name)
    assert [row["rank"] for row in rows[:3]] == [1, 2, 3] and len(rows) == 3 * int(told["users"])
    own = [row["item_id"] for row in rows if row["user_id"] == "u02"]
    assert own == [each.item_id for each in rec.rank(user="u02", k=3, model="item-knn", id="u02")]
    assert not list(tmp_path.glob("*.parts"))


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".db":
        with closing(sqlite3.connect(path)) as database:
            found = database.execute("SELECT user_id, rank, item_id FROM recommendations ORDER BY rowid").fetchall()
        return [dict(zip(("user_id", "rank", "item_id"), row, strict=True)) for row in found]
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return (pl.read_parquet(path) if path.suffix == ".parquet" else pl.read_csv(path)).to_dicts()


def test_a_table_of_lists_is_replaced_only_if_asked(run: Path, tmp_path: Path) -> None:
    given = RankOptions(
        model=str(run), all_users=True, to=str(tmp_path / "lists.db"), by="item-knn", top=2, backend="hf"
    )
    rank_users(given)
    before = _rows(tmp_path / "lists.db")
    with raises(DataError, Facts(kind="exists", column="--to", says="--restart")):
        rank_users(replace(given, top=1))
    assert _rows(tmp_path / "lists.db") == before
    rank_users(replace(given, top=1, restart=True))
    assert _rows(tmp_path / "lists.db") == [row for row in before if row["rank"] == 1]


def test_requests_and_questions_into_tables(
    rec: Loaded, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    to = f"sqlite:///{tmp_path}/shop.db"
    asked = [{"id": "a", "history": ["k01"], "candidates": ["k03", "k04"]}, {"id": "b", "candidates": ["nowhere"]}]
    wanted = RankOptions(requests=jsonl(tmp_path / "q.jsonl", asked), to=to, model=str(run), by="item-knn")
    told = rank_file(wanted)
    assert (told["ranked"], told["failed"], told["out"]) == (1, 1, f"{tmp_path}/shop.db")
    found = read_query(to, "SELECT user_id, rank, item_id, title, error FROM recommendations").frame.rows()
    best = [each.item_id for each in rec.rank(["k03", "k04"], history=["k01"], model="item-knn", id="a")]
    assert [(row[0], row[2]) for row in found[:2]] == [("a", item) for item in best] and found[0][3]
    assert found[2][:4] == ("b", None, None, None) and "nowhere" in found[2][4]
    questions = [{"id": "a", "user_id": "u01", "item": "k03"}, {"id": "b"}]
    about = PredictOptions(
        requests=jsonl(tmp_path / "p.jsonl", questions), to=to, model=str(run), family="rating", backend="hf"
    )
    about = replace(about, dtype="float32")
    predict_file(about)
    rows = read_query(to, "SELECT request_id, user_id, item_id, value FROM predictions").frame.rows()
    assert rows == [("a", "u01", "k03", pytest.approx(rec.rate("k03", user="u01"))), ("b", None, None, None)]
    assert not list((tmp_path / "here").iterdir())
    # Neither is overwritten unless asked, and one output is enough.
    exists = Facts(kind="exists", column="--to", says="--restart")
    with raises(DataError, exists):
        rank_file(wanted)
    with raises(DataError, exists):
        predict_file(about)
    predict_file(replace(about, restart=True, limit=1))
    assert read_query(to, "SELECT count(*) AS n FROM predictions").frame.rows() == [(1,)]
    for wrong, kind in (("lists.csv", "wrong-format"), ("mysql://host/shop", "wrong-format")):
        with raises(DataError, Facts(kind=kind, column="--to")):
            rank_file(replace(wanted, to=wrong))
    with raises(RecipeError, Facts(kind="contradiction", column="--to")):
        predict_file(replace(about, out=tmp_path / "x.csv"))
    with raises(RecipeError, Facts(kind="missing-key", column="--out")):
        predict_file(replace(about, to=None))
    twice = jsonl(tmp_path / "twice.jsonl", [{"id": n, "user_id": "u01", "candidates": ["k03"]} for n in "ab"])
    with raises(DataError, Facts(kind="duplicate", column="user_id")):
        rank_file(replace(wanted, requests=twice, restart=True))


def test_where_lists_of_every_user_can_go(run: Path, tmp_path: Path) -> None:
    with raises(DataError, Facts(kind="missing-key", column="--to")):
        rank_users(RankOptions(model=str(run), all_users=True))
    with raises(DataError, Facts(kind="wrong-format", column="--to")):
        rank_users(RankOptions(model=str(run), all_users=True, to=str(tmp_path / "lists.xlsx")))
    for address in ("mysql:///lists.db", "sqlite://lists.db", "sqlite:///", "https://example.org/lists.csv"):
        with raises(DataError, Facts(kind="wrong-format", column="--to", says="sqlite:///FILE")):
            rank_users(RankOptions(model=str(run), all_users=True, to=address))


# --------------------------------------------------------------------------- refresh


def _csv(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_new_events_and_items_are_known_after_a_refresh(rec: Loaded, run: Path, tmp_path: Path) -> None:
    events = _csv(tmp_path / "new.csv", "user_id,item_id,timestamp\nfresh,k01,9000000000\nfresh,n1,9000000001\n")
    with raises(DataError, Facts(kind="unknown-name", column="--items")):
        refresh(RefreshOptions(model=str(run), events=str(events), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out-*"))
    items = _csv(tmp_path / "items.csv", "item_id,title\nn1,A new kettle\n")
    told = refresh(RefreshOptions(model=str(run), events=str(events), items=items, out=tmp_path / "out"))
    assert (told["new interactions"], told["new items"]) == (2, 1)
    again = refresh(RefreshOptions(model=str(tmp_path / "out"), events=str(events)))
    assert again["new interactions"] == 0
    with llmrec.load(str(tmp_path / "out"), backend="hf", dtype="float32") as new:
        assert [event.item_id for event in new.known.histories.of_user("fresh")] == ["k01", "n1"]
        # Held-out interactions of the run are learned from as well: nothing is measured with this folder.
        assert (
            new.rank(history=["k02"], k=1, model="popularity")[0].score
            >= rec.rank(history=["k02"], k=1, model="popularity")[0].score
        )
        told_of = [each.item_id for each in new.rank(user="fresh", k=5)]
        assert told_of and not {"k01", "n1"} & set(told_of)
        # The model's own weights are as they were.
        lists = [each.rank(history=["k02"], candidates=["k03", "k05", "k07"]) for each in (rec, new)]
        assert lists[0] == lists[1]


def test_new_items_need_no_events(run: Path, tmp_path: Path) -> None:
    items = _csv(tmp_path / "items.csv", "item_id,title\nn1,A new kettle\n")
    with raises(DataError, Facts(kind="missing-key", column="--events")):
        refresh(RefreshOptions(model=str(run), out=tmp_path / "out"))
    told = refresh(RefreshOptions(model=str(run), items=items, out=tmp_path / "out"))
    assert (told["new interactions"], told["new items"]) == (0, 1)
    assert "n1" in pl.read_parquet(tmp_path / "out" / "items.parquet")["item_id"].to_list()


def test_a_run_without_a_language_model_is_refreshed_and_ranks_the_new_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "run"
    made.mkdir()
    page = load_recipe(str(resource("recipes", "made") / "classic.yaml"))
    (made / "recipe.yaml").write_text(dump(page), encoding="utf-8")
    items = _csv(tmp_path / "items.csv", "item_id,title\nn1,A new kettle\nn2,A kettle for tea\n")
    # What lies where the command is called is none of its business.
    monkeypatch.chdir(tmp_path)
    told = refresh(RefreshOptions(model=str(made), items=items, out=tmp_path / "live"))
    assert told["new items"] == 2
    names = {"fusions.json", "interactions.parquet", "items.parquet", "recipe.yaml", "refreshed.json"}
    assert {path.name for path in (tmp_path / "live").iterdir()} == names
    again = refresh(RefreshOptions(model=str(tmp_path / "live"), items=_csv(items, "item_id,title\nn3,A pot\n")))
    assert (again["new items"], again["interactions"]) == (1, told["interactions"])
    with llmrec.load(str(tmp_path / "live"), models=["content", "popularity"]) as new:
        user = new.users[0]
        texts, counts = ([each.item_id for each in new.rank(user=user, k=60, model=name)] for name in new.models)
        assert {"n1", "n2", "n3"} <= set(texts)
        # Nobody has chosen them, so events say nothing for them.
        assert {"n1", "n2", "n3"}.isdisjoint(counts[:10])


def test_training_goes_on_with_all_events_and_holds_none_out(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"""
name: more
data: {{source: made-reviews, noun: products}}
tasks: {{sequential: {{}}, direct: {{templates: [shortlist]}}, ctr: {{calibrate: valid}}}}
model: {{name: {llama_folder}, dtype: float32, device: cpu}}
eval: {{arms: [tuned], users: 10, candidates: {{count: 5}}}}
train: {{steps: 1, batch_tokens: 256, valid_rows: 4, judge: {{users: 4}}}}
"""
    page = load_recipe(str(_csv(tmp_path / "page.yaml", text)))
    made = tmp_path / "run"
    pipeline.train(page, made, quiet=True)
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
    told = refresh(RefreshOptions(model=str(made), events=str(events), out=tmp_path / "live", train=1))
    (study,) = seen
    learned = study.data.train.select("user_id", "item_id").cast(pl.String)
    known = before.dataset.interactions.select("user_id", "item_id").cast(pl.String)
    assert learned.height == known.height + 2 == told["interactions"]
    assert {(user, item) for item in new} | before.held_out <= set(learned.iter_rows())
    assert not study.data.valid.height and not study.data.test.height
    from safetensors.torch import load_file

    weights = [load_file(folder / "model.safetensors") for folder in (made / "merged", tmp_path / "live")]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_networks_that_stop_early_keep_their_validation_interactions(tmp_path: Path) -> None:
    page = load_recipe(
        str(resource("recipes", "made") / "classic.yaml"),
        ["tasks.sequential.baselines=[random, popularity, item-knn, markov-1, {name: gru4rec, epochs: 1, dim: 4}]"],
    )
    run = llmrec.run(page, out=tmp_path / "run").folder
    events = _csv(tmp_path / "new.csv", "user_id,item_id\nfresh,i001\n")
    items = _csv(tmp_path / "items.csv", "item_id,title\ni001,A new kettle\n")
    refresh(RefreshOptions(model=str(run), events=str(events), items=items, out=tmp_path / "live"))
    rows = pl.read_parquet(tmp_path / "live" / "interactions.parquet")
    data = build_study(load_stored(run)).data
    choosing = halves(data, load_stored(run).eval.fusion.reserved)[0].valid
    kept = rows.filter(pl.col("part") == "valid").select("user_id", "item_id")
    assert set(kept.iter_rows()) == set(choosing.select("user_id", "item_id").iter_rows()) and kept.height
    # The whole log again, with an earlier event of a held-out pair: it is in neither part.
    user, item = next(iter(kept.iter_rows()))
    log = data.dataset.interactions.select(pl.col("user_id", "item_id").cast(pl.String), "timestamp").write_csv()
    events = _csv(tmp_path / "log.csv", f"{log}{user},{item},1\n")
    told = refresh(RefreshOptions(model=str(tmp_path / "live"), events=str(events)))
    assert told["new interactions"] == 0


@pytest.mark.parametrize("unit", [1, 1000, 1_000_000, 10**9])
def test_new_events_come_after_the_known_ones_in_whatever_unit(unit: int, tmp_path: Path) -> None:
    made = tmp_path / "run"
    made.mkdir()
    begin = 1_700_000_000
    log = [f"u{user},i{(user + step) % 9},{(begin + 100 * step) * unit}" for user in range(12) for step in range(4)]
    _csv(tmp_path / "log.csv", "\n".join(["user_id,item_id,timestamp", *log]))
    page = load_recipe(
        str(resource("recipes", "made") / "classic.yaml"), [f"data={{source: table, path: {tmp_path / 'log.csv'}}}"]
    )
    (made / "recipe.yaml").write_text(dump(page), encoding="utf-8")
    for number, text in enumerate(
        (
            "user_id,item_id\nu0,i7\nu0,i8\n",
            "user_id,item_id,timestamp\nu0,i7,2024-01-01\nu0,i8,2024-01-02\n",
            f"user_id,item_id,timestamp\nu0,i7,{(begin + 10**6) * 1000}\nu0,i8,{(begin + 10**6 + 1) * 1000}\n",
        )
    ):
        events, out = _csv(tmp_path / "new.csv", text), tmp_path / f"live{number}"
        assert refresh(RefreshOptions(model=str(made), events=str(events), out=out))["new interactions"] == 2
        assert refresh(RefreshOptions(model=str(out), events=str(events)))["new interactions"] == 0
        with llmrec.load(str(out), models=["popularity"]) as new:
            assert [event.item_id for event in new.known.histories.of_user("u0")] == [
                "i0",
                "i1",
                "i2",
                "i3",
                "i7",
                "i8",
            ]
            assert new.known.histories.per_second == unit


def test_a_refresh_does_not_write_over_other_files(run: Path, tmp_path: Path) -> None:
    events = _csv(tmp_path / "new.csv", "user_id,item_id\nu01,k05\n")
    bad = _csv(tmp_path / "bad.csv", "user,item_id\nu01,k05\n")
    with raises(DataError, Facts(kind="missing-column", column="user_id", file="bad.csv")):
        refresh(RefreshOptions(model=str(run), events=str(bad), out=tmp_path / "out"))
    with raises(DataError, Facts(kind="missing-key", column="--out")):
        refresh(RefreshOptions(model=str(run), events=str(events)))
    mine = tmp_path / "mine"
    mine.mkdir()
    _csv(mine / "notes.txt", "keep")
    with raises(DataError, Facts(kind="exists", column="--out")):
        refresh(RefreshOptions(model=str(run), events=str(events), out=mine))
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]


# --------------------------------------------------------------------------- what a hostile reading found


def test_known_users_have_the_order_of_the_split(rec: Loaded) -> None:
    data = rec._models.data
    assert data is not None
    for user in data.users()[:20]:
        learned = [event.item_id for event in data.train_events(user)]
        assert [event.item_id for event in rec.known.histories.of_user(user)][: len(learned)] == learned


def test_a_refreshed_folder_has_every_user_in_order(run: Path, tmp_path: Path) -> None:
    # The new event is the oldest of all.
    events = _csv(tmp_path / "new.csv", "user_id,item_id,timestamp\nu01,k40,1\n")
    refresh(RefreshOptions(model=str(run), events=str(events), out=tmp_path / "out"))
    rows = pl.read_parquet(tmp_path / "out" / "interactions.parquet")
    times = rows["timestamp"].to_list()
    assert times == sorted(times) and rows.filter(pl.col("user_id") == "u01")["item_id"][0] == "k40"


def test_a_refresh_leaves_old_rows_alone(run: Path, tmp_path: Path) -> None:
    with llmrec.load(str(run), backend="hf") as found:
        before = len(found.known.histories.items)
    events = _csv(tmp_path / "new.csv", "user_id,item_id,timestamp\nu01,k40,1\nu01,k40,1\n")
    told = refresh(RefreshOptions(model=str(run), events=str(events), out=tmp_path / "out"))
    assert told["new interactions"] == 1 and told["interactions"] == before + 1


@pytest.mark.parametrize("model", ["tuned", "popularity", "item-knn", "markov"])
def test_histories_by_title_are_seen_too(rec: Loaded, model: str) -> None:
    titles = [rec._models.items[item].title for item in ("k01", "k02")]
    found = rec.rank(history=[{"title": title} for title in titles], k=40, model=model)
    assert not {each.item_id for each in found} & {"k01", "k02"}


def test_a_request_cannot_say_what_rules_look_at(rec: Loaded) -> None:
    item = next(item for item in rec._models.items.values() if item.fields)
    name, value = next(iter(item.fields.items()))
    with raises(DataError, Facts(kind="empty", column="rules")):
        rec.rank(
            history=["k01"],
            candidates=[{"item_id": item.item_id, name: "something else"}],
            where={"without": {name: [value]}},
        )


def test_more_candidates_than_a_language_model_orders(rec: Loaded) -> None:
    many = [{"title": f"thing {n}"} for n in range(300)]
    with raises(DataError, Facts(kind="failed", says="200")):
        rec.rank(history=["k01"], candidates=many)
    assert len(rec.rank(history=["k01"], candidates=many, model="popularity", k=5)) == 5


def test_a_search_is_as_wide_as_it_may_be(rec: Loaded) -> None:
    model = rec._models.get("tuned")
    assert isinstance(model, LanguageModel)
    widths = {}
    for depth in (1, 20, 21, 160, 161, 1000):
        searching = model._searching(depth)
        assert searching is not None
        widths[depth] = searching.options.beams
    assert widths == {1: 20, 20: 20, 21: 40, 160: 160, 161: 160, 1000: 160}


def test_outputs_of_others_are_not_written_over(run: Path, tmp_path: Path) -> None:
    mine = _csv(tmp_path / "mine.csv", "keep")
    with raises(DataError, Facts(kind="exists", column="--to")):
        rank_users(RankOptions(model=str(run), all_users=True, to=str(mine), by="popularity", backend="hf"))
    asked = jsonl(tmp_path / "q.jsonl", [{"item": "k01"}])
    for out in (asked, jsonl(tmp_path / "other.jsonl", [{}])):
        with raises(DataError, Facts(kind="exists", column="--out")):
            predict_file(PredictOptions(requests=asked, out=out, model=str(run), family="rating", backend="hf"))
    theirs = tmp_path / "theirs.db"
    with closing(sqlite3.connect(theirs)) as database, database:
        database.execute("CREATE TABLE recommendations (what TEXT)")
    (tmp_path / "theirs.db.summary.json").write_text("{}")
    with raises(DataError, Facts(kind="exists", column="--to")):
        rank_users(RankOptions(model=str(run), all_users=True, to=str(theirs), by="popularity", backend="hf"))
    with raises(DataError, Facts(kind="contradiction", column="--retrieve")):
        rank_users(RankOptions(model=str(run), all_users=True, to=str(tmp_path / "x.csv"), retrieve="markov"))


def test_questions_of_known_users_bring_their_history(rec: Loaded, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    asked = jsonl(tmp_path / "q.jsonl", [{"user_id": "u01", "item": "k03"}])
    told = {"model": str(run), "family": "rating", "backend": "hf", "dtype": "float32"}
    predict_file(PredictOptions(requests=asked, out=out, **told))
    assert lines(out)[0]["value"] == rec.rate("k03", user="u01")
