"""Evaluates a model on the cases of a task: answers, values per request, and metrics with intervals.

No answer is dropped: one that cannot be parsed counts as a miss, a fallback rating or probability, or an empty text,
and lowers the parse rate.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.data.split import SplitDataset
from llmrec.errors import LlmrecError
from llmrec.evaluate.figures import EvalProtocol, Measurements, compute_metrics
from llmrec.metrics import explained, probability
from llmrec.metrics import ranking as rank_metrics
from llmrec.metrics import text as text_metrics
from llmrec.registry import compared_metrics
from llmrec.results import Cost, Failure, ModelResults, Prediction, Rates
from llmrec.types import Answer, Case, Predictor, Probability, Ranking, Rating, Request, Text, Unparsed

# --------------------------------------------------------------------------- metrics by type of answer


DEFAULT_PROBABILITY = 0.5
"""The default fallback of a yes/no answer that cannot be parsed."""


Fallback = Callable[[Request], float] | None
MetricFunction = Callable[[Sequence[Case], Sequence[Answer], EvalProtocol, Fallback], Measurements]


def metric_function_for(kind: type[Answer], background: explained.ExplanationReference | None) -> MetricFunction:
    """Return the function that computes the metrics for a type of answer."""
    texts: MetricFunction = partial(_measure_texts, background=background)
    kinds: Mapping[type[Answer], MetricFunction] = {
        Rating: _measure_ratings,
        Text: texts,
        Probability: _measure_probabilities,
    }
    return kinds.get(kind, _measure_rankings)


def _measure_rankings(
    cases: Sequence[Case], answers: Sequence[Answer], protocol: EvalProtocol, fallback: object
) -> Measurements:
    standings, sizes = [], []
    for case, answer in zip(cases, answers, strict=True):
        size = len(case.request.candidates) if case.request.candidates is not None else protocol.catalogue
        result = answer if isinstance(answer, Ranking) else Ranking(request_id=answer.request_id, items=(), scores=())
        standings.append(rank_metrics.target_rank(result, str(case.truth), size))
        sizes.append(size)
    greater = np.array([s.greater for s in standings], dtype=np.int64)
    tied = np.array([s.tied for s in standings], dtype=np.int64)
    pool = np.array(sizes)
    inputs = {"greater": greater, "tied": tied, "pool": pool}
    taken = compute_metrics("ranking", inputs, _case_users(cases), protocol, cutoffs=protocol.cutoffs)
    return replace(taken, tie_rate=rank_metrics.tie_rate(tied), columns=target_rank_columns(greater, tied, pool))


def _case_users(cases: Sequence[Case]) -> list[str]:
    return [case.request.user_id for case in cases]


def target_rank_columns(
    greater: NDArray[np.int64], tied: NDArray[np.int64], pool: NDArray[np.int64]
) -> dict[str, Sequence[object]]:
    """Return the columns of predictions.parquet about each target: ties and expected rank."""
    ranks = [None if np.isnan(rank) else float(rank) for rank in rank_metrics.expected_rank(greater, tied)]
    return {"rank": ranks, "above": greater.tolist(), "tied": tied.tolist(), "pool": pool.tolist()}


def _measure_ratings(
    cases: Sequence[Case], answers: Sequence[Answer], protocol: EvalProtocol, fallback: Fallback
) -> Measurements:
    truth = np.array([float(case.truth) for case in cases])
    predicted = np.empty(len(cases))
    for i, (case, answer) in enumerate(zip(cases, answers, strict=True)):
        if isinstance(answer, Rating):
            predicted[i] = answer.value
        elif fallback is not None:
            predicted[i] = fallback(case.request)
        else:
            raise LlmrecError(
                f"request {answer.request_id}: the rating could not be parsed, and there is no fallback",
                kind="missing-value",
            )
    users = _case_users(cases)
    inputs = {"predicted": predicted, "truth": truth, "liked": protocol.liked, "owners": users}
    taken = compute_metrics("rating", inputs, users, protocol)
    fallbacks = sum(not isinstance(answer, Rating) for answer in answers)
    return replace(taken, rates=Rates(fallbacks=fallbacks), columns={"value": predicted.tolist()})


def _measure_texts(
    cases: Sequence[Case],
    answers: Sequence[Answer],
    protocol: EvalProtocol,
    fallback: object,
    background: explained.ExplanationReference | None = None,
) -> Measurements:
    written = [answer.text if isinstance(answer, Text) else "" for answer in answers]
    truth = [str(case.truth) for case in cases]
    users, items = _case_users(cases), [case.request.item or "" for case in cases]
    features = background.features if background is not None else None
    named = explained.measure_mentioned_features(written, users, items, features) if features is not None else None
    inputs = {
        "texts": written,
        "references": truth,
        "rouge": text_metrics.rouge(written, truth),
        "background": background,
        "named": named,
        "owners": users,
    }
    taken = compute_metrics("text", inputs, users, protocol)
    if background is None:
        return taken
    copies, in_truth = (explained.detect_copies(texts, background.texts) for texts in (written, truth))
    # Short texts recur naturally, so the copy rate of the true texts is given for comparison.
    columns: dict[str, Sequence[object]] = {"copied": copies.tolist(), "truth_copied": in_truth.tolist()}
    if features is None or named is None:
        return replace(taken, rates=Rates(truth_copy_rate=float(in_truth.mean())), columns=columns)
    truth_named = explained.measure_mentioned_features(truth, users, items, features)
    # Reviews of an item are incomplete: true texts also mention features that no other review mentions.
    rates = Rates(
        truth_copy_rate=float(in_truth.mean()),
        truth_hallucination_rate=truth_named.hallucination,
        features_asked=len(named.known),
        features_named=int(named.counts[:, 0].sum()),
    )
    columns |= _feature_columns(named, [features.annotated.get(pair) for pair in zip(users, items, strict=True)])
    columns |= {
        f"truth_{name}": truth_named.counts[:, index].astype(int).tolist()
        for index, name in enumerate(("features", "unsupported"))
    }
    return replace(taken, rates=rates, columns=columns)


def _feature_columns(
    named: explained.MentionedFeatures, expected: Sequence[tuple[str, ...] | None]
) -> dict[str, Sequence[object]]:
    match = dict(zip(named.known.tolist(), named.match.tolist(), strict=True))
    return {
        "feature": [" ".join(words) if words else None for words in expected],
        "feature_named": [match[index] == 1 if index in match else None for index in range(len(expected))],
        "features": [sorted(" ".join(words) for words in result) for result in named.mentions],
        "unsupported": named.counts[:, 1].astype(int).tolist(),
    }


def _measure_probabilities(
    cases: Sequence[Case], answers: Sequence[Answer], protocol: EvalProtocol, fallback: Fallback
) -> Measurements:
    truth = np.array([float(case.truth) for case in cases])
    probabilities = np.full(len(cases), DEFAULT_PROBABILITY)
    for i, (case, answer) in enumerate(zip(cases, answers, strict=True)):
        if isinstance(answer, Probability):
            probabilities[i] = answer.value
        elif fallback is not None:
            probabilities[i] = fallback(case.request)
    users = _case_users(cases)
    inputs = {"probabilities": probabilities, "labels": truth, "owners": users}
    taken = compute_metrics("probability", inputs, users, protocol)
    # Metrics that are not means are compared by probabilities, with a minus sign where the true answer is no.
    signed = np.copysign(probabilities, np.where(truth == 1, 1.0, -1.0))
    values = {name: taken.values.get(name, signed) for name in compared_metrics("probability")}
    bins = probability.reliability_curve(probabilities, truth)
    _, groups, sizes = np.unique(probabilities, return_inverse=True, return_counts=True)
    rates = Rates(users_left_out=probability.gauc(probabilities, truth, users).left_out, reliability=bins)
    ties = float((sizes[groups] > 1).mean())
    return replace(taken, values=values, rates=rates, tie_rate=ties, columns={"value": probabilities.tolist()})


def explanation_reference(data: SplitDataset) -> explained.ExplanationReference:
    """Return the training texts of a split, and the features of (user, item) pairs."""
    columns = ["user_id", "item_id", "feature"]
    features: dict[tuple[str, str], str] | None = None
    if "feature" in data.train.columns:
        parts = (data.train, data.valid, data.test)
        rows = (row for part in parts for row in part.select(columns).drop_nulls().iter_rows())
        features = {(user, item): feature for user, item, feature in rows}
    entries = list(data.train.select("user_id", "item_id", "text").iter_rows())
    # If a text is one sentence of a review, the whole review supports features and can be copied from.
    reviews = ((user, item, data.dataset.reviews.get((user, item))) for user, item, _ in entries)
    entries += [(user, item, review.text) for user, item, review in reviews if review is not None]
    users, items, texts = zip(*entries, strict=True)
    return explained.build_explanation_reference(users, items, texts, features)


_SHOWN_FAILURES = 5


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """The results of evaluating one model.

    Attributes:
        figures: Metrics with intervals and signatures, rates, cost.
        values: Per-request values behind each mean, shape (n,), for paired comparisons; see
            `llmrec.evaluate.compare.compare_values` for AUC.
        records: One per request.
    """

    figures: ModelResults
    values: dict[str, NDArray[np.float64]]
    records: list[Prediction]


def evaluate(
    predictor: Predictor,
    cases: Sequence[Case],
    *,
    name: str,
    kind: type[Answer],
    protocol: EvalProtocol,
    fallback: Callable[[Request], float] | None = None,
    background: explained.ExplanationReference | None = None,
) -> EvaluationResult:
    """Evaluate a model on cases.

    Args:
        predictor: A baseline or a language model.
        cases: Requests with their truth; the predictor gets the requests only.
        name: Name of the table in messages, such as the family.
        kind: The expected kind of answers, which determines the metrics.
        protocol: See `EvalProtocol`.
        fallback: For ratings and yes/no answers, the value of one that cannot be parsed, such as the user's mean;
            for yes/no answers the default is 0.5.
        background: For explanations, the training texts and features to compare with; None omits the metrics that
            need them.

    Raises:
        LlmrecError: If there are no cases, or the predictor omits a request.
    """
    if not cases:
        raise LlmrecError(
            f"{name}: the split has no test cases; relax the filters, or choose another split", kind="empty"
        )
    start = time.monotonic()
    answers = predictor.answer([case.request for case in cases])
    seconds = time.monotonic() - start
    if [answer.request_id for answer in answers] != [case.request.id for case in cases]:
        raise LlmrecError(
            f"predictor {predictor.name!r} did not answer every request in order; fix the predictor", kind="defect"
        )
    answers = [answer if isinstance(answer, (kind, Unparsed)) else _wrong_type_failure(answer) for answer in answers]
    result = metric_function_for(kind, background)(cases, answers, protocol, fallback)
    failures = [answer for answer in answers if isinstance(answer, Unparsed)]
    figures = ModelResults(
        n=len(cases),
        parse_rate=1 - len(failures) / len(cases),
        tie_rate=result.tie_rate,
        metrics=result.metrics,
        cost=Cost(
            seconds=seconds,
            prompt_tokens=sum(answer.cost.prompt_tokens for answer in answers),
            completion_tokens=sum(answer.cost.completion_tokens for answer in answers),
            forwards=sum(answer.cost.forwards for answer in answers),
        ),
        failures=tuple(
            Failure(request_id=failure.request_id, reason=failure.reason, raw=failure.raw or "")
            for failure in failures[:_SHOWN_FAILURES]
        ),
        **result.rates.as_json(),
    )
    records = [
        prediction_record(case, answer, {name: item[index] for name, item in result.columns.items()})
        for index, (case, answer) in enumerate(zip(cases, answers, strict=True))
    ]
    return EvaluationResult(figures, result.values, records)


def _wrong_type_failure(answer: Answer) -> Unparsed:
    """Return the failure that replaces an answer of the wrong type."""
    return Unparsed(
        request_id=answer.request_id,
        reason=f"a {type(answer).__name__} is not an answer of this task",
        raw=answer.raw,
        prompt_hash=answer.prompt_hash,
        cost=answer.cost,
    )


def prediction_record(case: Case, answer: Answer, fields: Mapping[str, Any]) -> Prediction:
    """Return the record of an answer, with further fields."""
    parsed: object = None
    if isinstance(answer, Ranking):
        parsed = {"items": list(answer.items), "scores": [float(score) for score in answer.scores]}
    elif isinstance(answer, Rating | Probability):
        parsed = answer.value
    elif isinstance(answer, Text):
        parsed = answer.text
    return Prediction(
        request_id=answer.request_id,
        user_id=case.request.user_id,
        truth=str(case.truth),
        parsed=json.dumps(parsed, ensure_ascii=False),
        raw=answer.raw,
        prompt_hash=answer.prompt_hash,
        error=answer.reason if isinstance(answer, Unparsed) else None,
        prompt_tokens=answer.cost.prompt_tokens,
        completion_tokens=answer.cost.completion_tokens,
        forwards=answer.cost.forwards,
        **fields,
    )
