"""Candidates that a classic recommender retrieves, for two-step ranking: retrieve, then rank (PALR, 2305.07622)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from llmrec.data.candidates import CandidateSets
from llmrec.data.split import SplitDataset, request_id
from llmrec.errors import DataError, RecipeError, did_you_mean
from llmrec.recipe import CandidateSection
from llmrec.registry import BASELINES, FAMILY_BASELINES, lookup
from llmrec.tasks.common import keyed
from llmrec.types import CatalogueScorer, Request, SplitName

log = logging.getLogger(__name__)

# Requests that are scored at a time: a block of dense scores.
_BLOCK = 256


def retrieve(data: SplitDataset, split: SplitName, section: CandidateSection, *, seed: int) -> CandidateSets:
    """Return the best items of a retriever for every held-out interaction, in an order that tells nothing.

    The retriever learns from training interactions and sees the history of the request; items of the history are left
    out. Whether the held-out item is among its best is its own doing: where it is not, every ranking misses it. The
    order is shuffled by a hash of the request, so that no ranker can copy the retriever.

    Args:
        data: The split data.
        split: ``valid`` or ``test``.
        section: ``retriever`` and ``count``.
        seed: The run's seed.

    Raises:
        RecipeError: If the retriever is no baseline that ranks.
        DataError: If a history leaves fewer items than are asked for.
    """
    known = FAMILY_BASELINES["sequential"]
    if section.retriever not in known:
        raise RecipeError(
            f"eval.candidates.retriever: {section.retriever!r} is no recommender that ranks"
            f"{did_you_mean(str(section.retriever), known)}; choose from {', '.join(known)}"
        )
    model = lookup(BASELINES, section.retriever, "baseline")(seed=seed)
    model.fit(data)
    requests = [
        Request(
            id=request_id(held.user_id, held.item_id),
            user_id=held.user_id,
            history=data.history(held.user_id, split),
        )
        for held in data.holdouts(split)
    ]
    sets: dict[str, tuple[str, ...]] = {}
    for start in range(0, len(requests), _BLOCK):
        for request, items in _best(model, requests[start : start + _BLOCK], section.count):
            shuffled = sorted(items)
            keyed("retrieved candidates", seed, request.id).shuffle(shuffled)
            sets[request.id] = tuple(shuffled)
    found = CandidateSets.of(f"retrieved-{section.retriever}", section.count, seed, sets)
    log.info(
        "%s finds %.1f %% of the held-out items among %d",
        section.retriever,
        100 * ceiling(found, {request_id(one.user_id, one.item_id): one.item_id for one in data.holdouts(split)}),
        section.count,
    )
    return found


def _best(model: CatalogueScorer, requests: Sequence[Request], count: int) -> list[tuple[Request, list[str]]]:
    scores = np.array(model.scores(requests), dtype=np.float64)
    column = {item: place for place, item in enumerate(model.items)}
    found = []
    for request, row in zip(requests, scores, strict=True):
        seen = [column[event.item_id] for event in request.history if event.item_id in column]
        row[seen] = -np.inf
        if np.isfinite(row).sum() < count:
            raise DataError(
                f"user {request.user_id!r} has touched all but {int(np.isfinite(row).sum())} of {len(row)} items; set "
                "eval.candidates.count to at most that"
            )
        # Equal scores in the order of item ids, so that a retriever gives the same set everywhere.
        best = np.argsort(-row, kind="stable")[:count]
        found.append((request, [model.items[place] for place in best]))
    return found


def ceiling(sets: CandidateSets, targets: Mapping[str, str]) -> float:
    """Return the share of targets that stand among their candidates: no ranking of these can have a higher HR.

    Args:
        sets: Retrieved candidates.
        targets: Target by request: of those that a figure is over, since a part of them has a ceiling of its own.
    """
    return sum(item in sets.sets[name] for name, item in targets.items()) / max(1, len(targets))
