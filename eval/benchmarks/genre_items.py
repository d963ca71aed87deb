"""Writes the feature stores of ``eval/suites/genre-items.yaml``: titles with generated descriptions (GENRE).

``LLMREC_DATA=FOLDER python -m eval.benchmarks.genre_items`` reads FOLDER/goodreads/items.tsv from
`eval.benchmarks.goodreads_sequences`: titles, and one sentence each that GPT-3.5 wrote from the title alone (Liu et
al., WSDM 2024). It writes four stores of item features under ``runs/genre``: titles; titles with their
sentence; titles with the sentence of another book; sentences only. No text was generated from interactions.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from llmrec.augment.stores import features_from_texts
from llmrec.data.features import Provenance, publish
from llmrec.data.read.table import read_table

TARGET = Path("runs/genre")


def main() -> None:
    """Write the stores."""
    table = read_table(Path(os.environ.get("LLMREC_DATA", ".")) / "goodreads" / "items.tsv").frame
    ids, titles, descriptions = (table[name].to_list() for name in ("item_id", "title", "description"))
    drawn = np.random.default_rng(0).permutation(len(ids))
    other = dict(zip(drawn.tolist(), np.roll(drawn, 1).tolist(), strict=True))
    arms = {
        "title": titles,
        "title-and-sentence": [f"{title}. {text}" for title, text in zip(titles, descriptions, strict=True)],
        "title-and-other-sentence": [f"{title}. {descriptions[other[n]]}" for n, title in enumerate(titles)],
        "sentence": descriptions,
    }
    for name, texts in arms.items():
        generator = {} if name == "title" else {"model": "gpt-3.5, as published by ONCE"}
        source = Provenance(system="genre", generator=generator)
        publish(TARGET / name, [features_from_texts("item", dict(zip(ids, texts, strict=True)), provenance=source)])
        sys.stdout.write(f"{TARGET / name}\n")


if __name__ == "__main__":
    main()
