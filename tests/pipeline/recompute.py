"""Recomputes all values of a run from predictions.parquet and items.parquet.

docs/datasets-and-output-files.md describes their columns.

It uses numpy, pyarrow and, for texts, sacrebleu and rouge-score, but not llmrec, so that it finds errors in the metrics
and files of llmrec.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

WORD = re.compile(r"\w+")
Columns = dict[str, list[Any]]
Figures = dict[str, Any]


def read(path: Path) -> Columns:
    return dict(pq.read_table(path).to_pydict())


def taken(columns: Columns, indices: Any) -> Columns:
    return {name: [values[index] for index in indices] for name, values in columns.items()}


def rows_of(columns: Columns) -> dict[str, Columns]:
    ids = np.array(columns["row_id"], dtype=object)
    return {row: taken(columns, np.flatnonzero(ids == row)) for row in dict.fromkeys(columns["row_id"])}


def metrics(row: Columns, answer: str, signatures: dict[str, str]) -> dict[str, float | None]:
    """Return the metrics of a row, by the signature of each metric."""
    compute = {"ranking": rankings, "rating": ratings, "probability": probabilities, "text": texts}[answer]
    return compute(row, signatures)


# --------------------------------------------------------------------------- rankings


def per_request(row: Columns, name: str) -> Any:
    """Return the exact expectation of a ranking metric over all orders of the target's block, shape (n,)."""
    kind, _, cut = name.partition("@")
    values = []
    for above, tied in zip(row["above"], row["tied"], strict=True):
        ranks = np.arange(above + 1, above + tied + 1, dtype=float)
        gain = {"HR": np.ones_like(ranks), "NDCG": 1 / np.log2(ranks + 1), "MRR": 1 / ranks}[kind]
        values.append(float((gain * (ranks <= int(cut or 10**9))).sum() / tied) if tied else 0.0)
    return np.array(values)


def rankings(row: Columns, signatures: dict[str, str]) -> dict[str, float | None]:
    return {name: float(per_request(row, name).mean()) for name in signatures}


# --------------------------------------------------------------------------- numbers


def auc(score: Any, yes: Any) -> float | None:
    won, lost = score[yes], score[~yes]
    if not len(won) or not len(lost):
        return None
    return float(((won[:, None] > lost) + 0.5 * (won[:, None] == lost)).mean())


def ratings(row: Columns, signatures: dict[str, str]) -> dict[str, float | None]:
    guess, truth = np.array(row["value"]), np.array(row["truth"], dtype=float)
    values: dict[str, float | None] = {
        "RMSE": float(np.sqrt(((guess - truth) ** 2).mean())),
        "MAE": float(np.abs(guess - truth).mean()),
    }
    if "LikedAUC" in signatures:
        (least,) = re.findall(r"how:from-([^|]+)", signatures["LikedAUC"])
        values["LikedAUC"] = auc(guess, truth >= float(least))
    return values


def within(row: Columns) -> list[float | None]:
    guess, yes, users = np.array(row["value"]), np.array(row["truth"], dtype=float) == 1, np.array(row["user_id"])
    return [auc(guess[users == user], yes[users == user]) for user in np.unique(users)]


def bins(row: Columns) -> list[tuple[int, float, float]]:
    """Return size, mean P(yes) and share of yes of ten bins of about equal size; equal answers share a bin."""
    guess, yes = np.array(row["value"]), np.array(row["truth"], dtype=float)
    borders = np.sort(guess)[(np.arange(1, 10) * len(guess)) // 10]
    bin_of = np.array([int((borders <= value).sum()) for value in guess])
    return [
        (int((bin_of == each).sum()), float(guess[bin_of == each].mean()), float(yes[bin_of == each].mean()))
        for each in np.unique(bin_of)
    ]


def log_losses(row: Columns) -> Any:
    guess, yes = np.array(row["value"]), np.array(row["truth"], dtype=float) == 1
    return -np.log(np.maximum(np.where(yes, guess, 1 - guess), 1e-15))


def probabilities(row: Columns, signatures: dict[str, str]) -> dict[str, float | None]:
    users = [value for value in within(row) if value is not None]
    return {
        "AUC": auc(np.array(row["value"]), np.array(row["truth"], dtype=float) == 1),
        "GAUC": float(np.mean(users)) if users else None,
        "LogLoss": float(log_losses(row).mean()),
        "ECE": sum(size * abs(guess - share) for size, guess, share in bins(row)) / len(row["value"]),
    }


# --------------------------------------------------------------------------- texts


def written(row: Columns) -> list[str]:
    return [json.loads(parsed) or "" for parsed in row["parsed"]]


def rouge(row: Columns, name: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    kind = name.replace("ROUGE-", "rouge")
    scorer = RougeScorer([kind], use_stemmer=False)
    pairs = zip(row["truth"], written(row), strict=True)
    return np.array([scorer.score(truth, text)[kind].fmeasure for truth, text in pairs])


def texts(row: Columns, signatures: dict[str, str]) -> dict[str, float | None]:
    from sacrebleu import BLEU

    answers = written(row)
    words = [WORD.findall(text.lower()) for text in answers]
    values: dict[str, float | None] = {
        name: float(rouge(row, name).mean()) for name in ("ROUGE-1", "ROUGE-2", "ROUGE-L")
    }
    values["BLEU-4"] = BLEU(force=True).corpus_score(answers, [row["truth"]]).score / 100
    for n in (1, 2):
        grams = [tuple(text[start : start + n]) for text in words for start in range(len(text) - n + 1)]
        values[f"Distinct-{n}"] = len(set(grams)) / len(grams) if grams else 0.0
    values["USR"] = len({tuple(text) for text in words if text}) / len(answers)
    if "CopyRate" in signatures:
        values["CopyRate"] = float(np.mean(row["copied"]))
    if "FCR" not in signatures:
        return values
    (vocabulary,) = re.findall(r"how:features-(\d+)", signatures["FCR"])
    held = Counter(feature for each in row["features"] for feature in each)
    named = [hit for hit in row["feature_named"] if hit is not None]
    pairs, total = len(answers) * (len(answers) - 1), sum(held.values())
    values["FMR"] = float(np.mean(named)) if named else None
    values["FCR"] = len(held) / int(vocabulary)
    values["DIV"] = sum(count * (count - 1) for count in held.values()) / pairs if pairs else None
    values["Hallucination"] = sum(row["unsupported"]) / total if total else None
    return values


# --------------------------------------------------------------------------- other values


def rates(row: Columns, answer: str) -> Figures:
    """Return the other values of a row of results.json."""
    n, unread = len(row["request_id"]), np.array([error is not None for error in row["error"]])
    values: Figures = {
        "n": n,
        "users": len(set(row["user_id"])),
        "parse_rate": 1 - unread.sum() / n,
        "tie_rate": 0.0,
        **{name: sum(row[name]) for name in ("prompt_tokens", "completion_tokens", "forwards")},
    }
    if answer == "ranking":
        values["tie_rate"] = float(np.mean(np.array(row["tied"]) > 1))
    if answer == "rating":
        values["fallbacks"] = int(unread.sum())
    if answer == "probability":
        sizes = Counter(row["value"])
        values["tie_rate"] = float(np.mean([sizes[value] > 1 for value in row["value"]]))
        values["users_left_out"] = sum(value is None for value in within(row))
        values["reliability"] = bins(row)
    if answer == "text" and row["truth_copied"][0] is not None:
        values["truth_copy_rate"] = float(np.mean(row["truth_copied"]))
    if answer == "text" and row["features"][0] is not None:
        held = sum(row["truth_features"])
        values["truth_hallucination_rate"] = sum(row["truth_unsupported"]) / held if held else None
        values["features_asked"] = sum(feature is not None for feature in row["feature"])
        values["features_named"] = sum(len(each) for each in row["features"])
    return values


def by_position(row: Columns) -> list[Figures]:
    """Return HR@1 and the mean rank by the position of the target; a missing target has the last rank."""
    hit = per_request(row, "HR@1")
    rank = np.array(
        [above + (tied + 1) / 2 if tied else pool
         for above, tied, pool in zip(row["above"], row["tied"], row["pool"], strict=True)]
    )  # fmt: skip
    positions = np.array([0 if position is None else position for position in row["position"]])
    return [
        {
            "position": int(each),
            "n": int((positions == each).sum()),
            "hit": float(hit[positions == each].mean()),
            "rank": float(rank[positions == each].mean()),
            "rank_sd": float(rank[positions == each].std(ddof=1)) if (positions == each).sum() > 1 else None,
        }
        for each in np.unique(positions[positions > 0])
    ]


def bias(row: Columns) -> tuple[float, float]:
    """Return the share of the rank explained by the position (Kruskal-Wallis over n - 1), and their correlation."""

    def ranks(values: Any) -> Any:
        return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])

    last = [rank if rank is not None else pool for rank, pool in zip(row["rank"], row["pool"], strict=True)]
    both = [(position, rank) for position, rank in zip(row["position"], last, strict=True) if position is not None]
    positions, explained = (ranks(np.array(side, dtype=float)) for side in zip(*both, strict=True))
    means = np.array([explained[positions == position].mean() for position in positions])
    return float(means.var() / explained.var()), float(np.corrcoef(positions, explained)[0, 1])


def in_slice(row: Columns, name: str, training: Any) -> Any:
    """Return which requests are in a slice such as ``item:cold-below-5``; ``training`` counts interactions by item."""
    kind, _, rule = name.partition(":")
    if kind in ("history", "activity"):
        values = np.array(row["history" if kind == "history" else "user_training"])
        low, high = (rule.removeprefix("from-"), "999999999") if rule.startswith("from-") else rule.split("-")
        return (values >= int(low)) & (values <= int(high))
    values = np.array(row["item_training"])
    if rule.startswith("cold-below-"):
        return values < int(rule.removeprefix("cold-below-"))
    if rule.startswith("warm-from-"):
        return values >= int(rule.removeprefix("warm-from-"))
    falling = np.sort(training[training > 0])[::-1]
    share = float(rule.rpartition("-")[2])
    reached = np.flatnonzero(np.cumsum(falling) >= share * falling.sum() - 1e-9)
    least = falling[reached[0]] if len(reached) else 1
    return values >= least if rule.startswith("head-") else values < least


def sliced(row: Columns, name: str) -> Any:
    """Return the values of requests, whose mean is the metric of a slice; for RMSE, the root of the mean."""
    if name.startswith(("HR", "NDCG", "MRR")):
        return per_request(row, name)
    if name.startswith("ROUGE"):
        return rouge(row, name)
    if name == "LogLoss":
        return log_losses(row)
    return (np.array(row["value"]) - np.array(row["truth"], dtype=float)) ** 2
