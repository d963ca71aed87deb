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

from llmrec.decode.token_tree import ROOT, Children, Index, TokenTrie
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
    size = len(catalogue)
    # One sorted array gives the number of excluded items in any range for any request.
    offset = np.concatenate([_no_items(), *(ranks + n * size for n, ranks in enumerate(barred))])
    left = [size - len(ranks) for ranks in barred]
    # The best score that was pruned for each request.
    bounds = np.full(len(prompts), -np.inf)
    roots = initial_beams(np.flatnonzero(left), size)
    beams, fed = extend_beams(engine, catalogue, prompts, roots, partial(_keep_best, width, bounds), offset)
    results = []
    for user, available in enumerate(left):
        rows = np.flatnonzero(beams.users == user)
        best = beams.take(rows[np.lexsort((beams.lows[rows], -beams.scores[rows]))][:k])
        scores = tuple(best.scores.tolist())
        results.append(
            SearchResult(
                items=tuple(catalogue.order[best.lows].tolist()),
                scores=scores,
                # If fewer than k items are left, nothing was pruned.
                certified=not scores or float(bounds[user]) <= scores[-1],
                width=width,
                short="" if len(scores) == k else f"only {available} of {size} items are valid results",
                tokens=int(fed[user]),
            )
        )
    return results


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
    keep: Callable[[_BeamsType, Children, Floats], _BeamsType],
    barred: Index | None = None,
) -> tuple[_BeamsType, Index]:
    """Extend beams from the root to complete items with a given pruning function.

    Args:
        engine: Computes log-probabilities.
        catalogue: The legal outputs.
        prompts: Token ids of each request.
        beams: One root per request, in order.
        keep: Takes the kept beams, their possible next nodes (``parents`` are indices of beams) and the
            log-probabilities of these, and returns the beams to keep.
        barred: Excluded items of all requests, ascending: the rank of the path, plus the number of the request times
            the number of items. None: no items.

    Returns:
        The complete items, and the number of tokens read after each prompt, shape (requests,).
    """
    fed = np.zeros(len(prompts), np.int64)
    barred = _no_items() if barred is None else barred
    try:
        # Score the first tokens before anything is fed; all paths may share a first token.
        branches = _allowed_branches(catalogue, barred, beams)
        wanted = LogprobQueries(beams.handles[branches.parents], catalogue.tokens(branches.nodes))
        logprobs = engine.open(prompts, wanted)
        while True:
            beams = keep(beams, branches, logprobs)
            beams, branches, logprobs = _follow_branches(engine, catalogue, barred, fed, beams)
            if beams.complete.all():
                return beams, fed
    finally:
        engine.close()


def _allowed_branches(catalogue: TokenTrie, barred: Index, beams: Beams) -> Children:
    """Return all continuations of kept prefixes that lead to an allowed item."""
    live = np.flatnonzero(~beams.complete)
    below = catalogue.below(beams.nodes[live], beams.lows[live], beams.highs[live])
    below = replace(below, parents=live[below.parents])
    if not len(barred):
        return below
    base = beams.users[below.parents] * len(catalogue)
    excluded = np.searchsorted(barred, base + below.highs) - np.searchsorted(barred, base + below.lows)
    stay = below.highs - below.lows > excluded
    return Children(**{name: array[stay] for name, array in vars(below).items()})


def extend_by_branches(beams: _BeamsType, branches: Children, logprobs: Floats) -> _BeamsType:
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


def _keep_best(width: int, bounds: Floats, beams: Beams, branches: Children, logprobs: Floats) -> Beams:
    """Keep the best branches and complete items of each request, and record the best score that is pruned."""
    pool = Beams.join(beams.take(np.flatnonzero(beams.complete)), extend_by_branches(beams, branches, logprobs))
    # Ties are broken by path order, which does not depend on batch or beam width.
    order, rank = rank_beams(pool, pool.scores)
    pruned = order[rank >= width]
    # A NaN score gives no bound and stays NaN.
    with np.errstate(invalid="ignore"):
        np.maximum.at(bounds, pool.users[pruned], pool.scores[pruned])
    return pool.take(order[rank < width])


def _follow_branches(
    engine: TreeEngine, catalogue: TokenTrie, barred: Index, fed: Index, beams: _BeamsType
) -> tuple[_BeamsType, Children, Floats]:
    """Follow every kept branch to its next branching point or item, and score the continuations.

    One call of the engine: the branch's own token, the forced ones after it, and the children of the node reached. The
    last token of an item is scored but never read. ``fed`` counts the tokens of each request.
    """
    read: list[TreeTokens] = []
    forced_rows: list[Index] = []
    after: list[Index] = []
    wanted: list[Index] = []
    nodes, handles = beams.nodes.copy(), beams.handles.copy()
    complete = beams.complete.copy()
    # Prompts are numbered first, then tokens in the order in which they are fed.
    handle = len(fed) + int(fed.sum())
    going = np.flatnonzero(~beams.complete)
    while len(going):
        first, count = catalogue.spans(nodes[going])
        leaf = count == 0
        complete[going[leaf]] = True
        going, first, count = going[~leaf], first[~leaf], count[~leaf]
        read.append(TreeTokens(beams.users[going], handles[going], catalogue.tokens(nodes[going])))
        handles[going] = handle + np.arange(len(going))
        handle += len(going)
        forced = count == 1
        going, first = going[forced], first[forced]
        after.append(handles[going])
        wanted.append(catalogue.tokens(first))
        forced_rows.append(going)
        nodes[going] = first
    reached = replace(beams, nodes=nodes, scores=beams.scores.copy(), handles=handles, complete=complete)
    branches = _allowed_branches(catalogue, barred, reached)
    if not any(len(item.tokens) for item in read):
        return reached, branches, np.empty(0)
    numbers = np.concatenate([*after, handles[branches.parents]])
    tokens = np.concatenate([*wanted, catalogue.tokens(branches.nodes)])
    order = np.argsort(numbers, kind="stable")
    everything = TreeTokens(
        *(np.concatenate([getattr(item, name) for item in read]) for name in ("users", "parents", "tokens"))
    )
    fed += np.bincount(everything.users, minlength=len(fed))
    logprobs = np.empty(len(numbers))
    logprobs[order] = engine.feed(everything, LogprobQueries(numbers[order], tokens[order]))
    rows = np.concatenate(forced_rows)
    np.add.at(reached.scores, rows, logprobs[: len(rows)])
    return reached, branches, logprobs[len(rows) :]
