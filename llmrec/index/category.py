"""Category codes: the path of an item's categories, and a token that distinguishes items with the same path.

(Hua et al., "How to Index Item IDs for Recommendation Foundation Models", SIGIR-AP 2023, section 4.4: SemID, and its
hybrid with item tokens.)
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmrec.durable import Json
from llmrec.errors import DataError, RecipeError, did_you_mean
from llmrec.guard import TEXT_LIMIT, clean
from llmrec.index.numbers import shuffle_by_hash
from llmrec.index.table import Embed, ItemIndex, item_token, level_token
from llmrec.recipe.schema import CategoryIndex, IndexSection
from llmrec.types import Item

if TYPE_CHECKING:
    from llmrec.data.split import SplitDataset

_SEPARATORS = (">", "|", ",")

CategoryPath = tuple[str, ...]


class Category:
    """One token per category of an item, most general first, and a last token that numbers items with the same path.

    The number of a category's token is its rank by number of items among the categories of its level. Items of a path
    are numbered by training interactions, then by hash. Items without a category share an additional token of the first
    level.
    """

    @staticmethod
    def build(section: IndexSection, data: SplitDataset, *, seed: int, embed: Embed | None = None) -> ItemIndex:
        """Assign codes to items; see `Scheme`.

        Raises:
            DataError: If the items have no fields.
            RecipeError: If no item has a field that the recipe names.
        """
        items = data.dataset.items
        filing = _CategoryFields.of(section.category, items, data.dataset.name)
        paths = {item: filing.names(entry) for item, entry in items.items()}
        ranked = [
            _names_by_frequency(path[level] for path in paths.values() if len(path) > level)
            for level in range(filing.levels)
        ]
        ranked = [names for names in ranked if names] or [[]]
        numbers = [{name: number for number, name in enumerate(names)} for names in ranked]
        chosen = Counter(dict(data.train.group_by("item_id").len().iter_rows()))
        order = shuffle_by_hash(items, seed)
        codes, groups = {}, defaultdict(list)
        for item in sorted(order, key=lambda item: -chosen[item]):
            groups[_path_tokens(paths[item], numbers)].append(item)
        rank = {item: number for number, item in enumerate(order)}
        for path, group in groups.items():
            for number, item in enumerate(group):
                codes[item] = (*path, item_token(rank[item] if section.item_token else number))
        largest = max(map(len, groups.values()), default=0)
        ends = len(codes) if section.item_token else largest
        return ItemIndex(
            "category",
            {item: codes[item] for item in sorted(codes)},
            # One more token at the first level, for items without a category.
            tokens=(
                *(
                    level_token(level, n)
                    for level, names in enumerate(ranked)
                    for n in range(len(names) + (level == 0))
                ),
                *map(item_token, range(ends)),
            ),
            settings={
                **filing.settings(),
                "names": ranked,
                "ends": ends,
                "item_token": section.item_token,
                "seed": seed,
            },
            figures={
                "paths": float(len(groups)),
                "largest_path": float(largest),
                "depth": float(max(map(len, paths.values()), default=0)),
                "unfiled": float(sum(not path for path in paths.values())),
            },
        )

    @staticmethod
    def extend(index: ItemIndex, items: Mapping[str, Item], *, embed: Embed | None = None) -> ItemIndex:
        """Add items, with the longest known prefix of their category path; see `Scheme`.

        If the known last tokens of a path are exhausted, items move to the next shorter prefix, finally to the empty
        one. Only if that is full too, or with ``item_token``, they get new tokens, unknown to a trained model.
        """
        filing = _CategoryFields.read(index.settings)
        numbers = [{name: number for number, name in enumerate(names)} for names in index.settings["names"]]
        hybrid, ends = bool(index.settings["item_token"]), int(index.settings["ends"])
        used = Counter(pieces[:-1] for pieces in index.codes.values())
        codes: dict[str, tuple[str, ...]] = {}
        for number, item in enumerate(shuffle_by_hash(items, int(index.settings["seed"])), len(index.codes)):
            full = _path_tokens(filing.names(items[item]), numbers)
            prefixes = [full[:length] for length in range(len(full), -1, -1)]
            path = full if hybrid else next((prefix for prefix in prefixes if used[prefix] < ends), full)
            codes[item] = (*path, item_token(number if hybrid else used[path]))
            used[path] += 1
        return index.adding(codes, [pieces[-1] for pieces in codes.values()])


@dataclass(frozen=True)
class _CategoryFields:
    """The fields and separators from which category paths are read.

    Attributes:
        fields: Item fields, most general first.
        separators: Separator of each field's value; empty if the value is not split.
        levels: Maximum path length.
    """

    fields: tuple[str, ...]
    separators: tuple[str, ...]
    levels: int

    @staticmethod
    def of(section: CategoryIndex, items: Mapping[str, Item], name: str) -> _CategoryFields:
        known = list(dict.fromkeys(field for item in sorted(items) for field in items[item].fields))
        if not known:
            raise DataError(
                f"{name}: the items have no fields with categories; set data.columns.fields, or use another "
                "index.scheme",
                kind="missing-column",
                at=name,
                column="data.columns.fields",
            )
        for field in section.fields:
            if field not in known:
                raise RecipeError(
                    f"index.category.fields: the items have no field {field!r}{did_you_mean(field, known)}; "
                    f"the fields are {', '.join(known)}",
                    kind="unknown-name",
                    column="index.category.fields",
                )
        fields = section.fields or (known[0],)
        results = [
            next((s for s in _SEPARATORS if any(s in item.fields.get(field, "") for item in items.values())), "")
            for field in fields
        ]
        return _CategoryFields(fields, tuple(section.separator or s for s in results), section.levels)

    @staticmethod
    def read(settings: Mapping[str, Any]) -> _CategoryFields:
        return _CategoryFields(tuple(settings["fields"]), tuple(settings["separators"]), int(settings["levels"]))

    def settings(self) -> dict[str, Json]:
        return {"fields": list(self.fields), "separators": list(self.separators), "levels": self.levels}

    def names(self, item: Item) -> CategoryPath:
        """Return the categories of an item."""
        parts: list[str] = []
        for field, separator in zip(self.fields, self.separators, strict=True):
            value = item.fields.get(field, "")
            parts += value.split(separator) if separator else [value]
        return tuple([name for part in parts if (name := clean(part, TEXT_LIMIT))][: self.levels])


def _names_by_frequency(names: Iterable[str]) -> list[str]:
    """Return the different names, most frequent first, ties by name."""
    return [name for name, _ in sorted(Counter(names).items(), key=lambda entry: (-entry[1], entry[0]))]


def _path_tokens(path: CategoryPath, numbers: Sequence[Mapping[str, int]]) -> tuple[str, ...]:
    """Return the tokens of the longest known prefix of a category path."""
    results = []
    for level, (name, known) in enumerate(zip(path, numbers, strict=False)):
        if name not in known:
            break
        results.append(level_token(level, known[name]))
    return tuple(results) or (level_token(0, len(numbers[0])),)
