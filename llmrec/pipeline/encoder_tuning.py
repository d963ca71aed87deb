"""Fine-tunes a text encoder on the training interactions of a recipe."""

from __future__ import annotations

from pathlib import Path

from llmrec import __version__
from llmrec.baselines.pairs import TransitionsTuned, TransitionsTunedConfig
from llmrec.data.hashing import digest_frame
from llmrec.data.split import split_validation_users
from llmrec.durable import Json, replace_atomically, write_json
from llmrec.models.text_encoder import TUNING_RECORD_FILE, find_encoder, read_tuning_record
from llmrec.pipeline.resume import check_foreign_files
from llmrec.pipeline.study import load_split
from llmrec.recipe.schema import Recipe


def tune_encoder(recipe: Recipe, out: Path, config: TransitionsTunedConfig) -> dict[str, Json]:
    """Fine-tune a text encoder as `TransitionsTuned` does, and save it for ``encoder`` settings.

    The best epoch is selected on the validation users that do not weigh ensembles.

    Args:
        recipe: The recipe, of which data, seed and ``eval.fusion.reserved`` are used.
        out: The folder of the text encoder, with a file on its training data.
        config: The tuning configuration.

    Returns:
        The content of that file.

    Raises:
        LlmrecError: If the folder has foreign files.
        DataError: If no item has a text, or the encoder was fine-tuned on another split.
        ModelError: If the encoder is missing.
    """
    written = read_tuning_record(out).get("files", [])
    check_foreign_files(out, lambda name: name == TUNING_RECORD_FILE or name in written)
    _, stamp = find_encoder(config.encoder)
    data = load_split(recipe.data, recipe.seed)
    choosing, _ = split_validation_users(data, recipe.eval.fusion.reserved)
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
    with replace_atomically(out) as draft:
        draft.mkdir()
        encoder.save(draft)
        record["files"] = sorted(entry.name for entry in draft.iterdir())
        write_json(draft / TUNING_RECORD_FILE, record)
    return record
