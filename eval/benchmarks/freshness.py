"""Measures the effect of stale user profiles: MovieLens by year, a CTR network trained each year, older profiles.

``LLMREC_DATA=FOLDER python -m eval.benchmarks.freshness eval/results/freshness.json`` reads FOLDER/ml_latest_small (610
users, 1996 to 2018). For each year the network is trained on the `WINDOW` years before it, older ratings are history,
and every rating of the year is a test case, with all previous ratings of the user as history. A profile is the mean
vector of the liked films of a user minus that of the others, by the words of titles and genres, without a language
model. At age a, profiles contain the ratings before the a-th last year, and the store contains the films rated by then;
profiles for training years have the same age. Users have separate ids in each year, since their profiles change, and no
rating is both in a profile and a training or test case with it.

``never`` are the profiles of the first year. Baselines are shuffled features (profiles and film vectors), the network
without features, and that network trained in the first year only.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from eval.benchmarks.kar import figures, measure, within
from eval.benchmarks.provenance import provenance
from llmrec.augment.texts import taste
from llmrec.baselines.item_texts import latent, texts_of
from llmrec.baselines.parameters import make
from llmrec.data.dataset import Dataset, conform
from llmrec.data.features import Features, Provenance, publish
from llmrec.data.split import SplitDataset, request_id
from llmrec.durable import write_json
from llmrec.metrics.multi_target import Pairs, judge, ndcg
from llmrec.types import Case, Event, Item, Request

HOST, LIKED, WINDOW = "deepfm", 4.0, 3
YEARS = tuple(range(2013, 2019))
NEVER = 99
AGES: Mapping[str, int] = {"age 0": 0, "age 1": 1, "age 3": 3, "never refreshed": NEVER}
"""Age of the profiles in years, by name."""
SHUFFLED, ALONE, FROZEN = "shuffled", "host alone", "host never trained anew"
PAIRS = (
    ("age 0", ALONE),
    ("age 0", SHUFFLED),
    ("age 0", "age 1"),
    ("age 0", "age 3"),
    ("age 0", "never refreshed"),
    (ALONE, FROZEN),
)
PARAMETERS: Mapping[str, Any] = {"liked": LIKED, "epochs": 3, "patience": None}


@dataclass(frozen=True)
class Replay:
    """Ratings by time.

    Attributes:
        events: Columns user_id, item_id, rating, timestamp and year, sorted by time.
        items: Items by id.
        vectors: Text vectors of the items, in the order of ``items``, shape (items, d).
    """

    events: pl.DataFrame
    items: Mapping[str, Item]
    vectors: NDArray[np.float64]

    @staticmethod
    def of(events: pl.DataFrame, items: Mapping[str, Item]) -> Replay:
        """Compute the text vectors of items."""
        said = texts_of(list(items.values()))
        return Replay(events.sort("timestamp", "user_id", "item_id"), items, latent(said, said))


def read(folder: Path) -> Replay:
    """Read MovieLens in GroupLens' format, with times in UTC."""

    def table(name: str) -> pl.DataFrame:
        with gzip.open(folder / f"{name}.csv.gz") as stream:
            return pl.read_csv(io.BytesIO(stream.read()))

    found = table("ratings").select(
        pl.col("userId").cast(pl.String).alias("user_id"),
        pl.col("movieId").cast(pl.String).alias("item_id"),
        pl.col("rating").cast(pl.Float64),
        pl.col("timestamp").cast(pl.Float64),
        pl.from_epoch("timestamp").dt.year().cast(pl.Int64).alias("year"),
    )
    rated = set(found["item_id"].to_list())
    items = {
        str(item): Item(item_id=str(item), title=title, fields={"genres": genres.replace("|", ", ")})
        for item, title, genres in table("movies").select("movieId", "title", "genres").iter_rows()
        if str(item) in rated
    }
    return Replay.of(found, items)


def before(year: int, age: int, first: int) -> int:
    """Return the year up to which features of an age have data (exclusive); ``first`` is the first year."""
    return min(year, first) if age == NEVER else year - age


def name_of(user: str, year: int) -> str:
    """Return the id of a user in a year."""
    return f"{user}@{year}"


def features(replay: Replay, year: int, age: int, first: int) -> list[Features]:
    """Return profiles of users in the test year and the training years, and vectors of items.

    Args:
        replay: The data.
        year: The test year.
        age: Age of the features in years.
        first: First year.
    """
    made = Provenance(system="freshness benchmark")
    place = {item: number for number, item in enumerate(replay.items)}
    names, rows, seen = [], [], {}
    for other in range(year - WINDOW, year + 1):
        asked = replay.events.filter(pl.col("year") == other)["user_id"].unique().to_list()
        known = replay.events.filter((pl.col("year") < before(other, age, first)) & pl.col("user_id").is_in(asked))
        for (user,), own in known.sort("user_id", maintain_order=True).group_by("user_id", maintain_order=True):
            vectors = replay.vectors[[place[item] for item in own["item_id"]]]
            liked = (own["rating"] >= LIKED).to_numpy()
            name = name_of(str(user), other)
            names.append(name)
            rows.append(taste(vectors, liked))
            seen[name] = frozenset((name, item) for item in own["item_id"])
    there = replay.events.filter(pl.col("year") < before(year, age, first))["item_id"].unique().sort().to_list()
    return [
        Features("user", names, np.array(rows, dtype=np.float32), made, seen=seen),
        Features("item", there, replay.vectors[[place[item] for item in there]].astype(np.float32), made),
    ]


def slice_of(replay: Replay, year: int) -> tuple[SplitDataset, list[Case]]:
    """Return the training data and the test cases of a year."""
    told = replay.events.filter(pl.col("year") < year)
    train = told.filter(pl.col("year") >= year - WINDOW)
    known = [
        told.filter(
            (pl.col("year") < other) & pl.col("user_id").is_in(rows["user_id"].unique().to_list())
        ).with_columns(pl.lit(other, dtype=pl.Int64).alias("year"))
        for (other,), rows in train.sort("year").group_by("year", maintain_order=True)
    ]
    asked = replay.events.filter(pl.col("year") == year)
    # The data contain nothing of the test year except its items.
    whole = Dataset(
        name=f"ml-latest-small before {year}",
        noun="movies",
        interactions=_named(pl.concat([*known, train])),
        items=dict(replay.items),
        rating_scale=(0.5, 5.0),
    )
    data = SplitDataset(
        dataset=whole,
        kind="given",
        seed=0,
        train=_named(train),
        valid=_named(asked.clear()),
        test=_named(asked.clear()),
        held_out=frozenset(),
        known=_named(pl.concat(known)),
    )
    return data, _cases(asked, told)


def _named(frame: pl.DataFrame) -> pl.DataFrame:
    named = pl.concat_str("user_id", pl.lit("@"), pl.col("year").cast(pl.String)).alias("user_id")
    return conform(frame.select(named, "item_id", "rating", "timestamp"))


def _cases(asked: pl.DataFrame, told: pl.DataFrame) -> list[Case]:
    past: dict[str, list[Event]] = {}
    users = set(asked["user_id"].to_list())
    columns = ("user_id", "item_id", "rating", "timestamp")
    for user, item, rating, at in told.select(columns).iter_rows():
        if user in users:
            past.setdefault(user, []).append(Event(item_id=item, rating=rating, timestamp=at))
    cases = []
    for user, item, rating, at, year in asked.select(*columns, "year").iter_rows():
        own, name = past.setdefault(user, []), name_of(user, year)
        # Ratings of the same second were given together and are not history of each other.
        history = tuple(event for event in own if event.timestamp is not None and event.timestamp < at)
        cases.append(
            Case(request=Request(id=request_id(name, item), user_id=name, item=item, history=history), truth=rating)
        )
        own.append(Event(item_id=item, rating=rating, timestamp=at))
    return cases


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all years and write the results."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.freshness")
    parser.add_argument("target", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--years", type=int, nargs="+", default=list(YEARS))
    parser.add_argument("--keep", type=Path, default=Path("runs/freshness"))
    given = parser.parse_args(arguments)
    replay, begin = read(Path(os.environ.get("LLMREC_DATA", ".")) / "ml_latest_small"), time.process_time()
    said: dict[str, list[list[NDArray[np.float64]]]] = {}
    asked: list[Case] = []
    frozen: list[Any] = []
    for year in given.years:
        data, cases = slice_of(replay, year)
        asked += cases
        for arm, (age, more) in _arms().items():
            folder = given.keep / f"{year}-{age}"
            if age is not None:
                publish(folder, features(replay, year, age, given.years[0]))
                more = {"features": str(folder), **more}
            for seed in range(given.seeds):
                host = make(HOST, {**PARAMETERS, **more}, seed=seed)
                host.fit(data)
                said.setdefault(arm, [[] for _ in range(given.seeds)])[seed].append(measure(host, cases))
                if arm == ALONE and year == given.years[0]:
                    frozen.append(host)
        for seed, host in enumerate(frozen):
            said.setdefault(FROZEN, [[] for _ in range(given.seeds)])[seed].append(measure(host, cases))
        sys.stdout.write(f"{year}: {len(cases)} ratings, {time.process_time() - begin:.0f} s\n")
        sys.stdout.flush()
        done = given.years[: given.years.index(year) + 1]
        write_json(given.target, result(replay, asked, said, done) | {"processor_seconds": _since(begin)})


def _arms() -> dict[str, tuple[int | None, dict[str, Any]]]:
    aged: dict[str, tuple[int | None, dict[str, Any]]] = {arm: (age, {}) for arm, age in AGES.items()}
    return {ALONE: (None, {}), **aged, SHUFFLED: (0, {"shuffled": True})}


def _since(begin: float) -> float:
    return round(time.process_time() - begin, 1)


def result(
    replay: Replay, asked: Sequence[Case], said: Mapping[str, Sequence[Sequence[NDArray[np.float64]]]], years: list[int]
) -> dict[str, Any]:
    """Return metrics of all cases, of those of users with ratings in earlier years, and the comparisons."""
    truth = np.array([float(float(case.truth) >= LIKED) for case in asked])
    users, of_year = zip(*(case.request.user_id.split("@") for case in asked), strict=True)
    joined = dict(replay.events.group_by("user_id").agg(pl.col("year").min()).iter_rows())
    returning = np.array([joined[user] < int(year) for user, year in zip(users, of_year, strict=True)])
    whole = {arm: [np.concatenate(parts) for parts in seeds] for arm, seeds in said.items()}
    groups = {"all": np.ones(len(asked), dtype=bool), "returning": returning}
    rows, pairs = [], []
    for group, kept in groups.items():
        names = [user for user, there in zip(users, kept, strict=True) if there]
        lists = [case.request.user_id for case, there in zip(asked, kept, strict=True) if there]
        some = {arm: [values[kept] for values in seeds] for arm, seeds in whole.items()}
        rows += [
            {"of": group, "arm": arm, "questions": int(kept.sum()), "users": len(set(names))}
            | figures(seeds, truth[kept], names)
            | {"ndcg": round(float(np.mean([ndcg_within(each, truth[kept], lists) for each in seeds])), 5)}
            for arm, seeds in some.items()
        ]
        told = within(some, PAIRS, truth[kept], names)
        pairs += [{"of": group, "a": a, "b": b, **found} for (a, b), found in zip(PAIRS, told, strict=True)]
    return {
        "command": "LLMREC_DATA=FOLDER python -m eval.benchmarks.freshness eval/results/freshness.json",
        "what": "MovieLens-latest-small by year; a CTR host that learns anew each year, profiles of several ages",
        "host": HOST,
        "years": years,
        "window": WINDOW,
        "users": len(set(users)),
        "questions": len(asked),
        "seeds": list(range(len(next(iter(said.values()))))),
        "rows": rows,
        "pairs": pairs,
        **provenance(),
    }


def ndcg_within(values: NDArray[np.float64], liked: NDArray[np.float64], lists: Sequence[str]) -> float:
    """Return the mean NDCG@10 of each user's ratings in a year, ranked by probability.

    Args:
        values: Probabilities, shape (n,).
        liked: 1 or 0, shape (n,).
        lists: User and year of each rating. Lists with a single class are left out.
    """
    known, of = np.unique(np.array(lists), return_inverse=True)
    counts, likes = np.bincount(of), np.bincount(of, liked)
    item = np.arange(len(of))
    found = judge(Pairs(of, item, values), Pairs(of[liked > 0], item[liked > 0], liked[liked > 0]), len(known))
    return float(ndcg(found, 10)[(likes > 0) & (likes < counts)].mean())


def show(found: Mapping[str, Any]) -> str:
    """Return the results as lines of text."""
    return "\n".join(json.dumps(row) for row in found["rows"])


if __name__ == "__main__":
    main()
