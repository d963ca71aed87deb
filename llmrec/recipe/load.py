"""Reads recipes and other YAML files, with one level of ``base:`` and ``key=value`` overrides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from llmrec import plugins
from llmrec.display import shorten_text
from llmrec.durable import Json
from llmrec.errors import ErrorKind, LlmrecError, Location, RecipeError, did_you_mean
from llmrec.plugins import KINDS
from llmrec.recipe.comparisons import Benchmark, ChatSuite, Suite
from llmrec.recipe.pages import KeyPath, format_yaml_value, parse_yaml_value, read_yaml_page
from llmrec.recipe.paths import resolve_paths
from llmrec.recipe.schema import UNKNOWN_KEY, Recipe, TasksSection
from llmrec.registry import BUILT_IN, TABLES, TASKS, import_component, import_family, is_plugin
from llmrec.resources import resource

# Maximum number of characters of a value in an error message.
_MAX_SHOWN_CHARACTERS = 200
# Maximum number of problems of a file in an error message.
_MAX_FAULTS = 20
STORED_RECIPE_FILE = "recipe.yaml"
"""The recipe of a run folder."""

Page = TypeVar("Page", bound=BaseModel)


Overrides = Sequence[str] | Mapping[str, Any]
"""Changed keys, as texts such as ``train.steps=20``, or as a mapping such as ``{"train.steps": 20}``."""


def load_recipe(path: str | Path, overrides: Overrides = ()) -> Recipe:
    """Read a recipe and apply overrides such as ``train.steps=20`` or ``{"train.steps": 20}``.

    The plug-ins that it names are imported: passing a recipe is consent to run their code.

    A path that does not exist in the working folder is looked up among the shipped recipes, so that
    ``recipes/quickstart.yaml`` works from an installed wheel too. Paths in the file are resolved in the working folder,
    or else in the folder of the file; paths in overrides only in the working folder.

    Raises:
        RecipeError: If the file, a key or a value is wrong; the message names file, line and key.
    """
    file = _find_file(Path(path), "recipes")
    sought: dict[str, Path] = {}
    values, lines = read_yaml_page(file)
    resolve_paths(values, file.parent, sought)
    values, lines = _merge_base_file(file, values, lines, {}, sought)
    return _validate_page(Recipe, values, lines, file, overrides).looked_for(sought)


def load_stored_recipe(run: Path, overrides: Overrides = ()) -> Recipe:
    """Read the recipe of a run folder; unlike `load_recipe`, this runs no code without the user's consent.

    All readers of a run folder's recipe use this function. Overrides are those of `load_recipe`.

    Raises:
        RecipeError: See `load_recipe`; or if it names a plug-in or a model's code without the user's consent.
    """
    file = run / STORED_RECIPE_FILE
    values, lines = read_yaml_page(file)
    return _validate_page(Recipe, values, lines, file, overrides, given=False)


def import_stored_plugins(run: Path) -> None:
    """Import the plug-ins of a run folder's recipe, if any, before reading its results."""
    if (run / STORED_RECIPE_FILE).is_file():
        values, lines = read_yaml_page(run / STORED_RECIPE_FILE)
        with _import_plugins(values, lines, run / STORED_RECIPE_FILE, (), given=False):
            pass


def load_yaml_model(model: type[Page], path: Path, more: Mapping[str, Json], known: Mapping[str, Path]) -> Page:
    """Read a YAML file that is not a recipe.

    Args:
        model: The model of its keys.
        path: The file.
        more: Default values for keys that it omits.
        known: Files that its ``base`` may name; any other base is a path relative to the file.
    """
    if not path.is_file():
        raise RecipeError.at(path, "missing-file", " does not exist; correct the path")
    values, lines = read_yaml_page(path)
    values, lines = _merge_base_file(path, values, lines, known)
    return _validate_page(model, {**more, **values}, lines, path, ())


def _merge_base_file(
    file: Path,
    values: dict[str, Json],
    lines: dict[KeyPath, Location],
    known: Mapping[str, Path],
    sought: dict[str, Path] | None = None,
) -> tuple[dict[str, Json], dict[KeyPath, Location]]:
    """Merge a file with its base file, if it has one."""
    base = values.pop("base", None)
    if base is None:
        return values, lines
    asking = lines.get(("base",), Location(str(file)))
    try:
        below = known.get(str(base)) or _find_file(file.parent / str(base), "recipes")
        base_values, base_lines = read_yaml_page(below)
        if sought is not None:
            resolve_paths(base_values, below.parent, sought)
        if below in known.values():
            # Base files in the package have no cycles.
            base_values, base_lines = _merge_base_file(below, base_values, base_lines, known)
    except RecipeError as error:
        raise error.reworded(f"{asking}: base: {error}") from None
    if "base" in base_values:
        raise RecipeError.at(
            file, "contradiction", f": its base {base} has a base too; only one level is supported", "base"
        )
    return _merge_values(with_absolute_paths(base_values, below.parent), values), {**base_lines, **lines}


def as_recipe(recipe: Recipe | str | Path | Mapping[str, Any], overrides: Overrides = ()) -> Recipe:
    """Return a recipe from a path, a mapping or a recipe.

    Args:
        recipe: A recipe, the path of a recipe file, or its sections as a mapping, which may omit ``name``.
        overrides: See `load_recipe`.

    Raises:
        RecipeError: If a key or a value is wrong.
    """
    if isinstance(recipe, Recipe):
        if not overrides:
            with _import_plugins(recipe.model_dump(mode="json"), {}, Path("recipe"), (), given=True):
                _apply_code_consent(recipe, given=True)
                return recipe
        recipe = recipe.model_dump(mode="json")
    if isinstance(recipe, str | Path):
        return load_recipe(recipe, overrides)
    values = json.loads(json.dumps({"name": "recipe", **recipe}, default=_to_plain_value))
    return _validate_page(Recipe, values, {}, Path("recipe"), overrides)


def _to_plain_value(value: Any) -> Json:
    if isinstance(value, BaseModel):
        dumped: Json = value.model_dump(mode="json")
        return dumped
    if isinstance(value, Path):
        return str(value)
    raise RecipeError(
        f"recipe: {type(value).__name__} {value!r} is not a valid value; use texts, numbers, lists and mappings",
        kind="bad-value",
    )


def load_suite(path: str | Path, overrides: Sequence[str] = ()) -> Suite:
    """Read a suite, such as ``eval/suites/ml-100k.yaml``, and apply overrides such as ``seeds=[0]``."""
    return _load_eval_page(Suite, path, overrides)


def load_benchmark(path: str | Path, overrides: Sequence[str] = ()) -> Benchmark:
    """Read a benchmark, such as ``eval/suites/two-stages.yaml``, and apply overrides such as ``bootstrap=500``."""
    return _load_eval_page(Benchmark, path, overrides)


def load_chat_suite(path: str | Path, overrides: Sequence[str] = ()) -> ChatSuite:
    """Read a suite of conversations, such as ``eval/suites/chat.yaml``, and apply overrides such as ``users=20``."""
    return _load_eval_page(ChatSuite, path, overrides)


def detect_page_kind(path: str | Path) -> Literal["recipe", "suite", "benchmark", "chat"]:
    """Return the type of a file by its main key: ``suite``, ``benchmark``, ``chat`` or ``recipe``."""
    try:
        keys = read_yaml_page(_find_file(Path(path), "eval"))[0]
    except RecipeError:
        return "recipe"
    kinds: tuple[Literal["suite", "benchmark", "chat"], ...] = ("suite", "benchmark", "chat")
    return next((kind for kind in kinds if kind in keys), "recipe")


def _load_eval_page(model: type[Page], path: str | Path, overrides: Sequence[str]) -> Page:
    """Read a benchmark file from eval/, which has no base."""
    file = _find_file(Path(path), "eval")
    values, lines = read_yaml_page(file)
    return _validate_page(model, values, lines, file, overrides)


def format_overrides(overrides: Overrides) -> Sequence[str]:
    """Return overrides as ``key=value`` texts."""
    if isinstance(overrides, str):
        return [overrides]
    if not isinstance(overrides, Mapping):
        return overrides
    plain = json.loads(json.dumps(dict(overrides), default=_to_plain_value))
    return [f"{key}={format_yaml_value(value)}" for key, value in plain.items()]


def _validate_page(
    model: type[Page],
    values: dict[str, Json],
    lines: dict[KeyPath, Location],
    file: Path,
    overrides: Overrides,
    *,
    given: bool = True,
) -> Page:
    """Validate a file, after importing its plug-ins if the user allows them."""
    overrides = format_overrides(overrides)
    for override in overrides:
        _apply_override(values, override)
    plugged = issubclass(model, Recipe | Suite)
    if plugged:
        values = with_absolute_paths(values, file.parent)
    with _import_plugins(values, lines, file, overrides, given=given) if plugged else nullcontext():
        try:
            validated = model.model_validate(values)
        except ValidationError as error:
            raise _recipe_error(error, model, file, lines, overrides) from None
    if isinstance(validated, Recipe):
        _apply_code_consent(validated, given=given)
    return validated


def _apply_code_consent(recipe: Recipe, *, given: bool) -> None:
    """Allow the model of a recipe to run its own code if the user has permitted it."""
    if recipe.model.trust_remote_code:
        (plugins.allow_model_code if given else plugins.check_model_consent)(recipe.model.name, recipe.model.revision)


def recipe_hash(recipe: Recipe | Suite | Benchmark | ChatSuite) -> str:
    """Return a hash of all resolved values as 16 hex digits."""
    canonical = json.dumps(recipe.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML with all defaults."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _find_file(path: Path, home: str) -> Path:
    with suppress(OSError):  # a name that is too long for a file
        if path.is_file():
            return path
    if not path.is_absolute() and path.parts and path.parts[0] == home:
        shipped = resource(home).joinpath(*path.parts[1:])
        if shipped.is_file():
            return shipped
    names = [
        (folder / page.relative_to(resource(*folder.parts))).as_posix()
        for folder in (Path("recipes"), Path("eval", "suites"))
        for page in sorted(resource(*folder.parts).rglob("*.yaml"))
    ]
    similar: list[str] = []
    with suppress(OSError):  # the folder is missing
        results = [page for page in path.parent.iterdir() if page.suffix in (".yaml", ".yml")]
        similar = [str(page) for page in results if get_close_matches(path.stem, [page.stem], cutoff=0.7)]
    close = did_you_mean(str(path), [*similar, *names])
    raise RecipeError(
        f"file {shorten_text(str(path), _MAX_SHOWN_CHARACTERS)} does not exist{close}; give an existing file, or a "
        "recipe of llmrec such as recipes/quickstart.yaml",
        kind="missing-file",
        at=path,
    )


def _merge_values(below: dict[str, Json], above: Mapping[str, Any]) -> dict[str, Json]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge_values(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _apply_override(values: dict[str, Json], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(
            f"override {shorten_text(repr(override), _MAX_SHOWN_CHARACTERS)} is not of the form key=value, such as "
            "train.steps=20",
            kind="syntax",
            column=key.strip() or override[:80],
        )
    value = parse_yaml_value(text, key.strip())
    *parents, last = key.strip().split(".")
    here: dict[str, Any] = values
    for parent in parents:
        if not isinstance(here.get(parent), dict):
            here[parent] = {}
        here = here[parent]
    here[last] = value


def _recipe_error(
    error: ValidationError,
    model: type[BaseModel],
    file: Path,
    lines: Mapping[KeyPath, Location],
    overrides: Sequence[str],
) -> RecipeError:
    """Return one error for all problems in a file."""
    details = error.errors(include_url=False)
    # For a list with only wrong entries, do not also report that it is too short.
    inner = {tuple(detail["loc"])[:-1] for detail in details}
    details = [item for item in details if item["type"] != "too_short" or tuple(item["loc"]) not in inner]
    more = len(details) - _MAX_FAULTS
    details = details[:_MAX_FAULTS]
    paths: list[KeyPath] = [
        (*detail["loc"], detail["ctx"]["key"]) if detail["type"] == UNKNOWN_KEY else tuple(detail["loc"])
        for detail in details
    ]
    problems = [_describe_problem(path, detail, model) for path, detail in zip(paths, details, strict=True)]
    locations = [
        _describe_override(path, overrides)
        or lines.get(path)
        or _describe_override_below(path, overrides)
        or _find_location(path, file, lines)
        for path in paths
    ]
    first = locations[0]
    below = next((where.file for where in locations if isinstance(where, Location) and where.file != str(file)), None)
    return RecipeError(
        "; ".join(f"{where}: {problem}" for where, problem in zip(locations, problems, strict=True))
        + (f"; and {more:,} more" if more > 0 else "")
        + (f"; {below} is the base of {file}" if below else ""),
        kind=_ERROR_KINDS.get(details[0]["type"], "bad-value"),
        at=first if isinstance(first, Location) else file,
        # The message of a rule over several keys begins with the key.
        column=problems[0].partition(":")[0] if details[0]["type"] == "value_error" else dotted_key(paths[0]),
    )


_ERROR_KINDS: Mapping[str, ErrorKind] = {
    "extra_forbidden": "unknown-key",
    UNKNOWN_KEY: "unknown-key",
    "missing": "missing-key",
    "value_error": "contradiction",
}


def _describe_override(path: KeyPath, overrides: Sequence[str]) -> str:
    """Return the command-line override that sets a key; empty if there is none."""
    mine = dotted_key(path)
    for override in overrides:
        key = override.partition("=")[0].strip()
        if mine == key or mine.startswith(key + "."):
            return (
                f"override of {key}"
                if _may_be_secret(path)
                else f"override {shorten_text(repr(override), _MAX_SHOWN_CHARACTERS)}"
            )
    return ""


def _describe_override_below(path: KeyPath, overrides: Sequence[str]) -> str:
    """Return an override below a key that is not in any file; empty if there is none.

    Its value is not shown: below a mistyped section any value may be a secret.
    """
    keys = (override.partition("=")[0].strip() for override in overrides)
    return next((f"override of {key}" for key in keys if key.startswith(f"{dotted_key(path)}.")), "")


def _find_location(path: KeyPath, file: Path, lines: Mapping[KeyPath, Location]) -> Location:
    """Return the line of a key, or of the section that should contain it."""
    known = (path[:length] for length in range(len(path), 0, -1) if path[:length] in lines)
    return next((lines[part] for part in known), Location(str(file)))


def _describe_problem(path: KeyPath, detail: Any, page: type[BaseModel]) -> str:
    key = dotted_key(path)
    kind = detail["type"]
    if kind in ("extra_forbidden", UNKNOWN_KEY):
        known = _known_keys(path[:-1], page)
        return f"unknown key {key!r}{did_you_mean(str(path[-1]), known)}; known here: {', '.join(known)}"
    if kind == "missing":
        return f"key {key!r} is missing; add it"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if kind in ("tuple_type", "list_type"):
        message = "write a list in brackets, such as [a, b]; [] for none"
    if kind == "value_error" and (not path or message.startswith(f"{key}.")):
        return message
    if _may_be_secret(path):
        return f"{key}: {message[:1].lower()}{message[1:]}"
    return (
        f"{key}: {message[:1].lower()}{message[1:]}, got {shorten_text(repr(detail['input']), _MAX_SHOWN_CHARACTERS)}"
    )


def _may_be_secret(path: KeyPath) -> bool:
    """Whether a value may be a secret, which must not appear in messages."""
    return path == ("eval",) or path[:2] == ("eval", "server")


def _known_keys(path: KeyPath, page: type[BaseModel]) -> list[str]:
    model: Any = page
    for part in path:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return []
        options = [field.annotation, *get_args(field.annotation)]
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if model is None:
            return []
    further = (*TASKS, *plugins.installed_plugins("tasks")) if model is TasksSection else ()
    return list(dict.fromkeys([*model.model_fields, *further]))


# --------------------------------------------------------------------------- plug-ins


PLUGINS_KEY, PROMPTS_KEY = "plugins", "prompts"
YAML_SUFFIXES = (".yaml", ".yml")
"""Endings of files. In `prompts`, text with such an ending is a template file, other text the name of a template."""


@dataclass(frozen=True)
class ComponentReference:
    """A reference to a component in a file: its kind, a name in `llmrec.registry.TABLES`; its name; and its key."""

    group: str
    name: str
    key: KeyPath


@contextmanager
def _import_plugins(
    values: Mapping[str, Json], lines: Mapping[KeyPath, Location], file: Path, overrides: Sequence[str], *, given: bool
) -> Iterator[None]:
    """Import the plug-ins that a recipe or suite names, and store the user's consent.

    A file that the user passed (``given``) is consent to its plug-ins; see `llmrec.plugins`.
    """
    plugins.check_installed_plugins(BUILT_IN)
    named = [item for item in _component_references(values) if is_plugin(TABLES[item.group], item.name)]
    locations = {
        item.key: _describe_override(item.key, overrides) or _find_location(item.key, file, lines) for item in named
    }
    folder = values.get(PLUGINS_KEY)
    base = folder if isinstance(folder, str) else None
    addresses = [item for item in named if plugins.is_address(item.name)]
    with plugins.allow_plugins([address.name for address in addresses], base) if given else nullcontext():
        for item in addresses:
            with _errors_at(item, locations[item.key], file):
                plugins.check_plugin_consent(item.name, base)
        # A folder on the Python path affects all imports, so a folder that only a run folder names is used only for
        # modules in it that the user has allowed.
        if given or (
            base is not None and any(plugins.is_module_in_folder(address.name, base) for address in addresses)
        ):
            plugins.add_import_folder(base)
        for item in named:
            with _errors_at(item, locations[item.key], file):
                if item.group == "tasks":
                    import_family(item.name)
                else:
                    import_component(TABLES[item.group], item.name, KINDS[item.group].what)
        yield


@contextmanager
def _errors_at(named: ComponentReference, where: Location | str, file: Path) -> Iterator[None]:
    """Add the file and key to an error."""
    try:
        yield
    except LlmrecError as error:
        raise RecipeError(
            f"{where}: {dotted_key(named.key)}: {error}",
            kind=error.kind,
            at=where if isinstance(where, Location) else file,
            column=dotted_key([part for part in named.key if isinstance(part, str)]),
        ) from error


def dotted_key(path: Sequence[str | int]) -> str:
    """Return a key as written in messages, with dots."""
    return ".".join(str(part) for part in path)


def _component_references(values: Mapping[str, Any]) -> Iterator[ComponentReference]:
    for family, section in _as_mapping(values.get("tasks")).items():
        yield ComponentReference("tasks", str(family), ("tasks", family))
        for group in ("strategies", "baselines"):
            yield from _references_in_list(group, _as_mapping(section).get(group), ("tasks", family, group), "name")
    yield from _references_in_list("baselines", values.get("rows"), ("rows",), "baseline")
    for group, *key in (
        ("sources", "data", "source"),
        ("sources", "reviews", "source"),
        ("indexes", "index", "scheme"),
        ("backends", "eval", "backend"),
        ("backends", "eval", "scorer"),
        ("baselines", "eval", "candidates", "retriever"),
    ):
        result: Any = values
        for part in key:
            result = _as_mapping(result).get(part)
        if isinstance(result, str):
            yield ComponentReference(group, result, tuple(key))


def _references_in_list(group: str, values: object, key: KeyPath, called: str) -> Iterator[ComponentReference]:
    """Yield the names in a list, whose entries are names or mappings with a name."""
    for index, item in enumerate(values if isinstance(values, list | tuple) else ()):
        name = item.get(called) if isinstance(item, dict) else item
        if isinstance(name, str):
            yield ComponentReference(group, name, (*key, index))


def _as_mapping(value: object) -> Mapping[Any, Any]:
    return value if isinstance(value, dict) else {}


def with_absolute_paths(values: dict[str, Json], base: Path) -> dict[str, Json]:
    """Return values with absolute paths to prompts and plug-ins, for the stored recipe.

    A path is resolved next to the file, then in the working folder. A file among the ``templates``, ``eval_templates``
    or ``untuned_templates`` of a family is added to ``prompts``, and replaced by its stem.

    Args:
        values: The values of a recipe.
        base: The folder of its file.
    """
    located_values, prompts = dict(values), values.get(PROMPTS_KEY)
    result = [prompts] if isinstance(prompts, str) else list(prompts) if isinstance(prompts, list | tuple) else []
    tasks = dict(_as_mapping(values.get("tasks")))
    for family, section in tasks.items():
        for key in ("templates", "eval_templates", "untuned_templates"):
            names = _as_mapping(section).get(key)
            if not isinstance(names, list | tuple):
                continue
            if files := [name for name in names if isinstance(name, str) and name.lower().endswith(YAML_SUFFIXES)]:
                result += [_absolute_path(file, base, f"tasks.{family}.{key}") for file in files]
                names = [Path(name).stem if name in files else name for name in names]
                tasks[family] = {**tasks[family], key: names}
                located_values["tasks"] = tasks
    if result:
        paths = [_absolute_path(item, base, PROMPTS_KEY) if isinstance(item, str) else item for item in result]
        located_values[PROMPTS_KEY] = list(dict.fromkeys(paths))
    folder = values.get(PLUGINS_KEY)
    if isinstance(folder, str):
        located_values[PLUGINS_KEY] = _absolute_path(folder, base, PLUGINS_KEY)
    return located_values


def _absolute_path(path: str, base: Path, key: str) -> str:
    expanded = Path(path).expanduser()
    for candidate in (base / expanded, expanded):
        if candidate.is_dir() or (candidate.is_file() and key != PLUGINS_KEY):
            return str(candidate.resolve())
        if candidate.exists():
            raise RecipeError(
                f"{key}: {path} is not a {'folder' if key == PLUGINS_KEY else 'file or folder'}; correct the path",
                kind="wrong-format",
                at=expanded,
                column=key,
            )
    raise RecipeError(
        f"{key}: {path} is neither in {base.resolve()} nor in the working folder; check the path",
        kind="missing-file",
        at=expanded,
        column=key,
    )
