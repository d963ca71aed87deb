"""The functions that a user calls, for each surface."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from typing import Any

from llmrec.answer.loaded import load as load_run
from llmrec.backends.cache import AnswerStore, CachedBackend, StoredLedger
from llmrec.backends.encode import Encoder
from llmrec.backends.server.backend import OpenAIBackend
from llmrec.cli.check import CheckOptions, check
from llmrec.data.request_file import open_requests
from llmrec.data.requests import parse_request
from llmrec.data.sets.table import load_data
from llmrec.errors import DataError
from llmrec.exports.export import export
from llmrec.index import table as index_table
from llmrec.models.load import check_weights, load_config, load_model, load_tokenizer
from llmrec.pipeline import bundle, preflight
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.audit import audit
from llmrec.pipeline.runs import open_run
from llmrec.pipeline.study import load_split
from llmrec.prompts.template import load_templates
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import DataSection, IndexSection, ModelSection, ServerSection
from llmrec.start.init import write_recipe
from llmrec.types import Item, Message, Prompt, Segment

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Lines:
    """Outcome for a file of which some lines were rejected and the others were read.

    Attributes:
        error: The first error.
        placed: Whether every error message contains its line number.
    """

    error: str
    placed: bool


def recipe(folder: Path, arguments: Arguments) -> None:
    """``llmrec check`` of a recipe."""
    preflight.build_checked_study(load_recipe(str(folder / "page.yaml"), arguments.get("overrides", [])))


def suite(folder: Path, arguments: Arguments) -> None:
    """``llmrec check`` of a suite or a benchmark."""
    check(CheckOptions(recipe=str(folder / "page.yaml"), overrides=tuple(arguments.get("overrides", ()))))


_EVENTS = [{"title": "Heat", "rating": "4", "item_id": "i1", "fields": [{"name": "genre", "value": "Drama"}]}] * 3
_VALUES = {
    **{"noun": "films", "scale_low": "1", "scale_high": "5", "rating": "4", "answer": "yes", "user_id": "u1"},
    **{"item": _EVENTS[0], "item_id": "i1", "fields": _EVENTS[0]["fields"], "history": _EVENTS, "n": 3, "want": 5},
    **{"profile": [{"name": "age", "value": "30"}], "candidates": _EVENTS, "liked": _EVENTS, "disliked": []},
}


def template(folder: Path, arguments: Arguments) -> None:
    """Read a family's templates with an additional one, and render it."""
    shipped = _shipped()
    for name, loaded in load_templates("rating", folder / "prompts").items():
        if name not in shipped:
            loaded.turns(_VALUES)
            loaded.step(_VALUES)


@cache
def _shipped() -> frozenset[str]:
    return frozenset(load_templates("rating"))


def table(folder: Path, arguments: Arguments) -> None:
    """``llmrec init`` of a table, or reading it as a recipe's data."""
    if arguments["by"] == "init":
        write_recipe(str(folder / arguments["file"]), out=folder / "made.yaml", name="mine", force=True, backend="hf")
        return
    load_data(DataSection(**_resolved(folder, arguments["section"])), seed=0)


def _resolved(folder: Path, section: Arguments) -> dict[str, Any]:
    return {key: str(folder / value) if key in ("path", "items") else value for key, value in section.items()}


def requests(folder: Path, arguments: Arguments) -> Lines | None:
    """Read requests as ``llmrec rank`` does."""
    known = {f"i{n}": Item(item_id=f"i{n}", title=f"Film {n}") for n in range(15)} if arguments.get("known") else None
    refused: list[tuple[int, str]] = []
    for number, raw in enumerate(open_requests(folder / arguments["file"]), start=1):
        if raw.error or raw.record is None:
            refused.append((raw.line, raw.error))
            continue
        try:
            parse_request(raw.record, number, known)
        except DataError as problem:
            refused.append((raw.line, str(problem)))
    return Lines(refused[0][1], all(line > 0 for line, _ in refused)) if refused else None


@cache
def _split(events: Path) -> Any:
    return load_split(DataSection(source="table", path=str(events)), 0)


def index(folder: Path, arguments: Arguments) -> None:
    """Read codes from a file, or an index that `llmrec index` wrote, and write and read every code of it."""
    if arguments["by"] == "file":
        section = IndexSection(scheme="external", path=str(folder / arguments["file"]))
        item_index = index_table.build_item_index(section, _split(Path(arguments["events"])), seed=0)
    else:
        item_index = index_table.ItemIndex.load(folder / "index")
    for item in item_index.codes:
        item_index.decode(item_index.encode(item))
    hash(item_index.digest)


def model(folder: Path, arguments: Arguments) -> None:
    """Open a model folder as ``llmrec rank`` does."""
    _open_model(folder / "model", weights=bool(arguments.get("weights")))


def _open_model(folder: Path, *, weights: bool) -> None:
    section = ModelSection(name=str(folder), dtype="float32")
    opened = bundle.read(str(folder))
    encoder = Encoder(load_tokenizer(opened.folder, section), max_length=64)
    encoder.prompt(Prompt(messages=(Message("user", (Segment("text", "Heat"),)),)))
    load_config(opened.folder, section)
    check_weights(opened.folder, section)
    if weights:
        load_model(opened.folder, section)


# --------------------------------------------------------------------------- runs


def make_run(folder: Path, arguments: Arguments) -> None:
    """Create a valid run."""
    pipeline.run(load_recipe(str(folder / "page.yaml"), arguments["overrides"]), folder / "run")


def run(folder: Path, arguments: Arguments) -> None:
    """Open a run folder to report, audit, export, rank with or resume it."""
    home, by = folder / "run", arguments["by"]
    page = str(folder / "page.yaml")
    if by == "report":
        pipeline.report(home)
    elif by == "audit":
        audit(home)
    elif by in ("open", "weights"):
        open_run(home)
        _open_model(home, weights=by == "weights")
    elif by == "train":
        pipeline.train(load_recipe(page, arguments["overrides"]), home)
    elif by == "load":
        with load_run(str(home), models=("popularity",)) as rec:
            rec.rank(history=["i1", "i2"], k=3)
    elif by == "again":
        pipeline.run(load_recipe(page, arguments["overrides"]), home, may_train=False)
    else:
        export(home, folder / "out", check_users=0, licence="mit", base_licence="mit", quiet=True)


# --------------------------------------------------------------------------- a server

_ROUTES = {"/models": "models", "/completions": "completions", "/chat/completions": "chat"}


@contextmanager
def _serving(good: Mapping[str, Any], spoiled: Arguments, body: bytes) -> Iterator[str]:
    """Serve valid responses, except for one route from a given call on."""
    requests_by_route = dict.fromkeys(_ROUTES.values(), 0)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._answer()

        def _answer(self) -> None:
            route = next(
                (name for end, name in sorted(_ROUTES.items(), key=lambda e: -len(e[0])) if self.path.endswith(end)), ""
            )
            if not route or good[route] is None:
                self._send(404, {}, b'{"error": {"message": "no such route"}}')
                return
            requests_by_route[route] += 1
            if route == spoiled["route"] and requests_by_route[route] > spoiled["after"]:
                self._send(spoiled["status"], spoiled["headers"], body)
            else:
                self._send(200, {"Content-Type": "application/json"}, json.dumps(good[route]).encode())

        def _send(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
            self.close_connection = True
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), "Connection": "close", **headers}.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def server(folder: Path, arguments: Arguments) -> None:
    """Request texts and scores from a server, and store the responses, as a run does."""
    limits = {"timeout": 1.0, "attempts": 2, "backoff": 0.01, "longest_wait": 0.02, "concurrency": 2}
    with _serving(arguments["good"], arguments, (folder / "answer").read_bytes()) as url:
        section = ServerSection(url=url, model="films", **limits)
        store = AnswerStore(folder / "answers.sqlite")
        started: list[OpenAIBackend] = []

        def start() -> OpenAIBackend:
            started.append(OpenAIBackend(section, ledger=StoredLedger(store, "campaign")))
            return started[-1]

        backend = CachedBackend(store, section.answering() | {"url": "the server"}, OpenAIBackend, start)
        question = Prompt(messages=(Message("user", (Segment("text", "Which film is next?"),)),))
        try:
            backend.generate([question], max_tokens=8)
            if "score" in started[-1].capabilities:
                backend.score([question], [["1", "2"]], closed=False)
        finally:
            backend.close()
            store.close()


CALLS: dict[str, Callable[[Path, Arguments], Lines | None]] = {
    "recipes": recipe,
    "suites": suite,
    "templates": template,
    "tables": table,
    "spreadsheets": table,
    "requests": requests,
    "indexes": index,
    "model folders": model,
    "run folders": run,
    "server answers": server,
    "make run": make_run,
}


def quietly(surface: str, folder: Path, arguments: Arguments) -> Lines | None:
    """Make a call and suppress its output."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return CALLS[surface](folder, arguments)
