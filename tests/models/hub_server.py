"""A model hub in a thread, from which models are fetched over real HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "1" * 40


class Hub:
    """What it has, and how it refuses.

    Attributes:
        address: Of the server.
        models: Name -> folder.
        refuse: Status that every request is answered with, if set.
        refuse_files: Status that requests for files are answered with, if set.
        code: Its ``X-Error-Code``.
        torn: Files that break off half-way.
        asked: Paths that were asked for.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.models: dict[str, Path] = {}
        self.refuse: int | None = None
        self.refuse_files: int | None = None
        self.code = ""
        self.torn: set[str] = set()
        self.asked: list[str] = []


@contextmanager
def serving() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._respond(body=False)

    def do_GET(self) -> None:
        self._respond(body=True)

    def _respond(self, *, body: bool) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(self.path.partition("?")[0])
        hub.asked.append(path)
        api, file = path.startswith("/api/models/"), "/resolve/" in path
        if hub.refuse is not None or (file and hub.refuse_files is not None):
            return self._answer(hub.refuse or hub.refuse_files or 0, {"error": "refused"}, {"X-Error-Code": hub.code})
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        folder = hub.models.get(name)
        if folder is None:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        rest = path.partition(name)[2]
        if api and rest.startswith("/tree/"):
            return self._answer(200, [_listed(each) for each in sorted(folder.iterdir())])
        if api:
            if rest and rest.rpartition("/")[2] not in ("main", COMMIT):
                return self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            files = [{"rfilename": each.name} for each in sorted(folder.iterdir())]
            return self._answer(200, {"id": name, "sha": COMMIT, "siblings": files, "tags": [], "private": False})
        return self._file(hub, folder / rest.rpartition("/")[2], body=body)

    def _file(self, hub: Hub, file: Path, *, body: bool) -> None:
        if not file.is_file():
            return self._answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.send_header("etag", f'"{sha1(content).hexdigest()}"')
        self.send_header("x-repo-commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if file.name in hub.torn else content)
        return None

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        written = json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"content-length": str(len(written))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(written)


def _listed(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"type": "file", "path": file.name, "size": len(content), "oid": sha1(content).hexdigest()}
