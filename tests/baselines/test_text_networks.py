"""Sequence models whose item vectors read texts: SASRec, and layers of a language model."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrec.baselines.llm_sequence import LLMSequence
from llmrec.baselines.sasrec_text import SASRecText
from llmrec.data.split import SplitDataset
from llmrec.errors import ModelError
from llmrec.models.first_layers import load_first_layers
from llmrec.models.load import BUNDLE_FILE
from llmrec.models.text_encoder import TUNING_RECORD_FILE
from tests.baselines.test_baselines_neural import _request, _ring, _tests
from tests.encoders import tiny_encoder
from tests.facts import Facts, raises

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", reason="the train extra is not installed")
ATTENTION = {"dim": 16, "epochs": 2, "patience": 1, "quiet": True}
SHORT = {"encoder": tiny_encoder(), "layers": 1, "epochs": 2, "patience": 1, "quiet": True}


@pytest.fixture(scope="module")
def data() -> SplitDataset:
    ring = _ring()
    items = {
        name: replace(item, title=f"number {int(name[1:]) % 7} {name}") for name, item in ring.dataset.items.items()
    }
    return replace(ring, dataset=replace(ring.dataset, items=items))


def test_item_vectors_are_an_embedding_and_a_mapped_text(data: SplitDataset) -> None:
    model = SASRecText(**ATTENTION)
    model.fit(data)
    network = model._model.network
    expected = network["table"].weight + network.texts @ network["project"].weight.T
    items = torch.tensor([[3, 0, 7]])
    assert torch.allclose(model._item_vectors(network), expected, atol=1e-6)
    assert torch.allclose(model._embedded(network, items), expected[items], atol=1e-6)
    assert network.texts.any(), "texts without words in common would be zero"


@pytest.mark.parametrize("kind", [SASRecText, LLMSequence])
def test_learns_a_planted_sequence(kind: Any, data: SplitDataset, llama_folder: Path) -> None:
    settings = {"learning_rate": 0.01, "batch": 64, "epochs": 20, "patience": None, "dropout": 0.1, "quiet": True}
    if kind is LLMSequence:
        settings |= {"encoder": tiny_encoder(), "layers": 1, "layer_learning_rate": 0.001, "model": str(llama_folder)}
    model = kind(**settings)
    model.fit(data)
    requests, targets = _tests(data)
    requests = [replace(request, history=request.history[-5:]) for request in requests]
    assert np.mean(model.scores(requests).argmax(axis=1) == targets) > 0.95


def test_a_restored_model_has_the_same_scores(data: SplitDataset, llama_folder: Path) -> None:
    model, other = (LLMSequence(**SHORT, model=str(llama_folder)) for _ in range(2))
    model.fit(data)
    other.restore(data, model.state())
    requests = [_request(4, 5, 6), _request(6)]
    np.testing.assert_array_equal(model.scores(requests), other.scores(requests))
    assert not any("embed_tokens" in name for name in model.state()), "items replace the tokens"


@pytest.mark.parametrize("change", [{"pretrained": False}, {"shuffled": True}])
def test_ablations_change_the_scores(data: SplitDataset, llama_folder: Path, change: dict[str, Any]) -> None:
    scores = []
    for more in ({}, change):
        model = LLMSequence(**SHORT | more, model=str(llama_folder), seed=1)
        model.fit(data)
        scores.append(model.scores([_request(4, 5, 6)]))
    assert not np.allclose(*scores)


def test_first_layers_keep_their_weights(llama_folder: Path) -> None:
    layers, folder = load_first_layers(str(llama_folder), 1, column="model")
    complete, _ = load_first_layers(str(llama_folder), None, column="model")
    assert len(layers.layers) == 1 and len(complete.layers) == 2 and folder == str(llama_folder)
    for one, two in zip(layers.layers[0].parameters(), complete.layers[0].parameters(), strict=True):
        assert torch.equal(one, two)


def test_rejects_unusable_models(data: SplitDataset, llama_folder: Path, tmp_path: Path) -> None:
    for record in (BUNDLE_FILE, TUNING_RECORD_FILE):
        tuned = shutil.copytree(llama_folder, tmp_path / record)
        (tuned / record).write_text("{}", encoding="utf-8")
        with raises(ModelError, Facts("leak", tuned, column="model", says="base model")):
            LLMSequence(**SHORT, model=str(tuned)).fit(data)
    with raises(ModelError, Facts("bad-value", llama_folder, column="layers", says="2 layers")):
        LLMSequence(**SHORT | {"layers": 3}, model=str(llama_folder)).fit(data)
