"""The options of `llmrec chat`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import About, ModelOptions

RULES = "rules"
"""The manager that uses no model."""
MOST = 50
"""Maximum length of a list, as in `llmrec.chat.calls.Show`."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions(ModelOptions):
    """A recommender for a conversation, and its manager."""

    model: Annotated[
        str, About(argument=True, metavar="RUN", help="A run folder, or an exported folder with its interactions.")
    ]
    models: Annotated[
        tuple[str, ...],
        About(
            names=("--models",),
            metavar="NAME",
            help="What ranks: tuned, fusion, a baseline or another run; the run's default.",
        ),
    ] = ()
    manager: Annotated[
        str, About(metavar="rules|MODEL", help="Who chooses the tools: rules, or a language model by folder or name.")
    ] = RULES
    encoder: Annotated[
        str | None,
        About(metavar="NAME", help="A text encoder, or a folder of --learn: search compares meanings too."),
    ] = None
    ranker: Annotated[
        str | None, About(metavar="MODEL", help="A language model, by folder or name, that also orders and explains.")
    ] = None
    k: Annotated[int, About(least=1, most=MOST, help="Items of a list.")] = 5
    save: Annotated[Path | None, About(metavar="FILE", help="Write a transcript, as JSON lines.")] = None
    replay: Annotated[
        Path | None, About(metavar="FILE", help="Hold a transcript's conversations again; 1 where an answer differs.")
    ] = None
    simulate: Annotated[
        int | None, About(least=1, metavar="N", help="Hold N conversations with simulated users, who know no title.")
    ] = None
    seed: Annotated[int, About(least=0, help="Of the simulated users.")] = 0
    learn: Annotated[
        Path | None, About(metavar="FOLDER", help="Learn a dual encoder from them, over --encoder, for --encoder.")
    ] = None
    tune: Annotated[
        Path | None, About(metavar="RECIPE", help="Tune its model to choose the tools, on --simulate or --replay.")
    ] = None
    calls: Annotated[bool, About(help="Also print the calls and the seconds of each answer.")] = False
