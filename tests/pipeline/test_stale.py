"""Nothing stale: a run into the folder of another recipe ends like the same run into an empty folder.

The end of this module goes through the fields of which an answer depends, one by one, with the engines as they are.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llmrec.backends.cache import AnswerStore, CachedBackend
from llmrec.backends.encode import Encoder
from llmrec.models.load import load_tokenizer, weights_stamp
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.engines import Engines
from llmrec.pipeline.resume import Budget
from llmrec.pipeline.study import Study, build_study
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import EvalSection, ModelSection
from llmrec.registry import STRATEGIES, lookup
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
    """Run and return the rows and predictions that must not depend on what lay in the folder."""
    import polars as pl

    recipe = load_recipe("recipes/movielens-100k/four-tasks.yaml", [f"model.name={model}", *BASE, *more])
    done = pipeline.run(recipe, folder, quiet=True)
    rows = json.loads(json.dumps(done.results["rows"]))
    for row in rows:
        del row["cost"]["seconds"]
    return {"rows": rows, "predictions": pl.read_parquet(folder / "predictions.parquet").to_dicts()}


@pytest.fixture(scope="module")
def model(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model at a place where it can be changed."""
    place = tmp_path_factory.mktemp("model") / "m"
    shutil.copytree(llama_folder, place)
    return place


@pytest.fixture(scope="module")
def base(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("base") / "run"
    return folder, run(model, folder)


CHANGES = {
    "dtype": "model.dtype=bfloat16",
    "seed": "seed=1",
    "template": "tasks.sequential.eval_templates=[name-next]",
    "stop": "tasks.rating.eval_templates=[rate-next]",
    "max tokens": "tasks.explanation.max_tokens=3",
    "history": "tasks.sequential.history=2",
    "candidates": "eval.candidates.kind=popularity",
    "candidate count": "eval.candidates.count=4",
    "k": "eval.shots.k=2",
    "choice of shots": "eval.shots.choice=own",
    "strategy": "tasks.direct.strategies=[list]",
    "strategy of ratings": "tasks.rating.strategies=[expected]",
    "backend": "eval.backend=fake",
    "noun": "data.noun=goods",
    "users": "eval.users=8",
    "split": "eval.split=valid",
}


# Each is two runs; which settings change what is stored is tested of all in test_fingerprints.py.
@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_no_change_gets_a_stale_answer(
    change: str, model: Path, base: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(base[0], tmp_path / "used")
    again = run(model, tmp_path / "used", change)
    assert again == run(model, tmp_path / "fresh", change)
    assert again != base[1]


@pytest.mark.slow
def test_another_model_gets_no_stale_answer(
    model: Path, qwen_folder: Path, base: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(base[0], tmp_path / "used")
    again = run(qwen_folder, tmp_path / "used")
    assert again == run(qwen_folder, tmp_path / "fresh")
    assert again != base[1]


@pytest.mark.slow
def test_another_adapter_gets_no_stale_answer(model: Path, tmp_path: Path) -> None:
    first = run(model, tmp_path / "used", "eval.arms=[tuned]")
    again = run(model, tmp_path / "used", "eval.arms=[tuned]", "train.learning_rate=0.1")
    assert again == run(model, tmp_path / "fresh", "eval.arms=[tuned]", "train.learning_rate=0.1")
    assert again != first


@pytest.mark.slow
@pytest.mark.parametrize("part", ["weights", "chat template", "tokenizer"])
def test_a_changed_model_folder_gets_no_stale_answer(
    part: str, model: Path, base: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    import os

    from safetensors.torch import load_file, save_file

    shutil.copytree(model, tmp_path / "model")
    shutil.copytree(base[0], tmp_path / "used")
    # The same folder name, so that only content tells the two models apart.
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


# --------------------------------------------------------------------------- the fields, one by one


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A few questions, with all that their answers depend on."""

    folder: Path
    revision: str | None = None
    dtype: str = "float32"
    backend: str = "hf"
    chat_template: str | None = None
    sampling: str = "greedy"
    seed: int = 0
    template: str = "after-history"
    strategy: str = "label"
    candidates: int = 5
    k: int = 1
    stop: str | None = None
    max_tokens: int = 4


class Sampling(Engines):
    """Engines that decode in another way than greedily, as none does today."""

    decoding = "greedy"

    def identity(self, engine: str, weights: str) -> dict[str, Any]:
        found = super().identity(engine, weights)
        assert found["decoding"] == "greedy"
        return {**found, "decoding": self.decoding}


@cache
def study_of(candidates: int) -> Study:
    return build_study(
        load_recipe("recipes/movielens-100k/four-tasks.yaml", [*BASE, f"eval.candidates.count={candidates}"])
    )


def ask(store: AnswerStore, asked: Asked) -> tuple[int, int]:
    """Ask through a strategy and in free text; return how many of the answers of each were remembered ones."""
    section = ModelSection(name=str(asked.folder), revision=asked.revision, dtype=asked.dtype)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(str(asked.folder), section)
    tokenizer.chat_template = asked.chat_template or tokenizer.chat_template
    encoder = Encoder(tokenizer, max_length=1024)
    study = study_of(asked.candidates)
    task, requests = study.tasks["direct"], [case.request for case in study.cases("direct")[:3]]
    engines = Sampling(section, EvalSection(backend="hf"), encoder, asked.seed, Budget(), store)
    engines.decoding = asked.sampling
    backend: CachedBackend = engines.get(asked.backend, str(asked.folder), weights_stamp(str(asked.folder)))
    try:
        lookup(STRATEGIES, asked.strategy, "strategy")(
            Prompting(backend=backend, task=task, template=asked.template, shots=asked.k)
        ).answer(requests)
        ranked = backend.recalled
        prompts = [task.prompt(request, template=asked.template, shots=asked.k) for request in requests]
        backend.generate([replace(prompt, stop=asked.stop) for prompt in prompts], max_tokens=asked.max_tokens)
        return ranked, backend.recalled - ranked
    finally:
        engines.close()


FIELDS: dict[str, dict[str, Any]] = {
    "model": {"folder": "another model"},
    "revision": {"revision": "main"},
    "adapter": {"folder": "the same model with an adapter merged in"},
    "template": {"template": "shortlist"},
    "sampling": {"sampling": "temperature 0.7"},
    "seed": {"seed": 1},
    "strategy": {"strategy": "list"},
    "candidates": {"candidates": 4},
    "k": {"k": 2},
    "backend": {"backend": "fake"},
    "chat template": {"chat_template": "another chat template"},
    "stop": {"stop": "\n"},
    "max tokens": {"max_tokens": 5},
    "dtype": {"dtype": "bfloat16"},
}
# Of these the other question of `ask` knows nothing: a stop is no part of a score, nor a strategy of a text.
OF_ONE_QUESTION = {"strategy": (0, 3), "stop": (3, 0), "max tokens": (3, 0)}


@pytest.mark.parametrize(
    "field",
    [pytest.param(name, marks=() if name == "model" else pytest.mark.slow) for name in FIELDS],
)
def test_no_field_gives_a_stale_hit(field: str, model: Path, qwen_folder: Path, tmp_path: Path) -> None:
    base, store = Asked(folder=model), AnswerStore(tmp_path / "answers.sqlite")
    assert ask(store, base) == (0, 0)
    assert ask(store, base) == (3, 3), "the same questions are remembered"
    change = dict(FIELDS[field])
    if field == "model":
        change["folder"] = qwen_folder
    elif field == "adapter":
        change["folder"] = merged(model, tmp_path)
    elif field == "chat template":
        text = load_tokenizer(str(model), ModelSection(name=str(model))).chat_template
        change["chat_template"] = text.replace("assistant", "adviser")
    assert ask(store, replace(base, **change)) == OF_ONE_QUESTION.get(field, (0, 0))
    assert ask(store, base) == (3, 3), "and stay so"


def merged(model: Path, place: Path) -> Path:
    """Train an adapter for a step and return the folder in which it is merged."""
    recipe = load_recipe("recipes/movielens-100k/four-tasks.yaml", [f"model.name={model}", *BASE])
    pipeline.train(recipe, place / "run", quiet=True)
    return place / "run" / "merged"
