"""Magnitude pruning during training: its schedule, masks, and zeros in exported models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from llmrec.errors import LlmrecError, ModelError, RecipeError
from llmrec.models.load import load_model
from llmrec.recipe.schema import LoraSection, ModelSection, PruneSection, TrainSection
from llmrec.train import lora
from llmrec.train import pruning as magnitude
from tests.conftest import make_model, section
from tests.facts import Facts, raises
from tests.train.test_training import run

PRUNE = {"sparsity": 0.8, "end": 0.5, "every": 2}


def export(folder: Path, out: Path, method: str) -> dict[str, torch.Tensor]:
    """Return the weights of the blocks' linear layers, as they were exported and are read again."""
    chosen = ModelSection(name=str(folder), dtype="bfloat16")
    if method == "full":
        lora.save_full_model(out / "adapter", chosen, out / "merged")
    else:
        lora.merge_adapter(str(folder), chosen, out / "adapter", out / "merged")
    weights = load_model(str(out / "merged"), chosen).state_dict()
    return {name: each for name, each in weights.items() if name.endswith("_proj.weight")}


def test_schedule_equals_equation_1() -> None:
    cubic = PruneSection(sparsity=0.8, begin=0.1, end=0.5, every=10)
    # t0 = 10, t1 = 50: .8 (1 - (1 - k/4)^3) at step 10 + 10k.
    by_hand = {0: 0, 9: 0, 10: 0, 19: 0, 20: 0.4625, 29: 0.4625, 30: 0.7, 40: 0.7875, 49: 0.7875, 50: 0.8, 100: 0.8}
    for step, value in by_hand.items():
        assert magnitude.sparsity_at(cubic, 100, step) == pytest.approx(value)
    # The schedule reaches its end even if the last interval is shorter than `every`.
    assert magnitude.sparsity_at(PruneSection(begin=0.1, end=0.45), 100, 45) == 0.8
    once = PruneSection(sparsity=0.5, schedule="one-shot", end=0.25)
    assert [magnitude.sparsity_at(once, 8, step) for step in range(4)] == [0, 0, 0.5, 0.5]


def test_smallest_weights_are_pruned() -> None:
    weight = torch.tensor([[3.0, -1.0, 0.5], [1.0, -2.0, 1.0]])
    assert magnitude.magnitude_mask(weight, 1 / 3).tolist() == [[True, False, False], [True, True, True]]
    assert magnitude.magnitude_mask(weight, 2 / 3).tolist() == [[True, False, False], [False, True, False]]
    assert magnitude.magnitude_mask(weight, 0).all()
    # Weights that were pruned before are chosen again.
    pruned = torch.where(magnitude.magnitude_mask(weight, 0.5), weight, 0)
    assert torch.equal(magnitude.magnitude_mask(pruned, 0.5), pruned != 0)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_exported_model_has_the_zeros_of_training(method: str, llama_folder: Path, tmp_path: Path) -> None:
    rate = 1e-2 if method == "lora" else 1e-3
    done, model = run(llama_folder, tmp_path, steps=8, method=method, learning_rate=rate, prune=PRUNE)
    weights = export(llama_folder, tmp_path, method)
    zeros = {name: each == 0 for name, each in weights.items()}
    share = sum(int(each.sum()) for each in zeros.values()) / sum(each.numel() for each in zeros.values())
    assert share == pytest.approx(0.8, abs=1e-3) and done.sparsity == pytest.approx(share, abs=1e-6)
    masks = {f"{name}.weight": layer.llmrec_mask for name, layer in magnitude._prepared_layers(model)}
    assert masks.keys() == zeros.keys()
    assert all(torch.equal(zeros[name], ~mask) for name, mask in masks.items())
    # The trained model, the reference of an export, and the exported model agree.
    train, ids = TrainSection(method=method), torch.tensor([[5, 9, 30, 12, 44]])
    live = lora.load_adapted(str(llama_folder), section(llama_folder), train, tmp_path / "adapter")
    plain = load_model(str(tmp_path / "merged"), section(llama_folder))
    with torch.no_grad():
        trained = model.eval()(input_ids=ids).logits
        assert torch.allclose(trained, live(input_ids=ids).logits, atol=1e-5)
        assert torch.allclose(trained, plain(input_ids=ids).logits, atol=0.05 * float(trained.abs().max()))


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_masks_are_fixed_after_the_end_and_resumed(method: str, llama_folder: Path, tmp_path: Path) -> None:
    settings = {"method": method, "learning_rate": 1e-3, "prune": {**PRUNE, "end": 0.75}, "save_every": 2}
    full, _ = run(llama_folder, tmp_path, steps=8, keep_checkpoints=4, **settings)
    masks = {
        step: load_file(tmp_path / "checkpoints" / f"checkpoint-{step}" / magnitude.MASKS_FILE) for step in (4, 6, 8)
    }
    assert all(torch.equal(masks[6][name], masks[8][name]) for name in masks[6])
    assert not all(torch.equal(masks[4][name], masks[6][name]) for name in masks[6])
    # Killed once when the schedule is over, and once within it.
    for torn in ((8,), (8, 6)):
        for step in torn:
            (tmp_path / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json").write_text("torn")
        again, _ = run(llama_folder, tmp_path, steps=8, keep_checkpoints=4, **settings)
        assert again.adapter_sha256 == full.adapter_sha256 and again.sparsity == full.sparsity


def test_sparsity_of_0_changes_nothing(llama_folder: Path, tmp_path: Path) -> None:
    plain, _ = run(llama_folder, tmp_path / "plain", steps=4)
    none, _ = run(llama_folder, tmp_path / "none", steps=4, prune={"sparsity": 0})
    assert none.adapter_sha256 == plain.adapter_sha256
    assert none.sparsity is None
    # All weights, with masks that hide nothing.
    train = TrainSection(method="full", prune=PruneSection())
    model = lora.load_trainable(str(llama_folder), section(llama_folder), train)
    ids = torch.tensor([[5, 9, 30]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        magnitude.prune_to_share(model, 0.0)
        assert torch.equal(before, model(input_ids=ids).logits)


def test_only_unpruned_weights_are_trained(llama_folder: Path) -> None:
    train = TrainSection(method="full", prune=PruneSection())
    model = lora.load_trainable(str(llama_folder), section(llama_folder), train)
    magnitude.prune_to_share(model, 0.8)
    model(input_ids=torch.tensor([[5, 9, 30]])).logits.square().sum().backward()
    for _, layer in magnitude._prepared_layers(model):
        assert not layer.weight.grad[~layer.llmrec_mask].any() and layer.weight.grad[layer.llmrec_mask].any()
        # Hidden weights keep their value, so that a later mask may show them again.
        assert layer.weight[~layer.llmrec_mask].any()


def test_layers_without_adapters_are_pruned_and_adapters_count(llama_folder: Path) -> None:
    train = TrainSection(lora=LoraSection(targets=("q_proj",)), prune=PruneSection())
    model = lora.load_trainable(str(llama_folder), section(llama_folder), train)
    layers = dict(magnitude._prepared_layers(model))
    assert len(layers) == 7 * len(model.get_base_model().model.layers)
    adapted = layers["model.layers.0.self_attn.q_proj"]
    with torch.no_grad():
        # An adapter that cancels the first row of the base: these are then the smallest weights.
        adapted.lora_A["default"].weight.zero_()[0] = -adapted.base_layer.weight[0] / adapted.scaling["default"]
        adapted.lora_B["default"].weight.zero_()[0, 0] = 1
    magnitude.prune_to_share(model, 1 / adapted.base_layer.weight.shape[0])
    assert not adapted.llmrec_mask[0].any() and adapted.llmrec_mask[1:].all()


def test_rejects_pruning_of_other_methods_and_models() -> None:
    for settings in (
        {"method": "qlora"},
        {"method": "option"},
        {"lora": {"dora": True}},
        {"lora": {"dropout": 0.1}},
        {"judge": {}},
    ):
        with pytest.raises(ValueError, match=r"train\.prune"):
            TrainSection(prune={}, **settings)
    with pytest.raises(ValueError, match=r"train\.prune\.begin"):
        PruneSection(begin=0.7)
    # Its matrices are no linear layers.
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8))
    with raises(RecipeError, Facts("unsupported", None, column="train.prune")):
        magnitude.attach_masks(model)


def test_rejects_masks_of_another_model(llama_folder: Path, tmp_path: Path) -> None:
    train = TrainSection(method="full", prune=PruneSection())
    model = lora.load_trainable(str(llama_folder), section(llama_folder), train)
    magnitude.prune_to_share(model, 0.5)
    magnitude.save(model, tmp_path)
    other = load_model(str(make_model(tmp_path / "other", layers=3)), section(tmp_path / "other"))
    with raises(ModelError, Facts("damaged", magnitude.MASKS_FILE)):
        magnitude.zeroing_function(other, tmp_path)
    (tmp_path / magnitude.MASKS_FILE).write_bytes(b"torn")
    with pytest.raises(LlmrecError):
        magnitude.load(model, tmp_path)
