"""What a language model is asked about users and items: prompts, and which interactions each of them shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmrec.data.features import FeatureKind, Pair
from llmrec.data.hashing import hash64
from llmrec.data.split import SplitDataset
from llmrec.errors import RecipeError, did_you_mean
from llmrec.prompts.template import Template, load_templates
from llmrec.recipe.schema import AugmentSection
from llmrec.tasks.base import View
from llmrec.types import Event, Prompt

FAMILY = "augment"
_USERS = frozenset({"history", "factors", "noun", "user_id", "profile"})
_ITEMS = frozenset({"item", "item_id", "fields", "factors", "noun"})


@dataclass(frozen=True)
class Asked:
    """What is asked about one user or item.

    Attributes:
        id: Whose text it becomes.
        prompt: The question.
        seen: The interactions that it shows.
    """

    id: str
    prompt: Prompt
    seen: frozenset[Pair]


def template_of(kind: FeatureKind, name: str, prompts: Sequence[str] = ()) -> Template:
    """Return a template of ``prompts/augment``, or of the recipe's own ``prompts``.

    Raises:
        RecipeError: If there is none of this name, or it shows what is not known there.
    """
    known = load_templates(FAMILY, *prompts)
    if name not in known:
        raise RecipeError(
            f"augment.{kind}s: there is no template {name!r}{did_you_mean(name, known)}; known: "
            f"{', '.join(sorted(known))}",
            kind="unknown-name",
            column=f"augment.{kind}s",
        )
    known[name].check(turns=_USERS if kind == "user" else _ITEMS, lead=(), target={"text"})
    return known[name]


def readable(data: SplitDataset, user: str) -> tuple[Event, ...]:
    """Return what a text on a user may be written from, oldest first.

    Under a split of kind ``prefix`` that is the user's beginning, which nothing else learns from; under others the
    training events, which a host that takes the text then leaves out.
    """
    return data.known_events(user) if data.kind == "prefix" else data.train_events(user)


def about_users(data: SplitDataset, section: AugmentSection, seed: int, prompts: Sequence[str] = ()) -> list[Asked]:
    """Return the questions about users who have events that may be read."""
    assert section.users is not None
    template, view = template_of("user", section.users, prompts), View(data)
    able = [user for user in data.users() if readable(data, user)]
    found = []
    for user in _some(able, section.limit, seed):
        events = readable(data, user)[-section.history :]
        values = view.user(user, {}) | {"history": view.events(events, _stars), "factors": list(section.factors)}
        seen = frozenset((user, event.item_id) for event in events)
        found.append(Asked(user, Prompt(messages=template.turns(values)), seen))
    return found


def about_items(data: SplitDataset, section: AugmentSection, seed: int, prompts: Sequence[str] = ()) -> list[Asked]:
    """Return the questions about the items of the catalogue; they show no interaction."""
    assert section.items is not None
    template, view = template_of("item", section.items, prompts), View(data)
    found = []
    for item in _some(sorted(data.dataset.items), section.limit, seed):
        values = view.about(item) | {"factors": list(section.factors), "noun": data.dataset.noun}
        values.pop("item_stats", None)
        found.append(Asked(item, Prompt(messages=template.turns(values)), frozenset()))
    return found


def _stars(rating: float) -> str:
    return f"{rating:g}"


def _some(names: Sequence[str], limit: int | None, seed: int) -> list[str]:
    """Return some names, the same ones whatever the order, in sorted order."""
    if limit is None or limit >= len(names):
        return list(names)
    order = np.argsort(hash64("augment", seed, list(names)), kind="stable")[:limit]
    return sorted(names[place] for place in order.tolist())
