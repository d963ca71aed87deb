"""Alignment of item codes and titles: predict a title from a code or vice versa (LC-Rec, ICDE 2024, section 3.3)."""

from __future__ import annotations

from collections.abc import Iterator

from llmrec.errors import DataError, RecipeError
from llmrec.prompts.template import Template
from llmrec.prompts.values import Fields
from llmrec.recipe.schema import AlignmentSection
from llmrec.registry import BASELINES, STRATEGIES, components_for_family
from llmrec.tasks.base import (
    DataView,
    Values,
    check_not_test,
    describe_shots,
    iterate_user_passes,
    requested_item,
    required_candidates,
    seeded_random,
)
from llmrec.tasks.family import Family
from llmrec.tasks.fewshot import FewShotDraw, Window
from llmrec.tasks.held_items import alignment_request_id, select_held_items
from llmrec.tasks.rows import chat_example, chat_shot_messages, insert_shots
from llmrec.tasks.sequential import items_by_text, parse_item
from llmrec.tasks.task import Task, TaskInputs, Want, check_single_answer
from llmrec.tasks.templates import check_chat_template, select_task_templates
from llmrec.types import Answer, Case, Event, Example, Message, Prompt, Ranking, Request, SplitName

NO_USER = ""
"""The user id of the examples; it does not occur in data."""


class AlignmentTask(Task):
    """The alignment task: predict an item's title from its code, or its code from its text.

    There is no user and no history. Items are held out: their pairs of code and text are in no training example,
    and evaluation uses only them, so that a correct answer cannot be memorised.

    A case does not name its item, since the item is the answer; its id is a hash that only this task can resolve. Other
    requests name their item.
    """

    family = "alignment"

    def __init__(self, section: AlignmentSection, inputs: TaskInputs) -> None:
        """Create the task. Few-shot examples are drawn at random, since there are no histories.

        Raises:
            RecipeError: If there is no index, no item is left to train on, or a template does not map a text to a code
                or a code to a text.
        """
        data, seed, index = inputs.data, inputs.seed, inputs.index
        if index is None:
            raise RecipeError(
                "tasks.alignment: the task trains the meaning of item codes and needs an index; add an index to the "
                "recipe, such as index: {scheme: semantic}, or remove the task",
                kind="missing-key",
                column="index",
            )
        self._data, self._seed, self._candidates = data, seed, inputs.candidates
        self._chosen = select_task_templates(self.family, section, inputs.templates, index)
        self._view = DataView(data, index)
        self.held = inputs.held or select_held_items(data.dataset.items, section.held_out, seed=seed)
        self._trained = tuple(item for item in sorted(data.dataset.items) if item not in self.held.items)
        if not self._trained:
            raise RecipeError(
                f"tasks.alignment.held_out: {section.held_out:g} leaves no item to train on; lower this share",
                kind="too-few",
                column="tasks.alignment.held_out",
            )
        self._named = {alignment_request_id(item, seed): item for item in sorted(self.held.items)}
        for template in inputs.templates.values():
            self._check(template)

    def examples(self, split: SplitName, limit: int | None = None) -> Iterator[Example]:
        """Yield training or validation examples; see `Task`. Validation examples use the training templates in turn."""
        check_not_test(split)
        if split == "valid":
            for index, item in enumerate(self.held.valid[:limit]):
                template = self._chosen.train[index % len(self._chosen.train)]
                yield self._example(template, f"alignment/valid/{item}", item)
            return
        for row, item, rng in iterate_user_passes(self.family, self._trained, self._seed, limit):
            yield self._example(rng.choice(self._chosen.train), row, item)

    def cases(self, split: SplitName) -> list[Case]:
        """Return one question for every held-out item of a split.

        Each question is a separate user, since intervals and tests resample users.

        Raises:
            RecipeError: If the task was built without candidate sets.
        """
        part = self.held.part(split)
        if self._candidates is None:
            raise RecipeError(
                "tasks.alignment ranks stored candidates; draw candidates first (llmrec.tasks.held_items)",
                kind="missing-value",
                column="candidates",
            )
        results = []
        for item in part:
            name = alignment_request_id(item, self._seed)
            if name not in self._candidates.sets:
                raise DataError(
                    "tasks.alignment: the stored candidates lack a held-out item, since they were drawn for another "
                    "split, seed or data set; draw the candidates again",
                    kind="mismatch",
                    column="tasks.alignment",
                )
            request = Request(id=name, user_id=name, candidates=self._candidates.sets[name])
            results.append(Case(request=request, truth=item))
        return results

    def prompt(self, request: Request, *, template: str, shots: int = 0, want: Want = "one") -> Prompt:
        """Render a request; see `Task`."""
        check_single_answer(self.family, want)
        chosen = self._chosen.get(template)
        shown = [window.events[-1].item_id for window in self.draw_shots(request, shots).windows]
        turns = [self._solved(chosen, item) for item in shown]
        return Prompt(messages=insert_shots(chosen.turns(self._question(chosen, self._item(request))), turns))

    def draw_shots(self, request: Request, shots: int) -> FewShotDraw:
        """Draw training items for few-shot examples, as interactions without a user.

        Raises:
            DataError: If there are too few.
        """
        if shots == 0:
            return FewShotDraw((), ())
        # One more than needed, since the item of the request may be among them.
        rng = seeded_random("alignment shots", self._seed, request.id)
        sample = rng.sample(self._trained, min(shots + 1, len(self._trained)))
        drawn = [item for item in sample if item != self._item(request)][:shots]
        if len(drawn) < shots:
            raise DataError(
                f"tasks.alignment: {shots} few-shot examples are requested, but there are only {len(self._trained)} "
                "training items, including the item of the request; lower eval.shots.k",
                kind="too-few",
                column="eval.shots.k",
            )
        return FewShotDraw(tuple(Window(NO_USER, (Event(item_id=item),)) for item in drawn), ())

    def continuations(self, request: Request, *, template: str) -> tuple[str, ...]:
        """Return the titles or codes of the candidates, in stored order."""
        chosen = self._chosen.get(template)
        return tuple(chosen.answer(self._answer(chosen, item)) for item in required_candidates(request))

    def parse(self, completion: str, request: Request, *, template: str) -> Answer | None:
        """Match the first line against the titles or codes of the candidates; equal matches share a rank."""
        chosen = self._chosen.get(template)
        name = "code" if chosen.answers_with_code else "title"
        return parse_item(completion, items_by_text(self._view, name, required_candidates(request)), request)

    def shows(self, template: Template, shots: int) -> str:
        """Describe what a prompt shows; see `Task`."""
        return f"{'text' if template.answers_with_code else 'code'} of the item{describe_shots(shots)}"

    def training_size(self) -> int:
        """Return the number of items whose text and code may be trained together."""
        return len(self._trained)

    def scored_by(self, template: Template) -> str:
        """Return the strategy that scores candidates."""
        return "likelihood"

    # ----------------------------------------------------------------------- building blocks

    def _check(self, template: Template) -> None:
        """Reject templates that do not map codes to texts or texts to codes."""
        check_chat_template(template)
        if template.asks_with_code == template.answers_with_code:
            raise RecipeError(
                f"template {template.id}: an alignment template shows item.code and asks for item.title, or shows "
                "item.title and asks for item.code; use item.code in either user or target",
                kind="bad-value",
                at=template.id,
            )
        variables = {"noun", "item"} | ({"fields"} if template.answers_with_code else set())
        template.check(turns=variables, lead=(), target={"noun", "item"})
        template.turns(self._question(template, self._trained[0]))
        template.answer(self._answer(template, self._trained[0]))

    def _question(self, template: Template, item: str) -> Values:
        values: Values = {"noun": self._data.dataset.noun}
        if template.answers_with_code:
            return values | {"item": self._text(item), "fields": self._view.about(item)["fields"]}
        return values | {"item": self._code(item)}

    def _answer(self, template: Template, item: str) -> Values:
        shown = self._code(item) if template.answers_with_code else self._text(item)
        return {"noun": self._data.dataset.noun, "item": shown}

    def _code(self, item: str) -> dict[str, object]:
        return {"code": self._view.item(item)["code"]}

    def _text(self, item: str) -> Fields:
        return Fields({name: value for name, value in self._view.item(item).items() if name != "code"})

    def _example(self, template: Template, row: str, item: str) -> Example:
        question, answer = self._question(template, item), self._answer(template, item)
        return chat_example(template, row, NO_USER, question, answer, past=(), event=Event(item_id=item))

    def _solved(self, template: Template, item: str) -> tuple[Message, ...]:
        return chat_shot_messages(template, self._question(template, item), self._answer(template, item))

    def _item(self, request: Request) -> str:
        if request.item is None and request.id in self._named:
            return self._named[request.id]
        return requested_item(request, self.family)


FAMILY = Family(
    name="alignment",
    title="Item IDs and item texts",
    task=AlignmentTask,
    section=AlignmentSection,
    answer=Ranking,
    headline="NDCG@10",
    strategies=components_for_family(STRATEGIES, "alignment"),
    baselines=components_for_family(BASELINES, "alignment"),
    controls=("random",),
    candidates="items",
)
