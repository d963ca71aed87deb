"""Test and validation cases of a split, created on access."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from typing import overload

from llmrec.data.candidates import CandidateSets
from llmrec.data.split import Holdouts, SplitDataset, request_id, request_of
from llmrec.errors import DataError
from llmrec.types import Case, Interaction, SplitName


def held_out_interactions(data: SplitDataset, split: SplitName) -> Holdouts:
    """Return the held-out interactions of validation or test."""
    if split == "train":
        raise ValueError("the training split has no held-out interactions; use 'valid' or 'test'")
    return data.holdouts(split)


class Cases(Sequence[Case]):
    """The cases of held-out interactions, created on access to save memory.

    Attributes:
        held: The interactions.
    """

    def __init__(self, held: Sequence[Interaction], make: Callable[[Interaction], Case]) -> None:
        self.held, self._make = held, make

    def __len__(self) -> int:
        return len(self.held)

    @overload
    def __getitem__(self, index: int) -> Case: ...

    @overload
    def __getitem__(self, index: slice) -> list[Case]: ...

    def __getitem__(self, index: int | slice) -> Case | list[Case]:
        held = self.held[index]
        return self._make(held) if isinstance(held, Interaction) else [self._make(item) for item in held]

    def __iter__(self) -> Iterator[Case]:
        return map(self._make, self.held)


def cases_of_first_users(
    cases: Sequence[Case], count: int | None, *, among: Collection[str] | None = None, but: Collection[str] = ()
) -> list[Case]:
    """Return the cases of the first ``count`` users in order, without creating the others.

    Args:
        cases: The cases.
        count: Number of users; None: all.
        among: Users to include; None: all.
        but: Users to exclude.
    """
    requests = cases.held if isinstance(cases, Cases) else [case.request for case in cases]
    users = [item.user_id for item in requests]
    eligible = dict.fromkeys(user for user in users if user not in but and (among is None or user in among))
    chosen = set(islice(eligible, count))
    return [cases[index] for index, user in enumerate(users) if user in chosen]


def limit_per_user(held: Sequence[Interaction], count: int | None) -> Sequence[Interaction]:
    """Return the first ``count`` held-out interactions of each user, in the given order; all if None."""
    if count is None:
        return held
    seen: Counter[str] = Counter()
    result = []
    for item in held:
        seen[item.user_id] += 1
        if seen[item.user_id] <= count:
            result.append(item)
    return tuple(result)


def stored_candidates(sets: CandidateSets | None, held: Interaction, family: str) -> tuple[str, ...] | None:
    """Return the stored candidates of a held-out interaction; None if there are no candidate sets.

    Raises:
        DataError: If there are sets but none for this interaction.
    """
    if sets is None:
        return None
    name = request_id(held.user_id, held.item_id)
    if name not in sets.sets:
        raise DataError(
            f"tasks.{family}: the stored candidates lack request {name!r}, since they were drawn for another split, "
            "seed or data set; draw the candidates again",
            kind="mismatch",
            column=f"tasks.{family}",
        )
    return sets.sets[name]


def ranking_cases(data: SplitDataset, split: SplitName, sets: CandidateSets | None, family: str) -> Cases:
    """Return the held-out interactions of users with candidate sets, or of all users if there are no sets.

    Raises:
        DataError: If there are sets but one is missing.
    """
    every = held_out_interactions(data, split).of(sets.users if sets is not None else None)
    for held in every if sets is not None else ():
        stored_candidates(sets, held, family)

    def case(held: Interaction) -> Case:
        request = request_of(data, held, split, candidates=stored_candidates(sets, held, family))
        return Case(request=request, truth=held.item_id)

    return Cases(every, case)
