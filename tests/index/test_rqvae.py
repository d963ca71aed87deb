"""RQ-VAE: losses and gradients by hand, and training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmrec.index.diagnostics import perplexity
from llmrec.index.semantic import (
    Floats,
    RQVAENetwork,
    compute_losses,
    create_network,
    encode_vectors,
    fit_rqvae,
    nearest_codes,
    residual_kmeans,
)
from llmrec.recipe.schema import RQVAEIndex

torch = pytest.importorskip("torch")

SMALL = RQVAEIndex(hidden=(10,), dim=4, epochs=30, batch=64, learning_rate=3e-3)


def network(seed: int = 0) -> RQVAENetwork:
    """Return a network in double precision, with codewords about as long as the encodings."""
    initial = create_network(6, SMALL, 3, 5, seed)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([1, 0.5, 0.25])[:, None, None]
    codebooks = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64) * lengths

    def double(layers: Any) -> list[tuple[Any, Any]]:
        return [(w.detach().double().requires_grad_(), b.detach().double().requires_grad_()) for w, b in layers]

    return RQVAENetwork(double(initial.encoder), double(initial.decoder), codebooks.requires_grad_())


def batch(n: int = 7) -> Any:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def relu_net(layers: Any, h: Any) -> Any:
    layers = [(w.detach().numpy(), b.detach().numpy()) for w, b in layers]
    for number, (weight, bias) in enumerate(layers):
        h = h @ weight.T + bias
        h = np.maximum(h, 0) if number + 1 < len(layers) else h
    return h


def test_losses_equal_the_paper() -> None:
    net, x = network(), batch()
    losses, codes = compute_losses(net, x)
    rest = relu_net(net.encoder, x.numpy())
    total, distance = np.zeros_like(rest), 0.0
    for level, codewords in enumerate(net.codebooks.detach().numpy()):
        number = np.square(rest[:, None] - codewords).sum(2).argmin(1)
        np.testing.assert_array_equal(codes[:, level], number)
        distance += np.square(rest - codewords[number]).sum(1).mean()
        total, rest = total + codewords[number], rest - codewords[number]
    decoded = relu_net(net.decoder, total)
    assert losses.reconstruction.item() == pytest.approx(np.square(x.numpy() - decoded).sum(1).mean())
    assert losses.codebook.item() == pytest.approx(distance)
    assert losses.commitment.item() == pytest.approx(distance)


def gradients_reached(net: RQVAENetwork) -> tuple[bool, bool, bool]:
    """Return whether the encoder, the decoder and the codebooks have gradients."""

    def any_of(layers: Any) -> bool:
        return any(t.grad is not None and bool(t.grad.any()) for layer in layers for t in layer)

    grad = net.codebooks.grad
    return any_of(net.encoder), any_of(net.decoder), grad is not None and bool(grad.any())


@pytest.mark.parametrize(
    ("name", "reached"),
    [("reconstruction", (True, True, False)), ("codebook", (False, False, True)), ("commitment", (True, False, False))],
)
def test_each_loss_has_gradients_in_its_part_only(name: str, reached: tuple[bool, bool, bool]) -> None:
    net = network()
    getattr(compute_losses(net, batch())[0], name).backward()
    assert gradients_reached(net) == reached


def difference(value: Any, tensor: Any, position: tuple[int, ...], step: float = 1e-6) -> float:
    with torch.no_grad():
        original = float(tensor[position])
        ends = []
        for sign in (1, -1):
            tensor[position] = original + sign * step
            ends.append(float(value()))
        tensor[position] = original
    return (ends[0] - ends[1]) / (2 * step)


def test_codebook_gradients_equal_finite_differences() -> None:
    net, x = network(), batch()
    losses, codes = compute_losses(net, x)
    losses.codebook.backward()
    rests, rest = [], torch.from_numpy(relu_net(net.encoder, x.numpy()))
    for level in range(3):
        rests.append(rest)
        rest = rest - net.codebooks[level][codes[:, level]].detach()

    def value() -> Any:
        return sum((rests[n] - net.codebooks[n][codes[:, n]]).square().sum(1).mean() for n in range(3))

    for level in range(3):
        position = (level, int(codes[0, level]), 2)
        assert float(net.codebooks.grad[position]) == pytest.approx(
            difference(value, net.codebooks, position), abs=1e-7
        )


def test_commitment_gradients_equal_finite_differences() -> None:
    net, x = network(), batch()
    losses, codes = compute_losses(net, x)
    losses.commitment.backward()
    chosen = [net.codebooks[n][codes[:, n]].detach() for n in range(3)]

    def value() -> Any:
        rest, total = torch.from_numpy(relu_net(net.encoder, x.numpy())), 0.0
        for codewords in chosen:
            rest = rest - codewords
            total = total + rest.square().sum(1).mean()
        return total

    for layer, position in ((0, (3, 1)), (0, (7, 5)), (1, (2, 4))):
        weight = net.encoder[layer][0]
        assert float(weight.grad[position]) == pytest.approx(difference(value, weight, position), rel=1e-5, abs=1e-7)


def test_reconstruction_gradient_is_straight_through() -> None:
    net, x = network(), batch()
    compute_losses(net, x)[0].reconstruction.backward()
    z = torch.from_numpy(relu_net(net.encoder, x.numpy()))
    codes = nearest_codes(z.float().numpy(), net.codebooks.detach().float().numpy())
    total = sum(net.codebooks[n][torch.from_numpy(codes[:, n])].detach() for n in range(3)).requires_grad_()

    def decoded() -> Any:
        return torch.from_numpy(relu_net(net.decoder, total.detach().numpy()))

    # The numerical gradient at the decoder's input, summed over rows, equals that of the encoder's last bias.
    slope = np.array(
        [
            [difference(lambda: (x - decoded()).square().sum(1).mean(), total, (row, j)) for j in range(4)]
            for row in range(len(total))
        ]
    )
    np.testing.assert_allclose(net.encoder[-1][1].grad.numpy(), slope.sum(0), rtol=1e-5, atol=1e-7)


def vectors(n: int = 600, dim: int = 24) -> Floats:
    """Return vectors of length 1 around 6 x 6 planted centres."""
    rng = np.random.default_rng(0)
    far, near = rng.normal(size=(6, dim)), 0.5 * rng.normal(size=(6, dim))
    x = far[rng.integers(6, size=n)] + near[rng.integers(6, size=n)] + 0.1 * rng.normal(size=(n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def test_training_lowers_the_loss_and_uses_the_codes() -> None:
    x = vectors()
    result = fit_rqvae(x, SMALL.model_copy(update={"epochs": 60, "hidden": (32,), "dim": 8}), 3, 16, quiet=True)
    assert result.loss[1] < 0.5 * result.loss[0]
    assert result.error < 0.2
    codes = nearest_codes(encode_vectors(result.weights, x), result.codebooks)
    for level in range(3):
        assert len(np.unique(codes[:, level])) >= 0.8 * 16
    assert perplexity(np.bincount(codes[:, 0])) > 6


def test_weights_depend_on_the_seed() -> None:
    x = vectors(200)
    section = SMALL.model_copy(update={"epochs": 3})
    once, twice, other = (fit_rqvae(x, section, 2, 8, seed=seed, quiet=True) for seed in (1, 1, 2))
    np.testing.assert_array_equal(once.codebooks, twice.codebooks)
    for name, weight in once.weights.items():
        np.testing.assert_array_equal(weight, twice.weights[name])
    assert not np.array_equal(once.codebooks, other.codebooks)


def test_numpy_encoding_equals_torch() -> None:
    x = vectors(50)
    result = fit_rqvae(x, SMALL.model_copy(update={"epochs": 1, "hidden": (12, 9)}), 2, 4, quiet=True)
    layers = [(result.weights[f"encoder.{n}.weight"], result.weights[f"encoder.{n}.bias"]) for n in range(3)]
    h = torch.from_numpy(x)
    for n, (weight, bias) in enumerate(layers):
        h = torch.nn.functional.linear(h, torch.from_numpy(weight), torch.from_numpy(bias))
        h = torch.relu(h) if n < 2 else h
    np.testing.assert_allclose(encode_vectors(result.weights, x), h.numpy(), atol=1e-5)
    assert encode_vectors(result.weights, x).shape == (50, SMALL.dim)


def test_few_equal_vectors() -> None:
    result = fit_rqvae(np.ones((5, 6), np.float32), SMALL.model_copy(update={"epochs": 2}), 2, 16, quiet=True)
    assert np.isfinite(result.codebooks).all() and np.isfinite(result.error)


def test_first_codewords_are_residual_kmeans_of_the_first_batch() -> None:
    x = vectors(100)
    # A tiny learning rate keeps the first codewords.
    section = SMALL.model_copy(update={"epochs": 1, "batch": 100, "learning_rate": 1e-9})
    result = fit_rqvae(x, section, 2, 8, seed=5, quiet=True)
    rows = x[np.random.default_rng([5, 7]).permutation(100)]
    expected = residual_kmeans(encode_vectors(result.weights, rows), 2, 8, seed=5, iterations=10)
    np.testing.assert_allclose(result.codebooks, expected.codebooks, atol=1e-4)
