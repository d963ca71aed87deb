"""Measures how often a fine-tuned dialogue manager makes the tool calls of the rules, on MovieLens-100K.

``python -m eval.benchmarks.chat_tuning eval/results/chat_tuning.json`` (`make bench NAME=chat-models`, which also runs
conversations with the fine-tuned model) fine-tunes SmolLM2-135M-Instruct on 300 simulated conversations over the run
``runs/demo``, and stores what the command prints: the model's accuracy on held-out calls and on calls with unseen
wordings, before and after fine-tuning, and that of a baseline that predicts the most frequent next call. An interrupted
run resumes from its checkpoint.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.benchmarks.provenance import provenance
from llmrec.durable import write_json

RECIPE = "recipes/movielens-100k/manager.yaml"
CONVERSATIONS = 300


def result(found: Mapping[str, Any]) -> dict[str, Any]:
    """Parse the output of the command: one row for each manager and kind of turns."""
    return {
        "conversations": found["conversations"],
        "training_rows": found["rows"],
        "left_out": found["left_out"],
        "steps": found["steps"],
        "seconds": found["seconds"],
        "held_out_loss": found["held_out_loss"],
        "known": found["known"],
        "rows": [
            {"manager": manager, "part": part, **shares}
            for manager, parts in found["agreement"].items()
            for part, shares in parts.items()
        ],
    }


def main(path: Path) -> None:
    """Fine-tune and write the results."""
    words = ["chat", "runs/demo", "--simulate", str(CONVERSATIONS), "--tune", RECIPE]
    done = subprocess.run([sys.executable, "-m", "llmrec", *words, "--json"], check=True, stdout=subprocess.PIPE)
    asked = {"command": f"python -m eval.benchmarks.chat_tuning {path}", "of": " ".join(["llmrec", *words])}
    write_json(path, asked | result(json.loads(done.stdout)) | {**provenance()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
