"""CTR models: formulas of their papers, and no use of held-out interactions."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

torch: Any = pytest.importorskip("torch")

from llmrec.baselines.parameters import create_baseline  # noqa: E402
from llmrec.baselines.profiles import SHARED_EXPERTS, Adaptor, gated_expert_sum  # noqa: E402
from llmrec.data.dataset import Dataset  # noqa: E402
from llmrec.data.features import Features, Provenance, publish  # noqa: E402
from llmrec.data.split import SplitDataset, split_dataset  # noqa: E402
from llmrec.errors import DataError, RecipeError  # noqa: E402
from llmrec.metrics.probability import auc  # noqa: E402
from llmrec.recipe.schema import Split  # noqa: E402
from llmrec.systems.ctr.fields import Attribute, FieldEncoder  # noqa: E402
from llmrec.systems.ctr.networks import (  # noqa: E402
    apply_attention_layer,
    apply_cross_layers,
    attend_to_history,
    sum_pairwise_products,
)
from llmrec.types import Event, Item, Probability, Request  # noqa: E402
from tests.facts import Facts, raises  # noqa: E402

HOSTS = ("din", "deepfm", "dcn", "autoint")
QUICK: dict[str, Any] = {"dim": 8, "hidden": "32", "epochs": 8, "patience": None, "learning_rate": 0.01, "batch": 256}
USERS, ITEMS, WIDTH = 120, 50, 3


@cache
def _planted() -> tuple[SplitDataset, Any, Any]:
    """Return ratings that depend on vectors of users and items, and the vectors."""
    rng = np.random.default_rng(0)
    users, items = rng.normal(size=(USERS, WIDTH)), rng.normal(size=(ITEMS, WIDTH))
    rows = []
    for user in range(USERS):
        for step, item in enumerate(rng.permutation(ITEMS)[:40].tolist()):
            yes = users[user] @ items[item] + 0.3 * rng.normal() > 0
            rows.append((f"u{user}", f"i{item}", 5.0 if yes else 1.0, float(step)))
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "rating", "timestamp"], orient="row")
    entries = {f"i{n}": Item(item_id=f"i{n}", title=f"T{n}", fields={"kind": f"k{n % 3}"}) for n in range(ITEMS)}
    data = Dataset(name="toy", noun="things", interactions=frame, items=entries, rating_scale=(1.0, 5.0))
    return split_dataset(data, Split(kind="last_share", valid=0.1, test=0.2), seed=1), users, items


def _store(folder: Path, users: Any, items: Any, **more: Any) -> str:
    provenance = Provenance(system="planted")
    publish(
        folder,
        [
            Features("user", [f"u{n}" for n in range(USERS)], users.astype(np.float32), provenance, **more),
            Features("item", [f"i{n}" for n in range(ITEMS)], items.astype(np.float32), provenance),
        ],
    )
    return str(folder)


def _auc(name: str, data: SplitDataset, **parameters: Any) -> float:
    host = create_baseline(name, QUICK | parameters, seed=0)
    host.fit(data)
    held = list(data.holdouts("test"))
    requests = [
        Request(id="r", user_id=h.user_id, item=h.item_id, history=data.history(h.user_id, "test")) for h in held
    ]
    answers = host.answer(requests)
    assert all(isinstance(answer, Probability) for answer in answers)
    return float(auc([a.value for a in answers], [float(float(h.rating or 0) >= 4) for h in held]))


@pytest.mark.parametrize(("name", "epochs"), [pytest.param("din", 8, marks=pytest.mark.slow), ("deepfm", 5)])
def test_informative_features_help_and_shuffled_ones_do_not(name: str, epochs: int, tmp_path: Path) -> None:
    data, users, items = _planted()
    folder = _store(tmp_path / "store", users, items)
    score = _auc(name, data, features=folder, epochs=epochs)
    assert score > 0.85
    # Shuffled vectors still identify users.
    assert score > _auc(name, data, features=folder, epochs=epochs, shuffled=True) + 0.05


def test_rows_seen_by_features_are_skipped_or_rejected(tmp_path: Path) -> None:
    data, users, items = _planted()
    pairs = list(data.train.select("user_id", "item_id").iter_rows())
    folder = _store(tmp_path / "store", users, items, seen={"u0": frozenset(pairs[:9])})
    host = create_baseline("deepfm", QUICK | {"features": folder, "epochs": 1}, seed=0)
    _, rows = FieldEncoder.of(data, "deepfm", liked=None, window=5, decay=0.8)
    adaptor = Adaptor.of((folder,), rows, 1.0, kinds=("user", "item"), shuffle=False, data=data)
    kept = host._unseen(data, adaptor, rows)
    assert len(kept) == len(rows) - 9
    assert set(pairs[:9]).isdisjoint(zip(kept.user_names.tolist(), kept.item_names.tolist(), strict=True))
    with raises(DataError, Facts("leak", says="9 of")):
        create_baseline("deepfm", QUICK | {"features": folder, "seen": "refuse"}, seed=0).fit(data)
    held = next(iter(data.test.select("user_id", "item_id").iter_rows()))
    folder = _store(tmp_path / "leak", users, items, seen={"u0": frozenset({held})})
    with raises(DataError, Facts("leak", says="held-out")):
        create_baseline("din", QUICK | {"features": folder}, seed=0).fit(data)
    folder = _store(tmp_path / "all", users, items, seen={"u0": frozenset(pairs)})
    with raises(DataError, Facts("leak", says="no example is left for training")):
        create_baseline("din", QUICK | {"features": folder}, seed=0).fit(data)


def test_missing_features_are_zero(tmp_path: Path) -> None:
    """The centred mean is rounding noise, which must not be normalised to length 1."""
    data, users, items = _planted()
    folder = _store(tmp_path / "store", users, items)
    _, rows = FieldEncoder.of(data, "din", liked=None, window=5, decay=0.8)
    adaptor = Adaptor.of((folder,), rows, 1.0, kinds=("user",), shuffle=False, data=data)
    vectors = adaptor.tables[0].vectors(["u0", "unknown"])
    assert np.linalg.norm(vectors[0]) == pytest.approx(1.0, abs=1e-6) and not vectors[1].any()


def test_rejects_features_of_another_split(tmp_path: Path) -> None:
    data, users, _ = _planted()
    provenance = Provenance(system="augment", split="of another split")
    publish(tmp_path, [Features("user", [f"u{n}" for n in range(USERS)], users, provenance)])
    with raises(DataError, Facts("mismatch", says="llmrec augment")):
        create_baseline("dcn", QUICK | {"features": str(tmp_path)}, seed=0).fit(data)


def test_first_order_term_of_deepfm() -> None:
    data, _, _ = _planted()
    host = create_baseline("deepfm", QUICK | {"epochs": 1}, seed=0)
    host.fit(data)
    fields, network = host._fitted.fields, host._fitted.network

    def log_odds(*items: str) -> list[float]:
        requests = [Request(id=item, user_id="u0", item=item, history=()) for item in items]
        return host._judge(network, fields, fields.encode(requests), []).tolist()  # type: ignore[no-any-return]

    items = list(fields.items)[:2]
    before = log_odds(*items)
    with torch.no_grad():
        network["item"].weight[fields.warm[fields.items[items[0]]], -1] += 0.5
    # It is added only for this item.
    assert log_odds(*items) == pytest.approx([before[0] + 0.5, before[1]], abs=1e-9)


@pytest.mark.parametrize("widths", ["", "64,x", "0"])
def test_rejects_malformed_widths(widths: str) -> None:
    with raises(RecipeError, Facts("bad-value", says="hidden")):
        create_baseline("deepfm", {"hidden": widths}, seed=0)


def test_rejects_store_without_the_side(tmp_path: Path) -> None:
    data, users, _ = _planted()
    publish(tmp_path, [Features("user", [f"u{n}" for n in range(USERS)], users, Provenance(system="x"))])
    with raises(DataError, Facts("missing-value", says="has only features of users")):
        create_baseline("dcn", QUICK | {"features": str(tmp_path), "sides": "item"}, seed=0).fit(data)


def test_training_rows_have_earlier_events_only() -> None:
    data, _, _ = _planted()
    fields, rows = FieldEncoder.of(data, "din", liked=None, window=4, decay=0.8)
    names = {number: item for item, number in fields.items.items()}
    frame = data.train.select("user_id", "item_id", "rating")
    for at in range(0, frame.height, 37):
        user, item, rating = frame.row(at)
        assert rows.user_names[at] == user and names[int(rows.items[at])] == item
        assert rows.truth[at] == float(rating >= 4)
        events = [row for row in frame.iter_rows() if row[0] == user]
        past = events[: events.index((user, item, rating))][-4:]
        shown = [names[int(number)] for number in rows.events[at] if number]
        assert shown == [row[1] for row in past]
        assert rows.liked[at][4 - len(past) :].tolist() == [int(row[2] >= 4) for row in past]


def test_requests_are_encoded_like_training_rows() -> None:
    data, _, _ = _planted()
    fields, rows = FieldEncoder.of(data, "din", liked=None, window=4, decay=0.8)
    user = data.train["user_id"][0]
    events = data.train_events(user)
    encoded = fields.encode([Request(id="r", user_id=user, item=events[6].item_id, history=events[:6])])
    assert np.array_equal(encoded.events[0], rows.events[6]) and np.array_equal(encoded.liked[0], rows.liked[6])
    assert encoded.items[0] == rows.items[6] and encoded.users[0] == rows.users[6]
    # Counts of the user are of earlier rows; counts of the item exclude the row itself.
    assert encoded.numbers[0, [0, 1, 5, 6]] == pytest.approx(rows.numbers[6, [0, 1, 5, 6]], abs=0.05)
    again = (*events[:6], Event(item_id=events[6].item_id, rating=5.0))
    repeated = fields.encode([Request(id="r", user_id=user, item=events[6].item_id, history=again)])
    assert np.array_equal(repeated.events[0], encoded.events[0])


def test_attributes_have_few_short_values() -> None:
    entries = [
        {"kind": "a, b", "text": f"a long text of its own that nobody else has {n}" * 3, "one": "x", "id": str(n)}
        for n in range(9)
    ]
    (kind,) = Attribute.all_of(entries)
    assert kind.name == "kind" and kind.of([{"kind": "b, zzz, a"}, {}]).tolist() == [[2, 1] + [0] * 6, [0] * 8]


def test_products_of_all_pairs() -> None:
    fields = torch.randn(3, 5, 4)
    slow = sum((fields[:, i] * fields[:, j]).sum(dim=1) for i in range(5) for j in range(i + 1, 5))
    assert torch.allclose(sum_pairwise_products(fields), slow, atol=1e-5)
    assert torch.allclose(sum_pairwise_products(fields[:, torch.randperm(5)]), slow, atol=1e-5)


def test_cross_layer_equals_its_formula() -> None:
    layers = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(2)])
    first = torch.randn(3, 4)
    values = first
    for layer in layers:
        rows = [first[row] * (layer.weight @ values[row] + layer.bias) + values[row] for row in range(3)]
        values = torch.stack(rows)
    assert torch.allclose(apply_cross_layers(layers, first), values, atol=1e-6)


def test_attention_depends_on_item_and_not_on_padding() -> None:
    weigh = torch.nn.Sequential(torch.nn.Linear(16, 5), torch.nn.PReLU(), torch.nn.Linear(5, 1))
    events, mask = torch.randn(2, 3, 4), torch.ones(2, 3)
    one, other = torch.randn(2, 4), torch.randn(2, 4)
    result = attend_to_history(weigh, one, events, mask)
    assert not torch.allclose(result, attend_to_history(weigh, other, events, mask))
    wide = torch.cat([torch.randn(2, 2, 4), events], dim=1)
    padded = attend_to_history(weigh, one, wide, torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0]] * 2))
    assert torch.allclose(result, padded, atol=1e-6)
    twice = attend_to_history(weigh, one, torch.cat([events, events], dim=1), torch.ones(2, 6))
    assert torch.allclose(twice, 2 * result, atol=1e-5)


def test_attention_with_identity_projections() -> None:
    block = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4, bias=False) for name in ("q", "k", "v", "keep")})
    with torch.no_grad():
        for name in ("q", "k", "v"):
            block[name].weight.copy_(torch.eye(4))
        block["keep"].weight.zero_()
    fields = torch.randn(2, 3, 4)
    mixed = torch.softmax(fields @ fields.transpose(1, 2), dim=-1) @ fields
    assert torch.allclose(apply_attention_layer(block, fields, 1), torch.relu(mixed), atol=1e-6)


def test_gates_and_shared_experts(tmp_path: Path) -> None:
    data, users, items = _planted()
    folder = _store(tmp_path / "store", users, items)
    _, rows = FieldEncoder.of(data, "din", liked=None, window=5, decay=0.8)
    adaptor = Adaptor.of((folder,), rows, 1.0, kinds=("user", "item"), shuffle=False, data=data)
    network = adaptor.build(8, 3)
    columns = adaptor.columns(rows.of(np.arange(7)))
    vectors = torch.from_numpy(columns[0].vectors[columns[0].entities])
    sums = torch.softmax(network["gates"][0](vectors), dim=1).sum(dim=1)
    assert torch.allclose(sums, torch.ones(7), atol=1e-6)
    gated_expert_sum(network, 0, vectors).sum().backward()
    assert all(p.grad is not None for expert in network["shared"] for p in expert.parameters())
    assert all(p.grad is None for p in network["own"][1].parameters())
    assert len(network["shared"]) == SHARED_EXPERTS
    # Whitening separates vectors that agree in most directions.
    assert abs(float(np.mean(columns[1].vectors @ columns[1].vectors.T)) - 1 / len(columns[1].vectors)) < 0.2


@pytest.mark.parametrize("name", HOSTS)
def test_every_field_learns(name: str, tmp_path: Path) -> None:
    data, users, items = _planted()
    host = create_baseline(name, QUICK | {"features": _store(tmp_path / "s", users, items), "user_id": True}, seed=0)
    fields, rows = FieldEncoder.of(data, name, liked=None, window=5, decay=0.8)
    adaptor = Adaptor.of(host.config.folders, rows, 1.0, kinds=("user", "item"), shuffle=False, data=data)
    network = host._network(fields, adaptor)
    some = rows.of(np.arange(64))
    host._forward(network, fields, some, adaptor.columns(some)).pow(2).sum().backward()
    silent = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert silent == []
