"""Direct recommendation: which of these candidates will the user choose?"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import cycle, islice
from string import ascii_uppercase
from typing import Literal

from llmrec.data.split import request_id
from llmrec.errors import DataError, RecipeError, did_you_mean
from llmrec.prompts.template import Template, load_templates
from llmrec.prompts.words import Words
from llmrec.recipe.schema import DirectSection, PreferenceSection
from llmrec.registry import BASELINES, STRATEGIES, components_for_family, import_component, is_plugin
from llmrec.tasks.base import (
    ABOUT_USER,
    USER_STATS,
    DataView,
    UserHistories,
    Values,
    check_not_test,
    iterate_user_passes,
    required_candidates,
    seeded_random,
)
from llmrec.tasks.cases import Cases, held_out_interactions, ranking_cases
from llmrec.tasks.ctr import parse_choice
from llmrec.tasks.family import RANKING_CONTROLS, Family
from llmrec.tasks.fewshot import FewShotDraw
from llmrec.tasks.parsing import parse_ranking
from llmrec.tasks.pool import NegativeSampler, RejectedItemSampler, shuffle_items
from llmrec.tasks.rating import find_scale
from llmrec.tasks.rows import Listwise, chat_example, chat_shot_messages, insert_shots
from llmrec.tasks.sequential import items_by_text, parse_item
from llmrec.tasks.task import Task, TaskInputs, Want
from llmrec.tasks.templates import check_chat_template, select_task_templates
from llmrec.types import (
    Answer,
    Event,
    Example,
    Interaction,
    Message,
    Probability,
    Prompt,
    Ranking,
    Request,
    SplitName,
)

# What a direct template asks for (a candidate's label, the item, or yes/no), and the strategies for each.


AnswerKind = Literal["label", "item", "yes"]

_ANSWER_DESCRIPTIONS: Mapping[AnswerKind, str] = {
    "label": "answers with a candidate's label",
    "item": "answers with the item itself",
    "yes": "answers yes or no to one item",
}
# The default strategy per answer type.
_DEFAULT_STRATEGIES: Mapping[AnswerKind, str] = {"label": "label", "item": "likelihood", "yes": "pointwise-yes"}


def asks_for(template: Template) -> AnswerKind:
    """Return what a template asks for: a label, the item, or yes/no."""
    names = template.names("target")
    return "yes" if "answer" in names else "item" if "item" in names else "label"


def default_strategy_for(template: Template) -> str:
    """Return the cheapest strategy for the answers of a template."""
    return _DEFAULT_STRATEGIES[asks_for(template)]


def is_strategy_supported(template: Template, strategy: str) -> bool:
    """Whether a strategy for direct recommendation supports the answers of a template.

    ``pointwise-yes`` also supports label templates with a yes-or-no question. A plug-in declares the forms in its
    attribute ``reads``: ``label`` (default), ``item`` and ``yes``.
    """
    if is_plugin(STRATEGIES, strategy):
        return asks_for(template) in getattr(import_component(STRATEGIES, strategy, "strategy"), "reads", ("label",))
    asks = asks_for(template)
    return strategy != _DEFAULT_STRATEGIES["item"] if asks == "label" else strategy == _DEFAULT_STRATEGIES[asks]


def check_template_variables(template: Template) -> None:
    """Reject template variables that reveal the answer or are never filled.

    Raises:
        RecipeError: If there are any, if the template is a list, or if its answer is not yes or no.
    """
    check_chat_template(template)
    asks, variables = asks_for(template), ABOUT_USER | {"history"}
    if asks == "yes":
        template.check(turns=variables | {"item", "item_id", "fields"}, lead=(), target={"answer"})
        words = (template.words.says_yes, template.words.says_no)
        if any(template.answer({"answer": word}).strip().casefold() != word.casefold() for word in words):
            raise RecipeError(
                f"template {template.id}: the target is not {' or '.join(words)}; write the target with {{{{ answer "
                "}}",
                kind="bad-value",
                at=template.id,
                column="target",
            )
    elif asks == "item":
        template.check(turns=variables | USER_STATS | {"candidates"}, lead=(), target={"noun", "item"})
    else:
        variables |= USER_STATS | {"candidates", "want"}
        template.check(turns=variables, lead=(), target=variables | {"label"})


def check_strategies(templates: Sequence[Template], strategies: Sequence[str]) -> None:
    """Check that every evaluation template has a compatible strategy, and every strategy a template.

    Raises:
        RecipeError: Naming the first template or strategy without a counterpart.
    """
    for template in templates if strategies else ():
        if not any(is_strategy_supported(template, strategy) for strategy in strategies):
            raise RecipeError(
                f"tasks.direct.strategies: {template.id} {_ANSWER_DESCRIPTIONS[asks_for(template)]}, which "
                f"{', '.join(strategies)} cannot evaluate; add {default_strategy_for(template)}, or set another "
                "template in tasks.direct.eval_templates",
                kind="contradiction",
                at=template.id,
                column="tasks.direct.strategies",
            )
    for strategy in strategies:
        if not any(is_strategy_supported(template, strategy) for template in templates):
            raise_unsupported_strategy(templates[0], strategy)


def check_loss(templates: Sequence[Template], loss: str) -> None:
    """Check that training templates answer with the item if the loss uses title likelihoods.

    Raises:
        RecipeError: Naming the first template that does not.
    """
    other = next((template for template in templates if asks_for(template) != "item"), None)
    if loss != "answer" and other is not None:
        raise RecipeError(
            f"tasks.direct.loss: {loss} needs templates that answer with the item itself, but {other.id} "
            f"{_ANSWER_DESCRIPTIONS[asks_for(other)]}; use templates such as which-title, or set "
            "tasks.direct.loss=answer",
            kind="contradiction",
            at=other.id,
            column="tasks.direct.loss",
        )


def check_asks_yes(template: Template, values: Callable[[str], Values]) -> None:
    """Check that a template has its own text for yes/no questions.

    Args:
        template: One that answers with a label.
        values: Answer form -> the values that a question shows.

    Raises:
        RecipeError: If it does not.
    """
    if template.turns(values("one")) == template.turns(values("yes")):
        raise RecipeError(
            f"template {template.id} has no question for the strategy 'pointwise-yes'; add one under "
            '{% if want == "yes" %}, or choose another template',
            kind="unsupported",
            at=template.id,
        )


def check_rejected(preference: PreferenceSection, count: int, *, retrieved: bool) -> None:
    """Check that the rejected items of preference examples are among the candidates of the question.

    Args:
        preference: The recipe's ``train.preference``.
        count: Number of candidates of a question.
        retrieved: Whether they are retrieved.

    Raises:
        RecipeError: If there are too few of them, or the rejected items are chosen otherwise.
    """
    if preference.negatives >= count:
        raise RecipeError(
            f"train.preference.negatives: a prompt of tasks.direct shows {count} candidates (eval.candidates.count), "
            f"so at most {count - 1} can be rejected",
            kind="too-large",
            column="train.preference.negatives",
        )
    if preference.rejected not in ("uniform", "ratings") or (preference.rejected == "ratings" and retrieved):
        raise RecipeError(
            "train.preference.rejected: tasks.direct rejects other candidates of the prompt, not "
            f"{preference.rejected}; remove the key, and choose harder candidates with eval.candidates.kind",
            kind="contradiction",
            column="train.preference.rejected",
        )


def load_profile_template(name: str) -> Template:
    """Return the template that generates a user profile before candidates are shown.

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


def raise_unsupported_strategy(template: Template, strategy: str) -> None:
    """Raise the error for a strategy that does not support the answers of a template.

    Raises:
        RecipeError: Always.
    """
    raise RecipeError(
        f"the strategy {strategy!r} does not support the answers of template {template.id}, which "
        f"{_ANSWER_DESCRIPTIONS[asks_for(template)]}; use {default_strategy_for(template)!r}, or another template",
        kind="contradiction",
        at=template.id,
    )


def candidate_labels(count: int) -> tuple[str, ...]:
    """Return labels A, B, C, ... for up to 26 candidates, otherwise numbers of equal width."""
    if count <= len(ascii_uppercase):
        return tuple(ascii_uppercase[:count])
    width = len(str(count))
    return tuple(f"{number:0{width}d}" for number in range(1, count + 1))


# Number of candidates in a training example without stored candidate sets.
_DEFAULT_CANDIDATE_COUNT = 20


class DirectTask(Task):
    """The direct recommendation task: choose or rank candidates in one prompt, or answer yes or no about one item.

    A template's target is a candidate's label, an item's code or title, as in P5 (RecSys 2022, appendix D), or yes or
    no to one item.
    """

    family = "direct"

    def __init__(self, section: DirectSection, inputs: TaskInputs) -> None:
        data, templates, candidates = inputs.data, inputs.templates, inputs.candidates
        self._data, self._section, self._seed, self._candidates = data, section, inputs.seed, candidates
        self._chosen = select_task_templates(self.family, section, templates, inputs.index)
        self._view = DataView(data, inputs.index)
        for template in templates.values():
            check_template_variables(template)
        check_strategies([templates[name] for name in self._chosen.evaluate], section.strategies)
        check_loss(self._chosen.train, section.loss)
        self._asks_yes: set[str] = set()
        self._rating = find_scale(data).label if data.train["rating"].null_count() < len(data.train) else None
        self._events = UserHistories(data)
        self._negatives = NegativeSampler(data, candidates.kind if candidates else "uniform")
        self._count = candidates.count if candidates else _DEFAULT_CANDIDATE_COUNT
        loss = None if section.loss == "answer" else Listwise(section.loss, self._count, section.temperature)
        self._listwise, self._rejecting = inputs.listwise or loss, None
        if (preference := inputs.preference) is not None:
            check_rejected(preference, self._count, retrieved=inputs.lists is not None)
            if preference.rejected == "ratings":
                self._rejecting = RejectedItemSampler(self.family, self._events, preference, self._negatives)
        self._lists = inputs.lists
        self._past = inputs.past(section, self._chosen.asking)
        self._shots = inputs.shots(self.family, self._events)

    def examples(self, split: SplitName, limit: int | None = None) -> Iterator[Example]:
        """Yield training or validation examples; see `Task`."""
        check_not_test(split)
        if split == "valid":
            every: Sequence[Interaction] = held_out_interactions(self._data, "valid")
            known = self._lists.held() if self._lists else self._candidates.sets if self._candidates else {}
            if self._lists is not None:
                # As in training, items that were not retrieved are left out.
                every = tuple(held for held in every if request_id(held.user_id, held.item_id) in known)
            for held in every[:limit]:
                name, past = request_id(held.user_id, held.item_id), self._data.history(held.user_id, "valid")
                stored = known.get(name)
                if stored is None or held.item_id not in stored:
                    rng = seeded_random("direct valid", self._seed, name)
                    had = [event.item_id for event in past]
                    stored = self._sample_pool(held.user_id, held.item_id, self._count, rng, had)
                event = Event(item_id=held.item_id)
                yield self._example(self._chosen.train[0], f"direct/valid/{name}", held.user_id, past, event, stored)
            return
        users = self._rejecting.users if self._rejecting is not None else self._training_users
        for row, user, rng in iterate_user_passes(self.family, users, self._seed, limit):
            template, events = rng.choice(self._chosen.train), self._events[user]
            if self._rejecting is not None:
                at, lower = self._rejecting.pair(user, rng)
                item, some = events[at].item_id, self._count - 1 - len(lower)
                pool = shuffle_items((item, *lower, *self._negatives.draw(user, some, rng, but=(item,))), rng)
                yield self._example(template, row, user, events[:at], events[at], pool, lower)
                continue
            at, pool = self._question(user, rng)
            yield self._example(template, row, user, events[:at], events[at], pool)

    def cases(self, split: SplitName) -> Cases:
        """Return all held-out interactions with their stored candidates.

        Raises:
            RecipeError: If the task was built without candidate sets.
        """
        if self._candidates is None:
            raise RecipeError(
                "tasks.direct ranks stored candidates; draw candidates first "
                "(llmrec.data.candidates.sample_candidates)",
                kind="missing-value",
                column="candidates",
            )
        return ranking_cases(self._data, split, self._candidates, self.family)

    def prompt(self, request: Request, *, template: str, shots: int = 0, want: Want = "one") -> Prompt:
        """Render a request; see `Task`.

        Args:
            request: The request, with candidates.
            template: Name of the template.
            shots: Number of few-shot examples.
            want: ``one`` label, a ``ranking`` of all labels, or a ``yes`` or no to the only candidate. Templates whose
                answer is not a label support one form only.

        Raises:
            DataError: If the question is about one item, and the request has several candidates.
            RecipeError: If the template has no text for the requested answer.
        """
        chosen = self._chosen.get(template)
        pool = required_candidates(request)
        form = self._answer_type(chosen, want, request)
        drawn = self.draw_shots(request, shots)
        turns = []
        for index, shot in enumerate(drawn.windows):
            rng = seeded_random("direct shot candidates", self._seed, request.id, str(index))
            if form == "yes":
                turns.append(self._solved_yes(chosen, shot.user_id, shot.events, index, rng))
                continue
            shown = self._sample_pool(shot.user_id, shot.events[-1].item_id, len(pool), rng)
            turns.append(self._solved(chosen, shot.user_id, shot.events, shown, form))
        values = self._asking(chosen, request.user_id, drawn.history, pool, form, drawn.context(request.context))
        return Prompt(messages=insert_shots(chosen.turns(values), turns))

    def questions(self, count: int) -> list[Request]:
        """Return ``count`` questions about training interactions, with candidates as in evaluation.

        They do not depend on held-out data: the chosen item is from a training interaction, and the others are drawn
        from all items without a training interaction of the user.
        """
        users = sorted(self._training_users)
        seeded_random("direct questions", self._seed, "order").shuffle(users)
        result = []
        for number, user in enumerate(islice(cycle(users), count)):
            # Not the training examples, whose answers a fine-tuned model may have memorised.
            rng, events = seeded_random("direct question", self._seed, user, str(number)), self._events[user]
            at, pool = self._question(user, rng)
            result.append(Request(id=f"direct/question/{number}", user_id=user, history=events[:at], candidates=pool))
        return result

    # ----------------------------------------------------------------------- the first step of two-step strategies

    @cached_property
    def profile_template(self) -> Template:
        """The template that generates a user profile."""
        return load_profile_template(self._section.profile.template)

    @property
    def profile_tokens(self) -> int:
        """The maximum number of tokens of a profile."""
        return self._section.profile.max_tokens

    def profile_prompt(self, request: Request) -> Prompt:
        """Render the prompt for a user profile, which shows only the history."""
        past = request.history[-self._section.profile.history :]
        values = self._view.user(request.user_id, request.context) | {"history": self._view.events(past, self._rating)}
        return Prompt(messages=self.profile_template.turns(values))

    def shows_profile(self, template: str) -> bool:
        """Whether a template shows a profile."""
        return self._chosen.get(template).shows_profile

    # ----------------------------------------------------------------------- asking

    def asked_by(self, template: Template, strategies: Sequence[str], *, tuned: bool) -> tuple[str, ...]:
        """Return the strategies that support the answers of a template."""
        return tuple(name for name in strategies if is_strategy_supported(template, name))

    def words(self, template: str) -> Words:
        """Return the words of the language of a template."""
        return self._chosen.words(template)

    def scored_by(self, template: Template) -> str:
        """Return the cheapest strategy that supports the answers of a template."""
        return default_strategy_for(template)

    def draw_shots(self, request: Request, shots: int) -> FewShotDraw:
        """Draw training interactions for few-shot examples; also return the remaining history of the question."""
        past, about = request.history, required_candidates(request)
        return self._shots.draw(request, past, shots, self._section.history, self._past.show(past, about))

    def continuations(self, request: Request, *, template: str) -> tuple[str, ...]:
        """Return the labels, titles or codes of the candidates in stored order, or the words for yes and no."""
        chosen, pool = self._chosen.get(template), required_candidates(request)
        asks = asks_for(chosen)
        if asks == "yes":
            return tuple(chosen.answer({"answer": text}) for text in (chosen.words.says_yes, chosen.words.says_no))
        if asks == "label":
            return candidate_labels(len(pool))
        noun = self._data.dataset.noun
        return tuple(chosen.answer({"noun": noun, "item": self._view.item(item)}) for item in pool)

    def parse(self, completion: str, request: Request, *, template: str) -> Answer | None:
        """Parse labels and titles in order; candidates that are not mentioned are left out.

        If the answer is an item, its code or title is the first line; a yes or no is a probability of 1 or 0.
        """
        chosen, pool = self._chosen.get(template), required_candidates(request)
        asks = asks_for(chosen)
        if asks == "yes":
            index = parse_choice(completion, self.continuations(request, template=template), chosen.words)
            return None if index is None else Probability(request_id=request.id, value=1.0 if index == 0 else 0.0)
        if asks == "item":
            name = "code" if chosen.answers_with_code else "title"
            return parse_item(completion, items_by_text(self._view, name, pool), request)
        indices = parse_ranking(
            completion, candidate_labels(len(pool)), [self._view.title(item) for item in pool], chosen.words
        )
        if not indices:
            return None
        scores = tuple(float(len(indices) - rank) for rank in range(len(indices)))
        return Ranking(request_id=request.id, items=tuple(pool[index] for index in indices), scores=scores)

    # ----------------------------------------------------------------------- building blocks

    @cached_property
    def _training_users(self) -> list[str]:
        """Users with training examples."""
        if self._lists is None:
            return list(self._events)
        results = [user for user in self._events if self._lists.of(user)]
        if not results:
            raise DataError(
                f"tasks.direct: the retriever finds no target of a training example among its {self._count} "
                "candidates, so there is nothing to train on; raise eval.candidates.count, or choose another "
                "eval.candidates.retriever",
                kind="too-few",
                column="eval.candidates",
            )
        return results

    def _question(self, user: str, rng: random.Random) -> tuple[int, tuple[str, ...]]:
        """Return the index of a user's training interaction, and candidates as in evaluation."""
        if self._lists is not None:
            at, result = rng.choice(self._lists.of(user))
            return at, shuffle_items(result, rng)
        events = self._events[user]
        # The first interaction has no history, so it is used only for users without other interactions.
        at = rng.randrange(min(1, len(events) - 1), len(events))
        return at, self._sample_pool(user, events[at].item_id, self._count, rng)

    def _sample_pool(
        self, user: str, item: str, count: int, rng: random.Random, had: Sequence[str] = ()
    ) -> tuple[str, ...]:
        return shuffle_items((item, *self._negatives.draw(user, count - 1, rng, but=(item, *had))), rng)

    def _values(
        self, user: str, past: Sequence[Event], pool: Sequence[str], want: str, context: Mapping[str, str] | None = None
    ) -> Values:
        labels = candidate_labels(len(pool))
        message = [self._view.candidate(user, item) for item in pool]
        codes = [self._view.item(item)["code"] for item in pool]
        listed = [
            entry | {"label": label, "code": code} for label, code, entry in zip(labels, codes, message, strict=True)
        ]
        # Of the user's training items, the candidates contain only the chosen one; excluding all of them excludes it.
        about = self._view.user(user, context) | self._view.user_stats(user, pool)
        return about | {"history": self._view.events(past), "candidates": listed, "want": want}

    def _asking(
        self,
        template: Template,
        user: str,
        past: Sequence[Event],
        pool: Sequence[str],
        want: str,
        context: Mapping[str, str] | None = None,
    ) -> Values:
        """Return the items in a question: the candidates, or the single item of a yes/no template."""
        if asks_for(template) != "yes":
            return self._values(user, past, pool, want, context)
        (item,) = pool
        return self._view.user(user, context) | self._view.about(item) | {"history": self._view.events(past)}

    def _target_values(self, template: Template, values: Values, pool: Sequence[str], item: str) -> Values:
        """Return the target of an example: the label of the chosen item, or the item."""
        if asks_for(template) == "item":
            return values | {"item": self._view.item(item)}
        return values | {"label": candidate_labels(len(pool))[pool.index(item)]}

    def _example(
        self,
        template: Template,
        row: str,
        user: str,
        past: Sequence[Event],
        event: Event,
        pool: tuple[str, ...],
        lower: tuple[str, ...] = (),
    ) -> Example:
        if asks_for(template) == "yes":
            return self._yes_example(template, row, user, past, event)
        shown = self._past.show(past, pool)
        values = self._values(user, shown.events, pool, "one", shown.context({}))
        answer = self._target_values(template, values, pool, event.item_id)
        example = chat_example(template, row, user, values, answer, past=shown.events, event=event)
        others = tuple(item for item in pool if item != event.item_id)
        count = 0 if self._listwise is None else self._listwise.size - 1
        drawn = (
            others if count == len(others) else seeded_random("direct rejected", self._seed, row).sample(others, count)
        )
        answers = (self._target_values(template, values, pool, item) for item in lower or drawn)
        rejected = tuple(template.answer(entry) + template.tail for entry in answers)
        return replace(example, negatives=others, rejected=rejected)

    def _yes_example(self, template: Template, row: str, user: str, past: Sequence[Event], event: Event) -> Example:
        """Return an example with answer yes about a chosen item or, equally often, no about a negative."""
        rng = seeded_random("direct yes or no", self._seed, row)
        yes = rng.random() < 0.5
        had = [event.item_id, *(entry.item_id for entry in past)]
        item = event.item_id if yes else self._negatives.draw(user, 1, rng, but=had)[0]
        shown = self._past.show(past, [item])
        values = self._asking(template, user, shown.events, (item,), "yes", shown.context({}))
        answer = values | {"answer": template.words.answer_word(yes=yes)}
        example = chat_example(template, row, user, values, answer, past=shown.events, event=event)
        if self._listwise is not None:
            example = replace(example, rejected=(template.answer({"answer": template.words.answer_word(yes=not yes)}),))
        # The user has no interaction with a negative, and the interaction with the item is not shown.
        return example if yes else replace(example, pairs=example.pairs[:-1], negatives=(item,))

    def _solved(
        self, template: Template, user: str, events: tuple[Event, ...], pool: tuple[str, ...], want: str
    ) -> tuple[Message, ...]:
        values = self._values(user, events[:-1], pool, want)
        answer = self._target_values(template, values, pool, events[-1].item_id)
        if want == "ranking":
            # The data determine only the first rank; the others keep their order.
            best = str(answer["label"])
            others = [label for label in candidate_labels(len(pool)) if label != best]
            answer |= {"label": ", ".join([best, *others])}
        return chat_shot_messages(template, values, answer)

    def _solved_yes(
        self, template: Template, user: str, events: tuple[Event, ...], index: int, rng: random.Random
    ) -> tuple[Message, ...]:
        """Return a few-shot example with the answer yes or no, alternating by index."""
        chosen, other = events[-1].item_id, self._negatives.draw(user, 1, rng)[0]
        values = self._asking(template, user, events[:-1], (other if index % 2 else chosen,), "yes")
        # Both exclude the same interaction, so that user statistics do not reveal the answer.
        values |= self._view.user_stats(user, [chosen])
        name = "answer" if asks_for(template) == "yes" else "label"
        return chat_shot_messages(template, values, values | {name: template.words.answer_word(yes=not index % 2)})

    def _answer_type(self, template: Template, want: str, request: Request) -> str:
        """Return the requested type of answer, if the template supports it."""
        asks = asks_for(template)
        if (asks == "item" and want != "one") or (asks == "yes" and want == "ranking"):
            raise_unsupported_strategy(template, "list" if want == "ranking" else "pointwise-yes")
        if asks != "yes" and want != "yes":
            return want
        pool = required_candidates(request)
        if len(pool) != 1:
            raise DataError(
                f"request {request.id!r}: a yes/no question needs one candidate, but the request has {len(pool)}",
                kind="bad-value",
                column="candidates",
            )
        if asks == "label" and template.name not in self._asks_yes:
            check_asks_yes(template, lambda want: self._values(request.user_id, (), pool, want))
            self._asks_yes.add(template.name)
        return "yes"


FAMILY = Family(
    name="direct",
    title="Pick from candidates",
    task=DirectTask,
    section=DirectSection,
    answer=Ranking,
    headline="NDCG@10",
    strategies=components_for_family(STRATEGIES, "direct"),
    baselines=components_for_family(BASELINES, "direct"),
    controls=RANKING_CONTROLS,
    candidates="users",
    lists=True,
)
