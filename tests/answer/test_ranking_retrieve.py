"""`llmrec rank --retrieve`: retrieved candidates, their random order, and rejected options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrec.answer.classic import Retriever, training_data
from llmrec.answer.rank import run as rank_files
from llmrec.answer.rank.run import rank_file
from llmrec.baselines.knn import ItemKNN
from llmrec.baselines.popular import Popularity
from llmrec.data.requests import RankRequest, parse_request
from llmrec.data.split import SplitDataset
from llmrec.errors import DataError, RecipeError
from llmrec.pipeline import bundle
from llmrec.types import Event, Request
from tests.answer.rank_cases import Killed, dying, jsonl, lines, options
from tests.facts import Facts, raises

pytest.importorskip("torch", reason="the train extra is not installed")

K = 6


@pytest.fixture(scope="module")
def data(tuned: Path) -> SplitDataset:
    return training_data(bundle.read(str(tuned)))


@pytest.fixture(scope="module")
def retriever(data: SplitDataset) -> Retriever:
    return Retriever("item-knn", data, data.dataset.items, count=K, seed=0)


def requests_of(data: SplitDataset, *requests: dict[str, Any]) -> list[RankRequest]:
    return [parse_request(each, n, data.dataset.items, retrieves=True) for n, each in enumerate(requests, start=1)]


def ids_of(request: RankRequest) -> list[str]:
    return [item.item_id for item in request.candidates]


def histories(data: SplitDataset, count: int) -> list[list[str]]:
    return [[event.item_id for event in data.train_events(user)[:4]] for user in data.users()[:count]]


def best_of(model: Any, data: SplitDataset, history: list[str]) -> dict[str, float]:
    """Return the scores of all items that are not in a history."""
    model.fit(data)
    asking = Request(id="x", user_id="nobody", history=tuple(Event(item_id=item) for item in history))
    (row,) = model.scores([asking])
    return {item: score for item, score in zip(model.items, row, strict=True) if item not in history}


def test_retrieves_best_items_by_id_and_title(data: SplitDataset, retriever: Retriever) -> None:
    for n, history in enumerate(histories(data, 5)):
        titles = [{"title": data.dataset.items[item].title} for item in history]
        by_id, by_title = retriever.fill(
            requests_of(data, {"id": f"a{n}", "history": history}, {"id": f"b{n}", "history": titles})
        )
        scores = best_of(ItemKNN(seed=0), data, history)
        chosen = ids_of(by_id)
        assert len(set(chosen)) == K == by_id.retrieved and not set(chosen) & set(history)
        assert min(scores[item] for item in chosen) >= max(s for item, s in scores.items() if item not in chosen)
        assert set(ids_of(by_title)) == set(chosen) and by_title.notes == ()


def test_given_candidates_are_kept(data: SplitDataset, retriever: Retriever) -> None:
    first, *others = sorted(data.dataset.items)
    brought, empty = retriever.fill(
        requests_of(data, {"history": [first], "candidates": others[:3]}, {"history": [first], "candidates": []})
    )
    assert ids_of(brought) == others[:3] and brought.retrieved == 0
    assert empty.retrieved == K


def test_unknown_history_gets_popular_items(data: SplitDataset, retriever: Retriever) -> None:
    scores = best_of(Popularity(), data, [])
    strange = {"history": [{"item_id": "nowhere", "title": "Nothing like it"}, {"title": "nor this"}]}
    filled = retriever.fill(requests_of(data, strange, {}))
    for request, noted in zip(filled, ("'nowhere', 'nor this'", ""), strict=True):
        chosen = ids_of(request)
        assert min(scores[item] for item in chosen) >= max(s for item, s in scores.items() if item not in chosen)
        assert "the most popular items are the candidates" in request.notes[-1]
        assert noted in " ".join(request.notes)
    known = sorted(data.dataset.items)[0]
    (mixed,) = retriever.fill(requests_of(data, {"history": [known, {"title": "nor this"}]}))
    assert mixed.notes == ("retrieval: ignored items missing in the run's data: 'nor this'",)
    # An id passed as a title is not treated as an id.
    (request,) = retriever.fill(requests_of(data, {"history": [{"title": known}]}))
    assert "missing in the run's data" in request.notes[0]


def test_candidate_order_is_random(data: SplitDataset, retriever: Retriever) -> None:
    history = histories(data, 1)[0]
    scores = best_of(ItemKNN(seed=0), data, history)
    filled = retriever.fill(requests_of(data, *({"id": f"r{n}", "history": history} for n in range(60))))
    positions = [int(np.argmax([scores[item] for item in ids_of(request)])) for request in filled]
    assert (np.bincount(positions, minlength=K) > 0).all()
    again = retriever.fill(requests_of(data, {"id": "r7", "history": history}))
    assert ids_of(again[0]) == ids_of(filled[7])


def test_retrieves_fewer_if_few_remain(data: SplitDataset) -> None:
    every = sorted(data.dataset.items)
    small = Retriever("item-knn", data, data.dataset.items, count=len(every), seed=0)
    most, none = small.fill(requests_of(data, {"history": every[2:]}, {"history": every}))
    assert sorted(ids_of(most)) == every[:2] and most.retrieved == 2
    assert none.candidates == ()


def test_held_out_interactions_are_not_learned(data: SplitDataset) -> None:
    held = {(one.user_id, one.item_id) for one in data.holdouts("test")}
    assert held and not held & set(data.train.select("user_id", "item_id").iter_rows())


def test_ranks_file_with_retrieved_candidates(
    tuned: Path, data: SplitDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_files, "PART_SIZE", 2)
    every = sorted(data.dataset.items)
    rows: list[dict[str, Any]] = [{"id": f"r{n}", "history": h} for n, h in enumerate(histories(data, 3))]
    rows += [{"id": "own", "candidates": every[:3]}, {"id": "cold"}, {"id": "all", "history": every}]
    path = jsonl(tmp_path / "in.jsonl", rows)
    clean = options(tuned, path, tmp_path / "clean.jsonl", retrieve="item-knn", k=4, task="direct")
    summary = rank_file(clean)
    results = {row["request_id"]: row for row in lines(clean.out)}
    assert [results[f"r{n}"]["retrieved"] for n in range(3)] == [4, 4, 4]
    assert all(len(results[f"r{n}"]["items"]) == 4 and not set(results[f"r{n}"]["items"]) & set(rows[n]["history"])
               for n in range(3))  # fmt: skip
    assert results["own"]["retrieved"] == 0 and sorted(results["own"]["items"]) == every[:3]
    assert "most popular" in results["cold"]["notes"][-1]
    assert results["all"]["error"] is not None and "no item is left to retrieve" in results["all"]["error"]
    assert summary["retriever"] == {"retriever": "item-knn", "k": 4, "data": data.fingerprint, "seed": 0}
    assert (summary["with_retrieved"], summary["failed"]) == (4, 1) and "retrieving" in summary["seconds"]

    # A killed run that is resumed gives the same bytes; a different k or recommender is a different job.
    killed = options(tuned, path, tmp_path / "out.jsonl", retrieve="item-knn", k=4, task="direct")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(rank_files, "write_part", dying(1))
        rank_file(killed)
    assert rank_file(killed)["from_earlier_run"] == 3
    assert killed.out.read_bytes() == clean.out.read_bytes()
    changed = [replace(killed, k=5), replace(killed, retrieve="popularity")]
    assert len({summary["key"], *(rank_file(each)["key"] for each in changed)}) == 3


def test_unsupported_retrieval_is_refused(llama_folder: Path, tuned: Path, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "in.jsonl", [{"history": ["1"]}])
    with raises(DataError, Facts("unsupported", tuned / "merged", column="--retrieve", says="--model")):
        rank_file(options(tuned / "merged", path, tmp_path / "o.jsonl", retrieve="item-knn"))
    with raises(RecipeError, Facts("unknown-name", column="--retrieve", says="did you mean 'item-knn'")):
        rank_file(options(tuned, path, tmp_path / "o.jsonl", retrieve="item-kn"))
    with raises(RecipeError, Facts("contradiction", column="--retrieve")):
        rank_file(options(tuned, path, tmp_path / "o.jsonl", retrieve="item-knn", candidates="all"))
    assert not (tmp_path / "o.jsonl").exists()
    # Without the option, a request without candidates still fails.
    assert rank_file(options(tuned, path, tmp_path / "p.jsonl"))["failed"] == 1
