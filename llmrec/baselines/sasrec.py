"""SASRec: self-attention over the history, trained with a softmax over all items."""

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


class SASRec:
    """Predicts each item of a sequence from those before it by causal self-attention (Kang and McAuley, ICDM 2018).

    The loss is the cross-entropy over all items at every position instead of the paper's binary one against a single
    drawn negative, which is what held published SASRec figures down (Klenitskiy and Vasilev, RecSys 2023; Petrov and
    Macdonald, RecSys 2023). ``negatives`` estimates it from drawn items, for large catalogues. Blocks normalise
    before attention and feed-forward; the item table is input and output; positions are learned and counted from the
    start of what the network sees.

    Training ends when validation NDCG@10 has not risen for ``patience`` epochs, and the best epoch's weights are kept:
    the validation split chooses the epoch and nothing else. With ``patience=None`` it is not looked at.
    """

    name = "sasrec"
    stochastic = True
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {"dim": (64, 128), "dropout": (0.35, 0.5)}

    def __init__(
        self,
        *,
        dim: int = 128,
        layers: int = 2,
        heads: int = 2,
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
            dim: Length of item vectors and hidden states; a multiple of ``heads``.
            layers: Blocks of attention and feed-forward.
            heads: Attention heads.
            dropout: Share of values left out in training: of inputs, attention weights and block outputs.
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
        if dim % heads or not 0 <= dropout < 1:
            raise ValueError(f"dim must be a multiple of heads and dropout in [0, 1), not {dim}, {heads} and {dropout}")
        self._dim, self._layers, self._heads, self._dropout = dim, layers, heads, dropout
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
        nn, dim = require("torch", "baselines").nn, self._dim
        blocks = [
            {
                "attend_norm": nn.LayerNorm(dim),
                "attend_in": nn.Linear(dim, 3 * dim),
                "attend_out": nn.Linear(dim, dim),
                "feed_norm": nn.LayerNorm(dim),
                "feed_in": nn.Linear(dim, 4 * dim),
                "feed_out": nn.Linear(4 * dim, dim),
            }
            for _ in range(self._layers)
        ]
        network = nn.ModuleDict(
            {
                "table": nn.Embedding(items, dim),
                "places": nn.Embedding(self._schedule.max_len, dim),
                "blocks": nn.ModuleList([nn.ModuleDict(block) for block in blocks]),
                "last_norm": nn.LayerNorm(dim),
            }
        )
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        return network

    def _encode(self, network: Any, items: Any) -> Any:
        # Padding stands on the right, and no position sees what follows it: it needs no mask.
        functional = require("torch", "baselines").nn.functional
        rows, length = items.shape
        share = self._dropout if network.training else 0.0

        def drop(values: Any) -> Any:
            return functional.dropout(values, share, network.training)

        state = drop(network["table"](items) + network["places"].weight[:length])
        for block in network["blocks"]:
            mixed = block["attend_in"](block["attend_norm"](state))
            query, key, value = mixed.view(rows, length, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
            seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=share)
            state = state + drop(block["attend_out"](seen.transpose(1, 2).reshape(rows, length, self._dim)))
            wide = functional.gelu(block["feed_in"](block["feed_norm"](state)))
            state = state + drop(block["feed_out"](drop(wide)))
        return network["last_norm"](state)
