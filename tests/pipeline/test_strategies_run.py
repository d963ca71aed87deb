"""A run with every ranking strategy: rows, costs, and new rows after a relevant change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrec.backends.encode import Encoder
from llmrec.cli.estimate import estimate_eval_work
from llmrec.models.load import load_tokenizer
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.row_specs import strategy_settings
from llmrec.pipeline.study import build_study
from llmrec.prompts.template import load_templates
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import EvalSection, ModelSection
from llmrec.registry import STRATEGIES, is_positional, strategy_eval_keys
from llmrec.tasks.direct import is_strategy_supported
from llmrec.tasks.family import family_of

pytest.importorskip("trl", reason="the train extra is not installed")

DIRECT = ("label", "list", "permutation", "window", "pairwise", "setwise", "pointwise-yes")
BASE = (
    "data={source: made-reviews, noun: products}",
    "reviews=null",
    "model.dtype=float32",
    f"tasks={{sequential: {{templates: [continue-list], strategies: [likelihood, likelihood-prior]}}, "
    f"direct: {{templates: [after-history], strategies: [{', '.join(DIRECT)}]}}}}",
    "eval={arms: [few-shot], users: 5, batch: 4, bootstrap: 20, backend: hf, candidates: {count: 6}, depth: 3, "
    "window: 4, window_step: 2, all_pairs: 4, set_size: 3, debias_questions: 8}",
)


def rows_of(model: Path, folder: Path, *more: str) -> dict[str, Any]:
    recipe = load_recipe("recipes/movielens-100k/four-tasks.yaml", [f"model.name={model}", *BASE, *more])
    rows = json.loads(json.dumps(pipeline.run(recipe, folder, quiet=True).results["rows"]))
    for row in rows:
        del row["cost"]["seconds"]
    return {row["predictor"]: row for row in rows if row["arm"] != "baseline"}


@pytest.mark.slow
def test_run_with_every_strategy(llama_folder: Path, tmp_path: Path) -> None:
    rows = rows_of(llama_folder, tmp_path / "run")
    assert set(rows) == {*DIRECT, "likelihood", "likelihood-prior"}
    forwards = {name: row["cost"]["forwards"] / 5 for name, row in rows.items()}
    exact = {"likelihood": 1, "label": 1, "permutation": 3, "window": 2, "pairwise": 24, "pointwise-yes": 6}
    assert {name: forwards[name] for name in exact} == exact
    assert 3 <= forwards["setwise"] <= 7 and forwards["list"] >= 1 and forwards["likelihood-prior"] > 1
    assert all(row["cost"]["prompt_tokens"] > 0 for row in rows.values())
    # The report shows the first prompt of each strategy.
    shown = {example["predictor"]: example["prompt"] for example in _examples(tmp_path / "run")}
    assert "Answer Yes or No." in shown["pointwise-yes"] and "Order all labels" in shown["permutation"]
    question = shown["pairwise"].rpartition("Candidates:")[2]
    assert "\nB. " in question and "\nC. " not in question

    # Only the rows of the changed settings are computed again.
    again = rows_of(llama_folder, tmp_path / "run", "eval.permutations=2", "eval.debias=measured")
    for name in rows:
        assert (again[name] == rows[name]) == (not is_positional(name))
    assert again["label"]["cost"]["forwards"] == 2 * 5 + 8


def test_dry_run_counts_every_strategy(llama_folder: Path) -> None:
    encoder = Encoder(load_tokenizer(str(llama_folder), ModelSection(name=str(llama_folder))), max_length=99_999)
    recipe = load_recipe(
        "recipes/movielens-100k/four-tasks.yaml", [f"model.name={llama_folder}", *BASE, "tasks.sequential=null"]
    )

    def tokens(strategy: str, permutations: int = 1) -> int:
        direct = recipe.tasks.direct.model_copy(  # type: ignore[union-attr]
            update={"strategies": (strategy,), "eval_templates": ("with-profile",)}
        )
        chosen = recipe.model_copy(
            update={
                "tasks": recipe.tasks.model_copy(update={"direct": direct}),
                "eval": recipe.eval.model_copy(update={"permutations": permutations}),
            }
        )
        return estimate_eval_work(build_study(chosen), encoder)["few-shot"].tokens

    template = load_templates("direct")["with-profile"]
    counted = {
        strategy: tokens(strategy)
        for strategy in family_of("direct").strategies
        if is_strategy_supported(template, strategy)
    }
    assert set(counted) == {*DIRECT, "two-step"}
    assert min(counted.values()) > 0
    assert counted["two-step"] > counted["label"] and counted["pairwise"] > counted["window"]
    assert tokens("two-step", 3) - counted["two-step"] > 2 * counted["label"]


def _examples(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "rows").glob("*.json"))
    return [example for file in files for example in json.loads(file.read_text("utf-8"))["examples"][:1]]


CHANGES = {
    "prior_weight": 0.5,
    "permutations": 3,
    "debias_questions": 7,
    "depth": 4,
    "window": 9,
    "window_step": 3,
    "set_size": 5,
    "all_pairs": 3,
    "beams": 9,
    "exact": True,
}


@pytest.mark.parametrize("name", [name for name, entry in STRATEGIES.items() if entry.keys])
def test_row_key_contains_settings_of_strategy(name: str) -> None:
    plain = EvalSection(debias="measured")
    for key, value in CHANGES.items():
        changed = plain.model_copy(update={key: value})
        reads = key in strategy_eval_keys(name) or (is_positional(name) and key == "debias_questions")
        assert (strategy_settings(name, changed) != strategy_settings(name, plain)) == reads
    assert (strategy_settings(name, EvalSection()) != strategy_settings(name, plain)) == is_positional(name)
