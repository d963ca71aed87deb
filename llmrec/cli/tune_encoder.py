"""The command `llmrec tune-encoder`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import OptionHelp
from llmrec.cli.console import say, store_facts
from llmrec.cli.options import RecipeOptions


@dataclass(frozen=True, kw_only=True)
class TuneEncoderOptions(RecipeOptions):
    """Options of `llmrec tune-encoder`."""

    out: Annotated[Path, OptionHelp(metavar="FOLDER", help="Output folder.")]
    encoder: Annotated[str, OptionHelp(metavar="NAME", help="Text encoder to start from: name or folder.")] = (
        "all-MiniLM-L6-v2"
    )


def tune_encoder(options: TuneEncoderOptions) -> None:
    """Fine-tune a text encoder on a recipe's interactions.

    The encoder learns which items follow each other in the training data. Use the folder wherever a recipe names a text
    encoder, with the same data and seed: `transitions-text`, `content`, semantic IDs and item tokens.

    Example:
        llmrec tune-encoder recipes/quickstart.yaml --out encoder
    """
    from llmrec.baselines.pairs import TransitionsTunedConfig
    from llmrec.pipeline.encoder_tuning import tune_encoder as tune
    from llmrec.recipe.load import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    facts = tune(recipe, options.out, TransitionsTunedConfig(encoder=options.encoder))
    store_facts(folder=options.out, **facts)
    say(f"encoder: {options.out}, fine-tuned on {facts['interactions']:,} interactions of {facts['data']}")
