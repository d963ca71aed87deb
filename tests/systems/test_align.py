"""CTRL's first stage: its loss equals the paper's, it reads no answers, and keeps no texts."""

from __future__ import annotations

import gc
import math
import weakref
from functools import cache
from typing import Any

import numpy as np
import polars as pl
import pytest

torch: Any = pytest.importorskip("torch")

from llmrec.baselines.neural import symmetric_info_nce  # noqa: E402
from llmrec.baselines.parameters import create_baseline  # noqa: E402
from llmrec.baselines.profiles import Adaptor  # noqa: E402
from llmrec.data.dataset import Dataset  # noqa: E402
from llmrec.data.split import SplitDataset, split_dataset  # noqa: E402
from llmrec.errors import RecipeError  # noqa: E402
from llmrec.recipe.comparisons import SuiteRow  # noqa: E402
from llmrec.recipe.schema import BaselineSection, Split  # noqa: E402
from llmrec.systems.ctr import host as hosts  # noqa: E402
from llmrec.systems.ctr.align import (  # noqa: E402
    Align,
    SentenceVectors,
    ctrl_similarities,
    iterate_alignment_epochs,
    same_entity_mask,
    user_and_item_texts,
)
from llmrec.systems.ctr.fields import EncodedRows, FieldEncoder  # noqa: E402
from llmrec.types import Item, Request  # noqa: E402
from tests.encoders import tiny_encoder  # noqa: E402
from tests.facts import Facts, raises  # noqa: E402

QUICK: dict[str, Any] = {"dim": 8, "hidden": "16", "epochs": 1, "patience": None, "window": 4, "user_id": True}
ALIGN: dict[str, Any] = {"encoder": "chance", "epochs": 1, "batch": 64, "width": 16, "parts": 2}


@cache
def _data(flip: bool = False) -> SplitDataset:
    """Return thirty users with profiles, twenty items and random answers, or with other answers."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(30):
        for step, item in enumerate(rng.permutation(20)[:12].tolist()):
            rating = float(rng.integers(1, 6))
            rows.append((f"u{user}", f"i{item}", 6 - rating if flip else rating, float(step)))
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "rating", "timestamp"], orient="row")
    entries = {f"i{n}": Item(item_id=f"i{n}", title=f"Film {n}", fields={"kind": f"k{n % 3}"}) for n in range(20)}
    users = {f"u{n}": {"town": f"town {n}", "work": ""} for n in range(30)}
    data = Dataset(name="toy", noun="things", interactions=frame, items=entries, users=users, rating_scale=(1.0, 5.0))
    return split_dataset(data, Split(kind="last_share", valid=0.1, test=0.2), seed=1)


def _fields(data: SplitDataset) -> tuple[FieldEncoder, EncodedRows]:
    return FieldEncoder.of(data, "dcn", liked=4.0, window=4, decay=0.8)


def _stage(name: str, seed: int = 0, **more: Any) -> list[Any]:
    """Return the epochs of the first stage."""
    data, config = _data(), Align(**(ALIGN | more))
    (fields, rows), host = _fields(data), create_baseline(name, QUICK, seed=seed)
    torch.manual_seed(seed)
    network = host._network(fields, Adaptor((), frozenset()))

    def represent(part: Any) -> Any:
        return torch.cat(host._represent(network["body"], host._see(network, fields, rows.of(part), [])), dim=1)

    sentences = SentenceVectors.of(data, fields, config)
    return list(
        iterate_alignment_epochs(
            config, network, rows, represent=represent, judge=lambda part: None, sentences=sentences, seed=seed
        )
    )


@pytest.mark.parametrize("name", ["din", "deepfm", "dcn", "autoint"])
def test_initial_loss_is_the_logarithm_of_the_sentences(name: str) -> None:
    _, rows = _fields(_data())
    (start,) = _stage(name, learning_rate=1e-12, batch=len(rows))
    assert start.loss == pytest.approx(np.log((~same_entity_mask(rows)).sum(axis=1)).mean(), abs=0.05)


def test_rows_learn_to_find_their_sentence() -> None:
    epochs = _stage("autoint", epochs=10, learning_rate=0.02)
    assert epochs[-1].right > 5 / 64 > epochs[0].right / 2 and epochs[-1].loss < epochs[0].loss


def test_similarity_equals_its_formula() -> None:
    rows, texts = torch.randn(4, 6), torch.randn(5, 6)
    assert torch.allclose(ctrl_similarities(rows, texts, 1), rows @ texts.T, atol=1e-6)
    for i in range(4):
        for j in range(5):
            row, text = rows[i].reshape(3, 2), texts[j].reshape(3, 2)
            slow = sum(max(float(row[m] @ text[k]) for k in range(3)) for m in range(3))
            assert float(ctrl_similarities(rows, texts, 3)[i, j]) == pytest.approx(slow, abs=1e-5)


def test_rows_of_same_user_or_item_are_no_negatives() -> None:
    _, rows = _fields(_data())
    some = rows.of(np.arange(0, 60, 3))
    n = len(some)
    slow = np.array(
        [
            [i != j and (some.users[i] == some.users[j] or some.items[i] == some.items[j]) for j in range(n)]
            for i in range(n)
        ]
    )
    assert np.array_equal(same_entity_mask(some), slow) and slow.any()
    alike = torch.randn(n, n)
    by_row = [math.log(sum(math.exp(alike[i, j]) for j in range(n) if not slow[i, j])) - alike[i, i] for i in range(n)]
    by_text = [math.log(sum(math.exp(alike[i, j]) for i in range(n) if not slow[i, j])) - alike[j, j] for j in range(n)]
    expected = (float(np.mean(by_row)) + float(np.mean(by_text))) / 2
    assert float(symmetric_info_nce(alike, torch.from_numpy(slow))) == pytest.approx(expected, abs=1e-5)


def test_sentences_have_no_answers() -> None:
    results = []
    for flip in (False, True):
        data = _data(flip)
        fields, rows = _fields(data)
        results.append(
            (
                user_and_item_texts(data, fields),
                SentenceVectors.of(data, fields, Align(**ALIGN)).of_rows(rows),
                rows.truth,
            )
        )
    assert results[0][0] == results[1][0] and np.array_equal(results[0][1], results[1][1])
    assert not np.array_equal(results[0][2], results[1][2])
    users, titles, items = results[0][0]
    assert users[0] == "town: town 0" and titles[0] == "Film 0" and items[0] == "Film 0. kind: k0"


def test_sentence_of_a_row() -> None:
    data = _data()
    fields, rows = _fields(data)
    sentences = SentenceVectors.of(data, fields, Align(**ALIGN))
    number = int(np.flatnonzero((rows.events > 0).sum(axis=1) == 2)[0])
    user, past, item = np.split(sentences.of_rows(rows)[number], 3)
    assert np.array_equal(user, sentences.users[rows.users[number]])
    assert np.array_equal(item, sentences.items[rows.items[number]])
    assert past == pytest.approx(sentences.titles[rows.events[number][-2:]].mean(axis=0), abs=1e-6)
    for sides, silent in (("user", sentences.items), ("item", sentences.users)):
        half = SentenceVectors.of(data, fields, Align(**ALIGN, sides=sides))
        assert not (half.items if sides == "user" else half.users).any() and silent.any()
    words = SentenceVectors.of(data, fields, Align(**ALIGN | {"encoder": "lsa"}))
    assert words.of_rows(rows).shape == (len(rows), words.width)
    # Texts of other users and items only.
    shuffled = SentenceVectors.of(data, fields, Align(**ALIGN, shuffled=True))
    for one, other in (
        (sentences.users, shuffled.users),
        (sentences.items, shuffled.items),
        (sentences.titles, shuffled.titles),
    ):
        assert not (one[1:] == other[1:]).all(axis=1).any()
        assert {row.tobytes() for row in one} == {row.tobytes() for row in other}


@pytest.mark.parametrize("align", [ALIGN, ALIGN | {"longer": True}])
def test_second_stage_keeps_no_texts(align: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    data = _data()
    held: list[weakref.ref[SentenceVectors]] = []
    read, train = SentenceVectors.of, hosts.CtrNetwork._train

    def of(*arguments: Any) -> SentenceVectors:
        sentences = read(*arguments)
        held.append(weakref.ref(sentences))
        return sentences

    def second(*arguments: Any) -> int:
        gc.collect()
        assert all(ref() is None for ref in held)
        return train(*arguments)

    monkeypatch.setattr(SentenceVectors, "of", staticmethod(of))
    monkeypatch.setattr(hosts.CtrNetwork, "_train", second)
    plain, aligned = (create_baseline("autoint", QUICK | {"align": settings}, seed=0) for settings in (None, align))
    plain.fit(data)
    aligned.fit(data)
    assert len(held) == ("longer" not in align)
    shapes = [
        {name: (tuple(value.shape), value.dtype) for name, value in each._model.network.state_dict().items()}
        for each in (plain, aligned)
    ]
    assert shapes[0] == shapes[1]
    requests = [Request(id="r", user_id="u1", item="i3", history=data.history("u1", "test"))]
    assert plain.answer(requests) != aligned.answer(requests)


def test_text_encoder_and_seed() -> None:
    data = _data()
    requests = [Request(id="r", user_id="u1", item="i3", history=data.history("u1", "test"))]
    answers = []
    for _ in range(2):
        host = create_baseline("dcn", QUICK | {"align": ALIGN | {"encoder": tiny_encoder()}}, seed=3)
        host.fit(data)
        answers.append(host.answer(requests))
    assert answers[0] == answers[1]


def test_rejects_impossible_settings() -> None:
    with raises(RecipeError, Facts("bad-value", says="multiple of parts")):
        create_baseline("dcn", {"align": {"width": 10, "parts": 4}}, seed=0)
    with raises(RecipeError, Facts("bad-value", says="cannot encode titles")):
        create_baseline("dcn", {"align": {"encoder": "store:features"}}, seed=0)
    with raises(RecipeError, Facts("unknown-key", says="align.text")):
        create_baseline("dcn", {"align": {"text": "own"}}, seed=0)


def test_nested_parameters_in_recipes_and_suites() -> None:
    section = BaselineSection.model_validate({"name": "dcn", "dim": 8, "align": {"encoder": "chance", "epochs": 2}})
    assert section.label == "dcn(align.encoder=chance, align.epochs=2, dim=8)"
    row = SuiteRow.model_validate({"baseline": "dcn", "parameters": {"align": {"shuffled": True}}})
    assert row.parameters == {"align": {"shuffled": True}}
