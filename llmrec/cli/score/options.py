"""What `llmrec score` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import About
from llmrec.recipe.shared import CUTOFFS, RESAMPLES


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """One or two files of ranked lists, and what is relevant."""

    ranked: Annotated[
        tuple[Path, ...], About(argument=True, metavar="RANKED [OTHER]", help="Ranked lists; of two, how they differ.")
    ] = ()
    truth: Annotated[Path, About(help="What is relevant: a table with a user and an item a row, or TREC qrels.")]
    user: Annotated[str | None, About(metavar="COLUMN", help="Column of the user; default: known by its name.")] = None
    item: Annotated[str | None, About(metavar="COLUMN", help="Column of the item; default: known by its name.")] = None
    k: Annotated[str, About(metavar="K,K", help="Ranks at which metrics are cut.")] = ",".join(map(str, CUTOFFS))
    graded: Annotated[bool, About(help="NDCG takes the truth's relevance for its gain, as trec_eval does.")] = False
    planned: Annotated[
        str | None, About(metavar="METRIC", help="Of two: the metric that they were to be compared on; it is tested.")
    ] = None
    resamples: Annotated[int, About(least=1, help="Of the bootstrap over users.")] = RESAMPLES
    seed: Annotated[int, About(help="Of the resamples.")] = 0
