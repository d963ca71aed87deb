"""Renaming users and items does not change prompts and continuations."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import polars as pl
import pytest

from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset, split_dataset
from llmrec.prompts.template import load_templates
from llmrec.recipe.schema import (
    CtrSection,
    DirectSection,
    ExplanationSection,
    RatingSection,
    SequentialSection,
    Split,
)
from llmrec.tasks.ctr import CtrTask
from llmrec.tasks.direct import DirectTask
from llmrec.tasks.explanation import ExplanationTask
from llmrec.tasks.rating import RatingTask
from llmrec.tasks.sequential import SequentialTask
from llmrec.types import Item, Prompt, Request
from tests.tasks.making import make

Name = Callable[[str], str]
TASKS: dict[str, tuple[Any, Any, str]] = {
    "rating": (RatingTask, RatingSection, "list-ratings"),
    "sequential": (SequentialTask, SequentialSection, "continue-list"),
    "direct": (DirectTask, DirectSection, "pick-letter"),
    "explanation": (ExplanationTask, ExplanationSection, "likely-words"),
    "ctr": (CtrTask, CtrSection, "list-likes"),
}


def as_is(name: str) -> str:
    return name


def reversed_in_order(name: str) -> str:
    """Another alphabet and the opposite order."""
    return f"{name[0].upper()}-{999 - int(name[1:]):03d}"


def data(name: Name) -> SplitDataset:
    """Return twelve users whose interactions have distinct times; ties would be broken by a hash of ids."""
    rng, clock = random.Random(3), 0
    rows = []
    for user in range(12):
        for item in rng.sample(range(40), 12):
            clock += 1
            rows.append((name(f"u{user}"), name(f"i{item}"), float(rng.randint(1, 5)), float(clock), f"words {clock}"))
    schema = ["user_id", "item_id", "rating", "timestamp", "text"]
    items = {
        name(f"i{n}"): Item(item_id=name(f"i{n}"), title=f"Film {n}", fields={"year": str(1950 + n)}) for n in range(40)
    }
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    dataset = Dataset(name="small", noun="films", interactions=frame, items=items, rating_scale=(1.0, 5.0))
    return split_dataset(dataset, Split(), seed=0)


def questions(family: str, name: Name) -> tuple[list[Prompt], list[tuple[str, ...]]]:
    """Return the prompts of all users about the same items, and their continuations."""
    known = data(name)
    kind, section, preferred = TASKS[family]
    templates = load_templates(family)
    template = preferred if preferred in templates else next(iter(templates))
    task = make(kind, known, section(templates=(template,)), templates, seed=0)
    prompts, answers = [], []
    for user in range(12):
        history = tuple(known.history(name(f"u{user}"), "test"))
        seen = {event.item_id for event in history}
        others = tuple(name(f"i{n}") for n in range(40) if name(f"i{n}") not in seen)[:6]
        request = Request(id=str(user), user_id=name(f"u{user}"), history=history, item=others[0], candidates=others)
        prompts.append(task.prompt(request, template=template))
        answers.append(task.continuations(request, template=template) if family != "explanation" else ("good", "bad"))
    return prompts, answers


@pytest.mark.parametrize("family", TASKS)
def test_other_ids_change_no_question(family: str) -> None:
    prompts, answers = questions(family, as_is)
    assert questions(family, reversed_in_order) == (prompts, answers)
    assert len(set(prompts)) > 6
