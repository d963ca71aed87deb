"""Builds item indexes with their metrics and HTML page, for `llmrec index` and `llmrec run`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from llmrec import __version__
from llmrec.data.split import SplitDataset
from llmrec.display import shorten_line, single_line
from llmrec.durable import write_json
from llmrec.errors import LlmrecError, RecipeError
from llmrec.index.diagnostics import CodedItem, Diagnostics, diagnose, example_items, largest_code_groups, nearest_items
from llmrec.index.table import ItemIndex
from llmrec.pipeline.indexing import build_index
from llmrec.pipeline.resume import lock_folder
from llmrec.pipeline.study import Study, load_tables, resolve_run_folder
from llmrec.recipe.schema import Recipe
from llmrec.report import index_page, index_summary
from llmrec.report.wording import format_percentage

_PAGE = "index.html"
_FILES = {"index.json", "index.safetensors", index_summary.DIAGNOSTICS, index_summary.NEIGHBOURS, _PAGE}
_EXAMPLES = 20
# Number of groups shown per prefix length, and of items per group.
_GROUPS, _MEMBERS = 8, 8
# Number of groups in the report of a run.
_REPORT_GROUPS = 6
# Maximum width of a code or title in the terminal.
_MAX_LINE_WIDTH = 60


@dataclass(frozen=True)
class SavedIndex:
    """An index that was built and saved.

    Attributes:
        data: The data that it was built from.
        index: The codes.
        found: Its metrics.
        seconds: Time to build the index, or to read a stored one.
        folder: Its folder.
        page: Its HTML page.
        items: The requested item ids.
    """

    data: SplitDataset
    index: ItemIndex
    found: Diagnostics
    seconds: float
    folder: Path
    page: Path
    items: tuple[str, ...]


def index(recipe: Recipe, out: Path | None = None, *, items: Sequence[str] = ()) -> SavedIndex:
    """Build the item index of a recipe and save it with its page; loads the data but no model.

    Args:
        recipe: A recipe with a section ``index``.
        out: The folder; ``runs/<name>/index`` by default.
        items: Item ids to show first among the examples.

    Raises:
        RecipeError: If the recipe has no index.
        DataError: If the index cannot be built, or lacks a requested item.
        LlmrecError: If the folder has foreign files.
    """
    folder = out if out is not None else resolve_run_folder(recipe, None) / index_summary.FOLDER
    if _has_foreign_files(folder):
        raise LlmrecError(
            f"{folder} contains other files than an index, which would be replaced; choose another --out",
            kind="exists",
            at=folder,
        )
    if recipe.index is None:
        raise RecipeError(
            f"the recipe {recipe.name} has no section index; add one, such as 'index={{scheme: semantic}}'",
            kind="missing-key",
            at=recipe.name,
            column="index",
        )
    data = load_tables(recipe)[0]
    begin = time.monotonic()
    built = build_index(recipe.index, data, seed=recipe.seed)
    seconds = time.monotonic() - begin
    result = diagnose(built, _item_counts(data))
    content = _page_content(recipe, data, built, result, items=items, seconds=seconds)
    with lock_folder(resolve_run_folder(recipe, None)) if out is None else nullcontext():
        built.save(folder)
        write_json(folder / index_summary.DIAGNOSTICS, result.as_json())
        page = index_page.write_index_page(content, folder / _PAGE)
    return SavedIndex(data, built, result, seconds, folder, page, tuple(items))


def _has_foreign_files(folder: Path) -> bool:
    """Whether a folder has other files than an index, which a new index would remove."""
    result = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return (
        (folder.exists() and not folder.is_dir())
        or bool(result - _FILES)
        or bool(result and not _stored_digest(folder))
    )


def write_run_index(study: Study, folder: Path) -> None:
    """Save the index of a study with its metrics and page, and remove the page of an earlier index.

    An existing equal index is kept.
    """
    where, page = folder / index_summary.FOLDER, folder / "report" / index_summary.PAGE
    page.unlink(missing_ok=True)
    if study.index is None:
        return
    if _stored_digest(where) != study.index.digest:
        study.index.save(where)
    result = diagnose(study.index, _item_counts(study.data))
    write_json(where / index_summary.DIAGNOSTICS, result.as_json())
    content = _page_content(study.recipe, study.data, study.index, result, run=True)
    # The report of the run shows only a few.
    write_json(where / index_summary.NEIGHBOURS, [asdict(group) for group in content.groups[:_REPORT_GROUPS]])
    index_page.write_index_page(content, page)


def summary_tables(built: SavedIndex) -> dict[str, dict[str, str]]:
    """Return a summary for the terminal: names and values by title."""
    result, titles = built.found, _item_titles(built.data)
    # Numbers on the page have thin spaces.
    rows = {name: value.replace("\u2009", ",") for name, value in index_summary.key_figures(result).items()}
    tables = {
        f"index {result.scheme} of {single_line(built.data.dataset.name)}": rows | {"Seconds": f"{built.seconds:.1f}"}
    }
    if result.levels:
        tables["levels"] = {
            index_summary.level_title(level): (
                f"{level.used:,} of {level.available:,} used, perplexity {level.perplexity:,.1f}, most frequent "
                f"{format_percentage(level.share)}, without training {level.untrained:,}"
            )
            for level in result.levels
        }
    shown = example_items(built.index, titles, max(5, len(built.items)), built.items)
    tables["examples"] = _example_rows(shown)
    for item in built.items:
        near = nearest_items(built.index, item, titles)
        if near:
            tables[f"nearest to {_shorten_line(built.index.encode(item))}, {_shorten_line(titles[item])}"] = (
                _example_rows(near)
            )
    tables["written"] = {"index": str(built.folder), "page": str(built.page)}
    return tables


def _page_content(
    recipe: Recipe,
    data: SplitDataset,
    built: ItemIndex,
    diagnostics: Diagnostics,
    *,
    items: Sequence[str] = (),
    seconds: float | None = None,
    run: bool = False,
) -> index_page.IndexPage:
    titles = _item_titles(data)
    return index_page.IndexPage(
        name=recipe.name,
        data=data.dataset.name,
        noun=data.dataset.noun,
        made=data.dataset.made,
        seed=recipe.seed,
        digest=built.digest,
        seconds=seconds,
        found=diagnostics,
        groups=largest_code_groups(built, titles, prefixes=_GROUPS, members=_MEMBERS, counts=_item_counts(data)),
        examples=example_items(built, titles, max(_EXAMPLES, len(items)), items),
        version=__version__,
        run=run,
    )


def _item_titles(data: SplitDataset) -> dict[str, str]:
    return {item: entry.title for item, entry in data.dataset.items.items()}


def _item_counts(data: SplitDataset) -> dict[str, int]:
    return dict(Counter(data.train["item_id"]))


def _example_rows(entries: Sequence[CodedItem]) -> dict[str, str]:
    rows: dict[str, str] = {}
    for entry in entries:
        code = _shorten_line(entry.code)
        # Long codes may differ only in the part that is cut off.
        rows[single_line(entry.code) if code in rows else code] = _shorten_line(entry.title)
    return rows


def _shorten_line(text: str) -> str:
    return shorten_line(text, _MAX_LINE_WIDTH)


def _stored_digest(folder: Path) -> str:
    """Return the hash of the index in a folder; empty if it is missing or unreadable."""
    try:
        return ItemIndex.load(folder).digest
    except LlmrecError:
        return ""
