"""The search with vLLM: what is asked of an engine, with a made one; and a real one beside transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.backends.encode import Encoder
from llmrec.backends.vllm.backend import Answers, Ask, VLLMBackend, VLLMTree, answered
from llmrec.data.hashing import hash_one
from llmrec.decode.beam import Fed, Targets, beam
from llmrec.decode.token_tree import Catalogue
from llmrec.errors import BackendError
from llmrec.index.table import ItemIndex, token
from llmrec.models.load import load_model, load_tokenizer
from llmrec.recipe.schema import ModelSection
from llmrec.types import Message, Prompt, SearchResult, Segment
from tests.conftest import make_model
from tests.decode.trees import branching
from tests.facts import Facts, raises

END, VOCABULARY = 7, 12
PATHS = st.lists(
    st.lists(st.integers(0, 5), max_size=5).map(lambda path: (*path, END)), min_size=1, max_size=40, unique=True
)
PROMPTS = st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=2), min_size=1, max_size=4)


def logprob(text: Sequence[int], after: int) -> float:
    """A made language model."""
    dice = np.random.default_rng(hash_one("made model", 0, *map(str, text)))
    logits = 2 * dice.standard_normal(VOCABULARY)
    return float(logits[after] - np.log(np.exp(logits).sum()))


class MadeEngine:
    """Answers requests over the made model, checks them and keeps them."""

    def __init__(self, limit: int, *, forces: bool) -> None:
        self.limit, self.forces = limit, forces
        self.rounds: list[list[Ask]] = []

    def read(self, asked: Sequence[Ask]) -> Answers:
        wanted: list[tuple[tuple[int, ...], int]] = []
        values = []
        for ask in asked:
            assert len(ask.targets) == len(ask.forced) + 1 and all(ask.targets) and (self.forces or not ask.forced)
            assert len({token for row in ask.targets for token in row}) <= self.limit
            assert all(token in row for token, row in zip(ask.forced, ask.targets, strict=False))
            pairs = [(ask.text + ask.forced[:n], token) for n, row in enumerate(ask.targets) for token in row]
            values.append([logprob(*pair) for pair in pairs])
            wanted += pairs
        assert len(set(wanted)) == len(wanted), "a value was asked for twice"
        self.rounds.append(list(asked))
        return Answers(values, sum(len(ask.text) for ask in asked), len(asked))


class PlainEngine:
    """A `TreeEngine` over the made model, with nothing to get wrong."""

    def open(self, prompts: Sequence[Sequence[int]], wanted: Targets) -> Any:
        self.texts = [tuple(prompt) for prompt in prompts]
        return self.answers(wanted)

    def feed(self, fed: Fed, wanted: Targets) -> Any:
        for parent, read in zip(fed.parents.tolist(), fed.tokens.tolist(), strict=True):
            self.texts.append((*self.texts[parent], read))
        return self.answers(wanted)

    def answers(self, wanted: Targets) -> Any:
        self.distinct = {self.texts[after] for after in wanted.after.tolist()}
        return np.array([logprob(self.texts[a], t) for a, t in zip(wanted.after.tolist(), wanted.tokens, strict=True)])

    def close(self) -> None: ...


# --------------------------------------------------------------------------- what is asked


@given(PATHS, PROMPTS, st.integers(1, 6), st.integers(1, 4), st.booleans(), st.sets(st.integers(0, 39), max_size=5))
def test_answers_are_those_of_a_plain_engine(
    paths: list[tuple[int, ...]],
    prompts: list[list[int]],
    width: int,
    limit: int,
    chains: bool,
    barred: set[int],
) -> None:
    made, catalogue = MadeEngine(limit, forces=chains), Catalogue.of(paths)
    out = [[item for item in barred if item < len(paths)]] * len(prompts)
    tree = VLLMTree(made.read, chains=chains, limit=limit)
    found = beam(tree, catalogue, prompts, k=2, width=width, excluded=out)
    plain = beam(PlainEngine(), catalogue, prompts, k=2, width=width, excluded=out)
    assert [each.items for each in found] == [each.items for each in plain]
    for ours, theirs in zip(found, plain, strict=True):
        assert ours.scores == pytest.approx(theirs.scores, abs=1e-9)
    # Where all items begin with one token, that one takes a round of its own.
    alone = catalogue.firsts[1] - catalogue.firsts[0] == 1
    assert tree.forwards == len(made.rounds) <= branching(catalogue) + 1 + alone
    assert tree.requests == sum(map(len, made.rounds))
    assert tree.tokens == sum(len(ask.text) for asked in made.rounds for ask in asked)


def test_a_wide_node_is_asked_in_groups_and_equal_texts_once() -> None:
    made = MadeEngine(4, forces=False)
    tree = VLLMTree(made.read, chains=False, limit=4)
    after = np.repeat([0, 1, 2], [10, 3, 10])
    tokens = np.array([*range(10), 3, 2, 1, *range(9, -1, -1)])
    values = tree.open([(5,), (6,), (5,)], Targets(after, tokens))
    assert [ask.text for ask in made.rounds[0]] == [(5,), (5,), (5,), (6,)]
    assert [len(ask.targets[0]) for ask in made.rounds[0]] == [4, 4, 2, 3]
    assert values[:10].tolist() == values[13:][::-1].tolist()
    assert values[10] == logprob((6,), 3)


@pytest.mark.parametrize("chains", [False, True])
def test_a_chain_is_one_request_where_tokens_can_be_forced(chains: bool) -> None:
    made = MadeEngine(4, forces=True)
    tree = VLLMTree(made.read, chains=chains, limit=4)
    tree.open([(5,)], Targets(np.array([0, 0]), np.array([1, 2])))
    # Behind 1: 3, 4, and then a choice of five. Behind 2: the forced end 6, 7.
    fed = Fed(np.zeros(5, dtype=int), np.array([0, 0, 1, 2, 3]), np.array([1, 2, 3, 6, 4]))
    wanted = Targets(np.array([1, 2, 3, 4, 5, 5, 5, 5, 5]), np.array([3, 6, 4, 7, 0, 1, 2, 3, 4]))
    values = tree.feed(fed, wanted)
    texts = [(5,), (5, 1), (5, 2), (5, 1, 3), (5, 2, 6), (5, 1, 3, 4)]
    assert values.tolist() == [logprob(texts[a], t) for a, t in zip(wanted.after, wanted.tokens, strict=True)]
    asked = made.rounds[1]
    if chains:
        assert asked == [
            Ask((5, 1), (3,), ((3,), (4,))),
            Ask((5, 1, 3, 4), (), ((0, 1, 2, 3),)),
            Ask((5, 1, 3, 4), (), ((4,),)),
            Ask((5, 2), (6,), ((6,), (7,))),
        ]
    else:
        assert len(asked) == 6 and {ask.text for ask in asked} == set(texts[1:])
    tree.close()
    assert tree.requests == 1 + len(asked) and tree.forwards == 2


def test_a_prompt_that_goes_on_from_another_hides_no_choice() -> None:
    made = MadeEngine(4, forces=True)
    tree = VLLMTree(made.read, chains=True, limit=4)
    values = tree.open([(5,), (5, 1)], Targets(np.array([0, 0, 1, 1]), np.array([1, 2, 1, 2])))
    assert values.tolist() == [logprob(text, t) for text in [(5,), (5, 1)] for t in (1, 2)]
    assert made.rounds == [[Ask((5,), (1,), ((1, 2), (1, 2)))]]


def test_nothing_wanted_asks_nothing() -> None:
    made = MadeEngine(4, forces=False)
    (found,) = beam(
        VLLMTree(made.read, chains=False, limit=4), Catalogue.of([(1,), (2,)]), [[3]], k=1, width=2, excluded=[[0, 1]]
    )
    assert found.items == () and not made.rounds


def test_an_engine_that_does_not_follow_is_an_error() -> None:
    class Step:
        logprob = -1.0

    class Output:
        outputs = (type("Said", (), {"token_ids": [4, 9], "logprobs": [{4: Step()}, {9: Step(), 8: Step()}]})(),)

    assert answered(Output(), Ask((1, 2, 3), (4,), ((4,), (8,))), prefill=False) == [-1.0, -1.0]
    with raises(BackendError, Facts("defect", column="eval.scorer", says="eval.scorer=hf")):
        answered(Output(), Ask((1, 2, 3), (5,), ((4,), (8,))), prefill=False)


# --------------------------------------------------------------------------- a real engine

FIRST, SECOND = 300, 4
INDEX = ItemIndex(
    "semantic",
    {f"i{n}": (token(0, n // SECOND), token(1, n % SECOND)) for n in range(60)},
    tokens=(*(token(0, n) for n in range(FIRST)), *(token(1, n) for n in range(SECOND))),
)
CODES = [INDEX.encode(item) for item in INDEX.codes]
FILMS = ("Toy Story", "Heat", "Fargo", "Casino", "Alien", "Brazil", "Jaws", "Rocky", "Heat Story")
TITLES = [f"{film} {n} {film.lower()}" for film in FILMS for n in range(5)] + list(FILMS)
# One-token items: more than one request may ask for.
WIDE = [token(0, n) for n in range(FIRST)]
SETS = {"codes": CODES, "titles": TITLES, "wide": WIDE}


def asked(question: str, given_before: str = "", stop: str | None = "\n") -> Prompt:
    answer = (Segment("item", given_before),) if given_before else ()
    return Prompt(messages=(Message("user", (Segment("text", question),)),), answer_prefix=answer, stop=stop)


ASKED = [
    asked("Continue the list", "Toy Story\nAlien\n"),
    asked("Continue the list of films that this person watched in order", "Brazil\nJaws\nRocky\n"),
    asked("Answer with one title", stop=None),
    asked("Continue the list of films", "Heat\n"),
    asked("Continue the list", "Toy Story\nAlien\n"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that knows the tokens of the index."""
    from llmrec.models.item_tokens import extended

    home = tmp_path_factory.mktemp("search")
    made = make_model(home / "m")
    titles = {item: FILMS[n % len(FILMS)] for n, item in enumerate(INDEX.codes)}
    section = ModelSection(name=str(made), dtype="float32")
    extended(str(made), section, INDEX, titles, home / "base", words=True, seed=0)
    return home / "base"


def encoder(folder: Path) -> Encoder:
    return Encoder(load_tokenizer(str(folder), ModelSection(name=str(folder))), max_length=512)


@pytest.fixture(scope="module")
def hf(folder: Path) -> Any:
    from llmrec.backends.hf.backend import HFBackend

    return HFBackend(load_model(str(folder), ModelSection(name=str(folder), dtype="float32")), encoder(folder))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[VLLMBackend]:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    backend = VLLMBackend(str(folder), encoder(folder), dtype="float32", route="forced")
    yield backend
    backend.close()


@pytest.fixture(params=["forced", "nodes"])
def vllm(request: pytest.FixtureRequest, engine: VLLMBackend, monkeypatch: pytest.MonkeyPatch) -> VLLMBackend:
    """The same engine by both routes."""
    monkeypatch.setattr(engine, "route", request.param)
    return engine


def same(ours: Sequence[SearchResult], theirs: Sequence[SearchResult]) -> None:
    assert [each.items for each in ours] == [each.items for each in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.scores == pytest.approx(b.scores, abs=1e-3)
        assert (a.certified, a.short, a.prompt_tokens) == (b.certified, b.short, b.prompt_tokens)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("name", list(SETS))
def test_finds_what_transformers_finds(name: str, vllm: VLLMBackend, hf: Any) -> None:
    texts = SETS[name]
    excluded = [[], [0, 5, 9], list(range(len(texts) - 3)), [1], []]
    for width in (3, 12):
        found = vllm.search(ASKED, texts, k=5, width=width, excluded=excluded)
        same(found, hf.search(ASKED, texts, k=5, width=width, excluded=excluded))
        assert {each.engine for each in found} == {f"vllm:{vllm.route}"}
        assert not [item for each, out in zip(found, excluded, strict=True) for item in each.items if item in out]
        assert len(found[2].items) == 3 and "only 3 of" in found[2].short


@pytest.mark.slow
@pytest.mark.vllm
def test_results_do_not_depend_on_the_batch(vllm: VLLMBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    together = vllm.search(ASKED, TITLES, k=4, width=6)
    monkeypatch.setattr(vllm, "_room", lambda: 1)
    same(vllm.search(ASKED, TITLES, k=4, width=6), together)
    same([vllm.search([each], TITLES, k=4, width=6)[0] for each in ASKED], together)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("name", list(SETS))
def test_a_certified_result_is_that_of_all_scores(name: str, vllm: VLLMBackend) -> None:
    texts, chosen = SETS[name], ASKED[:3]
    found = vllm.search(chosen, texts, k=4, width=2, exact=True)
    for result, scores in zip(found, vllm.score(chosen, [texts] * len(chosen)), strict=True):
        order = sorted(range(len(texts)), key=lambda n: -scores.logprobs[n])[:4]
        assert result.certified and list(result.items) == order
        assert result.scores == pytest.approx([scores.logprobs[n] for n in order], abs=1e-3)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("name", list(SETS))
def test_work_is_what_the_catalogue_needs(name: str, vllm: VLLMBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """One round a branch, one request a text or chain and group, and no full block computed twice."""
    rounds: list[list[Ask]] = []
    read, computed = vllm._read, []

    def kept(asked_: Sequence[Ask]) -> Answers:
        rounds.append(list(asked_))
        answers = read(asked_)
        computed.append(answers.tokens)
        return answers

    monkeypatch.setattr(vllm, "_read", kept)
    prompts = [asked(f"Continue the list of films, reader {vllm.route} {name} {n}", "Heat\n" * n) for n in range(3)]
    vllm.search(prompts, SETS[name], k=5, width=8)
    catalogue = vllm.encoder.catalogue(SETS[name], "\n")
    assert len(rounds) <= branching(catalogue) + 1
    for each in rounds:
        groups: dict[tuple[int, ...], int] = {}
        for ask in each:
            groups[ask.text] = groups.get(ask.text, 0) + 1
        # More than one request a text only where one cannot ask for all of its ids.
        assert all(count == 1 for count in groups.values()) or (name == "wide" and max(groups.values()) == 3)
    block = vllm._process.llm.llm_engine.vllm_config.cache_config.block_size
    ids = [vllm.encoder.prompt(prompt) for prompt in prompts]
    first = len(rounds[0]) // len(prompts)
    assert computed[0] <= sum(len(each) + (first - 1) * block for each in ids)
    for each, tokens in zip(rounds[1:], computed[1:], strict=True):
        assert tokens <= sum(block + len(ask.forced) + len(ask.text) % block for ask in each)


@pytest.mark.slow
@pytest.mark.vllm
def test_forcing_asks_less(engine: VLLMBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    work = {}
    for route in ("forced", "nodes"):
        tree = VLLMTree(engine._read, chains=route == "forced", limit=128)
        catalogue = engine.encoder.catalogue(TITLES, "\n")
        beam(tree, catalogue, [engine.encoder.prompt(each) for each in ASKED], k=5, width=8)
        work[route] = tree
    assert work["forced"].requests < work["nodes"].requests / 2
    assert work["forced"].tokens < work["nodes"].tokens
    assert work["forced"].forwards == work["nodes"].forwards


@pytest.mark.slow
@pytest.mark.vllm
def test_an_engine_that_died_is_told(engine: VLLMBackend) -> None:
    """The last test: it costs the engine."""
    import psutil

    for pid in sorted(engine._process.watch._vital):
        psutil.Process(pid).kill()
    with raises(BackendError, Facts("failed", says="run the same command again to continue")):
        engine.search(ASKED, CODES, k=3, width=3)
    with raises(BackendError, Facts("closed")):
        engine.search(ASKED, CODES, k=3, width=3)
