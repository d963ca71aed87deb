"""Feeds vectors of a feature store into networks: item and user features by gated experts (KAR), and user vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from llmrec.baselines.item_texts import PrincipalAxes, normalise_vectors
from llmrec.data.described import check_feature_leaks, cyclic_permutation
from llmrec.data.features import FeatureKind, FeatureStore, Pair
from llmrec.errors import DataError, require

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset


# Number of experts shared by all tables, and their hidden size (Xi et al., RecSys 2024, section 3.3: 128).
SHARED_EXPERTS, _HIDDEN_SIZE = 2, 128


class UserItemRows(Protocol):
    """The users and items of several training rows."""

    @property
    def user_names(self) -> NDArray[Any]:
        """User ids, shape (n,)."""
        ...

    @property
    def item_names(self) -> NDArray[Any]:
        """Item ids, shape (n,)."""
        ...


@dataclass(frozen=True)
class FeatureTable:
    """The whitened features of users or items in a feature store.

    Attributes:
        store: The open store.
        kind: Users or items.
        centre: The mean of the vectors, shape (d,).
        whitening: The whitening map, shape (d, k).
        shuffled: Ablation: every known entity has the vector of another one, chosen by id.
    """

    store: FeatureStore
    kind: FeatureKind
    centre: NDArray[np.float64]
    whitening: NDArray[np.float64]
    shuffled: dict[str, str] | None

    @staticmethod
    def of(
        store: FeatureStore, kind: FeatureKind, names: Sequence[str], exponent: float, *, shuffle: bool
    ) -> FeatureTable:
        """Fit the whitening of features."""
        turned = PrincipalAxes.of(store.get(kind, names)[0].astype(np.float64))
        other = None
        if shuffle:
            other = cyclic_permutation(sorted(store.ids(kind)))
        return FeatureTable(store, kind, turned.centre, turned.whitening(exponent), other)

    @property
    def width(self) -> int:
        """Dimension of the whitened vectors."""
        return int(self.whitening.shape[1])

    def vectors(self, names: Sequence[str]) -> NDArray[np.float32]:
        """Return normalised whitened vectors, shape (n, k); zeros for unknown names."""
        sources = names if self.shuffled is None else [self.shuffled.get(name, name) for name in names]
        vectors, known = self.store.get(self.kind, sources)
        result = (vectors - self.centre) @ self.whitening
        # A vector equal to the mean leaves a rounding error without a meaningful direction.
        result[~known] = 0
        return normalise_vectors(result).astype(np.float32)


@dataclass(frozen=True)
class RowFeatures:
    """The feature vectors of the users or items in several training rows.

    Attributes:
        vectors: The vectors, shape (entities, k).
        entities: Entity index of each row, shape (n,).
    """

    vectors: NDArray[np.float32]
    entities: NDArray[np.int64]

    def of(self, rows: NDArray[np.int64]) -> RowFeatures:
        """Return the feature vectors for several training rows."""
        return RowFeatures(self.vectors, self.entities[rows])


@dataclass(frozen=True)
class Adaptor:
    """The feature tables that a network reads.

    Attributes:
        tables: The tables, in the order of the stores, users before items.
        seen: User-item pairs from which the texts were written.
    """

    tables: tuple[FeatureTable, ...]
    seen: frozenset[Pair]

    @staticmethod
    def of(
        folders: Sequence[str],
        rows: UserItemRows,
        exponent: float,
        *,
        kinds: Sequence[FeatureKind],
        shuffle: bool,
        data: SplitDataset,
    ) -> Adaptor:
        """Open feature stores and fit their whitening on training rows.

        Raises:
            DataError: If a store is missing, has no features of these kinds, or its texts were written from training
                interactions other than those of ``data``.
        """
        tables, seen = [], set[Pair]()
        for folder in folders:
            store = FeatureStore.open(Path(folder), split=data.readable)
            kinds_read = [kind for kind in store.kinds if kind in kinds]
            if not kinds_read:
                raise DataError.at(
                    folder,
                    "missing-value",
                    f" has only features of {' and '.join(store.kinds)}s; set sides accordingly",
                )
            for kind in kinds_read:
                names = sorted(set((rows.user_names if kind == "user" else rows.item_names).tolist()))
                tables.append(FeatureTable.of(store, kind, names, exponent, shuffle=shuffle))
                seen |= store.seen(kind)
        return Adaptor(tuple(tables), frozenset(seen))

    @property
    def width(self) -> int:
        """Input size of the experts; shorter vectors are padded with 0."""
        return max((table.width for table in self.tables), default=0)

    def columns(self, rows: UserItemRows) -> list[RowFeatures]:
        """Return the feature vectors of each table for several training rows."""
        results = []
        for table in self.tables:
            names, indices = np.unique(
                (rows.user_names if table.kind == "user" else rows.item_names).astype(str), return_inverse=True
            )
            vectors = table.vectors(names.tolist())
            padded = np.zeros((len(vectors), self.width), dtype=np.float32)
            padded[:, : table.width] = vectors
            results.append(RowFeatures(padded, indices.astype(np.int64)))
        return results

    def build(self, dim: int, experts: int) -> Any:
        """Build the network: shared experts, and for each table its own experts and a gate over both."""
        nn = require("torch", "baselines").nn

        def expert() -> Any:
            return nn.Sequential(
                nn.Linear(self.width, _HIDDEN_SIZE), nn.ReLU(), nn.Linear(_HIDDEN_SIZE, dim), nn.ReLU()
            )

        return nn.ModuleDict(
            {
                "shared": nn.ModuleList([expert() for _ in range(SHARED_EXPERTS)]),
                "own": nn.ModuleList([nn.ModuleList([expert() for _ in range(experts)]) for _ in self.tables]),
                "gates": nn.ModuleList([nn.Linear(self.width, SHARED_EXPERTS + experts) for _ in self.tables]),
            }
        )


def gated_expert_sum(network: torch.nn.Module, table: int, vectors: Any) -> Any:
    """Return the gated sum of expert outputs (KAR, equation 8).

    Args:
        network: The result of `Adaptor.build`.
        table: The index of the table.
        vectors: Input vectors, shape (b, width).

    Returns:
        Shape (b, dim).
    """
    torch = require("torch", "baselines")
    weights = torch.softmax(network["gates"][table](vectors), dim=1)
    outputs = torch.stack([expert(vectors) for expert in (*network["shared"], *network["own"][table])], dim=1)
    return (weights[:, :, None] * outputs).sum(dim=1)


@dataclass(frozen=True)
class UserProfiles:
    """Whitened user vectors, which can be the first element of a sequence; their indices follow the item indices.

    Attributes:
        adaptor: An adaptor with a single table.
        rows: Row index of each user.
        vectors: Shape (users + 1, width); the last row, zeros, belongs to unknown users.
        experts: Number of experts of the adaptor, in addition to the shared ones.
    """

    adaptor: Adaptor
    rows: Mapping[str, int]
    vectors: Any
    experts: int

    @staticmethod
    def of(folder: str, data: SplitDataset, exponent: float, *, shuffle: bool, experts: int) -> UserProfiles:
        """Open a feature store and fit the whitening on the training users.

        Raises:
            DataError: If the store is missing, has no user features, or was written from another split, from training
                targets or from held-out interactions.
            MissingExtra: If torch is not installed.
        """
        store = FeatureStore.open(folder, split=data.readable)
        if "user" not in store.kinds:
            raise DataError.at(
                folder,
                "missing-value",
                f" has only features of {store.kinds[0]}s, but this baseline needs user features",
            )
        check_feature_leaks(folder, store, data)
        table = FeatureTable.of(store, "user", list(data.train_counts()), exponent, shuffle=shuffle)
        names = store.ids("user")
        vectors = np.concatenate([table.vectors(names), np.zeros((1, table.width), dtype=np.float32)])
        known = {name: row for row, name in enumerate(names)}
        return UserProfiles(
            Adaptor((table,), frozenset()), known, require("torch", "baselines").from_numpy(vectors), experts
        )

    def build(self, dim: int) -> Any:
        """Build the network that maps a user vector to an input of size ``dim`` for the sequence encoder."""
        network = self.adaptor.build(dim, self.experts)
        # A buffer, so that it moves with the network; not persistent, since the feature store contains it.
        network.register_buffer("vectors", self.vectors, persistent=False)
        return network

    def numbers(self, users: Sequence[str], items: int) -> NDArray[np.int64]:
        """Return the indices of users, which follow the given number of items, shape (n,)."""
        unknown = len(self.vectors) - 1
        return np.array([items + self.rows.get(user, unknown) for user in users], dtype=np.int64)

    def before(
        self, histories: Sequence[NDArray[np.int64]], users: Sequence[str], items: int
    ) -> list[NDArray[np.int64]]:
        """Return each history with the index of the user before the item indices."""
        numbers = self.numbers(users, items)
        return [np.concatenate([numbers[row : row + 1], history]) for row, history in enumerate(histories)]

    def embedded(self, network: torch.nn.Module, items: Any) -> Any:
        """Return the vector of the user followed by the item vectors, shape (b, t, dim)."""
        torch, table = require("torch", "baselines"), network["table"]
        adaptor = network["profiles"]
        user_vectors = adaptor.vectors[items[:, 0] - table.num_embeddings]
        return torch.cat([gated_expert_sum(adaptor, 0, user_vectors)[:, None], table(items[:, 1:])], dim=1)
