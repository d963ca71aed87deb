"""How validation loss falls with tokens read and with parameters: recipes/sequences/generative-items.yaml in sizes.

``LLMREC_DATA=folder python -m eval.benchmarks.scaling eval/results/scaling.json docs/generative/scaling.svg``. Every
size sees the same rows in the same order; the learning rate falls to nothing over the whole run, so the last point of a
curve is the only one of a finished training. A run that is there already is not trained again.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from eval.benchmarks.index_pictures import Canvas
from llmrec.durable import write_json, write_text
from llmrec.machine import machine, versions
from llmrec.pipeline.run import train
from llmrec.recipe.load import load_recipe, recipe_hash

RECIPE = "recipes/sequences/generative-items.yaml"
# Width of the hidden states; blocks and heads grow with it.
SIZES = ((16, 1, 1), (32, 1, 2), (64, 2, 2))
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 760, 100, 420
_INKS = ("#b9c4d2", "#7fa6c4", "#2f6f9f", "#123a5a")
_SOFT = "#5b6375"


def overrides(width: int, layers: int, heads: int, steps: int) -> list[str]:
    """Return what makes one size of the recipe."""
    data = Path(os.environ.get("LLMREC_DATA", ".")) / "amazon14_beauty"
    return [
        f"model.shape.width={width}",
        f"model.shape.layers={layers}",
        f"model.shape.heads={heads}",
        f"model.shape.feedforward={4 * width}",
        f"train.steps={steps}",
        f"train.valid_every={max(1, steps // 8)}",
        "model.shape.dropout=0.2",
        f"data.path={data}",
    ]


def measured(width: int, layers: int, heads: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train one size, or read what an earlier call left, and return its curve."""
    recipe = load_recipe(RECIPE, overrides(width, layers, heads, steps))
    found = train(recipe, folder / f"{width}x{layers}")
    a_step = found["tokens"] / found["steps"]
    return {
        "width": width,
        "blocks": layers,
        "parameters": found["total_parameters"],
        # Without the item table, which is as wide as the model and hides them.
        "weights_of_the_blocks": layers * 12 * width * width,
        "seconds": round(found["seconds"], 1),
        "curve": [
            {"tokens": round(record["step"] * a_step), "valid_loss": round(record["valid_loss"]["sequential"], 4)}
            for record in found["log"]
            if record["valid_loss"]
        ],
    }


def picture(result: dict[str, Any]) -> str:
    """Return loss by tokens, a line a size."""
    canvas = Canvas()
    curves = [[point for point in run["curve"] if point["tokens"]] for run in result["runs"]]
    most = max(point["tokens"] for curve in curves for point in curve)
    losses = [point["valid_loss"] for curve in curves for point in curve]
    low, high = min(losses), max(losses)
    canvas.text(26, 28, "Amazon 2014 Beauty, one token an item", size=13, ink=_SOFT)
    canvas.text(26, 54, "Validation loss by tokens read, and by size", size=19)
    for n, (run, curve) in enumerate(zip(result["runs"], curves, strict=True)):
        places = [
            (
                _LEFT + (_RIGHT - _LEFT) * point["tokens"] / most,
                _BOTTOM - (_BOTTOM - _TOP) * (point["valid_loss"] - low) / max(high - low, 1e-9),
            )
            for point in curve
        ]
        path = " ".join(f"{'L' if k else 'M'}{x:.1f} {y:.1f}" for k, (x, y) in enumerate(places))
        canvas.parts.append(f'<path d="{path}" fill="none" stroke="{_INKS[n]}" stroke-width="3"/>')
        x, y = places[-1]
        canvas.text(x + 8, y + 5, f"width {run['width']}", size=13, ink=_INKS[max(n, 1)])
    for value in (low, high):
        y = _BOTTOM - (_BOTTOM - _TOP) * (value - low) / max(high - low, 1e-9)
        canvas.text(26, y + 5, f"{value:.2f}", size=13, ink=_SOFT)
    canvas.text(_LEFT, _BOTTOM + 26, "0", size=13, ink=_SOFT)
    canvas.text(_RIGHT - 60, _BOTTOM + 26, f"{most / 1e6:.1f} M tokens", size=13, ink=_SOFT)
    canvas.text(26, _BOTTOM + 50, result["command"], size=13, ink=_SOFT, mono=True)
    return canvas.svg(_BOTTOM + 66, "Validation loss falls with tokens read and with the width of the model")


def main(target: Path, drawn: Path, folder: Path, steps: int) -> None:
    """Train every size, write the curves and draw them."""
    runs = []
    for size in SIZES:
        runs.append(measured(*size, steps, folder))
        print(json.dumps(runs[-1]), flush=True)  # noqa: T201
    result = {
        "command": "make bench NAME=scaling",
        "what": "validation loss in nats an item by tokens read, for decoders of growing width from chance",
        "recipe": RECIPE,
        "recipe_hash": recipe_hash(load_recipe(RECIPE)),
        "steps": steps,
        "runs": runs,
        "machine": machine(),
        "versions": versions(),
    }
    write_json(target, result)
    write_text(drawn, picture(result))


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        Path(sys.argv[3]) if len(sys.argv) > 3 else Path("runs/scaling"),
        int(sys.argv[4]) if len(sys.argv) > 4 else 640,
    )
