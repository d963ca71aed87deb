"""Strategies with several label prompts per request, run in rounds for all requests of a batch.

A strategy is a generator for one request. It yields questions, receives the log-probabilities of the items for each of
them, and returns the final order. This module contains what all such strategies share: labels, prompts, shuffles, the
correction for position bias, and the cost.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import permutations as arrangements

import numpy as np
from numpy.typing import NDArray

from llmrec.errors import LlmrecError
from llmrec.strategies.asking import (
    GeneratingStrategy,
    Prompting,
    cost_of,
    has_nested_labels,
    prompt_hash,
    ranking_of,
    score_in_chunks,
)
from llmrec.tasks.base import required_candidates, seeded_random
from llmrec.tasks.direct import candidate_labels
from llmrec.tasks.task import Want
from llmrec.types import Answer, Cost, Prompt, Ranking, Request, Scores, Segment


@dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    """Asks which of several items is best.

    Attributes:
        shown: Items in the order in which the prompt lists them.
        given: Items that the answer already contains, best first; the question is about the others.
    """

    shown: tuple[str, ...]
    given: tuple[str, ...] = ()


ItemScores = Mapping[str, float]
"""Item -> log-probability of its label, in nats, for each queried item in the order shown."""
Order = Sequence[tuple[str, float]]
"""Items with scores, best first."""
QuestionGenerator = Generator[list[ChoiceQuestion], list[ItemScores], Order]


@dataclass(frozen=True, slots=True)
class _RenderedQuestion:
    """A question with its prompt."""

    prompt: Prompt
    items: tuple[str, ...]
    texts: tuple[str, ...]


@dataclass(slots=True)
class _RankingState:
    """The state of the ranking of one request."""

    request: Request
    steps: QuestionGenerator
    waiting: list[ChoiceQuestion] = field(default_factory=list)
    order: Order | None = None
    cost: Cost = field(default_factory=Cost)
    hashes: list[str] = field(default_factory=list)

    def go(self, scores: list[ItemScores] | None = None) -> None:
        """Advance to the next questions, or to the end."""
        try:
            self.waiting = next(self.steps) if scores is None else self.steps.send(scores)
        except StopIteration as stop:
            self.waiting, self.order = [], stop.value


class Rounds:
    """Runs strategies written as generators, for many requests at once on one backend.

    Args:
        name: The name of the strategy.
        asker: The setup of the strategy.
        steps: A request with candidates -> its generator.
        want: The requested answer: ``one`` label, or a ``ranking``.
        permutations: Number of orders in which each question is shown. The first is the question's order, the others
            are shuffles seeded by the request's id; log-probabilities are averaged for each item.
        training: Questions for estimating the position bias; empty: no correction.
    """

    def __init__(
        self,
        name: str,
        asker: Prompting,
        steps: Callable[[Request], QuestionGenerator],
        *,
        want: Want = "one",
        permutations: int = 1,
        training: Sequence[Request] = (),
    ) -> None:
        asker.needs("score")
        self.name, self.asker, self._steps, self._want = name, asker, steps, want
        self._permutations, self._training = permutations, tuple(training)
        self._bias: dict[int, NDArray[np.float64]] = {}
        self._unbooked = Cost()
        self.engine = ""

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank the candidates of every request; see `Predictor.answer`.

        Raises:
            DataError: If a request has no candidates.
        """
        answers: list[Answer] = []
        for part in self.asker.split(requests):
            games = [_RankingState(request, self._steps(request)) for request in part]
            for game in games:
                game.go()
            while open_games := [game for game in games if game.order is None]:
                self._round(open_games)
            answers += [self._ranking(game) for game in games]
            self.asker.advance(len(part))
        return answers

    def first_prompt(self, request: Request) -> Prompt:
        """Return the first prompt for a request, for reports."""
        questions = next(self._steps(request), None)
        return self._render_question(
            request, questions[0] if questions else ChoiceQuestion(required_candidates(request))
        ).prompt

    def _round(self, games: Sequence[_RankingState]) -> None:
        """Score the pending prompts of all requests in one batch, and continue each request with its result."""
        pending = [
            (game, question, self._question_orders(game.request, question))
            for game in games
            for question in game.waiting
        ]
        posed = [(game, self._render_question(game.request, order)) for game, _, orders in pending for order in orders]
        biases = {size: self._position_bias(size) for size in {len(question.shown) for _, question, _ in pending}}
        result = iter(self._score([entry for _, entry in posed]))
        for game, entry in posed:
            game.hashes.append(prompt_hash(entry.prompt))
        replies: dict[int, list[ItemScores]] = {id(game): [] for game in games}
        for game, question, orders in pending:
            sums = dict.fromkeys((item for item in question.shown if item not in question.given), 0.0)
            for order in orders:
                scores = next(result)
                self.engine = scores.engine
                game.cost += cost_of(scores)
                bias = dict(zip(order.shown, biases[len(order.shown)].tolist(), strict=True))
                for item, logprob in zip(_remaining_items(order), scores.logprobs, strict=True):
                    sums[item] += (logprob - bias[item]) / len(orders)
            replies[id(game)].append(sums)
        for game in games:
            game.go(replies[id(game)])

    def _question_orders(self, request: Request, question: ChoiceQuestion) -> list[ChoiceQuestion]:
        """Return a question with its items in several orders."""
        orders = [question]
        for number in range(1, self._permutations):
            shown = list(question.shown)
            seeded_random("permutation", 0, request.id, str(number), *_stored_positions(request, shown)).shuffle(shown)
            orders.append(ChoiceQuestion(tuple(shown), question.given))
        return orders

    def _render_question(self, request: Request, question: ChoiceQuestion) -> _RenderedQuestion:
        shown = replace(request, candidates=question.shown)
        asker, task = self.asker, self.asker.task
        prompt = task.prompt(shown, template=asker.template, shots=asker.shots, want=self._want)
        labels = dict(zip(question.shown, task.continuations(shown, template=asker.template), strict=True))
        items = _remaining_items(question)
        if not question.given:
            return _RenderedQuestion(prompt, items, tuple(labels[item] for item in items))
        # The comma ends the given part and the space begins the next label, with the same tokens as in a list. So
        # a longer given part extends the tokens of a shorter one, whose states are cached.
        written = ", ".join(labels[item] for item in question.given) + ","
        longer = replace(prompt, answer_prefix=(*prompt.answer_prefix, Segment("text", written)))
        return _RenderedQuestion(longer, items, tuple(f" {labels[item]}" for item in items))

    def _score(self, posed: Sequence[_RenderedQuestion]) -> list[Scores]:
        texts = [item.texts for item in posed]
        closed = any(has_nested_labels(labels) for labels in set(texts))
        return score_in_chunks(self.asker.backend, [item.prompt for item in posed], texts, closed=closed)

    def _position_bias(self, size: int) -> NDArray[np.float64]:
        """Return the bias of each of ``size`` positions, in nats with mean 0, shape (size,).

        It is the mean over the training questions of a position's label log-probability, normalised over the labels.
        Items have random positions, so that the mean is an estimate of the position bias.
        """
        if not self._training or size < 2:
            return np.zeros(size)
        if size not in self._bias:
            usable = [request for request in self._training if len(request.candidates or ()) >= size]
            if not usable:
                raise LlmrecError(
                    f"eval.debias: requests have {size} candidates, but all training examples have fewer; set "
                    "eval.debias=none, or lower eval.candidates.count",
                    kind="too-few",
                    column="eval.debias",
                )
            posed = [
                self._render_question(request, ChoiceQuestion((request.candidates or ())[:size])) for request in usable
            ]
            result = self._score(posed)
            logs = np.array([scores.logprobs for scores in result], dtype=np.float64)
            logs -= np.logaddexp.reduce(logs, axis=1, keepdims=True)
            mean = logs.mean(axis=0)
            self._bias[size] = mean - mean.mean()
            for scores in result:
                self._unbooked += cost_of(scores)
        return self._bias[size]

    def _ranking(self, game: _RankingState) -> Ranking:
        # The cost of training prompts is assigned to the first request, so that the sum is complete.
        cost, self._unbooked = game.cost + self._unbooked, Cost()
        return ranking_of(game.request, game.order or (), joint_hash(game.hashes), cost)


def shuffled_items(request: Request, items: Sequence[str]) -> tuple[str, ...]:
    """Return items in a seeded order that does not depend on their given order.

    The position of an item must not depend on earlier results of a strategy; otherwise a position bias of the model
    would accumulate over steps.
    """
    unordered = set(items)
    shown = [item for item in request.candidates or () if item in unordered]
    seeded_random("shown", 0, request.id, *_stored_positions(request, shown)).shuffle(shown)
    return tuple(shown)


def _stored_positions(request: Request, items: Sequence[str]) -> list[str]:
    """Return the positions of items in the stored order, as strings."""
    stored = {item: index for index, item in enumerate(request.candidates or ())}
    return [str(stored[item]) for item in items]


def score_by_position(best: Sequence[str], rest: Sequence[str] = ()) -> Order:
    """Score items by position from the end; items in ``rest`` share the last position."""
    return [*((item, float(len(best) - index)) for index, item in enumerate(best)), *((item, 0.0) for item in rest)]


def sort_by_score(scores: ItemScores) -> Order:
    """Return items sorted by score, best first."""
    return sorted(scores.items(), key=lambda pair: -pair[1])


def joint_hash(hashes: Sequence[str]) -> str | None:
    """Return one hash for all prompts of a request."""
    if len(hashes) < 2:
        return hashes[0] if hashes else None
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


def _remaining_items(question: ChoiceQuestion) -> tuple[str, ...]:
    return tuple(item for item in question.shown if item not in question.given)


# --------------------------------------------------------------------------- lists
# Listwise ranking: all candidates in one prompt, ordered by label probabilities, label by label, or as generated text.


def max_list_tokens(candidates: int) -> int:
    """Return the maximum number of tokens of a list of all labels.

    Some tokenizers split every digit, so that labels of three digits take five tokens each.
    """
    return sum(len(label) + 2 for label in candidate_labels(candidates)) + 1


def label_ranker(asker: Prompting, *, permutations: int = 1, training: Sequence[Request] = ()) -> Rounds:
    """Rank candidates by the probabilities of their labels in one forward pass per order (arXiv 2406.15657).

    Args:
        asker: The setup of the strategy.
        permutations: Number of orders in which the candidates are shown; see `Rounds`.
        training: Questions for estimating the position bias; see `Rounds`.
    """
    return Rounds("label", asker, _label_steps, permutations=permutations, training=training)


def _label_steps(request: Request) -> QuestionGenerator:
    (scores,) = yield [ChoiceQuestion(required_candidates(request))]
    return sort_by_score(scores)


def permutation_ranker(
    asker: Prompting, *, depth: int, permutations: int = 1, training: Sequence[Request] = ()
) -> Rounds:
    """Generate a ranking label by label, choosing only among the remaining labels.

    Each step appends the most likely label to the answer. After ``depth`` steps the others are ordered by the last
    distribution.

    Args:
        asker: The setup of the strategy.
        depth: Number of positions that are chosen one by one.
        permutations: Number of orders in which the candidates are shown; see `Rounds`.
        training: Questions for estimating the position bias before any label is given; see `Rounds`.
    """
    steps = partial(_permutation_steps, depth=depth)
    return Rounds("permutation", asker, steps, want="ranking", permutations=permutations, training=training)


def _permutation_steps(request: Request, *, depth: int) -> QuestionGenerator:
    pool = required_candidates(request)
    chosen: tuple[str, ...] = ()
    scores: ItemScores = dict.fromkeys(pool, 0.0)
    for _ in range(min(depth, len(pool) - 1)):
        (scores,) = yield [ChoiceQuestion(pool, chosen)]
        chosen = (*chosen, max(scores, key=lambda item: scores[item]))
    return _append_rest(chosen, sort_by_score({item: value for item, value in scores.items() if item not in chosen}))


def _append_rest(chosen: Sequence[str], rest: Order) -> Order:
    """Put the chosen items before the rest, and score the rest relative to its best item."""
    best = rest[0][1] if rest else 0.0
    ahead = [(item, float(len(chosen) - index)) for index, item in enumerate(chosen)]
    return [*ahead, *((item, value - best) for item, value in rest)]


class ListRanker(GeneratingStrategy):
    """Generates the whole list as text and parses it; missing candidates count as misses."""

    name = "list"
    answer_type, reason = Ranking, "no candidate label or title in the answer"

    def __init__(self, asker: Prompting) -> None:
        super().__init__(replace(asker, want="ranking"))

    def token_limit(self, requests: Sequence[Request]) -> int:
        """Return enough tokens for the longest list of candidates."""
        return max_list_tokens(max((len(r.candidates or ()) for r in requests), default=1))


# --------------------------------------------------------------------------- windows
# Ranking by a window that moves from the end of the list to its start (RankGPT, Sun et al., EMNLP 2023).


def window_ranker(
    asker: Prompting, *, window: int, window_step: int, permutations: int = 1, training: Sequence[Request] = ()
) -> Rounds:
    """Rank overlapping windows from the end of the list, so that good items move to the front.

    The first window is at the end of the stored, shuffled order. In a window, items are ranked by the probability of
    their labels, and shown in an order that is independent of their current positions.

    Args:
        asker: The setup of the strategy.
        window: Number of items in a window.
        window_step: Number of positions that it moves; fewer than ``window``.
        permutations: Number of orders in which each window is shown; see `Rounds`.
        training: Questions for estimating the position bias; see `Rounds`.
    """
    steps = partial(_window_steps, window=window, step=window_step)
    return Rounds("window", asker, steps, permutations=permutations, training=training)


def _window_steps(request: Request, *, window: int, step: int) -> QuestionGenerator:
    items = list(required_candidates(request))
    for begin, end in window_bounds(len(items), window, step):
        (scores,) = yield [ChoiceQuestion(shuffled_items(request, items[begin:end]))]
        items[begin:end] = sorted(items[begin:end], key=lambda item: -scores[item])
    return score_by_position(items)


def window_bounds(count: int, window: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of the windows over ``count`` items, from the last to the first."""
    begin = max(0, count - window)
    while count > 1:
        yield begin, min(begin + window, count)
        if begin == 0:
            return
        begin = max(0, begin - step)


# --------------------------------------------------------------------------- pairs
# Ranking by pairwise comparisons (PRP, Qin et al., Findings of NAACL 2024).


def pairwise_ranker(asker: Prompting, *, all_pairs: int, depth: int) -> Rounds:
    """Rank by pairwise comparisons, each averaged over both orders, so that position bias cancels out.

    For up to ``all_pairs`` candidates every pair is compared, and an item's score is the expected number of others that
    it beats. More candidates are sorted by passes from the end to the start, in which the better of two neighbours
    moves on: after k passes the first k positions are decided. The others share the last position.

    Args:
        asker: The setup of the strategy.
        all_pairs: Maximum number of candidates for which every pair is compared.
        depth: Number of passes.
    """
    return Rounds("pairwise", asker, partial(_pairwise_steps, all_pairs=all_pairs, depth=depth))


def _pairwise_steps(request: Request, *, all_pairs: int, depth: int) -> QuestionGenerator:
    items = list(required_candidates(request))
    if len(items) < 2:
        return score_by_position(items)
    if len(items) <= all_pairs:
        pairs = list(arrangements(items, 2))
        scores = yield [ChoiceQuestion(pair) for pair in pairs]
        return sort_by_score(_expected_wins(items, dict(zip(pairs, scores, strict=True))))
    passes = min(depth, len(items) - 1)
    for front in range(passes):
        for position in range(len(items) - 1, front, -1):
            ahead, behind = items[position - 1], items[position]
            one, other = yield [ChoiceQuestion((ahead, behind)), ChoiceQuestion((behind, ahead))]
            if _pair_log_odds(behind, ahead, one, other) > 0:
                items[position - 1], items[position] = behind, ahead
    decided = len(items) if passes == len(items) - 1 else passes
    return score_by_position(items[:decided], items[decided:])


def _pair_log_odds(first: str, second: str, one: ItemScores, other: ItemScores) -> float:
    """Return the log-odds of the first item over the second, averaged over both orders."""
    return (one[first] - one[second] + other[first] - other[second]) / 2


def _expected_wins(items: Sequence[str], scores: Mapping[tuple[str, ...], ItemScores]) -> dict[str, float]:
    """Return the expected number of other items that each item beats."""
    wins = dict.fromkeys(items, 0.0)
    for first, second in scores:
        lead = _pair_log_odds(first, second, scores[first, second], scores[second, first])
        wins[first] += 0.5 * (1 + math.tanh(lead / 2))
    return wins


# --------------------------------------------------------------------------- sets
# Ranking by choosing the best of small sets, sorted in a heap (setwise, Zhuang et al., SIGIR 2024).


def setwise_ranker(
    asker: Prompting, *, set_size: int, depth: int, permutations: int = 1, training: Sequence[Request] = ()
) -> Rounds:
    """Rank the top of the list by heap sort, with ``set_size - 1`` children per node.

    One question finds the best of a node and its children, by the probability of their labels. Items that remain in the
    heap after ``depth`` positions share the last position.

    Args:
        asker: The setup of the strategy.
        set_size: Maximum number of items in a question, at least 2.
        depth: Number of positions that are decided.
        permutations: Number of orders in which each set is shown; see `Rounds`.
        training: Questions for estimating the position bias; see `Rounds`.
    """
    steps = partial(_setwise_steps, children=set_size - 1, depth=depth)
    return Rounds("setwise", asker, steps, permutations=permutations, training=training)


def _setwise_steps(request: Request, *, children: int, depth: int) -> QuestionGenerator:
    heap = list(required_candidates(request))
    for node in reversed(range(-(-(len(heap) - 1) // children))):
        yield from _sift_down(request, heap, node, children)
    best: list[str] = []
    while heap and len(best) < depth:
        best.append(heap[0])
        last = heap.pop()
        if heap:
            heap[0] = last
            if len(best) < depth:
                yield from _sift_down(request, heap, 0, children)
    return score_by_position(best, heap)


def _sift_down(
    request: Request, heap: list[str], node: int, children: int
) -> Generator[list[ChoiceQuestion], list[ItemScores], None]:
    """Move an item down the heap until it is the best of its set; on ties the upper item stays."""
    while below := range(node * children + 1, min((node + 1) * children + 1, len(heap))):
        (scores,) = yield [ChoiceQuestion(shuffled_items(request, [heap[index] for index in (node, *below)]))]
        best = max((node, *below), key=lambda index: scores[heap[index]])
        if best == node:
            return
        heap[node], heap[best] = heap[best], heap[node]
        node = best
