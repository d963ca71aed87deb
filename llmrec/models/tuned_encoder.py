"""A text encoder whose last blocks are tuned, over texts whose states below those blocks are computed once."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.errors import ModelError, require
from llmrec.models.load import cpu_has_bf16
from llmrec.models.text_encoder import batches_of, open_encoder

if TYPE_CHECKING:
    from numpy.typing import NDArray


# What folders of sentence-transformers say beside the model: its parts, how states are pooled, the longest text.
_BESIDE = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json")


class TunedEncoder:
    """The vectors of fixed texts by an encoder whose last blocks learn.

    Blocks below those stay as they are, so that what they make of each text is computed once and kept: 2 bytes times
    hidden size times tokens. Vectors have length 1.

    Attributes:
        blocks: What is tuned, a torch module.
    """

    def __init__(self, folder: str, texts: Sequence[str], *, blocks: int) -> None:
        """Read the texts.

        Args:
            folder: The text encoder.
            texts: The texts.
            blocks: How many of its last blocks are tuned, 1 or more.

        Raises:
            ModelError: If it cannot be loaded, or has not so many blocks.
        """
        self._torch = require("torch", "train")
        self._folder = Path(folder)
        self._encoder = open_encoder(folder)
        model = self._encoder.model.requires_grad_(False)
        holder, name, layers = _blocks_of(model, folder)
        if not 1 <= blocks <= len(layers):
            raise ModelError(
                f"the text encoder in {folder} has {len(layers)} blocks, so that its last {blocks} cannot be tuned",
                kind="bad-value",
                at=folder,
            )
        self.blocks = self._torch.nn.ModuleList(layers[-blocks:]).requires_grad_(True).eval()
        self._tokens = self._encoder.tokens(texts)
        self._states = self._below()
        self._given: Any = None
        # Takes the place of all blocks below: it gives what they have made, and else looks like the first of them.
        recall = copy.copy(layers[0])
        recall.forward = lambda *given, **named: self._given
        setattr(holder, name, self._torch.nn.ModuleList([recall, *self.blocks]))
        self._whole = holder, name, layers

    def __call__(self, rows: Sequence[int]) -> Any:
        """Return the vectors of some texts, with gradients for the blocks where they are asked, shape (n, d)."""
        torch, encoder = self._torch, self._encoder
        batch = encoder.padded([self._tokens[row] for row in rows])
        kept = torch.nn.utils.rnn.pad_sequence(
            [torch.from_numpy(self._states[row]).float() for row in rows], batch_first=True
        )
        self._given = kept.to(encoder.model.device)
        device = encoder.model.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda" or cpu_has_bf16()):
            states = encoder.model(**batch).last_hidden_state
        return torch.nn.functional.normalize(encoder.pooled(states.float(), batch["attention_mask"]), dim=1)

    def length(self, row: int) -> int:
        """Return how many tokens a text has."""
        return len(self._tokens[row])

    def every(self) -> Any:
        """Return the vectors of all texts as the blocks now stand, without gradients, shape (texts, d)."""
        torch = self._torch
        training = self.blocks.training
        self.blocks.eval()
        found = torch.zeros(len(self._tokens), self._encoder.model.config.hidden_size)
        with torch.no_grad():
            for rows in batches_of([len(ids) for ids in self._tokens]):
                found[torch.tensor(rows)] = self(rows).cpu()
        self.blocks.train(training)
        return found

    def save(self, folder: Path) -> None:
        """Write the encoder, as its blocks now stand, in the form of the one that it was; it learns no more after that.

        Args:
            folder: Of weights in safetensors, the tokenizer, and how states are pooled; made where it is not there.
        """
        holder, name, layers = self._whole
        setattr(holder, name, self._torch.nn.ModuleList(layers))
        self._encoder.model.save_pretrained(folder)
        self._encoder.tokenizer.save_pretrained(folder)
        for beside in _BESIDE:
            if (self._folder / beside).is_file():
                (folder / beside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._folder / beside, folder / beside)

    def _below(self) -> list[NDArray[np.float16]]:
        """Return what the first of the tuned blocks is given for each text, shape (tokens, d) each."""
        torch, encoder = self._torch, self._encoder
        found: list[Any] = [None] * len(self._tokens)
        caught: list[Any] = []

        def catch(_: Any, given: tuple[Any, ...], named: Any) -> None:
            caught.append(given[0] if given else named["hidden_states"])
            raise _Enough

        hook = self.blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
        with torch.inference_mode():
            for rows in batches_of([len(ids) for ids in self._tokens]):
                try:
                    encoder.model(**encoder.padded([self._tokens[row] for row in rows]))
                except _Enough:
                    (states,) = caught
                    caught.clear()
                for place, row in enumerate(rows):
                    found[row] = states[place, : len(self._tokens[row])].half().cpu().numpy()
        hook.remove()
        return found


class _Enough(Exception):
    """Ends a forward pass whose rest is not needed."""


def _blocks_of(model: Any, folder: str) -> tuple[Any, str, list[Any]]:
    """Return the module that holds the blocks of an encoder, under which name, and the blocks.

    Raises:
        ModelError: If there is no list of as many modules as the configuration has blocks.
    """
    torch = require("torch", "train")
    wanted = getattr(model.config, "num_hidden_layers", None)
    for holder in model.modules():
        for name, part in holder.named_children():
            if isinstance(part, torch.nn.ModuleList) and len(part) == wanted:
                return holder, name, list(part)
    raise ModelError(
        f"the text encoder in {folder} ({type(model).__name__}) has no list of {wanted} blocks, so that they cannot be "
        "tuned; take one of the kind of BERT, MPNet or a decoder",
        kind="unsupported",
        at=folder,
    )
