"""Measures answers of each kind (rankings, ratings, texts, probabilities) against the truths of their cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from llmrec.data.split import SplitDataset
from llmrec.errors import LlmrecError
from llmrec.evaluate.figures import EvalProtocol, figure, mean_figure
from llmrec.metrics import explained, probability
from llmrec.metrics import ranking as rank_metrics
from llmrec.metrics import rating as rating_metrics
from llmrec.metrics import text as text_metrics
from llmrec.metrics.stats import interval_of
from llmrec.records import Reliability
from llmrec.results import Metric, Rates
from llmrec.types import Answer, Case, Probability, Ranking, Rating, Request, Text

UNKNOWN = 0.5
"""What a yes/no answer that cannot be read counts as, where there is no better fallback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What answers of one kind come to.

    Attributes:
        metrics: Figures by metric.
        values: Per-request values by metric, shape (n,) each.
        rates: What this kind has beside its metrics.
        tie_rate: Share of answers that tie.
        columns: What each answer came to, one value a request, by the fields of `llmrec.results.Prediction`.
    """

    metrics: dict[str, Metric]
    values: dict[str, NDArray[np.float64]]
    rates: Rates = field(default_factory=Rates)
    tie_rate: float = 0.0
    columns: Mapping[str, Sequence[object]] = field(default_factory=dict)


Fallback = Callable[[Request], float] | None
Measure = Callable[[Sequence[Case], Sequence[Answer], EvalProtocol, Fallback], Found]


def measure_of(kind: type[Answer], background: explained.Background | None) -> Measure:
    """Return what measures answers of a kind; ``background`` as `llmrec.evaluate.predictor.evaluate` takes it."""
    texts: Measure = partial(_texts, background=background)
    kinds: Mapping[type[Answer], Measure] = {Rating: _ratings, Text: texts, Probability: _probabilities}
    return kinds.get(kind, _rankings)


def _figures(
    values: Mapping[str, NDArray[np.float64]], cases: Sequence[Case], protocol: EvalProtocol
) -> dict[str, Metric]:
    users = [case.request.user_id for case in cases]
    return {name: mean_figure(name, each, users, protocol, protocol.sign(name)) for name, each in values.items()}


def _rankings(cases: Sequence[Case], answers: Sequence[Answer], protocol: EvalProtocol, fallback: object) -> Found:
    standings, pools = [], []
    for case, answer in zip(cases, answers, strict=True):
        pool = len(case.request.candidates) if case.request.candidates is not None else protocol.catalogue
        found = answer if isinstance(answer, Ranking) else Ranking(request_id=answer.request_id, items=(), scores=())
        standings.append(rank_metrics.standing(found, str(case.truth), pool))
        pools.append(pool)
    greater = np.array([s.greater for s in standings], dtype=np.int64)
    tied = np.array([s.tied for s in standings], dtype=np.int64)
    values = ranking_values(greater, tied, protocol.cutoffs)
    metrics, columns = _figures(values, cases, protocol), standing_columns(greater, tied, np.array(pools))
    return Found(metrics=metrics, values=values, tie_rate=rank_metrics.tie_rate(tied), columns=columns)


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


def standing_columns(
    greater: NDArray[np.int64], tied: NDArray[np.int64], pool: NDArray[np.int64]
) -> dict[str, Sequence[object]]:
    """Return what the stored predictions say of where each target stands: its block, and its expected rank."""
    ranks = [None if np.isnan(rank) else float(rank) for rank in rank_metrics.expected_rank(greater, tied)]
    return {"rank": ranks, "above": greater.tolist(), "tied": tied.tolist(), "pool": pool.tolist()}


def _ratings(
    cases: Sequence[Case],
    answers: Sequence[Answer],
    protocol: EvalProtocol,
    fallback: Callable[[Request], float] | None,
) -> Found:
    truth = np.array([float(case.truth) for case in cases])
    predicted = np.empty(len(cases))
    for i, (case, answer) in enumerate(zip(cases, answers, strict=True)):
        if isinstance(answer, Rating):
            predicted[i] = answer.value
        elif fallback is not None:
            predicted[i] = fallback(case.request)
        else:
            raise LlmrecError(
                f"request {answer.request_id}: no rating could be read and no fallback was given", kind="missing-value"
            )
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
    columns = {"value": predicted.tolist()}
    return Found(metrics=figures, values=values, rates=Rates(fallbacks=fallbacks), columns=columns)


def _texts(
    cases: Sequence[Case],
    answers: Sequence[Answer],
    protocol: EvalProtocol,
    fallback: object,
    background: explained.Background | None = None,
) -> Found:
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
        return Found(metrics=figures, values=values)
    sign = protocol.sign("CopyRate", how=f"rouge-l-{background.texts.threshold:g}")
    copies = explained.copies(written, background)
    figures["CopyRate"] = mean_figure("CopyRate", copies, users, protocol, sign)
    # Short texts recur by themselves: how often people's own do is what a copy rate is held against.
    own = explained.copies(truth, background)
    columns: dict[str, Sequence[object]] = {"copied": (copies == 1).tolist(), "truth_copied": (own == 1).tolist()}
    if (features := background.features) is None:
        rates = Rates(truth_copy_rate=float(own.mean()))
        return Found(metrics=figures, values=values, rates=rates, columns=columns)
    items = [case.request.item or "" for case in cases]
    named = explained.named(written, users, items, features)
    told = explained.named(truth, users, items, features)
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
    rates = Rates(
        truth_copy_rate=float(own.mean()),
        truth_hallucination_rate=told.hallucination,
        features_asked=len(asked),
        features_named=held,
    )
    columns |= _feature_columns(named, [features.asked.get(pair) for pair in zip(users, items, strict=True)])
    columns |= {f"truth_{name}": told.counts[:, place].astype(int).tolist() for place, name in enumerate(_COUNTED)}
    return Found(metrics=figures, values=values, rates=rates, columns=columns)


_COUNTED = ("features", "unsupported")


def _feature_columns(named: explained.Named, asked: Sequence[tuple[str, ...] | None]) -> dict[str, Sequence[object]]:
    match = dict(zip(named.known.tolist(), named.match.tolist(), strict=True))
    return {
        "feature": [" ".join(words) if words else None for words in asked],
        "feature_named": [match[place] == 1 if place in match else None for place in range(len(asked))],
        "features": [sorted(" ".join(words) for words in found) for found in named.found],
        "unsupported": named.counts[:, 1].astype(int).tolist(),
    }


def _probabilities(
    cases: Sequence[Case],
    answers: Sequence[Answer],
    protocol: EvalProtocol,
    fallback: Callable[[Request], float] | None,
) -> Found:
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
    bins = tuple(Reliability(**asdict(each)) for each in probability.reliability(said, truth))
    _, own, sizes = np.unique(said, return_inverse=True, return_counts=True)
    rates = Rates(users_left_out=left_out, reliability=bins)
    ties = float((sizes[own] > 1).mean())
    return Found(metrics=figures, values=values, rates=rates, tie_rate=ties, columns={"value": said.tolist()})


def _auc_figure(
    said: NDArray[np.float64], truth: NDArray[np.float64], users: Sequence[str], protocol: EvalProtocol, sign: str
) -> Metric:
    if truth.min() == truth.max():
        return figure(None, None, None, sign, "all truths are of one class, so there is no pair of a yes and a no")
    statistic = probability.auc_statistic(said, truth, users)
    found = interval_of(statistic, len(set(users)), resamples=protocol.resamples, seed=protocol.seed)
    return figure(found.value, found.low, found.high, sign)


def _gauc_figure(
    said: NDArray[np.float64], truth: NDArray[np.float64], users: Sequence[str], protocol: EvalProtocol
) -> tuple[Metric, int]:
    """Return the figure over users who have both classes, and how many have not."""
    within = probability.gauc(said, truth, users)
    both, sign = within.weights > 0, protocol.sign("GAUC", how="users-alike")
    if not both.any():
        return figure(None, None, None, sign, "no user has both a yes and a no"), within.left_out
    names = [name for name, kept in zip(within.users, both, strict=True) if kept]
    return mean_figure("GAUC", within.values[both], names, protocol, sign), within.left_out


def background_of(data: SplitDataset) -> explained.Background:
    """Return the training texts of a split, and the features of its pairs where its interactions have a column."""
    columns = ["user_id", "item_id", "feature"]
    features: dict[tuple[str, str], str] | None = None
    if "feature" in data.train.columns:
        parts = (data.train, data.valid, data.test)
        rows = (row for part in parts for row in part.select(columns).drop_nulls().iter_rows())
        features = {(user, item): feature for user, item, feature in rows}
    told = list(data.train.select("user_id", "item_id", "text").iter_rows())
    # Where a text is one sentence of a review, the rest of it supports features and can be copied too.
    reviews = ((user, item, data.dataset.reviews.get((user, item))) for user, item, _ in told)
    told += [(user, item, review.text) for user, item, review in reviews if review is not None]
    users, items, texts = zip(*told, strict=True)
    return explained.background(users, items, texts, features)
