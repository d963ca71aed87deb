"""Candidates of many prompts in one pass, as on a GPU: the same scores with fewer passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hub

from llmrec.backends.encode import Encoder
from llmrec.backends.hf.backend import HFBackend
from llmrec.backends.search import single_token_labels
from llmrec.models.load import write_random_model
from llmrec.recipe.schema import ShapeSection
from llmrec.types import Message, Prompt, Segment
from tests.conftest import encoder_of, make_tokenizer, opened

TITLES = ("Heat (1995)", "Fargo (1996)", "Casino", "Heat", "Toy Story 2", "Alien", "Alien 2")
PROMPTS = [
    Prompt(
        messages=(Message("user", (Segment("text", f"{n} Toy Story Heat Fargo " * (1 + 2 * n)),)),),
        answer_prefix=(Segment("item", "Jaws\n"),),
        stop="\n",
    )
    for n in range(6)
]
KINDS = ("llama_folder", "window", "soft cap", "t5")


def windowed(kind: str) -> Any:
    """Return a random model whose layers attend to 16 tokens, or whose logits are capped."""
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
        write_random_model(shape, tmp_path, seed=0)
    folder = tmp_path if kind == "t5" else request.getfixturevalue(kind)
    return opened(folder)[0], encoder_of(folder, 512)


def passes(model: Any) -> list[int]:
    """Count the forward passes of a model's decoder."""
    count = [0]
    model.get_decoder().register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    return count


def test_wide_scores_equal_those_of_single_prompts(loaded: tuple[Any, Encoder]) -> None:
    model, encoder = loaded
    narrow, wide = HFBackend(model, encoder, wide=False), HFBackend(model, encoder, wide=True)
    for candidates, closed in ((TITLES, True), (("1", "2", "3"), False), (("Heat",), True)):
        candidate_sets = [candidates] * len(PROMPTS)
        expected = narrow.score(PROMPTS, candidate_sets, closed=closed)
        results = wide.score(PROMPTS, candidate_sets, closed=closed)
        for single, together in zip(expected, results, strict=True):
            assert together.logprobs == pytest.approx(single.logprobs, abs=2e-3)
            assert (together.tokens, together.prompt_tokens, together.engine) == (
                single.tokens,
                single.prompt_tokens,
                single.engine,
            )


def test_score_of_a_text_does_not_depend_on_the_others(loaded: tuple[Any, Encoder]) -> None:
    model, encoder = loaded
    prompt = Prompt(messages=PROMPTS[0].messages, stop="")
    ids, similar = encoder.prompt(prompt), ("Toy Story 2", "Toy Story 3")
    # They differ only in the last token.
    assert single_token_labels(encoder.continuations(prompt, ids, similar, closed=True), closed=False)
    for wide in (False, True):
        backend = HFBackend(model, encoder, wide=wide)
        two, three = (backend.score([prompt], [texts])[0] for texts in (similar, (*similar, "Casino")))
        assert two.logprobs == pytest.approx(three.logprobs[:2], abs=2e-3) and two.tokens == three.tokens[:2]


def test_batch_takes_two_passes_within_its_limit(llama_folder: Path) -> None:
    model, encoder = opened(llama_folder)[0], encoder_of(llama_folder, 512)
    backend = HFBackend(model, encoder)
    assert backend.batch_tokens == 4096 and not backend._wide
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
