"""Training for real on tiny models: it learns, it is deterministic, it resumes, and NF4 runs on the CPU."""

from __future__ import annotations

import math
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrec.backends.encode import Encoder
from llmrec.errors import LlmrecError, RecipeError
from llmrec.models.load import load_model, load_tokenizer
from llmrec.recipe.schema import LoraSection, ModelSection, TrainSection
from llmrec.train import lora, precision, sft
from llmrec.train.batches import plan
from llmrec.types import Example, Message, Segment
from tests.facts import Facts, raises

QUESTION = (Message("user", (Segment("text", "Answer with one number"),)),)


def examples() -> list[Example]:
    return [
        Example(
            id=str(k),
            user_id="u",
            task="rating",
            template="rating/x",
            messages=QUESTION,
            answer=(Segment("item", f"Heat {k % 3}: "), Segment("target", str(1 + k % 3)), Segment("target", "\n")),
            ends_turn=False,
        )
        for k in range(480)
    ]


def run(
    folder: Path, out: Path, *, steps: int = 12, dtype: str = "float32", **settings: Any
) -> tuple[sft.Training, Any]:
    section = ModelSection(name=str(folder), dtype=dtype)
    values = {"steps": steps, "batch_tokens": 256, "learning_rate": 1e-2, "valid_every": 6, "save_every": 4, **settings}
    train = TrainSection(**values)
    encoder = Encoder(load_tokenizer(str(folder), section), max_length=256)
    rows = [encoder.row(example) for example in examples()]
    torch.manual_seed(0)
    model = lora.load_trainable(str(folder), section, train)
    planned = plan(iter(rows), steps=steps, batch_tokens=256, seed=0)
    return sft.train(model, encoder, planned, {"rating": rows[:6]}, train, folder=out, seed=0, quiet=True), model


@pytest.mark.parametrize("folder", ["llama_folder", "qwen_folder"])
def test_it_learns_and_follows_validation(folder: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    done, _ = run(request.getfixturevalue(folder), tmp_path, steps=30)
    valid = [record["valid_loss"]["rating"] for record in done.log if record["valid_loss"]]
    assert valid[-1] < 0.5 * valid[0]
    assert [record["step"] for record in done.log] == list(range(31))
    assert done.tokens > done.target_tokens > 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("faulty", "column", "says"),
    [
        ("backward", "model.dtype", ("at step 3, after a gradient of norm nan at step 2", "float32", "does not help")),
        ("forward", "train.learning_rate", ("at step 2, after a gradient of norm", "lower train.learning_rate")),
    ],
)
def test_a_loss_that_is_no_number_is_one_line_that_says_why(
    faulty: str,
    column: str,
    says: tuple[str, ...],
    llama_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = lora.load_trainable

    def loaded(*args: Any) -> Any:
        model, passes = load(*args), count(1)

        def spoil(value: Any) -> Any:
            return value * (math.nan if next(passes) == 2 else 1.0)

        if faulty == "backward":
            # As a faulty kernel of attention does: the loss of this step is right.
            next(weight for weight in model.parameters() if weight.requires_grad).register_hook(spoil)
        else:
            model.get_input_embeddings().register_forward_hook(
                lambda layer, _, states: spoil(states) if layer.training else None
            )
        return model

    monkeypatch.setattr(lora, "load_trainable", loaded)
    with raises(LlmrecError, Facts("failed", column=column, says=("the loss is nan", *says))):
        run(llama_folder, tmp_path, steps=4)


def test_nf4_runs_on_the_cpu(llama_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    done, model = run(llama_folder, tmp_path, steps=4, method="qlora")
    kinds = {type(module).__name__ for module in model.modules()}
    assert "Linear4bit" in kinds
    assert all(record["loss"] is None or record["loss"] > 0 for record in done.log)


def test_switches_reach_the_adapter(llama_folder: Path) -> None:
    section = ModelSection(name=str(llama_folder), dtype="float32")
    train = TrainSection(lora=LoraSection(rank=4, rslora=True, dora=True, top_layers=1, targets=("q_proj",)))
    model = lora.load_trainable(str(llama_folder), section, train)
    config = model.peft_config["default"]
    assert (config.r, config.use_rslora, config.use_dora) == (4, True, True)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("layers.1." in name and "q_proj" in name for name in trained)


def test_full_tuning_trains_every_weight(llama_folder: Path, tmp_path: Path) -> None:
    done, model = run(llama_folder, tmp_path, steps=3, method="full", learning_rate=1e-3)
    assert done.trainable_parameters == done.total_parameters
    lora.save_full(tmp_path / "adapter", ModelSection(name="x", dtype="float32"), tmp_path / "merged")
    again = load_model(str(tmp_path / "merged"), ModelSection(name="x", dtype="float32"))
    ids = torch.tensor([[5, 9, 30]])
    with torch.no_grad():
        assert torch.allclose(model.eval()(input_ids=ids).logits, again(input_ids=ids).logits, atol=1e-4)


def test_without_bfloat16_a_float16_model_is_trained_in_float32(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # As on a Turing card, which only emulates bfloat16 and so is asked in float16.
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr(precision, "gpu_has_bf16", lambda: False)
    done, model = run(llama_folder, tmp_path, dtype="float16", steps=6)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(record["loss"] is None or math.isfinite(record["loss"]) for record in done.log)
    assert [record.getMessage() for record in caplog.records if "float32" in record.getMessage()] == [
        "this hardware does not support bfloat16: training in float32, which takes more memory and time"
    ]
    whole, _ = run(llama_folder, tmp_path / "float32", steps=6)
    assert [record["loss"] for record in done.log][1:] == pytest.approx(
        [record["loss"] for record in whole.log][1:], rel=1e-2
    )


def test_one_of_several_processes_that_are_not_together_is_refused(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with raises(RecipeError, Facts("unsupported", says=("WORLD_SIZE", "torchrun", "--launch"))):
        run(llama_folder, tmp_path, steps=1)
    assert not list(tmp_path.iterdir())


def test_impossible_settings_are_one_clear_error(llama_folder: Path) -> None:
    section = ModelSection(name=str(llama_folder), dtype="float32")
    with raises(RecipeError, Facts("unknown-name", column="train.lora.targets", says="q_proj")):
        lora.load_trainable(str(llama_folder), section, TrainSection(lora=LoraSection(targets=("nope",))))
    if not torch.cuda.is_available():
        with raises(RecipeError, Facts("unsupported", column="train.method", says="'qlora'")):
            lora.load_trainable(str(llama_folder), section, TrainSection(method="lora8"))
