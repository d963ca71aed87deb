"""Translates command options in messages to Python keywords: ``--user COLUMN`` becomes ``user="COLUMN"``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec, TypeVar

from llmrec import terminal
from llmrec.errors import LlmrecError

_P = ParamSpec("_P")
_T = TypeVar("_T")

# Options whose keyword has another name, and options that negate their keyword.
_SPECIAL_KEYWORDS = {"--set": "overrides", "--no-items": "with_items=False", "--public": "private=False"}
# A command in backticks is meant for a shell and is kept.
_OPTION_PATTERN = re.compile(
    r"`[^`]*`|(?<![\w-])(?P<flag>--[a-z][a-z-]*)(?:[ =](?P<value>'[^']*'|\"[^\"]*\"|\.{3}|[\w.:=,-]*\w))?"
)
# Values after an option: quoted, a placeholder, a number, KEY=VALUE, or one of a few words. Any other word belongs to
# the sentence, except after an option that names a column.
_VALUE = re.compile(
    r"['\"].*|\.{3}|[A-Z][A-Z,]+|\d[\w.]*|[a-z][\w.]*=.*"
    r"|none|all|hf|vllm|openai|float32|float16|bfloat16|day-first|month-first"
)
_COLUMNS = frozenset({"user", "item", "rating", "time", "title", "text", "split", "fields"})


def function_keywords(function: Callable[..., object]) -> dict[str, bool]:
    """Return the keywords of a function, and whether each is boolean."""
    result = inspect.signature(function).parameters.values()
    return {item.name: isinstance(item.default, bool) for item in result}


def replace_options_by_keywords(text: str, keywords: dict[str, bool]) -> str:
    """Replace command options in a message by keywords of a function.

    Args:
        text: The message.
        keywords: See `function_keywords`; other options, such as those of pip, are unchanged.
    """

    def replacement(match: re.Match[str]) -> str:
        flag, value = match["flag"], match["value"] or ""
        name = _option_keyword(flag or "")
        if flag is None or name.partition("=")[0] not in keywords:
            return match[0]
        rest = match[0].removeprefix(flag)
        if "=" in name:
            return f"{name}{rest}"
        if keywords[name]:
            return f"{name}=True{rest}"
        if not value or not (name in _COLUMNS or _VALUE.fullmatch(value)):
            return f"{name}{rest}"
        bare = value.strip("'\"")
        return f"{name}={bare}" if bare.isdigit() else f'{name}="{bare}"'

    return _OPTION_PATTERN.sub(replacement, text)


def with_keywords_in_errors(function: Callable[_P, _T], also: Iterable[str] = ()) -> Callable[_P, _T]:
    """Decorate a function so that its errors name keywords instead of command options.

    Args:
        function: A function that runs the code of a command.
        also: Keywords that are not in its signature.
    """
    keywords = {**dict.fromkeys(also, False), **function_keywords(function)}

    @wraps(function)
    def spoken(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            with terminal.log_warnings_once():
                return function(*args, **kwargs)
        except LlmrecError as error:
            error.args = (replace_options_by_keywords(str(error), keywords), *error.args[1:])
            if error.column is not None and error.column.startswith("--"):
                error.column = _option_keyword(error.column)
            raise

    return spoken


def _option_keyword(flag: str) -> str:
    return _SPECIAL_KEYWORDS.get(flag) or flag.removeprefix("--").replace("-", "_")
