"""Semantic IDs: text vectors quantised to a few tokens, most informative token first.

Items with similar texts share the first pieces of their codes (TIGER: Rajput et al., NeurIPS 2023; LC-Rec: Zheng et
al., ICDE 2024). Duplicate codes are repaired, so that every code is unique.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from llmrec.data.hashing import hash64
from llmrec.errors import DataError, RecipeError, did_you_mean, require
from llmrec.guard import TEXT_LIMIT, clean
from llmrec.index.diagnostics import perplexity
from llmrec.index.table import Embed, ItemIndex, item_token, level_token
from llmrec.machine import has_cuda
from llmrec.progress import Progress
from llmrec.recipe.schema import IndexSection, RQVAEIndex, SemanticIndex
from llmrec.types import Item

if TYPE_CHECKING:
    from llmrec.data.split import SplitDataset


# RQ-VAE: an autoencoder whose bottleneck is quantised level by level (TIGER: Rajput et al., NeurIPS 2023, section
# 3.1).
#
# With the encoder output z, r_0 = z, c_l the index of the codeword at level l nearest to r_l, and r_(l+1) = r_l -
# e_(c_l), the decoder sees the sum of the codewords. The loss of a vector x is
#
#     ||x - decoded||^2 + sum over l of ||sg[r_l] - e_(c_l)||^2 + beta ||r_l - sg[e_(c_l)]||^2
#
# where sg stops gradients: the second term moves only codewords, the third only the encoder. Gradients of the
# first term reach the encoder as if there were no quantisation.


_WEIGHT_DECAY = 1e-4
# Iterations of k-means (Lloyd) for the initial codewords, which training then changes.
_INITIAL_ITERATIONS = 10
_ENCODING_BATCH = 4096


class Losses(NamedTuple):
    """Mean losses of a batch: reconstruction, codewords to residuals, residuals to codewords."""

    reconstruction: Any
    codebook: Any
    commitment: Any


@dataclass(frozen=True)
class RQVAENetwork:
    """Layers as (weight, bias), with ReLU between them, and codebooks of shape (levels, k, dim)."""

    encoder: Sequence[tuple[Any, Any]]
    decoder: Sequence[tuple[Any, Any]]
    codebooks: Any

    def parameters(self) -> list[Any]:
        """Return all trainable tensors."""
        return [tensor for layer in (*self.encoder, *self.decoder) for tensor in layer] + [self.codebooks]


@dataclass(frozen=True)
class RQVAE:
    """A trained RQ-VAE.

    Attributes:
        weights: Encoder weights: ``encoder.0.weight`` of shape (out, in), ``encoder.0.bias`` and so on.
        codebooks: Shape (levels, k, dim).
        error: Mean squared norm of x - decoded, divided by that of x.
        loss: Mean loss of the first and of the last epoch.
    """

    weights: Mapping[str, Floats]
    codebooks: Floats
    error: float
    loss: tuple[float, float]


def fit_rqvae(x: Floats, section: RQVAEIndex, levels: int, k: int, *, seed: int = 0, quiet: bool = False) -> RQVAE:
    """Train an RQ-VAE; deterministic for a seed on the same machine and number of threads.

    The initial codewords are residual k-means of the first batch's encodings. A codeword that no vector of an epoch
    selected is moved to the residual of a random vector.

    Args:
        x: Embeddings, shape (n, d).
        section: The recipe's ``index.semantic.rqvae``.
        levels: Number of codebooks.
        k: Codewords per codebook.
        seed: Seed of weights and batches.
        quiet: Show no progress bar.
    """
    torch, device = require("torch", "train"), _training_device(section)
    rng, source = np.random.default_rng([seed, 7]), torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(device)
    network = create_network(x.shape[1], section, levels, k, seed, device=device)
    _initialise_codebooks(network, source[rng.permutation(len(x))[: section.batch]], seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr=section.learning_rate, weight_decay=_WEIGHT_DECAY)
    means = []
    with Progress("RQ-VAE", section.epochs, unit="epochs", quiet=quiet, passing=True) as bar:
        for _ in range(section.epochs):
            total, used, order = 0.0, torch.zeros(levels, k, dtype=torch.bool, device=device), rng.permutation(len(x))
            for start in range(0, len(x), section.batch):
                rows = source[order[start : start + section.batch]]
                losses, codes = compute_losses(network, rows)
                loss = losses.reconstruction + losses.codebook + section.beta * losses.commitment
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += float(loss.detach()) * len(rows)
                used[torch.arange(levels, device=device), codes] = True
            means.append(total / len(x))
            if len(means) < section.epochs:
                _replace_unused_codewords(network, source, used, rng)
            bar.advance(1, f"loss {means[-1]:.4f}")
    return _rqvae_from_network(network, x, (means[0], means[-1]))


def _training_device(section: RQVAEIndex) -> str:
    """Return the device for training.

    Raises:
        RecipeError: If a GPU is requested and there is none.
    """
    if section.device == "cpu":
        return "cpu"
    if has_cuda():
        return "cuda"
    if section.device == "cuda":
        raise RecipeError(
            "index.semantic.rqvae.device=cuda: torch finds no GPU (see `llmrec doctor`); set the key to auto or cpu",
            kind="unsupported",
            column="index.semantic.rqvae.device",
        )
    return "cpu"


def encode_vectors(weights: Mapping[str, Floats], x: Floats) -> Floats:
    """Return the encodings of vectors of shape (n, d) by an `RQVAE` with these weights, shape (n, dim), with numpy."""
    depth = sum(name.endswith(".weight") for name in weights)
    results = []
    for start in range(0, len(x), _ENCODING_BATCH):
        h = x[start : start + _ENCODING_BATCH]
        for layer in range(depth):
            h = h @ weights[f"encoder.{layer}.weight"].T + weights[f"encoder.{layer}.bias"]
            h = np.maximum(h, 0) if layer + 1 < depth else h
        results.append(h)
    return np.concatenate(results)


def create_network(
    width: int, section: RQVAEIndex, levels: int, k: int, seed: int, *, device: str = "cpu"
) -> RQVAENetwork:
    """Return an untrained network; layers are initialised as in He et al. (ICCV 2015), codewords with 0."""
    torch = require("torch", "train")
    generator = torch.Generator().manual_seed(seed)

    def layers(sizes: Sequence[int]) -> list[tuple[Any, Any]]:
        results = []
        for inside, outside in pairwise(sizes):
            # Drawn on the CPU, so that training on a GPU starts from the same weights.
            weight = (torch.randn(outside, inside, generator=generator) * (2 / inside) ** 0.5).to(device)
            results.append((weight.requires_grad_(), torch.zeros(outside, device=device).requires_grad_()))
        return results

    sizes = (width, *section.hidden, section.dim)
    return RQVAENetwork(
        layers(sizes), layers(sizes[::-1]), torch.zeros(levels, k, section.dim, device=device).requires_grad_()
    )


def compute_losses(network: RQVAENetwork, x: Any) -> tuple[Losses, Any]:
    """Return the losses of a batch, shape (b, d), and its codes, shape (b, levels)."""
    torch = require("torch", "train")
    z = _apply_layers(network.encoder, x)
    rest, total, codes = z, torch.zeros_like(z), []
    codebook, commitment = z.new_zeros(()), z.new_zeros(())
    for level in network.codebooks:
        with torch.no_grad():
            codes.append((level.square().sum(1) - 2 * rest @ level.T).argmin(1))
        chosen = torch.nn.functional.embedding(codes[-1], level)
        codebook = codebook + (rest.detach() - chosen).square().sum(1).mean()
        commitment = commitment + (rest - chosen.detach()).square().sum(1).mean()
        # Without gradient, since the commitment loss of later levels would move the codewords of this level.
        rest, total = rest - chosen.detach(), total + chosen.detach()
    decoded = _apply_layers(network.decoder, z + (total - z).detach())
    return Losses((x - decoded).square().sum(1).mean(), codebook, commitment), torch.stack(codes, 1)


def _apply_layers(layers: Sequence[tuple[Any, Any]], h: Any) -> Any:
    torch = require("torch", "train")
    for index, (weight, bias) in enumerate(layers):
        h = torch.nn.functional.linear(h, weight, bias)
        h = torch.relu(h) if index + 1 < len(layers) else h
    return h


def _initialise_codebooks(network: RQVAENetwork, batch: Any, seed: int) -> None:
    torch = require("torch", "train")
    levels, k, _ = network.codebooks.shape
    with torch.no_grad():
        z = _apply_layers(network.encoder, batch).cpu().numpy()
        first = residual_kmeans(z, levels, k, seed=seed, iterations=_INITIAL_ITERATIONS)
        network.codebooks.copy_(torch.from_numpy(first.codebooks).to(network.codebooks.device))


def _replace_unused_codewords(network: RQVAENetwork, source: Any, used: Any, rng: np.random.Generator) -> None:
    """Move unused codewords to random residuals of their level."""
    torch = require("torch", "train")
    dead = (~used).cpu().numpy()
    if not dead.any():
        return
    _, k, _ = network.codebooks.shape
    with torch.no_grad():
        rest = _apply_layers(network.encoder, source[rng.permutation(len(source))[:k]])
        for level, codewords in enumerate(network.codebooks):
            unused = np.flatnonzero(dead[level])
            codewords[unused] = rest[rng.integers(len(rest), size=len(unused))]
            rest = rest - codewords[(codewords.square().sum(1) - 2 * rest @ codewords.T).argmin(1)]


def _rqvae_from_network(network: RQVAENetwork, x: Floats, loss: tuple[float, float]) -> RQVAE:
    torch = require("torch", "train")
    weights = {}
    for index, (weight, bias) in enumerate(network.encoder):
        weights[f"encoder.{index}.weight"] = weight.detach().cpu().numpy().copy()
        weights[f"encoder.{index}.bias"] = bias.detach().cpu().numpy().copy()
    codebooks: NDArray[np.float32] = network.codebooks.detach().cpu().numpy().copy()
    total = reconstruct_vectors(nearest_codes(encode_vectors(weights, x), codebooks), codebooks)
    with torch.no_grad():
        decoded = _apply_layers(network.decoder, torch.from_numpy(total).to(network.codebooks.device)).cpu().numpy()
    error = np.square(x - decoded).sum(dtype=np.float64) / max(np.square(x).sum(dtype=np.float64), 1e-30)
    return RQVAE(weights, codebooks, float(error), loss)


# Residual k-means: each level clusters the residuals of the previous levels, optionally into clusters of limited size.
#
# The code of an item has one index per level, and the sum of the corresponding centroids approximates its vector.
# Clusters of limited size use the vocabulary more evenly, which is why OneRec (arXiv 2502.18965, section 3.1) uses
# them.


Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_BLOCK = 2048
# Number of vectors per centroid from which the initial centroids are drawn.
_SAMPLES_PER_CENTROID = 16
# Size limit in the first step, as a multiple of equal sizes, and number of steps after which costs are compared.
_INITIAL_SIZE_LIMIT, _INITIAL_STEPS = 1.2, 5
# Minimum bid as a share of the mean cost; an assignment costs at most this much more than the optimum.
_BID_SHARE = 1e-3
# As a multiple of the range of costs; smaller bids are lost by rounding.
_MIN_RELATIVE_BID = 1e-5
# Number of rounds after which bids grow, and the growth factor per further round.
_PATIENCE, _GROWTH = 30, 1.05


@dataclass(frozen=True)
class Clusters:
    """Centroids, shape (k, d), and the index of each vector's centroid, shape (n,)."""

    centroids: Floats
    codes: Ints


@dataclass(frozen=True)
class Quantised:
    """Codes, shape (n, levels), and codebooks, shape (levels, k, d)."""

    codes: Ints
    codebooks: Floats


def residual_kmeans(
    x: Floats, levels: int, k: int, *, balance: float = 0.0, seed: int = 0, iterations: int = 25
) -> Quantised:
    """Quantise vectors level by level.

    Args:
        x: Vectors, shape (n, d), at least one.
        levels: Numbers per code.
        k: Codes per level; may exceed the number of vectors.
        balance: Maximum vectors per code, as a multiple of n / k and at least 1; 0: no bound.
        seed: Seed of the initial centroids.
        iterations: Maximum steps of Lloyd's algorithm per level.
    """
    rest, result = np.array(x, np.float32, order="C"), []
    for level in range(levels):
        most = math.ceil(balance * len(x) / k)
        result.append(kmeans(rest, k, most=most, seed=(seed, level), iterations=iterations))
        rest -= result[-1].centroids[result[-1].codes]
    return Quantised(np.stack([c.codes for c in result], axis=1), np.stack([c.centroids for c in result]))


def nearest_codes(x: Floats, codebooks: Floats) -> Ints:
    """Return the nearest centroid at each level, shape (n, levels), ties by index."""
    rest, codes = np.array(x, np.float32, order="C"), np.empty((len(x), len(codebooks)), np.int64)
    for level, centroids in enumerate(codebooks):
        codes[:, level], _ = _assign_centroids(rest, centroids)
        rest -= centroids[codes[:, level]]
    return codes


def reconstruct_vectors(codes: Ints, codebooks: Floats) -> Floats:
    """Return the sum of the centroids of each code, shape (n, d)."""
    total = np.zeros((len(codes), codebooks.shape[2]), np.float32)
    for level, centroids in enumerate(codebooks):
        total += centroids[codes[:, level]]
    return total


def kmeans(x: Floats, k: int, *, most: int = 0, seed: int | Sequence[int] = 0, iterations: int = 25) -> Clusters:
    """Cluster vectors by k-means (Lloyd) after greedy k-means++; deterministic for a seed.

    A bound is applied only in the last third of the iterations: without it they are cheaper and converge to similar
    centroids. With it, the distances of all vectors to all centroids are in memory at once: 4 n k bytes.

    Args:
        x: Vectors, shape (n, d).
        k: Clusters; some stay empty if there are fewer different vectors.
        most: Maximum vectors per cluster, with ``most * k >= n``; 0: no bound.
        seed: Seed of the initial centroids.
        iterations: Maximum steps.
    """
    centroids = _initial_centroids(x, _kmeans_plus_plus(x, k, np.random.default_rng(seed)))
    bounded_steps = iterations // 3 if most else 0
    centroids, _ = _run_lloyd(x, centroids, 0, iterations - bounded_steps - _INITIAL_STEPS)
    centroids, _ = _run_lloyd(x, centroids, most, bounded_steps)
    return Clusters(centroids, _assign_centroids(x, centroids, most)[0])


def _run_lloyd(x: Floats, centroids: Floats, most: int, steps: int) -> tuple[Floats, float]:
    """Return the centroids after a number of steps or convergence, and the total cost of the last step."""
    before, total = np.full(len(x), -1), math.inf
    for _ in range(steps):
        codes, cost = _assign_centroids(x, centroids, most)
        total = float(cost.sum(dtype=np.float64))
        if np.array_equal(codes, before):
            break
        centroids, before = _update_centroids(x, codes, cost, centroids), codes
    return centroids, total


def _initial_centroids(x: Floats, first: Floats) -> Floats:
    """Return initial centroids for limited cluster sizes.

    Residuals are distributed around zero in all directions: without a bound, a central centroid may get most of them,
    while others get a few distant ones. A single step with a tight bound divides the centre, and unbounded steps do
    not merge it again.
    """
    results = []
    for most in (0, math.ceil(_INITIAL_SIZE_LIMIT * len(x) / len(first))):
        centroids, _ = _run_lloyd(x, first, most, 1)
        centroids, cost = _run_lloyd(x, centroids, 0, _INITIAL_STEPS - 1)
        results.append((cost, most, centroids))
    return min(results, key=lambda entry: entry[:2])[2]


def _kmeans_plus_plus(x: Floats, k: int, rng: np.random.Generator) -> Floats:
    """Select initial centroids by greedy k-means++ (Arthur and Vassilvitskii, SODA 2007, section 3)."""
    if len(x) > _SAMPLES_PER_CENTROID * k:
        x = x[np.sort(rng.choice(len(x), _SAMPLES_PER_CENTROID * k, replace=False))]
    norms, trials = np.einsum("ij,ij->i", x, x), 2 + int(math.log(k))
    chosen = [int(rng.integers(len(x)))]
    cost = _squared_distances(x, norms, chosen)[0]
    while len(chosen) < k:
        steps = np.cumsum(cost, dtype=np.float64)
        if steps[-1] <= 0:
            # All vectors are already centroids, so any repetition is equally good.
            chosen += [chosen[0]] * (k - len(chosen))
            break
        drawn = np.searchsorted(steps, rng.random(trials) * steps[-1], side="right").clip(max=len(x) - 1)
        costs = np.minimum(cost, _squared_distances(x, norms, drawn))
        best = int(costs.sum(axis=1, dtype=np.float64).argmin())
        cost = costs[best]
        chosen.append(int(drawn[best]))
    return x[chosen]


def _squared_distances(x: Floats, norms: Floats, of: list[int] | Ints) -> Floats:
    result = norms[None, :] + norms[of, None] - 2 * (x[of] @ x.T)
    # Otherwise equal vectors would be drawn repeatedly because of rounding errors.
    result[result < 1e-6 * (norms[of, None] + norms[None, :])] = 0
    return result


def _assign_centroids(x: Floats, centroids: Floats, most: int = 0) -> tuple[Ints, Floats]:
    """Return the nearest centroid of each vector within the size limits, and the squared distances."""
    codes, part = np.empty(len(x), np.int64), np.empty(len(x), np.float32)
    table = np.empty((len(x) if most else 0, len(centroids)), np.float32)
    offset, turned = np.einsum("ij,ij->i", centroids, centroids), np.ascontiguousarray(-2 * centroids.T)
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, start + _BLOCK)
        # Without the norm of the vector, which is the same for all centroids.
        costs = np.matmul(x[rows], turned, out=table[rows] if most else None)
        costs += offset
        codes[rows] = costs.argmin(axis=1)
        part[rows] = costs[np.arange(len(costs)), codes[rows]]
    norms = np.einsum("ij,ij->i", x, x)
    if most and np.bincount(codes).max() > most:
        codes = assign_with_limit(table, most, bid=_BID_SHARE * float(np.maximum(part + norms, 0).mean()))
        part = table[np.arange(len(x)), codes]
    return codes, np.maximum(part + norms, 0)


def assign_with_limit(costs: Floats, most: int, *, bid: float = 0.0) -> Ints:
    """Assign each row to a column, with at most ``most`` rows per column, at nearly minimum total cost.

    Bertsekas' auction (Annals of Operations Research 14, 1988) for all rows of a column at once: a column with too many
    bidding rows raises its price until only ``most`` of them remain. The mean cost is at most one bid above the
    minimum; bids grow if prices have not converged after some rounds. Ties are broken by row.

    Args:
        costs: Shape (n, k).
        most: Maximum rows per column; ``most * k >= n``.
        bid: Minimum rise of a price; 0: a thousandth of the range of costs.
    """
    k, spread = costs.shape[1], float(np.ptp(costs)) or 1.0
    bid = max(bid or _BID_SHARE * spread, _MIN_RELATIVE_BID * spread)
    prices, rounds = np.zeros(k, np.float32), 0
    codes: Ints = costs.argmin(axis=1)
    while (over := np.bincount(codes, minlength=k) > most).any():
        rows = np.flatnonzero(over[codes])
        columns, indices = codes[rows], np.arange(len(rows))
        offers = costs[rows] + prices
        kept = offers[indices, columns]
        offers[indices, columns] = np.inf
        # The loss of each row in its next best column: rows with the smallest loss are moved.
        margin = np.maximum(offers.min(axis=1) - kept, 0)
        order = np.lexsort((rows, -margin, columns))
        leaving = order[indices - np.searchsorted(columns[order], columns[order]) >= most]
        rise = np.zeros(k, np.float32)
        np.maximum.at(rise, columns[leaving], margin[leaving])
        prices[over] += rise[over] + np.float32(bid)
        codes[rows[leaving]] = (costs[rows[leaving]] + prices).argmin(axis=1)
        rounds += 1
        if rounds > _PATIENCE:
            bid = min(bid * _GROWTH, spread)
    return codes


def _update_centroids(x: Floats, codes: Ints, cost: Floats, before: Floats) -> Floats:
    """Return the cluster means; empty clusters move to the vectors farthest from their centroids."""
    counts = np.bincount(codes, minlength=len(before))
    member = csr_array((np.ones(len(x), np.float32), codes, np.arange(len(x) + 1)), shape=(len(x), len(before)))
    centroids: Floats = np.asarray(member.T.tocsr() @ x)
    centroids /= np.maximum(counts, 1)[:, None]
    empty = np.flatnonzero(counts == 0)
    far = np.argsort(-cost, kind="stable")[: len(empty)] if len(empty) else empty
    far = far[cost[far] > 0]
    centroids[empty] = before[empty]
    centroids[empty[: len(far)]] = x[far]
    return centroids


class Semantic:
    """Semantic IDs by residual quantisation of text vectors.

    ``repair: extra_level`` numbers items with equal codes in an additional piece, 0 for the most popular in training,
    as in TIGER. ``repair: last_level`` gives items that share all but the last piece different last pieces with the
    minimum sum of squared distances, as LC-Rec's uniform mapping does within its batches. With ``index.item_token`` the
    last piece is an item token instead.
    """

    @staticmethod
    def build(section: IndexSection, data: SplitDataset, *, seed: int, embed: Embed | None = None) -> ItemIndex:
        """Assign codes to items; see `Scheme`.

        Raises:
            RecipeError: If no item has a field that the recipe names, or items cannot be distinguished as it requires.
            DataError: If there is no encoder, or its embeddings are unusable.
        """
        semantic = section.semantic
        names = sorted(data.dataset.items)
        items = [data.dataset.items[name] for name in names]
        fields = item_fields(items, semantic)
        x = item_vectors(items, fields, embed)
        vectors, result, arrays, figures = _quantise_vectors(x, semantic, seed)
        grid = [level_token(level, number) for level in range(semantic.levels) for number in range(semantic.codes)]
        rows, added = [tuple(map(int, row)) for row in result.codes], []
        if section.item_token:
            added = [item_token(number) for number in range(len(rows))]
            codes = {name: (*_code_tokens(row), last) for name, row, last in zip(names, rows, added, strict=True)}
        elif semantic.repair == "extra_level":
            numbers = _number_duplicates(rows, names, data, seed)
            added = [level_token(semantic.levels, number) for number in range(max(numbers) + 1)]
            codes = {name: _code_tokens((*row, n)) for name, row, n in zip(names, rows, numbers, strict=True)}
        else:
            moved = _repair_last_level(vectors, result)
            figures |= {"moved": float((moved != result.codes[:, -1]).mean())}
            codes = {name: _code_tokens((*row[:-1], int(n))) for name, row, n in zip(names, rows, moved, strict=True)}
        settings = {"semantic": semantic.model_dump(mode="json"), "fields": list(fields), "seed": seed}
        settings |= {"item_token": section.item_token}
        return ItemIndex(
            "semantic", codes, (*grid, *added), settings, {"codebooks": result.codebooks, **arrays}, figures
        )

    @staticmethod
    def extend(index: ItemIndex, items: Mapping[str, Item], *, embed: Embed | None = None) -> ItemIndex:
        """Assign the nearest free codes to new items, in the order of their ids; see `Scheme`.

        The vocabulary does not change, except with ``item_token``. If the nearest code is full, the nearest free last
        number is used, then the nearest number of the level before, and so on.

        Raises:
            DataError: If there is no encoder, its embeddings differ from those of the index, or every code is full.
        """
        names, arrays = sorted(items), dict(index.arrays)
        x = _embed_texts([item_text(items[name], index.settings["fields"]) for name in names], embed)
        codebooks = arrays.pop("codebooks")
        width = arrays["encoder.0.weight"].shape[1] if arrays else codebooks.shape[2]
        if x.shape[1] != width:
            raise DataError(
                f"index semantic: the index was built on vectors of {width} dimensions, but this text encoder returns "
                f"{x.shape[1]}; use {index.settings['semantic']['encoder']!r}",
                kind="mismatch",
                column="index.semantic.encoder",
            )
        x = encode_vectors(arrays, x) if arrays else x
        spare = len(index.tokens) - codebooks.shape[0] * codebooks.shape[1]
        if index.settings["item_token"]:
            new = [item_token(number) for number in range(spare, spare + len(names))]
            rows = (tuple(map(int, row)) for row in nearest_codes(x, codebooks))
            return index.adding(
                {n: (*_code_tokens(row), last) for n, row, last in zip(names, rows, new, strict=True)}, new
            )
        levels, room = len(codebooks), max(1, spare)
        held = Counter(pieces[:levels] for pieces in index.codes.values())
        codes = {}
        for name, vector in zip(names, x, strict=True):
            code = next((p for c in _codes_by_distance(vector, codebooks) if held[p := _code_tokens(c)] < room), None)
            if code is None:
                raise DataError(
                    f"index semantic: no free code for item {name!r}; build the index again", kind="exhausted"
                )
            codes[name] = (*code, level_token(levels, held[code])) if spare else code
            held[code] += 1
        return index.adding(codes)


def _code_tokens(numbers: Sequence[int]) -> tuple[str, ...]:
    return tuple(level_token(level, number) for level, number in enumerate(numbers))


# --------------------------------------------------------------------------- text vectors


def item_vectors(items: Sequence[Item], fields: Sequence[str], embed: Embed | None) -> Floats:
    """Return normalised text vectors of items, shape (n, d), from their titles and then the fields.

    Raises:
        DataError: If there is no encoder, or its embeddings are unusable.
    """
    return _embed_texts([item_text(item, fields) for item in items], embed)


def item_fields(items: Sequence[Item], section: SemanticIndex) -> tuple[str, ...]:
    """Return the item fields named in a recipe, by default all fields.

    Raises:
        RecipeError: If no item has a field of that name.
    """
    known = tuple(dict.fromkeys(name for item in items for name in item.fields))
    for name in section.fields:
        if name not in known:
            raise RecipeError(
                f"index.semantic.fields: no item has a field {name!r}{did_you_mean(name, known)}; the data has "
                f"{', '.join(known) or 'no fields'}",
                kind="unknown-name",
                column="index.semantic.fields",
            )
    return section.fields or known


def item_text(item: Item, fields: Sequence[str]) -> str:
    """Return the text of an item on one line: ``title. categories: Skin Care``; its id if the text is empty."""
    text = [f"{name}: {value}" for name in fields if (value := clean(item.fields.get(name, ""), TEXT_LIMIT))]
    return ". ".join(part for part in (clean(item.title), *text) if part) or item.item_id


def _embed_texts(texts: Sequence[str], embed: Embed | None) -> Floats:
    """Return normalised vectors of texts, shape (n, d)."""
    if embed is None:
        raise DataError(
            "index semantic: the index requires a text encoder; pass one as embed",
            kind="missing-value",
            column="embed",
        )
    x = np.array(embed(texts), np.float32, order="C")
    if x.ndim != 2 or len(x) != len(texts) or not x.size:
        raise DataError(
            f"index semantic: the text encoder returned an array of shape {x.shape} for {len(texts)} texts",
            kind="defect",
        )
    wrong = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if len(wrong):
        raise DataError(
            f"index semantic: the text encoder returned no finite vector for {texts[wrong[0]]!r}", kind="defect"
        )
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return x


def _quantise_vectors(
    x: Floats, section: SemanticIndex, seed: int
) -> tuple[Floats, Quantised, dict[str, NDArray[Any]], dict[str, float]]:
    """Return the quantised vectors, their codes, the function that encodes new vectors, and quality measures."""
    arrays: dict[str, NDArray[Any]] = {}
    if section.quantizer == "kmeans":
        if 0 < section.balance < 1:
            raise RecipeError(
                f"index.semantic.balance: {section.balance:g} is less than 1, so not all items fit into the clusters; "
                "use at least 1, or 0 for no limit",
                kind="bad-value",
                column="index.semantic.balance",
            )
        vectors, result = x, residual_kmeans(x, section.levels, section.codes, balance=section.balance, seed=seed)
        rest = x - reconstruct_vectors(result.codes, result.codebooks)
        error = float(np.square(rest).sum(dtype=np.float64) / max(np.square(x).sum(dtype=np.float64), 1e-12))
    else:
        trained = fit_rqvae(x, section.rqvae, section.levels, section.codes, seed=seed)
        arrays, error = dict(trained.weights), trained.error
        vectors = encode_vectors(arrays, x)
        result = Quantised(nearest_codes(vectors, trained.codebooks), trained.codebooks)
    sizes = np.unique(result.codes, axis=0, return_counts=True)[1]
    figures = {
        "collisions": float(sizes[sizes > 1].sum() / len(x)),
        "largest_bucket": float(sizes.max()),
        "mse": error,
    }
    for level in range(section.levels):
        figures[f"perplexity_{level + 1}"] = perplexity(np.bincount(result.codes[:, level]))
    return vectors, result, arrays, figures


# --------------------------------------------------------------------------- items with equal codes


def _number_duplicates(
    rows: Sequence[tuple[int, ...]], names: Sequence[str], data: SplitDataset, seed: int
) -> list[int]:
    """Number the items with the same code by training popularity, then by hash."""
    popular = Counter(dict(data.train.group_by("item_id").len().iter_rows()))
    hashes = hash64("semantic codes", seed, names)
    numbers, seen = [0] * len(names), Counter[tuple[int, ...]]()
    for row in sorted(range(len(names)), key=lambda n: (-popular[names[n]], int(hashes[n]))):
        numbers[row] = seen[rows[row]]
        seen[rows[row]] += 1
    return numbers


def _repair_last_level(vectors: Floats, quantised: Quantised) -> Ints:
    """Change the last index of items with equal codes so that codes become unique, shape (n,)."""
    first, codebook = quantised.codes[:, :-1], quantised.codebooks[-1]
    rest = vectors - reconstruct_vectors(first, quantised.codebooks[:-1])
    _, group = np.unique(first, axis=0, return_inverse=True)
    order = np.argsort(group.ravel(), kind="stable")
    moved = quantised.codes[:, -1].copy()
    for rows in np.split(order, np.cumsum(np.bincount(group.ravel()))[:-1]):
        if len(rows) > len(codebook):
            raise RecipeError(
                f"index.semantic.repair: last_level cannot distinguish {len(rows)} items of equal first codes with "
                f"{len(codebook)} codes; use extra_level, more codes or levels, or a lower index.semantic.balance",
                kind="contradiction",
                column="index.semantic.repair",
            )
        if len(np.unique(moved[rows])) < len(rows):
            # The norm of a row is left out, because it does not depend on the code.
            costs = np.square(codebook).sum(axis=1) - 2 * rest[rows] @ codebook.T
            # Importing scipy takes 0.1 s, which most commands do not need.
            from scipy.optimize import linear_sum_assignment

            moved[rows] = linear_sum_assignment(costs)[1]
    return moved


def _codes_by_distance(rest: Floats, codebooks: Floats, before: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Yield all codes in the order of their distance at each level."""
    level = len(before)
    if level == len(codebooks):
        yield before
        return
    steps = rest - codebooks[level]
    for number in np.argsort(np.square(steps).sum(axis=1), kind="stable"):
        yield from _codes_by_distance(steps[number], codebooks, (*before, int(number)))
