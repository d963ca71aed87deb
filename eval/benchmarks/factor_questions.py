"""Measures factual question answering of a small language model about films, with and without retrieved documents.

``LLMREC_DATA=FOLDER python -m eval.benchmarks.factor_questions eval/results/factor_questions.json`` reads
FOLDER/movie_facts: directors, countries and years of films from HetRec 2011 as the truth, and lead sections of
Wikipedia pages as independent documents. Films in both are sampled by a hash (``--films 300``), and SmolLM2-135M-
Instruct answers three questions on each: alone; with passages of the film's page by BM25 within a budget of words
(``--tokens 40``); and with passages of another film. An answer is correct if it contains the truth: the full name of a
director, a year of the decade or its name, a name of the country or its adjective. For the decade, the title has no
year. Answers are stored under ``runs/factor-questions``; an interrupted run continues.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from eval.benchmarks.kar import table
from eval.benchmarks.provenance import provenance
from llmrec.backends.cache import AnswerStore, CachedBackend
from llmrec.backends.encode import Encoder
from llmrec.backends.hf.backend import HFBackend
from llmrec.data.hashing import hash64
from llmrec.data.knowledge import Documents, numbered
from llmrec.durable import write_json
from llmrec.machine import machine, versions
from llmrec.metrics.significance import decide, enough
from llmrec.metrics.stats import paired_of
from llmrec.models.load import load_model, load_tokenizer, resolve, weights_stamp
from llmrec.models.text_encoder import text_embedder
from llmrec.prompts.template import Template, load_templates
from llmrec.recipe.schema import ModelSection
from llmrec.types import Item, Prompt, Segment

MODEL = "SmolLM2-135M-Instruct"
QUESTIONS = {
    "director": ('Who directed the film "{title}"?', "The film was directed by", "directed by director"),
    "country": ('Which country is the film "{title}" from?', "The film is from", "country American British French"),
    "decade": ('In which year was the film "{title}" made?', "The film was made in", "film released year"),
}
"""By factor: the question, the beginning of the answer, and the query for passages."""
SETTINGS = ("model alone", "model with retrieval", "model with another film's")
COUNTRIES = {
    "USA": "usa|u s a|united states|u s|us|america|american",
    "UK": "uk|u k|united kingdom|england|english|britain|british|great britain|scotland|scottish",
    "France": "france|french",
    "Germany": "germany|german",
    "West Germany": "germany|german|west germany|west german",
    "Canada": "canada|canadian",
    "Italy": "italy|italian",
    "Japan": "japan|japanese",
    "Australia": "australia|australian",
    "Hong Kong": "hong kong",
    "Spain": "spain|spanish",
    "Ireland": "ireland|irish",
    "China": "china|chinese",
    "Sweden": "sweden|swedish",
    "New Zealand": "new zealand",
    "Mexico": "mexico|mexican",
    "Denmark": "denmark|danish",
}
"""Accepted names by HetRec's name; films from other countries are not sampled."""
_YEAR = re.compile(r"\s*\((\d{4})\)\s*$")
_TOKENS, _BATCH = 8, 16


@dataclass(frozen=True)
class Film:
    """A film that is in both tables."""

    id: str
    title: str
    directors: tuple[str, ...]
    country: str
    year: int

    def holds(self, factor: str, text: str) -> bool:
        """Whether a text contains the true value of a factor."""
        words = f" {plain(text)} "
        if factor == "director":
            return any(f" {plain(name)} " in words for name in self.directors)
        if factor == "country":
            return any(f" {name} " in words for name in COUNTRIES[self.country].split("|"))
        decade = self.year // 10
        return f" {decade}0s " in words or any(f" {decade}{digit} " in words for digit in range(10))

    def question(self, factor: str) -> str:
        """Return the question."""
        title = _YEAR.sub("", self.title) if factor == "decade" else self.title
        title = re.sub(r"^(.*), (The|A|An)(?= \(|$)", r"\2 \1", title)
        return QUESTIONS[factor][0].format(title=title)


def plain(text: str) -> str:
    """Return the lower-cased words of a text."""
    return " ".join(re.findall(r"\w+", text.lower()))


def films(folder: Path, documents: Documents, count: int) -> list[Film]:
    """Sample films with a document, directors, a country of `COUNTRIES` and a year."""
    known, found = set(documents.names), []
    for row in table(folder / "hetrec_facts.tsv.gz").iter_rows(named=True):
        item, year = str(row["item_id"]), _YEAR.search(row["title"] or "")
        if item in known and row["directors"] and row["country"] in COUNTRIES and year:
            found.append(Film(item, row["title"], tuple(row["directors"].split("|")), row["country"], int(year[1])))
    order = np.argsort(hash64("factor questions", 0, [film.id for film in found]), kind="stable")
    return [found[place] for place in order[:count].tolist()]


def asked(template: Template, film: Film, factor: str, facts: Sequence[str]) -> Prompt:
    """Return a question with passages."""
    values = {"item": {"facts": numbered(facts)}, "question": film.question(factor)}
    return Prompt(messages=template.turns(values), answer_prefix=(Segment("text", QUESTIONS[factor][1]),))


def answers(backend: CachedBackend, prompts: Sequence[Prompt]) -> list[str]:
    """Return the first lines of greedy answers."""
    found = []
    for start in range(0, len(prompts), _BATCH):
        done = backend.generate(prompts[start : start + _BATCH], max_tokens=_TOKENS)
        found += [next(iter(each.text.strip().splitlines()), "") for each in done]
        sys.stderr.write(f"{len(found)} of {len(prompts)}\n")
    return found


def held(drawn: Sequence[Film], factor: str, texts: Sequence[str]) -> NDArray[np.float64]:
    """Return 1 for each film whose text contains the truth, else 0, shape (films,)."""
    return np.array([float(film.holds(factor, text)) for film, text in zip(drawn, texts, strict=True)])


def mean_of(values: NDArray[np.float64]) -> Callable[[NDArray[np.intp]], NDArray[np.float64]]:
    """Return the mean of resampled films."""
    return lambda rows: np.asarray(values[rows].mean(axis=1))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the questions, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.factor_questions")
    parser.add_argument("target", type=Path)
    parser.add_argument("--films", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--factors", nargs="+", default=list(QUESTIONS), choices=QUESTIONS)
    parser.add_argument("--keep", type=Path, default=Path("runs/factor-questions"))
    given = parser.parse_args(arguments)
    folder, begin = Path(os.environ.get("LLMREC_DATA", ".")) / "movie_facts", time.perf_counter()
    pages = table(folder / "wikipedia_extracts.tsv.gz").drop_nulls("extract")
    documents = Documents(tuple(pages["item_id"]), tuple(pages["extract"]), False, "wikipedia_extracts.tsv.gz")
    drawn, embed = films(folder, documents, given.films), text_embedder("all-MiniLM-L6-v2")
    section = ModelSection(name=MODEL)
    base = resolve(section)

    def begun() -> HFBackend:
        encoder = Encoder(load_tokenizer(base, section), max_length=section.max_length)
        return HFBackend(load_model(base, section), encoder)

    store = AnswerStore(given.keep / "answers.sqlite")
    backend = CachedBackend(store, {"weights": weights_stamp(base), **versions()}, HFBackend, begun)
    template, rows, compared = load_templates("knowledge")["answer"], [], []
    for factor in given.factors:
        looked_for = QUESTIONS[factor][-1]
        places = [documents.about(Item(item_id=film.id, title=film.title)) or 0 for film in drawn]
        facts = [documents.passages(place, looked_for, given.tokens) for place in places]
        others = [*facts[1:], *facts[:1]]
        near = [
            documents.passages(place, film.question(factor), given.tokens, embed)
            for place, film in zip(places, drawn, strict=True)
        ]
        right = {}
        for name, shown in zip(SETTINGS, ([()] * len(drawn), facts, others), strict=True):
            prompts = [asked(template, film, factor, each) for film, each in zip(drawn, shown, strict=True)]
            said = answers(backend, prompts)
            right[name] = held(drawn, factor, said)
            rows.append({"factor": factor, "setting": name, "right": round(right[name].mean(), 4), "first": said[:5]})
            sys.stdout.write(f"{factor:9} {name:26} {right[name].mean():.3f}\n")
        texts = {
            "passages by BM25": [" ".join(each) for each in facts],
            "passages by BM25 and encoder": [" ".join(each) for each in near],
            "whole page": [documents.written[place] for place in places],
        }
        for name, written in texts.items():
            rows.append({"factor": factor, "setting": name, "right": round(held(drawn, factor, written).mean(), 4)})
        for other in (SETTINGS[0], SETTINGS[2]):
            compared.append((factor, other, right[SETTINGS[1]] - right[other]))
    draws = enough(2000, len(compared))
    decided = decide([paired_of(mean_of(each), len(drawn), resamples=draws, seed=0) for *_, each in compared])
    found = {
        "command": "LLMREC_DATA=FOLDER python -m eval.benchmarks.factor_questions eval/results/factor_questions.json "
        f"--films {given.films} --tokens {given.tokens} --factors {' '.join(given.factors)}",
        "model": MODEL,
        "films": len(drawn),
        "tokens": given.tokens,
        "rows": rows,
        "pairs": [
            {"factor": factor, "a": SETTINGS[1], "b": other, **asdict(each)}
            for (factor, other, _), each in zip(compared, decided, strict=True)
        ],
        "seconds": round(time.perf_counter() - begin, 1),
        **provenance(),
        "machine": {**machine(), "threads": torch.get_num_threads()},
    }
    write_json(given.target, found)


if __name__ == "__main__":
    main()
