"""Evaluates baselines on the validation split, for tuning and early stopping; never uses the test split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from llmrec.data.hashing import hash64
from llmrec.data.split import request_id
from llmrec.evaluate.catalogue import parse_seen_conventions, rank_catalogue
from llmrec.metrics.probability import log_loss
from llmrec.metrics.ranking import ndcg
from llmrec.metrics.rating import rmse
from llmrec.types import Case, CatalogueScorer, Predictor, Probability, Rating, Request

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset


def sampling_keys(data: SplitDataset) -> NDArray[np.uint64]:
    """Return random sampling keys of the validation interactions, shape (n,)."""
    if data.drawn is not None and len(data.drawn) == len(data.valid):
        return data.drawn
    return hash64("validation", data.seed, data.valid["user_id"], data.valid["item_id"])


def ranking_cases(data: SplitDataset, limit: int | None = None) -> list[Case]:
    """Return the validation interactions as requests on the whole catalogue, in seeded order.

    Histories end before the validation interactions, so a target is in its history only if the user had the item
    before.

    Args:
        data: The split; its test interactions are not used.
        limit: Maximum number of requests, a random sample; None: all.
    """
    users, items = data.valid["user_id"].to_list(), data.valid["item_id"].to_list()
    order = np.argsort(sampling_keys(data), kind="stable")[:limit]
    return [
        Case(
            request=Request(
                id=request_id(users[row], items[row]),
                user_id=users[row],
                history=data.history(users[row], "valid"),
            ),
            truth=items[row],
        )
        for row in order.tolist()
    ]


def rating_cases(data: SplitDataset, limit: int | None = None) -> list[Case]:
    """Return the validation ratings as requests, in the order of the split.

    The request contains the text of the rating's review, if there is one, as ``review``.

    Args:
        data: The split.
        limit: Return a sample of this size, drawn as in `ranking_cases`.
    """
    reviews = data.dataset.reviews
    rated = data.valid.with_columns(drawn=sampling_keys(data)).drop_nulls("rating")
    if limit is not None:
        rated = rated.filter(pl.col("drawn").rank("ordinal") <= limit)
    rated = rated.select("user_id", "item_id", "rating")
    return [
        Case(
            request=Request(
                id=request_id(user, item),
                user_id=user,
                item=item,
                history=data.history(user, "valid"),
                context={"review": reviews[user, item].text} if (user, item) in reviews else {},
            ),
            truth=rating,
        )
        for user, item, rating in rated.iter_rows()
    ]


def mean_ndcgs(
    scorer: CatalogueScorer, cases: Sequence[Case], seen: Sequence[str] = ("excluded",), k: int = 10
) -> dict[str, float]:
    """Return NDCG@k on the whole catalogue, computed as on the test split.

    Args:
        scorer: A fitted model that scores the catalogue.
        cases: Requests with the held-out item.
        seen: Whether items of the history are ranked: ``excluded``, ``included`` or both. The target is always ranked.
        k: The cut-off.

    Returns:
        The means by convention.
    """
    ranked = rank_catalogue(scorer, cases, cutoffs=(), seen=parse_seen_conventions(seen))
    return {item: float(ndcg(result.greater, result.tied, k).mean()) for item, result in ranked.items()}


def root_mean_squared_error(predictor: Predictor, cases: Sequence[Case]) -> float:
    """Return the RMSE of a rating baseline."""
    answers = predictor.answer([case.request for case in cases])
    guesses = [answer.value for answer in answers if isinstance(answer, Rating)]
    return rmse(guesses, [float(case.truth) for case in cases])


def mean_log_loss(predictor: Predictor, cases: Sequence[Case], liked: float) -> float:
    """Return the log loss of a CTR baseline, in nats.

    Args:
        predictor: A fitted baseline.
        cases: The result of `rating_cases`.
        liked: The lowest rating that counts as yes.
    """
    answers = predictor.answer([case.request for case in cases])
    guesses = [answer.value for answer in answers if isinstance(answer, Probability)]
    return float(log_loss(guesses, [float(float(case.truth) >= liked) for case in cases]).mean())
