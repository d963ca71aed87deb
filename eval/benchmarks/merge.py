"""Measures the memory of merging a LoRA adapter: block by block by llmrec, and the whole model in float32 by PEFT.

``python -m eval.benchmarks.merge eval/results/merge.json`` creates a Llama with random weights in bfloat16 and a LoRA
adapter on all linear layers, merges it both ways, each in a separate process, and compares the files. Peak memory is
the anonymous memory of the process, sampled two hundred times per second, minus that before the merge; pages of mapped
files are excluded, since the system can drop them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from eval.benchmarks.provenance import provenance
from llmrec.durable import sha256_of, write_json

_MAKE = """
import sys, torch, transformers
from llmrec.recipe.schema import LoraSection
from llmrec.train.lora import add_lora_adapters
folder, layers = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
shape = dict(hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=16)
config = transformers.LlamaConfig(vocab_size=32000, num_hidden_layers=layers, tie_word_embeddings=False, **shape)
model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
model.save_pretrained(folder + "/base")
adapted = add_lora_adapters(model, LoraSection(rank=16))
for name, weight in adapted.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(weight, std=0.01)
adapted.save_pretrained(folder + "/adapter")
print(model.num_parameters())
"""

_MERGE = """
import json, sys, threading, time
from pathlib import Path
import peft, torch
from llmrec.models.load import load_model, silence_libraries
from llmrec.recipe.schema import ModelSection
from llmrec.train import lora
folder, way = Path(sys.argv[1]), sys.argv[2]
silence_libraries()
section, done, peak = ModelSection(name="made", dtype="bfloat16"), threading.Event(), [0]
def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], held())
def blocks():
    lora.merge_adapter(str(folder / "base"), section, folder / "adapter", folder / way)
def whole():
    base = load_model(str(folder / "base"), section, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    merged.to(torch.bfloat16).save_pretrained(folder / way)
before, start = held(), time.monotonic()
threading.Thread(target=watch, daemon=True).start()
{"blocks": blocks, "whole": whole}[way]()
seconds = time.monotonic() - start
done.set()
print(json.dumps({"way": way, "held_before": before, "peak": max(peak[0], held()) - before, "seconds": seconds}))
"""


def _run(code: str, *words: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def main(target: Path, *, layers: int) -> None:
    """Measure both ways, and compare their files."""
    rows = []
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        weights = int(_run(_MAKE, folder, str(layers)))
        for way in ("whole", "blocks"):
            row = json.loads(_run(_MERGE, folder, way))
            row["bytes_per_weight"] = row["peak"] / weights
            row["sha256"] = sha256_of(Path(folder) / way / "model.safetensors")
            rows.append(row)
            sys.stdout.write(f"{way}: {row['peak'] / 2**20:,.0f} MiB, {row['seconds']:.1f} s\n")
    command = f"python -m eval.benchmarks.merge {target} --layers {layers}"
    write_json(
        target,
        {
            "command": command,
            **provenance(),
            "weights": weights,
            "equal": len({row["sha256"] for row in rows}) == 1,
            "times_less": rows[0]["peak"] / rows[1]["peak"],
            "rows": rows,
        },
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    options = parser.parse_args()
    main(options.target, layers=options.layers)
