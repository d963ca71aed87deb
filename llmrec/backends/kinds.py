"""Which kind of language model a configuration describes, and the class that loads it: decided here alone."""

from __future__ import annotations

from typing import Any

from llmrec.errors import require


def is_paired(config: Any) -> bool:
    """Whether one half of the model reads the prompt and the other writes the answer: an encoder-decoder such as T5."""
    return bool(getattr(config, "is_encoder_decoder", False))


def auto_class(config: Any) -> Any:
    """Return transformers' class that makes or loads the model of a configuration, head included."""
    transformers = require("transformers", "train")
    return transformers.AutoModelForSeq2SeqLM if is_paired(config) else transformers.AutoModelForCausalLM
