"""Policy-gradient training (GRPO): rollouts of the current model, their rewards, and the loss of a step.

Rollouts depend only on the seed, the id of their question and the weights, so a resumed training draws the same ones.
The rollouts of a question share one packed sequence, like the candidates of a list (`llmrec.train.rows`). The reference
model is the base model, evaluated with the adapter disabled. Dropout is off, so that the trained policy is the sampled
one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from llmrec.backends.encode import IGNORED, TokenRow
from llmrec.backends.hf.tree import MaskedTree
from llmrec.data.hashing import hash_one
from llmrec.decode.beam import Floats
from llmrec.decode.rollouts import RolloutGroup, sample_rollouts
from llmrec.decode.token_tree import TokenTrie
from llmrec.recipe.schema import RewardSection
from llmrec.train.batches import micro_batch_indices
from llmrec.train.loss import AllowedTokens, sum_by_row, target_losses
from llmrec.train.packing import PackedRows, pack_into_one_bin, pack_rows, stack_sequences
from llmrec.train.precision import mixed_precision
from llmrec.train.reward.rewards import Rewards
from llmrec.train.steps import PlannedSteps
from llmrec.types import Case

# Group-relative advantages and the clipped loss of whole items (GRPO, Shao et al., arXiv 2402.03300, section
# 4.1).
#
# The action is an item, regardless of its number of tokens: probability ratio and divergence are per item. Every
# rollout has a weight (`llmrec.decode.rollouts.RolloutGroup`), so that a sum over a group is an expectation over the
# model's choices: equal draws are one rollout with the sum of their weights, and items drawn without replacement have
# weights that correct for their probability of being drawn (Kool et al., Buy 4 REINFORCE Samples, Get a Baseline for
# Free!, 2019).


# A smaller standard deviation is rounding noise; TRL adds the same constant.
_MIN_DEVIATION = 1e-4


def advantages(rewards: Sequence[float], weights: Floats, *, normalise: bool) -> Floats:
    """Return each rollout's advantage over the mean of its group; their weighted sum is 0.

    Args:
        rewards: Reward of each rollout, shape (n,).
        weights: Weight of each rollout; they sum to 1, shape (n,).
        normalise: Divide by the group's standard deviation.
    """
    values = np.asarray(rewards, dtype=np.float64)
    gains: Floats = values - weights @ values
    return gains / (np.sqrt(weights @ gains**2) + _MIN_DEVIATION) if normalise else gains


class PolicyLoss(NamedTuple):
    """The summed loss and, for each rollout, its divergence and whether its ratio was clipped, shape (n,)."""

    total: Any
    divergence: Any
    clipped: Any


def policy_loss(
    current: Any, old: Any, reference: Any, gains: Any, weights: Any, *, clip: float, beta: float
) -> PolicyLoss:
    """Return the clipped policy loss with KL penalty, summed over rollouts.

    KL is estimated by exp(d) - d - 1 with d = log p_reference - log p (k3 of Schulman, Approximating KL Divergence,
    2020), which is never below 0.

    Args:
        current: Log-probability of each item under the current model, shape (n,), with gradients.
        old: The same under the model that drew it.
        reference: The same under the initial model.
        gains: Advantages.
        weights: Weight of each rollout.
        clip: Clipping range of the ratio.
        beta: The weight of the divergence.
    """
    ratio = (current - old).exp()
    bounded = ratio.clamp(1 - clip, 1 + clip)
    gap = reference - current
    divergence = gap.exp() - gap - 1
    total = (weights * (beta * divergence - torch.minimum(ratio * gains, bounded * gains))).sum()
    return PolicyLoss(total, divergence.detach(), (bounded * gains < ratio * gains).detach())


@dataclass
class _RolloutBatch:
    """Rollouts of an optimiser step that are computed in one micro-batch.

    Attributes:
        packed: Their packed sequences as tensors.
        legal: The legal tokens at each target; None: log-probabilities are over the full vocabulary.
        weights: The weight of each rollout, shape (n,).
        gains: Advantages, shape (n,).
        reference: Log-probabilities under the initial model.
        old: The same under the model that drew them; None before their first update.
    """

    packed: Mapping[str, Any]
    legal: AllowedTokens | None
    weights: Any
    gains: Any
    reference: Any
    old: Any = None


@dataclass(frozen=True)
class _SampledRollouts:
    """The rollouts of step ``number``, in parts, with the values to log."""

    number: int
    parts: Sequence[_RolloutBatch]
    metrics: dict[str, float]


class RewardObjective:
    """Computes the loss of a step from rollouts for the questions of the step.

    Attributes:
        updates: Number of optimiser steps with the same rollouts.
    """

    def __init__(
        self,
        steps: PlannedSteps,
        cases: Sequence[Case],
        section: RewardSection,
        rewards: Rewards,
        *,
        pad: int,
        seed: int,
        limit: int | None = None,
    ) -> None:
        """Prepare for planned steps, whose rows are questions with their answers; cases are by row number.

        At most ``limit`` tokens are computed together, padding included; None: a whole step.
        """
        self.updates = section.updates
        self._steps, self._cases, self._section, self._rewards = steps, cases, section, rewards
        self._numbers = list(steps.numbers())
        self._pad, self._seed, self._limit = pad, seed, limit
        self._drawn: _SampledRollouts | None = None

    def parts(self, model: torch.nn.Module, number: int) -> int:
        """Draw the rollouts of a step, and return its number of parts; dropout stays disabled."""
        model.eval()
        if self._drawn is None or self._drawn.number != number:
            self._drawn = None
            self._drawn = self._sample_rollouts(model, number)
        return len(self._drawn.parts)

    def loss(self, model: torch.nn.Module, number: int, part: int = 0) -> tuple[Any, float]:
        """Return the summed loss of a part of a step, and the number of questions in the step."""
        self.parts(model, number)
        assert self._drawn is not None
        drawn, section = self._drawn.parts[part], self._section
        logprobs = self._logprobs(model, drawn.packed, drawn.legal)
        if drawn.old is None:
            drawn.old = logprobs.detach()
        result = policy_loss(
            logprobs, drawn.old, drawn.reference, drawn.gains, drawn.weights, clip=section.clip, beta=section.beta
        )
        questions = len(self._numbers[number])
        for name, values in {"kl": result.divergence, "clipped": result.clipped}.items():
            before = self._drawn.metrics[name] if part else 0.0
            self._drawn.metrics[name] = before + float((drawn.weights * values).sum()) / questions
        return result.total, float(questions)

    def metrics(self) -> Mapping[str, float]:
        """Return the values to log about the last rollouts; see `llmrec.records.RewardLine`."""
        return dict(self._drawn.metrics) if self._drawn is not None else {}

    def _sample_rollouts(self, model: torch.nn.Module, number: int) -> _SampledRollouts:
        """Draw rollouts for a step, and compute their rewards and their likelihood under the reference model."""
        section, catalogue = self._section, self._rewards.catalogue
        cases = [self._cases[row] for row in self._numbers[number]]
        prompts = [_prompt_tokens(row) for row in self._steps[number].rows]
        groups = sample_rollouts(
            MaskedTree(model.get_base_model(), self._pad),
            catalogue,
            prompts,
            way=section.rollouts,
            count=section.group,
            temperature=section.temperature,
            seeds=[hash_one("rollouts", self._seed, case.request.id) for case in cases],
        )
        rewards = [self._rewards.of(case, group.items.tolist()) for case, group in zip(cases, groups, strict=True)]
        gains = [
            advantages(values, group.weights, normalise=section.normalise)
            for values, group in zip(rewards, groups, strict=True)
        ]
        bins: list[PackedRows] = []
        # rollout indices of the packed rows
        orders: list[list[int]] = []
        for prompt, group in zip(prompts, groups, strict=True):
            rows = [_rollout_row(prompt, catalogue, item) for item in group.items.tolist()]
            index_of = {id(row): n for n, row in enumerate(rows)}
            bins.append(pack_into_one_bin(rows))
            orders.append([index_of[id(row)] for row in bins[-1].rows])
        parts = []
        for chosen in micro_batch_indices([item.columns for item in bins], self._limit):
            parts.append(
                self._part(
                    model,
                    [bins[n] for n in chosen],
                    np.concatenate([groups[n].items[orders[n]] for n in chosen]),
                    np.concatenate([groups[n].weights[orders[n]] for n in chosen]),
                    np.concatenate([gains[n][orders[n]] for n in chosen]),
                )
            )
        metrics = _rollout_metrics(cases, groups, rewards, self._rewards.items)
        targets = sum(len(part.packed["targets"]) for part in parts)
        metrics |= {"tokens": sum(entry.columns for entry in bins), "targets": targets}
        return _SampledRollouts(number, parts, metrics)

    def _part(
        self, model: torch.nn.Module, bins: Sequence[PackedRows], items: Any, weights: Floats, gains: Floats
    ) -> _RolloutBatch:
        """Return rollouts that are computed together, with their likelihood under the reference model."""
        laid = asdict(stack_sequences([pack_rows(entry.rows) for entry in bins], self._pad))
        packed = {name: torch.from_numpy(values).to(model.device) for name, values in laid.items()}
        legal = None
        if self._section.logprobs == "legal":
            legal = AllowedTokens.of(self._rewards.catalogue, items.tolist(), model.device)
        with torch.no_grad(), model.disable_adapter():
            reference = self._logprobs(model, packed, legal)
        return _RolloutBatch(
            packed, legal, torch.from_numpy(weights).to(reference), torch.from_numpy(gains).to(reference), reference
        )

    def _logprobs(self, model: torch.nn.Module, packed: Mapping[str, Any], legal: AllowedTokens | None) -> Any:
        """Return the log-probability of every rollout at the temperature of the recipe, float32, shape (rollouts,)."""
        with mixed_precision(model):
            losses = target_losses(model, packed, temperature=self._section.temperature, legal=legal)
        return sum_by_row(packed, -losses)


def _prompt_tokens(row: TokenRow) -> tuple[int, ...]:
    """Return the prompt tokens of a tokenised question."""
    return row.ids[: next(n for n, label in enumerate(row.labels) if label != IGNORED)]


def _rollout_row(prompt: tuple[int, ...], catalogue: TokenTrie, item: int) -> TokenRow:
    path = catalogue.path(int(catalogue.ranks[item]))
    return TokenRow((*prompt, *path), (*[IGNORED] * len(prompt), *path))


def _rollout_metrics(
    cases: Sequence[Case], groups: Sequence[RolloutGroup], rewards: Sequence[Sequence[float]], items: Sequence[str]
) -> dict[str, float]:
    """Return the values to log about the rollouts of a step; see `llmrec.records.RewardLine`."""
    count = len(groups)
    shares: dict[int, float] = {}
    for group in groups:
        for item, weight in zip(group.items.tolist(), group.weights.tolist(), strict=True):
            shares[item] = shares.get(item, 0.0) + weight / count
    hits = [str(case.truth) in {items[n] for n in group.items} for case, group in zip(cases, groups, strict=True)]
    p = np.array([share for share in shares.values() if share > 0])
    return {
        "reward": sum(float(group.weights @ values) for group, values in zip(groups, rewards, strict=True)) / count,
        "zero": sum(max(values) - min(values) < 1e-12 for values in rewards) / count,
        "hit": sum(hits) / count,
        "entropy": max(0.0, float(-(p * np.log(p)).sum())),
        "distinct": len(shares),
        "rollouts": sum(len(group.items) for group in groups),
    }
