"""Training rows as chat messages: the trainer's rows in its order, read by datasets and trained on by TRL."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmrec.backends.encode import Encoder
from llmrec.cli.main import app
from llmrec.errors import LlmrecError, RecipeError
from llmrec.models.load import load_tokenizer
from llmrec.pipeline.conversations import Written, write
from llmrec.pipeline.study import build_study, encoder_of
from llmrec.pipeline.training import plan_training
from llmrec.recipe.load import load_recipe
from llmrec.train.steps import Plan
from tests.facts import Facts, raises
from tests.models.test_model_kinds import paired

RECIPE = "recipes/movielens-100k/four-tasks.yaml"
STEPS = ["data={source: made-reviews, noun: products}", "reviews=null", "train.steps=12", "train.batch_tokens=768"]


def written(folder: Path, file: Path, *changes: str) -> tuple[Written, list[Any], Plan, Encoder]:
    """Return what was written, the messages, and what training plans with the same recipe."""
    study = build_study(load_recipe(RECIPE, [f"model.name={folder}", *STEPS, *changes]))
    done = write(study, file)
    messages = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    encoder = encoder_of(study, str(folder))
    return done, messages, plan_training(study, encoder), encoder


def tokens(encoder: Encoder, messages: list[dict[str, str]]) -> list[int]:
    """Tokenise a conversation as other programs do."""
    ids = encoder.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    return list(ids)


def test_conversations_have_the_tokens_of_the_rows_in_the_order_of_training(llama_folder: Path, tmp_path: Path) -> None:
    done, messages, plan, encoder = written(llama_folder, tmp_path / "rows.jsonl", "train.max_row_tokens=2048")
    rows = [row for step in plan.steps for row in step.rows]
    assert len(rows) == len(messages) == done.rows > 12
    assert done.steps == 12 and done.different == done.cut == done.dropped == 0
    for row, turns in zip(rows, messages, strict=True):
        assert [turn["role"] for turn in turns][-2:] == ["user", "assistant"]
        assert tokens(encoder, turns)[: len(row.ids)] == list(row.ids)
    assert 0 < done.partly < done.rows and 0 < done.share < 1


def test_rows_of_one_history_are_written_in_their_order_too(llama_folder: Path, tmp_path: Path) -> None:
    changes = ["train.packing=tree", "train.max_row_tokens=2048"]
    changes += ["tasks.sequential.templates=[one-history]", "tasks.direct.templates=[after-history]"]
    done, messages, plan, encoder = written(llama_folder, tmp_path / "rows.jsonl", *changes)
    rows = [row for step in plan.steps for row in step.rows]
    assert len(rows) == done.rows
    for row, turns in zip(rows, messages, strict=True):
        assert tokens(encoder, turns)[: len(row.ids)] == list(row.ids)


@pytest.mark.slow
def test_a_row_that_training_cuts_ends_before_the_cut(llama_folder: Path, tmp_path: Path) -> None:
    done, messages, plan, encoder = written(llama_folder, tmp_path / "rows.jsonl", "train.max_row_tokens=256")
    rows = [row for step in plan.steps for row in step.rows]
    assert done.cut > 0 and len(rows) == done.rows + done.dropped
    if not done.dropped:
        for row, turns in zip(rows, messages, strict=True):
            shared = [a == b for a, b in zip(tokens(encoder, turns), row.ids, strict=False)]
            # Only the end of the turn, which training cut off with the rest of the list, may differ.
            assert all(shared[:-8])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (["index={scheme: token}", "train.only=[sequential]"], "index"),
        (["train={method: prompt, steps: 12, lora: {}}"], "train.method"),
        (["train.preference={loss: dpo, reference_free: true}", "train.only=[sequential]"], "train.preference"),
        (
            ["tasks.rating.head={}", "tasks.rating.strategies=[head]", "eval.backend=hf", "train.only=[rating]"],
            "tasks.rating.head",
        ),
    ],
)
def test_rows_that_are_no_conversations_are_refused(
    changes: list[str], key: str, llama_folder: Path, tmp_path: Path
) -> None:
    study = build_study(load_recipe(RECIPE, [f"model.name={llama_folder}", *STEPS, *changes]))
    with raises(RecipeError, Facts("unsupported", column=key)):
        write(study, tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()


def test_an_encoder_decoder_and_an_existing_file_are_refused(llama_folder: Path, tmp_path: Path) -> None:
    study = build_study(load_recipe(RECIPE, [f"model.name={paired('t5', tmp_path)}", *STEPS]))
    with raises(RecipeError, Facts("unsupported", column="model.name")):
        write(study, tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("mine", encoding="utf-8")
    words = ["prompts", RECIPE, f"model.name={llama_folder}", *STEPS, "--chat", f"{tmp_path}/rows.jsonl"]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, LlmrecError) and done.exception.kind == "exists"
    assert (tmp_path / "rows.jsonl").read_text(encoding="utf-8") == "mine"
    done = CliRunner().invoke(app, [*words, "--all"])
    assert isinstance(done.exception, RecipeError) and done.exception.kind == "contradiction"


_WITHOUT_TORCH = """
import sys
from llmrec.cli import main
sys.argv = ["llmrec", *sys.argv[1:]]
try:
    main.main()
except SystemExit as ended:
    assert not ended.code, ended.code
assert "torch" not in sys.modules
"""


def test_the_command_writes_them_without_torch(llama_folder: Path, tmp_path: Path) -> None:
    words = ["prompts", RECIPE, f"model.name={llama_folder}", *STEPS, "--chat", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH, *words], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "training examples in 12 steps" in done.stdout
    assert (tmp_path / "rows.jsonl").read_text(encoding="utf-8").count("\n") > 12


def test_datasets_reads_them_and_trl_trains_on_them(llama_folder: Path, tmp_path: Path) -> None:
    import datasets
    import torch
    import trl
    from transformers import AutoModelForCausalLM

    file = tmp_path / "rows.jsonl"
    done, messages, _, encoder = written(llama_folder, file)
    rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.column_names == ["messages"] and len(rows) == done.rows
    assert rows[0]["messages"] == messages[0]
    # The first rows that are not longer than a small training takes.
    few = rows.select(range(4))
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=1,
        per_device_train_batch_size=4,
        max_length=None,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
    )
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    tokenizer = load_tokenizer(str(llama_folder), load_recipe(RECIPE, [f"model.name={llama_folder}"]).model)
    trainer = trl.SFTTrainer(model=model, args=settings, train_dataset=few, processing_class=tokenizer)
    assert [list(row["input_ids"]) for row in trainer.train_dataset] == [tokens(encoder, item) for item in messages[:4]]
    assert trainer.train().training_loss > 0
