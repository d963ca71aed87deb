"""Prompts that generate texts about users and items, with the interactions shown in each prompt."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.data.features import FeatureKind, Pair
from llmrec.data.hashing import hash64
from llmrec.data.split import SplitDataset
from llmrec.errors import RecipeError, did_you_mean
from llmrec.guard import clean
from llmrec.prompts.template import Template, load_templates
from llmrec.recipe.schema import AugmentSection
from llmrec.tasks.base import DataView
from llmrec.types import Event, Prompt

if TYPE_CHECKING:
    from numpy.typing import NDArray

FAMILY = "augment"
_USER_VARIABLES = frozenset({"history", "factors", "topics", "interests", "noun", "user_id", "profile"})
_ITEM_VARIABLES = frozenset({"item", "item_id", "fields", "factors", "noun"})


@dataclass(frozen=True)
class TextPrompt:
    """A prompt about one user or item.

    Attributes:
        id: Id of the user or item that the text is about.
        prompt: The question.
        events: The user's interactions in the prompt, oldest first; empty for an item.
    """

    id: str
    prompt: Prompt
    events: tuple[Event, ...] = ()

    @property
    def seen(self) -> frozenset[Pair]:
        """The interactions shown in the prompt."""
        return frozenset((self.id, event.item_id) for event in self.events)


def text_template(kind: FeatureKind, name: str, prompts: Sequence[str] = ()) -> Template:
    """Return a template from ``prompts/augment``, or from ``prompts`` of the recipe.

    Raises:
        RecipeError: If no template has this name, or it uses variables that are not available.
    """
    known = load_templates(FAMILY, *prompts)
    if name not in known:
        raise RecipeError(
            f"{template_key(kind)}: there is no template {name!r}{did_you_mean(name, known)}; known: "
            f"{', '.join(sorted(known))}",
            kind="unknown-name",
            column=template_key(kind),
        )
    known[name].check(turns=_ITEM_VARIABLES if kind == "item" else _USER_VARIABLES, lead=(), target={"text"})
    return known[name]


def readable_events(data: SplitDataset, user: str) -> tuple[Event, ...]:
    """Return the interactions from which a text about a user may be generated, oldest first.

    With a split of kind ``prefix`` these are the user's first interactions, which nothing else is trained on; with
    other splits the training interactions, which a baseline with the text as a feature then excludes.
    """
    return data.known_events(user) if data.kind == "prefix" else data.train_events(user)


def user_prompts(
    data: SplitDataset,
    section: AugmentSection,
    seed: int,
    prompts: Sequence[str] = (),
    *,
    kind: FeatureKind = "user",
    interests: Mapping[str, str] = MappingProxyType({}),
) -> list[TextPrompt]:
    """Return prompts about users who have interactions that may be shown.

    Args:
        data: The split data.
        section: The recipe's augment section.
        seed: Seed of the sample, if there are more users than the limit.
        prompts: Files and folders of further templates.
        kind: ``user``, or ``synthetic``: the next item of users with few interactions.
        interests: The texts on users, which the prompt for synthetic items may show.
    """
    name = section.users if kind == "user" else section.synthetic
    assert name is not None
    template, view = text_template(kind, name, prompts), DataView(data)
    most = math.inf if kind == "user" else section.cold
    eligible = [user for user in data.users() if 0 < len(readable_events(data, user)) <= most]
    fields = {"factors": list(section.factors), "topics": list(section.topics)}
    results = []
    for user in _sample_names(eligible, section.limit, seed):
        events = readable_events(data, user)[-section.history :]
        values = view.user(user, {}) | fields | {"history": view.events(events, "{:g}".format)}
        values["interests"] = interests.get(user, "")
        results.append(TextPrompt(user, Prompt(messages=template.turns(values)), events))
    return results


def item_prompts(
    data: SplitDataset, section: AugmentSection, seed: int, prompts: Sequence[str] = ()
) -> list[TextPrompt]:
    """Return prompts about all items, without interactions."""
    assert section.items is not None
    template, view = text_template("item", section.items, prompts), DataView(data)
    results = []
    for item in _sample_names(sorted(data.dataset.items), section.limit, seed):
        values = view.about(item) | {"factors": list(section.factors), "noun": data.dataset.noun}
        values.pop("item_stats", None)
        results.append(TextPrompt(item, Prompt(messages=template.turns(values))))
    return results


def preference_vector(vectors: NDArray[np.floating[Any]], liked: NDArray[np.bool_]) -> NDArray[np.floating[Any]]:
    """Return the mean of the liked vectors minus the mean of the others; shapes (n, d) and (d,)."""
    parts = vectors[liked], vectors[~liked]
    means = [part.mean(axis=0) if len(part) else np.zeros(vectors.shape[1]) for part in parts]
    return np.asarray(means[0] - means[1])


def template_key(kind: FeatureKind) -> str:
    """Return the recipe key for the template of users, items or synthetic items."""
    return "augment.synthetic" if kind == "synthetic" else f"augment.{kind}s"


def extract_text(kind: FeatureKind, answer: str, section: AugmentSection) -> str:
    """Return the part of an answer to store; empty if the answer is not usable.

    For a text on a user with a closed list, these are the topics of the list that it names, in list order (GENRE, Liu
    et al., WSDM 2024, section 3.2). For a synthetic item, these are title and description from a JSON object, the
    format of GENRE, or else the first line.
    """
    if kind == "user" and section.topics:
        words = f" {_normalise_words(answer)} "
        return ", ".join(topic for topic in section.topics if f" {_normalise_words(topic)} " in words)
    if kind == "synthetic":
        answer = parse_synthetic_item(answer)
    # Generated text is untrusted, and must not be able to imitate parts of a template.
    return clean(answer)


def parse_synthetic_item(answer: str) -> str:
    """Return the title and description of the synthetic item in an answer."""
    begin, end = answer.find("{"), answer.rfind("}")
    try:
        item = json.loads(answer[begin : end + 1]) if 0 <= begin < end else None
    except ValueError:
        item = None
    if isinstance(item, dict):
        parts = [str(item[key]).strip() for key in ("title", "description", "desc", "abstract") if item.get(key)]
        return ". ".join(dict.fromkeys(part.rstrip(".") for part in parts))
    first = next((line.strip() for line in answer.splitlines() if line.strip()), "")
    return first.strip("\"'* ")


def _normalise_words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _sample_names(names: Sequence[str], limit: int | None, seed: int) -> list[str]:
    """Return a sorted sample of names that does not depend on their order."""
    if limit is None or limit >= len(names):
        return list(names)
    order = np.argsort(hash64("augment", seed, list(names)), kind="stable")[:limit]
    return sorted(names[index] for index in order.tolist())
