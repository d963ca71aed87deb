"""Sequential recommendation: predict the next item from a user's history."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from llmrec.data.split import request_id
from llmrec.errors import RecipeError
from llmrec.index.titles import title_key
from llmrec.prompts.template import Template
from llmrec.recipe.schema import SequentialSection
from llmrec.registry import BASELINES, STRATEGIES, components_for_family
from llmrec.tasks.base import (
    ABOUT_USER,
    USER_STATS,
    DataView,
    ExampleDraw,
    UserHistories,
    Values,
    check_not_test,
    iterate_user_passes,
    sample_window,
)
from llmrec.tasks.cases import Cases, held_out_interactions, ranking_cases
from llmrec.tasks.family import RANKING_CONTROLS, Family
from llmrec.tasks.fewshot import FewShotDraw
from llmrec.tasks.parsing import first_line_keys
from llmrec.tasks.pool import NegativeSampler, RejectedItemSampler
from llmrec.tasks.rating import find_scale
from llmrec.tasks.rows import (
    chat_example,
    chat_shot_messages,
    insert_shots,
    list_example,
    list_prompt,
    list_shot_messages,
    list_steps,
)
from llmrec.tasks.task import BranchingTask, TaskInputs, Want
from llmrec.tasks.templates import select_task_templates
from llmrec.types import (
    Answer,
    Case,
    Code,
    Event,
    Example,
    Message,
    Prompt,
    Ranking,
    Request,
    SplitName,
)


class SequentialTask(BranchingTask):
    """The sequential recommendation task.

    A list template is a list to continue; the history is part of the answer, so that one training example teaches the
    next title at every position. A chat template shows the history and asks for one title.
    """

    family = "sequential"

    def __init__(self, section: SequentialSection, inputs: TaskInputs) -> None:
        data, templates = inputs.data, inputs.templates
        self._data, self._section, self._seed, self._candidates = data, section, inputs.seed, inputs.candidates
        self._warm_up = section.warm_up
        self._chosen = select_task_templates(self.family, section, templates, inputs.index)
        self._view = DataView(data, inputs.index)
        self._rating = find_scale(data).label if data.train["rating"].null_count() < len(data.train) else None
        for template in templates.values():
            if template.shape == "list":
                template.check(turns=ABOUT_USER, lead=ABOUT_USER | {"n"}, target=ABOUT_USER | {"item", "n"})
            else:
                variables = ABOUT_USER | {"history"}
                template.check(turns=variables | USER_STATS, lead=(), target=variables | {"item"})
        self._check_bare_codes()
        least = max(2, section.warm_up + 1)
        if section.window < least:
            raise RecipeError(
                f"tasks.sequential.window={section.window} leaves no target after the first {section.warm_up} items "
                f"(warm_up); set it to at least {least}",
                kind="bad-value",
                column="tasks.sequential.window",
            )
        self._events = UserHistories(data, least=least)
        self._keys: dict[str, Mapping[str, tuple[str, ...]]] = {}
        self._past = inputs.past(section, self._chosen.asking)
        self._shots = inputs.shots(self.family, self._events, least=2)
        self._listwise, self._rejecting = inputs.listwise, None
        if (preference := inputs.preference) is not None:
            drawn = NegativeSampler(data, preference.rejected, key="train.preference.negatives")
            self._rejecting = RejectedItemSampler(self.family, self._events, preference, drawn, inputs.hard)

    @cached_property
    def catalogue(self) -> tuple[str, ...]:
        """All item ids, sorted: the default candidates of a request."""
        return tuple(sorted(self._data.dataset.items))

    def examples(self, split: SplitName, limit: int | None = None) -> Iterator[Example]:
        """Yield training or validation examples; see `Task`."""
        check_not_test(split)
        if split == "valid":
            for held in held_out_interactions(self._data, "valid")[:limit]:
                past = self._past.show(self._data.history(held.user_id, "valid")).events
                row = f"sequential/valid/{request_id(held.user_id, held.item_id)}"
                events = (*past, Event(item_id=held.item_id))
                yield self._example(self._chosen.train[0], row, held.user_id, events, first_target=len(past))
            return
        if self._rejecting is not None:
            yield from self._preference_examples(self._rejecting, limit)
            return
        for draw in self.draws(limit):
            yield self.example(draw)

    def _preference_examples(self, rejecting: RejectedItemSampler, limit: int | None) -> Iterator[Example]:
        """Yield examples whose only target is the last item, with rejected items for preference training."""
        for row, user, rng in iterate_user_passes(self.family, rejecting.users, self._seed, limit):
            template, events = rng.choice(self._chosen.train), self._events[user]
            at, rejected = rejecting.pair(user, rng)
            shown = (*self._past.show(events[:at]).events, events[at])
            example = self._example(template, row, user, shown, first_target=len(shown) - 1)
            values = self._view.user(user) | {"n": len(shown)}
            if template.shape == "chat":
                values |= self._question(user, shown)
            others = (template.answer(values | {"item": self._view.item(item)}) for item in rejected)
            yield replace(example, negatives=rejected, rejected=tuple(text + template.tail for text in others))

    def draws(self, limit: int | None = None) -> Iterator[ExampleDraw]:
        """Yield training examples before rendering, in the order of ``examples("train")``."""
        for row, user, rng in iterate_user_passes(self.family, list(self._events), self._seed, limit):
            template = rng.choice(self._chosen.train)
            events = self._train_events(template, user, rng)
            yield ExampleDraw(row, user, template, events, self._warm_up)

    def example(self, draw: ExampleDraw) -> Example:
        """Render a sampled training example as text."""
        return self._example(draw.template, draw.id, draw.user_id, draw.events, first_target=draw.first_target)

    def cases(self, split: SplitName) -> Cases:
        """Return all held-out interactions with their candidates."""
        return ranking_cases(self._data, split, self._candidates, self.family)

    def training_cases(self) -> Iterator[Case]:
        """Yield training interactions as questions with the history before them; see `Task`."""
        for row, user, rng in iterate_user_passes(f"{self.family} question", list(self._events), self._seed, None):
            events = self._events[user]
            at = rng.randrange(max(1, self._warm_up), len(events))
            yield Case(request=Request(id=row, user_id=user, history=events[:at]), truth=events[at].item_id)

    def prompt(self, request: Request, *, template: str, shots: int = 0, want: Want = "one") -> Prompt:
        """Render a request; see `Task`.

        Raises:
            RecipeError: If a complete ranking is requested as text: these templates generate the next title.
        """
        if want != "one":
            raise RecipeError(
                "tasks.sequential does not answer with a list; use the strategy 'likelihood', or the direct task",
                kind="unsupported",
                column="tasks.sequential",
            )
        chosen = self._chosen.get(template)
        drawn = self.draw_shots(request, shots)
        turns = [self._solved(chosen, shot.user_id, shot.events) for shot in drawn.windows]
        values = self._view.user(request.user_id, drawn.context(request.context))
        if chosen.shape == "chat":
            values |= self._view.user_stats(request.user_id, ())
            question = chosen.turns(values | {"history": self._view.events(drawn.history, self._rating)})
            return Prompt(messages=insert_shots(question, turns))
        return list_prompt(chosen, values, list_steps(values, drawn.history, self._answered), {}, turns)

    def draw_shots(self, request: Request, shots: int) -> FewShotDraw:
        """Draw training interactions for few-shot examples; also return the remaining history of the question."""
        past = request.history
        return self._shots.draw(request, past, shots, self._section.history, self._past.show(past))

    def continuations(self, request: Request, *, template: str) -> tuple[str, ...]:
        """Return the titles or codes of the candidates in stored order, or of the `catalogue`."""
        chosen = self._chosen.get(template)
        values = self._view.user(request.user_id, request.context)
        if chosen.shape == "chat":
            values["history"] = self._view.events(request.history[-self._section.history :], self._rating)
        n = min(len(request.history), self._section.history) + 1
        items = self.catalogue if request.candidates is None else request.candidates
        return tuple(chosen.answer(values | {"item": self._view.item(item), "n": n}) for item in items)

    def writes_alike(self, template: str) -> bool:
        """Whether a template writes an item the same way in all requests."""
        return self._chosen.get(template).names("target") <= {"item", "noun"}

    def parse(self, completion: str, request: Request, *, template: str) -> Answer | None:
        """Match the first line against titles or codes, ignoring case and punctuation.

        Items that share the title share the first rank.
        """
        name = "code" if self._chosen.get(template).answers_with_code else "title"
        candidates = request.candidates
        known = self._catalogue(name) if candidates is None else items_by_text(self._view, name, candidates)
        return parse_item(completion, known, request)

    def scored_by(self, template: Template) -> str:
        """Return beam search if the whole catalogue is ranked, otherwise likelihood scoring of the candidates."""
        return "search" if self._candidates is None else "likelihood"

    # ----------------------------------------------------------------------- building blocks

    def _check_bare_codes(self) -> None:
        """Check that codes in lists consist of item tokens, so that no code is a prefix of another."""
        names = dict.fromkeys((*(t.name for t in self._chosen.train), *self._chosen.evaluate))
        bare = [name for name in names if self._chosen.get(name).bare]
        # Requests have candidates, so the task needs no catalogue.
        some = next(iter(self._data.dataset.items), None)
        if bare and some is not None and not isinstance(self._view.item(some)["code"], Code):
            raise RecipeError(
                f"tasks.sequential.templates: {bare[0]} lists codes without separators, but codes of this index are "
                "ordinary text; use index: {scheme: token}, collaborative or semantic, or the template "
                "continue-codes",
                kind="contradiction",
                at=f"{self.family}/{bare[0]}",
                column="tasks.sequential.templates",
            )

    def _catalogue(self, name: str) -> Mapping[str, tuple[str, ...]]:
        if name not in self._keys:
            self._keys[name] = items_by_text(self._view, name, self.catalogue)
        return self._keys[name]

    def _train_events(self, template: Template, user: str, rng: random.Random) -> tuple[Event, ...]:
        events = self._events[user]
        if template.shape == "list":
            return sample_window(events, self._section.window, rng)
        at = rng.randrange(1, len(events))
        return (*self._past.show(events[:at]).events, events[at])

    def _example(
        self, template: Template, row: str, user: str, events: tuple[Event, ...], *, first_target: int = 0
    ) -> Example:
        if template.shape == "chat":
            values = self._question(user, events)
            answer = self._answered(values, events[-1])
            return chat_example(template, row, user, values, answer, past=events[:-1], event=events[-1])
        values = self._view.user(user)
        return list_example(template, row, user, values, events, self._answered, first_target=first_target)

    def _solved(self, template: Template, user: str, events: tuple[Event, ...]) -> tuple[Message, ...]:
        if template.shape == "chat":
            values = self._question(user, events)
            return chat_shot_messages(template, values, self._answered(values, events[-1]))
        return list_shot_messages(template, self._view.user(user), events, self._answered)

    def _question(self, user: str, events: tuple[Event, ...]) -> Values:
        stats = self._view.user_stats(user, [events[-1].item_id])
        return self._view.user(user) | stats | {"history": self._view.events(events[:-1], self._rating)}

    def _answered(self, values: Values, event: Event) -> Values:
        return values | {"item": self._view.item(event.item_id)}


def items_by_text(view: DataView, name: str, items: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """Return items by their normalised ``title`` or ``code`` (letters and digits only)."""
    result: dict[str, tuple[str, ...]] = {}
    for item in items:
        key = title_key(str(view.item(item)[name]))
        result[key] = (*result.get(key, ()), item)
    return result


def parse_item(completion: str, known: Mapping[str, tuple[str, ...]], request: Request) -> Ranking | None:
    """Return the items that the first line of an answer names; None if there are none."""
    for key in first_line_keys(completion):
        if key in known:
            items = known[key]
            return Ranking(request_id=request.id, items=items, scores=(1.0,) * len(items))
    return None


FAMILY = Family(
    name="sequential",
    title="Next item from history",
    task=SequentialTask,
    section=SequentialSection,
    answer=Ranking,
    headline="NDCG@10",
    strategies=components_for_family(STRATEGIES, "sequential"),
    baselines=components_for_family(BASELINES, "sequential"),
    controls=RANKING_CONTROLS,
    candidates="users",
)
