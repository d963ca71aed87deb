"""Reads YAML of limited size and depth: the values, and the line of every key.

PyYAML has no limits: aliases can expand to billions of values or to themselves, nested brackets can overflow Python's
stack, and a scalar that does not match its tag can raise any exception. Here each of these is an error with its line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from llmrec.durable import Json
from llmrec.errors import Location, RecipeError

KeyPath = tuple[str | int, ...]

MAX_CHARACTERS = 1_000_000
"""The maximum size of a file, in characters."""
MAX_VALUES = 20_000
"""The maximum number of values in a file, with those repeated by aliases."""
MAX_NESTING = 50
_MAX_DIGITS = 18


# PyYAML's patterns without numbers in base 60 (1:20) and octal numbers (010), which YAML 1.2 dropped.
_NUMBER_PATTERNS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
}
_RESOLVERS = {
    first: [(tag, _NUMBER_PATTERNS.get(tag, pattern)) for tag, pattern in resolvers]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class YamlLimitExceeded(yaml.MarkedYAMLError):
    """Raised for YAML that exceeds the limits."""


class _LimitedLoader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.yaml_implicit_resolvers = _RESOLVERS
        self._depth = self._values = 0
        # Number of values to which each complete node expands.
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark: Any = event.start_mark
        if self._depth >= MAX_NESTING:
            raise YamlLimitExceeded(problem=f"nested more than {MAX_NESTING} levels deep", problem_mark=mark)
        before = self._values
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise YamlLimitExceeded(problem="an alias within its own value", problem_mark=mark)
            self._values += self._sizes[id(node)]
        else:
            self._values += 1
            self._sizes[id(node)] = self._values - before
        if self._values > MAX_VALUES:
            raise YamlLimitExceeded(problem=f"it expands to more than {MAX_VALUES:,} values", problem_mark=mark)
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            result = super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError):
            raise self._invalid_value_error(node) from None
        if isinstance(result, int) and abs(result) >= 10**_MAX_DIGITS:
            raise self._invalid_value_error(node)
        return result

    def _invalid_value_error(self, node: Any) -> yaml.MarkedYAMLError:
        kind = str(node.tag).rpartition(":")[2]
        result = str(node.value) if isinstance(node, yaml.ScalarNode) else "this"
        result = result if len(result) <= 40 else result[:39] + "…"
        return yaml.constructor.ConstructorError(
            problem=f"{result!r} is not a valid {kind}; put a text in quotes", problem_mark=node.start_mark
        )


def read_yaml_page(file: Path) -> tuple[dict[str, Json], dict[KeyPath, Location]]:
    """Return the values of a file, and the line of each key."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError.at(
            file, "encoding", f": not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise RecipeError.at(file, "unreadable", f" cannot be read: {error.strerror}") from None
    values, locations = _parse_yaml_cached(text, file)
    if not isinstance(values, dict):
        raise RecipeError.at(
            file,
            "wrong-format",
            ": the file must be a mapping of keys (of a recipe: name, data, tasks, ...), but is empty or a list",
        )
    return deepcopy(values), dict(locations)


@lru_cache(maxsize=256)
def _parse_yaml_cached(text: str, file: Path) -> tuple[Any, dict[KeyPath, Location]]:
    # Cached, because a run reads its templates again for every task and study, which would take long.
    return parse_yaml(text, file)


def parse_yaml(text: str, file: Path) -> tuple[Any, dict[KeyPath, Location]]:
    """Return the values of a YAML text, and the line of each key; errors name the file."""
    if len(text) > MAX_CHARACTERS:
        raise RecipeError.at(file, "too-large", f": longer than {MAX_CHARACTERS:,} characters; shorten it")
    try:
        locations: dict[KeyPath, Location] = {}
        return _load_yaml(text, lambda node: _record_locations(node, (), locations, file)), locations
    except yaml.MarkedYAMLError as error:
        line = Location(str(file), line=error.problem_mark.line + 1 if error.problem_mark else None)
        if isinstance(error, YamlLimitExceeded):
            raise RecipeError.at(line, "too-large", f": {error.problem}; simplify it") from None
        raise RecipeError.at(
            line, "syntax", f": not valid YAML ({error.problem}); check quoting and indentation"
        ) from None
    except yaml.YAMLError as error:
        raise RecipeError.at(file, "syntax", f": not valid YAML ({' '.join(str(error).split())})") from None


def parse_yaml_value(text: str, key: str) -> Any:
    """Return the value of an option such as ``eval.users=20``; invalid YAML is taken as text."""
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(f"{key}: longer than {MAX_CHARACTERS:,} characters", kind="too-large", column=key)
    try:
        return _load_yaml(text, lambda _: None) if text else None
    except YamlLimitExceeded as error:
        raise RecipeError(f"{key}: {error.problem}; simplify it", kind="too-large", column=key) from None
    except yaml.YAMLError:
        return text


def format_yaml_value(value: Json) -> str:
    """Return a value on one line, in the format that `parse_yaml_value` reads."""
    # The YAML writer ends a bare value with a line of dots.
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def _load_yaml(text: str, look: Callable[[yaml.Node], None]) -> Any:
    """Load the values of a text, after checking its nodes and before resolving merge keys (``<<``)."""
    loader = _LimitedLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        look(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _record_locations(node: yaml.Node, path: KeyPath, locations: dict[KeyPath, Location], file: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            location = Location(str(file), line=key.start_mark.line + 1)
            if here in locations:
                name = ".".join(map(str, here))
                raise RecipeError.at(location, "duplicate", f": key {name!r} is repeated; keep one", name)
            locations[here] = location
            _record_locations(value, here, locations, file)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            locations[(*path, index)] = Location(str(file), line=value.start_mark.line + 1)
            _record_locations(value, (*path, index), locations, file)
