"""What the columns of a table can be, what the user said about them, and what they were taken for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmrec.data.read.columns import NONE
from llmrec.data.read.dates import ORDERS, DateOrder
from llmrec.errors import DataError, did_you_mean
from llmrec.start.init.profile import Profile, shown

ROLES = ("user", "item", "rating", "time", "title", "text", "split")


@dataclass(frozen=True)
class Asked:
    """What the user said: column names, `NONE` to leave a role out, None where it is to be guessed."""

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
        """Return what was said of a role."""
        value: str | None = getattr(self, role)
        return value


def asked(
    *,
    user: str | None = None,
    item: str | None = None,
    rating: str | None = None,
    time: str | None = None,
    title: str | None = None,
    text: str | None = None,
    fields: str | None = None,
    dates: str | None = None,
    split: str | None = None,
) -> Asked:
    """Read what stands on a command line: ``fields`` with commas between them, ``dates`` as one of two words.

    Raises:
        DataError: If ``dates`` is another word.
    """
    order = next((each for each in ORDERS if each == dates), None)
    if dates is not None and order is None:
        raise DataError(
            f"--dates {dates!r}{did_you_mean(dates, ORDERS)}: say {' or '.join(ORDERS)}",
            kind="unknown-name",
            column="dates",
        )
    listed = None if fields is None else tuple(part for part in map(str.strip, fields.split(",")) if part)
    return Asked(user, item, rating, time, title, text, listed, order, split)


@dataclass(frozen=True)
class Roles:
    """Which column is what.

    Attributes:
        user: The user's column.
        item: The item's column.
        rating: Column of ratings, if any; so are the next three.
        time: Of times.
        title: Of item titles, in this table or in that of the items.
        text: Of what the user wrote.
        fields: Further columns about items.
        why: A reason for every column of both tables, used or not.
        profiles: Every column of the table of interactions by name.
        items: Every column of the table of items by name; empty where there is none.
        split: The column that says train, valid or test, if any.
        dates: What was said of the order in dates of the column of times.
    """

    user: str
    item: str
    rating: str | None
    time: str | None
    title: str | None
    text: str | None
    fields: tuple[str, ...]
    why: Mapping[str, str]
    profiles: Mapping[str, Profile] = field(repr=False)
    items: Mapping[str, Profile] = field(repr=False, default_factory=dict)
    split: str | None = None
    dates: DateOrder | None = None

    def named(self, role: str, own: str) -> str | None:
        """Return a role's column as recipes say it: `NONE` where there is none, and a column has llmrec's own name."""
        found: str | None = getattr(self, role)
        return found or (NONE if own in self.profiles else None)

    def again(self, item: str) -> Asked:
        """Return the roles as something asked for, of a copy of the table that calls the item so."""
        return Asked(
            user=self.user,
            item=item,
            rating=self.rating or NONE,
            time=self.time or NONE,
            title=(item if self.title == self.item else self.title) or NONE,
            text=self.text or NONE,
            fields=self.fields,
            split=self.split or NONE,
            dates=self.dates,
        )

    def uses(self, column: str) -> bool:
        """Whether a recipe names a column."""
        return column in self.fields or any(getattr(self, role) == column for role in ROLES)

    def taken_for(self, column: str) -> str:
        """Return what a column was taken for, in the words of a recipe; ``-`` for one that is not used."""
        found = [role for role in ROLES if getattr(self, role) == column]
        return ", ".join(found) or ("field" if column in self.fields else "-")


def check_asked(
    name: str,
    asked: Asked,
    profiles: Mapping[str, Profile],
    items: Mapping[str, Profile],
    inner: Sequence[str] = (),
) -> None:
    """Check that every column that was named exists, and is named once.

    Args:
        name: Of the table.
        asked: What the user said.
        profiles: Every column of the table of interactions.
        items: Every column of the table of items.
        inner: Further columns, in lists.

    Raises:
        DataError: If not; the message suggests the closest name.
    """
    for role in (*ROLES, "fields"):
        named = (asked.fields or ()) if role == "fields" else (asked.of(role),)
        known = [*profiles, *(c for c in items if c not in profiles and role in ("title", "fields"))]
        for column in named:
            if column is None or column in known or (column == NONE and role not in ("user", "item")):
                continue
            raise DataError.at(
                name,
                "missing-column",
                f" has no column {column!r}{did_you_mean(column, [*known, *inner])}, named by --{role}; its columns "
                f"are: {', '.join(map(shown, [*known, *inner]))}",
                column,
            )
    taken = [column for role in ROLES if role != "title" and (column := asked.of(role)) not in (None, NONE)]
    twice = next((column for column in taken if taken.count(column) > 1), None)
    if twice is not None:
        raise DataError(
            f"the column {twice!r} is named for two things: "
            f"{', '.join(f'--{role}' for role in ROLES if asked.of(role) == twice)}; give each a column of its own",
            kind="contradiction",
            column=twice,
        )
