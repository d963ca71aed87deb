"""Measures the processor time of short commands, which is mostly start-up time.

`make bench NAME=commands` writes eval/results/small_commands.json. Seconds are user time of the process and its
threads, the minimum over rounds. It is much more stable than wall-clock time, but still grows by half or more on shared
cores. So every round also measures the import of the required third-party libraries, a lower bound for each command.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.benchmarks.provenance import provenance
from llmrec.durable import write_json

RECIPE = "recipes/quickstart.yaml"
# Goals in seconds.
GOALS: Mapping[str, float] = {"--help": 0.1, "init": 2.0, "check": 1.5, "data": 1.5, "prompts": 2.0, "rank": 5.0}
ITEMS, ROWS = 40, 8_000
_DATA = "import numpy, polars, pyarrow.compute, pydantic, scipy.sparse, jinja2.sandbox, yaml, typer"
# Required third-party imports of each command.
LIBRARIES: Mapping[str, str] = {
    "--help": "import typer",
    "init": _DATA,
    "check": f"{_DATA}, tokenizers, huggingface_hub",
    "data": _DATA,
    "prompts": f"{_DATA}, transformers; transformers.TokenizersBackend",
    "rank": f"{_DATA}, transformers.models.llama.modeling_llama; transformers.AutoModelForCausalLM",
}


def lines(folder: Path) -> dict[str, list[str]]:
    """Return the commands, after writing a table and one request for the test model into a folder."""
    titles = "".join(f"i{n},Film number {n} ({1950 + n})\n" for n in range(ITEMS))
    (folder / "items.csv").write_text(f"item_id,title\n{titles}", encoding="utf-8")
    request = {"history": ["i1", "i2", "i3"], "candidates": [f"i{n}" for n in range(4, 12)]}
    (folder / "one.jsonl").write_text(json.dumps(request) + "\n", encoding="utf-8")
    events = "".join(f"u{n % 500},i{n * 7 % 997 % ITEMS},{1_700_000_000 + n}\n" for n in range(ROWS))
    (folder / "events.csv").write_text(f"customer_id,sku,ordered_at\n{events}", encoding="utf-8")
    files = ["--items", f"{folder}/items.csv", "--in", f"{folder}/one.jsonl", "--out", f"{folder}/out.jsonl"]
    return {
        "--help": ["--help"],
        "init": ["init", f"{folder}/events.csv", "--out", f"{folder}/events.yaml", "--force"],
        "check": ["check", RECIPE],
        "data": ["data", RECIPE],
        "prompts": ["prompts", RECIPE],
        "rank": ["rank", "--model", "SmolLM2-135M-Instruct", "--backend", "hf", "--restart", "-q", *files],
    }


def user_seconds(words: Sequence[str]) -> float:
    """Run Python once and return the user time, including child processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    # Spinning threads would count as work.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    # As in an installed package, modules are compiled.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run([sys.executable, *words], check=True, capture_output=True, env=environment)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        todo, spent, below = lines(Path(folder)), dict[str, list[float]](), dict[str, list[float]]()
        for _ in range(options.rounds):
            for name, words in todo.items():
                Path(folder, "out.jsonl").unlink(missing_ok=True)
                spent.setdefault(name, []).append(user_seconds(["-m", "llmrec.cli.main", *words]))
                below.setdefault(name, []).append(user_seconds(["-c", LIBRARIES[name]]))
    commands = {
        name: {
            "user_seconds": round(min(seconds), 3),
            "goal": GOALS[name],
            "met": min(seconds) <= GOALS[name],
            "libraries": round(min(below[name]), 3),
            "times_libraries": round(min(seconds) / min(below[name]), 2),
        }
        for name, seconds in spent.items()
    }
    write_json(
        options.out,
        {
            "command": "make bench NAME=commands",
            "rounds": options.rounds,
            "commands": commands,
            **provenance(),
        },
    )


if __name__ == "__main__":
    main()
