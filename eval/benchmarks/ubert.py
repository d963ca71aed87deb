"""Measures the effect of pretraining U-BERT (Qiu et al., AAAI 2021) on another domain's reviews, on synthetic data.

``python -m eval.benchmarks.ubert eval/results/ubert.json`` generates two synthetic domains per seed, with different
users and items and the same language. A user has weights for six aspects, an item is good, plain or bad at each, and a
rating is 3 plus the sum of weights times qualities, with noise, rounded to stars. A review names two aspects, sampled
by the user's weights, with an opinion word that fits the item. The source domain has many reviews, the target domain
few per user. So the data satisfy U-BERT's assumptions, and results do not generalise to real reviews.

The variants: no pretraining; pretraining on the source by masked opinion words and ratings of single reviews; the same
with shuffled source texts, so that words are independent of user and rating; weights of a U-BERT fitted to the ratings
of the source, which is more than the paper's pretraining. Baselines: user and item biases, and the mean. Every seed
samples data and weights, so the five seeds are the sampling units: intervals are Student's over seeds, and exploratory.

Parameters are not tuned.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import stats

from eval.benchmarks.provenance import provenance
from llmrec.baselines.parameters import make
from llmrec.baselines.validation import rating_cases
from llmrec.data.dataset import Dataset
from llmrec.data.split import split
from llmrec.durable import write_json, write_text
from llmrec.recipe.schema import Split
from llmrec.systems.ubert.baseline import UBert
from llmrec.types import Item, Rating

ASPECTS = ("sound", "build", "price", "comfort", "look", "service")
OPINIONS: Mapping[int, tuple[str, ...]] = {
    1: ("great", "superb", "lovely", "excellent"),
    0: ("average", "ordinary", "acceptable", "usual"),
    -1: ("awful", "poor", "dreadful", "terrible"),
}
SENTENCES = (
    "The {aspect} is {word}.",
    "I find the {aspect} {word}.",
    "For me, {word} {aspect}.",
    "It has {word} {aspect}.",
)
NONE, PRETRAINED, SHUFFLED, FITTED = (
    "no pretraining",
    "pretrained",
    "pretrained on shuffled reviews",
    "fitted to the source",
)
BIAS, MEAN = "user-item-bias", "global-mean"
PAIRS = ((PRETRAINED, NONE), (PRETRAINED, SHUFFLED), (PRETRAINED, BIAS), (NONE, BIAS), (FITTED, NONE))
"""Differences of RMSE, first − second."""
_ENDS = ("value", "low", "high")
PARAMETERS: Mapping[str, Any] = {"tokens": 24, "reviews": 8, "learning_rate": 3e-3, "quiet": True}


def domain(name: str, users: int, items: int, reviews: int, rng: np.random.Generator) -> Dataset:
    """Return synthetic ratings and reviews for a number of users and of reviews per user."""
    quality = rng.integers(-1, 2, (items, len(ASPECTS)))
    weights = 2.0 * rng.dirichlet(np.full(len(ASPECTS), 0.4), users)
    rows = []
    for user in range(users):
        for step, item in enumerate(rng.choice(items, reviews, replace=False).tolist()):
            exact = 3 + weights[user] @ quality[item] + rng.normal(0, 0.3)
            drawn = rng.choice(len(ASPECTS), 2, p=weights[user] / weights[user].sum())
            text = " ".join(_sentence(int(each), int(quality[item, each]), rng) for each in drawn)
            stars = float(np.clip(np.rint(exact), 1, 5))
            rows.append((f"{name}-u{user}", f"{name}-i{item}", stars, float(step), text))
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "rating", "timestamp", "text"], orient="row")
    names = {f"{name}-i{item}" for item in range(items)} & set(frame["item_id"].unique())
    known = {each: Item(item_id=each, title=each) for each in sorted(names)}
    return Dataset(name=name, noun="products", interactions=frame, items=known, rating_scale=(1.0, 5.0))


def _sentence(aspect: int, quality: int, rng: np.random.Generator) -> str:
    word = OPINIONS[quality][rng.integers(len(OPINIONS[quality]))]
    return SENTENCES[rng.integers(len(SENTENCES))].format(aspect=ASPECTS[aspect], word=word)


def settings(seed: int, given: argparse.Namespace, folder: Path) -> dict[str, tuple[NDArray[np.float64], list[str]]]:
    """Fit every variant with one seed, and return squared errors on the test split with the users, by name."""
    rng = np.random.default_rng([seed, 5])
    rich = split(
        domain(f"source{seed}", given.users, given.items, 10, rng),
        Split(kind="last_share", valid=0.1, test=0.1),
        seed=seed,
    )
    poor = split(
        domain(f"target{seed}", given.users, given.items, 10, rng),
        Split(kind="last_share", valid=0.2, test=0.4),
        seed=seed,
    )
    lexicon = folder / "lexicon.txt"
    write_text(lexicon, "\n".join(word for words in OPINIONS.values() for word in words) + "\n")
    taught: dict[str, Mapping[str, Any]] = {NONE: {}}
    told = {**PARAMETERS, "lexicon": str(lexicon), "pretrain": given.pretrain}
    for name in (PRETRAINED, SHUFFLED):
        teacher = UBert(UBert.Config(**told, shuffled=name == SHUFFLED), seed=seed)
        teacher.pretrained(rich)
        teacher.save(folder / name.replace(" ", "-"), rich)
        taught[name] = {"start": str(folder / name.replace(" ", "-"))}
    whole = UBert(UBert.Config(**PARAMETERS), seed=seed)
    whole.fit(rich)
    whole.save(folder / "fitted", rich)
    taught[FITTED] = {"start": str(folder / "fitted")}
    models = {name: make("ubert", {**PARAMETERS, **more}, seed=seed) for name, more in taught.items()}
    models |= {BIAS: make(BIAS, {"recency": 0.0}, seed=seed), MEAN: make(MEAN, {}, seed=seed)}
    # The test split as cases; nothing else reads it.
    cases = rating_cases(replace(poor, valid=poor.test))
    users = [case.request.user_id for case in cases]
    found = {}
    for name, model in models.items():
        model.fit(poor)
        answers = model.answer([case.request for case in cases])
        values = [answer.value for answer in answers if isinstance(answer, Rating)]
        found[name] = (np.array(values) - [float(case.truth) for case in cases]) ** 2, users
        sys.stdout.write(f"seed {seed}: {name} {float(np.sqrt(found[name][0].mean())):.4f}\n")
        sys.stdout.flush()
    return found


def about(by_seed: Sequence[float]) -> dict[str, float]:
    """Return the mean over seeds with Student's 95 % interval; each seed has separate data and weights."""
    mean, error = float(np.mean(by_seed)), float(np.std(by_seed, ddof=1)) / len(by_seed) ** 0.5
    reach = float(stats.t.ppf(0.975, len(by_seed) - 1)) * error
    return {name: round(value, 5) for name, value in zip(_ENDS, (mean, mean - reach, mean + reach), strict=True)}


def summed_up(rmse: Mapping[str, Sequence[float]]) -> dict[str, list[dict[str, Any]]]:
    """Return the results and their differences from RMSE by variant and seed; exploratory with few seeds."""
    rows = [{"setting": name, "rmse": about(each), "by_seed": list(each)} for name, each in rmse.items()]
    found = []
    for one, other in PAIRS:
        less = [round(a - b, 5) for a, b in zip(rmse[one], rmse[other], strict=True)]
        found.append({"a": one, "b": other, **about(less), "by_seed": less})
    return {"rows": rows, "pairs": found}


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.ubert")
    parser.add_argument("target", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--users", type=int, default=150, help="users per domain")
    parser.add_argument("--items", type=int, default=60, help="items per domain")
    parser.add_argument("--pretrain", type=int, default=10, help="epochs")
    given = parser.parse_args(arguments)
    begin, found = time.process_time(), []
    for seed in range(given.seeds):
        with tempfile.TemporaryDirectory() as folder:
            found.append(settings(seed, given, Path(folder)))
    rmse = {name: [round(float(np.sqrt(each[name][0].mean())), 5) for each in found] for name in found[0]}
    users = [user for each in found for user in each[NONE][1]]
    result = {
        "command": "python -m eval.benchmarks.ubert eval/results/ubert.json",
        **summed_up(rmse),
        "cases": len(users),
        "users": len(set(users)),
        "seeds": list(range(given.seeds)),
        "parameters": {**PARAMETERS, "pretrain": given.pretrain},
        "seconds": round(time.process_time() - begin, 1),
        **provenance(),
    }
    write_json(given.target, result)


if __name__ == "__main__":
    main()
