"""A sample suite result, its page, and published results."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from llmrec.bench.pages import benchmark_pages, parse_benchmark_result
from llmrec.bench.records import BenchmarkResult
from llmrec.bench.references import Reference

METRICS = ("HR@5", "NDCG@5", "HR@10", "NDCG@10")
LEVELS = {"random": 0.01, "popularity": 0.05, "item-knn": 0.09, "sasrec": 0.12}


def _figures(level: float, seen: str) -> dict[str, Any]:
    result = {}
    for number, name in enumerate(METRICS):
        value = level * (1 + 0.1 * number) * (0.9 if seen == "included" else 1.0)
        result[name] = {
            "value": value, "low": 0.9 * value, "high": 1.1 * value, "range": [0.95 * value, 1.05 * value],
            "signature": f"{name}|gain:binary|ties:expected|cand:full|seen:{seen}|split:leave_one_out/test|llmrec:0.1",
        }  # fmt: skip
    result["NDCG@10"]["sd"] = 0.001
    return result


def sample_suite() -> dict[str, Any]:
    """Return the content of a suite's results file: four baselines, with seen items excluded and included."""
    seen = ("excluded", "included")
    return {
        "kind": "suite", "benchmark": "films", "description": "Films, five tie rules.", "command": "llmrec eval films",
        "machine": {"cpu": "Xeon", "cores": 2}, "data": {
            "name": "films", "users": 943, "items": 1349, "interactions": 99_287, "train": 97_401, "valid": 943,
            "test": 943, "fingerprint": "f" * 16, "split_fingerprint": "5" * 16, "split": "leave_one_out",
        },
        "protocol": {
            "split": "leave_one_out/test", "candidates": "full", "seeds": [0, 1, 2], "users": 943,
        },
        "tables": [
            {
                "name": s, "task": "ranking", "metric": METRICS[-1], "metrics": list(METRICS), "requests": 943,
                "users": 943, "detectable": "With 943 users a true difference of 0.01 would be shown.",
            }
            for s in seen
        ],
        "rows": [
            {
                "name": name, "seconds": {"fit": 1.0, "answer": 2.0},
                "memory_gb": 0.5,
                "tables": {
                    s: {
                        "metrics": _figures(level, s), "parameters": {"neighbours": 20}, "tie_rate": 0.25, "n": 943,
                    }
                    for s in seen
                },
            }
            for name, level in LEVELS.items()
        ],
        "comparisons": [
            {
                "table": s, "metric": "NDCG@10", "a": "sasrec", "b": name, "value": 0.12 - level, "low": 0.1 - level,
                "high": 0.14 - level,
            }
            for s in seen for name, level in LEVELS.items() if name != "sasrec"
        ],
        "pairs": [
            {
                "table": s, "metric": "NDCG@10", "a": "sasrec", "b": "item-knn", "value": 0.03, "low": low,
                "high": 0.06, "level": 0.975, "p": 2 * raw, "p_raw": raw, "verdict": verdict,
            }
            for s, low, raw, verdict in (("excluded", 0.0001, 0.02, "shown"), ("included", -0.01, 0.05, "not shown"))
        ],
        "references": ["papers"], "seconds": 130.0,
    }  # fmt: skip


def sample_reference(texts: Sequence[str] = ("P5", "a paper", "as printed")) -> Reference:
    """Return published values with seen items excluded, included, and unknown."""
    stream = itertools.cycle(texts)
    rows = [
        {"system": next(stream), "source": next(stream), "note": next(stream), "seen": seen, "values": values}
        for seen in ("excluded", "included", "unknown")
        for values in ({"HR@5": 0.05, "NDCG@10": 0.04}, {"NDCG@10": 0.06}, {"HR@5": 0.9})
    ]
    return Reference.model_validate(
        {
            "reference": "papers", "data": next(stream), "counts": {"users": 943},
            "protocol": {"split": "leave_one_out", "candidates": "full"}, "rows": rows,
        }
    )  # fmt: skip


def hostile_suite(texts: Sequence[str]) -> dict[str, Any]:
    """Put texts into all fields of a suite whose content users define."""
    result, stream = sample_suite(), itertools.cycle(texts)
    names = {name: f"{number} {next(stream)}" for number, name in enumerate(LEVELS)}
    metrics = {name: f"{next(stream)} {number}" for number, name in enumerate(METRICS)}
    seen = {name: f"{next(stream)} {name}" for name in ("excluded", "included")}
    for row in result["rows"]:
        row.update(name=names[row["name"]])
        row["tables"] = {seen[name]: table for name, table in row["tables"].items()}
        for table in row["tables"].values():
            table["parameters"] = {next(stream): next(stream)}
            table["metrics"] = {metrics[name]: figure for name, figure in table["metrics"].items()}
    for entry in (*result["comparisons"], *result["pairs"]):
        entry.update(a=names[entry["a"]], b=names[entry["b"]], table=seen[entry["table"]])
    result["protocol"].update(split=f"leave_one_out {next(stream)}")
    for table in result["tables"]:
        table.update(
            name=seen[table["name"]], metric=metrics[METRICS[-1]], metrics=list(metrics.values()),
            detectable=next(stream),
        )  # fmt: skip
    result.update({key: next(stream) for key in ("benchmark", "description", "command")})
    result["machine"]["cpu"] = next(stream)
    return result


def page_of(content: dict[str, Any] | BenchmarkResult, references: Mapping[str, Reference] | None = None) -> str:
    """Return the page of a suite's result."""
    result = content if isinstance(content, BenchmarkResult) else parse_benchmark_result(content)
    return benchmark_pages(result, references or {})[f"{result.benchmark}.md"]
