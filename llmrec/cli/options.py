"""A command's options, made of the fields of a frozen record: names, words and defaults stand there alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from inspect import Parameter, Signature
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from llmrec.answer.options import About

_Record = TypeVar("_Record")


def takes(record: type[_Record]) -> Callable[[Callable[[_Record], None]], Callable[..., None]]:
    """Turn a function of a record into a command that takes the record's fields as options, required ones first.

    Args:
        record: A dataclass whose fields are `Annotated` with an `About` each.
    """
    hints = get_type_hints(record, include_extras=True)
    parameters = [_parameter(field, hints[field.name]) for field in fields(record)]  # type: ignore[arg-type]
    parameters.sort(key=lambda parameter: parameter.default is not Parameter.empty)

    def decorate(command: Callable[[_Record], None]) -> Callable[..., None]:
        def called(**given: Any) -> None:
            command(
                record(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
            )

        called.__name__, called.__doc__ = command.__name__, command.__doc__
        called.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        return called

    return decorate


def _parameter(field: Field[Any], hint: Any) -> Parameter:
    kind, about = get_args(hint)
    assert isinstance(about, About)
    default: Any = Parameter.empty if field.default is MISSING else field.default
    if get_origin(kind) is tuple:
        # An option that may be given several times.
        kind, default = list[str], default if field.default is MISSING else list(default)
    if about.argument:
        given = typer.Argument(metavar=about.metavar, help=about.help)
        return Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, given])
    option = typer.Option(
        *(about.names or (f"--{field.name.replace('_', '-')}",)),
        metavar="|".join(about.choices) or about.metavar,
        min=about.least,
        max=about.most,
        help=about.help,
    )
    return Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
