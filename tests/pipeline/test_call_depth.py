"""The way from `llmrec run` to a model: at most ten functions of llmrec, so that a traceback can be read."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmrec.backends.fake import FakeBackend
from llmrec.cli.main import app

pytest.importorskip("torch", reason="the train extra is not installed")

MOST = 10
RUN = (
    *("run", "recipes/movielens-100k/four-tasks.yaml", "reviews=null", "data={source: made-reviews, noun: products}"),
    "tasks={sequential: {templates: [continue-list]}, rating: {strategies: [parsed]}}",
)


def frames() -> list[str]:
    """Return the functions of llmrec from the command on, the outermost first."""
    called = [
        f"{frame.frame.f_globals['__name__']}.{frame.function}"
        for frame in reversed(inspect.stack())
        if str(frame.frame.f_globals.get("__name__", "")).startswith("llmrec")
    ]
    return called[called.index("llmrec.cli.run.run") :]


def ran(folder: Path, model: Path, backend: str) -> None:
    settings = f"eval={{arms: [zero-shot], users: 12, bootstrap: 20, backend: {backend}, candidates: {{count: 6}}}}"
    found = CliRunner().invoke(app, [*RUN, f"model.name={model}", settings, "--out", str(folder)])
    assert found.exit_code == 0, found.output


@pytest.mark.parametrize("verb", ["score", "generate"])
def test_a_backend_is_near(verb: str, tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    asked = getattr(FakeBackend, verb)

    def asking(*args: Any, **options: Any) -> Any:
        seen.append(frames())
        return asked(*args, **options)

    monkeypatch.setattr(FakeBackend, verb, asking)
    ran(tmp_path / "run", llama_folder, "fake")
    assert seen and max(map(len, seen)) < MOST, max(seen, key=len)


@pytest.mark.slow
def test_a_forward_pass_is_near(tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="the train extra is not installed")
    seen: list[list[str]] = []
    forward = transformers.LlamaModel.forward

    def passing(*args: Any, **options: Any) -> Any:
        seen.append(frames())
        return forward(*args, **options)

    monkeypatch.setattr(transformers.LlamaModel, "forward", passing)
    ran(tmp_path / "run", llama_folder, "hf")
    assert seen and min(map(len, seen)) <= MOST, min(seen, key=len)
