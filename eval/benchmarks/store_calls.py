"""Tests a service's store on SQLite and PostgreSQL with random calls, compared with an in-memory model.

``make bench NAME=store`` runs some sequences on each database. The clock jumps by ten years, stores are closed and
opened, other programs lock the events, and processes that add events are killed. The model is that of the tests.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from eval.benchmarks.provenance import provenance
from llmrec.durable import write_json
from tests.serve.store_model import agree


@contextmanager
def _places(database: str, folder: Path) -> Iterator[Iterator[str]]:
    """Yield addresses of empty stores."""
    if database == "sqlite":
        yield (str(folder / f"{n}" / "service.db") for n in range(10**6))
        return
    import pgserver
    from adbc_driver_postgresql import dbapi

    with pgserver.get_server(folder / "postgres", cleanup_mode="delete") as running:
        url = running.get_uri()

        def schemas() -> Iterator[str]:
            for n in range(10**6):
                with dbapi.connect(url, autocommit=True) as connection, connection.cursor() as cursor:
                    cursor.execute(f"CREATE SCHEMA shop{n}")
                yield f"{url}&options=-csearch_path%3Dshop{n}"

        yield schemas()


def _asked(database: str, seeds: range, calls: int, folder: Path) -> dict[str, Any]:
    """Run the sequences on one database, and count the outcomes."""
    kinds: Counter[str] = Counter()
    wrong: list[dict[str, Any]] = []
    with _places(database, folder) as places:
        for seed, where in zip(seeds, places, strict=False):
            try:
                kinds += agree(where, seed, calls, faults=True)
            except Exception as error:  # counted; continue with the others
                at = traceback.extract_tb(error.__traceback__)[-1]
                wrong.append({"seed": seed, "error": type(error).__name__, "at": f"{Path(at.filename).name}:{at.name}"})
                sys.stdout.write(traceback.format_exc())
    return {
        "tried": kinds.total(),
        "sequences": len(seeds),
        "kinds": dict(sorted(kinds.items())),
        "disagreed": len(wrong),
        "wrong": wrong,
    }


def main() -> None:
    """Run the calls and write the counts."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.store_calls", description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seed", type=int, default=2000, help="seed of the first sequence; the others follow")
    parser.add_argument("--sequences", type=int, default=3)
    parser.add_argument("--calls", type=int, default=120, help="number of calls per sequence")
    parser.add_argument("--database", choices=["sqlite", "postgresql"], action="append", help="this alone")
    chosen = parser.parse_args()
    begin = time.monotonic()
    seeds = range(chosen.seed, chosen.seed + chosen.sequences)
    found = {}
    with tempfile.TemporaryDirectory(prefix="llmrec-store-") as name:
        for database in chosen.database or ["sqlite", "postgresql"]:
            found[database] = _asked(database, seeds, chosen.calls, Path(name))
            sys.stdout.write(json.dumps({database: found[database]}, indent=1) + "\n")
    write_json(
        chosen.target,
        {
            "kind": "faults",
            "command": "make bench NAME=store",
            "what": "random calls of two connections to one store, with jumps of the clock, locks of other programs "
            "and killed processes, each compared with a model in memory",
            "date": date.today().isoformat(),
            "seed": chosen.seed,
            **provenance(),
            "all": {key: sum(each[key] for each in found.values()) for key in ("tried", "sequences", "disagreed")},
            "databases": found,
            "seconds": round(time.monotonic() - begin),
        },
    )


if __name__ == "__main__":
    main()
