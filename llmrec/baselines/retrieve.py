"""Candidates that a classic recommender retrieves, for two-step ranking: retrieve, then rank (PALR, 2305.07622)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from llmrec.data.candidates import CandidateSets
from llmrec.data.hashing import hash_one
from llmrec.data.split import SplitDataset, request_id, request_of
from llmrec.errors import DataError, RecipeError, did_you_mean
from llmrec.recipe.schema import CandidateSection
from llmrec.registry import BASELINES, lookup
from llmrec.tasks.base import keyed
from llmrec.tasks.family import RANKERS
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
    name = str(section.retriever)
    check_retriever(name, "eval.candidates.retriever")
    model = lookup(BASELINES, name, "baseline")(seed=seed)
    model.fit(data)
    held = data.holdouts(split)
    sets: dict[str, tuple[str, ...]] = {}
    for start in range(0, len(held), _BLOCK):
        requests = [request_of(data, one, split) for one in held[start : start + _BLOCK]]
        for request, items in zip(requests, best(model, requests, section.count), strict=True):
            if len(items) < section.count:
                raise DataError(
                    f"user {request.user_id!r} has touched all but {len(items)} of {len(model.items)} items; set "
                    "eval.candidates.count to at most that",
                    kind="too-few",
                    column="eval.candidates.count",
                )
            sets[request.id] = shuffled(items, request.id, seed)
    found = CandidateSets.of(f"retrieved-{name}", section.count, seed, sets)
    log.info(
        "%s finds %.1f %% of the held-out items among %d",
        name,
        100 * ceiling(found, {request_id(one.user_id, one.item_id): one.item_id for one in held}),
        section.count,
    )
    return found


def check_retriever(name: str, where: str) -> None:
    """Check that a baseline ranks.

    Args:
        name: Of the baseline.
        where: The key or option that names it.

    Raises:
        RecipeError: If it does not; the message lists those that do.
    """
    known = RANKERS
    if name not in known:
        raise RecipeError(
            f"{where}: {name!r} is no recommender that ranks{did_you_mean(name, known)}; choose from "
            f"{', '.join(known)}",
            kind="unknown-name",
            column=where,
        )


def best(model: CatalogueScorer, requests: Sequence[Request], count: int) -> list[list[str]]:
    """Return the best items for each request, those of its history left out; fewer where the history leaves fewer.

    Equal scores stand in an order that is drawn by a hash of the request's id, so that a retriever gives the same set
    everywhere and does not favour items by their ids.
    """
    scores = np.array(model.scores(requests), dtype=np.float64)
    column = {item: place for place, item in enumerate(model.items)}
    found = []
    for request, row in zip(requests, scores, strict=True):
        row[[column[event.item_id] for event in request.history if event.item_id in column]] = -np.inf
        drawn = np.random.default_rng(hash_one("retrieved ties", 0, request.id)).random(len(row))
        places = np.lexsort((drawn, -row))[: min(count, int(np.isfinite(row).sum()))]
        found.append([model.items[place] for place in places])
    return found


def shuffled(items: Sequence[str], request: str, seed: int) -> tuple[str, ...]:
    """Return retrieved items in an order by a hash of the request's id, which tells nothing of the retriever's."""
    found = sorted(items)
    keyed("retrieved candidates", seed, request).shuffle(found)
    return tuple(found)


def ceiling(sets: CandidateSets, targets: Mapping[str, str]) -> float:
    """Return the share of targets that stand among their candidates: no ranking of these can have a higher HR.

    Args:
        sets: Retrieved candidates.
        targets: Target by request: of those that a figure is over, since a part of them has a ceiling of its own.
    """
    return sum(item in sets.sets[name] for name, item in targets.items()) / max(1, len(targets))
