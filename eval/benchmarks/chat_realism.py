"""Measures how well classifiers distinguish simulated users from people by their utterances.

``LLMREC_DATA=FOLDER python -m eval.benchmarks.chat_realism eval/results/chat_realism.json`` reads FOLDER/convrec and
FOLDER/movie_facts. People are the seekers of the 77 dialogues of IARD (Cai and Chen, UMAP 2020; texts of ReDial, CC BY
4.0, which are not in the repository); simulated users are those of ``eval/suites/chat_loop.yaml`` with the rule-based
manager. Titles are replaced by one word, so that classifiers cannot use the catalogue.

Each classifier is a ridge regression with a linear kernel on features of a session, cross-fitted over five folds:
``words`` (tf-idf of unigrams and bigrams), ``letters`` (character trigrams) and ``manner`` (turns, words per turn,
questions, capitals, final punctuation, titles, variety). ``all`` is an ensemble, the mean of their standardised scores,
as RecLLM evaluates its simulator (Friedman et al. 2023, arXiv 2305.07961). At an AUC of .5 they cannot be
distinguished. The baseline compares one half of the people with the other.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.benchmarks.chat_items import RECIPE, informed
from eval.benchmarks.provenance import provenance
from eval.benchmarks.redial_slots import lines
from llmrec.answer.known import Catalogue
from llmrec.answer.opening import open_classics
from llmrec.chat.audience import data_users, talks
from llmrec.chat.conversation import Conversation
from llmrec.chat.facts import Facts
from llmrec.chat.managers import RuleManager
from llmrec.chat.reading import Reader, title_of
from llmrec.chat.tools import ModelLists, Tools, asking
from llmrec.data.hashing import hash64
from llmrec.durable import write_json
from llmrec.metrics.probability import auc
from llmrec.recipe.load import load_recipe

TITLE = "sometitle"
_YEAR, _WORD = r"(?:\s*\(\d{4}\))?", re.compile(r"[\w']+")
FOLDS, RIDGE, RESAMPLES = 5, 1.0, 1000

Floats = NDArray[np.float64]


def masked(text: str, titles: Sequence[str]) -> str:
    """Replace each title, with its year, by one word."""
    for title in sorted(filter(None, titles), key=len, reverse=True):
        text = re.sub(re.escape(title) + _YEAR, TITLE, text)
    return text


def people(folder: Path) -> list[list[str]]:
    """Return the utterances of each seeker of IARD."""
    return [
        [
            masked(turn["text"], [value for act in turn["acts"] for slot, value in act["slots"] if slot == "TITLE"])
            for turn in dialogue["turns"]
            if turn["speaker"] == "user"
        ]
        for dialogue in lines(folder / "convrec" / "iard_gold.jsonl.gz")
    ]


def simulated(folder: Path, users: int) -> list[list[str]]:
    """Return the utterances of simulated users in conversations with the rule-based manager."""
    models = open_classics(load_recipe(RECIPE), ["item-knn"])
    facts = Facts(informed(models.items, folder))
    lists = ModelLists(Catalogue(facts.items), asking(models))
    conversation = Conversation(Tools(facts, lists), RuleManager(), Reader(facts))
    assert models.data is not None
    titles = [each for title in facts.titles.values() for each in (title, title_of(title)) if len(each) > 3]
    found = []
    for _, held in talks(conversation, data_users(models.data, facts, users, 0), 0, turns=5):
        said = " ".join(held.lines)
        named = [title for title in titles if title in said]
        found.append([masked(line, named) for line in held.lines])
    return found


def counts(sessions: Sequence[Sequence[str]], kind: str) -> Floats:
    """Return unit tf-idf vectors of sessions, shape (sessions, terms)."""
    found = []
    for session in sessions:
        terms: Counter[str] = Counter()
        for line in session:
            words = [word.casefold() for word in _WORD.findall(line)]
            if kind == "words":
                terms.update([*words, *(" ".join(pair) for pair in pairwise(words))])
            else:
                text = line.replace(TITLE, "#")
                terms.update(text[at : at + 3] for at in range(len(text) - 2))
        found.append(terms)
    place = {term: number for number, term in enumerate(sorted(set().union(*found)))}
    table = np.zeros((len(sessions), len(place)))
    for row, terms in enumerate(found):
        for term, count in terms.items():
            table[row, place[term]] = 1 + np.log(count)
    table *= np.log(len(sessions) / (table > 0).sum(axis=0))
    return table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)


def manner(sessions: Sequence[Sequence[str]]) -> Floats:
    """Return the style features of sessions, standardised, shape (sessions, 8)."""
    rows = []
    for session in sessions:
        sizes = [len(_WORD.findall(line)) for line in session]
        words = [word.casefold() for line in session for word in _WORD.findall(line)]
        share = [
            np.mean([test(line.strip()) for line in session])
            for test in (
                lambda line: "?" in line,
                lambda line: line[:1].isupper(),
                lambda line: line[-1:] in ".!?",
                lambda line: TITLE in line,
            )
        ]
        rows.append([len(session), np.mean(sizes), np.std(sizes), len(set(words)) / max(1, len(words)), *share])
    table = np.array(rows, dtype=np.float64)
    return (table - table.mean(axis=0)) / np.maximum(table.std(axis=0), 1e-12)


def told_apart(features: Mapping[str, Floats], truth: Floats, seed: int = 0) -> dict[str, Floats]:
    """Return the cross-fitted scores of each classifier, and their mean.

    Args:
        features: Features by classifier, shape (sessions, d).
        truth: Labels, 1 or 0, shape (sessions,).
        seed: Seed of the folds.
    """
    fold = np.argsort(np.random.default_rng(seed).permutation(len(truth))) % FOLDS
    found = {}
    for name, table in features.items():
        kernel, scores = table @ table.T, np.zeros(len(truth))
        for each in range(FOLDS):
            out = fold == each
            sides = 2 * truth[~out] - 1
            weights = np.linalg.solve(kernel[np.ix_(~out, ~out)] + RIDGE * np.eye((~out).sum()), sides - sides.mean())
            scores[out] = kernel[np.ix_(out, ~out)] @ weights
        found[name] = (scores - scores.mean()) / max(float(scores.std()), 1e-12)
    return found | {"all": np.mean(list(found.values()), axis=0)}


def rows_of(sessions: Sequence[Sequence[str]], truth: Floats, what: str) -> list[dict[str, Any]]:
    """Return the AUC of each classifier, with a 95 % interval over sessions."""
    features = {"words": counts(sessions, "words"), "letters": counts(sessions, "letters"), "manner": manner(sessions)}
    rng, found = np.random.default_rng(0), []
    draws = [rng.integers(len(truth), size=len(truth)) for _ in range(RESAMPLES)]
    for name, scores in told_apart(features, truth).items():
        sampled = [auc(scores[draw], truth[draw]) for draw in draws if 0 < truth[draw].sum() < len(draw)]
        low, high = np.quantile(sampled, [0.025, 0.975])
        found.append(
            {
                "of": what,
                "classifier": name,
                "auc": round(float(auc(scores, truth)), 4),
                "low": round(float(low), 4),
                "high": round(float(high), 4),
            }
        )
    return found


def side_of(name: str, sessions: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return the number of sessions, their mean turns and words, and the share of distinct utterances."""
    said = [line for session in sessions for line in session]
    return {
        "side": name,
        "sessions": len(sessions),
        "turns_a_session": round(len(said) / len(sessions), 2),
        "words_a_turn": round(float(np.mean([len(_WORD.findall(line)) for line in said])), 2),
        "different_lines": round(len(set(said)) / len(said), 4),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.chat_realism")
    parser.add_argument("target", type=Path)
    parser.add_argument("--users", type=int, default=200)
    given = parser.parse_args(arguments)
    begin, folder = time.perf_counter(), Path(os.environ.get("LLMREC_DATA", "."))
    real, made = people(folder), simulated(folder, given.users)
    truth = np.repeat([1.0, 0.0], [len(real), len(made)])
    halves = (hash64("realism", 0, [str(n) for n in range(len(real))]) % 2).astype(np.float64)
    rows = [
        *rows_of([*real, *made], truth, "people and simulated users"),
        *rows_of(real, halves, "two halves of the people"),
    ]
    write_json(
        given.target,
        {
            "command": "LLMREC_DATA=FOLDER python -m eval.benchmarks.chat_realism eval/results/chat_realism.json",
            "sides": [side_of("people", real), side_of("simulated users", made)],
            "rows": rows,
            "seconds": round(time.perf_counter() - begin, 1),
            **provenance(),
        },
    )


if __name__ == "__main__":
    main()
