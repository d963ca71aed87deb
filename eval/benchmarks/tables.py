"""Measures time and memory of the data layer by number of rows, on synthetic tables: ``make bench NAME=tables``.

A table has fifty rows per user; item popularity follows a power law; ids are short strings. All stages run in one
process, and the peak memory of a stage is that of the process minus that of an empty one. The time of polars for
reading the same file is reported for comparison. Tables are generated in a folder and kept there: ``python -m
eval.benchmarks.tables eval/results/tables.json FOLDER 1000000 10000000``.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from eval.benchmarks.provenance import provenance
from llmrec.durable import write_json

ROWS_A_USER = 50
_BLOCK = 2_000_000
_MIB = 2**20
SIZES = (1_000_000, 10_000_000)
# 100 million rows give a billion item pairs for similarities and transitions of up to ten positions.
_PAIRS_UP_TO = 10_000_000


def make(path: Path, rows: int) -> None:
    """Write a table with a number of rows, in blocks; the block size does not change the rows."""
    users, items = max(1, rows // ROWS_A_USER), min(100_000, max(100, rows // 100))
    draft = path.with_suffix(".part")
    with draft.open("wb") as out:
        out.write(b"user_id,item_id,rating,timestamp\n")
        for start in range(0, rows, _BLOCK):
            count = min(_BLOCK, rows - start)
            rng = np.random.default_rng([rows, start])
            # The share of item i falls as i**(-2/3): the most popular of 100,000 items has 2 % of the rows.
            item = (items * rng.random(count) ** 3).astype(np.int64)
            # Rows are sorted by time, not by user.
            frame = pl.DataFrame(
                {
                    "user_id": pl.Series(rng.integers(0, users, count)),
                    "item_id": pl.Series(item),
                    "rating": pl.Series(rng.integers(1, 6, count)),
                    "timestamp": pl.Series(1_000_000_000 + start + np.arange(count)),
                }
            )
            frame = frame.with_columns(
                pl.format("u{}", "user_id").alias("user_id"), pl.format("i{}", "item_id").alias("item_id")
            )
            frame.write_csv(out, include_header=False)
    draft.replace(path)


def _status(key: str) -> float:
    """Return a memory value of this process in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def _recipe(path: Path) -> dict[str, Any]:
    return {
        "name": "tables",
        "seed": 0,
        "model": {"name": "SmolLM2-135M-Instruct"},
        "data": {"source": "table", "path": str(path), "duplicates": "keep_last"},
        "tasks": {"sequential": {}, "rating": {}},
        "train": {"steps": 20},
        "eval": {"users": 1000, "candidates": {"kind": "uniform", "count": 20}},
    }


def _measure(path: Path, rows: int, out: Any) -> None:
    """Run all stages, each with the results of earlier ones, and report the time and memory of each."""
    from llmrec.backends.encode import Encoder
    from llmrec.baselines.knn import ItemKNN
    from llmrec.baselines.markov import FirstOrder, Markov
    from llmrec.baselines.popular import Popularity
    from llmrec.data.candidates import sample_candidates
    from llmrec.data.sets.table import load_data
    from llmrec.data.split import split_dataset
    from llmrec.data.stats import statistics
    from llmrec.models.load import load_tokenizer, resolve_model_folder
    from llmrec.pipeline.study import build_study
    from llmrec.pipeline.training import plan_training
    from llmrec.recipe.load import as_recipe

    recipe = as_recipe(_recipe(path))
    empty = _status("VmRSS")

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        begun, worked, held = time.perf_counter(), time.process_time(), _status("VmRSS")
        yield
        seconds, processor = time.perf_counter() - begun, time.process_time() - worked
        peak = _status("VmHWM")
        out.put(
            {
                "stage": name,
                "seconds": round(seconds, 2),
                "processor_seconds": round(processor, 2),
                "peak_mib": round(peak - empty, 1),
                "more_mib": round(peak - held, 1),
            }
        )

    with stage("read"):
        data = load_data(recipe.data, seed=0)
    with stage("split"):
        split = split_dataset(data, recipe.data.split, seed=0)
        del data
    with stage("statistics and fingerprints"):
        statistics(split)
    with stage("tasks and candidates of 1,000 users"):
        study = build_study(recipe, split)
        requests = [case.request for case in study.cases("sequential")]
    with stage("candidates of every user"):
        sample_candidates(split, "test", recipe.eval.candidates, seed=0)
    with stage("training plan of 20 steps"):
        base = resolve_model_folder(recipe.model, seed=0)
        plan_training(study, Encoder(load_tokenizer(base, recipe.model), max_length=recipe.model.max_length))
    baselines = (Popularity, FirstOrder, Markov, ItemKNN)
    for kind in baselines if rows <= _PAIRS_UP_TO else baselines[:2]:
        with stage(kind.name):
            kind().fit(split).answer(requests)
    out.put(None)


def _scan(path: Path, rows: int, out: Any) -> None:
    begun = time.perf_counter()
    pl.read_csv(path)
    out.put({"stage": "polars.read_csv alone", "seconds": round(time.perf_counter() - begun, 2)})
    out.put(None)


def measured(path: Path, rows: int) -> list[dict[str, Any]]:
    """Return the measurements of all stages, in separate processes for polars and for llmrec."""
    results: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    for target in (_scan, _measure):
        out: Any = context.Queue()
        child = context.Process(target=target, args=(path, rows, out))
        child.start()
        while True:
            try:
                one = out.get(timeout=5)
            except Exception:
                if child.is_alive():
                    continue
                results.append({"stage": "ended early", "exit": child.exitcode})
                break
            if one is None:
                break
            if "peak_mib" in one:
                one["bytes_a_row"] = round(one["peak_mib"] * _MIB / rows, 1)
            results.append(one)
            sys.stdout.write(json.dumps({"rows": rows, **one}) + "\n")
            sys.stdout.flush()
        child.join()
    return results


def main(target: Path, folder: Path, sizes: tuple[int, ...]) -> None:
    """Generate missing tables, measure, and write after each; results of other sizes are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    before = json.loads(target.read_text(encoding="utf-8"))["tables"] if target.is_file() else []
    result: dict[str, Any] = {
        "command": "make bench NAME=tables",
        "what": "seconds of each stage, and the peak memory of the process in it, by rows of a made-up CSV table",
        "rows_a_user": ROWS_A_USER,
        **provenance(),
        "tables": [table for table in before if table["rows"] not in sizes],
    }
    for rows in sizes:
        path = folder / f"table-{rows}.csv"
        if not path.exists():
            make(path, rows)
        entry = {"rows": rows, "bytes": path.stat().st_size, "load": round(os.getloadavg()[0], 2)}
        result["tables"].append(entry | {"stages": measured(path, rows)})
        result["tables"].sort(key=lambda table: table["rows"])
        write_json(target, result)


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        Path(sys.argv[2]) if len(sys.argv) > 2 else Path("runs/tables"),
        tuple(int(rows) for rows in sys.argv[3:]) or SIZES,
    )
