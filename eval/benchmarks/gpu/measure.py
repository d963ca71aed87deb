"""Measurements that need a process with torch: ``python -m eval.benchmarks.gpu.measure WHAT ...`` prints JSON."""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional

from llmrec.backends.encode import IGNORED, Encoder, TokenRow
from llmrec.backends.hf.backend import HFBackend
from llmrec.backends.vllm.backend import VLLMBackend
from llmrec.durable import replace_atomically
from llmrec.models.load import load_model, load_tokenizer, release_memory, resolve_model_folder
from llmrec.recipe.schema import LoraSection, ModelSection, TrainSection
from llmrec.train import lora
from llmrec.train.batches import pad_rows
from llmrec.train.loss import label_loss, packed_loss
from llmrec.train.packing import pack_rows, stack_sequences
from llmrec.train.precision import mixed_precision
from llmrec.types import Message, Prompt, Segment

Facts = dict[str, Any]

_QWEN = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
_LLAMA = {"num_key_value_heads": 8, "max_position_embeddings": 8192, "num_attention_heads": 32, "vocab_size": 128256}
SHAPES: dict[str, Callable[[], Any]] = {
    "qwen3-1.7b": lambda: transformers.Qwen3Config(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        tie_word_embeddings=True, **_QWEN,
    ),
    "qwen3-4b": lambda: transformers.Qwen3Config(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        tie_word_embeddings=True, **_QWEN,
    ),
    "qwen3-8b": lambda: transformers.Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        tie_word_embeddings=False, **_QWEN,
    ),
    "llama-3-8b": lambda: transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, **_LLAMA
    ),
    "t5-small": lambda: transformers.T5Config(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, decoder_start_token_id=0,
    ),
    # The output layer is not tied to the embeddings.
    "llama-1b": lambda: transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=12, **_LLAMA
    ),
    "tiny": lambda: transformers.LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=4096, tie_word_embeddings=True,
    ),
}  # fmt: skip
"""Configurations of models with random weights."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Call one of the functions below with the arguments of the command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.gpu.measure", description=__doc__)
    parser.add_argument("what", choices=("engines", "masked", "merge", "model"))
    parser.add_argument("words", nargs="*")
    chosen = parser.parse_args(arguments)
    sys.stdout.write(json.dumps(globals()[chosen.what](*chosen.words)) + "\n")


def model(shape: str, folder: str, device: str = "cuda") -> Facts:
    """Write a model with random weights, and the tokenizer of the quickstart's model."""
    with torch.device(device):
        built = transformers.AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=torch.bfloat16)
    with replace_atomically(Path(folder)) as draft:
        built.save_pretrained(draft, max_shard_size="5GB")
        load_tokenizer(resolve_model_folder(ModelSection()), ModelSection()).save_pretrained(draft)
    return {"parameters": sum(parameter.numel() for parameter in built.parameters())}


# --------------------------------------------------------------------------- a backward pass under a mask


def masked(folder: str, device: str = "cuda") -> Facts:
    """Compare gradients of packed rows on a device in bfloat16 with those of plain rows on the CPU in float32.

    The packed rows have 192 columns, and logits of attention are around -128: with a mask, a length of 64 mod 128 and a
    logsumexp below -88.7 cuDNN 9.20 returned NaN gradients (pytorch #196678, trl #7181).

    Args:
        folder: Folder to which the model is written.
        device: ``cuda``; or ``cpu``, to test the code.
    """
    _with_low_logits(Path(folder))
    expected, lowest = _gradients(folder, "cpu", "float32", packed=False)[0], list[float]()
    with torch.profiler.profile() as profile, _recording_logsumexp(lowest):
        actual, columns = _gradients(folder, device, "bfloat16")
    facts = {
        "torch": torch.__version__,
        "columns_mod_128": columns % 128,
        "lowest_logsumexp": round(min(lowest), 1) if lowest else None,
        "math_attention": sum(event.name.endswith("attention_math") for event in profile.events()),
        **_compared(expected, actual),
    }
    if device == "cuda":
        facts |= {"cudnn": torch.backends.cudnn.version(), "capability": torch.cuda.get_device_capability()}
        facts["cudnn_attention"] = torch.backends.cuda.cudnn_sdp_enabled()
        # Loading a model may switch cuDNN off, so it is switched on afterwards. Its result does not affect the check.
        actual, _ = _gradients(folder, device, "bfloat16", lambda: torch.backends.cuda.enable_cudnn_sdp(True))
        facts["if_cudnn_attention_were_on"] = [*_compared(expected, actual).values()]
    return facts


def _with_low_logits(folder: Path) -> None:
    """Write a small Qwen2 whose queries and keys have opposite biases in the dimensions that hardly rotate."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024}
    rotary = {"rope_type": "default", "rope_theta": 1e6}
    config = transformers.Qwen2Config(**sizes, **heads, rope_parameters=rotary)
    qwen = transformers.Qwen2ForCausalLM(config)
    slow = torch.tensor([*range(24, 32), *range(56, 64)])
    with torch.no_grad():
        for parameter in qwen.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
        for layer in qwen.model.layers:
            for linear, bias in ((layer.self_attn.q_proj, 8.0), (layer.self_attn.k_proj, -8.0)):
                rows = torch.cat([slow + first for first in range(0, linear.out_features, 64)])
                linear.weight[rows], linear.bias[rows] = 0.0, bias
    qwen.save_pretrained(folder)


@contextmanager
def _recording_logsumexp(lowest: list[float]) -> Iterator[None]:
    """Record the lowest logsumexp of each attention call with a mask."""
    attention = functional.scaled_dot_product_attention

    def recorded(query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> Any:
        if attn_mask is not None:
            keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
            logits = query.float() @ keys.float().mT * options.get("scale", query.shape[-1] ** -0.5)
            logits = logits.masked_fill(~attn_mask, -torch.inf)
            lowest.append(float(logits.detach().logsumexp(-1).min()))
        return attention(query, key, value, attn_mask=attn_mask, **options)

    functional.scaled_dot_product_attention = recorded
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = attention


def _gradients(
    folder: str, device: str, dtype: str, loaded: Callable[[], object] = bool, *, packed: bool = True
) -> tuple[Any, int]:
    """Return gradients of adapters as `llmrec train` computes them, and the number of columns."""
    section = ModelSection(name=folder, device=device, dtype=dtype)
    learning = lora.load_trainable(folder, section, TrainSection(packing="tree", lora=LoraSection(rank=4))).to(device)
    loaded()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in learning.named_parameters():
            if "lora" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    draw = torch.randint(5, 512, (4, 120), generator=generator).tolist()
    rows = [TokenRow((*draw[0], *end[:25]), (*[IGNORED] * 120, *end[:25])) for end in draw[1:]]
    stacked = asdict(stack_sequences([pack_rows(rows)], 0))
    learning.train()
    with mixed_precision(learning):
        if packed:
            inputs = {name: torch.from_numpy(values).to(device) for name, values in stacked.items()}
            total, count = packed_loss(learning, inputs)
        else:
            total, count = label_loss(learning, *(torch.tensor(values, device=device) for values in pad_rows(rows, 0)))
    (total / count).backward()
    gradients = [parameter.grad for parameter in learning.parameters() if parameter.grad is not None]
    return torch.cat([gradient.float().cpu().flatten() for gradient in gradients]), stacked["ids"].shape[1]


def _compared(expected: Any, actual: Any) -> Facts:
    finite = torch.isfinite(actual)
    apart = (actual - expected).norm() / expected.norm()
    return {
        "nonfinite_gradients": int((~finite).sum()),
        "gradient_difference": round(float(apart), 5) if finite.all() else None,
    }


# --------------------------------------------------------------------------- likelihoods of two engines


def engines(folder: str, ways: str = "prefill,nodes,hf", device: str = "cuda", prompts: str = "200") -> Facts:
    """Compare log-probabilities of titles and of labels by routes of vLLM with those by transformers, in float32.

    Args:
        folder: A model folder; empty: the quickstart's model.
        ways: Routes of vLLM, and ``hf`` as the last; ``hf,hf`` on the CPU, to test the code.
        device: Device of transformers.
        prompts: Number of prompts, with 20 candidates each.
    """
    section = ModelSection(**({"name": folder} if folder else {}), dtype="float32", device=device)
    folder = resolve_model_folder(section)
    encoder = Encoder(load_tokenizer(folder, section), max_length=512)
    titles = [f"{one} {two} ({year})" for year, one in enumerate(("Red", "The Old", "Fargo", "Sea of"), 1990) for two in
              ("River", "Rivers", "House", "Night", "Men")]  # fmt: skip
    requests = [
        Prompt(messages=(Message("user", (Segment("text", f"Person {n} watched {', '.join(titles[: 3 + n % 9])}."),)),))
        for n in range(int(prompts))
    ]
    kinds = {"titles": titles, "labels": list("ABCDEFGHIJKLMNOPQRST")}
    facts: Facts = {name: {"scores": len(requests) * len(candidates)} for name, candidates in kinds.items()}
    scores: dict[str, list[Any]] = {name: [] for name in kinds}
    for way in ways.split(","):
        backend: Any = (
            HFBackend(load_model(folder, section).to(device), encoder)
            if way == "hf"
            else VLLMBackend(folder, encoder, dtype="float32", route=way)  # type: ignore[arg-type]
        )
        for name, candidates in kinds.items():
            begin = time.perf_counter()
            answers = backend.score(requests, [candidates] * len(requests), closed=name == "titles")
            facts[name][f"{way}_seconds"] = round(time.perf_counter() - begin, 2)
            facts[name][f"{way}_route"] = answers[0].engine
            scores[name].append(torch.tensor([answer.logprobs for answer in answers], dtype=torch.float64))
        backend.close()
        del backend
        release_memory()
    for name, (*others, last) in scores.items():
        facts[name]["logprob_difference"] = max(
            float((other - last).abs().max().nan_to_num(torch.inf)) for other in others
        )
    return facts


# --------------------------------------------------------------------------- merging


def merge(base: str, adapter: str, target: str) -> Facts:
    """Merge an adapter, and return the peak anonymous memory as a share of the size of the weights."""
    weights = sum(file.stat().st_size for file in Path(base).glob("*.safetensors"))
    before, peak, done = _anonymous(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], _anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        lora.merge_adapter(base, ModelSection(name=base, dtype="bfloat16", device="cpu"), Path(adapter), Path(target))
    finally:
        done.set()
        thread.join()
    return {"weights_gib": round(weights / 2**30, 2), "peak_to_weights": round((peak[0] - before) / weights, 3)}


def _anonymous() -> int:
    """Return the anonymous memory of this process in bytes."""
    line = next(
        line for line in Path("/proc/self/status").read_text("utf-8").splitlines() if line.startswith("RssAnon")
    )
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
