"""Measures the effect of LLM-written user profiles on CTR networks: the variants of KAR (Xi et al., RecSys 2024).

``LLMREC_DATA=FOLDER python -m eval.benchmarks.kar eval/results/kar.json`` reads FOLDER/ml1m_ctr: MovieLens-1M under a
published random split of its ratings, and profiles that gpt-4o-mini generated from training ratings. Which ratings were
used is not recorded, so all possible ones are assumed: the last 40, the last 10 with five stars and the last 10 with
two or less. FOLDER/ml1m/items.tsv.gz has a sentence about each film by GPT-3.5. Ratings in profiles are history and
never training examples, in every variant. Fits are stored under ``runs/kar``, by tables and code; an interrupted run
continues.

``--data ml100k`` reads FOLDER/ml100k_profiles in the same way: MovieLens-100K under its split u1, with profiles and
texts about films by gpt-4o-mini.

The effect of the language model is the difference from the best features of the same interactions without it, which are
latent factors. Differences in within-user AUC account for users and seeds together.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import svds

from eval.benchmarks.provenance import provenance
from llmrec.augment.stores import features_from_texts
from llmrec.baselines.parameters import create_baseline, feature_store_hashes
from llmrec.data.dataset import Dataset, conform_to_schema
from llmrec.data.features import Features, FeatureStore, Pair, Provenance, publish
from llmrec.data.hashing import hash64
from llmrec.data.sets.table import load_data
from llmrec.data.split import SplitDataset, request_id
from llmrec.durable import replace_atomically, write_json
from llmrec.evaluate.compare import Contrast, ModelValues, compare_planned
from llmrec.fingerprint import digest_of, fingerprint
from llmrec.metrics.probability import auc, gauc, log_loss
from llmrec.recipe.schema import DataSection
from llmrec.registry import BASELINES
from llmrec.types import Case, Event, Item, Probability, Request

ARMS: Mapping[str, tuple[tuple[str, ...], Mapping[str, Any]]] = {
    "host": ((), {}),
    "same events, no language model": (("raw",), {}),
    "language model": (("llm",), {}),
    "language model, shuffled": (("llm",), {"shuffled": True}),
    "language model, users alone": (("llm",), {"sides": "user"}),
    "language model, items alone": (("llm",), {"sides": "item"}),
    "factors of the same events": (("factors",), {}),
}
"""Stores and network parameters, by variant."""
PAIRS = (
    ("language model", "factors of the same events"),
    ("language model", "same events, no language model"),
    ("language model", "host"),
    ("factors of the same events", "host"),
)
HOSTS = ("deepfm", "dcn", "din")
LAST, BEST, WORST = 40, 10, 10
WINDOW = 20


def table(path: Path) -> pl.DataFrame:
    """Read a compressed table of texts."""
    with gzip.open(path) as stream:
        return pl.read_csv(io.BytesIO(stream.read()), separator="\t", infer_schema=False, quote_char=None)


@dataclass(frozen=True)
class Tables:
    """The tables of a data set.

    Attributes:
        name: Name of the data set.
        ratings: Columns user_id, item_id, rating, timestamp and u1: train or test in a published random split.
        titles: Titles by item.
        genres: Genres by item.
        users: Attributes by user.
        profiles: LLM-written profile of each user.
        texts: LLM-written text of each item.
    """

    name: str
    ratings: pl.DataFrame
    titles: Mapping[str, str]
    genres: Mapping[str, str]
    users: Mapping[str, Mapping[str, str]]
    profiles: Mapping[str, str]
    texts: Mapping[str, str]


def ml1m(root: Path) -> Tables:
    """Read MovieLens-1M."""
    folder, films = root / "ml1m_ctr", table(root / "ml1m" / "items.tsv.gz")
    ratings = table(folder / "ratings.tsv.gz").with_columns(
        pl.col("rating").cast(pl.Float64), pl.col("position").cast(pl.Float64).alias("timestamp")
    )
    return Tables(
        "ml1m-u1",
        # A rating without a position in its user's sequence cannot be in a history.
        ratings.filter(pl.col("timestamp") >= 0),
        dict(table(folder / "item_tmdb.tsv.gz").select("item_id", "title").iter_rows()),
        {item: (genres or "").replace("|", ", ") for item, genres in films.select("item_id", "genres").iter_rows()},
        {
            row["user_id"]: {k: row[k] for k in ("gender", "age", "occupation")}
            for row in table(folder / "users.tsv.gz").iter_rows(named=True)
        },
        dict(table(folder / "user_profiles_gpt4omini.tsv.gz").select("user_id", "profile").iter_rows()),
        {item: text or "" for item, text in films.select("item_id", "llm_summary_agent4rec").iter_rows()},
    )


def ml100k(root: Path) -> Tables:
    """Read MovieLens-100K, with the ratings of its data source."""
    folder, data = root / "ml100k_profiles", load_data(DataSection(source="movielens-100k"), seed=0)
    held = table(folder / "u1_test_pairs.tsv.gz").with_columns(pl.lit("test").alias("u1"))
    ratings = data.interactions.with_columns(pl.col("user_id", "item_id").cast(pl.String))
    ratings = ratings.join(held, on=["user_id", "item_id"], how="left").with_columns(pl.col("u1").fill_null("train"))
    profiles = {row["user_id"]: row["gpt4omini_short"] for row in lines(folder / "user_profiles.jsonl.gz")}
    texts = {row["item_id"]: row["profile"] for row in lines(folder / "item_profiles_gpt4omini.jsonl.gz")}
    genres = {name: item.fields.get("genres", "") for name, item in data.items.items()}
    return Tables("ml100k-u1", ratings, data.titles, genres, data.users, profiles, texts)


def lines(path: Path) -> list[dict[str, str]]:
    """Read compressed JSON Lines."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def read(tables: Tables, rows: int) -> tuple[SplitDataset, list[Case], list[Case], dict[str, frozenset[Pair]]]:
    """Return the split, early-stopping cases, test cases, and the interactions in each user's profile.

    Args:
        tables: The tables.
        rows: Number of training examples to keep, by a hash.
    """
    ratings = tables.ratings.sort("user_id", "timestamp", maintain_order=True)
    train, test = ratings.filter(pl.col("u1") == "train"), ratings.filter(pl.col("u1") == "test")
    latest = pl.len().over("user_id") - pl.int_range(pl.len()).over("user_id")
    seen = train.filter(latest <= LAST)
    for some in (train.filter(pl.col("rating") == 5), train.filter(pl.col("rating") <= 2)):
        most = BEST if some["rating"].max() == 5 else WORST
        seen = pl.concat([seen, some.filter(pl.len().over("user_id") - pl.int_range(pl.len()).over("user_id") <= most)])
    seen = seen.unique(["user_id", "item_id"], maintain_order=True)
    rest = train.join(seen, on=["user_id", "item_id"], how="anti", maintain_order="left")
    order = np.argsort(hash64("kar rows", 0, rest["user_id"], rest["item_id"]), kind="stable")
    count = len(order)
    valid, kept = rest[np.sort(order[: count // 20])], rest[np.sort(order[count // 20 : count // 20 + rows])]
    # Training examples that are omitted to save time become history, like the interactions in profiles.
    known = train.join(pl.concat([kept, valid]), on=["user_id", "item_id"], how="anti", maintain_order="left")
    items = {
        name: Item(item_id=name, title=tables.titles.get(name, name), fields={"genres": tables.genres.get(name, "")})
        for name in ratings["item_id"].unique().to_list()
    }
    dataset = Dataset(
        name=tables.name,
        noun="movies",
        interactions=_events(ratings),
        items=items,
        users={user: dict(known) for user, known in tables.users.items()},
        rating_scale=(1.0, 5.0),
    )
    held = frozenset(pl.concat([valid, test]).select("user_id", "item_id").iter_rows())
    data = SplitDataset(
        dataset=dataset,
        kind="given",
        seed=0,
        train=_events(kept),
        valid=_events(valid),
        test=_events(test),
        held_out=held,
        known=_events(known),
    )
    past = _past(train)
    by_user: dict[str, set[Pair]] = {}
    for user, item in seen.select("user_id", "item_id").iter_rows():
        by_user.setdefault(user, set()).add((user, item))
    return data, _cases(valid, past), _cases(test, past), {user: frozenset(pairs) for user, pairs in by_user.items()}


def _events(frame: pl.DataFrame) -> pl.DataFrame:
    return conform_to_schema(frame.select("user_id", "item_id", "rating", "timestamp"))


def _past(train: pl.DataFrame) -> dict[str, list[tuple[float, Event]]]:
    past: dict[str, list[tuple[float, Event]]] = {}
    for user, item, rating, time_ in train.select("user_id", "item_id", "rating", "timestamp").iter_rows():
        past.setdefault(user, []).append((time_, Event(item_id=item, rating=rating, timestamp=time_)))
    return past


def _cases(frame: pl.DataFrame, past: Mapping[str, Sequence[tuple[float, Event]]]) -> list[Case]:
    """Return ratings as cases with the previous ratings as history."""
    cases = []
    for user, item, rating, time_ in frame.select("user_id", "item_id", "rating", "timestamp").iter_rows():
        before = tuple(event for t, event in past.get(user, ()) if t < time_ and event.item_id != item)
        request = Request(id=request_id(user, item), user_id=user, item=item, history=before)
        cases.append(Case(request=request, truth=rating))
    return cases


def stores(tables: Tables, folder: Path, data: SplitDataset, seen: Mapping[str, frozenset[Pair]]) -> None:
    """Write the missing stores of all variants."""
    users = sorted(seen)
    # The training examples depend on ``--rows``; the interactions in texts do not and are listed.
    source = Provenance(system="kar benchmark")
    items = data.dataset.items
    plain = {name: f"{item.title}. {item.fields['genres']}" for name, item in items.items()}
    if not (folder / "raw" / "current").is_file():
        item_features = features_from_texts("item", plain, provenance=source)
        publish(folder / "raw-items", [item_features])
        base = FeatureStore.open(folder / "raw-items")
        ratings = {(u, i): r for u, i, r in data.known.select("user_id", "item_id", "rating").iter_rows()}
        best = {u: [i for _, i in sorted(seen[u]) if ratings.get((u, i), 3.0) >= 5] for u in users}
        worst = {u: [i for _, i in sorted(seen[u]) if ratings.get((u, i), 3.0) <= 2] for u in users}
        vectors = _mean(base, best) - _mean(base, worst)
        publish(folder / "raw", [Features("user", users, vectors, source, seen=seen), item_features])
    if not (folder / "llm" / "current").is_file():
        texts = {name: f"{text} {tables.texts.get(name, '')}" for name, text in plain.items()}
        profiles = {user: tables.profiles.get(user) or "" for user in users}
        written = features_from_texts("user", profiles, provenance=source, seen=seen)
        publish(folder / "llm", [written, features_from_texts("item", texts, provenance=source)])
    if not (folder / "factors" / "current").is_file():
        # Only the interactions that may be in profiles.
        known = data.known.with_columns(pl.col("user_id", "item_id").cast(pl.String))
        known = known.join(_frame(seen), on=["user_id", "item_id"], how="semi")
        of_users, of_items, known_items = _factors(known, users)
        publish(
            folder / "factors",
            [Features("user", users, of_users, source, seen=seen), Features("item", known_items, of_items, source)],
        )


def _mean(base: FeatureStore, groups: Mapping[str, Sequence[str]]) -> NDArray[np.float32]:
    rows = []
    for names in groups.values():
        vectors, known = base.get("item", list(names) or ["?"])
        rows.append(vectors[known].mean(axis=0) if known.any() else np.zeros(base.width("item"), np.float32))
    return np.array(rows, dtype=np.float32)


def _frame(seen: Mapping[str, frozenset[Pair]]) -> pl.DataFrame:
    rows = sorted(pair for pairs in seen.values() for pair in pairs)
    return pl.DataFrame(rows, schema=["user_id", "item_id"], orient="row")


def _factors(
    known: pl.DataFrame, users: Sequence[str], width: int = 32
) -> tuple[NDArray[np.float32], NDArray[np.float32], list[str]]:
    """Return vectors of users and items by a truncated SVD of ratings minus item means."""
    items = sorted(known["item_id"].unique().to_list())
    of_user, of_item = ({name: index for index, name in enumerate(names)} for names in (users, items))
    rows = np.array([of_user[user] for user in known["user_id"]])
    columns = np.array([of_item[item] for item in known["item_id"]])
    values = known["rating"].to_numpy().astype(np.float64)
    counts = np.bincount(columns)
    values = values - values.mean()
    values = values - (np.bincount(columns, values) / (counts + 3))[columns]
    matrix = sparse.csr_array((values, (rows, columns)), shape=(len(users), len(items)))
    left, sizes, right = svds(matrix, k=width, random_state=0)
    scale = np.sqrt(sizes)
    return (left * scale).astype(np.float32), (right.T * scale).astype(np.float32), items


def measure(host: Any, cases: Sequence[Case]) -> NDArray[np.float64]:
    """Return the probabilities of all cases, shape (n,)."""
    answers = host.answer([case.request for case in cases])
    return np.array([answer.value for answer in answers if isinstance(answer, Probability)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the missing fits, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.kar")
    parser.add_argument("target", type=Path)
    parser.add_argument("--data", choices=("ml1m", "ml100k"), default="ml1m")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--hosts", nargs="+", default=["deepfm"], choices=HOSTS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM", help="default: all")
    parser.add_argument("--keep", type=Path, default=Path("runs/kar"))
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    tables = {"ml1m": ml1m, "ml100k": ml100k}[options.data](Path(os.environ.get("LLMREC_DATA", ".")))
    data, valid_cases, cases, seen = read(tables, options.rows)
    # Separate stores for each set of tables.
    options.keep /= digest_of(data=data.fingerprint, profiles=tables.profiles, told=tables.texts)
    options.keep.mkdir(parents=True, exist_ok=True)
    stores(tables, options.keep, data, seen)
    truth = np.array([float(float(case.truth) >= 4) for case in cases])
    users = [case.request.user_id for case in cases]
    rows, by_arm = [], {}
    for host in options.hosts:
        for arm in options.arms:
            names, parameters = ARMS[arm]
            values = [
                _fit(options.keep, host, arm, names, parameters, seed, data, valid_cases, cases, options.rows)
                for seed in range(options.seeds)
            ]
            by_arm[host, arm] = values
            rows.append({"host": host, "arm": arm, **figures(values, truth, users)})
            sys.stdout.write(json.dumps(rows[-1]) + "\n")
            sys.stdout.flush()
    plain = create_baseline("logistic", {"features": "ids"}, seed=0)
    plain.fit(data)
    rows.append(
        {"host": "logistic", "arm": "bias of users and items", **figures([measure(plain, cases)], truth, users)}
    )
    result = {
        "command": f"LLMREC_DATA=FOLDER python -m eval.benchmarks.kar {shlex.join(arguments or sys.argv[1:])}",
        "rows": rows,
        "pairs": _pairs(by_arm, options.hosts, truth, users),
        "users": len(set(users)),
        "cases": len(cases),
        "training": data.train.height,
        "seen": sum(map(len, seen.values())),
        "seeds": list(range(options.seeds)),
        "seconds": round(time.perf_counter() - begin, 1),
        **provenance(),
    }
    write_json(options.target, result)


def _fit(
    keep: Path,
    host: str,
    arm: str,
    names: Sequence[str],
    parameters: Mapping[str, Any],
    seed: int,
    data: SplitDataset,
    valid_cases: Sequence[Case],
    cases: Sequence[Case],
    rows: int,
) -> NDArray[np.float64]:
    settings = {"features": ",".join(str(keep / name) for name in names), "window": WINDOW, **parameters}
    key = fingerprint(
        "kar",
        made_by=[(BASELINES, host)],
        host=host,
        seed=seed,
        rows=rows,
        data=data.fingerprint,
        parameters=settings,
        stores=feature_store_hashes(host, settings),
        arm=arm,
    )
    file = keep / f"{key}.npy"
    if file.is_file():
        return np.asarray(np.load(file, allow_pickle=False))
    chosen = create_baseline(host, settings, seed=seed)
    chosen.fit(data, cases=valid_cases)
    values = measure(chosen, cases)
    with replace_atomically(file) as draft, draft.open("wb") as stream:
        np.save(stream, values, allow_pickle=False)
    return values


def figures(values: Sequence[NDArray[np.float64]], truth: NDArray[np.float64], users: Sequence[str]) -> dict[str, Any]:
    return {
        "auc": round(float(np.mean([auc(scores, truth) for scores in values])), 5),
        "gauc": round(float(np.mean([gauc(scores, truth, users).value for scores in values])), 5),
        "log_loss": round(float(np.mean([log_loss(scores, truth).mean() for scores in values])), 5),
        "gauc_by_seed": [round(float(gauc(scores, truth, users).value), 5) for scores in values],
    }


def _pairs(
    by_arm: Mapping[tuple[str, str], Sequence[NDArray[np.float64]]],
    hosts: Sequence[str],
    truth: NDArray[np.float64],
    users: Sequence[str],
) -> list[dict[str, Any]]:
    # `compare` expects a negative sign, also of 0, if the truth is no.
    signed = {key: np.stack(values) * np.where(truth > 0, 1.0, -1.0) for key, values in by_arm.items()}

    def standing(host: str, arm: str) -> ModelValues:
        return ModelValues(arm, 0.0, signed[host, arm])

    family = [(host, *pair) for host in hosts for pair in PAIRS if all((host, arm) in by_arm for arm in pair)]
    contrasts = [Contrast("GAUC", standing(host, one), standing(host, other), users) for host, one, other in family]
    return [
        {"host": host, **pair.as_json(), "metric": "within-user AUC"}
        for (host, *_), pair in zip(family, compare_planned(contrasts, resamples=2000), strict=True)
    ]


if __name__ == "__main__":
    main()
