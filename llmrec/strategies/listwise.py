"""Listwise ranking: all candidates in one prompt, ordered by label distribution, label by label, or as free text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from llmrec.strategies.asking import Prompting, generated
from llmrec.strategies.rounds import Order, Question, Rounds, Said, Steps, by_score
from llmrec.tasks.direct import candidate_labels
from llmrec.types import Answer, Ranking, Request


def list_room(candidates: int) -> int:
    """Return tokens enough for a list of all labels: as many as letters, with a comma and a space behind each label.

    Some tokenizers write every digit by itself, so that labels of three digits take five tokens each.
    """
    return sum(len(label) + 2 for label in candidate_labels(candidates)) + 1


def label_ranker(asker: Prompting, *, permutations: int = 1, training: Sequence[Request] = ()) -> Rounds:
    """Rank candidates by the probability of their label as the next token: one forward an order (arXiv 2406.15657).

    Args:
        asker: How to ask.
        permutations: Orders in which the candidates are shown; see `Rounds`.
        training: Questions that measure what positions add; see `Rounds`.
    """
    return Rounds("label", asker, _at_once, permutations=permutations, training=training)


def _at_once(request: Request) -> Steps:
    (said,) = yield [Question(request.candidates or ())]
    return by_score(said)


def permutation_ranker(
    asker: Prompting, *, depth: int, permutations: int = 1, training: Sequence[Request] = ()
) -> Rounds:
    """Write the order label by label, each step choosing among the labels that are left: always a permutation.

    Each step takes the likeliest label behind the answer so far. After ``depth`` steps the rest follow in the order of
    the last distribution.

    Args:
        asker: How to ask.
        depth: Places that are chosen one by one.
        permutations: Orders in which the candidates are shown; see `Rounds`.
        training: Questions that measure what positions add, before any label is given; see `Rounds`.
    """
    steps = partial(_one_by_one, depth=depth)
    return Rounds("permutation", asker, steps, want="ranking", permutations=permutations, training=training)


def _one_by_one(request: Request, *, depth: int) -> Steps:
    pool = request.candidates or ()
    chosen: tuple[str, ...] = ()
    said: Said = dict.fromkeys(pool, 0.0)
    for _ in range(min(depth, len(pool) - 1)):
        (said,) = yield [Question(pool, chosen)]
        chosen = (*chosen, max(said, key=lambda item: said[item]))
    return _behind(chosen, by_score({item: value for item, value in said.items() if item not in chosen}))


def _behind(chosen: Sequence[str], rest: Order) -> Order:
    """Put the chosen items before the rest, whose scores are nats below the best of them."""
    best = rest[0][1] if rest else 0.0
    places = [(item, float(len(chosen) - place)) for place, item in enumerate(chosen)]
    return [*places, *((item, value - best) for item, value in rest)]


class ListRanker:
    """Asks for the whole list as text and reads it; candidates left out are misses."""

    name = "list"

    def __init__(self, asker: Prompting) -> None:
        asker.needs("generate")
        self.asker = replace(asker, want="ranking")
        self.engine = f"{asker.backend.name}:generate"

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank every request's candidates; see `Predictor.answer`."""
        room = list_room(max((len(r.candidates or ()) for r in requests), default=1))
        reason = "no candidate label or title in the answer"
        return generated(self.asker, requests, max_tokens=room, wanted=Ranking, reason=reason)
