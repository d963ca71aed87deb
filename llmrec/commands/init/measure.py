"""The estimate of a recipe that was just written: the one that `llmrec check --dry-run` prints."""

from __future__ import annotations

from collections.abc import Mapping

from llmrec.commands.show.estimate import estimate, train_rows
from llmrec.errors import LlmrecError
from llmrec.experiment.study import Study, encoder_of
from llmrec.models.load import outline


def seconds_of(study: Study) -> Mapping[str, float] | None:
    """Return the seconds of each stage on this machine; None where the model is not at hand, and nothing is fetched."""
    recipe = study.recipe
    try:
        folder = outline(recipe.model, fetch=False)
        if folder is None:
            return None
        encoder = encoder_of(study, folder)
        rows = train_rows(study, encoder, folder) if "tuned" in recipe.eval.arms else {}
        return estimate(study, encoder, folder, rows).stages
    except LlmrecError:
        return None
