"""How commands end: a message for an error that users can fix, a line for a signal, or JSON with `--json`."""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import typer

from llmrec import __version__, processes, terminal
from llmrec.cli.console import facts, format_json
from llmrec.display import escape_hidden
from llmrec.durable import WRITING_NOTE
from llmrec.errors import EngineFailure, ErrorKind, LlmrecError
from llmrec.progress import running_tasks
from llmrec.registry import COMMANDS

# Errors that users can fix: no space, no permission, a full or read-only file system, too many open files.
_FIXABLE_ERRORS: Mapping[int, ErrorKind] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE), "exhausted"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "unreadable"),
}
# Libraries written in Rust or C++ report these errors only in their messages.
_SYSTEM_ERROR_MESSAGE = re.compile(
    r"os error (\d+)|No space left on device|PytorchStreamWriter failed|inline_container\.cc"
    r"|database or disk is full|^\d+ requested and \d+ written"
)
_MAX_CAUSES = 10
# Errors that a library may have caused, so that its last output is shown.
_LIBRARY_ERROR_KINDS: frozenset[ErrorKind | None] = frozenset({None, "failed", "exhausted", "defect"})
# The base class of command-line errors, in the version of click that typer uses.
_UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]
_CHECKPOINT = "checkpoint-"


def run_and_exit(program: Callable[..., Any]) -> None:
    """Run a program; expected failures are printed as a message, or as ``error`` in JSON, and exit with 2.

    Args:
        program: A `typer.Typer`, which takes ``standalone_mode``.
    """
    with print_line_at_signals():
        if _asks_for_json(sys.argv[1:]):
            with _redirect_standard_output() as out:
                answer, code = _run_for_json(program)
                out.write(format_json(answer) + "\n")
            sys.exit(code)
        try:
            program()
        except Exception as error:
            wrong = as_fixable_error(error)
            if not processes.is_first_to_fail():
                sys.exit(2 if wrong else 1)
            _print_library_output(error, wrong.kind if wrong else "defect")
            if wrong is None:
                raise
            sys.stderr.write(f"error: {wrong}\n")
            sys.exit(2)


def _print_library_output(error: Exception, kind: ErrorKind | None) -> None:
    """Print the last output of libraries if they may have caused the error."""
    if kind in _LIBRARY_ERROR_KINDS and not isinstance(error, EngineFailure):
        sys.stderr.writelines(f"{line}\n" for line in terminal.last_library_output())


def _run_for_json(program: Callable[..., Any]) -> tuple[Mapping[str, Any], int]:
    """Run a program, and return its JSON output or its error, and its exit status."""
    try:
        code = program(standalone_mode=False)
        return {"llmrec": __version__, **facts}, code if isinstance(code, int) else 0
    except _UsageError as error:
        wrong = _error_record("usage", error.format_message())
    except typer.Abort:
        return {"error": _error_record("closed", "it was interrupted")}, 1
    except Exception as error:
        fix = as_fixable_error(error)
        _print_library_output(error, fix.kind if fix else "defect")
        if fix is None:
            traceback.print_exc()
            return {"error": _error_record("defect", f"{type(error).__name__}: {error}")}, 1
        wrong = _error_record(fix.kind, str(fix), file=fix.file, row=fix.row, line=fix.line, column=fix.column)
    sys.stderr.write(f"error: {wrong['message']}\n")
    return {"error": wrong}, 2


def _error_record(kind: ErrorKind | None, message: str, **facts: Any) -> Mapping[str, Any]:
    return {"kind": kind, "message": message, "file": None, "row": None, "line": None, "column": None, **facts}


def _asks_for_json(line: Sequence[str]) -> bool:
    # Detected before the command line is parsed, so that its errors are also reported in JSON.
    return "--json" in line[: line.index("--") if "--" in line else len(line)]


@contextmanager
def _redirect_standard_output() -> Iterator[TextIO]:
    """Yield the standard output, and redirect everything that other code writes there to standard error.

    Libraries and their subprocesses write to it as well, so the descriptor itself is redirected.
    """
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        yield out


# --------------------------------------------------------------------------- errors that users can fix


def as_fixable_error(error: BaseException) -> LlmrecError | None:
    """Convert an exception to an error that users can fix; None for a bug, which needs its traceback."""
    if isinstance(error, LlmrecError):
        return error
    for seen in _error_chain(error):
        number = seen.errno if isinstance(seen, OSError) and seen.errno else _errno_in_message(str(seen))
        if number is not None and number in _FIXABLE_ERRORS:
            file = (seen.filename if isinstance(seen, OSError) else None) or _written_path(error)
            where = f" ({file})" if file else ""
            return LlmrecError(
                f"{os.strerror(number)}{where}; fix this and run the same command again to resume",
                kind=_FIXABLE_ERRORS[number],
                at=str(file) if file else None,
            )
    return None


def _error_chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and the errors that caused it."""
    seen: BaseException | None = error
    for _ in range(_MAX_CAUSES):
        if seen is None:
            return
        yield seen
        seen = seen.__cause__ or seen.__context__


def _written_path(error: BaseException) -> str | None:
    """Return the file or folder that was being written when an error was raised, if known."""
    notes = (note for seen in _error_chain(error) for note in getattr(seen, "__notes__", ()))
    return next((str(note.removeprefix(WRITING_NOTE)) for note in notes if note.startswith(WRITING_NOTE)), None)


def _errno_in_message(text: str) -> int:
    """Return the error number in a message; 0 if there is none."""
    message = _SYSTEM_ERROR_MESSAGE.search(text)
    if message is None:
        return 0
    return int(message[1]) if message[1] else errno.ENOSPC


@contextmanager
def print_line_at_signals() -> Iterator[None]:
    """Print one line at SIGINT and SIGTERM; the exit codes are 130 and 143.

    SIGINT unwinds the stack, so that engines are closed; a second one exits immediately. SIGTERM exits immediately:
    work that was not stored yet is repeated, as after any kill.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != owner:  # a forked process that inherited the handler
            os.kill(os.getpid(), number)
            return
        if not processes.rank():
            os.write(_error_descriptor(), format_stop_message(sys.argv[1:], ended=number != signal.SIGINT).encode())
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        os._exit(128 + number)

    # shells make background jobs ignore SIGINT
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def format_stop_message(words: list[str], *, ended: bool = True) -> str:
    """Return the line to print at a signal: the running task, the stored results, and how to resume.

    Args:
        words: The command line, without the program.
        ended: Whether the process ends now; if not, `llmrec auto` prints its own line.
    """
    command = next((word for word in words if not word.startswith("-")), "")
    if command == "auto" and not ended:
        return "\n"
    text = " ".join(filter(None, ("stopped", _describe_running_tasks())))
    if command not in COMMANDS or not COMMANDS[command].resumes:
        return f"\n{text}\n"
    folder = terminal.command_folder()
    kept = _describe_stored_results(folder) if folder is not None else []
    what = f"; kept in {escape_hidden(str(folder))}: {', '.join(kept)}" if kept else ""
    return f"\n{text}{what}\nthe same command resumes: {escape_hidden(shlex.join(['llmrec', *words]))}\n"


def _describe_running_tasks() -> str:
    """Return the running tasks, and the progress of the innermost one."""
    result = running_tasks()
    names = " / ".join(dict.fromkeys(bar.name for bar in result))
    reached = result[-1].reached() if result else ""
    return escape_hidden(f"at {names}{f', {reached}' if reached else ''}") if result else ""


def _describe_stored_results(folder: Path) -> list[str]:
    """Return which results of a run or suite are stored in its folder."""
    trained, merged = (folder / "train.json").is_file(), (folder / "merged").is_dir()
    steps = [int(path.name.removeprefix(_CHECKPOINT)) for path in folder.glob(f"checkpoints/{_CHECKPOINT}*[0-9]")]
    rows = sum(1 for _ in folder.glob("rows/*.json"))
    result = (
        ["the tuned model" if merged else "the trained adapter"]
        if trained
        else [f"training up to step {max(steps)}"]
        if steps
        else []
    )
    result += [f"{rows} finished {'row' if rows == 1 else 'rows'}"] if rows else []
    return result + (["all answers so far"] if (folder / "answers.sqlite").is_file() else [])


def _error_descriptor() -> int:
    try:
        return terminal.err().fileno()
    except (OSError, ValueError):  # in a notebook
        return 2
