"""What a page names beside the package: components that are plug-ins, and the paths of prompts and modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrec import plugins
from llmrec.durable import Json
from llmrec.errors import LlmrecError, Place, RecipeError
from llmrec.plugins import KINDS
from llmrec.registry import TABLES, is_plugin, lookup, open_family

KeyPath = tuple[str | int, ...]
PLUGINS, PROMPTS = "plugins", "prompts"
_YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Named:
    """A component that a page names.

    Attributes:
        group: The kind of plug-in; see `llmrec.registry.TABLES`.
        name: As it is written.
        key: Of the page.
    """

    group: str
    name: str
    key: KeyPath


def plug_ins(values: Mapping[str, Json]) -> list[Named]:
    """Return what the values of a recipe or a suite name that is no part of llmrec."""
    return [each for each in _named(values) if is_plugin(TABLES[each.group], each.name)]


@contextmanager
def imported(
    values: Mapping[str, Json], place: Callable[[KeyPath], Place | str], file: Path, *, given: bool
) -> Iterator[None]:
    """Import the plug-ins that a page names; consent that the page gives is kept where the body accepts the page.

    Args:
        values: Of a recipe or a suite.
        place: Where a key stands, for messages.
        file: The page.
        given: Whether the user gave the page, which is consent to its plug-ins; see `llmrec.plugins`.

    Raises:
        RecipeError: Naming the first key whose plug-in must not or cannot be used, or an installed one that has the
            name of a built-in one.
    """
    plugins.refuse_faults(TABLES)
    named, folder = plug_ins(values), values.get(PLUGINS)
    beside = folder if isinstance(folder, str) else None
    addresses = [each for each in named if plugins.is_address(each.name)]
    with plugins.allowed([each.name for each in addresses], beside) if given else nullcontext():
        for each in addresses:
            with _told(each, place, file):
                plugins.consent(each.name, beside)
        # A folder on the Python path serves every import, so one that only a run folder names is used for nothing
        # but modules in it that the user consented to.
        if given or (beside is not None and any(plugins.lies_in(each.name, beside) for each in addresses)):
            plugins.use(beside)
        for each in named:
            with _told(each, place, file):
                if each.group == "tasks":
                    open_family(each.name)
                else:
                    lookup(TABLES[each.group], each.name, KINDS[each.group].what)
        yield


@contextmanager
def _told(named: Named, place: Callable[[KeyPath], Place | str], file: Path) -> Iterator[None]:
    """Say of an error which key of which page it is about."""
    try:
        yield
    except LlmrecError as error:
        where = place(named.key)
        raise RecipeError(
            f"{where}: {dotted(named.key)}: {error}",
            kind=error.kind,
            at=where if isinstance(where, Place) else file,
            column=dotted([part for part in named.key if isinstance(part, str)]),
        ) from error


def dotted(path: Sequence[str | int]) -> str:
    """Return a key as messages write it."""
    return ".".join(str(part) for part in path)


def _named(values: Mapping[str, Any]) -> Iterator[Named]:
    for family, section in _mapping(values, "tasks").items():
        yield Named("tasks", str(family), ("tasks", family))
        for group in ("strategies", "baselines"):
            yield from _listed(group, _mapping({"": section}, "").get(group), ("tasks", family, group), "name")
    yield from _listed("baselines", values.get("rows"), ("rows",), "baseline")
    for group, *key in (
        ("sources", "data", "source"),
        ("sources", "reviews", "source"),
        ("indexes", "index", "scheme"),
        ("backends", "eval", "backend"),
        ("backends", "eval", "scorer"),
        ("baselines", "eval", "candidates", "retriever"),
    ):
        found: Any = values
        for part in key:
            found = _mapping({"": found}, "").get(part)
        if isinstance(found, str):
            yield Named(group, found, tuple(key))


def _listed(group: str, values: object, key: KeyPath, called: str) -> Iterator[Named]:
    """Yield the names in a list, each a text or a mapping that has it under a key."""
    for place, each in enumerate(values if isinstance(values, list | tuple) else ()):
        name = each.get(called) if isinstance(each, dict) else each
        if isinstance(name, str):
            yield Named(group, name, (*key, place))


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[Any, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def located(values: dict[str, Json], beside: Path) -> dict[str, Json]:
    """Return a page's values with whole paths of prompts and plug-ins, so that they hold for what is stored.

    A path is looked for beside the page, then in the working folder. A file among the ``templates``,
    ``eval_templates`` or ``untuned_templates`` of a family is read as one of ``prompts``, and named there by its stem.

    Args:
        values: Of a recipe.
        beside: The page's folder.

    Raises:
        RecipeError: If there is nothing at a path.
    """
    made, prompts = dict(values), values.get(PROMPTS)
    found = [prompts] if isinstance(prompts, str) else list(prompts) if isinstance(prompts, list | tuple) else []
    tasks = dict(_mapping(values, "tasks"))
    for family, section in tasks.items():
        for key in ("templates", "eval_templates", "untuned_templates"):
            names = _mapping({"": section}, "").get(key)
            if not isinstance(names, list | tuple):
                continue
            if files := [each for each in names if _is_file(each)]:
                found += [_whole(each, beside, f"tasks.{family}.{key}") for each in files]
                names = [Path(each).stem if each in files else each for each in names]
                tasks[family] = {**tasks[family], key: names}
                made["tasks"] = tasks
    if found:
        paths = [_whole(each, beside, PROMPTS) if isinstance(each, str) else each for each in found]
        made[PROMPTS] = list(dict.fromkeys(paths))
    folder = values.get(PLUGINS)
    if isinstance(folder, str):
        made[PLUGINS] = _whole(folder, beside, PLUGINS)
    return made


def _is_file(name: object) -> bool:
    return isinstance(name, str) and name.lower().endswith(_YAML)


def _whole(path: str, beside: Path, key: str) -> str:
    asked = Path(path).expanduser()
    for place in (beside / asked, asked):
        if place.is_dir() or (place.is_file() and key != PLUGINS):
            return str(place.resolve())
        if place.exists():
            raise RecipeError(
                f"{key}: {path} is no {'folder' if key == PLUGINS else 'file or folder'}; name one",
                kind="wrong-format",
                at=asked,
                column=key,
            )
    raise RecipeError(
        f"{key}: there is no {path}, beside {beside.resolve()} or in the working folder; check the path",
        kind="missing-file",
        at=asked,
        column=key,
    )
