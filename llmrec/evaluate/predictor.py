"""Runs one predictor over the cases of one task: answers -> per-request values -> figures with intervals.

Nothing is dropped: an answer that cannot be read stays in the denominator as a miss, a fallback rating or
probability, or an empty text, and is counted in the parse rate.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.errors import LlmrecError
from llmrec.evaluate.answers import measure_of
from llmrec.evaluate.figures import EvalProtocol
from llmrec.metrics import explained
from llmrec.results import Cost, Failure, Measured, Prediction
from llmrec.types import Answer, Case, Predictor, Probability, Ranking, Rating, Request, Text, Unparsed

_SHOWN_FAILURES = 5


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One row of a table.

    Attributes:
        figures: Metrics with intervals and signatures, rates, cost.
        values: Per-request values behind each mean, shape (n,), for paired comparisons; see
            `llmrec.evaluate.compare.compare` for AUC.
        records: One a request.
    """

    figures: Measured
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
    background: explained.Background | None = None,
) -> Evaluated:
    """Ask a predictor and measure its answers.

    Args:
        predictor: A baseline or a language model.
        cases: Requests with their truth; the predictor sees the requests only.
        name: What the table is called in messages, such as the family.
        kind: The answers that are wanted, which says what metrics apply.
        protocol: See `EvalProtocol`.
        fallback: For ratings and yes/no answers, what stands in for one that cannot be read, such as the user's mean;
            yes/no answers may do without, and then count 0.5.
        background: For explanations, the training texts and features that they are held against; None: the figures that
            need them are left out.

    Raises:
        LlmrecError: If there are no cases, or the predictor leaves a request out.
    """
    if not cases:
        raise LlmrecError(
            f"{name}: the split holds no case to evaluate; lower the filters or choose another split", kind="empty"
        )
    start = time.monotonic()
    answers = predictor.answer([case.request for case in cases])
    seconds = time.monotonic() - start
    asked = [case.request.id for case in cases]
    if [answer.request_id for answer in answers] != asked:
        raise LlmrecError(
            f"predictor {predictor.name!r} did not answer every request in order; this is a defect in it", kind="defect"
        )
    answers = [answer if isinstance(answer, (kind, Unparsed)) else _foreign(answer) for answer in answers]
    found = measure_of(kind, background)(cases, answers, protocol, fallback)
    failures = [answer for answer in answers if isinstance(answer, Unparsed)]
    figures = Measured(
        n=len(cases),
        parse_rate=1 - len(failures) / len(cases),
        tie_rate=found.tie_rate,
        metrics=found.metrics,
        cost=Cost(
            seconds=seconds,
            prompt_tokens=sum(answer.cost.prompt_tokens for answer in answers),
            completion_tokens=sum(answer.cost.completion_tokens for answer in answers),
            forwards=sum(answer.cost.forwards for answer in answers),
        ),
        failures=tuple(
            Failure(request_id=each.request_id, reason=each.reason, raw=each.raw or "")
            for each in failures[:_SHOWN_FAILURES]
        ),
        **found.rates.as_json(),
    )
    records = [
        _record(case, answer, {name: each[place] for name, each in found.columns.items()})
        for place, (case, answer) in enumerate(zip(cases, answers, strict=True))
    ]
    return Evaluated(figures, found.values, records)


def _foreign(answer: Answer) -> Unparsed:
    """Count an answer of another family's kind as a failure."""
    return Unparsed(
        request_id=answer.request_id,
        reason=f"a {type(answer).__name__} does not answer this task",
        raw=answer.raw,
        prompt_hash=answer.prompt_hash,
        cost=answer.cost,
    )


def _record(case: Case, answer: Answer, found: Mapping[str, Any]) -> Prediction:
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
        **found,
    )
