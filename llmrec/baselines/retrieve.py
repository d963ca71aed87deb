"""Retrieves candidates with a baseline, to be reranked by another model (PALR, arXiv 2305.07622)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import polars as pl

from llmrec.baselines.fits import fit_baseline
from llmrec.baselines.parameters import stops_early
from llmrec.data.candidates import CandidateSets
from llmrec.data.hashing import hash_one
from llmrec.data.split import SplitDataset, request_id, request_of
from llmrec.errors import DataError, RecipeError, did_you_mean
from llmrec.recipe.schema import CandidateSection
from llmrec.registry import BASELINES, components_for_family, import_component, is_plugin
from llmrec.tasks.base import seeded_random
from llmrec.types import CatalogueScorer, Request, SplitName

log = logging.getLogger(__name__)

# Requests per block of dense scores.
_BLOCK_REQUESTS = 256
# Number of user folds: candidates for the users of a fold come from a retriever fitted on the other folds.
_FOLDS = 5
# Maximum number of training interactions per user for which candidates are retrieved.
_MAX_USER_EVENTS = 20

HARD_NEGATIVE_POOL = 20
"""Number of top-ranked items from which hard negatives are sampled."""

ENSEMBLE_RETRIEVER_NAME = "fusion"
"""The retriever that is an ensemble of the family's baselines."""


class RetrieverFactory(Protocol):
    """Fits recommenders that retrieve candidates."""

    @property
    def name(self) -> str:
        """Name of the retriever in recipes."""
        ...

    def fitted(self, data: SplitDataset, split: SplitName) -> Sequence[tuple[CatalogueScorer, frozenset[str] | None]]:
        """Return the retrievers for held-out interactions, each with the users for whom it is used."""
        ...

    def apart(self, data: SplitDataset, parts: Mapping[str, int], part: int) -> CatalogueScorer:
        """Return a retriever fitted on the training interactions of all users outside a fold.

        Raises:
            RecipeError: If it cannot be fitted without held-out interactions.
        """
        ...


@dataclass(frozen=True)
class SingleRetriever:
    """Retrieves candidates with a single baseline.

    Attributes:
        name: The name of a baseline that ranks.
        seed: The run's seed.
        key: The recipe key that names it.
    """

    name: str
    seed: int
    key: str = "eval.candidates.retriever"

    def fitted(self, data: SplitDataset, split: SplitName) -> Sequence[tuple[CatalogueScorer, frozenset[str] | None]]:
        """Return the baseline, fitted on training interactions; see `RetrieverFactory`."""
        return [(fit_baseline(self.name, {}, data, seed=self.seed), None)]

    def apart(self, data: SplitDataset, parts: Mapping[str, int], part: int) -> CatalogueScorer:
        """Return the baseline, fitted on the interactions of the other folds; see `RetrieverFactory`."""
        if stops_early(self.name):
            raise RecipeError(
                f"{self.key}: {self.name} uses the validation split for early stopping, so its candidates cannot be "
                "used for training; choose another retriever, such as transitions, or train only other tasks "
                "(train.only)",
                kind="unsupported",
                column=self.key,
            )
        inside = [user for user, user_part in parts.items() if user_part == part]
        rest = replace(data, train=data.train.filter(~pl.col("user_id").is_in(inside)))
        model: CatalogueScorer = fit_baseline(self.name, {}, rest, seed=self.seed)
        return model


def baseline_retriever(section: CandidateSection, seed: int) -> SingleRetriever:
    """Return the retriever for the baseline that a recipe names.

    Raises:
        RecipeError: If it is not a baseline that ranks.
    """
    name = str(section.retriever)
    check_retriever(name, "eval.candidates.retriever", ENSEMBLE_RETRIEVER_NAME)
    return SingleRetriever(name, seed)


def retrieve_candidates(
    data: SplitDataset,
    split: SplitName,
    section: CandidateSection,
    *,
    seed: int,
    finder: RetrieverFactory | None = None,
    users: frozenset[str] | None = None,
) -> CandidateSets:
    """Retrieve candidates for held-out interactions; their order does not reveal the scores.

    The retriever gets the history of the request; seen items are left out. The held-out item is not added: if the
    retriever misses it, every ranking misses it. The order is shuffled by a hash of the request, so that a ranker
    cannot copy the order of the retriever.

    Args:
        data: The split data.
        split: ``valid`` or ``test``.
        section: ``retriever`` and ``count``.
        seed: The run's seed.
        finder: The retriever; None: the baseline that the section names.
        users: The users whose interactions are used; None: all.

    Raises:
        RecipeError: If the retriever is not a baseline that ranks.
        DataError: If a history leaves fewer items than ``count``.
    """
    finder = finder or baseline_retriever(section, seed)
    held = data.holdouts(split).of(users)
    sets: dict[str, tuple[str, ...]] = {}
    for model, subset in finder.fitted(data, split):
        selected = held.of(subset)
        for start in range(0, len(selected), _BLOCK_REQUESTS):
            requests = [request_of(data, one, split) for one in selected[start : start + _BLOCK_REQUESTS]]
            for request, items in zip(requests, top_unseen_items(model, requests, section.count), strict=True):
                if len(items) < section.count:
                    raise DataError(
                        f"user {request.user_id!r} has only {len(items)} unseen items out of {len(model.items)}; set "
                        "eval.candidates.count to at most this number",
                        kind="too-few",
                        column="eval.candidates.count",
                    )
                sets[request.id] = shuffle_by_request(items, request.id, seed)
    sets = {name: sets[name] for name in (request_id(one.user_id, one.item_id) for one in held)}
    result = CandidateSets.of(f"retrieved-{finder.name}", section.count, seed, sets, users)
    log.info(
        "%s: %.1f %% of the held-out items are among its %d candidates",
        finder.name,
        100 * candidate_recall(result, {request_id(one.user_id, one.item_id): one.item_id for one in held}),
        section.count,
    )
    return result


@dataclass(frozen=True)
class RetrievedCandidates:
    """Retrieved candidates for training interactions, on which a reranker is trained.

    A retriever that was fitted on an interaction would nearly always rank its item first. So users are divided into
    five folds by a hash, and the lists of a fold come from a retriever that was fitted on the training interactions of
    the other folds; its input is the history before the interaction. Interactions that it misses have no list, as in
    LlamaRec (arXiv 2311.02089, section 3.2). At most 20 interactions of a user are used. Nothing depends on held-out
    interactions, so retrievers with early stopping on the validation split are rejected.

    Attributes:
        data: The split data.
        section: ``retriever`` and ``count``.
        seed: The seed of the retriever and of sampling.
        finder: The retriever; None: the baseline that the section names.
        others: If true, every interaction has a list of negatives: items that the user never had in training. Otherwise
            a list contains the interaction's item, or there is no list.
        least: The minimum length of a list if a user has fewer than ``count`` unseen items; None: ``count``.
    """

    data: SplitDataset
    section: CandidateSection
    seed: int
    finder: RetrieverFactory | None = None
    others: bool = False
    least: int | None = None

    def of(self, user: str) -> Sequence[tuple[int, tuple[str, ...]]]:
        """Return positions in a user's training history, each with the candidates retrieved for that position."""
        return self._candidates.get(user, ())

    def held(self) -> Mapping[str, tuple[str, ...]]:
        """Return the retrieved candidates of validation requests by id, if they contain the target."""
        return self._held

    @cached_property
    def _held(self) -> Mapping[str, tuple[str, ...]]:
        sets = retrieve_candidates(self.data, "valid", self.section, seed=self.seed, finder=self.finder).sets
        targets = {request_id(held.user_id, held.item_id): held.item_id for held in self.data.holdouts("valid")}
        return {name: items for name, items in sets.items() if targets[name] in items}

    @cached_property
    def _candidates(self) -> Mapping[str, Sequence[tuple[int, tuple[str, ...]]]]:
        finder = self.finder or baseline_retriever(self.section, self.seed)
        result: dict[str, list[tuple[int, tuple[str, ...]]]] = {}
        users = [user for user in self.data.users() if len(self.data.train_events(user)) > 1]
        parts, total = {user: hash_one("retrieved lists", self.seed, user) % _FOLDS for user in users}, 0
        for part in sorted(set(parts.values())):
            model = finder.apart(self.data, parts, part)
            queries = [(user, at) for user in users if parts[user] == part for at in self._sampled_positions(user)]
            total += len(queries)
            for start in range(0, len(queries), _BLOCK_REQUESTS):
                block = queries[start : start + _BLOCK_REQUESTS]
                requests = [
                    Request(id=f"list/{user}/{at}", user_id=user, history=self.data.train_events(user)[:at])
                    for user, at in block
                ]
                more = max(len(self.data.train_events(user)) - at for user, at in block) if self.others else 0
                for (user, at), items in zip(
                    block, top_unseen_items(model, requests, self.section.count + more), strict=True
                ):
                    events = self.data.train_events(user)
                    if self.others:
                        later_items = {event.item_id for event in events[at:]}
                        items = [item for item in items if item not in later_items][: self.section.count]
                    enough = len(items) >= (self.least or self.section.count)
                    if enough and (self.others or events[at].item_id in items):
                        result.setdefault(user, []).append((at, tuple(items)))
        count = sum(map(len, result.values()))
        if not self.others:
            log.info(
                "%s: %d of %d training items are among its %d candidates",
                finder.name,
                count,
                total,
                self.section.count,
            )
        return result

    def _sampled_positions(self, user: str) -> list[int]:
        positions = range(1, len(self.data.train_events(user)))
        rng = seeded_random("retrieved list", self.seed, user)
        return sorted(rng.sample(positions, min(_MAX_USER_EVENTS, len(positions))))


def check_retriever(name: str, where: str, *others: str) -> None:
    """Check that a baseline can rank the catalogue.

    Args:
        name: The name of the baseline.
        where: The key or option that names it.
        others: Other names that are valid there.

    Raises:
        RecipeError: If it does not; the message lists the baselines that do.
    """
    ranking = components_for_family(BASELINES, "sequential")
    known = (*ranking, *others)
    if name not in ranking and not _is_scoring_plugin(name):
        raise RecipeError(
            f"{where}: {name!r} is not a ranking baseline{did_you_mean(name, known)}; choose from {', '.join(known)}",
            kind="unknown-name",
            column=where,
        )


def _is_scoring_plugin(name: str) -> bool:
    """Whether a name belongs to a plug-in that scores all items."""
    baseline_class = import_component(BASELINES, name, "baseline") if is_plugin(BASELINES, name) else None
    return all(hasattr(baseline_class, verb) for verb in ("scores", "items"))


def top_unseen_items(model: CatalogueScorer, requests: Sequence[Request], count: int) -> list[list[str]]:
    """Return the highest-scoring unseen items for each request; fewer than ``count`` if there are not enough.

    Ties are ordered by a hash of the request's id, so that results are reproducible and not biased by item ids.
    """
    scores = np.array(model.scores(requests), dtype=np.float64)
    column = {item: index for index, item in enumerate(model.items)}
    results = []
    for request, row in zip(requests, scores, strict=True):
        row[[column[event.item_id] for event in request.history if event.item_id in column]] = -np.inf
        noise = np.random.default_rng(hash_one("retrieved ties", 0, request.id)).random(len(row))
        length = min(count, int(np.isfinite(row).sum()))
        # The items from the last place on, including ties; sorting the whole catalogue would take much longer.
        top = np.flatnonzero(row >= np.partition(row, -length)[-length]) if length else np.empty(0, dtype=np.int64)
        order = top[np.lexsort((noise[top], -row[top]))][:length]
        results.append([model.items[index] for index in order])
    return results


def shuffle_by_request(items: Sequence[str], request: str, seed: int) -> tuple[str, ...]:
    """Order retrieved items by a seeded hash of the request id, so that their order reveals nothing."""
    results = sorted(items)
    seeded_random("retrieved candidates", seed, request).shuffle(results)
    return tuple(results)


def candidate_recall(sets: CandidateSets, targets: Mapping[str, str]) -> float:
    """Return the share of requests whose candidates contain the target, an upper bound of the hit rate.

    Args:
        sets: Retrieved candidates.
        targets: Target by request, for the requests of the metric only.
    """
    return sum(item in sets.sets[name] for name, item in targets.items()) / max(1, len(targets))
