"""Pointwise ranking: scores each candidate separately, by the likelihood of its title or of a yes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llmrec.strategies.asking import (
    Prompting,
    ScoredRequest,
    ScoringStrategy,
    cost_of,
    prompt_hash,
    ranking_of,
    score_in_chunks,
    scored_requests,
)
from llmrec.strategies.rounds import joint_hash, sort_by_score
from llmrec.tasks.base import required_candidates
from llmrec.types import Answer, Cost, Prompt, Ranking, Request

# Titles per user-independent prompt, because the cost of a forward pass over a tree of titles is quadratic.
_TITLES_PER_PROMPT = 64
_NO_USER = Request(id="prior", user_id="")


class LikelihoodRanker(ScoringStrategy):
    """Ranks candidates by log P(title | prompt), summed over tokens including the end token.

    The sum is a full-softmax log-probability. Renormalising at branching points only would be cheaper, but ranks
    no better than random.
    """

    name = "likelihood"
    closed = True

    def read(self, result: ScoredRequest) -> Ranking:
        """Return the candidates sorted by score."""
        return sorted_ranking(result)


class PriorRanker(ScoringStrategy):
    """Ranks candidates by log P(title | prompt) - weight * log P(title | prompt without user).

    The second term is the prior of a title, independent of the user. Its prompt uses the same template for a user
    without history, profile or name, after few-shot examples that are sampled once for all requests. With weight 1 the
    score is the pointwise mutual information of title and history. A title's prior is computed once.
    """

    name = "likelihood-prior"

    def __init__(self, asker: Prompting, *, prior_weight: float) -> None:
        super().__init__(asker)
        self._weight = prior_weight
        self._priors: dict[str, float] = {}

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank the candidates of every request; see `Predictor.answer`."""
        answers: list[Answer] = []
        for part in self.asker.split(requests):
            results = list(scored_requests(self.asker, part, closed=True))
            texts = [self._texts_without_user(item.request) for item in results]
            extra = self._learn(sorted({text for group in texts for text in group} - self._priors.keys()))
            for item, group in zip(results, texts, strict=True):
                self.engine = item.scores.engine
                less = tuple(
                    score - self._weight * self._priors[text]
                    for score, text in zip(item.scores.logprobs, group, strict=True)
                )
                plain = sorted_ranking(replace(item, scores=replace(item.scores, logprobs=less)))
                # Requests share priors, whose cost is assigned to the first request that needs them.
                answers.append(replace(plain, cost=plain.cost + extra))
                extra = Cost()
        return answers

    def _texts_without_user(self, request: Request) -> tuple[str, ...]:
        """Return the candidate titles as texts that follow the prompt without a user."""
        return self.asker.task.continuations(
            replace(_NO_USER, candidates=required_candidates(request)), template=self.asker.template
        )

    def _learn(self, texts: Sequence[str]) -> Cost:
        slices = [texts[start : start + _TITLES_PER_PROMPT] for start in range(0, len(texts), _TITLES_PER_PROMPT)]
        prompt = self.asker.task.prompt(_NO_USER, template=self.asker.template, shots=self.asker.shots)
        scores = score_in_chunks(self.asker.backend, [prompt] * len(slices), slices, closed=True)
        for part, item in zip(slices, scores, strict=True):
            self._priors.update(zip(part, item.logprobs, strict=True))
        return sum(map(cost_of, scores), Cost())


class YesRanker(ScoringStrategy):
    """Ranks candidates by log P(yes) - log P(no) to the question whether the user would choose the candidate.

    P is the summed probability of all spellings in the template's language, as complete answers. A prompt contains
    one candidate, so that there is no label bias and no position bias.
    """

    name = "pointwise-yes"

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank the candidates of every request; see `Predictor.answer`."""
        answers: list[Answer] = []
        for part in self.asker.split(requests):
            answers += self._rank(part)
            self.asker.advance(len(part))
        return answers

    def first_prompt(self, request: Request) -> Prompt:
        """Return the first prompt for a request."""
        return self._yes_prompt(request, required_candidates(request)[0])

    def _yes_prompt(self, request: Request, item: str) -> Prompt:
        return replace(self.asker, want="yes").prompt(replace(request, candidates=(item,)))

    def _rank(self, part: Sequence[Request]) -> list[Answer]:
        prompts = [self._yes_prompt(request, item) for request in part for item in required_candidates(request)]
        yes, no = self.asker.task.words(self.asker.template).spellings()
        texts = [yes + no] * len(prompts)
        result = score_in_chunks(self.asker.backend, prompts, texts, closed=False)
        odds = iter([(prompt_hash(prompt), scores) for prompt, scores in zip(prompts, result, strict=True)])
        answers: list[Answer] = []
        for request in part:
            text: dict[str, float] = {}
            hashes, cost = [], Cost()
            for item, (digest, scores) in zip(required_candidates(request), odds, strict=False):
                self.engine = scores.engine
                text[item] = yes_log_odds(scores.logprobs, len(yes))
                hashes.append(digest)
                cost += cost_of(scores)
            answers.append(ranking_of(request, sort_by_score(text), joint_hash(hashes), cost))
        return answers


def yes_log_odds(logprobs: Sequence[float], spelt: int) -> float:
    """Return log P(yes) - log P(no), given the log-probabilities of all spellings of yes, then of no."""
    logs = np.array(logprobs, dtype=np.float64)
    return float(np.logaddexp.reduce(logs[:spelt]) - np.logaddexp.reduce(logs[spelt:]))


def sorted_ranking(result: ScoredRequest) -> Ranking:
    """Return the candidates sorted by score; equal scores keep the stored order and are ties.

    Raises:
        DataError: If the request has no candidate set: scoring a whole catalogue title by title is too expensive.
    """
    items, scores = required_candidates(result.request), result.scores
    order = sorted(zip(items, scores.logprobs, strict=True), key=lambda pair: -pair[1])
    return ranking_of(result.request, order, result.prompt_hash, cost_of(scores))
