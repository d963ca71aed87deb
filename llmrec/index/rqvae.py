"""RQ-VAE: an autoencoder whose middle is quantised level by level (TIGER: Rajput et al., NeurIPS 2023, section 3.1).

With the encoder's output z, r_0 = z, c_l the nearest of level l's codewords to r_l, and r_(l+1) = r_l - e_(c_l), the
decoder sees the sum of the codewords. The loss of a vector x is

    ||x - decoded||^2 + sum over l of ||sg[r_l] - e_(c_l)||^2 + beta ||r_l - sg[e_(c_l)]||^2

where sg stops gradients: the second term moves codewords only, the third the encoder only. Gradients of the first
reach the encoder as if nothing had been quantised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmrec.errors import RecipeError, require
from llmrec.index.kmeans import Floats, nearest, reconstructed, residual_kmeans
from llmrec.progress import Bar
from llmrec.recipe.schema import RQVAEIndex

_WEIGHT_DECAY = 1e-4
# Steps of Lloyd's algorithm for the first codewords; training moves them anyway.
_FIRST_STEPS = 10
_ROWS = 4096


class Losses(NamedTuple):
    """Means over a batch of squared norms: reconstruction, codewords to residuals, residuals to codewords."""

    reconstruction: Any
    codebook: Any
    commitment: Any


@dataclass(frozen=True)
class Network:
    """Layers as (weight, bias), ReLU between them, and codebooks of shape (levels, k, dim)."""

    encoder: Sequence[tuple[Any, Any]]
    decoder: Sequence[tuple[Any, Any]]
    codebooks: Any

    def parameters(self) -> list[Any]:
        """Return every tensor that is learned."""
        return [tensor for layer in (*self.encoder, *self.decoder) for tensor in layer] + [self.codebooks]


@dataclass(frozen=True)
class RQVAE:
    """What training leaves.

    Attributes:
        weights: Of the encoder, ``encoder.0.weight`` of shape (out, in), ``encoder.0.bias`` and so on.
        codebooks: Shape (levels, k, dim).
        error: Mean squared norm of x - decoded, over that of x.
        loss: Mean loss of the first epoch and of the last.
    """

    weights: Mapping[str, Floats]
    codebooks: Floats
    error: float
    loss: tuple[float, float]


def fit(x: Floats, section: RQVAEIndex, levels: int, k: int, *, seed: int = 0, quiet: bool = False) -> RQVAE:
    """Train where ``section.device`` says; the same seed gives the same numbers on the same machine and threads.

    The first codewords are residual k-means of the first batch's encodings. A codeword that no vector of an epoch chose
    moves to the residual of a vector drawn at random.

    Args:
        x: Vectors, shape (n, d).
        section: The recipe's ``index.semantic.rqvae``.
        levels: Codebooks.
        k: Codewords of each.
        seed: Of weights and batches.
        quiet: Show no progress bar.
    """
    torch, place = require("torch", "train"), _place(section)
    rng, source = np.random.default_rng([seed, 7]), torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(place)
    network = made(x.shape[1], section, levels, k, seed, place=place)
    _first_codewords(network, source[rng.permutation(len(x))[: section.batch]], seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr=section.learning_rate, weight_decay=_WEIGHT_DECAY)
    means = []
    with Bar("RQ-VAE", section.epochs, unit="epochs", quiet=quiet, passing=True) as bar:
        for _ in range(section.epochs):
            total, used, order = 0.0, torch.zeros(levels, k, dtype=torch.bool, device=place), rng.permutation(len(x))
            for start in range(0, len(x), section.batch):
                rows = source[order[start : start + section.batch]]
                losses, codes = forward(network, rows)
                loss = losses.reconstruction + losses.codebook + section.beta * losses.commitment
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += float(loss.detach()) * len(rows)
                used[torch.arange(levels, device=place), codes] = True
            means.append(total / len(x))
            if len(means) < section.epochs:
                _revive(network, source, used, rng)
            bar.advance(1, f"loss {means[-1]:.4f}")
    return _numbers(network, x, (means[0], means[-1]))


def _place(section: RQVAEIndex) -> str:
    """Return the device of training.

    Raises:
        RecipeError: If a GPU is asked for and there is none.
    """
    if section.device == "cpu":
        return "cpu"
    if require("torch", "train").cuda.is_available():
        return "cuda"
    if section.device == "cuda":
        raise RecipeError(
            "index.semantic.rqvae.device=cuda: torch finds no GPU here; `llmrec doctor` tells more. Set it to auto or "
            "cpu",
            kind="unsupported",
            column="index.semantic.rqvae.device",
        )
    return "cpu"


def encode(weights: Mapping[str, Floats], x: Floats) -> Floats:
    """Return what the encoder makes of vectors, shape (n, dim); numpy alone.

    Args:
        weights: Those of `RQVAE`.
        x: Shape (n, d).
    """
    depth = sum(name.endswith(".weight") for name in weights)
    found = []
    for start in range(0, len(x), _ROWS):
        h = x[start : start + _ROWS]
        for layer in range(depth):
            h = h @ weights[f"encoder.{layer}.weight"].T + weights[f"encoder.{layer}.bias"]
            h = np.maximum(h, 0) if layer + 1 < depth else h
        found.append(h)
    return np.concatenate(found)


def made(width: int, section: RQVAEIndex, levels: int, k: int, seed: int, *, place: str = "cpu") -> Network:
    """Return an untrained network for vectors of a width; layers start as He et al. (ICCV 2015) say, codewords at 0."""
    torch = require("torch", "train")
    generator = torch.Generator().manual_seed(seed)

    def layers(sizes: Sequence[int]) -> list[tuple[Any, Any]]:
        found = []
        for inside, outside in pairwise(sizes):
            # Drawn on the CPU, so that a GPU begins with the same weights.
            weight = (torch.randn(outside, inside, generator=generator) * (2 / inside) ** 0.5).to(place)
            found.append((weight.requires_grad_(), torch.zeros(outside, device=place).requires_grad_()))
        return found

    sizes = (width, *section.hidden, section.dim)
    return Network(
        layers(sizes), layers(sizes[::-1]), torch.zeros(levels, k, section.dim, device=place).requires_grad_()
    )


def forward(network: Network, x: Any) -> tuple[Losses, Any]:
    """Return the losses of a batch of shape (b, d), and its codes, shape (b, levels)."""
    torch = require("torch", "train")
    z = _through(network.encoder, x)
    rest, total, codes = z, torch.zeros_like(z), []
    codebook, commitment = z.new_zeros(()), z.new_zeros(())
    for level in network.codebooks:
        with torch.no_grad():
            codes.append((level.square().sum(1) - 2 * rest @ level.T).argmin(1))
        chosen = torch.nn.functional.embedding(codes[-1], level)
        codebook = codebook + (rest.detach() - chosen).square().sum(1).mean()
        commitment = commitment + (rest - chosen.detach()).square().sum(1).mean()
        # Without gradient, else the next levels' commitment would move this level's codewords.
        rest, total = rest - chosen.detach(), total + chosen.detach()
    decoded = _through(network.decoder, z + (total - z).detach())
    return Losses((x - decoded).square().sum(1).mean(), codebook, commitment), torch.stack(codes, 1)


def _through(layers: Sequence[tuple[Any, Any]], h: Any) -> Any:
    torch = require("torch", "train")
    for place, (weight, bias) in enumerate(layers):
        h = torch.nn.functional.linear(h, weight, bias)
        h = torch.relu(h) if place + 1 < len(layers) else h
    return h


def _first_codewords(network: Network, batch: Any, seed: int) -> None:
    torch = require("torch", "train")
    levels, k, _ = network.codebooks.shape
    with torch.no_grad():
        z = _through(network.encoder, batch).cpu().numpy()
        first = residual_kmeans(z, levels, k, seed=seed, iterations=_FIRST_STEPS)
        network.codebooks.copy_(torch.from_numpy(first.codebooks).to(network.codebooks.device))


def _revive(network: Network, source: Any, used: Any, rng: np.random.Generator) -> None:
    """Move codewords that nothing chose to residuals of their level."""
    torch = require("torch", "train")
    dead = (~used).cpu().numpy()
    if not dead.any():
        return
    _, k, _ = network.codebooks.shape
    with torch.no_grad():
        rest = _through(network.encoder, source[rng.permutation(len(source))[:k]])
        for level, codewords in enumerate(network.codebooks):
            places = np.flatnonzero(dead[level])
            codewords[places] = rest[rng.integers(len(rest), size=len(places))]
            rest = rest - codewords[(codewords.square().sum(1) - 2 * rest @ codewords.T).argmin(1)]


def _numbers(network: Network, x: Floats, loss: tuple[float, float]) -> RQVAE:
    torch = require("torch", "train")
    weights = {}
    for place, (weight, bias) in enumerate(network.encoder):
        weights[f"encoder.{place}.weight"] = weight.detach().cpu().numpy().copy()
        weights[f"encoder.{place}.bias"] = bias.detach().cpu().numpy().copy()
    codebooks: NDArray[np.float32] = network.codebooks.detach().cpu().numpy().copy()
    total = reconstructed(nearest(encode(weights, x), codebooks), codebooks)
    with torch.no_grad():
        decoded = _through(network.decoder, torch.from_numpy(total).to(network.codebooks.device)).cpu().numpy()
    error = np.square(x - decoded).sum(dtype=np.float64) / max(np.square(x).sum(dtype=np.float64), 1e-30)
    return RQVAE(weights, codebooks, float(error), loss)
