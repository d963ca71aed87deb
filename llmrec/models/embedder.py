"""A text encoder by name that remembers on disk what it has read."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmrec.data.hashing import digest_frame, hash64
from llmrec.durable import replacing
from llmrec.errors import DataError, require
from llmrec.models.text_encoder import BATCH_TOKENS, DTYPE, encode_texts, find_encoder
from llmrec.resources import cache_dir

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset

log = logging.getLogger(__name__)

CHANCE = "chance"
"""An encoder that says nothing: the control of what text adds to codes."""
TUNED = "llmrec-encoder.json"
"""In the folder of an encoder that was tuned: on what."""


def text_embedder(name: str) -> Embedder:
    """Return what turns texts into vectors by a text encoder of this name."""
    if name == CHANCE:
        return Embedder(CHANCE, CHANCE)
    return Embedder(*find_encoder(name))


def fitting(name: str, data: SplitDataset) -> Embedder:
    """Return what turns texts into vectors for a split.

    Raises:
        DataError: If the encoder was tuned on other training interactions, which may hold what this split holds out.
    """
    if learned_from(name) not in (None, digest_frame(data.train)):
        raise DataError(
            f"the text encoder {name} was tuned on other training interactions than those of {data.dataset.name} as "
            "it is split here, so that it may know what is held out; tune it with `llmrec tune-encoder` and the recipe "
            "that uses it, or name the encoder that it began from",
            kind="leak",
            at=name,
            column="encoder",
        )
    return text_embedder(name)


def learned_from(name: str) -> str | None:
    """Return a digest of the training interactions that an encoder was tuned on; None if llmrec did not tune it."""
    # A store of features is no encoder; what its texts have seen stands in it.
    if name == CHANCE or name.startswith("store:"):
        return None
    file = Path(find_encoder(name)[0]) / TUNED
    return str(json.loads(file.read_text(encoding="utf-8"))["train"]) if file.is_file() else None


class Embedder:
    """An `Embed` that remembers on disk the vectors of sets of texts."""

    def __init__(self, folder: str, stamp: str) -> None:
        """Set up.

        Args:
            folder: The text encoder.
            stamp: A hash over its weights and tokenizer.
        """
        self.stamp = stamp
        self._folder = folder

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return one vector of length 1 for each text, shape (n, d)."""
        if self._folder == CHANCE:
            return _by_chance(texts)
        # Whatever order texts come in, and however often: those of a catalogue are read once.
        distinct = sorted(set(texts))
        rows = {text: row for row, text in enumerate(distinct)}
        return self._read(distinct)[[rows[text] for text in texts]]

    def _read(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return one vector for each text, from the cache or the encoder."""
        tensors = require("safetensors.numpy", "train")
        digest = hashlib.sha256("\0".join([self.stamp, *texts]).encode()).hexdigest()[:32]
        file = cache_dir() / "vectors" / f"{digest}.safetensors"
        if file.is_file():
            try:
                found: NDArray[np.float32] = tensors.load_file(file)["vectors"]
                return found
            except Exception as error:
                log.warning("%s cannot be read (%s); the texts are embedded again", file, error)
        vectors = encode_texts(self._folder, texts)
        with replacing(file) as draft:
            tensors.save_file({"vectors": vectors}, draft, metadata=self.record)
        return vectors

    @property
    def record(self) -> dict[str, str]:
        """How vectors are made: a hash over the encoder's weights and tokenizer, numbers, and tokens read together."""
        return {"stamp": self.stamp, "dtype": DTYPE, "batch_tokens": str(BATCH_TOKENS)}


def _by_chance(texts: Sequence[str], width: int = 64) -> NDArray[np.float32]:
    """Return a direction for each text that depends on nothing but its hash, shape (n, width)."""
    hashed = hash64("chance", 0, texts)
    rows = np.stack([np.random.default_rng(int(seed)).standard_normal(width) for seed in hashed])
    found: NDArray[np.float32] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return found
