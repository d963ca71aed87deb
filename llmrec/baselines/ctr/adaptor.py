"""Features in a CTR host: vectors of a store become fields through experts that a gate weighs (KAR's adaptor)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.baselines.ctr.fields import Rows
from llmrec.baselines.item_texts import Turned
from llmrec.data.described import dealt_anew
from llmrec.data.features import FeatureKind, FeatureStore, Pair
from llmrec.errors import DataError, require

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset

# Experts that all tables share, and what an expert is in between (Xi et al., RecSys 2024, section 3.3: 128).
SHARED, _BETWEEN = 2, 128


@dataclass(frozen=True)
class Table:
    """One kind of features of one store, whitened by the entities of training.

    Attributes:
        store: Open.
        kind: Users or items.
        centre: Of the vectors, shape (d,).
        whitening: Shape (d, k).
        shuffled: A control: every known entity has the vector of another one, by its id.
    """

    store: FeatureStore
    kind: FeatureKind
    centre: NDArray[np.float64]
    whitening: NDArray[np.float64]
    shuffled: dict[str, str] | None

    @staticmethod
    def of(store: FeatureStore, kind: FeatureKind, names: Sequence[str], exponent: float, *, shuffle: bool) -> Table:
        """Whiten by some names: directions in which all vectors agree say nothing, and would fill the gate."""
        turned = Turned.of(store.get(kind, names)[0].astype(np.float64))
        other = None
        if shuffle:
            other = dealt_anew(sorted(store.ids(kind)))
        return Table(store, kind, turned.centre, turned.whitening(exponent), other)

    @property
    def width(self) -> int:
        """Length of the whitened vectors."""
        return int(self.whitening.shape[1])

    def vectors(self, names: Sequence[str]) -> NDArray[np.float32]:
        """Return whitened vectors of length 1, shape (n, k); of unknown names zeros."""
        asked = names if self.shuffled is None else [self.shuffled.get(name, name) for name in names]
        vectors, known = self.store.get(self.kind, asked)
        found = (vectors - self.centre) @ self.whitening
        # The mean of all is the centre: what is left of it is rounding, and no direction.
        found[~known] = 0
        lengths = np.linalg.norm(found, axis=1, keepdims=True)
        long = np.divide(found, lengths, out=np.zeros_like(found), where=lengths > 0)
        return np.asarray(long, dtype=np.float32)


@dataclass(frozen=True)
class Columns:
    """Vectors of a table for some rows: of each entity once, and which entity a row has.

    Attributes:
        vectors: Shape (entities, k).
        places: Shape (n,).
    """

    vectors: NDArray[np.float32]
    places: NDArray[np.int64]

    def of(self, rows: NDArray[np.int64]) -> Columns:
        """Return those of some rows."""
        return Columns(self.vectors, self.places[rows])


@dataclass(frozen=True)
class Adaptor:
    """The tables of a host.

    Attributes:
        tables: In the order of the stores, users before items.
        seen: Pairs that their texts have seen.
    """

    tables: tuple[Table, ...]
    seen: frozenset[Pair]

    @staticmethod
    def of(
        folders: Sequence[str],
        rows: Rows,
        exponent: float,
        *,
        kinds: Sequence[FeatureKind],
        shuffle: bool,
        data: SplitDataset,
    ) -> Adaptor:
        """Open stores for training rows.

        Raises:
            DataError: If there is no such store, it has nothing of these kinds, or its texts were written from other
                training interactions than those of ``data``.
        """
        tables, seen = [], set[Pair]()
        for folder in folders:
            store = FeatureStore.open(Path(folder), split=data.readable)
            able = [kind for kind in store.kinds if kind in kinds]
            if not able:
                raise DataError.at(
                    folder, "missing-value", f" has features of {' and '.join(store.kinds)}s alone; say another side"
                )
            for kind in able:
                names = sorted(set((rows.user_names if kind == "user" else rows.item_names).tolist()))
                tables.append(Table.of(store, kind, names, exponent, shuffle=shuffle))
                seen |= store.seen(kind)
        return Adaptor(tuple(tables), frozenset(seen))

    @property
    def width(self) -> int:
        """Length of what experts read; shorter vectors are padded with 0."""
        return max((table.width for table in self.tables), default=0)

    def columns(self, rows: Rows) -> list[Columns]:
        """Return the vectors of each table for some rows."""
        found = []
        for table in self.tables:
            names, places = np.unique(
                (rows.user_names if table.kind == "user" else rows.item_names).astype(str), return_inverse=True
            )
            vectors = table.vectors(names.tolist())
            wide = np.zeros((len(vectors), self.width), dtype=np.float32)
            wide[:, : table.width] = vectors
            found.append(Columns(wide, places.astype(np.int64)))
        return found

    def build(self, dim: int, experts: int) -> Any:
        """Return the network: experts that all tables share, and for each table its own and a gate over both."""
        nn = require("torch", "baselines").nn

        def expert() -> Any:
            return nn.Sequential(nn.Linear(self.width, _BETWEEN), nn.ReLU(), nn.Linear(_BETWEEN, dim), nn.ReLU())

        return nn.ModuleDict(
            {
                "shared": nn.ModuleList([expert() for _ in range(SHARED)]),
                "own": nn.ModuleList([nn.ModuleList([expert() for _ in range(experts)]) for _ in self.tables]),
                "gates": nn.ModuleList([nn.Linear(self.width, SHARED + experts) for _ in self.tables]),
            }
        )


def adapt(network: Any, table: int, vectors: Any) -> Any:
    """Return what experts make of vectors, weighed by the gate: KAR's equation 8.

    Args:
        network: As `Adaptor.build` makes it.
        table: Which one.
        vectors: Shape (b, width).

    Returns:
        Shape (b, dim).
    """
    torch = require("torch", "baselines")
    weights = torch.softmax(network["gates"][table](vectors), dim=1)
    made = torch.stack([expert(vectors) for expert in (*network["shared"], *network["own"][table])], dim=1)
    return (weights[:, :, None] * made).sum(dim=1)
