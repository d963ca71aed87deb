"""GRU4Rec: a recurrent network over the history, trained with a softmax over all items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from llmrec.baselines.base import fitted, rank_all
from llmrec.baselines.neural import Precision, Schedule, Trained, train
from llmrec.errors import require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset
    from llmrec.types import Answer, Request


class GRU4Rec:
    """Predicts each item of a sequence from those before it by a gated recurrent network (Hidasi et al., ICLR 2016).

    The loss is the cross-entropy over all items at every position, with the item table as input and as output, as
    later versions of the method have it (Hidasi and Karatzoglou, CIKM 2018), instead of a loss over the other items of
    a batch. Its settings are not tuned beyond the grid. Training ends as SASRec's does: on the validation split, or
    after ``epochs`` with ``patience=None``.
    """

    name = "gru4rec"
    stochastic = True
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {"dim": (64, 128), "dropout": (0.35, 0.5)}

    def __init__(
        self,
        *,
        dim: int = 128,
        layers: int = 1,
        dropout: float = 0.5,
        max_len: int = 50,
        negatives: int | None = None,
        precision: Precision = "auto",
        batch: int = 512,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        epochs: int = 100,
        patience: int | None = 5,
        seed: int = 0,
        quiet: bool = False,
    ) -> None:
        """Set up.

        Args:
            dim: Length of item vectors and of the state.
            layers: Recurrent layers.
            dropout: Share of values left out in training: of inputs and outputs.
            max_len: The network sees the last ``max_len`` items; longer training sequences are cut into pieces.
            negatives: Items drawn as negatives for each step; None takes the softmax over all items.
            precision: Of products with the item table in the loss: float32, bfloat16 or auto, see `Schedule`.
            batch: Targets of one optimiser step, about.
            learning_rate: Of Adam.
            weight_decay: Decoupled, as in AdamW.
            epochs: Passes over the training sequences, at most.
            patience: Epochs without a better validation NDCG@10 after which training ends; None for never.
            seed: Seeds weights, dropout, order and negatives.
            quiet: No progress line on the standard error.
        """
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {dropout}")
        self._dim, self._layers, self._dropout = dim, layers, dropout
        self._schedule = Schedule(
            epochs=epochs,
            patience=patience,
            batch=batch,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            negatives=negatives,
            precision=precision,
            max_len=max_len,
            seed=seed,
            quiet=quiet,
        )
        self._model: Trained | None = None

    def fit(self, data: SplitDataset) -> None:
        """Train the network.

        Raises:
            MissingExtra: If torch is not installed.
        """
        self._model = train(data, self._build, self._encode, self._schedule)

    @property
    def items(self) -> tuple[str, ...]:
        """The catalogue in column order."""
        return fitted(self._model, self.name).items

    def scores(self, requests: Sequence[Request]) -> NDArray[np.floating[Any]]:
        """Return the logits after each history, shape (n, items)."""
        return fitted(self._model, self.name).scores(requests)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank the candidates, or the catalogue less the history; unknown items come last."""
        return rank_all(requests, fitted(self._model, self.name).warm.catalogue, self.scores)

    def _build(self, items: int) -> Any:
        nn = require("torch", "baselines").nn
        network = nn.ModuleDict(
            {
                "table": nn.Embedding(items, self._dim),
                "recur": nn.GRU(self._dim, self._dim, num_layers=self._layers, batch_first=True),
                "out": nn.Linear(self._dim, self._dim),
                "last_norm": nn.LayerNorm(self._dim),
            }
        )
        nn.init.normal_(network["table"].weight, std=0.02)
        return network

    def _encode(self, network: Any, items: Any) -> Any:
        functional = require("torch", "baselines").nn.functional
        given = functional.dropout(network["table"](items), self._dropout, network.training)
        state = functional.dropout(network["recur"](given)[0], self._dropout, network.training)
        return network["last_norm"](network["out"](state))
