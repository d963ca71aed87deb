"""The ten surfaces: valid files of each, and their mutations."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from eval.benchmarks.campaign import good, sheets
from eval.benchmarks.campaign.spoil import (
    ODD,
    SCALARS,
    json_bytes,
    paths,
    some_bytes,
    some_json,
    some_objects,
    some_page,
    some_table,
    some_value,
)

Content = bytes | str
"""The content of a path: bytes, ``nothing``, a ``folder``, or a link: a ``loop`` to itself, or ``dangling``."""


@dataclass(frozen=True)
class Case:
    """One malformed input.

    Attributes:
        fault: Description of the fault.
        files: Files to write into the folder, by name.
        arguments: Further arguments of the call.
        base: The folder of valid files into which they are written.
    """

    fault: str
    files: Mapping[str, Content]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    base: str = "page"


@dataclass(frozen=True)
class Surface:
    """A kind of user input.

    Attributes:
        sound: Valid inputs, which load every library that the surface needs.
        spoil: Generates a malformed input, given the folder of valid files.
        count: Number of inputs.
    """

    sound: tuple[Case, ...]
    spoil: Callable[[random.Random, Path], Case]
    count: int


def cases(name: str, surface: Surface, bases: Path, seed: int, count: int) -> Iterator[Case]:
    """Yield a surface's malformed inputs, deterministic given the seed."""
    for number in range(count):
        yield surface.spoil(random.Random(f"{seed} {name} {number}"), bases)


def _path_kind(rng: random.Random) -> str:
    return rng.choice(("nothing", "folder", "loop", "dangling"))


# --------------------------------------------------------------------------- YAML files


def _recipe(rng: random.Random, bases: Path) -> Case:
    page = rng.choice(good.RECIPES)
    if rng.random() < 0.2:
        key = rng.choice([".".join(map(str, path)) for path in paths(page)] + ["x", "", "a..b", "name.x"])
        value = rng.choice((*SCALARS, "x", "", "-1", "1e999", "[1, 2]", "{a: 1}", "y" * 70_000))
        word = rng.choice((f"{key}={value}", f"{key}={value}", f"{key}:{value}", key, f"={value}"))
        return Case(f"override {word[:40]!r}", {"page.yaml": _yaml(page)}, {"overrides": [word]})
    if rng.random() < 0.03:
        kind = _path_kind(rng)
        return Case(f"the page is {kind}", {"page.yaml": kind})
    fault, raw = some_page(rng, page)
    return Case(fault, {"page.yaml": raw})


def _suite(rng: random.Random, bases: Path) -> Case:
    fault, raw = some_page(rng, rng.choice(good.SUITES))
    return Case(fault, {"page.yaml": raw, "recipe.yaml": _yaml(good.RECIPES[0])})


def _template(rng: random.Random, bases: Path) -> Case:
    page = dict(good.TEMPLATE)
    if rng.random() < 0.5:
        part, source = rng.choice(("system", "user", "lead", "target", "tail")), rng.choice(good.SOURCES)
        page[part] = f"{page.get(part, '')}{source}" if rng.random() < 0.6 else source
        return Case(f"{part}: {source[:40]!r}", {"prompts/rating/spoiled.yaml": _yaml(page)})
    fault, raw = some_page(rng, page)
    return Case(fault, {"prompts/rating/spoiled.yaml": raw})


def _yaml(value: Any) -> bytes:
    return yaml.safe_dump(value, sort_keys=False).encode()


# --------------------------------------------------------------------------- tables and requests

_SEPARATORS = {"csv": ",", "tsv": "\t"}


def _table(rng: random.Random, bases: Path) -> Case:
    kind = rng.choice(("csv", "csv", "csv", "tsv", "jsonl", "jsonl", "parquet", "items", "path"))
    by = "init" if rng.random() < 0.4 else "section"
    if kind == "items":
        fault, raw = some_table(rng, good.ITEM_LINES, ",")
        section = {"source": "table", "path": "events.csv", "items": "items.csv"}
        return Case(f"items: {fault}", {"items.csv": raw}, {"by": "section", "file": "items.csv", "section": section})
    if kind == "path":
        name, raw = "events.csv", _path_kind(rng)
        fault = f"the table is {raw}"
    elif kind == "jsonl":
        name = "events.jsonl"
        fault, raw = some_objects(rng, good.EVENTS)
    elif kind == "parquet":
        name = "events.parquet"
        fault, raw = _parquet(rng, good.EVENTS)
    else:
        name, separator = f"events.{kind}", _SEPARATORS[kind]
        fault, raw = some_table(rng, [line.replace(",", separator) for line in good.EVENT_LINES], separator)
    section = {"source": "table", "path": name}
    return Case(f"{kind}: {fault}", {name: raw}, {"by": by, "file": name, "section": section})


def _parquet(rng: random.Random, records: list[dict[str, Any]]) -> tuple[str, bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {name: [record[name] for record in records] for name in records[0]}
    name = rng.choice(list(columns))
    fault = f"{name} is "
    way = rng.randrange(9)
    if way < 5:
        other = (
            pa.array([None] * len(records)),
            pa.array([[1, 2]] * len(records)),
            pa.array([{"a": 1}] * len(records)),
            pa.array([b"\xff\xfe"] * len(records)),
            pa.array([float("nan")] * len(records)),
        )[way]
        table = pa.table({**columns, name: other})
        fault += str(other.type)
    elif way == 5:
        table, fault = pa.table({key: value for key, value in columns.items() if key != name}), f"no {name}"
    elif way == 6:
        table, fault = pa.table({key: value[:0] for key, value in columns.items()}), "no rows"
    else:
        table = pa.table(columns)
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return some_bytes(rng, stream.getvalue()) if way > 6 else (fault, stream.getvalue())


def _spreadsheet(rng: random.Random, bases: Path) -> Case:
    fault, raw = sheets.some_workbook(rng, good.EVENT_LINES)
    file = "book.xlsx" + rng.choice(
        ("#Notes", "#", "#x", f"#{'y' * 300}", "#Ord\u202eers") if rng.random() < 0.1 else ("", "", "#Orders")
    )
    by = "init" if rng.random() < 0.3 else "section"
    section = {"source": "table", "path": file}
    return Case(f"{file[:20]!a}: {fault}", {"book.xlsx": raw}, {"by": by, "file": file, "section": section})


def _request(rng: random.Random, bases: Path) -> Case:
    known = {"known": rng.random() < 0.7}
    kind = rng.choice(("jsonl", "jsonl", "jsonl", "csv", "tsv", "parquet"))
    name = f"requests.{kind}"
    if kind == "jsonl":
        fault, raw = some_objects(rng, good.REQUESTS)
    elif kind == "parquet":
        fault, raw = _parquet(rng, [request | {"history": ["i0", "i1"]} for request in good.REQUESTS])
    else:
        separator = _SEPARATORS[kind]
        fault, raw = some_table(rng, [line.replace(",", separator) for line in good.REQUEST_LINES], separator)
    return Case(f"{kind}: {fault}", {name: raw}, {"file": name, **known})


# --------------------------------------------------------------------------- indexes and models


def _index(rng: random.Random, bases: Path) -> Case:
    way = rng.random()
    arguments = {"by": "file", "events": str(bases / "page" / "events.csv")}
    if way < 0.3:
        fault, raw = some_json(rng, rng.choice((good.CODES, good.TOKENS)))
        return Case(f"json: {fault}", {"codes.json": raw}, {**arguments, "file": "codes.json"})
    if way < 0.5:
        fault, raw = some_table(rng, good.CODE_LINES, ",")
        return Case(f"csv: {fault}", {"codes.csv": raw}, {**arguments, "file": "codes.csv"})
    if way < 0.6:
        records = [{"item_id": item, "code": code} for item, code in good.CODES.items()]
        fault, raw = some_objects(rng, records)
        return Case(f"jsonl: {fault}", {"codes.jsonl": raw}, {**arguments, "file": "codes.jsonl"})
    stored = sorted((bases / "index" / "index").iterdir())
    file = rng.choice([path for path in stored if path.suffix == ".json"] * 3 + stored)
    fault, content = _file(rng, file)
    return Case(f"{file.name}: {fault}", {f"index/{file.name}": content}, {"by": "folder"}, "index")


def _file(rng: random.Random, path: Path) -> tuple[str, Content]:
    """Mutate a file of a folder: its type, its bytes, or a value of JSON or YAML."""
    if rng.random() < 0.08:
        kind = _path_kind(rng)
        return f"is {kind}", kind
    raw = path.read_bytes()
    if path.suffix == ".json":
        return some_json(rng, json.loads(raw))
    if path.suffix == ".yaml":
        return some_page(rng, yaml.safe_load(raw))
    if path.suffix == ".safetensors" and rng.random() < 0.5:
        return _tensors(rng, raw)
    return some_bytes(rng, raw)


def _tensors(rng: random.Random, raw: bytes) -> tuple[str, bytes]:
    """Mutate the JSON header of a safetensors file."""
    size = int.from_bytes(raw[:8], "little")
    if rng.random() < 0.2:
        wrong = rng.choice((0, 1, size - 1, size + 1, 2**40, 2**64 - 1))
        return f"its header has {wrong} bytes", wrong.to_bytes(8, "little") + raw[8:]
    fault, header = some_value(rng, json.loads(raw[8 : 8 + size]), tuple(odd for odd in ODD if odd != "\ud800"))
    content = json_bytes(header)
    return f"header: {fault}", len(content).to_bytes(8, "little") + content + raw[8 + size :]


def _model(rng: random.Random, bases: Path) -> Case:
    files = sorted(path for path in (bases / "model" / "model").iterdir())
    small = [path for path in files if path.suffix in (".json", ".jinja")]
    file = rng.choice(
        files if rng.random() < 0.1 else small + [path for path in small if path.name == "config.json"] * 3
    )
    weights = {"weights": rng.random() < 0.3 or file.suffix == ".safetensors"}
    if file.suffix == ".jinja":
        source = rng.choice(good.SOURCES)
        replace = rng.random() < 0.5
        raw = (b"" if replace else file.read_bytes()) + source.encode("utf-8", "surrogatepass")
        return Case(f"{file.name}: {source[:40]!r}", {f"model/{file.name}": raw}, weights, "model")
    fault, content = _file(rng, file)
    return Case(f"{file.name}: {fault}", {f"model/{file.name}": content}, weights, "model")


# --------------------------------------------------------------------------- runs and servers

# Files of a run, the calls that read them, and files that must be removed so that they are read.
_CALLS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("results.json", ("report", "report", "audit", "audit", "export", "again"), ()),
    ("audit.json", ("report",), ()),
    ("recipe.yaml", ("audit", "export", "open", "load", "again"), ()),
    ("train.json", ("export", "open", "report", "again"), ()),
    ("predictions.parquet", ("report", "audit"), ()),
    ("merged/*", ("open", "weights", "export"), ()),
    ("adapter/*", ("export", "again"), ()),
    ("rows/*.json", ("again",), ()),
    ("candidates/*", ("audit", "again"), ()),
    ("*-baselines.json", ("audit",), ()),
    ("fusions.json", ("load", "again"), ()),
    ("items.parquet", ("load", "again"), ()),
    ("answers.sqlite", ("again",), ("rows",)),
    ("checkpoints/*/*", ("train",), ("train.json", "merged", "adapter")),
)
_OFTEN = 5  # the first entries are read by most calls, and drawn more often


def _run(rng: random.Random, bases: Path) -> Case:
    home = bases / "run" / "run"
    pattern, calls, deleted = rng.choice(_CALLS[:_OFTEN] * 2 + _CALLS)
    files = sorted(path for path in home.glob(pattern) if path.is_file())
    if not files:
        return _run(rng, bases)
    file, by = rng.choice(files), rng.choice(calls)
    name = str(file.relative_to(home))
    fault, content = _file(rng, file)
    removed: dict[str, Content] = {f"run/{name}": "nothing" for name in deleted}
    return Case(f"{by}, {name}: {fault}", {**removed, f"run/{name}": content}, {"by": by, "overrides": []}, "run")


_CHATS = {"models": good.MODELS, "chat": good.CHAT, "completions": None}


def _server(rng: random.Random, bases: Path) -> Case:
    route = rng.choice(("chat", "chat", "chat", "chat", "models"))
    after = rng.choice((0, 0, 1, 3, 4, 5))
    status, headers = 200, {"Content-Type": "application/json"}
    way = rng.random()
    if way < 0.75:
        fault, body = some_json(rng, _CHATS[route])
    elif way < 0.9:
        status = rng.choice((100, 204, 206, 301, 302, 307, 400, 401, 402, 403, 404, 408, 413, 429, 500, 502, 503, 599))
        fault, body = some_json(rng, rng.choice(good.REFUSALS))
        name = rng.choice(("Retry-After", "Location", "Content-Type"))
        headers[name] = rng.choice(
            ("-1", "x", "1e999", "9" * 40, "http://127.0.0.1:9/", "/", "Thu, 99 Foo 2024", "nan")
        )
        fault = f"{status}, {name} {headers[name][:20]}: {fault}"
    else:
        body = json_bytes(_CHATS[route])
        headers |= rng.choice(
            (
                {"Content-Encoding": "gzip"},
                {"Content-Encoding": "br"},
                {"Content-Encoding": "nonsense"},
                {"Content-Length": "5"},
                {"Content-Length": "-1"},
                {"Content-Length": "x"},
                {"Content-Length": "999999"},
                {"Content-Length": "", "Transfer-Encoding": "chunked"},
                {"Content-Type": "text/html; charset=nonsense"},
                {"X-Long": "y" * 70_000},
            )
        )
        fault = f"headers {str(headers)[:60]}"
    arguments = {"good": _CHATS, "route": route, "after": after, "status": status, "headers": headers}
    return Case(f"{route} after {after}: {fault}", {"answer": body}, arguments)


_SOUND = {"route": "", "after": 0, "status": 200, "headers": {}}
_EXTERNAL = Case("", {"codes.csv": good.CODE_FILE}, {"by": "file", "file": "codes.csv", "events": "events.csv"})
_BOOK = Case("", {"book.xlsx": sheets.sound(good.EVENT_LINES)}, {"by": "init", "file": "book.xlsx"})
_RUNS = tuple(
    Case("", {}, {"by": by, "overrides": []}, "run")
    for by in ("report", "audit", "weights", "load", "export", "train", "again")
)
SURFACES: dict[str, Surface] = {
    "recipes": Surface((Case("", {"page.yaml": _yaml(good.RECIPES[0])}),), _recipe, 400),
    "suites": Surface((Case("", {"page.yaml": _yaml(good.SUITES[0])}),), _suite, 200),
    "templates": Surface((Case("", {"prompts/rating/spoiled.yaml": _yaml(good.TEMPLATE)}),), _template, 300),
    "tables": Surface((Case("", {}, {"by": "init", "file": "events.csv"}),), _table, 300),
    "spreadsheets": Surface((_BOOK,), _spreadsheet, 300),
    "requests": Surface((Case("", {"requests.jsonl": good.REQUEST_FILE}, {"file": "requests.jsonl"}),), _request, 300),
    "indexes": Surface((Case("", {}, {"by": "folder"}, "index"), _EXTERNAL), _index, 300),
    "model folders": Surface((Case("", {}, {"weights": True}, "model"),), _model, 250),
    "run folders": Surface(_RUNS, _run, 300),
    "server answers": Surface((Case("", {"answer": b""}, {"good": _CHATS, **_SOUND}),), _server, 200),
}
