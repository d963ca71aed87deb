"""Evaluates conversational retrieval on ReDial's test dialogues.

``LLMREC_DATA=FOLDER python -m eval.benchmarks.redial eval/results/redial.json`` reads FOLDER/convrec and
FOLDER/movie_facts. ReDial (Li et al., NeurIPS 2018) is used in CRSLab's preprocessing, test part only: 1,322 dialogues.

Cases are the items that the recommender mentions first in the dialogue; all items not yet mentioned are ranked, in
expectation over ties. Intervals and differences resample dialogues.

The models below are not trained on these data, except for counts in the *other* dialogues:

- ``popularity``: number of other dialogues in which an item is recommended; ``co-mention``: the same in dialogues that
  mention one of the items mentioned so far.
- ``words``: BM25 of the last three utterances over names and, if there is a page of the same name, facts.
- ``encoder, name`` and ``encoder, text``: MiniLM without fine-tuning, between the same utterances and names, or names
  with lead sections.
- ``named``: MiniLM between the texts of the items mentioned so far and an item's text. ``concepts``: MiniLM between the
  utterances and the mean vector of an item's genres, cast and year.

- ``dual encoder, other dialogues``: MiniLM with projections trained on the cases of other dialogues
  (`llmrec.chat.dual_encoder`). ``shuffled texts`` is its ablation: each item has the fixed text of another one, of one
  with a page if it has a page, so that texts are uninformative but still identify items.
- ``dual encoder, synthetic``: trained on conversations of rules with simulated users over the items with facts instead
  (`llmrec.chat.simulator`), without ReDial.
- ``named by a language model``: SmolLM2-135M-Instruct generates the title after the last utterances, by constrained
  search over all titles. It is evaluated on ``--named`` cases, sampled by a hash, since a case takes seconds.
  Popularity is reported on the same cases. Items that the search does not find are tied last.

Ensembles are conditional logits with weights cross-fitted over five folds of dialogues: the weights for a fold are
fitted on 1,000 cases of the others, with counts without that fold. A dual encoder that scores a fold is not trained on
it, and one that scores cases for the fit is trained neither on their fold nor on the evaluated one. ``somebody else's
context`` is the baseline for the text.

ReDial is licensed under CC BY 4.0; the data are not in the repository.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from eval.benchmarks.kar import table
from eval.benchmarks.provenance import provenance
from eval.benchmarks.redial_learned import TALKS, OtherDialogues, exchanged_items, named, synthetic
from llmrec.chat.dual_encoder import CONTEXT_UTTERANCES, DEFAULT_ENCODER, apply_linear_map
from llmrec.chat.facts import Facts
from llmrec.data.hashing import hash64
from llmrec.data.knowledge import BM25
from llmrec.durable import write_json
from llmrec.ensembles.cells import CandidateScores, ScoreScale
from llmrec.ensembles.weights import FOLDS, Weights, assign_folds, fit_logit
from llmrec.metrics.ranking import hit_rate
from llmrec.metrics.significance import holm_adjusted, required_resamples
from llmrec.metrics.stats import bootstrap_interval, paired_statistic_difference, sums_by_user
from llmrec.models.text_encoder import text_embedder
from llmrec.types import Item

CUTS = (1, 10, 50)
NAMED, SAME = "named by a language model", "popularity, same cases"
KINDS: Mapping[str, ScoreScale] = {
    "popularity": "counts",
    "co-mention": "counts",
    "words": "logits",
    "encoder, name": "logits",
    "encoder, text": "logits",
    "named": "logits",
    "concepts": "logits",
}
OTHERS = "dual encoder, other dialogues"
SHUFFLED = f"{OTHERS}, shuffled texts"
SYNTHETIC = "dual encoder, synthetic"
LEARNED: Mapping[str, ScoreScale] = {OTHERS: "logits", SYNTHETIC: "logits", SHUFFLED: "logits"}
"""Models that are trained on dialogues."""
COUNTS = ("popularity", "co-mention")
MIXTURES: Mapping[str, Sequence[str]] = {
    "mixture of all": list(KINDS),
    "mixture of counts": list(COUNTS),
    "mixture of popularity and text": [name for name in KINDS if name != "co-mention"],
    **{f"mixture of all and {name}": [*KINDS, name] for name in LEARNED},
}
PLANNED = (
    ("mixture of all", "popularity"),
    ("mixture of popularity and text", "popularity"),
    ("mixture of all", "mixture of counts"),
    ("encoder, text", "somebody else's context"),
)
"""Differences of Recall@10 that are tested together."""
PLANNED_OF_LEARNED = [
    (name, other)
    for learned in (OTHERS, SYNTHETIC)
    for name in (learned, f"mixture of all and {learned}")
    for other in ("popularity", "mixture of counts")
] + [(f"mixture of all and {learned}", "mixture of all") for learned in (OTHERS, SYNTHETIC)]
"""Differences of trained models: a separate family, planned later, so that the first results do not change."""
PLANNED_OF_SHUFFLED = (
    (OTHERS, SHUFFLED),
    (f"mixture of all and {OTHERS}", f"mixture of all and {SHUFFLED}"),
    (f"mixture of all and {SHUFFLED}", "mixture of all"),
)
"""Effect of the texts: a third family."""
_FAMILIES = (PLANNED, PLANNED_OF_LEARNED, PLANNED_OF_SHUFFLED)
LEARN = 1000
"""Number of cases for fitting the weights of a fold, sampled by a hash."""
_YEAR = re.compile(r"\((\d{4})[^)]*\)\s*$")
_SUFFIX = re.compile(r"\s*\([^()]*\)\s*$")

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Cases:
    """The cases, one for each target.

    Attributes:
        rows: Turn index of each case.
        targets: Item index of each target.
        dialogues: Dialogue of each turn.
        queries: The last utterances of each turn.
        named: Indices of the items mentioned before each turn.
    """

    rows: NDArray[np.int64]
    targets: NDArray[np.int64]
    dialogues: list[str]
    queries: list[str]
    named: list[list[int]]

    @property
    def clusters(self) -> list[str]:
        """The dialogue of each case."""
        return [self.dialogues[row] for row in self.rows]


def items_of(folder: Path) -> list[Item]:
    """Return the items, with facts if there is a page of the same name."""
    pages = {
        str(row["wiki_page"]).replace("_", " "): row
        for row in table(folder / "movie_facts" / "wikipedia_extracts.tsv.gz").iter_rows(named=True)
    }
    result = []
    for row in table(folder / "convrec" / "redial_items.tsv.gz").iter_rows(named=True):
        name, page = str(row["name"]), pages.get(str(row["name"]))
        fields = {key: str(page[key] or "").replace("|", ", ") for key in ("genres", "cast")} if page else {}
        year = _YEAR.search(name)
        fields["year"] = str(page["year"]) if page else year[1] if year else ""
        fields["facts"] = str(page["extract"] or "") if page else ""
        result.append(Item(item_id=str(row["item_id"]), title=name, fields={key: v for key, v in fields.items() if v}))
    return result


def cases_of(folder: Path, items: Sequence[Item]) -> Cases:
    """Return the cases: targets that were not mentioned before."""
    column_of = {item.item_id: column for column, item in enumerate(items)}
    with gzip.open(folder / "convrec" / "redial_test.jsonl.gz", "rt", encoding="utf-8") as stream:
        turns = [json.loads(line) for line in stream]
    rows, targets = [], []
    for row, turn in enumerate(turns):
        for target in turn["targets"]:
            if target not in turn["mentioned_before"] and str(target) in column_of:
                rows.append(row)
                targets.append(column_of[str(target)])
    return Cases(
        rows=np.array(rows),
        targets=np.array(targets),
        dialogues=[turn["dialogue"] for turn in turns],
        queries=[" ".join(turn["context"][-CONTEXT_UTTERANCES:]) for turn in turns],
        named=[[column_of[str(item)] for item in turn["mentioned_before"] if str(item) in column_of] for turn in turns],
    )


def counted(cases: Cases, size: int, among: NDArray[np.bool_]) -> dict[str, Floats]:
    """Return popularity and co-mentions in other dialogues, shape (turns, items) each.

    Args:
        cases: The cases.
        size: Number of items.
        among: Dialogues to count, by index in sorted order; the dialogue of a turn is always excluded.
    """
    names, dialogue_of = np.unique(cases.dialogues, return_inverse=True)
    advised = {(int(dialogue_of[row]), int(column)) for row, column in zip(cases.rows, cases.targets, strict=True)}
    mentioned = advised | {(int(dialogue_of[row]), column) for row, named in enumerate(cases.named) for column in named}
    counting = sparse.diags_array(among.astype(np.float32))
    goals, all_named = (counting @ _table(pairs, (len(names), size)) for pairs in (advised, mentioned))
    popular = np.asarray(goals.sum(axis=0)).ravel()
    both = (all_named.T @ goals).tocsr()
    popularity = np.empty((len(dialogue_of), size), dtype=np.float32)
    together = np.zeros_like(popularity)
    for row, dialogue in enumerate(dialogue_of):
        targets, here = goals[[dialogue]].toarray().ravel(), cases.named[row]
        popularity[row] = popular - targets
        if here:
            # Subtract the counts of this dialogue: its targets with each mentioned item.
            mentions = float(all_named[[dialogue]].toarray().ravel()[here].sum())
            together[row] = np.asarray(both[here].sum(axis=0)).ravel() - targets * mentions
    together /= np.sqrt(np.maximum(popularity, 0) + 1)
    return {"popularity": popularity, "co-mention": np.maximum(together, 0)}


def _table(pairs: set[tuple[int, int]], shape: tuple[int, int]) -> Any:
    return sparse.csr_array((np.ones(len(pairs), dtype=np.float32), np.array(sorted(pairs)).T), shape)


def names_of(items: Sequence[Item]) -> tuple[list[str], list[str]]:
    """Return the names of items, and names with lead sections of pages."""
    names = [_SUFFIX.sub("", item.title) for item in items]
    return names, [f"{name}. {item.fields.get('facts', '')}" for name, item in zip(names, items, strict=True)]


def texts(cases: Cases, items: Sequence[Item]) -> tuple[dict[str, Floats], Floats, Floats]:
    """Return the scores of the text models and the baseline, shape (turns, items) each, and MiniLM vectors.

    The vectors are those of the last utterances, shape (turns, d), and of names with leads, shape (items, d).
    """
    embed = text_embedder(DEFAULT_ENCODER)
    names, descriptions = names_of(items)
    facts = Facts({item.item_id: item for item in items}, embed)
    queries, titles, full = embed(cases.queries), embed(names), embed(descriptions)
    words = BM25.of([f"{name} {' '.join(item.fields.values())}" for name, item in zip(names, items, strict=True)])
    past = np.stack([full[named].mean(axis=0) if named else np.zeros(full.shape[1]) for named in cases.named])
    owners = np.unique(cases.dialogues, return_inverse=True)[1]
    # The context of another dialogue: the turn at a distance of half of all turns.
    other = np.argsort(owners, kind="stable")
    exchanged = np.empty(len(owners), dtype=np.int64)
    exchanged[other] = np.roll(other, len(other) // 2)
    result = {
        "words": np.stack([words.scores(query) for query in cases.queries]),
        "encoder, name": queries @ titles.T,
        "encoder, text": queries @ full.T,
        "named": past @ full.T,
        "concepts": queries @ facts.concepts.T,
        "somebody else's context": queries[exchanged] @ full.T,
    }
    return {name: np.asarray(scores, dtype=np.float32) for name, scores in result.items()}, queries, full


def hits(scores: Floats, cases: Cases, chosen: NDArray[np.int64] | None = None) -> dict[int, NDArray[np.float64]]:
    """Return whether each case's target is among the first k, in expectation over ties.

    Args:
        scores: One row for each turn, or for each case of ``chosen``.
        cases: The cases.
        chosen: Cases of the rows; None: rows are turns.
    """
    which = np.arange(len(cases.rows)) if chosen is None else chosen
    greater, tied = [], []
    for index, case in enumerate(which):
        row = cases.rows[case]
        values = scores[row if chosen is None else index].copy()
        target_score = values[cases.targets[case]]
        values[cases.named[row]] = -np.inf
        greater.append(int((values > target_score).sum()))
        tied.append(int((values == target_score).sum()))
    return {k: hit_rate(greater, tied, k) for k in CUTS}


def mixed(
    cases: Cases, size: int, untrained: Mapping[str, Floats], learned: Callable[[int], Mapping[str, Floats]]
) -> tuple[dict[str, dict[int, NDArray[np.float64]]], Any]:
    """Return the cross-fitted hits of every ensemble, and the weights.

    Args:
        cases: The cases.
        size: Number of items.
        untrained: Scores of the models without training.
        learned: Returns the scores of trained models for an evaluated fold and for the fit.
    """
    names = np.unique(cases.dialogues)
    folds = assign_folds("redial", cases.clusters)
    fold_of = dict(zip(cases.clusters, folds.tolist(), strict=True))
    result = {name: {k: np.zeros(len(cases.rows)) for k in CUTS} for name in MIXTURES}
    weights: dict[str, list[dict[str, float]]] = {name: [] for name in MIXTURES}
    starts: dict[str, Weights] = {}
    order = np.argsort(hash64("redial cases", 0, [str(case) for case in range(len(cases.rows))]), kind="stable")
    out = np.zeros((len(cases.rows), size), dtype=bool)
    for case, row in enumerate(cases.rows):
        out[case, cases.named[row]] = True
    every = counted(cases, size, np.ones(len(names), dtype=bool))
    for fold in range(FOLDS):
        # Counts for the fit exclude the evaluated dialogues.
        within = counted(cases, size, np.array([fold_of.get(name) != fold for name in names]))
        by_fold = learned(fold)
        judge = np.flatnonzero(folds == fold)
        learn = np.array([case for case in order if folds[case] != fold][:LEARN])
        for name, parts in MIXTURES.items():
            fit, _ = _known(cases, learn, {**untrained, **within, **by_fold}, parts, out)
            fitted = starts[name] = fit_logit(fit, starts.get(name), repeats=False)
            weights[name].append({part: round(w, 3) for part, w in zip(parts, fitted.parts, strict=True)})
            known, able = _known(cases, judge, {**untrained, **every, **by_fold}, parts, out)
            total = np.full(able.shape, -np.inf)
            total[able] = fitted.scores(known)
            for k, values in hits(total, cases, judge).items():
                result[name][k][judge] = values
        sys.stderr.write(f"fold {fold + 1} of {FOLDS}\n")
    return result, weights


def _known(
    cases: Cases, chosen: NDArray[np.int64], scores: Mapping[str, Floats], parts: Sequence[str], out: NDArray[np.bool_]
) -> tuple[CandidateScores, NDArray[np.bool_]]:
    """Return the candidates of cases with the members' scores, and their mask, shape (n, items)."""
    kinds, able = {**KINDS, **LEARNED}, ~out[chosen]
    starts = np.concatenate([[0], np.cumsum(able.sum(axis=1))])
    raw = np.stack([scores[part][cases.rows[chosen]][able].astype(np.float32) for part in parts])
    truth = starts[:-1] + np.cumsum(able, axis=1)[np.arange(len(chosen)), cases.targets[chosen]] - 1
    had = np.zeros(raw.shape[1], dtype=bool)
    return CandidateScores(tuple(parts), tuple(kinds[part] for part in parts), starts, raw, had, truth), able


# --------------------------------------------------------------------------- main


def row_of(name: str, values_by_cutoff: Mapping[int, NDArray[np.float64]], clusters: Sequence[str]) -> dict[str, Any]:
    """Return the results of one model, with intervals over dialogues."""
    row: dict[str, Any] = {"row": name}
    for k, values in values_by_cutoff.items():
        estimate = bootstrap_interval(values, resamples=2000, seed=0, users=clusters)
        row[f"Recall@{k}"] = {name: round(value, 4) for name, value in asdict(estimate).items()}
    text = "  ".join(f"R@{k} {row[f'Recall@{k}']['value']:.3f}" for k in CUTS)
    sys.stdout.write(f"{name:32} {text}\n")
    return row


def differences(
    metric: str, gains: Sequence[tuple[str, str, NDArray[np.float64], Sequence[str]]]
) -> list[dict[str, Any]]:
    """Return planned differences, corrected together, with intervals over dialogues.

    Args:
        metric: Name of the metric.
        gains: Names of two models, their difference (first − second) for every case, and the dialogue of every case.
    """
    sampled = []
    for _, _, values, clusters in gains:
        sums, sizes = sums_by_user(values, clusters)
        sampled.append(
            paired_statistic_difference(
                lambda rows, sums=sums, sizes=sizes: sums[rows].sum(axis=1) / sizes[rows].sum(axis=1),  # type: ignore[misc]
                len(sums),
                resamples=required_resamples(2000, len(gains)),
                seed=0,
            )
        )
    return [
        {"metric": metric, "a": one, "b": other, **{key: round(value, 5) for key, value in asdict(difference).items()}}
        for (one, other, _, _), difference in zip(gains, holm_adjusted(sampled), strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.redial")
    parser.add_argument("target", type=Path)
    parser.add_argument("--named", type=int, default=100)
    options = parser.parse_args(arguments)
    folder, begin = Path(os.environ.get("LLMREC_DATA", ".")), time.perf_counter()
    items = items_of(folder)
    cases = cases_of(folder, items)
    untrained, queries, descriptions = texts(cases, items)
    single = {**counted(cases, len(items), np.ones(len(set(cases.dialogues)), dtype=bool)), **untrained}
    results = {name: hits(scores, cases) for name, scores in single.items()}
    learned = {
        OTHERS: OtherDialogues(cases, queries, descriptions),
        SHUFFLED: OtherDialogues(cases, queries, descriptions[exchanged_items(items)]),
    }
    for name, encoders in learned.items():
        results[name] = hits(encoders.alone(), cases)
    encoder, turns = synthetic(items, descriptions)
    requested = len({turn.items for turn in turns if turn.user is None})
    untrained[SYNTHETIC] = apply_linear_map(queries, encoder.context) @ apply_linear_map(descriptions, encoder.item).T
    results[SYNTHETIC] = hits(untrained[SYNTHETIC], cases)
    mixtures, weights = mixed(
        cases, len(items), untrained, lambda fold: {name: encoders.scores(fold) for name, encoders in learned.items()}
    )
    results |= mixtures
    rows = [row_of(name, values, cases.clusters) for name, values in results.items()]
    families = [[(a, b, results[a][10] - results[b][10], cases.clusters) for a, b in planned] for planned in _FAMILIES]
    if options.named:
        drawn = np.argsort(hash64("redial named", 0, [str(case) for case in range(len(cases.rows))]), kind="stable")
        chosen = np.sort(drawn[: options.named])
        of_chosen = [cases.clusters[case] for case in chosen]
        by_model = hits(named(cases, names_of(items)[0], chosen), cases, chosen)
        same = {k: values[chosen] for k, values in results["popularity"].items()}
        rows += [row_of(NAMED, by_model, of_chosen), row_of(SAME, same, of_chosen)]
        families[1].append((NAMED, SAME, by_model[10] - same[10], of_chosen))
    write_json(
        options.target,
        {
            "command": "LLMREC_DATA=FOLDER make bench NAME=redial",
            "dialogues": len(set(cases.clusters)),
            "cases": len(cases.rows),
            "seeds": [],
            "items": len(items),
            "items with facts": sum("facts" in item.fields for item in items),
            "rows": rows,
            "pairs": [pair for family in families for pair in differences("Recall@10", family)],
            "synthetic": {"conversations": TALKS, "turns": len(turns) - TALKS, "items": requested},
            "cases of the language model": options.named,
            "weights by fold": weights,
            "seconds": round(time.perf_counter() - begin, 1),
            **provenance(),
        },
    )


if __name__ == "__main__":
    main()
