"""Explanations of rankings: generated sentences on why the first items suit the user.

The sentence is generated after the ranking and does not affect it. Generated text is untrusted data: it is cleaned to
one line, has a separate column, and is never inserted into another prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmrec.answer.prompting import NO_USER, prompt_length_error
from llmrec.answer.recommender import Reasons
from llmrec.answer.strategy import TWO_STEP, TaskStrategy, items_only_data
from llmrec.backends.encode import Encoder
from llmrec.data.knowledge import FACTS_FIELD, resolve_citations
from llmrec.data.requests import RankRequest
from llmrec.errors import LlmrecError, RecipeError
from llmrec.guard import clean
from llmrec.pipeline.bundle import Bundle
from llmrec.prompts.template import Template, load_templates
from llmrec.strategies.asking import cost_of
from llmrec.tasks.base import DataView
from llmrec.types import Answer, Backend, Event, Item, Prompt, Ranking

FAMILY = "rationale"
RATIONALE_TOKENS = 40
"""Maximum length of a rationale in tokens: room for one sentence."""

_TEMPLATE_VARIABLES = frozenset({"noun", "profile", "history", "item", "fields"})


def _load_template() -> Template:
    """Return the prompt template for explanations."""
    known = load_templates(FAMILY)
    if not known:
        raise RecipeError(
            f"--rationale: there is no prompt template; add a template to prompts/{FAMILY}",
            kind="missing-file",
            column="--rationale",
        )
    template = next(iter(known.values()))
    template.check(turns=_TEMPLATE_VARIABLES, lead=(), target={"text"})
    return template


class Explainer:
    """Generates explanations.

    Args:
        bundle: The model and its training prompts.
        way: The family, template and strategy of the ranking; prompts show the same number of interactions,
            and the profile of two-step.
        encoder: The model's tokenizer and maximum prompt length.
        first: The number of items per ranking with a rationale.
        batch: The number of prompts per call of the backend.
    """

    def __init__(self, bundle: Bundle, way: TaskStrategy, encoder: Encoder, *, first: int, batch: int) -> None:
        self.template, self.first = _load_template(), first
        self._bundle, self._way, self._encoder, self._batch = bundle, way, encoder, batch
        self._shown = bundle.tasks.present()[way.family].history

    def write(
        self,
        requests: Sequence[RankRequest],
        answers: Sequence[Answer],
        items: Mapping[str, Item] | None,
        backend: Backend,
    ) -> list[Reasons]:
        """Generate explanations for the first items of every ranking, in order; failed requests get none.

        Args:
            requests: The requests.
            answers: One answer per request.
            items: The catalogue, if the whole catalogue was ranked; None: the requests' candidates were ranked.
            backend: An engine that generates text.
        """
        results = [Reasons() for _ in requests]
        prompts: list[Prompt] = []
        owners: list[tuple[int, int]] = []
        facts: dict[tuple[int, int], str] = {}
        for n, (request, answer) in enumerate(zip(requests, answers, strict=True)):
            if not isinstance(answer, Ranking):
                continue
            for item in self._best(request, answer, items):
                position = len(results[n].texts)
                results[n].texts.append("")
                try:
                    prompts.append(self._prompt(request, answer, item))
                    owners.append((n, position))
                    facts[n, position] = item.fields.get(FACTS_FIELD, "")
                except LlmrecError as error:
                    results[n].notes.append(f"rationale of {item.item_id[:60]!r}: {error}")
        for start in range(0, len(prompts), self._batch):
            part = slice(start, start + self._batch)
            completions = backend.generate(prompts[part], max_tokens=RATIONALE_TOKENS)
            for (n, position), done in zip(owners[part], completions, strict=True):
                line, shown = _first_line(done.text), facts[n, position]
                results[n].texts[position] = resolve_citations(line, shown)[0] if shown else line
                results[n].cost += cost_of(done)
        return results

    def _best(self, request: RankRequest, answer: Ranking, items: Mapping[str, Item] | None) -> list[Item]:
        pool = items if items is not None else {item.item_id: item for item in request.candidates}
        return [pool[item] for item in answer.items[: self.first]]

    def _prompt(self, request: RankRequest, answer: Ranking, item: Item) -> Prompt:
        """Return the prompt about an item."""
        past = request.history[-self._shown :]
        known = {f"history/{position}": event.item for position, event in enumerate(past)} | {"item": item}
        view = DataView(items_only_data(self._bundle, known))
        # The profile generated by the two-step strategy affected the ranking, so the prompt includes it.
        profile = request.profile or ((answer.raw or "") if self._way.strategy == TWO_STEP else "")
        values = view.user(request.user_id or NO_USER, {**request.context, "profile": profile}) | view.about("item")
        values["history"] = view.events([Event(item_id=f"history/{position}") for position in range(len(past))])
        prompt = Prompt(messages=self.template.turns(values))
        if error := prompt_length_error(len(self._encoder.prompt(prompt)), RATIONALE_TOKENS, self._encoder):
            raise RecipeError(error, kind="too-large", column="--max-length")
        return prompt


def _first_line(text: str) -> str:
    """Return the first non-empty line, because small models may continue with lists and made-up turns."""
    return next((line for item in text.splitlines() if (line := clean(item))), "")
