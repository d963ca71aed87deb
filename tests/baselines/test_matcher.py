"""The text matcher: attention that knows neither padding nor order, and learns which items of a history count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest

from llmrec.baselines.content import Content
from llmrec.baselines.matcher import TextMatcher, attended, weights
from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset, split
from llmrec.recipe.schema import Split
from llmrec.types import Event, Item, Request

torch = pytest.importorskip("torch")

WORDS = ("anvil", "banjo", "candle", "drum", "engine", "feather")
SETTINGS = {"dim": 16, "dropout": 0.0, "learning_rate": 0.02, "batch": 64, "epochs": 8, "patience": None, "quiet": True}


def _data() -> SplitDataset:
    """Every second item is a signal, all of one word; the items between have words of their own."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(150):
        word, noise = int(rng.integers(len(WORDS))), rng.permutation(24)[:3].tolist()
        pairs = zip(noise, rng.permutation(3).tolist(), strict=True)
        mixed = [item for n, k in pairs for item in (f"n{n}", f"s{word}{k}")]
        rows += [(f"u{user:03d}", item, float(step)) for step, item in enumerate(mixed)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    counted = ("one", "two", "three", "four")
    titles = {f"n{n}": f"pebble {WORDS[n % 6]} {counted[n // 6]}" for n in range(24)}
    titles |= {f"s{n}{k}": f"signal {word} {counted[k]}" for n, word in enumerate(WORDS) for k in range(3)}
    items = {each: Item(item_id=each, title=title) for each, title in titles.items()}
    whole = Dataset(name="signals", noun="things", interactions=frame, items=items)
    none = frame.clear()
    return SplitDataset(whole, "leave_one_out", 0, whole.interactions, none, none, frozenset())


def _fitted(data: SplitDataset, **settings: Any) -> TextMatcher:
    model = TextMatcher(TextMatcher.Config(**(SETTINGS | settings)), seed=3)
    model.fit(data)
    return model


def _scores(model: Any, *histories: tuple[str, ...]) -> np.ndarray[Any, Any]:
    asked = [Request(id="r", user_id="u", history=tuple(Event(item_id=item) for item in each)) for each in histories]
    return np.asarray(model.scores(asked))


@pytest.mark.parametrize("heads", [0, 4])
def test_neither_padding_nor_order_moves_a_score(heads: int) -> None:
    model = _fitted(_data(), heads=heads, epochs=1)
    short, long = ("n1", "s10"), ("n2", "n3", "s20", "n4", "n5", "n6", "n7")
    together = _scores(model, short, long)
    assert np.allclose(together[0], _scores(model, short)[0], atol=1e-5)
    assert np.allclose(together, _scores(model, short[::-1], long[::-1]), atol=1e-5)
    assert not np.allclose(together[0], together[1], atol=1e-2)


def test_weights_are_shares_of_what_is_there() -> None:
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(3, 4, 6, generator=generator)
    mask = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    found = weights(torch.nn.Linear(6, 1), items, mask)
    assert torch.allclose(found.sum(dim=1), torch.tensor([1.0, 1.0, 0.0]))
    assert (found[~mask] == 0).all() and (found[mask] > 0).all()


def test_attention_is_that_of_a_double_loop() -> None:
    torch.manual_seed(0)
    dim, heads = 6, 2
    network = torch.nn.ModuleDict({name: torch.nn.Linear(dim, dim, bias=False) for name in ("query", "key", "value")})
    items, mask = torch.randn(1, 3, dim), torch.tensor([[True, True, False]])
    with torch.no_grad():
        found = attended(network, items, mask, heads)[0].numpy()
        query, key, value = (network[name](items)[0].numpy() for name in ("query", "key", "value"))
    for head in range(heads):
        part = slice(head * 3, head * 3 + 3)
        for one in range(2):
            powers = [np.exp(query[one, part] @ key[other, part] / np.sqrt(3)) for other in range(2)]
            wanted = sum(power * value[other, part] for other, power in enumerate(powers)) / sum(powers)
            assert np.allclose(found[one, part], wanted, atol=1e-5)


def test_before_training_it_ranks_as_content_without_fading() -> None:
    data = _data()
    # As long as the vectors are, so that the map keeps all likenesses.
    model = _fitted(data, heads=0, dim=128, epochs=1, learning_rate=1e-12)
    plain = Content(Content.Config(decay=1.0, history=10, whitening=0.5))
    plain.fit(data)
    history = ("n1", "n2", "s10")
    ours, theirs = _scores(model, history)[0], _scores(plain, history)[0]
    assert np.corrcoef(ours, theirs)[0, 1] > 0.9999


def _words_found(model: TextMatcher) -> int:
    """How many of the three best signals have the word of the signal in the history, over all words."""
    signals, right = [place for place, item in enumerate(model.items) if item[0] == "s"], 0
    for word in range(len(WORDS)):
        others = tuple(f"n{(word + far) % 6 + 6}" for far in (1, 2, 2, 3))
        scores = _scores(model, (*others[:2], f"s{word}0", *others[2:]))[0][signals]
        right += sum(model.items[signals[place]][1] == str(word) for place in np.argsort(-scores)[:3])
    return right


def test_it_learns_which_items_of_a_history_count() -> None:
    data = _data()
    # The words of the others mislead whoever weighs all alike.
    learned, alike = _words_found(_fitted(data, heads=0)), _words_found(_fitted(data, heads=0, learning_rate=1e-12))
    assert learned >= 17 and alike <= 13


def test_a_history_without_a_known_item_is_left_to_popularity() -> None:
    model = _fitted(_data(), epochs=1)
    scores = _scores(model, ("no such item",), ())
    assert np.isfinite(scores).all() and np.array_equal(scores[0], scores[1])
    assert scores[0].max() == 1


def test_validation_users_who_choose_the_epoch_are_named() -> None:
    data = split(_data().dataset, Split(kind="leave_one_out"), seed=0)
    assert _fitted(data, epochs=1).looked_at == frozenset()
    assert _fitted(data, epochs=2, patience=1).looked_at == frozenset(data.valid["user_id"].to_list())


def test_another_seed_gives_other_maps_and_the_same_seed_the_same() -> None:
    one, two = _fitted(_data(), epochs=1), _fitted(_data(), epochs=1)
    assert np.array_equal(_scores(one, ("n1",)), _scores(two, ("n1",)))
    other = TextMatcher(TextMatcher.Config(**(SETTINGS | {"epochs": 1})), seed=4)
    other.fit(_data())
    assert not np.array_equal(_scores(one, ("n1",)), _scores(other, ("n1",)))


def test_without_any_text_it_says_the_same_of_all_items() -> None:
    data = _data()
    items = {item: Item(item_id=item, title="thing") for item in data.dataset.items}
    assert np.ptp(_scores(_fitted(replace(data, dataset=replace(data.dataset, items=items)), epochs=1), ("n1",))) == 0
