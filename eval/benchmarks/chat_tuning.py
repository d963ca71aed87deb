"""How far a tuned manager of conversations calls what rules call, on MovieLens-100K.

``python -m eval.benchmarks.chat_tuning eval/results/chat_tuning.json`` (`make bench-chat-models`, which also holds
conversations with the tuned model) tunes SmolLM2-135M-Instruct on 300 simulated conversations over the run
``runs/demo``, and keeps what the command prints: the share of held-out calls, and of calls in wordings that no row has,
that the model makes too, before and after tuning, beside the control that calls what usually follows. A call that was
cut off resumes from its checkpoint.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from llmrec.durable import write_json
from llmrec.machine import machine, versions

RECIPE = "recipes/movielens-100k/manager.yaml"
CONVERSATIONS = 300


def main(path: Path) -> None:
    """Tune and write."""
    words = ["chat", "runs/demo", "--simulate", str(CONVERSATIONS), "--tune", RECIPE]
    done = subprocess.run([sys.executable, "-m", "llmrec", *words, "--json"], check=True, stdout=subprocess.PIPE)
    found = json.loads(done.stdout)
    command = f"python -m eval.benchmarks.chat_tuning {path}"
    asked = {"command": command, "of": " ".join(["llmrec", *words])}
    write_json(path, asked | found | {"machine": machine(), "versions": versions()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
