"""`llmrec init`: writes a runnable recipe for a table, with the role of each column and the reason for it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from llmrec.data import dataset as filters
from llmrec.data.dataset import Dataset
from llmrec.data.read.databases import detect_database_url, is_database_url, is_hub_path, read_hub_dataset, read_query
from llmrec.data.read.files import expand_path
from llmrec.data.read.nested import enclosing_lists, leaf_name
from llmrec.data.read.sheets import split_sheet_name
from llmrec.data.read.table import find_atomic_file, is_pattern
from llmrec.data.read.tables import Table, expand_lists
from llmrec.data.sets.recognise import recognise_source, sources_with_columns
from llmrec.data.sets.table import load_data
from llmrec.data.split import SplitDataset, split_dataset
from llmrec.data.stats import basket_warning
from llmrec.display import align_columns
from llmrec.durable import write_text
from llmrec.errors import DataError, LlmrecError, RecipeError, did_you_mean
from llmrec.recipe.schema import AUTO, Columns, DataSection, Recipe, Split
from llmrec.resources import resource
from llmrec.start.columns import ROLES, RequestedRoles, Roles, columns_inside_lists, guess_roles
from llmrec.start.faults import describe_table_errors, find_table_errors, repair_table, write_repaired_table
from llmrec.start.page import SCHEMA_FILE, RecipeValues, filter_line, format_estimate, render_recipe
from llmrec.start.plan import FAMILIES, Events, RecipePlan, events_of_dataset, events_of_table, plan_recipe
from llmrec.start.profile import ColumnProfile, TableSample, count_event_types, printable_name, read_sample
from llmrec.start.suggestions import find_items_table, missing_query_error, suggest_query

_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# The beginning of a schema file written by llmrec.
_SCHEMA_TITLE = '"title": "llmrec recipe"'
_CHECKED_ROWS = 300_000


@dataclass(frozen=True)
class InitResult:
    """The result of `write_recipe`.

    Attributes:
        fixes: The faults that a copy of the table fixes, and the rows it leaves out; empty without a copy.
    """

    recipe: Path
    found: str
    then: str
    fixes: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """Findings and next commands as text."""
        return f"{self.found}\n{self.then}"


def write_recipe(
    table: str,
    *,
    items: str | None = None,
    out: Path | None = None,
    name: str | None = None,
    requested: RequestedRoles | None = None,
    mend: Path | None = None,
    force: bool = False,
    backend: str | None = None,
    query: str | None = None,
    in_memory: bool = False,
    only_data: bool = False,
) -> InitResult:
    """Write a recipe for a table.

    Args:
        table: The table of interactions: a file, the URL of a database, or ``hf://NAME``.
        items: The table of items, if there is one.
        out: Path of the recipe; ``<name>.yaml`` in the working folder by default.
        name: The recipe's name; the table's by default.
        requested: The roles that the user gave.
        mend: Path for a fixed copy of the table, if one is needed.
        force: Whether to overwrite an existing recipe or copy.
        backend: The backend; by default each run chooses it.
        query: The query of a database.
        in_memory: Whether the table is a frame in Python, which gets no fixed copy.
        only_data: Whether only the section ``data`` is needed, so that no task has to be possible.

    Raises:
        DataError: If the table cannot be read, its roles cannot be guessed, or it has faults to fix.
        RecipeError: If the name or the path of the recipe cannot be used.
    """
    requested = requested or RequestedRoles()
    name = recipe_name(name, table)
    target = _recipe_path(out, name, force)
    path = None if _is_remote(table) else _find_table_file(table)
    items_path = find_atomic_file(path, ".item") if path is not None else None
    if items is not None:
        items_path = _find_items_file(items, table)
    if query is not None and not is_database_url(table):
        raise DataError(f"--query: {table} is not a database; remove the option", kind="contradiction")
    if mend is not None and mend.exists() and any(_is_same_file(mend, given) for given in (path, items_path) if given):
        raise DataError(
            f"--mend {mend}: this is the table itself, which is never overwritten; choose another file",
            kind="exists",
            at=mend,
        )
    backend = backend or AUTO
    if (
        path is not None
        and requested == RequestedRoles()
        and items is None
        and (source := recognise_source(path)) is not None
    ):
        return _write_source_recipe(source, path, name, target, backend)
    read = read_sample(path, whole=mend is not None) if path is not None else _read_remote_table(table, query)
    read = read.along(columns_inside_lists(read.table, requested))
    listed = None
    if items_path is not None:
        listed = expand_lists(
            read_sample(items_path, whole=True).table, (requested.item, requested.title, *(requested.fields or ()))
        )
    roles = guess_roles(read.table, requested, listed)
    seen, used, notes = roles, read, list[str]()
    column = _item_column(roles, listed)
    wrong = find_table_errors(read, roles, listed, column)
    if wrong:
        if mend is None or not all(fault.mend for fault in wrong):
            copy = None if in_memory else mend or Path(f"{name}-mended.csv")
            raise DataError(
                describe_table_errors(str(path or table), wrong, copy),
                kind=wrong[0].kind,
                at=wrong[0].at,
                column=wrong[0].column,
            )
        frame, notes = repair_table(read.table, roles, listed, column)
        write_repaired_table(frame, mend, force=force)
        notes = [
            f"{mend} is a repaired copy of {path or table}",
            *dict.fromkeys(f.mend for f in wrong),
            *notes,
        ]
        path, used, query = mend, read_sample(mend, whole=True), None
        again = guess_roles(used.table, roles.again(column), listed)
        roles = replace(again, why={**again.why, **{again.item: roles.why[roles.item]}, **roles.why})
    called = path.name if path is not None else table
    names = (roles.item, roles.title or "", items_path.name if items_path else "", called)
    events = events_of_table(roles)
    plan = plan_recipe(events, names, whole=used.whole, backend=backend)
    if only_data:
        # No candidates are drawn, so a user may have interacted with every item.
        plan = replace(plan, candidates=20, tasks={**dict.fromkeys(FAMILIES, (False, "")), "sequential": (True, "")})
    written = _path_in_recipe(path, target) if path is not None else table
    page = _recipe_values(name, called, written, query, items_path, target, roles, plan, whole=used.whole)
    check = not only_data and used.whole and plan.facts.rows <= _CHECKED_ROWS
    plan, recipe, cut = _write_checked_recipe(page, target, check=check)
    message = [
        *_column_lines(read, seen, listed),
        *_titled_block("mended", notes),
        *_statistics_lines(events, plan, complete=used.whole),
    ]
    message += [*_task_lines(plan), *_titled_block("note", _recipe_hints(path, roles, items_path, used, plan, cut))]
    return InitResult(target, "\n".join(message), "\n".join(_next_commands(recipe, target, plan)), tuple(notes))


def _write_source_recipe(source: str, path: Path, name: str, target: Path, backend: str) -> InitResult:
    """Write a recipe for the files of a published data set."""
    split = Split(kind="given") if source == "samples" else Split()
    section = DataSection(source=source, path=str(path), duplicates="keep_last", split=split)
    dataset = load_data(section, seed=0)
    events = events_of_dataset(dataset)
    plan = replace(plan_recipe(events, (), whole=False, backend=backend), noun=dataset.noun)
    kept, text = dataset.interactions.height, dataset.provenance["rows"]
    rows = int(text) if text.isdigit() else kept
    duplicates = f"{rows - kept} rows repeat a user with an item; the latest of each is kept" if rows > kept else ""
    page = RecipeValues(
        name, path.name, _path_in_recipe(path, target), None, Columns(), {}, duplicates, plan, source=source
    )
    plan, recipe, cut = _write_checked_recipe(page, target, check=True, dataset=dataset)
    message = [
        f"{path}: files of {source}, which llmrec reads as they were published (docs/datasets-and-output-files.md)"
    ]
    message += [
        *_statistics_lines(events, plan, complete=True),
        *_task_lines(plan),
        *_titled_block("note", _plan_hints(plan, cut)),
    ]
    return InitResult(target, "\n".join(message), "\n".join(_next_commands(recipe, target, plan)))


# --------------------------------------------------------------------------- file names


def recipe_name(name: str | None, table: str) -> str:
    """Return the name of a recipe: the given one, if it is valid, or the name of the table."""
    if name is None:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(table).name.split(".")[0]).strip("-._")
        return stem or "mine"
    if not _NAME_PATTERN.fullmatch(name):
        raise RecipeError(
            f"--name {printable_name(name)!r}: use letters, digits, dots, hyphens and underscores, starting with a "
            "letter or digit",
            kind="bad-value",
            column="name",
        )
    return name


def _recipe_path(out: Path | None, name: str, force: bool) -> Path:
    target = out if out is not None else Path(f"{name}.yaml")
    if target.suffix.lower() not in (".yaml", ".yml"):
        raise RecipeError(f"--out {target}: the name of a recipe must end in .yaml", kind="wrong-format", at=target)
    if target.is_dir():
        raise RecipeError.at(target, "unreadable", " is a folder; give a file with --out")
    if target.exists() and not force:
        raise RecipeError.at(target, "exists", " exists; choose another file for --out, or overwrite it with --force")
    return target


def _is_remote(text: str) -> bool:
    return is_hub_path(text) or is_database_url(text)


def _read_remote_table(text: str, query: str | None) -> TableSample:
    """Read a table from a database, which requires a query, or from the Hugging Face hub."""
    if is_hub_path(text):
        return TableSample(result := read_hub_dataset(text), True, result.frame.height)
    if query is None:
        raise missing_query_error(text)
    return TableSample(result := read_query(text, query), True, result.frame.height)


def _find_table_file(text: str) -> Path:
    path = expand_path(text)
    stored, _ = split_sheet_name(path)
    if not stored.exists() and not is_pattern(path):
        others = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError.at(
            text,
            "missing-file",
            f": file not found{did_you_mean(stored.name, others)}; give the path of a table",
        )
    if (url := detect_database_url(stored)) is not None:
        raise DataError.at(
            text,
            "wrong-format",
            f": this is a database; write it as {url}, with --query {shlex.quote(suggest_query(url))}",
        )
    return path


def _find_items_file(text: str, table: str) -> Path:
    if not _is_remote(text):
        return _find_table_file(text)
    way = "save its rows as CSV or Parquet and give that file"
    if is_database_url(text) and text == table:
        way = f"join the items in the query, such as --query {shlex.quote(suggest_query(table))}, and drop --items"
    raise DataError.at(text, "wrong-format", f": the table of items must be a file; {way}")


def _is_same_file(copy: Path, given: Path) -> bool:
    """Whether a copy would overwrite the given table."""
    stored, _ = split_sheet_name(given)
    return stored.exists() and copy.samefile(stored)


def _path_in_recipe(path: Path, target: Path) -> str:
    """Return a path for a recipe: relative only if the recipe is in the current working folder."""
    here = target.resolve().parent == Path.cwd().resolve()
    text = str(path)
    return text if here and not text.startswith(("~", "hf:")) else str(path.absolute())


# --------------------------------------------------------------------------- the recipe


def _item_column(roles: Roles, items: Table | None) -> str:
    """Return the item column in the item table, by name or by shared values."""
    if items is None:
        return roles.item
    for name in (roles.item, leaf_name(roles.item)):
        if name in roles.items:
            return name
    known = roles.profiles[roles.item].cells.unique()
    shares = {
        column: int(known.is_in(col.cells.unique().implode()).sum()) / max(len(known), 1)
        for column, col in roles.items.items()
    }
    best = max(shares, key=lambda column: (shares[column], roles.items[column].unique))
    if shares[best] < 0.5:
        raise DataError.at(
            items.name,
            "missing-column",
            f" has no column {printable_name(roles.item)!r}, and no column with the same values; its columns are "
            f"{', '.join(map(printable_name, roles.items))}. Use the same name for the item column in both tables",
            roles.item,
        )
    return best


def _recipe_values(
    name: str,
    called: str,
    written: str,
    query: str | None,
    items: Path | None,
    target: Path,
    roles: Roles,
    plan: RecipePlan,
    *,
    whole: bool,
) -> RecipeValues:
    title = roles.title
    if title is None and "title" in {*roles.profiles, *roles.items}:
        title = roles.item  # Otherwise the recipe would use a column with that name.
    columns = Columns(
        user=roles.user,
        item=roles.item,
        rating=roles.named("rating", "rating") if plan.rates or roles.rating is None else None,
        time=roles.named("time", "timestamp"),
        title=title,
        text=roles.named("text", "text"),
        fields=roles.fields,
        split=roles.split,
        dates=roles.dates,
    )
    why = {role: roles.why.get(column, "") for role in ROLES if (column := getattr(roles, role)) is not None}
    if roles.dates is not None:
        why["dates"] = "day or month first in dates such as 03/04/2024"
    if title is not None and roles.title is None:
        why["title"] = "no titles: item IDs are used instead"
    item_profile = roles.items.get(roles.item) or roles.items.get(leaf_name(roles.item))
    twice = item_profile is not None and item_profile.distinct < item_profile.filled
    duplicates = ""
    if plan.facts.repeats:
        duplicates = f"{plan.facts.repeats} rows repeat a user with an item; the latest of each is kept"
    elif twice:
        duplicates = "some items are listed twice; the last entry of each is kept"
    elif not whole:
        duplicates = "only a part of the table was read; of repeated rows the latest is kept"
    return RecipeValues(
        name=name,
        made_from=called if items is None else f"{called} and {items.name}",
        path=written,
        items=_path_in_recipe(items, target) if items is not None else None,
        columns=columns,
        why=why,
        duplicates=duplicates,
        plan=plan,
        query=query,
        where=next((_event_filter_line(col, kinds, plan) for col, kinds in _event_type_columns(roles)), ""),
    )


def _write_checked_recipe(
    page: RecipeValues, target: Path, *, check: bool, dataset: Dataset | None = None
) -> tuple[RecipePlan, Recipe, str]:
    """Write the recipe after checking it; return the plan, the recipe and a warning about the split.

    A family that `llmrec check` rejects is switched off.

    Args:
        page: The content of the recipe.
        target: Path of the recipe.
        check: Whether to check it.
        dataset: Its data before any filter, if already loaded.
    """
    from llmrec.pipeline.study import build_study

    while page.plan.on:
        text = render_recipe(page)
        recipe = Recipe.model_validate(yaml.safe_load(text))
        cut = ""
        try:
            if check:
                study = build_study(recipe, None if dataset is None else _filter_and_split(dataset, recipe))
                cut = basket_warning(study.data)
        except LlmrecError as error:
            refused = str(error)
            family = next((f for f in page.plan.on if refused.startswith(f"tasks.{f}")), None)
            if family is None:
                raise
            page = replace(page, plan=page.plan.without(family, refused.partition(": ")[2] or refused))
            continue
        write_text(target, text)
        _write_schema(target.with_name(SCHEMA_FILE))
        return page.plan, recipe, cut
    off = "; ".join(f"{family} {reason}" for family, (_, reason) in page.plan.tasks.items())
    raise DataError.at(page.path, "too-few", f": this table does not support any of the four tasks: {off}")


def _filter_and_split(dataset: Dataset, recipe: Recipe) -> SplitDataset:
    return split_dataset(filters.filter_dataset(dataset, recipe.data.filter), recipe.data.split, seed=recipe.seed)


def _write_schema(file: Path) -> None:
    """Write the JSON schema next to the recipe, for editors."""
    text = resource("docs", "schema", "recipe.json").read_text(encoding="utf-8")
    # a user's file with that name is not overwritten
    if not file.exists() or (
        file.is_file() and _SCHEMA_TITLE in file.read_text(encoding="utf-8", errors="replace")[:200]
    ):
        write_text(file, text)


# --------------------------------------------------------------------------- output


def _column_lines(read: TableSample, roles: Roles, items: Table | None) -> list[str]:
    frame = read.table.frame
    size = f"{frame.height} rows, {frame.width} columns" if read.whole else f"a part of it, {frame.height} rows"
    if lists := max((enclosing_lists(column) for column in frame.columns), key=len):
        size += f"; each element of {lists[-1]} is a row"
    rows = [(printable_name(c, 30), roles.taken_for(c), roles.why.get(c, "")) for c in frame.columns]
    lines = [f"{read.table.name}: {size}", *align_columns([("column", "taken for", "why"), *rows])]
    if items is not None:
        both = [c for c in items.frame.columns if c not in frame.columns or c in (roles.title, *roles.fields)]
        rows = [(printable_name(c, 30), roles.taken_for(c), roles.why.get(c, "")) for c in both]
        lines += [f"{items.name}: {items.frame.height} rows", *align_columns(rows)]
    return lines


def _titled_block(title: str, lines: Sequence[str]) -> list[str]:
    return [title, *(f"  {line}" for line in lines)] if lines else []


def _statistics_lines(events: Events, plan: RecipePlan, *, complete: bool) -> list[str]:
    facts = plan.facts
    low, median, high = facts.history
    rows: list[tuple[str, ...]] = [
        ("rows", f"{facts.rows}" + ("" if plan.core == 1 else f", after user_core and item_core {plan.core}")),
        ("users", f"{facts.users}"),
        ("items", f"{facts.items}, called {plan.noun} in prompts"),
        ("history", f"{low} to {high} different items per user, median {median:g}"),
    ]
    if facts.repeats:
        rows.append(("repeats", f"{facts.repeats} rows repeat a user with an item; the latest is kept (keep_last)"))
    shares = {
        "ratings": 1.0 if events.ratings is not None else 0.0,
        "times": 1.0 if events.time else 0.0,
        "titles": facts.with_title,
        "texts": facts.with_texts / max(facts.rows, 1),
    }
    rows.append(("filled", ", ".join(f"{name} {share:.0%}" for name, share in shares.items())))
    return ["the data" if complete else "the part that was read", *align_columns(rows)]


def _task_lines(plan: RecipePlan) -> list[str]:
    return ["tasks", *align_columns([(f, "on" if plan.tasks[f][0] else "off", plan.tasks[f][1]) for f in FAMILIES])]


def _plan_hints(plan: RecipePlan, cut: str) -> list[str]:
    """Return hints about the split and about the size of the experiment."""
    hints = [cut] if cut else []
    if plan.split == "last_basket":
        hints.append(
            f"{plan.facts.tied:.0%} of the users chose several {plan.noun} at their last timestamp, as in one order, "
            "so the recipe holds out whole orders (data.split.kind: last_basket), since the rest of an order would "
            "reveal the target"
        )
    if plan.facts.zeros > 0.3:
        hints.append(
            f"{plan.facts.zeros:.0%} of the ratings are 0; if that means no rating, set data.filter.min_rating"
        )
    if plan.candidates < 20 and {"direct", "sequential"} & set(plan.on):
        hints.append(
            f"requests have {plan.candidates} candidates instead of 20, because a user has interacted with "
            f"{plan.facts.history[2]} of {plan.facts.items} items"
        )
    return hints


def _recipe_hints(
    path: Path | None, roles: Roles, items: Path | None, used: TableSample, plan: RecipePlan, cut: str
) -> list[str]:
    hints = _plan_hints(plan, cut)
    if known := sources_with_columns(used.table.frame.columns):
        hints.append(
            f"the columns are the same as in {', '.join(known)}: to read the published files with titles, use `llmrec "
            "init FOLDER` with their folder, or set data.source to the name (docs/datasets-and-output-files.md)"
        )
    hints += [_event_type_hint(col, kinds, plan) for col, kinds in _event_type_columns(roles)]
    if roles.title not in (None, roles.item) and plan.facts.with_title < 1:
        hints.append(
            f"{1 - plan.facts.with_title:.1%} of the titles are missing; the IDs of these items are used instead"
        )
    if roles.title is None:
        hints.append("there are no titles: IDs are used instead, which contain little information for a language model")
        companion = find_items_table(path, roles.item) if items is None and path is not None else None
        if companion is not None:
            option = f"--items {shlex.quote(str(companion))}"
            hints.append(
                f"{companion.name} also has a column {printable_name(roles.item)}: to read titles from it, set {option}"
            )
    if path is not None and (people := find_atomic_file(path, ".user")) is not None:
        hints.append(
            f"{people} contains user data: to read it, set data.users and data.columns.user_fields (docs/your-data.md)"
        )
    test_set = path.with_name(path.name.replace("train", "test")) if path is not None and "train" in path.name else None
    if test_set is not None and test_set.is_file() and roles.split is None:
        hints.append(
            f"{test_set.name} is in the same folder: if both files are a published split, set data.files and "
            "data.split.kind=given instead of data.path (docs/your-data.md)"
        )
    if not used.whole:
        hints.append("only a part of the table was read; `llmrec check` reads the whole table")
    return hints


def _event_type_columns(roles: Roles) -> Iterator[tuple[ColumnProfile, Mapping[str, int]]]:
    """Yield the columns that contain event types, with the number of rows per type."""
    for col in roles.profiles.values():
        if not roles.uses(col.name) and (kinds := count_event_types(col)):
            yield col, kinds


def _event_filter_line(col: ColumnProfile, kinds: Mapping[str, int], plan: RecipePlan) -> str:
    return filter_line(col.name, next(iter(kinds)), plan.core)


def _event_type_hint(col: ColumnProfile, kinds: Mapping[str, int], plan: RecipePlan) -> str:
    """Return a hint on how to keep only one event type."""
    counted = ", ".join(f"{printable_name(kind, 20)} {count}" for kind, count in list(kinds.items())[:5])
    return (
        f"{printable_name(col.name)} contains the kind of each interaction ({counted}), and the recipe uses all kinds; "
        f"to keep only one kind, add to data:  {_event_filter_line(col, kinds, plan)}"
    )


def _next_commands(recipe: Recipe, target: Path, plan: RecipePlan) -> list[str]:
    file = shlex.quote(str(target))
    return [
        f"wrote {target}, and {SCHEMA_FILE} for editors",
        f"next: llmrec check {file}",
        f"then: llmrec run {file}  ({format_estimate(plan)}; results in runs/{recipe.name})",
    ]
