"""Command-line options, declared as the fields of a frozen record with names, help and defaults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from inspect import Parameter, Signature, cleandoc
from pathlib import Path
from textwrap import dedent
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from llmrec.answer.options import OptionHelp
from llmrec.errors import RecipeError

Out = Annotated[Path | None, OptionHelp(help="Run folder. Default: runs/NAME.")]
Shard = Annotated[
    str | None, OptionHelp(metavar="I/N", help="Process only shard I of N; combine the shards with llmrec merge.")
]
Ray = Annotated[
    str | None,
    OptionHelp(
        metavar="local|HOST:PORT",
        help="Process all shards on a Ray cluster, then merge them. Configured by the recipe's section ray.",
    ),
]

Launch = Annotated[
    int | None,
    OptionHelp(
        least=1, metavar="N", help="Use N processes on this machine, each with one GPU or its share of the CPU cores."
    ),
]


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """Options with a recipe and overrides of its keys."""

    recipe: Annotated[
        str, OptionHelp(argument=True, metavar="RECIPE", help="Recipe file, such as recipes/quickstart.yaml.")
    ]
    overrides: Annotated[
        tuple[str, ...],
        OptionHelp(
            argument=True,
            metavar="[KEY=VALUE]...",
            help="Recipe keys to override, such as train.steps=20 eval.users=100.",
        ),
    ] = ()


def check_exclusive_options(shard: str | None, ray: str | None, launch: int | None = None) -> None:
    """Reject more than one of `--shard`, `--ray` and `--launch`."""
    chosen = [name for name, value in (("--shard", shard), ("--ray", ray), ("--launch", launch)) if value is not None]
    if len(chosen) > 1:
        raise RecipeError(
            f"{' and '.join(chosen)}: --shard processes one shard, --ray and --launch process all shards; keep one of "
            "these options",
            kind="contradiction",
            column=chosen[0],
        )


def expand_options(function: Callable[[Any], None]) -> Callable[..., None]:
    """Convert a function with an options record to a function with one parameter per field.

    Its docstring is the help text, without the section ``Example:``.

    Args:
        function: A function with one parameter, annotated with a dataclass whose fields are `Annotated` with an
            `OptionHelp` each.
    """
    record = next(iter(get_type_hints(function).values()))
    hints = get_type_hints(record, include_extras=True)
    parameters = [_build_parameter(field, hints[field.name]) for field in fields(record)]
    parameters.sort(key=lambda parameter: parameter.default is not Parameter.empty)

    def called(**values: Any) -> None:
        function(record(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}))

    called.__name__, called.__doc__ = function.__name__, _split_docstring(function)[0]
    called.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return called


def docstring_example(function: Callable[[Any], None]) -> str:
    """Return the command lines in the section ``Example:`` at the end of a command's docstring."""
    return _split_docstring(function)[1]


def _split_docstring(function: Callable[[Any], None]) -> tuple[str, str]:
    """Return the help text and the example of a command, both without indentation."""
    text, _, example = cleandoc(function.__doc__ or "").partition("\n\nExample:\n")
    return text, dedent(example)


def _build_parameter(field: Field[Any], hint: Any) -> Parameter:
    kind, about = get_args(hint)
    assert isinstance(about, OptionHelp)
    default: Any = Parameter.empty if field.default is MISSING else field.default
    if get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis:
        # the option may be repeated
        kind, default = list[get_args(kind)[0]], default if field.default is MISSING else list(default)  # type: ignore[misc]
    if about.argument:
        declared = typer.Argument(metavar=about.metavar, help=about.help)
        return Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, declared])
    option = typer.Option(
        *(about.names or (f"--{field.name.replace('_', '-')}",)),
        metavar="|".join(about.choices) or about.metavar,
        min=about.least,
        max=about.most,
        help=about.help,
    )
    return Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
