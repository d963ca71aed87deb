"""Two-step ranking: first a profile of the user from the history, then the candidates with it (PALR, 2305.07622)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmrec.errors import RecipeError
from llmrec.prompts.template import clean
from llmrec.strategies.asking import Prompting, cost_of
from llmrec.strategies.rounds import label_ranker
from llmrec.types import Answer, Cost, Prompt, Ranking, Request


class TwoStepRanker:
    """Writes what the user likes in one generated line, and ranks by label with that line in the prompt.

    A request that brings a profile keeps it, and costs one step. The profile is data like any other: it is cleaned and
    can write no template word and no line of its own. It sees the history of the request and nothing else.
    """

    name = "two-step"

    def __init__(self, asker: Prompting, *, permutations: int = 1) -> None:
        """Set up.

        Args:
            asker: Its task writes `profile_prompt`.
            permutations: As of the strategy ``label``, in the second step.

        Raises:
            RecipeError: If the template does not show a profile.
        """
        asker.needs("generate")
        task = asker.task
        self._task = task
        if not task.shows_profile(asker.template):
            raise RecipeError(
                f"template {asker.template}: the strategy two-step puts what it learned of the user into the profile, "
                "which this template does not show; use with-profile, or another that names `profile`",
                kind="contradiction",
                at=asker.template,
            )
        self.asker = asker
        self._second = label_ranker(asker, permutations=permutations)
        # By identity: served requests have the ids that their senders chose, and many may have one.
        self._told: dict[int, tuple[Request, str | None]] = {}

    @property
    def engine(self) -> str:
        """The routes of both steps."""
        return f"{self.asker.backend.name}:generate, {self._second.engine}"

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank every request's candidates; see `Predictor.answer`. What was said of the user is the raw answer."""
        answers: list[Answer] = []
        for start in range(0, len(requests), self.asker.batch):
            part = requests[start : start + self.asker.batch]
            message = self._profiles(part)
            self._told |= {id(request): (request, text) for request, (text, _) in zip(part, message, strict=True)}
            second = self._second.answer(
                [_with(request, text) for request, (text, _) in zip(part, message, strict=True)]
            )
            for (text, cost), answer in zip(message, second, strict=True):
                assert isinstance(answer, Ranking)
                answers.append(replace(answer, cost=answer.cost + cost, raw=text))
        return answers

    def first_prompt(self, request: Request) -> Prompt:
        """Return the second step's prompt, with the profile that the first one wrote for this very request."""
        _, text = self._told.get(id(request), (request, None))
        return self._second.first_prompt(_with(request, text))

    def _profiles(self, requests: Sequence[Request]) -> list[tuple[str | None, Cost]]:
        """Return the profile that was written for each request and what it cost; None where it brought one."""
        asked = [request for request in requests if not request.context.get("profile")]
        prompts = [self._task.profile_prompt(request) for request in asked]
        result = iter(self.asker.backend.generate(prompts, max_tokens=self._task.profile_tokens) if prompts else [])
        message: list[tuple[str | None, Cost]] = []
        for request in requests:
            done = None if request.context.get("profile") else next(result)
            message.append((None, Cost()) if done is None else (clean(done.text), cost_of(done)))
        return message


def _with(request: Request, told: str | None) -> Request:
    return replace(request, context={**request.context, "profile": told}) if told else request
