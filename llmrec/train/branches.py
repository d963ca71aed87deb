"""Draws the rows of one user together, so that tasks whose question follows the history branch off one history."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from llmrec.backends.encode import Encoder, TokenRow
from llmrec.errors import DataError
from llmrec.tasks.base import keyed
from llmrec.train.batches import fit_row
from llmrec.types import Example


@runtime_checkable
class Branching(Protocol):
    """A task that can give its row of a user with the history that other tasks show at the same time."""

    @property
    def branches(self) -> bool:
        """Whether some template asks its question after the history."""
        ...

    def branch(self, number: int, user: str) -> Example | None:
        """Return the user's row of a pass; None if there is none."""
        ...


def branching_rows(
    tasks: Mapping[str, Branching],
    weights: Mapping[str, float],
    users: Sequence[str],
    encoder: Encoder,
    *,
    limit: int,
    seed: int,
    lines: bool = False,
) -> Iterator[tuple[str, TokenRow | None]]:
    """Yield families and rows without end, the rows of a user one after the other, pass after pass over the users.

    The family that is furthest behind its share of tokens gives a row of every user, and another one does unless it is
    ahead of the first even then. So after any number of users each family is within two rows of its share.

    Args:
        tasks: Families by name.
        weights: Their shares.
        users: Everybody.
        encoder: What counts tokens.
        limit: Longest row; a longer one is cut, or None where no target is left.
        seed: The run's seed.
        lines: Whether list rows say where their lines begin.

    Raises:
        DataError: If a pass over all users gives no row.
    """
    served = dict.fromkeys(sorted(tasks), 0.0)
    number = 0
    while True:
        order = sorted(users)
        keyed("branch order", seed, str(number)).shuffle(order)
        before = sum(served.values())
        for user in order:
            bar = math.inf
            for family in sorted(served, key=lambda name: served[name] / weights[name]):
                if served[family] / weights[family] > bar:
                    break
                example = tasks[family].branch(number, user)
                if example is None:
                    continue
                row = fit_row(example, encoder, limit, lines=lines)
                served[family] += max(1, len(row.ids)) if row else 1
                bar = min(bar, served[family] / weights[family])
                yield family, row
        if sum(served.values()) == before:
            names = ", ".join(served)
            raise DataError(
                f"tasks {names}: no user has enough training interactions; use more data or drop a task", kind="too-few"
            )
        number += 1
