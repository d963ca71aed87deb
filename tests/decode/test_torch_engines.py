"""The engines over transformers models: against plain forwards, all items, and the beam search of transformers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.backends.hf.backend import HFBackend
from llmrec.backends.hf.tree import MaskedTree, PlainTree
from llmrec.decode.beam import LogprobQueries, TreeTokens, beam_search
from llmrec.decode.token_tree import TokenTrie
from llmrec.types import SearchResult
from tests.conftest import encoder_of, opened
from tests.decode.trees import branching
from tests.servers.client import question

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PAD, END = 0, 70
# All are below the smallest vocabulary size here, and none is an end-of-text token.
FULL = [(10 + a, 20 + b, 30 + c) for a, b, c in itertools.product(range(6), range(5), range(4))]
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": PAD,
}
PATHS = st.lists(
    st.lists(st.integers(10, 15), max_size=4).map(lambda path: (*path, END)), min_size=1, max_size=25, unique=True
)
PROMPTS = st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=12), min_size=1, max_size=4)


def sharp(model: Any) -> Any:
    """Enlarge the weights, so that answers differ clearly between prompts."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model.eval()


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> Any:
    return opened(llama_folder)[0].eval()


@pytest.fixture(scope="module")
def qwen(qwen_folder: Path) -> Any:
    return opened(qwen_folder)[0].eval()


@pytest.fixture(scope="module")
def untied() -> Any:
    torch.manual_seed(2)
    config = transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False)
    return sharp(transformers.LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def sliding() -> Any:
    """Return a model whose layers attend to eight tokens only."""
    torch.manual_seed(3)
    config = transformers.MistralConfig(**SHAPE, sliding_window=8, tie_word_embeddings=False)
    return sharp(transformers.MistralForCausalLM(config))


@pytest.fixture(scope="module")
def t5() -> Any:
    torch.manual_seed(4)
    config = transformers.T5Config(
        vocab_size=96, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2, decoder_start_token_id=PAD
    )
    return transformers.T5ForConditionalGeneration(config).eval()


ENGINES = [
    *((MaskedTree, name) for name in ("llama", "qwen", "untied", "t5")),
    *((PlainTree, name) for name in ("untied", "sliding", "t5")),
]
each_engine = pytest.mark.parametrize(("kind", "name"), ENGINES, ids=[f"{kind.__name__}-{n}" for kind, n in ENGINES])


def plain(model: Any, prompt: Sequence[int], paths: Sequence[Sequence[int]]) -> list[float]:
    """Return the log-likelihood of paths by plain forward passes, padded on the right."""
    longest = max(map(len, paths))
    answers = torch.tensor([[*path, *[PAD] * (longest - len(path))] for path in paths])
    prompts = torch.tensor([list(prompt)] * len(paths))
    with torch.inference_mode():
        if model.config.is_encoder_decoder:
            start = torch.full((len(paths), 1), model.config.decoder_start_token_id)
            before = torch.cat([start, answers[:, :-1]], dim=1)
            logits = model(input_ids=prompts, decoder_input_ids=before).logits
        else:
            logits = model(input_ids=torch.cat([prompts, answers[:, :-1]], dim=1)).logits[:, len(prompt) - 1 :]
    logprobs = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0].double()
    return [float(row[: len(path)].sum()) for row, path in zip(logprobs, paths, strict=True)]


def ranked(model: Any, prompt: Sequence[int], paths: Sequence[Sequence[int]]) -> dict[int, float]:
    """Return the likelihood of every item, best first."""
    scores = dict(enumerate(plain(model, prompt, paths)))
    return dict(sorted(scores.items(), key=lambda pair: -pair[1]))


def assert_best(result: SearchResult, scores: dict[int, float], k: int) -> None:
    """Check that a result is optimal; equally likely items may be swapped."""
    assert result.certified and len(set(result.items)) == len(result.items)
    assert result.scores == pytest.approx(list(scores.values())[:k], abs=1e-4)
    assert [scores[item] for item in result.items] == pytest.approx(list(result.scores), abs=1e-4)


@each_engine
def test_token_tree_equals_plain_forwards(kind: type, name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    engine, prompts = kind(model, PAD), [(5, 6, 7, 8, 9, 3, 2), (40,), tuple(range(1, 20))]
    first = engine.open(prompts, LogprobQueries(np.array([0, 0, 1, 2]), np.array([11, 12, 13, 14])))
    assert first == pytest.approx(
        [
            *plain(model, prompts[0], [(11,), (12,)]),
            *plain(model, prompts[1], [(13,)]),
            *plain(model, prompts[2], [(14,)]),
        ],
        abs=1e-4,
    )
    # Tokens 3 and 4 are a chain, 5 is a fork, 6 belongs to another user; then one token after each.
    texts = {3: (0, (11,)), 4: (0, (11, 21)), 5: (0, (12,)), 6: (2, (14,))}
    fed = TreeTokens(np.array([0, 0, 0, 2]), np.array([0, 3, 0, 2]), np.array([11, 21, 12, 14]))
    answered = engine.feed(fed, LogprobQueries(np.array([3, 4, 5, 5, 6]), np.array([21, 31, 31, 32, 33])))
    texts |= {7: (2, (14, 50)), 8: (0, (12, 51)), 9: (0, (11, 21, 52))}
    fed = TreeTokens(np.array([2, 0, 0]), np.array([6, 5, 4]), np.array([50, 51, 52]))
    later = engine.feed(fed, LogprobQueries(np.array([7, 8, 9]), np.array([60, 60, 60])))
    pairs = [(3, 21), (4, 31), (5, 31), (5, 32), (6, 33), (7, 60), (8, 60), (9, 60)]
    for (number, token), value in zip(pairs, [*answered, *later], strict=True):
        user, text = texts[number]
        longer, shorter = plain(model, prompts[user], [(*text, token), text])
        reference = longer - shorter
        assert value == pytest.approx(reference, abs=2e-4)


@given(paths=PATHS, prompts=PROMPTS, k=st.integers(1, 6))
@pytest.mark.parametrize("kind", [MaskedTree, PlainTree])
def test_search_is_optimal_for_any_paths(
    kind: type, untied: Any, paths: list[tuple[int, ...]], prompts: list[list[int]], k: int
) -> None:
    results = beam_search(kind(untied, PAD), TokenTrie.of(paths), prompts, k=k, width=25)
    for prompt, result in zip(prompts, results, strict=True):
        assert_best(result, ranked(untied, prompt, paths), k)


@pytest.mark.parametrize(("name", "width"), [("llama", 4), ("untied", 10)])
def test_equals_the_beam_search_of_transformers(name: str, width: int, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    prompts = [(5, 6, 7, 8), (40, 41), (*range(1, 13),)]
    results = beam_search(MaskedTree(model, PAD), TokenTrie.of(FULL), prompts, k=width, width=width)
    for prompt, result in zip(prompts, results, strict=True):
        reference = constrained(model, prompt, width)
        assert set(reference) == {FULL[item] for item in result.items}
        for item, score in zip(result.items, result.scores, strict=True):
            assert score == pytest.approx(reference[FULL[item]], abs=1e-3)


def constrained(model: Any, prompt: Sequence[int], width: int) -> dict[tuple[int, ...], float]:
    """Return the results of ``generate`` with a ``prefix_allowed_tokens_fn``."""
    after: dict[tuple[int, ...], list[int]] = {}
    for path in FULL:
        for n, token in enumerate(path):
            if token not in (legal := after.setdefault(path[:n], [])):
                legal.append(token)
    with torch.inference_mode():
        out = model.generate(
            input_ids=torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=len(FULL[0]),
            length_penalty=0.0,
            do_sample=False,
            prefix_allowed_tokens_fn=lambda _, row: after[tuple(row[len(prompt) :].tolist())],
            output_scores=True,
            return_dict_in_generate=True,
            pad_token_id=PAD,
        )
    rows = [tuple(row[len(prompt) :].tolist()) for row in out.sequences]
    return dict(zip(rows, out.sequences_scores.tolist(), strict=True))


@pytest.mark.parametrize("width", [3, 10, 200])
def test_each_token_is_computed_once(untied: Any, width: int) -> None:
    """Computed once: the prompts, and the beam's tokens at each depth except the last; each has one row of logits."""
    engine, prompts = MaskedTree(untied, PAD), [(5, 6, 7), (40,), (1,) * 9]
    beam_search(engine, TokenTrie.of(FULL), prompts, k=1, width=width)
    read = len(prompts) * (min(width, 6) + min(width, 30))
    assert engine.tokens == sum(map(len, prompts)) + read
    assert engine.forwards == 3
    assert engine.head_rows == len(prompts) + read


@pytest.mark.parametrize("change", ["appended", "last differs", "same", "shorter", "other"])
def test_prompt_reuses_the_previous_one(untied: Any, change: str) -> None:
    first = tuple(np.random.default_rng(1).integers(1, 90, 60).tolist())
    second, known = {
        "appended": ((*first, 50, 51, 52, 53), 60),
        "last differs": ((*first[:-1], (first[-1] + 1) % 90), 59),
        # The last token of a prompt is always read.
        "same": (first, 59),
        "shorter": (first[:20], 19),
        "other": ((first[0] + 1, *first[1:]), 0),
    }[change]
    tree, engine = TokenTrie.of(FULL), MaskedTree(untied, PAD, warm=True)
    beam_search(engine, tree, [first], k=10, width=10)
    before = engine.tokens
    (warm,) = beam_search(engine, tree, [second], k=10, width=10)
    cold_engine = MaskedTree(untied, PAD)
    (cold,) = beam_search(cold_engine, tree, [second], k=10, width=10)
    assert engine.tokens - before == cold_engine.tokens - known
    assert warm.items == cold.items
    assert warm.scores == pytest.approx(cold.scores, abs=1e-4)


def test_wider_search_reads_the_prompt_once(untied: Any) -> None:
    prompt = tuple(np.random.default_rng(2).integers(1, 90, 60).tolist())
    engine = MaskedTree(untied, PAD, warm=True)
    (result,) = beam_search(engine, TokenTrie.of(FULL), [prompt], k=3, width=3, exact=True)
    assert result.certified and result.width > 3, "a prompt that needs more than three prefixes"
    runs = int(np.log2(result.width // 3)) + 1
    kept = sum(min(3 << n, 6) + min(3 << n, 30) for n in range(runs))
    assert engine.tokens == 60 + (runs - 1) + kept


def test_batch_drops_the_previous_prompt(untied: Any) -> None:
    tree, engine = TokenTrie.of(FULL), MaskedTree(untied, PAD, warm=True)
    prompt = (5, 6, 7, 8)
    for prompts in ([prompt], [prompt, (9,)], [prompt]):
        before = engine.tokens
        beam_search(engine, tree, prompts, k=3, width=3)
        assert engine.tokens - before == sum(map(len, prompts)) + 6 * len(prompts)


@pytest.mark.parametrize("route", ["tree", "sliding"])
def test_titles_need_forward_passes_by_branches(llama: Any, llama_folder: Path, route: str) -> None:
    encoder, model = encoder_of(llama_folder, 512), llama
    if route == "sliding":
        shape = SHAPE | {"vocab_size": len(encoder.tokenizer), "sliding_window": 8}
        model = sharp(transformers.MistralForCausalLM(transformers.MistralConfig(**shape)))
    words = ("Toy", "Heat", "Fargo", "Casino", "Alien", "Brazil")
    pairs = enumerate(itertools.product(words, words))
    titles = [f"{a} {b}: the complete restored story of a quiet kitchen ({1980 + n})" for n, (a, b) in pairs]
    tree = encoder.catalogue(titles, "\n")
    assert branching(tree) + 1 < tree.depth / 4, "long titles with few branches"
    backend = HFBackend(model, encoder)
    prompts = [
        *(question("Continue the list of films", given=text, stop="\n") for text in ("Jaws\nRocky\n", "Alien\n"))
    ]
    results = backend.search(prompts, titles, k=5, width=len(titles))
    if route == "tree":
        assert backend._tree.forwards <= branching(tree) + 1
    for prompt, result in zip(prompts, results, strict=True):
        ids = encoder.prompt(prompt)
        tails = [encoder.continuation(prompt, title, closed=True) for title in titles]
        assert_best(result, ranked(model, ids, tails), 5)
        assert result.engine == ("hf:tree" if route == "tree" else "hf:rows")
