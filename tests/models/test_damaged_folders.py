"""Model folders whose files are damaged, of another form or meant to harm: one error that names the folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmrec.backends.encode import Encoder
from llmrec.errors import LlmrecError, ModelError
from llmrec.models.load import check_weights, load_model, load_tokenizer
from llmrec.models.text_encoder import open_encoder
from llmrec.pipeline import bundle
from llmrec.recipe.schema import ModelSection
from llmrec.types import Message, Prompt, Segment
from tests.facts import Facts, raises

Change = Callable[[Path], object]


def put(name: str, content: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def told(name: str, **values: Any) -> Change:
    def change(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | values))

    return change


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


def ask(folder: Path) -> None:
    """Open a folder as `llmrec rank` does."""
    section = ModelSection(name=str(folder), dtype="float32")
    bundle.read(str(folder))
    encoder = Encoder(load_tokenizer(str(folder), section), max_length=64)
    encoder.prompt(Prompt(messages=(Message("user", (Segment("text", "Heat"),)),)))
    check_weights(str(folder), section)
    load_model(str(folder), section)


DEEP = "[" * 100_000
DAMAGED = {
    **{
        f"{name}: {content[:4]}": put(name, content)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json")
        for content in ("[]", "null", "3", "", DEEP)
    },
    **{
        f"{name}: {content}": put(name, content)
        for name in ("generation_config.json", "special_tokens_map.json", "added_tokens.json")
        for content in ("[]", "null")
    },
    **{
        f"{name}={value!r}": told("config.json", **{name: value})
        for name, value in (
            *(("num_hidden_layers", 0), ("num_attention_heads", 0), ("num_attention_heads", "x"), ("vocab_size", -1)),
            *(("hidden_size", []), ("hidden_act", "nope"), ("model_type", 3), ("dtype", "floaty")),
            *(("rope_parameters", "x"), ("max_position_embeddings", -1), ("quantization_config", [])),
        )
    },
    "model_max_length='x'": told("tokenizer_config.json", model_max_length="x"),
    "eos_token=3": told("tokenizer_config.json", eos_token=3),
    "weights cut off": cut,
    "weights of zeros": put("model.safetensors", b"\0" * 100),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "llmrec.json nested": put("llmrec.json", DEEP),
    "llmrec.json: []": put("llmrec.json", "[]"),
    "llmrec.json: null": put("llmrec.json", "null"),
    "llmrec.json of bytes": put("llmrec.json", b"\xff"),
}


@pytest.mark.parametrize("change", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_folder_is_one_line(change: Change, folder: Path) -> None:
    change(folder)
    with pytest.raises(LlmrecError) as caught:
        ask(folder)
    assert caught.value.kind in ("damaged", "wrong-format")
    assert str(folder) in (caught.value.file or "")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in %}",
        "{{ messages.__class__.__mro__ }}",
        "{{ nope.x.y }}",
        "{{ raise_exception('no') }}",
        "{{ 1 + 'a' }}",
        "{{ 1 // 0 }}",
        "{% for i in range(99999999) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'x' %}",
    ],
)
def test_a_chat_template_that_fails_names_its_folder(template: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with raises(ModelError, Facts("unsupported", folder, column="model.name", says="chat template")):
        ask(folder)


def test_pickled_weights_are_not_unpacked(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    proof = tmp_path / "ran"
    (folder / "pytorch_model.bin").write_bytes(f"\x80\x04cos\nsystem\n(S'touch {proof}'\ntR.".encode("latin-1"))
    with raises(ModelError, Facts("damaged", folder)):
        ask(folder)
    assert not os.path.lexists(proof)


@pytest.mark.parametrize(
    "change",
    [put("config.json", "null"), put("tokenizer_config.json", "[]"), told("config.json", num_attention_heads=0)],
)
def test_a_damaged_text_encoder_is_one_line(change: Change, folder: Path) -> None:
    change(folder)
    with raises(ModelError, Facts("damaged", folder, column="index.semantic.encoder")):
        open_encoder(str(folder))
