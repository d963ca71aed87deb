"""A run into the folder of another recipe gives the same results as into an empty folder.

The end of this module changes each field on which an answer depends.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from safetensors.torch import load_file, save_file

from llmrec.backends.cache import AnswerStore, CachedBackend
from llmrec.backends.encode import Encoder
from llmrec.models.load import load_tokenizer, model_folder_hash
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.engines import Engines
from llmrec.pipeline.resume import StageTimer
from llmrec.pipeline.study import Study, build_study
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import EvalSection, ModelSection
from llmrec.registry import STRATEGIES, import_component
from llmrec.strategies.asking import Prompting

pytest.importorskip("trl", reason="the train extra is not installed")

BASE = (
    "data={source: made-reviews, noun: products}",
    "reviews=null",
    "model.dtype=float32",
    "tasks={sequential: {templates: [continue-list]}, "
    "direct: {templates: [after-history], strategies: [label]}, "
    "rating: {templates: [list-ratings], strategies: [parsed]}, "
    "explanation: {templates: [plain], max_tokens: 4}}",
    "train={steps: 2, batch_tokens: 512, valid_rows: 0, learning_rate: 0.03, warmup: 0, lora: {rank: 4, alpha: 8}}",
    "eval.arms=[zero-shot, few-shot]",
    "eval.users=6",
    "eval.batch=4",
    "eval.candidates.count=5",
    "eval.bootstrap=20",
    "eval.backend=hf",
)


def run(model: Path, folder: Path, *more: str) -> dict[str, Any]:
    """Run, and return the rows and predictions."""
    recipe = load_recipe("recipes/movielens-100k/four-tasks.yaml", [f"model.name={model}", *BASE, *more])
    done = pipeline.run(recipe, folder, quiet=True)
    rows = json.loads(json.dumps(done.results["rows"]))
    for row in rows:
        del row["cost"]["seconds"]
    return {"rows": rows, "predictions": pl.read_parquet(folder / "predictions.parquet").to_dicts()}


@pytest.fixture(scope="module")
def model(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of a model that tests can change."""
    return Path(shutil.copytree(llama_folder, tmp_path_factory.mktemp("model") / "m"))


@pytest.fixture(scope="module")
def base(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("base") / "run"
    return folder, run(model, folder)


# Each is two runs. test_fingerprints.py tests all settings.
@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        *("model.dtype=bfloat16", "seed=1", "tasks.sequential.eval_templates=[name-next]"),
        *("eval.candidates.count=4", "eval.shots.k=2", "tasks.direct.strategies=[list]", "data.noun=goods"),
        *("tasks.sequential.history=2", "eval.users=8", "eval.split=valid"),
    ],
)
def test_changed_setting_gets_no_stale_answer(
    change: str, model: Path, base: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(base[0], tmp_path / "used")
    again = run(model, tmp_path / "used", change)
    assert again == run(model, tmp_path / "fresh", change)
    assert again != base[1]


@pytest.mark.slow
def test_other_adapter_gets_no_stale_answer(model: Path, tmp_path: Path) -> None:
    first = run(model, tmp_path / "used", "eval.arms=[tuned]")
    again = run(model, tmp_path / "used", "eval.arms=[tuned]", "train.learning_rate=0.1")
    assert again == run(model, tmp_path / "fresh", "eval.arms=[tuned]", "train.learning_rate=0.1")
    assert again != first


@pytest.mark.slow
@pytest.mark.parametrize("part", ["weights", "chat template", "tokenizer"])
def test_changed_model_folder_gets_no_stale_answer(
    part: str, model: Path, base: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "model")
    shutil.copytree(base[0], tmp_path / "used")
    # The folder keeps its name, so only the content differs.
    model.rename(model.with_name("aside"))
    try:
        (tmp_path / "model").rename(model)
        file = {"weights": "model.safetensors", "chat template": "chat_template.jinja", "tokenizer": "tokenizer.json"}
        changed = model / file[part]
        before = changed.stat()
        if part == "weights":
            weights = load_file(changed)
            weights = {name: value.flip(0) if value.dim() > 1 else value for name, value in weights.items()}
            save_file({n: v.contiguous() for n, v in weights.items()}, changed, metadata={"format": "pt"})
        elif part == "chat template":
            text = changed.read_text(encoding="utf-8")
            changed.write_text(text.replace("\n", " "), encoding="utf-8")
        else:
            stored = json.loads(changed.read_text(encoding="utf-8"))
            stored["model"]["merges"] = stored["model"]["merges"][:-40]
            changed.write_text(json.dumps(stored), encoding="utf-8")
        os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
        again = run(model, tmp_path / "used")
        assert again == run(model, tmp_path / "fresh")
        assert again != base[1]
    finally:
        shutil.rmtree(model)
        model.with_name("aside").rename(model)


# --------------------------------------------------------------------------- fields of an answer


@dataclass(frozen=True, kw_only=True)
class Question:
    """Questions, with everything on which their answers depend."""

    folder: Path
    dtype: str = "float32"
    backend: str = "hf"
    chat_template: str | None = None
    seed: int = 0
    template: str = "after-history"
    strategy: str = "label"
    candidates: int = 5
    k: int = 1


@cache
def study_of(candidates: int) -> Study:
    return build_study(
        load_recipe("recipes/movielens-100k/four-tasks.yaml", [*BASE, f"eval.candidates.count={candidates}"])
    )


def ask(store: AnswerStore, question: Question) -> tuple[int, int]:
    """Query with a strategy and for free text; return how many stored answers each reused."""
    section = ModelSection(name=str(question.folder), dtype=question.dtype)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(str(question.folder), section)
    tokenizer.chat_template = question.chat_template or tokenizer.chat_template
    encoder = Encoder(tokenizer, max_length=1024)
    study = study_of(question.candidates)
    task, requests = study.tasks["direct"], [case.request for case in study.cases("direct")[:3]]
    engines = Engines(section, EvalSection(backend="hf"), encoder, question.seed, StageTimer(), store)
    backend: CachedBackend = engines.get(
        question.backend, str(question.folder), model_folder_hash(str(question.folder))
    )
    try:
        import_component(STRATEGIES, question.strategy, "strategy")(
            Prompting(backend=backend, task=task, template=question.template, shots=question.k)
        ).answer(requests)
        ranked = backend.recalled
        prompts = [task.prompt(request, template=question.template, shots=question.k) for request in requests]
        backend.generate(prompts, max_tokens=4)
        return ranked, backend.recalled - ranked
    finally:
        engines.close()


FIELDS: dict[str, dict[str, Any]] = {
    "model": {"folder": "another model"},
    "adapter": {"folder": "the same model with an adapter merged in"},
    "template": {"template": "shortlist"},
    "seed": {"seed": 1},
    "strategy": {"strategy": "list"},
    "candidates": {"candidates": 4},
    "k": {"k": 2},
    "backend": {"backend": "fake"},
    "chat template": {"chat_template": "another chat template"},
    "dtype": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize(
    "field",
    [pytest.param(name, marks=() if name == "model" else pytest.mark.slow) for name in FIELDS],
)
def test_changed_field_gets_no_stale_answer(field: str, model: Path, qwen_folder: Path, tmp_path: Path) -> None:
    base, store = Question(folder=model), AnswerStore(tmp_path / "answers.sqlite")
    assert ask(store, base) == (0, 0)
    assert ask(store, base) == (3, 3)
    change = dict(FIELDS[field])
    if field == "model":
        change["folder"] = qwen_folder
    elif field == "adapter":
        change["folder"] = merged(model, tmp_path)
    elif field == "chat template":
        text = load_tokenizer(str(model), ModelSection(name=str(model))).chat_template
        change["chat_template"] = text.replace("assistant", "adviser")
    # A strategy does not affect the texts for the same prompts.
    assert ask(store, replace(base, **change)) == (0, 3 if field == "strategy" else 0)
    assert ask(store, base) == (3, 3)


def merged(model: Path, folder: Path) -> Path:
    """Train an adapter, and return the folder of the merged model."""
    recipe = load_recipe("recipes/movielens-100k/four-tasks.yaml", [f"model.name={model}", *BASE])
    pipeline.train(recipe, folder / "run", quiet=True)
    return folder / "run" / "merged"
