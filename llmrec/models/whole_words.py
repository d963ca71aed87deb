"""Whole-word embeddings: all tokens of a word or item code share an additional embedding (P5, RecSys 2022).

The encoder adds to every token embedding that of its word number, counted through the input from 1. So the pieces of
"item 1001", or the tokens of a code, are marked as belonging together. Words are separated by white space, as in P5's
code; a code of item tokens is always a word; control tokens, such as the end of the text or padding, have number 0.

Numbers follow from the token ids alone and are added where the encoder begins. So they are the same in training,
generation, scoring and search. The table is stored with a model's weights as ``whole_words.safetensors``, with the
effect of each token of the vocabulary on the count.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llmrec.errors import ModelError, RecipeError, require
from llmrec.guard import is_item_token
from llmrec.models.tensors import base_of, reading_trained_file
from llmrec.models.traits import is_encoder_decoder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

WHOLE_WORDS_FILE = "whole_words.safetensors"

# How a token changes the word count. An item token has the index of its level in the code, counted from LEVEL.
CONTROL, INSIDE, START, SPACE, LEVEL = range(5)
_LETTERS = 26
USER = LEVEL + _LETTERS + 1
_WORDS_ATTRIBUTE = "whole_words"
# White space in vocabularies: the mark of SentencePiece, and the letters that represent bytes.
_SENTENCEPIECE_SPACES = str.maketrans({"\u2581": " "})
_BYTE_LEVEL_SPACES = str.maketrans({"\u0120": " ", "\u010a": "\n", "\u0109": "\t", "\u010d": "\r"})


def token_kinds(tokenizer: PreTrainedTokenizerBase, control: Iterable[str], size: int) -> list[int]:
    """Return how each token of a vocabulary changes the word count.

    Args:
        tokenizer: The tokenizer; names of tokens that begin a word begin with white space.
        control: Control tokens, see `llmrec.guard.control_tokens`.
        size: Rows of the model's embeddings; those that the tokenizer does not use count as parts of words.
    """
    names: Mapping[str, int] = tokenizer.get_vocab()
    marks = _SENTENCEPIECE_SPACES if any(name.startswith("\u2581") for name in names) else _BYTE_LEVEL_SPACES
    # The unknown token represents a letter outside the vocabulary, which is part of a word.
    apart = {*control, *tokenizer.all_special_tokens} - {tokenizer.unk_token}
    kinds = [INSIDE] * size
    for name, number in names.items():
        if number < size:
            kinds[number] = CONTROL if name in apart else _token_kind(name, marks)
    return kinds


def _token_kind(name: str, marks: Mapping[int, str]) -> int:
    if is_item_token(name):
        level = name[1 : name.index("_")]
        if level == "user":
            return USER
        return LEVEL + (_LETTERS if level == "item" else ord(level) - ord("a"))
    text = name.translate(marks)
    return SPACE if text.isspace() else START if text[:1].isspace() else INSIDE


def word_numbers(kinds: Any) -> Any:
    """Number the words of inputs from 1; control tokens have 0.

    White space starts a word. Codes write their levels in order, with the token that identifies a single item last, so
    a token whose level does not increase starts the next code. A user token is a code by itself. Text after a code
    starts a word.

    Args:
        kinds: Kinds of the tokens, integers of shape (rows, columns).

    Returns:
        Integers of the same shape.
    """
    torch = require("torch", "train")
    before = torch.nn.functional.pad(kinds[:, :-1], (1, 0), value=CONTROL)
    follows_code = before >= LEVEL
    of_code = (kinds >= LEVEL) & ~(follows_code & (before < kinds) & (kinds != USER))
    of_text = (kinds == INSIDE) & ((before == CONTROL) | follows_code)
    begins = (before != SPACE) & ((kinds == START) | (kinds == SPACE) | of_code | of_text)
    return begins.long().cumsum(-1) * (kinds != CONTROL)


def attach_whole_words(model: torch.nn.Module, table: Any, kinds: Sequence[int]) -> None:
    """Add whole-word embeddings to the encoder of a model.

    Args:
        model: An encoder-decoder, with or without PEFT adapters.
        table: Rows by number, shape (longest count + 1, width); words beyond it share its last row. It is trainable.
        kinds: From `token_kinds`.

    Raises:
        RecipeError: If the model is not an encoder-decoder.
    """
    torch, base = require("torch", "train"), base_of(model)
    if not is_encoder_decoder(base.config):
        raise_missing_encoder(f"a model of type {base.config.model_type}")
    encoder = base.get_encoder()
    known = hasattr(encoder, _WORDS_ATTRIBUTE)
    device = encoder.get_input_embeddings().weight.device
    words = torch.nn.Embedding(*table.shape, _weight=table.float().to(device))
    words.register_buffer("kinds", torch.tensor(list(kinds), device=device), persistent=False)
    setattr(encoder, _WORDS_ATTRIBUTE, words)
    # The original files of the model remain readable for other programs that use transformers.
    names = {f"{name}.weight" for name, module in base.named_modules() if module is words}
    base._keys_to_ignore_on_save = names.union(base._keys_to_ignore_on_save or ())
    if not known:
        encoder.register_forward_pre_hook(_add_word_embeddings, with_kwargs=True)


def raise_missing_encoder(model: str) -> NoReturn:
    """Raise the error for a model without an encoder.

    Raises:
        RecipeError: Always.
    """
    raise RecipeError(
        f"model.whole_words: whole-word embeddings need an encoder-decoder such as T5, unlike {model}; set "
        "model.whole_words=false, or choose another model",
        kind="contradiction",
        column="model.whole_words",
    )


def _add_word_embeddings(
    encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace the token ids of an encoder input by token embeddings plus word embeddings."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is None:
        raise ModelError(
            "an encoder with whole-word embeddings needs token ids as input, not embeddings", kind="unsupported"
        )
    words, tokens = getattr(encoder, _WORDS_ATTRIBUTE), encoder.get_input_embeddings()(ids)
    positions = word_numbers(words.kinds[ids]).clamp(max=words.num_embeddings - 1)
    arguments = {**kwargs, "input_ids": None, "inputs_embeds": tokens + words(positions).to(tokens.dtype)}
    return args[1:], arguments


def new_word_table(model: torch.nn.Module, size: int, *, seed: int) -> Any:
    """Create an embedding table of ``size`` rows, initialised with the standard deviation of the model.

    For T5 that is 1, as for P5's table. It is small compared with trained token embeddings, so the first steps do not
    destroy the knowledge of a pretrained model.
    """
    torch, config = require("torch", "train"), base_of(model).config
    spread = getattr(config, "initializer_factor", None) or getattr(config, "init_std", 1.0)
    width = base_of(model).get_encoder().get_input_embeddings().weight.shape[1]
    return torch.randn((size, width), generator=torch.Generator().manual_seed(seed)) * spread


def whole_word_embeddings(model: torch.nn.Module) -> Any:
    """Return the whole-word embeddings of a model as ``torch.nn.Embedding``; None if it has none."""
    base = base_of(model)
    return getattr(base.get_encoder(), _WORDS_ATTRIBUTE, None) if is_encoder_decoder(base.config) else None


def save_whole_words(model: torch.nn.Module, folder: Path) -> None:
    """Save the whole-word embeddings of a model to a folder, if it has any."""
    words = whole_word_embeddings(model)
    if words is None:
        return
    torch, safetensors = require("torch", "train"), require("safetensors.torch", "train")
    tensors = {"table": words.weight.detach().float().cpu().contiguous(), "kinds": words.kinds.cpu().to(torch.int32)}
    safetensors.save_file(tensors, folder / WHOLE_WORDS_FILE)


def load_whole_words(model: torch.nn.Module, folder: Path) -> None:
    """Add the whole-word embeddings in a folder to a model, if there are any.

    Raises:
        ModelError: If they cannot be read, or do not belong to the model.
    """
    if not (folder / WHOLE_WORDS_FILE).is_file():
        return
    safetensors = require("safetensors.torch", "train")
    with reading_trained_file(f"the whole-word embeddings in {folder} cannot be read", folder):
        result = safetensors.load_file(folder / WHOLE_WORDS_FILE)
        table, kinds = result["table"], result["kinds"].tolist()
    shape = tuple(base_of(model).get_encoder().get_input_embeddings().weight.shape)
    if (len(kinds), table.shape[-1]) != shape or table.dim() != 2:
        raise ModelError(
            f"the whole-word embeddings in {folder} are for {len(kinds)} tokens of width {table.shape[-1]}, and the "
            f"model has {shape[0]} of width {shape[1]}; train again with `llmrec train`",
            kind="mismatch",
            at=folder,
        )
    attach_whole_words(model, table, kinds)


def copy_whole_words(source: Path, target: Path) -> None:
    """Copy the file with whole-word embeddings, if there is one."""
    if (source / WHOLE_WORDS_FILE).is_file():
        shutil.copyfile(source / WHOLE_WORDS_FILE, target / WHOLE_WORDS_FILE)
