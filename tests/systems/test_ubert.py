"""U-BERT: the reviews that it reads, its parts by hand, transfer, stored fits and features."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from llmrec.baselines.rated import training_ratings
from llmrec.data.dataset import Dataset, Review
from llmrec.data.features import FeatureStore, publish
from llmrec.data.split import SplitDataset, split_dataset, split_validation_users
from llmrec.errors import DataError, ModelError, RecipeError
from llmrec.recipe.schema import Split
from llmrec.systems.ctr.networks import DeepFM
from llmrec.systems.ubert.baseline import UBert, _train_epoch
from llmrec.systems.ubert.network import (
    ReviewModel,
    create_network,
    encode_entities,
    match_tokens,
    scaled_dot_attention,
)
from llmrec.systems.ubert.pretrain import MaskedTexts, last_pair_ratings, opinion_words
from llmrec.systems.ubert.reviews import FrozenEncoder, Reviews, Tokens
from llmrec.types import Item, Rating, Request
from tests.encoders import tiny_encoder
from tests.facts import Facts, raises

torch = pytest.importorskip("torch")

OPINIONS = {"great": 5.0, "fine": 4.0, "dull": 2.0, "awful": 1.0}
SMALL: dict[str, Any] = {
    "dim": 8,
    "tokens": 24,
    "reviews": 4,
    "batch": 16,
    "epochs": 2,
    "patience": None,
    "quiet": True,
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the tiny encoder with a mask token."""
    from transformers import AutoTokenizer, BertModel

    folder = tmp_path_factory.mktemp("masking")
    BertModel.from_pretrained(tiny_encoder()).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder())
    tokenizer.mask_token = "<|im_end|>"
    tokenizer.save_pretrained(folder)
    return str(folder)


@cache
def _data(name: str = "planted", kind: str = "last_share") -> SplitDataset:
    """Return 16 users and 10 items that are great, fine, dull or awful; one user has two equal reviews."""
    rng, words, rows = np.random.default_rng(0), list(OPINIONS), []
    for user in range(16):
        for step, item in enumerate(rng.permutation(10)[:7].tolist()):
            word = words[item % 4]
            text = f"Title {user} of {item}: it is {word}"
            rows.append((f"u{user:02d}", f"i{item}", OPINIONS[word], float(step), text))
    for item in (8, 9):
        rows = [row for row in rows if row[:2] != ("u00", f"i{item}")]
        rows.append(("u00", f"i{item}", 3.0, item - 20.0, "the same again"))
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "rating", "timestamp", "text"], orient="row")
    items = {f"i{n}": Item(item_id=f"i{n}", title=f"Title {n}") for n in range(10)}
    dataset = Dataset(name=name, noun="things", interactions=frame, items=items, rating_scale=(1.0, 5.0))
    return split_dataset(dataset, Split(kind=kind, valid=0.15, test=0.15), seed=0)


def _model(encoder: str, **settings: Any) -> UBert:
    return UBert(UBert.Config(**(SMALL | {"encoder": encoder} | settings)), seed=3)


@pytest.fixture(scope="module")
def fitted(encoder: str) -> UBert:
    model = _model(encoder, epochs=20, learning_rate=0.02, patience=8, dropout=0.0)
    model.fit(_data())
    return model


def _requests(*pairs: tuple[str, str]) -> list[Request]:
    return [Request(id=f"{user} {item}", user_id=user, item=item) for user, item in pairs]


def _values(model: UBert, *pairs: tuple[str, str]) -> list[float]:
    answers = model.answer(_requests(*pairs))
    assert all(isinstance(answer, Rating) for answer in answers)
    return [answer.value for answer in answers if isinstance(answer, Rating)]


def test_batches_do_not_read_reviews_of_their_pairs(encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _data()
    model = _model(encoder)._initial(data)
    reviews = {(user, item): text for user, item, text in data.train.select("user_id", "item_id", "text").iter_rows()}
    users, items = list(model.known.user_index), list(model.known.item_index)
    pairs, read = list[tuple[str, str]](), list[list[set[str]]]()
    forward, positions = ReviewModel.forward, Tokens.positions

    def watched(self: ReviewModel, of: Any, to: Any) -> Any:
        pairs.extend((users[u], items[i]) for u, i in zip(of, to, strict=True))
        return forward(self, of, to)

    def noted(self: Tokens, rows: Any) -> Any:
        read.append([{model.reviews.texts[row] for row in each} for each in rows])
        return positions(self, rows)

    monkeypatch.setattr(ReviewModel, "forward", watched)
    monkeypatch.setattr(Tokens, "positions", noted)
    optimiser = torch.optim.AdamW(model.network.parameters())
    _train_epoch(model, optimiser, np.random.default_rng(0))
    # A batch reads the reviews of its users, then of its items.
    of_users = [each for batch in read[::2] for each in batch]
    of_items = [each for batch in read[1::2] for each in batch]
    assert sorted(pairs) == sorted(reviews) and len(of_users) == len(of_items) == len(pairs)
    for pair, *sides in zip(pairs, of_users, of_items, strict=True):
        for side in sides:
            assert reviews[pair] not in side and side <= set(reviews.values())
        # It reads the other recent reviews of the user, and those of the item by others.
        others = [text for (user, _), text in reviews.items() if user == pair[0] and text != reviews[pair]]
        assert len(sides[0]) == min(4, len(others))
        assert all(text.startswith(f"Title {int(pair[0][1:])} ") or text == "the same again" for text in sides[0])
    held = set(data.dataset.interactions["text"]) - set(reviews.values())
    assert held and held.isdisjoint(model.reviews.texts)


def test_predictions_do_not_depend_on_the_review_of_the_pair(encoder: str) -> None:
    model = _model(encoder)._initial(_data())
    reviews, tokens = model.reviews, model.tokens
    row = 20
    tokens.values[tokens.starts[row] : tokens.starts[row + 1]] = torch.nan
    user, item = reviews.users[[row]], reviews.items[[row]]
    assert np.isfinite(model.rate(user, item)).all()
    others = np.setdiff1d(np.arange(10), reviews.items[reviews.of["user"][user[0]]])[:1]
    model.config = model.config.model_copy(update={"reviews": 99})
    assert np.isnan(model.rate(user, others)).all()


def test_reviews_of_a_source_come_before_the_texts_of_a_task(encoder: str) -> None:
    data = _data()
    pairs = list(data.train.select("user_id", "item_id").iter_rows())[:5]
    reviews = {pair: Review(text=f"full {number}") for number, pair in enumerate(pairs)}
    data = replace(data, dataset=replace(data.dataset, reviews=reviews))
    known = training_ratings(data, "ubert")
    assert sorted(Reviews.read(data, known, range).texts) == [f"full {number}" for number in range(5)]
    with raises(DataError, Facts("missing-column", column="text")):
        bare = data.train.with_columns(pl.lit(None, dtype=pl.String).alias("text"))
        Reviews.read(replace(data, dataset=replace(data.dataset, reviews={}), train=bare), known, range)


def test_uniform_attention_is_the_mean() -> None:
    tokens, mask = torch.randn(2, 5, 8), torch.tensor([[True] * 3 + [False] * 2, [False] * 5])
    network = create_network(4, 6, 6, UBert.Config(**SMALL))
    side = network["user"]
    for part in ("query", "domain"):
        for parameter in side[part].parameters():
            torch.nn.init.zeros_(parameter)
    result = encode_entities(side, torch.tensor([1, 2]), tokens, mask)
    torch.testing.assert_close(result, torch.stack([tokens[0, :3].mean(dim=0), torch.zeros(8)]))
    query = torch.randn(2, 1, 8)
    weights = torch.softmax((query[0] @ tokens[0, :3].T) / 8**0.5, dim=1)
    torch.testing.assert_close(scaled_dot_attention(query, tokens, tokens, mask)[0], weights @ tokens[0, :3])
    # Padding and sides without tokens change nothing.
    both = match_tokens(network["match"], tokens, mask, tokens.flip(0), mask.flip(0))
    torch.testing.assert_close(both, torch.zeros(2, 16))
    longer = torch.cat([tokens, torch.randn(2, 3, 8)], dim=1)
    wider = torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    one = match_tokens(network["match"], tokens[:1], mask[:1], tokens[:1], mask[:1])
    torch.testing.assert_close(match_tokens(network["match"], longer[:1], wider[:1], tokens[:1], mask[:1]), one)


def test_only_words_of_the_lexicon_are_masked(encoder: str) -> None:
    data = _data()
    frozen = FrozenEncoder(encoder, data, 24)
    texts = ["Great, awful and dull.", "greatness is no opinion", "It is fine", "so fine " * 30]
    plain, spans = frozen.tokens(texts)
    assert frozen.mask is not None
    words = ("awful", "dull", "fine", "great")
    for share in (0.3, 1.0):
        hidden = MaskedTexts.of(texts, plain, spans, words, mask=frozen.mask, share=share, rng=np.random.default_rng(0))
        for row, text in enumerate(texts):
            rows = hidden.texts == row
            changed = [n for n, (a, b) in enumerate(zip(plain[row], hidden.encoded[row], strict=True)) if a != b]
            masked = "".join(text[start:end] for start, end in (spans[row][n] for n in changed)).lower()
            # The masked letters are those of the target words.
            assert masked.replace(" ", "") == "".join(words[word] for word in hidden.words[rows])
            assert all(hidden.encoded[row][n] == frozen.mask for n in changed)
            assert rows.any() == (row != 1)
        assert (hidden.texts == 0).sum() == 3 or share < 1
    # The first token of each word, in the numbering of states.
    states = frozen.states(hidden.encoded, spans)
    assert (hidden.positions < np.diff(states.starts)[hidden.texts]).all()


def test_opinion_words(encoder: str, tmp_path: Path) -> None:
    data = _data()
    texts, truth = data.train["text"].to_list(), data.train["rating"].to_numpy()
    assert set(OPINIONS) >= set(opinion_words(UBert.Config(opinions=3), texts, truth)) - {"the", "same", "again"}
    (tmp_path / "words.txt").write_text("Great\nawful\n\nnot a word\n", encoding="utf-8")
    config = UBert.Config(lexicon=str(tmp_path / "words.txt"))
    assert opinion_words(config, texts, truth) == ("awful", "great")
    with raises(RecipeError, Facts("unreadable", column="lexicon")):
        opinion_words(UBert.Config(lexicon=str(tmp_path / "none.txt")), texts, truth)
    with pytest.raises(ValueError, match="no token embeddings"):
        UBert.Config(encoder="lsa")
    with raises(ModelError, Facts("unsupported", column="pretrain")):
        _model(tiny_encoder(), pretrain=1).pretrained(data)


def test_learns_from_reviews_of_an_item(fitted: UBert) -> None:
    data = _data()
    truth = data.test["rating"].to_numpy()
    predictions = np.array(_values(fitted, *data.test.select("user_id", "item_id").iter_rows()))
    mean = float(data.train["rating"].mean())  # type: ignore[arg-type]
    assert np.sqrt(np.mean((predictions - truth) ** 2)) < 0.7 * np.sqrt(np.mean((mean - truth) ** 2))
    assert fitted.looked_at == set(data.valid["user_id"].to_list())


def test_unknown_users_are_the_mean(fitted: UBert) -> None:
    model = fitted._fitted
    with torch.no_grad():
        for side, pair in (("user", (-1, 2)), ("item", (2, -1))):
            vector = model.side(side, *(np.array([each]) for each in pair))[0][0]  # type: ignore[arg-type]
            torch.testing.assert_close(vector, model.vectors(side).mean(dim=0))  # type: ignore[arg-type]
    assert len(set(_values(fitted, ("new", "i1"), ("other", "i1")))) == 1
    pairs = [("u01", "i1"), ("new", "new"), ("u02", "i9"), ("u00", "i3")]
    assert _values(fitted, *pairs) == [_values(fitted, pair)[0] for pair in pairs]


def test_restored_fit_gives_same_answers(fitted: UBert, encoder: str) -> None:
    again = UBert(fitted.config, seed=3)
    again.restore(_data(), fitted.state())
    pairs = [(f"u{user:02d}", f"i{item}") for user in range(17) for item in range(10)]
    assert again.answer(_requests(*pairs)) == fitted.answer(_requests(*pairs)) and again.looked_at == fitted.looked_at
    assert not any("u0" in name for name in fitted.state())


def test_pretraining_transfers_without_users(encoder: str, tmp_path: Path) -> None:
    source, target = _data("source"), _data("target")
    teacher = _model(encoder, pretrain=3, learning_rate=0.01)
    teacher.pretrained(source)
    with pytest.raises(RuntimeError, match="fit"):
        teacher.answer(_requests(("u00", "i1")))
    teacher.save(tmp_path / "start", source)
    plain = _model(encoder)._initial(target).network
    started = _model(encoder, start=str(tmp_path / "start"))._initial(target).network
    pretrained = teacher._pretrained
    assert pretrained is not None
    for name, weight in started.state_dict().items():
        # Pretraining knows no items.
        assert torch.equal(weight, pretrained.network.state_dict()[name]) == (name != "user.own.weight"), name
    assert not plain["user"]["own"].weight.any() and not started["user"]["own"].weight.any()
    # The embeddings of users were trained, and the item encoder is initialised from the user encoder.
    assert pretrained.network["user"]["own"].weight.any()
    assert torch.equal(started["item"]["query"].weight, started["user"]["query"].weight)
    with raises(ModelError, Facts("mismatch", column="dim")):
        _model(encoder, start=str(tmp_path / "start"), dim=4)._initial(target)
    with raises(DataError, Facts("leak", column="start")):
        _model(encoder, start=str(tmp_path / "start")).fit(replace(source, train=source.train[:-1]))


def test_vectors_are_features_of_a_host(encoder: str, tmp_path: Path) -> None:
    data = _data(kind="prefix")
    tables = _model(encoder, epochs=1).features(data)
    publish(tmp_path / "vectors", tables)
    store = FeatureStore.open(tmp_path / "vectors", split=data.readable)
    # It reads known events only, so that a host can use all training rows.
    assert store.seen() == set(data.known.select("user_id", "item_id").iter_rows())
    assert store.seen().isdisjoint(data.held_out | set(data.train.select("user_id", "item_id").iter_rows()))
    vectors, known = store.get("user", ["u03", "unknown"])
    assert known.tolist() == [True, False]
    np.testing.assert_allclose(vectors[1], tables[0].vectors.mean(axis=0), rtol=1e-5)
    host = DeepFM(DeepFM.Config(features=str(tmp_path / "vectors"), epochs=1, patience=None, seen="refuse"), seed=0)
    host.fit(data)
    assert len(host.answer(_requests(("u03", "i1")))) == 1
    with pytest.raises(DataError):
        host.fit(_data(kind="last_share"))


def test_users_of_ensemble_weights_do_not_choose_the_epoch(encoder: str) -> None:
    data = _data(kind="prefix")
    model = _model(encoder, epochs=1, patience=1)
    model.features(data)
    choose, weigh = (set(part.valid["user_id"]) for part in split_validation_users(data, 0.5))
    assert choose and weigh and model.looked_at == choose


def test_last_rating_of_a_pair() -> None:
    rows = [("a", "x", 5.0, 1.0), ("a", "x", 1.0, 3.0), ("b", "x", 3.0, 2.0), ("b", "y", 2.0, 4.0)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "rating", "timestamp"], orient="row")
    frame = frame.with_columns(text=pl.lit(None, dtype=pl.String))
    base = _data()
    known = training_ratings(replace(base, train=frame), "ubert")
    assert last_pair_ratings(known) == {(0, 0): 1.0, (1, 0): 3.0, (1, 1): 2.0}
