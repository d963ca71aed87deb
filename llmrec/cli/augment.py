"""The command `llmrec augment`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from llmrec.answer.options import OptionHelp
from llmrec.cli.console import say, show_shard, show_values, store_facts
from llmrec.cli.options import Ray, RecipeOptions, Shard, check_exclusive_options
from llmrec.errors import RecipeError
from llmrec.registry import extension_hook

if TYPE_CHECKING:
    from llmrec.pipeline.augmenting import AugmentResult
    from llmrec.recipe.schema import Recipe

_SHOWN_TEXTS = 3


@dataclass(frozen=True, kw_only=True)
class AugmentOptions(RecipeOptions):
    """Options of `llmrec augment`."""

    out: Annotated[
        Path | None, OptionHelp(help="Folder of the feature store. Default: features/ in the run folder.")
    ] = None
    dry_run: Annotated[bool, OptionHelp(help="Print the estimated cost and an example prompt; generate nothing.")] = (
        False
    )
    without_model: Annotated[
        bool,
        OptionHelp(
            help="Write a reference feature store without a language model. Default folder: control/ in the run folder."
        ),
    ] = False
    shard: Shard = None
    ray: Ray = None


def augment(options: AugmentOptions) -> None:
    """Generate texts of users and items with a language model.

    Stores the texts and their embeddings in a feature store. An interrupted call resumes. With data.split.kind=prefix,
    texts on users are written from interactions that no model is trained on.

    Example:
        llmrec augment recipes/movielens-100k/kar.yaml --dry-run
    """
    from llmrec import records
    from llmrec.pipeline import augmenting
    from llmrec.pipeline.study import resolve_run_folder
    from llmrec.recipe.load import load_recipe

    check_exclusive_options(options.shard, options.ray)
    if options.without_model and (options.shard, options.ray) != (None, None):
        raise RecipeError(
            "--without-model makes no model calls, so --shard and --ray do not apply; remove one of the options",
            kind="contradiction",
            column="--without-model",
        )
    recipe = load_recipe(options.recipe, options.overrides)
    folder = resolve_run_folder(recipe, None)
    target = options.out or folder / augmenting.FEATURES
    if options.dry_run:
        _show_plan(recipe)
    elif options.without_model:
        show_texts(augmenting.build_reference_store(recipe, options.out or folder / augmenting.CONTROL))
    elif options.ray is not None:
        extension_hook("recipe-on-ray")(options.ray, "augment", target, recipe)
    elif options.shard is not None:
        show_shard(augmenting.augment_shard(recipe, target, records.Shard.parse(options.shard)), target)
    else:
        show_texts(augmenting.augment(recipe, target))


def _show_plan(recipe: Recipe) -> None:
    """Print the estimated cost, and a prompt about a user and about an item."""
    from llmrec.pipeline import augmenting

    planned = augmenting.plan_texts(recipe)
    for questions in planned.asked.values():
        for question in questions[:1]:
            say("\n".join(message.text for message in question.prompt.messages) + "\n")
    assert recipe.augment is not None
    show_values("augment", augmenting.estimate_cost(planned, recipe.augment))


def show_texts(done: AugmentResult) -> None:
    """Print some texts of a new feature store, and their cost."""
    from llmrec.data.features import PLURALS, FeatureStore

    store = FeatureStore.open(done.folder)
    for kind in store.kinds:
        for name, text in list(store.texts(kind, store.ids(kind)[:_SHOWN_TEXTS]).items()):
            say(f"{kind} {name}: {text}")
    store_facts(texts=done.texts, cost=done.cost, seconds=done.seconds, store=done.folder)
    facts = {PLURALS[kind]: f"{count:,}" for kind, count in done.texts.items()}
    tokens = f"{done.cost.prompt_tokens:,} tokens read, {done.cost.completion_tokens:,} written"
    show_values("augment", {**facts, "cost": tokens, "seconds": f"{done.seconds:.0f}", "store": str(done.folder)})
