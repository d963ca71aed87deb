"""Gradient-boosted trees (LightGBM) as a learned ensemble of ranking models.

Unlike one weight per member, trees can weight a member by context, such as the length of the history. LightGBM (Ke et
al., NeurIPS 2017) has a small wheel, stores models as text (nothing is unpickled), and its results do not depend on the
number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmrec.errors import ModelError, require

if TYPE_CHECKING:
    from numpy.typing import NDArray

Objective = Literal["lambdarank", "binary"]
"""For rankings LambdaRank (Burges, MSR-TR-2010-82) or cross-entropy, for yes/no cross-entropy."""

TREE_COUNTS = (5, 10, 20, 30, 40, 60, 80, 100, 125, 150)
"""Numbers of trees to try."""

_LIGHTGBM_OPTIONS: Mapping[str, Any] = {
    "learning_rate": 0.05,
    "num_leaves": 15,
    "min_data_in_leaf": 200,
    "feature_fraction": 0.5,
    "lambdarank_truncation_level": 20,
    "seed": 0,
    "deterministic": True,
    "force_row_wise": True,
    "verbose": -1,
}


@dataclass(frozen=True)
class TreeSetting:
    """Hyperparameters selected by cross-fitting: objective and number of trees."""

    objective: Objective
    rounds: int = TREE_COUNTS[-1]

    @property
    def name(self) -> str:
        """Name in tables."""
        return f"{self.objective}, {self.rounds} trees"


@dataclass(frozen=True)
class Trees:
    """Fitted trees, evaluated without LightGBM, whose parser aborts the process for damaged files.

    Attributes:
        text: LightGBM's text format.
        names: The features, in column order.
    """

    text: str
    names: tuple[str, ...]

    @property
    def gains(self) -> dict[str, float]:
        """The relative gain importance of each feature."""
        arrays = _parse_trees(self.text, len(self.names))
        gains = np.bincount(arrays.feature[arrays.inner], arrays.gain[arrays.inner], minlength=len(self.names))
        return dict(zip(self.names, (gains / (gains.sum() or 1.0)).tolist(), strict=True))

    def scores(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the raw score of each row of features, shape (n,)."""
        arrays = _parse_trees(self.text, len(self.names))
        block = max(1, _BLOCK_ELEMENTS // len(arrays.roots))
        parts = [_sum_leaf_values(arrays, features[start : start + block]) for start in range(0, len(features), block)]
        return np.concatenate(parts) if parts else np.empty(0)

    def contributions(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the contribution of each feature to each score (SHAP values), shape (n, f).

        These are exact SHAP values with the distribution of features along the paths of the trees (Lundberg et al.,
        Nature Machine Intelligence 2020): they sum to the score minus the mean score in training.
        """
        paths = _tree_paths(self.text, len(self.names))
        block = max(1, _BLOCK_ELEMENTS // paths.feature.size)
        parts = [_shap_values(paths, features[start : start + block]) for start in range(0, len(features), block)]
        return np.concatenate(parts) if parts else np.empty((0, len(self.names)))


@dataclass(frozen=True)
class _TreeArrays:
    """Trees as arrays with one row per tree, shape (trees, maximum nodes) or (trees, maximum leaves).

    Attributes:
        roots: Root node of each tree; a child or root n below 0 is leaf ``~n``.
        feature: Split feature of each node.
        threshold: Split value; rows with at most this value go left.
        left: Left child.
        right: Right child.
        missing: Whether rows with a missing value go left; without any in training, as for the value 0.
        gain: Gain of the split.
        inner: Mask of the existing nodes.
        leaves: Values of the leaves.
        covers: Number of training rows in each node.
        leaf_covers: Number of training rows in each leaf.
    """

    roots: NDArray[np.int64]
    feature: NDArray[np.int64]
    threshold: NDArray[np.float64]
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    missing: NDArray[np.bool_]
    gain: NDArray[np.float64]
    inner: NDArray[np.bool_]
    leaves: NDArray[np.float64]
    covers: NDArray[np.int64]
    leaf_covers: NDArray[np.int64]


# Number of array elements per block: rows times trees, or rows times features of all paths.
_BLOCK_ELEMENTS = 1 << 20
# Bits of decision_type in LightGBM: missing values go left; missing values occurred in training.
_MISSING_GOES_LEFT, _MISSING_IN_TRAINING = 2, 8


@lru_cache(maxsize=16)
def _parse_trees(text: str, features: int) -> _TreeArrays:
    """Parse and validate trees from LightGBM's text format; the file may be damaged or malicious."""
    try:
        blocks = text.split("\nend of trees", 1)[0].split("\nTree=")[1:]
        trees = [dict(line.split("=", 1) for line in block.split("\n") if "=" in line) for block in blocks]
        counts = [int(tree["num_leaves"]) for tree in trees]
        if not trees or min(counts) < 1 or any(tree.get("num_cat", "0") != "0" for tree in trees):
            raise ValueError("the ranker has no tree, or has categorical splits")
        widest = max(counts)

        def table(key: str, dtype: Any, extra: int = 0) -> NDArray[Any]:
            result = np.zeros((len(trees), max(1, widest - 1 + extra)), dtype=dtype)
            for row, (tree, count) in enumerate(zip(trees, counts, strict=True)):
                result[row, : count - 1 + extra] = np.array(tree.get(key, "").split(), dtype=dtype)
            return result

        inner = np.arange(max(1, widest - 1)) < np.array(counts)[:, None] - 1
        feature, left, right = (table(key, np.int64) for key in ("split_feature", "left_child", "right_child"))
        threshold, gain = table("threshold", np.float64), table("split_gain", np.float64)
        kind, leaves = table("decision_type", np.int64), table("leaf_value", np.float64, extra=1)
        if np.any((feature < 0) | (feature >= features)):
            raise ValueError("a tree uses unknown features")
        # An infinite threshold separates rows with a value from rows without.
        if np.isnan(threshold).any() or not (np.isfinite(leaves).all() and np.isfinite(gain).all()):
            raise ValueError("a tree has values that are not finite")
        sizes, nodes = np.array(counts)[:, None], np.arange(inner.shape[1])
        covers, leaf_covers = table("internal_count", np.int64), table("leaf_count", np.int64, extra=1)
        total, at = np.zeros_like(covers), np.arange(len(trees))[:, None]
        for child in (left, right):
            # Children must come after their parent, so that there are no cycles.
            if np.any(inner & ((child < -sizes) | (child >= sizes - 1) | ((child >= 0) & (child <= nodes)))):
                raise ValueError("a child of a tree node is out of range")
            total += np.where(child >= 0, covers[at, np.maximum(child, 0)], leaf_covers[at, np.maximum(~child, 0)])
        if any(len({*left[n, : c - 1], *right[n, : c - 1]}) < 2 * (c - 1) for n, c in enumerate(counts)):
            raise ValueError("a tree node has two parents")
        if np.any(leaf_covers[np.arange(widest) < sizes] < 1) or np.any(inner & ((covers < 1) | (covers != total))):
            raise ValueError("the row counts of a tree do not add up")
    except (KeyError, ValueError, OverflowError) as error:
        raise ModelError(f"the trees of an ensemble cannot be read: {error}", kind="damaged") from error
    missing = np.where(kind & _MISSING_IN_TRAINING, (kind & _MISSING_GOES_LEFT) > 0, threshold >= 0)
    roots = np.where(np.array(counts) > 1, 0, -1)
    return _TreeArrays(roots, feature, threshold, left, right, missing, gain, inner, leaves, covers, leaf_covers)


def _sum_leaf_values(arrays: _TreeArrays, features: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the sum of all trees' values for each row of features, shape (n,)."""
    # Flat arrays of (row, tree) pairs that have not reached a leaf.
    trees, nodes = arrays.feature.shape
    tree, row = np.tile(np.arange(trees), len(features)), np.repeat(np.arange(len(features)), trees)
    node, values = arrays.roots[tree], features.ravel()
    active = np.flatnonzero(node >= 0)
    while len(active):
        position = tree[active] * nodes + node[active]
        value = values.take(row[active] * features.shape[1] + arrays.feature.take(position))
        left = np.where(np.isnan(value), arrays.missing.take(position), value <= arrays.threshold.take(position))
        node[active] = np.where(left, arrays.left.take(position), arrays.right.take(position))
        active = active[node[active] >= 0]
    return np.asarray(arrays.leaves[tree, ~node].reshape(len(features), trees).sum(axis=1))


@dataclass(frozen=True)
class _TreePaths:
    """The paths to all leaves as feature ranges, shape (leaves, maximum number of features on a path).

    Shorter paths are padded with ranges that contain everything, which changes no contribution.

    Attributes:
        feature: The feature.
        above: Exclusive lower limit of its value on the path.
        most: Inclusive upper limit.
        missing: Whether rows with a missing value are on the path.
        share: The share of training rows that stay on the path at the splits by this feature.
        value: The value of the leaf, shape (leaves, 1).
    """

    feature: NDArray[np.int64]
    above: NDArray[np.float64]
    most: NDArray[np.float64]
    missing: NDArray[np.bool_]
    share: NDArray[np.float64]
    value: NDArray[np.float64]


@lru_cache(maxsize=16)
def _tree_paths(text: str, features: int) -> _TreePaths:
    """Return the paths to the leaves of all trees; see `_parse_trees`."""
    arrays, everything = _parse_trees(text, features), (-np.inf, np.inf, True, 1.0)
    paths: list[dict[int, tuple[float, float, bool, float]]] = []
    values: list[float] = []
    for tree, root in enumerate(arrays.roots.tolist()):
        ahead: list[tuple[int, dict[int, tuple[float, float, bool, float]]]] = [(root, {})]
        while ahead:
            node, path = ahead.pop()
            if node < 0:
                paths.append(path)
                values.append(float(arrays.leaves[tree, ~node]))
                continue
            at = tree, node
            feature, threshold, left = int(arrays.feature[at]), float(arrays.threshold[at]), bool(arrays.missing[at])
            above, most, stays, share = path.get(feature, everything)
            for child, low, high, side in (
                (int(arrays.left[at]), above, min(most, threshold), left),
                (int(arrays.right[at]), max(above, threshold), most, not left),
            ):
                cover = arrays.covers[tree, child] if child >= 0 else arrays.leaf_covers[tree, ~child]
                narrowed = low, high, stays and side, share * float(cover / arrays.covers[at])
                ahead.append((child, {**path, feature: narrowed}))
    width = max(1, *(len(path) for path in paths))
    table = np.array(
        [
            [*((feature, *range_) for feature, range_ in path.items()), *[(0, *everything)] * (width - len(path))]
            for path in paths
        ],
        dtype=np.float64,
    )
    columns = np.moveaxis(table, 2, 0)
    missing = columns[3] > 0
    return _TreePaths(
        columns[0].astype(np.int64), columns[1], columns[2], missing, columns[4], np.array(values)[:, None]
    )


def _shap_values(paths: _TreePaths, features: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the contributions of features (SHAP values), shape (n, f); see `Trees.contributions`.

    A leaf's expected value given some features is its value times the share of each other feature, and 0 if a given one
    is out of range. A feature's contribution is its mean effect over all orders of the features, with the weights
    s! (d - 1 - s)! / d!. These are the integrals of t^s (1 - t)^(d - 1 - s) over [0, 1]. So the sum over all subsets is
    the integral of a product of one factor per feature, which Gauss-Legendre quadrature computes exactly.
    """
    # Infinite values are made finite, so that they are inside the ranges used for padding.
    largest = np.finfo(np.float32).max
    values = np.clip(features, -largest, largest)[:, paths.feature]
    inside = np.where(np.isnan(values), paths.missing, (values > paths.above) & (values <= paths.most))
    change = inside - paths.share
    effect = np.zeros_like(change)
    points, weights = np.polynomial.legendre.leggauss((paths.feature.shape[1] + 1) // 2)
    for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
        factors = paths.share + point * change
        effect += weight * factors.prod(axis=2, keepdims=True) / factors
    effect *= paths.value * change
    return np.stack([effect[:, paths.feature == n].sum(axis=1) for n in range(features.shape[1])], axis=1)


def fit_trees(
    features: NDArray[np.float32],
    labels: NDArray[Any],
    sizes: NDArray[np.int64],
    setting: TreeSetting,
) -> Any:
    """Fit a LightGBM model and return it.

    Args:
        features: One row per candidate, shape (n, f).
        labels: 1 for the target and 0 for others, shape (n,).
        sizes: Number of candidates of each request, in sequence.
        setting: The objective and the number of trees.

    Raises:
        MissingExtra: If LightGBM is not installed.
    """
    lightgbm = require("lightgbm", "ranker")
    group = sizes if setting.objective == "lambdarank" else None
    least = min(_LIGHTGBM_OPTIONS["min_data_in_leaf"], max(1, len(labels) // 50))
    options = {**_LIGHTGBM_OPTIONS, "objective": setting.objective, "min_data_in_leaf": least}
    return lightgbm.train(options, lightgbm.Dataset(features, labels, group=group), setting.rounds)


def scores_by_tree_count(booster: Any, features: NDArray[np.float32]) -> list[NDArray[np.float64]]:
    """Return the raw scores after each number of trees in `TREE_COUNTS`, shape (n,) each."""
    total, done, result = np.zeros(len(features)), 0, []
    for count in TREE_COUNTS:
        total = total + booster.predict(features, raw_score=True, start_iteration=done, num_iteration=count - done)
        result.append(total)
        done = count
    return result


def select_setting(
    values: Mapping[TreeSetting, NDArray[np.float64]], folds: NDArray[np.int64]
) -> tuple[TreeSetting, NDArray[np.float64]]:
    """Select the best setting; also return each case's value under the setting chosen on the other folds.

    So the values are not biased by the choice of the setting.

    Args:
        values: The cross-fitted value of each case by setting, higher is better, shape (n,).
        folds: The fold of each case.
    """
    settings = list(values)
    table = np.array([values[setting] for setting in settings])
    cross_fitted_values = np.empty(table.shape[1])
    for fold in np.unique(folds):
        inside = folds == fold
        cross_fitted_values[inside] = table[table[:, ~inside].mean(axis=1).argmax(), inside]
    return settings[int(table.mean(axis=1).argmax())], cross_fitted_values


def cross_fit_settings(
    objectives: Sequence[Objective],
    fit_to: Callable[[NDArray[np.bool_], TreeSetting], Any],
    features: NDArray[np.float32],
    rows: NDArray[np.int64],
    folds: NDArray[np.int64],
    value: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> tuple[TreeSetting, NDArray[np.float64]]:
    """Select the objective and the number of trees by cross-fitting over users; see `select_setting`.

    Args:
        objectives: The objectives to try.
        fit_to: Fits a setting to the cases of a mask, shape (cases,).
        features: One row per candidate, shape (n, f).
        rows: The case of each candidate.
        folds: The fold of each case.
        value: Returns the value of each case by scores of all candidates, shape (cases,).
    """
    values: dict[TreeSetting, NDArray[np.float64]] = {}
    for objective in objectives:
        scores = np.zeros((len(TREE_COUNTS), len(features)))
        for fold in np.unique(folds):
            held = (folds == fold)[rows]
            scores[:, held] = scores_by_tree_count(fit_to(folds != fold, TreeSetting(objective)), features[held])
        values |= {TreeSetting(objective, count): value(scores[n]) for n, count in enumerate(TREE_COUNTS)}
    return select_setting(values, folds)
