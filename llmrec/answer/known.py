"""The catalogue and the users' histories of a model, read without loading the model.

Items and interactions come from the run's data or the exported folder, and from later requests to a service.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmrec.answer.rules import Rules
from llmrec.baselines.parameters import baseline_config
from llmrec.data.assemble import digest_items, read_items
from llmrec.data.dataset import Dataset, conform_to_schema
from llmrec.data.described import items_with_stored_texts, stored_user_text
from llmrec.data.features import FeatureStore
from llmrec.data.hashing import digest_frame, digest_strings
from llmrec.data.read.codes import values_and_codes
from llmrec.data.read.limits import format_value
from llmrec.data.read.typed import time_units_per_second
from llmrec.data.requests import RankRequest, history_entry, parse_request, request_identity
from llmrec.data.sets.table import load_data
from llmrec.data.split import time_order
from llmrec.display import MAX_ROWS, Displayed, Summary
from llmrec.ensembles.carried import USER_ID_PREFIX, read_training_data
from llmrec.errors import DataError, did_you_mean
from llmrec.pipeline import bundle as bundles
from llmrec.pipeline.bundle import Bundle
from llmrec.recipe.load import load_stored_recipe
from llmrec.recipe.schema import Recipe
from llmrec.types import Event, Item

Users = Mapping[str, Mapping[str, str]]
Profile = str | Mapping[str, str]
"""A user profile in prompts: a text, or fields by name."""

ITEMS_FILE = "items.parquet"
"""The optional catalogue file of an exported folder."""

# Number of sets of business rules whose allowed items are cached per state of the catalogue.
_MAX_CACHED_RULES = 8


class Catalogue:
    """Items by id; can be changed while other threads read it.

    A change creates a new mapping; readers continue with the one they have.

    Args:
        items: The initial items.

    Attributes:
        changes: The number of changes, for callers that cache derived values.
    """

    def __init__(self, items: Mapping[str, Item]) -> None:
        self.items = dict(items)
        self.changes = 0
        # Derived values are stored with their items, which may have been replaced meanwhile.
        self._search: tuple[Mapping[str, Item], pl.Series, pl.Series] | None = None
        self._allowed: tuple[Mapping[str, Item], dict[Rules, frozenset[str]]] = (self.items, {})

    def change(self, put: Iterable[Item], removed: Iterable[str]) -> None:
        """Add, replace and remove items."""
        items = dict(self.items)
        for name in removed:
            items.pop(name, None)
        items.update((item.item_id, item) for item in put)
        self.items, self._search, self._allowed = items, None, (items, {})
        self.changes += 1

    def get(self, item_id: str) -> Item:
        """Return an item by id."""
        if item_id not in self.items:
            raise DataError(
                f"there is no item {item_id[:60]!r}; search the items of the run by id or title",
                kind="unknown-name",
                column="item_id",
            )
        return self.items[item_id]

    def allowed(self, rules: Rules) -> frozenset[str]:
        """Return the ids of the items that business rules allow.

        Raises:
            DataError: If no item has the field of a rule.
        """
        items, known = self._allowed
        if (result := known.get(rules)) is None:
            rules.check(items)
            if len(known) >= _MAX_CACHED_RULES:
                known.clear()
            result = known[rules] = rules.allowed(items)
        return result

    def search(self, words: str, *, limit: int, offset: int) -> tuple[list[Item], int]:
        """Find items whose title or id contains a text: matches at the start first, then at a word, then elsewhere.

        Args:
            words: The text, case-insensitive; empty: every item matches, in the order of the catalogue.
            limit: The maximum number of returned items.
            offset: The number of matches to skip.

        Returns:
            Items, and the total number of matches.
        """
        items, ids, texts = self._texts()
        sought = words.casefold().strip()
        if sought:
            inside = texts.str.contains(sought, literal=True) | ids.str.contains(words.strip(), literal=True)
            rows = np.flatnonzero(inside.to_numpy())
            result = texts.gather(rows)
            begins = result.str.starts_with(sought) | (ids.gather(rows) == words.strip())
            word = result.str.contains(f" {sought}", literal=True)
            order = np.where(begins.to_numpy(), 0, np.where(word.to_numpy(), 1, 2))
            rows = rows[np.argsort(order, kind="stable")]
        else:
            rows = np.arange(len(ids))
        return [items[name] for name in ids.gather(rows[offset : offset + limit])], len(rows)

    def _texts(self) -> tuple[Mapping[str, Item], pl.Series, pl.Series]:
        result, items = self._search, self.items
        if result is None or result[0] is not items:
            titles = [item.title.casefold() for item in items.values()]
            result = items, pl.Series(list(items), dtype=pl.String), pl.Series(titles, dtype=pl.String)
            self._search = result
        return result


@dataclass(frozen=True)
class Histories:
    """The past interactions of all users, oldest first.

    Attributes:
        users: User ids, sorted.
        starts: The first row of each user, shape (users + 1,).
        items: The item of each row.
        ratings: The rating of each row; NaN: none.
        times: The time of each row; NaN: none.
    """

    users: pl.Series
    starts: NDArray[np.int64]
    items: pl.Series
    ratings: NDArray[np.float64]
    times: NDArray[np.float64]

    @classmethod
    def of(cls, dataset: Dataset, seed: int) -> Histories:
        """Return the histories of a data set; interactions at the same time are ordered as in a split with the seed."""
        frame = dataset.interactions[time_order(dataset, seed)]
        names, rows = values_and_codes(frame["user_id"])
        order = np.argsort(rows, kind="stable")
        return cls(
            users=names,
            starts=np.searchsorted(rows[order], np.arange(len(names) + 1)),
            items=frame["item_id"].gather(order),
            ratings=frame["rating"].cast(pl.Float64).fill_null(np.nan).to_numpy()[order],
            times=frame["timestamp"].cast(pl.Float64).fill_null(np.nan).to_numpy()[order],
        )

    @classmethod
    def none(cls) -> Histories:
        """Return empty histories."""
        empty = pl.Series(dtype=pl.String)
        return cls(empty, np.zeros(1, dtype=np.int64), empty, np.empty(0), np.empty(0))

    @cached_property
    def digest(self) -> str:
        """Hash of all histories."""
        rows = {"items": self.items.cast(pl.String), "ratings": self.ratings, "times": self.times}
        tables = ({"users": self.users}, {"starts": self.starts}, rows)
        return digest_strings([digest_frame(pl.DataFrame(table)) for table in tables])[:32]

    @cached_property
    def per_second(self) -> float:
        """Time units per second: 1, or more if the times are too large to be seconds."""
        return time_units_per_second(
            float(np.nanmax(self.times)) if len(self.times) and not np.isnan(self.times).all() else 0.0
        )

    def of_user(self, user_id: str) -> list[Event]:
        """Return the interactions of a user; empty for an unknown user."""
        if not len(self.users):
            return []
        position = int(self.users.search_sorted(user_id))
        if position >= len(self.users) or self.users[position] != user_id:
            return []
        rows = slice(int(self.starts[position]), int(self.starts[position + 1]))
        events = zip(self.items[rows].to_list(), self.ratings[rows].tolist(), self.times[rows].tolist(), strict=True)
        return [
            Event(
                item_id=str(item),
                rating=None if math.isnan(rating) else rating,
                timestamp=None if math.isnan(time) else time,
            )
            for item, rating, time in events
        ]


class Items(Displayed, dict[str, Item]):
    """A catalogue by id, to be changed by `change` only."""

    @cached_property
    def digest(self) -> str:
        """Hash of the items; all models of a catalogue share it."""
        return digest_items(self)

    def change(self, put: Mapping[str, Item], removed: Iterable[str]) -> None:
        """Add, replace and remove items."""
        for name in removed:
            self.pop(name, None)
        self.update(put)
        self.__dict__.pop("digest", None)

    def _summary(self) -> Summary:
        rows = [(item.item_id, item.title) for item in islice(self.values(), MAX_ROWS)]
        return Summary(f"{len(self):,} items", header=("item_id", "title"), rows=rows)


def digest_catalogue(items: Mapping[str, Item]) -> str:
    """Return a hash of a catalogue, which `Items` keep until they change."""
    return items.digest if isinstance(items, Items) else digest_items(items)


@dataclass(frozen=True, repr=False)
class KnownEntities(Displayed):
    """The items and users of a run or an exported folder.

    Attributes:
        items: The catalogue.
        histories: All interactions of its data, in any part of the split.
        features: Feature stores with data of users.
        profiles: See `profile_lookup`.
        users: The fields of the users of a run's data.
    """

    items: Mapping[str, Item]
    histories: Histories
    features: Sequence[Path] = field(default_factory=tuple)
    profiles: Callable[[str], Profile] | None = None
    users: Users = field(default_factory=dict)

    def _summary(self) -> Summary:
        facts = {"items": f"{len(self.items):,}", "users": f"{len(self.histories.users):,}"}
        return Summary("Catalogue and histories", {**facts, "interactions": f"{len(self.histories.items):,}"})

    @property
    def digest(self) -> str:
        """Hash of all user data in prompts: histories, and texts or profile fields."""
        stores = [FeatureStore.open(folder).stamp for folder in self.features]
        users = sorted(self.users.items()) if self.profiles else []
        shown = [repr((user, sorted(values.items()))) for user, values in users]
        return digest_strings([self.histories.digest, *stores, *shown])

    def profile(self, user: str | None, erased: Callable[[str], bool] = lambda user: False) -> Profile | None:
        """Return a user's text or profile fields for prompts; None if there are none or the user was deleted."""
        if self.profiles is None or user is None or erased(user):
            return None
        return self.profiles(user) or None


def read_catalogue(bundle: Bundle, items: Path | None) -> tuple[Mapping[str, Item] | None, Dataset | None]:
    """Return the items that requests can name by id, and the data of the run if loaded.

    The items come from a table, the run's data, or the folder. They are empty for a tuned model without an item table,
    whose requests must name titles, and None for a plain pretrained model.

    Raises:
        DataError: If the table or the run's data cannot be read.
    """
    if items is not None:
        return read_items(items), None
    if bundle.run is not None:
        recipe = load_stored_recipe(bundle.run)
        data = _read_run_data(bundle, recipe)
        return items_with_stored_texts(data.items, recipe.data.texts), data
    carried = Path(bundle.folder) / ITEMS_FILE
    if carried.is_file():
        return read_items(carried), None
    return ({} if bundle.tuned else None), None


def _read_run_data(bundle: Bundle, recipe: Recipe) -> Dataset:
    """Read the data of a run."""
    try:
        return load_data(recipe.data, seed=recipe.seed)
    except DataError as error:
        raise error.reworded(
            f"{error}. The data of the run {bundle.run} are needed; alternatively, give a table with --items"
        ) from None


def read_known_entities(folder: str, items: Path | None) -> KnownEntities:
    """Read the items and interactions of a run or an exported folder.

    Args:
        folder: As `llmrec.pipeline.bundle.read` takes it.
        items: A table of items that takes precedence over those of the folder.

    Raises:
        LlmrecError: If they cannot be read.
    """
    bundle = bundles.read(folder)
    catalogue, data = read_catalogue(bundle, items)
    return build_known_entities(bundle, catalogue or {}, data)


def build_known_entities(bundle: Bundle, items: Mapping[str, Item], data: Dataset | None = None) -> KnownEntities:
    """Return the items and users of an open model.

    Args:
        bundle: The model.
        items: Its catalogue.
        data: The data of its run, if already read.

    Raises:
        LlmrecError: If a file cannot be read.
    """
    if bundle.run is None:
        exported = read_training_data(Path(bundle.folder), seed=bundle.seed)
        past = Histories.none() if exported is None else Histories.of(_keep_named_users(exported.dataset), bundle.seed)
        return KnownEntities(items, past)
    recipe = load_stored_recipe(bundle.run)
    dataset = _read_run_data(bundle, recipe) if data is None else data
    profiles = profile_lookup(str(bundle.run), lambda: dataset.users)
    return KnownEntities(
        items, Histories.of(dataset, recipe.seed), _feature_stores(bundle.run, recipe), profiles, dataset.users
    )


def _keep_named_users(dataset: Dataset) -> Dataset:
    """Return the interactions of the users whose ids were exported."""
    rows = dataset.interactions.with_columns(pl.col("user_id").cast(pl.String))
    return replace(
        dataset, interactions=conform_to_schema(rows.filter(~pl.col("user_id").str.starts_with(USER_ID_PREFIX)))
    )


def _feature_stores(run: Path, recipe: Recipe) -> list[Path]:
    """Return the feature stores that a run wrote or read, for prompts and baselines."""
    tables = filter(None, (recipe.data, recipe.reviews))
    named = [table.texts.path for table in tables if table.texts is not None]
    for section in recipe.tasks.present().values():
        for baseline in section.baselines:
            named += getattr(baseline_config(baseline.name, baseline.parameters, "parameters"), "folders", ())
    folders = dict.fromkeys([run / "features", *(Path(path).expanduser() for path in named)])
    return [store for store in folders if (store / "current").is_file()]


def profile_lookup(folder: str, users: Callable[[], Users] | None = None) -> Callable[[str], Profile] | None:
    """Return a function that maps a user to the text (``data.texts``) or profile fields in a run's prompts.

    None if prompts show no user data.

    Args:
        folder: As `llmrec.pipeline.bundle.read` takes it.
        users: A function that returns the fields of the run's users; by default they are read at the first call.
    """
    bundle = bundles.read(folder)
    shown = [item for known in bundle.templates.values() for item in known.values()]
    if bundle.run is None or not any(
        {"profile", "user_name"} & template.names("system", "user", "lead") for template in shown
    ):
        return None
    recipe = load_stored_recipe(bundle.run)
    section = recipe.data.texts
    fields = users or cache(lambda: load_data(recipe.data, seed=recipe.seed).users)

    def profile(user: str) -> Profile:
        text = stored_user_text(user, section) if section is not None else ""
        # In the baseline with shuffled texts, each user has another user's text and no fields.
        return text or ({} if section is not None and section.shuffled else fields().get(user, {}))

    return profile


def merge_histories(past: Sequence[Event], since: Sequence[Event]) -> list[Event]:
    """Merge the stored and the later interactions of a user, oldest first, without duplicates.

    Interactions without a time come first.
    """
    both = {(event.item_id, event.timestamp) for event in past}
    every = [*past, *(event for event in since if (event.item_id, event.timestamp) not in both)]
    return sorted(every, key=lambda event: -math.inf if event.timestamp is None else event.timestamp)


def with_stored_data(
    record: Mapping[str, object],
    events: Callable[[str], Sequence[Event]],
    items: Mapping[str, Item],
    profile: Callable[[str], Profile | None] | None = None,
) -> tuple[Mapping[str, object], bool]:
    """Add the user's stored data to a request, and return whether there are any.

    Every interface looks up users here.

    Args:
        record: The request as received.
        events: A function that returns a user's interactions, oldest first; called if a request has a user and no
            history.
        items: The catalogue; interactions with missing items are dropped.
        profile: A function that returns the profile of a user; see `profile_lookup`.
    """
    # Parse the user as in the request: 1.0 is user 1.
    user, looked_up, stored = request_identity(record, 1)[1], dict[str, object](), False
    if user is not None and record.get("history") is None:
        past = events(user)
        stored = bool(past)
        looked_up["history"] = [history_entry(event) for event in past if event.item_id in items]
    if user is not None and not record.get("profile") and profile is not None and (shown := profile(user)):
        stored = True
        looked_up["profile"] = shown
    return ({**record, **looked_up} if looked_up else record), stored


def parse_request_with_history(
    record: Mapping[str, object],
    row: int,
    events: Callable[[str], Sequence[Event]],
    items: Mapping[str, Item] | None,
    profile: Callable[[str], Profile | None] | None = None,
    *,
    whole: bool = False,
    retrieves: bool = False,
) -> RankRequest:
    """Parse a request and add the stored data of a known user, with a note.

    Args:
        record: As `parse_request` takes it.
        row: See `parse_request`.
        events: See `with_stored_data`.
        items: The catalogue, as `parse_request` takes it.
        profile: See `with_stored_data`.
        whole: See `parse_request`.
        retrieves: See `parse_request`.

    Raises:
        DataError: If the request cannot be ranked.
    """
    completed, stored = with_stored_data(record, events, items or {}, profile)
    request = parse_request(completed, row, items, whole=whole, retrieves=retrieves)
    if request.user_id is None or record.get("history") is not None:
        return request
    return with_history_note(request, known=stored)


def with_history_note(request: RankRequest, *, known: bool) -> RankRequest:
    """Note the length of the user's stored history in a request, or that the user is unknown.

    Args:
        request: A request with a user, whose history was looked up.
        known: Whether any data of the user are stored.
    """
    if not known:
        note = f"unknown user {format_value(str(request.user_id))}"
        return replace(request, unknown_user=True, notes=(note, *request.notes))
    events = len(request.history)
    note = f"history: {events} interaction{'' if events == 1 else 's'} of this user in the data"
    return replace(request, notes=(*request.notes, note))


def unknown_name_error(what: str, name: str, known: Iterable[str]) -> DataError:
    """Return an error about an unknown name."""
    return DataError(f"there is no {what} {name[:60]!r}{did_you_mean(name, known)}", kind="unknown-name", column=what)
