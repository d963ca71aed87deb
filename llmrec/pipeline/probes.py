"""What may explain a figure besides skill: numbers in ids, near-duplicates across the split, a memorised catalogue."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.data.hashing import hash64
from llmrec.data.split import SplitDataset
from llmrec.index.table import ItemIndex
from llmrec.index.titles import title_key
from llmrec.pipeline.leaks.checks import Check
from llmrec.prompts.template import Template, load_templates
from llmrec.tasks.base import keyed
from llmrec.types import Backend, Prompt

_HASHES, _BANDS = 64, 16
_CROWD = 50
_SOLVED = 4
_ROUNDS = 20


# --------------------------------------------------------------------------- arithmetic on ids


def id_arithmetic(data: SplitDataset, split: str) -> Check:
    """HR@5 of a rule that only counts on from the numbers in ids: largest + 1, last + 1, largest + 2, last + 2, ...

    It is compared with the same rule over ids dealt out anew. Well above that, the numbering itself tells what comes
    next: honest where it follows training order, a leak where held-out interactions took part in it (P5's published
    ids reach .0524 on Beauty).
    """
    numbers = {item: int(found[0]) for item in data.dataset.items if len(found := re.findall(r"\d+", item)) == 1}
    if len(numbers) < 0.9 * len(data.dataset.items):
        return Check("id arithmetic", "not probed: item ids hold no single number")
    return _arithmetic("id arithmetic", "ids", numbers, data, split)


def code_arithmetic(index: ItemIndex, data: SplitDataset, split: str) -> Check:
    """The same rule over an index: its numbers, or the places of its codes when they are sorted piece by piece.

    What it reaches above a random ranking, a model can reach by counting on from the codes of the history. Numbers in
    training order tell something honestly, as do codes of a tree in which neighbours were chosen together.
    """
    name = "code arithmetic"
    if index.scheme == "title":
        return Check(name, "not probed: titles have no order that means anything")
    pieces = {item: [int(n) for n in re.findall(r"\d+", "".join(code))] for item, code in index.codes.items()}
    order = sorted(pieces, key=lambda item: (pieces[item], item))
    single = all(len(found) == 1 for found in pieces.values()) and not index.tokens
    numbers = {item: pieces[item][0] for item in order} if single else {item: n for n, item in enumerate(order)}
    return _arithmetic(name, "codes", numbers, data, split)


def _arithmetic(name: str, what: str, numbers: dict[str, int], data: SplitDataset, split: str) -> Check:
    held = [(h, data.history(h.user_id, split)) for h in data.holdouts(split)]  # type: ignore[arg-type]
    pairs = [([e.item_id for e in past if e.item_id in numbers], h.item_id) for h, past in held if h.item_id in numbers]
    pairs = [(past, target) for past, target in pairs if past]
    if not pairs:
        return Check(name, "not probed: no held-out request has a history")
    rate = _rule(pairs, numbers)
    rng, items = np.random.default_rng(0), list(numbers)
    values = np.array([numbers[item] for item in items])
    dealt = [_rule(pairs, dict(zip(items, rng.permutation(values).tolist(), strict=True))) for _ in range(_ROUNDS)]
    chance = float(np.mean(dealt))
    figures = {"HR@5": rate, "chance": chance}
    return Check(name, f"the rule reaches HR@5 {rate:.4f}, over random {what} {chance:.4f}", "notice", (), figures)


def _rule(pairs: Sequence[tuple[list[str], str]], numbers: dict[str, int]) -> float:
    by_number = {number: item for item, number in numbers.items()}
    hits = 0
    for past, target in pairs:
        seen = {numbers[item] for item in past}
        last, largest = numbers[past[-1]], max(seen)
        guesses: list[int] = []
        for step in range(1, 40):
            for guess in (largest + step, last + step):
                if guess in by_number and guess not in seen and guess not in guesses:
                    guesses.append(guess)
            if len(guesses) >= 5:
                break
        hits += numbers[target] in guesses[:5]
    return hits / len(pairs)


# --------------------------------------------------------------------------- near-duplicates


def near_duplicates(sets: Sequence[frozenset[str]], threshold: float) -> list[tuple[int, int, float]]:
    """Return pairs of sets whose Jaccard similarity reaches a threshold, found by MinHash banding.

    64 permutations in 16 bands of 4 find a pair of similarity .9 with probability .999997, one of .8 with .9998
    (Broder, "On the resemblance and containment of documents", 1997; Leskovec et al., "Mining of Massive Datasets",
    section 3.4); every pair that is found is checked exactly.

    Args:
        sets: Any sets of strings; empty ones are skipped.
        threshold: Lowest similarity.

    Returns:
        (first, second, similarity), first < second, sorted.
    """
    words = sorted(frozenset().union(*sets)) if sets else []
    place = {word: n for n, word in enumerate(words)}
    base = hash64("minhash", 0, words) if words else np.empty(0, dtype=np.uint64)
    rng = np.random.default_rng(0)
    factors = rng.integers(1, 2**63, size=_HASHES, dtype=np.uint64) | np.uint64(1)
    offsets = rng.integers(0, 2**63, size=_HASHES, dtype=np.uint64)
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for n, members in enumerate(sets):
        if members:
            signature = _signature(base[[place[word] for word in members]], factors, offsets)
            for band, part in enumerate(signature.reshape(_BANDS, -1)):
                buckets[band, part.tobytes()].append(n)
    found: dict[tuple[int, int], float] = {}
    for crowd in buckets.values():
        # A crowd of equals needs no square of comparisons: each is compared with the first.
        pairs = combinations(crowd, 2) if len(crowd) <= _CROWD else ((crowd[0], other) for other in crowd[1:])
        for a, b in pairs:
            if (a, b) not in found:
                found[a, b] = len(sets[a] & sets[b]) / len(sets[a] | sets[b])
    return sorted((a, b, value) for (a, b), value in found.items() if value >= threshold)


def _signature(
    hashes: NDArray[np.uint64], factors: NDArray[np.uint64], offsets: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        mixed = hashes[:, None] * factors + offsets
        mixed ^= mixed >> np.uint64(29)
        lowest: NDArray[np.uint64] = mixed.min(axis=0)
    return lowest


def duplicate_items(data: SplitDataset, threshold: float = 0.85) -> Check:
    """Items with equal or nearly equal titles: a hit on one of them may count as a miss on the other."""
    items = sorted(data.dataset.items)
    keys = [title_key(data.dataset.items[item].title) for item in items]
    equal: dict[str, list[str]] = defaultdict(list)
    for item, key in zip(items, keys, strict=True):
        equal[key].append(item)
    twins = sum(len(group) for group in equal.values() if len(group) > 1)
    shingles = [frozenset(key[i : i + 3] for i in range(max(1, len(key) - 2))) for key in keys]
    near = [(a, b, s) for a, b, s in near_duplicates(shingles, threshold) if keys[a] != keys[b]]
    examples = tuple(
        f"{data.dataset.items[items[a]].title!r} and {data.dataset.items[items[b]].title!r}" for a, b, _ in near[:5]
    )
    found = (
        f"{twins} of {len(items):,} items share their title with another, {len(near)} further pairs are nearly equal"
    )
    figures = {"equal": float(twins), "near_pairs": float(len(near))}
    return Check("near-duplicate items", found, "notice" if twins or near else "clean", examples, figures)


def duplicate_users(data: SplitDataset, split: str, threshold: float = 0.9) -> Check:
    """Held-out users with a twin: another user who did nearly the same, the held-out item included, in training."""
    held = {h.user_id: h.item_id for h in data.holdouts(split)}  # type: ignore[arg-type]
    trained = {user: frozenset(e.item_id for e in data.train_events(user)) for user in data.users()}
    users = [user for user in data.users() if len(trained[user]) >= 3]
    # Training items of everyone, and of the held-out users once more with what is held out.
    sets = [trained[user] for user in users] + [trained[u] | {held[u]} for u in users if u in held]
    owners = users + [user for user in users if user in held]
    twins = set()
    for a, b, _ in near_duplicates(sets, threshold):
        if a < len(users) <= b and owners[a] != owners[b] and held[owners[b]] in sets[a]:
            twins.add((owners[b], owners[a]))
    asked = sum(user in held for user in users)
    examples = tuple(f"held-out user {user} and user {twin}" for user, twin in sorted(twins)[:5])
    count = len({user for user, _ in twins})
    found = f"{count} of {asked:,} held-out users have a twin in training who has the held-out item too"
    return Check("near-duplicate users", found, "notice" if count else "clean", examples, {"users": float(count)})


# --------------------------------------------------------------------------- memorisation


def memorisation(backend: Backend, data: SplitDataset, *, seed: int, titles: int = 200) -> Check:
    """Whether a model can finish the catalogue's own titles from their first half, against titles cut up and mixed.

    Each prompt shows a few whole titles and the first words of another; a completion counts where its letters and
    digits equal the rest of the title. The control deals the second halves out anew, so that no such title exists: what
    it reaches is chance. (Di Palma et al., "Do LLMs Memorize Recommendation Datasets?", SIGIR 2025, ask for
    MovieLens-1M's records in the same spirit.)

    Args:
        backend: The untuned model.
        data: Whose catalogue.
        seed: Draws the titles.
        titles: How many are asked.
    """
    name = f"memorisation of {data.dataset.name}"
    halves = _halves(data)
    if len(halves) < 2 * _SOLVED:
        return Check(name, "not probed: fewer than 8 titles have three words")
    rng = keyed("memorisation", seed, data.dataset.name)
    chosen = rng.sample(halves, min(titles, len(halves)))
    tails = [tail for _, tail in chosen]
    mixed = tails[1:] + tails[:1]
    template = load_templates("probe")["recite"]
    rates = []
    for second in (tails, mixed):
        records = [(head, tail) for (head, _), tail in zip(chosen, second, strict=True)]
        prompts = [_recital(template, records, n, data.dataset.noun) for n in range(len(records))]
        said = backend.generate(prompts, max_tokens=24)
        right = [title_key(done.text) == title_key(tail) for done, (_, tail) in zip(said, records, strict=True)]
        rates.append(sum(right) / len(right))
    true, control = rates
    figures = {"completed": true, "control": control, "titles": float(len(chosen))}
    found = f"the untuned model completes {true:.1%} of {len(chosen)} titles, of mixed-up ones {control:.1%}"
    return Check(name, found, "notice" if true > control + 0.02 else "clean", (), figures)


def _halves(data: SplitDataset) -> list[tuple[str, str]]:
    found = []
    for _, item in sorted(data.dataset.items.items()):
        # A year or an edition in brackets tells itself; the words before it are the title.
        words = re.sub(r"\s*[(\[].*", "", item.title).split()
        if len(words) >= 3:
            cut = len(words) // 2
            found.append((" ".join(words[:cut]), " ".join(words[cut:])))
    return found


def _recital(template: Template, records: Sequence[tuple[str, str]], n: int, noun: str) -> Prompt:
    solved = [records[(n + k) % len(records)] for k in range(1, _SOLVED + 1)]
    values: list[dict[str, Any]] = [{"noun": noun, "head": head, "rest": rest} for head, rest in solved]
    prefix = [segment for value in values for part in template.step(value) for segment in part]
    opening = template.opening({"noun": noun, "head": records[n][0]})
    return Prompt(messages=template.turns({"noun": noun}), answer_prefix=(*prefix, *opening), stop=template.tail)
