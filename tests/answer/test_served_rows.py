"""Models served by the name of a report row return the lists of that row."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

import llmrec
from llmrec.answer.loaded import ListSpec, Loaded
from llmrec.answer.rank.options import RankOptions
from llmrec.answer.rank.run import rank_file
from llmrec.answer.rank.sharded import merge_rank, rank_shard
from llmrec.answer.recommender import AnnotatedAnswer
from llmrec.baselines.fits import fit_baseline
from llmrec.data.requests import history_entry
from llmrec.data.split import split_validation_users
from llmrec.durable import parse_checked_json, sha256_of, write_checked_json
from llmrec.ensembles import rankers
from llmrec.errors import ModelError, RecipeError
from llmrec.evaluate.predictor import evaluate
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.audit import audit
from llmrec.pipeline.row_specs import protocol_of
from llmrec.pipeline.study import build_study
from llmrec.pipeline.weighing import EnsembleUsers
from llmrec.recipe.load import load_recipe
from llmrec.records import Shard
from llmrec.types import Ranking
from tests import planted
from tests.answer.rank_cases import evaluated_lists, evaluated_requests, jsonl, lines, pairs
from tests.facts import Facts, raises
from tests.planted import ITEMS, WORDS

pytest.importorskip("llmrec.serve", reason="the extension is not there")

from llmrec.serve.options import RefreshOptions, ServeOptions
from llmrec.serve.refresh import refresh
from llmrec.serve.run import make_service

CLASSIC = (
    *("data={source: made-reviews, noun: products}", "reviews=null", "eval.arms=[]", "eval.bootstrap=20", "seed=2"),
    "tasks={sequential: {baselines: [random, popularity, {name: item-knn, history: 1}, {name: item-knn, history: 5}, "
    "markov-1]}}",
    *("eval.users=12", "eval.candidates.count=8"),
)


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> pipeline.Run:
    """A run with only classic recommenders and linear ensembles."""
    recipe = load_recipe("recipes/movielens-100k/four-tasks.yaml", CLASSIC)
    return pipeline.run(recipe, tmp_path_factory.mktemp("rows") / "r", quiet=True)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> pipeline.Run:
    """A run with only classic recommenders, whose ensembles are learned rankers."""
    pytest.importorskip("lightgbm", reason="the ranker extra is not installed")
    folder = tmp_path_factory.mktemp("ranked")
    overrides = [*CLASSIC, *planted.changes(folder / "data")]
    recipe = load_recipe("recipes/movielens-100k/four-tasks.yaml", overrides)
    return pipeline.run(recipe, folder / "r", quiet=True)


@pytest.fixture(scope="module", params=[pytest.param("linear", marks=pytest.mark.slow), "ranked"])
def run(request: pytest.FixtureRequest) -> pipeline.Run:
    result: pipeline.Run = request.getfixturevalue(request.param)
    forms = {row["fusion"]["form"] for row in result.results["rows"] if row.get("fusion")}
    assert (forms == {"ranker"}) == (request.param == "ranked")
    return result


@pytest.fixture(scope="module")
def rec(run: pipeline.Run) -> Iterator[Loaded]:
    with llmrec.load(str(run.folder)) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def requests(run: pipeline.Run) -> list[dict[str, Any]]:
    return evaluated_requests(run.folder)


@contextmanager
def serving(folder: Path, store: Path) -> Iterator[str]:
    """Yield the URL of a service of a run."""
    pytest.importorskip("fastapi", reason="the serve extra is not installed")
    from llmrec.serve.app import make_app
    from llmrec.serve.gates import Auth
    from tests.serve.served import listening, wait_ready

    service = make_service(ServeOptions(model=str(folder), store=str(store / "store.sqlite")))
    with listening(make_app(service, Auth())) as (url,):
        wait_ready(url)
        yield url


def test_every_row_of_the_report_is_served(run: pipeline.Run, rec: Loaded) -> None:
    rows = {row["predictor"] for row in run.results["rows"]}
    assert {"fusion", "fusion with texts", "item-knn(history=1)", "item-knn(history=5)"} <= rows
    assert set(rec.models) == rows - {"random"}
    # The row with the best validation figure is the default.
    choice = run.results["choice"]
    assert rec.models[0] == choice["row"].split("/")[2] == "fusion with texts"
    assert choice["value"] == max(choice["figures"].values())


def test_served_lists_equal_the_evaluation(run: pipeline.Run, rec: Loaded, requests: list[dict[str, Any]]) -> None:
    lists = {}
    for row in run.results["rows"]:
        name, known = row["predictor"], evaluated_lists(run.folder, row["id"])
        if name == "random":
            continue
        assert len(known) == len(requests) == 12
        for request in requests:
            ranking = rec.rank(**request, model=name, k=100)
            expected = known[request["id"]]
            assert [each.score for each in ranking] == pytest.approx([score for _, score in expected]), name
            # If texts differ only in a number, rounding of the scores may change the order.
            assert {each.item_id: each.score for each in ranking} == pytest.approx(dict(expected)), name
        lists[name] = known
    # Otherwise the test could not tell the two ensembles apart.
    assert lists["fusion"] != lists["fusion with texts"]


def test_rows_by_method_and_by_id(run: pipeline.Run, rec: Loaded, requests: list[dict[str, Any]]) -> None:
    request = requests[0]
    assert rec.rank(**request, model="item-knn") == rec.rank(**request, model="item-knn(history=1)")
    names = ["sequential/baseline/fusion with texts", "item-knn(history=5)", "item-knn"]
    with llmrec.load(str(run.folder), models=names) as chosen:
        assert chosen.models == ("fusion with texts", "item-knn(history=5)", "item-knn(history=1)")
        assert chosen.rank(**request) == rec.rank(**request, model="fusion with texts")
    with raises(RecipeError, Facts("unknown-name", column="model")):
        rec.rank(**request, model="fusion with models")


@pytest.mark.parametrize("run", ["linear"], indirect=True)
def test_ensemble_explains_by_members(
    run: pipeline.Run, rec: Loaded, requests: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = {"id": "whole", "history": requests[0]["history"]}
    file = jsonl(tmp_path / "in.jsonl", [requests[0], request, {"id": "cold", "user_id": "nobody"}])
    options = RankOptions(model=str(run.folder), requests=file, out=tmp_path / "o.jsonl", rationale=2, top=3)
    summary = rank_file(options)
    assert summary["by"] == "fusion with texts" and summary["rationale"]["written"] == 4
    some, every, cold = lines(tmp_path / "o.jsonl")
    assert cold["rationale"] == [] and len(every["rationale"]) == 2
    members = {row["predictor"]: row for row in run.results["rows"]}["fusion with texts"]["fusion"]["parts"]
    for item, text in zip(every["items"], every["rationale"], strict=False):
        name, _, value = text.split(", ")[0].rpartition(" ")
        assert name in {part["name"] for part in members} and float(value) > 0
        assert rec.explain(item, history=request["history"], model="fusion with texts") == text
    # An item of the history, which the list excludes, is explained too.
    assert rec.explain(request["history"][-1]["item_id"], history=request["history"], model="fusion with texts")
    with monkeypatch.context() as patch:
        patch.setattr(rankers, "TOP_ITEMS_PER_MEMBER", 3)
        last = rec.rank(history=request["history"], k=100)[-1]
        assert rec.explain(last.item_id, history=request["history"]) == "not among the best items of any member"
    rank_file(replace(options, by="popularity", out=tmp_path / "p.jsonl"))
    assert all(not line["rationale"] and "popularity" in line["notes"][-1] for line in lines(tmp_path / "p.jsonl"))
    with raises(RecipeError, Facts("unsupported", column="model")):
        rec.explain(item, history=request["history"], model="popularity")
    with serving(run.folder, tmp_path) as url:
        assert [each["name"] for each in httpx.get(f"{url}/v1/models").json()["models"]] == list(rec.models)
        for name in ("fusion", "item-knn"):
            response = httpx.post(f"{url}/v1/rank", json={**requests[0], "model": name, "k": 100}, timeout=60).json()
            expected = rec.rank(**requests[0], model=name, k=100)
            assert [each["item_id"] for each in response["items"]] == [each.item_id for each in expected]
            assert response["model"]["name"] == ("item-knn(history=1)" if name == "item-knn" else name)
        listed = httpx.post(f"{url}/v1/rank", json={**requests[0], "k": 3, "rationale": 2}, timeout=60).json()
        assert [item["rationale"] for item in listed["items"]] == [*some["rationale"], None]
        about = {"history": request["history"], "item_id": every["items"][0]}
        answer = httpx.post(f"{url}/v1/explain", json=about, timeout=60).json()
        assert (answer["text"], answer["model"]["name"]) == (every["rationale"][0], "fusion with texts")


def test_choice_uses_separate_validation_users(run: pipeline.Run) -> None:
    study = build_study(load_recipe(run.folder / "recipe.yaml"))
    cases = EnsembleUsers(study).cases("sequential")
    weighers = {
        one.user_id
        for one in split_validation_users(study.data, study.recipe.eval.fusion.reserved)[1].holdouts("valid")
    }
    assert {case.request.user_id for case in cases} <= weighers
    choice, protocol = run.results["choice"], protocol_of(study, "sequential")
    assert choice["users"] == len({case.request.user_id for case in cases})
    for section in study.baselines("sequential"):
        if section.name != "random":
            model = fit_baseline(section.name, section.parameters, study.data, seed=study.recipe.seed)
            result = evaluate(model, cases, name="sequential", kind=Ranking, protocol=protocol)
            expected = result.values["NDCG@10"].mean()
            assert choice["figures"][f"sequential/baseline/{section.label}"] == pytest.approx(expected)


def test_test_users_do_not_change_the_default(linear: pipeline.Run, tmp_path: Path) -> None:
    recipe = load_recipe("recipes/movielens-100k/four-tasks.yaml", [*CLASSIC, "eval.users=5"])
    other = pipeline.run(recipe, tmp_path / "r", quiet=True)
    tables = [{row["id"]: row["metrics"]["NDCG@10"] for row in each.results["rows"]} for each in (linear, other)]
    assert tables[0] != tables[1] and other.results["choice"] == linear.results["choice"]


def test_network_is_served_as_evaluated(tmp_path: Path) -> None:
    """Early stopping excludes the validation users that weight the ensembles, also in a served model."""
    pytest.importorskip("torch", reason="the train extra is not installed")
    network = "{name: gru4rec, dim: 4, epochs: 12, patience: 1, quiet: true}"
    tasks = f"tasks={{sequential: {{baselines: [random, popularity, item-knn, markov-1, {network}]}}}}"
    result = pipeline.run(
        load_recipe("recipes/movielens-100k/four-tasks.yaml", [*CLASSIC, tasks]), tmp_path / "r", quiet=True
    )
    (row,) = [row for row in result.results["rows"] if row["predictor"].startswith("gru4rec")]
    with llmrec.load(str(result.folder), models=[row["predictor"]]) as rec:
        study = build_study(load_recipe(result.folder / "recipe.yaml"))
        for case in study.cases("sequential"):
            history = [history_entry(event) for event in case.request.history]
            pool = list(case.request.candidates or ())
            ranking = rec.rank(history=history, candidates=pool, id=case.request.id, k=100)
            known = evaluated_lists(result.folder, row["id"])[case.request.id]
            assert [each.score for each in ranking] == pytest.approx([score for _, score in known], rel=1e-5)


def test_rank_file_by_default_and_named_rows(
    run: pipeline.Run, rec: Loaded, requests: list[dict[str, Any]], tmp_path: Path
) -> None:
    user = {"id": "whole", "user_id": rec.users[3]}
    file = jsonl(tmp_path / "in.jsonl", [*requests, user])
    for by, name in ((None, rec.models[0]), ("popularity", "popularity"), ("item-knn", "item-knn(history=1)")):
        out = tmp_path / f"{by}.jsonl"
        summary = rank_file(RankOptions(model=str(run.folder), requests=file, out=out, by=by, top=6))
        assert (summary["ranked"], summary["failed"], summary["by"]) == (13, 0, name)
        expected = [*requests, {"id": "whole", "user": user["user_id"]}]
        for line, request in zip(lines(out), expected, strict=True):
            assert line["items"] == [each.item_id for each in rec.rank(**request, model=name, k=6)], (name, request)
    source = jsonl(tmp_path / "requests.jsonl", requests)
    out = tmp_path / "row.jsonl"
    rank_file(RankOptions(baseline="fusion with texts", recipe=str(run.folder), requests=source, out=out))
    known = evaluated_lists(run.folder, "sequential/baseline/fusion with texts")
    assert all(pairs(line) == known[line["request_id"]] for line in lines(out))
    with raises(RecipeError, Facts("contradiction", column="--strategy")):
        rank_file(RankOptions(model=str(run.folder), requests=file, out=tmp_path / "o.jsonl", strategy="list"))
    with raises(RecipeError, Facts("contradiction", column="--backend")):
        rank_file(RankOptions(model=str(run.folder), requests=file, out=tmp_path / "o.jsonl", backend="hf"))


def test_unknown_users_and_items_are_noted(
    linear: pipeline.Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"id": "a", "user_id": "nobody"}, {"id": "b", "history": ["k01", "no such"]}, {"id": "c", "user_id": "u01"}]
    file = jsonl(tmp_path / "i.jsonl", rows)
    rank_file(RankOptions(model=str(linear.folder), requests=file, out=tmp_path / "o.jsonl", top=2))
    notes = [line["notes"] for line in lines(tmp_path / "o.jsonl")]
    with llmrec.load(str(linear.folder)) as rec:
        frame = rec.recommend(rows, k=2)
        assert [row["notes"] for row in frame[::2]] == ["; ".join(each) for each in notes]
        assert "unknown user 'nobody'" in notes[0][0] and "the most popular items" in notes[0][-1]
        assert "'no such'" in notes[1][0] and "of this user in the data" in notes[2][0] and len(notes[2]) == 1
        assert not caplog.records
        for _ in range(2):
            rec.rank(user="nobody")
            rec.rank(history=["no such"])
            rec.rank(user="u01", history=["k01"])
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == 2 and all(text.endswith("the most popular items are listed") for text in messages)
        assert "'nobody'" in messages[0] and "'no such'" in messages[1]


def test_untrained_items_are_noted(linear: pipeline.Run) -> None:
    with llmrec.load(str(linear.folder)) as rec:
        (result,) = rec.lists([rec.read({"history": ["k01", {"title": "Tomorrow"}]}, 1, whole=True)], ListSpec(k=1))
        assert isinstance(result, AnnotatedAnswer) and result.unknown_items == ("Tomorrow",)
        assert "missing in the training data: 'Tomorrow'" in result.notes[0]
        request = rec.read({"user_id": "nobody", "history": None}, 1, whole=True)
        (result,) = rec.lists([request], ListSpec(k=1))
        assert isinstance(result, AnnotatedAnswer) and result.unknown_user and result.cold and not result.unknown_items
        (result,) = rec.lists([rec.read({"history": ["k01", "no such"]}, 1, whole=True)], ListSpec(k=1))
        assert isinstance(result, AnnotatedAnswer) and result.unknown_items == ("no such",) and not result.cold


def test_ranker_is_audited_and_reported(ranked: pipeline.Run) -> None:
    checks = {check.name: check for check in audit(ranked.folder)}
    rankers = checks["held-out items in the features of ensemble rankers"]
    assert rankers.verdict == "clean" and not any(check.verdict == "leak" for check in checks.values())
    report = (ranked.folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "Features of the ranker" in report and "<bdi>markov-1: score</bdi>" in report


def test_ranker_ranks_the_catalogue(ranked: pipeline.Run) -> None:
    lamps = [f"i{n:02d}" for n in range(ITEMS) if WORDS[n % len(WORDS)] == "lamp"]
    with llmrec.load(str(ranked.folder), models=["fusion with texts", "popularity"]) as rec:
        complete = rec.rank(history=lamps[:2], k=ITEMS)
        # After a short history, the best items have the same topic.
        assert {item.item_id for item in complete[:4]} == set(lamps[2:]) and len(complete) == ITEMS - 2
        assert [item.score for item in complete] == sorted((item.score for item in complete), reverse=True)
        again = rec.rank(history=lamps[:2], k=ITEMS, exclude_seen=False)
        assert len(again) == ITEMS and set(lamps[:2]) <= {item.item_id for item in again}
        few = rec.rank(history=lamps[:2], k=ITEMS, where={"only": {"price": ["2"]}})
        kept = {f"i{n:02d}" for n in range(ITEMS) if n % 7 == 1} - set(lamps[:2])
        assert {item.item_id for item in few} == kept
        # Rules apply before candidates are chosen; the order equals that of a request with these candidates.
        expected = rec.rank(history=lamps[:2], k=ITEMS, candidates=sorted(kept))
        assert [(item.item_id, item.score) for item in few] == [(item.item_id, item.score) for item in expected]
        # An item is explained by the contributions of members and features.
        assert "content" in rec.explain(lamps[2], history=lamps[:2])
        strange = rec.rank(history=lamps[:2], candidates=[*sorted(kept), {"title": "A thing of tomorrow"}])
        assert strange[-1].title == "A thing of tomorrow"
        # Without data about the user, the most popular items are returned, as with any model.
        cold = [item.item_id for item in rec.rank(history=[], k=5)]
        assert cold == [item.item_id for item in rec.rank(history=[], k=5, model="popularity")]
        assert {item.item_id for item in rec.rank(history=[], candidates=lamps)} == set(lamps)


def test_refreshed_ranker_finds_new_item(ranked: pipeline.Run, tmp_path: Path) -> None:
    live, items, events = tmp_path / "live", tmp_path / "items.csv", tmp_path / "events.csv"
    events.write_text("user_id,item_id,timestamp\nfresh,i02,90000000\nfresh,i12,90000001\n", encoding="utf-8")
    refresh(RefreshOptions(model=str(ranked.folder), events=str(events), out=live))
    with serving(live, tmp_path) as url:

        def best() -> list[str]:
            response = httpx.post(f"{url}/v1/rank", json={"user_id": "fresh", "k": 8}, timeout=60).json()
            assert response["model"]["name"] == "fusion with texts"
            return [item["item_id"] for item in response["items"]]

        assert "new" not in best()
        items.write_text("item_id,title\nnew,A lamp of kind 99\n", encoding="utf-8")
        refresh(RefreshOptions(model=str(live), items=items, server=url))
        assert "new" in best()
    before, after = (parse_checked_json((folder / "fusions.json").read_bytes()) for folder in (ranked.folder, live))
    fitted_ = [[fusion["fitted"] for fusion in stored["fusions"]] for stored in (before, after)]
    assert fitted_[0] == fitted_[1] and fitted_[0][0]["form"] == "ranker"


def test_ranker_shards_equal_one_process(run: pipeline.Run, requests: list[dict[str, Any]], tmp_path: Path) -> None:
    file = jsonl(tmp_path / "in.jsonl", [*requests, {"id": "whole", "history": requests[0]["history"]}])
    options = RankOptions(model=str(run.folder), requests=file, out=tmp_path / "out.jsonl", top=9)
    complete = rank_file(replace(options, out=tmp_path / "whole.jsonl"))
    for number in (2, 1):
        rank_shard(options, Shard(number, 2))
    assert merge_rank(options.target)["sha256"] == complete["sha256"] == sha256_of(options.target)


@pytest.mark.parametrize("harm", ["cut", "no trees", "text"])
def test_damaged_ensembles_raise_error(ranked: pipeline.Run, tmp_path: Path, harm: str) -> None:
    folder = shutil.copytree(ranked.folder, tmp_path / "r")
    path = folder / "fusions.json"
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    else:
        content = parse_checked_json(path.read_bytes())
        for fusion in content["fusions"]:
            fusion["fitted"]["trees"] = (
                None if harm == "no trees" else {**fusion["fitted"]["trees"], "text": "bm8gdHJlZXM="}
            )
        write_checked_json(path, {key: value for key, value in content.items() if key != "checksum"})
    with raises(ModelError, Facts("damaged", str(path))):
        llmrec.load(str(folder), models=["fusion with texts"]).rank(history=["i01"])
