"""Two-step ranking: generate a user profile from the history, then rank with it (PALR, arXiv 2305.07622)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmrec.errors import RecipeError
from llmrec.guard import clean
from llmrec.strategies.asking import Prompting, cost_of
from llmrec.strategies.rounds import label_ranker
from llmrec.types import Answer, Cost, Prompt, Ranking, Request


class TwoStepRanker:
    """Generates a one-line user profile, and ranks by label with this profile in the prompt.

    A request that contains a profile keeps it, and needs one step. A profile is cleaned like other data, so that it
    cannot contain template words or line breaks. It is generated from the history of the request only.
    """

    name = "two-step"

    def __init__(self, asker: Prompting, *, permutations: int = 1) -> None:
        """Create the ranker.

        Args:
            asker: The setup; its task defines `profile_prompt`.
            permutations: As for the strategy ``label``, in the second step.

        Raises:
            RecipeError: If the template does not show a profile.
        """
        asker.needs("generate")
        if not asker.task.shows_profile(asker.template):
            raise RecipeError(
                f"template {asker.template}: the strategy two-step generates a user profile, but this template does "
                "not show `profile`; use with-profile, or another template with `profile`",
                kind="contradiction",
                at=asker.template,
            )
        self.asker = asker
        self._second = label_ranker(asker, permutations=permutations)
        # By identity: clients choose the ids of requests to a service, which may not be unique.
        self._profiled: dict[int, tuple[Request, str | None]] = {}

    @property
    def engine(self) -> str:
        """The engines used in the two steps."""
        return f"{self.asker.backend.name}:generate, {self._second.engine}"

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Rank the candidates of every request; see `Predictor.answer`. The raw answer is the profile."""
        answers: list[Answer] = []
        for part in self.asker.split(requests):
            profiles = self._profiles(part)
            self._profiled |= {id(request): (request, text) for request, (text, _) in zip(part, profiles, strict=True)}
            second = self._second.answer(
                [_with_profile(request, text) for request, (text, _) in zip(part, profiles, strict=True)]
            )
            for (text, cost), answer in zip(profiles, second, strict=True):
                assert isinstance(answer, Ranking)
                answers.append(replace(answer, cost=answer.cost + cost, raw=text))
        return answers

    def first_prompt(self, request: Request) -> Prompt:
        """Return the prompt of the second step, with the profile generated for this request."""
        _, text = self._profiled.get(id(request), (request, None))
        return self._second.first_prompt(_with_profile(request, text))

    def _profiles(self, requests: Sequence[Request]) -> list[tuple[str | None, Cost]]:
        """Return the generated profile of each request and its cost."""
        pending = [request for request in requests if not request.context.get("profile")]
        task, backend = self.asker.task, self.asker.backend
        prompts = [task.profile_prompt(request) for request in pending]
        result = iter(backend.generate(prompts, max_tokens=task.profile_tokens) if prompts else [])
        profiles: list[tuple[str | None, Cost]] = []
        for request in requests:
            done = None if request.context.get("profile") else next(result)
            profiles.append((None, Cost()) if done is None else (clean(done.text), cost_of(done)))
        return profiles


def _with_profile(request: Request, profile: str | None) -> Request:
    return replace(request, context={**request.context, "profile": profile}) if profile else request
