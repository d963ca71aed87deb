"""Times catalogue search and candidate scoring, compared with common implementations with transformers.

``python -m eval.benchmarks.search eval/results/search.json``. All use the same model with 41 million random weights and
the same threads, alternately in one process; the minimum and the median of the rounds are stored, and a goal is met
only if both meet it. Random weights suffice for timing.

- beam: 8 users, prompts of 200 tokens, 10,000 codes of 4 tokens that branch at every token, 20 beams; compared with
  ``generate`` with a prefix function.
- limit: the same, compared with one plain forward pass over the minimum number of tokens of an exact search.
- scoring: 100 candidates of one user, compared with one forward pass each.
- warm: a user with one new interaction, compared with the same search without a prefix cache.
- catalogue: building the tree of a million items, and the cost of a search step over ten thousand and a million items.

Section names after the file measure only these and keep the others; ``BENCH_CLOCK=processor`` measures processor time,
for a busy machine.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

# Waiting threads sleep, because on a busy machine spinning takes ten times the processor time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from eval.benchmarks import search_peers as peers
from eval.benchmarks.search_alone import FIRST, build_codes, measure_catalogue
from eval.benchmarks.timing import alternated, faster, measured, seconds_now, summary, within
from llmrec.backends.hf.backend import HFBackend
from llmrec.backends.hf.tree import MaskedTree
from llmrec.decode.beam import beam_search
from llmrec.decode.token_tree import TokenTrie
from llmrec.machine import cpu_has_bf16
from llmrec.models.load import silence_libraries
from llmrec.types import SearchResult

ROUNDS, USERS, PROMPT, WIDTH, CANDIDATES = 3, 8, 200, 20, 100
HISTORIES, EVENT, FEW, WARM_ROUNDS = (220, 440, 880), 4, 10, 9
OURS, LIMIT, GENERATE = "llmrec", "plain forwards, as many tokens", "transformers generate, dict trie"
COLD = "nothing kept"
EACH, EACH_SHORT = "a forward a candidate", "a forward a candidate, few logits"


def build_model(dtype: torch.dtype) -> Any:
    """Return the model for the measurements."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=33_024,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen2ForCausalLM(config).eval().to(dtype)


def prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random text tokens."""
    return np.random.default_rng(seed).integers(0, FIRST, (count, length)).tolist()  # type: ignore[no-any-return]


def measure_beam(model: Any, precise: Any) -> dict[str, Any]:
    """Search of a batch, compared with ``generate``."""
    codes, batch = build_codes(), prompts(USERS, PROMPT)
    tree, trie = TokenTrie.of(codes), peers.Trie(codes)
    engine = MaskedTree(model, 0)
    beam_search(engine, tree, batch, k=WIDTH, width=WIDTH)
    ways: dict[str, Callable[[], Any]] = {
        OURS: lambda: beam_search(MaskedTree(model, 0), tree, batch, k=WIDTH, width=WIDTH),
        GENERATE: lambda: peers.generate(model, trie, batch, width=WIDTH, length=tree.depth),
    }
    seconds, results = alternated(ROUNDS, ways)
    exact = agreement(
        codes,
        beam_search(MaskedTree(precise, 0), tree, batch[:2], k=WIDTH, width=WIDTH),
        peers.generate(precise, trie, batch[:2], width=WIDTH, length=tree.depth),
    )
    assert exact["shared_items"] == 1 and exact["largest_difference_nats"] < 1e-4, "the same lists in float32"
    return {
        "what": f"{USERS} users, prompts of {PROMPT} tokens, {len(codes):,} codes of {tree.depth} tokens that part at "
        f"every token, {WIDTH} beams and as many items, in one batch.",
        "seconds": seconds,
        "work": {"tokens": engine.tokens, "forwards": engine.forwards, "head_rows": engine.head_rows},
        "tokens_of_generate": USERS * WIDTH * (PROMPT + tree.depth - 1),
        "agreement": agreement(codes, results[OURS], results[GENERATE]),
        "agreement_in_float32": exact,
        "goals": {
            "generate": faster(seconds, GENERATE, OURS, 8.0) | {"what": "times faster than generate"},
        },
    }


def measure_limit(model: Any) -> dict[str, Any]:
    """The same search, compared with the minimum tokens and logit rows of an exact search."""
    codes, batch = build_codes(), prompts(USERS, PROMPT)
    tree, engine = TokenTrie.of(codes), MaskedTree(model, 0)
    beam_search(engine, tree, batch, k=WIDTH, width=WIDTH)
    behind = sum(min(WIDTH, end - start) for start, end in itertools.pairwise(tree.starts[1:-1]))
    assert engine.tokens == USERS * (PROMPT + behind), "no more tokens than the limit"
    ways: dict[str, Callable[[], Any]] = {
        OURS: lambda: beam_search(MaskedTree(model, 0), tree, batch, k=WIDTH, width=WIDTH),
        LIMIT: lambda: plain_forwards(model, batch, behind),
    }
    seconds, _ = alternated(ROUNDS, ways)
    return {
        "what": f"{USERS} users, prompts of {PROMPT} tokens, {len(codes):,} codes of {tree.depth} tokens that part at "
        f"every token, {WIDTH} beams, in one batch: {engine.tokens:,} tokens and {engine.head_rows} rows of logits in "
        f"{engine.forwards} forwards, compared with as many tokens and at least as many rows in one.",
        "seconds": seconds,
        "goals": {
            "forwards": within(seconds, OURS, LIMIT, 1.1)
            | {"what": "times as long as one plain forward pass over its tokens"}
        },
    }


def agreement(
    codes: Sequence[peers.Path], ours: Sequence[SearchResult], theirs: Sequence[dict[peers.Path, float]]
) -> dict[str, float]:
    """The number of common items of two lists, and the difference of their scores."""
    shared, apart = [], 0.0
    for mine, other in zip(ours, theirs, strict=True):
        scores = {codes[item]: value for item, value in zip(mine.items, mine.scores, strict=True)}
        both = scores.keys() & other.keys()
        shared.append(len(both) / len(scores))
        apart = max(apart, *(abs(scores[path] - other[path]) for path in both))
    return {"shared_items": statistics.mean(shared), "largest_difference_nats": apart}


def plain_forwards(model: Any, batch: Sequence[Sequence[int]], behind: int) -> None:
    """Plain causal forward passes over the minimum tokens and logit rows of an exact search."""
    rows = torch.tensor([[*prompt, *prompt[:behind]] for prompt in batch])
    with torch.inference_mode():
        hidden = model.get_decoder()(input_ids=rows, use_cache=False).last_hidden_state
        for part in hidden[:, -behind - 1 :].flatten(0, 1).split(256):
            model.get_output_embeddings()(part).float().logsumexp(-1)


class TokenIds:
    """Replaces an encoder: prompts and candidates are token ids, and no token ends an answer."""

    stop_ids: ClassVar[frozenset[int]] = frozenset()
    tokenizer: ClassVar[Any] = SimpleNamespace(pad_token_id=None)
    max_length: ClassVar[int] = 1024

    def prompt(self, prompt: Any) -> list[int]:
        return list(prompt)

    def continuations(self, prompt: Any, ids: Any, texts: Any, *, closed: bool) -> list[tuple[int, ...]]:
        return [tuple(text) for text in texts]


def measure_scoring(model: Any, precise: Any) -> dict[str, Any]:
    """Candidate scoring, compared with one forward pass each."""
    codes, dice = build_codes(), np.random.default_rng(1)
    (prompt,) = prompts(1, PROMPT, seed=1)
    tails = [codes[n] for n in dice.choice(len(codes), CANDIDATES, replace=False)]

    def ours(model: Any) -> Any:
        backend = HFBackend(model, TokenIds(), packed=True)  # type: ignore[arg-type]
        return backend.score([prompt], [tails])[0].logprobs  # type: ignore[list-item]

    ours(model)
    ways: dict[str, Callable[[], Any]] = {
        OURS: lambda: ours(model),
        EACH: lambda: peers.score(model, prompt, tails),
        EACH_SHORT: lambda: peers.score(model, prompt, tails, all_logits=False),
    }
    seconds, results = alternated(ROUNDS, ways)
    apart = difference(ours(precise), peers.score(precise, prompt, tails, all_logits=False))
    assert apart < 1e-4, "the same scores in float32"
    return {
        "what": f"{CANDIDATES} candidates of {len(tails[0])} tokens for one user, a prompt of {PROMPT} tokens.",
        "seconds": seconds,
        "largest_difference_nats": difference(results[OURS], results[EACH]),
        "largest_difference_nats_in_float32": apart,
        "goals": {
            "each": faster(seconds, EACH_SHORT, OURS, 20.0) | {"what": "times faster than a forward a candidate"}
        },
    }


def difference(one: Sequence[float], two: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, two, strict=True))


def measure_warm(model: Any, precise: Any) -> dict[str, Any]:
    """Search after a prompt that grew by one interaction, compared with a search without a prefix cache."""
    times, goals, same = {}, {}, []
    for length in HISTORIES:
        spent: dict[str, list[float]] = {OURS: [], COLD: []}
        for _ in range(WARM_ROUNDS):
            (_, fast), (_, slow) = warm_and_cold(model, length)
            for name, seconds in ((OURS, fast), (COLD, slow)):
                spent[name].append(seconds)
        (warm, _), (cold, _) = warm_and_cold(precise, length)
        same.append(warm.items == cold.items)
        times[str(length)] = {name: summary(values) for name, values in spent.items()}
        goals[str(length)] = faster(times[str(length)], COLD, OURS, 3.0) | {
            "what": f"times faster than with nothing kept, after a prompt of {length} tokens"
        }
    assert all(same), "the same lists in float32"
    return {
        "what": f"One user, one new event of {EVENT} tokens, 10,000 codes of 4 tokens, {FEW} beams.",
        "seconds": times,
        "same_lists_in_float32": all(same),
        "goals": goals,
    }


def warm_and_cold(model: Any, length: int) -> list[tuple[SearchResult, float]]:
    """Search after a prompt with and without a cached prefix; return both lists with seconds."""
    tree, kept = TokenTrie.of(build_codes()), MaskedTree(model, 0, warm=True)
    (grown,) = prompts(1, length + EVENT, seed=length)
    beam_search(kept, tree, [grown[:length]], k=FEW, width=FEW)
    results = []
    for engine in (kept, MaskedTree(model, 0)):
        begin = seconds_now()
        (result,) = beam_search(engine, tree, [grown], k=FEW, width=FEW)
        results.append((result, seconds_now() - begin))
    return results


def main(target: Path, only: Sequence[str]) -> None:
    """Measure and write."""
    silence_libraries()
    model = build_model(torch.bfloat16 if cpu_has_bf16() else torch.float32)
    precise = build_model(torch.float32)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "beam": lambda: measure_beam(model, precise),
        "limit": lambda: measure_limit(model),
        "scoring": lambda: measure_scoring(model, precise),
        "warm": lambda: measure_warm(model, precise),
        "catalogue": measure_catalogue,
    }
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    head = {
        "command": "python -m eval.benchmarks.search eval/results/search.json",
        "what": "search of a catalogue and scores of candidates with transformers",
        "rounds": {"warm": WARM_ROUNDS, "others": ROUNDS},
        "model": f"{size:.0f} million random weights, {str(model.dtype).removeprefix('torch.')}",
        "threads": torch.get_num_threads(),
    }
    measured(target, head, parts, only)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
