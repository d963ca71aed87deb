"""Fine-tunes a text encoder on a recipe's training interactions."""

from __future__ import annotations

import json
from pathlib import Path

from llmrec import __version__
from llmrec.baselines.pairs import TransitionsTuned, TransitionsTunedConfig
from llmrec.data.hashing import digest_frame
from llmrec.data.split import halves
from llmrec.durable import Json, replacing, write_json
from llmrec.models.text_encoder import TUNED, find_encoder
from llmrec.pipeline.resume import refuse_foreign
from llmrec.pipeline.study import load_split
from llmrec.recipe.schema import Recipe


def tune_encoder(recipe: Recipe, out: Path, config: TransitionsTunedConfig) -> dict[str, Json]:
    """Fine-tune a text encoder as `TransitionsTuned` does, and write it to a folder for ``encoder`` settings.

    The best epoch is chosen by the validation users that do not weigh fusions.

    Args:
        recipe: Its data, seed and ``eval.fusion.reserved`` count.
        out: The folder: a text encoder with a file that says what it learned from.
        config: How it is tuned.

    Returns:
        What that file says.

    Raises:
        LlmrecError: If the folder holds something else.
        DataError: If no item has a text.
        ModelError: If there is no such encoder.
    """
    written = json.loads((out / TUNED).read_text(encoding="utf-8")).get("files", []) if (out / TUNED).is_file() else []
    refuse_foreign(out, lambda name: name == TUNED or name in written)
    _, stamp = find_encoder(config.encoder)
    data = load_split(recipe.data, recipe.seed)
    choosing, _ = halves(data, recipe.eval.fusion.reserved)
    encoder = TransitionsTuned(config, seed=recipe.seed).tuned(choosing)
    record: dict[str, Json] = {
        "llmrec": __version__,
        "data": data.dataset.name,
        "train": digest_frame(data.train),
        "interactions": data.train.height,
        "seed": recipe.seed,
        "encoder": config.encoder,
        "stamp": stamp,
        "parameters": config.model_dump(mode="json"),
    }
    with replacing(out) as draft:
        draft.mkdir()
        encoder.save(draft)
        record["files"] = sorted(entry.name for entry in draft.iterdir())
        write_json(draft / TUNED, record)
    return record
