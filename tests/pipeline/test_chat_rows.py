"""Training rows as chat messages: the rows of the trainer in its order, readable by datasets and TRL."""

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
from llmrec.pipeline.conversations import WrittenConversations, write_conversations
from llmrec.pipeline.study import build_study, encoder_of
from llmrec.pipeline.training import plan_training
from llmrec.recipe.load import load_recipe
from llmrec.train.steps import TrainingPlan
from tests.facts import Facts, raises
from tests.models.test_model_kinds import paired

RECIPE = "recipes/movielens-100k/four-tasks.yaml"
STEPS = ["data={source: made-reviews, noun: products}", "reviews=null", "train.steps=12", "train.batch_tokens=768"]


Rows = tuple[WrittenConversations, list[Any], TrainingPlan, Encoder]


def written(folder: Path, file: Path, *changes: str) -> Rows:
    """Write a file, and return its summary, its messages, and the training plan of the same recipe."""
    study = build_study(load_recipe(RECIPE, [f"model.name={folder}", *STEPS, *changes]))
    summary = write_conversations(study, file)
    messages = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    encoder = encoder_of(study, str(folder))
    return summary, messages, plan_training(study, encoder), encoder


def tokens(encoder: Encoder, messages: list[dict[str, str]]) -> list[int]:
    """Tokenise a conversation as other programs do."""
    return list(encoder.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows") / "rows.jsonl"


@pytest.fixture(scope="module")
def long_rows(file: Path, llama_folder: Path) -> Rows:
    return written(llama_folder, file, "train.max_row_tokens=2048")


def test_conversations_have_the_tokens_and_order_of_training_rows(long_rows: Rows) -> None:
    summary, messages, plan, encoder = long_rows
    rows = [row for step in plan.steps for row in step.rows]
    assert len(rows) == len(messages) == summary.rows > 12
    assert summary.steps == 12 and summary.different == summary.cut == summary.dropped == 0
    for row, turns in zip(rows, messages, strict=True):
        assert [turn["role"] for turn in turns][-2:] == ["user", "assistant"]
        assert tokens(encoder, turns)[: len(row.ids)] == list(row.ids)
    assert 0 < summary.partly < summary.rows and 0 < summary.share < 1


def test_packed_rows_keep_their_order(llama_folder: Path, tmp_path: Path) -> None:
    changes = ["train.packing=tree", "train.max_row_tokens=2048"]
    changes += ["tasks.sequential.templates=[one-history]", "tasks.direct.templates=[after-history]"]
    summary, messages, plan, encoder = written(llama_folder, tmp_path / "rows.jsonl", *changes)
    rows = [row for step in plan.steps for row in step.rows]
    assert len(rows) == summary.rows
    for row, turns in zip(rows, messages, strict=True):
        assert tokens(encoder, turns)[: len(row.ids)] == list(row.ids)


@pytest.mark.slow
def test_truncated_row_ends_at_the_same_token(llama_folder: Path, tmp_path: Path) -> None:
    summary, messages, plan, encoder = written(llama_folder, tmp_path / "rows.jsonl", "train.max_row_tokens=256")
    rows = [row for step in plan.steps for row in step.rows]
    assert summary.cut > 0 and len(rows) == summary.rows + summary.dropped
    if not summary.dropped:
        for row, turns in zip(rows, messages, strict=True):
            shared = [a == b for a, b in zip(tokens(encoder, turns), row.ids, strict=False)]
            # Training also removes the end of the turn.
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
def test_rejects_rows_that_are_no_conversations(
    changes: list[str], key: str, llama_folder: Path, tmp_path: Path
) -> None:
    study = build_study(load_recipe(RECIPE, [f"model.name={llama_folder}", *STEPS, *changes]))
    with raises(RecipeError, Facts("unsupported", column=key)):
        write_conversations(study, tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()


def test_rejects_encoder_decoder_and_existing_file(llama_folder: Path, tmp_path: Path) -> None:
    study = build_study(load_recipe(RECIPE, [f"model.name={paired('t5', tmp_path)}", *STEPS]))
    with raises(RecipeError, Facts("unsupported", column="model.name")):
        write_conversations(study, tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("mine", encoding="utf-8")
    command = ["prompts", RECIPE, f"model.name={llama_folder}", *STEPS, "--chat", f"{tmp_path}/rows.jsonl"]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, LlmrecError) and result.exception.kind == "exists"
    assert (tmp_path / "rows.jsonl").read_text(encoding="utf-8") == "mine"
    result = CliRunner().invoke(app, [*command, "--all"])
    assert isinstance(result.exception, RecipeError) and result.exception.kind == "contradiction"


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


def test_command_does_not_import_torch(llama_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    command = ["prompts", RECIPE, f"model.name={llama_folder}", *STEPS, "train.steps=2", "--chat", str(path)]
    result = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH, *command], capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "training examples in 2 steps" in result.stdout
    assert path.read_text(encoding="utf-8").count("\n") > 2


def test_datasets_reads_rows_and_trl_trains_on_them(
    long_rows: Rows, file: Path, llama_folder: Path, tmp_path: Path
) -> None:
    import datasets
    import torch
    import trl
    from transformers import AutoModelForCausalLM

    summary, messages, _, encoder = long_rows
    rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.column_names == ["messages"] and len(rows) == summary.rows
    assert rows[0]["messages"] == messages[0]
    few = rows.select(range(2))
    options: dict[str, Any] = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    options |= {"max_steps": 1, "per_device_train_batch_size": 2, "max_length": None, "bf16": False}
    settings = trl.SFTConfig(output_dir=str(tmp_path / "trl"), **options)
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    tokenizer = load_tokenizer(str(llama_folder), load_recipe(RECIPE, [f"model.name={llama_folder}"]).model)
    trainer = trl.SFTTrainer(model=model, args=settings, train_dataset=few, processing_class=tokenizer)
    assert [list(row["input_ids"]) for row in trainer.train_dataset] == [tokens(encoder, item) for item in messages[:2]]
    assert trainer.train().training_loss > 0
