"""The beam search against a plain reference with the same pruning, and against scoring every item."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.data.hashing import hash_one
from llmrec.decode.beam import Floats, LogprobQueries, TreeTokens, beam_search
from llmrec.decode.token_tree import TokenTrie
from llmrec.types import SearchResult
from tests.decode.trees import branching

END, VOCABULARY = 7, 12
PATHS = st.lists(
    st.lists(st.integers(0, 4), max_size=4).map(lambda path: (*path, END)), min_size=1, max_size=40, unique=True
)
SEEDS = st.integers(0, 10**6)


def logprobs(seed: int, text: Sequence[int]) -> Floats:
    """Return the distribution of a fake language model over the vocabulary."""
    dice = np.random.default_rng(hash_one("fake model", seed, *map(str, text)))
    logits = 2 * dice.standard_normal(VOCABULARY)
    return logits - np.log(np.exp(logits).sum())


class FakeEngine:
    """A tree engine over the fake model that checks and counts its requests."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.forwards = self.fed = 0
        self.is_open = False

    def open(self, prompts: Sequence[Sequence[int]], targets: LogprobQueries) -> Floats:
        assert not self.is_open
        self.is_open = True
        self.texts = [tuple(prompt) for prompt in prompts]
        self.users = list(range(len(prompts)))
        self.forwards += 1
        assert (targets.after < len(prompts)).all()
        return self._answers(targets)

    def feed(self, fed: TreeTokens, targets: LogprobQueries) -> Floats:
        assert self.is_open
        before = len(self.texts)
        for user, parent, token in zip(fed.users.tolist(), fed.parents.tolist(), fed.tokens.tolist(), strict=True):
            assert self.users[parent] == user and parent < len(self.texts)
            self.texts.append((*self.texts[parent], token))
            self.users.append(user)
        assert len(set(zip(self.users, self.texts, strict=True))) == len(self.texts), "a token was read twice"
        self.forwards += 1
        self.fed += len(fed.tokens)
        # Each fed token has a target, and no earlier one is requested again.
        assert set(targets.after.tolist()) == set(range(before, len(self.texts)))
        return self._answers(targets)

    def close(self) -> None:
        self.is_open = False

    def _answers(self, targets: LogprobQueries) -> Floats:
        assert (np.diff(targets.after) >= 0).all()
        pairs = zip(targets.after.tolist(), targets.tokens.tolist(), strict=True)
        return np.array([logprobs(self.seed, self.texts[after])[token] for after, token in pairs])


def score(seed: int, prompt: Sequence[int], path: Sequence[int]) -> float:
    return sum(float(logprobs(seed, (*prompt, *path[:n]))[token]) for n, token in enumerate(path))


def ranked(seed: int, prompt: Sequence[int], paths: Sequence[tuple[int, ...]]) -> list[int]:
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

    beams: list[tuple[float, tuple[int, ...], bool]] = [(0.0, (), False)] if legal else []
    while not all(complete for *_, complete in beams):
        pool = []
        for value, prefix, complete in beams:
            if complete:
                pool.append((value, prefix, True))
                continue
            for token in {p[len(prefix)] for p in legal if p[: len(prefix)] == prefix}:
                pool.append((value + float(logprobs(seed, (*prompt, *prefix))[token]), (*prefix, token), False))
        pool.sort(key=lambda each: -each[0])
        beams = [each if each[2] else forced(each[1], each[0]) for each in pool[:width]]
    return sorted(((value, paths.index(path)) for value, path, _ in beams), reverse=True)


PROMPTS = [(1, 2, 3), (4,), (5, 5)]


@given(paths=PATHS, seed=SEEDS, width=st.integers(1, 8), barred=st.sets(st.integers(0, 39)))
def test_equals_a_plain_beam(paths: list[tuple[int, ...]], seed: int, width: int, barred: set[int]) -> None:
    barred_items = {item for item in barred if item < len(paths)}
    excluded = [sorted(barred_items), [], list(range(len(paths)))]
    results = beam_search(FakeEngine(seed), TokenTrie.of(paths), PROMPTS, k=width, width=width, excluded=excluded)
    for prompt, result, barred_ids in zip(PROMPTS, results, excluded, strict=True):
        expected = reference(seed, prompt, paths, width, set(barred_ids))[:width]
        assert list(result.items) == [item for _, item in expected]
        assert result.scores == pytest.approx([value for value, _ in expected])


@given(paths=PATHS, seed=SEEDS, k=st.integers(1, 6), width=st.integers(1, 6), barred=st.sets(st.integers(0, 39)))
def test_certified_results_are_optimal(
    paths: list[tuple[int, ...]], seed: int, k: int, width: int, barred: set[int]
) -> None:
    out = sorted(item for item in barred if item < len(paths))
    tree = TokenTrie.of(paths)
    for exact in (False, True):
        (result,) = beam_search(FakeEngine(seed), tree, [(1, 2)], k=k, width=width, excluded=[out], exact=exact)
        best = [item for item in ranked(seed, (1, 2), paths) if item not in out]
        assert len(result.items) == min(k, len(best)) == len(set(result.items))
        assert not set(result.items) & set(out)
        assert result.scores == pytest.approx([score(seed, (1, 2), paths[item]) for item in result.items])
        assert bool(result.short) == (len(best) < k)
        if result.certified:
            assert list(result.items) == best[:k]
        assert result.certified or not exact


@given(paths=PATHS, seed=SEEDS)
def test_full_width_finds_the_best(paths: list[tuple[int, ...]], seed: int) -> None:
    tree = TokenTrie.of(paths)
    widest = max(end - start for start, end in zip(tree.starts, tree.starts[1:], strict=False))
    engine = FakeEngine(seed)
    (result,) = beam_search(engine, tree, [(3,)], k=5, width=max(widest, len(paths)))
    assert result.certified and list(result.items) == ranked(seed, (3,), paths)[:5]


@given(paths=PATHS, seed=SEEDS, width=st.integers(1, 8))
def test_forward_passes_are_bounded_by_branches(paths: list[tuple[int, ...]], seed: int, width: int) -> None:
    tree, engine = TokenTrie.of(paths), FakeEngine(seed)
    beam_search(engine, tree, [(1,)], k=1, width=width)
    # A prefix shared by all paths takes one more forward pass.
    alike = len({path[0] for path in paths}) == 1
    assert engine.forwards <= branching(tree) + 1 + alike
    assert engine.fed < len(tree.marks)


@pytest.mark.parametrize("width", [1, 5, 20])
def test_work_for_codes_of_equal_length(width: int) -> None:
    """One pass for the prompts, and one for the kept tokens at each depth except the last."""
    codes = np.array([(a, b, c) for a in range(6) for b in range(6) for c in range(6)])
    tree, engine = TokenTrie.of(codes), FakeEngine(1)
    beam_search(engine, tree, [(1,), (2, 3)], k=1, width=width)
    assert engine.forwards == tree.depth == branching(tree)
    assert engine.fed == 2 * (min(width, 6) + min(width, 36))


def test_one_item_and_one_token() -> None:
    for paths in ([(1,)], [(1, 2, 3)], [(1,), (2,)]):
        (result,) = beam_search(FakeEngine(0), TokenTrie.of(paths), [(4,)], k=3, width=1)
        assert len(result.items) == len(paths) and result.short and result.certified
    (none,) = beam_search(FakeEngine(0), TokenTrie.of([(1,), (2,)]), [(4,)], k=1, width=1, excluded=[[0, 1]])
    assert none == SearchResult(
        items=(), scores=(), certified=True, width=1, short="only 0 of 2 items are valid results"
    )
    for k, width in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            beam_search(FakeEngine(0), TokenTrie.of([(1,)]), [(4,)], k=k, width=width)


def test_the_engine_is_closed_when_it_fails() -> None:
    class Failing(FakeEngine):
        def feed(self, fed: TreeTokens, targets: LogprobQueries) -> Floats:
            raise RuntimeError("out of memory")

    engine = Failing(0)
    with pytest.raises(RuntimeError):
        beam_search(engine, TokenTrie.of([(1, 2), (1, 3)]), [(4,)], k=1, width=1)
    assert not engine.is_open


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_exact_search_ends_with_invalid_scores(broken: float) -> None:
    class Broken(FakeEngine):
        def feed(self, fed: TreeTokens, targets: LogprobQueries) -> Floats:
            return np.full(len(targets.tokens), broken)

    paths = [(a, b, END) for a in range(5) for b in range(6)]
    (result,) = beam_search(Broken(0), TokenTrie.of(paths), [(4,)], k=3, width=3, exact=True)
    assert not all(map(math.isfinite, result.scores))


def test_exact_search_ends_at_the_maximal_width(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmrec.decode import beam as module

    monkeypatch.setattr(module, "MAX_WIDTH", 4)
    paths = [(a, b, END) for a in range(8) for b in range(8)]
    results = [
        beam_search(FakeEngine(seed), TokenTrie.of(paths), [(1,)], k=3, width=3, exact=True)[0] for seed in range(8)
    ]
    assert {result.width for result in results if not result.certified} == {4}


@given(paths=PATHS, seed=SEEDS, exact=st.booleans())
def test_tokens_do_not_depend_on_the_batch(paths: list[tuple[int, ...]], seed: int, exact: bool) -> None:
    tree = TokenTrie.of(paths)
    together = beam_search(FakeEngine(seed), tree, PROMPTS, k=2, width=2, exact=exact)
    for prompt, result in zip(PROMPTS, together, strict=True):
        engine = FakeEngine(seed)
        (alone,) = beam_search(engine, tree, [prompt], k=2, width=2, exact=exact)
        assert result.tokens == alone.tokens == engine.fed
