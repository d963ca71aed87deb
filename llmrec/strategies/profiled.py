"""Two-step ranking: first a profile of the user from the history, then the candidates with it (PALR, 2305.07622)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmrec.errors import RecipeError
from llmrec.prompts.template import clean
from llmrec.strategies.asking import Prompting, cost_of
from llmrec.strategies.listwise import label_ranker
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
        self._told: dict[str, str] = {}

    @property
    def engine(self) -> str:
        """The routes of both steps."""
        return f"{self.asker.backend.name}:generate, {self._second.engine}"

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank every request's candidates; see `Predictor.answer`. What was said of the user is the raw answer."""
        answers: list[Answer] = []
        for start in range(0, len(requests), self.asker.batch):
            part = requests[start : start + self.asker.batch]
            costs = self._profiles([request for request in part if not request.context.get("profile")])
            for request, answer in zip(part, self._second.answer([self._with(r) for r in part]), strict=True):
                assert isinstance(answer, Ranking)
                cost = answer.cost + costs.get(request.id, Cost())
                answers.append(replace(answer, cost=cost, raw=self._told.get(request.id)))
        return answers

    def first_prompt(self, request: Request) -> Prompt:
        """Return the second step's prompt, with the profile that the first one wrote, for reports."""
        return self._second.first_prompt(self._with(request))

    def _profiles(self, requests: Sequence[Request]) -> dict[str, Cost]:
        """Write profiles and return what each cost."""
        prompts = [self._task.profile_prompt(request) for request in requests]
        found = self.asker.backend.generate(prompts, max_tokens=self._task.profile_tokens) if prompts else []
        costs = {}
        for request, done in zip(requests, found, strict=True):
            self._told[request.id] = clean(done.text)
            costs[request.id] = cost_of(done)
        return costs

    def _with(self, request: Request) -> Request:
        told = self._told.get(request.id)
        return replace(request, context={**request.context, "profile": told}) if told else request
