"""Times catalogue search and candidate scoring, compared with common implementations with vLLM.

``python -m eval.benchmarks.search_vllm eval/results/search_vllm.json``. All use the same model with 41 million random
weights; the prefix cache is cleared before each measurement. Measurements of one engine alternate; two engines with
different block sizes run one after the other in each round, since they would share the cores. The minimum and the
median over all rounds are stored, and a goal is met only if both meet it.

- search: 8 users, 10,000 codes of 4 tokens of 256, 20 beams, compared with ``LLM.beam_search``, which is unconstrained:
  with the block size of llmrec (32 tokens), and with vLLM's default. Prompts of 224 tokens are a whole number of
  blocks, those of 223 are not, and those of 216 need the most tokens per beam.
- scoring: 20 candidates for each of 8 users, codes of 4 tokens and titles of 12, compared with ``prompt_logprobs``,
  after prompts of 200 tokens, and of 223, the length with the most tokens per candidate.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Waiting threads sleep, because on a busy machine spinning takes ten times the processor time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from eval.benchmarks.provenance import provenance
from eval.benchmarks.search import build_model
from eval.benchmarks.timing import faster, summary, within
from llmrec.backends.vllm.backend import VLLMBackend, VLLMTree, prepare_environment
from llmrec.decode.beam import beam_search
from llmrec.decode.token_tree import TokenTrie
from llmrec.durable import write_json
from llmrec.machine import cpu_has_bf16
from llmrec.models.load import silence_libraries
from tests.conftest import make_tokenizer

ROUNDS, REPEATS, USERS, WIDTH, CANDIDATES = 2, 3, 8, 20, 20
LENGTHS, SHORT = (223, 224, 216), 200
FIRST, LEVEL, ITEMS, DEPTH, TITLE = 32_000, 256, 10_000, 4, 12
OURS, NODES, EQUAL, DEFAULT = "llmrec", "llmrec, no forced tokens", "beam_search, blocks of 32", "beam_search, default"
PROMPT_LOGPROBS, LONG = "prompt_logprobs", "codes, long prompts"
Spent = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt of tokens."""

    ids: tuple[int, ...]
    stop: None = None


class TokenEncoder:
    """Replaces an encoder; prompts and texts are tokens."""

    max_length = 1024

    def __init__(self, codes: Sequence[Sequence[int]]) -> None:
        self._catalogue = TokenTrie.of(codes)

    def prompt(self, prompt: TokenPrompt) -> list[int]:
        return list(prompt.ids)

    def continuations(self, prompt: TokenPrompt, ids: Any, texts: Sequence[tuple[int, ...]], *, closed: bool) -> Any:
        return list(texts)

    def catalogue(self, texts: Any, stop: None) -> TokenTrie:
        return self._catalogue


def build_codes() -> list[tuple[int, ...]]:
    """Distinct random codes."""
    numbers = np.random.default_rng(0).choice(LEVEL**DEPTH, size=ITEMS, replace=False)
    columns = [FIRST + LEVEL * n + (numbers // LEVEL**n) % LEVEL for n in range(DEPTH)]
    return [tuple(row) for row in np.stack(columns, axis=1).tolist()]


def build_prompts(length: int, seed: int) -> list[TokenPrompt]:
    """Random text tokens."""
    ids = np.random.default_rng([seed, length]).integers(3, FIRST, (USERS, length)).tolist()
    return [TokenPrompt(tuple(row)) for row in ids]


def tokens(prompts: Sequence[TokenPrompt]) -> list[dict[str, list[int]]]:
    """Return prompts in vLLM's format."""
    return [{"prompt_token_ids": list(prompt.ids)} for prompt in prompts]


def save_model(folder: Path) -> str:
    """Write the model, and return its type."""
    dtype = torch.bfloat16 if cpu_has_bf16() else torch.float32
    build_model(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(dtype).removeprefix("torch.")


def free_search(engine: Any, prompts: Sequence[TokenPrompt]) -> Any:
    """Search without a catalogue, by vLLM's ``beam_search``."""
    import vllm

    params = vllm.sampling_params.BeamSearchParams(beam_width=WIDTH, max_tokens=DEPTH, ignore_eos=True)
    return engine.beam_search(tokens(prompts), params)


def scored(engine: Any, prompts: Sequence[TokenPrompt], tails: Sequence[Sequence[tuple[int, ...]]]) -> list[float]:
    """Score candidates by the log-probabilities of full prompts."""
    import vllm

    full = [{"prompt_token_ids": [*p.ids, *tail]} for p, group in zip(prompts, tails, strict=True) for tail in group]
    params = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = engine.generate(full, params, use_tqdm=False)
    flat = [tail for group in tails for tail in group]
    return [
        sum(step[token].logprob for step, token in zip(output.prompt_logprobs[-len(tail) :], tail, strict=True))
        for output, tail in zip(outputs, flat, strict=True)
    ]


class Bench:
    """Times implementations on one engine after the other."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder, self.dtype = folder, dtype
        self.codes = build_codes()
        self.spent: Spent = {}
        self.work: dict[str, Any] = {}
        self.apart: dict[str, float] = {}
        self.loads: list[float] = []

    def time(self, engine: Any, what: str, ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
        """Time implementations alternately, each with an empty cache."""
        results = {}
        for _ in range(repeats):
            for name, once in ways.items():
                engine.reset_prefix_cache()
                begin = time.perf_counter()
                results[name] = once()
                self.spent.setdefault(what, {}).setdefault(name, []).append(time.perf_counter() - begin)
        self.loads.append(round(os.getloadavg()[0], 2))
        return results

    def ours(self, seed: int) -> None:
        """Run both searches and both scoring implementations on an engine with llmrec's settings."""
        backend = VLLMBackend(str(self.folder), TokenEncoder(self.codes), dtype=self.dtype, route="forced")  # type: ignore[arg-type]
        try:
            self._warm(backend)
            for length in LENGTHS:
                self._searches(backend, build_prompts(length, seed))
            for name, prompt in (("codes", SHORT), ("titles", SHORT), (LONG, LENGTHS[0])):
                self._scores(backend, name, build_prompts(prompt, seed))
        finally:
            backend.close()

    def _warm(self, backend: Any) -> None:
        """Warm up, so that compilation and loading are not timed."""
        some = build_prompts(40, 0)
        for route in ("forced", "nodes"):
            backend.route = route
            backend.search(some, self.codes, k=WIDTH, width=WIDTH)
        backend.route = "forced"
        free_search(backend._llm(), some)
        backend.score(some[:1], [[(5, 6), (5, 7)]])
        scored(backend._llm(), some[:1], [[(5, 6)]])

    def _searches(self, backend: Any, prompts: Sequence[TokenPrompt]) -> None:
        def search(route: str) -> Any:
            backend.route = route
            try:
                return backend.search(prompts, self.codes, k=WIDTH, width=WIDTH)
            finally:
                backend.route = "forced"

        length = len(prompts[0].ids)
        results = self.time(
            backend._llm(),
            str(length),
            {
                OURS: lambda: search("forced"),
                NODES: lambda: search("nodes"),
                EQUAL: lambda: free_search(backend._llm(), prompts),
            },
            REPEATS,
        )
        assert [result.items for result in results[OURS]] == [result.items for result in results[NODES]]
        for name, chains in ((OURS, True), (NODES, False)):
            backend._llm().reset_prefix_cache()
            tree = VLLMTree(backend._read, chains=chains, limit=128)
            beam_search(tree, backend.encoder.catalogue(None, None), [p.ids for p in prompts], k=WIDTH, width=WIDTH)
            work = {"tokens": tree.tokens, "requests": tree.requests, "rounds": tree.forwards}
            self.work.setdefault(str(length), {})[name] = work

    def _scores(self, backend: Any, name: str, prompts: Sequence[TokenPrompt]) -> None:
        dice = np.random.default_rng(9)
        tails = [[self.codes[n] for n in dice.choice(ITEMS, CANDIDATES, replace=False)] for _ in prompts]
        if name == "titles":
            tails = [[tuple(row) for row in dice.integers(3, FIRST, (CANDIDATES, TITLE)).tolist()] for _ in prompts]
        results = self.time(
            backend._llm(),
            name,
            {
                OURS: lambda: backend.score(prompts, tails),
                PROMPT_LOGPROBS: lambda: scored(backend._llm(), prompts, tails),
            },
            1,
        )
        logprobs = [value for scores in results[OURS] for value in scores.logprobs]
        assert len({round(value, 4) for value in logprobs}) > len(logprobs) / 2 and np.isfinite(logprobs).all()
        apart = max(abs(a - b) for a, b in zip(logprobs, results[PROMPT_LOGPROBS], strict=True))
        self.apart[name] = max(apart, self.apart.get(name, 0.0))

    def default(self, seed: int) -> int:
        """Run on an engine with vLLM's default block size, and return that size."""
        import vllm

        engine = vllm.LLM(
            str(self.folder),
            dtype=self.dtype,
            max_model_len=TokenEncoder.max_length,
            max_logprobs=2 * WIDTH,
            enforce_eager=True,
            enable_prefix_caching=True,
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        try:
            free_search(engine, build_prompts(40, 0))
            for length in LENGTHS:
                prompts = build_prompts(length, seed)
                self.time(engine, str(length), {DEFAULT: lambda p=prompts: free_search(engine, p)}, 1)  # type: ignore[misc]
            return int(engine.llm_engine.vllm_config.cache_config.block_size)
        finally:
            engine.llm_engine.engine_core.shutdown()

    def result(self) -> dict[str, Any]:
        """Return all results with their goals."""
        seconds = {what: {name: summary(s) for name, s in ways.items()} for what, ways in self.spent.items()}
        unaligned, aligned, _ = (seconds[str(length)] for length in LENGTHS)
        goals = {
            "default blocks": faster(unaligned, DEFAULT, OURS, 5.0)
            | {"what": f"times faster than beam_search with default blocks, prompts of {LENGTHS[0]} tokens"},
            "default blocks, aligned": faster(aligned, DEFAULT, OURS, 8.0)
            | {"what": f"times faster than beam_search with default blocks, prompts of {LENGTHS[1]} tokens"},
            "equal blocks": within(unaligned, OURS, EQUAL, 1.1)
            | {"what": f"times as long as beam_search with equal blocks, prompts of {LENGTHS[0]} tokens"},
            "equal blocks, aligned": within(aligned, OURS, EQUAL, 1.1)
            | {"what": f"times as long as beam_search with equal blocks, prompts of {LENGTHS[1]} tokens"},
            "codes": faster(seconds["codes"], PROMPT_LOGPROBS, OURS, 10.0)
            | {"what": f"times faster than prompt_logprobs, candidates of {DEPTH} tokens"},
            "titles": faster(seconds["titles"], PROMPT_LOGPROBS, OURS, 4.0)
            | {"what": f"times faster than prompt_logprobs, candidates of {TITLE} tokens"},
        }
        return {
            "seconds": seconds,
            "samples": self.spent,
            "work": self.work,
            "largest_difference_nats": self.apart,
            "goals": goals,
            "loads": self.loads,
        }


def main(target: Path) -> None:
    """Measure and write."""
    prepare_environment()
    silence_libraries()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "model"
        bench = Bench(folder, save_model(folder))
        for seed in range(1, ROUNDS + 1):
            bench.ours(seed)
            block = bench.default(seed)
    results = bench.result()
    for name, goal in results["goals"].items():
        figures = ", ".join(f"{value:.2f}" for value in goal["found"].values())
        sys.stdout.write(f"{name}: {figures} {goal['what']}, {'met' if goal['met'] else 'NOT met'}\n")
    sys.stdout.write(f"load after each measurement: {results['loads']}\n")
    result = {
        "command": "python -m eval.benchmarks.search_vllm eval/results/search_vllm.json",
        "what": f"search of {ITEMS} codes of {DEPTH} tokens, {WIDTH} beams, and scores of {CANDIDATES} candidates, for "
        f"{USERS} users, with vLLM on CPU; default blocks hold {block} tokens",
        "rounds": {"engines": ROUNDS, "each on blocks of 32": REPEATS, "default blocks and scoring": 1},
        "model": f"41 million random weights, {bench.dtype}",
        "took": time.perf_counter() - begin,
        **results,
        **provenance(),
    }
    write_json(target, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
