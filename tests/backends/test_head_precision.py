"""Precision of label and title scores of a bfloat16 model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmrec.backends.hf.backend import HFBackend
from llmrec.models.traits import chosen_logprobs
from tests.conftest import encoder_of
from tests.servers.client import question

LABELS = tuple("ABCDEFGHIJKLMNOP")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chosen_logprobs_equal_the_full_softmax(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 700, bias=False).to(dtype)
    states = (8 * torch.randn(600, 32)).to(dtype)
    after, targets = torch.randint(0, 600, (900,)), torch.randint(0, 700, (900,))
    logits = states.float() @ head.weight.float().T
    exact = logits.double().log_softmax(-1)[after, targets]
    with torch.inference_mode():
        chosen = chosen_logprobs(head, states, after, targets)
    # A row's total is shared by its tokens, and the largest logits of a bfloat16 head are rounded in it.
    assert torch.allclose(chosen, exact, atol=1e-4 if dtype == torch.float32 else 0.07)
    with torch.inference_mode():
        again = chosen_logprobs(head, states, torch.zeros(700, dtype=torch.long), torch.arange(700))
    row = logits[0].double()
    assert torch.allclose(again - again[0], row - row[0], atol=1e-4)


def test_labels_of_a_bfloat16_model_do_not_tie_by_rounding(llama_folder: Path) -> None:
    encoder = encoder_of(llama_folder)
    prompts = [question(f"Which one, {n}?") for n in range(12)]
    scores = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=dtype)
        with torch.no_grad():
            # Logits as large as in trained models, where bfloat16 is coarse.
            model.get_output_embeddings().weight.mul_(60)
        scores[dtype] = HFBackend(model, encoder).score(prompts, [LABELS] * len(prompts), closed=False)
    for full, half in zip(scores[torch.float32], scores[torch.bfloat16], strict=True):
        assert len(set(half.logprobs)) == len(LABELS)
        # Hidden states are bfloat16 too; the head must not add to their error.
        spread = max(full.logprobs) - min(full.logprobs)
        assert max(abs(a - b) for a, b in zip(full.logprobs, half.logprobs, strict=True)) < 0.05 * spread
