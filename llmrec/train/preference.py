"""Losses on a chosen and several rejected answers: DPO, S-DPO, SimPO and IPO.

The reward of an answer is beta times the difference between its log-likelihood and that of the reference, the model
that training started from; SimPO's is beta times the mean log-likelihood of its tokens. With r of the chosen and r_i of
the rejected answers:

- ``dpo`` (Rafailov et al., NeurIPS 2023, eq. 7): the mean over i of -log sigmoid(r - r_i), with one rejected answer the
  paper's; with label smoothing e the mean of (1 - e) times that and e times -log sigmoid(r_i - r).
- ``s-dpo`` (Chen et al., NeurIPS 2024): -log sigmoid(-log sum_i exp(r_i - r)), which is the softmax cross-entropy of
  the chosen answer among all; with one rejected answer it is DPO.
- ``simpo`` (Meng et al., NeurIPS 2024, eq. 6): as ``dpo``, with its own reward and a margin, r - r_i - margin.
- ``ipo`` (Azar et al., AISTATS 2024, eq. 17, a token as in TRL): (h - 1 / (2 beta))^2 with h the difference of mean log
  ratios.

There is no second model: the adapter is disabled to compute log-likelihoods of the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from llmrec.recipe.schema import PreferenceSection
from llmrec.train.loss import answer_lengths, candidate_log_likelihoods, chosen_indices, softmax_loss


@contextmanager
def use_reference_model(model: torch.nn.Module) -> Iterator[None]:
    """Disable a model's adapter and gradients, so that it serves as the reference model."""
    with torch.no_grad(), model.disable_adapter():
        yield


def disable_dropout(model: torch.nn.Module) -> None:
    """Disable dropout permanently, because a model and its reference must differ only by training."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        # Some blocks store the dropout probability and call the dropout function.
        for name in [name for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]:
            setattr(module, name, 0.0)


def preference_list_loss(
    model: torch.nn.Module, packed: Mapping[str, Any], section: PreferenceSection
) -> tuple[Any, float, dict[str, float]]:
    """Return the summed loss of answer lists, the number of lists, and sums of the reward margins.

    The sums are those whose means TRL logs, under its names. The model and ``packed`` are as in
    `llmrec.train.loss.list_loss`, with lists of one chosen answer and ``section.negatives`` others; a reference needs
    PEFT adapters.
    """
    size = 1 + section.negatives
    before = None
    if section.refers:
        with use_reference_model(model):
            before = candidate_log_likelihoods(model, packed, size)
    scores, chosen, lengths = (
        candidate_log_likelihoods(model, packed, size),
        chosen_indices(packed, size),
        answer_lengths(packed, size),
    )
    rewards = implicit_rewards(scores, before, lengths, section)
    total = preference_loss(rewards, chosen, section)
    chosen_scores = scores.gather(1, chosen[:, None])
    if section.sft_weight:
        total = total - section.sft_weight * (chosen_scores / lengths.gather(1, chosen[:, None])).sum()
    ahead = reward_margins(rewards.detach(), chosen)
    best = rewards.detach().gather(1, chosen[:, None])
    fields = {
        "rewards/chosen": best,
        "rewards/rejected": best - ahead.mean(1, keepdim=True),
        "rewards/margins": ahead.mean(1),
        "rewards/accuracies": (ahead > 0).float().mean(1),
        "logps/chosen": chosen_scores.detach(),
    }
    return total, float(len(scores)), {name: float(values.sum()) for name, values in fields.items()}


def implicit_rewards(
    scores: torch.Tensor, before: torch.Tensor, lengths: torch.Tensor, section: PreferenceSection
) -> torch.Tensor:
    """Return the implicit rewards of answers from log-likelihoods, those of any reference, and lengths in tokens.

    All are of shape (lists, answers).
    """
    ratios = scores if before is None else scores - before
    return section.beta * (ratios / lengths if section.loss in ("simpo", "ipo") else ratios)


def preference_loss(rewards: torch.Tensor, chosen: torch.Tensor, section: PreferenceSection) -> torch.Tensor:
    """Return the summed preference loss of lists; rewards have the shape (lists, answers)."""
    if section.loss == "s-dpo":
        behind = torch.zeros_like(rewards).scatter(1, chosen[:, None], section.margin)
        return softmax_loss(rewards - behind, chosen)
    ahead = reward_margins(rewards, chosen) - section.margin
    if section.loss == "ipo":
        return (ahead / section.beta - 1 / (2 * section.beta)).square().mean(1).sum()
    swapped, soft = section.label_smoothing, torch.nn.functional.softplus
    return ((1 - swapped) * soft(-ahead) + swapped * soft(ahead)).mean(1).sum()


def reward_margins(rewards: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return the reward margins between chosen and rejected answers, shape (lists, rejected)."""
    others = torch.ones_like(rewards, dtype=torch.bool).scatter(1, chosen[:, None], False)
    return rewards.gather(1, chosen[:, None]) - rewards[others].view(len(rewards), -1)
