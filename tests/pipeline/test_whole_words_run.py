"""Whole-word embeddings from a recipe's key to ranked items: one run, reused, ranked with, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmrec.errors import RecipeError
from llmrec.models.load import load_model
from llmrec.models.whole_words import LEVEL, WEIGHTS, words_of
from llmrec.pipeline.run import Run, open_session, run
from llmrec.recipe.schema import Recipe
from tests.conftest import make_model
from tests.facts import Facts, raises
from tests.pipeline.test_paired_run import RECIPE as PAIRED
from tests.pipeline.test_paired_run import ranked

RECIPE: dict[str, Any] = {
    **PAIRED,
    "name": "whole-words",
    "model": {**PAIRED["model"], "whole_words": True},
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(Recipe(**RECIPE), tmp_path_factory.mktemp("run") / "out", quiet=True)


def test_a_run_trains_them_and_its_model_has_them(ran: Run) -> None:
    tuned = next(row for row in ran.results["rows"] if row["arm"] == "tuned")
    assert tuned["engine"] == "hf:tree" and tuned["parse_rate"] == 1.0 and tuned["n"] == 20
    saved = load_file(ran.folder / "merged" / WEIGHTS)
    assert saved["table"].shape == (97, 16)
    model = load_model(str(ran.folder / "merged"), Recipe(**RECIPE).model)
    assert torch.equal(words_of(model).weight, saved["table"])
    # Tokens of codes, which were added to the vocabulary, are known by their level.
    session = open_session(Recipe(**RECIPE), ran.folder, quiet=True)
    assert session.study.index is not None
    vocabulary = session.encoder.tokenizer.convert_tokens_to_ids(list(session.study.index.tokens))
    assert min(saved["kinds"][vocabulary].tolist()) == LEVEL
    assert ran.results["training"]["trainable_parameters"] == ran.results["training"]["total_parameters"]


def test_a_second_run_reuses_it(ran: Run) -> None:
    again = run(Recipe(**RECIPE), ran.folder, quiet=True)
    assert again.results["training"] == ran.results["training"]


def test_rank_asks_the_model_with_them(ran: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same folder without its table is refused, and would answer otherwise."""
    session = open_session(Recipe(**RECIPE), ran.folder, quiet=True)
    items = sorted(session.study.data.dataset.items)

    def scores(out: str) -> list[float]:
        (found,) = ranked(ran, tmp_path, [{"id": "one", "history": items[:5]}], out)
        return list(found["scores"])

    table = ran.folder / "merged" / WEIGHTS
    with_them = scores("with.jsonl")
    away = table.rename(tmp_path / WEIGHTS)
    try:
        with pytest.raises(AssertionError, match="does not match the record of its training"):
            scores("refused.jsonl")
        monkeypatch.setattr("llmrec.answer.language_model.refuse_changed", lambda *told: None)
        without = scores("without.jsonl")
    finally:
        away.rename(table)
    assert with_them != pytest.approx(without, abs=1e-4)


def test_training_goes_on_from_a_table_beside_new_tokens(ran: Run, tmp_path: Path) -> None:
    """A tuned model whose vocabulary grows by another index keeps its table, which counts the new codes as words."""
    model = {**RECIPE["model"], "name": str(ran.folder / "merged"), "shape": None}
    train = {**RECIPE["train"], "steps": 1, "learning_rate": 1e-9}
    recipe = Recipe(**{**RECIPE, "model": model, "index": {"scheme": "token"}, "train": train})
    grown = run(recipe, tmp_path / "out", quiet=True)
    before, base, after = (
        load_file(folder / WEIGHTS)
        for folder in (ran.folder / "merged", grown.folder / "base", grown.folder / "merged")
    )
    assert torch.equal(base["table"], before["table"])
    assert torch.allclose(after["table"], before["table"], atol=1e-6)
    session = open_session(recipe, grown.folder, quiet=True)
    assert session.study.index is not None
    new = session.encoder.tokenizer.convert_tokens_to_ids(list(session.study.index.tokens))
    assert {after["kinds"][i].item() for i in new} == {base["kinds"][i].item() for i in new} == {LEVEL + 26}
    assert torch.equal(after["kinds"][: min(new)], before["kinds"][: min(new)])
    tuned = next(row for row in grown.results["rows"] if row["arm"] == "tuned")
    assert tuned["parse_rate"] == 1.0


def test_a_decoder_is_refused_before_it_trains(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "llama")
    changes = {"model": {"name": str(folder), "max_length": 512, "whole_words": True}, "index": None}
    tasks = {"sequential": {"templates": ["continue-list"], "strategies": ["likelihood"]}}
    recipe = Recipe(**{**RECIPE, **changes, "tasks": tasks, "eval": {"arms": ["tuned"], "backend": "hf", "users": 5}})
    with raises(RecipeError, Facts("contradiction", column="model.whole_words", says="model.whole_words=false")):
        run(recipe, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out" / "adapter").exists()
