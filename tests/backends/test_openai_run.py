"""A recipe with a server, from its settings to its results; and the API key, which is only sent in its header."""

from __future__ import annotations

import json
import logging
import sqlite3
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmrec.backends.encode import Encoder
from llmrec.backends.server.backend import OpenAIBackend
from llmrec.errors import BackendError, EngineFailure, ErrorKind, RecipeError
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import EvalSection, Recipe, ServerSection
from tests.conftest import make_tokenizer
from tests.facts import Facts, raises
from tests.servers.client import question, section
from tests.servers.faulty import Behaviour, FaultyServer, running

SECRET = "sk-proj-Zx81QmW0pT7v"
SMALL = (
    "eval.fusion={}",
    "data={source: made-reviews, noun: products}",
    "reviews=null",
    "model.dtype=float32",
    "tasks.rating.users=null",
    "tasks.rating.strategies=[expected, parsed]",
    "tasks.sequential.users=null",
    "tasks.direct=null",
    "tasks.explanation=null",
    "eval.users=6",
    "eval.candidates.count=5",
    "eval.bootstrap=50",
    "eval.arms=[zero-shot]",
    "eval.backend=openai",
)


def recipe(folder: Path, url: str, *more: str) -> Recipe:
    server = f"eval.server={{url: '{url}', model: films, key_env: FILMS_KEY, timeout: 5, attempts: 3, backoff: 0.01}}"
    return load_recipe("recipes/movielens-100k/four-tasks.yaml", [f"model.name={folder}", *SMALL, server, *more])


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    tokenizer = make_tokenizer()
    with running(Behaviour(key=SECRET, count=lambda text: len(tokenizer.encode(text)))) as server:
        yield server


@pytest.mark.parametrize(
    ("override", "kind", "key", "says"),
    [
        ("{model: m, url: 'https://user:%s@host/v1'}", "contradiction", "url", "without user, password or parameters"),
        ("{model: m, url: 'https://host/v1?key=%s'}", "contradiction", "url", "without user, password or parameters"),
        ("{model: m, url: 'ftp://host/%s'}", "contradiction", "url", "http://host:port/v1"),
        ("{model: m, key_env: %s}", "contradiction", "key_env", "such as OPENAI_API_KEY"),
        ("{model: m, key: %s}", "unknown-key", "key", "did you mean 'key_env'"),
        ("{model: m, extra: {a: [{b: {auth_Key: %s}}]}}", "contradiction", "extra", "'auth_Key'"),
        ("{model: m, extra: {Authorization: %s}}", "contradiction", "extra", "'Authorization'"),
        ("{model: m, extra: {client_secret: %s}}", "contradiction", "extra", "'client_secret'"),
        ("{model: m, extra: {passWord: %s}}", "contradiction", "extra", "'passWord'"),
        ("{model: m, timeout: %s}", "bad-value", "timeout", "number"),
    ],
)
def test_rejects_misplaced_key_without_repeating_it(override: str, kind: ErrorKind, key: str, says: str) -> None:
    for changes in (f"eval.server={override % SECRET}", f"eval={{backend: openai, server: {override % SECRET}}}"):
        with raises(RecipeError, Facts(kind, column=f"eval.server.{key}", says=says)) as caught:
            load_recipe("recipes/movielens-100k/four-tasks.yaml", [*SMALL, changes])
        assert SECRET not in str(caught.value)


def test_rejects_reserved_extra_keys() -> None:
    for name in ("model", "messages", "prompt", "stream", "n", "stop", "logprobs"):
        with pytest.raises(ValueError, match=f"'{name}' cannot be set in a recipe"):
            ServerSection(model="m", extra={name: 1})


@pytest.mark.parametrize(
    ("overrides", "key", "says"),
    [
        (["eval.backend=openai"], "eval.server", "such as server: {url: 'http://127.0.0.1:8000/v1', model: films}"),
        (["eval.server={model: m}", "eval.backend=hf"], "eval.server", "eval.backend=openai"),
        (["eval.server={model: m}", "eval.arms=[tuned]"], "eval.arms", "arms: [zero-shot]"),
        (["eval.server={model: m}", "eval.scorer=hf"], "eval.scorer", ()),
        (["eval.server={model: m, max_cost: 1}"], "eval.server.max_cost", "eval.server.price_in and price_out"),
    ],
)
def test_rejects_contradicting_sections(overrides: list[str], key: str, says: str | tuple[str, ...]) -> None:
    with raises(RecipeError, Facts("contradiction", column=key, says=says)):
        load_recipe("recipes/movielens-100k/four-tasks.yaml", [*SMALL, *overrides])


def test_settings_that_change_answers() -> None:
    one = ServerSection(model="m")
    other = ServerSection(model="m", url=one.url + "/", concurrency=2, timeout=1, max_tokens_budget=9)
    assert one.answering() == other.answering()
    options = ({"url": "http://b/v1"}, {"model": "n"}, {"chat": "chat"}, {"thinking_tokens": 9}, {"extra": {"a": 1}})
    for changed in options:
        assert ServerSection(**({"model": "m"} | changed)).answering() != one.answering()  # type: ignore[arg-type]
    assert EvalSection().server is None


def test_the_variable_of_the_key_must_be_set(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "", "  "):
        monkeypatch.delenv("FILMS_KEY", raising=False)
        if value is not None:
            monkeypatch.setenv("FILMS_KEY", value)
        with raises(BackendError, Facts("missing-value", column="eval.server.key_env", says="FILMS_KEY is not set")):
            OpenAIBackend(section(server.url, key_env="FILMS_KEY"))
    monkeypatch.setenv("FILMS_KEY", SECRET + "\nX-Other: 1")
    with raises(BackendError, Facts("bad-value", column="eval.server.key_env", says="FILMS_KEY")) as caught:
        OpenAIBackend(section(server.url, key_env="FILMS_KEY"))
    assert SECRET not in str(caught.value)


def test_messages_and_logs_do_not_contain_the_key(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("FILMS_KEY", SECRET + "-old")
    with raises(
        BackendError,
        Facts("failed", f"{server.url}/chat/completions", says=("status 401", "Bearer ***", "eval.server.key_env")),
    ) as caught:
        OpenAIBackend(section(server.url, key_env="FILMS_KEY"))
    assert caught.value.__cause__ is None
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    monkeypatch.setenv("FILMS_KEY", SECRET)
    backend = OpenAIBackend(section(server.url, key_env="FILMS_KEY"))
    assert backend.generate([question("a")], max_tokens=4)
    backend.close()
    assert SECRET not in caplog.text
    assert SECRET not in repr(backend.wire) + repr(backend.wire._client.headers)


def test_run_with_a_server(
    server: FaultyServer, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", reason="the train extra is not installed")
    from llmrec.pipeline import run as pipeline

    monkeypatch.setenv("FILMS_KEY", SECRET)
    recipe_ = recipe(llama_folder, server.url)
    done = pipeline.run(recipe_, tmp_path / "run", quiet=True)
    rows = {row["predictor"]: row for row in done.results["rows"] if row["arm"] == "zero-shot"}
    assert rows["expected"]["engine"] == "openai:one-token"
    assert rows["parsed"]["engine"] == "openai:generate"
    assert rows["likelihood"]["engine"] == "openai:echo"
    assert rows["parsed"]["parse_rate"] == 1.0
    assert done.results["model"] == {"name": "films", "folder": server.url, "dtype": "as served"}
    # No file of the run contains the key: answers, recipe, results, report.
    files = [file for file in done.folder.rglob("*") if file.is_file()]
    assert len(files) > 8 and all(SECRET.encode() not in file.read_bytes() for file in files)
    usage = sqlite3.connect(done.folder / "answers.sqlite").execute("SELECT * FROM spent").fetchall()
    assert usage[0][0] == f"{server.url} films" and usage[0][1] > 1000

    # A second run sends no requests: neither for finished rows, nor for stored answers of deleted rows.
    requests = len(server.bodies)
    for row in (done.folder / "rows").glob("*zero-shot*"):
        row.unlink()
    monkeypatch.delenv("FILMS_KEY")
    again = pipeline.run(recipe_, tmp_path / "run", quiet=True)
    assert len(server.bodies) == requests
    assert [row["metrics"] for row in again.results["rows"]] == [row["metrics"] for row in done.results["rows"]]


def test_run_with_an_unreachable_server_keeps_the_baselines(llama_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the train extra is not installed")
    from llmrec.pipeline import run as pipeline

    url = "http://127.0.0.1:9/v1"
    gone = f"eval.server={{url: '{url}', model: films, attempts: 1}}"
    with raises(EngineFailure, Facts("unreachable", says=(url, "models were not evaluated", "index.html"))):
        pipeline.run(recipe(llama_folder, url, gone), tmp_path / "run", quiet=True)
    results = json.loads((tmp_path / "run" / "results.json").read_bytes())
    assert {row["arm"] for row in results["rows"]} == {"baseline"}
    assert {row["arm"] for row in results["unevaluated"]} == {"zero-shot"}


def test_server_with_a_leading_token_has_the_same_tokenizer() -> None:
    encoder = Encoder(make_tokenizer(), max_length=512)
    with running(Behaviour(count=lambda text: 1 + len(encoder.tokenizer.encode(text)))) as server_:
        backend = OpenAIBackend(section(server_.url), encoder)
        backend.close()
        assert backend.offers.exact, "a server may add a first token to a text"
