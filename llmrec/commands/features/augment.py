"""`llmrec augment`: what it would cost, and what came out."""

from __future__ import annotations

from pathlib import Path

from llmrec.commands.merge.app import refuse_both
from llmrec.commands.show.console import say, show, show_shard, tell
from llmrec.data.features import PLURALS, FeatureStore
from llmrec.errors import RecipeError
from llmrec.experiment import augmenting
from llmrec.experiment.study import folder_of
from llmrec.recipe.schema import Recipe
from llmrec.records import Shard

_SHOWN = 3


def run(
    recipe: Recipe, out: Path | None, shard: str | None, ray: str | None, *, dry_run: bool, without_model: bool
) -> None:
    """Write the features of a recipe or their control without a language model, or say what the first would cost."""
    if dry_run:
        planned = augmenting.plan(recipe)
        for asked in planned.asked.values():
            for each in asked[:1]:
                say("\n".join(message.text for message in each.prompt.messages) + "\n")
        assert recipe.augment is not None
        show("augment", augmenting.estimate(planned, recipe.augment))
        return
    folder = folder_of(recipe, None)
    if without_model:
        if shard is not None or ray is not None:
            raise RecipeError(
                "--shard and --ray share out questions, and --without-model asks none; drop one of them",
                kind="contradiction",
                column="--without-model",
            )
        show_texts(augmenting.without_model(recipe, out or folder / augmenting.CONTROL))
        return
    target = out or folder / augmenting.FEATURES
    refuse_both(shard, ray)
    if ray is not None:
        from llmrec.commands.cluster.actors import finish_on

        finish_on(ray, "augment", target, recipe)
        return
    if shard is not None:
        show_shard(augmenting.augment_shard(recipe, target, Shard.parse(shard)), target)
        return
    show_texts(augmenting.augment(recipe, target))


def show_texts(done: augmenting.Augmented) -> None:
    """Print some texts of a store that was made, and what they cost."""
    store = FeatureStore.open(done.folder)
    for kind in store.kinds:
        for name, text in list(store.texts(kind, store.ids(kind)[:_SHOWN]).items()):
            say(f"{kind} {name}: {text}")
    tell(texts=done.texts, cost=done.cost, seconds=done.seconds, store=done.folder)
    facts = {PLURALS[kind]: f"{count:,}" for kind, count in done.texts.items()}
    tokens = f"{done.cost.prompt_tokens:,} tokens read, {done.cost.completion_tokens:,} written"
    show("augment", {**facts, "cost": tokens, "seconds": f"{done.seconds:.0f}", "store": str(done.folder)})
