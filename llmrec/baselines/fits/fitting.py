"""Fits a baseline: `fitted`, which everything asks that needs one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
    """Return a fitted baseline; a log shows that the fit goes on.

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
            return other.with_config(model.config)
    with Bar(f"fitting {name}", None, quiet=bool(getattr(model.config, "quiet", False))):
        model.fit(data)
    return model
