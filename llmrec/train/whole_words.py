"""Trains whole-word embeddings together with the other weights of an encoder-decoder."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from llmrec.backends.encode import Encoder
from llmrec.models.whole_words import WEIGHTS, attach, kinds_of, new_table, whole_word_embeddings


def put_on(model: torch.nn.Module, encoder: Encoder, *, size: int, seed: int) -> None:
    """Add trainable whole-word embeddings to a model; a new table has ``size`` rows, the maximum word number + 1.

    Raises:
        RecipeError: If the model is not an encoder-decoder.
    """
    known = whole_word_embeddings(model)
    rows = model.get_input_embeddings().weight.shape[0]
    table = new_table(model, size, seed=seed) if known is None else known.weight.detach()
    attach(model, table, kinds_of(encoder.tokenizer, encoder.control, rows))


def restore_words(model: torch.nn.Module, checkpoint: Path) -> None:
    """Load the whole-word embeddings of a checkpoint, if the model has any."""
    words = whole_word_embeddings(model)
    if words is not None:
        with torch.no_grad():
            words.weight.copy_(load_file(checkpoint / WEIGHTS)["table"])
