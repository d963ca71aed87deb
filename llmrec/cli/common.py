"""What all commands share: options that may stand anywhere on the line, log levels, and JSON in place of words.

`App` gives every command the options, `main` runs it and says how it ended. A command prints with
`llmrec.cli.show.console` and need not know whether it is asked for words or for JSON.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from llmrec import __version__, processes, progress, terminal
from llmrec.cli.ending import fix_of, told_of_signals
from llmrec.cli.show.console import as_json, facts
from llmrec.errors import EngineFailure, ErrorKind
from llmrec.progress import QUIET

Level = Literal["debug", "info", "warning", "error"]

# What other libraries say of themselves; read when they are imported, and by the processes that they start.
_SILENT = {
    QUIET: "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "CRITICAL",
}
_SERVICES = frozenset({"serve"})
# Marks commands that `main` runs: tests that call one inside their own process keep their streams.
_MAIN = object()
# What may be due to a library that broke down, so that its last words are shown.
_BROKEN: frozenset[ErrorKind | None] = frozenset({None, "failed", "exhausted", "defect"})
# The base of what is wrong with a command line, whichever click it is that typer brings.
_UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]


# --------------------------------------------------------------------------- options of every command


def _heard(context: typer.Context, option: typer.CallbackParam, value: Any) -> Any:
    if value:
        context.meta[f"llmrec.{option.name}"] = value
    return value


def _options(
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            callback=_heard,
            expose_value=False,
            help="Print one JSON object, and all else on the error stream.",
        ),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", callback=_heard, expose_value=False, help="Say which stages are reused.")
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet", "-q", callback=_heard, expose_value=False, help="No progress bars, and errors as the only notes."
        ),
    ] = False,
    log_level: Annotated[
        Level | None,
        typer.Option("--log-level", callback=_heard, expose_value=False, help="In place of -v (info) and -q (error)."),
    ] = None,
) -> None:
    """Take the options that every command has; `_Shared` adds them."""


def said(meta: Mapping[str, Any]) -> list[str]:
    """Return the options of every command that were given, for the same command in another process; not ``--json``."""
    level = meta.get("llmrec.log_level")
    flags = [f"--{name}" for name in ("verbose", "quiet") if meta.get(f"llmrec.{name}")]
    return [*flags, *(["--log-level", level] if level else [])]


_holder = typer.Typer(add_completion=False)
_holder.command()(_options)
_OPTIONS = get_command(_holder).params


class _Shared:
    """Adds the options to a command or a group, and heeds them before it runs."""

    def get_params(self, ctx: Any) -> Any:
        return [*super().get_params(ctx), *_OPTIONS]  # type: ignore[misc]

    def invoke(self, ctx: Any) -> Any:
        # The path begins with the program, which may be several words.
        facts["command"] = ctx.command_path.removeprefix(ctx.find_root().command_path).strip()
        _heed(ctx.meta)
        return super().invoke(ctx)  # type: ignore[misc]


class _Command(_Shared, TyperCommand):
    def invoke(self, ctx: Any) -> Any:
        # What a service and its libraries say is read together, where its error stream goes.
        listens = ctx.find_root().obj is not _MAIN or self.name in _SERVICES
        with terminal.once(), nullcontext() if listens else terminal.apart():
            return super().invoke(ctx)


class _Group(_Shared, TyperGroup):
    panels: Mapping[str, Sequence[str]] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands in the order of the panels; others follow."""
        known = super().list_commands(ctx)
        placed = [name for names in self.panels.values() for name in names if name in known]
        return [*placed, *(name for name in known if name not in placed)]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a list of commands for each panel, instead of one of all."""
        if not self.panels:
            super().format_commands(ctx, formatter)
            return
        width = max(len(name) for names in self.panels.values() for name in names)
        for panel, names in self.panels.items():
            found = [(name, self.get_command(ctx, name)) for name in names]
            rows = [
                (f"{name:<{width}}", command.get_short_help_str(formatter.width - width - 6))
                for name, command in found
                if command is not None and not command.hidden
            ]
            with formatter.section(panel):
                formatter.write_dl(rows)


RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="Path of a recipe, such as recipes/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as train.steps=20 eval.users=100.")
]


class App(typer.Typer):
    """A group of commands which all have the shared options.

    Args:
        panels: Names of commands by the heading that ``--help`` puts them under; without any they are one list.
        settings: See `typer.Typer`.
    """

    def __init__(self, panels: Mapping[str, Sequence[str]] | None = None, **settings: Any) -> None:
        group = type("_Panels", (_Group,), {"panels": panels or {}})
        super().__init__(cls=group, rich_markup_mode=None, pretty_exceptions_enable=False, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        """Register a command; see `typer.Typer.command`."""
        return super().command(name, **{"cls": _Command, **settings})


class _Voice(logging.Handler):
    """Says llmrec's notes, and leaves those of other libraries where the rest of their output goes."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            own = record.name.partition(".")[0] == "llmrec"
            progress.say(self.format(record), terminal.err() if own else sys.stderr)
        except Exception:
            self.handleError(record)


def _heed(meta: Mapping[str, Any]) -> None:
    # Of several processes of a command one speaks.
    quiet = bool(meta.get("llmrec.quiet")) or processes.rank() > 0
    if quiet:
        os.environ.update({name: value for name, value in _SILENT.items() if name == QUIET or name not in os.environ})
        warnings.simplefilter("ignore")
    level: Level = (not processes.rank() and meta.get("llmrec.log_level")) or (
        "error" if quiet else "info" if meta.get("llmrec.verbose") else "warning"
    )
    # Other libraries say at most what they warn of.
    logging.basicConfig(format="%(message)s", handlers=[_Voice()])
    logging.getLogger().setLevel(logging.ERROR if quiet else logging.WARNING)
    logging.getLogger("llmrec").setLevel(level.upper())
    # How far long work is, in lines where there is no terminal for a bar.
    logging.getLogger("llmrec.progress").setLevel(level.upper() if quiet or level == "error" else logging.INFO)


# --------------------------------------------------------------------------- how a command ends


def main(app: typer.Typer) -> None:
    """Run the command line; expected failures are one paragraph, or an ``error`` in JSON, and exit with 2.

    Of several processes that a launcher started the first one answers, and the first that fails says why.
    """
    # Threads of OpenMP spin while they wait for each other. With a second busy process the thread that is waited for
    # then gets no core: training takes twice as long, and more with further processes (eval/results/waiting.json).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if processes.rank() and "train" in sys.argv[1:]:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
    with told_of_signals():
        if _asks_for_json(sys.argv[1:]):
            with _aside() as out:
                told, code = _told(app)
                out.write(as_json(told) + "\n")
            sys.exit(code)
        try:
            app(obj=_MAIN)
        except Exception as error:
            wrong = fix_of(error)
            if not processes.begins_to_tell():
                sys.exit(2 if wrong else 1)
            _last_words(error, wrong.kind if wrong else "defect")
            if wrong is None:
                raise
            sys.stderr.write(f"error: {wrong}\n")
            sys.exit(2)


def _last_words(error: Exception, kind: ErrorKind | None) -> None:
    """Show what libraries printed last, where they may have caused what is wrong; an engine's error says it itself."""
    if kind in _BROKEN and not isinstance(error, EngineFailure):
        sys.stderr.writelines(f"{line}\n" for line in terminal.last_words())


def _told(app: typer.Typer) -> tuple[Mapping[str, Any], int]:
    """Run a command and return what it says of itself, and its exit status."""
    try:
        code = app(standalone_mode=False, obj=_MAIN)
        return {"llmrec": __version__, **facts}, code if isinstance(code, int) else 0
    except _UsageError as error:
        wrong: Mapping[str, Any] | None = _error("usage", error.format_message())
    except typer.Abort:
        return {"error": _error("closed", "it was broken off")}, 1
    except Exception as error:
        wrong = _problem(error)
        _last_words(error, wrong["kind"] if wrong else "defect")
        if wrong is None:
            traceback.print_exc()
            return {"error": _error("defect", f"{type(error).__name__}: {error}")}, 1
    assert wrong is not None
    sys.stderr.write(f"error: {wrong['message']}\n")
    return {"error": wrong}, 2


def _problem(error: Exception) -> Mapping[str, Any] | None:
    """Return the facts of what a user can fix, and None of anything else."""
    if (wrong := fix_of(error)) is None:
        return None
    return _error(wrong.kind, str(wrong), file=wrong.file, row=wrong.row, line=wrong.line, column=wrong.column)


def _error(kind: ErrorKind | None, message: str, **facts: Any) -> Mapping[str, Any]:
    return {"kind": kind, "message": message, "file": None, "row": None, "line": None, "column": None, **facts}


def _asks_for_json(line: Sequence[str]) -> bool:
    # Looked for before the line is read: what is wrong with it is told in JSON too.
    return "--json" in line[: line.index("--") if "--" in line else len(line)]


@contextmanager
def _aside() -> Iterator[TextIO]:
    """Hand out the standard output, and send whatever else is written there to the error stream.

    Libraries and the processes that they start write to it as well, so the descriptor itself is moved.
    """
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        yield out
