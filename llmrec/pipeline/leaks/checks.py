"""Looks for held-out data where it must not be: the split, profiles, candidates, fitted baselines, the item index.

Every check reads what the run really used (drawn sets, stored answers), not what the code that made it promises. A
check returns what it found; nothing here repairs anything. What is rendered is looked at in
`llmrec.pipeline.leaks.rows`.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import polars as pl
from scipy.special import chdtrc

from llmrec.baselines.fits.fitting import fitted
from llmrec.baselines.parameters import make, stores_of
from llmrec.data.candidates import touched
from llmrec.data.features import FeatureStore, Pair
from llmrec.data.split import SplitDataset, earlier, request_id
from llmrec.metrics.stats import mean_ranks
from llmrec.pipeline.indexing import build_index
from llmrec.pipeline.study import Study
from llmrec.pipeline.told import sentence, told, users
from llmrec.recipe.schema import BaselineSection
from llmrec.tasks.family import families

_SHOWN = 5
# Chance of a false alarm of one statistical check.
_ALARM = 1e-4
_SCORED = 50
REDRAWN = 2
"""Raised whenever `redrawn` changes more than before: what was found of baselines is found out again."""


@dataclass(frozen=True)
class Check:
    """One line of an audit.

    Attributes:
        name: What was looked at.
        found: What came out, in one sentence.
        verdict: ``leak`` fails the run; a ``notice`` is something that a reader must know.
        examples: The first places where something was found.
        figures: Numbers behind the sentence.
    """

    name: str
    found: str
    verdict: Literal["clean", "leak", "notice"] = "clean"
    examples: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)


def verdict(name: str, looked_at: str, places: Sequence[str]) -> Check:
    """Return a check that leaks where there is any place at all."""
    if not places:
        return Check(name, f"none in {looked_at}")
    return Check(name, f"{len(places)} in {looked_at}", "leak", tuple(places[:_SHOWN]))


# --------------------------------------------------------------------------- the split and the users


def training_interactions(data: SplitDataset) -> Check:
    """Held-out pairs among training interactions, such later than the user's held-out ones, and any on cold items."""
    train = data.train.select("user_id", "item_id", "timestamp")
    places = [
        f"user {user}, item {item} is held out and trained on"
        for user, item in train.select("user_id", "item_id").iter_rows()
        if (user, item) in data.held_out
    ]
    places += [
        f"item {item} is cold, and an event of user {user} on it is learned from or shown"
        for frame in (data.train, data.known)
        for user, item in frame.select("user_id", "item_id").iter_rows()
        if item in data.cold
    ]
    if data.cold:
        both = set(data.valid["user_id"]) & set(data.test["user_id"])
        places += [f"user {user} is asked about in both splits, and histories hold cold items" for user in sorted(both)]
    if data.kind in ("leave_one_out", "last_share", "last_basket", "cold_items") and data.dataset.has_time:
        first = pl.concat([data.valid, data.test]).group_by("user_id").agg(pl.col("timestamp").min().alias("held"))
        late = train.join(first, on="user_id").filter(pl.col("timestamp") > pl.col("held"))
        places += [
            f"user {user}, item {item} is trained on and later than what is held out"
            for user, item in late.select("user_id", "item_id").iter_rows()
        ]
    name, looked = f"training interactions of {data.dataset.name}", f"{len(train):,} interactions"
    if not places and data.kind == "given" and (early := earlier(data.train, pl.concat([data.valid, data.test]))):
        found = f"none is held out; {early:,} held-out ones are earlier than a training interaction of their user"
        return Check(name, f"{found}: histories show what came later", "notice", figures={"earlier": early})
    return verdict(name, looked, places)


def profiles(data: SplitDataset) -> Check:
    """Held-out titles in the profile texts of users, who are set aside from evaluation."""
    name, found = f"user profiles of {data.dataset.name}", told(data)
    if not found:
        return Check(name, f"none names a held-out item in {len(data.dataset.users):,} profiles")
    places = tuple(f"user {each.user_id}: field {each.field!r} names held-out item {each.item_id}" for each in found)
    return Check(name, sentence(data, found), "notice", places[:_SHOWN], {"users": len(users(found))})


# --------------------------------------------------------------------------- candidates


def candidate_sets(study: Study) -> list[Check]:
    """Sets that lack or repeat the target, hold other items of the user, or give the target away by its place."""
    data, sets, split = study.data, study.candidates, study.recipe.eval.split
    if sets is None:
        return []
    by_user = touched(data, split)
    lacking, repeated, taken, positions = [], [], [], []
    for held in data.holdouts(split).of(sets.users):
        name = request_id(held.user_id, held.item_id)
        items = sets.sets.get(name, ())
        if held.item_id not in items:
            lacking.append(f"request {name}")
        else:
            positions.append(items.index(held.item_id))
        repeated += [f"request {name}: {item}" for item, times in Counter(items).items() if times > 1]
        taken += [f"request {name}: {item}" for item in items if item != held.item_id and item in by_user[held.user_id]]
    looked = f"{len(sets.sets):,} candidate sets"
    if study.recipe.eval.candidates.kind == "retrieved":
        # Without the target, or with what the user takes later, a retriever's set is as it would be in use.
        found = len(sets.sets) - len(lacking)
        about = [Check("retrieved sets", f"{found:,} of {len(sets.sets):,} hold the target, which bounds HR over them")]
    else:
        about = [
            verdict("candidate sets without the target", looked, lacking),
            verdict("negatives that the user interacted with", looked, taken),
        ]
    return [
        *about,
        verdict("candidates that stand twice", looked, repeated),
        _placed(positions, sets.count),
        _ordered(study, sets.sets),
    ]


def _placed(positions: Sequence[int], count: int) -> Check:
    """Chi-square of the target's position against the uniform distribution."""
    name = "position of the target among its candidates"
    if len(positions) < 5 * count:
        return Check(name, f"not tested: {len(positions)} sets are too few for {count} positions", "notice")
    seen = np.bincount(positions, minlength=count)
    expected = len(positions) / count
    statistic = float(((seen - expected) ** 2 / expected).sum())
    p = float(chdtrc(count - 1, statistic))
    figures = {"chi2": statistic, "p": p}
    if p < _ALARM:
        return Check(
            name, f"not uniform: p = {p:.2g}", "leak", (f"position {int(seen.argmax()) + 1} most often",), figures
        )
    return Check(name, f"uniform: p = {p:.2g} over {len(positions):,} sets", figures=figures)


def _ordered(study: Study, sets: Mapping[str, Sequence[str]]) -> Check:
    """Whether stored orders follow popularity or ids: mean rank correlation, zero for shuffled sets."""
    counts = dict(study.data.train.group_by("item_id").len().iter_rows())
    ids = {item: place for place, item in enumerate(sorted(study.data.dataset.items))}
    name, figures = "order of the candidates", {}
    for what, key in (("popularity", counts), ("item ids", ids)):
        values = [np.array([key.get(item, 0) for item in items], dtype=float) for items in sets.values()]
        found = [_correlation(value) for value in values if len(value) > 2 and np.ptp(value) > 0]
        if not found:
            continue
        mean, error = float(np.mean(found)), float(np.std(found) / np.sqrt(len(found)) + 1e-9)
        figures[what] = mean
        if abs(mean) > max(5 * error, 0.05):
            return Check(name, f"follows {what}: mean rank correlation {mean:+.2f}", "leak", (), figures)
    shown = ", ".join(f"{value:+.3f} with {what}" for what, value in figures.items())
    return Check(name, f"shuffled: mean rank correlation {shown}", figures=figures)


def _correlation(values: np.ndarray[Any, Any]) -> float:
    # Equal values share a rank: in the order of their places they would follow it by themselves.
    return float(np.corrcoef(mean_ranks(values), np.arange(len(values)))[0, 1])


def stored_rows(rows: Sequence[Mapping[str, Any]], predictions: pl.DataFrame, study: Study) -> list[Check]:
    """Rows of one table that were given different candidates, and answers that rank what was not asked."""
    unequal, foreign = [], []
    item_answers = [name for name, family in families().items() if family.answers_with_items]
    for family in item_answers:
        digests = {row["id"]: row.get("candidates") for row in rows if row["task"] == family}
        if len(set(digests.values())) > 1:
            unequal += [f"{row}: {digest}" for row, digest in digests.items()]
    sets = {**(study.candidates.sets if study.candidates else {}), **(study.aligned.sets if study.aligned else {})}
    ranked = predictions.filter(pl.col("task").is_in(item_answers) & pl.col("error").is_null())
    for row, request, parsed in ranked.select("row_id", "request_id", "parsed").iter_rows():
        items = json.loads(parsed)["items"] if parsed and parsed != "null" else []
        if request in sets and not set(items) <= set(sets[request]):
            foreign.append(f"{row}, request {request}")
    asked: dict[str, set[str]] = defaultdict(set)
    for row, request in predictions.select("row_id", "request_id").iter_rows():
        asked[row].add(request)
    by_family: dict[str, dict[str, frozenset[str]]] = defaultdict(dict)
    for row in rows:
        by_family[row["task"]][row["id"]] = frozenset(asked[row["id"]])
    different = [
        f"{family}: {row}" for family, seen in by_family.items() if len(set(seen.values())) > 1 for row in seen
    ]
    return [
        verdict("rows of one table with unequal candidates", f"{len(rows)} rows", unequal),
        verdict("rows of one table with unequal requests", f"{len(rows)} rows", different),
        verdict("ranked items that were no candidates", f"{len(ranked):,} answers", foreign),
    ]


# --------------------------------------------------------------------------- what was fitted


def redrawn(
    data: SplitDataset, split: str, seed: int = 1, toward: Mapping[str, Sequence[str]] | None = None
) -> SplitDataset:
    """Return the data with a split's held-out items, ratings and texts drawn anew; all else stays as it is.

    Items are drawn from the catalogue: dealing the same items out among other users would leave every count of items as
    it was, and miss a prior that counted them.

    Args:
        data: The split data.
        split: ``valid`` or ``test``.
        seed: Of the draw.
        toward: Some users' held-out items are drawn from these.
    """
    rng, items, ratings = np.random.default_rng(seed), sorted(data.dataset.items), data.train["rating"].drop_nulls()
    parts, pools = {"valid": data.valid, "test": data.test}, toward or {}
    frame = parts[split]
    found = [items[place] for place in rng.integers(len(items), size=len(frame))]
    for row, user in enumerate(frame["user_id"]):
        if pool := pools.get(user):
            found[row] = pool[int(rng.integers(len(pool)))]
    stars = frame["rating"].to_list()
    if len(ratings):
        drawn = ratings.gather(rng.integers(len(ratings), size=len(frame))).to_list()
        stars = [None if old is None else new for old, new in zip(stars, drawn, strict=True)]
    texts = [None if text is None else f"redrawn {row}" for row, text in enumerate(frame["text"])]
    parts[split] = frame.with_columns(
        pl.Series("item_id", found, pl.String).cast(frame["item_id"].dtype),
        pl.Series("rating", stars, pl.Float64),
        pl.Series("text", texts, frame["text"].dtype),
    )
    held = frozenset(pl.concat([*parts.values()]).select("user_id", "item_id").iter_rows())
    names = data.train.columns
    whole = pl.concat([part.select(names) for part in (data.train, data.known, *parts.values())])
    dataset = replace(data.dataset, interactions=whole)
    return replace(data, dataset=dataset, valid=parts["valid"], test=parts["test"], held_out=held)


def baselines(study: Study) -> Check:
    """Whether a baseline's answers move when only the interactions that are evaluated change: it learned from them."""
    # A baseline of two families that read the same data is fitted once for both.
    asked: dict[tuple[int, str], list[str]] = defaultdict(list)
    made = {}
    for family in study.tasks:
        for baseline in study.baselines(family):
            asked[(id(study.task_data(family)), baseline.label)].append(family)
            made[baseline.label] = baseline
    places: list[str] = []
    others: dict[int, SplitDataset] = {}
    for (number, name), asking in asked.items():
        data = study.task_data(asking[0])
        if (seen := _seen(made[name])) or number not in others:
            # A baseline refuses features that have seen what is held out, and that is no change of an answer.
            others[number] = redrawn(data, study.recipe.eval.split, toward=_unseen(data, seen))
        asked_of = [[case.request for case in study.cases(family)[:_SCORED]] for family in asking]
        # What the run fitted may be kept. Another number of threads may have rounded it otherwise: no leak.
        first = fitted(made[name].name, made[name].parameters, data, seed=study.recipe.seed)
        answers, others_answers = (
            [*map(each.answer, asked_of)] for each in (first, _anew(study, made[name], others[number]))
        )
        if answers != others_answers and first.recalled:
            answers = [*map(_anew(study, made[name], data).answer, asked_of)]
        places += [
            f"{family}/{name}" for family, one, two in zip(asking, answers, others_answers, strict=True) if one != two
        ]
    count = sum(map(len, asked.values()))
    return verdict("baselines that learned from held-out interactions", f"{count} fitted baselines", sorted(places))


def _anew(study: Study, baseline: BaselineSection, data: SplitDataset) -> Any:
    predictor = make(baseline.name, baseline.parameters, seed=study.recipe.seed)
    predictor.fit(data)
    return predictor


def _seen(baseline: BaselineSection) -> frozenset[Pair]:
    """Return the interactions that the texts of a baseline's features have seen."""
    stores = stores_of(baseline.name, baseline.parameters)
    return frozenset().union(*(FeatureStore.open(folder).seen() for folder in stores))


def _unseen(data: SplitDataset, seen: frozenset[Pair]) -> dict[str, list[str]]:
    """Return what users' texts have not seen, for the users whose texts have seen anything."""
    read: dict[str, set[str]] = defaultdict(set)
    for user, item in seen:
        read[user].add(item)
    items = sorted(data.dataset.items)
    return {user: rest for user, known in read.items() if (rest := [item for item in items if item not in known])}


def feature_texts(study: Study) -> Check | None:
    """Whether a text among the features that baselines read has seen a held-out interaction; None without features."""
    stores = {
        folder: family
        for family in study.tasks
        for baseline in study.baselines(family)
        for folder in stores_of(baseline.name, baseline.parameters)
    }
    if study.recipe.data.texts is not None:
        stores.setdefault(study.recipe.data.texts.path, next(iter(study.tasks)))
    if not stores:
        return None
    places, rows = [], 0
    for folder, family in sorted(stores.items()):
        data = study.task_data(family)
        seen = FeatureStore.open(folder, split=data.readable).seen()
        places += [f"{folder}: {user} has {item} held out" for user, item in sorted(seen & data.held_out)]
        rows += sum(pair in seen for pair in data.train.select("user_id", "item_id").iter_rows())
    found = verdict("texts of features that have seen held-out interactions", f"{len(stores)} stores", places)
    told_too = f"{found.found}; {rows:,} training rows were seen too, which hosts leave out"
    return replace(found, found=told_too, figures={"training_rows_seen": float(rows)})


def item_index(study: Study) -> Check | None:
    """Whether the codes of items move when only held-out interactions change: the invariance gate.

    The index is built again after the items of all held-out interactions were drawn anew, and must be the same bytes.
    """
    section, index = study.recipe.index, study.index
    if section is None or index is None:
        return None
    name = "item index that learned from held-out interactions"
    if section.scheme == "external":
        return Check(name, "not tested: its codes come from a file, and how they were made is not known", "notice")
    other = study.data
    for split in ("valid", "test"):
        other = redrawn(other, split)
    again = build_index(section, other, seed=study.recipe.seed)
    if again.digest != index.digest:
        # The index may have been read back from where another number of threads rounded otherwise.
        index = build_index(section, study.data, seed=study.recipe.seed, fresh=True)
    if again.digest == index.digest:
        return Check(name, f"none: {len(index.codes):,} codes are the same bytes without them")
    moved = [f"item {item}" for item, pieces in index.codes.items() if again.codes.get(item) != pieces]
    found = f"{len(moved):,} of {len(index.codes):,} codes move with them" if moved else "its codebooks move with them"
    return Check(name, found, "leak", tuple(moved[:_SHOWN]))
