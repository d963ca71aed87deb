"""Runs one predictor over the cases of one task: answers -> per-request values -> figures with intervals.

Nothing is dropped: an answer that cannot be read stays in the denominator as a miss, a fallback rating or
probability, or an empty text, and is counted in the parse rate.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec import __version__
from llmrec.errors import LlmrecError
from llmrec.metrics import explained, probability
from llmrec.metrics import ranking as rank_metrics
from llmrec.metrics import rating as rating_metrics
from llmrec.metrics import text as text_metrics
from llmrec.metrics.signature import signature
from llmrec.metrics.significance import signflip
from llmrec.metrics.stats import Difference, StatisticName, interval, interval_of, paired_of
from llmrec.types import Answer, Case, Predictor, Probability, Ranking, Rating, Request, Text, Unparsed

UNKNOWN = 0.5
"""What a yes/no answer that cannot be read counts as, where there is no better fallback."""
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
        users: Which or how many users were evaluated, for the signatures; None leaves it unsaid.
        liked: Lowest rating that counts as liked, for the AUC of ratings; None: that figure is not taken.
    """

    split: str
    candidates: str
    cutoffs: tuple[int, ...]
    resamples: int
    seed: int
    catalogue: int
    users: str | None = None
    liked: float | None = None

    def sign(self, metric: str, *, seen: str = "excluded", slice: str | None = None, how: str | None = None) -> str:
        """Return a metric's signature.

        Args:
            metric: Its name.
            seen: ``excluded`` or ``included``, see `signature`.
            slice: Which cases the figure is over; None for all.
            how: What else sets the figure apart.
        """
        return signature(
            metric,
            candidates=self.candidates,
            seen=seen,
            users=self.users,
            slice=slice,
            how=how,
            split=self.split,
            version=__version__,
        )


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One row of a table.

    Attributes:
        figures: Metrics with intervals and signatures, rates, cost: the row as results.json holds it.
        values: Per-request values behind each mean, shape (n,), for paired comparisons; see `compare` for AUC.
        records: One mapping a request, as predictions.parquet holds it.
    """

    figures: dict[str, Any]
    values: dict[str, NDArray[np.float64]]
    records: list[dict[str, Any]]


def evaluate(
    predictor: Predictor,
    cases: Sequence[Case],
    *,
    name: str,
    kind: type[Answer],
    protocol: Protocol,
    fallback: Callable[[Request], float] | None = None,
    background: explained.Background | None = None,
) -> Evaluated:
    """Ask a predictor and measure its answers.

    Args:
        predictor: A baseline or a language model.
        cases: Requests with their truth; the predictor sees the requests only.
        name: What the table is called in messages, such as the family.
        kind: The answers that are wanted, which says what metrics apply.
        protocol: See `Protocol`.
        fallback: For ratings and yes/no answers, what stands in for one that cannot be read, such as the user's mean;
            yes/no answers may do without, and then count 0.5.
        background: For explanations, the training texts and features that they are held against; None: the figures that
            need them are left out.

    Raises:
        LlmrecError: If there are no cases, or the predictor leaves a request out.
    """
    if not cases:
        raise LlmrecError(f"{name}: the split holds no case to evaluate; lower the filters or choose another split")
    start = time.monotonic()
    answers = predictor.answer([case.request for case in cases])
    seconds = time.monotonic() - start
    asked = [case.request.id for case in cases]
    if [answer.request_id for answer in answers] != asked:
        raise LlmrecError(f"predictor {predictor.name!r} did not answer every request in order; this is a defect in it")
    answers = [answer if isinstance(answer, (kind, Unparsed)) else _foreign(answer) for answer in answers]
    texts: _Measure = partial(_texts, background=background)
    kinds: Mapping[type[Answer], _Measure] = {Rating: _ratings, Text: texts, Probability: _probabilities}
    measure = kinds.get(kind, _rankings)
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
            "forwards": sum(answer.cost.forwards for answer in answers),
        },
        "failures": [
            {"request_id": f.request_id, "reason": f.reason, "raw": f.raw or ""} for f in failures[:_SHOWN_FAILURES]
        ],
        **extra.get("rates", {}),
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
    """Pair two rows over the same requests of ``users``, a less b.

    Means are compared by flipping signs over users, see `significance`; RMSE as a root mean of squared errors; GAUC
    over the users who have both classes. AUC is no mean over users and gets the paired bootstrap.

    A row may have been made with several seeds. Values are averaged over them first; AUC and GAUC, which are no means
    of a request's values, are averaged themselves: the AUC of averaged probabilities would be that of an ensemble.

    Args:
        metric: Name of the metric.
        a: Values of the first row as `Evaluated.values` has them, shape (n,), or (seeds, n). For AUC and GAUC these are
            the probabilities, with a minus sign (also before 0) where the truth is no.
        b: Values of the second row.
        users: Whose request each value is.
        resamples: Number of resamples.
        seed: Seeds them.

    Raises:
        LlmrecError: If rows of AUC or GAUC have different truths, or no user has both classes.
    """
    left, right = np.atleast_2d(a), np.atleast_2d(b)
    if metric in ("AUC", "GAUC"):
        return _compare_auc(metric, left, right, users, resamples=resamples, seed=seed)
    first, second = left.mean(axis=0), right.mean(axis=0)
    return signflip(first, second, users=users, resamples=resamples, seed=seed, statistic=statistic_of(metric))


def _compare_auc(
    metric: str, a: NDArray[np.float64], b: NDArray[np.float64], users: Sequence[str], *, resamples: int, seed: int
) -> Difference:
    truth = ~np.signbit(a[0])
    if any(not np.array_equal(truth, ~np.signbit(each)) for each in (*a, *b)):
        raise LlmrecError(f"{metric}: the two rows have different truths, so they cannot be paired")
    if metric == "AUC":
        first, second = ([probability.auc_statistic(np.abs(each), truth, users) for each in seeds] for seeds in (a, b))

        def difference(rows: NDArray[np.intp]) -> NDArray[np.float64]:
            one, other = (np.mean([auc(rows) for auc in seeds], axis=0) for seeds in (first, second))
            return one - other  # type: ignore[no-any-return]

        return paired_of(difference, len(set(users)), resamples=resamples, seed=seed)
    left, right = (
        np.mean([probability.gauc(np.abs(each), truth, users).values for each in seeds], axis=0) for seeds in (a, b)
    )
    both = np.isfinite(left)
    if not both.any():
        raise LlmrecError("GAUC: no user has both a yes and a no, so there is nothing to compare")
    return signflip(left[both], right[both], resamples=resamples, seed=seed)


_Measured = tuple[dict[str, Any], dict[str, NDArray[np.float64]], dict[str, Any]]
_Measure = Callable[[Sequence[Case], Sequence[Answer], Protocol, Callable[[Request], float] | None], _Measured]


def statistic_of(metric: str) -> StatisticName:
    """Return how a metric's figure comes from per-request values."""
    return "root_mean" if metric == "RMSE" else "mean"


def mean_figure(
    metric: str,
    per_request: NDArray[np.float64],
    users: Sequence[str],
    protocol: Protocol,
    signature: str,
) -> dict[str, Any]:
    """Return the mean of per-request values (for RMSE its root) with its interval and signature."""
    found = interval(
        per_request,
        users=users,
        resamples=protocol.resamples,
        seed=protocol.seed,
        statistic=statistic_of(metric),
        method="bca",
        widen=True,
    )
    return figure(found.value, found.low, found.high, signature)


def figure(
    value: float | None, low: float | None, high: float | None, signature: str, undefined: str = ""
) -> dict[str, Any]:
    """Return one metric as results.json holds it; where it is not defined, the reason in place of a number."""
    found = {"value": value, "low": low, "high": high, "signature": signature}
    return found if value is not None else found | {"undefined": undefined}


def _figures(values: Mapping[str, NDArray[np.float64]], cases: Sequence[Case], protocol: Protocol) -> dict[str, Any]:
    users = [case.request.user_id for case in cases]
    return {name: mean_figure(name, each, users, protocol, protocol.sign(name)) for name, each in values.items()}


def _rankings(cases: Sequence[Case], answers: Sequence[Answer], protocol: Protocol, fallback: object) -> _Measured:
    standings = []
    for case, answer in zip(cases, answers, strict=True):
        pool = len(case.request.candidates) if case.request.candidates is not None else protocol.catalogue
        found = answer if isinstance(answer, Ranking) else Ranking(request_id=answer.request_id, items=(), scores=())
        standings.append(rank_metrics.standing(found, str(case.truth), pool))
    greater = np.array([s.greater for s in standings], dtype=np.int64)
    tied = np.array([s.tied for s in standings], dtype=np.int64)
    values = ranking_values(greater, tied, protocol.cutoffs)
    ranks = ranks_of(greater, tied)
    return _figures(values, cases, protocol), values, {"tie_rate": rank_metrics.tie_rate(tied), "ranks": ranks}


def ranking_values(
    greater: NDArray[np.int64], tied: NDArray[np.int64], cutoffs: Sequence[int]
) -> dict[str, NDArray[np.float64]]:
    """Return the per-request values of every ranking metric, shape (n,) each, for one target a request."""
    values: dict[str, NDArray[np.float64]] = {}
    for k in cutoffs:
        values[f"HR@{k}"] = rank_metrics.hit_rate(greater, tied, k)
        if k > 1:
            values[f"NDCG@{k}"] = rank_metrics.ndcg(greater, tied, k)
    values["MRR"] = rank_metrics.reciprocal_rank(greater, tied)
    return values


def ranks_of(greater: NDArray[np.int64], tied: NDArray[np.int64]) -> list[float | None]:
    """Return the expected rank of each target; None where it was left out."""
    return [None if np.isnan(rank) else float(rank) for rank in rank_metrics.expected_rank(greater, tied)]


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
    figures = _figures(values, cases, protocol)
    if (liked := protocol.liked) is not None:
        users = [case.request.user_id for case in cases]
        likes, sign = (truth >= liked).astype(np.float64), protocol.sign("LikedAUC", how=f"from-{liked:g}")
        figures["LikedAUC"] = _auc_figure(predicted, likes, users, protocol, sign)
    fallbacks = sum(not isinstance(answer, Rating) for answer in answers)
    return figures, values, {"rates": {"fallbacks": fallbacks}}


def _texts(
    cases: Sequence[Case],
    answers: Sequence[Answer],
    protocol: Protocol,
    fallback: object,
    background: explained.Background | None = None,
) -> _Measured:
    written = [answer.text if isinstance(answer, Text) else "" for answer in answers]
    truth = [str(case.truth) for case in cases]
    values = dict(text_metrics.rouge(written, truth))
    figures = _figures(values, cases, protocol)
    users = [case.request.user_id for case in cases]
    statistic = text_metrics.bleu4_statistic(written, truth, users)
    bleu = interval_of(statistic, len(set(users)), resamples=protocol.resamples, seed=protocol.seed)
    figures["BLEU-4"] = figure(bleu.value, bleu.low, bleu.high, protocol.sign("BLEU-4"))
    # Resampling repeats texts, which distinct-n punishes by definition: it gets no interval.
    for n in (1, 2):
        name = f"Distinct-{n}"
        figures[name] = figure(text_metrics.distinct_n(written, n), None, None, protocol.sign(name))
    figures["USR"] = figure(explained.unique_sentences(written), None, None, protocol.sign("USR"))
    if background is None:
        return figures, values, {}
    sign = protocol.sign("CopyRate", how=f"rouge-l-{background.texts.threshold:g}")
    figures["CopyRate"] = mean_figure("CopyRate", explained.copies(written, background), users, protocol, sign)
    # Short texts recur by themselves: how often people's own do is what a copy rate is held against.
    rates: dict[str, Any] = {"truth_copy_rate": float(explained.copies(truth, background).mean())}
    if (features := background.features) is None:
        return figures, values, {"rates": rates}
    items = [case.request.item or "" for case in cases]
    named = explained.named(written, users, items, features)
    how = f"features-{len(features.vocabulary)}"
    signs = {name: protocol.sign(name, how=how) for name in ("FMR", "FCR", "DIV", "Hallucination")}
    asked, held = [users[place] for place in named.known], int(named.counts[:, 0].sum())
    taken = {"FCR": named.coverage, "DIV": named.diversity}
    why = {
        "FMR": "no request has a feature that its text should name",
        "DIV": "a single text has no pair to compare",
        "Hallucination": "no text names a feature",
    }
    figures |= {name: figure(taken.get(name), None, None, sign, why.get(name, "")) for name, sign in signs.items()}
    if asked:
        figures["FMR"] = mean_figure("FMR", named.match, asked, protocol, signs["FMR"])
    if held:
        rate = explained.hallucination_statistic(named.counts, users)
        found = interval_of(rate, len(set(users)), resamples=protocol.resamples, seed=protocol.seed)
        figures["Hallucination"] = figure(found.value, found.low, found.high, signs["Hallucination"])
    # Few reviews of an item say all that there is to say: people's own texts name what no other does too.
    rates["truth_hallucination_rate"] = explained.hallucination_rate(truth, items, features)
    return figures, values, {"rates": rates | {"features_asked": len(asked), "features_named": held}}


def _probabilities(
    cases: Sequence[Case],
    answers: Sequence[Answer],
    protocol: Protocol,
    fallback: Callable[[Request], float] | None,
) -> _Measured:
    truth = np.array([float(case.truth) for case in cases])
    said = np.full(len(cases), UNKNOWN)
    for i, (case, answer) in enumerate(zip(cases, answers, strict=True)):
        if isinstance(answer, Probability):
            said[i] = answer.value
        elif fallback is not None:
            said[i] = fallback(case.request)
    users = [case.request.user_id for case in cases]
    signed = np.copysign(said, np.where(truth == 1, 1.0, -1.0))
    loss = probability.log_loss(said, truth)
    figures = {"AUC": _auc_figure(said, truth, users, protocol, protocol.sign("AUC"))}
    figures["GAUC"], left_out = _gauc_figure(said, truth, users, protocol)
    figures["LogLoss"] = mean_figure("LogLoss", loss, users, protocol, protocol.sign("LogLoss", how="clip-1e-15"))
    # A resample of few answers a bin is further from its own mean than the answers are: no interval.
    error = probability.calibration_error(said, truth)
    figures["ECE"] = figure(error, None, None, protocol.sign("ECE", how=f"mass-{probability.BINS}"))
    values = {"AUC": signed, "GAUC": signed, "LogLoss": loss}
    bins = [asdict(each) for each in probability.reliability(said, truth)]
    _, own, sizes = np.unique(said, return_inverse=True, return_counts=True)
    rates = {"users_left_out": left_out, "reliability": bins}
    return figures, values, {"rates": rates, "tie_rate": float((sizes[own] > 1).mean())}


def _auc_figure(
    said: NDArray[np.float64], truth: NDArray[np.float64], users: Sequence[str], protocol: Protocol, sign: str
) -> dict[str, Any]:
    if truth.min() == truth.max():
        return figure(None, None, None, sign, "all truths are of one class, so there is no pair of a yes and a no")
    statistic = probability.auc_statistic(said, truth, users)
    found = interval_of(statistic, len(set(users)), resamples=protocol.resamples, seed=protocol.seed)
    return figure(found.value, found.low, found.high, sign)


def _gauc_figure(
    said: NDArray[np.float64], truth: NDArray[np.float64], users: Sequence[str], protocol: Protocol
) -> tuple[dict[str, Any], int]:
    """Return the figure over users who have both classes, and how many have not."""
    within = probability.gauc(said, truth, users)
    both, sign = within.weights > 0, protocol.sign("GAUC", how="users-alike")
    if not both.any():
        return figure(None, None, None, sign, "no user has both a yes and a no"), within.left_out
    names = [name for name, kept in zip(within.users, both, strict=True) if kept]
    return mean_figure("GAUC", within.values[both], names, protocol, sign), within.left_out


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
    elif isinstance(answer, Rating | Probability):
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
