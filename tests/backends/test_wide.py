"""Candidates of many prompts in one pass, as on a GPU: the same scores, and far fewer passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hub

from llmrec.backends.encode import Encoder
from llmrec.backends.hf.backend import HFBackend
from llmrec.backends.search import single_token_labels
from llmrec.models.load import load_model, load_tokenizer, write
from llmrec.recipe.schema import ModelSection, ShapeSection
from llmrec.types import Message, Prompt, Segment
from tests.conftest import make_tokenizer

TITLES = ("Heat (1995)", "Fargo (1996)", "Casino", "Heat", "Toy Story 2", "Alien", "Alien 2")
PROMPTS = [
    Prompt(
        messages=(Message("user", (Segment("text", f"{n} Toy Story Heat Fargo " * (1 + 2 * n)),)),),
        answer_prefix=(Segment("item", "Jaws\n"),),
        stop="\n",
    )
    for n in range(6)
]
KINDS = ("llama_folder", "qwen_folder", "window", "soft cap", "t5")


def windowed(kind: str) -> Any:
    """A random model whose layers see 16 tokens, or whose logits are capped."""
    tokenizer = make_tokenizer()
    shape: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    if kind == "window":
        return hub.MistralForCausalLM(hub.MistralConfig(**shape, sliding_window=16)).eval()
    return hub.Gemma2ForCausalLM(hub.Gemma2Config(**shape, final_logit_softcapping=3.0)).eval()


@pytest.fixture(params=KINDS)
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Encoder]:
    kind = request.param
    if kind in ("window", "soft cap"):
        return windowed(kind), Encoder(make_tokenizer(), max_length=512)
    if kind == "t5":
        shape = ShapeSection(kind="encoder-decoder", layers=2, width=32, heads=2, head_width=16, feedforward=64)
        write(shape, tmp_path, seed=0)
    folder = tmp_path if kind == "t5" else request.getfixturevalue(kind)
    section = ModelSection(name=str(folder), dtype="float32")
    return load_model(str(folder), section), Encoder(load_tokenizer(str(folder), section), max_length=512)


def passes(model: Any) -> list[int]:
    """Count the passes of a model's decoder from now on."""
    count = [0]
    model.get_decoder().register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    return count


def test_scores_are_those_of_one_prompt_after_the_other(loaded: tuple[Any, Encoder]) -> None:
    model, encoder = loaded
    narrow, wide = HFBackend(model, encoder, wide=False), HFBackend(model, encoder, wide=True)
    for candidates, closed in ((TITLES, True), (("1", "2", "3"), False), (("Heat",), True)):
        asked = [candidates] * len(PROMPTS)
        expected = narrow.score(PROMPTS, asked, closed=closed)
        found = wide.score(PROMPTS, asked, closed=closed)
        for one, other in zip(expected, found, strict=True):
            assert other.logprobs == pytest.approx(one.logprobs, abs=2e-3)
            assert (other.tokens, other.prompt_tokens, other.engine) == (one.tokens, one.prompt_tokens, one.engine)


def test_the_score_of_a_text_does_not_depend_on_what_it_shares_with_others(loaded: tuple[Any, Encoder]) -> None:
    model, encoder = loaded
    prompt = Prompt(messages=PROMPTS[0].messages, stop="")
    ids, alike = encoder.prompt(prompt), ("Toy Story 2", "Toy Story 3")
    # They differ in their last token alone.
    assert single_token_labels(encoder.continuations(prompt, ids, alike, closed=True), closed=False)
    for wide in (False, True):
        backend = HFBackend(model, encoder, wide=wide)
        two, three = (backend.score([prompt], [texts])[0] for texts in (alike, (*alike, "Casino")))
        assert two.logprobs == pytest.approx(three.logprobs[:2], abs=2e-3) and two.tokens == three.tokens[:2]


def test_a_batch_takes_two_passes_and_holds_no_more_tokens_than_it_may(llama_folder: Path) -> None:
    section = ModelSection(name=str(llama_folder), dtype="float32")
    model = load_model(str(llama_folder), section)
    encoder = Encoder(load_tokenizer(str(llama_folder), section), max_length=512)
    for tokens, most in ((10**6, 2), (300, 2 * len(PROMPTS) - 1)):
        backend = HFBackend(model, encoder, wide=True, batch_tokens=tokens)
        backend.score(PROMPTS[:1], [TITLES])  # proves the mask
        count = passes(model)
        backend.score(PROMPTS, [TITLES] * len(PROMPTS))
        assert 2 <= count[0] <= most
    backend = HFBackend(model, encoder, wide=True)
    backend.score(PROMPTS[:1], [("1", "2")], closed=False)  # proves the head
    count = passes(model)
    backend.score(PROMPTS, [("1", "2")] * len(PROMPTS), closed=False)
    assert count[0] == 1


def test_what_a_pass_holds_follows_from_the_device(loaded: tuple[Any, Encoder]) -> None:
    model, encoder = loaded
    assert HFBackend(model, encoder).batch_tokens == 4096 and not HFBackend(model, encoder)._wide
    assert HFBackend(model, encoder, batch_tokens=100).batch_tokens == 100
