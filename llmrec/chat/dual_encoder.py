"""A dual encoder of conversations and items, learned from dialogues: two linear maps over a fixed text encoder.

RecLLM tunes such encoders themselves (Friedman et al. 2023, arXiv 2305.07961); here they stay as they are, so that each
text is read once, and learning takes seconds of a core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.baselines.neural import info_nce_both, until_least
from llmrec.durable import read_json, replacing, write_json
from llmrec.errors import DataError, require
from llmrec.models.text_encoder import text_embedder

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch.optim import Optimizer

    from llmrec.chat.transcripts import Turn
    from llmrec.data.knowledge import Embed

ENCODER = "all-MiniLM-L6-v2"
LAST = 3
"""Utterances that a conversation is read by."""
_ABOUT, _MAPS = "dual-encoder.json", "maps.safetensors"
_BATCH, _RATE, _DECAY, _DROPOUT = 256, 1e-3, 0.1, 0.2
# Passes at most, and without a lower loss of the dialogues that are set aside.
_EPOCHS, _PATIENCE = 40, 3
# Dialogues: of two that are set aside, the one's item is to be told from the other's.
_FEWEST = 20
# Logarithm of the factor of cosines before training.
_SCALE = 3.0


@dataclass(frozen=True)
class Asked:
    """Moments of dialogues, each with the item that was to be found.

    Attributes:
        vectors: Of what was said last, by the text encoder, shape (n, d).
        targets: Row of each item among the items, shape (n,).
        apart: Rows of items that are no wrong answers, such as others that the same dialogue ends in.
        dialogues: Number of the dialogue of each, shape (n,).
    """

    vectors: NDArray[np.float32]
    targets: NDArray[np.int64]
    apart: Sequence[frozenset[int]]
    dialogues: NDArray[np.int64]

    def part(self, rows: NDArray[np.int64]) -> Asked:
        """Return some of them."""
        return Asked(self.vectors[rows], self.targets[rows], [self.apart[row] for row in rows], self.dialogues[rows])

    def false(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which targets of a batch are no wrong answers to which of its moments, shape (n, n).

        Those are the moment's own target, where another one has it too, and what is `apart`.
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
    """Maps of the vectors of conversations and of items, both shape (d, d).

    Attributes:
        encoder: The text encoder, by name.
        context: For what was said.
        item: For the texts of items.
    """

    encoder: str
    context: NDArray[np.float32]
    item: NDArray[np.float32]

    def asking(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return one vector of length 1 for each text of a conversation, shape (n, d)."""
        return mapped(text_embedder(self.encoder)(texts), self.context)

    def telling(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return one vector of length 1 for each text of an item, shape (n, d)."""
        return mapped(text_embedder(self.encoder)(texts), self.item)

    def save(self, folder: Path) -> None:
        """Write the maps as safetensors, and which encoder they belong to."""
        with replacing(folder / _MAPS) as draft:
            require("safetensors.numpy", "train").save_file({"context": self.context, "item": self.item}, draft)
        write_json(folder / _ABOUT, {"encoder": self.encoder})

    @staticmethod
    def load(folder: Path) -> DualEncoder:
        """Read what `save` wrote."""
        about = read_json(folder / _ABOUT, "learn it again with `llmrec chat --learn`")
        try:
            return DualEncoder(str(about["encoder"]), **require("safetensors.numpy", "train").load_file(folder / _MAPS))
        except Exception as error:
            raise DataError(
                f"the dual encoder {folder} cannot be read ({error}); learn it again with `llmrec chat --learn`",
                kind="damaged",
                at=folder,
            ) from error


def heard(turns: Sequence[Turn]) -> list[str]:
    """Return what was said last before each answer of a conversation: the last utterances of both sides."""
    text: list[str] = []
    results = []
    for turn in turns:
        text.append(turn.user or "")
        results.append(" ".join(text[-LAST:]))
        text.append(turn.text)
    return results


def of_transcript(turns: Sequence[Turn], items: Sequence[str], encoder: str) -> Asked:
    """Return what simulated conversations teach: every line of a user is one more request for the wanted item.

    Args:
        turns: A line whose user is null begins each conversation, and its item is what is wanted.
        items: Ids in the order of the catalogue.
        encoder: The text encoder.
    """
    place, begun = (
        {item: row for row, item in enumerate(items)},
        [n for n, turn in enumerate(turns) if turn.user is None],
    )
    text, targets, dialogues = [], [], []
    for number, (start, end) in enumerate(pairwise([*begun, len(turns)])):
        lines = heard(turns[start + 1 : end])
        text += lines
        targets += [place[turns[start].items[0]]] * len(lines)
        dialogues += [number] * len(lines)
    nothing: frozenset[int] = frozenset()
    return Asked(text_embedder(encoder)(text), np.array(targets), [nothing] * len(text), np.array(dialogues))


def embedders(name: str) -> tuple[Embed, Embed]:
    """Return what reads the texts of items and what is said, by a text encoder or by a folder of a dual one."""
    if (Path(name) / _ABOUT).is_file():
        dual = DualEncoder.load(Path(name))
        return dual.telling, dual.asking
    return text_embedder(name), text_embedder(name)


def mapped(vectors: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return mapped vectors with length 1, shape (n, d)."""
    result = vectors @ weights.T
    unit: NDArray[np.float32] = result / np.maximum(np.linalg.norm(result, axis=1, keepdims=True), 1e-12)
    return unit


def learn(encoder: str, asked: Asked, items: NDArray[np.float32], seed: int = 0) -> DualEncoder:
    """Learn the maps, beginning with those that change nothing.

    Each moment is to be told by its own item from the other items of its batch, and each item by its moment. Nothing is
    corrected for how often an item is a target (Yi et al., RecSys 2019): what is learned is how much more likely a
    conversation makes an item, not how popular it is. A tenth of the dialogues is set aside and says when to stop; the
    best epoch is kept, which may be none.

    Args:
        encoder: The text encoder that the vectors are of.
        asked: What to learn from.
        items: Vectors of all items by the same encoder, shape (items, d).
        seed: Of the draws.

    Raises:
        DataError: If there are fewer than 20 dialogues.
        MissingExtra: If torch is not installed.
    """
    torch = require("torch", "train")
    rng = np.random.default_rng(seed)
    names = rng.permutation(np.unique(asked.dialogues))
    if len(names) < _FEWEST:
        raise DataError(
            f"a dual encoder learns from {_FEWEST} dialogues or more, and there are {len(names)}; simulate more",
            kind="too-few",
        )
    aside = np.isin(asked.dialogues, names[: len(names) // 10])
    rows, judged = np.flatnonzero(~aside), np.flatnonzero(aside)
    vectors, table = torch.from_numpy(asked.vectors), torch.from_numpy(items)
    targets = torch.from_numpy(asked.targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _maps(items.shape[1])

        def loss(batch: NDArray[np.int64]) -> Any:
            text = _moved(network, "context", vectors[batch]) * network["scale"][0].exp()
            own = _moved(network, "item", table[targets[batch]])
            return info_nce_both(text @ own.T, torch.from_numpy(asked.false(batch)))

        def judge() -> float:
            network.eval()
            with torch.no_grad():
                return float(loss(judged))

        def learn_once(optimiser: Optimizer) -> float:
            network.train()
            order, total = rng.permutation(rows), 0.0
            for batch in np.array_split(order, -(-len(order) // _BATCH)):
                optimiser.zero_grad(set_to_none=True)
                value = loss(batch)
                value.backward()
                optimiser.step()
                total += float(value.detach()) * len(batch)
            return total / len(order)

        # What the first epoch, which learns nothing, would have drawn.
        rng.permutation(rows)
        until_least(_Maps(network), judge, _Epochs(), learn_once, measure="loss", learned=True)
    kept = network.state_dict()
    eye = np.eye(items.shape[1], dtype=np.float32)
    return DualEncoder(encoder, *(eye + kept[f"{name}.weight"].numpy() for name in ("context", "item")))


@dataclass
class _Maps:
    """What learns."""

    network: Any
    name: str = "dual encoder"


@dataclass(frozen=True)
class _Epochs:
    """How it learns."""

    learning_rate: float = _RATE
    weight_decay: float = _DECAY
    epochs: int = _EPOCHS
    patience: int = _PATIENCE
    quiet: bool = True


def _maps(width: int) -> Any:
    """Return what the maps add to their vectors, at first nothing, and the factor of cosines."""
    torch = require("torch", "train")
    network = torch.nn.ModuleDict({name: torch.nn.Linear(width, width, bias=False) for name in ("context", "item")})
    for part in network.values():
        torch.nn.init.zeros_(part.weight)
    network["scale"] = torch.nn.ParameterList([torch.tensor(_SCALE)])
    return network


def _moved(network: torch.nn.Module, name: str, vectors: Any) -> Any:
    """Return vectors with what a map adds to them, of length 1, shape (n, d)."""
    nn = require("torch", "train").nn.functional
    vectors = nn.dropout(vectors, _DROPOUT, network.training)
    return nn.normalize(vectors + network[name](vectors), dim=1)
