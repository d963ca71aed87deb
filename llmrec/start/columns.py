"""Guesses what the columns of a table contain (user, item, rating, ...), by their names and values.

A name is only a proposal: a column with a different value in every row is not the user whatever its name, a title must
be determined by its item, and numbers that look like counts are not ratings. If two columns fit the user or the item
equally well, the guess ends with an error that asks for the column, never with a random choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from llmrec.data.read.nested import LISTS, OBJECTS, leaf_name
from llmrec.data.read.tables import NO_COLUMN, Table, check_usable, nested_column_paths
from llmrec.data.read.typed import DATE_ORDERS, DateOrder
from llmrec.data.read.words import interpret_column_name, is_about_orders
from llmrec.data.sets.table import PART_SPELLINGS, parse_split_part
from llmrec.errors import DataError, did_you_mean
from llmrec.start.options import TableOptions
from llmrec.start.profile import (
    READABLE_FORMS,
    UNIX_RANGES,
    ColumnProfile,
    count_event_types,
    count_split_parts,
    dependence_share,
    describe_levels,
    describe_repetition,
    describe_times,
    id_problem,
    looks_like_ids,
    looks_like_ratings,
    printable_name,
    profile_columns,
    shell_quoted,
)

# --------------------------------------------------------------------------- roles


ROLES = ("user", "item", "rating", "time", "title", "text", "split")


@dataclass(frozen=True)
class RequestedRoles:
    """The columns that the user named; None means that a column is to be guessed."""

    user: str | None = None
    item: str | None = None
    rating: str | None = None
    time: str | None = None
    title: str | None = None
    text: str | None = None
    fields: tuple[str, ...] | None = None
    dates: DateOrder | None = None
    split: str | None = None

    def of(self, role: str) -> str | None:
        """Return the column that the user named for a role."""
        value: str | None = getattr(self, role)
        return value


def requested_roles(options: TableOptions) -> RequestedRoles:
    """Return the columns given as options; ``fields`` is comma-separated, ``dates`` is one of two words.

    Raises:
        DataError: If ``dates`` is another word.
    """
    dates = options.dates
    order = next((known for known in DATE_ORDERS if known == dates), None)
    if dates is not None and order is None:
        raise DataError(
            f"--dates {dates!r}{did_you_mean(dates, DATE_ORDERS)}; use {' or '.join(DATE_ORDERS)}",
            kind="unknown-name",
            column="dates",
        )
    fields = None if options.fields is None else tuple(filter(None, map(str.strip, options.fields.split(","))))
    roles = {role: getattr(options, role, None) for role in ROLES}
    return RequestedRoles(**roles, fields=fields, dates=order)


@dataclass(frozen=True)
class Roles:
    """What the columns of a table contain.

    Attributes:
        title: Column of item titles, if any, in this table or in that of the items.
        why: A reason for every column of both tables, used or not.
        profiles: Profile of each column of the table of interactions, by name.
        items: Profile of each column of the table of items, by name; empty if there is no such table.
        split: Column of the parts train, valid and test, if any.
        dates: Order of day and month in the column of times, if the user gave it.
    """

    user: str
    item: str
    rating: str | None
    time: str | None
    title: str | None
    text: str | None
    fields: tuple[str, ...]
    why: Mapping[str, str]
    profiles: Mapping[str, ColumnProfile] = field(repr=False)
    items: Mapping[str, ColumnProfile] = field(repr=False, default_factory=dict)
    split: str | None = None
    dates: DateOrder | None = None

    def named(self, role: str, default: str) -> str | None:
        """Return the recipe value for a role: the name of its column, or `NO_COLUMN`."""
        result: str | None = getattr(self, role)
        return result or (NO_COLUMN if default in self.profiles else None)

    def again(self, item: str) -> RequestedRoles:
        """Return the roles as options, after the item column was renamed."""
        return RequestedRoles(
            user=self.user,
            item=item,
            rating=self.rating or NO_COLUMN,
            time=self.time or NO_COLUMN,
            title=(item if self.title == self.item else self.title) or NO_COLUMN,
            text=self.text or NO_COLUMN,
            fields=self.fields,
            split=self.split or NO_COLUMN,
            dates=self.dates,
        )

    def uses(self, column: str) -> bool:
        """Whether a recipe uses a column."""
        return column in self.fields or any(getattr(self, role) == column for role in ROLES)

    def taken_for(self, column: str) -> str:
        """Return the recipe keys for which a column is used; ``-`` if there are none."""
        result = [role for role in ROLES if getattr(self, role) == column]
        return ", ".join(result) or ("field" if column in self.fields else "-")


def check_requested_columns(
    name: str,
    requested: RequestedRoles,
    profiles: Mapping[str, ColumnProfile],
    items: Mapping[str, ColumnProfile],
    inner: Sequence[str] = (),
) -> None:
    """Check that all columns that the user named exist, and that none is named twice.

    Args:
        name: Name of the table.
        requested: The roles that the user gave.
        profiles: The columns of the table of interactions.
        items: The columns of the table of items.
        inner: Further columns, inside lists.

    Raises:
        DataError: Otherwise; the message suggests the closest name.
    """
    for role in (*ROLES, "fields"):
        named = (requested.fields or ()) if role == "fields" else (requested.of(role),)
        known = [*profiles, *(c for c in items if c not in profiles and role in ("title", "fields"))]
        for column in named:
            if column is None or column in known or (column == NO_COLUMN and role not in ("user", "item")):
                continue
            raise DataError.at(
                name,
                "missing-column",
                f" has no column {column!r}{did_you_mean(column, [*known, *inner])}, named by --{role}; its columns "
                f"are: {', '.join(map(printable_name, [*known, *inner]))}",
                column,
            )
    taken = [column for role in ROLES if role != "title" and (column := requested.of(role)) not in (None, NO_COLUMN)]
    twice = next((column for column in taken if taken.count(column) > 1), None)
    if twice is not None:
        raise DataError(
            f"the column {twice!r} is used for two options: "
            f"{', '.join(f'--{role}' for role in ROLES if requested.of(role) == twice)}; use a different column for "
            "each option",
            kind="contradiction",
            column=twice,
        )


_MIN_DEPENDENCE = 0.95
_TIE_MARGIN = 0.1
_MAX_FIELDS = 4
_MAX_LEVELS = 101


def columns_inside_lists(table: Table, requested: RequestedRoles) -> tuple[str, ...]:
    """Return the used columns inside lists, whose elements become rows.

    They are those that the user gave; without any, the column whose name fits the item best, if no column outside lists
    fits as well.
    """
    inner = nested_column_paths(table)
    text = (*(requested.of(role) for role in ROLES), *(requested.fields or ()))
    chosen = tuple(name for name in text if name in inner)
    if chosen or requested.item is not None or not inner:
        return chosen
    best = max(inner, key=lambda path: interpret_column_name(path).weight("item"))
    others = max((interpret_column_name(column).weight("item") for column in table.frame.columns), default=0.0)
    return (best,) if interpret_column_name(best).weight("item") > others else ()


def guess_roles(table: Table, requested: RequestedRoles, items: Table | None = None) -> Roles:
    """Return the guessed roles of the columns.

    Args:
        table: The interactions.
        requested: The roles that the user gave.
        items: The table of items, if any, which is searched for titles and fields first.

    Raises:
        DataError: If a column is missing, no column fits the user or the item, or two columns fit equally well.
    """
    profiles = profile_columns(table, requested.dates)
    listed = profile_columns(items) if items is not None else {}
    for role in ROLES:
        if (named := requested.of(role)) is not None and named not in listed:
            check_usable(table, named, f"--{role}")
    check_requested_columns(table.name, requested, profiles, listed, nested_column_paths(table))
    return _RoleGuesser(table, profiles, requested, listed).roles()


def _choice_hint(start: str, role: str, column: str) -> str:
    return f"{start} {role}; select it with --{role} {shell_quoted(column)}"


def _field_hint(column: str) -> str:
    return f"to show it in prompts, set --fields {shell_quoted(column)}"


def _may_be_title(col: ColumnProfile) -> bool:
    return col.distinct >= 2 and col.letters >= 0.3 and col.length <= 300


class _RoleGuesser:
    """Assigns columns to `Roles`, one role at a time."""

    def __init__(
        self,
        table: Table,
        profiles: Mapping[str, ColumnProfile],
        requested: RequestedRoles,
        items: Mapping[str, ColumnProfile],
    ) -> None:
        self._name, self._unusable, self._inner = table.name, table.unusable, nested_column_paths(table)
        self._profiles, self._requested, self._items = profiles, requested, items
        self._why = {c: "you named it" for r in ROLES if (c := requested.of(r)) is not None and c != NO_COLUMN}
        self._used = set(self._why) - ({requested.title} if requested.title else set())
        self._dependences: dict[tuple[str, str], float | None] = {}
        self._user = self._item = ""

    def roles(self) -> Roles:
        self._assign_user_and_item()
        split = self._one("split", self._split)
        self._check_split(split)
        time = self._one("time", self._time)
        rating = self._one("rating", self._rating)
        title = self._one("title", self._find_title)
        text = self._one("text", lambda: self._text(rating))
        fields = self._fields(title)
        idle = {c: self._idle(col) for c, col in self._profiles.items() if c not in self._why}
        listed = {c: self._unused_item_reason(col) for c, col in self._items.items() if c not in {**self._why, **idle}}
        why = {**idle, **listed, **self._why}
        roles = Roles(
            self._user, self._item, rating, time, title, text, fields, why, self._profiles, self._items, split
        )
        ordered = time is not None and self._profiles[time].times.form in ("day-first dates", "month-first dates")
        return replace(roles, dates=self._requested.dates) if ordered else roles

    def _one(self, role: str, find: Callable[[], str | None]) -> str | None:
        text = self._requested.of(role)
        if text is not None:
            return None if text == NO_COLUMN else text
        result = find()
        if result is not None and role != "title":
            self._used.add(result)
        return result

    def _free(self) -> list[ColumnProfile]:
        return [col for name, col in self._profiles.items() if name not in self._used]

    def _dependence(self, column: str, other: str) -> float | None:
        """Return how well one column determines another; None if the table is too small."""
        if (column, other) not in self._dependences:
            self._dependences[column, other] = dependence_share(
                self._profiles[column].cells, self._profiles[other].cells
            )
        return self._dependences[column, other]

    def _determines(self, column: str, other: str) -> bool:
        return (self._dependence(column, other) or 0.0) >= _MIN_DEPENDENCE

    def _may_determine(self, column: str, other: str) -> bool:
        share = self._dependence(column, other)
        return share is None or share >= _MIN_DEPENDENCE

    # ----------------------------------------------------------------------- user and item

    def _assign_user_and_item(self) -> None:
        for role in ("user", "item"):
            text = self._requested.of(role)
            if text is not None and (fault := id_problem(self._profiles[text], named=True)):
                raise DataError.at(
                    self._name,
                    "bad-value",
                    f": the column {text!r} cannot be the {role}, since {fault}; name another --{role}",
                    text,
                )
        user = self._requested.user or self._find_by_name("user", self._requested.item)
        item = self._requested.item or self._find_by_name("item", user)
        if user is not None and item is None:
            item = self._find_item_by_content(user)
        if item is not None and user is None:
            user = self._find_user_by_content(item)
        missing = [role for role, result in (("user", user), ("item", item)) if result is None]
        if missing or user is None or item is None:
            raise DataError(self._describe_missing_roles(missing), kind="missing-column", at=self._name)
        self._user, self._item = user, item
        self._used |= {user, item}

    def _find_by_name(self, role: str, other: str | None) -> str | None:
        scored = []
        for col in self._free():
            weight = col.named.weight(role)
            if col.name == other or not weight:
                continue
            if fault := id_problem(col):
                self._why[col.name] = f"named like the {role}, but {fault}"
                continue
            scored.append((self._score(col, role, weight), col))
        if not scored:
            return None
        # Of equivalent columns, such as an id and a number of the same product, the first is used.
        scored.sort(key=lambda pair: -pair[0])
        top, best = scored[0]
        rivals = [h for s, h in scored[1:] if s >= top - _TIE_MARGIN and not self._same(best.name, h.name)]
        if role == "user":
            rivals = [h for h in rivals if not self._determines(best.name, h.name)]
        if rivals:
            both = [best.name, *(h.name for h in rivals)]
            raise DataError.at(
                self._name,
                "ambiguous",
                f": {' and '.join(repr(printable_name(name)) for name in both)} could each be the {role}; choose with "
                + " or ".join(f"--{role} {shell_quoted(name)}" for name in both),
            )
        for score, col in scored[1:]:
            if self._same(best.name, col.name):
                self._why[col.name] = f"equivalent to {printable_name(best.name)}"
            elif score >= 0.7:
                self._why[col.name] = _choice_hint("could also be the", role, col.name)
        self._why[best.name] = f"its name; {describe_repetition(best)}"
        return best.name

    def _score(self, col: ColumnProfile, role: str, weight: float) -> float:
        listed = self._items.get(leaf_name(col.name))
        known = role == "item" and listed is not None and listed.unique
        return weight + 0.05 * col.named.is_id + 0.15 * ("parent" in col.name.casefold()) + 0.5 * known

    def _same(self, column: str, other: str) -> bool:
        return self._determines(column, other) and self._determines(other, column)

    def _id_like_columns(self, *others: str) -> list[ColumnProfile]:
        """Return the columns whose values could be ids."""
        return [
            col
            for col in self._free()
            if col.name not in others
            and not id_problem(col)
            and looks_like_ids(col)
            and not any(self._determines(other, col.name) for other in others)
        ]

    def _find_item_by_content(self, user: str) -> str | None:
        ids = self._id_like_columns(user)
        titles = [
            h
            for h in self._free()
            if h.name != user and h.named.weight("title") >= 0.5 and not id_problem(h) and h.letters
        ]
        titles = [h for h in titles if not self._determines(user, h.name)]
        listed = [h for h in ids if (other := self._items.get(leaf_name(h.name))) is not None and other.unique]
        tied = [h for h in ids if any(h is not t and self._same(h.name, t.name) for t in titles)]
        marked = [h for h in ids if h.named.is_id and not h.named.weight("row")]
        return self._single_candidate(
            (listed, "also in the table of items"),
            (tied, f"one ID per {printable_name(titles[0].name)}" if titles else ""),
            (marked, "the only remaining ID column"),
            (titles, "titles, which are used as IDs"),
            (ids, "the only remaining column with repeated values, like IDs"),
        )

    def _find_user_by_content(self, item: str) -> str | None:
        ids = self._id_like_columns(item)
        marked = [h for h in ids if h.named.is_id and not h.named.weight("row")]
        return self._single_candidate(
            (marked, "the only remaining ID column"),
            (ids, "the only remaining column with repeated values, like IDs"),
        )

    def _single_candidate(self, *candidates: tuple[list[ColumnProfile], str]) -> str | None:
        """Return the column of the first list with a single one, for the reason given with the list."""
        for result, reason in candidates:
            if len(result) == 1:
                self._why[result[0].name] = f"{reason}; {describe_repetition(result[0])}"
                return result[0].name
        return None

    def _describe_missing_roles(self, missing: Sequence[str]) -> str:
        text = [f"{printable_name(c)!r} is {why}" for c, why in self._why.items() if why.startswith("named like")]
        columns = ", ".join(f"{printable_name(c)} ({h.distinct} values)" for c, h in self._profiles.items())
        return (
            f"{self._name}: found no column for the {' or the '.join(missing)}"
            + (f" ({'; '.join(text)})" if text else "")
            + f"; set {' '.join(f'--{role} COLUMN' for role in missing)}"
            + f". The columns ({self._rows()} rows) are: {columns}"
            + (f"; columns in lists: {', '.join(map(printable_name, self._inner))}" if self._inner else "")
            + "".join(
                f"; {printable_name(c)} contains {col}, which cannot be used"
                for c, col in self._unusable.items()
                if col not in (OBJECTS, LISTS)
            )
        )

    def _rows(self) -> int:
        return next(iter(self._profiles.values())).rows

    # ----------------------------------------------------------------------- other roles

    def _split(self) -> str | None:
        """Return the only column whose values name parts of a split; None if not unique."""
        result = {}
        for col in self._free():
            sizes = count_split_parts(col)
            if sum(sizes.values()) == col.rows and sizes["train"] and sizes["test"]:
                result[col.name] = ", ".join(f"{part} {n}" for part, n in sizes.items() if n)
        for name, counted in result.items():
            alone = len(result) == 1
            self._why[name] = f"its values; {counted}" if alone else _choice_hint("could be the", "split", name)
        return next(iter(result)) if len(result) == 1 else None

    def _check_split(self, column: str | None) -> None:
        """Reject a split column with a value that is not a part of a split."""
        if column is None:
            return
        col = self._profiles[column]
        if sum(count_split_parts(col).values()) < col.rows:
            other = next(cell for cell in col.cells.unique(maintain_order=True) if parse_split_part(cell) is None)
            raise DataError.at(
                self._name,
                "bad-value",
                f": column {printable_name(column)!r} cannot be the split, since it contains "
                f"{printable_name(other)!r}; every row needs one of {', '.join(PART_SPELLINGS)}. Correct it, or choose "
                "another --split",
                column,
            )

    def _time(self) -> str | None:
        scored = []
        for col in self._free():
            weight = col.named.weight("time")
            times = col.times
            if times.form == "no times" or col.distinct < 2 or col.named.weight("count"):
                if weight and col.filled and col.distinct > 1:
                    self._why[col.name] = "named like a time, but contains neither numbers nor dates"
                continue
            unix = times.low is not None and any(
                low <= times.low and (times.high or 0) < high for low, high in UNIX_RANGES
            )
            if not weight and ((times.form == "numbers" and not unix) or col.filled < col.rows):
                continue
            if self._describes_entity(col):
                continue
            scored.append((max(weight, 0.3) + 0.3 * (times.form in READABLE_FORMS) + 1e-9 * col.distinct, col))
        return self._first(scored, "time", describe_times)

    def _rating(self) -> str | None:
        named, others = [], []
        for col in self._free():
            weight = col.named.weight("rating")
            if not col.numeric or col.distinct < 2 or col.named.weight("count") or self._describes_entity(col):
                if weight and col.filled and not col.numeric:
                    self._why[col.name] = "named like a rating, but contains no numbers"
                continue
            if col.counts:
                if weight:
                    self._why[col.name] = (
                        f"named like a rating, but its numbers look like {self._counts_or_amounts(col)}, from "
                        f"{col.levels[0]:g} to {col.levels[-1]:g}; to use it, set --rating {shell_quoted(col.name)}"
                    )
                continue
            if weight:
                overall = "overall" in col.name.casefold()
                named.append((weight + 0.2 * overall + 0.01 * (len(col.levels) <= _MAX_LEVELS), col))
            elif looks_like_ratings(col) and col.filled == col.rows:
                others.append((0.1, col))
        if not named and len(others) > 1:
            for _, col in others:
                self._why[col.name] = _choice_hint("could be a", "rating", col.name)
            return None
        return self._first(named or others, "rating", describe_levels)

    def _counts_or_amounts(self, col: ColumnProfile) -> str:
        return "counts" if col.whole else "amounts"

    def _find_title(self) -> str | None:
        if self._items:
            result = self._find_title_of_items()
            if result is not None:
                return result
        scored = []
        for col in self._free():
            weight = col.named.weight("title")
            if not _may_be_title(col) or col.named.weight("field") or col.named.weight("text"):
                continue
            determined = self._determines(self._item, col.name)
            many = col.distinct >= 0.7 * self._profiles[self._item].distinct
            if weight and not self._may_determine(self._item, col.name):
                if not self._determines(self._user, col.name):
                    self._why[col.name] = f"named like a title, but one {printable_name(self._item)} has several"
                continue
            if weight or (determined and many and col.words >= 1.5):
                scored.append((weight + 0.1, col))
        result = self._first(scored, "title", lambda col: f"one title per {printable_name(self._item)}")
        item = self._profiles[self._item]
        if result is None and item.letters >= 0.5 and (item.words >= 1.5 or item.named.weight("title")):
            return self._item
        return result

    def _find_title_of_items(self) -> str | None:
        scored = []
        for col in self._items.values():
            weight = col.named.weight("title")
            if col.name == leaf_name(self._item) or not _may_be_title(col):
                continue
            if weight or (col.words >= 1.5 and col.unique and col.length <= 100):
                scored.append((weight + 0.1 * col.unique, col))
        if not scored:
            return None
        _, best = max(scored, key=lambda pair: pair[0])
        self._why[best.name] = f"{'its name' if best.named.weight('title') else 'its values'}; in the table of items"
        return best.name

    def _text(self, rating: str | None) -> str | None:
        scored = []
        for col in self._free():
            weight = col.named.weight("text")
            review = col.named.weight("review") or col.name == "text"
            if col.letters < 0.5 or col.distinct < 2 or col.named.weight("field") or col.named.weight("headline"):
                continue
            if col.words < 2 or (not weight and (col.words < 5 or col.distinct < 0.5 * col.filled)):
                if weight:
                    self._why[col.name] = f"named like a text, but has {col.words:.1f} words on average"
                continue
            if self._describes_entity(col):
                continue
            if not review and (rating is None or is_about_orders(col.name)):
                self._why[col.name] = (
                    f"a text, possibly not about {printable_name(self._item)}; if it is a review, set --text "
                    f"{shell_quoted(col.name)}"
                )
                continue
            scored.append((weight + min(col.words, 100) / 1000, col))
        share = self._rows()
        return self._first(
            scored, "text", lambda col: f"{col.words:.0f} words on average; in {col.filled / share:.0%} of the rows"
        )

    def _describes_entity(self, col: ColumnProfile) -> bool:
        """Whether a column describes the user or the item instead of the interaction."""
        return self._determines(self._item, col.name) or self._determines(self._user, col.name)

    def _first(
        self, scored: list[tuple[float, ColumnProfile]], role: str, say: Callable[[ColumnProfile], str]
    ) -> str | None:
        if not scored:
            return None
        scored.sort(key=lambda pair: -pair[0])
        best = scored[0][1]
        for _, col in scored[1:]:
            self._why[col.name] = _choice_hint("could also be the", role, col.name)
        self._why[best.name] = f"{'its name' if best.named.weight(role) else 'its values'}; {say(best)}"
        return best.name

    def _fields(self, title: str | None) -> tuple[str, ...]:
        if self._requested.fields is not None:
            chosen = tuple(column for column in self._requested.fields if column != NO_COLUMN)
            self._why |= dict.fromkeys(chosen, "you named it")
            return chosen
        scored: list[tuple[float, str]] = []
        for table, col in [("items", h) for h in self._items.values()] + [("", h) for h in self._free()]:
            item = leaf_name(self._item) if table else self._item
            if col.name in (title, item) or col.name in (name for _, name in scored):
                continue
            weight = col.named.weight("field")
            plain = col.letters >= 0.5 and not col.named.roles and not col.named.is_id
            few = col.distinct <= 0.5 * (col.rows if table else self._profiles[self._item].distinct)
            if col.distinct < 2 or col.length > 80 or col.filled < 0.5 * col.rows:
                continue
            if not (weight or (plain and few and col.length <= 40)):
                continue
            if (
                table
                or self._determines(self._item, col.name)
                or (weight and self._may_determine(self._item, col.name))
            ):
                scored.append((weight, col.name))
                self._why[col.name] = (
                    "in the table of items" if table else f"one value per {printable_name(self._item)}"
                ) + (f"; {col.distinct} values")
        kept: list[str] = []
        for _, name in sorted(scored, key=lambda pair: -pair[0]):
            same = next((other for other in kept if self._has_equal_values(name, other)), None)
            if same is not None:
                self._why[name] = f"has the same values as {printable_name(same)}"
            elif len(kept) < _MAX_FIELDS:
                kept.append(name)
            else:
                self._why[name] = f"describes {printable_name(self._item)}; {_field_hint(name)}"
        return tuple(name for _, name in scored if name in kept)

    def _has_equal_values(self, column: str, other: str) -> bool:
        """Whether two columns have equal values; numbers are compared numerically."""
        first, second = (self._profiles.get(name) or self._items[name] for name in (column, other))
        if (column in self._profiles) != (other in self._profiles):
            return False
        if first.numeric and second.numeric:
            return first.numbers.values.equals(second.numbers.values, check_names=False)
        return first.cells.equals(second.cells, check_names=False)

    def _idle(self, col: ColumnProfile) -> str:
        if not col.filled:
            return "it is empty"
        if col.distinct == 1:
            return "the same value in every row"
        if col.unique and col.words < 3:
            return "a different value in every row, like a row ID"
        if col.named.weight("row"):
            return "an order or row ID, by its name"
        if self._determines(self._item, col.name):
            return f"describes {printable_name(self._item)}; {_field_hint(col.name)}"
        if self._determines(self._user, col.name):
            return f"describes {printable_name(self._user)}; user columns need a table of users"
        if col.named.weight("count"):
            return "a count or an amount, by its name"
        if count_event_types(col):
            return "kinds of interactions, by its values; see the note"
        if col.numeric and col.counts:
            return f"looks like {self._counts_or_amounts(col)}, not like ratings"
        return "not used by llmrec"

    def _unused_item_reason(self, col: ColumnProfile) -> str:
        if col.name == leaf_name(self._item):
            return f"the same as {printable_name(self._item)}"
        return self._idle(col) if col.distinct < 2 else _field_hint(col.name)
