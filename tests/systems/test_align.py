"""CTRL's first stage: its loss is what the paper writes, no answer is read, and nothing of the texts is kept."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import numpy as np
import polars as pl
import pytest

torch: Any = pytest.importorskip("torch")

from llmrec.baselines.neural import info_nce_both  # noqa: E402
from llmrec.baselines.parameters import make  # noqa: E402
from llmrec.baselines.profiles import Adaptor  # noqa: E402
from llmrec.data.dataset import Dataset  # noqa: E402
from llmrec.data.split import SplitDataset, split  # noqa: E402
from llmrec.errors import RecipeError  # noqa: E402
from llmrec.recipe.comparisons import SuiteRow  # noqa: E402
from llmrec.recipe.schema import BaselineSection, Split  # noqa: E402
from llmrec.systems.ctr import host as hosts  # noqa: E402
from llmrec.systems.ctr.align import Align, Sentences, first_stage, same, similar, texts  # noqa: E402
from llmrec.systems.ctr.fields import Fields, Rows  # noqa: E402
from llmrec.types import Item, Request  # noqa: E402
from tests.encoders import tiny_encoder  # noqa: E402
from tests.facts import Facts, raises  # noqa: E402

QUICK: dict[str, Any] = {"dim": 8, "hidden": "16", "epochs": 1, "patience": None, "window": 4, "user_id": True}
ALIGN: dict[str, Any] = {"encoder": "chance", "epochs": 1, "batch": 64, "width": 16, "parts": 2}


def _data(flip: bool = False) -> SplitDataset:
    """Thirty users with a profile each and twenty items, whose answers are random; or the same with other answers."""
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
    return split(data, Split(kind="last_share", valid=0.1, test=0.2), seed=1)


def _fields(data: SplitDataset) -> tuple[Fields, Rows]:
    return Fields.of(data, "dcn", liked=4.0, window=4, decay=0.8)


def _stage(name: str, seed: int = 0, **more: Any) -> list[Any]:
    """Return what the first stage tells of its epochs."""
    data, config = _data(), Align(**(ALIGN | more))
    (fields, rows), host = _fields(data), make(name, QUICK, seed=seed)
    torch.manual_seed(seed)
    network = host._network(fields, Adaptor((), frozenset()))

    def represent(part: Any) -> Any:
        return torch.cat(host._represent(network["body"], host._see(network, fields, rows.of(part), [])), dim=1)

    sentences = Sentences.of(data, fields, config)
    return list(
        first_stage(config, network, rows, represent=represent, judge=lambda part: None, sentences=sentences, seed=seed)
    )


@pytest.mark.parametrize("name", ["din", "deepfm", "dcn", "autoint"])
def test_the_loss_begins_at_the_logarithm_of_the_sentences_and_rows_find_their_own(name: str) -> None:
    _, rows = _fields(_data())
    (start,) = _stage(name, learning_rate=1e-12, batch=len(rows))
    beside = (~same(rows)).sum(axis=1)
    assert start.loss == pytest.approx(np.log(beside).mean(), abs=0.05)
    told = _stage(name, epochs=10, learning_rate=0.02)
    chance = 1 / 64
    assert told[-1].right > 5 * chance > told[0].right / 2 and told[-1].loss < told[0].loss


def test_zero_likeness_costs_exactly_the_logarithm() -> None:
    nothing = torch.zeros(7, 7, dtype=torch.bool)
    assert float(info_nce_both(torch.zeros(7, 7), nothing)) == pytest.approx(math.log(7), abs=1e-6)


def test_likeness_with_one_part_is_the_inner_product_and_with_more_the_formula() -> None:
    rows, told = torch.randn(4, 6), torch.randn(5, 6)
    assert torch.allclose(similar(rows, told, 1), rows @ told.T, atol=1e-6)
    for i in range(4):
        for j in range(5):
            own, other = rows[i].reshape(3, 2), told[j].reshape(3, 2)
            slow = sum(max(float(own[m] @ other[k]) for k in range(3)) for m in range(3))
            assert float(similar(rows, told, 3)[i, j]) == pytest.approx(slow, abs=1e-5)


def test_rows_of_one_user_or_item_are_no_negatives_of_each_other() -> None:
    _, rows = _fields(_data())
    some = rows.of(np.arange(0, 60, 3))
    n = len(some)
    slow = np.array(
        [
            [i != j and (some.users[i] == some.users[j] or some.items[i] == some.items[j]) for j in range(n)]
            for i in range(n)
        ]
    )
    assert np.array_equal(same(some), slow) and slow.any()
    alike = torch.randn(n, n)
    by_row = [math.log(sum(math.exp(alike[i, j]) for j in range(n) if not slow[i, j])) - alike[i, i] for i in range(n)]
    by_text = [math.log(sum(math.exp(alike[i, j]) for i in range(n) if not slow[i, j])) - alike[j, j] for j in range(n)]
    expected = (float(np.mean(by_row)) + float(np.mean(by_text))) / 2
    assert float(info_nce_both(alike, torch.from_numpy(slow))) == pytest.approx(expected, abs=1e-5)


def test_no_answer_is_in_a_sentence() -> None:
    told = []
    for flip in (False, True):
        data = _data(flip)
        fields, rows = _fields(data)
        told.append((texts(data, fields), Sentences.of(data, fields, Align(**ALIGN)).of_rows(rows), rows.truth))
    assert told[0][0] == told[1][0] and np.array_equal(told[0][1], told[1][1])
    assert not np.array_equal(told[0][2], told[1][2])
    users, titles, items = told[0][0]
    assert users[0] == "town: town 0" and titles[0] == "Film 0" and items[0] == "Film 0. kind: k0"


def test_a_row_is_its_user_the_mean_title_of_its_events_and_its_item() -> None:
    data = _data()
    fields, rows = _fields(data)
    said = Sentences.of(data, fields, Align(**ALIGN))
    place = int(np.flatnonzero((rows.events > 0).sum(axis=1) == 2)[0])
    own, past, item = np.split(said.of_rows(rows)[place], 3)
    assert np.array_equal(own, said.users[rows.users[place]]) and np.array_equal(item, said.items[rows.items[place]])
    assert past == pytest.approx(said.titles[rows.events[place][-2:]].mean(axis=0), abs=1e-6)
    for sides, silent in (("user", said.items), ("item", said.users)):
        half = Sentences.of(data, fields, Align(**ALIGN, sides=sides))
        assert not (half.items if sides == "user" else half.users).any() and silent.any()
    words = Sentences.of(data, fields, Align(**ALIGN | {"encoder": "lsa"}))
    assert words.of_rows(rows).shape == (len(rows), words.width)
    # Of others, and of nobody one's own.
    dealt = Sentences.of(data, fields, Align(**ALIGN, shuffled=True))
    for one, other in ((said.users, dealt.users), (said.items, dealt.items), (said.titles, dealt.titles)):
        assert not (one[1:] == other[1:]).all(axis=1).any()
        assert {row.tobytes() for row in one} == {row.tobytes() for row in other}


@pytest.mark.parametrize("align", [ALIGN, ALIGN | {"longer": True}])
def test_the_second_stage_holds_nothing_of_the_texts(align: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    data = _data()
    held: list[weakref.ref[Sentences]] = []
    read, train = Sentences.of, hosts.Host._train

    def of(*given: Any) -> Sentences:
        found = read(*given)
        held.append(weakref.ref(found))
        return found

    def second(*given: Any) -> int:
        gc.collect()
        assert all(ref() is None for ref in held)
        return train(*given)

    monkeypatch.setattr(Sentences, "of", staticmethod(of))
    monkeypatch.setattr(hosts.Host, "_train", second)
    plain, aligned = (make("autoint", QUICK | {"align": told}, seed=0) for told in (None, align))
    plain.fit(data)
    aligned.fit(data)
    assert len(held) == ("longer" not in align)
    shapes = [
        {name: (tuple(value.shape), value.dtype) for name, value in each._model.network.state_dict().items()}
        for each in (plain, aligned)
    ]
    assert shapes[0] == shapes[1]
    asked = [Request(id="r", user_id="u1", item="i3", history=data.history("u1", "test"))]
    assert plain.answer(asked) != aligned.answer(asked)


def test_a_text_encoder_reads_the_parts_and_a_seed_decides_all() -> None:
    data = _data()
    asked = [Request(id="r", user_id="u1", item="i3", history=data.history("u1", "test"))]
    answers = []
    for _ in range(2):
        host = make("dcn", QUICK | {"align": ALIGN | {"encoder": tiny_encoder()}}, seed=3)
        host.fit(data)
        answers.append(host.answer(asked))
    assert answers[0] == answers[1]


def test_settings_that_cannot_be_are_named() -> None:
    with raises(RecipeError, Facts("bad-value", says="multiple of parts")):
        make("dcn", {"align": {"width": 10, "parts": 4}}, seed=0)
    with raises(RecipeError, Facts("bad-value", says="cannot encode titles")):
        make("dcn", {"align": {"encoder": "store:features"}}, seed=0)
    with raises(RecipeError, Facts("unknown-key", says="align.text")):
        make("dcn", {"align": {"text": "own"}}, seed=0)


def test_recipes_and_suites_write_parameters_with_parts() -> None:
    section = BaselineSection.model_validate({"name": "dcn", "dim": 8, "align": {"encoder": "chance", "epochs": 2}})
    assert section.label == "dcn(align.encoder=chance, align.epochs=2, dim=8)"
    row = SuiteRow.model_validate({"baseline": "dcn", "parameters": {"align": {"shuffled": True}}})
    assert row.parameters == {"align": {"shuffled": True}}
