"""Rollouts for policy gradients: items sampled from the model's distribution over a catalogue.

The policy is the model at a temperature, renormalised at every branching over the branches of the catalogue: p(item) is
a product of softmaxes over siblings, so every rollout is an item. There are three ways to draw a group:

- ``beam``: the best items of a constrained beam search. All different, but not a sample: a mean over them is biased.
- ``sampled``: independent draws. Equal ones are merged into one with a weight, so that they are computed once.
- ``without-replacement``: the Gumbel-top-k trick over the tree (Kool et al., Stochastic Beams and Where to Find Them,
  ICML 2019, algorithm 1). All different; with the weights p / P(drawn) of their section 4.2, a mean over them estimates
  the mean over the catalogue.

In each case, a group's weights sum to 1, and every prompt has its own random generator: draws do not depend on the rest
of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmrec.decode.beam import (
    Beams,
    Floats,
    TreeEngine,
    beam_search,
    extend_beams,
    extend_by_branches,
    initial_beams,
    rank_beams,
)
from llmrec.decode.token_tree import Children, Index, TokenTrie

RolloutMethod = Literal["beam", "sampled", "without-replacement"]


@dataclass(frozen=True)
class RolloutGroup:
    """The rollouts for one prompt, without duplicates, most likely first.

    Attributes:
        items: Catalogue indices, in the order of the given paths, shape (n,).
        weights: The weight of each in a mean over the group; they sum to 1, shape (n,).
        scores: Full-softmax log-probability of each at temperature 1, in nats, shape (n,).
    """

    items: Index
    weights: Floats
    scores: Floats


def sample_rollouts(
    engine: TreeEngine,
    catalogue: TokenTrie,
    prompts: Sequence[Sequence[int]],
    *,
    way: RolloutMethod,
    count: int,
    temperature: float,
    seeds: Sequence[int],
) -> list[RolloutGroup]:
    """Sample a group of items for each prompt.

    Args:
        engine: Computes log-probabilities.
        catalogue: The legal outputs.
        prompts: Token ids of each prompt.
        way: See the module.
        count: Rollouts per prompt; fewer different ones if some are drawn repeatedly, or the catalogue has no more.
        temperature: Divisor of log-probabilities before they are renormalised; not used by a beam.
        seeds: Seed of each prompt's generator.
    """
    if way == "beam":
        result = beam_search(engine, catalogue, prompts, k=count, width=count)
        return [_sorted_group(np.array(item.items), np.ones(len(item.items)), np.array(item.scores)) for item in result]
    generators = [np.random.default_rng(seed) for seed in seeds]
    roots = vars(initial_beams(np.arange(len(prompts)), len(catalogue)))
    keep, finish = (
        (_split_draws, _frequency_weighted_group) if way == "sampled" else (_keep_highest, _inclusion_weighted_group)
    )
    # One more item is drawn than requested: it sets the threshold for the inclusion probabilities of the others.
    draws = count if way == "sampled" else count + 1
    first = np.array([float(count) if way == "sampled" else generator.gumbel() for generator in generators])
    beams = _SampledPrefixes(**roots, logq=np.zeros(len(prompts)), marks=first)
    beams, _ = extend_beams(engine, catalogue, prompts, beams, partial(keep, temperature, draws, generators))
    return [finish(catalogue, beams.take(np.flatnonzero(beams.users == user)), count) for user in range(len(prompts))]


@dataclass
class _SampledPrefixes(Beams):
    """Sampled prefixes.

    Attributes:
        logq: Log-probability under the renormalised policy, shape (n,).
        marks: The number of draws of each, or its perturbed log-probability; shape (n,).
    """

    logq: Floats
    marks: Floats


def _extend_and_renormalise(
    temperature: float, beams: _SampledPrefixes, branches: Children, logprobs: Floats
) -> _SampledPrefixes:
    """Extend prefixes by one token, and update their log-probability ``logq`` under the sampling distribution."""
    if not len(logprobs):
        return extend_by_branches(beams, branches, logprobs)
    heads, sizes = _equal_runs(branches.parents)
    scaled = logprobs / temperature
    scaled -= np.repeat(np.maximum.reduceat(scaled, heads), sizes)
    scaled -= np.repeat(np.log(np.add.reduceat(np.exp(scaled), heads)), sizes)
    result = extend_by_branches(beams, branches, logprobs)
    result.logq = result.logq + scaled
    return result


def _split_draws(
    temperature: float,
    _: int,
    generators: Sequence[np.random.Generator],
    beams: _SampledPrefixes,
    branches: Children,
    logprobs: Floats,
) -> _SampledPrefixes:
    """Distribute the draws of each prefix among its branches, by a multinomial distribution."""
    result = _extend_and_renormalise(temperature, beams, branches, logprobs)
    heads, sizes = _equal_runs(branches.parents)
    for begin, end in zip(heads, heads + sizes, strict=True):
        shares = np.exp(result.logq[begin:end] - beams.logq[branches.parents[begin]])
        generator = generators[result.users[begin]]
        result.marks[begin:end] = generator.multinomial(int(result.marks[begin]), shares / shares.sum())
    return _sort_by_path(
        _SampledPrefixes.join(beams.take(np.flatnonzero(beams.complete)), result.take(np.flatnonzero(result.marks)))
    )


def _keep_highest(
    temperature: float,
    count: int,
    generators: Sequence[np.random.Generator],
    beams: _SampledPrefixes,
    branches: Children,
    logprobs: Floats,
) -> _SampledPrefixes:
    """Keep the highest Gumbel-perturbed log-probabilities of each prompt (sampling without replacement)."""
    result = _extend_and_renormalise(temperature, beams, branches, logprobs)
    if len(logprobs):
        heads, sizes = _equal_runs(branches.parents)
        of_users, counts = _equal_runs(result.users)
        draws = zip(result.users[of_users].tolist(), counts.tolist(), strict=True)
        noise = np.concatenate([generators[user].gumbel(size=n) for user, n in draws])
        free = result.logq + noise
        result.marks = _conditioned_gumbels(result.marks, free, np.repeat(np.maximum.reduceat(free, heads), sizes))
    pool = _SampledPrefixes.join(beams.take(np.flatnonzero(beams.complete)), result)
    order, rank = rank_beams(pool, pool.marks)
    return _sort_by_path(pool.take(order[rank < count]))


def _sort_by_path(pool: _SampledPrefixes) -> _SampledPrefixes:
    """Sort prefixes by prompt and path, which fixes the order of random draws."""
    return pool.take(np.lexsort((pool.lows, pool.users)))


def _equal_runs(numbers: Index) -> tuple[Index, Index]:
    """Return the starts and lengths of runs of equal numbers."""
    heads = np.flatnonzero(np.diff(numbers, prepend=-1))
    return heads, np.diff(heads, append=len(numbers))


def _conditioned_gumbels(parents: Floats, free: Floats, highest: Floats) -> Floats:
    """Sample Gumbel variables whose maximum over siblings equals the parent's value (appendix B.3 of the paper)."""
    with np.errstate(divide="ignore"):
        gap = parents - free + np.log1p(-np.exp(free - highest))
    bounded: Floats = parents - np.maximum(gap, 0) - np.log1p(np.exp(-np.abs(gap)))
    return bounded


def _frequency_weighted_group(catalogue: TokenTrie, drawn: _SampledPrefixes, _: int) -> RolloutGroup:
    return _sorted_group(catalogue.order[drawn.lows].astype(np.int64), drawn.marks, drawn.scores)


def _inclusion_weighted_group(catalogue: TokenTrie, drawn: _SampledPrefixes, count: int) -> RolloutGroup:
    """Weight each item by its probability divided by its inclusion probability."""
    order = np.argsort(-drawn.marks, kind="stable")
    kept = drawn.take(order[:count])
    weights = np.exp(kept.logq)
    if len(order) > count:
        threshold = drawn.marks[order[count]]
        weights = weights / -np.expm1(-np.exp(kept.logq - threshold))
    return _sorted_group(catalogue.order[kept.lows].astype(np.int64), weights, kept.scores)


def _sorted_group(items: Index, weights: NDArray[np.float64], scores: Floats) -> RolloutGroup:
    order = np.argsort(-scores, kind="stable")
    return RolloutGroup(items[order].astype(np.int64), weights[order] / weights.sum(), scores[order])
