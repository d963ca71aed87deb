"""Thousands of malformed data files: every reader refuses each in its own words, at once, and runs nothing in it."""

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
from itertools import chain
from pathlib import Path
from types import FrameType

import pytest
from malformed_files import CANARY, archives, encodings, packed, parquet_faults, places, strangers, whole_files
from malformed_readers import Case, Grid, Reader, Refused
from malformed_rows import asked, headers, objects, rows, sequences
from malformed_sets import readers

from llmrec.data.read import parquet
from llmrec.errors import DataError, LlmrecError, RecipeError

SECONDS = 10
MEMORY = 2**20
"""KiB that the highest use of memory may grow by; each bomb unpacks to that or far more."""
# Tables are given everything, the other readers a share. With the slow tests, some others are given everything, too.
MORE = ("init-csv", "table-jsonl", "table-parquet", "requests-jsonl", "requests-csv", "ml-1m", "sequences")
WHOLE = ("table-csv", *(MORE if os.environ.get("LLMREC_SLOW") == "1" else ()))
SHARE = 4
_MEND = re.compile(
    r"--mend|\b(add|call|check|compress|correct|create|delete|download|drop|end|export|extract|fetch|flatten|give|keep|"
    r"leave|make|name|needs?|put|"
    r"remove|rename|save|say|set|shorten|split|unpack|use|write|is this a table)\b",
    re.IGNORECASE,
)


def cases(reader: Reader) -> Iterator[Case]:
    """Return every malformed file of a reader."""
    makers: list[Callable[[Reader], Iterator[Case]]] = [whole_files, encodings, places, packed]
    makers += [archives] if reader.streamed else []
    makers += {
        "delimited": [rows, headers],
        "objects": [objects, asked] if reader.requests else [objects],
        "lines": [sequences],
        "parquet": [parquet_faults],
    }[reader.kind]
    return chain.from_iterable(make(reader) for make in makers)


def chosen(reader: Reader) -> Iterator[Case]:
    start = readers().index(reader)
    for number, case in enumerate(cases(reader)):
        if reader.name in WHOLE or (number + start) % SHARE == 0:
            yield case


class _Hang(BaseException):
    """Nothing in the package catches it."""


class _Watch:
    """Looks every second at how long a file has been read: seconds of work, which a busy machine does not stretch.

    Waiting, as for a pipe that nobody writes to, takes none; so there is an end to that too.
    """

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
    """Run in an empty folder, where a canary would show; with less room for Parquet, so that its bombs are quick."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parquet, "FREE_BYTES", 2**27)
    logging.disable(logging.WARNING)
    previous = signal.signal(signal.SIGALRM, WATCH.ring)
    yield
    signal.signal(signal.SIGALRM, previous)
    logging.disable(logging.NOTSET)
    assert not list(tmp_path.rglob(CANARY)), "a file was run"


def _given(case: Case, folder: Path) -> Path:
    folder.mkdir()
    for name, raw in case.files.items():
        (folder / name).write_bytes(raw)
    path = folder / case.reader.file
    if case.make is not None:
        case.make(path)
    return path


def problem_of(case: Case, folder: Path) -> str:
    """Return what is wrong with how a file is refused; empty if nothing is."""
    path = _given(case, folder)
    WATCH.start()
    try:
        found = case.reader.read(path)
    except (DataError, RecipeError) as error:
        return _fault_of(case, error)
    except _Hang:
        return f"it takes more than {SECONDS} seconds"
    except BaseException as error:  # a panic of a library in Rust is no Exception
        return "".join(traceback.format_exception(error)[-2:])
    finally:
        WATCH.stop()
    if not isinstance(found, Refused):
        return "it was read"
    if not case.line and not found.found:
        return next((flaw for reason in found.values() if (flaw := _flaw(reason))), "") if found else "it was read"
    if list(found) != [case.line]:
        return f"lines {list(found)} were refused"
    return _flaw(found[case.line])


def _fault_of(case: Case, error: LlmrecError) -> str:
    message = str(error)
    if case.line:
        return f"the whole file is refused: {message}"
    if error.kind is None:
        return f"what is wrong is not told: {message}"
    # Where a set lacks a file, the folder is at fault, and the message names the file.
    if Path(case.reader.file).stem not in (message if error.kind == "missing-file" else error.file or ""):
        return f"the file is {error.file}: {message}"
    if case.places and not {error.row, error.line} & set(case.places):
        return f"row {error.row} and line {error.line} are none of {case.places}: {message}"
    if case.column and case.column != error.column:
        return f"the column is {error.column} and not {case.column}: {message}"
    return _flaw(message)


def _flaw(message: str) -> str:
    """Return what is wrong with the words of an error."""
    if len(message) > 1000 or not message.isprintable():
        return f"not one short paragraph: {message[:1500]!r}"
    return "" if _MEND.search(message) else f"no mend: {message}"


# --------------------------------------------------------------------------- what must be refused


@pytest.mark.slow
def test_there_are_enough_files_of_enough_sorts() -> None:
    told = [(case.name, case.fault) for reader in readers() for case in chosen(reader)]
    names, faults = [name for name, _ in told], {re.sub(r"\b[0-9]+\b", "N", fault) for _, fault in told}
    assert len(set(names)) == len(names) and len(faults) >= 200


def test_good_files_are_read(tmp_path: Path) -> None:
    """Else their faults would prove nothing."""
    for reader in readers():
        path = _given(Case(reader, "none", {**reader.others, reader.file: reader.good()}), tmp_path / reader.name)
        found = reader.read(path)
        if isinstance(found, Refused):
            assert not found and len(found.found) == 8, reader.name
        else:
            assert found, reader.name


@pytest.mark.parametrize("reader", readers(), ids=lambda reader: str(reader.name))
def test_malformed_files_are_refused(reader: Reader, tmp_path: Path) -> None:
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problems: dict[str, str] = {}
    for number, case in enumerate(chosen(reader)):
        problem = problem_of(case, tmp_path / str(number))
        if problem:
            problems[case.name] = problem
    assert not problems, f"{len(problems)}: {list(problems.items())[:5]}"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - highest < MEMORY


def test_pickles_are_refused_under_any_name(tmp_path: Path) -> None:
    """The fixture looks for the file that each of them would make."""
    held = {name: raw for name, raw in strangers().items() if "pickle" in name}
    assert len(held) == 6
    endings = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".parquet", ".pq", ".inter", ".pkl", ".pickle", ".npy", "")
    table = next(reader for reader in readers() if reader.name == "table-csv")
    for number, ((name, raw), ending) in enumerate((pair, end) for pair in held.items() for end in endings):
        for packing in ("", ".gz"):
            path = tmp_path / f"{number}{ending}{packing}"
            path.write_bytes(gzip.compress(raw) if packing else raw)
            with pytest.raises(DataError) as refused:
                table.read(path)
            assert refused.value.file == str(path) and not _flaw(str(refused.value)), name


# --------------------------------------------------------------------------- what is odd and can be read


def _oddities(reader: Reader) -> dict[str, bytes]:
    """Return text files that look unusual and mean the same."""
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
    }
    if not reader.requests and isinstance(reader.form, Grid):
        odd["line ends of old Macs"] = text.replace(b"\n", b"\r")
    if isinstance(reader.form, Grid) and reader.form.quoted:
        quoted = [",".join(f'"{cell}"' for cell in line.split(",")) for line in text.decode().splitlines()]
        odd["quotes around everything"] = "\n".join(quoted).encode() if reader.form.separator == "," else text
    return odd


@pytest.mark.parametrize(
    "reader", [reader for reader in readers() if reader.kind != "parquet"], ids=lambda reader: str(reader.name)
)
def test_odd_files_are_read_as_plain_ones(reader: Reader, tmp_path: Path) -> None:
    good = reader.read(_given(Case(reader, "none", {**reader.others, reader.file: reader.good()}), tmp_path / "good"))
    odd = _oddities(reader)
    for number, (name, raw) in enumerate(odd.items()):
        path = _given(Case(reader, name, {**reader.others, reader.file: raw}), tmp_path / str(number))
        found = reader.read(path)
        assert found == good, name
        if isinstance(found, Refused) and isinstance(good, Refused):
            assert found.found == good.found, name


@pytest.mark.parametrize("kind", ["gzip", "gzip in two parts"])
def test_packed_files_are_read_as_plain_ones(kind: str, tmp_path: Path) -> None:
    for reader in readers():
        if reader.kind == "parquet":
            continue
        text = reader.good()
        half = text.find(b"\n") + 1
        parts = [text] if kind == "gzip" else [text[:half], text[half:]]
        others = {name: raw for name, raw in reader.others.items() if name != reader.file}
        folder = tmp_path / reader.name
        path = _given(Case(reader, kind, {**others, f"{reader.file}.gz": b"".join(map(gzip.compress, parts))}), folder)
        plain = _given(Case(reader, "none", {**others, reader.file: text}), tmp_path / f"{reader.name}-plain")
        assert reader.read(path.with_name(f"{reader.file}.gz")) == reader.read(plain), reader.name
