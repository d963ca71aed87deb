"""The common base of language-model predictors: a backend, a task, a template, and batches with progress."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Protocol, runtime_checkable

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
    Prompt,
    Ranking,
    Request,
    Scores,
    Unparsed,
)

# Prompts per call of a strategy with many prompts per request.
_PROMPTS_PER_CALL = 512


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
    advance: Callable[[int], None] = lambda done: None

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

    def split(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        """Yield batches of requests."""
        return (requests[start : start + self.batch] for start in range(0, len(requests), self.batch))

    def batches(self, requests: Sequence[Request]) -> Iterator[tuple[Sequence[Request], list[Prompt]]]:
        """Yield batches of requests with their prompts, and report progress after each."""
        for part in self.split(requests):
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


class ScoringStrategy:
    """A strategy that scores continuations.

    Subclasses define ``read`` if one scored prompt per request is enough, and ``answer`` otherwise.

    Attributes:
        closed: See `scored_requests`.
    """

    closed: ClassVar[bool | None] = None

    def __init__(self, asker: Prompting) -> None:
        asker.needs("score")
        self.asker = asker
        self.engine = ""

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer every request; see `Predictor.answer`."""
        answers: list[Answer] = []
        for result in scored_requests(self.asker, requests, closed=self.closed):
            self.engine = result.scores.engine
            answers.append(self.read(result))
        return answers

    def read(self, result: ScoredRequest) -> Answer:
        """Return the answer that follows from the scores of a request."""
        raise NotImplementedError


class GeneratingStrategy:
    """A strategy that generates a text for every request and parses it.

    Attributes:
        answer_type: The type of its answers; other texts are `Unparsed`.
        reason: Why a text is unparsed.
    """

    answer_type: ClassVar[type[Answer]]
    reason: ClassVar[str]

    def __init__(self, asker: Prompting) -> None:
        asker.needs("generate")
        self.asker = asker
        self.engine = f"{asker.backend.name}:generate"

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer every request; see `Predictor.answer`."""
        answers: list[Answer] = []
        limit = self.token_limit(requests)
        for part, prompts in self.asker.batches(requests):
            texts = self.asker.backend.generate(prompts, max_tokens=limit)
            for request, prompt, done in zip(part, prompts, texts, strict=True):
                answer = self.asker.task.parse(done.text, request, template=self.asker.template)
                if not isinstance(answer, self.answer_type):
                    answer = Unparsed(request_id=request.id, reason=self.reason)
                answers.append(replace(answer, raw=done.text, prompt_hash=prompt_hash(prompt), cost=cost_of(done)))
        return answers

    def token_limit(self, requests: Sequence[Request]) -> int:
        """Return the maximum number of tokens of a text; by default enough for a number or a word."""
        return 8


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


def ranking_of(request: Request, order: Sequence[tuple[str, float]], hashed: str | None, cost: Cost) -> Ranking:
    """Return the ranking of items with scores, best first; ``hashed`` is a `prompt_hash`."""
    return Ranking(
        request_id=request.id,
        items=tuple(item for item, _ in order),
        scores=tuple(score for _, score in order),
        prompt_hash=hashed,
        cost=cost,
    )


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
