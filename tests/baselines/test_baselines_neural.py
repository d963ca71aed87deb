from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.baselines import neural
from llmrec.baselines.base import Catalogue, InteractionLog, WarmItems
from llmrec.baselines.gru4rec import GRU4Rec
from llmrec.baselines.sasrec import SASRec
from llmrec.data.split import SplitDataset, split_dataset
from llmrec.recipe.schema import Split
from llmrec.types import Request
from tests.baselines.trained import make_dataset, request

torch = pytest.importorskip("torch")
MODELS = (SASRec, GRU4Rec)


def _ring(items: int = 30, users: int = 150, length: int = 8, seed: int = 0) -> SplitDataset:
    """Every user walks a ring: after item i comes item i + 1."""
    starts = np.random.default_rng(seed).integers(0, items, users).tolist()
    rows = [
        (f"u{user:03d}", f"i{(start + step) % items:02d}", float(step))
        for user, start in enumerate(starts)
        for step in range(length)
    ]
    dataset = make_dataset(rows, "timestamp", {f"i{n:02d}": "t" for n in range(items)})
    return split_dataset(dataset, Split(kind="leave_one_out"), seed=0)


def _request(*items: int) -> Request:
    return request(f"i{item:02d}" for item in items)


def _tests(data: SplitDataset) -> tuple[list[Request], list[int]]:
    held_out = data.holdouts("test")
    requests = [Request(id=h.user_id, user_id=h.user_id, history=data.history(h.user_id, "test")) for h in held_out]
    return requests, [sorted(data.dataset.items).index(h.item_id) for h in held_out]


@pytest.mark.parametrize(("model_class", "negatives"), [(SASRec, None), (GRU4Rec, None), (SASRec, 10)])
def test_learns_a_planted_sequence(model_class: Any, negatives: int | None) -> None:
    data = _ring()
    options = {"dropout": 0.1, "learning_rate": 0.01, "batch": 64, "epochs": 20, "patience": None, "quiet": True}
    model = model_class(model_class.Config(dim=32, negatives=negatives, **options))
    model.fit(data)
    # Histories no longer than in training: later positions were not trained.
    requests, targets = _tests(data)
    requests = [replace(request, history=request.history[-5:]) for request in requests]
    assert np.mean(model.scores(requests).argmax(axis=1) == targets) > 0.95
    if negatives is None:
        forward, backward = model.scores([_request(4, 5, 6), _request(6, 5, 4)])
        assert forward.argmax() == 7 and backward.argmax() == 5


@pytest.mark.parametrize("model_class", MODELS)
def test_the_best_epoch_is_kept(model_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.1, 0.3, 0.2, 0.25, 0.05, 0.9])
    monkeypatch.setattr(neural, "mean_ndcgs", lambda *args: {"excluded": next(values)})
    model = model_class(model_class.Config(dim=8, epochs=6, patience=3, quiet=True))
    model.fit(_ring())
    assert model._model.epochs == 2
    # Two epochs without validation give the same weights.
    data = _ring()
    for patience, valid in ((None, data.valid), (1, data.valid.clear())):
        short = model_class(model_class.Config(dim=8, epochs=2, patience=patience, quiet=True))
        short.fit(replace(data, valid=valid))
        assert np.array_equal(model.scores([_request(3, 4)]), short.scores([_request(3, 4)]))
    assert next(values) == 0.9


def test_fit_keeps_the_global_random_state() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    SASRec(SASRec.Config(dim=8, epochs=1, patience=None, quiet=True)).fit(_ring())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("model_class", MODELS)
def test_positions_depend_on_themselves_and_earlier_ones(model_class: Any) -> None:
    model = model_class(model_class.Config(dim=8, quiet=True))
    network = model._build(20).eval()
    items = torch.tensor([[3, 5, 7, 9, 11]])
    expected = model._encode(network, items)
    for position in range(5):
        changed = items.clone()
        changed[0, position] = 1
        moved = (model._encode(network, changed) - expected).abs().amax(-1)[0]
        assert moved[:position].max() < 1e-6 if position else True
        assert moved[position] > 1e-6
        # So padding on the right changes nothing.
        cut = model._encode(network, items[:, : position + 1])
        assert torch.allclose(cut, expected[:, : position + 1], atol=1e-6)


@pytest.mark.parametrize("model_class", MODELS)
def test_history_is_cut_to_max_len(model_class: Any) -> None:
    model = model_class(model_class.Config(dim=8, max_len=3, epochs=1, patience=None, quiet=True))
    model.fit(_ring())
    long, short, other = model.scores([_request(9, 8, 1, 2, 3), _request(1, 2, 3), _request(8, 2, 3)])
    np.testing.assert_allclose(long, short, atol=1e-6)
    assert np.abs(short - other).max() > 1e-6


@given(
    lengths=st.lists(st.integers(0, 23), min_size=1, max_size=12), longest=st.integers(1, 7), size=st.integers(1, 30)
)
def test_each_step_is_a_target_once(lengths: list[int], longest: int, size: int) -> None:
    users = np.repeat(np.arange(len(lengths)), lengths)
    # Each event has a different item, which identifies its position.
    events = InteractionLog(users=users, items=np.arange(len(users)), times=users * 0.0, user_count=len(lengths))
    sequences = neural.training_segments(events, longest)
    assert all(2 <= len(items) <= longest + 1 for items in sequences)
    seen = []
    for batch in neural.training_batches(sequences, size, np.random.default_rng(0)):
        assert batch.items.shape == batch.targets.shape
        kept = batch.targets >= 0
        assert kept[:, 0].all() and (kept.sum() <= size or len(kept) == 1)
        seen += list(zip(batch.items[kept].tolist(), batch.targets[kept].tolist(), strict=True))
    expected = [
        (position, position + 1) for position in range(len(users) - 1) if users[position] == users[position + 1]
    ]
    assert sorted(seen) == expected


def test_batches_are_shuffled_with_little_padding() -> None:
    rng = np.random.default_rng(1)
    sequences = [np.arange(n) for n in rng.integers(2, 40, 2000)]
    first, second = (list(neural.training_batches(sequences, 256, np.random.default_rng(seed))) for seed in (0, 1))
    assert [b.items.shape for b in first] != [b.items.shape for b in second]
    padded = sum(batch.targets.size for batch in first)
    assert sum(len(items) - 1 for items in sequences) > 0.97 * padded


def _vectors(n: int, items: int, dim: int = 6) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(n)
    tensors = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((n, dim), (items, dim)))
    return *tensors, torch.randint(0, items, (n,), generator=generator)


@pytest.mark.parametrize("cells", [100, 1 << 19])
def test_full_loss_and_gradients_equal_cross_entropy(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neural, "_BLOCK_LOGITS", cells)
    vectors, table, targets = _vectors(11, 30)
    loss, of_vectors, of_table = neural.full_softmax_loss(vectors, table, targets)
    vectors.requires_grad_(True)
    table.requires_grad_(True)
    expected = torch.nn.functional.cross_entropy(vectors @ table.T, targets)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), abs=1e-12)
    assert torch.allclose(of_vectors, vectors.grad, atol=1e-12)
    assert torch.allclose(of_table, table.grad, atol=1e-12)


def test_bfloat16_products_change_loss_and_gradients_by_rounding_only() -> None:
    vectors, table, targets = (each.float() if each.is_floating_point() else each for each in _vectors(64, 300, dim=32))
    loss, *gradients = neural.full_softmax_loss(vectors, table, targets)
    rough, *others = neural.full_softmax_loss(vectors, table, targets, half=True)
    assert rough == pytest.approx(loss, rel=5e-3) and rough != loss
    for exact, rounded in zip(gradients, others, strict=True):
        assert rounded.dtype == torch.float32
        assert (rounded - exact).norm() < 0.01 * exact.norm()


def _warm(popular: list[int]) -> WarmItems:
    ids = tuple(f"i{n:02d}" for n in range(len(popular)))
    catalogue = Catalogue(ids=ids, index={item: index for index, item in enumerate(ids)})
    items = np.repeat(np.arange(len(popular)), popular)
    return WarmItems.of(InteractionLog(users=items * 0, items=items, times=items * 0.0, user_count=1), catalogue)


def test_sampled_loss_and_gradients_equal_a_sampled_softmax() -> None:
    vectors, table, targets = _vectors(9, 12)
    popular = [5, 1, 1, 2, 9, 1, 3, 1, 1, 4, 1, 2]
    loss, of_vectors, of_table = neural._SampledSoftmaxLoss(_warm(popular), 7, seed=4)(vectors, table, targets)
    probabilities = np.array(popular) / sum(popular)
    drawn = np.random.default_rng([4, 1]).choice(12, size=7, p=probabilities)
    vectors.requires_grad_(True)
    table.requires_grad_(True)
    total = torch.zeros((), dtype=torch.float64)
    for vector, target in zip(vectors, targets.tolist(), strict=True):
        others = [vector @ table[j] - math.log(7 * probabilities[j]) for j in drawn.tolist() if j != target]
        total = total - (vector @ table[target]) + torch.logsumexp(torch.stack([vector @ table[target], *others]), 0)
    (total / len(targets)).backward()
    assert loss == pytest.approx(float(total.detach()) / len(targets), abs=1e-12)
    assert torch.allclose(of_vectors, vectors.grad, atol=1e-12)
    assert torch.allclose(of_table, table.grad, atol=1e-12)
