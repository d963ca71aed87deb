"""What every backend must do, whichever engine answers. vLLM here is the real engine on a tiny random model."""

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


def prompt(question: str, given: str = "", stop: str | None = None) -> Prompt:
    answer = (Segment("item", given),) if given else ()
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
    """A client of a server that answers from hashes; tests/backends/test_openai_vllm.py asks a real one."""
    encoder = Encoder(make_tokenizer(), max_length=512)
    with running(Behaviour(latency=0.01, count=lambda text: len(encoder.tokenizer.encode(text)))) as server:
        backend = OpenAIBackend(section(server.url), encoder)
        yield backend
        backend.close()


@pytest.fixture(params=["fake", "hf-packed", "hf-rows", "openai", pytest.param("vllm", marks=pytest.mark.vllm)])
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


def test_scores_come_in_order_one_per_candidate(backend: Backend) -> None:
    sets = [TITLES, LABELS, TITLES[:2]]
    found = backend.score(PROMPTS, sets)
    assert [len(scores.logprobs) for scores in found] == [5, 5, 2]
    assert all(math.isfinite(value) and value < 0 for scores in found for value in scores.logprobs)
    assert all(n >= 1 for scores in found for n in scores.tokens)


def test_scores_do_not_depend_on_the_batch_or_on_candidate_order(backend: Backend) -> None:
    together = backend.score(PROMPTS, [TITLES, TITLES, TITLES])
    alone = backend.score(PROMPTS[2:], [TITLES[::-1]])[0]
    assert together[2].logprobs == pytest.approx(alone.logprobs[::-1], abs=1e-4)


def test_generates_in_order_and_within_the_limit(backend: Backend) -> None:
    found = backend.generate(PROMPTS, max_tokens=6)
    assert len(found) == 3
    assert all(0 <= done.completion_tokens <= 6 for done in found)
    assert all(done.finish_reason in ("stop", "length") for done in found)
    assert "\n" not in found[0].text
    assert [done.text for done in found] == [done.text for done in backend.generate(PROMPTS, max_tokens=6)]


# --------------------------------------------------------------------------- exactness


def test_a_search_finds_what_scores_say_is_best(backend: Backend) -> None:
    """Whatever the engine: with room for everything, a search is a sort of all scores."""
    if "search" not in backend.capabilities:
        pytest.skip(f"{backend.name} does not search")
    texts = [f"{film} {n}" for film in TITLES for n in range(4)]
    scores = backend.score(PROMPTS, [texts] * len(PROMPTS))
    excluded: list[list[int]] = [[], [0, 3, 7], list(range(len(texts) - 2))]
    for exact, width in ((False, len(texts) * 12), (True, 3)):
        found = backend.search(PROMPTS, texts, k=3, width=width, excluded=excluded[: len(PROMPTS)], exact=exact)
        for result, known, out in zip(found, scores, excluded, strict=False):
            left = [place for place in range(len(texts)) if place not in out]
            best = sorted(left, key=lambda place: -known.logprobs[place])[:3]
            assert result.certified and list(result.items) == best, (exact, width)
            assert result.scores == pytest.approx([known.logprobs[place] for place in best], abs=1e-2)
            assert bool(result.short) == (len(left) < 3)


def test_a_search_refuses_texts_that_are_equal(backend: Backend) -> None:
    if "search" not in backend.capabilities or backend.name == "fake":
        pytest.skip(f"{backend.name} has no tokens")
    with raises(DataError, Facts("duplicate", says=("items 0 and 2", "{scheme: title}"))):
        backend.search(PROMPTS, ["Heat", "Fargo", "Heat"], k=1, width=1)


def by_hand(backend: Any, asked: Prompt, text: str, *, closed: bool) -> float:
    """Sum full-softmax log-probabilities over one plain forward of prompt + continuation."""
    import torch

    ids = backend.encoder.prompt(asked)
    tail = list(backend.encoder.continuation(asked, text, closed=closed))
    with torch.no_grad():
        logprobs = backend.model(input_ids=torch.tensor([ids + tail])).logits[0].float().log_softmax(-1)
    return float(sum(logprobs[len(ids) + k - 1, token] for k, token in enumerate(tail)))


@pytest.mark.parametrize("kind", ["llama_folder", "qwen_folder"])
@pytest.mark.parametrize("closed", [True, False])
def test_packed_scores_equal_plain_forwards(kind: str, closed: bool, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    packed, rows = load_hf(folder, packed=True), load_hf(folder, packed=False)
    found = packed.score(PROMPTS, [TITLES] * 3, closed=closed)
    assert found[0].engine == "hf:tree"
    assert rows.score(PROMPTS, [TITLES] * 3, closed=closed)[0].engine == "hf:rows"
    for asked, scores, plain in zip(PROMPTS, found, rows.score(PROMPTS, [TITLES] * 3, closed=closed), strict=True):
        expected = [by_hand(packed, asked, title, closed=closed) for title in TITLES]
        assert scores.logprobs == pytest.approx(expected, abs=1e-4)
        assert plain.logprobs == pytest.approx(expected, abs=1e-4)


def test_labels_are_read_from_one_distribution(llama_folder: Path) -> None:
    hf: Any = load_hf(llama_folder)
    (found,) = hf.score(PROMPTS[1:2], [LABELS], closed=False)
    assert found.engine == "hf:one-token"
    assert found.logprobs == pytest.approx([by_hand(hf, PROMPTS[1], label, closed=False) for label in LABELS], abs=1e-4)


def test_batched_generation_equals_one_by_one(llama_folder: Path) -> None:
    hf = load_hf(llama_folder)
    together = [done.text for done in hf.generate(PROMPTS, max_tokens=8)]
    assert together == [hf.generate([asked], max_tokens=8)[0].text for asked in PROMPTS]


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


# --------------------------------------------------------------------------- properties, whatever the backend


def test_a_candidate_set_equal_to_the_catalogue_ranks_as_its_search_does(backend: Backend) -> None:
    if "search" not in backend.capabilities:
        pytest.skip("this backend searches no catalogue")
    catalogue = [f"{title} {year}" for title in ("Heat", "Fargo", "Alien", "Jaws") for year in range(1990, 1996)]
    scores = backend.score(PROMPTS[:1], [catalogue])[0].logprobs
    (found,) = backend.search(PROMPTS[:1], catalogue, k=len(catalogue), width=len(catalogue), exact=True)
    order = sorted(range(len(catalogue)), key=lambda n: -scores[n])
    assert list(found.items) == order
    assert found.scores == pytest.approx([scores[n] for n in order], abs=1e-3)


def test_an_unrelated_prompt_and_another_batch_change_no_score(backend: Backend) -> None:
    alone = [backend.score([each], [TITLES])[0].logprobs for each in PROMPTS]
    others = [prompt(f"Who asked for number {n}?", "Brazil\n" * n, "\n") for n in range(1, 6)]
    mixed = [*others[:2], PROMPTS[0], *others[2:], PROMPTS[1], PROMPTS[2]]
    together = backend.score(mixed, [TITLES] * len(mixed))
    for place, values in zip((2, 6, 7), alone, strict=True):
        assert together[place].logprobs == pytest.approx(values, abs=1e-4)


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_in_bfloat16_reads_labels_from_a_float32_head(tmp_path: Path) -> None:
    """Of 40 rating prompts 23 had tied labels: logits of a bfloat16 head lie 1/8 apart from 16 on."""
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
        # Logits as large as those of trained models; the tied embeddings are divided again by the first norm.
        model.get_output_embeddings().weight.mul_(60)
    model.save_pretrained(folder)
    section = ModelSection(name=str(folder))
    encoder = Encoder(load_tokenizer(str(folder), section), max_length=512)
    asked = [prompt(f"Which one, {n}?") for n in range(12)]
    backend = VLLMBackend(str(folder), encoder, dtype="bfloat16")
    try:
        scores = backend.score(asked, [LABELS] * 12, closed=False)
    finally:
        backend.close()
    assert all(len(set(found.logprobs)) == len(LABELS) for found in scores)
    assert all(value <= 1e-6 for found in scores for value in found.logprobs)
