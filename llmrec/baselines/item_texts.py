"""Vectors of item texts, by latent semantic analysis or a pretrained text encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from llmrec.baselines.base import LSA
from llmrec.baselines.text import TfIdf
from llmrec.data.features import PLURALS, FeatureKind, FeatureStore
from llmrec.errors import DataError, RecipeError
from llmrec.index.semantic import item_fields, item_text, item_vectors
from llmrec.models.text_encoder import text_embedder_for_split
from llmrec.recipe.schema import Section, SemanticIndex

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset
    from llmrec.types import Item

STORE_PREFIX = "store:"
"""Prefix of the folder of a store with precomputed item embeddings."""

# Whitening exponents that tuning tries.
WHITENINGS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

# Dimensions, oversampling and iterations of latent semantic analysis.
_LSA_DIMENSIONS, _LSA_OVERSAMPLING, _LSA_ITERATIONS = 128, 16, 6
# Directions with a smaller standard deviation relative to the first one are noise.
_MIN_RELATIVE_SPREAD = 1e-3


def check_pretrained_encoder(name: str, encoder: str, instead: str) -> None:
    """Reject an untrained encoder for a baseline; ``instead`` is a baseline that supports it.

    Raises:
        RecipeError: For latent semantic analysis and stores.
    """
    if encoder == LSA or encoder.startswith(STORE_PREFIX):
        raise RecipeError(
            f"{name} needs a pretrained text encoder, and {encoder} is not one; set encoder, or use the baseline "
            f"{instead}",
            kind="bad-value",
            column="encoder",
        )


class TextsConfig(Section):
    """Parameters of item text vectors."""

    encoder: str = Field(
        LSA,
        description="Source of text embeddings: `lsa`; a text encoder such as `all-MiniLM-L6-v2` (name or folder); or "
        "`store:FOLDER`, a feature store.",
    )
    shuffled: bool = Field(False, description="Ablation: assign the texts to random items.")

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of the feature stores."""
        return (self.encoder.removeprefix(STORE_PREFIX),) if self.encoder.startswith(STORE_PREFIX) else ()

    def order(self, count: int) -> list[int]:
        """Return, for each item, the index of the item whose text is used: the same, or with ``shuffled`` another."""
        order = np.arange(count)
        if self.shuffled:
            drawn = np.random.default_rng(0).permutation(count)
            # a cycle, so that no item keeps its text
            order[drawn] = np.roll(drawn, 1)
        return order.tolist()


class WhitenedConfig(TextsConfig):
    """Parameters of item text vectors and their whitening."""

    whitening: float = Field(
        0.5, ge=0, le=1, description="Strength of the whitening of the embeddings. 0: none, 1: full."
    )


@dataclass(frozen=True)
class PrincipalAxes:
    """Vectors with their principal directions.

    Attributes:
        vectors: The original vectors, shape (n, d).
        centre: Their mean, shape (d,).
        directions: In columns, shape (d, k).
        spread: The standard deviation along each direction, shape (k,).
    """

    vectors: NDArray[np.floating[Any]]
    centre: NDArray[np.float64]
    directions: NDArray[np.float64]
    spread: NDArray[np.float64]
    # Caches the whitened vectors for the last exponent, which a service needs in every request.
    _last: dict[float, NDArray[np.float64]] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(vectors: NDArray[np.floating[Any]]) -> PrincipalAxes:
        """Compute the principal directions of vectors."""
        centre = vectors.mean(axis=0, dtype=np.float64)
        _, lengths, turned = np.linalg.svd(vectors - centre, full_matrices=False)
        return PrincipalAxes(vectors, centre, turned.T, lengths)

    def whitening(self, exponent: float) -> NDArray[np.float64]:
        """Return the matrix that divides direction k of centred vectors by ``spread_k**exponent``, shape (d, <= k).

        After Su et al. (arXiv 2103.15316), who use full whitening; directions with little variance are left out.
        """
        known = self.spread > self.spread.max(initial=0.0) * _MIN_RELATIVE_SPREAD
        if not known.any():
            return np.zeros((len(self.centre), 1))
        return np.asarray(self.directions[:, known] / self.spread[known] ** exponent)

    def whitened(self, exponent: float) -> NDArray[np.float64]:
        """Return the normalised whitened vectors, shape (n, at most k)."""
        if exponent not in self._last:
            self._last.clear()
            self._last[exponent] = self.turn(self.vectors, exponent)
        return self._last[exponent]

    def turn(self, vectors: NDArray[np.floating[Any]], exponent: float) -> NDArray[np.float64]:
        """Apply `whitening` to other vectors and normalise them, shape (n, at most k)."""
        return normalise_vectors((vectors - self.centre) @ self.whitening(exponent))


def normalise_vectors(vectors: NDArray[Any]) -> NDArray[Any]:
    """Normalise vectors to length 1; zero vectors are unchanged."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0))


def text_vectors(
    data: SplitDataset, ids: Sequence[str], config: TextsConfig, change: Callable[[str], str] | None = None
) -> NDArray[np.floating[Any]]:
    """Return normalised text vectors of the titles and fields of items, shape (n, d).

    Args:
        data: The split.
        ids: The items.
        config: The encoder: ``lsa``, fitted on these texts alone (Deerwester et al., JASIS 1990, over TF-IDF), or the
            name or folder of a text encoder; and whether texts are shuffled.
        change: Modifies each text before encoding; the encoder is fitted on the unmodified texts.

    Raises:
        DataError: If no item has a title or a field, the encoder was fine-tuned on another split, or ``change`` is used
            with a store, which has no texts.
        ModelError: If the encoder is missing.
    """
    order = config.order(len(ids))
    if config.encoder.startswith(STORE_PREFIX):
        folder = config.encoder.removeprefix(STORE_PREFIX)
        if change is not None:
            raise DataError(f"{folder} has vectors but no texts, so words cannot be dropped", kind="unsupported")
        # Items that the store lacks get its fallback vector.
        return normalise_vectors(open_feature_store(data, folder, "item").get("item", list(ids))[0])[order]
    items = [data.dataset.items[item] for item in ids]
    texts = texts_of_items(items)
    inputs = texts if change is None else [change(text) for text in texts]
    if config.encoder == LSA:
        return lsa_vectors(texts, inputs)[order]
    if change is not None:
        return text_embedder_for_split(config.encoder, data)(inputs)[order]
    return item_vectors(items, item_fields(items, SemanticIndex()), text_embedder_for_split(config.encoder, data))[
        order
    ]


def open_feature_store(data: SplitDataset, folder: str, kind: FeatureKind) -> FeatureStore:
    """Open a feature store after checking that it does not use held-out interactions of the split.

    Raises:
        DataError: If the store is missing, was written from other training interactions, or contains a text about a
            held-out one.
    """
    store = FeatureStore.open(folder, split=data.readable)
    if leaked := store.seen(kind) & data.held_out:
        user, item = min(leaked)
        raise DataError.at(
            folder,
            "leak",
            f": the texts of {PLURALS[kind]} were written from {len(leaked)} held-out interactions, such as user "
            f"{user!r} with item {item!r}; create the texts from the training interactions of this split",
        )
    return store


def texts_of_items(items: Sequence[Item]) -> list[str]:
    """Return the text of each item: its title and all its fields.

    Raises:
        DataError: If no item has a title or a field.
    """
    if not any(item.title or item.fields for item in items):
        raise DataError("this baseline needs item texts, but no item has a title or a field", kind="missing-value")
    fields = item_fields(items, SemanticIndex())
    return [item_text(item, fields) for item in items]


def lsa_vectors(texts: Sequence[str], inputs: Sequence[str]) -> NDArray[np.float64]:
    """Return normalised TF-IDF vectors of ``inputs``, projected on the leading singular vectors of ``texts``.

    Subspace iteration starts from fixed values (Halko et al., SIAM Review 2011, algorithm 4.4), so that results are
    reproducible.
    """
    model = TfIdf.of(texts, least=2)
    matrix = model.vectors(texts)
    width = min(_LSA_DIMENSIONS, *matrix.shape)
    if width < 1:
        return np.zeros((len(texts), 1))
    start = np.random.default_rng(0).standard_normal((matrix.shape[1], min(width + _LSA_OVERSAMPLING, matrix.shape[1])))
    basis = matrix @ start
    for _ in range(_LSA_ITERATIONS):
        basis = matrix @ np.linalg.qr(matrix.T @ np.linalg.qr(basis)[0])[0]
    rows = (matrix.T @ np.linalg.qr(basis)[0]).T
    directions = np.linalg.svd(rows, full_matrices=False)[2][:width]
    result = (matrix if inputs is texts else model.vectors(inputs)) @ directions.T
    lengths = np.linalg.norm(result, axis=1, keepdims=True)
    vectors: NDArray[np.float64] = np.divide(result, lengths, out=np.zeros_like(result), where=lengths > 1e-9)
    return vectors
