"""A two-tower model over texts whose text encoder is tuned with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from llmrec.baselines.base import AboveZero
from llmrec.baselines.item_texts import LSA, Turned, texts_of
from llmrec.baselines.neural import until_best
from llmrec.baselines.tower import Tower, TowerConfig, Towers, epoch_of
from llmrec.errors import RecipeError, require
from llmrec.models.text_encoder import find_encoder
from llmrec.models.tuned_encoder import TunedEncoder
from llmrec.recipe.schema import Positive

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset
    from llmrec.types import Case


# Texts that are read for one step of the encoder.
_TEXTS = 64
# Steps of the mean length that a vector takes at most.
_FURTHEST = 5.0


class TunedTowerConfig(TowerConfig):
    """Parameters of `TunedTower`."""

    encoder: str = Field("all-MiniLM-L6-v2", description="the text encoder that is tuned: a name or a folder")
    blocks: Positive = Field(1, description="how many of the encoder's last blocks are tuned")
    step: AboveZero = Field(0.1, description="how far the vectors of texts, of length 1, are to move in an epoch")
    encoder_rate: AboveZero = Field(2e-5, description="learning rate of the encoder")
    map_rate: AboveZero = Field(5e-4, description="learning rate of the maps while the encoder is tuned")


class TunedTower(Tower):
    """`Tower`, and then its text encoder is tuned too: its last blocks learn which texts follow which.

    It begins with the maps that `Tower` finds over the encoder as it is. Then maps and blocks learn in turns under the
    same loss: an epoch over the training rows moves the maps and sums, for every item, the gradient with respect to its
    vector, on both sides of the product (gradient caching: Gao et al., RepL4NLP 2021). Each vector is to move a
    ``step`` down that gradient, and the blocks go once over the texts, in small batches, towards these vectors by least
    squares (target propagation: Lee et al., ECML 2015). So a text is read once an epoch, however often its item occurs,
    all items are negatives, and no vector runs away. Centre and whitening stay those of the encoder as it was. The best
    epoch by validation NDCG@10 is kept, which may be none. Items that nobody has chosen get their vectors from the
    tuned encoder too.
    """

    name = "tuned-tower"
    Config = TunedTowerConfig
    READS = "language model"
    GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {"step": (0.03, 0.1, 0.3), "blocks": (1, 2)}
    FITS: ClassVar[int] = 4
    _config: TunedTowerConfig

    def fit(self, data: SplitDataset) -> None:
        """Learn the maps, then maps and encoder.

        Raises:
            RecipeError: If the encoder is none that could be tuned.
            DataError: If no item has a text.
            ModelError: If there is no such encoder, or it has fewer blocks.
            MissingExtra: If torch or transformers is not installed.
        """
        if self._config.encoder == LSA:
            raise RecipeError(
                f"{self.name}: {LSA} is no encoder that could be tuned; name a pretrained one, or take the baseline "
                "tower",
                kind="bad-value",
                column="encoder",
            )
        super().fit(data)

    def _tune(
        self, model: Towers, data: SplitDataset, texts: Turned, rows: Sequence[NDArray[np.int64]], cases: Sequence[Case]
    ) -> None:
        torch, config = require("torch", "baselines"), self._config
        said = texts_of([data.dataset.items[item] for item in model.catalogue.ids])
        encoder = TunedEncoder(find_encoder(config.encoder)[0], said, blocks=config.blocks)
        centre = torch.from_numpy(texts.centre.astype(np.float32))
        turn = torch.from_numpy(texts.whitening(config.whitening).astype(np.float32))

        def whitened(vectors: Any) -> Any:
            return torch.nn.functional.normalize((vectors - centre) @ turn, dim=1)

        rates = [
            {"params": list(model.network.parameters()), "lr": config.map_rate},
            {"params": list(encoder.blocks.parameters()), "lr": config.encoder_rate},
        ]
        # From here on the blocks are kept and put back with the maps.
        model.network["encoder"] = encoder.blocks
        model.vectors = whitened(encoder.every())
        rng = np.random.default_rng([self._seed, 1])

        def learn(optimiser: Any) -> float:
            model.vectors.requires_grad_(True)
            loss = epoch_of(model, rows, optimiser, rng)
            wanted = _moved(model.vectors, config.step)
            for places in np.array_split(rng.permutation(len(said)), -(-len(said) // _TEXTS)):
                optimiser.zero_grad(set_to_none=True)
                (whitened(encoder(places.tolist())) - wanted[places]).square().sum(dim=1).mean().backward()
                optimiser.step()
            model.vectors = whitened(encoder.every())
            return loss

        until_best(model, cases, config, learn, rates=rates, learned=True)
        model.vectors = whitened(encoder.every())
        # Scores need the vectors alone.
        del model.network["encoder"]


def _moved(vectors: Any, step: float) -> Any:
    """Return where vectors are to go: down their gradients, by ``step`` in the root mean square, shape (n, d)."""
    gradient = vectors.grad
    lengths = gradient.norm(dim=1, keepdim=True)
    scale = step / lengths.square().mean().sqrt().clamp(min=1e-12)
    bound = (_FURTHEST * step / (lengths * scale).clamp(min=1e-12)).clamp(max=1)
    return vectors.detach() - scale * bound * gradient
