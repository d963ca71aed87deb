"""The functions that a user calls, by surface, in this checkout of llmrec and in older ones with other names."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from inspect import signature
from io import StringIO
from pathlib import Path
from typing import Any

Given = Mapping[str, Any]


@dataclass(frozen=True)
class Lines:
    """Some lines of a file were rejected, and the others read.

    Attributes:
        said: The first error.
        placed: Whether every error names its line.
    """

    said: str
    placed: bool


def named(*places: str) -> Any:
    """Return the first existing function of some names ``module:name``."""
    for place in places:
        module, _, name = place.partition(":")
        try:
            return getattr(import_module(module), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise LookupError(places)


def _schema(name: str) -> Any:
    return named(f"llmrec.recipe.schema:{name}", f"llmrec.recipe:{name}")


def _load_recipe(page: Path, overrides: list[str]) -> Any:
    return named("llmrec.recipe.load:load_recipe", "llmrec.recipe_file:load_recipe")(str(page), overrides)


def _build_study(recipe: Any) -> Any:
    return named("llmrec.pipeline.study:build_study", "llmrec.build.study:build_study")(recipe)


def recipe(folder: Path, given: Given) -> None:
    """``llmrec check`` of a recipe."""
    loaded = _load_recipe(folder / "page.yaml", given.get("overrides", []))
    named("llmrec.pipeline.preflight:checked_study", "llmrec.build.study:build_study")(loaded)


def suite(folder: Path, given: Given) -> None:
    """``llmrec check`` of a suite or a benchmark; in older checkouts, loading it as ``eval`` does."""
    page = str(folder / "page.yaml")
    try:
        check = named("llmrec.cli.check:check")
    except LookupError:
        kind = named("llmrec.recipe_file:kind_of_page")(page)
        named(f"llmrec.recipe_file:load_{kind}")(page, given.get("overrides", []))
    else:
        options = named("llmrec.cli.check:CheckOptions")
        check(options(recipe=page, overrides=tuple(given.get("overrides", ()))))


_EVENTS = [{"title": "Heat", "rating": "4", "item_id": "i1", "fields": [{"name": "genre", "value": "Drama"}]}] * 3
_VALUES = {
    **{"noun": "films", "scale_low": "1", "scale_high": "5", "rating": "4", "answer": "yes", "user_id": "u1"},
    **{"item": _EVENTS[0], "item_id": "i1", "fields": _EVENTS[0]["fields"], "history": _EVENTS, "n": 3, "want": 5},
    **{"profile": [{"name": "age", "value": "30"}], "candidates": _EVENTS, "liked": _EVENTS, "disliked": []},
}


def template(folder: Path, given: Given) -> None:
    """Read a family's templates with an additional one, and render it."""
    own = _shipped()
    load = named("llmrec.prompts.template:load_templates", "llmrec.prompts:load_templates")
    for name, each in load("rating", folder / "prompts").items():
        if name not in own:
            each.turns(_VALUES)
            each.step(_VALUES)


@cache
def _shipped() -> frozenset[str]:
    return frozenset(named("llmrec.prompts.template:load_templates", "llmrec.prompts:load_templates")("rating"))


def table(folder: Path, given: Given) -> None:
    """``llmrec init`` of a table, or reading it as a recipe's data."""
    if given["by"] == "init":
        init = named("llmrec.start.init:init", "llmrec.build.init:init")
        # Data statistics take seconds and read nothing new.
        brief = {"measure": False} if "measure" in signature(init).parameters else {}
        init(str(folder / given["file"]), out=folder / "made.yaml", name="mine", force=True, backend="hf", **brief)
        return
    load = named("llmrec.data.sets.table:load", "llmrec.data.sets:load")
    load(_schema("DataSection")(**_resolved(folder, given["section"])), seed=0)


def _resolved(folder: Path, section: Given) -> dict[str, Any]:
    return {key: str(folder / value) if key in ("path", "items") else value for key, value in section.items()}


def requests(folder: Path, given: Given) -> Lines | None:
    """Read requests as ``llmrec rank`` does."""
    opened = named("llmrec.data.request_file:open_requests", "llmrec.data.request_files:open_requests")
    read = named("llmrec.data.requests:read_request")
    error = named("llmrec.errors:DataError")
    item = named("llmrec.types:Item")
    known = {f"i{n}": item(item_id=f"i{n}", title=f"Film {n}") for n in range(15)} if given.get("known") else None
    refused: list[tuple[int, str]] = []
    for number, raw in enumerate(opened(folder / given["file"]), start=1):
        if raw.error or raw.record is None:
            refused.append((raw.line, raw.error))
            continue
        try:
            read(raw.record, number, known)
        except error as problem:
            refused.append((raw.line, str(problem)))
    return Lines(refused[0][1], all(line > 0 for line, _ in refused)) if refused else None


@cache
def _split(events: Path) -> Any:
    data = _schema("DataSection")(source="table", path=str(events))
    return named("llmrec.pipeline.study:load_split", "llmrec.build.study:load_split")(data, 0)


def index(folder: Path, given: Given) -> None:
    """Read codes from a file, or an index that `llmrec index` wrote, and write and read every code of it."""
    if given["by"] == "file":
        build = named("llmrec.index.table:build", "llmrec.index.index:build")
        section = _schema("IndexSection")(scheme="external", path=str(folder / given["file"]))
        made = build(section, _split(Path(given["events"])), seed=0)
    else:
        made = named("llmrec.index.table:ItemIndex", "llmrec.index.index:ItemIndex").load(folder / "index")
    for item in made.codes:
        made.decode(made.encode(item))
    hash(made.digest)


def model(folder: Path, given: Given) -> None:
    """Open a model folder as ``llmrec rank`` does."""
    _open_model(folder / "model", weights=bool(given.get("weights")))


def _open_model(folder: Path, *, weights: bool) -> None:
    section = _schema("ModelSection")(name=str(folder), dtype="float32")
    types = "llmrec.types"
    message, segment, prompt = (named(f"{types}:{name}") for name in ("Message", "Segment", "Prompt"))
    found = named("llmrec.pipeline.bundle:read", "llmrec.build.bundle:read")(str(folder))
    loads = ("llmrec.models.load", "llmrec.backends.models")
    tokenizer = named(*(f"{place}:load_tokenizer" for place in loads))(found.folder, section)
    encoder = named("llmrec.backends.encode:Encoder")(tokenizer, max_length=64)
    encoder.prompt(prompt(messages=(message("user", (segment("text", "Heat"),)),)))
    named(*(f"{place}:load_config" for place in loads))(found.folder, section)
    try:
        check = named("llmrec.models.load:check_weights")
    except LookupError:
        check = None
    if check is not None:
        check(found.folder, section)
    if weights:
        named(*(f"{place}:load_model" for place in loads))(found.folder, section)


# --------------------------------------------------------------------------- runs


def make_run(folder: Path, given: Given) -> None:
    """Create a valid run with the tested checkout."""
    run = named("llmrec.pipeline.run:run", "llmrec.build.pipeline:run")
    run(_load_recipe(folder / "page.yaml", given["overrides"]), folder / "run")


def run(folder: Path, given: Given) -> None:
    """Open a run folder to report, audit, export, rank with or resume it."""
    home, by = folder / "run", given["by"]
    if by == "report":
        named("llmrec.pipeline.run:report", "llmrec.build.pipeline:report")(home)
    elif by == "audit":
        named("llmrec.pipeline.audit:audit", "llmrec.build.audit:audit")(home)
    elif by in ("open", "weights"):
        named("llmrec.pipeline.runs:open_run", "llmrec.build.finished:open_run")(home)
        _open_model(home, weights=by == "weights")
    elif by == "train":
        train = named("llmrec.pipeline.run:train", "llmrec.build.pipeline:train")
        train(_load_recipe(folder / "page.yaml", given["overrides"]), home)
    elif by == "load":
        _load(home)
    elif by == "again":
        again = named("llmrec.pipeline.run:run", "llmrec.build.pipeline:run")
        again(_load_recipe(folder / "page.yaml", given["overrides"]), home, may_train=False)
    else:
        export = named("llmrec.exports.export:export")
        export(home, folder / "out", check_users=0, licence="mit", base_licence="mit", quiet=True)


def _load(home: Path) -> None:
    """Open a run and rank with its baselines; in older checkouts, open its models."""
    try:
        load = named("llmrec.answer.loaded:load")
    except LookupError:
        named("llmrec.build.bundle:read")(str(home))
        return
    with load(str(home), models=("popularity",)) as rec:
        rec.rank(history=["i1", "i2"], k=3)


# --------------------------------------------------------------------------- a server

_ROUTES = {"/models": "models", "/completions": "completions", "/chat/completions": "chat"}


@contextmanager
def _serving(good: Mapping[str, Any], spoiled: Given, body: bytes) -> Iterator[str]:
    """Serve valid responses, except for one route from a given call on."""
    asked = dict.fromkeys(_ROUTES.values(), 0)

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
            asked[route] += 1
            if route == spoiled["route"] and asked[route] > spoiled["after"]:
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


def server(folder: Path, given: Given) -> None:
    """Request texts and scores from a server, and store the responses, as a run does."""
    section, message, segment, prompt = (
        _schema("ServerSection"),
        *(named(f"llmrec.types:{name}") for name in ("Message", "Segment", "Prompt")),
    )
    client = named("llmrec.backends.server.backend:OpenAIBackend", "llmrec.backends.openai:OpenAIBackend")
    store_of, cached, ledger = (
        named(f"llmrec.backends.cache:{name}") for name in ("AnswerStore", "CachedBackend", "StoredLedger")
    )
    limits = {"timeout": 1.0, "attempts": 2, "backoff": 0.01, "longest_wait": 0.02, "concurrency": 2}
    with _serving(given["good"], given, (folder / "answer").read_bytes()) as url:
        asked = section(url=url, model="films", **limits)
        store = store_of(folder / "answers.sqlite")
        started = []

        def start() -> Any:
            started.append(client(asked, ledger=ledger(store, "campaign")))
            return started[-1]

        backend = cached(store, asked.answering() | {"url": "the server"}, client, start)
        question = prompt(messages=(message("user", (segment("text", "Which film is next?"),)),))
        try:
            backend.generate([question], max_tokens=8)
            if "score" in started[-1].capabilities:
                backend.score([question], [["1", "2"]], closed=False)
        finally:
            backend.close()
            store.close()


CALLS: dict[str, Callable[[Path, Given], Lines | None]] = {
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


def quietly(surface: str, folder: Path, given: Given) -> Lines | None:
    """Make a call without its output."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return CALLS[surface](folder, given)
