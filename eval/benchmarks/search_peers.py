"""Common implementations with transformers, for eval/benchmarks/search.py: trie, beams and loops.

The trie is the nested dict of OpenP5, MiniOneRec and LC-Rec (from GENRE), which ``generate`` queries for each beam at
each step through ``prefix_allowed_tokens_fn``. Log-probabilities are over the full vocabulary in all implementations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Path = tuple[int, ...]


class Trie:
    """Nested dicts, one level per token."""

    def __init__(self, paths: Sequence[Sequence[int]]) -> None:
        self.root: dict[int, Any] = {}
        for path in paths:
            level = self.root
            for token in path:
                level = level.setdefault(token, {})

    def get(self, prefix: Sequence[int]) -> list[int]:
        """Return the allowed next tokens."""
        level = self.root
        for token in prefix:
            if token not in level:
                return []
            level = level[token]
        return list(level)


def generate(
    model: Any, trie: Trie, prompts: Sequence[Sequence[int]], *, width: int, length: int
) -> list[dict[Path, float]]:
    """Return the paths that ``generate`` finds for prompts of equal length, with their log-probabilities."""
    size, rows = len(prompts[0]), torch.tensor([list(prompt) for prompt in prompts])
    with torch.inference_mode():
        out = model.generate(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=length,
            length_penalty=0.0,
            do_sample=False,
            prefix_allowed_tokens_fn=lambda _, row: trie.get(row[size:].tolist()),
            output_scores=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
    paths = [tuple(row[size:].tolist()) for row in out.sequences]
    scores = out.sequences_scores.tolist()
    cuts = range(0, len(paths), width)
    return [dict(zip(paths[at : at + width], scores[at : at + width], strict=True)) for at in cuts]


def score(model: Any, prompt: Sequence[int], tails: Sequence[Path], *, all_logits: bool = True) -> list[float]:
    """Return the log-probability of each candidate, one forward pass each; ``all_logits``: compute all logits."""
    scores = []
    for tail in tails:
        row = torch.tensor([[*prompt, *tail]])
        keep = 0 if all_logits else len(tail) + 1
        with torch.inference_mode():
            logits = model(input_ids=row, use_cache=False, logits_to_keep=keep).logits[0]
            logprobs = logits[-len(tail) - 1 : -1].float().log_softmax(-1)
            scores.append(float(logprobs.gather(-1, torch.tensor(tail)[:, None]).double().sum()))
    return scores
