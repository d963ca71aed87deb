"""Strategies that ask several label questions a request: played in rounds, all requests of a batch in lock step.

A strategy is a generator for one request. It yields questions, is sent for each of them how likely the items are to be
the answer, and returns the order that it found. What all such strategies share is here: labels, prompts, shuffles, the
correction for positions, and the cost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from llmrec.errors import LlmrecError
from llmrec.strategies.asking import Prompting, cost_of, is_nested, prompt_hash, score_in_chunks
from llmrec.tasks.base import keyed
from llmrec.tasks.task import Want
from llmrec.types import Answer, Cost, Prompt, Ranking, Request, Scores, Segment


@dataclass(frozen=True, slots=True)
class Question:
    """Which of these is the best?

    Attributes:
        shown: Items in the order in which the prompt lists them.
        given: Items that the answer names already, best first; the others are asked for.
    """

    shown: tuple[str, ...]
    given: tuple[str, ...] = ()


Said = Mapping[str, float]
"""Item -> log-probability of its label, in nats; for each item that is asked for, in the order shown."""
Order = Sequence[tuple[str, float]]
"""Items with scores, best first."""
Steps = Generator[list[Question], list[Said], Order]


@dataclass(frozen=True, slots=True)
class _Posed:
    """A question in words."""

    prompt: Prompt
    items: tuple[str, ...]
    texts: tuple[str, ...]


@dataclass(slots=True)
class _Game:
    """One request while it is played."""

    request: Request
    steps: Steps
    waiting: list[Question] = field(default_factory=list)
    order: Order | None = None
    cost: Cost = field(default_factory=Cost)
    hashes: list[str] = field(default_factory=list)

    def go(self, said: list[Said] | None = None) -> None:
        """Play up to the next questions, or to the end."""
        try:
            self.waiting = next(self.steps) if said is None else self.steps.send(said)
        except StopIteration as stop:
            self.waiting, self.order = [], stop.value


class Rounds:
    """Plays the steps of many requests against one backend: a predictor for every strategy that is written as steps.

    Args:
        name: Of the strategy.
        asker: How to ask.
        steps: A request with candidates -> its generator.
        want: What the template is to ask for: ``one`` label, or a ``ranking``.
        permutations: Orders in which each question is shown. The first is the question's own, the others are shuffles
            seeded by the request's id; log-probabilities are averaged for each item.
        training: Questions whose answers say how much a position is worth by itself; empty: no correction.
    """

    def __init__(
        self,
        name: str,
        asker: Prompting,
        steps: Callable[[Request], Steps],
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
        """Rank every request's candidates; see `Predictor.answer`.

        Raises:
            LlmrecError: If a request has no candidates.
        """
        answers: list[Answer] = []
        for start in range(0, len(requests), self.asker.batch):
            part = requests[start : start + self.asker.batch]
            games = [_Game(request, self._steps(_with_candidates(request))) for request in part]
            for game in games:
                game.go()
            while open_games := [game for game in games if game.order is None]:
                self._round(open_games)
            answers += [self._ranking(game) for game in games]
            self.asker.advance(len(part))
        return answers

    def first_prompt(self, request: Request) -> Prompt:
        """Return the first prompt that a request is asked with, for reports."""
        questions = next(self._steps(_with_candidates(request)), None)
        question = questions[0] if questions else Question(_with_candidates(request).candidates or ())
        return self._pose(request, question).prompt

    def _round(self, games: Sequence[_Game]) -> None:
        """Ask the waiting questions of all games at once and play on."""
        asked = [(game, question, self._orders(game.request, question)) for game in games for question in game.waiting]
        posed = [(game, self._pose(game.request, order)) for game, _, orders in asked for order in orders]
        biases = {size: self._bias_of(size) for size in {len(question.shown) for _, question, _ in asked}}
        found = iter(self._score([each for _, each in posed]))
        for game, each in posed:
            game.hashes.append(prompt_hash(each.prompt))
        replies: dict[int, list[Said]] = {id(game): [] for game in games}
        for game, question, orders in asked:
            sums = dict.fromkeys((item for item in question.shown if item not in question.given), 0.0)
            for order in orders:
                scores = next(found)
                self.engine = scores.engine
                game.cost += cost_of(scores)
                worth = dict(zip(order.shown, biases[len(order.shown)].tolist(), strict=True))
                for item, logprob in zip(_left(order), scores.logprobs, strict=True):
                    sums[item] += (logprob - worth[item]) / len(orders)
            replies[id(game)].append(sums)
        for game in games:
            game.go(replies[id(game)])

    def _orders(self, request: Request, question: Question) -> list[Question]:
        """Return the question as it is shown each time."""
        orders = [question]
        for number in range(1, self._permutations):
            shown = list(question.shown)
            keyed("permutation", 0, request.id, str(number), *_places(request, shown)).shuffle(shown)
            orders.append(Question(tuple(shown), question.given))
        return orders

    def _pose(self, request: Request, question: Question) -> _Posed:
        asked = replace(request, candidates=question.shown)
        asker, task = self.asker, self.asker.task
        prompt = task.prompt(asked, template=asker.template, shots=asker.shots, want=self._want)
        labels = dict(zip(question.shown, task.continuations(asked, template=asker.template), strict=True))
        items = _left(question)
        if not question.given:
            return _Posed(prompt, items, tuple(labels[item] for item in items))
        # The comma ends the given part and the space begins the next label, as tokenizers cut written lists: so a
        # longer given part extends the tokens of a shorter one, and what was read before is cached.
        written = ", ".join(labels[item] for item in question.given) + ","
        longer = replace(prompt, answer_prefix=(*prompt.answer_prefix, Segment("text", written)))
        return _Posed(longer, items, tuple(f" {labels[item]}" for item in items))

    def _score(self, posed: Sequence[_Posed]) -> list[Scores]:
        texts = [each.texts for each in posed]
        closed = any(is_nested(labels) for labels in set(texts))
        return score_in_chunks(self.asker.backend, [each.prompt for each in posed], texts, closed=closed)

    def _bias_of(self, size: int) -> NDArray[np.float64]:
        """Return what each of ``size`` positions is worth by itself, in nats with mean 0, shape (size,).

        It is the mean over the training questions of a position's label log-probability, normalised over the labels.
        Which item stands where is chance, so that what is left of the mean is the position's own share.

        Raises:
            LlmrecError: If no training question shows that many items.
        """
        if not self._training or size < 2:
            return np.zeros(size)
        if size not in self._bias:
            usable = [request for request in self._training if len(request.candidates or ()) >= size]
            if not usable:
                raise LlmrecError(
                    f"eval.debias: no training question has {size} candidates, as many as a request shows; set it to "
                    "none, or lower eval.candidates.count",
                    kind="too-few",
                    column="eval.debias",
                )
            posed = [self._pose(request, Question((request.candidates or ())[:size])) for request in usable]
            found = self._score(posed)
            logs = np.array([scores.logprobs for scores in found], dtype=np.float64)
            logs -= np.logaddexp.reduce(logs, axis=1, keepdims=True)
            mean = logs.mean(axis=0)
            self._bias[size] = mean - mean.mean()
            for scores in found:
                self._unbooked += cost_of(scores)
        return self._bias[size]

    def _ranking(self, game: _Game) -> Ranking:
        order = game.order or ()
        # What was spent on no request in particular is booked on the first one, so that a row's sum is complete.
        cost, self._unbooked = game.cost + self._unbooked, Cost()
        return Ranking(
            request_id=game.request.id,
            items=tuple(item for item, _ in order),
            scores=tuple(score for _, score in order),
            prompt_hash=joint_hash(game.hashes),
            cost=cost,
        )


def mixed(request: Request, items: Sequence[str]) -> tuple[str, ...]:
    """Return items in a seeded order that does not depend on the order in which they come.

    What a strategy has found so far must not show in where an item stands, or a model that likes a position would
    carry its liking from step to step.
    """
    here = set(items)
    shown = [item for item in request.candidates or () if item in here]
    keyed("shown", 0, request.id, *_places(request, shown)).shuffle(shown)
    return tuple(shown)


def _places(request: Request, items: Sequence[str]) -> list[str]:
    """Name items by their places in the stored order: a request may call them by ids that mean nothing elsewhere."""
    stored = {item: place for place, item in enumerate(request.candidates or ())}
    return [str(stored[item]) for item in items]


def placed(best: Sequence[str], rest: Sequence[str] = ()) -> Order:
    """Score items by their places counted from the end; those of ``rest`` share the last place."""
    return [*((item, float(len(best) - place)) for place, item in enumerate(best)), *((item, 0.0) for item in rest)]


def by_score(said: Said) -> Order:
    """Sort items by what was said of them, best first; equal ones keep their order."""
    return sorted(said.items(), key=lambda pair: -pair[1])


def joint_hash(hashes: Sequence[str]) -> str | None:
    """Return one hash for all prompts of a request; that of the prompt itself where there is one."""
    if len(hashes) < 2:
        return hashes[0] if hashes else None
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


def _left(question: Question) -> tuple[str, ...]:
    return tuple(item for item in question.shown if item not in question.given)


def _with_candidates(request: Request) -> Request:
    if not request.candidates:
        raise LlmrecError(
            f"request {request.id} has no candidates to rank; give it a candidate set",
            kind="missing-value",
            column="candidates",
        )
    return request
