"""Ids are names: what a user is asked, and every score of the answers, is the same under others."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from llmrec.backends.encode import Encoder
from llmrec.backends.fake import FakeBackend
from llmrec.backends.hf.backend import HFBackend
from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset, split
from llmrec.models.load import load_model, load_tokenizer
from llmrec.prompts.template import load_templates
from llmrec.recipe.schema import (
    CtrSection,
    DirectSection,
    ExplanationSection,
    ModelSection,
    RatingSection,
    SequentialSection,
    Split,
)
from llmrec.tasks.ctr import CtrTask
from llmrec.tasks.direct import DirectTask
from llmrec.tasks.explanation import ExplanationTask
from llmrec.tasks.rating import RatingTask
from llmrec.tasks.sequential import SequentialTask
from llmrec.types import Backend, Item, Prompt, Request
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
    """Twelve users whose interactions have a time each: ties would be broken by a hash of ids."""
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
    made = Dataset(name="small", noun="films", interactions=frame, items=items, rating_scale=(1.0, 5.0))
    return split(made, Split(), seed=0)


def asked(family: str, name: Name) -> tuple[list[Prompt], list[tuple[str, ...]]]:
    """What every user is asked about the same items, and the answers that are weighed."""
    known = data(name)
    task, section, wanted = TASKS[family]
    templates = load_templates(family)
    template = wanted if wanted in templates else next(iter(templates))
    made = make(task, known, section(templates=(template,)), templates, seed=0)
    prompts, answers = [], []
    for user in range(12):
        history = tuple(known.history(name(f"u{user}"), "test"))
        seen = {event.item_id for event in history}
        others = tuple(name(f"i{n}") for n in range(40) if name(f"i{n}") not in seen)[:6]
        request = Request(id=str(user), user_id=name(f"u{user}"), history=history, item=others[0], candidates=others)
        prompts.append(made.prompt(request, template=template))
        answers.append(made.continuations(request, template=template) if family != "explanation" else ("good", "bad"))
    return prompts, answers


@pytest.fixture(scope="module", params=["fake", "hf"])
def backend(request: pytest.FixtureRequest, llama_folder: Path) -> Backend:
    if request.param == "fake":
        return FakeBackend()
    section = ModelSection(name=str(llama_folder), dtype="float32")
    encoder = Encoder(load_tokenizer(str(llama_folder), section), max_length=2048)
    return HFBackend(load_model(str(llama_folder), section), encoder)


@pytest.mark.parametrize("family", TASKS)
def test_other_names_change_no_question_and_no_score(family: str, backend: Backend) -> None:
    prompts, answers = asked(family, as_is)
    renamed, same = asked(family, reversed_in_order)
    assert [prompt.messages for prompt in renamed] == [prompt.messages for prompt in prompts]
    assert renamed == prompts and same == answers
    scores = [found.logprobs for found in backend.score(prompts, answers)]
    assert [found.logprobs for found in backend.score(renamed, same)] == scores
    assert len(set(scores)) > 6
