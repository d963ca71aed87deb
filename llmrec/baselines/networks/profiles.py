"""What a feature store has on users, as the first step of a sequence: KAR's user field in a sequence network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.baselines.ctr.adaptor import Adaptor, Table, adapt
from llmrec.data.described import refuse_seen
from llmrec.data.features import FeatureStore
from llmrec.errors import DataError, require

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset


@dataclass(frozen=True)
class Profiles:
    """Whitened vectors of users. A user has a number behind those of all items, and so can stand among them.

    Attributes:
        adaptor: With the one table.
        places: Row of each user of the store.
        vectors: Shape (users + 1, width); the last row is that of unknown users, zeros.
        experts: Of the adaptor, beside those that are shared.
    """

    adaptor: Adaptor
    places: Mapping[str, int]
    vectors: Any
    experts: int

    @staticmethod
    def of(folder: str, data: SplitDataset, exponent: float, *, shuffle: bool, experts: int) -> Profiles:
        """Open a store and whiten by the users of training.

        Raises:
            DataError: If there is no such store, it has nothing on users, it was made from another split, or it has
                seen what is learned from or held out.
            MissingExtra: If torch is not installed.
        """
        store = FeatureStore.open(folder, split=data.readable)
        if "user" not in store.kinds:
            raise DataError.at(
                folder, "missing-value", f" has features of {store.kinds[0]}s alone, and those of users are read here"
            )
        refuse_seen(folder, store, data)
        table = Table.of(store, "user", list(data.train_counts()), exponent, shuffle=shuffle)
        names = store.ids("user")
        vectors = np.concatenate([table.vectors(names), np.zeros((1, table.width), dtype=np.float32)])
        known = {name: row for row, name in enumerate(names)}
        return Profiles(
            Adaptor((table,), frozenset()), known, require("torch", "baselines").from_numpy(vectors), experts
        )

    def build(self, dim: int) -> Any:
        """Return the network that makes a step of length ``dim`` of a vector."""
        network = self.adaptor.build(dim, self.experts)
        # It goes where the network goes, and is kept with no fit: the store has it.
        network.register_buffer("vectors", self.vectors, persistent=False)
        return network

    def numbers(self, users: Sequence[str], items: int) -> NDArray[np.int64]:
        """Return the numbers of users behind so many items, shape (n,)."""
        unknown = len(self.vectors) - 1
        return np.array([items + self.places.get(user, unknown) for user in users], dtype=np.int64)

    def before(
        self, histories: Sequence[NDArray[np.int64]], users: Sequence[str], items: int
    ) -> list[NDArray[np.int64]]:
        """Return histories with the number of the user before each."""
        numbers = self.numbers(users, items)
        return [np.concatenate([numbers[row : row + 1], history]) for row, history in enumerate(histories)]

    def embedded(self, network: Any, items: Any) -> Any:
        """Return one vector a step, of the user and of the items behind, shape (b, t, dim)."""
        torch, table = require("torch", "baselines"), network["table"]
        adaptor = network["profiles"]
        own = adaptor.vectors[items[:, 0] - table.num_embeddings]
        return torch.cat([adapt(adaptor, 0, own)[:, None], table(items[:, 1:])], dim=1)
