"""Codes of the items that ranking requests mention, of which a model's index may not know all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from llmrec.data.requests import RankRequest
from llmrec.errors import DataError
from llmrec.index.table import ItemIndex
from llmrec.index.titles import title_key
from llmrec.pipeline.indexing import placed
from llmrec.types import Item

# No id of a catalogue holds such a character, so these are never taken for one of its items.
_OWN = "\x1f"


class CodesByMention:
    """Codes by mention: those of the index, and for items that it does not hold those that their request gets.

    An item that a request gives by its title alone is none of the index, whatever the index calls its items; so is one
    that a request calls otherwise than an index of titles does. Each request's new items are placed by themselves, so
    that no request moves another's codes, or fails with it.
    """

    def __init__(self, index: ItemIndex, items: Mapping[str, Item], requests: Sequence[RankRequest]) -> None:
        self._index, self._items, self._requests = index, items, requests
        self._extended: dict[int, ItemIndex] = {}

    @property
    def users(self) -> Mapping[str, str]:
        """Tokens of the users of training; see `ItemCodes`."""
        return self._index.users

    @property
    def writes_ids(self) -> bool:
        """Whether templates show codes as ids; see `ItemCodes`."""
        return self._index.writes_ids

    def encode(self, item: str) -> str:
        """Return the code of a mention; see `ItemCodes`.

        Raises:
            DataError: If the model knows no token for an item.
        """
        n = int(item.partition("/")[0])
        name = self._name(self._items[item], self._requests[n])
        if name in self._index.codes:
            return self._index.encode(name)
        if n not in self._extended:
            self._extended[n] = self._placed(self._requests[n])
        return self._extended[n].encode(name)

    def _name(self, item: Item, request: RankRequest) -> str:
        """Return what the index calls an item, or a name that it does not know."""
        if item.item_id in request.titled:
            return _OWN + item.item_id
        if self._index.scheme == "title" and item.item_id in self._index.codes:
            (written,) = self._index.codes[item.item_id]
            # What tells namesakes apart stands behind the title.
            if not title_key(written).startswith(title_key(item.title)):
                return _OWN + item.item_id
        return item.item_id

    def _placed(self, request: RankRequest) -> ItemIndex:
        mentioned = (*(event.item for event in request.history), *request.candidates)
        named = {self._name(item, request): item for item in mentioned}
        extended = placed(self._index, {name: replace(item, item_id=name) for name, item in named.items()})
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
            "tuned on has none; leave new items out, or tune on codes that items share",
            kind="unsupported",
            column="index.scheme",
        )
