"""Engines that fail: another engine replaces them, or their rows are not evaluated."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmrec.answer.checks import with_resolved_engine
from llmrec.answer.language_model import LanguageModel
from llmrec.answer.opening import open_models
from llmrec.answer.options import RecommenderOptions
from llmrec.answer.rank.run import rank_file
from llmrec.backends.fake import FakeBackend
from llmrec.errors import EngineFailure
from llmrec.pipeline import engines
from llmrec.pipeline import run as pipeline
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Recipe
from llmrec.registry import BACKENDS, import_component
from llmrec.report.results import parse_results
from llmrec.report.table import csv_text
from llmrec.types import Prompt, Scores
from tests.answer.rank_cases import items_csv, jsonl, lines, options, records
from tests.facts import Facts, raises

pytest.importorskip("torch", reason="the train extra is not installed")

PAGE = """
name: failing
data: {source: made-reviews, noun: products}
tasks:
  direct: {strategies: [label, permutation], weight: 0, baselines: [random, popularity, item-knn, markov-1]}
  sequential: {weight: 0, baselines: [random, popularity, item-knn, markov-1]}
eval:
  {arms: [zero-shot], users: 6, batch: 4, bootstrap: 50, candidates: {count: 5}}
"""
# Rows of the two engines. On a CPU, transformers score titles whichever engine the recipe names.
VLLM_ROWS, HF_ROWS = 2, 1


class Working(FakeBackend):
    """Replaces vLLM."""

    name = "vllm"

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__()


class Failing(Working):
    """Does not start."""

    starts = 0

    def __init__(self, *args: object, **options: object) -> None:
        type(self).starts += 1
        message = "vLLM could not start: 0.1 GiB are free; set eval.backend=hf"
        raise EngineFailure(message, kind="exhausted", column="eval.backend")


class Dying(Working):
    """Answers one batch."""

    def score(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]], *, closed: bool = True
    ) -> list[Scores]:
        if getattr(self, "answered", False):
            raise EngineFailure("the vLLM engine died; run the same command again to continue", kind="failed")
        self.answered = True
        return super().score(prompts, candidates, closed=closed)


Use = Callable[[type[FakeBackend]], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Return a function that replaces vLLM by a class."""
    for module in ("llmrec.pipeline.engines", "llmrec.pipeline.preflight", "llmrec.answer.checks"):
        monkeypatch.setattr(f"{module}.is_installed", lambda name: True)
    monkeypatch.setattr(engines, "package_versions", lambda: {"llmrec": "0", "vllm": "0.32.0+cpu"})
    Failing.starts = 0

    def use(kind: type[FakeBackend]) -> None:
        def lookup(table: Any, name: str, what: str) -> Any:
            return kind if table is BACKENDS and name == "vllm" else import_component(table, name, what)

        monkeypatch.setattr(engines, "import_component", lookup)

    return use


@pytest.fixture(scope="module")
def page(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "failing.yaml"
    file.write_text(f"{PAGE}model: {{name: {llama_folder}, dtype: float32}}\n", encoding="utf-8")
    return file


def recipe(page: Path, *more: str) -> Recipe:
    return load_recipe(str(page), more)


@pytest.fixture(scope="module")
def by_transformers(page: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Return the metrics of a run with transformers."""
    done = pipeline.run(recipe(page, "eval.backend=hf"), tmp_path_factory.mktemp("hf") / "r", quiet=True)
    return [row["metrics"] for row in done.results["rows"]]


def engines_of(results: dict[str, Any]) -> dict[str, str]:
    rows = [row for row in results["rows"] if row["template"] is not None and "fusion" not in row]
    return {row["id"]: row["engine"].partition(":")[0] for row in rows}


def test_transformers_replace_engine_that_does_not_start(
    use: Use,
    page: Path,
    by_transformers: list[dict[str, float]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    use(Failing)
    with caplog.at_level(logging.WARNING, logger="llmrec"):
        done = pipeline.run(recipe(page), tmp_path / "r", quiet=True)
    assert set(engines_of(done.results).values()) == {"hf"} and "unevaluated" not in done.results
    (line,) = [record.getMessage() for record in caplog.records if "vLLM" in record.getMessage()]
    assert line.startswith("vLLM could not start: 0.1 GiB are free; using transformers instead, ")
    assert "twice as long" in line
    assert Failing.starts == 1
    # A second run reuses the rows, even if the engine starts now.
    use(Working)
    again = pipeline.run(recipe(page), tmp_path / "r", quiet=True)
    assert engines_of(again.results) == engines_of(done.results)
    assert [row["metrics"] for row in done.results["rows"]] == by_transformers


def test_rows_do_not_mix_answers_of_two_engines(
    use: Use, page: Path, by_transformers: list[dict[str, float]], tmp_path: Path
) -> None:
    use(Dying)
    done = pipeline.run(recipe(page), tmp_path / "r", quiet=True)
    assert set(engines_of(done.results).values()) == {"hf"}
    assert [row["metrics"] for row in done.results["rows"]] == by_transformers


def test_rows_of_requested_engine_are_marked_and_completed_later(use: Use, page: Path, tmp_path: Path) -> None:
    use(Failing)
    folder, chosen = tmp_path / "r", recipe(page, "eval.backend=vllm", "eval.fusion.model_users=20")
    with raises(
        EngineFailure,
        Facts(
            "exhausted",
            column="eval.backend",
            says=("0.1 GiB are free; set eval.backend=hf.", str(folder / "report" / "index.html"), "the same command"),
        ),
    ) as caught:
        pipeline.run(chosen, folder, quiet=True)
    assert Failing.starts == 1
    results = json.loads((folder / "results.json").read_bytes())
    missing = {row["id"]: row["reason"] for row in results["unevaluated"]}
    assert set(missing.values()) == {"vLLM could not start: 0.1 GiB are free"}
    # Ensembles with these rows are missing too.
    assert {name.split("/")[0] for name in missing} == {"direct"} and len(missing) > VLLM_ROWS
    assert set(engines_of(results).values()) == {"hf"} and len(engines_of(results)) == HF_ROWS
    assert f"{len(missing)} of {len(missing) + len(results['rows'])} models were not evaluated" in str(caught.value)
    assert "\n" not in str(caught.value)
    report = {file.suffix: file.read_text("utf-8") for file in (folder / "report").iterdir()}
    for text in report.values():
        assert text.count("not evaluated") >= len(missing)
    assert len(csv_text(parse_results(results)).splitlines()) == len(report[".csv"].splitlines())
    use(Working)
    done = pipeline.run(chosen, folder, quiet=True)
    assert "unevaluated" not in done.results
    answered = list(engines_of(done.results).values())
    assert (answered.count("hf"), len(answered)) == (HF_ROWS, HF_ROWS + VLLM_ROWS)
    assert missing.keys() <= {row["id"] for row in done.results["rows"]}


def test_baselines_are_reported_without_any_engine(
    use: Use, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(Failing)

    def full(*args: object, **options: object) -> None:
        raise EngineFailure("loading the model: memory is full; choose a smaller one", kind="exhausted")

    monkeypatch.setattr(engines, "load_model", full)
    with raises(EngineFailure, Facts("exhausted", says="memory is full; choose a smaller one.")):
        pipeline.run(recipe(page), tmp_path / "r", quiet=True)
    results = json.loads((tmp_path / "r" / "results.json").read_bytes())
    assert {row["arm"] for row in results["rows"]} == {"baseline"}
    assert {row["reason"] for row in results["unevaluated"]} == {"loading the model: memory is full"}


@pytest.mark.parametrize("kind", [Failing, Dying])
def test_recommender_uses_another_engine(kind: type[Working], use: Use, llama_folder: Path, tmp_path: Path) -> None:
    use(kind)
    ranking = options(llama_folder, jsonl(tmp_path / "in.jsonl", records(4)), tmp_path / "out.jsonl", strategy="label")
    ranking = replace(ranking, items=items_csv(tmp_path), batch=2)
    summary = rank_file(replace(ranking, backend="auto"))
    rank_file(replace(ranking, out=tmp_path / "hf.jsonl", backend="hf"))
    assert summary["engine"] == "hf"
    assert lines(tmp_path / "out.jsonl")[-1] == lines(tmp_path / "hf.jsonl")[-1]


def test_recommender_with_requested_engine_fails(use: Use, llama_folder: Path, tmp_path: Path) -> None:
    use(Failing)
    ranking = options(llama_folder, jsonl(tmp_path / "in.jsonl", records(4)), tmp_path / "out.jsonl", strategy="label")
    with raises(EngineFailure, Facts("exhausted", says="0.1 GiB are free")):
        rank_file(replace(ranking, items=items_csv(tmp_path), backend="vllm"))


def test_service_on_a_gpu_uses_transformers(
    use: Use, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(Failing)
    monkeypatch.setattr("llmrec.answer.checks.device", lambda model: "cuda")
    monkeypatch.setattr(engines, "_on_gpu", lambda model: True)
    monkeypatch.setattr(engines, "_device", lambda model: "a card")
    chosen = RecommenderOptions(model=str(llama_folder), items=items_csv(tmp_path), dtype="float32")
    models = open_models(with_resolved_engine(chosen), ())
    model = models.get(None)
    assert isinstance(model, LanguageModel)
    model.warm()
    assert (Failing.starts, model.described["engine"]) == (1, "hf")
    models.close()
    with raises(EngineFailure, Facts("exhausted", says="0.1 GiB are free")):
        models = open_models(with_resolved_engine(replace(chosen, backend="vllm")), ())
        model = models.get(None)
        assert isinstance(model, LanguageModel)
        model.warm()
