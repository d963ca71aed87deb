"""Codes of the items that ranking requests mention, of which a model's index may not know all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmrec.build.indexing import embed_of
from llmrec.data.requests import RankRequest
from llmrec.errors import DataError
from llmrec.index.index import ItemIndex
from llmrec.types import Item


class CodesByMention:
    """Codes by mention: those of the index, and for items that it does not hold those that their request gets.

    Each request's new items are placed by themselves, so that no request moves another's codes, or fails with it.
    """

    def __init__(self, index: ItemIndex, items: Mapping[str, Item], requests: Sequence[RankRequest]) -> None:
        self._index, self._items, self._requests = index, items, requests
        self._extended: dict[int, ItemIndex] = {}

    def encode(self, item: str) -> str:
        """Return the code of a mention; see `ItemCodes`.

        Raises:
            DataError: If the model knows no token for an item.
        """
        known = self._items[item].item_id
        if known in self._index.codes:
            return self._index.encode(known)
        n = int(item.partition("/")[0])
        if n not in self._extended:
            self._extended[n] = self._placed(self._requests[n])
        return self._extended[n].encode(known)

    def _placed(self, request: RankRequest) -> ItemIndex:
        mentioned = (*(event.item for event in request.history), *request.candidates)
        extended = self._index.extend({item.item_id: item for item in mentioned}, embed=embed_of(self._index))
        refuse_new_tokens(self._index, extended)
        return extended


def refuse_new_tokens(known: ItemIndex, extended: ItemIndex) -> None:
    """Refuse an index that grew by tokens which no trained model has.

    Raises:
        DataError: If it did.
    """
    if extended.tokens != known.tokens:
        raise DataError(
            f"the model was tuned on one token an item (index scheme {known.scheme!r}), and an item that it was not "
            "tuned on has none; leave new items out, or tune on codes that items share"
        )
