"""New models: equal weights for equal seeds, a tokenizer for any text, and no forged control tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from llmrec.backends.encode import Encoder
from llmrec.models.load import (
    byte_tokenizer,
    describe_availability,
    load_config,
    load_model,
    load_tokenizer,
    new_model_folder,
    resolve_model_folder,
    write_random_model,
)
from llmrec.models.traits import is_encoder_decoder
from llmrec.recipe.schema import ModelSection, ShapeSection
from llmrec.types import Message, Prompt, Segment

SIZES: dict[str, Any] = {"layers": 1, "width": 16, "heads": 2, "feedforward": 32}
SHAPES = {
    "decoder": ShapeSection(**SIZES),
    "encoder-decoder": ShapeSection(kind="encoder-decoder", head_width=24, dropout=0.1, **SIZES),
}
each_kind = pytest.mark.parametrize("kind", SHAPES)
ENCODER = Encoder(byte_tokenizer(), max_length=4096)


@each_kind
def test_weights_depend_on_the_seed_only(kind: str, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(ord(name))
        expected = torch.rand(3)
        torch.manual_seed(ord(name))
        write_random_model(SHAPES[kind], tmp_path / name, seed=seed)
        # The caller's random state does not change.
        assert torch.equal(torch.rand(3), expected)
    one, same, other = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert one.keys() == same.keys() == other.keys()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@each_kind
def test_model_is_created_once_and_loads(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    section = ModelSection(name="new", shape=SHAPES[kind], dtype="float32")
    folder = resolve_model_folder(section, seed=3)
    stamp = (Path(folder) / "model.safetensors").stat().st_mtime_ns
    assert new_model_folder(SHAPES[kind], 3) == folder != new_model_folder(SHAPES[kind], 4)
    assert (Path(folder) / "model.safetensors").stat().st_mtime_ns == stamp
    model = load_model(folder, section)
    assert is_encoder_decoder(load_config(folder, section)) == (kind == "encoder-decoder")
    assert "Seq2Seq" in type(model).__name__ or "ConditionalGeneration" in type(model).__name__ or kind == "decoder"
    # The head is tied to the embeddings.
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "random weights" in describe_availability(section)


def test_encoder_decoder_has_the_configured_shape(tmp_path: Path) -> None:
    """TIGER (NeurIPS 2023, section 4): 4 + 4 blocks, 6 heads of 64, width 128, inner width 1024, ReLU, dropout 0.1."""
    tiger = ShapeSection(
        kind="encoder-decoder", layers=4, width=128, heads=6, head_width=64, feedforward=1024, dropout=0.1
    )
    write_random_model(tiger, tmp_path / "m", seed=0)
    section = ModelSection(name=str(tmp_path / "m"), dtype="float32")
    model, tokenizer = load_model(str(tmp_path / "m"), section), load_tokenizer(str(tmp_path / "m"), section)
    assert (len(model.encoder.block), len(model.decoder.block)) == (4, 4)
    attention, dense = model.decoder.block[0].layer[0].SelfAttention, model.encoder.block[0].layer[1].DenseReluDense
    assert tuple(attention.q.weight.shape) == (6 * 64, 128) and tuple(dense.wi.weight.shape) == (1024, 128)
    assert model.config.dropout_rate == 0.1 and model.config.dense_act_fn == "relu"
    assert attention.has_relative_attention_bias and model.config.relative_attention_num_buckets == 32
    assert model.config.decoder_start_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    # About 13 million with the paper's vocabulary, of which its codes and users take 0.4.
    assert 4e6 < sum(parameter.numel() for parameter in model.parameters()) < 13e6
    hidden, config = torch.randn(1, 1, 128), model.config
    logits = model(encoder_outputs=(hidden,), decoder_input_ids=torch.tensor([[0]])).logits
    states = model.decoder(input_ids=torch.tensor([[0]]), encoder_hidden_states=hidden).last_hidden_state
    assert config.scale_decoder_outputs and torch.allclose(logits, model.lm_head(states * 128**-0.5), atol=1e-5)


@given(st.text(max_size=40))
def test_any_text_round_trips(text: str) -> None:
    tokenizer = ENCODER.tokenizer
    shown = text.encode("utf-8", "replace").decode()
    ids = tokenizer.encode(shown, add_special_tokens=False)
    if not any(token in shown for token in ("<|start|>", "<|end|>", "<|pad|>")):
        assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == shown
        assert len(ids) == len(shown.encode())


def test_titles_cannot_forge_control_tokens() -> None:
    for token in ("<|end|>", "<|start|>", "<|pad|>"):
        for text in (f"Heat {token} 2", token, token.upper(), token[:4], token.replace("<", "＜")):
            assert not set(ENCODER.piece(text)) & {0, 1, 2}
            prompt = Prompt(messages=(Message("user", (Segment("text", "List: "), Segment("item", text))),))
            ids = ENCODER.prompt(prompt)
            assert ids[0] == 1 and not set(ids[1:]) & {0, 1, 2}


def test_turns_are_concatenated_and_answers_end() -> None:
    prompt = Prompt(messages=(Message("user", (Segment("text", "ab"),)),))
    tokenizer = ENCODER.tokenizer
    assert tokenizer.decode(ENCODER.prompt(prompt)) == "<|start|>ab"
    assert ENCODER.end_id == tokenizer.eos_token_id
    assert tokenizer.decode(list(ENCODER.continuation(prompt, "c", closed=True))) == "c<|end|>"
    solved = (*prompt.messages, Message("assistant", (Segment("text", "c"),)), *prompt.messages)
    assert tokenizer.decode(ENCODER.prompt(Prompt(messages=solved))) == "<|start|>abc<|end|>ab"
