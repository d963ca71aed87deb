"""Ranks requests for real: how many a second, and does every faulty line fail where it stands, and no other?

Run by ``make bench NAME=rank``. Requests of 20 films each are made from MovieLens-100K: a stretch of a user's history,
the film that came next, and 19 that the user never rated. One line in 20 is faulty in a known way. The command line
ranks the file twice, whole and with ``--top 10``; figures and checks are written to ``eval/results/rank.json``.

``--beside-engine`` measures something else, and leaves the rest of that file as it stands: what processor time ranking
takes beyond that of the engine's own calls, of the same run.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmrec.answer.rank.options import RankOptions
from llmrec.answer.rank.run import rank_file
from llmrec.backends.hf.backend import HFBackend
from llmrec.data.sets.table import load
from llmrec.data.split import split
from llmrec.durable import write_json
from llmrec.machine import machine, versions
from llmrec.recipe.schema import DataSection
from llmrec.tasks.base import keyed
from llmrec.tasks.pool import Negatives

CANDIDATES = 20
HISTORY = 20
EVERY = 20
LONG = "字" * 300

# What is done to a good line, and what its error must say.
FAULTS: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "cut off": (lambda r: json.dumps(r)[:-40], "not JSON"),
    "no object": (lambda r: json.dumps(list(r)), "not a JSON object"),
    "no candidates": (lambda r: json.dumps({**r, "candidates": None}), "no 'candidates'"),
    "empty set": (lambda r: json.dumps({**r, "candidates": []}), "empty"),
    "unknown item": (lambda r: json.dumps({**r, "candidates": [*r["candidates"], "no-such-film"]}), "'no-such-film'"),
    "wrong type": (lambda r: json.dumps({**r, "history": {"item": 1}}), "an object"),
    "id of another": (lambda r: json.dumps({**r, "id": "r0"}), "that of line 1"),
    "NUL": (lambda r: json.dumps({**r, "candidates": [{"title": "a\0b"}]}), "NUL"),
    "half a character": (lambda r: json.dumps({**r, "profile": "\ud800"}), "no text"),
    "too long": (lambda r: json.dumps({**r, "history": [{"title": f"{n} {LONG}"} for n in range(20)]}), "--max-length"),
}


def main() -> None:
    """Make requests, rank them twice, check and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--beside-engine", action="store_true", help="the engine's share of the processor time alone")
    parser.add_argument("--folder", type=Path, help="keep files here, and go on from what a killed run left")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = chosen.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        if chosen.beside_engine:
            make(folder, min(chosen.requests, EVERY - 1))
            stored = json.loads(chosen.target.read_text(encoding="utf-8"))
            write_json(chosen.target, {**stored, "beside_engine": beside_engine(folder, chosen.model)})
            return
        good, faults = make(folder, chosen.requests)
        runs = {}
        for run, options in (("all", []), ("top 10", ["--top", "10"])):
            before = os.getloadavg()[0]
            out = folder / f"{run.replace(' ', '-')}.jsonl"
            summary = rank(folder, out, chosen.model, options)
            runs[run] = {
                **{
                    key: summary[key]
                    for key in ("ranked", "failed", "from_earlier_run", "prompt_tokens", "completion_tokens")
                },
                **{key: summary[key] for key in ("requests_per_second", "tokens_per_second", "seconds")},
                "load_before": round(before, 2),
                "load_after": round(os.getloadavg()[0], 2),
            }
            sys.stdout.write(f"{run}: {json.dumps(runs[run])}\n")
            check(out, good, faults, None if run == "all" else 10)
    result = {
        "command": "make bench NAME=rank",
        "what": f"requests of {CANDIDATES} films from MovieLens-100K, histories of {HISTORY}, ranked by llmrec rank",
        "model": chosen.model,
        "requests": chosen.requests,
        "faulty": {kind: sum(kind == found for found in faults.values()) for kind in FAULTS},
        "checked": "exactly the faulty lines failed, each with its reason; every other line ranks all its candidates",
        **{key: summary[key] for key in ("task", "template", "strategy", "engine", "dtype", "window")},
        "runs": runs,
        "machine": machine(),
        # How threads wait for each other decides the speed on a machine that is also used otherwise.
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(("OMP_", "GOMP_"))},
        "versions": versions(),
    }
    chosen.target.parent.mkdir(parents=True, exist_ok=True)
    chosen.target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def make(folder: Path, count: int) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """Write the requests and the items; return the good requests and the kinds of faults, both by line."""
    section = DataSection(source="movielens-100k")
    data = split(load(section, seed=0), section.split, seed=0)
    with (folder / "items.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["item_id", "title"])
        writer.writerows([item.item_id, item.title] for item in data.dataset.items.values())
    negatives = Negatives(data, "uniform")
    users = data.users()
    good: dict[int, dict[str, Any]] = {}
    faults: dict[int, str] = {}
    lines = []
    for n in range(count):
        user = users[n % len(users)]
        rng = keyed("rank benchmark", 0, str(n))
        events = data.history(user, "test")
        at = rng.randrange(min(HISTORY, len(events) - 1), len(events))
        pool = [events[at].item_id, *negatives.draw(user, CANDIDATES - 1, rng)]
        rng.shuffle(pool)
        past = [event.item_id for event in events[max(0, at - HISTORY) : at]]
        request = {"id": f"r{n}", "user_id": user, "history": past, "candidates": pool}
        if n % EVERY == EVERY - 1:
            kind = list(FAULTS)[n // EVERY % len(FAULTS)]
            faults[n + 1] = kind
            lines.append(FAULTS[kind][0](request))
        else:
            good[n + 1] = request
            lines.append(json.dumps(request))
    (folder / "requests.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return good, faults


def rank(folder: Path, out: Path, model: str, options: list[str]) -> dict[str, Any]:
    """Rank through the command line and return its summary."""
    command = [sys.executable, "-m", "llmrec.cli.main", "rank", "--model", model, "--noun", "movies"]
    command += ["--in", str(folder / "requests.jsonl"), "--items", str(folder / "items.csv"), "--out", str(out)]
    done = subprocess.run([*command, *options], check=False)
    if done.returncode != 1:
        raise SystemExit(f"llmrec rank ended with {done.returncode}, where faulty lines call for 1")
    summary: dict[str, Any] = json.loads(out.with_name(out.name + ".summary.json").read_text(encoding="utf-8"))
    return summary


def beside_engine(folder: Path, model: str) -> dict[str, Any]:
    """Rank inside this process, and tell the time of the engine's own calls apart from all the rest.

    What comes before the first call is opening: imports, tokenizer, weights. It does not grow with the requests.
    """
    calls: list[tuple[float, float]] = []
    score = HFBackend.score

    def timed(self: HFBackend, *asked: Any, **options: Any) -> Any:
        begin = time.process_time()
        found = score(self, *asked, **options)
        calls.append((begin, time.process_time()))
        return found

    HFBackend.score = timed  # type: ignore[method-assign]
    options = RankOptions(
        model=model,
        backend="hf",
        noun="movies",
        requests=folder / "requests.jsonl",
        items=folder / "items.csv",
        out=folder / "out.jsonl",
    )
    begin = time.process_time()
    summary = rank_file(options)
    end = time.process_time()
    HFBackend.score = score  # type: ignore[method-assign]
    engine = sum(after - before for before, after in calls)
    ratio = (end - calls[0][0]) / engine
    return {
        "command": "python -m eval.benchmarks.rank_requests eval/results/rank.json --beside-engine",
        "what": "processor seconds of llmrec rank: before the engine's first call, in its calls, and the rest",
        "requests": summary["ranked"],
        "dtype": summary["dtype"],
        "opening": calls[0][0] - begin,
        "engine": engine,
        "rest": end - calls[0][0] - engine,
        "ranking_by_engine": {"value": ratio, "goal": {"at_most": 1.1, "met": ratio <= 1.1}},
        "machine": machine(),
        "versions": versions(),
    }


def check(out: Path, good: dict[int, dict[str, Any]], faults: dict[int, str], top: int | None) -> None:
    """Compare the output with what was made.

    Raises:
        AssertionError: If a line is missing, a faulty one passed, or a good one did not.
    """
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    assert [row["line"] for row in rows] == list(range(1, len(good) + len(faults) + 1))
    for row in rows:
        line = row["line"]
        if line in faults:
            assert FAULTS[faults[line]][1] in (row["error"] or ""), (line, faults[line], row["error"])
            continue
        assert row["error"] is None, row
        wanted = set(good[line]["candidates"])
        assert len(row["items"]) == len(set(row["items"])) == min(top or CANDIDATES, CANDIDATES)
        assert set(row["items"]) <= wanted and row["scores"] == sorted(row["scores"], reverse=True)


if __name__ == "__main__":
    main()
