"""Training in epochs until the validation split says stop."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from llmrec.errors import require
from llmrec.progress import Bar

log = logging.getLogger(__name__)


class Learner(Protocol):
    """What has a torch network that learns."""

    network: Any
    name: str


class Epochs(Protocol):
    """How long a network learns, and how fast."""

    @property
    def learning_rate(self) -> float:
        """Of AdamW."""
        ...

    @property
    def weight_decay(self) -> float:
        """Decoupled."""
        ...

    @property
    def epochs(self) -> int:
        """At most."""
        ...

    @property
    def patience(self) -> int | None:
        """Epochs without a better one; None: all are trained."""
        ...

    @property
    def quiet(self) -> bool:
        """No progress line."""
        ...


def until_least(
    model: Learner,
    judge: Callable[[], float] | None,
    config: Epochs,
    learn: Callable[[Any], float],
    *,
    measure: str,
    sign: int = 1,
    rates: Sequence[Mapping[str, Any]] | None = None,
    learned: bool = False,
) -> int:
    """Train until what validation says has not fallen for ``patience`` epochs, and keep the best epoch's weights.

    Args:
        model: Its network learns.
        judge: Looks at the validation split with the network as it stands, less is better; None: all epochs are trained
            and the last one is kept.
        config: How to train.
        learn: Passes once over the training data with an optimiser, and returns the mean loss.
        measure: What the judge measures.
        sign: What it is multiplied by to be shown.
        rates: Groups of parameters with learning rates of their own; None: one rate for all.
        learned: The network has learned something already, and is kept as it is if no epoch is better.

    Returns:
        The epoch that was kept, from 1; 0: the network as it was.
    """
    torch, network = require("torch", "baselines"), model.network
    optimiser = torch.optim.AdamW(
        rates or network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    best, kept, since = math.inf, None, 0
    early = config.patience is not None
    with Bar(model.name, config.epochs, unit="epochs", quiet=config.quiet, early=early, passing=True) as bar:
        for epoch in range(0 if learned and judge else 1, config.epochs + 1):
            mean = learn(optimiser) if epoch else math.nan
            bar.reach(epoch, f"loss {mean:.3f}")
            if judge is None:
                continue
            value = judge()
            log.info("epoch %d: loss %.4f, validation %s %.4f", epoch, mean, measure, sign * value)
            since += 1
            if value < best:
                best, kept, since = value, (epoch, copy.deepcopy(network.state_dict())), 0
            bar.reach(epoch, f"loss {mean:.3f}, validation {measure} {sign * value:.4f}, best {sign * best:.4f}")
            if config.patience is not None and since >= config.patience:
                break
    if kept is not None:
        network.load_state_dict(kept[1])
    network.eval()
    return kept[0] if kept else config.epochs
