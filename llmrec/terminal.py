"""Separates output of llmrec from output of libraries, which goes to a log.

Libraries print from Python, from C and from child processes. So the descriptors of the standard streams are redirected
to the log, and llmrec has its own streams, `out` and `err`.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TextIO, cast

LOG_FILE = "libraries.log"
"""The log in a run folder: the library output of its last command; missing if there was none."""

# Limits for the log lines shown in an error: number of lines, bytes read, characters per line.
_LINES, _BYTES, _CHARACTERS = 15, 64_000, 300
_ERROR = re.compile(r"\b[A-Z]\w*(?:Error|Exception): (.+)")
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x20-\x7e\xa0-\U0010ffff]")


class _SeparatedStreams:
    """The streams of a command whose library output goes only to the log."""

    def __init__(self, out: TextIO, err: TextIO, log: BinaryIO) -> None:
        self.out, self.err, self.log = out, err, log
        self.path: Path | None = None

    def turn(self) -> None:
        """Redirect the descriptors of the standard streams to the log."""
        for number in (1, 2):
            os.dup2(self.log.fileno(), number)

    def text(self) -> str:
        """Return the last part of the log."""
        size = os.fstat(self.log.fileno()).st_size
        return os.pread(self.log.fileno(), _BYTES, max(0, size - _BYTES)).decode("utf-8", "replace")


_now: _SeparatedStreams | None = None
_folder: Path | None = None
_last_output: list[str] = []


WarningKeys = frozenset[tuple[str, ...]]
_noted: set[tuple[str, ...]] | None = None


@contextmanager
def log_warnings_once(before: WarningKeys = frozenset()) -> Iterator[None]:
    """Log each warning only once within this block, because a command may read a table several times.

    Args:
        before: The result of `logged_warnings` in the parent process.
    """
    global _noted
    if _noted is not None:
        yield
        return
    _noted = set(before)
    try:
        yield
    finally:
        _noted = None


def logged_warnings() -> WarningKeys:
    """Return the warnings that `log_warnings_once` has seen in its block."""
    return frozenset(_noted or ())


def warn_once_logger(name: str) -> logging.Logger:
    """Return a logger whose warnings are logged once within a block of `log_warnings_once`."""
    result = logging.getLogger(name)
    result.addFilter(_is_new_warning)
    return result


def _is_new_warning(record: logging.LogRecord) -> bool:
    if _noted is None or record.levelno < logging.WARNING:
        return True
    args = record.args if isinstance(record.args, tuple) else (record.args,)
    key = (record.name, record.msg, *map(_resolve_path_argument, args))
    if key in _noted:
        return False
    _noted.add(key)
    return True


def _resolve_path_argument(arg: object) -> str:
    """Return a message argument as text, with absolute paths."""
    try:
        return str(Path(str(arg)).resolve(strict=True))
    except (OSError, ValueError):
        return str(arg)


def out() -> TextIO:
    """Return the stream for results of a command."""
    return sys.stdout if _now is None else _now.out


def err() -> TextIO:
    """Return the stream for notes, progress and errors."""
    return sys.stderr if _now is None else _now.err


def command_folder() -> Path | None:
    """Return the output folder of the current command, if known."""
    return _folder


def set_command_folder(output_folder: Path) -> None:
    """Set the output folder of a command, to which its log moves; call it after locking the folder.

    Called from Python, library output is not redirected and no log is written.
    """
    global _folder
    _folder = output_folder
    if _now is None or _now.path == output_folder / LOG_FILE:
        return
    before = _now.text()
    path = output_folder / LOG_FILE
    path.unlink(missing_ok=True)
    opened = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
    _flush_streams()
    _close_log(_now)
    _now.log, _now.path = cast(BinaryIO, os.fdopen(opened, "w+b", buffering=0)), path
    _now.log.write(before.encode())
    _now.turn()


def last_library_output() -> list[str]:
    """Return the last library output before a failure, with the path of the log."""
    return _last_output


def last_library_error() -> str:
    """Return the last error of a library in the log; empty if there is none."""
    if _now is None:
        return ""
    _flush_streams()
    results = [match[1] for line in _read_log_lines(_now) if (match := _ERROR.search(line))]
    return results[-1] if results else ""


@contextmanager
def redirect_library_output() -> Iterator[None]:
    """Redirect library output to a log, which is temporary until `set_command_folder` sets a folder."""
    global _now, _folder
    _last_output.clear()
    _folder = None
    if not _has_standard_streams():
        yield
        return
    with ExitStack() as closing:
        kept = [os.dup(number) for number in (1, 2)]
        for number in kept:
            closing.callback(os.close, number)
        _flush_streams()
        words, notes = _open_text_stream(kept[0], sys.stdout), _open_text_stream(kept[1], sys.stderr)
        for stream in (words, notes):
            closing.callback(_close_quietly, stream)
        log = tempfile.TemporaryFile("w+b", buffering=0)  # noqa: SIM115  (it may give way to the one of a folder)
        _now = _SeparatedStreams(words, notes, cast(BinaryIO, log))
        _now.turn()
        try:
            yield
        except BaseException:
            _flush_streams()
            _last_output.extend(_format_log_lines(_now))
            raise
        finally:
            _flush_streams()
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
            ended, _now = _now, None
            _close_log(ended)


def _has_standard_streams() -> bool:
    """Whether Python's streams use the standard descriptors, which they do not in notebooks and tests."""
    try:
        return (sys.stdout.fileno(), sys.stderr.fileno()) == (1, 2)
    except (AttributeError, OSError, ValueError):  # a daemon has no standard streams
        return False


def _open_text_stream(number: int, like: TextIO) -> TextIO:
    """Open a text stream on a descriptor with the encoding of the stream that it replaces."""
    encoding = getattr(like, "encoding", None) or "utf-8"
    return os.fdopen(os.dup(number), "w", encoding=encoding, errors="backslashreplace", buffering=1)


def _close_quietly(stream: TextIO) -> None:
    # The reader may have ended, as with `| head`.
    with suppress(OSError):
        stream.close()


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


def _close_log(apart: _SeparatedStreams) -> None:
    """Close a log; remove it if it is empty."""
    empty = os.fstat(apart.log.fileno()).st_size == 0
    apart.log.close()
    if empty and apart.path is not None:
        apart.path.unlink(missing_ok=True)


def _read_log_lines(apart: _SeparatedStreams) -> list[str]:
    """Return the last lines of the log, without control characters."""
    lines = [_CONTROL.sub("", line)[:_CHARACTERS].rstrip() for line in re.split(r"[\r\n]+", apart.text())]
    return [line for line in lines if line]


def _format_log_lines(apart: _SeparatedStreams) -> list[str]:
    result = _read_log_lines(apart)
    if not result:
        return []
    where = f" ({apart.path})" if apart.path else ""
    return [f"last output of libraries{where}:", *(f"    {line}" for line in result[-_LINES:])]
