"""Trains whole-word embeddings together with the other weights of an encoder-decoder."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from llmrec.backends.encode import Encoder
from llmrec.models.whole_words import (
    WHOLE_WORDS_FILE,
    attach_whole_words,
    new_word_table,
    token_kinds,
    whole_word_embeddings,
)


def add_whole_words(model: torch.nn.Module, encoder: Encoder, *, size: int, seed: int) -> None:
    """Add trainable whole-word embeddings to a model; a new table has ``size`` rows, the maximum word number + 1.

    Raises:
        RecipeError: If the model is not an encoder-decoder.
    """
    known = whole_word_embeddings(model)
    rows = model.get_input_embeddings().weight.shape[0]
    table = new_word_table(model, size, seed=seed) if known is None else known.weight.detach()
    attach_whole_words(model, table, token_kinds(encoder.tokenizer, encoder.control, rows))


def restore_whole_words(model: torch.nn.Module, checkpoint: Path) -> None:
    """Load the whole-word embeddings of a checkpoint, if the model has any."""
    words = whole_word_embeddings(model)
    if words is not None:
        with torch.no_grad():
            words.weight.copy_(load_file(checkpoint / WHOLE_WORDS_FILE)["table"])
