"""Counts of users, items and interactions, and how data at hand compares with published ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """Numbers of users, of items and of interactions.

    Attributes:
        users: Users with an interaction; None where it is not published.
        items: Items with an interaction; None where it is not published.
        interactions: Rows.
        origin: Who says so.
        rounded: Whether the page rounds to tenths of a thousand or of a million.
    """

    users: int | None
    items: int | None
    interactions: int
    origin: str
    rounded: bool = False

    def agrees(self, other: Counts) -> bool:
        """Whether another count is the same, as far as this one says."""
        pairs = (
            (self.users, other.users),
            (self.items, other.items),
            (self.interactions, other.interactions),
        )
        return all(
            mine is None or (theirs is not None and abs(mine - theirs) <= self._slack(mine)) for mine, theirs in pairs
        )

    def _slack(self, number: int) -> int:
        if not self.rounded or number < 1000:
            return 0
        return 50_000 if number >= 1_000_000 else 50

    def __str__(self) -> str:
        parts = ((self.users, "users"), (self.items, "items"), (self.interactions, "interactions"))
        return " / ".join(f"{number:,} {what}" for number, what in parts if number is not None)


def comparison(known: Counts, here: Counts) -> tuple[str, bool]:
    """Say how data compares with what is published about its file.

    Args:
        known: What is published.
        here: What was read, before any filter.

    Returns:
        A sentence, and whether the counts differ.
    """
    if known.agrees(here):
        return f"as published: {known} ({known.origin})", False
    sentence = f"published: {known} ({known.origin}); here: {here}; expected when the file was filtered or cut"
    return sentence, True
