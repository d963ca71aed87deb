"""The search with vLLM: requests to a fake engine, and a real engine compared with transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.backends.hf.backend import HFBackend
from llmrec.backends.vllm.backend import EngineAnswers, EngineRequest, VLLMBackend, VLLMTree, parse_output
from llmrec.decode.beam import LogprobQueries, TreeTokens, beam_search
from llmrec.decode.token_tree import TokenTrie
from llmrec.errors import BackendError
from llmrec.index.table import ItemIndex, level_token
from llmrec.models.item_tokens import save_with_item_tokens
from llmrec.recipe.schema import ModelSection
from tests.conftest import encoder_of, make_model, opened
from tests.decode.test_beam import FakeEngine, logprobs
from tests.decode.trees import branching
from tests.facts import Facts, raises
from tests.servers.client import question

END = 7
PATHS = st.lists(
    st.lists(st.integers(0, 5), max_size=5).map(lambda path: (*path, END)), min_size=1, max_size=40, unique=True
)
PROMPTS = st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=2), min_size=1, max_size=4)


def logprob(text: Sequence[int], after: int) -> float:
    return float(logprobs(0, text)[after])


class RequestEngine:
    """Answers, checks and records requests, with the fake model."""

    def __init__(self, limit: int, *, forces: bool) -> None:
        self.limit, self.forces = limit, forces
        self.rounds: list[list[EngineRequest]] = []

    def read(self, requests: Sequence[EngineRequest]) -> EngineAnswers:
        pairs_requested: list[tuple[tuple[int, ...], int]] = []
        values = []
        for ask in requests:
            assert len(ask.targets) == len(ask.forced) + 1 and all(ask.targets) and (self.forces or not ask.forced)
            assert len({token for row in ask.targets for token in row}) <= self.limit
            assert all(token in row for token, row in zip(ask.forced, ask.targets, strict=False))
            pairs = [(ask.text + ask.forced[:n], token) for n, row in enumerate(ask.targets) for token in row]
            values.append([logprob(*pair) for pair in pairs])
            pairs_requested += pairs
        assert len(set(pairs_requested)) == len(pairs_requested), "a value was requested twice"
        self.rounds.append(list(requests))
        return EngineAnswers(values, sum(len(ask.text) for ask in requests), len(requests))


@given(PATHS, PROMPTS, st.integers(1, 6), st.integers(1, 4), st.booleans(), st.sets(st.integers(0, 39), max_size=5))
def test_search_equals_a_plain_engine(
    paths: list[tuple[int, ...]], prompts: list[list[int]], width: int, limit: int, chains: bool, barred: set[int]
) -> None:
    fake, catalogue = RequestEngine(limit, forces=chains), TokenTrie.of(paths)
    out = [[item for item in barred if item < len(paths)]] * len(prompts)
    tree = VLLMTree(fake.read, chains=chains, limit=limit)
    results = beam_search(tree, catalogue, prompts, k=2, width=width, excluded=out)
    plain = beam_search(FakeEngine(0), catalogue, prompts, k=2, width=width, excluded=out)
    assert [each.items for each in results] == [each.items for each in plain]
    for ours, theirs in zip(results, plain, strict=True):
        assert ours.scores == pytest.approx(theirs.scores, abs=1e-9)
    # If all items begin with the same token, it takes an extra round.
    alone = catalogue.firsts[1] - catalogue.firsts[0] == 1
    assert tree.forwards == len(fake.rounds) <= branching(catalogue) + 1 + alone
    assert tree.requests == sum(map(len, fake.rounds))
    assert tree.tokens == sum(len(ask.text) for round_ in fake.rounds for ask in round_)


def test_wide_nodes_are_split_and_equal_texts_requested_once() -> None:
    fake = RequestEngine(4, forces=False)
    tree = VLLMTree(fake.read, chains=False, limit=4)
    after = np.repeat([0, 1, 2], [10, 3, 10])
    tokens = np.array([*range(10), 3, 2, 1, *range(9, -1, -1)])
    values = tree.open([(5,), (6,), (5,)], LogprobQueries(after, tokens))
    assert [ask.text for ask in fake.rounds[0]] == [(5,), (5,), (5,), (6,)]
    assert [len(ask.targets[0]) for ask in fake.rounds[0]] == [4, 4, 2, 3]
    assert values[:10].tolist() == values[13:][::-1].tolist()
    assert values[10] == logprob((6,), 3)


@pytest.mark.parametrize("chains", [False, True])
def test_forced_chain_is_one_request(chains: bool) -> None:
    fake = RequestEngine(4, forces=True)
    tree = VLLMTree(fake.read, chains=chains, limit=4)
    tree.open([(5,)], LogprobQueries(np.array([0, 0]), np.array([1, 2])))
    # After 1: 3, 4, and then a choice of five. After 2: the forced end 6, 7.
    fed = TreeTokens(np.zeros(5, dtype=int), np.array([0, 0, 1, 2, 3]), np.array([1, 2, 3, 6, 4]))
    targets = LogprobQueries(np.array([1, 2, 3, 4, 5, 5, 5, 5, 5]), np.array([3, 6, 4, 7, 0, 1, 2, 3, 4]))
    values = tree.feed(fed, targets)
    texts = [(5,), (5, 1), (5, 2), (5, 1, 3), (5, 2, 6), (5, 1, 3, 4)]
    assert values.tolist() == [logprob(texts[a], t) for a, t in zip(targets.after, targets.tokens, strict=True)]
    requests = fake.rounds[1]
    if chains:
        assert requests == [
            EngineRequest((5, 1), (3,), ((3,), (4,))),
            EngineRequest((5, 1, 3, 4), (), ((0, 1, 2, 3),)),
            EngineRequest((5, 1, 3, 4), (), ((4,),)),
            EngineRequest((5, 2), (6,), ((6,), (7,))),
        ]
    else:
        assert len(requests) == 6 and {ask.text for ask in requests} == set(texts[1:])
    tree.close()
    assert tree.requests == 1 + len(requests) and tree.forwards == 2


def test_no_targets_no_requests() -> None:
    fake = RequestEngine(4, forces=False)
    (result,) = beam_search(
        VLLMTree(fake.read, chains=False, limit=4), TokenTrie.of([(1,), (2,)]), [[3]], k=1, width=2, excluded=[[0, 1]]
    )
    assert result.items == () and not fake.rounds


def test_engine_that_ignores_forced_tokens_is_an_error() -> None:
    class Step:
        logprob = -1.0

    class Output:
        outputs = (type("Text", (), {"token_ids": [4, 9], "logprobs": [{4: Step()}, {9: Step(), 8: Step()}]})(),)

    assert parse_output(Output(), EngineRequest((1, 2, 3), (4,), ((4,), (8,))), prefill=False) == [-1.0, -1.0]
    with raises(BackendError, Facts("defect", column="eval.scorer", says="eval.scorer=hf")):
        parse_output(Output(), EngineRequest((1, 2, 3), (5,), ((4,), (8,))), prefill=False)


FIRST, SECOND = 300, 4
INDEX = ItemIndex(
    "semantic",
    {f"i{n}": (level_token(0, n // SECOND), level_token(1, n % SECOND)) for n in range(60)},
    tokens=(*(level_token(0, n) for n in range(FIRST)), *(level_token(1, n) for n in range(SECOND))),
)
FILMS = ("Toy Story", "Heat", "Fargo", "Casino", "Alien", "Brazil", "Jaws", "Rocky", "Heat Story")
SETS = {
    "codes": [INDEX.encode(item) for item in INDEX.codes],
    "titles": [f"{film} {n} {film.lower()}" for film in FILMS for n in range(5)] + list(FILMS),
    # One-token items: more than the limit of one request.
    "wide": [level_token(0, n) for n in range(FIRST)],
}
REQUESTS = [
    question("Continue the list", given="Toy Story\nAlien\n", stop="\n"),
    question("Continue the list of films that this person watched in order", given="Brazil\nJaws\n", stop="\n"),
    question("Answer with one title"),
]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VLLMBackend, HFBackend]]:
    """Return two engines over a tiny model with the tokens of the index."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    home = tmp_path_factory.mktemp("search")
    base, target = str(make_model(home / "m")), home / "base"
    titles = {item: FILMS[n % len(FILMS)] for n, item in enumerate(INDEX.codes)}
    save_with_item_tokens(base, ModelSection(name=base, dtype="float32"), INDEX, titles, target, words=True, seed=0)
    encoder = encoder_of(target, 512)
    backend = VLLMBackend(str(target), encoder, dtype="float32", route="forced")
    yield backend, HFBackend(opened(target)[0], encoder)
    backend.close()


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("route", ["forced", "nodes"])
def test_real_engine_equals_transformers(
    both: tuple[VLLMBackend, HFBackend], name: str, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (vllm, hf), texts = both, SETS[name]
    monkeypatch.setattr(vllm, "route", route)
    excluded = [[], [0, 5, 9], list(range(len(texts) - 3))]
    for width in (3, 12):
        results, expected = (b.search(REQUESTS, texts, k=5, width=width, excluded=excluded) for b in (vllm, hf))
        assert [each.items for each in results] == [each.items for each in expected]
        for a, b in zip(results, expected, strict=True):
            assert a.engine == f"vllm:{route}" and a.scores == pytest.approx(b.scores, abs=1e-3)
            assert (a.certified, a.short, a.prompt_tokens) == (b.certified, b.short, b.prompt_tokens)
        assert not [item for each, out in zip(results, excluded, strict=True) for item in each.items if item in out]
        assert len(results[2].items) == 3 and "only 3 of" in results[2].short
        # The second time, one request per batch.
        monkeypatch.setattr(vllm, "_room", lambda: 1)
