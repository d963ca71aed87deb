"""Tests that every backend must pass. vLLM is the real engine on a tiny random model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmrec.backends.encode import Encoder
from llmrec.backends.fake import FakeBackend
from llmrec.backends.server.backend import OpenAIBackend
from llmrec.errors import DataError
from llmrec.types import Backend, Message, Prompt, Segment
from tests.conftest import make_tokenizer
from tests.facts import Facts, raises
from tests.servers.client import section
from tests.servers.faulty import Behaviour, running

TITLES = ("Heat (1995)", "Fargo (1996)", "Casino (1995)", "Heat", "Toy Story 2")
LABELS = ("1", "2", "3", "4", "5")


def prompt(question: str, prefix: str = "", stop: str | None = None) -> Prompt:
    answer = (Segment("item", prefix),) if prefix else ()
    return Prompt(messages=(Message("user", (Segment("text", question),)),), answer_prefix=answer, stop=stop)


PROMPTS = (
    prompt("Continue the list", "Toy Story\nAlien\n", "\n"),
    prompt("Answer with one number"),
    prompt("Continue the list of films that this person watched in order", "Brazil\nJaws\nRocky\n", "\n"),
)


def load_hf(folder: Path, **options: Any) -> Backend:
    from llmrec.backends.hf.backend import HFBackend
    from llmrec.models.load import load_model, load_tokenizer
    from llmrec.recipe.schema import ModelSection

    section = ModelSection(name=str(folder), dtype="float32")
    encoder = Encoder(load_tokenizer(str(folder), section), max_length=512)
    return HFBackend(load_model(str(folder), section), encoder, **options)


def load_vllm(folder: Path, route: str) -> Backend:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from llmrec.backends.vllm.backend import VLLMBackend
    from llmrec.models.load import load_tokenizer
    from llmrec.recipe.schema import ModelSection

    section = ModelSection(name=str(folder))
    encoder = Encoder(load_tokenizer(str(folder), section), max_length=512)
    return VLLMBackend(str(folder), encoder, dtype="float32", route=route)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def vllm_backend(llama_folder: Path) -> Iterator[Backend]:
    backend = load_vllm(llama_folder, "forced")
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def openai_backend() -> Iterator[Backend]:
    """A client of a server that answers from hashes; tests/backends/test_openai_vllm.py uses a real one."""
    encoder = Encoder(make_tokenizer(), max_length=512)
    with running(Behaviour(latency=0.01, count=lambda text: len(encoder.tokenizer.encode(text)))) as server:
        backend = OpenAIBackend(section(server.url), encoder)
        yield backend
        backend.close()


@pytest.fixture(
    scope="module", params=["fake", "hf-packed", "hf-rows", "openai", pytest.param("vllm", marks=pytest.mark.vllm)]
)
def backend(request: pytest.FixtureRequest, llama_folder: Path) -> Backend:
    if request.param == "openai":
        client: Backend = request.getfixturevalue("openai_backend")
        return client
    if request.param == "vllm":
        engine: Backend = request.getfixturevalue("vllm_backend")
        return engine
    if request.param == "fake":
        return FakeBackend()
    return load_hf(llama_folder, packed=request.param == "hf-packed")


def test_satisfies_the_protocol(backend: Backend) -> None:
    assert isinstance(backend, Backend)
    assert backend.capabilities <= {"generate", "score", "search", "rate"}


def test_scores_are_in_order(backend: Backend) -> None:
    sets = [TITLES, LABELS, TITLES[:2]]
    results = backend.score(PROMPTS, sets)
    assert [len(scores.logprobs) for scores in results] == [5, 5, 2]
    assert all(math.isfinite(value) and value < 0 for scores in results for value in scores.logprobs)
    assert all(n >= 1 for scores in results for n in scores.tokens)


def test_scores_do_not_depend_on_batch_or_order(backend: Backend) -> None:
    others = [prompt(f"Who liked number {n}?", "Brazil\n" * n, "\n") for n in range(1, 4)]
    together = backend.score([*others, *PROMPTS], [TITLES] * 6)
    for scores, each in zip(together[3:], PROMPTS, strict=True):
        alone = backend.score([each], [TITLES[::-1]])[0]
        assert scores.logprobs == pytest.approx(alone.logprobs[::-1], abs=1e-4)


def test_generation_is_in_order_and_limited(backend: Backend) -> None:
    results = backend.generate(PROMPTS, max_tokens=6)
    assert len(results) == 3
    assert all(0 <= done.completion_tokens <= 6 for done in results)
    assert all(done.finish_reason in ("stop", "length") for done in results)
    assert "\n" not in results[0].text
    assert [done.text for done in results] == [done.text for done in backend.generate(PROMPTS, max_tokens=6)]


def test_search_equals_sorted_scores(backend: Backend) -> None:
    """A search of full width, and an exact one, equal a sort of all scores."""
    if "search" not in backend.capabilities:
        pytest.skip(f"{backend.name} does not search")
    texts = [f"{film} {n}" for film in TITLES for n in range(4)]
    scores = backend.score(PROMPTS, [texts] * len(PROMPTS))
    excluded: list[list[int]] = [[], [0, 3, 7], list(range(len(texts) - 2))]
    for exact, width in ((False, len(texts) * 12), (True, 3)):
        results = backend.search(PROMPTS, texts, k=3, width=width, excluded=excluded[: len(PROMPTS)], exact=exact)
        for result, known, out in zip(results, scores, excluded, strict=False):
            left = [index for index in range(len(texts)) if index not in out]
            best = sorted(left, key=lambda index: -known.logprobs[index])[:3]
            assert result.certified and list(result.items) == best, (exact, width)
            assert result.scores == pytest.approx([known.logprobs[index] for index in best], abs=1e-2)
            assert bool(result.short) == (len(left) < 3)


def test_search_rejects_duplicate_texts(backend: Backend) -> None:
    if "search" not in backend.capabilities or backend.name == "fake":
        pytest.skip(f"{backend.name} has no tokens")
    with raises(DataError, Facts("duplicate", says=("items 0 and 2", "{scheme: title}"))):
        backend.search(PROMPTS, ["Heat", "Fargo", "Heat"], k=1, width=1)


def by_hand(backend: Any, prompt: Prompt, text: str, *, closed: bool) -> float:
    """Sum full-softmax log-probabilities over one plain forward of prompt + continuation."""
    import torch

    ids = backend.encoder.prompt(prompt)
    tail = list(backend.encoder.continuation(prompt, text, closed=closed))
    with torch.no_grad():
        logprobs = backend.model(input_ids=torch.tensor([ids + tail])).logits[0].float().log_softmax(-1)
    return float(sum(logprobs[len(ids) + k - 1, token] for k, token in enumerate(tail)))


@pytest.mark.parametrize(("kind", "closed"), [("llama_folder", True), ("qwen_folder", False)])
def test_packed_scores_equal_plain_forwards(kind: str, closed: bool, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    packed, rows = load_hf(folder, packed=True), load_hf(folder, packed=False)
    results = packed.score(PROMPTS, [TITLES] * 3, closed=closed)
    assert results[0].engine == "hf:tree"
    assert rows.score(PROMPTS, [TITLES] * 3, closed=closed)[0].engine == "hf:rows"
    for each, scores, plain in zip(PROMPTS, results, rows.score(PROMPTS, [TITLES] * 3, closed=closed), strict=True):
        expected = [by_hand(packed, each, title, closed=closed) for title in TITLES]
        assert scores.logprobs == pytest.approx(expected, abs=1e-4)
        assert plain.logprobs == pytest.approx(expected, abs=1e-4)


def test_labels_are_scored_by_one_forward(llama_folder: Path) -> None:
    hf: Any = load_hf(llama_folder)
    (results,) = hf.score(PROMPTS[1:2], [LABELS], closed=False)
    assert results.engine == "hf:one-token"
    assert results.logprobs == pytest.approx(
        [by_hand(hf, PROMPTS[1], label, closed=False) for label in LABELS], abs=1e-4
    )


def test_batched_generation_equals_one_by_one(llama_folder: Path) -> None:
    hf = load_hf(llama_folder)
    together = [done.text for done in hf.generate(PROMPTS, max_tokens=8)]
    assert together == [hf.generate([each], max_tokens=8)[0].text for each in PROMPTS]


@pytest.mark.vllm
def test_vllm_scores_equal_transformers_in_float32(vllm_backend: Any, llama_folder: Path) -> None:
    hf = load_hf(llama_folder)
    for sets, closed, engine in (([TITLES] * 3, True, "vllm:forced"), ([LABELS] * 3, False, "vllm:one-token")):
        ours, theirs = vllm_backend.score(PROMPTS, sets, closed=closed), hf.score(PROMPTS, sets, closed=closed)
        assert ours[0].engine == engine
        for a, b in zip(ours, theirs, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=2e-3)


@pytest.mark.vllm
def test_vllm_greedy_text_equals_transformers_in_float32(vllm_backend: Backend, llama_folder: Path) -> None:
    hf = load_hf(llama_folder)
    assert [d.text for d in vllm_backend.generate(PROMPTS, max_tokens=8)] == [
        d.text for d in hf.generate(PROMPTS, max_tokens=8)
    ]


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_in_bfloat16_reads_labels_from_a_float32_head(tmp_path: Path) -> None:
    """Logits of a bfloat16 head have steps of 1/8 from 16 on, so 23 of 40 rating prompts had tied labels."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    import torch
    from transformers import AutoModelForCausalLM

    from llmrec.backends.vllm.backend import VLLMBackend
    from llmrec.models.load import load_tokenizer
    from llmrec.recipe.schema import ModelSection
    from tests.conftest import make_model

    folder = make_model(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        # Logits as large as those of trained models; the first norm undoes the scaling of the tied embeddings.
        model.get_output_embeddings().weight.mul_(60)
    model.save_pretrained(folder)
    section = ModelSection(name=str(folder))
    encoder = Encoder(load_tokenizer(str(folder), section), max_length=512)
    prompts = [prompt(f"Which one, {n}?") for n in range(12)]
    backend = VLLMBackend(str(folder), encoder, dtype="bfloat16")
    try:
        scores = backend.score(prompts, [LABELS] * 12, closed=False)
    finally:
        backend.close()
    assert all(len(set(results.logprobs)) == len(LABELS) for results in scores)
    assert all(value <= 1e-6 for results in scores for value in results.logprobs)
