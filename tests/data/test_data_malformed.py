"""Malformed data files: every reader rejects each at once with one clear error, and runs nothing in it."""

from __future__ import annotations

import gzip
import logging
import os
import re
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import FrameType

import pytest
from malformed_files import CANARY, archives, other_formats, packed, parquet_faults, special_files, strangers
from malformed_readers import Case, Grid, Reader, readers
from malformed_rows import headers, objects, rows, sequences

from llmrec.data.read import parquet
from llmrec.errors import DataError

SECONDS = 10
MEMORY = 2**20
"""KiB by which the peak memory may grow."""
SHARE = 1 if os.environ.get("LLMREC_SLOW") == "1" else 4
"""Every reader but the first reads one of so many files."""
_ADVICE = re.compile(
    r"--mend|\b(add|call|check|compress|correct|create|delete|download|drop|end|export|extract|fetch|flatten|give|keep|"
    r"leave|make|name|needs?|put|"
    r"remove|rename|save|say|set|shorten|split|unpack|use|write|is this a table)\b",
    re.IGNORECASE,
)


def cases(reader: Reader) -> Iterator[Case]:
    """Return every malformed file of a reader."""
    makers: list[Callable[[Reader], Iterator[Case]]] = [other_formats, special_files, packed]
    makers += [archives] if reader.streamed else []
    makers += {
        "delimited": [rows, headers],
        "objects": [objects],
        "lines": [sequences],
        "parquet": [parquet_faults],
    }[reader.kind]
    return chain.from_iterable(make(reader) for make in makers)


def chosen(reader: Reader) -> Iterator[Case]:
    start = readers().index(reader)
    for number, case in enumerate(cases(reader)):
        if start == 0 or (number + start) % SHARE == 0:
            yield case


class _Hang(BaseException):
    """Raised on a timeout; the package does not catch it."""


class _Watch:
    """Limits the CPU time of reading a file, and the waiting time, e.g. for a pipe without a writer."""

    def __init__(self) -> None:
        self.worked = self.waited = 0.0

    def start(self) -> None:
        self.worked, self.waited = time.process_time(), time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 1, 1)

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def ring(self, number: int, frame: FrameType | None) -> None:
        if time.process_time() - self.worked > SECONDS or time.monotonic() - self.waited > 6 * SECONDS:
            raise _Hang


WATCH = _Watch()


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Run in an empty folder and check that no canary is created; lower the Parquet limit, for fast bombs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parquet, "ALWAYS_ALLOWED_BYTES", 2**27)
    logging.disable(logging.WARNING)
    previous = signal.signal(signal.SIGALRM, WATCH.ring)
    yield
    signal.signal(signal.SIGALRM, previous)
    logging.disable(logging.NOTSET)
    assert not list(tmp_path.rglob(CANARY)), "a file was run"


def _write(case: Case, folder: Path) -> Path:
    folder.mkdir()
    for name, raw in case.files.items():
        (folder / name).write_bytes(raw)
    path = folder / case.reader.file
    if case.make is not None:
        case.make(path)
    return path


def problem_of(case: Case, folder: Path) -> str:
    """Return what is wrong with the rejection of a file, or an empty text."""
    path = _write(case, folder)
    WATCH.start()
    try:
        case.reader.read(path)
    except DataError as error:
        return _fault_of(case, error)
    except _Hang:
        return f"it takes more than {SECONDS} seconds"
    except BaseException as error:  # a panic of a Rust library is not an Exception
        return "".join(traceback.format_exception(error)[-2:])
    finally:
        WATCH.stop()
    return "it was read"


def _fault_of(case: Case, error: DataError) -> str:
    message = str(error)
    if error.kind is None:
        return f"the error has no kind: {message}"
    # If a data set lacks a file, the error names the folder, and the message names the file.
    if Path(case.reader.file).stem not in (message if error.kind == "missing-file" else error.file or ""):
        return f"the file is {error.file}: {message}"
    if case.rows and not {error.row, error.line} & set(case.rows):
        return f"row {error.row} and line {error.line} are none of {case.rows}: {message}"
    if case.column and case.column != error.column:
        return f"the column is {error.column} and not {case.column}: {message}"
    return _flaw(message)


def _flaw(message: str) -> str:
    """Return what is wrong with an error message."""
    if len(message) > 1000 or not message.isprintable():
        return f"not one short paragraph: {message[:1500]!r}"
    return "" if _ADVICE.search(message) else f"no advice: {message}"


@pytest.mark.parametrize("reader", readers(), ids=lambda reader: str(reader.name))
def test_rejects_malformed_files(reader: Reader, tmp_path: Path) -> None:
    assert reader.read(_write(Case(reader, "none", {**reader.others, reader.file: reader.good()}), tmp_path / "good"))
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problems: dict[str, str] = {}
    for number, case in enumerate(chosen(reader)):
        problem = problem_of(case, tmp_path / str(number))
        if problem:
            problems[case.name] = problem
    assert not problems, f"{len(problems)}: {list(problems.items())[:5]}"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - highest < MEMORY


def test_rejects_pickles_with_any_file_ending(tmp_path: Path) -> None:
    """The fixture checks that none of them creates its file."""
    pickles = {name: raw for name, raw in strangers().items() if "pickle" in name}
    assert len(pickles) == 3
    endings = (".csv", ".txt", ".jsonl", ".parquet", ".inter", ".pkl", ".npy", "")
    table = next(reader for reader in readers() if reader.name == "table-csv")
    for number, ((name, raw), ending) in enumerate((pair, end) for pair in pickles.items() for end in endings):
        for packing in ("", ".gz"):
            path = tmp_path / f"{number}{ending}{packing}"
            path.write_bytes(gzip.compress(raw) if packing else raw)
            with pytest.raises(DataError) as caught:
                table.read(path)
            assert caught.value.file == str(path) and not _flaw(str(caught.value)), name


def _oddities(reader: Reader) -> dict[str, bytes]:
    """Return unusual text files with the same content."""
    text = reader.good()
    lines = text.splitlines(keepends=True)
    half = len(lines) // 2
    odd = {
        "a byte order mark": b"\xef\xbb\xbf" + text,
        "Windows line ends": text.replace(b"\n", b"\r\n"),
        "line ends of both sorts": b"".join(line[:-1] + (b"\r\n" if n % 2 else b"\n") for n, line in enumerate(lines)),
        "no last line end": text.removesuffix(b"\n"),
        "blank lines at its end": text + b"\n\n\r\n",
        "blank lines in the middle": b"".join([*lines[:half], b"\n\n", *lines[half:]]),
        "all of this": b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n\r\n").rstrip(),
        "gzip in two parts": gzip.compress(text[:60]) + gzip.compress(text[60:]),
    }
    if isinstance(reader.form, Grid):
        odd["line ends of old Macs"] = text.replace(b"\n", b"\r")
    if isinstance(reader.form, Grid) and reader.form.quoted:
        quoted = [",".join(f'"{cell}"' for cell in line.split(",")) for line in text.decode().splitlines()]
        odd["quotes around everything"] = "\n".join(quoted).encode() if reader.form.separator == "," else text
    return odd


@pytest.mark.parametrize(
    "reader", [reader for reader in readers() if reader.kind != "parquet"], ids=lambda reader: str(reader.name)
)
def test_reads_unusual_files(reader: Reader, tmp_path: Path) -> None:
    good = reader.read(_write(Case(reader, "none", {**reader.others, reader.file: reader.good()}), tmp_path / "good"))
    odd = _oddities(reader)
    for number, (name, raw) in enumerate(odd.items()):
        others = {other: held for other, held in reader.others.items() if other != reader.file}
        zipped = replace(reader, file=f"{reader.file}.gz" if name.startswith("gzip") else reader.file)
        path = _write(Case(zipped, name, {**others, zipped.file: raw}), tmp_path / str(number))
        assert zipped.read(path) == good, name
