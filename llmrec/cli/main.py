"""The command line: imports each command when it is called, and adds the options that all commands share."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from textwrap import indent
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from llmrec import __version__, processes, progress, terminal
from llmrec.cli.console import facts, given_options, say
from llmrec.cli.ending import run_and_exit
from llmrec.cli.options import docstring_example, expand_options
from llmrec.progress import QUIET
from llmrec.registry import COMMANDS, PANELS, import_attribute

Level = Literal["debug", "info", "warning", "error"]

# Other libraries read these variables when they are imported; subprocesses inherit them.
_QUIET_ENVIRONMENT = {
    QUIET: "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "CRITICAL",
}
# Set if `main` runs the command; tests that call a command in their own process keep their streams.
_CALLED_BY_MAIN = object()


# --------------------------------------------------------------------------- options of every command


def _store_shared_option(context: typer.Context, option: typer.CallbackParam, value: Any) -> Any:
    if value:
        context.meta[f"llmrec.{option.name}"] = value
    return value


def _shared(*names: str, help: str) -> Any:
    """Declare an option that every command has."""
    return typer.Option(*names, callback=_store_shared_option, expose_value=False, help=help)


def _declare_shared_options(
    as_json: Annotated[
        bool, _shared("--json", help="Print the result as one JSON object; messages go to standard error.")
    ] = False,
    verbose: Annotated[bool, _shared("--verbose", "-v", help="Also print which stages are reused.")] = False,
    quiet: Annotated[bool, _shared("--quiet", "-q", help="Hide progress bars and print only errors.")] = False,
    log_level: Annotated[
        Level | None, _shared("--log-level", help="Log level; replaces -v (info) and -q (error).")
    ] = None,
) -> None:
    """Declare the options that every command has; `_SharedOptions` adds them."""


_holder = typer.Typer(add_completion=False)
_holder.command()(_declare_shared_options)
_SHARED_OPTIONS = get_command(_holder).params


class _SharedOptions:
    """Adds the shared options to a command or group, and applies them before the command runs."""

    def get_params(self, ctx: Any) -> Any:
        return [*super().get_params(ctx), *_SHARED_OPTIONS]  # type: ignore[misc]

    def invoke(self, ctx: Any) -> Any:
        # The path begins with the name of the program, which may consist of several words.
        facts["command"] = ctx.command_path.removeprefix(ctx.find_root().command_path).strip()
        _apply_shared_options(ctx.meta)
        return super().invoke(ctx)  # type: ignore[misc]


def _apply_shared_options(meta: Mapping[str, Any]) -> None:
    """Set the log levels given on the command line."""
    level = meta.get("llmrec.log_level")
    flags = [f"--{name}" for name in ("verbose", "quiet") if meta.get(f"llmrec.{name}")]
    given_options[:] = [*flags, *(["--log-level", level] if level else [])]
    # if a command has several processes, only one prints
    quiet = bool(meta.get("llmrec.quiet")) or processes.rank() > 0
    if quiet:
        os.environ.update(
            {name: value for name, value in _QUIET_ENVIRONMENT.items() if name == QUIET or name not in os.environ}
        )
        warnings.simplefilter("ignore")
    chosen: Level = (not processes.rank() and level) or (
        "error" if quiet else "info" if meta.get("llmrec.verbose") else "warning"
    )
    # of other libraries, log only warnings and errors
    logging.basicConfig(format="%(message)s", handlers=[_LogHandler()])
    logging.getLogger().setLevel(logging.ERROR if quiet else logging.WARNING)
    logging.getLogger("llmrec").setLevel(chosen.upper())
    # Progress of long tasks, as log lines if there is no terminal for a progress bar.
    logging.getLogger("llmrec.progress").setLevel(chosen.upper() if quiet or chosen == "error" else logging.INFO)


class _LogHandler(logging.Handler):
    """Prints log records of llmrec, and sends log records of other libraries to a separate log."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            is_llmrec = record.name.partition(".")[0] == "llmrec"
            progress.say(self.format(record), terminal.err() if is_llmrec else sys.stderr)
        except Exception:
            self.handleError(record)


# --------------------------------------------------------------------------- commands


class _Command(_SharedOptions, TyperCommand):
    def invoke(self, ctx: Any) -> Any:
        # A service writes its own output and that of libraries to standard error, so that they are read together.
        command = COMMANDS.get(self.name or "")
        serves = command is not None and command.serves
        with (
            terminal.log_warnings_once(),
            nullcontext()
            if serves or ctx.find_root().obj is not _CALLED_BY_MAIN
            else terminal.redirect_library_output(),
        ):
            return super().invoke(ctx)


class _Group(_SharedOptions, TyperGroup):
    """A group of commands with the shared options."""


class _Root(_Group):
    """All registered commands, each imported when it is called or its help is printed."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # names from which a misspelt command gets a suggestion
        self.commands = dict.fromkeys(self.list_commands(None))  # type: ignore[assignment]

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands in the order of the help panels."""
        return [name for panel in PANELS for name, command in COMMANDS.items() if command.panel == panel]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        command = COMMANDS[cmd_name]
        target = import_attribute(command.target)
        if isinstance(target, Mapping):
            return get_command(build_app(target, name=cmd_name, help=command.help, no_args_is_help=True))
        return get_command(build_app({cmd_name: target}))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a list of commands for each help panel."""
        width = max(map(len, COMMANDS))
        for panel in PANELS:
            rows = [(f"{name:<{width}}", command.help) for name, command in COMMANDS.items() if command.panel == panel]
            if rows:
                with formatter.section(panel):
                    formatter.write_dl(rows)


def build_app(functions: Mapping[str, Callable[[Any], None]], **settings: Any) -> typer.Typer:
    """Create a command-line program from functions that take an options record.

    Args:
        functions: The functions by command name; see `llmrec.cli.options.expand_options`.
        settings: See `typer.Typer`.
    """
    made = typer.Typer(
        cls=_Group, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, **settings
    )
    for name, function in functions.items():
        made.command(name, cls=_Command, epilog=f"\b\nExample:\n{indent(docstring_example(function), '  ')}")(
            expand_options(function)
        )
    return made


def _print_version(value: bool) -> None:
    if value:
        say(__version__)
        raise typer.Exit


app = typer.Typer(
    name="llmrec",
    cls=_Root,
    help="Fine-tune language models as recommenders, and compare them with baselines.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(program: typer.Typer = app) -> None:
    """Run the command line; expected failures print a message and exit with 2.

    Of several processes that a launcher started, the first prints the result; the first that fails prints its error.
    """
    # OpenMP threads spin while they wait for each other. With another busy process, the thread that they wait for gets
    # no core, and training takes at least twice as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if processes.rank() and "train" in sys.argv[1:]:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
    run_and_exit(lambda **settings: program(obj=_CALLED_BY_MAIN, **settings))


if __name__ == "__main__":
    main()
