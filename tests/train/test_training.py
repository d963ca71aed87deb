"""Training of tiny models: it learns, reports invalid losses, and applies its settings."""

from __future__ import annotations

import math
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrec.errors import LlmrecError, RecipeError
from llmrec.recipe.schema import LoraSection, TrainSection
from llmrec.train import lora, precision, sft
from llmrec.train.batches import plan_steps
from tests.conftest import encoder_of, section
from tests.facts import Facts, raises
from tests.train.tiny import examples, fit


def run(
    folder: Path, out: Path, *, steps: int = 12, dtype: str = "float32", **settings: Any
) -> tuple[sft.TrainingResult, Any]:
    train = TrainSection(**{"steps": steps, "learning_rate": 1e-2, "valid_every": 6, "save_every": 4, **settings})
    encoder = encoder_of(folder)
    rows = [encoder.row(example) for example in examples()]
    torch.manual_seed(0)
    model = lora.load_trainable(str(folder), section(folder, dtype), train)
    planned = plan_steps(iter(rows), steps=steps, batch_tokens=256, seed=0)
    return fit(model, encoder, planned, train, out, {"rating": rows[:6]}), model


def test_training_learns_and_logs_validation(qwen_folder: Path, tmp_path: Path) -> None:
    done, _ = run(qwen_folder, tmp_path, steps=20)
    valid = [record["valid_loss"]["rating"] for record in done.log if record["valid_loss"]]
    assert valid[-1] < 0.5 * valid[0]
    assert [record["step"] for record in done.log] == list(range(21))
    assert done.tokens > done.target_tokens > 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("faulty", "column", "says"),
    [
        ("backward", "model.dtype", ("at step 3, after a gradient of norm nan at step 2", "float32", "does not help")),
        ("forward", "train.learning_rate", ("at step 2, after a gradient of norm", "lower train.learning_rate")),
    ],
)
def test_invalid_loss_is_an_error_with_its_cause(
    faulty: str, column: str, says: tuple[str, ...], llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = lora.load_trainable

    def loaded(*args: Any) -> Any:
        model, passes = load(*args), count(1)

        def spoil(value: Any) -> Any:
            return value * (math.nan if next(passes) == 2 else 1.0)

        if faulty == "backward":
            # Like a faulty attention kernel: the loss of this step is right.
            next(weight for weight in model.parameters() if weight.requires_grad).register_hook(spoil)
        else:
            model.get_input_embeddings().register_forward_hook(
                lambda layer, _, states: spoil(states) if layer.training else None
            )
        return model

    monkeypatch.setattr(lora, "load_trainable", loaded)
    with raises(LlmrecError, Facts("failed", column=column, says=("the loss is nan", *says))):
        run(llama_folder, tmp_path, steps=4)


def test_lora_settings_are_applied(llama_folder: Path) -> None:
    train = TrainSection(lora=LoraSection(rank=4, rslora=True, dora=True, top_layers=1, targets=("q_proj",)))
    model = lora.load_trainable(str(llama_folder), section(llama_folder), train)
    config = model.peft_config["default"]
    assert (config.r, config.use_rslora, config.use_dora) == (4, True, True)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("layers.1." in name and "q_proj" in name for name in trained)


def test_without_bfloat16_a_float16_model_is_trained_in_float32(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Like a Turing GPU, which only emulates bfloat16.
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr(precision, "gpu_has_bf16", lambda: False)
    done, model = run(llama_folder, tmp_path, dtype="float16", steps=6)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(record["loss"] is None or math.isfinite(record["loss"]) for record in done.log)
    assert [record.getMessage() for record in caplog.records if "float32" in record.getMessage()] == [
        "this hardware does not support bfloat16: training in float32, which takes more memory and time"
    ]
    full, _ = run(llama_folder, tmp_path / "float32", steps=6)
    losses = [[record["loss"] for record in each.log[1:]] for each in (done, full)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_rejects_unconnected_processes(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with raises(RecipeError, Facts("unsupported", says=("WORLD_SIZE", "torchrun", "--launch"))):
        run(llama_folder, tmp_path, steps=1)
    assert not list(tmp_path.iterdir())


def test_rejects_impossible_settings(llama_folder: Path) -> None:
    folder, model = str(llama_folder), section(llama_folder)
    with raises(RecipeError, Facts("unknown-name", column="train.lora.targets", says="q_proj")):
        lora.load_trainable(folder, model, TrainSection(lora=LoraSection(targets=("nope",))))
    if not torch.cuda.is_available():
        with raises(RecipeError, Facts("unsupported", column="train.method", says="'qlora'")):
            lora.load_trainable(folder, model, TrainSection(method="lora8"))
