"""The options of `llmrec chat`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import ModelOptions, OptionHelp

RULES_MANAGER = "rules"
"""The manager without a model."""
MAX_LIST_LENGTH = 50
"""Maximum length of a list, as in `llmrec.chat.calls.Show`."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions(ModelOptions):
    """Options of `llmrec chat`."""

    model: Annotated[
        str,
        OptionHelp(argument=True, metavar="RUN", help="Run folder, or an exported folder that includes interactions."),
    ]
    models: Annotated[
        tuple[str, ...],
        OptionHelp(
            names=("--models",),
            metavar="NAME",
            help="Model that ranks: tuned, fusion, a baseline or another run. Default: the default model of the run.",
        ),
    ] = ()
    manager: Annotated[
        str, OptionHelp(metavar="rules|MODEL", help="Dialogue manager: rules, or a language model (name or folder).")
    ] = RULES_MANAGER
    encoder: Annotated[
        str | None,
        OptionHelp(metavar="NAME", help="Text encoder (name, or folder written by --learn) for semantic search."),
    ] = None
    ranker: Annotated[
        str | None, OptionHelp(metavar="MODEL", help="Language model (name or folder) that reranks and explains items.")
    ] = None
    k: Annotated[int, OptionHelp(least=1, most=MAX_LIST_LENGTH, help="Number of items in a list.")] = 5
    save: Annotated[Path | None, OptionHelp(metavar="FILE", help="Write a transcript as JSON lines.")] = None
    replay: Annotated[
        Path | None,
        OptionHelp(metavar="FILE", help="Replay the conversations of a transcript. Exit code 1 if an answer differs."),
    ] = None
    simulate: Annotated[
        int | None,
        OptionHelp(
            least=1,
            metavar="N",
            help="Run N conversations with simulated users, who describe items without naming titles.",
        ),
    ] = None
    seed: Annotated[int, OptionHelp(least=0, help="Random seed of the simulated users.")] = 0
    learn: Annotated[
        Path | None,
        OptionHelp(
            metavar="FOLDER",
            help="Train a dual encoder on the simulated conversations, starting from --encoder. Output folder.",
        ),
    ] = None
    tune: Annotated[
        Path | None,
        OptionHelp(
            metavar="RECIPE",
            help="Fine-tune the recipe's model to select tools, on the conversations from --simulate or --replay.",
        ),
    ] = None
    calls: Annotated[bool, OptionHelp(help="Also print tool calls and the latency of each answer.")] = False
