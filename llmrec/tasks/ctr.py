"""Click-through rate (CTR) prediction: will this user like this item, yes or no? (TALLRec, RecSys 2023, section 3)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from llmrec.data.split import history_without_item, liked_threshold, request_id, request_of, scale_of
from llmrec.errors import DataError, RecipeError
from llmrec.prompts.template import Template
from llmrec.prompts.words import Words, english_words
from llmrec.recipe.schema import CtrSection
from llmrec.registry import BASELINES, STRATEGIES, components_for_family
from llmrec.tasks.base import (
    ABOUT_ITEM,
    ABOUT_USER,
    NO,
    USER_STATS,
    YES,
    DataView,
    UserHistories,
    Values,
    check_not_test,
    iterate_user_passes,
    rated_events,
    requested_item,
    sample_window,
)
from llmrec.tasks.cases import Cases, held_out_interactions
from llmrec.tasks.family import Family
from llmrec.tasks.fewshot import FewShotDraw
from llmrec.tasks.parsing import MAX_ANSWER_LENGTH
from llmrec.tasks.rows import (
    chat_example,
    chat_shot_messages,
    insert_shots,
    list_example,
    list_prompt,
    list_shot_messages,
    list_steps,
    merge_rejected,
)
from llmrec.tasks.task import Task, TaskInputs, Want, check_single_answer
from llmrec.tasks.templates import select_task_templates
from llmrec.types import (
    Answer,
    Case,
    Event,
    Example,
    Interaction,
    Message,
    Probability,
    Prompt,
    Request,
    SplitName,
)

_TRIMMED_CHARACTERS = " \t\r\n*_`\"'“”‘’«»([<>#-–—:."
# In phrases such as "No idea" or "no way to tell", "no" is not an answer.
_ANSWER_END = re.compile(r"\s*(?:$|\n|[^\w\s])")


class CtrTask(Task):
    """The CTR task: given titles that a user liked and disliked, predict whether the user likes another item.

    A list template has the answers of one user line by line; the history is in the answer, so that one training
    example teaches an answer at every position.

    A rating of at least ``liked`` is a yes. With ``balance: user`` every user has as many yes questions as no
    questions, so that properties of the user, such as the share of likes, do not reveal the answer.
    """

    family = "ctr"
    _column = "rating"
    kinds = (YES, NO)

    def __init__(self, section: CtrSection, inputs: TaskInputs) -> None:
        data, templates = inputs.data, inputs.templates
        self._data, self._section, self._seed = data, section, inputs.seed
        self._events = UserHistories(data, rated=True)
        if inputs.learns and not self._events:
            raise DataError(
                f"tasks.ctr: {data.dataset.name} has no ratings, from which likes are derived; set "
                "data.columns.rating, or remove the task",
                kind="missing-column",
                at=data.dataset.name,
                column="rating",
            )
        self.liked = liked_threshold(scale_of(data), section.liked)
        self._chosen = select_task_templates(self.family, section, templates, inputs.index)
        self._view = DataView(data, inputs.index)
        for template in templates.values():
            if template.shape == "list":
                template.check(turns=ABOUT_USER, lead=ABOUT_USER | ABOUT_ITEM | {"n"}, target={"answer"})
            else:
                variables = ABOUT_USER | ABOUT_ITEM | USER_STATS | {"history", "liked", "disliked"}
                template.check(turns=variables, lead=(), target={"answer"})
        self._listwise = inputs.listwise
        self._past = inputs.past(section, self._chosen.asking)
        self._shots = inputs.shots(self.family, self._events, label=lambda event: self._is_liked(event.rating))

    @property
    def training_templates(self) -> tuple[Template, ...]:
        """The templates used in training."""
        return tuple(self._chosen.train)

    def examples(self, split: SplitName, limit: int | None = None) -> Iterator[Example]:
        """Yield training or validation examples; see `Task`. Validation uses all rated interactions."""
        check_not_test(split)
        if split == "valid":
            for held in self._rated_holdouts("valid")[:limit]:
                past = rated_events(self._data.history(held.user_id, "valid"))
                event = Event(item_id=held.item_id, rating=held.rating)
                row = f"ctr/valid/{request_id(held.user_id, held.item_id)}"
                yield self._asking(self._chosen.train[0], row, held.user_id, past, event)
            return
        for row, user, rng in iterate_user_passes(self.family, list(self._events), self._seed, limit):
            template = rng.choice(self._chosen.train)
            events = self._events[user]
            if template.shape == "list" and self._listwise is None:
                shown = _last_rating_per_item(sample_window(events, self._section.window, rng))
                yield self._listed(template, row, user, shown, last_only=False)
                continue
            # The first interaction has no history, so it is used only for users without other interactions.
            at = rng.randrange(min(1, len(events) - 1), len(events))
            ends = [events[at]]
            if self._listwise is not None:
                ends.append(
                    replace(events[at], rating=self.liked - 1 if self._is_liked(events[at].rating) else self.liked)
                )
            yield merge_rejected(self._asking(template, row, user, events[:at], end) for end in ends)

    def kind(self, example: Example) -> str:
        """Return the class of a training example, such as yes or no, for balancing."""
        yes, _ = self._answers(example.template)
        text = example.answer[-1].text.removesuffix(self._chosen.get(example.template).tail)
        return YES if text == yes else NO

    def cases(self, split: SplitName) -> Cases:
        """Return the held-out ratings as yes/no questions, with truth 1 for yes and 0 for no.

        With ``balance: user`` the user's rarer answer determines the number of each, the first ones in seeded order.

        Raises:
            DataError: If a balanced set is requested and no user has both answers.
        """
        result = self._rated_holdouts(split)
        balanced, most = self._section.balance == "user", self._section.per_user or len(result)
        counts = Counter((held.user_id, self._is_liked(held.rating)) for held in result)
        questions: Counter[tuple[str, bool]] = Counter()
        kept = []
        for held in result:
            user, truth = held.user_id, self._is_liked(held.rating) and balanced
            room = min(counts[user, False], counts[user, True], most // 2) if balanced else most
            questions[user, truth] += 1
            if questions[user, truth] <= room:
                kept.append(held)
        if result and not kept:
            raise DataError(
                f"tasks.ctr.balance: no user of the {split} split has both likes and dislikes, which balanced cases "
                "need; hold out several interactions per user (data.split.kind=last_share), or set "
                "tasks.ctr.balance=none",
                kind="too-few",
                column="tasks.ctr.balance",
            )
        return Cases(kept, lambda held: self._case(held, split))

    def prompt(self, request: Request, *, template: str, shots: int = 0, want: Want = "one") -> Prompt:
        """Render a request; see `Task`."""
        check_single_answer(self.family, want)
        chosen = self._chosen.get(template)
        drawn = self.draw_shots(request, shots)
        turns = [self._solved(chosen, shot.user_id, shot.events) for shot in drawn.windows]
        item, context = requested_item(request, self.family), drawn.context(request.context)
        if chosen.shape == "chat":
            values = self._values(request.user_id, drawn.history, item, context)
            return Prompt(messages=insert_shots(chosen.turns(values), turns))
        values = self._view.user(request.user_id, context)
        listed = list_steps(values, drawn.history, self._answered(chosen))
        return list_prompt(chosen, values, listed, self._view.pair(request.user_id, item), turns)

    def draw_shots(self, request: Request, shots: int) -> FewShotDraw:
        """Draw training interactions for few-shot examples; also return the remaining history of the question."""
        item = requested_item(request, self.family)
        past = history_without_item(rated_events(request.history), item)
        return self._shots.draw(request, past, shots, self._section.history, self._past.show(past, [item]))

    def continuations(self, request: Request, *, template: str) -> tuple[str, ...]:
        """Return the words for yes and no of a template.

        Raises:
            RecipeError: If both are the same.
        """
        return self._answers(template)

    def parse(self, completion: str, request: Request, *, template: str) -> Answer | None:
        """Parse a leading yes or no; None if there is none or the text contains both."""
        choice = parse_choice(completion, self.continuations(request, template=template), self._chosen.words(template))
        return None if choice is None else Probability(request_id=request.id, value=1.0 if choice == 0 else 0.0)

    def reward(self, answer: Answer, case: Case) -> float:
        """Return 1 - (probability - truth)^2 (Brier, 1950)."""
        if not isinstance(answer, Probability):
            return 0.0
        return 1.0 - (answer.value - float(case.truth)) ** 2

    def scored_by(self, template: Template) -> str:
        """Return the strategy that compares the probabilities of yes and no."""
        return "yes-no"

    @property
    def baseline_options(self) -> Mapping[str, float | None]:
        """Lowest rating for which the answer is yes, for models and baselines."""
        return {"liked": self._section.liked}

    @property
    def calibrates(self) -> bool:
        """Whether answers are calibrated on validation interactions."""
        return self._section.calibrate == "valid"

    @property
    def users_kind(self) -> str | None:
        """Description of the evaluated users in metric signatures."""
        return "balanced" if self._section.balance == "user" else None

    # ----------------------------------------------------------------------- building blocks

    def _answers(self, template: str) -> tuple[str, str]:
        chosen = self._chosen.get(template)
        yes, no = (chosen.answer({"answer": text}) for text in (chosen.words.says_yes, chosen.words.says_no))
        if yes == no:
            raise RecipeError(
                f"template {chosen.id}: the target is {yes!r} for both yes and no; write the target with {{{{ answer "
                "}}",
                kind="bad-value",
                at=chosen.id,
                column="target",
            )
        return yes, no

    def _rated_holdouts(self, split: SplitName) -> list[Interaction]:
        return [held for held in held_out_interactions(self._data, split) if held.rating is not None]

    def _case(self, held: Interaction, split: SplitName) -> Case:
        request = request_of(self._data, held, split, item=held.item_id)
        return Case(request=request, truth=float(self._is_liked(held.rating)))

    def _values(self, user: str, past: Sequence[Event], item: str, context: Mapping[str, str] | None = None) -> Values:
        sides: dict[bool, list[Event]] = {True: [], False: []}
        for event in past:
            sides[self._is_liked(event.rating)].append(event)
        lists = {"liked": self._view.events(sides[True]), "disliked": self._view.events(sides[False])}
        shown = {"history": self._view.events(past), **lists}
        return self._view.user(user, context) | self._view.pair(user, item) | shown

    def _is_liked(self, rating: float | None) -> bool:
        return rating is not None and rating >= self.liked

    def _with_answer(self, template: Template, values: Values, event: Event) -> Values:
        return values | {"answer": template.words.answer_word(yes=self._is_liked(event.rating))}

    def _answered(self, template: Template) -> Callable[[Values, Event], Values]:
        """Return the function that creates the template variables of an answered list entry."""

        def answered(values: Values, event: Event) -> Values:
            return self._with_answer(template, values | self._view.pair(str(values["user_id"]), event.item_id), event)

        return answered

    def _asking(self, template: Template, row: str, user: str, past: Sequence[Event], event: Event) -> Example:
        """Return an example with one question, about the given interaction."""
        shown = self._past.show(history_without_item(past, event.item_id), [event.item_id])
        if template.shape == "list":
            events = (*shown.events, event)
            return self._listed(template, row, user, events, last_only=True, context=shown.context({}))
        values = self._values(user, shown.events, event.item_id, shown.context({}))
        answer = self._with_answer(template, values, event)
        return chat_example(template, row, user, values, answer, past=shown.events, event=event)

    def _listed(
        self,
        template: Template,
        row: str,
        user: str,
        events: Sequence[Event],
        *,
        last_only: bool,
        context: Mapping[str, str] | None = None,
    ) -> Example:
        values, first = self._view.user(user, context), len(events) - 1 if last_only else 0
        return list_example(template, row, user, values, events, self._answered(template), first_target=first)

    def _solved(self, template: Template, user: str, events: Sequence[Event]) -> tuple[Message, ...]:
        event = events[-1]
        if template.shape == "list":
            listed = (*history_without_item(events[:-1], event.item_id), event)
            return list_shot_messages(template, self._view.user(user), listed, self._answered(template))
        values = self._values(user, history_without_item(events[:-1], event.item_id), event.item_id)
        return chat_shot_messages(template, values, self._with_answer(template, values, event))


def _last_rating_per_item(events: Sequence[Event]) -> tuple[Event, ...]:
    """Keep only the last rating of each item, since earlier ratings would reveal the answer."""
    last = {event.item_id: index for index, event in enumerate(events)}
    return tuple(event for index, event in enumerate(events) if last[event.item_id] == index)


def parse_choice(text: str, answers: Sequence[str], words: Words | None = None) -> int | None:
    """Parse which of two answers a text begins with.

    The answer must be the first word, apart from punctuation and a lead such as "The answer is". Refusals, answers in
    another language, texts that name both, and a "No" that begins a phrase ("No idea") are not parsed.

    Args:
        text: A completion.
        answers: The words for yes and no.
        words: Words of the prompt's language, English by default.

    Returns:
        The index of the answer in ``answers``, or None.
    """
    lead = (words or english_words()).lead
    message = lead.sub("", text[:MAX_ANSWER_LENGTH].casefold().strip(_TRIMMED_CHARACTERS), count=1).strip(
        _TRIMMED_CHARACTERS
    )
    sought = [answer.casefold().strip(_TRIMMED_CHARACTERS) for answer in answers]
    named = [re.search(rf"(?<!\w){re.escape(word)}(?!\w)", message) for word in sought]
    results = [index for index, match in enumerate(named) if match is not None]
    if len(results) != 1:
        return None
    match = named[results[0]]
    assert match is not None
    leads = match.start() == 0 and (results[0] == 0 or _ANSWER_END.match(message, match.end()) is not None)
    return results[0] if leads else None


FAMILY = Family(
    name="ctr",
    title="Like prediction",
    task=CtrTask,
    section=CtrSection,
    answer=Probability,
    headline="AUC",
    strategies=components_for_family(STRATEGIES, "ctr"),
    baselines=components_for_family(BASELINES, "ctr"),
    controls=("like-ratio",),
    column="rating",
)
