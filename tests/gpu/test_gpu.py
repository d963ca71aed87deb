"""What a GPU computes is what a CPU computes; `pytest -m gpu` runs these on a machine with one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the train extra is not installed")

from llmrec.backends.encode import Encoder  # noqa: E402
from llmrec.baselines import neural  # noqa: E402
from llmrec.baselines.sasrec import SASRec  # noqa: E402
from llmrec.index import semantic  # noqa: E402
from llmrec.machine import has_cuda  # noqa: E402
from llmrec.models import text_encoder  # noqa: E402
from llmrec.models.load import load_model, load_tokenizer  # noqa: E402
from llmrec.recipe.schema import ModelSection, RQVAEIndex, TrainSection  # noqa: E402
from llmrec.types import Backend  # noqa: E402
from tests.baselines.test_networks_on_gpu import scores  # noqa: E402
from tests.conftest import asks_for_gpu  # noqa: E402
from tests.encoders import tiny_encoder  # noqa: E402

DEVICES = ("cpu", "cuda")
TITLES = ("Toy Story", "Heat", "Toy Story 2", "Brazil and Jaws")


@pytest.mark.parametrize(
    ("marks", "shown"),
    [*(("", False), ("not gpu", False), ("slow and not gpu", False)), *(("gpu", True), ("gpu and not vllm", True))],
)
def test_gpu_is_hidden_without_gpu_marks(marks: str, shown: bool, request: pytest.FixtureRequest) -> None:
    assert asks_for_gpu(marks) is shown
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == "-1"
    assert hidden or asks_for_gpu(request.config.option.markexpr)


def backend_on(device: str, folder: Path) -> Backend:
    from llmrec.backends.hf.backend import HFBackend

    section = ModelSection(name=str(folder), dtype="float32")
    encoder = Encoder(load_tokenizer(str(folder), section), max_length=512)
    return HFBackend(load_model(str(folder), section).to(device), encoder)


@pytest.mark.gpu
def test_scores_equal_those_of_a_cpu(llama_folder: Path) -> None:
    from tests.contracts.test_backends import PROMPTS

    cpu, cuda = (backend_on(device, llama_folder) for device in DEVICES)
    arguments = PROMPTS, [TITLES] * len(PROMPTS)
    for one, two in zip(cpu.score(*arguments), cuda.score(*arguments), strict=True):
        assert two.logprobs == pytest.approx(one.logprobs, abs=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["lora", "full"])
def test_packed_training_equals_that_of_a_cpu(method: str, llama_folder: Path, tmp_path: Path) -> None:
    """Under an explicit mask, the path where cuDNN's attention gives gradients that are no numbers."""
    from llmrec.train import lora, sft
    from llmrec.train.batches import plan_steps
    from tests.train.test_packing import user_rows

    assert has_cuda() and not torch.backends.cuda.cudnn_sdp_enabled()
    section = ModelSection(name=str(llama_folder), dtype="float32")
    train = TrainSection(steps=6, learning_rate=1e-3, valid_every=50, packing="tree", method=method)
    encoder = Encoder(load_tokenizer(str(llama_folder), section), max_length=256)
    steps = plan_steps(iter(user_rows()[:60]), steps=6, batch_tokens=400, seed=0, width=100)
    losses = []
    for device in DEVICES:
        torch.manual_seed(0)
        model = lora.load_trainable(str(llama_folder), section, train)
        done = sft.train(model, encoder, steps, {}, train, folder=tmp_path / device, seed=0, quiet=True, device=device)
        losses.append([record["loss"] for record in done.log[1:]])
    assert losses[1] == pytest.approx(losses[0], abs=1e-2)


@pytest.mark.gpu
def test_vectors_of_texts_equal_those_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = text_encoder.encode_texts(tiny_encoder(), TITLES)
    monkeypatch.setattr(text_encoder, "has_cuda", lambda: False)
    assert np.allclose(on_gpu, text_encoder.encode_texts(tiny_encoder(), TITLES), atol=1e-3)


@pytest.mark.gpu
def test_networks_train_as_on_a_cpu() -> None:
    result: dict[str, Any] = {device: scores(SASRec, device)[1] for device in DEVICES}
    assert np.allclose(result["cuda"], result["cpu"], atol=1e-2)
    assert isinstance(neural.SequenceConfig().half, bool)
    x = np.random.default_rng(0).standard_normal((80, 6)).astype(np.float32)
    section = RQVAEIndex(hidden=(10,), dim=4, epochs=3, batch=32)
    fits = [
        semantic.fit_rqvae(x, section.model_copy(update={"device": device}), 2, 30, quiet=True) for device in DEVICES
    ]
    assert fits[1].error == pytest.approx(fits[0].error, abs=1e-2)
