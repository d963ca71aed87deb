"""Texts to vectors by a pretrained text encoder, such as all-MiniLM-L6-v2."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.durable import Json
from llmrec.errors import ModelError, require
from llmrec.models.load import POOLING, has_cuda, quiet_libraries, resolve, weights_stamp
from llmrec.models.tensors import load_whole
from llmrec.progress import Bar
from llmrec.recipe.schema import ModelSection

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCH_TOKENS = 4096
"""Tokens that are read together, padding included."""
DTYPE = "float32"
"""Of weights and vectors."""

# What fewer texts take is over before a bar could be read.
_MANY = 2000


def find_encoder(name: str) -> tuple[str, str]:
    """Return the folder of a text encoder, found as models are, and a hash over its weights and tokenizer.

    Raises:
        ModelError: If there is none of this name.
    """
    folder = resolve(ModelSection(name=name)) if Path(name).is_dir() else _of_name(name)
    return folder, weights_stamp(folder)


@lru_cache(maxsize=16)
def _of_name(name: str) -> str:
    """Return the folder of a model that is named; where the hub cannot be reached, it is asked once."""
    return resolve(ModelSection(name=name))


@dataclass(frozen=True)
class OpenEncoder:
    """A text encoder in memory.

    Attributes:
        model: Of transformers, in evaluation mode.
        tokenizer: Its tokenizer.
        limit: Tokens of the longest text.
        first: Texts are the first token's state, not the mean of all.
    """

    model: Any
    tokenizer: Any
    limit: int
    first: bool

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, cut at the length that the encoder was trained with."""
        found = self.tokenizer(list(texts), truncation=True, max_length=self.limit)["input_ids"]
        return [list(ids) for ids in found]

    def spans(self, texts: Sequence[str], most: int) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """Return the tokens of each text, at most so many, and which characters each stands for; a frame for none."""
        found = self.tokenizer(list(texts), truncation=True, max_length=most, return_offsets_mapping=True)
        places = [[(int(start), int(end)) for start, end in each] for each in found["offset_mapping"]]
        return [list(ids) for ids in found["input_ids"]], places

    def padded(self, encoded: Sequence[Sequence[int]]) -> Any:
        """Return tokens and mask of some texts as the model takes them."""
        return self.tokenizer.pad({"input_ids": encoded}, return_tensors="pt").to(self.model.device)

    def pooled(self, states: Any, mask: Any) -> Any:
        """Return what is kept of last hidden states, shape (n, tokens, d) -> (n, d)."""
        if self.first:
            return states[:, 0]
        weights = mask[:, :, None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def open_encoder(folder: str) -> OpenEncoder:
    """Load a text encoder.

    Last hidden states are pooled as the folder's ``1_Pooling/config.json`` says (Reimers and Gurevych, EMNLP 2019): the
    first token's, or the mean over all tokens, which is also what an encoder without that file gets.

    Raises:
        ModelError: If the folder holds no encoder that transformers can load, or its weights do not fit its
            configuration.
    """
    torch, transformers = require("torch", "train"), require("transformers", "train")
    quiet_libraries()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        # Hidden states are pooled here: the encoder's own pooler, which many folders leave out, is never asked.
        auto, unread = transformers.AutoModel, ("pooler",)
        model = load_whole(auto, folder, unread=unread, use_safetensors=True, dtype=torch.float32).eval()
    except (ModelError, MemoryError):
        raise
    except Exception as error:
        # A damaged folder can end in any of them; see `llmrec.models.load`.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(
            f"the text encoder in {folder} cannot be loaded: {reason}; name a folder or hub "
            "model saved with save_pretrained (safetensors) as index.semantic.encoder",
            kind="damaged",
            at=folder,
            column="index.semantic.encoder",
        ) from error
    model.to("cuda" if has_cuda() else "cpu")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    first = bool(_settings(folder, POOLING).get("pooling_mode_cls_token"))
    return OpenEncoder(model, tokenizer, _longest(folder, model), first)


def encode_texts(folder: str, texts: Sequence[str]) -> NDArray[np.float32]:
    """Return one vector of length 1 for each text, shape (n, d).

    Raises:
        ModelError: See `open_encoder`.
    """
    encoder = open_encoder(folder)
    vectors = np.zeros((len(texts), encoder.model.config.hidden_size), dtype=np.float32)
    for rows, states, mask in states_of(encoder, encoder.tokens(texts)):
        vectors[rows] = encoder.pooled(states, mask).cpu().numpy()
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: NDArray[np.float32] = vectors / np.maximum(lengths, 1e-12)
    return unit


def states_of(encoder: OpenEncoder, encoded: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Any, Any]]:
    """Yield some of the texts at a time: their places, last hidden states and mask, shapes (n, tokens, d), (n, tokens).

    Args:
        encoder: Open.
        encoded: The tokens of each text.
    """
    torch = require("torch", "train")
    with Bar("encoding", len(encoded), unit="texts", quiet=len(encoded) < _MANY) as bar:
        for rows in batches_of([len(ids) for ids in encoded]):
            batch = encoder.padded([encoded[row] for row in rows])
            with torch.no_grad():
                states = encoder.model(**batch).last_hidden_state
            yield rows, states, batch["attention_mask"]
            bar.advance(len(rows))


def _longest(folder: str, model: Any) -> int:
    said = _settings(folder, "sentence_bert_config.json").get("max_seq_length")
    if isinstance(said, int) and said:
        return said
    return int(min(512, getattr(model.config, "max_position_embeddings", 512)))


def _settings(folder: str, name: str) -> dict[str, Json]:
    file = Path(folder) / name
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{file} cannot be read ({error}); fetch the encoder again", kind="damaged", at=file
        ) from error
    return found if isinstance(found, dict) else {}


def batches_of(lengths: Sequence[int]) -> list[list[int]]:
    """Group texts by length, so that little is padded; longest first, so that memory runs out at once or never."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if batches and (len(batches[-1]) + 1) * max(1, lengths[batches[-1][0]]) <= BATCH_TOKENS:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
