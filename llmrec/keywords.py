"""Messages of commands as Python says them: ``--user COLUMN`` becomes ``user="COLUMN"``."""

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

# Options whose keyword has another name, and those that say what their keyword denies.
_RENAMED = {"--set": "overrides", "--no-items": "with_items=False", "--public": "private=False"}
# A command in backticks is one to type in a shell.
_SPOKEN = re.compile(
    r"`[^`]*`|(?<![\w-])(?P<flag>--[a-z][a-z-]*)(?:[ =](?P<value>'[^']*'|\"[^\"]*\"|\.{3}|[\w.:=,-]*\w))?"
)
# What is a value after any option: quoted, a placeholder, a number, KEY=VALUE, or one of a few words; any other word
# goes on with the sentence, but after an option that names a column.
_VALUE = re.compile(
    r"['\"].*|\.{3}|[A-Z][A-Z,]+|\d[\w.]*|[a-z][\w.]*=.*"
    r"|none|all|hf|vllm|openai|float32|float16|bfloat16|day-first|month-first"
)
_COLUMNS = frozenset({"user", "item", "rating", "time", "title", "text", "split", "fields"})


def keywords_of(function: Callable[..., object]) -> dict[str, bool]:
    """Return the keywords that a function takes, each with whether it is yes or no."""
    result = inspect.signature(function).parameters.values()
    return {item.name: isinstance(item.default, bool) for item in result}


def in_python(text: str, keywords: dict[str, bool]) -> str:
    """Return a message with the options of a command as the keywords of a function.

    Args:
        text: The message.
        keywords: See `keywords_of`; other options, such as those of pip, stay as they are.
    """

    def said(match: re.Match[str]) -> str:
        flag, value = match["flag"], match["value"] or ""
        name = _keyword(flag or "")
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

    return _SPOKEN.sub(said, text)


def speaks_python(function: Callable[_P, _T], also: Iterable[str] = ()) -> Callable[_P, _T]:
    """Return a function whose errors name keywords in place of the options of a command.

    Args:
        function: A function over the code of a command.
        also: Keywords that its signature does not spell out.
    """
    keywords = {**dict.fromkeys(also, False), **keywords_of(function)}

    @wraps(function)
    def spoken(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            with terminal.once():
                return function(*args, **kwargs)
        except LlmrecError as error:
            error.args = (in_python(str(error), keywords), *error.args[1:])
            if error.column is not None and error.column.startswith("--"):
                error.column = _keyword(error.column)
            raise

    return spoken


def _keyword(flag: str) -> str:
    return _RENAMED.get(flag) or flag.removeprefix("--").replace("-", "_")
