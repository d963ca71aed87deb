"""Builds the training objectives of a recipe: losses, rewards, and the metric that selects a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from llmrec import processes
from llmrec.backends.encode import Encoder, TokenRow
from llmrec.backends.hf.backend import HFBackend
from llmrec.baselines.fits import fit_baseline
from llmrec.baselines.parameters import stops_early
from llmrec.data.split import split_validation_users
from llmrec.ensembles.members import (
    ENSEMBLE_NAMES,
    RANDOM_BASELINE,
    PrecomputedMember,
    baseline_reads,
    baseline_score_scale,
    combined_reads,
)
from llmrec.errors import DataError, RecipeError
from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.predictor import evaluate
from llmrec.models.soft_prompt import TIED_METHODS
from llmrec.models.tensors import base_of
from llmrec.pipeline.row_specs import protocol_of
from llmrec.pipeline.study import Study, build_candidate_sets, build_task
from llmrec.pipeline.weighing import EnsembleUsers, ensemble_kinds, fit_task_ensemble
from llmrec.recipe.schema import SOFT_PROMPT_METHODS, RewardSection
from llmrec.registry import BASELINES, import_component, strategy_eval_options
from llmrec.strategies.asking import Prompting, create_strategy
from llmrec.tasks.cases import cases_of_first_users
from llmrec.tasks.family import family_of
from llmrec.tasks.rating import RatingTask, is_training_only
from llmrec.tasks.rows import Listwise
from llmrec.tasks.task import Task
from llmrec.train.batches import AnswerLabels, RatingClasses, plan_steps
from llmrec.train.reward.rewards import Rewards, closing_token_count, training_question
from llmrec.train.rows import common_listwise_settings
from llmrec.train.steps import TrainingPlan
from llmrec.types import Case, CatalogueScorer, Predictor, Probability, Ranking, Rating, Request

if TYPE_CHECKING:
    import torch

    from llmrec.decode.token_tree import TokenTrie
    from llmrec.train.reward.objective import RewardObjective


def rating_head_classes(study: Study, encoder: Encoder, *, paired: bool = False) -> RatingClasses | None:
    """Return the classes of the rating head, if the recipe trains one."""
    rating = study.recipe.tasks.rating
    if rating is None or rating.head is None:
        return None
    if paired:
        raise RecipeError(
            f"tasks.rating.head: {study.recipe.model.name} is an encoder-decoder, and rating heads need a decoder; "
            "drop the section and 'head' from tasks.rating.strategies, or choose another model",
            kind="unsupported",
            column="tasks.rating.head",
        )
    task = study.tasks["rating"]
    assert isinstance(task, RatingTask)
    if other := [template.id for template in task.training_templates if is_training_only(template)]:
        raise RecipeError(
            f"tasks.rating.templates: {other[0]} has yes/no answers, but tasks.rating.head is trained only on "
            "ratings; remove the template, or drop tasks.rating.head",
            kind="contradiction",
            column="tasks.rating.templates",
        )
    return RatingClasses(encoder, task.scale)


def listwise_settings(study: Study, *, paired: bool = False) -> Listwise | None:
    """Return the listwise or preference loss of the recipe, or None."""
    tasks, recipe = {family: study.training_tasks[family] for family in study.shares}, study.recipe
    refused = recipe.model.name if paired else None
    result = common_listwise_settings(tasks, preference=recipe.train.preference is not None, paired=refused)
    if result is not None and recipe.train.exits:
        raise RecipeError(
            "train.exits: losses over candidates are computed only at the last layer; set tasks.<family>.loss=answer "
            "and train.preference=null, or drop train.exits",
            kind="contradiction",
            column="train.exits",
        )
    if recipe.train.teacher is not None and (result is not None or paired):
        what = (
            f"{recipe.model.name} is an encoder-decoder"
            if paired
            else "the loss over candidates is not a loss over tokens"
        )
        raise RecipeError(
            f"train.teacher: {what}; distillation needs a decoder and tasks.<family>.loss=answer",
            kind="contradiction",
            column="train.teacher",
        )
    return result


def answer_labels(study: Study, encoder: Encoder, *, paired: bool = False) -> AnswerLabels | None:
    """Return the answer labels of training examples, if the recipe trains soft prompts."""
    train = study.recipe.train
    if train.method not in SOFT_PROMPT_METHODS:
        return None
    tied, lists = train.method in TIED_METHODS, listwise_settings(study, paired=paired) is not None
    if paired or (tied and lists):
        what = (
            f"{study.recipe.model.name} is an encoder-decoder"
            if paired
            else "the loss over candidates is not a loss over labels"
        )
        raise RecipeError(
            f"train.method: {what}, but {train.method} needs a decoder that is trained on "
            f"{'labels' if tied else 'tokens'}; set train.method=lora",
            kind="contradiction",
            column="train.method",
        )
    labels = AnswerLabels(encoder, limit=train.soft.prompts, tied=tied)
    if tied:
        family, *others = study.shares
        if others:
            raise RecipeError(
                f"train.method: {train.method} supports one task with labels, but {family} and {', '.join(others)} "
                "are trained; set train.only to one task",
                kind="contradiction",
                column="train.method",
            )
        for text in _label_answers(study, family):
            labels.add(encoder.piece(text))
    return labels


def _label_answers(study: Study, family: str) -> Iterator[str]:
    """Yield all possible answers of a task whose answers are ratings or probabilities."""
    if family_of(family).answer not in (Rating, Probability):
        return
    task, anybody = study.tasks[family], Request(id="labels", user_id="")
    for template in task.training_templates:
        if not (isinstance(task, RatingTask) and is_training_only(template)):
            yield from (text + template.tail for text in task.continuations(anybody, template=template.name))


# Number of consecutive examples that are too long after which training stops with an error.
_MAX_CONSECUTIVE_DROPPED = 2000


def check_dropped_examples(consecutive: int, what: str, limit: int) -> None:
    """Reject a limit on tokens that too many consecutive examples exceed."""
    if consecutive > _MAX_CONSECUTIVE_DROPPED:
        raise RecipeError(
            f"train.max_row_tokens={limit}: {_MAX_CONSECUTIVE_DROPPED} consecutive {what} were longer; raise "
            "train.max_row_tokens, or show less history",
            kind="too-large",
            column="train.max_row_tokens",
        )


# --------------------------------------------------------------------------- rewards


def reward_family(study: Study, *, paired: bool) -> str:
    """Return the task that is trained with reinforcement learning."""
    section = _reward_section(study)
    (family, *others) = study.shares
    why = ""
    if paired:
        why = f"{study.recipe.model.name} is an encoder-decoder, which is not supported; choose a decoder"
    elif processes.process_count() > 1:
        why = "rollouts need a single process; start the training without --launch"
    elif others:
        why = f"it supports one task, but {family} and {', '.join(others)} are trained; set train.only to one task"
    elif not family_of(family).ranks_for_users:
        why = f"tasks.{family} does not rank items for users; set train.only=[sequential]"
    elif not study.tasks[family].writes_alike(study.tasks[family].eval_templates[0]):
        why = f"answers of tasks.{family} contain more than an item; choose another first template"
    elif "prefix" in section.kind and study.index is None:
        why = "kind=prefix compares item codes, but the recipe has no index; set index.scheme, or choose another kind"
    elif section.baseline is not None and not hasattr(
        import_component(BASELINES, section.baseline, "baseline"), "scores"
    ):
        why = (
            f"the baseline {section.baseline} does not score the whole catalogue; choose another baseline, such as ease"
        )
    elif section.baseline is not None and stops_early(section.baseline):
        why = (
            f"the baseline {section.baseline} uses the validation split for early stopping, so it cannot provide a "
            "reward; choose another baseline, such as ease"
        )
    if why:
        raise RecipeError(f"train.reward: {why}", kind="contradiction", column="train.reward")
    return family


def plan_reward_training(study: Study, encoder: Encoder, valid: Mapping[str, list[TokenRow]]) -> TrainingPlan:
    """Group training prompts into the optimiser steps of the recipe.

    The size of a question includes the tokens of its rollouts.
    """
    section, train, (family,) = _reward_section(study), study.recipe.train, valid
    task = study.training_tasks[family]
    template = task.eval_templates[0]
    behind = section.group * _catalogue_trie(study, encoder, family).depth
    cases: list[Case] = []
    dropped = 0

    def rows() -> Iterator[TokenRow]:
        nonlocal dropped
        since = 0
        for case in task.training_cases():
            row = encoder.row(training_question(task, case, template))
            if len(row.ids) > train.max_row_tokens:
                dropped, since = dropped + 1, since + 1
                check_dropped_examples(since, f"prompts of tasks.{family}", train.max_row_tokens)
                continue
            since = 0
            cases.append(case)
            yield row

    count = -(-train.steps // section.updates)
    steps = plan_steps(rows(), steps=count, batch_tokens=train.batch_tokens, seed=study.training_seed, behind=behind)
    total = sum(len(numbers) for numbers in steps.numbers())
    return TrainingPlan(steps, {family: total}, {family: dropped}, valid, {family: 1.0}, cases)


def reward_objective(study: Study, encoder: Encoder, planned: TrainingPlan) -> RewardObjective:
    """Return the reinforcement-learning objective for the planned training prompts."""
    from llmrec.train.reward.objective import RewardObjective

    section, (family,) = _reward_section(study), planned.rows
    catalogue = _catalogue_trie(study, encoder, family)
    scorer: CatalogueScorer | None = None
    if section.baseline is not None:
        scorer = fit_baseline(section.baseline, {}, study.task_data(family), seed=study.training_seed)
    task = study.training_tasks[family]
    closing = closing_token_count(catalogue) if "prefix" in section.kind else 0
    rewards = Rewards(section.kind, task, task.catalogue, catalogue, closing, scorer)
    pad = encoder.tokenizer.pad_token_id
    seed, limit = study.training_seed, study.recipe.train.micro_tokens
    return RewardObjective(planned.steps, planned.cases, section, rewards, pad=pad, seed=seed, limit=limit)


def _reward_section(study: Study) -> RewardSection:
    section = study.recipe.train.reward
    assert section is not None
    return section


def _catalogue_trie(study: Study, encoder: Encoder, family: str) -> TokenTrie:
    """Return the token sequences of all items, as written by the first evaluation template."""
    task = study.training_tasks[family]
    template = task.eval_templates[0]
    anybody = Request(id="catalogue", user_id="")
    stop = task.prompt(anybody, template=template).stop
    return encoder.catalogue(task.continuations(anybody, template=template), stop)


# --------------------------------------------------------------------------- checkpoint selection


METRIC = "NDCG@10"


def trained_ranking_families(study: Study) -> list[str]:
    """Return the trained tasks that rank items for users, which can be evaluated during training."""
    return [family for family in study.tasks if family in study.shares and family_of(family).ranks_for_users]


def checkpoint_selection_users(study: Study) -> frozenset[str]:
    """Return the validation users on which a model is evaluated during training."""
    section, able = study.recipe.train.judge, trained_ranking_families(study)
    if section is None or not able:
        return frozenset()
    choosing = split_validation_users(study.data, study.recipe.eval.fusion.reserved)[0].holdouts("valid")
    return frozenset(choosing.first_users(section.users, but=study.set_aside(able[0])))


@dataclass(frozen=True)
class CheckpointEvaluator:
    """Evaluates a model in training on the validation cases of one task.

    Attributes:
        study: The study, with the candidate sets of its validation split.
        family: The first family that is trained and ranks items for users.
        task: Its task over these sets.
        cases: The cases of the validation users for model selection, none of whom weighs an ensemble.
        encoder: The tokenizer of the model.
    """

    study: Study
    family: str
    task: Task
    cases: Sequence[Case]
    encoder: Encoder

    @staticmethod
    def of(study: Study, encoder: Encoder) -> CheckpointEvaluator | None:
        """Return the `CheckpointEvaluator` of a recipe; None if the recipe does not evaluate during training."""
        section = study.recipe.train.judge
        if section is None:
            return None
        rating = study.recipe.tasks.rating
        able = trained_ranking_families(study)
        if not able or (rating is not None and rating.head is not None):
            raise RecipeError(
                "train.judge: early stopping needs a ranking task, but none is trained; train sequential or direct, "
                "without tasks.rating.head, or drop train.judge",
                kind="contradiction",
                column="train.judge",
            )
        family, data, users = able[0], study.data, checkpoint_selection_users(study)
        valid_study = replace(study, candidates=build_candidate_sets(study.recipe, data, "valid", users))
        task = build_task(valid_study, family, study.section(family), study.templates[family], study.recipe.seed)
        cases = cases_of_first_users(task.cases("valid"), None, among=users)
        if not cases:
            raise DataError(
                f"{data.dataset.name}: the validation split has no cases of tasks.{family}, which train.judge needs; "
                "hold out validation users, or drop train.judge",
                kind="empty",
                at=data.dataset.name,
                column="train.judge",
            )
        return CheckpointEvaluator(valid_study, family, task, cases, encoder)

    def model(self, model: torch.nn.Module) -> float:
        """Compute NDCG@10 of the model in training with the first strategy of the task."""
        section = self.study.recipe.eval
        # Adapters are part of the model's modules, so the backend needs no change.
        live = base_of(model)
        asker = Prompting(
            backend=HFBackend(live, self.encoder, batch_tokens=section.batch_tokens),
            task=self.task,
            template=self.task.eval_templates[0],
            batch=section.batch,
        )
        name = self.study.section(self.family).strategies[0]
        options = strategy_eval_options(name, section) | dict(self.task.strategy_options)
        return self.figure(create_strategy(name, asker, **options))

    def figure(self, predictor: Predictor) -> float:
        """Compute NDCG@10 of a predictor."""
        result = evaluate(predictor, self.cases, name=self.family, kind=Ranking, protocol=self._protocol)
        value = result.figures.metrics[METRIC].value
        assert value is not None
        return value

    def controls(self) -> dict[str, float]:
        """Compute NDCG@10 of the task's baselines and ensembles, by name."""
        weighing = EnsembleUsers(self.study)
        weighers = weighing.cases(self.family)
        data, result, parts = self.study.task_data(self.family), {}, []
        for section in self.study.baselines(self.family):
            used = weighing.choosing(section.name, data)
            predictor = fit_baseline(section.name, section.parameters, used, seed=self.study.recipe.seed)
            result[section.label] = self.figure(predictor)
            if section.name != RANDOM_BASELINE:
                requests = [case.request for case in (*weighers, *self.cases)]
                answers = dict(zip([request.id for request in requests], predictor.answer(requests), strict=True))
                reads = baseline_reads(section.name, section.parameters)
                seen = frozenset(getattr(predictor, "looked_at", ()))
                parts.append(PrecomputedMember(section.label, reads, baseline_score_scale(section.name), answers, seen))
        for kind in ensemble_kinds(self.study, self.family) if weighers else ():
            able = [part for part in parts if combined_reads([part.reads, kind]) == kind]
            joined = fit_task_ensemble(self.study, self.family, ENSEMBLE_NAMES[kind], able, weighers, weighers)
            result[ENSEMBLE_NAMES[kind]] = self.figure(joined)
        return result

    @cached_property
    def _protocol(self) -> EvalProtocol:
        return replace(protocol_of(self.study, self.family), cutoffs=(10,), resamples=1)
