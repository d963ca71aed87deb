"""From `llmrec run` to a model: at most ten functions of llmrec, for short tracebacks."""

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
    """Return the functions of llmrec on the stack, from the command on."""
    calls = [
        f"{frame.frame.f_globals['__name__']}.{frame.function}"
        for frame in reversed(inspect.stack())
        if str(frame.frame.f_globals.get("__name__", "")).startswith("llmrec")
    ]
    return calls[calls.index("llmrec.cli.run.run") :]


def run(folder: Path, model: Path, backend: str) -> None:
    settings = f"eval={{arms: [zero-shot], users: 12, bootstrap: 20, backend: {backend}, candidates: {{count: 6}}}}"
    result = CliRunner().invoke(app, [*RUN, f"model.name={model}", settings, "--out", str(folder)])
    assert result.exit_code == 0, result.output


def record(owner: Any, method: str, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return a list to which each call of a method adds its stack."""
    stacks: list[list[str]] = []
    original = getattr(owner, method)

    def recorded(*args: Any, **options: Any) -> Any:
        stacks.append(frames())
        return original(*args, **options)

    monkeypatch.setattr(owner, method, recorded)
    return stacks


def test_call_depth_of_backend(tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored, generated = (record(FakeBackend, method, monkeypatch) for method in ("score", "generate"))
    run(tmp_path / "run", llama_folder, "fake")
    assert scored and generated
    deepest = max([*scored, *generated], key=len)
    assert len(deepest) < MOST, deepest


@pytest.mark.slow
def test_call_depth_of_forward_pass(tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="the train extra is not installed")
    stacks = record(transformers.LlamaModel, "forward", monkeypatch)
    run(tmp_path / "run", llama_folder, "hf")
    assert stacks and min(map(len, stacks)) <= MOST, min(stacks, key=len)
