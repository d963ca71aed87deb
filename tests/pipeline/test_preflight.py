"""`llmrec check` rejects what a run rejects, without loading weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import llmrec
from llmrec.errors import BackendError, LlmrecError, MissingExtra, ModelError, RecipeError
from llmrec.pipeline import preflight
from llmrec.pipeline import run as pipeline
from llmrec.recipe.schema import Recipe
from tests.conftest import make_tokenizer
from tests.facts import Facts, raises

ROWS = [
    {"user_id": f"u{u}", "item_id": f"i{(u + k) % 9}", "rating": 1 + (u * k) % 5, "timestamp": 100 * u + k}
    | {"title": f"Title {(u + k) % 9}"}
    for u in range(8)
    for k in range(6)
]


def recipe(model: Path | str, *, train: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    evaluation = {"backend": "hf", "arms": ["zero-shot", "tuned"], "users": 4, "candidates": {"count": 3}, **settings}
    return {
        "model": {"name": str(model)},
        "data": {"source": "table"},
        "tasks": {"rating": {}, "sequential": {}},
        "train": train or {},
        "eval": evaluation,
    }


@pytest.fixture
def t5(tmp_path: Path) -> Path:
    tokenizer = make_tokenizer()
    shape = {"vocab_size": len(tokenizer), "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0)).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


def refused(error: type[LlmrecError], facts: Facts, *model: Any, **more: Any) -> None:
    """Expect the same error from a check and from a run."""
    page = recipe(*model, **more)
    for call in (lambda: llmrec.check(page, data=ROWS), lambda: llmrec.run(page, out="run", data=ROWS, quiet=True)):
        with raises(error, facts):
            call()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_valid_recipe_passes(llama_folder: Path) -> None:
    assert llmrec.check(recipe(llama_folder), data=ROWS).cases == {"rating": 4, "sequential": 4}


def test_rejects_missing_folder() -> None:
    refused(ModelError, Facts("missing-file", "./nofolder", column="model.name"), "./nofolder")


def test_rejects_unknown_name() -> None:
    facts = Facts("unreachable", "user/model", column="model.name", says="HF_HUB_OFFLINE")
    refused(ModelError, facts, "user/model")


def test_rejects_pickled_weights(llama_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "pickled"))
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    refused(ModelError, Facts("unsafe", folder, column="model.name", says="pytorch_model.bin"), folder)
    # A server has the weights; the folder has the tokenizer.
    served = recipe(folder, arms=["zero-shot"], backend="openai", server={"model": "m"})
    assert llmrec.check(served, data=ROWS).cases["rating"] == 4


def test_rejects_encoder_decoder_with_vllm(t5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrec.pipeline.preflight.check_engine_device", lambda *_: None)
    refused(RecipeError, Facts("unsupported", column="eval.backend", says="eval.backend=hf"), t5, scorer="vllm")


def test_rejects_unknown_or_missing_tracker(llama_folder: Path) -> None:
    facts = Facts("unknown-name", column="train.report_to", says="tensorboard")
    refused(RecipeError, facts, llama_folder, train={"report_to": ["wand"]})
    facts = Facts("not-installed", column="train.report_to")
    refused(MissingExtra, facts, llama_folder, train={"report_to": ["neptune"]})


def test_rejects_comparison_of_unknown_rows(llama_folder: Path) -> None:
    refused(RecipeError, Facts("unknown-name", column="eval.planned"), llama_folder, planned=[["a/b", "c/d"]])


def test_rejects_missing_start(llama_folder: Path) -> None:
    facts = Facts("missing-file", "norun", column="train.start")
    refused(RecipeError, facts, llama_folder, train={"start": "norun"})


def test_rejects_eight_bits_without_gpu(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    refused(RecipeError, Facts("unsupported", column="train.method"), llama_folder, train={"method": "lora8"})


def test_rejects_missing_key_of_server(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    server = {"model": "m", "key_env": "NO_SUCH_KEY"}
    facts = Facts("missing-value", column="eval.server.key_env")
    refused(BackendError, facts, llama_folder, arms=["zero-shot"], backend="openai", server=server)


def test_rejects_relations_in_several_processes(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe(llama_folder, train={"teacher": {"run": "other", "relations": 1.0}})
    page = Recipe.model_validate({**settings, "name": "taught", "data": {"source": "made-reviews"}})
    monkeypatch.setenv("WORLD_SIZE", "2")
    for call in (
        lambda: pipeline.train(page, Path("run"), quiet=True),
        lambda: preflight.check_recipe(page, asks=True),
    ):
        with raises(RecipeError, Facts("unsupported", column="train.teacher.relations", says="one process")):
            call()
    monkeypatch.delenv("WORLD_SIZE")
    preflight.check_recipe(page, asks=True)
