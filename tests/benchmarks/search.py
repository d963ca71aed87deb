"""Times the search of a catalogue, and the scores of candidates, beside the usual ways with transformers.

``python -m tests.benchmarks.search eval/results/search.json``. Both sides use the same made model, of 41 million random
weights, and the same threads, alternately in one process; the minimum and the median of the rounds are kept, and a goal
is met only if both meet it. Random weights are right for speed and say nothing of quality.

- beam: 8 users, prompts of 200 tokens, 10,000 codes of 4 tokens that part at every token, 20 beams; beside ``generate``
  with a prefix function, and beside plain forwards over no more tokens than any exact search must read.
- catalogue: making the tree of a million items, and what a step of the search costs over ten thousand and a million.
- scoring: 100 candidates of one user, beside a forward for each.
- warm: a user with one new event, beside the same search with nothing kept from before.
- exact: how often 20 beams come with a proof, and how many it takes otherwise.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Threads that wait for each other give their core away: on a busy machine spinning costs ten times the work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from llmrec.backends.hf import HFBackend
from llmrec.backends.hf_tree import MaskedTree
from llmrec.backends.models import cpu_has_bf16, quiet_libraries
from llmrec.build.facts import machine, versions
from llmrec.decode.beam import Fed, Floats, Wanted, beam
from llmrec.decode.catalogue import ROOT, Catalogue
from llmrec.durable import write_json
from tests.benchmarks import search_peers as peers

ROUNDS, USERS, PROMPT, WIDTH, CANDIDATES = 3, 8, 200, 20, 100
FIRST, VOCABULARY, LEVEL = 32_000, 33_024, 256
HISTORIES, EVENT, FEW = (220, 440, 880), 4, 10
MILLION = 1_000_000
Summary = dict[str, dict[str, float]]


def made_model() -> Any:
    """The "mid" model of these measurements."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
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
    return Qwen2ForCausalLM(config).eval().to(torch.bfloat16 if cpu_has_bf16() else torch.float32)


def made_codes() -> list[tuple[int, ...]]:
    """10,000 codes of 4 tokens; every token leaves a choice, so none is read without need."""
    sizes = (20, 20, 5, 5)
    levels = [range(FIRST + LEVEL * n, FIRST + LEVEL * n + size) for n, size in enumerate(sizes)]
    return list(itertools.product(*levels))


def random_codes(items: int) -> np.ndarray[Any, Any]:
    """Different codes of 4 tokens of 256 each."""
    dice = np.random.default_rng(0)
    numbers = dice.choice(LEVEL**4, size=items, replace=False)
    return np.stack([(numbers >> shift) & (LEVEL - 1) for shift in (24, 16, 8, 0)], axis=1).astype(np.int32)


def prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Ordinary tokens by chance."""
    found: list[list[int]] = np.random.default_rng(seed).integers(0, FIRST, (count, length)).tolist()
    return found


# --------------------------------------------------------------------------- measuring


def alternated(rounds: int, ways: dict[str, Callable[[], Any]]) -> tuple[Summary, dict[str, Any]]:
    """Time every way once a round, in turn; return seconds, and what each gave last."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    given: dict[str, Any] = {}
    for _ in range(rounds):
        for name, once in ways.items():
            begin = time.perf_counter()
            given[name] = once()
            spent[name].append(time.perf_counter() - begin)
    return {name: summary(values) for name, values in spent.items()}, given


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values)}


def ratio(seconds: Summary, slow: str, fast: str) -> dict[str, float]:
    return {of: seconds[slow][of] / seconds[fast][of] for of in ("min", "median")}


def goal(what: str, found: dict[str, float], *, at_least: float | None = None, at_most: float | None = None) -> Any:
    """A figure beside what was wanted of it; met if every summary of the rounds is."""
    low, high = at_least or -np.inf, at_most or np.inf
    limits = {"at_least": at_least} if at_least is not None else {"at_most": at_most}
    return {"what": what, "found": found, **limits, "met": all(low <= value <= high for value in found.values())}


# --------------------------------------------------------------------------- sections


def measure_beam(model: Any) -> dict[str, Any]:
    """A search of a batch, beside ``generate`` and beside the tokens that no exact search can do without."""
    codes, asked = made_codes(), prompts(USERS, PROMPT)
    tree, trie = Catalogue.of(codes), peers.Trie(codes)
    engine = MaskedTree(model, 0)
    beam(engine, tree, asked, k=WIDTH, width=WIDTH)
    work = {"tokens": engine.tokens, "forwards": engine.forwards, "head_rows": engine.head_rows}
    behind = sum(min(WIDTH, end - start) for start, end in itertools.pairwise(tree.starts[1:-1]))
    assert work["tokens"] == USERS * (PROMPT + behind), "no more tokens than the limit"
    seconds, given = alternated(
        ROUNDS,
        {
            "llmrec": lambda: beam(MaskedTree(model, 0), tree, asked, k=WIDTH, width=WIDTH),
            "limit": lambda: plain_forwards(model, asked, behind),
            "generate": lambda: peers.generate(model, trie, asked, width=WIDTH, length=tree.depth),
        },
    )
    shared, apart = [], 0.0
    for ours, theirs in zip(given["llmrec"], given["generate"], strict=True):
        scores = {codes[item]: value for item, value in zip(ours.items, ours.scores, strict=True)}
        both = scores.keys() & theirs.keys()
        shared.append(len(both) / WIDTH)
        apart = max(apart, *(abs(scores[path] - theirs[path]) for path in both))
    return {
        "what": f"{USERS} users, prompts of {PROMPT} tokens, {len(codes)} codes of {tree.depth} tokens, {WIDTH} beams",
        "seconds": seconds,
        "work": work,
        "tokens_of_generate": USERS * WIDTH * (PROMPT + tree.depth - 1),
        "shared_items": statistics.mean(shared),
        "largest_difference_nats": apart,
        "goals": {
            "generate": goal("times faster than generate", ratio(seconds, "generate", "llmrec"), at_least=8.0),
            "limit": goal("times the limit", ratio(seconds, "llmrec", "limit"), at_most=2.5),
        },
    }


def plain_forwards(model: Any, asked: Sequence[Sequence[int]], behind: int) -> None:
    """Plain causal forwards over as many tokens and rows of logits as an exact search cannot do without."""
    rows = torch.tensor([[*prompt, *prompt[:behind]] for prompt in asked])
    with torch.inference_mode():
        hidden = model.get_decoder()(input_ids=rows, use_cache=False).last_hidden_state
        for part in hidden[:, -behind - 1 :].flatten(0, 1).split(256):
            model.get_output_embeddings()(part).float().logsumexp(-1)


def measure_catalogue() -> dict[str, Any]:
    """Making the tree, and the search alone."""
    codes = random_codes(MILLION)
    listed = codes.tolist()
    seconds, given = alternated(
        ROUNDS, {"llmrec": lambda: Catalogue.of(codes), "dict trie": lambda: peers.Trie(listed)}
    )
    million = given["llmrec"]
    del given["dict trie"], listed
    sizes = {"10,000": Catalogue.of(random_codes(10_000)), "1,000,000": million}
    steps = measure_steps()
    return {
        "what": f"{MILLION} items of 4 tokens of {LEVEL} each; steps keep {WIDTH} of 200 branches a user, {USERS} users",
        "seconds": seconds,
        "megabytes": million.nbytes / 1e6,
        "step_seconds": steps,
        "whole_search": measure_searches(sizes),
        "goals": {
            "seconds": goal("seconds to make the tree", seconds["llmrec"], at_most=1.0),
            "megabytes": goal("megabytes of the tree", {"bytes": million.nbytes / 1e6}, at_most=32.0),
            "trie": goal("times faster than a dict trie", ratio(seconds, "dict trie", "llmrec"), at_least=8.0),
            "step": goal(
                "a step at 1,000,000 items, by one at 10,000", ratio(steps, "1,000,000", "10,000"), at_most=1.2
            ),
        },
    }


class Instant:
    """Log-probabilities by chance, at once; notes how long the search takes between its questions."""

    def __init__(self) -> None:
        self.numbers = -np.random.default_rng(0).exponential(size=MILLION)
        self.at = self.opened = 0
        self.steps: list[tuple[int, int, float]] = []
        self._wanted, self._since = 0, 0.0

    def open(self, prompts: Sequence[Sequence[int]], wanted: Wanted) -> Floats:
        self._wanted = 0
        return self._answers(wanted)

    def feed(self, fed: Fed, wanted: Wanted) -> Floats:
        return self._answers(wanted)

    def close(self) -> None:
        pass

    def _answers(self, wanted: Wanted) -> Floats:
        count = len(wanted.tokens)
        if self._wanted:
            self.steps.append((self._wanted, count, time.perf_counter() - self._since))
        self.at = (self.at + 9973) % (MILLION - count)
        found = self.numbers[self.at : self.at + count]
        self.opened += count
        self._wanted, self._since = count, time.perf_counter()
        return found


def measure_steps() -> Summary:
    """One step between two questions, where as many branches are weighed and opened, whatever the catalogue's size."""
    ten = np.arange(10, dtype=np.int32)
    sizes = {
        f"{10**depth:,}": Catalogue.of(np.stack(np.meshgrid(*[ten] * depth, indexing="ij"), axis=-1).reshape(-1, depth))
        for depth in (4, 6)
    }
    engines = {name: Instant() for name in sizes}
    for _ in range(100):
        for name, tree in sizes.items():
            beam(engines[name], tree, [()] * USERS, k=WIDTH, width=WIDTH)
    full = USERS * WIDTH * len(ten)
    alike = {name: [spent for *sizes, spent in each.steps if sizes == [full, full]] for name, each in engines.items()}
    return {name: summary(spent) for name, spent in alike.items()}


def measure_searches(trees: dict[str, Catalogue]) -> dict[str, Any]:
    """The whole search alone, over codes by chance; a larger catalogue has more children a node, so more to weigh."""
    engines = {name: Instant() for name in trees}

    def search(name: str) -> Callable[[], Any]:
        return lambda: beam(engines[name], trees[name], [()] * USERS, k=WIDTH, width=WIDTH)

    rounds = 30
    seconds, _ = alternated(rounds, {name: search(name) for name in trees})
    opened = {name: engine.opened / rounds / USERS for name, engine in engines.items()}
    return {
        "seconds": seconds,
        "ratio": ratio(seconds, "1,000,000", "10,000"),
        "branches_opened_per_user": opened,
        "nodes_by_depth": {name: np.diff(tree.starts).tolist() for name, tree in trees.items()},
    }


class TokenIds:
    """Stands in for an encoder: prompts and candidates are token ids already."""

    def prompt(self, prompt: Any) -> list[int]:
        return list(prompt)

    def continuations(self, prompt: Any, ids: Any, texts: Any, *, closed: bool) -> list[tuple[int, ...]]:
        return [tuple(text) for text in texts]


def measure_scoring(model: Any) -> dict[str, Any]:
    """The likelihood of candidates, beside a forward for each."""
    codes, dice = made_codes(), np.random.default_rng(1)
    (asked,) = prompts(1, PROMPT, seed=1)
    tails = [codes[n] for n in dice.choice(len(codes), CANDIDATES, replace=False)]
    backend = HFBackend(model, TokenIds(), packed=True)  # type: ignore[arg-type]
    backend.score([asked], [tails])
    seconds, given = alternated(
        ROUNDS,
        {
            "llmrec": lambda: backend.score([asked], [tails])[0].logprobs,
            "forward each": lambda: peers.score(model, asked, tails),
            "forward each, few logits": lambda: peers.score(model, asked, tails, all_logits=False),
        },
    )
    apart = [abs(a - b) for a, b in zip(given["llmrec"], given["forward each"], strict=True)]
    fast, slow = ratio(seconds, "forward each", "llmrec"), ratio(seconds, "forward each, few logits", "llmrec")
    return {
        "what": f"one user, a prompt of {PROMPT} tokens, {CANDIDATES} candidates of {len(tails[0])} tokens",
        "seconds": seconds,
        "largest_difference_nats": max(apart),
        "times_faster_than_few_logits": slow,
        "goals": {"forward_each": goal("times faster than a forward a candidate", fast, at_least=20.0)},
    }


def measure_warm(model: Any) -> dict[str, Any]:
    """A search behind a prompt that grew by an event, beside one from nothing."""
    tree, found, goals = Catalogue.of(made_codes()), {}, {}
    for length in HISTORIES:
        (grown,) = prompts(1, length + EVENT, seed=length)
        spent: dict[str, list[float]] = {"warm": [], "cold": []}
        kept = MaskedTree(model, 0)
        for _ in range(3 * ROUNDS):
            beam(kept, tree, [grown[:length]], k=FEW, width=FEW)
            for name, engine in (("warm", kept), ("cold", MaskedTree(model, 0))):
                begin = time.perf_counter()
                beam(engine, tree, [grown], k=FEW, width=FEW)
                spent[name].append(time.perf_counter() - begin)
        seconds = {name: summary(values) for name, values in spent.items()}
        found[str(length)] = seconds
        goals[str(length)] = goal(
            f"times faster than cold, after {length} tokens", ratio(seconds, "cold", "warm"), at_least=3.0
        )
    return {
        "what": f"one user, an event of {EVENT} tokens after a prompt of {', '.join(map(str, HISTORIES))}, {FEW} beams",
        "seconds": found,
        "same_list_in_float32": same_lists(),
        "goals": goals,
    }


def same_lists() -> bool:
    """Whether warm and cold give the same lists where rounding does not part near ties."""
    tree = Catalogue.of(made_codes())
    model = made_model().float()
    for length in HISTORIES:
        (grown,) = prompts(1, length + EVENT, seed=length)
        kept = MaskedTree(model, 0)
        beam(kept, tree, [grown[:length]], k=FEW, width=FEW)
        (warm,), (cold,) = (beam(each, tree, [grown], k=FEW, width=FEW) for each in (kept, MaskedTree(model, 0)))
        if warm.items != cold.items:
            return False
    return True


class Sharp:
    """A made model that gives all its mass to codes: logits by chance at every node, of a chosen spread."""

    def __init__(self, tree: Catalogue, users: int, spread: float, seed: int) -> None:
        counts = np.diff(tree.firsts)
        logits = spread * np.random.default_rng(seed).standard_normal((users, len(tree.tokens)))
        self.tree = tree
        owners = np.repeat(np.arange(len(counts)), counts)
        weights = np.exp(logits[:, 1:])
        totals = np.stack([np.bincount(owners, row, minlength=len(counts)) for row in weights])
        self.logprobs = np.zeros_like(logits)
        self.logprobs[:, 1:] = np.log(weights / totals[:, owners])

    def open(self, prompts: Sequence[Sequence[int]], wanted: Wanted) -> Floats:
        self.nodes = np.full(len(prompts), ROOT)
        self.users = np.array([prompt[0] for prompt in prompts])
        return self._answers(wanted)

    def feed(self, fed: Fed, wanted: Wanted) -> Floats:
        # Every code parts at every token, so nothing is fed behind a token of the same feed.
        self.nodes = np.concatenate([self.nodes, self._children(fed.parents, fed.tokens)])
        self.users = np.concatenate([self.users, self.users[fed.users]])
        return self._answers(wanted)

    def close(self) -> None:
        pass

    def _answers(self, wanted: Wanted) -> Floats:
        found: Floats = self.logprobs[self.users[wanted.after], self._children(wanted.after, wanted.tokens)]
        return found

    def _children(self, parents: Any, tokens: Any) -> Any:
        firsts = self.tree.firsts[self.nodes[parents]]
        # Children here are numbered without gaps.
        return firsts + tokens - self.tree.tokens[firsts]


def measure_exact() -> dict[str, Any]:
    """Proofs at one width, and the width that proves the rest, for models of rising certainty."""
    tree, users, rows = Catalogue.of(made_codes()), 200, []
    for spread in (0.5, 1.0, 2.0, 3.0, 4.0):
        engine = Sharp(tree, users, spread, seed=0)
        asked = [(n,) for n in range(users)]
        once = beam(engine, tree, asked, k=FEW, width=WIDTH)
        proven = beam(engine, tree, asked, k=FEW, width=WIDTH, exact=True)
        first = engine.logprobs[:, tree.starts[1] : tree.starts[2]]
        rows.append(
            {
                "spread": spread,
                "perplexity_of_first_token": float(np.exp(-(np.exp(first) * first).sum(1)).mean()),
                "certified": statistics.mean(each.certified for each in once),
                "right": statistics.mean(a.items == b.items for a, b in zip(once, proven, strict=True)),
                "median_width": statistics.median(each.width for each in proven),
                "largest_width": max(each.width for each in proven),
            }
        )
    return {
        "what": f"{users} users, {len(tree)} codes, the {FEW} best by {WIDTH} beams; models that choose by chance",
        "models": rows,
        "goals": {},
    }


def main(target: Path) -> None:
    """Measure and write."""
    quiet_libraries()
    begin, model = time.perf_counter(), made_model()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "beam": lambda: measure_beam(model),
        "scoring": lambda: measure_scoring(model),
        "warm": lambda: measure_warm(model),
        "catalogue": measure_catalogue,
        "exact": measure_exact,
    }
    sections = {}
    for name, measure in parts.items():
        before = os.getloadavg()[0]
        sections[name] = measure() | {"load": {"before": round(before, 2), "after": round(os.getloadavg()[0], 2)}}
        for each in sections[name]["goals"].values():
            sys.stdout.write(f"{name}: {each}\n")
    result = {
        "command": "python -m tests.benchmarks.search eval/results/search.json",
        "what": "search of a catalogue and scores of candidates with transformers",
        "rounds": ROUNDS,
        "model": f"Qwen2, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M random weights, {model.dtype}",
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - begin,
        "sections": sections,
        "machine": machine(),
        "versions": versions(),
    }
    write_json(target, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
