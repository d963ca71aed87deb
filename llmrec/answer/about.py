"""Questions about one item: what rating a user would give it, whether the user will like it, why it suits, and so on.

Whatever family a model was tuned on is asked as its evaluation asks, by `answer_about`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from llmrec.answer.questions import pose
from llmrec.answer.strategy import Asking, one_of
from llmrec.answer.task import task_of
from llmrec.backends.encode import Encoder
from llmrec.data.requests import RankRequest
from llmrec.errors import LlmrecError, RecipeError
from llmrec.pipeline.bundle import Bundle
from llmrec.registry import options_of
from llmrec.strategies.asking import Prompting, strategy_of
from llmrec.tasks.family import Family, family_of
from llmrec.types import Answer, Backend, Probability, Prompt, Ranking, Rating, Request, Text, Unparsed

CONTEXT = frozenset({"review", "feature", "headline", "rating"})
"""What a question may tell a family besides a history, by name."""

# Tokens of a label or of a number, with what stands around it.
_LABEL = 8


def about_families(bundle: Bundle) -> dict[str, Family]:
    """Return the families that a model was tuned on and that ask about one item, by name."""
    found = {name: family_of(name) for name in bundle.tasks.present()}
    return {name: family for name, family in found.items() if family.answer is not Ranking}


def way_about(bundle: Bundle, family: str, *, template: str | None = None, strategy: str = "auto") -> Asking:
    """Choose how a family is asked: by default with the template and the strategy that its evaluation begins with.

    Args:
        bundle: The model and how it was asked in training.
        family: One of `about_families`.
        template: A bare name, or ``family/name``; None chooses.
        strategy: A strategy of the family, or ``auto``.

    Raises:
        RecipeError: If the model was not tuned on the family, or something asked for is unknown.
    """
    known = about_families(bundle)
    if family not in known:
        has = ", ".join(known) or "none"
        raise RecipeError(
            f"{bundle.folder} was not tuned on {family}; of the families that ask about one item it has: {has}. Tune "
            f"it with tasks.{family}",
            kind="unsupported",
            at=bundle.folder,
            column="family",
        )
    task = task_of(bundle, family, {}, bundle.index)
    templates = bundle.templates[family]
    name = task.eval_templates[0] if template is None else template.rpartition("/")[2]
    one_of("template", name, list(templates))
    section = bundle.tasks.present()[family]
    asked = task.asked_by(templates[name], section.strategies, tuned=bundle.tuned)
    one_of("strategy", strategy, ("auto", *known[family].strategies))
    return Asking(family, name, asked[0] if strategy == "auto" else strategy)


def answer_about(
    bundle: Bundle, requests: Sequence[RankRequest], *, way: Asking, backend: Backend, encoder: Encoder
) -> list[Answer]:
    """Answer every request, in order; one that cannot be asked does not touch the others.

    Args:
        bundle: The model and how it was asked in training.
        requests: Each with one candidate: the item that it asks about.
        way: From `way_about`.
        backend: An engine over the bundle's model.
        encoder: Its tokenizer and its longest prompt.

    Returns:
        Ratings, probabilities or texts, as the family answers; an `Unparsed` with the reason where there is none.
    """
    posed = pose(bundle, requests, way)
    asked: dict[int, Request] = {}
    failures: dict[int, str] = {}
    for n, request in enumerate(posed.requests):
        if request.candidates is None or len(request.candidates) != 1:
            failures[n] = f"{way.family} asks about one item; name it as 'item'"
            continue
        asked[n] = _of_item(request)
        try:
            _check_length(posed.task.prompt(asked[n], template=way.template), way, posed.task.strategy_options, encoder)
        except LlmrecError as error:
            failures[n] = str(error)
    able = [n for n in asked if n not in failures]
    options = {**posed.task.strategy_options, **options_of(way.strategy, way.asking)}
    asker = Prompting(backend=backend, task=posed.task, template=way.template)
    strategy = strategy_of(way.strategy, asker, **options)
    found = dict(zip(able, strategy.answer([asked[n] for n in able]), strict=True)) if able else {}
    return [
        Unparsed(request_id=request.id, reason=failures[n])
        if n in failures
        else replace(found[n], request_id=request.id)
        for n, request in enumerate(requests)
    ]


def prompt_about(bundle: Bundle, request: RankRequest, way: Asking) -> Prompt:
    """Return what a model reads of a request."""
    posed = pose(bundle, [request], way)
    return posed.task.prompt(_of_item(posed.requests[0]), template=way.template)


def _of_item(request: Request) -> Request:
    """Return a request about its only candidate."""
    assert request.candidates is not None
    return replace(request, item=request.candidates[0], candidates=None)


def value_of(answer: Answer) -> float | str | None:
    """Return a rating, a probability or a text as it is; None where there is none."""
    if isinstance(answer, Rating | Probability):
        return answer.value
    return answer.text if isinstance(answer, Text) else None


def _check_length(prompt: Prompt, way: Asking, options: Mapping[str, int], encoder: Encoder) -> None:
    """Refuse a prompt that leaves no room for its answer.

    Raises:
        RecipeError: If it does not.
    """
    room = options.get("max_tokens", _LABEL)
    length = len(encoder.prompt(prompt))
    if length + room > encoder.max_length:
        raise RecipeError(
            f"the prompt has {length} tokens and its answer up to {room}, together more than the {encoder.max_length} "
            "that fit; shorten its texts, or raise --max-length",
            kind="too-large",
            column="--max-length",
        )
