"""Strategies for ratings, yes/no answers and texts.

A rating is the expectation over the label distribution, the number in a generated answer, or the output of a rating
head (see `llmrec.models.rating_head`); a yes/no answer is the relative probability of yes, or is parsed from a text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmrec.errors import BackendError, LlmrecError
from llmrec.strategies.asking import (
    GeneratingStrategy,
    Prompting,
    ScoredRequest,
    ScoringStrategy,
    cost_of,
    prompt_hash,
)
from llmrec.tasks.rating import expected_rating
from llmrec.types import Answer, Case, Cost, HeadBackend, Predictor, Probability, Rating, Request, Text


class ExpectedRater(ScoringStrategy):
    """Predicts the mean rating sum_r r P(r | prompt), with P normalised over the labels of the scale."""

    name = "expected"

    def read(self, result: ScoredRequest) -> Rating:
        """Return the mean rating."""
        return Rating(
            request_id=result.request.id,
            value=expected_rating([float(text) for text in result.texts], result.scores.logprobs),
            prompt_hash=result.prompt_hash,
            cost=Cost(prompt_tokens=result.scores.prompt_tokens, completion_tokens=1, forwards=1),
        )


class ParsedRater(GeneratingStrategy):
    """Generates an answer and parses a number from it."""

    name = "parsed"
    answer_type, reason = Rating, "no number on the rating scale in the answer"


class HeadRater:
    """Predicts ratings with the rating head at the last prompt token, in one forward pass per request."""

    name = "head"

    def __init__(self, asker: Prompting) -> None:
        """Create the rater.

        Raises:
            BackendError: If the backend has no rating head.
        """
        backend = asker.backend
        if "rate" not in backend.capabilities or not isinstance(backend, HeadBackend):
            raise BackendError(
                f"tasks.rating.strategies: backend {backend.name!r} has no rating head; set eval.backend=hf, or remove "
                "'head'",
                kind="unsupported",
                column="tasks.rating.strategies",
            )
        self.asker = asker
        self.engine = ""
        self._backend: HeadBackend = backend

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rate the item of every request; see `Predictor.answer`."""
        answers: list[Answer] = []
        for part, prompts in self.asker.batches(requests):
            for request, prompt, read in zip(part, prompts, self._backend.rate(prompts), strict=True):
                self.engine = read.engine
                answers.append(
                    Rating(
                        request_id=request.id,
                        value=read.value,
                        prompt_hash=prompt_hash(prompt),
                        cost=Cost(prompt_tokens=read.prompt_tokens, forwards=1),
                    )
                )
        return answers


# The log-odds of certain answers are infinite. Use the float next to 1, so that no two answers become equal.
_CERTAIN = 2.0**-53


class YesNoJudge(ScoringStrategy):
    """Answers with P(yes) = exp(l_yes) / (exp(l_yes) + exp(l_no)), where l is the log-likelihood of an answer.

    TALLRec (Bao et al., RecSys 2023) uses the softmax over the first tokens of the two answers, whose ids depend on the
    tokenizer. Sums over all tokens of an answer are equal if it is one token, and have the same meaning for every
    tokenizer.
    """

    name = "yes-no"

    def read(self, result: ScoredRequest) -> Probability:
        """Return the relative probability of yes."""
        return Probability(
            request_id=result.request.id,
            value=expected_rating((1.0, 0.0), result.scores.logprobs),
            prompt_hash=result.prompt_hash,
            cost=cost_of(result.scores),
        )


class ParsedYesNoJudge(GeneratingStrategy):
    """Generates an answer, and parses yes as probability 1 and no as probability 0.

    A text without either is unparsed, and counts in every denominator as a wrong answer.
    """

    name = "parsed-yes-no"
    answer_type, reason = Probability, "neither a yes nor a no at the beginning of the answer"


# --------------------------------------------------------------------------- calibration


@dataclass(frozen=True, slots=True)
class CalibrationCurve:
    """A calibration curve ``p -> 1 / (1 + exp(-(scale * log(p / (1 - p)) + bias)))``.

    The scale is above 0, so that the order of answers, and thus the AUC, is unchanged.
    """

    scale: float
    bias: float

    def of(self, value: float) -> float:
        """Return the calibrated probability."""
        score = self.scale * _log_odds(value) + self.bias
        return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))


class CalibratedPredictor:
    """A yes/no predictor whose probabilities are calibrated on validation cases (Platt, 1999).

    Args:
        predictor: The predictor; it answers the cases once.
        cases: Cases of the validation split.

    Attributes:
        curve: The fitted curve; the smoothed targets of Platt's section 2.2 keep it finite.

    Raises:
        LlmrecError: If no answer to the cases could be parsed.
    """

    def __init__(self, predictor: Predictor, cases: Sequence[Case]) -> None:
        self.name, self._predictor = predictor.name, predictor
        answers = predictor.answer([case.request for case in cases])
        known = [(a.value, case.truth) for a, case in zip(answers, cases, strict=True) if isinstance(a, Probability)]
        if not known:
            raise LlmrecError(
                f"tasks.ctr.calibrate: no answer of {self.name} to the {len(cases)} validation cases could be parsed; "
                "set the key to none, or hold out more validation interactions (data.split.valid, or the validation "
                "file of a given split)",
                kind="too-few",
                column="tasks.ctr.calibrate",
            )
        self.curve = fit_curve([value for value, _ in known], [float(truth) for _, truth in known])

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer with calibrated probabilities; see `Predictor.answer`."""
        return [
            replace(answer, value=self.curve.of(answer.value)) if isinstance(answer, Probability) else answer
            for answer in self._predictor.answer(requests)
        ]


def fit_curve(probabilities: Sequence[float], truth: Sequence[float]) -> CalibrationCurve:
    """Fit a calibration curve to probabilities and labels by log loss.

    Args:
        probabilities: P(yes), shape (n,).
        truth: 1 for yes and 0 for no, shape (n,).
    """
    odds, labels = np.array([_log_odds(value) for value in probabilities]), np.array(truth)
    yes, no = labels.sum(), (1 - labels).sum()
    targets = np.where(labels == 1, (yes + 1) / (yes + 2), 1 / (no + 2))

    def loss(point: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
        score = math.exp(point[0]) * odds + point[1]
        return float((np.logaddexp(0, score) - targets * score).mean())

    # Importing scipy takes 0.1 s, which most commands do not need.
    from scipy.optimize import minimize

    result = minimize(loss, np.zeros(2), method="L-BFGS-B", bounds=[(-12, 12), (-20, 20)])
    return CalibrationCurve(scale=math.exp(result.x[0]), bias=float(result.x[1]))


def _log_odds(value: float) -> float:
    inside = min(max(value, _CERTAIN), 1 - _CERTAIN)
    return math.log(inside / (1 - inside))


class TextGenerator(GeneratingStrategy):
    """Generates one text per request by greedy decoding, of at most ``max_tokens`` tokens."""

    name = "text"
    answer_type, reason = Text, "empty answer"

    def __init__(self, asker: Prompting, *, max_tokens: int = 48) -> None:
        super().__init__(asker)
        self._max_tokens = max_tokens

    def token_limit(self, requests: Sequence[Request]) -> int:
        """Return the maximum number of tokens of a text."""
        return self._max_tokens
