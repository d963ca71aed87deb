"""The same list everywhere: a service, `llmrec.load` and `llmrec rank` agree to the last digit."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest

pytest.importorskip("trl", reason="the train extra is not installed")
pytest.importorskip("fastapi", reason="the serve extra is not installed")

import llmrec
from llmrec.answer.loaded import Loaded, Scored
from llmrec.answer.rank.options import RankOptions
from llmrec.answer.rank.run import rank_file
from llmrec.answer.rank.users import rank_users
from llmrec.serve.app import make_app
from llmrec.serve.gates import Auth
from llmrec.serve.options import ServeOptions
from llmrec.serve.run import make_service
from tests.answer.rank_cases import jsonl, lines, options
from tests.planted import ITEMS
from tests.serve.served import Served, listening, wait_ready

List = list[tuple[str, float]]


@pytest.fixture(scope="module")
def run(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(trained_run, tmp_path_factory.mktemp("same") / "r")


@pytest.fixture(scope="module")
def url(run: Path) -> Iterator[str]:
    service = make_service(ServeOptions(model=str(run), backend="hf", dtype="float32", batch=4))
    with listening(make_app(service, Auth())) as (url,):
        wait_ready(url)
        yield url


@pytest.fixture(scope="module")
def rec(run: Path) -> Iterator[Loaded]:
    with llmrec.load(str(run), backend="hf", dtype="float32") as results:
        yield results


def make_requests(count: int, *, candidates: int = 0) -> list[dict[str, Any]]:
    """Return requests with random histories of a fixed seed."""
    drawn = random.Random(5)
    names = [f"k{n:02d}" for n in range(1, 41)]
    return [
        {"id": f"r{n}", "history": drawn.sample(names, drawn.randint(1, 6))}
        | ({"candidates": drawn.sample(names, candidates)} if candidates else {})
        for n in range(count)
    ]


def over_http(url: str, requests: Sequence[dict[str, Any]], *, together: bool = True, **more: Any) -> list[List]:
    """Send requests concurrently, so that they are batched, or one after the other."""

    def one(question: dict[str, Any]) -> List:
        results = httpx.post(f"{url}/v1/rank", json={"k": 1000, **question, **more}, timeout=120)
        assert results.status_code == 200, results.text
        return [(item["item_id"], item["score"]) for item in results.json()["items"]]

    with ThreadPoolExecutor(8 if together else 1) as pool:
        return list(pool.map(one, requests))


def batched(url: str, requests: Sequence[dict[str, Any]], **more: Any) -> list[List]:
    body = {"requests": [{"k": 1000, **question, **more} for question in requests]}
    results = httpx.post(f"{url}/v1/rank/batch", json=body, timeout=120).json()["answers"]
    return [[(item["item_id"], item["score"]) for item in each["items"]] for each in results]


def in_python(rec: Loaded, requests: Sequence[dict[str, Any]], **more: Any) -> list[List]:
    def plain(results: list[Scored]) -> List:
        return [(each.item_id, each.score) for each in results]

    more = {{"rules": "where"}.get(key, key): value for key, value in more.items()}
    return [plain(rec.rank(**{"k": 1000, **question, **more})) for question in requests]


def in_frame(rec: Loaded, requests: list[dict[str, Any]], **more: Any) -> list[List]:
    more = {{"rules": "where"}.get(key, key): value for key, value in more.items()}
    results = rec.recommend(requests, **{"k": 1000, **more})
    lists: dict[str, List] = {question["id"]: [] for question in requests}
    for row in results:
        assert row["error"] is None
        lists[row["id"]].append((row["item_id"], row["score"]))
    return list(lists.values())


def in_file(run: Path, folder: Path, requests: list[Any], **changes: Any) -> list[List]:
    target = folder / "out.jsonl"
    rank_file(options(run, jsonl(folder / "in.jsonl", requests), target, **changes))
    return [list(zip(line["items"], line["scores"], strict=True)) for line in lines(target)]


def agree(*results: list[List]) -> None:
    """Check that all are equal, to the last digit."""
    first = results[0]
    assert all(each for each in first)
    for n, other in enumerate(results[1:], start=1):
        assert other == first, n


def agree_nearly(first: list[List], *results: list[List]) -> None:
    """Check that items and order are equal, and scores up to the rounding of float32 in batches."""
    for n, other in enumerate(results):
        for expected, actual in zip(first, other, strict=True):
            # A difference of likelihoods keeps their rounding errors, and they are far from 0.
            assert dict(actual) == pytest.approx(dict(expected), rel=1e-5, abs=1e-5), n
            scores = [score for _, score in actual]
            assert scores == sorted(scores, reverse=True), n


def test_lists_of_candidates(url: str, rec: Loaded, run: Path, tmp_path: Path) -> None:
    requests = make_requests(9, candidates=7)
    agree(
        in_file(run, tmp_path, requests),
        over_http(url, requests),
        over_http(url, requests, together=False, model="tuned"),
        batched(url, requests),
        in_python(rec, requests),
        in_frame(rec, requests),
    )


@pytest.mark.slow
def test_service_with_models_of_several_runs(run: Path, rec: Loaded, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    models, store = ("tuned", str(other)), str(tmp_path / "store.sqlite")
    requests = make_requests(3, candidates=7)
    service = make_service(ServeOptions(model=str(run), models=models, store=store, backend="hf", dtype="float32"))
    with listening(make_app(service, Auth())) as (url,):
        wait_ready(url)
        assert httpx.get(f"{url}/ready").json()["models"] == ["tuned", "other"]
        agree(
            in_python(rec, requests, model="tuned"),
            *(over_http(url, requests, model=name) for name in ("tuned", "other")),
        )


@pytest.mark.parametrize(
    "strategy",
    [
        "likelihood",
        "pairwise",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("likelihood-prior", "two-step")),
    ],
)
def test_lists_of_each_strategy(
    url: str, rec: Loaded, run: Path, tmp_path: Path, strategy: str, served: Served
) -> None:
    requests = make_requests(4, candidates=4)
    kinds = httpx.get(f"{url}/v1/models").json()["models"][0]["strategies"]
    # The model of the other tests supports more strategies.
    address, folder = (url, run) if strategy in kinds else (served.url, served.run)
    first = in_file(folder, tmp_path, requests, strategy=strategy, batch=1)
    agree(first, over_http(address, requests, strategy=strategy, together=False))
    agree_nearly(first, over_http(address, requests, strategy=strategy), batched(address, requests, strategy=strategy))
    if folder is run:
        agree(first, in_python(rec, requests, strategy=strategy))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "fuse"),
    [("fusion with texts", "baselines"), ("fusion with models", "model")],
)
def test_lists_of_a_learned_ranker(ranker_run: Path, tmp_path: Path, model: str, fuse: str) -> None:
    run, drawn = shutil.copytree(ranker_run, tmp_path / "r"), random.Random(5)
    names = [f"i{n:02d}" for n in range(ITEMS)]
    requests = [{"id": f"r{n}", "history": drawn.sample(names, 1 + n)} for n in range(3)]
    listed = [{**question, "candidates": drawn.sample(names, 7)} for question in requests]
    service = make_service(
        ServeOptions(model=str(run), store=str(tmp_path / "s.sqlite"), backend="hf", dtype="float32", batch=4)
    )
    with llmrec.load(str(run), backend="hf", dtype="float32") as rec, listening(make_app(service, Auth())) as (url,):
        wait_ready(url)
        # A language model reranks the ranker's items; the other case compares the ranker's lists.
        for more in ({}, {"k": 5}, {"exclude_seen": False})[: 1 if fuse == "model" else 3]:
            questions = requests if more else listed
            first = in_python(rec, questions, model=model, **more)
            agree(first, over_http(url, questions, model=model, together=False, **more))
            same = agree_nearly if model == "fusion with models" else agree
            same(first, batched(url, questions, model=model, **more), in_frame(rec, questions, model=model, **more))
        agree(in_python(rec, listed, model=model), in_file(run, tmp_path, listed, fuse=fuse, batch=64))


@pytest.mark.parametrize(
    ("model", "fuse"),
    [("markov", None), ("fusion with texts", "baselines"), ("fusion with models", "model")],
)
def test_lists_of_candidates_of_other_models(
    url: str, rec: Loaded, run: Path, tmp_path: Path, model: str, fuse: str | None
) -> None:
    requests = make_requests(9, candidates=7)
    agree(
        *([in_file(run, tmp_path, requests, fuse=fuse, batch=64)] if fuse else []),
        over_http(url, requests, model=model),
        over_http(url, requests, model=model, together=False),
        batched(url, requests, model=model),
        in_python(rec, requests, model=model),
        in_frame(rec, requests, model=model),
    )


@pytest.mark.parametrize("model", ["tuned", "popularity", "item-knn", "fusion with texts", "fusion with models"])
@pytest.mark.parametrize(
    "more",
    [
        {"k": 40, "exclude_seen": False},
        {"k": 5, "rules": {"only": {"brand": ["Brindal", "Orlune"]}, "quotas": [{"field": "category", "most": 1}]}},
    ],
    ids=["seen", "rules"],
)
def test_lists_of_the_catalogue(url: str, rec: Loaded, model: str, more: dict[str, Any]) -> None:
    requests = make_requests(3)
    first = in_python(rec, requests, model=model, **more)
    agree(first, over_http(url, requests, model=model, together=False, **more))
    # Models without prompts do not depend on the batch.
    same = agree_nearly if model in ("tuned", "fusion with models") else agree
    same(
        first,
        over_http(url, requests, model=model, **more),
        batched(url, requests, model=model, **more),
        in_frame(rec, requests, model=model, **more),
    )


def test_lists_of_a_model_that_searches(served: Served, tmp_path: Path) -> None:
    requests = make_requests(5)
    with llmrec.load(str(served.run), backend="hf", dtype="float32") as rec:
        agree(
            in_file(served.run, tmp_path, requests, candidates="all", top=10, beams=20, batch=1),
            over_http(served.url, requests, together=False, k=10),
            in_python(rec, requests, k=10),
        )
    agree_nearly(over_http(served.url, requests, k=10), batched(served.url, requests, k=10))


@pytest.mark.parametrize(
    "model",
    ["markov", "fusion", *(pytest.param(each, marks=pytest.mark.slow) for each in ("tuned", "fusion with models"))],
)
def test_lists_of_all_users(url: str, rec: Loaded, run: Path, tmp_path: Path, model: str) -> None:
    target = tmp_path / "lists.parquet"
    rank_users(
        RankOptions(model=str(run), backend="hf", dtype="float32", all_users=True, to=str(target), by=model, top=6)
    )
    table = pl.read_parquet(target).sort("user_id", "rank")
    assert table["error"].null_count() == len(table)
    users = table["user_id"].unique().sort().to_list()[:6]
    in_table = [list(table.filter(pl.col("user_id") == user).select("item_id", "score").iter_rows()) for user in users]
    by_user = [{"id": user, "user_id": user} for user in users]
    in_rec = [[(each.item_id, each.score) for each in rec.rank(user=user, id=user, k=6, model=model)] for user in users]
    agree(in_rec, over_http(url, by_user, together=False, k=6, model=model))
    (agree_nearly if model in ("tuned", "fusion with models") else agree)(in_rec, in_table)
