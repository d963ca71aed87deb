"""The first layers of a pretrained decoder, for models that train or read them without its tokens or its head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmrec.errors import ModelError, require
from llmrec.models.exits import check_early_exits
from llmrec.models.load import BUNDLE_FILE, load_model, resolve_model_folder
from llmrec.models.text_encoder import TUNING_RECORD_FILE
from llmrec.models.traits import is_encoder_decoder
from llmrec.recipe.schema import ModelSection


def load_first_layers(name: str, count: int | None, *, column: str) -> tuple[Any, str]:
    """Load a causal language model in float32 and remove all but its first layers and the final norm.

    Args:
        name: Name or folder of the model.
        count: Number of layers; None: all.
        column: The setting that names the model, for errors.

    Returns:
        The decoder without the head, and the folder of the model.

    Raises:
        ModelError: If it cannot be loaded, is an encoder-decoder, has fewer layers, or was fine-tuned by llmrec.
    """
    torch = require("torch", "train")
    section = ModelSection(name=name, dtype="float32")
    folder = resolve_model_folder(section)
    if any((Path(folder) / record).is_file() for record in (BUNDLE_FILE, TUNING_RECORD_FILE)):
        raise ModelError(
            f"{name} was fine-tuned by llmrec on interactions that may be held out here; use the base model of {name}",
            kind="leak",
            at=name,
            column=column,
        )
    model = load_model(folder, section, dtype=torch.float32)
    if is_encoder_decoder(model.config):
        raise ModelError(
            f"{name} is an encoder-decoder, which is not supported; name a causal language model",
            kind="unsupported",
            at=name,
            column=column,
        )
    body = model.get_decoder()
    if count is not None:
        check_early_exits(model, "layers")
        if count > (available := len(body.layers)):
            raise ModelError(
                f"layers={count} is more than the {available} layers of {name}; lower layers",
                kind="bad-value",
                at=name,
                column="layers",
            )
        body.layers = torch.nn.ModuleList(list(body.layers)[:count])
        body.config.num_hidden_layers = count
    return body, folder
