"""Every shipped template, byte for byte.

After an intended change raise the template's version and run once with LLMREC_UPDATE_GOLDEN=1.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import polars as pl
import pytest
from task_data import CLASSES, EVERY

from llmrec.data.candidates import sample_candidates
from llmrec.data.dataset import Dataset, Review
from llmrec.data.split import SplitDataset, split_dataset
from llmrec.index.table import ItemIndex, level_token
from llmrec.prompts.template import load_templates as read_templates
from llmrec.recipe.schema import CandidateSection, Split
from llmrec.tasks.direct import asks_for, default_strategy_for
from llmrec.tasks.held_items import sample_held_candidates, select_held_items
from llmrec.tasks.rating import is_training_only
from llmrec.types import Event, Item, Message, Prompt, Request, Segment
from tests.tasks.making import make

GOLDEN = Path(__file__).parent.parent / "golden"
load_templates = cache(read_templates)
NAMES = [(family, name) for family in EVERY for name in load_templates(family)]
CODES = ItemIndex(
    "made",
    {str(n): (level_token(0, n % 3), level_token(1, n // 3)) for n in range(10)},
    tokens=tuple(level_token(level, n) for level in range(2) for n in range(4)),
)
FILMS = ("Heat", "Alien", "Brazil", "Jaws", "Fargo", "Rocky", "Casino", "Big", "Manhattan", "Ed Wood")


@cache
def small() -> SplitDataset:
    rows = []
    for user in range(4):
        for when in range(8):
            film = (user * 3 + when) % len(FILMS)
            rows.append(
                (f"{user}", f"{film}", float(1 + (user + when) % 5), float(when), f"{FILMS[film]} moved user {user}.")
            )
    items = {
        str(i): Item(item_id=str(i), title=title, fields={"genres": "Drama" if i % 2 else "", "year": str(1970 + i)})
        for i, title in enumerate(FILMS)
    }
    data = Dataset(
        name="golden",
        noun="films",
        interactions=pl.DataFrame(rows, schema=["user_id", "item_id", "rating", "timestamp", "text"], orient="row"),
        items=items,
        users={"0": {"age": "24", "occupation": "technician"}, "1": {"age": "31"}},
        rating_scale=(1.0, 5.0),
        reviews={
            (user, item): Review(
                text=f"I saw it twice. {text} The music stays with me.", headline=f"Seen by {user}", phrases=("music",)
            )
            for user, item, _, _, text in rows
        },
    )
    return split_dataset(data, Split(), seed=0)


def show(messages: tuple[Message, ...], answer: tuple[Segment, ...]) -> str:
    parts = [f"[{message.role}]\n{message.text}\n" for message in messages]
    ends = {"text": ("", ""), "item": ("", ""), "given": ("", ""), "target": ("«", "»")}
    parts.append("[answer]\n" + "".join(f"{ends[s.kind][0]}{s.text}{ends[s.kind][1]}" for s in answer) + "\n")
    return "".join(parts)


def rendering(family: str, name: str) -> str:
    data = small()
    task_class, section = CLASSES[family]
    template = load_templates(family)[name]
    asks_of_items = family == "alignment"
    asks = asks_for(template) if family == "direct" else ""
    settings = {"held_out": 0.5} if asks_of_items else {}
    if family == "direct":
        settings = {"eval_templates": (name,), "strategies": (default_strategy_for(template),)}
    only_learned = family == "rating" and is_training_only(template)
    if only_learned:
        settings = {"eval_templates": ("name-item",)}
    held = select_held_items(data.dataset.items, 0.5, seed=0)
    drawn = sample_candidates(data, "test", CandidateSection(count=3), seed=0)
    sets = sample_held_candidates(held, "test", count=2, seed=0) if asks_of_items else drawn
    trained = {"templates": (name,)} if template.use != "unseen" else {}
    index = {"index": CODES} if template.writes_codes else {}
    task = make(
        task_class,
        data, section(history=3, **trained, **settings), load_templates(family), seed=0,
        candidates=sets if family in ("direct", "sequential", "alignment") else None, **index,
    )  # fmt: skip
    case = next(case for case in task.cases("test") if case.request.user_id == "0" or asks_of_items)
    pool = ("3", "1", "2")
    if asks == "yes":
        case, pool = replace(case, request=replace(case.request, candidates=case.request.candidates[:1])), pool[:1]
    known = () if family != "sequential" else (Event(item_id="5"),)
    context = {"review": "Too long, and yet."} if family in ("review", "stars") else {}
    bare = Request(id="bare", user_id="nobody", item="3", candidates=pool, history=known, context=context)
    prompts: list[tuple[str, Prompt]] = []
    if not only_learned:
        prompts = [
            ("request", task.prompt(case.request, template=name)),
            ("request of a stranger", task.prompt(bare, template=name)),
            ("request with one shot", task.prompt(case.request, template=name, shots=1)),
        ]
    if asks == "yes":
        prompts.append(("request with two shots", task.prompt(case.request, template=name, shots=2, want="yes")))
    if asks == "label":
        prompts.append(("request for a ranking", task.prompt(case.request, template=name, shots=1, want="ranking")))
        alone = replace(case.request, candidates=case.request.candidates[:1])
        prompts.append(("request for a yes", task.prompt(alone, template=name, shots=2, want="yes")))
    parts = [f"{template.id} version {template.version}, {template.use}, {template.shape}\n"]
    if template.use != "unseen":
        row = next(row for row in task.examples("train") if row.user_id == "0" or asks_of_items)
        parts.append(f"===== training row, {'closed' if row.ends_turn else 'open'}\n" + show(row.messages, row.answer))
    parts += [f"===== {title}, stops at {p.stop!r}\n" + show(p.messages, p.answer_prefix) for title, p in prompts]
    if prompts:
        parts.append(f"===== continuations\n{task.continuations(case.request, template=name)!r}\n")
    return "".join(parts)


@pytest.mark.parametrize(("family", "name"), NAMES)
def test_golden(family: str, name: str) -> None:
    file = GOLDEN / f"{family}.{name}.txt"
    text = rendering(family, name).encode()
    if os.environ.get("LLMREC_UPDATE_GOLDEN") == "1":
        file.write_bytes(text)
    assert file.read_bytes() == text, f"{file.name} changed; raise the template's version, then LLMREC_UPDATE_GOLDEN=1"


def test_no_golden_file_is_left_over() -> None:
    assert {file.name for file in GOLDEN.glob("*.txt")} == {f"{family}.{name}.txt" for family, name in NAMES}
