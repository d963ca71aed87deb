"""What cannot be exported is said at once, before any library of models is imported."""

from __future__ import annotations

from pathlib import Path

from llmrec.errors import LlmrecError
from llmrec.recipe.load import STORED, load_stored


def refuse_untuned(run: Path) -> None:
    """Refuse a run folder that tuned no language model, which is what an export holds.

    Raises:
        LlmrecError: With what can be done with such a run instead.
    """
    if (run / "train.json").is_file() or not (run / STORED).is_file():
        return
    arms = load_stored(run).eval.arms
    if not arms:
        raise LlmrecError(
            f"{run} has classic recommenders alone, and an export holds a tuned language model; they answer from the "
            f"run folder: llmrec serve {run}",
            kind="unsupported",
            at=run,
        )
    if "tuned" not in arms:
        raise LlmrecError(
            f"{run} measured a language model without tuning it (eval.arms={', '.join(arms)}), so there is nothing to "
            "export; add tuned to eval.arms and run it again",
            kind="unsupported",
            at=run,
            column="eval.arms",
        )
