"""Runs a service: reads catalogue and users, opens the database, and listens until stopped."""

from __future__ import annotations

import gc
import json
import logging
import socket
from pathlib import Path
from typing import Any

from llmrec.answer.checks import check_recommender_options
from llmrec.answer.opening import describe_default_model
from llmrec.answer.rules import Rules
from llmrec.cli.console import say
from llmrec.errors import DataError, LlmrecError, require
from llmrec.recipe.pages import parse_yaml
from llmrec.serve.options import ServeOptions

STORE_FILE = "service.sqlite"
"""The store of a service, in its run folder."""
_LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
_MIN_BURST = 20
# The number of allocations between two searches for garbage.
_GARBAGE_THRESHOLD = 10_000


def serve(options: ServeOptions) -> None:
    """Serve until interrupted; pending requests are then still answered.

    Raises:
        LlmrecError: If an option, a file or the model cannot be used, or the port is taken.
    """
    for module in ("fastapi", "uvicorn", "prometheus_client", "fastapi_offline"):
        require(module, "serve")
    if options.mcp:
        require("mcp", "mcp")
    from llmrec.serve.app import make_app
    from llmrec.serve.gates import Auth
    from llmrec.serve.keys import Keys, RateLimit
    from llmrec.serve.server import make_server

    _check_exposed_host(options)
    listening = _open_socket(options)
    keys = None if options.keys is None else Keys.read(options.keys)
    limit = None if options.per_minute is None else RateLimit(options.per_minute, max(options.per_minute, _MIN_BURST))
    service = make_service(options)
    app = make_app(service, Auth(keys, limit), body_limit=options.body_limit)
    if options.mcp:
        from llmrec.serve.mcp import mount_mcp

        mount_mcp(app, service)
    if logging.getLogger("llmrec").level <= logging.WARNING:
        # Log a line per request, unless only errors are requested.
        logging.getLogger("llmrec.serve").setLevel(logging.INFO)
    host, port = listening.getsockname()[:2]
    url = f"http://{'localhost' if host in _LOOPBACK_HOSTS else host}:{port}"
    say(f"llmrec serves {options.model} at {url} (API documentation: {url}/docs)")
    say(describe_default_model(options.model, options.models))
    server = make_server(app, timeout=options.timeout)
    hopeless: list[LlmrecError] = []

    def end(error: LlmrecError) -> None:
        hopeless.append(error)
        server.should_exit = True

    service.engine.hopeless = end
    # Requests leave few reference cycles, and what is loaded stays: searching for garbage takes a tenth of their time.
    gc.freeze()
    gc.set_threshold(_GARBAGE_THRESHOLD)
    server.run(sockets=[listening])
    if hopeless:
        raise hopeless[0]


def make_service(options: ServeOptions) -> Any:
    """Create the service, without starting it."""
    from llmrec.answer.known import read_known_entities
    from llmrec.serve.service import STORE_WAIT_FRACTION, Service, Settings
    from llmrec.serve.store import ServiceStore

    model_options = options.recommender(batch=options.batch)
    check_recommender_options(model_options)
    where = options.store or _default_store_path(options.model)
    settings = Settings(
        options=model_options,
        models=options.models,
        rules=_read_rules(options.rules),
        window=options.window / 1000,
        batch=options.batch,
        room=options.room,
        patience=float(options.timeout),
    )
    return Service(
        settings,
        read_known_entities(options.model, options.items),
        ServiceStore.open(where, STORE_WAIT_FRACTION * options.timeout),
    )


def _default_store_path(model: str) -> str:
    folder = Path(model).expanduser()
    return str((folder if folder.is_dir() else Path()) / STORE_FILE)


def _check_exposed_host(options: ServeOptions) -> None:
    """Reject an address that other machines can reach, if no API keys are set."""
    if options.host not in _LOOPBACK_HOSTS and options.keys is None:
        raise DataError(
            f"--host {options.host} makes this service reachable from other machines, and without --keys anyone can "
            "use it and change its catalogue; create a key with `llmrec serve-key keys.json NAME`, and pass the file "
            "with --keys",
            kind="unsafe",
            column="--keys",
        )


def _open_socket(options: ServeOptions) -> socket.socket:
    """Return a listening socket, before anything is loaded."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((options.host, options.port))
    except OSError as error:
        listening.close()
        raise DataError(
            f"--host {options.host} --port {options.port}: {error.strerror}; choose another --port, or 0 for a free "
            "one",
            kind="busy",
            column="--port",
        ) from None
    return listening


def _read_rules(file: Path | None) -> Rules:
    """Read business rules from a file."""
    if file is None:
        return Rules()
    try:
        text = file.read_text(encoding="utf-8")
        result = json.loads(text) if file.suffix == ".json" else parse_yaml(text, file)[0]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--rules {file} cannot be read: {error}", kind="unreadable", at=file) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"--rules {file} is not JSON: {error}", kind="syntax", at=file) from None
    try:
        return Rules.read(result or {})
    except LlmrecError as error:
        raise DataError(f"{file}: {error}", kind=error.kind, at=file, column=error.column) from None
