"""A new encoder-decoder with whole-word embeddings: one run, its dry run, `llmrec rank`, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from llmrec.cli.main import app
from llmrec.errors import RecipeError
from llmrec.models.load import load_model
from llmrec.models.whole_words import LEVEL, WHOLE_WORDS_FILE, whole_word_embeddings
from llmrec.pipeline.run import Run, open_session, run
from llmrec.recipe.schema import Recipe
from tests.conftest import make_model
from tests.facts import Facts, raises

RECIPE: dict[str, Any] = {
    "name": "paired",
    "model": {
        "name": "new",
        "shape": {"kind": "encoder-decoder", "layers": 1, "width": 16, "heads": 2, "feedforward": 32, "dropout": 0.1},
        "dtype": "float32",
        "max_length": 96,
        "whole_words": True,
    },
    "data": {"source": "made-reviews"},
    "index": {"scheme": "collaborative", "collaborative": {"clusters": 4, "leaf": 6}},
    "tasks": {"sequential": {"templates": ["bare-next-code"], "strategies": ["search"]}},
    "train": {"method": "full", "steps": 12, "batch_tokens": 512, "valid_rows": 8, "schedule": "inverse_sqrt"},
    "eval": {"arms": ["tuned"], "backend": "hf", "users": 20, "candidates": {"kind": "catalogue"}, "bootstrap": 50},
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(Recipe(**RECIPE), tmp_path_factory.mktemp("run") / "out", quiet=True)


def test_run_trains_and_searches(ran: Run) -> None:
    training = ran.results["training"]
    assert training["steps"] == 12 and training["rows"]["sequential"] > 50
    log = [json.loads(line) for line in (ran.folder / "train_log.jsonl").read_text().splitlines()]
    assert log[-1]["valid_loss"]["sequential"] < log[0]["valid_loss"]["sequential"]
    tuned = next(row for row in ran.results["rows"] if row["arm"] == "tuned")
    assert tuned["engine"] == "hf:tree" and tuned["parse_rate"] == 1.0 and tuned["n"] == 20
    assert json.loads((ran.folder / "merged" / "config.json").read_text())["is_encoder_decoder"]


def ranked(ran: Run, folder: Path, lines: list[dict[str, Any]], out: str = "out.jsonl") -> list[dict[str, Any]]:
    """Rank the five best items of the catalogue for each request by `llmrec rank`."""
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["rank", "--model", str(ran.folder), "--in", str(folder / "in.jsonl"), "--out", str(folder / out)]
    done = CliRunner().invoke(app, [*command, "--candidates", "all", "--top", "5"])
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in (folder / out).read_text().splitlines()]


def test_rank_returns_best_items_of_catalogue(ran: Run, tmp_path: Path) -> None:
    session = open_session(Recipe(**RECIPE), ran.folder, quiet=True)
    items = sorted(session.study.data.dataset.items)
    results = ranked(ran, tmp_path, [{"id": "one", "history": items[:3]}, {"id": "new", "history": []}])
    assert [each["request_id"] for each in results] == ["one", "new"]
    for each, history in zip(results, (items[:3], []), strict=True):
        assert len(set(each["items"])) == 5 and set(each["items"]) <= set(items) - set(history)
        assert each["scores"] == sorted(each["scores"], reverse=True)


def test_dry_run_counts_rows_and_parameters(tmp_path: Path) -> None:
    file = tmp_path / "paired.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    done = CliRunner().invoke(app, ["check", str(file), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "parameters" in done.output and "training rows" in done.output


def test_rejects_vllm_and_export(ran: Run, tmp_path: Path) -> None:
    recipe = Recipe(**{**RECIPE, "eval": {**RECIPE["eval"], "scorer": "vllm"}})
    with raises(RecipeError, Facts("unsupported", column="eval.backend", says="eval.backend=hf")):
        open_session(recipe, tmp_path / "out", quiet=True)
    done = CliRunner().invoke(app, ["export", str(ran.folder), "--out", str(tmp_path / "exported")])
    assert done.exit_code != 0 and "contains an encoder-decoder" in str(done.exception)


# --------------------------------------------------------------------------- whole-word embeddings


def test_tuned_model_has_whole_word_embeddings(ran: Run) -> None:
    saved = load_file(ran.folder / "merged" / WHOLE_WORDS_FILE)
    assert saved["table"].shape == (97, 16)
    model = load_model(str(ran.folder / "merged"), Recipe(**RECIPE).model)
    assert torch.equal(whole_word_embeddings(model).weight, saved["table"])
    # Tokens of codes are identified by their level.
    session = open_session(Recipe(**RECIPE), ran.folder, quiet=True)
    assert session.study.index is not None
    vocabulary = session.encoder.tokenizer.convert_tokens_to_ids(list(session.study.index.tokens))
    assert min(saved["kinds"][vocabulary].tolist()) == LEVEL
    assert ran.results["training"]["trainable_parameters"] == ran.results["training"]["total_parameters"]


def test_rank_needs_whole_word_embeddings(ran: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(Recipe(**RECIPE), ran.folder, quiet=True)
    items = sorted(session.study.data.dataset.items)

    def scores(out: str) -> list[float]:
        (result,) = ranked(ran, tmp_path, [{"id": "one", "history": items[:5]}], out)
        return list(result["scores"])

    table = ran.folder / "merged" / WHOLE_WORDS_FILE
    with_table = scores("with.jsonl")
    away = table.rename(tmp_path / WHOLE_WORDS_FILE)
    try:
        with pytest.raises(AssertionError, match="does not match the record of its training"):
            scores("refused.jsonl")
        monkeypatch.setattr("llmrec.answer.language_model.check_unchanged", lambda *_: None)
        without = scores("without.jsonl")
    finally:
        away.rename(table)
    assert with_table != pytest.approx(without, abs=1e-4)


def test_training_with_new_tokens_keeps_whole_word_embeddings(ran: Run, tmp_path: Path) -> None:
    model = {**RECIPE["model"], "name": str(ran.folder / "merged"), "shape": None}
    train = {**RECIPE["train"], "steps": 1, "learning_rate": 1e-9}
    recipe = Recipe(**{**RECIPE, "model": model, "index": {"scheme": "token"}, "train": train})
    grown = run(recipe, tmp_path / "out", quiet=True)
    before, base, after = (
        load_file(folder / WHOLE_WORDS_FILE)
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


def test_rejects_whole_words_in_decoder_before_training(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "llama")
    changes = {"model": {"name": str(folder), "max_length": 512, "whole_words": True}, "index": None}
    tasks = {"sequential": {"templates": ["continue-list"], "strategies": ["likelihood"]}}
    recipe = Recipe(**{**RECIPE, **changes, "tasks": tasks, "eval": {"arms": ["tuned"], "backend": "hf", "users": 5}})
    with raises(RecipeError, Facts("contradiction", column="model.whole_words", says="model.whole_words=false")):
        run(recipe, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out" / "adapter").exists()
