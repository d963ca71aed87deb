"""Held-out items of the alignment task, whose code and text are never trained together.

An item's text is not an interaction, so data splits do not hold it out. The items of alignment questions must be held
out nevertheless: a model trained on an item's code with its title could memorise the pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmrec.data.candidates import CandidateSets, sample_across_groups
from llmrec.data.hashing import hash64, hash_one
from llmrec.errors import DataError, RecipeError
from llmrec.index.titles import display_title, title_key
from llmrec.prompts.template import Template
from llmrec.types import Item, SplitName

CANDIDATE_KIND = "held-out-items"


@dataclass(frozen=True)
class HeldItems:
    """Held-out items in seeded order, so that the first n are an unbiased sample.

    Attributes:
        valid: Items for model selection.
        test: Items for reported figures.
        groups: The normalised title of every item; the items of a group are held out together.
    """

    valid: tuple[str, ...]
    test: tuple[str, ...]
    groups: Mapping[str, str]

    def part(self, split: SplitName) -> tuple[str, ...]:
        """Return the held-out items of a split.

        Raises:
            ValueError: For the training split, which has no held-out items.
        """
        if split == "train":
            raise ValueError("the training split has no held-out items; use 'valid' or 'test'")
        return self.valid if split == "valid" else self.test

    @property
    def items(self) -> frozenset[str]:
        """All held-out items, of validation and test."""
        return frozenset((*self.valid, *self.test))


def check_codes_without_titles(family: str, templates: Iterable[Template]) -> None:
    """Reject templates of other tasks that would show held-out items with both code and title.

    Raises:
        RecipeError: If there is one.
    """
    for template in templates:
        if template.writes_both:
            raise RecipeError(
                f"tasks.{family}.templates: {template.id} shows codes with titles, so tasks.alignment has no pairs "
                "that are unseen in training; choose other templates, or remove tasks.alignment",
                kind="contradiction",
                at=template.id,
                column=f"tasks.{family}.templates",
            )


def select_held_items(items: Mapping[str, Item], share: float, *, seed: int) -> HeldItems:
    """Select held-out items by a seeded hash of their titles, so that adding an item does not affect others.

    Items with the same title are held out together. With an index over titles their codes differ only in the
    disambiguating part, so one of them in training would reveal the others.

    Args:
        items: The catalogue.
        share: Approximate share of held-out items, half of it for each split.
        seed: The run's seed.
    """
    names = sorted(items)
    groups = {name: title_key(display_title(name, items[name])) for name in names}
    drawn = hash64("alignment held out", seed, [groups[name] for name in names]) / 2.0**64
    order = hash64("alignment order", seed, names)
    results = sorted(zip(order.tolist(), drawn.tolist(), names, strict=True))
    return HeldItems(
        valid=tuple(name for _, value, name in results if share / 2 <= value < share),
        test=tuple(name for _, value, name in results if value < share / 2),
        groups=groups,
    )


def alignment_request_id(item: str, seed: int) -> str:
    """Return the request id for an item, which does not reveal the item."""
    return f"alignment/{hash_one('alignment request', seed, item):016x}"


def sample_held_candidates(held: HeldItems, split: SplitName, *, count: int, seed: int) -> CandidateSets:
    """Draw the candidates of questions from the held-out items of the same split.

    Each of them is equally likely to be the answer, so that a candidate set reveals nothing.

    Raises:
        DataError: If too few items are held out.
    """
    part = held.part(split)
    alone = len({held.groups[item] for item in part})
    if alone < count:
        raise DataError(
            f"tasks.alignment.held_out: {len(part)} of {len(held.groups)} items are held out for the {split} split, "
            f"with {alone} different titles, fewer than the {count} candidates of a request; raise this share, or "
            "lower eval.candidates.count",
            kind="too-few",
            column="tasks.alignment.held_out",
        )
    targets = {alignment_request_id(item, seed): item for item in part}
    return sample_across_groups(
        targets, {item: held.groups[item] for item in part}, count=count, seed=seed, kind=CANDIDATE_KIND
    )
