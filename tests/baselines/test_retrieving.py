"""Candidates that a recommender retrieves: their items and order, and their report in a run."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from llmrec.baselines.knn import ItemKNN
from llmrec.baselines.retrieve import RetrievedCandidates, candidate_recall, retrieve_candidates
from llmrec.data.candidates import CandidateSets
from llmrec.data.split import SplitDataset, request_id
from llmrec.ensembles.rankers import CatalogueEnsemble
from llmrec.ensembles.retrieving import EnsembleRetriever
from llmrec.errors import DataError, RecipeError
from llmrec.pipeline.leaks import with_random_holdouts
from llmrec.pipeline.run import run
from llmrec.pipeline.study import build_study
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import BaselineSection, CandidateSection
from llmrec.types import Ranking, Request
from tests.facts import Facts, raises
from tests.tasks.task_data import make_dataset, make_split, make_task

DATA = make_split()
SECTION = CandidateSection(kind="retrieved", retriever="item-knn", count=8)


@pytest.fixture(scope="module")
def sets() -> CandidateSets:
    return retrieve_candidates(DATA, "test", SECTION, seed=0)


@pytest.fixture(scope="module")
def lists() -> RetrievedCandidates:
    return RetrievedCandidates(DATA, SECTION, 0)


def test_retrieves_the_best_items_without_the_history(sets: CandidateSets) -> None:
    positions = []
    model = ItemKNN(seed=0)
    model.fit(DATA)
    for held in DATA.holdouts("test"):
        name = request_id(held.user_id, held.item_id)
        history = DATA.history(held.user_id, "test")
        (answer,) = model.answer([Request(id=name, user_id=held.user_id, history=history)])
        assert isinstance(answer, Ranking)
        seen = {event.item_id for event in history}
        best = [(item, score) for item, score in zip(answer.items, answer.scores, strict=True) if item not in seen]
        chosen = sets.sets[name]
        assert len(set(chosen)) == 8 and not seen & set(chosen)
        scores = dict(best)
        assert min(scores[item] for item in chosen) >= max(score for item, score in best if item not in chosen)
        positions.append(int(np.argmax([scores[item] for item in chosen])))
    # The order of candidates does not reveal the retriever's order.
    counts = np.bincount(positions, minlength=8)
    assert counts.max() < len(positions) / 2 and (counts > 0).sum() >= 6
    assert retrieve_candidates(DATA, "test", SECTION, seed=0).digest == sets.digest
    assert retrieve_candidates(DATA, "test", SECTION, seed=1).digest != sets.digest


def test_lists_of_some_users_equal_those_of_all(sets: CandidateSets) -> None:
    users = DATA.holdouts("test").first_users(5)
    some = retrieve_candidates(DATA, "test", SECTION, seed=0, users=frozenset(users))
    assert some.sets == {name: items for name, items in sets.sets.items() if name.partition("|")[0] in users}
    assert len(some.sets) >= 5 < len(sets.sets)


def test_training_lists_come_from_a_retriever_without_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[set[str]] = []
    original_fit, original_scores = ItemKNN.fit, ItemKNN.scores

    def fit(self: ItemKNN, data: SplitDataset) -> None:
        learned.append(set(data.train["user_id"]))
        original_fit(self, data)

    def scores(self: ItemKNN, requests: list[Request]) -> Any:
        assert not learned[-1] & {request.user_id for request in requests}
        return original_scores(self, requests)

    monkeypatch.setattr(ItemKNN, "fit", fit)
    monkeypatch.setattr(ItemKNN, "scores", scores)
    lists = RetrievedCandidates(DATA, SECTION, 0)
    training_lists = {user: lists.of(user) for user in DATA.users()}
    assert len(learned) == 5 and sum(map(len, training_lists.values())) > 0
    for user, user_lists in training_lists.items():
        events = DATA.train_events(user)
        for at, items in user_lists:
            assert len(set(items)) == 8 and events[at].item_id in items
            assert not {event.item_id for event in events[:at]} & set(items)
    monkeypatch.undo()
    other = RetrievedCandidates(with_random_holdouts(with_random_holdouts(DATA, "valid", 1), "test", 2), SECTION, 0)
    assert training_lists == {user: other.of(user) for user in DATA.users()}
    assert all(len(items) == 8 for items in lists.held().values()) and lists.held()


def test_rejects_training_lists_of_a_retriever_with_early_stopping() -> None:
    unsupported = Facts("unsupported", column="eval.candidates.retriever", says="choose another retriever")
    for name in ("sasrec", "gru4rec", "transitions-tuned", "state-tower"):
        with raises(RecipeError, unsupported):
            RetrievedCandidates(DATA, CandidateSection(kind="retrieved", retriever=name, count=8), 0).of(
                next(iter(DATA.users()))
            )


def test_validation_rows_have_retrieved_candidates(lists: RetrievedCandidates) -> None:
    held = lists.held()
    rows = list(make_task("direct", DATA, lists=lists).examples("valid"))
    assert 0 < len(rows) == len(held) < len(DATA.holdouts("valid"))
    for row in rows:
        (item,) = [item for _, item in row.pairs[-1:]]
        assert {item, *row.negatives} == set(held[row.id.removeprefix("direct/valid/")])


def test_training_rows_have_retrieved_candidates(lists: RetrievedCandidates) -> None:
    task = make_task("direct", DATA, lists=lists)
    rows = list(islice(task.examples("train"), 60))
    answers = set()
    for row in rows:
        (item,) = [item for user, item in row.pairs[-1:]]
        candidates = {frozenset(items) for _, items in lists.of(row.user_id)}
        assert frozenset((item, *row.negatives)) in candidates
        answers.add(row.answer[-1].text if row.answer else "")
    # The position of the target among the candidates is random.
    assert len(answers) >= 6
    assert all(question.candidates and len(question.candidates) == 8 for question in task.questions(10))

    class Nothing:
        def of(self, user: str) -> list[tuple[int, tuple[str, ...]]]:
            return []

        def held(self) -> dict[str, tuple[str, ...]]:
            return {}

    with raises(DataError, Facts("too-few", column="eval.candidates", says="the retriever finds no target")):
        next(make_task("direct", DATA, lists=Nothing()).examples("train"))


def test_equal_scores_are_drawn_at_random() -> None:
    sets = retrieve_candidates(DATA, "test", CandidateSection(kind="retrieved", retriever="random", count=8), seed=0)
    drawn_items = {item for items in sets.sets.values() for item in items}
    assert len(drawn_items) == len(DATA.dataset.items)
    assert (
        retrieve_candidates(DATA, "test", CandidateSection(kind="retrieved", retriever="random", count=8), seed=0)
        == sets
    )


def test_ceiling_counts_targets_among_their_candidates(sets: CandidateSets) -> None:
    held = DATA.holdouts("test")
    inside = sum(one.item_id in sets.sets[request_id(one.user_id, one.item_id)] for one in held)
    targets = {request_id(one.user_id, one.item_id): one.item_id for one in held}
    assert 0 < inside < len(held) and candidate_recall(sets, targets) == inside / len(held)
    (lost,) = [(name, item) for name, item in targets.items() if item not in sets.sets[name]][:1]
    assert candidate_recall(sets, dict([lost])) == 0


def test_rejects_contradicting_options() -> None:
    with raises(RecipeError, Facts("unknown-name", column="eval.candidates.retriever", says="item-knn")):
        retrieve_candidates(DATA, "test", CandidateSection(kind="retrieved", retriever="item-kn"), seed=0)
    for options in ({"kind": "retrieved"}, {"kind": "uniform", "retriever": "item-knn"}):
        with pytest.raises(ValueError, match=r"eval\.candidates\.retriever"):
            CandidateSection.model_validate(options)


NAMED = tuple(
    BaselineSection(name=name) for name in ("random", "popularity", "item-knn", "markov-1", "transitions", "sasrec")
)
MANY = make_split(make_dataset(users=99))
FUSION = EnsembleRetriever(NAMED, 0.5, 0)
FUSED_SECTION = CandidateSection(kind="retrieved", retriever="fusion", count=8)


def test_fusion_retrieves_its_best_items() -> None:
    ((model, users),) = FUSION.fitted(MANY, "test")
    assert isinstance(model, CatalogueEnsemble) and users is None
    # Neither the random baseline nor one with early stopping is a member.
    assert model.names == ("popularity", "item-knn", "markov-1", "transitions")
    sets = retrieve_candidates(MANY, "test", FUSED_SECTION, seed=0, finder=FUSION)
    assert sets.kind == "retrieved-fusion"
    for held in MANY.holdouts("test")[:20]:
        request = Request(id="r", user_id=held.user_id, history=MANY.history(held.user_id, "test"))
        (row,) = model.scores([request])
        known = dict(zip(model.items, row.tolist(), strict=True))
        seen = {event.item_id for event in request.history}
        chosen = set(sets.sets[request_id(held.user_id, held.item_id)])
        rest = [score for item, score in known.items() if item not in seen | chosen]
        assert len(chosen) == 8 and min(known[item] for item in chosen) >= max(rest)


def test_validation_users_do_not_weight_their_fusion() -> None:
    (one, first), (two, second) = FUSION.fitted(MANY, "valid")
    users = {held.user_id for held in MANY.holdouts("valid")}
    assert first and second and not first & second and first | second == users
    changed = replace(MANY, valid=MANY.valid.filter(~pl.col("user_id").is_in(list(first))))
    assert one.fitted == FUSION.fitted(changed, "test")[0][0].fitted  # type: ignore[attr-defined]
    assert one.tried != two.tried  # type: ignore[attr-defined]


def test_training_lists_of_a_fusion_ignore_held_out_data() -> None:
    original = RetrievedCandidates(MANY, FUSED_SECTION, 0, FUSION)
    other = RetrievedCandidates(
        with_random_holdouts(with_random_holdouts(MANY, "valid", 1), "test", 2), FUSED_SECTION, 0, FUSION
    )
    lists = {user: original.of(user) for user in MANY.users()}
    assert any(lists.values())
    assert lists == {user: other.of(user) for user in MANY.users()}
    parts = {user: n % 5 for n, user in enumerate(MANY.users())}
    model = FUSION.apart(MANY, parts, 0)
    inside = [user for user, part in parts.items() if part == 0]
    without = replace(MANY, train=MANY.train.filter(~pl.col("user_id").is_in(inside)))
    requests = [Request(id="r", user_id=inside[0], history=MANY.train_events(inside[0])[:3])]
    assert np.array_equal(model.scores(requests), FUSION.apart(without, parts, 0).scores(requests))


def test_rejects_fusion_with_too_few_users() -> None:
    facts = Facts("too-few", column="eval.candidates.retriever", says="a single retriever")
    with raises(DataError, facts):
        RetrievedCandidates(DATA, FUSED_SECTION, 0, FUSION).of(next(iter(DATA.users())))
    with raises(DataError, facts):
        FUSION.fitted(replace(MANY, valid=MANY.valid.clear()), "test")
    with raises(DataError, facts):
        FUSION.apart(MANY, dict.fromkeys(MANY.users(), 3), 3)


def test_recipe_with_fusion_retriever(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    MANY.dataset.interactions.select("user_id", "item_id", "rating", "timestamp").write_csv(table)
    page = tmp_path / "recipe.yaml"
    text = (
        f"name: fused\ndata: {{source: table, path: {table}, columns: {{rating: rating, time: timestamp}}}}\n"
        "tasks: {direct: {strategies: [label], baselines: [random, popularity, item-knn, markov-1]}}\n"
        "eval: {arms: [zero-shot], candidates: {kind: retrieved, retriever: fusion, count: 8}}\n"
    )
    page.write_text(text, encoding="utf-8")
    study = build_study(load_recipe(str(page)))
    assert study.candidates is not None and study.candidates.kind == "retrieved-fusion"
    row = next(study.tasks["direct"].examples("train"))
    assert len(row.negatives) == 7
    alone = EnsembleRetriever(NAMED[:2] + NAMED[-1:], 0.5, 0)
    with raises(RecipeError, Facts("contradiction", column="eval.candidates.retriever", says="at least two baselines")):
        alone.fitted(MANY, "test")


def test_run_reports_the_ceiling(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    rows = DATA.dataset.interactions.select("user_id", "item_id", "rating", "timestamp")
    rows.write_csv(table)
    page = tmp_path / "recipe.yaml"
    page.write_text(
        f"name: two\ndata: {{source: table, path: {table}, columns: {{rating: rating, time: timestamp}}}}\n"
        "tasks: {direct: {strategies: [label, two-step], templates: [], eval_templates: [with-profile]}}\n"
        "eval: {arms: [zero-shot], backend: fake, scorer: fake, users: 30, bootstrap: 50,\n"
        "  candidates: {kind: retrieved, retriever: item-knn, count: 8}}\n",
        encoding="utf-8",
    )
    result = run(load_recipe(str(page)), tmp_path / "out", quiet=True)
    results = result.results
    ceiling_ = results["candidates"]["main"]["ceiling"]
    assert results["candidates"]["main"]["kind"] == "retrieved-item-knn" and 0 < ceiling_ < 1
    lines = {row["predictor"]: row for row in results["rows"]}
    assert {"label", "two-step", "item-knn"} <= set(lines)
    for row in lines.values():
        # All eight candidates are among the first ten, so HR@10 reaches the ceiling.
        assert row["metrics"]["HR@10"]["value"] == pytest.approx(ceiling_)
        assert "retrieved-item-knn-8" in row["metrics"]["HR@10"]["signature"]
    # The hit rate of a random order of eight candidates, times the ceiling.
    assert lines["random"]["metrics"]["HR@1"]["value"] == pytest.approx(ceiling_ / 8)
    assert f"These contain {ceiling_:.1%} of the targets" in " ".join(results["notes"])
    audit = json.loads((tmp_path / "out" / "audit.json").read_text(encoding="utf-8"))
    assert not [check for check in audit["checks"] if check["verdict"] == "leak"]
    page_text = result.report.read_text(encoding="utf-8")
    assert "% with the target" in page_text
