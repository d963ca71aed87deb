"""A dual encoder of conversations and items: two linear maps on a frozen text encoder, trained on dialogues.

RecLLM fine-tunes the encoders themselves (Friedman et al. 2023, arXiv 2305.07961); here they are frozen, so each text
is encoded once, and training takes seconds on one core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.baselines.neural import symmetric_info_nce, train_with_early_stopping
from llmrec.durable import read_json, replace_atomically, write_json
from llmrec.errors import DataError, require
from llmrec.models.text_encoder import text_embedder

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch.optim import Optimizer

    from llmrec.chat.transcripts import Turn
    from llmrec.index.table import Embed

DEFAULT_ENCODER = "all-MiniLM-L6-v2"
CONTEXT_UTTERANCES = 3
"""Number of last utterances from which a conversation is encoded."""
_METADATA_FILE, _MAPS_FILE = "dual-encoder.json", "maps.safetensors"
_BATCH_SIZE, _DROPOUT = 256, 0.2
# Minimum number of dialogues: two are held out, so that the item of each is a negative of the other.
_MIN_DIALOGUES = 20
# Initial logarithm of the scale of cosines.
_INITIAL_LOG_SCALE = 3.0


@dataclass(frozen=True)
class DialogueTurns:
    """Turns of dialogues, each with its target item.

    Attributes:
        vectors: Embeddings of the last messages by the text encoder, shape (n, d).
        targets: The row of each target among the items, shape (n,).
        apart: Rows of items that are not negatives, such as other targets of the same dialogue.
        dialogues: The number of the dialogue of each turn, shape (n,).
    """

    vectors: NDArray[np.float32]
    targets: NDArray[np.int64]
    apart: Sequence[frozenset[int]]
    dialogues: NDArray[np.int64]

    def part(self, rows: NDArray[np.int64]) -> DialogueTurns:
        """Return the selected turns."""
        return DialogueTurns(
            self.vectors[rows], self.targets[rows], [self.apart[row] for row in rows], self.dialogues[rows]
        )

    def false(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return a mask of the false negatives in a batch, shape (n, n).

        These are the turn's own target, if another turn has it too, and the items of `apart`.
        """
        targets = self.targets[rows]
        result: NDArray[np.bool_] = np.equal(targets[:, None], targets[None, :])
        for index, row in enumerate(rows):
            if self.apart[row]:
                result[index] |= np.isin(targets, list(self.apart[row]))
        np.fill_diagonal(result, False)
        return result


@dataclass(frozen=True)
class DualEncoder:
    """Linear maps of conversation vectors and item vectors, shape (d, d) each.

    Attributes:
        encoder: The name of the text encoder.
        context: The map of messages.
        item: The map of item texts.
    """

    encoder: str
    context: NDArray[np.float32]
    item: NDArray[np.float32]

    @cached_property
    def _embed(self) -> Embed:
        return text_embedder(self.encoder)

    def embed_contexts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return normalised vectors of conversation texts, shape (n, d)."""
        return apply_linear_map(self._embed(texts), self.context)

    def embed_items(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return normalised vectors of item texts, shape (n, d)."""
        return apply_linear_map(self._embed(texts), self.item)

    def save(self, folder: Path) -> None:
        """Save the maps as safetensors, with the name of their text encoder."""
        with replace_atomically(folder / _MAPS_FILE) as draft:
            require("safetensors.numpy", "train").save_file({"context": self.context, "item": self.item}, draft)
        write_json(folder / _METADATA_FILE, {"encoder": self.encoder})

    @staticmethod
    def load(folder: Path) -> DualEncoder:
        """Load a dual encoder written by `save`."""
        about = read_json(folder / _METADATA_FILE, "train it again with `llmrec chat --learn`")
        try:
            return DualEncoder(
                str(about["encoder"]), **require("safetensors.numpy", "train").load_file(folder / _MAPS_FILE)
            )
        except Exception as error:
            raise DataError(
                f"the dual encoder {folder} cannot be read ({error}); train it again with `llmrec chat --learn`",
                kind="damaged",
                at=folder,
            ) from error


def reply_contexts(turns: Sequence[Turn]) -> list[str]:
    """Return the context of each reply: the last messages of both sides before it."""
    messages: list[str] = []
    results = []
    for turn in turns:
        messages.append(turn.user or "")
        results.append(" ".join(messages[-CONTEXT_UTTERANCES:]))
        messages.append(turn.text)
    return results


def build_dialogue_turns(turns: Sequence[Turn], items: Sequence[str], encoder: str) -> DialogueTurns:
    """Return training data from simulated conversations: each user message is a request for the target item.

    Args:
        turns: The transcript; a turn whose user is null begins each conversation, and its item is the target.
        items: Ids in the order of the catalogue.
        encoder: The text encoder.
    """
    row_of = {item: row for row, item in enumerate(items)}
    begun = [n for n, turn in enumerate(turns) if turn.user is None]
    contexts, targets, dialogues = [], [], []
    for number, (start, end) in enumerate(pairwise([*begun, len(turns)])):
        lines = reply_contexts(turns[start + 1 : end])
        contexts += lines
        targets += [row_of[turns[start].items[0]]] * len(lines)
        dialogues += [number] * len(lines)
    nothing: frozenset[int] = frozenset()
    return DialogueTurns(
        text_embedder(encoder)(contexts), np.array(targets), [nothing] * len(contexts), np.array(dialogues)
    )


def load_embedders(name: str) -> tuple[Embed, Embed]:
    """Return the embedding functions for item texts and for messages, from a text encoder or a dual encoder."""
    if (Path(name) / _METADATA_FILE).is_file():
        dual = DualEncoder.load(Path(name))
        return dual.embed_items, dual.embed_contexts
    embed = text_embedder(name)
    return embed, embed


def apply_linear_map(vectors: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Apply a linear map to vectors and normalise them, shape (n, d)."""
    result = vectors @ weights.T
    unit: NDArray[np.float32] = result / np.maximum(np.linalg.norm(result, axis=1, keepdims=True), 1e-12)
    return unit


def train_dual_encoder(encoder: str, data: DialogueTurns, items: NDArray[np.float32], seed: int = 0) -> DualEncoder:
    """Train the maps, starting from the identity.

    The loss is contrastive in both directions, with in-batch negatives and without correction for the frequency of
    targets (Yi et al., RecSys 2019), so that the maps do not learn popularity. A tenth of the dialogues is held out for
    early stopping; the best epoch is kept, which may be the initial state.

    Args:
        encoder: The text encoder of the vectors.
        data: The training data.
        items: Embeddings of all items by the same encoder, shape (items, d).
        seed: The seed of the draws.

    Raises:
        DataError: If there are fewer than 20 dialogues.
        MissingExtra: If torch is not installed.
    """
    torch = require("torch", "train")
    rng = np.random.default_rng(seed)
    names = rng.permutation(np.unique(data.dialogues))
    if len(names) < _MIN_DIALOGUES:
        raise DataError(
            f"a dual encoder needs at least {_MIN_DIALOGUES} dialogues, but there are only {len(names)}; simulate more "
            "dialogues",
            kind="too-few",
        )
    held_out = np.isin(data.dialogues, names[: len(names) // 10])
    rows, valid_rows = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    vectors, table = torch.from_numpy(data.vectors), torch.from_numpy(items)
    targets = torch.from_numpy(data.targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _build_residual_maps(items.shape[1])

        def loss(batch: NDArray[np.int64]) -> Any:
            context = _apply_residual_map(network, "context", vectors[batch]) * network["scale"][0].exp()
            item = _apply_residual_map(network, "item", table[targets[batch]])
            return symmetric_info_nce(context @ item.T, torch.from_numpy(data.false(batch)))

        def judge() -> float:
            network.eval()
            with torch.no_grad():
                return float(loss(valid_rows))

        def learn_once(optimiser: Optimizer) -> float:
            network.train()
            order, total = rng.permutation(rows), 0.0
            for batch in np.array_split(order, -(-len(order) // _BATCH_SIZE)):
                optimiser.zero_grad(set_to_none=True)
                value = loss(batch)
                value.backward()
                optimiser.step()
                total += float(value.detach()) * len(batch)
            return total / len(order)

        # Advance the random generator as in the first epoch, which does not train.
        rng.permutation(rows)
        train_with_early_stopping(
            network, judge, _TrainingParameters(), learn_once, name="dual encoder", measure="loss", learned=True
        )
    kept = network.state_dict()
    eye = np.eye(items.shape[1], dtype=np.float32)
    return DualEncoder(encoder, *(eye + kept[f"{name}.weight"].numpy() for name in ("context", "item")))


@dataclass(frozen=True)
class _TrainingParameters:
    """The hyperparameters of training; see `llmrec.baselines.neural.TrainingSettings`."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    epochs: int = 40
    patience: int = 3
    quiet: bool = True


def _build_residual_maps(width: int) -> Any:
    """Return the residual maps, which are initially zero, and the scale of cosines."""
    torch = require("torch", "train")
    network = torch.nn.ModuleDict({name: torch.nn.Linear(width, width, bias=False) for name in ("context", "item")})
    for part in network.values():
        torch.nn.init.zeros_(part.weight)
    network["scale"] = torch.nn.ParameterList([torch.tensor(_INITIAL_LOG_SCALE)])
    return network


def _apply_residual_map(network: torch.nn.Module, name: str, vectors: Any) -> Any:
    """Add the residual map to vectors and normalise the result, shape (n, d)."""
    nn = require("torch", "train").nn.functional
    vectors = nn.dropout(vectors, _DROPOUT, network.training)
    return nn.normalize(vectors + network[name](vectors), dim=1)
