"""A decoder of item tokens: full training, then preference tuning of an adapter, with evaluation and audit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmrec.pipeline import run as pipeline
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Recipe
from llmrec.report.results import read_results

pytest.importorskip("trl", reason="the train extra is not installed")

SMALL = (
    "data={source: made-reviews, path: null, noun: products}",
    "model.shape={layers: 1, width: 16, heads: 2, feedforward: 32, dropout: 0.2}",
    *("index={scheme: token, tokens: random}", "tasks.sequential.baselines=[random, popularity, item-knn, markov-1]"),
    *("train.steps=4", "train.batch_tokens=300", "train.valid_rows=4", "train.valid_every=2", "train.save_every=2"),
    *("eval.users=10", "eval.bootstrap=50", "eval.beams=20"),
)


def recipe(page: str, *more: str) -> Recipe:
    return load_recipe(f"recipes/sequences/{page}.yaml", [*SMALL, *more])


@pytest.mark.slow
@pytest.mark.parametrize("rejected", ["item-knn", "beam"])
def test_decoder_is_tuned_on_preferences(rejected: str, tmp_path: Path) -> None:
    first = pipeline.train(recipe("generative-items"), tmp_path / "sft", quiet=True)
    more = (f"train.start={tmp_path / 'sft'}", f"train.preference.rejected={rejected}", "train.judge.users=5")
    chosen = recipe("s-dpo-items", *more, "train.preference.negatives=3", "train.max_row_tokens=64")
    done = pipeline.run(chosen, tmp_path / "run", quiet=True)
    training = done.results["training"]
    assert first["method"] == "full" and training["method"] == "lora"
    # The start is judged too; the first loss is that of random choice.
    assert [line["step"] for line in training["log"] if line["valid_ndcg"] is not None] == [0, 2, 4]
    assert training["log"][1]["loss"] == pytest.approx(1.3863, abs=1e-3)
    assert all(set(line["figures"]) >= {"rewards/margins", "rewards/accuracies"} for line in training["log"][1:])
    audit = json.loads((tmp_path / "run" / "audit.json").read_text(encoding="utf-8"))
    assert audit["leaks"] == 0
    names = {check["name"] for check in audit["checks"]}
    assert "training rows of sequential that depend on held-out interactions" in names
    page = done.report.read_text(encoding="utf-8")
    assert 'id="training-rewards-margins"' in page and "rewards/accuracies" in page
    stored = read_results(done.folder).training
    assert stored is not None and "rewards/margins" in stored.figured
    assert "rewards/margins" in (done.report.parent / "report.md").read_text(encoding="utf-8")
