"""Runs one predictor over the cases of one task: answers -> per-request values -> figures with intervals.

Nothing is dropped: an answer that cannot be read stays in the denominator as a miss, a fallback rating or an
empty text, and is counted in the parse rate.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec import __version__
from llmrec.errors import LlmrecError
from llmrec.metrics import ranking as rank_metrics
from llmrec.metrics import rating as rating_metrics
from llmrec.metrics import text as text_metrics
from llmrec.metrics.signature import signature
from llmrec.metrics.stats import Difference, StatisticName, interval, interval_of, paired
from llmrec.types import Answer, Case, Family, Predictor, Ranking, Rating, Request, Text, Unparsed

HEADLINE: Mapping[str, str] = {
    "rating": "RMSE",
    "sequential": "NDCG@10",
    "direct": "NDCG@10",
    "explanation": "ROUGE-L",
}
LOWER_IS_BETTER = frozenset({"RMSE", "MAE"})
_SHOWN_FAILURES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """What makes figures comparable; it is written into every signature.

    Attributes:
        split: Kind of split.
        candidates: Such as ``"uniform-20"``, or ``"full"``.
        cutoffs: Ranks at which HR and NDCG are cut.
        resamples: Bootstrap samples over users.
        seed: Seeds the bootstrap.
        catalogue: Number of items, the pool where a request has no candidates.
    """

    split: str
    candidates: str
    cutoffs: tuple[int, ...]
    resamples: int
    seed: int
    catalogue: int

    def sign(self, metric: str) -> str:
        """Return a metric's signature."""
        return signature(metric, candidates=self.candidates, seen="excluded", split=self.split, version=__version__)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One row of a table.

    Attributes:
        figures: Metrics with intervals and signatures, rates, cost: the row as results.json holds it.
        values: Per-request values behind each mean, shape (n,), for paired comparisons.
        records: One mapping a request, as predictions.parquet holds it.
    """

    figures: dict[str, Any]
    values: dict[str, NDArray[np.float64]]
    records: list[dict[str, Any]]


def evaluate(
    predictor: Predictor,
    cases: Sequence[Case],
    *,
    family: Family,
    protocol: Protocol,
    fallback: Callable[[Request], float] | None = None,
) -> Evaluated:
    """Ask a predictor and measure its answers.

    Args:
        predictor: A baseline or a language model.
        cases: Requests with their truth; the predictor sees the requests only.
        family: Which metrics apply.
        protocol: See `Protocol`.
        fallback: For ratings, what stands in for an answer that cannot be read, such as the user's mean.

    Raises:
        LlmrecError: If there are no cases, or the predictor leaves a request out.
    """
    if not cases:
        raise LlmrecError(f"{family}: the split holds no case to evaluate; lower the filters or choose another split")
    start = time.monotonic()
    answers = predictor.answer([case.request for case in cases])
    seconds = time.monotonic() - start
    asked = [case.request.id for case in cases]
    if [answer.request_id for answer in answers] != asked:
        raise LlmrecError(f"predictor {predictor.name!r} did not answer every request in order; this is a defect in it")
    wanted: type[Answer] = {"rating": Rating, "explanation": Text}.get(family, Ranking)
    answers = [answer if isinstance(answer, wanted | Unparsed) else _foreign(answer) for answer in answers]
    measure = {"rating": _ratings, "explanation": _texts}.get(family, _rankings)
    metrics, values, extra = measure(cases, answers, protocol, fallback)
    failures = [answer for answer in answers if isinstance(answer, Unparsed)]
    figures = {
        "n": len(cases),
        "parse_rate": 1 - len(failures) / len(cases),
        "tie_rate": extra.get("tie_rate", 0.0),
        "metrics": metrics,
        "cost": {
            "seconds": seconds,
            "prompt_tokens": sum(answer.cost.prompt_tokens for answer in answers),
            "completion_tokens": sum(answer.cost.completion_tokens for answer in answers),
        },
        "failures": [
            {"request_id": f.request_id, "reason": f.reason, "raw": f.raw or ""} for f in failures[:_SHOWN_FAILURES]
        ],
    }
    ranks = extra.get("ranks", [None] * len(cases))
    records = [_record(case, answer, rank) for case, answer, rank in zip(cases, answers, ranks, strict=True)]
    return Evaluated(figures, values, records)


def compare(
    metric: str,
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    users: Sequence[str],
    *,
    resamples: int,
    seed: int,
) -> Difference:
    """Pair two rows over the same requests of ``users``; RMSE is compared as a root mean of squared errors."""
    return paired(a, b, users=users, resamples=resamples, seed=seed, statistic=_statistic(metric))


_Measured = tuple[dict[str, Any], dict[str, NDArray[np.float64]], dict[str, Any]]


def _statistic(metric: str) -> StatisticName:
    return "root_mean" if metric == "RMSE" else "mean"


def _figures(values: Mapping[str, NDArray[np.float64]], cases: Sequence[Case], protocol: Protocol) -> dict[str, Any]:
    users = [case.request.user_id for case in cases]
    figures = {}
    for metric, per_request in values.items():
        found = interval(
            per_request, users=users, resamples=protocol.resamples, seed=protocol.seed, statistic=_statistic(metric)
        )
        figures[metric] = _figure(found.value, found.low, found.high, metric, protocol)
    return figures


def _figure(value: float, low: float | None, high: float | None, metric: str, protocol: Protocol) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "signature": protocol.sign(metric)}


def _rankings(cases: Sequence[Case], answers: Sequence[Answer], protocol: Protocol, fallback: object) -> _Measured:
    standings = []
    for case, answer in zip(cases, answers, strict=True):
        pool = len(case.request.candidates) if case.request.candidates is not None else protocol.catalogue
        found = answer if isinstance(answer, Ranking) else Ranking(request_id=answer.request_id, items=(), scores=())
        standings.append(rank_metrics.standing(found, str(case.truth), pool))
    greater = np.array([s.greater for s in standings], dtype=np.int64)
    tied = np.array([s.tied for s in standings], dtype=np.int64)
    values: dict[str, NDArray[np.float64]] = {}
    for k in protocol.cutoffs:
        values[f"HR@{k}"] = rank_metrics.hit_rate(greater, tied, k)
        if k > 1:
            values[f"NDCG@{k}"] = rank_metrics.ndcg(greater, tied, k)
    values["MRR"] = rank_metrics.reciprocal_rank(greater, tied)
    ranks = [None if np.isnan(rank) else float(rank) for rank in rank_metrics.expected_rank(greater, tied)]
    return _figures(values, cases, protocol), values, {"tie_rate": rank_metrics.tie_rate(tied), "ranks": ranks}


def _ratings(
    cases: Sequence[Case],
    answers: Sequence[Answer],
    protocol: Protocol,
    fallback: Callable[[Request], float] | None,
) -> _Measured:
    truth = np.array([float(case.truth) for case in cases])
    predicted = np.empty(len(cases))
    for i, (case, answer) in enumerate(zip(cases, answers, strict=True)):
        if isinstance(answer, Rating):
            predicted[i] = answer.value
        elif fallback is not None:
            predicted[i] = fallback(case.request)
        else:
            raise LlmrecError(f"request {answer.request_id}: no rating could be read and no fallback was given")
    values = {
        "RMSE": rating_metrics.squared_error(predicted, truth),
        "MAE": rating_metrics.absolute_error(predicted, truth),
    }
    return _figures(values, cases, protocol), values, {}


def _texts(cases: Sequence[Case], answers: Sequence[Answer], protocol: Protocol, fallback: object) -> _Measured:
    written = [answer.text if isinstance(answer, Text) else "" for answer in answers]
    truth = [str(case.truth) for case in cases]
    values = dict(text_metrics.rouge(written, truth))
    figures = _figures(values, cases, protocol)
    users = [case.request.user_id for case in cases]
    statistic = text_metrics.bleu4_statistic(written, truth, users)
    bleu = interval_of(statistic, len(set(users)), resamples=protocol.resamples, seed=protocol.seed)
    figures["BLEU-4"] = _figure(bleu.value, bleu.low, bleu.high, "BLEU-4", protocol)
    # Resampling repeats texts, which distinct-n punishes by definition: it gets no interval.
    figures["Distinct-2"] = _figure(text_metrics.distinct_n(written, 2), None, None, "Distinct-2", protocol)
    return figures, values, {}


def _foreign(answer: Answer) -> Unparsed:
    """Count an answer of another family's kind as a failure."""
    return Unparsed(
        request_id=answer.request_id,
        reason=f"a {type(answer).__name__} does not answer this task",
        raw=answer.raw,
        prompt_hash=answer.prompt_hash,
        cost=answer.cost,
    )


def _record(case: Case, answer: Answer, rank: float | None) -> dict[str, Any]:
    parsed: Any = None
    if isinstance(answer, Ranking):
        parsed = {"items": list(answer.items), "scores": [float(score) for score in answer.scores]}
    elif isinstance(answer, Rating):
        parsed = answer.value
    elif isinstance(answer, Text):
        parsed = answer.text
    return {
        "request_id": answer.request_id,
        "user_id": case.request.user_id,
        "truth": str(case.truth),
        "parsed": json.dumps(parsed, ensure_ascii=False),
        "raw": answer.raw,
        "prompt_hash": answer.prompt_hash,
        "rank": rank,
        "error": answer.reason if isinstance(answer, Unparsed) else None,
        "prompt_tokens": answer.cost.prompt_tokens,
        "completion_tokens": answer.cost.completion_tokens,
    }
