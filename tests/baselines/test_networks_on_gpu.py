"""Networks on a fake GPU: all tensors are on the device, and results equal those of a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from llmrec.baselines import neural  # noqa: E402
from llmrec.baselines.gru4rec import GRU4Rec  # noqa: E402
from llmrec.baselines.sasrec import SASRec  # noqa: E402
from llmrec.errors import RecipeError  # noqa: E402
from llmrec.index import semantic  # noqa: E402
from llmrec.recipe.schema import RQVAEIndex  # noqa: E402
from tests.backends.fake_cuda import FakeCuda, fake_cuda  # noqa: E402
from tests.baselines.test_baselines_neural import _request, _ring  # noqa: E402
from tests.facts import Facts, raises  # noqa: E402

OPTIONS = {"dropout": 0.0, "learning_rate": 0.01, "batch": 64, "epochs": 2, "patience": 2, "quiet": True, "dim": 8}


def scores(model_class: Any, device: str, **options: Any) -> tuple[Any, Any]:
    model = model_class(model_class.Config(device=device, precision="float32", **{**OPTIONS, **options}))
    model.fit(_ring(users=40))
    return model, model.scores([_request(4, 5, 6), _request(6), _request()])


# The fake device reports that it is CUDA.
@pytest.mark.filterwarnings("ignore:PyTorch was compiled without cuDNN")
@pytest.mark.parametrize(("model_class", "negatives"), [(SASRec, None), (SASRec, 5), (GRU4Rec, None)])
def test_network_on_gpu_equals_cpu(model_class: Any, negatives: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = scores(model_class, "cpu", negatives=negatives)
    monkeypatch.setattr(neural, "has_cuda", lambda: True)
    monkeypatch.setattr(neural, "gpu_has_bf16", lambda: False)
    with fake_cuda():
        model, result = scores(model_class, "auto", negatives=negatives)
        table = model._fitted.network["table"].weight
        assert isinstance(table, FakeCuda) and str(table.device) == "cuda:0"
        state = model.state()
        again = model_class(model.config)
        again.restore(_ring(users=40), state)
        assert isinstance(again._fitted.network["table"].weight, FakeCuda)
        assert np.allclose(again.scores([_request(4, 5, 6)]), result[:1], atol=1e-4)
    assert np.allclose(result, expected, atol=1e-3)
    assert all(type(each) is np.ndarray for each in state.values())


def test_rq_vae_on_gpu_equals_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((80, 6)).astype(np.float32)
    section = RQVAEIndex(hidden=(10,), dim=4, epochs=3, batch=32)
    # More codewords than vectors use, so that some are reset.
    expected = semantic.fit_rqvae(x, section, 2, 30, quiet=True)
    monkeypatch.setattr(semantic, "has_cuda", lambda: True)
    with fake_cuda():
        result = semantic.fit_rqvae(x, section, 2, 30, quiet=True)
        kept = semantic.fit_rqvae(x, section.model_copy(update={"device": "cpu"}), 2, 30, quiet=True)
    assert np.allclose(result.codebooks, expected.codebooks, atol=1e-4)
    assert np.array_equal(kept.codebooks, expected.codebooks)
    assert result.error == pytest.approx(expected.error, abs=1e-4)


@pytest.mark.parametrize("available", [False, True], ids=["no GPU", "no kernels for it"])
def test_rejects_unusable_gpu(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75"])
    with raises(RecipeError, Facts("unsupported", column="device")):
        scores(SASRec, "cuda")
    x = np.zeros((4, 2), dtype=np.float32)
    with raises(RecipeError, Facts("unsupported", column="index.semantic.rqvae.device")):
        semantic.fit_rqvae(x, RQVAEIndex(device="cuda"), 2, 2)
