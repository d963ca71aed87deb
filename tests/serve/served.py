"""A service for tests: a toy model in an engine process behind uvicorn, with and without keys."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx
from pydantic import TypeAdapter

from llmrec.serve.app import make_app
from llmrec.serve.gates import Auth
from llmrec.serve.keys import Keys, create_key
from llmrec.serve.mcp import mount_mcp
from llmrec.serve.options import ServeOptions
from llmrec.serve.run import make_service
from llmrec.serve.schema import Failed
from llmrec.serve.server import make_server
from llmrec.serve.service import Service
from tests.answer.rank_cases import toy_run

# Seconds; far more than an engine needs on a busy machine.
_PATIENCE = 300.0


@dataclass(frozen=True, kw_only=True)
class Served:
    """A service that runs.

    Attributes:
        url: Address without keys.
        keyed_url: Address of the same service with API keys.
        key: A key.
        admin_key: A key that may change the catalogue and erase users.
        service: The service behind both.
        run: The run folder.
    """

    url: str
    keyed_url: str
    key: str
    admin_key: str
    service: Service
    run: Path

    def bearer(self, *, admin: bool = False) -> dict[str, str]:
        """Return headers with a key."""
        return {"Authorization": f"Bearer {self.admin_key if admin else self.key}"}


class Unmanaged:
    """A service that another application starts and closes."""

    def __init__(self, service: Any) -> None:
        self._service = service

    def __getattr__(self, name: str) -> Any:
        return getattr(self._service, name)

    def start(self) -> None:
        pass

    async def close(self) -> None:
        pass


@contextmanager
def listening(*apps: Any, **limits: Any) -> Iterator[list[str]]:
    """Serve applications on free ports from one event loop in a thread; yields their addresses."""
    servers = [make_server(app, **limits) for app in apps]

    async def serve() -> None:
        await asyncio.gather(*(server.serve() for server in servers))

    thread = threading.Thread(target=asyncio.run, args=(serve(),), name="served")
    thread.start()
    try:
        while not all(server.started for server in servers):
            assert thread.is_alive(), "uvicorn did not start"
            time.sleep(0.01)
        ports = [server.servers[0].sockets[0].getsockname()[1] for server in servers]
        yield [f"http://127.0.0.1:{port}" for port in ports]
    finally:
        for server in servers:
            server.should_exit = True
        thread.join()


def until(condition: Callable[[], bool], what: str = "", pause: float = 0.01) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(pause)


def wait_ready(url: str) -> None:
    """Wait until the engine is ready."""
    until(lambda: httpx.get(f"{url}/ready").status_code == 200, f"{url} is not ready", pause=0.1)


def failure(answer: httpx.Response, status: int | None = None) -> dict[str, Any]:
    """Return the error of a response, and check its form."""
    assert status in (None, answer.status_code), answer.text
    assert answer.headers["content-type"] == "application/json"
    error = TypeAdapter(Failed).validate_json(answer.content).error
    assert set(answer.json()) == {"error"} and error.kind and error.message
    return error.model_dump()


@contextmanager
def serving(model: Path, folder: Path) -> Iterator[Served]:
    """Start a service over a toy run, with MCP, and wait until it answers."""
    run = toy_run(model, folder / "run")
    service = make_service(ServeOptions(model=str(run), backend="hf", dtype="float32", batch=4))
    file = folder / "keys.json"
    key, admin = create_key(file, "shop"), create_key(file, "boss", admin=True)
    auths = (Auth(), Auth(Keys.read(file)))
    # Only the first starts and closes the service.
    services = (service, cast(Service, Unmanaged(service)))
    apps = []
    for each, auth in zip(services, auths, strict=True):
        apps.append(make_app(each, auth))
        mount_mcp(apps[-1], each)
    with listening(*apps) as (url, keyed):
        wait_ready(url)
        yield Served(url=url, keyed_url=keyed, key=key, admin_key=admin, service=service, run=run)
