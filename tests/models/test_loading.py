"""Model folders whose weights do not fit their configuration."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from llmrec.errors import ModelError
from llmrec.models.load import check_weights, load_model
from llmrec.models.text_encoder import encode_texts
from llmrec.recipe.schema import TrainSection
from llmrec.train.lora import load_trainable
from tests.conftest import make_tokenizer, section
from tests.facts import Facts, raises


def settle(folder: Path, **values: Any) -> None:
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | values))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.top.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    tokenizer = make_tokenizer()
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**shape, num_hidden_layers=2)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_hidden_layers": 3}, ("missing: model.layers.2.input_layernorm.weight", "and 6 more")),
        ({"num_hidden_layers": 1}, ("without a place: model.layers.1.input_layernorm.weight", "and 6 more")),
        ({"intermediate_size": 260}, ("of another shape: ", "gate_proj.weight [256, 128] for [260, 128]")),
        ({"tie_word_embeddings": False}, ("missing: lm_head.weight",)),
        ({"model_type": "bert"}, ("missing: bert.embeddings", "and 41 more")),
        (
            {"model_type": "gpt2"},
            ("missing: lm_head.weight, transformer.h.0.", "without a place: model.embed_tokens.weight"),
        ),
        ({"model_type": "mamba"}, ("missing: backbone.embeddings.weight",)),
        ({"model_type": "qwen3"}, ("missing: model.layers.0.self_attn.k_norm.weight",)),
    ],
)
@pytest.mark.parametrize("load", [load_model, check_weights])
def test_a_configuration_of_other_weights_is_refused(
    folder: Path, change: dict[str, Any], named: tuple[str, ...], load: Any
) -> None:
    settle(folder, **change)
    with pytest.raises(ModelError) as refused:
        load(str(folder), section(folder))
    message = str(refused.value)
    assert str(folder) in message
    assert "\n" not in message
    assert all(each in message for each in named), message


@pytest.mark.parametrize("load", [load_model, check_weights])
def test_a_renamed_tensor_is_named_by_both_names(folder: Path, load: Any) -> None:
    rewrite(folder, rename)
    with raises(
        ModelError,
        Facts(
            "damaged",
            folder,
            column="model.name",
            says=("missing: model.layers.0.mlp.up_proj.weight", "mlp.top.weight"),
        ),
    ):
        load(str(folder), section(folder))


def test_a_quantised_base_with_a_renamed_tensor_is_refused(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    train = TrainSection(method="qlora")
    load_trainable(str(folder), section(folder), train)
    rewrite(folder, rename)
    with raises(
        ModelError, Facts("damaged", folder, column="model.name", says="missing: model.layers.0.mlp.up_proj.weight")
    ):
        load_trainable(str(folder), section(folder), train)


def test_an_encoder_decoder_with_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    shape = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0)).save_pretrained(tmp_path)
    load_model(str(tmp_path), section(tmp_path))
    rewrite(tmp_path, lambda tensors: tensors.pop("encoder.block.1.layer.0.SelfAttention.q.weight"))
    with raises(
        ModelError,
        Facts("damaged", tmp_path, column="model.name", says="missing: encoder.block.1.layer.0.SelfAttention.q.weight"),
    ):
        load_model(str(tmp_path), section(tmp_path))


def test_what_other_programs_leave_beside_a_model_is_no_fault(folder: Path, caplog: Any, capsys: Any) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)
        tensors["v_head.summary.weight"] = torch.ones(1, 128)

    whole = load_model(str(folder), section(folder)).state_dict()
    rewrite(folder, add)
    with caplog.at_level(logging.WARNING):
        found = load_model(str(folder), section(folder)).state_dict()
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    assert [r.getMessage() for r in caplog.records if "LlamaForCausalLM" in r.getMessage()] == [
        f"{folder}: ignoring tensors that LlamaForCausalLM does not have: v_head.summary.weight"
    ]
    assert "LOAD REPORT" not in capsys.readouterr().err


def test_a_text_encoder_may_leave_out_its_pooler_and_carry_other_heads(bert: Path) -> None:
    assert encode_texts(str(bert), ["Heat", "Fargo"]).shape == (2, 32)


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        (3, "missing: encoder.layer.2.attention"),
        (1, "without a place: bert.encoder.layer.1.attention"),
    ],
)
def test_a_text_encoder_of_another_depth_is_refused(bert: Path, layers: int, named: str) -> None:
    settle(bert, num_hidden_layers=layers)
    with raises(ModelError, Facts("damaged", bert, says=named)):
        encode_texts(str(bert), ["Heat"])
