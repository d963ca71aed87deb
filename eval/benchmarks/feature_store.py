"""Times feature stores: build, size and look-ups, compared with encoding a text per request.

``make bench NAME=features`` writes ``eval/results/feature_store.json``. Ids and vectors are random.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmarks.provenance import provenance
from llmrec.augment.stores import ENCODER, timed
from llmrec.data.features import Features, FeatureStore, Provenance, write_version, writing
from llmrec.durable import write_json
from llmrec.errors import require
from llmrec.models.text_encoder import find_encoder, open_encoder

SIZES = ((10_000, 64), (1_000_000, 64), (100_000, 384))
TEXT = "likes slow films about people who lose each other and old comedies; does not like horror or long battles"


def store(rows: int, width: int) -> dict[str, Any]:
    """Return seconds, megabytes and microseconds of one store."""
    rng = np.random.default_rng(0)
    names = [f"user-{number}" for number in rng.permutation(10 * rows)[:rows]]
    vectors = rng.normal(size=(rows, width)).astype(np.float32)
    made = Provenance(system="bench")
    found: dict[str, Any] = {"rows": rows, "width": width}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "float16"):
            begin = time.perf_counter()
            with writing(folder) as place:
                table = Features("user", names, vectors, made)
                write_version(place, [table], dtype=dtype, keep=1)  # type: ignore[arg-type]
            found[f"{dtype}_build_seconds"] = round(time.perf_counter() - begin, 2)
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
            found[f"{dtype}_megabytes"] = round(size / 2**20, 1)
            begin = time.perf_counter()
            opened = FeatureStore.open(folder)
            found[f"{dtype}_open_ms"] = round((time.perf_counter() - begin) * 1e3, 2)
            found |= {f"{dtype}_{name}": value for name, value in timed(opened, "user").items()}
    return found


def online(count: int = 20) -> dict[str, float]:
    """Return the milliseconds of encoding one text with the encoder in memory: p50 and p99."""
    torch, encoder = require("torch", "train"), open_encoder(find_encoder(ENCODER)[0])
    seconds = []
    with torch.inference_mode():
        for number in range(count + 3):
            begin = time.perf_counter()
            batch = encoder.padded(encoder.tokens([f"{TEXT} {number}"]))
            encoder.pooled(encoder.model(**batch).last_hidden_state, batch["attention_mask"])
            seconds.append(time.perf_counter() - begin)
    p50, p99 = np.percentile(np.array(seconds[3:]) * 1e3, [50, 99])
    return {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2)}


def main(target: Path) -> None:
    """Measure and write."""
    result = {
        "command": "make bench NAME=features",
        "stores": [store(*size) for size in SIZES],
        "encoder": {"name": ENCODER, **online()},
        **provenance(),
    }
    write_json(target, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
