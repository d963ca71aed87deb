"""Times training next to a busy process, with waiting threads that spin and waiting threads that sleep.

``python -m eval.benchmarks.waiting eval/results/waiting.json`` trains a network of SmolLM2-135M's shape with random
weights, 512 tokens per step, one thread per core, alone and next to one busy process, and records tokens per second.
``llmrec`` sets OMP_WAIT_POLICY=PASSIVE because of this result.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from eval.benchmarks.provenance import provenance
from llmrec.durable import write_json

POLICIES = {"spinning": None, "sleeping": "PASSIVE"}
_TRAIN = """
import sys, time, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
shape = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
             num_key_value_heads=3, vocab_size=2048)
model = LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16)
for name, weight in model.named_parameters():
    weight.requires_grad_(any(f"layers.{n}." in name for n in range(22, 30)))
ids = torch.randint(0, 2048, (16, 32))
def step():
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
step()
start, steps = time.monotonic(), 0
while time.monotonic() - start < float(sys.argv[1]):
    step()
    steps += 1
print(512 * steps / (time.monotonic() - start))
"""


def speed(policy: str | None, seconds: float) -> float:
    """Return tokens per second of training under a wait policy of OpenMP."""
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    if policy is not None:
        environment["OMP_WAIT_POLICY"] = policy
    done = subprocess.run(
        [sys.executable, "-c", _TRAIN, str(seconds)], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def main(target: Path, *, seconds: float) -> None:
    """Measure every policy alone and next to a busy process."""
    rows = []
    for busy in (False, True):
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
        try:
            rows += [
                {"threads": name, "busy_processes": int(busy), "tokens_per_second": speed(policy, seconds)}
                for name, policy in POLICIES.items()
            ]
        finally:
            if other is not None:
                other.kill()
                other.wait()
    command = f"python -m eval.benchmarks.waiting {target} --seconds {seconds:g}"
    write_json(target, {"command": command, **provenance(), "rows": rows})
    for row in rows:
        beside = "beside a busy process" if row["busy_processes"] else "alone"
        sys.stdout.write(f"{row['threads']}, {beside}: {row['tokens_per_second']:.0f} tokens/s\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seconds", type=float, default=15.0)
    given = parser.parse_args()
    main(given.target, seconds=given.seconds)
