"""Fits a baseline: `fitted`, which everything asks that needs one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmrec.baselines.fits.store import Storable, keep, keeps, key_of, recall
from llmrec.baselines.parameters import make
from llmrec.progress import Bar

if TYPE_CHECKING:
    from llmrec.data.split import SplitDataset


def fitted(
    name: str,
    parameters: Mapping[str, Any],
    data: SplitDataset,
    *,
    seed: int,
    like: Sequence[Any] = (),
    where: str = "parameters",
) -> Any:
    """Return a fitted baseline: one that is kept from before, or a new one, whose log shows that the fit goes on.

    Args:
        name: Of the baseline.
        parameters: Its parameters.
        data: The split.
        seed: Of the fit.
        like: Baselines of this name that were fitted on the same data with the same seed. Where one differs only in
            parameters that have no part in fitting, nothing is fitted again.
        where: The key that holds the parameters, for messages.

    Raises:
        LlmrecError: If a parameter is none, or the baseline cannot be fitted to these data.
    """
    model = make(name, parameters, seed=seed, where=where)
    for other in like:
        if other.config.model_dump(exclude=model.AT_ANSWER) == model.config.model_dump(exclude=model.AT_ANSWER):
            same = other.with_config(model.config)
            same.recalled = 0.0
            return same
    key = key_of(model, data, seed) if isinstance(model, Storable) and keeps() else None
    if key is not None and (seconds := recall(model, key, data)) is not None:
        model.recalled = seconds
        return model
    begin = time.monotonic()
    with Bar(f"fitting {name}", None, quiet=bool(getattr(model.config, "quiet", False))):
        model.fit(data)
    if key is not None:
        keep(model, key, time.monotonic() - begin)
    return model
