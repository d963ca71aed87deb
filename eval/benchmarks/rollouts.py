"""Times rollouts over a catalogue, compared with transformers' ``generate`` with a prefix function as in GRPO trainers.

``python -m eval.benchmarks.rollouts eval/results/rollouts.json``. Both sample the same number of items for the same
prompts from the same model with 41 million random weights, alternately in one process with one thread (``--prompts 8
--rounds 3``); the minimum and the median of the rounds are stored, with the load of the machine. Random weights suffice
for timing. ``BENCH_CLOCK=processor`` measures processor time, for a busy machine.

``--vllm`` adds vLLM, with the same weights and an empty prefix cache. Its engine is another process, which requires
wall-clock time.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from eval.benchmarks import search_peers as peers
from eval.benchmarks.provenance import provenance
from eval.benchmarks.search import made_model, prompts
from eval.benchmarks.search_alone import made_codes
from eval.benchmarks.timing import alternated, seconds_now
from llmrec.backends.hf.tree import MaskedTree
from llmrec.decode.beam import TreeEngine
from llmrec.decode.rollouts import Way, rollouts
from llmrec.decode.token_tree import Catalogue
from llmrec.durable import write_json
from llmrec.machine import machine
from llmrec.models.load import quiet_libraries

LENGTH, GROUP = 200, 16
WAYS: tuple[Way, ...] = ("sampled", "without-replacement", "beam")
SAMPLED, BEAMS = "generate, sampled", "generate, beams"

Drawn = list[list[tuple[int, ...]]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.rollouts")
    parser.add_argument("target", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm", action="store_true", help="add vLLM, which must be installed")
    options = parser.parse_args(arguments)
    if options.vllm and os.environ.get("BENCH_CLOCK") == "processor":
        parser.error("--vllm uses another process, which BENCH_CLOCK=processor does not measure; unset it")
    torch.set_num_threads(1)
    quiet_libraries()
    model, codes, asked = made_model(torch.float32), made_codes(), prompts(options.prompts, LENGTH)
    tree, trie = Catalogue.of(codes), peers.Trie(codes)

    def ours(way: Way, engine: TreeEngine | None = None) -> Drawn:
        how: Any = {"way": way, "count": GROUP, "temperature": 1.0, "seeds": range(len(asked))}
        drawn = rollouts(engine or MaskedTree(model, 0), tree, asked, **how)
        return [[codes[n] for n in group.items] for group in drawn]

    def theirs(*, sampled: bool) -> Drawn:
        if sampled:
            return peers.sample(model, trie, asked, count=GROUP, length=tree.depth)
        return [list(each) for each in peers.generate(model, trie, asked, width=GROUP, length=tree.depth)]

    ways: dict[str, Callable[[], Drawn]] = {f"llmrec, {way}": lambda way=way: ours(way) for way in WAYS}  # type: ignore[misc]
    ways |= {SAMPLED: lambda: theirs(sampled=True), BEAMS: lambda: theirs(sampled=False)}
    with vllm_trees(model, codes) if options.vllm else nullcontext() as emptied:
        if emptied is not None:
            ways |= {f"llmrec, {way}, vLLM": lambda way=way: ours(way, emptied()) for way in WAYS}  # type: ignore[misc]
        load, begin = os.getloadavg()[0], seconds_now()
        seconds, given = alternated(options.rounds, ways)
    drawn = len(asked) * GROUP
    speed = {name: drawn / seconds[name]["min"] for name in ways}
    found = {
        name: {
            "seconds": seconds[name],
            "rollouts_a_second": speed[name],
            "legal": legal(given[name], codes),
            "distinct": sum(len(set(group)) for group in given[name]) / drawn,
        }
        for name in ways
    }
    ratios = {
        name: speed[f"llmrec, {name}"] / speed[other]
        for name, other in (("sampled", SAMPLED), ("without-replacement", SAMPLED), ("beam", BEAMS))
    }
    if options.vllm:
        ratios |= {f"{way}, torch beside vLLM": speed[f"llmrec, {way}"] / speed[f"llmrec, {way}, vLLM"] for way in WAYS}
    write_json(
        options.target,
        {
            "command": "python -m eval.benchmarks.rollouts TARGET "
            f"--prompts {options.prompts} --rounds {options.rounds}{' --vllm' if options.vllm else ''}",
            "what": f"{GROUP} rollouts for each of {len(asked)} prompts of {LENGTH} tokens, among {len(codes):,} codes "
            f"of {tree.depth} tokens; a model of 41 million random weights in float32",
            "clock": os.environ.get("BENCH_CLOCK", "wall"),
            "rounds": options.rounds,
            "ways": found,
            "times_faster": ratios,
            "load": {"before": round(load, 2), "after": round(os.getloadavg()[0], 2)},
            "seconds": seconds_now() - begin,
            **provenance(),
            "machine": {**machine(), "threads": torch.get_num_threads()},
        },
    )
    for name, row in found.items():
        sys.stdout.write(f"{name:30} {row['rollouts_a_second']:8.1f} rollouts/s, {row['legal']:.0%} items\n")


@contextmanager
def vllm_trees(model: Any, codes: Sequence[tuple[int, ...]]) -> Iterator[Callable[[], TreeEngine]]:
    """Start vLLM with the model, and yield a function that clears its cache and returns a tree engine."""
    from eval.benchmarks.search_vllm import Given
    from llmrec.backends.vllm.backend import VLLMBackend
    from tests.conftest import make_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        backend = VLLMBackend(folder, Given(codes), dtype="float32", route="forced")  # type: ignore[arg-type]

        def emptied() -> TreeEngine:
            backend._llm().reset_prefix_cache()
            return backend.tree()

        try:
            yield emptied
        finally:
            backend.close()


def legal(drawn: Drawn, codes: Sequence[tuple[int, ...]]) -> float:
    """Return the share of rollouts that are items."""
    known = set(codes)
    flat = [path for group in drawn for path in group]
    return sum(path in known for path in flat) / len(flat)


if __name__ == "__main__":
    main()
