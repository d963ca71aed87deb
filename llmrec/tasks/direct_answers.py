"""What a direct template asks for: a candidate's label, the item itself, or a yes or no; and what reads that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from string import ascii_uppercase
from typing import Literal

from llmrec.errors import RecipeError, did_you_mean
from llmrec.prompts.template import Template, load_templates
from llmrec.recipe.schema import PreferenceSection
from llmrec.registry import STRATEGIES, is_plugin, lookup
from llmrec.tasks.base import ABOUT_USER, USER_STATS, Values

Asks = Literal["label", "item", "yes"]

_WORDS: Mapping[Asks, str] = {
    "label": "answers with a candidate's label",
    "item": "answers with the item itself",
    "yes": "answers yes or no to one item",
}
# The one strategy for what is no label, and of those that read labels the first.
_READER: Mapping[Asks, str] = {"label": "label", "item": "likelihood", "yes": "pointwise-yes"}


def asks_for(template: Template) -> Asks:
    """Return what a template's target writes: ``{{ answer }}``, something of ``item``, or a label."""
    written = template.names("target")
    return "yes" if "answer" in written else "item" if "item" in written else "label"


def reader_of(template: Template) -> str:
    """Return the strategy that reads a template's answers; of several the cheapest."""
    return _READER[asks_for(template)]


def fits(template: Template, strategy: str) -> bool:
    """Whether a strategy of the direct family reads what a template asks for.

    ``pointwise-yes`` also takes templates of labels, where these have words for it. A plug-in says what it reads in its
    attribute ``reads``, of ``label``, ``item`` and ``yes``; labels by default.
    """
    if is_plugin(STRATEGIES, strategy):
        return asks_for(template) in getattr(lookup(STRATEGIES, strategy, "strategy"), "reads", ("label",))
    asks = asks_for(template)
    return strategy != _READER["item"] if asks == "label" else strategy == _READER[asks]


def check_words(template: Template) -> None:
    """Refuse variables that give the answer away or that nothing fills.

    Raises:
        RecipeError: If there are any, if the template is a list, or if it writes other words than yes and no.
    """
    if template.shape == "list":
        raise RecipeError(
            f"template {template.id}: direct templates ask for one answer; use shape: chat",
            kind="unsupported",
            at=template.id,
            column="shape",
        )
    asks, asked = asks_for(template), ABOUT_USER | {"history"}
    if asks == "yes":
        template.check(turns=asked | {"item", "item_id", "fields"}, lead=(), target={"answer"})
        words = (template.words.says_yes, template.words.says_no)
        if any(template.answer({"answer": word}).strip().casefold() != word.casefold() for word in words):
            raise RecipeError(
                f"template {template.id}: its target is another word than {' or '.join(words)}; write it with "
                "{{ answer }}",
                kind="bad-value",
                at=template.id,
                column="target",
            )
    elif asks == "item":
        template.check(turns=asked | USER_STATS | {"candidates"}, lead=(), target={"noun", "item"})
    else:
        asked |= USER_STATS | {"candidates", "want"}
        template.check(turns=asked, lead=(), target=asked | {"label"})


def check_strategies(templates: Sequence[Template], strategies: Sequence[str]) -> None:
    """Check that every template of the evaluation has a strategy that reads it, and every strategy a template.

    Raises:
        RecipeError: Naming the first of either that has none.
    """
    for template in templates if strategies else ():
        if not any(fits(template, strategy) for strategy in strategies):
            raise RecipeError(
                f"tasks.direct.strategies: {template.id} {_WORDS[asks_for(template)]}, and none of "
                f"{', '.join(strategies)} reads that; add {reader_of(template)}, or name another template in "
                "tasks.direct.eval_templates",
                kind="contradiction",
                at=template.id,
                column="tasks.direct.strategies",
            )
    for strategy in strategies:
        if not any(fits(template, strategy) for template in templates):
            refuse(templates[0], strategy)


def check_loss(templates: Sequence[Template], loss: str) -> None:
    """Check that what is trained has the candidates' own texts, where the loss is over their likelihoods.

    Raises:
        RecipeError: Naming the first template that has not.
    """
    other = next((template for template in templates if asks_for(template) != "item"), None)
    if loss != "answer" and other is not None:
        raise RecipeError(
            f"tasks.direct.loss: {loss} is over the likelihoods of the candidates' texts, and {other.id} "
            f"{_WORDS[asks_for(other)]}; train templates that answer with the item, such as which-title, or set it to "
            "answer",
            kind="contradiction",
            at=other.id,
            column="tasks.direct.loss",
        )


def check_asks_yes(template: Template, values: Callable[[str], Values]) -> None:
    """Check that a template has other words for a yes or no than for one of several candidates.

    Args:
        template: One that answers with a label.
        values: What is wanted -> what a question shows.

    Raises:
        RecipeError: If it has not.
    """
    if template.turns(values("one")) == template.turns(values("yes")):
        raise RecipeError(
            f"template {template.id} has no words for the strategy 'pointwise-yes'; ask its question under "
            '{% if want == "yes" %}, or choose another template',
            kind="unsupported",
            at=template.id,
        )


def check_rejected(preference: PreferenceSection, count: int, *, retrieved: bool) -> None:
    """Check that what rows reject is among the candidates that a question shows.

    Args:
        preference: The recipe's ``train.preference``.
        count: Candidates of a question.
        retrieved: Whether they are retrieved.

    Raises:
        RecipeError: If there are too few of them, or others are to be rejected.
    """
    if preference.negatives >= count:
        raise RecipeError(
            f"train.preference.negatives: a question of tasks.direct shows {count} candidates (eval.candidates.count), "
            f"of which at most {count - 1} can be rejected",
            kind="too-large",
            column="train.preference.negatives",
        )
    if preference.rejected not in ("uniform", "ratings") or (preference.rejected == "ratings" and retrieved):
        raise RecipeError(
            f"train.preference.rejected: tasks.direct rejects some of the candidates that its question shows, not "
            f"{preference.rejected}; leave the key out, and choose by eval.candidates.kind how hard they are",
            kind="contradiction",
            column="train.preference.rejected",
        )


def profile_template(name: str) -> Template:
    """Return the words that ask what a user likes, before candidates are shown.

    Raises:
        RecipeError: If there is no template of that name, or it shows more than the history.
    """
    known = load_templates("profile")
    if name not in known:
        raise RecipeError(
            f"tasks.direct.profile.template: there is no prompts/profile/{name}.yaml{did_you_mean(name, known)}; "
            f"known: {', '.join(known)}",
            kind="unknown-name",
            column="tasks.direct.profile.template",
        )
    template = known[name]
    template.check(turns=ABOUT_USER | {"history"}, lead=(), target={"text"})
    return template


def refuse(template: Template, strategy: str) -> None:
    """Raise what there is to say of a strategy that does not read what a template asks for.

    Raises:
        RecipeError: Always.
    """
    raise RecipeError(
        f"the strategy {strategy!r} does not read the answers of template {template.id}, which "
        f"{_WORDS[asks_for(template)]}; use {reader_of(template)!r}, or another template",
        kind="contradiction",
        at=template.id,
    )


def candidate_labels(count: int) -> tuple[str, ...]:
    """Return A, B, C, ... for up to 26 candidates, else numbers of equal width: no label starts another."""
    if count <= len(ascii_uppercase):
        return tuple(ascii_uppercase[:count])
    width = len(str(count))
    return tuple(f"{number:0{width}d}" for number in range(1, count + 1))
