"""Rows of preference training: the rejected answers of every family, which do not depend on held-out events."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from task_data import make_dataset, make_split, make_task, targets

from llmrec.baselines.retrieve import RetrievedCandidates, SingleRetriever
from llmrec.data.hashing import hash_one
from llmrec.errors import DataError, RecipeError
from llmrec.pipeline import rejecting
from llmrec.pipeline.leaks import with_random_holdouts
from llmrec.pipeline.objectives import listwise_settings
from llmrec.pipeline.rejecting import release_backend
from llmrec.pipeline.study import build_study
from llmrec.pipeline.training import training_key
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import CandidateSection, PreferenceSection
from llmrec.tasks.rows import split_rejected
from llmrec.types import Example, Request
from tests.facts import Facts, raises

DATA = make_split(make_dataset(hostile=False))
OTHER = with_random_holdouts(with_random_holdouts(DATA, "valid", 3), "test", 103)
SOURCES = [
    ("sequential", "uniform", 3),
    ("sequential", "popularity", 3),
    ("sequential", "ratings", 2),
    ("sequential", "item-knn", 3),
    ("direct", "uniform", 3),
    ("direct", "ratings", 2),
    ("rating", "uniform", 3),
    ("stars", "uniform", 3),
    ("ctr", "uniform", 1),
    ("review", "uniform", 3),
    ("explanation", "uniform", 3),
]


def task_of(family: str, rejected: str, negatives: int, data: Any = DATA) -> Any:
    section = PreferenceSection(rejected=rejected, negatives=negatives)
    hard = None
    if rejected == "item-knn":
        drawn = CandidateSection(kind="retrieved", retriever="item-knn", count=10)
        hard = RetrievedCandidates(
            data, drawn, 0, SingleRetriever("item-knn", 0, "train.preference.rejected"), others=True
        )
    return make_task(family, data, preference=section, hard=hard)


def rows_of(task: Any, count: int = 120) -> list[Example]:
    return list(islice(task.examples("train"), count))


@pytest.mark.parametrize(("family", "rejected", "negatives"), SOURCES)
def test_every_family_has_rejected_answers(family: str, rejected: str, negatives: int) -> None:
    task = task_of(family, rejected, negatives)
    assert task.listwise.size == 1 + negatives
    rows = rows_of(task)
    for row in rows:
        preferred, *others = (targets(each) for each in split_rejected(row))
        # Only one target, which no rejected answer repeats.
        assert len(preferred) == 1 and len({*map(tuple, others), tuple(preferred)}) == 1 + negatives
        assert all(
            each.messages == row.messages and each.answer[:-1] == row.answer[:-1] for each in split_rejected(row)
        )
    assert rows_of(task_of(family, rejected, negatives, OTHER)) == rows


def test_rejected_items_follow_the_rule() -> None:
    titles = {title: item for item, title in DATA.dataset.titles.items()}
    for rejected in ("uniform", "item-knn"):
        for row in rows_of(task_of("sequential", rejected, 3)):
            had = {event.item_id for event in DATA.train_events(row.user_id)}
            assert [titles[text.strip()] for text in row.rejected] == list(row.negatives)
            assert not had & set(row.negatives) and targets(row)[0].strip() == DATA.dataset.titles[row.pairs[-1][1]]
    for family in ("sequential", "direct"):
        for row in rows_of(task_of(family, "ratings", 2)):
            events = DATA.train_events(row.user_id)
            rated = {event.item_id: event.rating or 0.0 for event in events}
            order = [event.item_id for event in events]
            chosen = row.pairs[-1][1]
            lower = [item for item in row.negatives if item in rated]
            assert len(lower) == 2
            assert all(rated[item] < rated[chosen] and order.index(item) > order.index(chosen) for item in lower)


def test_hard_negatives_come_from_a_model_fitted_without_the_user() -> None:
    hard = task_of("sequential", "item-knn", 3)._rejecting.lists
    parts = {user: hash_one("retrieved lists", 0, user) % 5 for user in DATA.users()}
    assert any(hard.of(user) for user in parts)
    for part in sorted(set(parts.values())):
        model = SingleRetriever("item-knn", 0).apart(DATA, parts, part)
        for user in (user for user in parts if parts[user] == part):
            events = DATA.train_events(user)
            had = {event.item_id for event in events}
            for at, items in hard.of(user):
                (scores,) = model.scores([Request(id="r", user_id=user, history=events[:at])])
                left = {item: score for item, score in zip(model.items, scores, strict=True) if item not in had}
                best = sorted(left.values(), reverse=True)[:10]
                assert len(set(items)) == 10 and [left[item] for item in items] == best
    with raises(RecipeError, Facts("unsupported", column="train.preference.rejected", says="choose another")):
        drawn = CandidateSection(kind="retrieved", retriever="sasrec", count=10)
        RetrievedCandidates(DATA, drawn, 0, SingleRetriever("sasrec", 0, "train.preference.rejected"), others=True).of(
            DATA.users()[0]
        )


def test_users_with_few_remaining_items() -> None:
    """Lists of users with few remaining items are shorter, but at least as long as a row needs."""
    drawn = CandidateSection(kind="retrieved", retriever="item-knn", count=len(DATA.dataset.items))
    finder = SingleRetriever("item-knn", 0, "train.preference.rejected")
    user = next(user for user in DATA.users() if len(DATA.train_events(user)) > 1)
    assert not RetrievedCandidates(DATA, drawn, 0, finder, others=True).of(user)
    lists = RetrievedCandidates(DATA, drawn, 0, finder, others=True, least=3).of(user)
    assert lists and all(3 <= len(items) < drawn.count for _, items in lists)


def test_impossible_rejections_are_refused() -> None:
    with raises(RecipeError, Facts("too-large", column="train.preference.negatives", says="at most 9")):
        task_of("direct", "uniform", 10)
    with raises(RecipeError, Facts("contradiction", column="train.preference.rejected", says="eval.candidates.kind")):
        task_of("direct", "popularity", 2)
    with raises(DataError, Facts("too-few", column="train.preference.negatives", says="at most")):
        rows_of(task_of("sequential", "uniform", 58))
    with raises(DataError, Facts("too-few", column="train.preference.rejected")):
        rows_of(task_of("sequential", "ratings", 30))


PAGE = """
name: prefers
model: {{name: "{model}"}}
data: {{source: made-reviews, noun: products}}
tasks: {{{tasks}}}
train: {{{train}}}
eval: {{backend: hf, candidates: {{count: 5}}}}
"""
SEQUENTIAL = "sequential: {templates: [next-title]}"


def page(tmp_path: Path, tasks: str, train: str, model: str = "m") -> Path:
    written = tmp_path / "page.yaml"
    written.write_text(PAGE.format(tasks=tasks, train=train, model=model), encoding="utf-8")
    return written


@pytest.mark.parametrize(
    ("tasks", "train", "says"),
    [
        (SEQUENTIAL, "preference: {}", "train.start"),
        (SEQUENTIAL, "start: sft, method: full, preference: {loss: dpo}", "train.method=lora"),
        (SEQUENTIAL, "start: sft, preference: {loss: s-dpo, label_smoothing: 0.1}", "label_smoothing"),
        (SEQUENTIAL, "start: sft, preference: {loss: ipo, margin: 1}", "ipo"),
        ("rating: {strategies: [head], head: {}}", "start: sft, preference: {}", "tasks.rating.head does not compute"),
        ("direct: {templates: [which-title], strategies: [likelihood], loss: softmax}", "start: sft, preference: {}",
         "tasks.direct.loss"),
    ],
)  # fmt: skip
def test_contradicting_recipes_are_refused(tasks: str, train: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=re.escape(says)):
        load_recipe(page(tmp_path, tasks, train))


def test_contradicting_studies_are_refused(llama_folder: Path, tmp_path: Path) -> None:
    def study(tasks: str, preference: str = "") -> Any:
        train = f"start: sft, preference: {{{preference}}}"
        return build_study(load_recipe(page(tmp_path, tasks, train, str(llama_folder))))

    accepted = study(SEQUENTIAL)
    assert listwise_settings(accepted).preference == accepted.recipe.train.preference  # type: ignore[union-attr]
    with raises(RecipeError, Facts("contradiction", column="train.preference", says="encoder-decoder")):
        listwise_settings(accepted, paired=True)
    with raises(
        RecipeError,
        Facts("contradiction", column="train.preference", says="cannot be trained together with tasks.direct"),
    ):
        listwise_settings(study(f"{SEQUENTIAL}, direct: {{templates: [after-history], strategies: [label]}}"))
    with raises(RecipeError, Facts("unknown-name", column="train.preference.rejected")):
        study(SEQUENTIAL, "rejected: item-knm")
    keys = [
        training_key(study(SEQUENTIAL, changed), str(llama_folder))
        for changed in ("", "beta: 0.2", "rejected: item-knn", "negatives: 2")
    ]
    assert len(set(keys)) == 4


def test_training_key_depends_on_rejection_settings(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def study(rejected: str, exact: str = "true", templates: str = "next-title, latest-pick") -> Any:
        tasks = f"sequential: {{templates: [next-title, latest-pick], eval_templates: [{templates}]}}"
        written = page(tmp_path, tasks, f"start: sft, preference: {{rejected: {rejected}}}", str(llama_folder))
        return build_study(load_recipe(written, [f"eval.exact={exact}"]))

    studies = [
        study("beam"),
        study("beam", exact="false"),
        study("beam", templates="latest-pick, next-title"),
        study("item-knn"),
        study("item-knn", exact="false", templates="latest-pick, next-title"),
    ]
    before = [training_key(each, str(llama_folder)) for each in studies]
    assert len(set(before[:4])) == 4 and before[3] == before[4]
    monkeypatch.setattr("llmrec.registry.plugin_digest", lambda table, name: "other code" if name == "item-knn" else "")
    after = [training_key(each, str(llama_folder)) for each in studies]
    assert after[:3] == before[:3] and after[3] != before[3]


def test_start_model_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[bool] = []
    monkeypatch.setattr("llmrec.models.load.release_memory", lambda: freed.append(True))
    release_backend()
    assert not freed
    monkeypatch.setattr(rejecting, "load_backend", lru_cache(maxsize=1)(lambda folder: folder))
    rejecting.load_backend("sft")
    release_backend()
    assert freed == [True] and not rejecting.load_backend.cache_info().currsize
