"""Collaborative codes: paths in a tree of items that is built by spectral clustering of co-occurrences.

An edge joins two items of a user's training history; its weight is the number of these users. The graph itself is never
stored: its product with a vector is two products with the users' histories, so long histories cost no more.
(Hua et al., "How to Index Item IDs for Recommendation Foundation Models", SIGIR-AP 2023, section 4.3: CID and CID+IID.)
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse
from scipy.sparse import csgraph
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

from llmrec.data.read.codes import map_ids_to_indices, values_and_codes
from llmrec.errors import DataError, RecipeError
from llmrec.index.numbers import shuffle_by_hash
from llmrec.index.table import Embed, ItemIndex, item_token, level_token
from llmrec.recipe.schema import CollaborativeIndex, IndexSection
from llmrec.types import Item

if TYPE_CHECKING:
    from llmrec.data.split import SplitDataset

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
TreePath = tuple[int, ...]

# For fewer items, a full eigendecomposition is faster than an iteration, and exact.
_MAX_DENSE_ITEMS = 400
# Number of iterations of the method that is used if Lanczos iteration does not converge.
_MAX_ITERATIONS = 300


class Collaborative:
    """One token for each cluster that contains the item, and one for its position in the smallest cluster.

    Items without training interactions have a separate branch, below an additional token of the first level. No
    training row has that token, so a model gives it a low probability; new items are added to it.
    """

    @staticmethod
    def build(section: IndexSection, data: SplitDataset, *, seed: int, embed: Embed | None = None) -> ItemIndex:
        """Assign codes to items; see `Scheme`.

        Raises:
            RecipeError: If the tree is too small for the catalogue.
        """
        shape, names = section.collaborative, sorted(data.dataset.items)
        users = _user_item_matrix(data, names)
        order = shuffle_by_hash(names, seed)
        warm = np.flatnonzero(users.sum(axis=0))
        trained = {names[index] for index in warm}
        cold = [name for name in order if name not in trained]
        _check_capacity(shape, len(warm), len(cold))
        leaves = list(_iterate_leaves(_restrict_to_items(users, warm), warm, shape)) if len(warm) else []
        depth = max((len(path) for path, _ in leaves), default=0)
        levels = max(1, depth)
        while len(cold) > _cold_capacity(shape.clusters, shape.leaf, levels):
            levels += 1
        rank = {name: index for index, name in enumerate(order)}
        codes: dict[str, tuple[str, ...]] = {}
        for path, members in leaves:
            inside = sorted((names[index] for index in members), key=rank.__getitem__)
            for number, name in enumerate(inside):
                last = item_token(rank[name] if section.item_token else number)
                codes[name] = (*(level_token(level, child) for level, child in enumerate(path)), last)
        settings = {
            "seed": seed,
            "clusters": shape.clusters,
            "leaf": shape.leaf,
            "levels": levels,
            "item_token": section.item_token,
            "cold": len(cold),
        }
        for slot, name in enumerate(cold):
            codes[name] = (*_cold_path(settings, slot), item_token(_last_token_number(settings, slot, rank[name])))
        ends = len(names) if section.item_token else shape.leaf
        return ItemIndex(
            "collaborative",
            {name: codes[name] for name in names},
            # One more token at the first level, for items without training interactions.
            tokens=(
                *(level_token(level, n) for level in range(levels) for n in range(shape.clusters + (level == 0))),
                *map(item_token, range(ends)),
            ),
            settings=settings,
            figures=_tree_figures(users, leaves, depth, len(cold)),
        )

    @staticmethod
    def extend(index: ItemIndex, items: Mapping[str, Item], *, embed: Embed | None = None) -> ItemIndex:
        """Add items to the branch for items without training interactions; see `Scheme`.

        With ``item_token`` each gets a new item token, which a trained model has not learned.

        Raises:
            DataError: If the branch is full.
        """
        known, start = index.settings, int(index.settings["cold"])
        room = _cold_capacity(int(known["clusters"]), int(known["leaf"]), int(known["levels"]))
        if not known["item_token"] and start + len(items) > room:
            raise DataError(
                f"index collaborative: there are tokens for only {room - start} of {len(items)} new items; build the "
                "index again with these items, or with a higher index.collaborative.leaf",
                kind="exhausted",
                column="index.collaborative.leaf",
            )
        codes, first = {}, len(index.codes)
        for position, name in enumerate(shuffle_by_hash(items, int(known["seed"]))):
            last = item_token(_last_token_number(known, start + position, first + position))
            codes[name] = (*_cold_path(known, start + position), last)
        # known tokens are not added again
        return index.adding(codes, [pieces[-1] for pieces in codes.values()], cold=start + len(items))


def _user_item_matrix(data: SplitDataset, names: Sequence[str]) -> Any:
    """Return the training interactions as a sparse binary matrix, shape (users, items)."""
    column_of = {name: number for number, name in enumerate(names)}
    columns = map_ids_to_indices(
        data.train["item_id"], lambda known: np.array([column_of.get(name, -1) for name in known])
    )
    _, rows = np.unique(values_and_codes(data.train["user_id"])[1], return_inverse=True)
    result = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(int(rows.max(initial=-1)) + 1, len(names)))
    result.sum_duplicates()
    result.data[:] = 1.0
    return result


def _tree_figures(users: Any, leaves: Sequence[tuple[TreePath, Ints]], depth: int, cold: int) -> dict[str, float]:
    sizes = [len(members) for _, members in leaves]
    leaf_of = sparse.csr_array(
        (
            np.ones(sum(sizes)),
            (
                np.concatenate([members for _, members in leaves] or [np.empty(0, np.int64)]),
                np.repeat(np.arange(len(sizes)), sizes),
            ),
        ),
        shape=(users.shape[1], max(1, len(sizes))),
    )
    total, inside = (_count_pairs(counts) for counts in (users.sum(axis=1), (users @ leaf_of).data))
    return {
        "leaves": float(len(sizes)),
        "largest_leaf": float(max(sizes, default=0)),
        "depth": float(depth),
        "isolated": float(((users.sum(axis=0) > 0) & (_degrees(users) == 0)).sum()),
        "untrained": float(cold),
        "inside": inside / total if total else 0.0,
    }


def _count_pairs(counts: Floats) -> float:
    return float((counts * (counts - 1)).sum() / 2)


# --------------------------------------------------------------------------- cold-start items


def _check_capacity(shape: CollaborativeIndex, warm: int, cold: int) -> None:
    room, aside = shape.clusters**shape.depth * shape.leaf, _cold_capacity(shape.clusters, shape.leaf, shape.depth)
    for count, most, what in ((warm, room, "items"), (cold, aside, "items without training interactions")):
        if count > most:
            raise RecipeError(
                f"index.collaborative: {count} {what} do not fit into a tree with clusters={shape.clusters}, "
                f"depth={shape.depth} and leaf={shape.leaf}, which holds {most}; increase one of these keys",
                kind="too-few",
                column="index.collaborative",
            )


def _cold_capacity(clusters: int, leaf: int, levels: int) -> int:
    return sum(leaf * int(clusters**level) for level in range(levels))


def _cold_path(settings: Mapping[str, Any], slot: int) -> tuple[str, ...]:
    """Return the path for a position in the branch of cold-start items."""
    clusters, leaf, levels = (int(settings[name]) for name in ("clusters", "leaf", "levels"))
    # With item tokens, any number of items may share a path.
    number, digits = slot // leaf % (_cold_capacity(clusters, leaf, levels) // leaf), []
    while number:
        number, digit = divmod(number - 1, clusters)
        digits.append(digit)
    return (level_token(0, clusters), *(level_token(level, digit) for level, digit in enumerate(reversed(digits), 1)))


def _last_token_number(settings: Mapping[str, Any], slot: int, number: int) -> int:
    return number if settings["item_token"] else slot % int(settings["leaf"])


# --------------------------------------------------------------------------- the tree


def _iterate_leaves(
    users: Any, members: Ints, shape: CollaborativeIndex, path: TreePath = ()
) -> Iterator[tuple[TreePath, Ints]]:
    """Cluster items recursively, and yield the path and the items of every smallest cluster.

    No cluster is larger than its remaining levels allow, so a leaf is never too large.

    Args:
        users: Histories, shape (users, n).
        members: Column indices, shape (n,).
        shape: Limits of the tree, with room for the members.
        path: Path of these items.
    """
    if len(members) <= shape.leaf:
        yield path, members
        return
    room = shape.clusters ** (shape.depth - len(path) - 1) * shape.leaf
    parts = _cluster_items(users, min(shape.clusters, len(members)))
    if len(parts) == 1 or max(map(len, parts)) > room:
        parts = np.array_split(_sort_by_spectrum(users), min(shape.clusters, -(-len(members) // shape.leaf)))
    parts = sorted((np.sort(part) for part in parts), key=lambda part: (-len(part), int(part[0])))
    for child, part in enumerate(parts):
        yield from _iterate_leaves(_restrict_to_items(users, part), members[part], shape, (*path, child))


def _cluster_items(users: Any, k: int) -> list[Ints]:
    """Divide items into at most k clusters; 1 <= k <= number of items.

    Components large enough to fill a cluster get clusters in proportion to their size, and small ones are merged whole:
    without edges between them, the spectrum cannot separate them.
    """
    components = _connected_components(users)
    large = [c for c in components if len(components) <= k or len(c) * k >= users.shape[1]]
    small = components[len(large) :]
    shares = _allocate_clusters([*map(len, large), *([sum(map(len, small))] if small else [])], k)
    parts = [part for c, share in zip(large, shares, strict=False) for part in _spectral_clusters(users, c, share)]
    return parts + (_merge_components(small, shares[-1]) if small else [])


def _connected_components(users: Any) -> list[Ints]:
    """Return the connected components of the items, largest first, ties by first item."""
    graph = sparse.block_array([[None, users], [users.T, None]], format="csr")
    labels = csgraph.connected_components(graph, directed=False)[1][users.shape[0] :]
    order = np.argsort(labels, kind="stable")
    result = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return sorted(result, key=lambda members: (-len(members), int(members[0])))


def _allocate_clusters(sizes: Sequence[int], k: int) -> list[int]:
    """Distribute k clusters among groups, at least one each, by the D'Hondt method."""
    shares = [1] * len(sizes)
    for _ in range(k - len(sizes)):
        shares[int(np.argmax([size / (share + 1) for size, share in zip(sizes, shares, strict=True)]))] += 1
    return shares


def _merge_components(components: Sequence[Ints], k: int) -> list[Ints]:
    """Merge components into at most k clusters of similar size."""
    bins: list[list[Ints]] = [[] for _ in range(k)]
    smallest = [(0, number) for number in range(k)]
    for members in components:
        size, number = heapq.heappop(smallest)
        bins[number].append(members)
        heapq.heappush(smallest, (size + len(members), number))
    return [np.concatenate(group) for group in bins if group]


def _spectral_clusters(users: Any, component: Ints, k: int) -> list[Ints]:
    if k == 1:
        return [component]
    labels = cluster_qr(_leading_eigenvectors(_restrict_to_items(users, component), k))
    return [component[labels == label] for label in range(k) if (labels == label).any()]


def cluster_qr(vectors: Floats) -> Ints:
    """Cluster the rows of an orthonormal basis, shape (n, k), independently of its rotation and signs.

    Damle, Minden and Ying, "Simple, direct and efficient multi-way spectral clustering", Information and Inference
    8(1), 2019, Algorithm 1: pivots select one row per cluster, and the nearest rotation aligns the basis with them.
    """
    pivots = linalg.qr(vectors.T, mode="r", pivoting=True)[1][: vectors.shape[1]]
    left, _, right = linalg.svd(vectors[pivots].T)
    labels: Ints = np.abs(vectors @ (left @ right)).argmax(axis=1)
    return labels


def _sort_by_spectrum(users: Any) -> Ints:
    """Sort items by component and second eigenvector, so that neighbouring items share users."""
    results = []
    for component in _connected_components(users):
        if len(component) > 2:
            inside = _restrict_to_items(users, component)
            positions = np.round(_leading_eigenvectors(inside, 2)[:, 1] / np.sqrt(_degrees(inside)), 12)
            far = int(np.argmax(np.abs(positions)))
            component = component[np.argsort(positions * np.copysign(1.0, positions[far]), kind="stable")]
        results.append(component)
    return np.concatenate(results)


# --------------------------------------------------------------------------- the spectrum


def _restrict_to_items(users: Any, members: Ints) -> Any:
    """Restrict the histories to some items, and drop users with fewer than two of them."""
    inside = users[:, members]
    inside = inside[np.diff(inside.indptr) > 1]
    inside.sort_indices()
    return inside


def _degrees(users: Any) -> Floats:
    """Return the total edge weight of each item, shape (n,)."""
    result: Floats = users.T @ users.sum(axis=1) - users.sum(axis=0)
    return result


def _leading_eigenvectors(users: Any, k: int) -> Floats:
    """Return the first k eigenvectors of the normalised adjacency matrix of a connected graph, shape (n, k)."""
    size, scale = users.shape[1], 1 / np.sqrt(_degrees(users))
    if size <= max(_MAX_DENSE_ITEMS, 2 * k):
        together = (users.T @ users).toarray()
        np.fill_diagonal(together, 0.0)
        result: Floats = linalg.eigh(scale[:, None] * together * scale, subset_by_index=[size - k, size - 1])[1]
        return result[:, ::-1]
    items, alone = users.T.tocsr(), users.sum(axis=0) * scale**2

    def times(block: Floats) -> Floats:
        turned = block.T
        product: Floats = ((items @ (users @ (turned * scale).T)).T * scale - turned * alone).T
        return product

    start = np.random.default_rng(0).uniform(-1, 1, (size, k))
    operator = LinearOperator((size, size), matvec=times, matmat=times, dtype=np.float64)
    try:
        # eigenvalues are in ascending order
        result = eigsh(operator, k=k, which="LA", v0=start[:, 0])[1]
        return result[:, ::-1]
    except ArpackError:
        return _orthogonal_iteration(times, start)


def _orthogonal_iteration(times: Any, block: Floats) -> Floats:
    """Approximate the first eigenvectors by orthogonal iteration; eigenvalues are in [-1, 1]."""
    for _ in range(_MAX_ITERATIONS):
        block = linalg.qr(block + times(block), mode="economic")[0]
    turn = linalg.eigh(block.T @ times(block))[1]
    result: Floats = block @ turn[:, ::-1]
    return result
