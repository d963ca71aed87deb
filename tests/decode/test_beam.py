"""The search against a plain reference of the same pruning, and against looking at every item."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.data.hashing import hash_one
from llmrec.decode.beam import Fed, Floats, Targets, beam
from llmrec.decode.token_tree import Catalogue
from llmrec.types import SearchResult
from tests.decode.trees import branching

END, VOCABULARY = 7, 12
PATHS = st.lists(
    st.lists(st.integers(0, 4), max_size=4).map(lambda path: (*path, END)), min_size=1, max_size=40, unique=True
)
SEEDS = st.integers(0, 10**6)


def logprobs(seed: int, text: Sequence[int]) -> Floats:
    """A made language model: a distribution over the vocabulary for every text."""
    dice = np.random.default_rng(hash_one("made model", seed, *map(str, text)))
    logits = 2 * dice.standard_normal(VOCABULARY)
    return logits - np.log(np.exp(logits).sum())


class MadeEngine:
    """A tree engine over the made model, which checks what it is asked and counts it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.forwards = self.fed = 0
        self.is_open = False

    def open(self, prompts: Sequence[Sequence[int]], wanted: Targets) -> Floats:
        assert not self.is_open
        self.is_open = True
        self.texts = [tuple(prompt) for prompt in prompts]
        self.users = list(range(len(prompts)))
        self.forwards += 1
        assert (wanted.after < len(prompts)).all()
        return self._answers(wanted)

    def feed(self, fed: Fed, wanted: Targets) -> Floats:
        assert self.is_open
        before = len(self.texts)
        for user, parent, token in zip(fed.users.tolist(), fed.parents.tolist(), fed.tokens.tolist(), strict=True):
            assert self.users[parent] == user and parent < len(self.texts)
            self.texts.append((*self.texts[parent], token))
            self.users.append(user)
        assert len(set(zip(self.users, self.texts, strict=True))) == len(self.texts), "a token was read twice"
        self.forwards += 1
        self.fed += len(fed.tokens)
        # Every token that is read is read for something, and nothing old is asked again.
        assert set(wanted.after.tolist()) == set(range(before, len(self.texts)))
        return self._answers(wanted)

    def close(self) -> None:
        self.is_open = False

    def _answers(self, wanted: Targets) -> Floats:
        assert (np.diff(wanted.after) >= 0).all()
        pairs = zip(wanted.after.tolist(), wanted.tokens.tolist(), strict=True)
        return np.array([logprobs(self.seed, self.texts[after])[token] for after, token in pairs])


def score(seed: int, prompt: Sequence[int], path: Sequence[int]) -> float:
    return sum(float(logprobs(seed, (*prompt, *path[:n]))[token]) for n, token in enumerate(path))


def everything(seed: int, prompt: Sequence[int], paths: Sequence[tuple[int, ...]]) -> list[int]:
    """Return all items by their likelihood."""
    return sorted(range(len(paths)), key=lambda item: -score(seed, prompt, paths[item]))


def reference(
    seed: int, prompt: Sequence[int], paths: Sequence[tuple[int, ...]], width: int, barred: set[int]
) -> list[tuple[float, int]]:
    """A beam in plain Python: prune after each branch, then follow what is forced."""
    legal = [path for item, path in enumerate(paths) if item not in barred]

    def forced(prefix: tuple[int, ...], value: float) -> tuple[float, tuple[int, ...], bool]:
        while True:
            after = {path[len(prefix)] for path in paths if path[: len(prefix)] == prefix and len(path) > len(prefix)}
            if not after:
                return value, prefix, True
            if len(after) > 1:
                return value, prefix, False
            (token,) = after
            value += float(logprobs(seed, (*prompt, *prefix))[token])
            prefix = (*prefix, token)

    kept: list[tuple[float, tuple[int, ...], bool]] = [(0.0, (), False)] if legal else []
    while not all(whole for *_, whole in kept):
        pool = []
        for value, prefix, whole in kept:
            if whole:
                pool.append((value, prefix, True))
                continue
            for token in {p[len(prefix)] for p in legal if p[: len(prefix)] == prefix}:
                pool.append((value + float(logprobs(seed, (*prompt, *prefix))[token]), (*prefix, token), False))
        pool.sort(key=lambda each: -each[0])
        kept = [each if each[2] else forced(each[1], each[0]) for each in pool[:width]]
    return sorted(((value, paths.index(path)) for value, path, _ in kept), reverse=True)


PROMPTS = [(1, 2, 3), (4,), (5, 5)]


@given(paths=PATHS, seed=SEEDS, width=st.integers(1, 8), barred=st.sets(st.integers(0, 39)))
def test_it_equals_a_plain_beam_of_the_same_pruning(
    paths: list[tuple[int, ...]], seed: int, width: int, barred: set[int]
) -> None:
    gone = {item for item in barred if item < len(paths)}
    excluded = [sorted(gone), [], list(range(len(paths)))]
    found = beam(MadeEngine(seed), Catalogue.of(paths), PROMPTS, k=width, width=width, excluded=excluded)
    for prompt, result, out in zip(PROMPTS, found, excluded, strict=True):
        wanted = reference(seed, prompt, paths, width, set(out))[:width]
        assert list(result.items) == [item for _, item in wanted]
        assert result.scores == pytest.approx([value for value, _ in wanted])


@given(paths=PATHS, seed=SEEDS, k=st.integers(1, 6), width=st.integers(1, 6), barred=st.sets(st.integers(0, 39)))
def test_a_certified_result_is_the_best_there_is(
    paths: list[tuple[int, ...]], seed: int, k: int, width: int, barred: set[int]
) -> None:
    out = sorted(item for item in barred if item < len(paths))
    tree = Catalogue.of(paths)
    for exact in (False, True):
        (found,) = beam(MadeEngine(seed), tree, [(1, 2)], k=k, width=width, excluded=[out], exact=exact)
        best = [item for item in everything(seed, (1, 2), paths) if item not in out]
        assert len(found.items) == min(k, len(best)) == len(set(found.items))
        assert not set(found.items) & set(out)
        assert found.scores == pytest.approx([score(seed, (1, 2), paths[item]) for item in found.items])
        assert bool(found.short) == (len(best) < k)
        if found.certified:
            assert list(found.items) == best[:k]
        assert found.certified or not exact


@given(paths=PATHS, seed=SEEDS)
def test_width_over_the_widest_level_finds_the_best(paths: list[tuple[int, ...]], seed: int) -> None:
    tree = Catalogue.of(paths)
    widest = max(end - start for start, end in zip(tree.starts, tree.starts[1:], strict=False))
    engine = MadeEngine(seed)
    (found,) = beam(engine, tree, [(3,)], k=5, width=max(widest, len(paths)))
    assert found.certified and list(found.items) == everything(seed, (3,), paths)[:5]


@given(paths=PATHS, seed=SEEDS, width=st.integers(1, 8))
def test_work_is_counted_in_branches(paths: list[tuple[int, ...]], seed: int, width: int) -> None:
    """The prompt is read once, every token of the tree at most once, and forced tokens cost no forward of their own."""
    tree, engine = Catalogue.of(paths), MadeEngine(seed)
    beam(engine, tree, [(1,)], k=1, width=width)
    # Where all paths begin alike, that beginning is one more forward.
    alike = len({path[0] for path in paths}) == 1
    assert engine.forwards <= branching(tree) + 1 + alike
    assert engine.fed < len(tree.marks)


@pytest.mark.parametrize("width", [1, 5, 20])
def test_the_work_for_codes_of_one_length_is_exact(width: int) -> None:
    """Prompts, and at each depth but the last as many tokens as are kept."""
    codes = np.array([(a, b, c) for a in range(6) for b in range(6) for c in range(6)])
    tree, engine = Catalogue.of(codes), MadeEngine(1)
    beam(engine, tree, [(1,), (2, 3)], k=1, width=width)
    assert engine.forwards == tree.depth == branching(tree)
    assert engine.fed == 2 * (min(width, 6) + min(width, 36))


def test_the_batch_does_not_matter() -> None:
    paths = [(a, b, END) for a in range(4) for b in range(4)]
    tree, prompts = Catalogue.of(paths), [(n, n + 1) for n in range(6)]
    together = beam(MadeEngine(3), tree, prompts, k=4, width=4)
    alone = [beam(MadeEngine(3), tree, [prompt], k=4, width=4)[0] for prompt in prompts]
    assert [found.items for found in together] == [found.items for found in alone]


def test_ten_thousand_lists_hold_real_items_once() -> None:
    dice = np.random.default_rng(0)
    paths = [tuple(row) for row in np.unique(dice.integers(0, 5, (300, 4)), axis=0).tolist()]
    tree = Catalogue.of(paths)
    lists = 0
    for seed in range(20):
        prompts = [(int(n),) for n in dice.integers(0, 10**6, 500)]
        out = [
            dice.choice(len(paths), int(size), replace=False).tolist() for size in dice.integers(0, len(paths) - 2, 500)
        ]
        for found, barred in zip(beam(FastEngine(seed), tree, prompts, k=10, width=12, excluded=out), out, strict=True):
            assert len(set(found.items)) == len(found.items) == min(10, len(paths) - len(barred))
            assert not set(found.items) & set(barred) and all(0 <= item < len(paths) for item in found.items)
            assert list(found.scores) == sorted(found.scores, reverse=True)
            lists += 1
    assert lists == 10_000


class FastEngine(MadeEngine):
    """Random log-probabilities without a model behind them."""

    def open(self, prompts: Sequence[Sequence[int]], wanted: Targets) -> Floats:
        self.dice = np.random.default_rng(self.seed)
        return -self.dice.exponential(size=len(wanted.tokens))

    def feed(self, fed: Fed, wanted: Targets) -> Floats:
        return -self.dice.exponential(size=len(wanted.tokens))


def test_one_item_and_one_token() -> None:
    for paths in ([(1,)], [(1, 2, 3)], [(1,), (2,)]):
        (found,) = beam(MadeEngine(0), Catalogue.of(paths), [(4,)], k=3, width=1)
        assert len(found.items) == len(paths) and found.short and found.certified
    (none,) = beam(MadeEngine(0), Catalogue.of([(1,), (2,)]), [(4,)], k=1, width=1, excluded=[[0, 1]])
    assert none == SearchResult(
        items=(), scores=(), certified=True, width=1, short="only 0 of 2 items are valid results"
    )


@pytest.mark.parametrize("values", [{"k": 0, "width": 1}, {"k": 1, "width": 0}])
def test_nothing_asked_is_an_error(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        beam(MadeEngine(0), Catalogue.of([(1,)]), [(4,)], **values)


def test_the_engine_is_closed_when_it_fails() -> None:
    class Failing(MadeEngine):
        def feed(self, fed: Fed, wanted: Targets) -> Floats:
            raise RuntimeError("out of memory")

    engine = Failing(0)
    with pytest.raises(RuntimeError):
        beam(engine, Catalogue.of([(1, 2), (1, 3)]), [(4,)], k=1, width=1)
    assert not engine.is_open


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_scores_that_are_no_numbers_end_an_exact_search(broken: float) -> None:
    class Broken(FastEngine):
        def feed(self, fed: Fed, wanted: Targets) -> Floats:
            return np.full(len(wanted.tokens), broken)

    paths = [(a, b, END) for a in range(5) for b in range(6)]
    (found,) = beam(Broken(0), Catalogue.of(paths), [(4,)], k=3, width=3, exact=True)
    assert not all(map(math.isfinite, found.scores))


def test_an_exact_search_ends_at_the_widest(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmrec.decode import beam as module

    monkeypatch.setattr(module, "WIDEST", 4)
    paths = [(a, b, END) for a in range(8) for b in range(8)]
    results = [beam(MadeEngine(seed), Catalogue.of(paths), [(1,)], k=3, width=3, exact=True)[0] for seed in range(8)]
    assert {found.width for found in results if not found.certified} == {4}


@given(paths=PATHS, seed=SEEDS, exact=st.booleans())
def test_tokens_are_told_by_request_whoever_else_is_searched(
    paths: list[tuple[int, ...]], seed: int, exact: bool
) -> None:
    tree = Catalogue.of(paths)
    together = beam(MadeEngine(seed), tree, PROMPTS, k=2, width=2, exact=exact)
    for prompt, found in zip(PROMPTS, together, strict=True):
        engine = MadeEngine(seed)
        (alone,) = beam(engine, tree, [prompt], k=2, width=2, exact=exact)
        assert found.tokens == alone.tokens == engine.fed
