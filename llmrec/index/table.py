"""The table of item codes.

An index is data: an item's code is a tuple of *pieces*, and its text is their concatenation. A piece is a new token of
the vocabulary, such as ``<a_12>``, or ordinary text, such as a title or a number; no code has both. Codes are made by a
`Scheme`; `llmrec.registry.INDEXES` lists the schemes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmrec.durable import Json, parse_checked_json, replace_atomically, sha256_of, write_checked_json
from llmrec.errors import DataError, did_you_mean, require
from llmrec.guard import is_item_token
from llmrec.recipe.schema import IndexSection
from llmrec.registry import INDEXES, import_component
from llmrec.types import Code, Item

if TYPE_CHECKING:
    from llmrec.data.split import SplitDataset

Embed = Callable[[Sequence[str]], NDArray[np.float32]]
"""Function that returns the embeddings of texts, shape (n, d)."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"
_CODES_FILE, _ARRAYS_FILE = "index.json", "index.safetensors"
_FORMAT = 1


def level_token(level: int, number: int) -> str:
    """Return the token for an index at a level of a code, counted from 0: ``<a_12>``."""
    return f"<{LETTERS[level]}_{number}>"


def item_token(number: int) -> str:
    """Return the token of an item, or of its position in a cluster: ``<item_12>``."""
    return f"<item_{number}>"


def user_token(number: int) -> str:
    """Return the token of a user: ``<user_12>``."""
    return f"<user_{number}>"


class Scheme(Protocol):
    """A method that assigns codes to items."""

    @staticmethod
    def build(section: IndexSection, data: SplitDataset, *, seed: int, embed: Embed | None) -> ItemIndex:
        """Return an index of all items of a data set.

        It may use the texts of all items, and training interactions. ``embed`` returns the embeddings of texts, shape
        (n, d); it is None if the recipe's scheme does not need it.
        """
        ...

    @staticmethod
    def extend(index: ItemIndex, items: Mapping[str, Item], *, embed: Embed | None) -> ItemIndex:
        """Return an index with additional items; codes of known items do not change."""
        ...


@dataclass(frozen=True)
class ItemIndex:
    """The codes of a catalogue: one code per item, and one item per code.

    Attributes:
        scheme: Name in `llmrec.registry.INDEXES`.
        codes: Pieces by item id.
        tokens: New tokens of the vocabulary, in the order of their ids; empty if codes are ordinary text.
        settings: Settings of the scheme and values that `extend` needs, as JSON.
        arrays: Arrays that `extend` needs, such as codebooks of shape (levels, codes, d).
        figures: Figures recorded when the index was built, such as collisions before the repair.
        users: User tokens by id, in addition to ``tokens``; empty if users are written as text.
        writes_ids: Whether ``item_id`` in templates shows the item's code.
    """

    scheme: str
    codes: Mapping[str, tuple[str, ...]]
    tokens: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    users: Mapping[str, str] = field(default_factory=dict)
    writes_ids: bool = False

    def __post_init__(self) -> None:
        """Reject codes that do not distinguish items.

        Raises:
            DataError: If two items share a code, a code is empty or not a single line, or has pieces not in ``tokens``;
                or if users share a token with each other or with items.
        """
        known = set(self.tokens)
        wrong = [name for name in self.vocabulary if not is_item_token(name)]
        if wrong:
            raise DataError(
                f"index {self.scheme}: {wrong[0]!r} is not an item token; write item tokens like {level_token(0, 12)}",
                kind="bad-value",
            )
        for item, pieces in self.codes.items():
            text = "".join(pieces)
            if not text.strip() or text != text.strip() or len(text.splitlines()) != 1:
                raise DataError(
                    f"index {self.scheme}: the code {text!r} of item {item!r} is not a line of text", kind="bad-value"
                )
            if self.tokens and not known.issuperset(pieces):
                raise DataError(
                    f"index {self.scheme}: the code {text!r} of item {item!r} has an unknown token", kind="bad-value"
                )
        if len(self._items) != len(self.codes):
            seen: dict[str, str] = {}
            for item, pieces in self.codes.items():
                other = seen.setdefault(_normalise_code("".join(pieces)), item)
                if other != item:
                    raise DataError(
                        f"index {self.scheme}: items {other!r} and {item!r} share the code {pieces}", kind="duplicate"
                    )
        if len(set(self.vocabulary)) != len(self.tokens) + len(self.users):
            raise DataError(f"index {self.scheme}: two users, or a user and an item, share a token", kind="duplicate")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """All new tokens, with item tokens before user tokens."""
        return (*self.tokens, *self.users.values())

    def encode(self, item: str) -> str:
        """Return the code of an item as shown in prompts: a `Code` if it consists of tokens.

        Raises:
            DataError: If the item is not in the index.
        """
        if item not in self.codes:
            raise DataError(
                f"index {self.scheme}: unknown item {item!r}{did_you_mean(item, self.codes)}; add new items with "
                "extend()",
                kind="unknown-name",
            )
        text = "".join(self.codes[item])
        return Code(text) if self.tokens else text

    def decode(self, text: str) -> str | None:
        """Return the item with a code, ignoring white space between tokens; None for other text."""
        return self._items.get(_normalise_code(text))

    def extend(self, items: Mapping[str, Item], *, embed: Embed | None = None) -> ItemIndex:
        """Return an index with additional items; known items keep their codes, even if their texts changed.

        Args:
            items: Items by id.
            embed: The encoder with which the index was built, if the scheme needs it.

        Raises:
            DataError: If the scheme cannot encode an item.
        """
        new = {item: entry for item, entry in items.items() if item not in self.codes}
        if not new:
            return self
        scheme: Scheme = import_component(INDEXES, self.scheme, "index scheme")
        return scheme.extend(self, new, embed=embed)

    def adding(self, codes: Mapping[str, tuple[str, ...]], tokens: Sequence[str] = (), **settings: Any) -> ItemIndex:
        """Return a copy with additional codes and tokens, and changed settings."""
        known = set(self.tokens)
        return replace(
            self,
            codes={**self.codes, **codes},
            tokens=(*self.tokens, *(new for new in tokens if new not in known)),
            settings={**self.settings, **settings},
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything except the recorded properties."""
        parts: list[object] = [self.scheme, sorted(self.codes.items()), self.tokens, self.settings]
        parts += [sorted(self.users.items()), self.writes_ids] if self.users or self.writes_ids else []
        total = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
        for name, array in sorted(self.arrays.items()):
            total.update(f"{name}{array.dtype.str}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return total.hexdigest()

    @cached_property
    def _items(self) -> Mapping[str, str]:
        return {_normalise_code("".join(pieces)): item for item, pieces in self.codes.items()}

    def save(self, folder: Path) -> None:
        """Save the index to a folder as JSON and safetensors, atomically."""
        with replace_atomically(folder) as draft:
            draft.mkdir()
            content: dict[str, Json] = {
                "format": _FORMAT,
                "scheme": self.scheme,
                "settings": dict(self.settings),
                "figures": dict(self.figures),
                "tokens": list(self.tokens),
                "codes": {item: list(pieces) for item, pieces in self.codes.items()},
                "users": dict(self.users),
                "writes_ids": self.writes_ids,
            }
            if self.arrays:
                arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
                require("safetensors.numpy", "train").save_file(arrays, draft / _ARRAYS_FILE)
                content["arrays_sha256"] = sha256_of(draft / _ARRAYS_FILE)
            write_checked_json(draft / _CODES_FILE, content)

    @staticmethod
    def load(folder: Path) -> ItemIndex:
        """Load an index written by `save`.

        Raises:
            DataError: If the folder has no index, or a file cannot be read.
        """
        file, arrays = folder / _CODES_FILE, folder / _ARRAYS_FILE
        if not file.is_file():
            raise DataError(
                f"{folder} has no index ({_CODES_FILE}); build it with `llmrec index`", kind="missing-file", at=folder
            )
        try:
            result = parse_checked_json(file.read_bytes())
            if result["format"] != _FORMAT:
                raise DataError(
                    f"{file} has format {result['format']}, but this version of llmrec reads format {_FORMAT}; build "
                    "the index again",
                    kind="wrong-format",
                    at=file,
                    column="format",
                )
            # folders of older versions have no hash of the arrays
            if "arrays_sha256" in result and sha256_of(arrays) != result["arrays_sha256"]:
                raise DataError(f"{arrays} was modified; build the index again", kind="damaged", at=arrays)
            return ItemIndex(
                scheme=str(result["scheme"]),
                codes={item: tuple(pieces) for item, pieces in result["codes"].items()},
                tokens=tuple(result["tokens"]),
                settings=result["settings"],
                arrays=require("safetensors.numpy", "train").load_file(arrays) if arrays.is_file() else {},
                figures=result["figures"],
                # folders written before user ids could be tokens have no users
                users={str(user): str(name) for user, name in result.get("users", {}).items()},
                writes_ids=bool(result.get("writes_ids", False)),
            )
        except DataError as error:
            if error.file is not None:
                raise
            # the check of codes does not know the file name
            raise DataError(f"{file}: {error}; build the index again", kind=error.kind, at=file) from error
        except Exception as error:  # a damaged file of arrays causes errors of its library
            raise DataError(
                f"{file} cannot be read ({type(error).__name__}: {error}); build the index again",
                kind="damaged",
                at=file,
            ) from error


def _normalise_code(text: str) -> str:
    """Normalise a code: tokens without spaces between them, or text with single spaces."""
    bare = "".join(text.split())
    return bare if is_item_token(bare.partition(">")[0] + ">") else " ".join(text.split())


def build_item_index(section: IndexSection, data: SplitDataset, *, seed: int, embed: Embed | None = None) -> ItemIndex:
    """Build the item index of a recipe.

    Args:
        section: The recipe's section.
        data: The split data: the catalogue gets codes; only its ``train`` interactions may be used.
        seed: The run's seed.
        embed: Function that returns the embeddings of texts; required by the scheme ``semantic``.

    Raises:
        DataError: If the scheme has no code for an item.
        RecipeError: If the scheme is unknown.
    """
    scheme: Scheme = import_component(INDEXES, section.scheme, "index scheme")
    built = scheme.build(section, data, seed=seed, embed=embed)
    if not isinstance(built, ItemIndex):
        raise DataError(
            f"index.scheme: {section.scheme!r} returned a {type(built).__name__}; build must return a "
            "llmrec.index.table.ItemIndex",
            kind="defect",
            at=section.scheme,
            column="index.scheme",
        )
    # a plug-in may be called by a name that is not in the recipe
    return built if built.scheme == section.scheme else replace(built, scheme=section.scheme)
