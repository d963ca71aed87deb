"""Scores of labels and titles of a bfloat16 model: its logits lie far apart, and what is read off them must not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrec.backends.encode import Encoder
from llmrec.backends.hf.backend import HFBackend
from llmrec.models.traits import chosen_logprobs
from llmrec.types import Message, Prompt, Segment
from tests.conftest import make_model

LABELS = tuple("ABCDEFGHIJKLMNOP")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chosen_tokens_equal_the_softmax_of_the_whole_vocabulary(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 700, bias=False).to(dtype)
    states = (8 * torch.randn(600, 32)).to(dtype)
    after, wanted = torch.randint(0, 600, (900,)), torch.randint(0, 700, (900,))
    logits = states.float() @ head.weight.float().T
    exact = logits.double().log_softmax(-1)[after, wanted]
    with torch.inference_mode():
        found = chosen_logprobs(head, states, after, wanted)
    # A row's total is shared by its tokens, and the largest logits of a bfloat16 head are rounded in it.
    assert torch.allclose(found, exact, atol=1e-4 if dtype == torch.float32 else 0.07)
    with torch.inference_mode():
        again = chosen_logprobs(head, states, torch.zeros(700, dtype=torch.long), torch.arange(700))
    whole = logits[0].double()
    assert torch.allclose(again - again[0], whole - whole[0], atol=1e-4)


def test_labels_of_a_bfloat16_model_do_not_tie_by_rounding(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    encoder = Encoder(AutoTokenizer.from_pretrained(folder), max_length=256)
    prompts = [Prompt(messages=(Message("user", (Segment("text", f"Which one, {n}?"),)),)) for n in range(12)]
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        with torch.no_grad():
            # Logits as large as those of trained models, where bfloat16 is coarse.
            model.get_output_embeddings().weight.mul_(60)
        found[dtype] = HFBackend(model, encoder).score(prompts, [LABELS] * len(prompts), closed=False)
    for full, half in zip(found[torch.float32], found[torch.bfloat16], strict=True):
        assert len(set(half.logprobs)) == len(LABELS)
        # Hidden states are bfloat16 too; beyond their share of the error nothing may be lost.
        spread = max(full.logprobs) - min(full.logprobs)
        assert max(abs(a - b) for a, b in zip(full.logprobs, half.logprobs, strict=True)) < 0.05 * spread
