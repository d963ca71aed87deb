"""Mutations of bytes, values and configs, deterministic given the random generator."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import yaml

Random = random.Random

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 11)
)
# Replacement values.
ODD: tuple[Any, ...] = (
    *(None, [], {}, "", " ", "x", "\u202e\u0000", "\ud800", "nan", "1e999", "=1+1", "../../etc/passwd", "<|im_end|>"),
    *(-1, 0, 10**30, 10**400, 0.5, -0.0, 1e308, float("inf"), float("-inf"), float("nan"), True, False),
    *([None], [[]], {"x": None}, {"": {}}, ["x"] * 3, "y" * 300, "y" * 70_000, [[[[[["x"]]]]]]),
)
# YAML scalars that are not text, or not valid.
SCALARS = (
    *("2024-99-99", "!!int abc", "!!bool abc", "!!timestamp abc", "!!float x", "!!binary '*'", "!!set {a, b}"),
    *("!!python/object/apply:os.system [ls]", "!x y", "&a [*a]", "*nowhere", "9" * 5000, "0x" + "f" * 40, "1_000"),
    *(".inf", ".nan", "-.inf", "0o17", "12:30:45", "~", "yes", "!!null x", "!!omap [a: 1]", "[" * 500 + "]" * 500),
    *("{a: 1, a: 2}", "? [a, b]", "|\n", "'", '"\\x', "%", "@x", "`x", "2024-01-01", "!!merge <<", '"\\ud800"'),
)


def some_bytes(rng: Random, raw: bytes) -> tuple[str, bytes]:
    """Return the description of a mutation, and the mutated file."""
    ways: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "cut off": lambda: raw[: rng.randrange(len(raw) or 1)],
        "bytes flipped": lambda: _flipped(rng, raw),
        "a NUL": lambda: _put(rng, raw, b"\0"),
        "no UTF-8": lambda: _put(rng, raw, rng.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80"))),
        "UTF-16": lambda: raw.decode("utf-8", "replace").encode("utf-16"),
        "UTF-16 without a mark": lambda: raw.decode("utf-8", "replace").encode("utf-16-le"),
        "deep brackets": lambda: rng.choice((b"[", b'{"a":', b"- ")) * 100_000,
        "random bytes": lambda: rng.randbytes(rng.randrange(1, 3000)),
        "a page of HTML": lambda: b"<!doctype html><html><body>404 Not Found</body></html>\n",
        "gzip": lambda: gzip.compress(raw, mtime=0),
        "half a gzip": lambda: gzip.compress(raw, mtime=0)[: max(12, len(raw) // 8)],
        "the start of a ZIP": lambda: b"PK\x03\x04" + rng.randbytes(60),
        "the start of Parquet": lambda: b"PAR1" + rng.randbytes(60),
        "the start of SQLite": lambda: b"SQLite format 3\0" + rng.randbytes(200),
        "a pickle": lambda: b"\x80\x04cos\nsystem\n(S'touch canary'\ntR.",
        "twice": lambda: raw + raw,
        "lines swapped": lambda: _shuffled(rng, raw),
        "blank lines": lambda: raw.replace(b"\n", b"\n\n \n"),
        "carriage returns": lambda: raw.replace(b"\n", b"\r"),
        "a number of 5,000 digits": lambda: _put(rng, raw, b"9" * 5000),
        "a line of 300,000 letters": lambda: _put(rng, raw, b"y" * 300_000),
    }
    name = rng.choice(list(ways))
    return name, ways[name]()


def _flipped(rng: Random, raw: bytes) -> bytes:
    spoiled = bytearray(raw or b"\0")
    for _ in range(rng.choice((1, 3, 40))):
        spoiled[rng.randrange(len(spoiled))] ^= 1 << rng.randrange(8)
    return bytes(spoiled)


def _put(rng: Random, raw: bytes, more: bytes) -> bytes:
    at = rng.randrange(len(raw) + 1)
    return raw[:at] + more + raw[at:]


def _shuffled(rng: Random, raw: bytes) -> bytes:
    lines = raw.splitlines(keepends=True)
    rng.shuffle(lines)
    return b"".join(lines)


# --------------------------------------------------------------------------- values


def paths(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values inside a value, at most twelve elements of each list."""
    result = []
    inside = value.items() if isinstance(value, dict) else enumerate(value[:12]) if isinstance(value, list) else ()
    for key, inner in inside:
        result += [(*before, key), *paths(inner, (*before, key))]
    return result


def some_value(rng: Random, value: Any, odd: tuple[Any, ...] = ODD) -> tuple[str, Any]:
    """Mutate a JSON document at a random path; return the description and the document."""
    document = deepcopy(value)
    if not (locations := paths(document)) or rng.random() < 0.04:
        other = rng.choice(odd)
        return f"all is {_short(other)}", other
    *outer, last = rng.choice(locations)
    holder = document
    for key in outer:
        holder = holder[key]
    dotted = ".".join(map(str, (*outer, last)))
    way = rng.random()
    if way < 0.65:
        holder[last] = rng.choice(odd)
        return f"{dotted} is {_short(holder[last])}", document
    if way < 0.8:
        del holder[last]
        return f"{dotted} is missing", document
    if isinstance(holder, dict):
        name = rng.choice((f"{last}s", str(last).upper(), "", "<<", "__class__", "a.b", "\ud800"))
        holder[name] = holder.pop(last) if way < 0.9 else "x"
        return f"{dotted} next to or as {_short(name)}", document
    holder.insert(0, holder[last])
    return f"{dotted} twice", document


def _short(value: Any) -> str:
    return ascii(value)[:30]


def json_bytes(value: Any) -> bytes:
    """Write JSON, including non-standard numbers and surrogates."""
    return json.dumps(value).encode()


def some_json(rng: Random, value: Any) -> tuple[str, bytes]:
    """Mutate a JSON file: mostly a value, sometimes its bytes."""
    if rng.random() < 0.25:
        return some_bytes(rng, json_bytes(value))
    fault, mutated = some_value(rng, value)
    return fault, json_bytes(mutated)


# --------------------------------------------------------------------------- YAML files


def some_page(rng: Random, value: Any) -> tuple[str, bytes]:
    """Mutate a YAML file: a value, a scalar, a line, or the bytes."""
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    way = rng.random()
    if way < 0.15:
        return some_bytes(rng, text.encode())
    if way < 0.55:
        fault, mutated = some_value(rng, value)
        # JSON is YAML; its writer accepts values that the YAML writer rejects.
        return fault, json_bytes(mutated) if rng.random() < 0.3 else _dumped(mutated)
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    key, colon, _ = lines[at].partition(": ")
    if way < 0.85 and colon:
        scalar = rng.choice(SCALARS)
        lines[at] = f"{key}: {scalar}"
        fault = f"{key.strip()} is {scalar[:30]!r}"
    elif 0.85 < way < 0.86:
        return "a bomb of aliases", f"{text}{BOMB}".encode()
    else:
        more = rng.choice(
            ("\t", " ", "  ", "- ", "]", "}", ": ", "---\n", "...\n", "<<: *x\n", "key", "#", "\\", "%YAML 9.9\n")
        )
        lines[at] = more + lines[at]
        fault = f"line {at + 1} begins with {more!r}"
    return fault, ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def _dumped(value: Any) -> bytes:
    try:
        return yaml.safe_dump(value, sort_keys=False).encode("utf-8", "surrogatepass")
    except (ValueError, yaml.YAMLError):
        return json_bytes(value)


# --------------------------------------------------------------------------- tables

CELLS = (
    *("", " ", "nan", "inf", "-inf", "1e999", "-1", "0", "3.5", "6", "x", "é", "\u202e", "\ufeff", "NULL", "None"),
    *("true", "=1+1", "<script>", "<|im_start|>", "9" * 40, "9" * 400, "y" * 20_000, '"', '""', '"x', ",", ",,", "\t"),
    *("2024-99-99", "2024-01-01", "1,5", "1.000,5", "0x10", "1_000", "\x1b[31m", "a\x00b", "|", "[1,2]", '{"a":1}'),
    *("12e", "+5", "٣"),
)


def some_table(rng: Random, lines: list[str], separator: str) -> tuple[str, bytes]:
    """Mutate delimited text with a header: a cell, a row, the header, or the bytes."""
    way = rng.random()
    lines = list(lines)
    row = 0 if way < 0.3 else rng.randrange(1, len(lines))
    cells = lines[row].split(separator)
    column = rng.randrange(len(cells))
    if way < 0.6:
        cells[column] = rng.choice(CELLS)
        fault = f"row {row}, cell {column + 1} is {_short(cells[column])}"
    elif way < 0.7:
        del cells[column]
        fault = f"row {row} lacks a cell"
    elif way < 0.75:
        cells.insert(column, cells[column])
        fault = f"row {row} has a cell more"
    elif way < 0.8:
        lines += lines[1:] if rng.random() < 0.5 else [lines[row]] * 3
        fault = "rows twice"
    elif way < 0.85:
        lines = lines[: rng.randrange(3)]
        return "few rows", "".join(f"{line}\n" for line in lines).encode()
    else:
        return some_bytes(rng, "".join(f"{line}\n" for line in lines).encode())
    lines[row] = separator.join(cells)
    return fault, "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass")


def some_objects(rng: Random, records: list[dict[str, Any]]) -> tuple[str, bytes]:
    """Mutate a JSON Lines file: a record, or the bytes."""
    if rng.random() < 0.25:
        return some_bytes(rng, b"".join(json_bytes(record) + b"\n" for record in records))
    records = list(records)
    at = rng.randrange(len(records))
    fault, records[at] = some_value(rng, records[at])
    return f"line {at + 1}: {fault}", b"".join(json_bytes(record) + b"\n" for record in records)
