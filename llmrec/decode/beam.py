"""Exact constrained beam search over a catalogue, with a proof that the result is optimal where possible.

The search uses numpy arrays of the catalogue; log-probabilities come from a `TreeEngine`, under the full softmax.
Pruning works on branches: of all branches of the kept prefixes and all complete items, the best ``width`` are kept per
request. The forced tokens after a branch are scored together in one forward pass, so a search takes as many forward
passes as its paths have branches, not tokens.

A prefix's log-probability is an upper bound for all its continuations. So if nothing that was pruned was better than
the k-th item, no search could find a better list: the result is *certified*. This holds for the engine's scores in this
search; in half precision, another layout of the same tokens is rounded differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from llmrec.decode.token_tree import ROOT, Index, TokenTrie
from llmrec.types import SearchResult

MAX_WIDTH = 4096
"""Maximum number of prefixes of an exact search: its memory grows with their square."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TreeTokens:
    """Tokens to be read, each after a previous token.

    Attributes:
        users: The request of each token, shape (n,).
        parents: The number of the preceding token, or of a request's prompt; shape (n,). Prompts are numbered 0 to
            users - 1, and fed tokens after them in the order in which they are fed.
        tokens: Token ids, shape (n,).
    """

    users: Index
    parents: Index
    tokens: Index


@dataclass(frozen=True)
class LogprobQueries:
    """Which log-probabilities to compute.

    Attributes:
        after: The number of the prompt or token before the wanted token, ascending, shape (m,).
        tokens: The wanted token, shape (m,).
    """

    after: Index
    tokens: Index


class TreeEngine(Protocol):
    """Reads trees of tokens after prompts, and returns log-probabilities of next tokens under the full softmax."""

    def open(self, prompts: Sequence[Sequence[int]], wanted: LogprobQueries) -> Floats:
        """Read prompts, and return the log-probabilities of given next tokens, shape (m,)."""
        ...

    def feed(self, fed: TreeTokens, wanted: LogprobQueries) -> Floats:
        """Read tokens, and return the log-probabilities of given next tokens, shape (m,)."""
        ...

    def close(self) -> None:
        """Discard the prompts and all tokens read after them."""
        ...


@dataclass
class Beams:
    """The beams kept for all requests: prefixes with several continuations, and complete items.

    Attributes:
        users: The request of each beam, shape (n,).
        nodes: The node in the catalogue.
        lows: The first of the node's items among the sorted paths.
        highs: The end of the node's items.
        scores: Log-probability of the prefix.
        handles: Number of the last token fed; meaningless for a complete item.
        complete: Whether it is a complete item.
    """

    users: Index
    nodes: Index
    lows: Index
    highs: Index
    scores: Floats
    handles: Index
    complete: NDArray[np.bool_]

    def take(self, rows: NDArray[Any]) -> Self:
        """Return the selected beams, in the order of ``rows``."""
        return type(self)(**{name: array[rows] for name, array in vars(self).items()})

    @classmethod
    def join(cls, *parts: Self) -> Self:
        """Concatenate beams."""
        return cls(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])})


_BeamsType = TypeVar("_BeamsType", bound=Beams)


@dataclass
class _Search:
    """The state of a search: catalogue, excluded items, bounds of pruned branches, and token counts."""

    catalogue: TokenTrie
    width: int
    barred: Index
    bounds: Floats
    engine: TreeEngine
    next_handle: int
    fed: Index


def beam_search(
    engine: TreeEngine,
    catalogue: TokenTrie,
    prompts: Sequence[Sequence[int]],
    *,
    k: int,
    width: int,
    excluded: Sequence[Sequence[int]] = (),
    exact: bool = False,
) -> list[SearchResult]:
    """Search the catalogue after each prompt.

    Args:
        engine: Computes log-probabilities.
        catalogue: The legal outputs.
        prompts: Token ids of each request.
        k: Items to return.
        width: Prefixes to keep per request, at least ``k``.
        excluded: The excluded items of each request, as catalogue indices.
        exact: Double the width of a request's search until its result is certified, or until `MAX_WIDTH` prefixes were
            kept.

    Returns:
        One result per request, in order: ``k`` items, or all remaining ones if they are fewer.
    """
    if k < 1 or width < 1:
        raise ValueError(f"k and width must be at least 1, not {k} and {width}")
    barred = [_no_items()] * len(prompts)
    if excluded:
        barred = [np.unique(catalogue.ranks[list(items)]).astype(np.int64) for items in excluded]
    results = _search_once(engine, catalogue, prompts, barred, k, max(k, width))
    for n, result in enumerate(results if exact else ()):
        wide = result.width
        # One at a time, so that a wide search needs memory for only one request. A NaN score proves nothing.
        while (
            not results[n].certified and np.isfinite(results[n].scores).all() and wide < min(len(catalogue), MAX_WIDTH)
        ):
            wide = min(2 * wide, MAX_WIDTH)
            (wider,) = _search_once(engine, catalogue, [prompts[n]], [barred[n]], k, wide)
            results[n] = replace(wider, tokens=results[n].tokens + wider.tokens)
    return results


def _no_items() -> Index:
    return np.empty(0, dtype=np.int64)


def _search_once(
    engine: TreeEngine,
    catalogue: TokenTrie,
    prompts: Sequence[Sequence[int]],
    barred: Sequence[Index],
    k: int,
    width: int,
) -> list[SearchResult]:
    """Search once, with the same beam width for all requests."""
    users, size = len(prompts), len(catalogue)
    # One sorted array gives the number of excluded items in any range for any request.
    offset = np.concatenate([_no_items(), *(ranks + n * size for n, ranks in enumerate(barred))])
    search = _Search(catalogue, width, offset, np.full(users, -np.inf), engine, users, np.zeros(users, np.int64))
    left = np.array([size - len(ranks) for ranks in barred])
    beams = _extend_search_beams(
        search, prompts, initial_beams(np.flatnonzero(left), size), partial(_keep_best, search)
    )
    return [_search_result(search, beams, user, k, int(left[user])) for user in range(users)]


def initial_beams(users: Index, size: int) -> Beams:
    """Return the initial beams of requests for a catalogue of ``size`` items."""
    return Beams(
        users=users,
        nodes=np.full(len(users), ROOT, dtype=np.int64),
        lows=np.zeros(len(users), dtype=np.int64),
        highs=np.full(len(users), size, dtype=np.int64),
        scores=np.zeros(len(users)),
        handles=users.copy(),
        complete=np.zeros(len(users), dtype=bool),
    )


def extend_beams(
    engine: TreeEngine,
    catalogue: TokenTrie,
    prompts: Sequence[Sequence[int]],
    beams: _BeamsType,
    keep: Callable[[_BeamsType, Branches, Floats], _BeamsType],
) -> _BeamsType:
    """Extend beams from the root to complete items, as `beam_search` does, with a given pruning function.

    Args:
        engine: Computes log-probabilities.
        catalogue: The legal outputs.
        prompts: Token ids of each request.
        beams: One root per request, in order.
        keep: Takes the kept beams, their branches and the branches' log-probabilities, and returns the beams to keep.
    """
    users = len(prompts)
    fed = np.zeros(users, np.int64)
    search = _Search(catalogue, 0, _no_items(), np.full(users, -np.inf), engine, users, fed)
    return _extend_search_beams(search, prompts, beams, keep)


def _extend_search_beams(
    search: _Search,
    prompts: Sequence[Sequence[int]],
    beams: _BeamsType,
    keep: Callable[[_BeamsType, Branches, Floats], _BeamsType],
) -> _BeamsType:
    try:
        # Score the first tokens before anything is fed; all paths may share a first token.
        branches = _allowed_branches(search, beams)
        logprobs = search.engine.open(prompts, LogprobQueries(beams.handles[branches.parents], branches.tokens))
        while True:
            beams = keep(beams, branches, logprobs)
            beams, branches, logprobs = _follow_branches(search, beams)
            if beams.complete.all():
                return beams
    finally:
        search.engine.close()


@dataclass(frozen=True)
class Branches:
    """Possible next tokens of kept prefixes; ``parents`` are the indices of the prefixes."""

    parents: Index
    nodes: Index
    lows: Index
    highs: Index
    tokens: Index


def _allowed_branches(search: _Search, beams: Beams) -> Branches:
    """Return all continuations of kept prefixes that lead to an allowed item."""
    catalogue = search.catalogue
    live = np.flatnonzero(~beams.complete)
    below = catalogue.below(beams.nodes[live], beams.lows[live], beams.highs[live])
    parents, nodes, lows, highs = live[below.parents], below.nodes, below.lows, below.highs
    if len(search.barred):
        base = beams.users[parents] * len(catalogue)
        excluded = np.searchsorted(search.barred, base + highs) - np.searchsorted(search.barred, base + lows)
        stay = highs - lows > excluded
        parents, nodes, lows, highs = parents[stay], nodes[stay], lows[stay], highs[stay]
    return Branches(parents, nodes, lows, highs, catalogue.tokens(nodes))


def extend_by_branches(beams: _BeamsType, branches: Branches, logprobs: Floats) -> _BeamsType:
    """Turn possible next tokens into prefixes."""
    return replace(
        beams.take(branches.parents),
        nodes=branches.nodes,
        lows=branches.lows,
        highs=branches.highs,
        scores=beams.scores[branches.parents] + logprobs,
        complete=np.zeros(len(logprobs), dtype=bool),
    )


def rank_beams(pool: Beams, values: Floats) -> tuple[Index, Index]:
    """Sort prefixes by request and score, and return their ranks within each request.

    Args:
        pool: Prefixes.
        values: The values to order by, shape (n,); ties by path.
    """
    order = np.lexsort((pool.lows, -values, pool.users))
    counts = np.bincount(pool.users)
    return order, np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)


def _keep_best(search: _Search, beams: Beams, branches: Branches, logprobs: Floats) -> Beams:
    """Keep the best branches and complete items of each request, and record the best score that is pruned."""
    pool = Beams.join(beams.take(np.flatnonzero(beams.complete)), extend_by_branches(beams, branches, logprobs))
    # Ties are broken by path order, which does not depend on batch or beam width.
    order, rank = rank_beams(pool, pool.scores)
    pruned = order[rank >= search.width]
    # A NaN score gives no bound and stays NaN.
    with np.errstate(invalid="ignore"):
        np.maximum.at(search.bounds, pool.users[pruned], pool.scores[pruned])
    return pool.take(order[rank < search.width])


def _follow_branches(search: _Search, beams: _BeamsType) -> tuple[_BeamsType, Branches, Floats]:
    """Follow every kept branch to its next branching point or item, and score the continuations.

    One call of the engine: the branch's own token, the forced ones after it, and the children of the node reached. The
    last token of an item is scored but never read.
    """
    catalogue = search.catalogue
    rows = np.flatnonzero(~beams.complete)
    fed: list[TreeTokens] = []
    forced_rows: list[Index] = []
    forced_tokens: list[tuple[Index, Index]] = []
    nodes, handles = beams.nodes.copy(), beams.handles.copy()
    complete = beams.complete.copy()
    handle = search.next_handle
    going = rows
    while len(going):
        first, count = catalogue.spans(nodes[going])
        leaf = count == 0
        complete[going[leaf]] = True
        going, first, count = going[~leaf], first[~leaf], count[~leaf]
        numbers = handle + np.arange(len(going))
        fed.append(TreeTokens(beams.users[going], handles[going], catalogue.tokens(nodes[going])))
        handles[going] = numbers
        handle += len(going)
        forced = count == 1
        going, first, numbers = going[forced], first[forced], numbers[forced]
        forced_tokens.append((numbers, catalogue.tokens(first)))
        forced_rows.append(going)
        nodes[going] = first
    reached = replace(beams, nodes=nodes, scores=beams.scores.copy(), handles=handles, complete=complete)
    branches = _allowed_branches(search, reached)
    if not fed or not sum(len(item.tokens) for item in fed):
        return reached, branches, np.empty(0)
    search.next_handle = handle
    return _score_branches(search, reached, branches, fed, forced_tokens, forced_rows)


def _score_branches(
    search: _Search,
    beams: _BeamsType,
    branches: Branches,
    fed: Sequence[TreeTokens],
    forced_tokens: Sequence[tuple[Index, Index]],
    forced_rows: Sequence[Index],
) -> tuple[_BeamsType, Branches, Floats]:
    """Call the engine once, add the scores of forced tokens, and return the log-probabilities of branches."""
    after = np.concatenate([*(pair[0] for pair in forced_tokens), beams.handles[branches.parents]])
    tokens = np.concatenate([*(pair[1] for pair in forced_tokens), branches.tokens])
    order = np.argsort(after, kind="stable")
    everything = TreeTokens(
        *(np.concatenate([getattr(item, name) for item in fed]) for name in ("users", "parents", "tokens"))
    )
    search.fed += np.bincount(everything.users, minlength=len(search.fed))
    answered = search.engine.feed(everything, LogprobQueries(after[order], tokens[order]))
    logprobs = np.empty(len(after))
    logprobs[order] = answered
    forced = np.concatenate([_no_items(), *forced_rows])
    np.add.at(beams.scores, forced, logprobs[: len(forced)])
    return beams, branches, logprobs[len(forced) :]


def _search_result(search: _Search, beams: Beams, user: int, k: int, left: int) -> SearchResult:
    rows = np.flatnonzero(beams.users == user)
    rows = rows[np.lexsort((beams.lows[rows], -beams.scores[rows]))][:k]
    ranks = beams.lows[rows]
    scores = tuple(float(score) for score in beams.scores[rows])
    short = "" if len(rows) == k else f"only {left} of {len(search.catalogue)} items are valid results"
    # If fewer than k items are left, nothing was pruned.
    certified = not len(scores) or float(search.bounds[user]) <= scores[-1]
    items = tuple(int(item) for item in search.catalogue.order[ranks])
    return SearchResult(
        items=items,
        scores=scores,
        certified=certified,
        width=search.width,
        short=short,
        tokens=int(search.fed[user]),
    )
