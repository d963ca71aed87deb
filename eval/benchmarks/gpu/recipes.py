"""Estimates for recipes/gpu: memory by the formula of the dry run, hours by arithmetic. No model is run.

`make bench NAME=gpu-recipes` writes eval/results/gpu_recipes.json, the source of figures in docs/.

A token takes 2 floating-point operations per weight of the layers in a forward pass, as many in the backward pass
through frozen weights, twice as many if all weights are trained, and one more forward pass with gradient
checkpointing. Each half of an encoder-decoder processes half of the tokens. Attention, logits, the index and the
baselines are ignored. Hours are operations divided by an assumed share of the peak, with a minimum time per step; for
eight GPUs an eighth, including the part that is not parallel. Nothing was measured on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.benchmarks.gpu.measure import SHAPES
from eval.benchmarks.provenance import provenance
from llmrec.cli.estimate import GPU_CONTEXT_BYTES, training_step_bytes
from llmrec.durable import write_json
from llmrec.models.load import load_config, resolve_model_folder
from llmrec.models.tensors import vocabulary_tables
from llmrec.models.traits import auto_class, is_encoder_decoder
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Recipe
from llmrec.resources import resource

RESULT = resource("eval", "results") / "gpu_recipes.json"
# TFLOP/s in bfloat16 without sparsity: the data sheets of the A100 of 80 GB and of the GeForce RTX 4090.
PEAKS = {80: 312.0, 24: 165.2}
# Assumed shares of the peak: for models of at least a billion weights, for smaller ones, and for text generation.
LARGE, SMALL, WRITING = 0.3, 0.05, 0.1


@dataclass(frozen=True)
class Scale:
    """Assumptions that are not in the keys of a recipe.

    Attributes:
        shape: The shape of its model, from `SHAPES`; None: the recipe creates its model.
        card: Memory of the intended GPU in GiB.
        requests: Requests per variant of the model: users or texts, times templates and requests per user.
        tokens: Maximum tokens of a request; None: those of the longest training sequence and the beams.
    """

    shape: str | None
    card: int
    requests: int
    tokens: int | None = None


SCALES: Mapping[str, Scale] = {
    "qwen3-4b": Scale("qwen3-4b", 80, 6040),
    "qwen3-4b-24gb": Scale("qwen3-4b", 24, 6040),
    "tallrec": Scale("llama-3-8b", 80, 943 * 6, 512),
    "p5": Scale("t5-small", 80, 2000 * 14, 512 + 100 * 8),
    "tiger": Scale(None, 80, 22363),
    "lc-rec": Scale("qwen3-1.7b", 80, 22363),
    "minionerec": Scale("qwen3-1.7b", 80, 22363),
    # A prompt of 30 films, and the text.
    "kar": Scale("qwen3-8b", 80, 6040 + 3706, 500 + 200),
}
# Assumed minimum duration of a training step in seconds: small models are limited by kernel launches.
LEAST = 0.03
# Maximum number of tokens of a code or a title in the search tree.
_CODE = 8


def estimates() -> dict[str, dict[str, Any]]:
    """Return the estimates by recipe."""
    return {name: estimate(load_recipe(f"recipes/gpu/{name}.yaml"), scale) for name, scale in SCALES.items()}


def estimate(recipe: Recipe, scale: Scale) -> dict[str, Any]:
    """Return memory in GiB, tokens, operations and hours of a recipe."""
    config = SHAPES[scale.shape]() if scale.shape else load_config(resolve_model_folder(recipe.model), recipe.model)
    weights = block_weights(config)
    share = WRITING if recipe.augment else LARGE if weights > 5e8 else SMALL
    train, evaluation = recipe.train, recipe.eval
    trains = "tuned" in evaluation.arms
    row = scale.tokens or train.max_row_tokens + evaluation.beams * _CODE
    # A few-shot prompt has one more question per demonstration.
    rows = sum(1 + evaluation.shots.k * (arm == "few-shot") for arm in evaluation.arms) or 1
    evaluated = scale.requests * row * rows
    passes = (3 if train.method == "full" else 2) + train.gradient_checkpointing
    # Rollouts are found by search and scored by the reference model.
    passes += 2 * (train.reward is not None)
    learned = train.steps * train.batch_tokens if trains else 0
    operations = {"training": 2 * weights * passes * learned / 1e15, "evaluation": 2 * weights * evaluated / 1e15}
    least = LEAST * train.steps / 3600 if trains else 0.0

    def hours(gpus: Mapping[str, int]) -> dict[str, float]:
        taken = {
            stage: 1e3 * done / (share * PEAKS[scale.card] * gpus[stage]) / 3600 for stage, done in operations.items()
        }
        return {stage: float(f"{max(value, least * (stage == 'training')):.2g}") for stage, value in taken.items()}

    entry: dict[str, Any] = {
        "card_gib": scale.card,
        "block_weights": weights,
        "share_of_peak": share,
        "tokens": {"training": learned, "evaluation": evaluated},
        "petaflop": {stage: float(f"{done:.3g}") for stage, done in operations.items()},
        "hours": hours({"training": 1, "evaluation": 1}),
        # Training with rewards does not support several processes.
        "hours_of_eight": hours({"training": 1 if train.reward else 8, "evaluation": 8}),
    }
    if trains:
        entry["memory_gib"] = round((training_step_bytes(config, recipe.model, train) + GPU_CONTEXT_BYTES) / 2**30, 1)
    return entry


def block_weights(config: Any) -> int:
    """Return the number of weights per token: those outside the vocabulary, half for an encoder-decoder."""
    import torch

    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    tables = {id(module.weight): module.weight.numel() for _, module in vocabulary_tables(model)}
    total = sum(parameter.numel() for parameter in model.parameters()) - sum(tables.values())
    return total // 2 if is_encoder_decoder(config) else total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("out", type=Path, nargs="?", default=RESULT)
    out = parser.parse_args().out
    assumed = {"tflops": {str(card): peak for card, peak in PEAKS.items()}, "share_of_peak": [LARGE, SMALL, WRITING]}
    assumed |= {"seconds_of_a_step": LEAST}
    write_json(
        out, {"command": "make bench NAME=gpu-recipes", **provenance(), "assumed": assumed, "recipes": estimates()}
    )


if __name__ == "__main__":
    main()
