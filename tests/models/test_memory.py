"""Memory of a GPU, on GPUs that are made up: estimates, where a model is put, and one line where it is full."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hub

from llmrec.cli.estimate import _of_gpu, memory_of
from llmrec.errors import LlmrecError
from llmrec.models import memory
from llmrec.models.memory import ASKING, TRAINING, placed, reporting_full_memory
from llmrec.recipe.schema import LoraSection, ModelSection, TrainSection
from tests.facts import Facts, raises

GIB = 2**30
BF16 = ModelSection(dtype="bfloat16", device="cpu")
# The shapes of Qwen3-1.7B and of Llama-3-8B.
QWEN = hub.Qwen3Config(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
)  # fmt: skip
LLAMA = hub.LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "train", "wanted"),
    [
        # Weights and what is kept for backward, by hand; adapters of rank 16 beside them.
        (QWEN, {"batch_tokens": 1536}, 3.2 + 4.1 + 0.3),
        (QWEN, {"batch_tokens": 8192}, 3.2 + 21.9 + 0.3),
        (QWEN, {"batch_tokens": 8192, "gradient_checkpointing": True}, 3.2 + 0.9 + 0.8 + 0.3),
        (QWEN, {"batch_tokens": 8192, "micro_tokens": 1536}, 3.2 + 4.1 + 0.3),
        (QWEN, {"batch_tokens": 1536, "method": "full"}, 25.6 + 8.2),
        (QWEN, {"batch_tokens": 1536, "method": "full", "optim": "adamw_8bit"}, 16.2 + 1.7 + 8.2),
        (LLAMA, {"batch_tokens": 1536}, 15.0 + 9.4 + 0.6),
        (LLAMA, {"batch_tokens": 1536, "method": "qlora"}, 3.9 + 2.0 + 9.4 + 0.6),
        (LLAMA, {"batch_tokens": 1536, "method": "lora8"}, 6.5 + 2.0 + 9.4 + 0.6),
        (LLAMA, {"batch_tokens": 1536, "lora": {"top_layers": 8}}, 15.0 + 9.4 / 4 + 0.6),
    ],
)
def test_what_a_step_of_training_takes(config: Any, train: dict[str, Any], wanted: float) -> None:
    section = TrainSection(**{**train, "lora": LoraSection(**train.get("lora", {}))})
    assert memory_of(config, BF16, section) / GIB == pytest.approx(wanted, abs=0.3)


def test_an_estimate_is_compared_with_what_is_free() -> None:
    assert _of_gpu(20.0, None) == ""
    assert "22.0 GiB" in _of_gpu(20.0, 22.0) and "too little" not in _of_gpu(20.0, 22.0)
    for key in ("train.gradient_checkpointing=true", "train.micro_tokens", "train.method=qlora"):
        assert key in _of_gpu(27.0, 22.0)


def test_a_full_gpu_is_one_line_that_names_what_makes_it_smaller() -> None:
    said = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.10 GiB is "
        "free. Including non-PyTorch memory, this process has 22.5 GiB memory in use. Of the allocated memory 21 GiB "
        "is allocated by PyTorch. See PYTORCH_CUDA_ALLOC_CONF."
    )

    @reporting_full_memory("training", TRAINING, "train.batch_tokens")
    def train(error: Exception) -> None:
        raise error

    for _ in range(2):
        with raises(
            LlmrecError,
            Facts(
                "exhausted",
                column="train.batch_tokens",
                says=("Tried to allocate 2.00 GiB", "1.10 GiB is free", "train.gradient_checkpointing=true"),
            ),
        ):
            train(torch.OutOfMemoryError(said))
    with pytest.raises(RuntimeError, match="another fault"):
        train(RuntimeError("another fault"))
    with (
        raises(LlmrecError, Facts("exhausted", column="eval.batch_tokens", says="memory of the GPU is full")),
        reporting_full_memory("asking the model", ASKING, "eval.batch_tokens"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    # An export cannot change the keys of the run that it reads.
    with (
        raises(LlmrecError, Facts("exhausted", column="--check-users", says=("measuring", "fewer"))),
        reporting_full_memory("measuring", "give fewer", "--check-users", instead=True),
        reporting_full_memory("asking the model", ASKING, "eval.batch_tokens"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with (
        raises(LlmrecError, Facts("bad-value", says="another fault")),
        reporting_full_memory("measuring", "give fewer", "--check-users", instead=True),
    ):
        raise LlmrecError("another fault", kind="bad-value")


class _Model:
    """Seven GiB of float32, which moves nowhere and remembers where it was sent."""

    def __init__(self) -> None:
        self.dtype, self.sent = torch.float32, []  # type: ignore[var-annotated]

    def parameters(self) -> list[Any]:
        return [torch.empty(7 * GIB // 4, device="meta", dtype=self.dtype)]

    def to(self, target: Any) -> _Model:
        self.dtype = target if isinstance(target, torch.dtype) else self.dtype
        self.sent.append(target)
        return self


@pytest.mark.parametrize(
    ("free", "sent"), [(9, ["cuda"]), (7, [torch.bfloat16, "cuda"]), (4, [])], ids=["whole", "half", "CPU"]
)
def test_a_model_goes_where_it_fits(
    free: int, sent: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: free * GIB)
    monkeypatch.setattr(memory, "gpu_has_bf16", lambda: True)
    model = _Model()
    assert placed(model, "cuda") is model and model.sent == sent
    assert len(caplog.messages) == (sent != ["cuda"])
    assert placed(model, "cpu") is model and model.sent == sent
