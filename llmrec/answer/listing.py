"""Builds recommendation lists under business rules: allowed items, ranking depth, and the final list.

A service awaits an engine where Python calls a model, so `recommendation_steps` is a generator: it yields a question,
is sent the answer, and returns the list. All interfaces use it.
"""

from __future__ import annotations

import operator
from collections.abc import Generator
from dataclasses import dataclass, field, replace

from llmrec.answer.known import Catalogue
from llmrec.answer.recommender import POPULAR, RANK, AnnotatedAnswer, Question, require_ranking
from llmrec.answer.rules import Rules, required_depth
from llmrec.data.requests import USER_FIELDS, RankRequest
from llmrec.errors import DataError

DEFAULT_LENGTH = 20
"""Default length of a list over the whole catalogue."""
COLD_START_NOTE = "no data about the user: the most popular items"
"""The note on the list for a request that `is_cold`."""
# How deep to rank at first under quotas or diversity, before a deeper ranking is requested.
_INITIAL_DEPTH = 50
_DEPTH_FACTOR = 4


@dataclass(frozen=True, slots=True)
class ListSpec:
    """What a list should contain: number of items, rules, and model.

    Attributes:
        k: The maximum number of items; None: all candidates, or `DEFAULT_LENGTH` items of a catalogue.
        model: The name of a model; None: the default. For similar items, ``interactions`` or ``text``.
        strategy: How a language model orders candidates.
        exclude_seen: Exclude seen items when the catalogue is ranked.
        rules: The business rules of the list.

    Raises:
        DataError: If ``k`` is not an integer of at least 1.
    """

    k: int | None = None
    model: str | None = None
    strategy: str = "auto"
    exclude_seen: bool = True
    rules: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        """Check the number of items."""
        try:
            valid = self.k is None or operator.index(self.k) >= 1
        except TypeError:
            valid = False
        if not valid:
            raise DataError(f"k: {self.k!r} is not an integer of at least 1", kind="bad-value", column="k")


Query = tuple[Question, RankRequest]


def recommendation_steps(
    request: RankRequest, spec: ListSpec, catalogue: Catalogue, verb: str = RANK
) -> Generator[Query, AnnotatedAnswer, AnnotatedAnswer]:
    """Yield the questions for models, receive the answers, and return the final list.

    The depth increases while quotas leave too few items, up to the whole catalogue.

    Args:
        request: The request; without candidates the catalogue is ranked.
        spec: The specification of the list.
        catalogue: The catalogue.
        verb: The verb of the question; a cold-start user gets the most popular items.

    Raises:
        DataError: If the rules allow no item, or the ranking failed.
    """
    rules, items = spec.rules, catalogue.items
    k = spec.k or len(request.candidates) or DEFAULT_LENGTH
    request = _remove_forbidden_items(request, spec, catalogue)
    question = Question(model=spec.model, verb=verb, strategy=spec.strategy)
    if is_cold(request):
        question = replace(question, verb=POPULAR, strategy="auto")
    most = len(items) - len(request.barred)
    depth = required_depth(rules, k) or min(most, max(_INITIAL_DEPTH, 5 * k))
    while True:
        answer = yield replace(question, depth=depth), request
        ranking = require_ranking(answer)
        candidates = {item.item_id: item for item in request.candidates}
        # A model may list an item that was just added or removed, without applying the rules to it.
        pairs = [
            (name, score)
            for name, score in zip(ranking.items, ranking.scores, strict=True)
            if name in candidates or (name in items and name not in request.barred)
        ]
        known = {name: candidates.get(name) or items[name] for name, _ in pairs} if rules else items
        chosen = rules.arrange(pairs, known, k)
        if len(chosen) >= k or request.candidates or len(ranking.items) < depth or depth >= most:
            break
        depth = min(most, depth * _DEPTH_FACTOR)
    titles = dict(zip(ranking.items, answer.titles, strict=True))
    ranking = replace(ranking, items=tuple(name for name, _ in chosen), scores=tuple(score for _, score in chosen))
    return replace(answer, answer=ranking, titles=tuple(titles[name] for name, _ in chosen))


def is_cold(request: RankRequest) -> bool:
    """Whether a request has no data about its user, so that the most popular items are recommended."""
    return not request.history and not request.profile and USER_FIELDS not in request.context


def _remove_forbidden_items(request: RankRequest, spec: ListSpec, catalogue: Catalogue) -> RankRequest:
    """Remove the items that the rules forbid from a request, before ranking."""
    request, items = replace(request, keep_seen=not spec.exclude_seen), catalogue.items
    if not spec.rules:
        return request
    # The rules use catalogue fields rather than fields of the request.
    candidates = {item.item_id: items.get(item.item_id, item) for item in request.candidates}
    left = spec.rules.allowed(candidates) if candidates else catalogue.allowed(spec.rules)
    kept = tuple(item for item in request.candidates if item.item_id in left)
    if not (kept if candidates else left):
        raise DataError(
            "the rules exclude every item; relax the rules, or change the candidates", kind="empty", column="rules"
        )
    return replace(request, candidates=kept, barred=frozenset() if candidates else frozenset(items.keys() - left))
