"""Lists under business rules: what may be ranked, how deep is asked, and what is made of the answer.

A service waits for an engine where Python calls a model, so that the steps between are here, and neither asks by
itself: `listing` says how deep to ask, is sent what came of it, and returns the list.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import replace

from llmrec.answer.recommender import Answered
from llmrec.answer.rules import Rules, deep_enough
from llmrec.data.requests import USER_FIELDS, RankRequest
from llmrec.errors import DataError
from llmrec.types import Item, Ranking, Unparsed

COLD = "nothing is known of the user: the most popular items"
"""The note on a list of a request that `is_cold`."""
# What is looked through where a list is to be diverse or keeps quotas, before more is asked for.
_DEEP = 50
_DEEPER = 4


def ruled(
    request: RankRequest,
    rules: Rules,
    items: Mapping[str, Item],
    allowed: Callable[[Rules], frozenset[str]],
    *,
    exclude_seen: bool,
) -> RankRequest:
    """Take out what rules forbid, before anything is ranked.

    Args:
        request: A question; without candidates it is one about the catalogue.
        rules: What a list may hold.
        items: The catalogue.
        allowed: What rules leave of the catalogue; a caller may remember it.
        exclude_seen: Seen items are not ranked, where the catalogue is.

    Raises:
        DataError: If nothing is left.
    """
    request = replace(request, keep_seen=not exclude_seen)
    if not rules:
        return request
    # What the catalogue says of an item holds, whatever a request says of it.
    own = {item.item_id: items.get(item.item_id, item) for item in request.candidates}
    left = rules.allowed(own) if own else allowed(rules)
    kept = tuple(item for item in request.candidates if item.item_id in left)
    if not (kept if own else left):
        raise DataError("the rules leave no item; loosen them, or give other candidates", kind="empty", column="rules")
    return replace(request, candidates=kept, barred=frozenset() if own else frozenset(items.keys() - left))


def listing(
    request: RankRequest, rules: Rules, items: Mapping[str, Item], k: int
) -> Generator[int, Answered, Answered]:
    """Yield how many items to ask for, be sent what was answered, and return the list of at most ``k``.

    It asks deeper as long as quotas leave too few, until the whole catalogue has been looked through.

    Args:
        request: From `ruled`.
        rules: What a list may hold.
        items: The catalogue.
        k: Items of the list.

    Raises:
        DataError: If there is no ranking; it says why.
    """
    most = len(items) - len(request.barred)
    depth = deep_enough(rules, k) or min(most, max(_DEEP, 5 * k))
    while True:
        found = yield depth
        ranking = ranking_of(found)
        given = {item.item_id: item for item in request.candidates}
        # An engine may know an item that was put or removed a moment ago, about which nobody has asked the rules.
        pairs = [
            (name, score)
            for name, score in zip(ranking.items, ranking.scores, strict=True)
            if name in given or (name in items and name not in request.barred)
        ]
        known = {name: given.get(name) or items[name] for name, _ in pairs} if rules else items
        chosen = rules.arrange(pairs, known, k)
        if len(chosen) >= k or request.candidates or len(ranking.items) < depth or depth >= most:
            break
        depth = min(most, depth * _DEEPER)
    titles = dict(zip(ranking.items, found.titles, strict=True))
    answer = replace(ranking, items=tuple(name for name, _ in chosen), scores=tuple(score for _, score in chosen))
    return replace(found, answer=answer, titles=tuple(titles[name] for name, _ in chosen))


def is_cold(request: RankRequest) -> bool:
    """Whether nothing is known of a user, so that the most popular items are the answer."""
    return not request.history and not request.profile and USER_FIELDS not in request.context


def told_cold(found: Answered) -> Answered:
    """Return the list of a request that `is_cold`, which the most popular items answer, with a note that says so."""
    return replace(found, cold=True, notes=(*found.notes, COLD))


def ranking_of(found: Answered) -> Ranking:
    """Return the ranking of a list.

    Raises:
        DataError: If there is none; it says why.
    """
    if isinstance(found.answer, Unparsed):
        raise DataError(found.answer.reason, kind="failed")
    return found.answer
