"""How far a tuned manager of conversations calls what rules call, on MovieLens-100K.

``python -m eval.benchmarks.chat_tuning eval/results/chat_tuning.json`` (`make bench NAME=chat-models`, which also holds
conversations with the tuned model) tunes SmolLM2-135M-Instruct on 300 simulated conversations over the run
``runs/demo``, and keeps what the command prints: the share of held-out calls, and of calls in wordings that no row has,
that the model makes too, before and after tuning, beside the control that calls what usually follows. A call that was
cut off resumes from its checkpoint.
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
    """Return what the command told, with a row for each manager and kind of moments."""
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
    """Tune and write."""
    words = ["chat", "runs/demo", "--simulate", str(CONVERSATIONS), "--tune", RECIPE]
    done = subprocess.run([sys.executable, "-m", "llmrec", *words, "--json"], check=True, stdout=subprocess.PIPE)
    asked = {"command": f"python -m eval.benchmarks.chat_tuning {path}", "of": " ".join(["llmrec", *words])}
    write_json(path, asked | result(json.loads(done.stdout)) | {**provenance()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
