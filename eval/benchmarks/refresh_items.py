"""Times ``llmrec refresh`` with 1,000 new items of Amazon 2014 Toys, and compares lists of all ways to rank.

``LLMREC_DATA=folder python -m eval.benchmarks.refresh_items eval/results/refresh_items.json`` removes 1,000 items and
their interactions from the data, writes a recipe with baselines over the rest, and adds the items with ``llmrec refresh
--items``. Quality is not evaluated. Lists of ten for the first users come from the ranking of the evaluation over a
recommender fitted to the folder's data, from ``llmrec.load``, from ``llmrec rank --all-users``, and from a service;
their items are compared one by one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from starlette.testclient import TestClient

import llmrec
from eval.benchmarks.provenance import provenance
from llmrec.answer.rank.options import RankOptions
from llmrec.answer.rank.users import rank_users
from llmrec.baselines.fits import fitted
from llmrec.data.assemble import write_items
from llmrec.data.dataset import Dataset
from llmrec.data.hashing import hash64
from llmrec.data.sets.table import load
from llmrec.durable import write_json, write_text
from llmrec.ensembles.carried import carried
from llmrec.evaluate.catalogue import rank_catalogue
from llmrec.recipe.load import dump, load_recipe
from llmrec.recipe.schema import DataSection
from llmrec.serve.app import make_app
from llmrec.serve.gates import Auth
from llmrec.serve.options import RefreshOptions, ServeOptions
from llmrec.serve.refresh import refresh
from llmrec.serve.run import make_service
from llmrec.types import Case, Request

K, MODELS = 10, ("content", "popularity")
Lists = dict[str, list[str]]
"""Items by user, best first."""


def without(whole: Dataset, count: int, folder: Path) -> list[str]:
    """Write data without some items, the recipe for them and a table of the items; return the removed items."""
    names = np.array(sorted(whole.items))
    new: list[str] = names[np.argsort(hash64("new items", 0, names.tolist()), kind="stable")[:count]].tolist()
    rows = whole.interactions.filter(~pl.col("item_id").cast(pl.String).is_in(new))
    rows.select("user_id", "item_id").write_parquet(folder / "events.parquet")
    write_items({name: item for name, item in whole.items.items() if name not in set(new)}, folder / "items.parquet")
    write_items({name: whole.items[name] for name in new}, folder / "new.parquet")
    fields = sorted({name for item in whole.items.values() for name in item.fields})
    page = (
        f"name: toys\n"
        f"data: {{source: table, path: {folder / 'events.parquet'}, items: {folder / 'items.parquet'}, "
        f"columns: {{fields: [{', '.join(fields)}]}}, split: {{kind: leave_one_out}}}}\n"
        f"tasks: {{sequential: {{baselines: [{', '.join(MODELS)}]}}}}\neval: {{arms: []}}\n"
    )
    write_text(folder / "toys.yaml", page)
    (folder / "run").mkdir()
    write_text(folder / "run" / "recipe.yaml", dump(load_recipe(str(folder / "toys.yaml"))))
    return new


def by_evaluation(live: Path, model: str, users: Sequence[str]) -> Lists:
    """Return the lists of the evaluation, with the data of a refreshed folder."""
    data = carried(live, seed=0)
    assert data is not None
    scorer = fitted(model, {}, data, seed=0)
    target = sorted(data.dataset.items)[0]
    # The truth is always ranked, so it must be an unseen item.
    cases = []
    for user in users:
        history = data.train_events(user)
        had = {event.item_id for event in history}
        truth = target if target not in had else next(item for item in data.dataset.items if item not in had)
        cases.append(Case(request=Request(id=user, user_id=user, history=history), truth=truth))
    found = rank_catalogue(scorer, cases, cutoffs=(K,), seen=("excluded",))["excluded"]
    return {user: [scorer.items[n] for n in row if n >= 0] for user, row in zip(users, found.lists, strict=True)}


def by_rank(live: Path, model: str, users: Sequence[str], out: Path) -> Lists:
    """Return the lists of ``llmrec rank --all-users``."""
    rank_users(RankOptions(model=str(live), all_users=True, to=str(out), by=model, top=K, limit=len(users)))
    rows = pl.read_parquet(out).sort("user_id", "rank")
    return {str(user): own["item_id"].to_list() for (user,), own in rows.group_by("user_id", maintain_order=True)}


@contextmanager
def served(live: Path, store: Path) -> Iterator[TestClient]:
    """Serve a folder in this process."""
    service = make_service(ServeOptions(model=str(live), models=MODELS, store=str(store)))
    with TestClient(make_app(service, Auth()), base_url="http://127.0.0.1") as client:
        while client.get("/ready").status_code != 200:
            time.sleep(0.2)
        yield client


def main(arguments: Sequence[str] | None = None) -> None:
    """Refresh, rank in all ways, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.refresh_items")
    parser.add_argument("target", type=Path)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--users", type=int, default=200)
    given = parser.parse_args(arguments)
    section = DataSection(source="sequences", path="amazon14_toys")
    whole = load(section, seed=0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        new = set(without(whole, given.items, folder))
        begin = time.perf_counter(), time.process_time()
        told = refresh(RefreshOptions(model=str(folder / "run"), items=folder / "new.parquet", out=folder / "live"))
        took = time.perf_counter() - begin[0], time.process_time() - begin[1]
        found = {
            "command": "LLMREC_DATA=folder python -m eval.benchmarks.refresh_items eval/results/refresh_items.json",
            "what": "1,000 items of Amazon 2014 Toys are brought in by llmrec refresh --items, without an event",
            "new_items": told["new items"],
            "items": told["items"],
            "interactions": told["interactions"],
            "seconds": round(took[0], 2),
            "processor_seconds": round(took[1], 2),
            "users": given.users,
            "k": K,
            **asked(folder, given.users, new),
            **provenance(),
        }
    write_json(given.target, found)
    sys.stdout.write(f"{found['rows']}\n")


def asked(folder: Path, count: int, new: set[str]) -> dict[str, Any]:
    """Return the lists of the first users from all ways to rank."""
    live, rows, seconds = folder / "live", [], {}
    begin = time.process_time()
    with llmrec.load(str(live), models=MODELS) as rec, served(live, folder / "service.sqlite") as client:
        seconds["to_open"] = round(time.process_time() - begin, 2)
        users = rec.users[:count]
        for model in MODELS:
            loaded = {u: [x.item_id for x in rec.rank(user=u, k=K, model=model, id=u)] for u in users}
            others = {
                "evaluation": by_evaluation(live, model, users),
                "rank": by_rank(live, model, users, folder / f"{model}.parquet"),
                "service": {
                    u: [
                        x["item_id"]
                        for x in client.post("/v1/rank", json={"user_id": u, "k": K, "model": model, "id": u}).json()[
                            "items"
                        ]
                    ]
                    for u in users
                },
            }
            rows.append({"model": model, **shown(loaded, new), **_same(loaded, others)})
    return {"open_processor_seconds": seconds["to_open"], "rows": rows}


def shown(lists: Mapping[str, Sequence[str]], new: set[str]) -> dict[str, Any]:
    """Return the share of new items in lists, the share of lists with one, and the number of different new items."""
    places = [item in new for own in lists.values() for item in own]
    return {
        "new_places": round(float(np.mean(places)), 4),
        "lists_with_new": round(float(np.mean([any(item in new for item in own) for own in lists.values()])), 4),
        "different_new": len({item for own in lists.values() for item in own} & new),
    }


def _same(lists: Lists, others: Mapping[str, Lists]) -> dict[str, float]:
    return {
        f"same_as_{name}": round(float(np.mean([lists[user] == own.get(user) for user in lists])), 4)
        for name, own in others.items()
    }


if __name__ == "__main__":
    main()
