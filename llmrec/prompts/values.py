"""Data values in templates: each is rendered as a placeholder, which is then replaced by a segment."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llmrec.errors import RecipeError, did_you_mean
from llmrec.guard import TEXT_LIMIT, break_item_tokens, clean
from llmrec.types import Code, CodedId, Segment

OUTPUT_LIMIT = 256 * 1024
LOOKUP_LIMIT = 256 * 1024
"""Maximum values that one rendering may look up or compare; a loop can run without writing anything."""
_PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")


class Fields(dict[str, object]):
    """The title and fields of an item; a missing field reads as None.

    Attributes:
        rendered: The rendered segments of templates that show only these fields, by template text. A list writes an
            item again for every user who had it.
    """

    __slots__ = ("rendered",)

    def __init__(self, *given: Mapping[str, object], **named: object) -> None:
        super().__init__(*given, **named)
        self.rendered: dict[str, tuple[Segment, ...]] = {}

    def __missing__(self, key: str) -> object:
        """Return None, so that templates can use ``{% if item.genres %}`` with any data set."""
        return None


class Placeholders:
    """Creates placeholders for data values, and converts them back to segments."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.size = 0
        self.lookups = 0

    def wrap(self, value: object) -> object:
        """Wrap strings as data and mappings as records; only codes may contain item tokens.

        A function is called for its value, so that an expensive value is computed only if a template uses it.
        """
        if callable(value):
            return self.wrap(value())
        if isinstance(value, Code):
            return _Datum(self, str(value))
        if isinstance(value, CodedId):
            return self.wrap(value.code)
        if isinstance(value, str):
            return _Datum(self, break_item_tokens(clean(value, TEXT_LIMIT)))
        if isinstance(value, Mapping):
            return Record(self, value)
        if isinstance(value, Sequence):
            return [self.wrap(item) for item in value]
        return value

    def spend(self, characters: int) -> None:
        """Add to the number of rendered characters.

        Raises:
            RecipeError: If there are more than `OUTPUT_LIMIT`.
        """
        self.size += characters
        if self.size > OUTPUT_LIMIT:
            raise RecipeError(
                f"the rendered text is longer than {OUTPUT_LIMIT} characters; use fewer or shorter values",
                kind="too-large",
            )

    def look(self) -> None:
        """Count a lookup or comparison of a value.

        Raises:
            RecipeError: If there are more than `LOOKUP_LIMIT`.
        """
        self.lookups += 1
        if self.lookups > LOOKUP_LIMIT:
            raise RecipeError(
                f"more than {LOOKUP_LIMIT} values are looked up; loop over fewer values, or compare fewer values",
                kind="too-large",
            )

    def mark(self, text: str) -> str:
        """Store a text, and return the placeholder that represents it in the rendered prompt."""
        self.spend(len(text))
        self.texts.append(text)
        return f"\ue000{len(self.texts) - 1}\ue001"

    def segments(self, rendered: str) -> tuple[Segment, ...]:
        """Return the segments of a rendered text, with values in place of their placeholders."""
        pieces = _PLACEHOLDER.split(rendered)
        both = [
            Segment("item", self.texts[int(piece)]) if index % 2 else Segment("text", piece)
            for index, piece in enumerate(pieces)
        ]
        return tuple(segment for segment in both if segment.text)


class _Datum:
    """A data value: compared and tested as text, and rendered as a placeholder."""

    __slots__ = ("_ledger", "_text")

    def __init__(self, ledger: Placeholders, text: str) -> None:
        self._ledger = ledger
        self._text = text

    def __str__(self) -> str:
        return self._ledger.mark(self._text)

    def __bool__(self) -> bool:
        return bool(self._text)

    def __eq__(self, other: object) -> bool:
        self._ledger.look()
        return self._text == (other._text if isinstance(other, _Datum) else other)

    def __hash__(self) -> int:
        return hash(self._text)

    def __contains__(self, other: object) -> bool:
        self._ledger.look()
        return str(other._text if isinstance(other, _Datum) else other) in self._text


class Record:
    """Named data values, such as the title of an item; a missing name is an error."""

    __slots__ = ("_known", "_ledger", "_source")

    def __init__(self, ledger: Placeholders, source: Mapping[str, object]) -> None:
        self._ledger = ledger
        self._source = source
        self._known: dict[str, object] = {}

    def __getattr__(self, name: str) -> object:
        self._ledger.look()
        try:
            # A long text is cleaned only once, however often a template uses it.
            if name not in self._known:
                self._known[name] = self._ledger.wrap(self._source[name])
            return self._known[name]
        except KeyError:
            known = ", ".join(sorted(self._source))
            raise RecipeError(
                f"unknown field {name!r}{did_you_mean(name, self._source)}; known: {known}", kind="unknown-name"
            ) from None

    def __str__(self) -> str:
        raise RecipeError("a record cannot be rendered; use one of its fields", kind="bad-value")
