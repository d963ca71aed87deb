"""Model folders with damaged, malicious or mismatched files: one error that names the folder."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from llmrec.errors import LlmrecError, ModelError
from llmrec.models.load import check_weights, load_model
from llmrec.models.text_encoder import encode_texts, load_text_encoder
from llmrec.pipeline import bundle
from llmrec.recipe.schema import TrainSection
from llmrec.train.lora import load_trainable
from llmrec.types import Message, Prompt, Segment
from tests.conftest import encoder_of, make_tokenizer, section
from tests.facts import Facts, raises

Change = Callable[[Path], object]


def changing(name: str, **values: Any) -> Change:
    """Return a change of keys of a JSON file."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return change


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
        (
            {"model_type": "gpt2"},
            ("missing: lm_head.weight, transformer.h.0.", "without a place: model.embed_tokens.weight"),
        ),
    ],
)
def test_rejects_config_of_other_weights(folder: Path, change: dict[str, Any], named: tuple[str, ...]) -> None:
    changing("config.json", **change)(folder)
    for load in (load_model, check_weights):
        with raises(ModelError, Facts("damaged", folder, says=named)):
            load(str(folder), section(folder))


def test_renamed_tensor_is_reported_with_both_names(folder: Path) -> None:
    rewrite(folder, rename)
    says = ("missing: model.layers.0.mlp.up_proj.weight", "mlp.top.weight")
    with raises(ModelError, Facts("damaged", folder, column="model.name", says=says)):
        load_model(str(folder), section(folder))


def test_rejects_quantised_base_with_renamed_tensor(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    train = TrainSection(method="qlora")
    load_trainable(str(folder), section(folder), train)
    rewrite(folder, rename)
    with raises(ModelError, Facts("damaged", folder, says="missing: model.layers.0.mlp.up_proj.weight")):
        load_trainable(str(folder), section(folder), train)


def test_rejects_encoder_decoder_with_missing_tensor(tmp_path: Path) -> None:
    shape = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0)).save_pretrained(tmp_path)
    load_model(str(tmp_path), section(tmp_path))
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    rewrite(tmp_path, lambda tensors: tensors.pop(name))
    with raises(ModelError, Facts("damaged", tmp_path, column="model.name", says=f"missing: {name}")):
        load_model(str(tmp_path), section(tmp_path))


def test_additional_tensors_are_ignored(folder: Path, caplog: Any, capsys: Any) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)
        tensors["v_head.summary.weight"] = torch.ones(1, 128)

    before = load_model(str(folder), section(folder)).state_dict()
    rewrite(folder, add)
    with caplog.at_level(logging.WARNING):
        after = load_model(str(folder), section(folder)).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [r.getMessage() for r in caplog.records if "LlamaForCausalLM" in r.getMessage()] == [
        f"{folder}: ignoring tensors that LlamaForCausalLM does not have: v_head.summary.weight"
    ]
    assert "LOAD REPORT" not in capsys.readouterr().err


def test_text_encoder_may_lack_pooler_and_have_other_heads(bert: Path) -> None:
    assert encode_texts(str(bert), ["Heat", "Fargo"]).shape == (2, 32)


@pytest.mark.parametrize(
    ("layers", "named"),
    [(3, "missing: encoder.layer.2.attention"), (1, "without a place: bert.encoder.layer.1.attention")],
)
def test_rejects_text_encoder_of_other_depth(bert: Path, layers: int, named: str) -> None:
    changing("config.json", num_hidden_layers=layers)(bert)
    with raises(ModelError, Facts("damaged", bert, says=named)):
        encode_texts(str(bert), ["Heat"])


def put(name: str, content: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def read(folder: Path) -> None:
    """Open a folder as `llmrec rank` does."""
    bundle.read(str(folder))
    encoder_of(folder).prompt(Prompt(messages=(Message("user", (Segment("text", "Heat"),)),)))
    check_weights(str(folder), section(folder))
    load_model(str(folder), section(folder))


DEEP = "[" * 100_000
DAMAGED = {
    **{
        f"{name}: {content[:4]}": put(name, content)
        for name, contents in {
            "config.json": ("[]", "", DEEP),
            "tokenizer.json": ("null", DEEP),
            "tokenizer_config.json": ("[]", "", DEEP),
            "generation_config.json": ("[]",),
            "special_tokens_map.json": ("null",),
            "added_tokens.json": ("[]",),
        }.items()
        for content in contents
    },
    **{
        f"{name}={value!r}": changing("config.json", **{name: value})
        for name, value in (
            *(("num_hidden_layers", 0), ("vocab_size", -1), ("num_attention_heads", "x"), ("hidden_size", [])),
            *(("hidden_act", "nope"), ("model_type", 3), ("dtype", "floaty"), ("quantization_config", [])),
        )
    },
    "eos_token=3": changing("tokenizer_config.json", eos_token=3),
    "truncated weights": cut,
    "weights of zeros": put("model.safetensors", b"\0" * 100),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "llmrec.json nested": put("llmrec.json", DEEP),
    "llmrec.json: []": put("llmrec.json", "[]"),
    "llmrec.json of bytes": put("llmrec.json", b"\xff"),
}


@pytest.mark.parametrize("change", DAMAGED.values(), ids=DAMAGED)
def test_damaged_folder_gives_one_line_error(change: Change, folder: Path) -> None:
    change(folder)
    with pytest.raises(LlmrecError) as caught:
        read(folder)
    assert caught.value.kind in ("damaged", "wrong-format")
    assert str(folder) in (caught.value.file or "")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in %}",
        "{{ messages.__class__.__mro__ }}",
        "{{ raise_exception('no') }}",
        "{% for i in range(99999999) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_failing_chat_template_is_rejected(template: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with raises(ModelError, Facts("unsupported", folder, column="model.name", says="chat template")):
        read(folder)


def test_pickled_weights_are_not_loaded(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    proof = tmp_path / "ran"
    (folder / "pytorch_model.bin").write_bytes(f"\x80\x04cos\nsystem\n(S'touch {proof}'\ntR.".encode("latin-1"))
    with raises(ModelError, Facts("damaged", folder)):
        read(folder)
    assert not os.path.lexists(proof)


@pytest.mark.parametrize("change", [put("config.json", "null"), put("tokenizer_config.json", "[]")])
def test_damaged_text_encoder_is_rejected(change: Change, folder: Path) -> None:
    change(folder)
    with raises(ModelError, Facts("damaged", folder, column="index.semantic.encoder")):
        load_text_encoder(str(folder))
