"""A task, a strategy and a baseline outside llmrec: each is a class and an entry in the registry.

The task also has a `Family` record and templates. It asks whether an item is in the more popular half of the catalogue.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from pydantic import Field

from llmrec import registry
from llmrec.baselines.base import Baseline
from llmrec.data.split import SplitDataset, request_of
from llmrec.entries import BaselineEntry, StrategyEntry
from llmrec.errors import RecipeError
from llmrec.pipeline import run as pipeline
from llmrec.prompts.template import Template
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import BaselineSection, Recipe, Section, TaskSection, default_baselines
from llmrec.strategies.raters import YesNoJudge
from llmrec.tasks.base import ABOUT_ITEM, ABOUT_USER, NO, USER_STATS, YES, DataView, iterate_user_passes
from llmrec.tasks.cases import held_out_interactions
from llmrec.tasks.ctr import parse_choice
from llmrec.tasks.family import Family
from llmrec.tasks.fewshot import FewShotDraw
from llmrec.tasks.rows import chat_example
from llmrec.tasks.task import Task, TaskInputs, Want
from llmrec.tasks.templates import select_task_templates
from llmrec.types import Answer, Case, Event, Example, Probability, Prompt, Request, SplitName
from tests.facts import Facts, raises

pytest.importorskip("trl", reason="the train extra is not installed")

TEMPLATE = """\
family: fame
name: ask
version: 1
use: seen
shape: chat
system: You know what sells.
user: "Do many people choose {{ item.title }}? Answer with Yes or No."
target: "{{ answer }}"
"""


class FameSection(TaskSection):
    """Section of the task ``fame``."""

    strategies: tuple[str, ...] = ("yes-no",)
    baselines: tuple[BaselineSection, ...] = default_baselines("like-ratio")


class FameTask(Task):
    """The task ``fame``: whether an item is popular."""

    family = "fame"

    def __init__(self, section: FameSection, inputs: TaskInputs) -> None:
        self._data, self._seed = inputs.data, inputs.seed
        self._chosen = select_task_templates(self.family, section, inputs.templates, inputs.index)
        self._view = DataView(inputs.data, inputs.index)
        for template in inputs.templates.values():
            template.check(turns=ABOUT_USER | ABOUT_ITEM | USER_STATS, lead=(), target={"answer"})
        counts = inputs.data.train["item_id"].value_counts().sort("count", "item_id", descending=True)
        self._famous = frozenset(counts["item_id"][: len(counts) // 2])

    def examples(self, split: SplitName, limit: int | None = None) -> Iterator[Example]:
        if split == "valid":
            for held in held_out_interactions(self._data, "valid")[:limit]:
                yield self._example(f"fame/valid/{held.user_id}", held.user_id, held.item_id)
            return
        for row, user, rng in iterate_user_passes(self.family, list(self._data.users()), self._seed, limit):
            yield self._example(row, user, rng.choice(self._data.train_events(user)).item_id)

    def cases(self, split: SplitName) -> list[Case]:
        return [
            Case(
                request=request_of(self._data, held, split, item=held.item_id),
                truth=float(held.item_id in self._famous),
            )
            for held in held_out_interactions(self._data, split)
        ]

    def prompt(self, request: Request, *, template: str, shots: int = 0, want: Want = "one") -> Prompt:
        values = self._view.user(request.user_id) | self._view.pair(request.user_id, str(request.item))
        return Prompt(messages=self._chosen.get(template).turns(values))

    def draw_shots(self, request: Request, shots: int) -> FewShotDraw:
        return FewShotDraw((), ())

    def continuations(self, request: Request, *, template: str) -> tuple[str, ...]:
        return YES, NO

    def parse(self, completion: str, request: Request, *, template: str) -> Answer | None:
        choice = parse_choice(completion, (YES, NO))
        return None if choice is None else Probability(request_id=request.id, value=1.0 - choice)

    def reward(self, answer: Answer, case: Case) -> float:
        return 0.0

    def shows(self, template: Template, shots: int) -> str:
        return "the item alone"

    def training_size(self) -> int:
        return len(self._data.train)

    def _example(self, row: str, user: str, item: str) -> Example:
        values = self._view.user(user) | self._view.pair(user, item)
        answer = values | {"answer": YES if item in self._famous else NO}
        return chat_example(self._chosen.train[0], row, user, values, answer, past=(), event=Event(item_id=item))


class ShyJudge(YesNoJudge):
    """The strategy ``shy``: the mean of the probability and 0.5."""

    name = "shy"

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return [replace(each, value=(each.value + 0.5) / 2) for each in super().answer(requests)]  # type: ignore[union-attr, type-var]


class HalfConfig(Section):
    """Parameters of `Half`."""

    value: float = Field(0.5, ge=0, le=1, description="the probability")


class Half(Baseline[HalfConfig, float]):
    """The baseline ``half``: the same probability for each item."""

    name = "half"
    Config = HalfConfig

    def learn(self, data: SplitDataset) -> None:
        self._model = self._config.value

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return [Probability(request_id=request.id, value=self._fitted) for request in requests]


FAME: Family


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("prompts") / "fame"
    folder.mkdir()
    (folder / "ask.yaml").write_text(TEMPLATE)
    global FAME
    FAME = Family(
        name="fame",
        title="What many choose",
        task=FameTask,
        section=FameSection,
        answer=Probability,
        headline="AUC",
        strategies=("yes-no", "shy"),
        baselines=("like-ratio", "half"),
        controls=("like-ratio",),
        prompts=folder,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.TASKS, "fame", f"{__name__}:FAME")  # type: ignore[arg-type]
        patch.setitem(registry.STRATEGIES, "shy", StrategyEntry(f"{__name__}:ShyJudge", ("fame",)))  # type: ignore[arg-type]
        patch.setitem(registry.BASELINES, "half", BaselineEntry(f"{__name__}:Half", ("fame",)))  # type: ignore[arg-type]
        yield


def recipe(folder: Path, *more: str) -> Recipe:
    return load_recipe(
        "recipes/movielens-100k/four-tasks.yaml",
        [
            f"model.name={folder}", "model.dtype=float32", "reviews=null",
            "tasks={fame: {users: 12, strategies: [yes-no, shy], baselines: [like-ratio, {name: half, value: 0.4}]}}",
            "data={source: made-reviews, noun: products, split: {kind: last_share, valid: 0.2, test: 0.4}}",
            "train.steps=3", "train.batch_tokens=512", "train.valid_rows=4", "train.lora.top_layers=1",
            "eval.arms=[zero-shot, tuned]", "eval.bootstrap=50", "eval.backend=hf",
            "eval.fusion={}", *more,
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(known: None, llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Run:
    return pipeline.run(recipe(llama_folder), tmp_path_factory.mktemp("run") / "r", quiet=True)


def test_new_task_trains_and_evaluates(done: pipeline.Run) -> None:
    rows = {row["id"]: row for row in json.loads((done.folder / "results.json").read_text())["rows"]}
    tasks = [f"fame/{arm}/{strategy}/ask" for arm in ("zero-shot", "tuned") for strategy in ("yes-no", "shy")]
    assert set(rows) == {"fame/baseline/like-ratio", "fame/baseline/half(value=0.4)", "fame/baseline/fusion", *tasks}
    assert all(row["metrics"]["AUC"]["value"] is not None and row["parse_rate"] == 1.0 for row in rows.values())
    assert rows["fame/baseline/half(value=0.4)"]["metrics"]["AUC"]["value"] == 0.5
    predictions = pl.read_parquet(done.folder / "predictions.parquet")
    plain, shy = (predictions.filter(pl.col("row_id") == f"fame/tuned/{name}/ask") for name in ("yes-no", "shy"))
    assert [json.loads(p) for p in shy["parsed"]] == [pytest.approx((json.loads(p) + 0.5) / 2) for p in plain["parsed"]]
    assert rows["fame/tuned/yes-no/ask"]["inputs"] == "the item alone"
    assert json.loads((done.folder / "results.json").read_text())["training"]["rows"]["fame"] > 0
    assert "What many choose" in done.report.read_text()


def test_new_task_is_audited(done: pipeline.Run) -> None:
    audit = json.loads((done.folder / "audit.json").read_text())
    names = {check["name"] for check in audit["checks"]}
    assert {"training rows of fame", "questions of fame"} <= names and audit["leaks"] == 0


def test_rejects_unknown_keys_of_new_task(known: None, llama_folder: Path) -> None:
    with raises(
        RecipeError,
        Facts("unknown-key", "recipes/movielens-100k/four-tasks.yaml", column="tasks.fam", says="did you mean 'fame'"),
    ):
        load_recipe("recipes/movielens-100k/four-tasks.yaml", ["tasks.fam={}"])
    with raises(RecipeError, Facts("unknown-key", "recipes/movielens-100k/four-tasks.yaml", column="tasks.usres")):
        recipe(llama_folder, "tasks={fame: {usres: 3}}")
