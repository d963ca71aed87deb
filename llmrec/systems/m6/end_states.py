"""Hidden states of a causal language model at the ends of texts, used as text vectors (M6-Rec, arXiv 2205.08084).

With causal attention a state depends only on preceding tokens, so one pass over the texts of a history gives the state
after each of them. States are stored in the cache folder, under a hash of weights, precision and texts.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.backends.encode import Encoder
from llmrec.durable import replace_atomically
from llmrec.errors import ModelError, require
from llmrec.machine import has_cuda
from llmrec.models.batching import group_by_length
from llmrec.models.first_layers import load_first_layers
from llmrec.models.load import load_tokenizer, model_folder_hash
from llmrec.models.text_encoder import BATCH_TOKENS, find_encoder
from llmrec.progress import Progress
from llmrec.recipe.schema import ModelSection
from llmrec.resources import cache_dir

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

# Minimum number of rows for a progress bar, and number of rows whose last state is cached.
_MIN_PROGRESS_ROWS, _MAX_CACHED_ROWS = 256, 1 << 15


def load_end_states(name: str, *, half: bool, layers: int | None = None) -> EndStates:
    """Return the encoder of a language model, which stays loaded for the next call with the same weights."""
    return _load_once(name, find_encoder(name)[1], half, layers)


@lru_cache(maxsize=1)
def _load_once(name: str, stamp: str, half: bool, layers: int | None) -> EndStates:
    return EndStates(name, half=half, layers=layers)


class EndStates:
    """Encodes rows of texts, one text per line, after an introductory line.

    Args:
        name: Name or folder of a causal language model.
        half: Multiply in bfloat16.
        layers: Number of first layers to use, followed by the final norm; None: all.

    Attributes:
        width: Dimensions of a state.
        read: Number of tokens that were computed and not cached.

    Raises:
        ModelError: If it cannot be loaded, is an encoder-decoder, has fewer layers, or was fine-tuned by llmrec.
    """

    def __init__(self, name: str, *, half: bool, layers: int | None = None) -> None:
        self._torch = require("torch", "train")
        body, folder = load_first_layers(name, layers, column="encoder")
        self._body = body.eval().requires_grad_(False).to("cuda" if has_cuda() else "cpu")
        section = ModelSection(name=name, dtype="float32")
        self._encoder = Encoder(load_tokenizer(folder, section), max_length=section.max_length)
        self._name, self._half, self._stamp = name, half, f"{model_folder_hash(folder)}-{layers}"
        self._known: dict[tuple[str, ...], NDArray[np.float32]] = {}
        self._limit = getattr(body.config, "max_position_embeddings", None)
        self.width = int(body.config.hidden_size)
        self.read = 0

    def ids(self, text: str, most: int | None = None) -> list[int]:
        """Return the tokens of a line: the truncated text and a line break.

        Raises:
            BackendError: If a text contains a control token.
        """
        return [*self._encoder.piece(text)[:most], *self._encoder.piece("\n")]

    def after(self, lead: str, rows: Sequence[Sequence[str]], *, most: int) -> list[NDArray[np.float32]]:
        """Return the hidden state after every text of each row; states are also cached on disk.

        Args:
            lead: The introductory line.
            rows: Lists of at least one text.
            most: The maximum number of tokens per text.

        Returns:
            Shape (texts, width) each.

        Raises:
            ModelError: If a row is longer than the model's context.
        """
        key = json.dumps([self._stamp, self._half, most, lead, rows])
        file = cache_dir() / "states" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        tensors, ends = require("safetensors.numpy", "train"), np.cumsum([len(row) for row in rows])
        if file.is_file():
            try:
                return np.split(tensors.load_file(file)["states"], ends[:-1])
            except Exception as error:
                log.warning("%s cannot be read (%s); computing the hidden states again", file, error)
        result = self._compute_states(lead, rows, most, last=False)
        if result:
            with replace_atomically(file) as draft:
                tensors.save_file({"states": np.concatenate(result)}, draft)
        return result

    def last(self, lead: str, rows: Sequence[Sequence[str]], *, most: int) -> list[NDArray[np.float32]]:
        """Return the cached hidden state after the last text of each row, shape (width,) each; see `after`."""
        keys = [(lead, str(most), *row) for row in rows]
        new = dict.fromkeys(key for key in keys if key not in self._known)
        if len(self._known) + len(new) > _MAX_CACHED_ROWS:
            self._known, new = {}, dict.fromkeys(keys)
        result = self._compute_states(lead, [key[2:] for key in new], most, last=True)
        self._known |= {key: state for key, (state,) in zip(new, result, strict=True)}
        return [self._known[key] for key in keys]

    def _compute_states(
        self, lead: str, rows: Sequence[Sequence[str]], most: int, *, last: bool
    ) -> list[NDArray[np.float32]]:
        torch, first, device = self._torch, self.ids(lead), self._body.device
        lines = [[self.ids(text, most) for text in row] for row in rows]
        lengths = [len(first) + sum(map(len, row)) for row in lines]
        if self._limit is not None and max(lengths, default=0) > self._limit:
            raise ModelError(
                f"a history has {max(lengths)} tokens, more than the context of {self._name} ({self._limit}); lower "
                "max_len",
                kind="too-large",
                at=self._name,
                column="max_len",
            )
        result: list[Any] = [None] * len(rows)
        with Progress("reading", len(rows), unit="texts", quiet=len(rows) < _MIN_PROGRESS_ROWS) as bar:
            for batch in group_by_length(lengths, BATCH_TOKENS, longest_first=True):
                ids = torch.zeros((len(batch), max(lengths[row] for row in batch)), dtype=torch.long)
                for index, row in enumerate(batch):
                    ids[index, : lengths[row]] = torch.tensor([*first, *(item for line in lines[row] for item in line)])
                # With causal attention, padding on the right has no effect.
                with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=self._half):
                    states = self._body(input_ids=ids.to(device), use_cache=False).last_hidden_state
                for index, row in enumerate(batch):
                    ends = len(first) + np.cumsum([len(line) for line in lines[row]]) - 1
                    result[row] = states[index, torch.from_numpy(ends[-1:] if last else ends)].float().cpu().numpy()
                bar.advance(len(batch))
        self.read += sum(lengths)
        return result
