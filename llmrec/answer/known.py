"""The catalogue of a model and the histories of its users, which are read without opening the model.

Items and events come from the run's data or the exported folder, and from what a service received since.
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

from llmrec.answer.rules import Rules
from llmrec.baselines.parameters import config_of
from llmrec.data.assemble import read_items
from llmrec.data.dataset import Dataset, conform
from llmrec.data.described import described_items, profile_of
from llmrec.data.features import FeatureStore
from llmrec.data.hashing import digest_strings
from llmrec.data.read.codes import codes
from llmrec.data.read.limits import shown
from llmrec.data.read.typed import per_second
from llmrec.data.requests import RankRequest, identity, read_request, told_event
from llmrec.data.sets.table import load
from llmrec.data.split import time_order
from llmrec.ensembles.carried import NUMBERED, carried
from llmrec.errors import DataError, did_you_mean
from llmrec.pipeline import bundle as bundles
from llmrec.pipeline.bundle import Bundle
from llmrec.recipe.load import load_stored
from llmrec.recipe.schema import Recipe
from llmrec.types import Event, Item

Users = Mapping[str, Mapping[str, str]]
Profile = str | Mapping[str, str]
"""What prompts show of a user: a text, or fields by name."""

ITEMS = "items.parquet"
"""The catalogue that an exported folder may carry."""

# Rule sets whose allowed items are remembered for one state of the catalogue.
_REMEMBERED = 8


class Catalogue:
    """Items by id, which can be added, replaced and removed while other threads look them up.

    A change makes a new mapping, so that readers continue with the one they have.

    Args:
        items: To begin with.

    Attributes:
        changes: How often items changed, for callers that cache something derived from them.
    """

    def __init__(self, items: Mapping[str, Item]) -> None:
        self.items = dict(items)
        self.changes = 0
        # Each is stored with the mapping that it was derived from, which may have been replaced meanwhile.
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
        """Return an item."""
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
        if (result := known.get(rules)) is None:
            rules.check(items)
            if len(known) >= _REMEMBERED:
                known.clear()
            result = known[rules] = rules.allowed(items)
        return result

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
            result = texts.gather(places)
            begins = result.str.starts_with(sought) | (ids.gather(places) == words.strip())
            word = result.str.contains(f" {sought}", literal=True)
            order = np.where(begins.to_numpy(), 0, np.where(word.to_numpy(), 1, 2))
            places = places[np.argsort(order, kind="stable")]
        else:
            places = np.arange(len(ids))
        return [items[name] for name in ids.gather(places[offset : offset + limit])], len(places)

    def _texts(self) -> tuple[Mapping[str, Item], pl.Series, pl.Series]:
        result, items = self._search, self.items
        if result is None or result[0] is not items:
            titles = [item.title.casefold() for item in items.values()]
            result = items, pl.Series(list(items), dtype=pl.String), pl.Series(titles, dtype=pl.String)
            self._search = result
        return result


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
        """Return histories of no user."""
        empty = pl.Series(dtype=pl.String)
        return cls(empty, np.zeros(1, dtype=np.int64), empty, np.empty(0), np.empty(0))

    @cached_property
    def digest(self) -> str:
        """A hash over all of them."""
        result = hashlib.sha256(digest_strings([*self.users.to_list(), *self.items.cast(pl.String).to_list()]).encode())
        for numbers in (self.starts, self.ratings, self.times):
            result.update(numbers.tobytes())
        return result.hexdigest()[:32]

    @property
    def per_second(self) -> float:
        """Units of time in a second: 1, or more where times are so large that they can be no seconds."""
        return per_second(float(np.nanmax(self.times)) if len(self.times) and not np.isnan(self.times).all() else 0.0)

    def of_user(self, user_id: str) -> list[Event]:
        """Return a user's events; none of a user who is not known."""
        if not len(self.users):
            return []
        position = int(self.users.search_sorted(user_id))
        if position >= len(self.users) or self.users[position] != user_id:
            return []
        rows = range(int(self.starts[position]), int(self.starts[position + 1]))
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
    """The items and users of a run or an exported folder.

    Attributes:
        items: The catalogue.
        histories: All interactions of its data, whichever part of the split they are in.
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
        """A hash over everything that requests get of users: their histories, and what prompts show of them."""
        stores = [FeatureStore.open(folder).stamp for folder in self.features]
        users = sorted(self.users.items()) if self.profiles else []
        shown = [repr((user, sorted(values.items()))) for user, values in users]
        return digest_strings([self.histories.digest, *stores, *shown])

    def profile(self, user: str | None, erased: Callable[[str], bool] = lambda user: False) -> Profile | None:
        """Return the text or the fields that prompts show of a user; None where there are none, or of an erased one."""
        if self.profiles is None or user is None or erased(user):
            return None
        return self.profiles(user) or None


def catalogue_of(bundle: Bundle, items: Path | None) -> tuple[Mapping[str, Item] | None, Dataset | None]:
    """Return the items that requests may name by id, and the data of a run where they were read for that.

    The items are those of a table, of the run's own data, or what the folder carries. Of a tuned model that carries
    none no id is known: the items that it was tuned on have titles, and an id is none. A plain pretrained model has no
    items, and None says that what requests name are titles.

    Raises:
        DataError: If a table or the run's data cannot be read.
    """
    if items is not None:
        return read_items(items), None
    if bundle.run is not None:
        recipe = load_stored(bundle.run)
        data = _data_of_run(bundle, recipe)
        return described_items(data.items, recipe.data.texts), data
    carried = Path(bundle.folder) / ITEMS
    if carried.is_file():
        return read_items(carried), None
    return ({} if bundle.tuned else None), None


def _data_of_run(bundle: Bundle, recipe: Recipe) -> Dataset:
    """Read the data of a run."""
    try:
        return load(recipe.data, seed=recipe.seed)
    except DataError as error:
        raise DataError(
            f"{error}. This is the data of the run {bundle.run}; or name a table with --items",
            kind=error.kind,
            at=error.place,
            column=error.column,
        ) from None


def known_of(folder: str, items: Path | None) -> Known:
    """Read the items and interactions of a run or an exported folder.

    Args:
        folder: As `llmrec.pipeline.bundle.read` takes it.
        items: A table of items that goes before those of the folder.

    Raises:
        LlmrecError: If they cannot be read.
    """
    bundle = bundles.read(folder)
    catalogue, data = catalogue_of(bundle, items)
    return known_from(bundle, catalogue or {}, data)


def known_from(bundle: Bundle, items: Mapping[str, Item], data: Dataset | None = None) -> Known:
    """Return the items and users of an open model.

    Args:
        bundle: The model.
        items: Its catalogue.
        data: Those of its run, where they were read already.

    Raises:
        LlmrecError: If something cannot be read.
    """
    if bundle.run is None:
        exported = carried(Path(bundle.folder), seed=bundle.seed)
        past = Histories.none() if exported is None else Histories.of(_of_named(exported.dataset), bundle.seed)
        return Known(items, past)
    recipe = load_stored(bundle.run)
    dataset = _data_of_run(bundle, recipe) if data is None else data
    profiles = profiles_of(str(bundle.run), lambda: dataset.users)
    return Known(items, Histories.of(dataset, recipe.seed), _stores(bundle.run, recipe), profiles, dataset.users)


def _of_named(dataset: Dataset) -> Dataset:
    """Return the interactions of users whose names were exported; the others are numbered, and not known by that."""
    rows = dataset.interactions.with_columns(pl.col("user_id").cast(pl.String))
    return replace(dataset, interactions=conform(rows.filter(~pl.col("user_id").str.starts_with(NUMBERED))))


def _stores(run: Path, recipe: Recipe) -> list[Path]:
    """Return the stores of features that a run wrote or reads, in prompts and in baselines."""
    tables = filter(None, (recipe.data, recipe.reviews))
    named = [table.texts.path for table in tables if table.texts is not None]
    for section in recipe.tasks.present().values():
        for baseline in section.baselines:
            named += getattr(config_of(baseline.name, baseline.parameters, "parameters"), "folders", ())
    folders = dict.fromkeys([run / "features", *(Path(path).expanduser() for path in named)])
    return [store for store in folders if (store / "current").is_file()]


def profiles_of(folder: str, users: Callable[[], Users] | None = None) -> Callable[[str], Profile] | None:
    """Return a function from a user to what a run's prompts show of the user: a text (``data.texts``), or fields.

    None where they show nothing of users.

    Args:
        folder: As `llmrec.pipeline.bundle.read` takes it.
        users: Returns the fields of the run's users; by default they are read at the first call.
    """
    bundle = bundles.read(folder)
    shown = [item for known in bundle.templates.values() for item in known.values()]
    if bundle.run is None or not any(
        {"profile", "user_name"} & template.names("system", "user", "lead") for template in shown
    ):
        return None
    recipe = load_stored(bundle.run)
    section = recipe.data.texts
    fields = users or cache(lambda: load(recipe.data, seed=recipe.seed).users)

    def profile(user: str) -> Profile:
        text = profile_of(user, section) if section is not None else ""
        # In the control every user has the text of another, and no fields.
        return text or ({} if section is not None and section.shuffled else fields().get(user, {}))

    return profile


def merged(past: Sequence[Event], since: Sequence[Event]) -> list[Event]:
    """Return a user's events of the data and those since, oldest first, without duplicates.

    Events without a time are older than all that have one.
    """
    both = {(event.item_id, event.timestamp) for event in past}
    every = [*past, *(event for event in since if (event.item_id, event.timestamp) not in both)]
    return sorted(every, key=lambda event: -math.inf if event.timestamp is None else event.timestamp)


def with_history(
    record: Mapping[str, object],
    events: Callable[[str], Sequence[Event]],
    items: Mapping[str, Item],
    profile: Callable[[str], Profile | None] | None = None,
) -> tuple[Mapping[str, object], bool]:
    """Return a request completed by what is stored of its user, and whether anything is.

    Every interface looks up users here.

    Args:
        record: A request as it was given.
        events: Returns what a user did, oldest first; it is called where a request names a user and has no history.
        items: The catalogue; events of items that it lacks are left out.
        profile: Returns what prompts show of a user; see `profiles_of`.
    """
    # As the request is read: 1.0 is the user 1.
    user, looked_up, stored = identity(record, 1)[1], dict[str, object](), False
    if user is not None and record.get("history") is None:
        past = events(user)
        stored = bool(past)
        looked_up["history"] = [told_event(event) for event in past if event.item_id in items]
    if user is not None and not record.get("profile") and profile is not None and (shown := profile(user)):
        stored = True
        looked_up["profile"] = shown
    return ({**record, **looked_up} if looked_up else record), stored


def read_known(
    record: Mapping[str, object],
    row: int,
    events: Callable[[str], Sequence[Event]],
    items: Mapping[str, Item] | None,
    profile: Callable[[str], Profile | None] | None = None,
    *,
    whole: bool = False,
    retrieves: bool = False,
) -> RankRequest:
    """Read a request; what it lacks of a known user is looked up, and a note says so.

    Args:
        record: As `read_request` takes it.
        row: See there.
        events: See `with_history`.
        items: The catalogue, as `read_request` takes it.
        profile: See `with_history`.
        whole: See `read_request`.
        retrieves: See there.

    Raises:
        DataError: If it cannot be ranked.
    """
    given, stored = with_history(record, events, items or {}, profile)
    request = read_request(given, row, items, whole=whole, retrieves=retrieves)
    if request.user_id is None or record.get("history") is not None:
        return request
    return of_user(request, known=stored)


def of_user(request: RankRequest, *, known: bool) -> RankRequest:
    """Return a request with the stored history of its user, with a note on its length.

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
    """Return an error about an unknown name."""
    return DataError(f"there is no {what} {name[:60]!r}{did_you_mean(name, known)}", kind="unknown-name", column=what)
