"""The common base of language-model predictors: a backend, a task, a template, and batches with progress."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import ClassVar, Literal, Protocol, runtime_checkable

from llmrec.errors import BackendError, RecipeError
from llmrec.registry import STRATEGIES, import_component, is_plugin
from llmrec.tasks.task import Task, Want
from llmrec.types import (
    Answer,
    Backend,
    Capability,
    Completion,
    Cost,
    Predictor,
    Probability,
    Prompt,
    Ranking,
    Rating,
    Request,
    Scores,
    Text,
    Unparsed,
)

# Prompts per call of a strategy with many prompts per request.
_PROMPTS_PER_CALL = 512


def _ignore_progress(done: int) -> None:
    """Report no progress."""


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """What a strategy needs: backend, task, template and batches.

    Attributes:
        backend: The engine that answers.
        task: Renders prompts and reads answers.
        template: ``family/name`` or the bare name.
        shots: Number of few-shot examples.
        batch: Requests per call of the backend.
        want: The answer that a prompt requests for its candidates.
        advance: Called with the number of requests that were just finished.
    """

    backend: Backend
    task: Task
    template: str
    shots: int = 0
    batch: int = 64
    want: Want = "one"
    advance: Callable[[int], None] = field(default=_ignore_progress)

    def needs(self, capability: Capability) -> None:
        """Raise an error if the backend lacks a capability, before the first request.

        Raises:
            BackendError: If it does not.
        """
        if capability not in self.backend.capabilities:
            offered = ", ".join(sorted(self.backend.capabilities))
            raise BackendError(
                f"the backend {self.backend.name!r} does not support {capability}; it supports {offered}",
                kind="unsupported",
                column="eval.backend",
            )

    def prompt(self, request: Request) -> Prompt:
        """Render a request."""
        return self.task.prompt(request, template=self.template, shots=self.shots, want=self.want)

    def batches(self, requests: Sequence[Request]) -> Iterator[tuple[Sequence[Request], list[Prompt]]]:
        """Yield batches of requests with their prompts, and report progress after each."""
        for start in range(0, len(requests), self.batch):
            part = requests[start : start + self.batch]
            yield part, [self.prompt(request) for request in part]
            self.advance(len(part))


class Strategy(Predictor, Protocol):
    """A predictor based on a language model, created from a `Prompting` and the ``eval`` keys that it accepts.

    Attributes:
        asker: Its setup.
        engine: The route used, such as ``"hf:tree"``; set by the first answer.
    """

    asker: Prompting
    engine: str


class BaseStrategy:
    """The state of a strategy that scores or generates answers; subclasses define ``answer``."""

    verb: ClassVar[Literal["score", "generate"]] = "score"

    def __init__(self, asker: Prompting) -> None:
        asker.needs(self.verb)
        self.asker = asker
        self.engine = f"{asker.backend.name}:generate" if self.verb == "generate" else ""


def create_strategy(name: str, asker: Prompting, **options: object) -> Strategy:
    """Return a strategy by name.

    Args:
        name: A name in `llmrec.registry.STRATEGIES`, or of a plug-in.
        asker: The setup of the strategy.
        options: The keys of ``eval`` that it accepts, and options from its task.

    Raises:
        RecipeError: If the strategy is unknown, or a plug-in rejects these arguments or lacks an attribute of a
            strategy.
    """
    factory = import_component(STRATEGIES, name, "strategy")
    if not is_plugin(STRATEGIES, name):
        result: Strategy = factory(asker, **options)
        return result
    try:
        result = factory(asker, **options)
    except TypeError as error:
        arguments = ", ".join(["a Prompting", *options])
        raise RecipeError(
            f"the strategy {name!r} cannot be created with {arguments} ({error}); accept these arguments, and declare "
            "eval keys in its attribute keys",
            kind="defect",
            at=name,
        ) from error
    lacking = [item for item in ("asker", "engine", "answer") if not hasattr(result, item)]
    if lacking:
        raise RecipeError(
            f"the strategy {name!r} lacks {', '.join(lacking)}; see llmrec.strategies.asking.Strategy",
            kind="defect",
            at=name,
        )
    return result


@runtime_checkable
class MultiPromptStrategy(Protocol):
    """A strategy with several prompts per request; reports show the first one."""

    def first_prompt(self, request: Request) -> Prompt:
        """Return the first prompt for a request."""
        ...


@dataclass(frozen=True, slots=True)
class ScoredRequest:
    """A request with the scores of its continuations."""

    request: Request
    texts: tuple[str, ...]
    scores: Scores
    prompt_hash: str


def scored_requests(asker: Prompting, requests: Sequence[Request], *, closed: bool | None) -> Iterator[ScoredRequest]:
    """Yield every request with the scores of its continuations, in order.

    ``closed`` as in `Backend.score`; None scores labels: open, unless one label is a prefix of another (``1`` and
    ``10``).
    """
    for part, prompts in asker.batches(requests):
        texts = [asker.task.continuations(request, template=asker.template) for request in part]
        closing = any(has_nested_labels(labels) for labels in set(texts)) if closed is None else closed
        result = asker.backend.score(prompts, texts, closed=closing)
        for request, prompt, candidates, scores in zip(part, prompts, texts, result, strict=True):
            yield ScoredRequest(request, candidates, scores, prompt_hash(prompt))


def score_in_chunks(
    backend: Backend, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]], *, closed: bool
) -> list[Scores]:
    """Score prompts in chunks of a few hundred, so that an interruption loses at most one chunk."""
    results: list[Scores] = []
    for start in range(0, len(prompts), _PROMPTS_PER_CALL):
        part = slice(start, start + _PROMPTS_PER_CALL)
        results += backend.score(prompts[part], texts[part], closed=closed)
    return results


def has_nested_labels(labels: tuple[str, ...]) -> bool:
    """Whether one label is a prefix of another, so that labels must be scored with their end."""
    ordered = sorted(labels)
    return any(after.startswith(before) for before, after in pairwise(ordered) if after != before)


def generate_answers(
    asker: Prompting,
    requests: Sequence[Request],
    *,
    max_tokens: int,
    answer_type: type[Ranking] | type[Rating] | type[Probability] | type[Text],
    reason: str,
) -> list[Answer]:
    """Generate and parse an answer for every request; if parsing fails, it is `Unparsed`."""
    answers: list[Answer] = []
    for part, prompts in asker.batches(requests):
        for request, prompt, done in zip(
            part, prompts, asker.backend.generate(prompts, max_tokens=max_tokens), strict=True
        ):
            parsed = asker.task.parse(done.text, request, template=asker.template)
            answer = parsed if isinstance(parsed, answer_type) else Unparsed(request_id=request.id, reason=reason)
            answers.append(replace(answer, raw=done.text, prompt_hash=prompt_hash(prompt), cost=cost_of(done)))
    return answers


def cost_of(done: Scores | Completion) -> Cost:
    """Return the cost of a scored or generated answer.

    A scored prompt is one forward pass; each generated token is one more, and an empty answer took one.
    """
    if isinstance(done, Scores):
        return Cost(prompt_tokens=done.prompt_tokens, completion_tokens=sum(done.tokens), forwards=1)
    written = done.completion_tokens
    return Cost(prompt_tokens=done.prompt_tokens, completion_tokens=written, forwards=max(1, written))


def prompt_hash(prompt: Prompt) -> str:
    """Return a hash of the messages and the given beginning of the answer, 16 hex digits."""
    parts = [f"{message.role}\x1e{message.text}" for message in prompt.messages]
    parts.append("".join(segment.text for segment in prompt.answer_prefix))
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]
