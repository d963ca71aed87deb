"""What `llmrec tune` is asked for: a recipe, which keys may take which values, and how long it may take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import About


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """A recipe, the keys that are searched, and a budget."""

    recipe: Annotated[str, About(argument=True, metavar="RECIPE", help="The recipe, such as recipes/quickstart.yaml.")]
    over: Annotated[
        tuple[str, ...],
        About(
            metavar="KEY=VALUES",
            help="A key and its values: 1e-4..1e-3 (a range; on a log scale from a factor of 10 on) or 8,16,32.",
        ),
    ]
    overrides: Annotated[
        tuple[str, ...], About(names=("--set",), metavar="KEY=VALUE", help="A key of the recipe that stays as it is.")
    ] = ()
    budget: Annotated[str, About(metavar="TIME", help="Wall time of this call, such as 90s, 30m or 2h.")] = "2h"
    trials: Annotated[int | None, About(least=1, help="Trials in all; default: as many as the budget allows.")] = None
    metric: Annotated[
        str | None,
        About(
            metavar="FAMILY/METRIC",
            help="What decides, on validation users; default: the headline metric of the first of the recipe's "
            "families, in the order rating, sequential, direct, explanation, alignment, ctr, review, stars.",
        ),
    ] = None
    out: Annotated[Path | None, About(help="The folder of trials; runs/<name>-tune by default.")] = None
