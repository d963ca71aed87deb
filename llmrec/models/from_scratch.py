"""Small models that start from random weights, for catalogues whose items are codes: no words have to be understood.

Their folder looks like that of any pretrained model, so training, merging, export and every engine read it as such.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from llmrec.durable import replacing
from llmrec.errors import require
from llmrec.models.traits import auto_class
from llmrec.recipe.schema import ShapeSection
from llmrec.resources import cache_dir

_START, _END, _PAD = "<|start|>", "<|end|>", "<|pad|>"
# Turns stand one behind the other: in a model that reads codes alone, every further token is time without meaning.
_CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
# Raised whenever a shape gives other weights or another tokenizer than before.
_REVISION = 1


def made(shape: ShapeSection, seed: int) -> str:
    """Return the folder of a model of this shape, made once and kept in the cache folder.

    Args:
        shape: Kind and sizes.
        seed: Of its weights.
    """
    told = json.dumps([_REVISION, shape.model_dump(), seed], sort_keys=True)
    folder = cache_dir() / "models" / f"new-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
    if not (folder / "model.safetensors").is_file():
        write(shape, folder, seed=seed)
    return str(folder)


def write(shape: ShapeSection, folder: Path, *, seed: int) -> None:
    """Write a model with random weights and a tokenizer of single bytes."""
    torch = require("torch", "train")
    tokenizer = byte_tokenizer()
    config = _config(shape, tokenizer)
    # The generator of the CPU alone: seeding or keeping those of GPUs would open a context on each of them.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = auto_class(config).from_config(config)
    with replacing(folder) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)


def byte_tokenizer() -> Any:
    """Return a tokenizer whose vocabulary is the 256 bytes: it reads any text, and item tokens are added to it."""
    transformers, tokenizers = require("transformers", "train"), require("tokenizers", "train")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([_PAD, _START, _END, *alphabet])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=_START, eos_token=_END, pad_token=_PAD
    )
    tokenizer.chat_template = _CHAT
    return tokenizer


def _config(shape: ShapeSection, tokenizer: Any) -> Any:
    """Return the configuration: a decoder with rotary positions, or T5's pair, both with dropout wherever they can."""
    transformers = require("transformers", "train")
    marks = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if shape.kind == "encoder-decoder":
        return transformers.T5Config(
            num_layers=shape.layers,
            num_decoder_layers=shape.layers,
            d_model=shape.width,
            num_heads=shape.heads,
            d_kv=shape.head_width or shape.width // shape.heads,
            d_ff=shape.feedforward,
            dropout_rate=shape.dropout,
            decoder_start_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
            **marks,
        )
    return transformers.Starcoder2Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        intermediate_size=shape.feedforward,
        residual_dropout=shape.dropout,
        embedding_dropout=shape.dropout,
        attention_dropout=shape.dropout,
        initializer_range=0.02,
        tie_word_embeddings=True,
        sliding_window=None,
        use_cache=True,
        **marks,
    )
