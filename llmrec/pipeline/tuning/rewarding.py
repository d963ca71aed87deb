"""Learning from reward in a run: which family it asks about, its questions as planned steps, and what rollouts earn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from llmrec import processes
from llmrec.backends.encode import Encoder, TokenRow
from llmrec.baselines.fits.fitting import fitted
from llmrec.baselines.parameters import stops_early
from llmrec.errors import RecipeError
from llmrec.pipeline.study import Study
from llmrec.recipe.schema import RewardSection
from llmrec.registry import BASELINES, lookup
from llmrec.tasks.family import family_of
from llmrec.train.batches import plan
from llmrec.train.reward.questions import question
from llmrec.train.reward.rewards import Rewards, closing_of
from llmrec.train.steps import Plan
from llmrec.types import Case, CatalogueScorer, Request

if TYPE_CHECKING:
    from llmrec.decode.token_tree import Catalogue
    from llmrec.train.reward.objective import RewardObjective

# Questions in a row that are too long before training gives up.
_PATIENCE = 2000


def rewarded(study: Study, *, paired: bool) -> str:
    """Return the family whose questions are answered by rollouts.

    Raises:
        RecipeError: If it is not one alone that asks for items of the catalogue, or the model or recipe does not allow
            for rollouts.
    """
    section = _section(study)
    (family, *others) = study.shares
    why = ""
    if paired:
        why = f"{study.recipe.model.name} is an encoder-decoder, whose rollouts are not packed; choose another model"
    elif processes.size() > 1:
        why = "its rollouts are drawn by one process; start the training without --launch"
    elif others:
        why = f"it trains one family, and these are {family} and {', '.join(others)}; name one in train.only"
    elif not family_of(family).ranks_for_users:
        why = f"tasks.{family} ranks no items for users; train sequential alone (train.only)"
    elif not study.tasks[family].writes_alike(study.tasks[family].eval_templates[0]):
        why = f"the answers of tasks.{family} are not items of the catalogue alone; choose another template first"
    elif "prefix" in section.kind and study.index is None:
        why = "kind=prefix compares codes, and this recipe has no index; set index.scheme, or choose another kind"
    elif section.baseline is not None and not hasattr(lookup(BASELINES, section.baseline, "baseline"), "scores"):
        why = f"the baseline {section.baseline} does not score the whole catalogue; choose another, such as ease"
    elif section.baseline is not None and stops_early(section.baseline):
        why = (
            f"the baseline {section.baseline} chooses its epoch on the validation split, on which no reward may "
            "depend; choose another, such as ease"
        )
    if why:
        raise RecipeError(f"train.reward: {why}", kind="contradiction", column="train.reward")
    return family


def plan_questions(study: Study, encoder: Encoder, valid: Mapping[str, list[TokenRow]]) -> Plan:
    """Cut training questions into steps, as many as the recipe's optimiser steps need.

    A question counts with the tokens that its rollouts will add.

    Args:
        study: The study.
        encoder: The tokenizer.
        valid: Validation rows of the one family that is trained.

    Raises:
        RecipeError: If no question fits ``train.max_row_tokens``.
    """
    section, train, (family,) = _section(study), study.recipe.train, valid
    task = study.training_tasks[family]
    template = task.eval_templates[0]
    behind = section.group * _catalogue(study, encoder, family).depth
    cases: list[Case] = []
    dropped = 0

    def rows() -> Iterator[TokenRow]:
        nonlocal dropped
        since = 0
        for case in task.training_cases():
            row = encoder.row(question(task, case, template))
            if len(row.ids) > train.max_row_tokens:
                dropped, since = dropped + 1, since + 1
                if since > _PATIENCE:
                    raise RecipeError(
                        f"train.max_row_tokens={train.max_row_tokens}: {_PATIENCE} questions of tasks.{family} in a "
                        "row were longer; raise it, or show less history",
                        kind="too-large",
                        column="train.max_row_tokens",
                    )
                continue
            since = 0
            cases.append(case)
            yield row

    count = -(-train.steps // section.updates)
    steps = plan(rows(), steps=count, batch_tokens=train.batch_tokens, seed=study.training_seed, behind=behind)
    asked = sum(len(numbers) for numbers in steps.numbers())
    return Plan(steps, {family: asked}, {family: dropped}, valid, {family: 1.0}, cases)


def objective_of(study: Study, encoder: Encoder, planned: Plan) -> RewardObjective:
    """Return what makes the loss of planned questions.

    Raises:
        DataError: If two items are written alike.
    """
    from llmrec.train.reward.objective import RewardObjective

    section, (family,) = _section(study), planned.rows
    catalogue = _catalogue(study, encoder, family)
    scorer: CatalogueScorer | None = None
    if section.baseline is not None:
        scorer = fitted(section.baseline, {}, study.task_data(family), seed=study.training_seed)
    task = study.training_tasks[family]
    closing = closing_of(catalogue) if "prefix" in section.kind else 0
    rewards = Rewards(section.kind, task, task.catalogue, catalogue, closing, scorer)
    pad = encoder.tokenizer.pad_token_id
    return RewardObjective(planned.steps, planned.cases, section, rewards, pad=pad, seed=study.training_seed)


def _section(study: Study) -> RewardSection:
    section = study.recipe.train.reward
    assert section is not None
    return section


def _catalogue(study: Study, encoder: Encoder, family: str) -> Catalogue:
    """Return the paths of all items, as the first template of evaluation writes them."""
    task = study.training_tasks[family]
    template = task.eval_templates[0]
    anybody = Request(id="catalogue", user_id="")
    stop = task.prompt(anybody, template=template).stop
    return encoder.catalogue(task.continuations(anybody, template=template), stop)
