"""Block-by-block merging writes the same files as a float32 merge of the full model, in the memory of a block."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hub
from safetensors.torch import load_file

from llmrec.models import streaming
from llmrec.models.load import load_model
from llmrec.models.tensors import mark_tied_tables
from llmrec.recipe.schema import LoraSection
from llmrec.train import lora
from tests.conftest import section
from tests.models.test_model_kinds import PAIRED, paired, shape

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning"),
]

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DECODERS: dict[str, Any] = {
    "llama": lambda: hub.LlamaForCausalLM(hub.LlamaConfig(**shape(**SMALL, intermediate_size=64))),
    "llama-tied": lambda: hub.LlamaForCausalLM(
        hub.LlamaConfig(**shape(**SMALL, intermediate_size=64, tie_word_embeddings=True))
    ),
    "gemma3": lambda: hub.Gemma3ForCausalLM(hub.Gemma3TextConfig(**shape(**SMALL, intermediate_size=64))),
    # Matrices of shape (in, out), and a tied head.
    "gpt2": lambda: hub.GPT2LMHeadModel(hub.GPT2Config(**shape(n_embd=32, n_layer=2, n_head=2))),
    # A checkpoint has one tensor per expert, and the module one tensor for all.
    "qwen3-moe": lambda: hub.Qwen3MoeForCausalLM(hub.Qwen3MoeConfig(**shape(**SMALL, intermediate_size=64, **EXPERTS))),
    "mixtral": lambda: hub.MixtralForCausalLM(
        hub.MixtralConfig(**shape(**SMALL, intermediate_size=64, num_local_experts=4))
    ),
    # A checkpoint and the module have other names.
    "gemma3-vision": lambda: hub.Gemma3ForConditionalGeneration(
        hub.Gemma3Config(
            text_config={**shape(**SMALL, intermediate_size=64)},
            vision_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
            | {"image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
        )
    ),
}


def base_of(kind: str, folder: Path, stored: torch.dtype = torch.bfloat16) -> Path:
    if kind in PAIRED:
        path = paired(kind, folder)
        load_model(str(path), section(path)).to(stored).save_pretrained(path)
        return path
    torch.manual_seed(0)
    model = DECODERS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.to(stored).save_pretrained(folder / kind)
    return folder / kind


def adapter_of(base: Path, folder: Path, *, tokens: tuple[int, ...] = (), **settings: Any) -> Path:
    """Save an adapter all of whose weights are random, as after training."""
    torch.manual_seed(1)
    plain = load_model(str(base), section(base))
    adapted = lora.add_lora_adapters(plain, LoraSection(rank=3, **settings), tokens)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder)
    return folder


def full_merge(base: Path, adapter: Path, target: Path, dtype: str) -> None:
    plain = load_model(str(base), section(base))
    with mark_tied_tables(plain):
        adapted = peft.PeftModel.from_pretrained(plain, adapter)
    tied, plain.config.tie_word_embeddings = plain.config.tie_word_embeddings, False
    merged = adapted.merge_and_unload()
    merged.config.tie_word_embeddings = tied
    merged.to(getattr(torch, dtype)).save_pretrained(target)


def assert_merged_alike(base: Path, adapter: Path, folder: Path, dtype: str) -> None:
    full_merge(base, adapter, folder / "full", dtype)
    lora.merge_adapter(str(base), section(base, dtype), adapter, folder / "blocks")
    assert_same(folder / "full", folder / "blocks")


def files(folder: Path) -> dict[str, bytes]:
    result = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    config = json.loads(result["config.json"])
    for key in ("text_config", "vision_config"):
        # transformers leaves the dtype of loading in nested configurations.
        config.get(key, {}).pop("dtype", None)
    return result | {"config.json": json.dumps(config).encode()}


def assert_same(one: Path, other: Path) -> None:
    first, second = files(one), files(other)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


DORA: dict[str, Any] = {"dora": True, "targets": ("q_proj", "v_proj", "q", "v")}
TOKENS: dict[str, Any] = {"tokens": (5, 9, 11)}


@pytest.mark.parametrize(
    ("kind", "stored", "dtype", "settings"),
    [
        *((kind, torch.bfloat16, "bfloat16", {}) for kind in (*DECODERS, "t5", "bart-untied")),
        *((kind, torch.bfloat16, "float32", {}) for kind in ("llama", "qwen3-moe", "t5-v1.1")),
        ("llama", torch.float16, "bfloat16", DORA),
        ("llama", torch.float16, "bfloat16", {"rslora": True, "top_layers": 1}),
        ("bart", torch.float16, "bfloat16", {"rslora": True}),
        *((kind, torch.float16, "bfloat16", TOKENS) for kind in ("llama", "llama-tied", "t5", "t5-v1.1", "bart")),
        *((kind, torch.float16, "bfloat16", DORA | TOKENS) for kind in ("gemma3", "t5-v1.1")),
    ],
)
def test_block_merge_equals_full_merge(
    kind: str, stored: torch.dtype, dtype: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    base = base_of(kind, tmp_path, stored)
    assert_merged_alike(base, adapter_of(base, tmp_path / "adapter", **settings), tmp_path, dtype)


def test_tensors_of_different_dtypes_are_exact(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path, torch.float32)
    weights = load_file(base / "model.safetensors")
    mixed = {name: item if "norm" in name else item.bfloat16() for name, item in weights.items()}
    streaming.require("safetensors.torch", "train").save_file(mixed, base / "model.safetensors", {"format": "pt"})
    assert streaming.exact_dtype(base) is torch.float32
    assert_merged_alike(base, adapter_of(base, tmp_path / "adapter"), tmp_path, "float32")


def test_model_of_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("llama", tmp_path)
    adapter = adapter_of(base, tmp_path / "adapter")
    model = load_model(str(base), section(base, "bfloat16"))
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(streaming.weight_files(tmp_path / "parts")) > 2
    monkeypatch.setattr(streaming, "_MAX_FILE_SIZE", "30KB")
    lora.merge_adapter(str(tmp_path / "parts"), section(base, "bfloat16"), adapter, tmp_path / "blocks")
    full_merge(base, adapter, tmp_path / "one", "bfloat16")
    load_model(str(tmp_path / "one"), section(base, "bfloat16")).save_pretrained(
        tmp_path / "full", max_shard_size="30KB"
    )
    assert len(streaming.weight_files(tmp_path / "blocks")) > 2
    index = streaming.INDEX_FILE
    read = [json.loads((tmp_path / name / index).read_text(encoding="utf-8")) for name in ("full", "blocks")]
    assert read[0] == read[1]
    for file in streaming.weight_files(tmp_path / "full"):
        assert (tmp_path / "blocks" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("kind", ["llama-tied", "qwen3-moe"])
def test_fully_tuned_weights_are_saved_alike_by_blocks(kind: str, tmp_path: Path) -> None:
    trained = base_of(kind, tmp_path, torch.float32)
    load_model(str(trained), section(trained)).bfloat16().save_pretrained(tmp_path / "full")
    lora.save_full_model(trained, section(trained, "bfloat16"), tmp_path / "blocks")
    assert_same(tmp_path / "full", tmp_path / "blocks")


_MERGE = """
import resource, sys
from pathlib import Path
from llmrec.recipe.schema import ModelSection
from llmrec.train import lora
base, adapter, target, room = sys.argv[1:]
def used(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))
section = ModelSection(name=base, dtype="bfloat16")
lora.merge_adapter(base, section, Path(adapter), Path(target) / "first")
# The limit is for the memory that the second merge adds.
resource.setrlimit(resource.RLIMIT_DATA, (used("VmData") + int(room), resource.RLIM_INFINITY))
lora.merge_adapter(base, section, Path(adapter), Path(target) / "second")
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory of a process as Linux counts it")
def test_merge_fits_in_the_memory_of_a_few_blocks(tmp_path: Path) -> None:
    """A model whose weights take 150 MB in float32 is merged in 24 MB plus its memory-mapped file."""
    torch.manual_seed(0)
    config = hub.LlamaConfig(**shape(**{**SMALL, "num_hidden_layers": 48, "hidden_size": 256}, intermediate_size=1024))
    hub.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "base")
    adapter = adapter_of(tmp_path / "base", tmp_path / "adapter")
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    room = 24 * 2**20
    assert 2 * size > 5 * room
    done = subprocess.run(
        [sys.executable, "-c", _MERGE, str(tmp_path / "base"), str(adapter), str(tmp_path), str(size + room)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
