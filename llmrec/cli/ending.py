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
from llmrec.cli.console import as_json, facts
from llmrec.display import visible
from llmrec.durable import WRITING
from llmrec.errors import EngineFailure, ErrorKind, LlmrecError
from llmrec.progress import under_way
from llmrec.registry import COMMANDS

# Errors that users can fix: no space, no permission, a full or read-only file system, too many open files.
_MENDABLE: Mapping[int, ErrorKind] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE), "exhausted"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "unreadable"),
}
# Libraries written in Rust or C++ report these errors only in their messages.
_TOLD = re.compile(
    r"os error (\d+)|No space left on device|PytorchStreamWriter failed|inline_container\.cc"
    r"|database or disk is full|^\d+ requested and \d+ written"
)
_MOST_CAUSES = 10
# Errors that a library may have caused, so that its last output is shown.
_BROKEN: frozenset[ErrorKind | None] = frozenset({None, "failed", "exhausted", "defect"})
# The base class of command-line errors, in the version of click that typer uses.
_UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]
_CHECKPOINT = "checkpoint-"


def run_and_exit(program: Callable[..., Any]) -> None:
    """Run a program; expected failures are printed as a message, or as ``error`` in JSON, and exit with 2.

    Args:
        program: A `typer.Typer`, which takes ``standalone_mode``.
    """
    with reporting_signals():
        if _asks_for_json(sys.argv[1:]):
            with _aside() as out:
                answer, code = _answer(program)
                out.write(as_json(answer) + "\n")
            sys.exit(code)
        try:
            program()
        except Exception as error:
            wrong = fix_of(error)
            if not processes.is_first_to_fail():
                sys.exit(2 if wrong else 1)
            _last_output(error, wrong.kind if wrong else "defect")
            if wrong is None:
                raise
            sys.stderr.write(f"error: {wrong}\n")
            sys.exit(2)


def _last_output(error: Exception, kind: ErrorKind | None) -> None:
    """Print the last output of libraries if they may have caused the error."""
    if kind in _BROKEN and not isinstance(error, EngineFailure):
        sys.stderr.writelines(f"{line}\n" for line in terminal.last_words())


def _answer(program: Callable[..., Any]) -> tuple[Mapping[str, Any], int]:
    """Run a program, and return its JSON output or its error, and its exit status."""
    try:
        code = program(standalone_mode=False)
        return {"llmrec": __version__, **facts}, code if isinstance(code, int) else 0
    except _UsageError as error:
        wrong = _error("usage", error.format_message())
    except typer.Abort:
        return {"error": _error("closed", "it was interrupted")}, 1
    except Exception as error:
        fix = fix_of(error)
        _last_output(error, fix.kind if fix else "defect")
        if fix is None:
            traceback.print_exc()
            return {"error": _error("defect", f"{type(error).__name__}: {error}")}, 1
        wrong = _error(fix.kind, str(fix), file=fix.file, row=fix.row, line=fix.line, column=fix.column)
    sys.stderr.write(f"error: {wrong['message']}\n")
    return {"error": wrong}, 2


def _error(kind: ErrorKind | None, message: str, **facts: Any) -> Mapping[str, Any]:
    return {"kind": kind, "message": message, "file": None, "row": None, "line": None, "column": None, **facts}


def _asks_for_json(line: Sequence[str]) -> bool:
    # Detected before the command line is parsed, so that its errors are also reported in JSON.
    return "--json" in line[: line.index("--") if "--" in line else len(line)]


@contextmanager
def _aside() -> Iterator[TextIO]:
    """Yield the standard output, and redirect everything that other code writes there to standard error.

    Libraries and their subprocesses write to it as well, so the descriptor itself is redirected.
    """
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        yield out


# --------------------------------------------------------------------------- errors that users can fix


def fix_of(error: BaseException) -> LlmrecError | None:
    """Convert an exception to an error that users can fix; None for a bug, which needs its traceback."""
    if isinstance(error, LlmrecError):
        return error
    for seen in _causes(error):
        number = seen.errno if isinstance(seen, OSError) and seen.errno else _errno_of(str(seen))
        if number is not None and number in _MENDABLE:
            file = (seen.filename if isinstance(seen, OSError) else None) or _written(error)
            where = f" ({file})" if file else ""
            return LlmrecError(
                f"{os.strerror(number)}{where}; fix this and run the same command again to resume",
                kind=_MENDABLE[number],
                at=str(file) if file else None,
            )
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and the errors that caused it."""
    seen: BaseException | None = error
    for _ in range(_MOST_CAUSES):
        if seen is None:
            return
        yield seen
        seen = seen.__cause__ or seen.__context__


def _written(error: BaseException) -> str | None:
    """Return the file or folder that was being written when an error was raised, if known."""
    notes = (note for seen in _causes(error) for note in getattr(seen, "__notes__", ()))
    return next((str(note.removeprefix(WRITING)) for note in notes if note.startswith(WRITING)), None)


def _errno_of(text: str) -> int:
    """Return the error number in a message; 0 if there is none."""
    message = _TOLD.search(text)
    if message is None:
        return 0
    return int(message[1]) if message[1] else errno.ENOSPC


@contextmanager
def reporting_signals() -> Iterator[None]:
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
            os.write(_error_stream(), last_line(sys.argv[1:], ended=number != signal.SIGINT).encode())
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


def last_line(words: list[str], *, ended: bool = True) -> str:
    """Return the line to print at a signal: the running task, the stored results, and how to resume.

    Args:
        words: The command line, without the program.
        ended: Whether the process ends now; if not, `llmrec auto` prints its own line.
    """
    command = next((word for word in words if not word.startswith("-")), "")
    if command == "auto" and not ended:
        return "\n"
    text = " ".join(filter(None, ("stopped", _at())))
    if command not in COMMANDS or not COMMANDS[command].resumes:
        return f"\n{text}\n"
    folder = terminal.folder()
    kept = _kept(folder) if folder is not None else []
    what = f"; kept in {visible(str(folder))}: {', '.join(kept)}" if kept else ""
    return f"\n{text}{what}\nthe same command resumes: {visible(shlex.join(['llmrec', *words]))}\n"


def _at() -> str:
    """Return the running tasks, and the progress of the innermost one."""
    result = under_way()
    names = " / ".join(dict.fromkeys(bar.name for bar in result))
    reached = result[-1].reached() if result else ""
    return visible(f"at {names}{f', {reached}' if reached else ''}") if result else ""


def _kept(folder: Path) -> list[str]:
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


def _error_stream() -> int:
    try:
        return terminal.err().fileno()
    except (OSError, ValueError):  # in a notebook
        return 2
