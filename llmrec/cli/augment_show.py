"""What texts would cost, and what came out."""

from __future__ import annotations

from llmrec.cli.show.console import say, show, tell
from llmrec.data.features import PLURALS, FeatureStore
from llmrec.pipeline import augmenting
from llmrec.recipe.schema import Recipe

_SHOWN = 3


def show_plan(recipe: Recipe) -> None:
    """Print what texts would cost, and a prompt of each kind."""
    planned = augmenting.plan(recipe)
    for asked in planned.asked.values():
        for each in asked[:1]:
            say("\n".join(message.text for message in each.prompt.messages) + "\n")
    assert recipe.augment is not None
    show("augment", augmenting.estimate(planned, recipe.augment))


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
