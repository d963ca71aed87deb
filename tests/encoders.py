"""A text encoder of a few thousand weights."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache


@cache
def tiny_encoder(kind: str = "Bert") -> str:
    """Return the folder of an encoder of two blocks with random weights; it exists until the tests end."""
    import torch
    import transformers

    from tests.conftest import make_tokenizer

    folder = tempfile.mkdtemp(prefix="llmrec-encoder-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer = make_tokenizer()
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**shape, num_hidden_layers=2, initializer_range=0.2)
        getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
