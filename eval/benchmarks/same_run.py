"""Compares two run folders, such as those of one recipe before and after a change of the code.

``python -m eval.benchmarks.same_run RUN OTHER`` prints what differs and ends with exit code 1 if anything does. Times,
costs and what says where and when a run was made are left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import polars as pl


def differences(one: Path, other: Path) -> list[str]:
    """Return what differs between two runs: columns of predictions, rows, comparisons, the adapter."""
    first, second = (pl.read_parquet(run / "predictions.parquet").sort("row_id", "request_id") for run in (one, other))
    if first.columns != second.columns or len(first) != len(second):
        return [f"predictions: {first.shape} and {second.shape}"]
    found = [f"predictions: {name}" for name in first.columns if not first[name].equals(second[name], null_equal=True)]
    left, right = (json.loads((run / "results.json").read_text(encoding="utf-8")) for run in (one, other))
    if [_bare(row) for row in left["rows"]] != [_bare(row) for row in right["rows"]]:
        found.append("rows")
    found += [key for key in ("comparisons", "headline", "candidates", "data") if left[key] != right[key]]
    adapters = [(each["training"] or {}).get("adapter_sha256") for each in (left, right)]
    return found + (["adapter"] if adapters[0] != adapters[1] else [])


def _bare(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "cost"}


if __name__ == "__main__":
    found = differences(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.write("\n".join(found or ["the same"]) + "\n")
    sys.exit(bool(found))
