"""A run into the folder of another recipe gets nothing stale: it ends like the same run into an empty folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmrec.build import pipeline
from llmrec.recipe_file import load_recipe

pytest.importorskip("trl", reason="the train extra is not installed")

BASE = (
    "data={source: made-reviews, noun: products}",
    "reviews=null",
    "model.dtype=float32",
    "tasks={sequential: {templates: [continue-list], baselines: [popularity]}, "
    "direct: {templates: [after-history], strategies: [label], baselines: [popularity]}, "
    "rating: {templates: [list-ratings], strategies: [parsed], baselines: [user-mean]}}",
    "train.valid_rows=0",
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

    recipe = load_recipe("recipes/quickstart.yaml", [f"model.name={model}", *BASE, *more])
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


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_change_gets_a_stale_answer(
    change: str, model: Path, base: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(base[0], tmp_path / "used")
    again = run(model, tmp_path / "used", change)
    assert again == run(model, tmp_path / "fresh", change)
    assert again != base[1]


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
