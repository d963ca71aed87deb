"""Group-relative advantages and the clipped loss of whole items (GRPO, Shao et al., arXiv 2402.03300, section 4.1).

The action is an item, however many tokens write it: ratio and divergence are those of whole items. Every rollout has a
weight (`llmrec.decode.rollouts.Group`), so that a sum over a group is a mean over what the model would choose: equal
draws are one rollout that weighs as much as they do together, and items drawn without replacement weigh what makes up
for how likely they were to be drawn (Kool et al., Buy 4 REINFORCE Samples, Get a Baseline for Free!, 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from llmrec.decode.beam import Floats

# Below this a standard deviation is noise: TRL adds as much.
_LEAST = 1e-4


def advantages(rewards: Sequence[float], weights: Floats, *, normalise: bool) -> Floats:
    """Return how much better each rollout is than the group's mean; their sum, as weighted, is 0.

    Args:
        rewards: Of each rollout, shape (n,).
        weights: What each counts; they sum to 1, shape (n,).
        normalise: Divide by the group's standard deviation.
    """
    values = np.asarray(rewards, dtype=np.float64)
    gains: Floats = values - weights @ values
    return gains / (np.sqrt(weights @ gains**2) + _LEAST) if normalise else gains


class PolicyLoss(NamedTuple):
    """The summed loss, and of each rollout its divergence and whether its ratio was clipped, shape (n,)."""

    total: Any
    divergence: Any
    clipped: Any


def policy_loss(
    own: Any, old: Any, reference: Any, gains: Any, weights: Any, *, clip: float, beta: float
) -> PolicyLoss:
    """Return the sum over rollouts of weight * (beta * KL - min(ratio * gain, clipped ratio * gain)).

    KL is estimated by exp(d) - d - 1 with d = log p_reference - log p (k3 of Schulman, Approximating KL Divergence,
    2020), which is never below 0.

    Args:
        own: Log-probability of each item under the model as it is, shape (n,); gradients pass.
        old: The same under the model that drew it.
        reference: The same under the model that training started from.
        gains: Advantages.
        weights: What each rollout counts.
        clip: How far the ratio to the model that drew may move a gradient.
        beta: What the divergence counts.
    """
    ratio = (own - old).exp()
    bounded = ratio.clamp(1 - clip, 1 + clip)
    gap = reference - own
    divergence = gap.exp() - gap - 1
    total = (weights * (beta * divergence - torch.minimum(ratio * gains, bounded * gains))).sum()
    return PolicyLoss(total, divergence.detach(), (bounded * gains < ratio * gains).detach())
