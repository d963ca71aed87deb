"""Experiment trackers, ``train.report_to``: which there are, and the figures of the evaluation beside the losses."""

from __future__ import annotations

from collections.abc import Sequence

from llmrec.errors import MissingExtra, RecipeError, did_you_mean, require


def refuse_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that do not exist, or are not installed.

    Raises:
        RecipeError: If the trainer knows none of a name.
        MissingExtra: If the package of one is not installed.
    """
    if not names:
        return
    known = require("transformers.integrations.integration_utils", "train")
    for name in names:
        if name not in known.INTEGRATION_TO_CALLBACK:
            raise RecipeError(
                f"train.report_to: there is no tracker {name!r}{did_you_mean(name, known.INTEGRATION_TO_CALLBACK)}; "
                f"known are {', '.join(sorted(known.INTEGRATION_TO_CALLBACK))}",
                kind="unknown-name",
                column="train.report_to",
            )
        if name not in known.get_available_reporting_integrations():
            raise MissingExtra(
                f"train.report_to: the package of {name!r} is not installed; install it with: pip install {name}, or "
                "take it out",
                kind="not-installed",
                column="train.report_to",
            )
