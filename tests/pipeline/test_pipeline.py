"""The quickstart recipe end to end on a tiny random model: every stage, reuse and files."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

from llmrec.backends import fake
from llmrec.backends.fake import FakeBackend
from llmrec.cli.main import app
from llmrec.durable import parse_checked_json
from llmrec.errors import LlmrecError, RecipeError
from llmrec.pipeline import run as pipeline
from llmrec.pipeline import study
from llmrec.pipeline.engines import Engines
from llmrec.pipeline.evaluation import Evaluation
from llmrec.pipeline.results import overwrite_warning
from llmrec.pipeline.resume import StageTimer, lock_folder
from llmrec.pipeline.row_specs import RowSpec
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Recipe
from tests.facts import Facts, raises

pytest.importorskip("trl", reason="the train extra is not installed")
pytest.importorskip("rouge_score", reason="the text extra is not installed")

SMALL = (
    *("data={source: made-reviews, noun: products}", "reviews=null", "train.steps=3", "train.batch_tokens=512"),
    *("train.valid_rows=4", "train.lora.top_layers=1", "tasks.sequential.users=null"),
    "tasks.sequential.baselines=[random, popularity, {name: item-knn, history: 5}, markov-1, {name: markov, order: 3}]",
    *("tasks.rating.users=null", "tasks.rating.arms=null", "tasks.direct.arms=null"),
    *("tasks.direct.strategies=[label, list]", "tasks.direct.users=null", "tasks.explanation.users=null"),
    *("tasks.explanation.max_tokens=6", "eval.users=6", "eval.candidates.count=5", "eval.bootstrap=50"),
    *("eval.backend=hf", "eval.fusion={}"),
)


def recipe(folder: Path, *more: str) -> Recipe:
    return load_recipe(
        "recipes/movielens-100k/four-tasks.yaml", [f"model.name={folder}", "model.dtype=float32", *SMALL, *more]
    )


@pytest.fixture(scope="module", params=["llama_folder", pytest.param("qwen_folder", marks=pytest.mark.slow)])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, pipeline.Run]:
    """The same recipe on two architectures."""
    chosen = recipe(request.getfixturevalue(request.param))
    return chosen, pipeline.run(chosen, tmp_path_factory.mktemp("run") / "r", quiet=True)


def test_every_arm_and_task_has_rows(done: tuple[Recipe, pipeline.Run]) -> None:
    rows = done[1].results["rows"]
    keys = {(row["task"], row["arm"], row["predictor"]) for row in rows}
    for arm in ("zero-shot", "few-shot", "tuned"):
        for task, predictor in (
            ("rating", "expected"),
            ("rating", "parsed"),
            ("sequential", "likelihood"),
            ("direct", "label"),
            ("direct", "list"),
            ("explanation", "text"),
        ):
            assert (task, arm, predictor) in keys
    assert {"random", "popularity", "item-knn", "markov"} <= {
        row["predictor"] for row in rows if row["task"] == "direct"
    }
    controls = {"random", "popularity", "item-knn(history=5)", "markov-1"}
    assert controls | {"markov(order=3)", "content", "fusion", "fusion with texts"} == {
        row["predictor"] for row in rows if row["task"] == "sequential" and row["arm"] == "baseline"
    }
    for row in rows:
        assert row["n"] == 6
        assert all(figure["signature"] for figure in row["metrics"].values())
        assert row["shots"] == (1 if row["arm"] == "few-shot" else 0)


def test_report_from_files_equals_report_of_run(done: tuple[Recipe, pipeline.Run]) -> None:
    folder = done[1].folder
    written = {file.name: file.read_bytes() for file in (folder / "report").iterdir()}
    pipeline.report(folder)
    assert {file.name: file.read_bytes() for file in (folder / "report").iterdir()} == written
    assert parse_checked_json((folder / "results.json").read_bytes()) == json.loads(json.dumps(done[1].results))


def test_every_file_is_written(done: tuple[Recipe, pipeline.Run]) -> None:
    folder = done[1].folder
    for name in (
        *("recipe.yaml", "results.json", "predictions.parquet", "candidates/test.parquet", "train_log.jsonl"),
        *("adapter/adapter_model.safetensors", "merged/model.safetensors"),
        *("report/index.html", "report/report.md", "report/table.csv"),
    ):
        assert (folder / name).is_file(), name
    assert load_recipe(folder / "recipe.yaml") == done[0]
    predictions = pl.read_parquet(folder / "predictions.parquet")
    assert len(predictions) == 6 * len(done[1].results["rows"])
    assert predictions["request_id"].null_count() == 0


def test_results_contain_recipe_versions_and_data(done: tuple[Recipe, pipeline.Run]) -> None:
    results = json.loads((done[1].folder / "results.json").read_text(encoding="utf-8"))
    assert results["recipe"] == done[0].model_dump(mode="json")
    assert results["versions"]["transformers"]
    assert len(results["data"]["main"]["fingerprint"]) >= 16
    assert results["candidates"]["main"]["count"] == 5
    assert results["training"]["adapter_sha256"]
    assert results["training"]["steps"] == 3
    assert any("synthetic data of the llmrec project" in note for note in results["notes"])
    assert {stage["stage"] for stage in results["budget"]} >= {"data", "train", "zero-shot", "few-shot", "tuned"}


def test_second_run_reuses_everything(
    done: tuple[Recipe, pipeline.Run], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chosen, first = done

    def fail(*args: Any, **options: Any) -> Any:
        raise AssertionError("nothing should be computed again")

    monkeypatch.setattr("llmrec.pipeline.engines.load_model", fail)
    monkeypatch.setattr("llmrec.train.lora.load_model", fail)
    again = pipeline.run(chosen, first.folder, quiet=True)
    assert "other settings" not in caplog.text
    assert again.results["rows"] == first.results["rows"]
    assert again.results["comparisons"] == first.results["comparisons"]
    cost = {entry["stage"]: entry["seconds"] for entry in again.results["budget"]}
    assert cost["train"] == {entry["stage"]: entry["seconds"] for entry in first.results["budget"]}["train"]


def test_warns_before_replacing_results_of_other_settings(tmp_path: Path) -> None:
    file, hashed = tmp_path / "results.json", "a" * 16
    assert overwrite_warning(file, "recipe_hash", hashed) == ""
    for content, warns in (('{"recipe_hash": "' + hashed + '"}', False), ('{"recipe_hash": "b"}', True), ("{", False)):
        file.write_text(content, encoding="utf-8")
        assert ("other settings" in overwrite_warning(file, "recipe_hash", hashed)) is warns


def test_row_key_depends_on_engine_model_device_and_dtype(llama_folder: Path, encoder: Any) -> None:
    chosen = recipe(llama_folder)
    built = study.build_study(chosen)
    evaluation = Evaluation(built, None, llama_folder, StageTimer(), quiet=True)
    engines = Engines(chosen.model, chosen.eval, encoder, chosen.seed, StageTimer(), None)
    spec = RowSpec("sequential", "zero-shot", "likelihood", built.eval_templates("sequential")[0])
    identity = engines.identity("hf", "w")
    variants = (
        ("hf", identity),
        ("vllm", engines.identity("vllm", "w")),
        ("hf", engines.identity("hf", "v")),
        ("hf", {**identity, "device": "NVIDIA H100"}),
        ("hf", {**identity, "dtype": "float16"}),
    )
    assert len({evaluation.key(spec, *each) for each in variants}) == len(variants)


def test_cost_of_rows_excludes_start_of_engine(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start is a stage, and the rows take no longer than their stage."""

    class SlowToStart(FakeBackend):
        def __init__(self) -> None:
            time.sleep(1)
            super().__init__()

    monkeypatch.setattr(fake, "FakeBackend", SlowToStart)
    tasks = "tasks={direct: {strategies: [label, list]}, sequential: {}}"
    chosen = recipe(llama_folder, tasks, "eval.arms=[zero-shot]", "eval.backend=fake")
    results = pipeline.run(chosen, tmp_path / "r", quiet=True).results
    rows = [row for row in results["rows"] if row["arm"] == "zero-shot"]
    budget = {entry["stage"]: entry["seconds"] for entry in results["budget"]}
    assert len(rows) == 3 and all(row["cost"]["seconds"] > 0 for row in rows)
    assert sum(row["cost"]["seconds"] for row in rows) <= budget["zero-shot"]
    assert budget["start fake"] >= 1


def test_task_can_be_evaluated_in_some_arms_only(llama_folder: Path, tmp_path: Path) -> None:
    controls = "baselines: [random, popularity, item-knn, markov-1]"
    tasks = (
        f"tasks={{direct: {{strategies: [label], arms: [zero-shot, tuned], {controls}}}, sequential: {{{controls}}}}}"
    )
    arms = ["eval.arms=[zero-shot, few-shot]", "eval.backend=fake"]
    results = pipeline.run(recipe(llama_folder, tasks, *arms), tmp_path / "r", quiet=True).results
    evaluated = {(row["task"], row["arm"]) for row in results["rows"] if row["arm"] != "baseline"}
    assert evaluated == {("direct", "zero-shot"), ("sequential", "zero-shot"), ("sequential", "few-shot")}
    checks = json.loads((tmp_path / "r" / "audit.json").read_text(encoding="utf-8"))["checks"]
    names = {check["name"] for check in checks}
    assert "few-shot examples of sequential" in names and "few-shot examples of direct" not in names


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (
            "tasks={direct: {arms: [zero-shot]}, sequential: {arms: [few-shot]}}",
            "no task is evaluated in the tuned setting",
        ),
        ("tasks={direct: {arms: []}}", "tasks.direct.arms"),
    ],
)
def test_rejects_arms_without_use_of_training(tasks: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("recipes/movielens-100k/four-tasks.yaml", [tasks])


def test_user_with_leaking_profile_is_excluded_and_reported(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`check` and the start of the report say so."""
    data = study.load_split(recipe(llama_folder).data, 0)
    source, (held, *_) = data.dataset, data.holdouts("test")
    title = source.items[held.item_id].title
    users = {user: {"likes": "quiet evenings"} for user in source.interactions["user_id"].unique()}
    users[held.user_id] = {"likes": f"things like the {title}, and tea"}
    monkeypatch.setattr(study, "load_data", lambda section, seed: replace(source, users=users))
    tasks = "tasks={direct: {eval_templates: [with-profile], strategies: [label], users: 200}}"
    changes = [tasks, "eval.arms=[zero-shot]", "eval.backend=fake"]
    output = CliRunner().invoke(app, ["check", "recipes/movielens-100k/four-tasks.yaml", *SMALL, *changes]).output
    assert f"1 user is excluded from the evaluation, of {len(users)} with a profile in made-reviews" in output
    assert f"users: {held.user_id}\n" in output
    done = pipeline.run(recipe(llama_folder, *changes), tmp_path / "r", quiet=True)
    assert {row["n"] for row in done.results["rows"]} == {len(users) - 1}
    (excluded,) = done.results["set_aside"]
    assert excluded["users"] == [held.user_id] and held.item_id in excluded["said"]
    for name, first in (("report.md", "- **"), ("index.html", 'class="opening"')):
        text = (done.folder / "report" / name).read_text("utf-8")
        assert text.index("1 user is excluded from the evaluation") < text.index(first)
    assert json.loads((done.folder / "audit.json").read_text("utf-8"))["leaks"] == 0


def test_rejects_eval_without_adapter(llama_folder: Path, tmp_path: Path) -> None:
    with raises(RecipeError, Facts("missing-file", tmp_path, column="eval.arms", says="`llmrec train`")):
        pipeline.run(recipe(llama_folder), tmp_path, quiet=True, may_train=False)


def test_two_runs_cannot_use_one_folder(llama_folder: Path, tmp_path: Path) -> None:
    with lock_folder(tmp_path), raises(LlmrecError, Facts("busy", tmp_path, says="--out")):
        pipeline.run(recipe(llama_folder), tmp_path, quiet=True)


@pytest.mark.parametrize(
    ("override", "facts"),
    [
        (
            "tasks.rating.strategies=[expcted]",
            Facts("unknown-name", column="tasks.rating.strategies", says="did you mean 'expected'"),
        ),
        ("tasks.rating.templates=[list-rating]", Facts("unknown-name", says="did you mean 'list-ratings'")),
        (
            "tasks.rating.templates=[judge-one]",
            Facts("contradiction", "rating/judge-one", column="tasks.rating.templates", says="eval_templates"),
        ),
        ("data.source=movielens-100", Facts("unknown-name", says="did you mean 'movielens-100k'")),
        ("eval.candidates.count=100", Facts("too-few", column="eval.candidates.count", says="at most 29")),
    ],
)
def test_rejects_wrong_names(llama_folder: Path, override: str, facts: Facts) -> None:
    with raises(LlmrecError, facts):
        study.build_study(recipe(llama_folder, override))
