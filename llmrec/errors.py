"""Expected failures: one paragraph that names the thing and the mend, never a traceback."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType


class LlmrecError(Exception):
    """Base of every failure that a user can mend; the command line prints it and exits with 2."""


class RecipeError(LlmrecError):
    """A recipe, an override or a template that cannot be used as written."""


class DataError(LlmrecError):
    """A data file, row or column that cannot be used as it stands."""


class ModelError(LlmrecError):
    """A model or tokenizer that cannot be found or loaded."""


class BackendError(LlmrecError):
    """A backend that cannot do what was asked of it, or that died."""


class MissingExtra(LlmrecError):
    """An optional package that is not installed."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest known word, or an empty string."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module at the door.

    Args:
        module: Dotted name of the module, such as ``"peft"``.
        extra: The extra of llmrec that installs it.

    Raises:
        MissingExtra: If it is not installed; the message holds the install command.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"this needs the package {module.split('.')[0]!r}, which cannot be imported ({error}). "
            f"Install it with: pip install 'llmrec[{extra}]'"
        ) from error
