"""A prompt as a model was tuned on, about invented items: a model card must show one and may show no data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import polars as pl

from llmrec.backends.encode import Encoder
from llmrec.data.dataset import Dataset, Review
from llmrec.data.split import SplitDataset, split
from llmrec.exports.snippets import Example
from llmrec.index.table import ItemIndex
from llmrec.prompts.template import Template
from llmrec.recipe.schema import (
    Split,
    TaskSection,
)
from llmrec.registry import family_names
from llmrec.tasks.direct import asks_for
from llmrec.tasks.family import family_of
from llmrec.tasks.task import Task, TaskInputs
from llmrec.types import Event, Item, Prompt, Request

_TITLES = ("The First Example", "A Second Example", "Third Time Lucky", "Four of a Kind", "Five Fables", "Sixth Sense")
_USER = "example"
_SAID = "It does what it says."
_LABEL_TOKENS = 8
_TITLE_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt about invented items: its family, the longest answer in tokens, and the titles in it."""

    family: str
    prompt: Prompt
    max_tokens: int
    history: tuple[str, ...]
    candidates: tuple[str, ...]


def sample_prompt(
    sections: Mapping[str, TaskSection],
    templates: Mapping[str, Mapping[str, Template]],
    *,
    noun: str,
    scale: tuple[float, float] | None,
    seed: int,
    index: ItemIndex | None = None,
) -> Sample:
    """Render the first family that a chat server can be asked, else the first family.

    Args:
        sections: The tuned families.
        templates: Their templates, by family and name.
        noun: What items are called.
        scale: Lowest and highest rating, where there are ratings.
        seed: Of the recipe.
        index: Whose codes stand for the invented items, where it was tuned on codes.
    """
    data = _invented(noun, scale or (1.0, 5.0))
    codes = _lent(index, data.dataset.items) if index is not None else None
    tasks: dict[str, Task] = {}
    for name in sorted(sections, key=_first):
        inputs = TaskInputs(data=data, templates=templates[name], seed=seed, index=codes)
        tasks[name] = family_of(name).task(sections[name], inputs)

    def shape(family: str) -> str:
        return templates[family][tasks[family].eval_templates[0]].shape

    family = next((family for family in tasks if shape(family) == "chat"), next(iter(tasks)))
    task, own = tasks[family], family_of(family)
    template = templates[family][task.eval_templates[0]]
    asks = asks_for(template) if own.lists else None
    items = list(data.dataset.items)
    request = Request(
        id=_USER,
        user_id=_USER,
        history=tuple(Event(item_id=item, rating=rating) for item, rating, *_ in _rows(scale or (1.0, 5.0))[:3]),
        # A yes or no is asked about one of them.
        candidates=tuple(items[3:4] if asks == "yes" else items[3:]) if own.ranks_for_users else None,
        item=None if own.ranks_for_users else items[3],
        context={"review": _SAID},
    )
    titled = asks == "item" if own.lists else own.answers_with_items
    longest = _TITLE_TOKENS if titled else _LABEL_TOKENS
    ranks = any(family_of(name).ranks_for_users for name in tasks)
    return Sample(
        family=family,
        prompt=task.prompt(request, template=template.name),
        max_tokens=task.strategy_options.get("max_tokens", longest),
        history=_TITLES[:3],
        candidates=_TITLES[3:] if ranks else (),
    )


def _first(name: str) -> tuple[bool, bool, int]:
    """Order families: chat servers take chat templates as they are, which lists of candidates have."""
    family = family_of(name)
    return not family.lists, not family.ranks_for_users, family_names().index(name)


def _lent(index: ItemIndex, items: Mapping[str, Item]) -> ItemIndex:
    """Return an index of the invented items: their own titles, or codes of the real index, which say nothing alone."""
    if index.scheme == "title":
        return ItemIndex("title", {}).extend(items)
    codes = sorted(index.codes.values())[: len(items)]
    if len(codes) < len(items):
        return index.extend(items)
    return replace(index, codes=dict(zip(items, codes, strict=True)))


def example_of(sample: Sample, encoder: Encoder) -> Example:
    """Return a sample as the snippets show it: as chat turns where the chat template takes them as they are."""
    prompt = sample.prompt
    messages = [{"role": message.role, "content": message.text} for message in prompt.messages]
    template = encoder.tokenizer.chat_template or ""
    thinking = "enable_thinking" in str(template)
    try:
        switch = {"enable_thinking": False} if thinking else {}
        shown = encoder.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **switch)
    except Exception:  # templates raise what they like, for instance at a system turn
        shown = None
    fits = bool(template) and shown == encoder.turns_text(prompt.messages)
    return Example(
        family=sample.family,
        messages=tuple((turn["role"], turn["content"]) for turn in messages) if fits else (),
        given="".join(segment.text for segment in prompt.answer_prefix),
        text=encoder.text(prompt),
        stop=prompt.stop,
        max_tokens=sample.max_tokens,
        thinking=thinking,
        history=sample.history,
        candidates=sample.candidates,
    )


def _rows(scale: tuple[float, float]) -> list[tuple[str, float, float, str]]:
    """Return (item, rating, time, text), oldest first."""
    low, high = scale
    return [(f"i{n}", high if n % 2 else low, float(n), _SAID) for n in range(1, len(_TITLES) + 1)]


def _invented(noun: str, scale: tuple[float, float]) -> SplitDataset:
    rows = [(_USER, *row) for row in _rows(scale)]
    columns = ["user_id", "item_id", "rating", "timestamp", "text"]
    items = {f"i{n}": Item(item_id=f"i{n}", title=title) for n, title in enumerate(_TITLES, 1)}
    dataset = Dataset(
        name="example",
        noun=noun,
        interactions=pl.DataFrame(rows, schema=columns, orient="row"),
        items=items,
        rating_scale=scale,
        reviews={(_USER, item): Review(text=_SAID, headline=_SAID) for item in items},
    )
    return split(dataset, Split(), seed=0)
