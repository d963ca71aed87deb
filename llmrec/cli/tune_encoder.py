"""The command `llmrec tune-encoder`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import About
from llmrec.cli.console import say, store_facts
from llmrec.cli.options import RecipeOptions


@dataclass(frozen=True, kw_only=True)
class TuneEncoderOptions(RecipeOptions):
    """A recipe, the encoder to begin from, and the folder to write."""

    out: Annotated[Path, About(metavar="FOLDER", help="The folder to write.")]
    encoder: Annotated[str, About(metavar="NAME", help="The text encoder to begin from: a name or a folder.")] = (
        "all-MiniLM-L6-v2"
    )


def tune_encoder(options: TuneEncoderOptions) -> None:
    """Fine-tune a text encoder on a recipe's interactions.

    It learns which items follow each other in training. The folder can stand wherever a recipe names an encoder, with
    the same data and seed: `transitions-text`, `content`, `tower`, semantic IDs and item tokens. Rows that use it count
    as language models.
    """
    from llmrec.baselines.pairs import TransitionsTunedConfig
    from llmrec.pipeline.encoder_tuning import tune_encoder as tune
    from llmrec.recipe.load import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    facts = tune(recipe, options.out, TransitionsTunedConfig(encoder=options.encoder))
    store_facts(folder=options.out, **facts)
    say(f"encoder: {options.out}, tuned on {facts['interactions']:,} interactions of {facts['data']}")
