from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.baselines import neural
from llmrec.baselines.base import Catalogue, Log, Warm
from llmrec.baselines.gru4rec import GRU4Rec
from llmrec.baselines.sasrec import SASRec
from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset, split
from llmrec.recipe.schema import Split
from llmrec.types import Event, Item, Request

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
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    catalogue = {f"i{n:02d}": Item(item_id=f"i{n:02d}", title="t") for n in range(items)}
    whole = Dataset(name="ring", noun="things", interactions=frame, items=catalogue)
    return split(whole, Split(kind="leave_one_out"), seed=0)


def _request(*items: int) -> Request:
    return Request(id="r", user_id="nobody", history=tuple(Event(item_id=f"i{item:02d}") for item in items))


def _tests(data: SplitDataset) -> tuple[list[Request], list[int]]:
    held = data.holdouts("test")
    requests = [Request(id=h.user_id, user_id=h.user_id, history=data.history(h.user_id, "test")) for h in held]
    return requests, [sorted(data.dataset.items).index(h.item_id) for h in held]


# ------------------------------------------------------------------ they learn


@pytest.mark.parametrize("negatives", [None, 10])
@pytest.mark.parametrize("made", MODELS)
def test_a_planted_sequence_is_learned(made: Any, negatives: int | None) -> None:
    data = _ring()
    # No early stop: among items that the user has not seen, a network of one epoch is right already.
    chosen = {"dropout": 0.1, "learning_rate": 0.01, "batch": 64, "epochs": 20, "patience": None, "quiet": True}
    model = made(made.Config(dim=32, negatives=negatives, **chosen))
    model.fit(data)
    # As long as what was trained on: nothing was learned about later positions.
    requests, targets = _tests(data)
    requests = [replace(request, history=request.history[-5:]) for request in requests]
    assert np.mean(model.scores(requests).argmax(axis=1) == targets) > 0.95


@pytest.mark.parametrize("made", MODELS)
def test_the_order_of_the_history_counts(made: Any) -> None:
    model = made(made.Config(dim=32, dropout=0.1, learning_rate=0.01, batch=64, epochs=12, patience=None, quiet=True))
    model.fit(_ring())
    forth, back = model.scores([_request(4, 5, 6), _request(6, 5, 4)])
    assert forth.argmax() == 7 and back.argmax() == 5


@pytest.mark.parametrize("made", MODELS)
def test_the_best_epoch_is_kept(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.1, 0.3, 0.2, 0.25, 0.05, 0.9])
    monkeypatch.setattr(neural, "mean_ndcgs", lambda *args: {"excluded": next(values)})
    model = made(made.Config(dim=8, epochs=6, patience=3, quiet=True))
    model.fit(_ring())
    assert model._model.epochs == 2
    # Two epochs and no look at the validation split give the same weights.
    short = made(made.Config(dim=8, epochs=2, patience=None, quiet=True))
    short.fit(_ring())
    assert np.array_equal(model.scores([_request(3, 4)]), short.scores([_request(3, 4)]))
    assert next(values) == 0.9


def test_a_split_without_validation_trains_all_epochs() -> None:
    data = _ring()
    model = SASRec(SASRec.Config(dim=8, epochs=2, patience=1, quiet=True))
    model.fit(replace(data, valid=data.valid.clear()))
    assert model._model is not None and model._model.epochs == 2


@pytest.mark.parametrize("made", MODELS)
def test_the_callers_random_stream_stays_where_it_was(made: Any) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    made(made.Config(dim=8, epochs=1, patience=None, quiet=True)).fit(_ring())
    assert torch.equal(torch.rand(3), expected)


# ------------------------------------------------------------------ no position sees what follows it


@pytest.mark.parametrize("made", MODELS)
def test_positions_see_themselves_and_what_was_before(made: Any) -> None:
    model = made(made.Config(dim=8, quiet=True))
    network = model._build(20).eval()
    items = torch.tensor([[3, 5, 7, 9, 11]])
    whole = model._encode(network, items)
    for place in range(5):
        changed = items.clone()
        changed[0, place] = 1
        moved = (model._encode(network, changed) - whole).abs().amax(-1)[0]
        assert moved[:place].max() < 1e-6 if place else True
        assert moved[place] > 1e-6
        # So padding on the right changes nothing.
        cut = model._encode(network, items[:, : place + 1])
        assert torch.allclose(cut, whole[:, : place + 1], atol=1e-6)


@pytest.mark.parametrize("made", MODELS)
def test_only_the_last_items_are_seen(made: Any) -> None:
    model = made(made.Config(dim=8, max_len=3, epochs=1, patience=None, quiet=True))
    model.fit(_ring())
    long, short, other = model.scores([_request(9, 8, 1, 2, 3), _request(1, 2, 3), _request(8, 2, 3)])
    np.testing.assert_allclose(long, short, atol=1e-6)
    assert np.abs(short - other).max() > 1e-6


# ------------------------------------------------------------------ batches


@given(
    lengths=st.lists(st.integers(0, 23), min_size=1, max_size=12), longest=st.integers(1, 7), size=st.integers(1, 30)
)
def test_every_step_of_every_sequence_is_a_target_once(lengths: list[int], longest: int, size: int) -> None:
    users = np.repeat(np.arange(len(lengths)), lengths)
    # Every event is an item of its own, so that a step names its place.
    events = Log(users=users, items=np.arange(len(users)), times=users * 0.0, user_count=len(lengths))
    sequences = neural.pieces_of(events, longest)
    assert all(2 <= len(items) <= longest + 1 for items in sequences)
    seen = []
    for batch in neural.batches_of(sequences, size, np.random.default_rng(0)):
        assert batch.items.shape == batch.targets.shape
        kept = batch.targets >= 0
        assert kept[:, 0].all() and (kept.sum() <= size or len(kept) == 1)
        seen += list(zip(batch.items[kept].tolist(), batch.targets[kept].tolist(), strict=True))
    expected = [(place, place + 1) for place in range(len(users) - 1) if users[place] == users[place + 1]]
    assert sorted(seen) == expected


def test_batches_are_shuffled_and_hold_hardly_any_padding() -> None:
    rng = np.random.default_rng(1)
    sequences = [np.arange(n) for n in rng.integers(2, 40, 2000)]
    first, second = (list(neural.batches_of(sequences, 256, np.random.default_rng(seed))) for seed in (0, 1))
    assert [b.items.shape for b in first] != [b.items.shape for b in second]
    padded = sum(batch.targets.size for batch in first)
    assert sum(len(items) - 1 for items in sequences) > 0.97 * padded


# ------------------------------------------------------------------ losses


def _vectors(n: int, items: int, dim: int = 6) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(n)
    made = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((n, dim), (items, dim)))
    return *made, torch.randint(0, items, (n,), generator=generator)


@pytest.mark.parametrize("cells", [1, 100, 1 << 19])
def test_the_full_loss_and_its_gradients_are_those_of_cross_entropy(
    cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neural, "_CELLS", cells)
    vectors, table, targets = _vectors(11, 30)
    loss, of_vectors, of_table = neural.over_all(vectors, table, targets)
    vectors.requires_grad_(True)
    table.requires_grad_(True)
    expected = torch.nn.functional.cross_entropy(vectors @ table.T, targets)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), abs=1e-12)
    assert torch.allclose(of_vectors, vectors.grad, atol=1e-12)
    assert torch.allclose(of_table, table.grad, atol=1e-12)


def test_products_in_bfloat16_give_the_same_loss_and_gradients_but_for_their_rounding() -> None:
    vectors, table, targets = (each.float() if each.is_floating_point() else each for each in _vectors(64, 300, dim=32))
    loss, *gradients = neural.over_all(vectors, table, targets)
    rough, *others = neural.over_all(vectors, table, targets, half=True)
    assert rough == pytest.approx(loss, rel=5e-3) and rough != loss
    for exact, rounded in zip(gradients, others, strict=True):
        assert rounded.dtype == torch.float32
        assert (rounded - exact).norm() < 0.01 * exact.norm()


def _warm(popular: list[int]) -> Warm:
    ids = tuple(f"i{n:02d}" for n in range(len(popular)))
    catalogue = Catalogue(ids=ids, index={item: place for place, item in enumerate(ids)})
    items = np.repeat(np.arange(len(popular)), popular)
    return Warm.of(Log(users=items * 0, items=items, times=items * 0.0, user_count=1), catalogue)


def test_the_sampled_loss_and_its_gradients_are_those_of_the_drawn_softmax() -> None:
    vectors, table, targets = _vectors(9, 12)
    popular = [5, 1, 1, 2, 9, 1, 3, 1, 1, 4, 1, 2]
    loss, of_vectors, of_table = neural._Sampled(_warm(popular), 7, seed=4)(vectors, table, targets)
    chance = np.array(popular) / sum(popular)
    drawn = np.random.default_rng([4, 1]).choice(12, size=7, p=chance)
    vectors.requires_grad_(True)
    table.requires_grad_(True)
    total = torch.zeros((), dtype=torch.float64)
    for vector, target in zip(vectors, targets.tolist(), strict=True):
        others = [vector @ table[j] - math.log(7 * chance[j]) for j in drawn.tolist() if j != target]
        total = total - (vector @ table[target]) + torch.logsumexp(torch.stack([vector @ table[target], *others]), 0)
    (total / len(targets)).backward()
    assert loss == pytest.approx(float(total.detach()) / len(targets), abs=1e-12)
    assert torch.allclose(of_vectors, vectors.grad, atol=1e-12)
    assert torch.allclose(of_table, table.grad, atol=1e-12)


def test_the_correction_makes_the_drawn_sum_the_full_sum_in_expectation() -> None:
    """One vector: exp(-loss) is exp(own) over the estimated sum, whose mean over many draws is the full sum."""
    vectors, table, targets = _vectors(1, 12)
    sampled = neural._Sampled(_warm([30, 1, 1, 2, 9, 1, 3, 1, 1, 4, 1, 2]), 400, seed=0)
    own = float(torch.exp(vectors[0] @ table[targets[0]]))
    sums = [own * math.exp(sampled(vectors, table, targets)[0]) for _ in range(400)]
    full = float(torch.exp(vectors @ table.T).sum())
    error = np.std(sums) / math.sqrt(len(sums))
    assert abs(np.mean(sums) - full) < 4 * error and error < 0.02 * full


@pytest.mark.parametrize("settings_", [{"dim": 9}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_settings_out_of_range_are_errors(settings_: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"dim must be a multiple of heads|dropout"):
        SASRec(SASRec.Config(**settings_))
    if "dropout" in settings_:
        with pytest.raises(ValueError, match="dropout"):
            GRU4Rec(GRU4Rec.Config(**settings_))
