"""What a shard of an evaluation asks: its share of every row's cases; the answers stay in a store of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmrec.pipeline.engines import Engines
from llmrec.pipeline.evaluation import Evaluation
from llmrec.pipeline.resume import Budget, key_of
from llmrec.recipe.schema import Recipe
from llmrec.records import Shard
from llmrec.results import Arm

Weights = Mapping[Arm, tuple[str, str]]
"""Of each setting the model folder, and the hash of what lies in it."""


# Of a recipe: where things lie on a machine, and what the keys of rows say already, by content.
_PLACES: Any = {name: True for name in ("name", "model", "data", "reviews", "prompts", "ray")} | {"eval": {"server"}}


def answers_key(evaluation: Evaluation, weights: Weights, engines: Engines, recipe: Recipe) -> str:
    """Return a hash over all that decides what language models answer and what is made of it."""
    asked = evaluation.asked(weights, engines)
    rows = [evaluation.key(spec, engine, engines.identity(engine, digest)) for spec, engine, _, digest in asked]
    return key_of(rows=rows, recipe=recipe.model_dump(mode="json", exclude=_PLACES))


def ask(
    evaluation: Evaluation,
    weights: Weights,
    engines: Engines,
    shard: Shard,
    budget: Budget,
    *,
    batch: int,
    quiet: bool = False,
) -> None:
    """Ask language models one shard of all cases.

    A row is asked whole batches of its cases, so that the same questions are put together as in one process.

    Args:
        evaluation: All rows.
        weights: What answers.
        engines: Where backends come from; what their store holds is not asked again.
        shard: Which piece.
        budget: Where seconds are booked.
        batch: Cases handed to an engine at a time.
        quiet: Show no progress bars.
    """
    for spec, engine, folder, digest in evaluation.asked(weights, engines):
        backend = engines.get(engine, folder, digest)
        shares = [[case.request for case in shard.share(cases, batch)] for cases in evaluation.questions(spec)]
        with budget.stage(spec.arm), evaluation.progress(spec, shares, quiet) as bar:
            predictor = evaluation.strategy(spec, backend, bar.advance)
            for requests in filter(None, shares):
                predictor.answer(requests)
