"""Full ranking: scores all items in batches, finds the rank of each target, and computes metrics.

The scores of a batch are compared with its targets once for both conventions about seen items: to exclude them, the
seen items above a target are subtracted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmrec.data.hashing import hash64
from llmrec.errors import LlmrecError
from llmrec.evaluate.figures import EvalProtocol, compute_metrics
from llmrec.evaluate.lists import list_figures
from llmrec.evaluate.predictor import EvaluationResult, prediction_record, target_rank_columns
from llmrec.metrics import ranking as rank_metrics
from llmrec.results import Cost, ModelResults, Prediction
from llmrec.types import Ranking

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.evaluate.lists import ListMetricData
    from llmrec.types import Case, CatalogueScorer

Seen = Literal["excluded", "included"]
SEEN_CONVENTIONS: tuple[Seen, ...] = ("excluded", "included")


def parse_seen_conventions(names: Sequence[str]) -> tuple[Seen, ...]:
    """Validate the options for the treatment of history items, and return them.

    Raises:
        ValueError: If a name is neither ``excluded`` nor ``included``.
    """
    result = tuple(item for name in names for item in SEEN_CONVENTIONS if item == name)
    if len(result) != len(names):
        raise ValueError(f"seen must be excluded or included, not {', '.join(names)}")
    return result


# Number of scores per batch: 64 MB of float64, and three times as much while lists are computed.
_SCORES_PER_BATCH = 1 << 23
# Number of scores that fit in the processor cache while lists are computed.
_SCORES_IN_CACHE = 1 << 17


@dataclass(frozen=True, slots=True)
class CatalogueRanks:
    """The rank of each request's target in the ranking of all items.

    Attributes:
        greater: Items with a strictly higher score, shape (n,); the pool's size for a target outside the catalogue.
        tied: Items with the target's score, including the target, shape (n,); 0 for a target outside the catalogue.
        pool: Number of rankable items, shape (n,).
        lists: The first items as indices into ``scorer.items``, best first, padded with -1, shape (n, k).
        scores: Their scores, padded with NaN, shape (n, k).
    """

    greater: NDArray[np.int64]
    tied: NDArray[np.int64]
    pool: NDArray[np.int64]
    lists: NDArray[np.int32]
    scores: NDArray[np.float64]


def rank_catalogue(
    scorer: CatalogueScorer,
    cases: Sequence[Case],
    *,
    cutoffs: Sequence[int],
    seen: Sequence[Seen] = SEEN_CONVENTIONS,
    batch: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Mapping[str, CatalogueRanks]:
    """Rank all items for every case; candidates of requests are ignored.

    With ``excluded``, items of the history are not ranked, except the target, which may be a repeated item. With
    ``included``, all items are ranked.

    Args:
        scorer: Scores the catalogue; float32 scores are compared unchanged.
        cases: Requests with an item as truth.
        cutoffs: The largest is the length of lists; without any, lists are empty, which halves the time.
        seen: Which conventions to return.
        batch: Requests per batch; by default as many as fit in 64 MB of scores.
        seed: Breaks ties in lists by request and item, independent of their order.
        progress: Called with the number of requests in each finished batch.

    Returns:
        Ranks and lists by convention.

    Raises:
        LlmrecError: If there are no cases, or scores are not finite or of the wrong shape.
    """
    if not cases:
        raise LlmrecError("there are no test cases; relax the filters, or choose another split", kind="empty")
    items = scorer.items
    index = {item: position for position, item in enumerate(items)}
    if not items or len(index) != len(items):
        raise LlmrecError(f"{scorer.name}: its catalogue is empty or has duplicate items; fix the model", kind="defect")
    length = min(max(cutoffs, default=0), len(items))
    item_hash = hash64("list ties", seed, items) if length else np.zeros(0, dtype=np.uint64)
    parts: dict[str, list[CatalogueRanks]] = {convention: [] for convention in seen}
    step = batch if batch is not None else max(1, _SCORES_PER_BATCH // len(items))
    for start in range(0, len(cases), step):
        part = cases[start : start + step]
        scores = _score_cases(scorer, part, len(items))
        targets = np.array([index.get(str(case.truth), -1) for case in part], dtype=np.int64)
        seen_items = _seen_items(part, index, targets)
        row_hash = hash64("list ties", seed, [case.request.id for case in part]) if length else item_hash
        for convention, result in _ranks_by_convention(
            scores, targets, seen_items, seen, length, row_hash, item_hash
        ).items():
            parts[convention].append(result)
        if progress is not None:
            progress(len(part))
    return {convention: _concatenate_ranks(result) for convention, result in parts.items()}


def evaluate_catalogue(
    scorer: CatalogueScorer,
    cases: Sequence[Case],
    protocol: EvalProtocol,
    *,
    seen: Sequence[Seen] = SEEN_CONVENTIONS,
    background: ListMetricData | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, EvaluationResult]:
    """Evaluate a model by ranking the whole catalogue; returns results like `evaluate`.

    Args:
        scorer: A fitted baseline or another scorer of the catalogue.
        cases: Requests with an item as truth; candidates are ignored.
        protocol: See `EvalProtocol`; its candidates become ``full``, and its users, if None, their number.
        seen: Which conventions to evaluate.
        background: Inputs of list metrics, see `llmrec.evaluate.lists`; None omits these metrics.
        progress: See `rank_catalogue`.

    Returns:
        Metrics, per-request values and records by convention. The time is that of the single pass for all conventions.

    Raises:
        LlmrecError: See `rank_catalogue`; also if the scorer's catalogue is not the protocol's.
    """
    if len(scorer.items) != protocol.catalogue:
        raise LlmrecError(
            f"{scorer.name} scores {len(scorer.items)} items, but the catalogue has {protocol.catalogue}; fit the "
            "model on the data of the test cases, since metrics over different catalogues are not comparable",
            kind="mismatch",
        )
    users = protocol.users or str(len({case.request.user_id for case in cases}))
    protocol = replace(protocol, candidates="full", users=users)
    start = time.monotonic()
    result = rank_catalogue(scorer, cases, cutoffs=protocol.cutoffs, seen=seen, seed=protocol.seed, progress=progress)
    seconds = time.monotonic() - start
    return {
        convention: _evaluate_ranks(scorer.items, cases, protocol, convention, standings, seconds, background)
        for convention, standings in result.items()
    }


# --------------------------------------------------------------------------- helpers


def _seen_items(cases: Sequence[Case], index: Mapping[str, int], targets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the (request, item) indices of the seen items of a batch except the targets, shape (seen, 2)."""
    pairs = [
        (row, column)
        for row, case in enumerate(cases)
        for column in {index.get(event.item_id, -1) for event in case.request.history} - {-1, int(targets[row])}
    ]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _score_cases(scorer: CatalogueScorer, cases: Sequence[Case], items: int) -> NDArray[Any]:
    scores = np.asarray(scorer.scores([case.request for case in cases]))
    if scores.shape != (len(cases), items):
        raise LlmrecError(
            f"{scorer.name} returned scores of shape {scores.shape} for {len(cases)} requests and {items} items; fix "
            "the model",
            kind="defect",
        )
    if scores.dtype.kind != "f":
        scores = scores.astype(np.float64)
    finite = np.isfinite(scores)
    if not finite.all():
        row, column = (int(indices[0]) for indices in np.nonzero(~finite))
        raise LlmrecError(
            f"request {cases[row].request.id!r}: {scorer.name} gave item {scorer.items[column]!r} the score "
            f"{scores[row, column]}, which cannot be ranked because training diverged or values overflowed; lower the "
            "learning rate, or use float32",
            kind="bad-value",
        )
    return scores


def _ranks_by_convention(
    scores: NDArray[Any],
    targets: NDArray[np.int64],
    seen_items: NDArray[np.int64],
    seen: Sequence[Seen],
    length: int,
    row_hash: NDArray[np.uint64],
    item_hash: NDArray[np.uint64],
) -> dict[str, CatalogueRanks]:
    n, items = scores.shape
    known = targets >= 0
    target_scores = scores[np.arange(n), np.maximum(targets, 0)]
    greater = np.count_nonzero(scores > target_scores[:, None], axis=1)
    tied = np.count_nonzero(scores >= target_scores[:, None], axis=1) - greater
    rows, columns = seen_items.T
    of_seen = scores[rows, columns]
    result = {}
    for convention in seen:
        above, block, pool, shown = greater, tied, np.full(n, items), scores
        if convention == "excluded":
            pool = pool - np.bincount(rows, minlength=n)
            above = above - np.bincount(rows, of_seen > target_scores[rows], minlength=n).astype(np.int64)
            block = block - np.bincount(rows, of_seen == target_scores[rows], minlength=n).astype(np.int64)
            if length:
                shown = scores.copy()
                shown[rows, columns] = -np.inf
        lists, kept = _top_items(shown, length, row_hash, item_hash)
        result[str(convention)] = CatalogueRanks(
            greater=np.where(known, above, pool), tied=np.where(known, block, 0), pool=pool, lists=lists, scores=kept
        )
    return result


def _top_items(
    scores: NDArray[Any], length: int, row_hash: NDArray[np.uint64], item_hash: NDArray[np.uint64]
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Return the top items of each request; ties are ordered by a hash of request and item."""
    n, items = scores.shape
    if length == 0:
        return np.empty((n, 0), dtype=np.int32), np.empty((n, 0))
    step = max(1, _SCORES_IN_CACHE // items)
    blocks = [slice(start, start + step) for start in range(0, n, step)]
    chosen = np.concatenate([_top_with_random_ties(scores[rows], length, row_hash[rows], item_hash) for rows in blocks])
    values = np.take_along_axis(scores, chosen, axis=1)
    order = np.lexsort((-_hash_to_unit_interval(row_hash[:, None] ^ item_hash[chosen]), -values), axis=1)
    chosen, values = np.take_along_axis(chosen, order, axis=1), np.take_along_axis(values, order, axis=1)
    open_ = np.isfinite(values)
    return np.where(open_, chosen, -1).astype(np.int32), np.where(open_, values, np.nan).astype(np.float64)


def _top_with_random_ties(
    scores: NDArray[Any], length: int, row_hash: NDArray[np.uint64], item_hash: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """Return the top items of each request in any order, with a random choice among ties at the cut-off."""
    n, items = scores.shape
    border = np.partition(scores, items - length, axis=1)[:, items - length]
    rows, columns = np.divmod(np.flatnonzero(scores >= border[:, None]), items)
    first = np.where(
        scores[rows, columns] > border[rows], 2.0, _hash_to_unit_interval(row_hash[rows] ^ item_hash[columns])
    )
    if len(rows) * 8 > n * items:
        keys = np.full((n, items), -1.0)
        keys[rows, columns] = first
        return np.argpartition(keys, items - length, axis=1)[:, items - length :]
    ordered = columns[np.lexsort((-first, rows))]
    begins = np.searchsorted(rows, np.arange(n))
    return np.asarray(ordered[begins[:, None] + np.arange(length)], dtype=np.int64)


def _hash_to_unit_interval(hashed: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Map hashes to [0, 1), using the finaliser of splitmix64."""
    mixed = hashed ^ (hashed >> np.uint64(30))
    mixed = mixed * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed = mixed * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return np.asarray((mixed >> np.uint64(11)) * 2.0**-53, dtype=np.float64)


def _concatenate_ranks(parts: Sequence[CatalogueRanks]) -> CatalogueRanks:
    names = [field.name for field in fields(CatalogueRanks)]
    return CatalogueRanks(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def _evaluate_ranks(
    items: Sequence[str],
    cases: Sequence[Case],
    protocol: EvalProtocol,
    seen: str,
    standings: CatalogueRanks,
    seconds: float,
    background: ListMetricData | None,
) -> EvaluationResult:
    users = [case.request.user_id for case in cases]
    inputs = {"greater": standings.greater, "tied": standings.tied, "pool": standings.pool}
    taken, more = (
        compute_metrics("ranking", inputs, users, protocol, cutoffs=protocol.cutoffs, full=full, seen=seen)
        for full in (False, True)
    )
    metrics, values = taken.metrics | more.metrics, taken.values
    if background is not None:
        listed = list_figures(standings.lists, items, cases, protocol, background, seen=seen)
        metrics, values = metrics | listed.metrics, values | listed.values
    figures = ModelResults(
        n=len(cases),
        parse_rate=1.0,
        tie_rate=rank_metrics.tie_rate(standings.tied),
        metrics=metrics,
        cost=Cost(seconds=seconds, prompt_tokens=0, completion_tokens=0),
        failures=(),
        seen=seen,
        pool=float(np.mean(standings.pool)),
    )
    return EvaluationResult(figures, values, _prediction_records(items, cases, standings))


def _prediction_records(items: Sequence[str], cases: Sequence[Case], standings: CatalogueRanks) -> list[Prediction]:
    columns = target_rank_columns(standings.greater, standings.tied, standings.pool)
    records = []
    rows = zip(cases, standings.lists.tolist(), standings.scores.tolist(), strict=True)
    for row, (case, numbers, scores) in enumerate(rows):
        count = sum(number >= 0 for number in numbers)
        shown = tuple(items[number] for number in numbers[:count])
        answer = Ranking(request_id=case.request.id, items=shown, scores=tuple(scores[:count]))
        records.append(prediction_record(case, answer, {name: entry[row] for name, entry in columns.items()}))
    return records
