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

from llmrec.durable import write_json, write_text
from llmrec.machine import machine, versions
from llmrec.pipeline.run import train
from llmrec.recipe.load import load_recipe, recipe_hash
from llmrec.report.canvas import WIDE, Canvas, Scale, fitted
from llmrec.report.render import picture as drawn

RECIPE = "recipes/sequences/generative-items.yaml"
# Width of the hidden states; blocks and heads grow with it.
SIZES = ((16, 1, 1), (32, 1, 2), (64, 2, 2))
_HUES = ("zero-shot", "few-shot", "tuned")


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
    canvas, bottom = Canvas(width=WIDE, height=440), 360
    curves = [[point for point in run["curve"] if point["tokens"]] for run in result["runs"]]
    rise = fitted([point["valid_loss"] for curve in curves for point in curve], bottom, 24)
    most = max(point["tokens"] for curve in curves for point in curve)
    along = Scale(low=0.0, high=most / 1e6, start=54, end=WIDE - 90)
    canvas.left(rise, along.start, along.end)
    canvas.below(along, bottom, bottom, "validation loss, nats an item, by million tokens read")
    for run, curve, hue in zip(result["runs"], curves, _HUES, strict=False):
        points = [(along(point["tokens"] / 1e6), rise(point["valid_loss"])) for point in curve]
        canvas.path(points, f"curve {hue}")
        canvas.text(points[-1][0] + 8, points[-1][1] + 4, f"width {run['width']}", "tick")
    canvas.text(along.start, canvas.height - 10, f"Amazon 2014 Beauty, one token an item; {result['command']}", "tick")
    return drawn(canvas, "Validation loss falls with tokens read and with the width of the model")


def main(target: Path, image: Path, folder: Path, steps: int) -> None:
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
    write_text(image, picture(result))


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        Path(sys.argv[3]) if len(sys.argv) > 3 else Path("runs/scaling"),
        int(sys.argv[4]) if len(sys.argv) > 4 else 640,
    )
