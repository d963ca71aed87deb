"""The dual encoder: loss by hand, masked negatives, learning, and its training dialogues."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llmrec.baselines.neural import symmetric_info_nce
from llmrec.chat.dual_encoder import (
    DialogueTurns,
    DualEncoder,
    apply_linear_map,
    build_dialogue_turns,
    load_embedders,
    reply_contexts,
    train_dual_encoder,
)
from llmrec.chat.reading import spoken_title
from llmrec.chat.simulator import has_near_title, random_target_conversations, transcript_turns
from llmrec.chat.transcripts import Turn, read, replay_differences, write
from llmrec.errors import DataError
from llmrec.types import Item
from tests.chat.shelf import conversation, items
from tests.encoders import tiny_encoder
from tests.facts import Facts, raises

torch = pytest.importorskip("torch", reason="the train extra is not installed")

NOTHING: frozenset[int] = frozenset()


def test_loss_by_hand() -> None:
    contexts, vectors = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    logits = np.array([[2.0, 1.2], [0.0, 0.8]])
    sums = np.log(np.exp(logits).sum(axis=1)), np.log(np.exp(logits).sum(axis=0))
    by_hand = float(np.mean([each - logits.diagonal() for each in sums]))
    assert float(symmetric_info_nce(contexts @ vectors.T, torch.zeros(2, 2, dtype=torch.bool))) == pytest.approx(
        by_hand
    )
    # The second item is masked for the first context, which then has no negative.
    left = torch.tensor([[False, True], [False, False]])
    alone = (np.log(np.exp(0.8) + 1) - 0.8 + np.log(np.exp(2) + 1) - 2) / 4
    assert float(symmetric_info_nce(contexts @ vectors.T, left)) == pytest.approx(alone)


def test_false_negatives_are_masked() -> None:
    apart = [NOTHING, frozenset({7}), NOTHING, NOTHING]
    cases = DialogueTurns(np.zeros((4, 2), dtype=np.float32), np.array([5, 6, 7, 5]), apart, np.arange(4))
    expected = np.zeros((4, 4), dtype=bool)
    expected[0, 3] = expected[3, 0] = expected[1, 2] = True
    assert (cases.false(np.arange(4)) == expected).all()
    assert not cases.false(np.array([0, 2])).any()


def planted(seed: int) -> tuple[DialogueTurns, NDArray[np.float32]]:
    """Return contexts whose vectors are the rotated vectors of their items with noise."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(60, 16)).astype(np.float32)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    turned = np.linalg.qr(rng.normal(size=(16, 16)))[0].astype(np.float32)
    targets = rng.integers(60, size=1500)
    noisy = table[targets] @ turned + 0.1 * rng.normal(size=(1500, 16)).astype(np.float32)
    return DialogueTurns(noisy.astype(np.float32), targets, [NOTHING] * 1500, np.arange(1500) // 2), table


def test_learns_planted_mapping() -> None:
    cases, table = planted(0)
    dual = train_dual_encoder("any", cases.part(np.arange(1200)), table)
    late = cases.part(np.arange(1200, 1500))

    def right(context: NDArray[np.float32], item: NDArray[np.float32]) -> float:
        return float(
            (
                np.argmax(apply_linear_map(late.vectors, context) @ apply_linear_map(table, item).T, axis=1)
                == late.targets
            ).mean()
        )

    eye = np.eye(16, dtype=np.float32)
    assert right(dual.context, dual.item) > 0.5 > 0.1 > right(eye, eye)
    again = train_dual_encoder("any", cases.part(np.arange(1200)), table)
    assert (again.context == dual.context).all() and (again.item == dual.item).all()
    with raises(DataError, Facts("too-few")):
        train_dual_encoder("any", cases.part(np.arange(2)), table)


def test_saved_dual_encoder_embeds_both_sides(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(32, 32)).astype(np.float32) for _ in range(2)]
    dual = DualEncoder(tiny_encoder(), *maps)
    dual.save(tmp_path)
    item_side, context_side = load_embedders(str(tmp_path))
    plain, same = load_embedders(tiny_encoder())
    texts = ["a comedy", "a western"]
    assert np.allclose(context_side(texts), apply_linear_map(plain(texts), maps[0])) and np.allclose(
        same(texts), plain(texts)
    )
    assert np.allclose(item_side(texts), apply_linear_map(plain(texts), maps[1])) and np.allclose(
        np.linalg.norm(item_side(texts), axis=1), 1
    )
    (tmp_path / "maps.safetensors").write_bytes(b"no")
    with raises(DataError, Facts("damaged")):
        DualEncoder.load(tmp_path)


def test_synthetic_dialogues_are_deterministic_without_titles(tmp_path: Path) -> None:
    talk = conversation()
    turns = transcript_turns(random_target_conversations(talk, 30, seed=1))
    assert (
        turns
        == transcript_turns(random_target_conversations(conversation(), 30, seed=1))
        != transcript_turns(random_target_conversations(talk, 30, seed=2))
    )
    begun = [turn for turn in turns if turn.user is None]
    assert len(begun) == 30 and all(turn.items[0] in items() for turn in begun)
    titles = [spoken_title(item.title) for item in items().values()]
    assert not [turn.user for turn in turns if turn.user for title in titles if has_near_title(turn.user, title)]
    write(tmp_path / "talks.jsonl", turns)
    assert read(tmp_path / "talks.jsonl") == turns and not list(replay_differences(turns, talk))


def test_contexts_and_targets_of_a_transcript() -> None:
    turns = [
        *(Turn(user=None, items=("f03",)), Turn(user="hi", text="hello"), Turn(user="a comedy", text="a list")),
        *(Turn(user="more"), Turn(user=None, items=("f01",)), Turn(user="horror")),
    ]
    assert reply_contexts(turns[1:4]) == ["hi", "hi hello a comedy", "a comedy a list more"]
    cases = build_dialogue_turns(turns, list(items()), tiny_encoder())
    assert cases.targets.tolist() == [3, 3, 3, 1] and cases.dialogues.tolist() == [0, 0, 0, 1]
    assert cases.vectors.shape == (4, 32)


def test_folds_are_scored_by_models_fitted_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from eval.benchmarks import redial_learned
    from eval.benchmarks.redial import Cases
    from eval.benchmarks.redial_learned import OtherDialogues

    rng, count = np.random.default_rng(0), 120
    names = [f"d{row // 2}" for row in range(count)]
    cases = Cases(np.arange(count), rng.integers(9, size=count), names, [""] * count, [[] for _ in range(count)])
    turns, table = (rng.normal(size=(size, 4)).astype(np.float32) for size in (count, 9))
    lessons = []

    def noted(encoder: str, asked: DialogueTurns, table: NDArray[np.float32]) -> DualEncoder:
        lessons.append({turns.tolist().index(row) for row in asked.vectors.tolist()})
        weights = np.random.default_rng(asked.targets.tolist()).normal(size=(4, 4)).astype(np.float32)
        return DualEncoder(encoder, weights, weights)

    monkeypatch.setattr(redial_learned, "train_dual_encoder", noted)
    others = OtherDialogues(cases, turns, table)
    folds = others.folds
    assert len({*folds.tolist()}) == 5 and all(folds[row] == folds[row + 1] for row in range(0, count, 2))
    for judged in range(5):
        before = len(lessons)
        others.scores(judged)
        assert all(not seen & set(np.flatnonzero(folds == judged).tolist()) for seen in lessons[before:])
    # One fit for each fold, and one for each pair of folds.
    assert len(lessons) == 15
    for judged, fold in ((0, 0), (0, 1)):
        changed = np.where(np.isin(folds, [judged, fold]), (cases.targets + 1) % 9, cases.targets)
        rows = np.flatnonzero(folds == fold)
        one, other = (
            OtherDialogues(each, turns, table).scores(judged)[rows] for each in (cases, replace(cases, targets=changed))
        )
        assert (one == other).all()


def test_titles_named_before_are_excluded(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eval.benchmarks import redial_learned
    from eval.benchmarks.redial import Cases

    monkeypatch.setattr(redial_learned, "MODEL", str(llama_folder))
    monkeypatch.setattr(redial_learned, "BEAMS", 4)
    titles = ["Cold Trail", "Cold Trail", "Dry River", "Orbit", "Signal", "Lena"]
    cases = Cases(np.array([0]), np.array([4]), ["d"], ["a western"], [[2, 0]])
    scores = redial_learned.named(cases, titles, np.array([0]))[0]
    # Of five titles, one was mentioned before; of the duplicated title, only one of two items was.
    assert scores[2] < -1e8 and scores[0] == scores[1] and (np.delete(scores, 2) > -1e8).all()


def test_exchanged_items_are_a_derangement() -> None:
    from eval.benchmarks.redial_learned import exchanged_items

    films = [Item(item_id=str(n), title=f"Film {n}", fields={"facts": "A film."} if n % 3 else {}) for n in range(20)]
    order = exchanged_items(films)
    assert sorted(order.tolist()) == list(range(20)) and (order != np.arange(20)).all()
    assert all(("facts" in films[row].fields) == ("facts" in films[other].fields) for row, other in enumerate(order))
