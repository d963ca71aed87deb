"""Requests and options for the ranking tests; as a script, ranks requests and kills itself after some parts."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from llmrec.answer.rank.options import RankOptions
from llmrec.data.ranked import RankingRecord, write_part
from llmrec.data.requests import history_entry
from llmrec.pipeline import bundle
from llmrec.pipeline.study import build_study
from llmrec.recipe.load import dump_recipe, load_recipe

WORDS = ("Toy", "Story", "Heat", "Fargo", "Casino", "Alien", "Brazil", "Jaws", "Rocky", "Kitchen", "Quiet", "Star")
TRAINED = (
    *("data={source: made-reviews, noun: products}", "reviews=null", "model.dtype=float32"),
    *("train.steps=2", "train.batch_tokens=512", "train.valid_rows=4", "train.lora.top_layers=1"),
    "tasks={sequential: {templates: [continue-list], baselines: [random, popularity, {name: item-knn, history: 5}, "
    "markov-1, markov]}}",
    *("eval.users=12", "eval.candidates.count=6", "eval.bootstrap=50", "eval.backend=hf", "eval.arms=[tuned]"),
    "eval.fusion={model_users: 24}",
)
"""Changes to recipes/movielens-100k/four-tasks.yaml for the run that tests share, `trained_run`."""
TITLES = {str(n): f"{WORDS[n % 12]} {WORDS[(n // 12 + n) % 12]} ({1950 + n})" for n in range(60)}


def options(model: Path | str, requests: Path, out: Path, **changes: Any) -> RankOptions:
    """Return the options of the command line, with the hf backend and float32."""
    values: dict[str, Any] = {"backend": "hf", "dtype": "float32", "batch": 3}
    return RankOptions(model=str(model), requests=requests, out=out, **values | changes)


def items_csv(folder: Path) -> Path:
    path = folder / "items.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["item_id", "title"], *TITLES.items()])
    return path


def records(count: int, *, candidates: int = 5, history: int = 4) -> list[dict[str, Any]]:
    """Return distinct requests with ids."""
    ids = list(TITLES)
    return [
        {
            "id": f"r{n}",
            "user_id": f"u{n % 7}",
            "history": [ids[(n * 7 + k * 3) % 60] for k in range(history)],
            "candidates": [ids[(n * 11 + k * 5 + 1) % 60] for k in range(candidates)],
        }
        for n in range(count)
    ]


def jsonl(path: Path, requests: list[Any]) -> Path:
    text = "".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in requests)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def make_run(model: Path, folder: Path) -> Path:
    """Create a run folder as after training, but without the adapter."""
    changes = ["data={source: made-reviews, noun: products}", "reviews=null", "eval.candidates.count=5"]
    recipe = load_recipe("recipes/movielens-100k/four-tasks.yaml", [*changes, "tasks.direct.templates=[shortlist]"])
    (folder / "merged").mkdir()
    for file in model.iterdir():
        (folder / "merged" / file.name).write_bytes(file.read_bytes())
    bundle.write(build_study(recipe), folder / "merged")
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return folder


def evaluated_requests(run: Path) -> list[dict[str, Any]]:
    """Return the requests of a run's test split, as written in a file."""
    study = build_study(load_recipe(run / "recipe.yaml"))
    return [
        {
            "id": case.request.id,
            "history": [history_entry(event) for event in case.request.history],
            "candidates": list(case.request.candidates or ()),
        }
        for case in study.cases("sequential")
    ]


def evaluated_lists(run: Path, row: str) -> dict[str, list[tuple[str, float]]]:
    """Return the items and scores of an evaluated row, by request."""
    rows = pl.read_parquet(run / "predictions.parquet").filter(pl.col("row_id") == row)
    answers = {request: json.loads(parsed) for request, parsed in rows.select("request_id", "parsed").iter_rows()}
    return {request: list(zip(each["items"], each["scores"], strict=True)) for request, each in answers.items()}


def pairs(line: dict[str, Any]) -> list[tuple[str, float]]:
    """Return the items and scores of a line of an output file."""
    return list(zip(line["items"], line["scores"], strict=True))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]


class Killed(BaseException):
    """Raised in place of a kill; the package does not catch it."""


def dying(parts: int) -> Callable[[Path, Sequence[RankingRecord]], None]:
    """Return a `write_part` that writes this many parts and then raises `Killed`."""
    done: list[Path] = []

    def write(path: Path, results: Sequence[RankingRecord]) -> None:
        if len(done) == parts:
            raise Killed
        write_part(path, results)
        done.append(path)

    return write


def toy_run(model: Path, folder: Path) -> Path:
    """Create a run whose model supports every kind of request."""
    folder.mkdir()
    run = make_run(model, folder)
    recipe = load_recipe(str(run / "recipe.yaml"), ["tasks.ctr={}"])
    bundle.write(build_study(recipe), run / "merged")
    (run / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return run
