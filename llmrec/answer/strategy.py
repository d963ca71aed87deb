"""Selects the task, the prompt template, and the strategy with its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl
from pydantic import ValidationError

from llmrec.data.dataset import SCHEMA, Dataset
from llmrec.data.split import SplitDataset
from llmrec.errors import RecipeError, did_you_mean
from llmrec.pipeline.bundle import Bundle
from llmrec.recipe.pages import parse_yaml_value
from llmrec.recipe.schema import EvalSection
from llmrec.registry import STRATEGIES, is_plugin, strategy_eval_keys, strategy_eval_options
from llmrec.tasks.direct import default_strategy_for, is_strategy_supported, raise_unsupported_strategy
from llmrec.tasks.family import Family, family_of, ranking_families
from llmrec.tasks.task import Task, TaskInputs
from llmrec.types import Item, ItemCodes, Ranking

TWO_STEP = "two-step"
"""The strategy that first generates a user profile, which its template must show."""

# Search settings that are also command-line options.
_COMMAND_OPTIONS: Mapping[str, str] = {"beams": "--beams", "exact": "--exact"}
_TITLE_STRATEGIES = ("likelihood", "likelihood-prior")
# The template whose profile suits any user.
_PROFILE_TEMPLATE = "with-profile"


@dataclass(frozen=True, slots=True)
class TaskStrategy:
    """A task, template and strategy, with the settings of the strategy.

    Attributes:
        family: A family of the bundle.
        template: The name of one of its templates.
        strategy: One of its strategies.
        asking: The recipe's eval section, with the settings of the strategy.
    """

    family: str
    template: str
    strategy: str
    asking: EvalSection = field(default_factory=EvalSection)

    @property
    def options(self) -> dict[str, Any]:
        """Settings of the strategy by name."""
        return strategy_eval_options(self.strategy, self.asking)

    @property
    def by_title(self) -> bool:
        """Whether each title is scored separately, so that long candidate lists can be split."""
        return not family_of(self.family).lists and self.strategy in _TITLE_STRATEGIES


def ranking_families_of(bundle: Bundle) -> list[str]:
    """Return the trained tasks of a model that rank items for users."""
    return [family for family in ranking_families() if family in bundle.tasks.present()]


def select_ranking_strategy(
    bundle: Bundle,
    *,
    task: str = "auto",
    template: str | None = None,
    strategy: str = "auto",
    settings: Sequence[str] = (),
) -> TaskStrategy:
    """Select a compatible task, template and strategy for a model.

    Of several families, sequential is preferred; the template is the one of the family's evaluation, and for two-step
    the first that shows a profile.

    Args:
        bundle: The model and its training prompts.
        task: A family, or ``auto``.
        template: ``family/name`` or the name; None: chosen automatically.
        strategy: A strategy, or ``auto``.
        settings: Settings of the strategy, such as ``eval.permutations=3``.
    """
    ranking = ranking_families()
    here = ranking_families_of(bundle)
    if not here:
        tuned = ", ".join(bundle.tasks.present())
        raise RecipeError(
            f"{bundle.folder} was tuned on {tuned}, which are not ranking tasks; tune on tasks.sequential or "
            "tasks.direct, or give a pretrained model with --model",
            kind="unsupported",
            at=bundle.folder,
        )
    strategies = [name for family in ranking for name in _supported_strategies(bundle, family)]
    check_known_name("task", task, ("auto", *ranking))
    check_known_name("strategy", strategy, ("auto", *strategies))
    templates = {family: bundle.templates[family] for family in here}
    if template is not None:
        check_known_name(
            "template", template.rpartition("/")[2], [name for known in templates.values() for name in known]
        )
    for family in here:
        fits = task in ("auto", family) and strategy in ("auto", *_supported_strategies(bundle, family))
        if fits and (template is None or _is_family_template(template, family, templates[family])):
            name = _select_template(bundle, family, strategy, template)
            chosen = _select_strategy(bundle, family, strategy, name)
            return TaskStrategy(family, name, chosen, parse_strategy_settings(chosen, settings))
    options = [f"--task {task}", f"--strategy {strategy}", f"--template {template}" if template else ""]
    known = "; ".join(
        f"{family} with {' or '.join(_supported_strategies(bundle, family))}, templates {', '.join(templates[family])}"
        for family in here
    )
    raise RecipeError(
        f"{' '.join(filter(None, options))} are incompatible; {bundle.folder} has {known}",
        kind="contradiction",
        at=bundle.folder,
    )


def _supported_strategies(bundle: Bundle, family: str) -> tuple[str, ...]:
    """Return the strategies of a task, including plug-in strategies that the run evaluated."""
    section = bundle.tasks.present().get(family)
    further = [name for name in section.strategies if is_plugin(STRATEGIES, name)] if section else []
    return (*family_of(family).strategies, *further)


def _select_strategy(bundle: Bundle, family: str, requested: str, template: str) -> str:
    """Return the requested strategy, or the first one that is compatible with the template."""
    known = family_of(family)
    if not known.lists:
        return known.strategies[0] if requested == "auto" else requested
    words = bundle.templates[family][template]
    if requested == "auto":
        return default_strategy_for(words)
    if not is_strategy_supported(words, requested):
        raise_unsupported_strategy(words, requested)
    return requested


def parse_strategy_settings(strategy: str, settings: Sequence[str]) -> EvalSection:
    """Validate the settings of a strategy, with the keys and checks of a recipe.

    Args:
        strategy: The name of the strategy.
        settings: ``key=value``, optionally with the prefix ``eval.``.
    """
    known = [key for key in strategy_eval_keys(strategy) if key not in _COMMAND_OPTIONS]
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        key = name.strip().removeprefix("eval.")
        if not equals or not key:
            raise RecipeError(
                f"--set {setting!r} is not key=value, such as eval.permutations=3",
                kind="syntax",
                column="--set",
            )
        if key in ("debias", "debias_questions"):
            raise RecipeError(
                f"--set eval.{key}: position bias is measured on training examples, which are not available here; "
                "average over candidate orders instead (--set eval.permutations=4)",
                kind="unsupported",
                column=f"eval.{key}",
            )
        if key in _COMMAND_OPTIONS:
            raise RecipeError(
                f"--set eval.{key}: use the option {_COMMAND_OPTIONS[key]} instead",
                kind="unsupported",
                column=f"eval.{key}",
            )
        if key not in known:
            takes = ", ".join(f"eval.{item}" for item in known) or "none"
            raise RecipeError(
                f"--set eval.{key}: not a setting of the strategy {strategy!r}{did_you_mean(key, known)}; its "
                f"settings: {takes}",
                kind="unknown-key",
                column=f"eval.{key}",
            )
        if key in values:
            raise RecipeError(f"--set eval.{key}: given twice; keep one value", kind="duplicate", column=f"eval.{key}")
        values[key] = parse_yaml_value(text, f"eval.{key}")
    try:
        return EvalSection(**values)
    except ValidationError as error:
        problems = validation_messages(error, "--set eval.")
        column = problems[0].removeprefix("--set ").partition(":")[0]
        raise RecipeError("; ".join(problems), kind="bad-value", column=column) from None


def validation_messages(error: ValidationError, prefix: str) -> list[str]:
    """Return messages about invalid values without the values, which may be secret."""
    results = []
    for detail in error.errors(include_input=False, include_url=False):
        message = str(detail["msg"]).removeprefix("Value error, ")
        where = ".".join(map(str, detail["loc"]))
        results.append(f"{prefix}{where}: {message[:1].lower()}{message[1:]}" if where else message)
    return results


def check_known_name(what: str, name: str, known: Sequence[str]) -> None:
    """Reject an unknown name."""
    if name not in known:
        names = ", ".join(dict.fromkeys(known))
        raise RecipeError(
            f"--{what}: unknown {what} {name!r}{did_you_mean(name, known)}; known: {names}",
            kind="unknown-name",
            column=f"--{what}",
        )


def _select_template(bundle: Bundle, family: str, strategy: str, requested: str | None) -> str:
    """Return the name of the requested template, or of the default template for the strategy."""
    known = bundle.templates[family]
    names: list[str] = [] if requested is None else [requested.rpartition("/")[2]]
    if requested is None:
        names = [items_only_task(bundle, family, {}, bundle.index).eval_templates[0]]
        names += [_PROFILE_TEMPLATE, *known] if strategy == TWO_STEP else []
    if strategy != TWO_STEP:
        return names[0]
    shows = [name for name in names if name in known and known[name].shows_profile]
    if not shows:
        could = ", ".join(name for name, item in known.items() if item.shows_profile) or "none"
        raise RecipeError(
            f"--template {requested}: two-step generates a user profile, but this template does not show profiles; use "
            f"one of {could}",
            kind="contradiction",
            at=bundle.folder,
            column="--template",
        )
    return shows[0]


def _is_family_template(template: str, family: str, known: Mapping[str, object]) -> bool:
    named, _, name = template.rpartition("/")
    return named in ("", family) and name in known


# --------------------------------------------------------------------------- one item


def item_families(bundle: Bundle) -> dict[str, Family]:
    """Return the trained tasks of a model that are about single items, by name."""
    results = {name: family_of(name) for name in bundle.tasks.present()}
    return {name: family for name, family in results.items() if family.answer is not Ranking}


def select_item_strategy(
    bundle: Bundle, family: str, *, template: str | None = None, strategy: str = "auto"
) -> TaskStrategy:
    """Select the template and strategy of a task, by default the first ones that the run evaluated.

    Args:
        bundle: The model and its training prompts.
        family: One of `item_families`.
        template: ``family/name`` or the name; None: chosen automatically.
        strategy: A strategy of the family, or ``auto``.
    """
    known = item_families(bundle)
    if family not in known:
        has = ", ".join(known) or "none"
        raise RecipeError(
            f"{bundle.folder} was not tuned on {family}; its tasks about one item: {has}. Tune it with tasks.{family}",
            kind="unsupported",
            at=bundle.folder,
            column="family",
        )
    task = items_only_task(bundle, family, {}, bundle.index)
    templates = bundle.templates[family]
    name = task.eval_templates[0] if template is None else template.rpartition("/")[2]
    check_known_name("template", name, list(templates))
    section = bundle.tasks.present()[family]
    strategies = task.asked_by(templates[name], section.strategies, tuned=bundle.tuned)
    check_known_name("strategy", strategy, ("auto", *known[family].strategies))
    return TaskStrategy(family, name, strategies[0] if strategy == "auto" else strategy)


# --------------------------------------------------------------------------- tasks


def items_only_task(bundle: Bundle, family: str, items: Mapping[str, Item], codes: ItemCodes | None = None) -> Task:
    """Return a task with these items and no interactions, which can only render prompts."""
    section = bundle.tasks.present()[family]
    data = items_only_data(bundle, items)
    inputs = TaskInputs(data=data, templates=bundle.templates[family], seed=bundle.seed, index=codes, learns=False)
    return family_of(family).task(section, inputs)


def items_only_data(bundle: Bundle, items: Mapping[str, Item]) -> SplitDataset:
    """Return data with these items and no interactions."""
    nothing = pl.DataFrame(schema=dict(SCHEMA))
    dataset = Dataset(
        name="requests", noun=bundle.noun, interactions=nothing, items=items, rating_scale=bundle.rating_scale
    )
    return SplitDataset(
        dataset=dataset,
        kind="requests",
        seed=bundle.seed,
        train=nothing,
        valid=nothing,
        test=nothing,
        held_out=frozenset(),
    )
