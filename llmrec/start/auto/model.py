"""The language model of `llmrec auto`: whether the budget allows it, how it is tuned, and whether it is kept."""

from __future__ import annotations

from dataclasses import dataclass

from llmrec.recipe.load import as_recipe
from llmrec.recipe.schema import AUTO, Recipe
from llmrec.report.wording import duration, with_interval
from llmrec.results import Results
from llmrec.start.init.plan import BATCH_TOKENS, TRAIN_SPEED

MODEL = "with-model"
"""Folder, inside that of the run, of the run with a tuned language model."""

# Users of validation and of test that the language model is asked about.
_USERS = 200
# Tokens below which a tuned model of 135 M parameters did not reach a Markov chain on any data set of docs/log.md.
_LEAST_TOKENS = 1_000_000
# Tokens a second in training, and seconds that a search of the catalogue takes, by device: two cores; one H100.
_TRAINS = {"cpu": TRAIN_SPEED, "cuda": 20_000.0}
_ASKS = {"cpu": 1.5, "cuda": 0.1}
_START = 60.0
# Of the budget, the most that the language model may have.
_SHARE = 0.5


@dataclass(frozen=True)
class Plan:
    """Whether a language model is tuned.

    Attributes:
        steps: Of training; 0: none is tuned.
        seconds: What tuning and asking it takes.
        told: A line that says so, and why.
    """

    steps: int
    seconds: float
    told: str


NONE = Plan(0, 0.0, "no language model: --classic")
"""What is planned where none is wanted."""


@dataclass(frozen=True)
class Judged:
    """What validation users say of a fusion with the tuned model: ``kept`` where they lose without it."""

    kept: bool
    sentence: str


def plan(budget: float, *, titles: bool, device: str | None) -> Plan:
    """Return the training that a budget allows.

    Args:
        budget: Seconds in all.
        titles: Items have titles, which the model reads and writes.
        device: What it runs on; None: nothing to train it with is installed.
    """
    if not titles:
        return Plan(0, 0.0, "no language model: the items have no titles that it could read")
    if device not in _TRAINS:
        return Plan(0, 0.0, "no language model: nothing to train one with is installed (pip install 'llmrec[train]')")
    asking = _START + 2 * _USERS * _ASKS[device]
    least = asking + _LEAST_TOKENS / _TRAINS[device]
    allowed = budget * _SHARE
    if allowed < least:
        need = duration(least / _SHARE)
        return Plan(0, 0.0, f"no language model: to tune one until it could help takes a budget of {need} here")
    steps = int((allowed - asking) * _TRAINS[device] / BATCH_TOKENS)
    return Plan(steps, allowed, f"a language model has the last {duration(allowed)} of the budget")


def with_model(recipe: Recipe, planned: Plan) -> Recipe:
    """Return a recipe of classic recommenders with a language model that is tuned and joined with them."""
    page = recipe.model_dump(mode="json")
    page["train"] = {
        "steps": planned.steps,
        "batch_tokens": BATCH_TOKENS,
        "learning_rate": 1e-3,
        "valid_every": max(1, planned.steps // 8),
        "save_every": max(1, planned.steps // 8),
    }
    page["eval"] |= {
        "arms": ["tuned"],
        "users": _USERS,
        "backend": AUTO,
        "fusion": page["eval"]["fusion"] | {"model_users": _USERS, "arms": ["tuned"]},
    }
    return as_recipe(page)


def judged(results: Results) -> Judged:
    """Say whether the fusion of classic recommenders gains from the tuned model, by validation users alone."""
    joined = [row for row in results.rows if row.arm == "tuned" and row.fusion is not None]
    models = {row.predictor for row in results.rows if row.arm == "tuned" and row.fusion is None}
    parts = [part for row in joined if row.fusion for part in row.fusion.parts if part.name in models]
    if not parts or parts[0].loss is None:
        return Judged(False, "The tuned language model is not kept: the fusion gives it no weight.")
    part = parts[0]
    figure = with_interval(part.loss, part.loss_low, part.loss_high, sign=True)
    if (part.loss_low or 0.0) > 0:
        return Judged(True, f"The tuned language model is kept: it brings {figure} on validation users.")
    return Judged(False, f"The tuned language model is not kept: it brings {figure} on validation users.")
