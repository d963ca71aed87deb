"""Adds texts from a feature store to users and items, as fields shown in prompts.

A user's text becomes the field ``profile`` and an item's text the field ``about``. They are data like other fields:
cleaned before a model reads them, and part of the fingerprint of the data.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from llmrec.data.features import PLURALS, FeatureKind, FeatureStore, Pair
from llmrec.data.read.codes import PAIR_COLUMNS, coded_pairs
from llmrec.data.split import SplitDataset
from llmrec.errors import DataError
from llmrec.guard import clean
from llmrec.recipe.schema import TextsSection
from llmrec.types import Item

ITEM_FIELD, USER_FIELD = "about", "profile"
"""The field of an item and the field of a user that hold the text."""
MIN_TITLE_LENGTH = 6
"""Minimum length: shorter titles ("Emma", "Heat") are common words, so their occurrence in a text is not a mention."""
_YEAR = re.compile(r"\s*\(\d{4}\)$")


class StoredProfile(str):
    """A user's text from a feature store, which prompts show instead of the user's other fields."""

    __slots__ = ()


def with_stored_texts(
    data: SplitDataset, section: TextsSection | None, held: frozenset[Pair] = frozenset()
) -> SplitDataset:
    """Return a split whose users and items have the texts of a feature store; unchanged without a store.

    A user's text that names an item held out for this user is excluded, but the user stays: models with and without
    texts must be evaluated on the same users.

    Args:
        data: The split.
        section: The store and the texts to use.
        held: Pairs that another table of the same recipe holds out.

    Raises:
        DataError: If the store is missing, its texts come from another split or from an interaction that is trained on
            or held out here, it has no texts on these users and items, or the field exists already.
    """
    if section is None:
        return data
    store = FeatureStore.open(section.path, split=data.readable)
    users, items, coverage = dict(data.dataset.users), data.dataset.items, []
    if section.sides in ("both", "user") and "user" in store.kinds:
        check_feature_leaks(section.path, store, data, held=held)
        texts = _stored_texts(store, "user", data.users(), shuffled=section.shuffled)
        _check_field_unused(section.path, USER_FIELD, (text for user in texts if (text := users.get(user))))
        titles = held_out_titles(data, texts)
        excluded = {
            user for user, text in texts.items() if any(mentions_title(text, title) for title in titles.get(user, ()))
        }
        shown = {user: StoredProfile(text) for user, text in texts.items() if user not in excluded}
        users |= {user: {**users.get(user, {}), USER_FIELD: text} for user, text in shown.items()}
        note = (
            f" ({len(excluded)} more users excluded, because their text names one of their held-out items)"
            if excluded
            else ""
        )
        coverage.append(f"{len(shown)} of {len(data.users())} users{note}")
    if section.sides in ("both", "item") and "item" in store.kinds:
        check_feature_leaks(section.path, store, data, kind="item", held=held)
        items = items_with_stored_texts(items, section)
        coverage.append(f"{sum(ITEM_FIELD in item.fields for item in items.values())} of {len(items)} items")
    if all(count.startswith("0 ") for count in coverage):
        raise DataError.at(
            section.path,
            "missing-value",
            f" has no text on users or items of {data.dataset.name} ({', '.join(coverage) or section.sides}); check "
            "that the ids match, or set data.texts.sides",
        )
    fields = {"texts": store.stamp, "have texts": ", ".join(coverage)}
    dataset = replace(data.dataset, users=users, items=items, provenance={**data.dataset.provenance, **fields})
    return replace(data, dataset=dataset)


def mentions_title(text: str, title: str) -> bool:
    """Whether a text mentions an item by its title, ignoring case and a year at the end of the title."""
    full = clean(title).casefold()
    bare = _YEAR.sub("", full)
    phrase = bare if len(bare) >= MIN_TITLE_LENGTH else full
    return (
        len(phrase) >= MIN_TITLE_LENGTH
        and re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", clean(text).casefold()) is not None
    )


def held_out_titles(data: SplitDataset, users: Container[str]) -> dict[str, dict[str, str]]:
    """Return the ids of held-out items by user and title, for titles long enough to be unambiguous."""
    result: dict[str, dict[str, str]] = {}
    for user, item in sorted(pair for pair in data.held_out if pair[0] in users):
        title = data.dataset.titles.get(item, "")
        if len(title) >= MIN_TITLE_LENGTH:
            result.setdefault(user, {})[title] = item
    return result


def items_with_stored_texts(items: Mapping[str, Item], section: TextsSection | None) -> Mapping[str, Item]:
    """Return items with the texts of a feature store, if it has texts about items."""
    store = None if section is None or section.sides == "user" else FeatureStore.open(section.path)
    if section is None or store is None or "item" not in store.kinds:
        return items
    texts = _stored_texts(store, "item", items, shuffled=section.shuffled)
    _check_field_unused(section.path, ITEM_FIELD, (items[item].fields for item in texts))
    new = {item: replace(items[item], fields={**items[item].fields, ITEM_FIELD: text}) for item, text in texts.items()}
    return {**items, **new}


def stored_user_text(user: str, section: TextsSection) -> str:
    """Return the text about a user for prompts; empty if there is none."""
    if section.sides == "item" or section.shuffled:
        return ""
    # Opened for each user, so that a text that was corrected or deleted in the meantime is not used.
    store = FeatureStore.open(section.path)
    return store.texts("user", [user]).get(user, "").strip() if "user" in store.kinds else ""


def cyclic_permutation(names: Sequence[str]) -> dict[str, str]:
    """Return a random cyclic permutation of names, which maps no name to itself."""
    drawn = np.random.default_rng(0).permutation(len(names))
    return {names[one]: names[two] for one, two in zip(drawn, np.roll(drawn, 1), strict=True)}


def check_feature_leaks(
    path: str,
    store: FeatureStore,
    data: SplitDataset,
    *,
    kind: FeatureKind = "user",
    held: frozenset[Pair] = frozenset(),
) -> None:
    """Reject features made from interactions used for training or evaluation, since they would leak the answer.

    Args:
        path: Path of the store, for the message.
        store: The store.
        data: The split.
        kind: The kind of features.
        held: Pairs held out in addition to those of this split.

    Raises:
        DataError: If there is such an interaction; the message names its user and item.
    """
    seen = store.seen(kind)
    if not seen:
        return
    shared = data.train.join(coded_pairs(seen, data.train), on=PAIR_COLUMNS, how="semi")
    trained = shared.select(PAIR_COLUMNS).head(1).rows()
    for pairs, what in ((seen & (data.held_out | held), "held out"), (trained, "used for training")):
        if pairs:
            user, item = min((str(user), str(item)) for user, item in pairs)
            raise DataError.at(
                path,
                "leak",
                f": the text on {PLURALS[kind]} was made from the interaction of user {user!r} with item {item!r}, "
                f"which is {what} here, so prompts would contain the answer; set data.split.kind=prefix and run "
                "llmrec augment again",
            )


def _stored_texts(store: FeatureStore, kind: FeatureKind, ids: Iterable[str], *, shuffled: bool) -> dict[str, str]:
    """Return the texts stored for these ids or, if shuffled, for other ids."""
    source = cyclic_permutation(sorted(store.ids(kind))) if shuffled else {name: name for name in store.ids(kind)}
    requested = [name for name in ids if name in source]
    stored = store.texts(kind, {source[name] for name in requested})
    return {name: text for name in requested if (text := stored.get(source[name], "").strip())}


def _check_field_unused(path: str, name: str, entries: Iterable[Mapping[str, str]]) -> None:
    if any(entry.get(name) for entry in entries):
        raise DataError.at(
            path,
            "contradiction",
            f": its texts are stored in the field {name!r}, which the data already have; drop this field from "
            "data.columns",
        )
