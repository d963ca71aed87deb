"""How well generated lists are formed: do they parse, do they name real items, do they repeat themselves?"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ListRates:
    """Rates over generated lists; all lie in [0, 1].

    Attributes:
        parse: Share of answers that hold a list at all.
        valid: Share of the entries of those lists that name an allowed item.
        duplicate: Share of the entries that name an item which stands earlier in the same list.
        full: Share of *all* answers that are lists of the length asked for, valid and without repeats throughout.
        answers: Number of answers.
        entries: Number of entries in all lists.
    """

    parse: float
    valid: float
    duplicate: float
    full: float
    answers: int
    entries: int


def list_rates(
    lists: Sequence[Sequence[str | None] | None], allowed: Sequence[Collection[str]] | Collection[str], *, length: int
) -> ListRates:
    """Count what generated lists get wrong.

    Args:
        lists: One answer a request: the item id of each entry, None for an entry that names none; None for an answer
            that could not be read.
        allowed: Items that may be named: one collection a request, or one for all.
        length: Entries asked for; further entries count too.

    Returns:
        The rates. Without any entry, ``valid`` and ``duplicate`` are 0.

    Raises:
        ValueError: If there are no answers, or ``allowed`` has another number of them.
    """
    if not lists:
        raise ValueError("the rates of no answers are not defined")
    per_request: Sequence[Collection[str]]
    if isinstance(allowed, Sequence) and not any(isinstance(each, str) for each in allowed):
        per_request = [frozenset(each) for each in allowed]
    else:
        everywhere = frozenset(str(each) for each in allowed)
        per_request = [everywhere] * len(lists)
    if len(per_request) != len(lists):
        raise ValueError(f"{len(lists)} answers but {len(per_request)} sets of allowed items")
    entries = valid = repeated = parsed = full = 0
    for answer, own in zip(lists, per_request, strict=True):
        if answer is None:
            continue
        parsed += 1
        named = [item for item in answer if item is not None]
        good = sum(item in own for item in named)
        twice = len(named) - len(set(named))
        entries, valid, repeated = entries + len(answer), valid + good, repeated + twice
        full += good == len(answer) == length and twice == 0
    return ListRates(
        parse=parsed / len(lists),
        valid=valid / entries if entries else 0.0,
        duplicate=repeated / entries if entries else 0.0,
        full=full / len(lists),
        answers=len(lists),
        entries=entries,
    )
