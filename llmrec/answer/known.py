"""What is known without asking a model: its catalogue, and what users did.

Items and past events come from the run's data or the exported folder, and from what a service was sent since.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmrec.answer.requests import catalogue_of, data_of_run
from llmrec.answer.rules import Rules
from llmrec.baselines.parameters import config_of
from llmrec.data.codes import codes
from llmrec.data.dataset import Dataset, conform
from llmrec.data.described import profile_of
from llmrec.data.features import FeatureStore
from llmrec.data.hashing import digest_strings
from llmrec.data.read.limits import shown
from llmrec.data.read.typed import per_second
from llmrec.data.requests import RankRequest, identity, read_request, told_event
from llmrec.data.sets.table import load
from llmrec.data.split import time_order
from llmrec.errors import DataError, did_you_mean
from llmrec.pipeline import bundle as bundles
from llmrec.pipeline.bundle import Bundle
from llmrec.pipeline.fusion.carried import NUMBERED, carried
from llmrec.recipe.load import load_stored
from llmrec.recipe.schema import Recipe
from llmrec.types import Event, Item

Users = Mapping[str, Mapping[str, str]]
Profile = str | Mapping[str, str]
"""What prompts show of a user: a text, or fields by name."""

# Rule sets whose allowed items are remembered for one state of the catalogue.
_REMEMBERED = 8


class Catalogue:
    """Items by id, which can be added, replaced and removed while other threads look them up.

    A change makes a new mapping, so that whoever is reading goes on with the one that he has.

    Args:
        items: To begin with.

    Attributes:
        changes: How often items changed, for those who remember something of them.
    """

    def __init__(self, items: Mapping[str, Item]) -> None:
        self.items = dict(items)
        self.changes = 0
        # What is made of one mapping stands beside it: it may be ready when the next one has come.
        self._search: tuple[Mapping[str, Item], pl.Series, pl.Series] | None = None
        self._allowed: tuple[Mapping[str, Item], dict[Rules, frozenset[str]]] = (self.items, {})

    def change(self, put: Iterable[Item], removed: Iterable[str]) -> None:
        """Add or replace items, and remove others."""
        items = dict(self.items)
        for name in removed:
            items.pop(name, None)
        items.update((item.item_id, item) for item in put)
        self.items, self._search, self._allowed = items, None, (items, {})
        self.changes += 1

    def get(self, item_id: str) -> Item:
        """Return an item.

        Raises:
            DataError: If there is none of this id.
        """
        if item_id not in self.items:
            raise DataError(
                f"there is no item {item_id[:60]!r}; look it up among the items of the run, by its title too",
                kind="unknown-name",
                column="item_id",
            )
        return self.items[item_id]

    def allowed(self, rules: Rules) -> frozenset[str]:
        """Return the ids that rules leave.

        Raises:
            DataError: If a rule names a field that no item has.
        """
        items, known = self._allowed
        if (found := known.get(rules)) is None:
            rules.check(items)
            if len(known) >= _REMEMBERED:
                known.clear()
            found = known[rules] = rules.allowed(items)
        return found

    def search(self, words: str, *, limit: int, offset: int) -> tuple[list[Item], int]:
        """Find items whose title or id holds some text: first those that begin with it, then words, then the rest.

        Args:
            words: Looked for without regard to case; empty: every item is found, in the order of the catalogue.
            limit: Items that are returned at most.
            offset: Items that are passed by first.

        Returns:
            Items, and how many were found in all.
        """
        items, ids, texts = self._texts()
        sought = words.casefold().strip()
        if sought:
            inside = texts.str.contains(sought, literal=True) | ids.str.contains(words.strip(), literal=True)
            places = np.flatnonzero(inside.to_numpy())
            found = texts.gather(places)
            begins = found.str.starts_with(sought) | (ids.gather(places) == words.strip())
            word = found.str.contains(f" {sought}", literal=True)
            order = np.where(begins.to_numpy(), 0, np.where(word.to_numpy(), 1, 2))
            places = places[np.argsort(order, kind="stable")]
        else:
            places = np.arange(len(ids))
        return [items[name] for name in ids.gather(places[offset : offset + limit])], len(places)

    def _texts(self) -> tuple[Mapping[str, Item], pl.Series, pl.Series]:
        found, items = self._search, self.items
        if found is None or found[0] is not items:
            titles = [item.title.casefold() for item in items.values()]
            found = items, pl.Series(list(items), dtype=pl.String), pl.Series(titles, dtype=pl.String)
            self._search = found
        return found


@dataclass(frozen=True)
class Histories:
    """Past events of the users of a data set, oldest first.

    Attributes:
        users: Sorted.
        starts: Where each user's rows begin, shape (users + 1,).
        items: Item of each row.
        ratings: Rating of each row; NaN: none.
        times: Time of each row; NaN: none.
    """

    users: pl.Series
    starts: NDArray[np.int64]
    items: pl.Series
    ratings: NDArray[np.float64]
    times: NDArray[np.float64]

    @classmethod
    def of(cls, dataset: Dataset, seed: int) -> Histories:
        """Sort interactions by user and time, those of one moment as a split with this seed does."""
        frame = dataset.interactions[time_order(dataset, seed)]
        names, rows = codes(frame["user_id"])
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
        """Return those of nobody."""
        empty = pl.Series(dtype=pl.String)
        return cls(empty, np.zeros(1, dtype=np.int64), empty, np.empty(0), np.empty(0))

    @cached_property
    def digest(self) -> str:
        """A hash over all of them."""
        found = hashlib.sha256(digest_strings([*self.users.to_list(), *self.items.cast(pl.String).to_list()]).encode())
        for numbers in (self.starts, self.ratings, self.times):
            found.update(numbers.tobytes())
        return found.hexdigest()[:32]

    @property
    def per_second(self) -> float:
        """Units of time in a second: 1, or more where times are so large that they can be no seconds."""
        return per_second(float(np.nanmax(self.times)) if len(self.times) and not np.isnan(self.times).all() else 0.0)

    def of_user(self, user_id: str) -> list[Event]:
        """Return a user's events; none of a user who is not known."""
        if not len(self.users):
            return []
        place = int(self.users.search_sorted(user_id))
        if place >= len(self.users) or self.users[place] != user_id:
            return []
        rows = range(int(self.starts[place]), int(self.starts[place + 1]))
        return [
            Event(
                item_id=str(self.items[row]),
                rating=None if np.isnan(self.ratings[row]) else float(self.ratings[row]),
                timestamp=None if np.isnan(self.times[row]) else float(self.times[row]),
            )
            for row in rows
        ]


@dataclass(frozen=True)
class Known:
    """What is known of a run or an exported folder without opening its weights.

    Attributes:
        items: The catalogue.
        histories: What its users did: all interactions of its data, whichever part of the split they are in.
        features: Stores of features that hold something about users.
        profiles: See `profiles_of`.
        users: Fields of the users of a run's data.
    """

    items: Mapping[str, Item]
    histories: Histories
    features: Sequence[Path] = field(default_factory=tuple)
    profiles: Callable[[str], Profile] | None = None
    users: Users = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """A hash over all that requests are told of users: what they did, and what prompts show of them."""
        stores = [FeatureStore.open(each).stamp for each in self.features]
        users = sorted(self.users.items()) if self.profiles else []
        shown = [repr((user, sorted(told.items()))) for user, told in users]
        return digest_strings([self.histories.digest, *stores, *shown])

    def profile(self, user: str | None, erased: Callable[[str], bool] = lambda user: False) -> Profile | None:
        """Return the text or the fields that prompts show of a user; None where there are none, or of an erased one."""
        if self.profiles is None or user is None or erased(user):
            return None
        return self.profiles(user) or None


def known_of(folder: str, items: Path | None) -> Known:
    """Read the items and interactions of a run or an exported folder.

    Args:
        folder: As `llmrec.pipeline.bundle.read` takes it.
        items: A table of items that goes before those of the folder.

    Raises:
        LlmrecError: If they cannot be read.
    """
    bundle = bundles.read(folder)
    found, data = catalogue_of(bundle, items)
    return known_from(bundle, found or {}, data)


def known_from(bundle: Bundle, items: Mapping[str, Item], data: Dataset | None = None) -> Known:
    """Return what is known of a model that is opened.

    Args:
        bundle: The model.
        items: Its catalogue.
        data: Those of its run, where they were read already.

    Raises:
        LlmrecError: If something cannot be read.
    """
    if bundle.run is None:
        brought = carried(Path(bundle.folder), seed=bundle.seed)
        past = Histories.none() if brought is None else Histories.of(_of_named(brought.dataset), bundle.seed)
        return Known(items, past)
    recipe = load_stored(bundle.run)
    found = data_of_run(bundle, recipe) if data is None else data
    said = profiles_of(str(bundle.run), lambda: found.users)
    return Known(items, Histories.of(found, recipe.seed), _stores(bundle.run, recipe), said, found.users)


def _of_named(dataset: Dataset) -> Dataset:
    """Return what users did whose names went along; an export numbers all, and nobody is meant by a number."""
    rows = dataset.interactions.with_columns(pl.col("user_id").cast(pl.String))
    return replace(dataset, interactions=conform(rows.filter(~pl.col("user_id").str.starts_with(NUMBERED))))


def _stores(run: Path, recipe: Recipe) -> list[Path]:
    """Return the stores of features that a run wrote or reads, in prompts and in baselines."""
    tables = filter(None, (recipe.data, recipe.reviews))
    named = [table.texts.path for table in tables if table.texts is not None]
    for section in recipe.tasks.present().values():
        for each in section.baselines:
            named += getattr(config_of(each.name, each.parameters, "parameters"), "folders", ())
    found = dict.fromkeys([run / "features", *(Path(path).expanduser() for path in named)])
    return [store for store in found if (store / "current").is_file()]


def known_in(dataset: Dataset, items: Mapping[str, Item], seed: int) -> Known:
    """Return what is known of data that are at hand, with the catalogue that goes before theirs."""
    return Known(items, Histories.of(dataset, seed))


def profiles_of(folder: str, users: Callable[[], Users] | None = None) -> Callable[[str], Profile] | None:
    """Return what says what a run's prompts show of a user: a text (``data.texts``), or the fields of its data.

    None where they show nothing of users.

    Args:
        folder: As `llmrec.pipeline.bundle.read` takes it.
        users: Gives the fields of the run's data where these are at hand; else they are read when first asked for.
    """
    bundle = bundles.read(folder)
    shown = [each for known in bundle.templates.values() for each in known.values()]
    if bundle.run is None or not any({"profile", "user_name"} & each.names("system", "user", "lead") for each in shown):
        return None
    recipe = load_stored(bundle.run)
    section = recipe.data.texts
    fields = users or cache(lambda: load(recipe.data, seed=recipe.seed).users)

    def said(user: str) -> Profile:
        text = profile_of(user, section) if section is not None else ""
        # In the control everybody has the text of somebody else, and no fields.
        return text or ({} if section is not None and section.shuffled else fields().get(user, {}))

    return said


def merged(past: Sequence[Event], since: Sequence[Event]) -> list[Event]:
    """Return a user's events of the data and those since, oldest first; one that is in both stands there once.

    Events without a time are older than all that have one.
    """
    both = {(event.item_id, event.timestamp) for event in past}
    every = [*past, *(event for event in since if (event.item_id, event.timestamp) not in both)]
    return sorted(every, key=lambda event: -math.inf if event.timestamp is None else event.timestamp)


def history_of(events: Sequence[Event], items: Mapping[str, Item]) -> list[dict[str, object]]:
    """Return a known user's history as a request has it; items that the catalogue has no more are left out."""
    return [told_event(event) for event in events if event.item_id in items]


def with_history(
    record: Mapping[str, object],
    histories: Callable[[], Histories],
    items: Mapping[str, Item],
    profiles: Callable[[str], Profile] | None = None,
) -> Mapping[str, object]:
    """Return a request with what is known of its user and what it does not bring itself.

    Args:
        record: A request as it was given.
        histories: What users did; it is called where a request brings a user and no history.
        items: The catalogue; items that it has no more are left out.
        profiles: See `profiles_of`.
    """
    # As the request is read: 1.0 is the user 1.
    user, found = identity(record, 1)[1], dict[str, object]()
    if user is not None and record.get("history") is None:
        found["history"] = history_of(histories().of_user(user), items)
    if user is not None and not record.get("profile") and profiles is not None and (said := profiles(user)):
        found["profile"] = said
    return {**record, **found} if found else record


def read_known(
    record: Mapping[str, object],
    row: int,
    histories: Callable[[], Histories],
    items: Mapping[str, Item] | None,
    profiles: Callable[[str], Profile] | None = None,
    *,
    whole: bool = False,
    retrieves: bool = False,
) -> RankRequest:
    """Read a request; what it does not bring of a known user is taken from what is stored, and a note says so.

    Args:
        record: As `read_request` takes it.
        row: See there.
        histories: What users did; it is called where a request names a user and brings no history.
        items: The catalogue, as `read_request` takes it.
        profiles: See `profiles_of`.
        whole: See `read_request`.
        retrieves: See there.

    Raises:
        DataError: If it cannot be ranked.
    """
    told = with_history(record, histories, items or {}, profiles)
    request = read_request(told, row, items, whole=whole, retrieves=retrieves)
    if request.user_id is None or record.get("history") is not None:
        return request
    stored = bool(told.get("profile")) and not record.get("profile")
    return of_user(request, known=stored or bool(histories().of_user(request.user_id)))


def of_user(request: RankRequest, *, known: bool) -> RankRequest:
    """Return a request whose history is what is stored of its user, with a note that says how much that is.

    Args:
        request: It names a user, and brought no history itself.
        known: Whether anything is stored of the user.
    """
    if not known:
        note = f"the user {shown(str(request.user_id))} is not known"
        return replace(request, unknown_user=True, notes=(note, *request.notes))
    events = len(request.history)
    note = f"history: {events} event{'' if events == 1 else 's'} that the data have of this user"
    return replace(request, notes=(*request.notes, note))


def unknown(what: str, name: str, known: Iterable[str]) -> DataError:
    """Return an error about a name that is not there."""
    return DataError(f"there is no {what} {name[:60]!r}{did_you_mean(name, known)}", kind="unknown-name", column=what)
