"""What a check measures inside a process of its own: ``python -m eval.benchmarks.gpu.measure WHAT ...`` prints JSON.

Models have the shape of published ones and random weights, since nothing is fetched.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from llmrec.backends.encode import IGNORED, TokenRow
from llmrec.cli.estimate import CONTEXT, memory_of
from llmrec.durable import replacing
from llmrec.models.load import load_tokenizer, resolve
from llmrec.models.memory import free_bytes
from llmrec.recipe.schema import ModelSection, TrainSection
from llmrec.train.batches import padded
from llmrec.train.lora import with_adapter
from llmrec.train.loss import label_loss, packed_loss
from llmrec.train.packing import stack, tree
from llmrec.train.precision import mixed_precision

_LLAMA = {"num_key_value_heads": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
SHAPES: dict[str, Any] = {
    "qwen3-1.7b": lambda: transformers.Qwen3Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
    "llama-3-8b": lambda: transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=8192, **_LLAMA,
    ),
    "tiny": lambda: transformers.LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    ),
}  # fmt: skip
_STEPS, _ROW = 20, 384


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one thing."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.benchmarks.gpu.measure", description=__doc__.split("\n", 1)[0]
    )
    what = parser.add_subparsers(dest="what", required=True)
    one = what.add_parser("step")
    one.add_argument("shape", choices=SHAPES)
    one.add_argument("checkpointing", choices=("on", "off"))
    what.add_parser("packing")
    what.add_parser("clock")
    what.add_parser("ties").add_argument("--requests", type=int, default=200)
    one = what.add_parser("model")
    one.add_argument("shape", choices=SHAPES)
    one.add_argument("folder", type=Path)
    chosen = parser.parse_args(arguments)
    if chosen.what == "step":
        found = step(chosen.shape, chosen.checkpointing == "on")
    elif chosen.what == "packing":
        found = packing()
    elif chosen.what == "clock":
        found = clock()
    elif chosen.what == "ties":
        found = ties(chosen.requests)
    else:
        found = model(chosen.shape, chosen.folder)
    sys.stdout.write(json.dumps(found) + "\n")


def random_model(shape: str, device: str, dtype: Any = torch.bfloat16) -> Any:
    """Return a model of a shape with random weights, made where it is to lie."""
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=dtype)
    made = made.to_empty(device=device)
    made.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for module in made.modules():
            # What is computed from the configuration, such as inverse frequencies, was made on the meta device.
            if hasattr(module, "inv_freq"):
                fresh = type(module)(made.config)
                module.inv_freq, module.original_inv_freq = (fresh.inv_freq.to(device) for _ in range(2))
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(1.0)
    return made


def step(
    shape: str, checkpointing: bool, device: str = "cuda", tokens: int = 1536, steps: int = _STEPS
) -> dict[str, Any]:
    """Take steps of LoRA, and return the peak memory beside the estimate of a dry run."""
    section = TrainSection(batch_tokens=tokens, gradient_checkpointing=checkpointing)
    free = free_bytes() if device == "cuda" else 0
    config = SHAPES[shape]()
    estimate = memory_of(config, ModelSection(dtype="bfloat16", device="cpu"), section) + CONTEXT
    found = {
        "estimate_gib": _gib(estimate),
        "free_gib": _gib(free),
        "peak_gib": None,
        "tokens": tokens,
        "seconds": None,
    }
    try:
        learning = with_adapter(random_model(shape, device), section.lora)
        if checkpointing:
            learning.enable_input_require_grads()
            learning.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        times = _steps(learning, config.vocab_size, tokens, steps, wait=True)
    except torch.OutOfMemoryError:
        return found
    found["seconds"] = round(float(np.median(times)), 4)
    if device == "cuda":
        found["peak_gib"] = _gib(torch.cuda.max_memory_reserved() + CONTEXT)
    return found


def _steps(model: Any, vocabulary: int, tokens: int, steps: int, *, wait: bool) -> list[float]:
    """Take optimiser steps on random rows, and return the seconds of each."""
    device, rng = model.device, np.random.default_rng(0)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    times = []
    model.train()
    for _ in range(steps):
        width = min(_ROW, tokens)
        ids = torch.from_numpy(rng.integers(0, vocabulary, (max(1, tokens // width), width))).to(device)
        labels = torch.where(torch.rand(ids.shape, device=device) < 0.1, ids, IGNORED)
        begin = _now(device, wait=wait)
        with mixed_precision(model):
            total, count = label_loss(model, ids, labels)
        (total / (count or 1)).backward()
        optimiser.step()
        optimiser.zero_grad()
        times.append(_now(device, wait=wait) - begin)
    return times


def packing(device: str = "cuda", shape: str = "qwen3-1.7b") -> dict[str, Any]:
    """Return the loss of rows packed and plain, and how often attention was computed in full."""
    made = random_model(shape, device).eval()
    begin = tuple(range(5, 60))
    rows = [TokenRow((*begin, *end), (*[IGNORED] * len(begin), *end)) for end in ((70, 71), (72, 73, 74), (75,))]
    ids, labels = (torch.tensor(each, device=device) for each in padded(rows, 0))
    packed = {name: torch.from_numpy(each).to(device) for name, each in asdict(stack([tree(rows)], 0)).items()}
    with torch.profiler.profile() as seen, torch.no_grad(), mixed_precision(made):
        one, two = float(label_loss(made, ids, labels)[0]), float(packed_loss(made, packed)[0])
    kernels = Counter(event.name for event in seen.events() if "scaled_dot_product" in event.name)
    full = sum(count for name, count in kernels.items() if name.endswith("attention_math"))
    return {"plain": one, "packed": two, "math_attention": full, "attention": dict(kernels)}


def clock(device: str = "cuda", shape: str = "qwen3-1.7b", steps: int = _STEPS) -> dict[str, float]:
    """Return the seconds of a step by a clock that waits for the GPU, and by one that does not."""
    learning = with_adapter(random_model(shape, device), TrainSection().lora)
    found = {}
    for name, wait in (("waited", True), ("unwaited", False)):
        times = _steps(learning, learning.config.vocab_size, 1536, steps, wait=wait)
        found[name] = round(float(np.median(times[1:])), 5)
    return found


def ties(requests: int) -> dict[str, int]:
    """Return in how many of many label requests the best label ties, by the dtype of the head; in vLLM."""
    from vllm import LLM, SamplingParams

    folder = resolve(ModelSection())
    tokenizer = load_tokenizer(folder, ModelSection())
    labels = [tokenizer.encode(each, add_special_tokens=False)[0] for each in "ABCDEFGHIJKLMNOPQRST"]
    prompts = [{"prompt_token_ids": tokenizer.encode(f"Film {n}, letter:")} for n in range(requests)]
    asked = SamplingParams(temperature=0, max_tokens=1, logprob_token_ids=labels, detokenize=False)
    found = {}
    for name in ("float32", "bfloat16"):
        overrides = {"head_dtype": "float32"} if name == "float32" else {}
        engine = LLM(
            folder, dtype="bfloat16", hf_overrides=overrides, max_logprobs=128, max_model_len=512, enforce_eager=True,
            gpu_memory_utilization=0.3,
        )  # fmt: skip
        best = []
        for output in engine.generate(prompts, asked, use_tqdm=False):
            values = sorted((output.outputs[0].logprobs[0][label].logprob for label in labels), reverse=True)
            best.append(values[0] == values[1])
        found[name] = sum(best)
        engine.llm_engine.engine_core.shutdown()
        del engine
    return found


def model(shape: str, folder: Path, device: str = "cuda") -> dict[str, Any]:
    """Write a model of a shape with random weights, with the tokenizer of the quickstart's model."""
    made = random_model(shape, device)
    with replacing(folder) as draft:
        made.save_pretrained(draft)
        load_tokenizer(resolve(ModelSection()), ModelSection()).save_pretrained(draft)
    return {"parameters": sum(parameter.numel() for parameter in made.parameters())}


def _now(device: Any, *, wait: bool) -> float:
    if wait and device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _gib(size: float) -> float:
    return round(size / 2**30, 2)


if __name__ == "__main__":
    main()
