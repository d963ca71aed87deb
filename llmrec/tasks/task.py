"""The interface of a recommendation task, `Task`, and its inputs, `TaskInputs`.

The defaults suit most families; a task that derives from `Task` overrides only where it differs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from llmrec.data.candidates import CandidateSets
from llmrec.data.split import SplitDataset
from llmrec.errors import RecipeError
from llmrec.prompts.template import Template
from llmrec.prompts.words import Words, english_words
from llmrec.recipe.schema import PreferenceSection, RatingSection, SequentialSection, ShotChoice, TaskSection
from llmrec.tasks.base import (
    UserHistories,
    count_training_rows,
    describe_events,
    ranking_reward,
    sample_window,
    seeded_random,
)
from llmrec.tasks.fewshot import FewShotDraw, ShotPool
from llmrec.tasks.held_items import HeldItems
from llmrec.tasks.history import HistorySelector, ItemVectors
from llmrec.tasks.rows import Listwise
from llmrec.tasks.templates import TemplateSelection
from llmrec.types import Answer, Case, Event, Example, ItemCodes, Prompt, Request, SplitName

Want = Literal["one", "ranking", "yes"]
"""The requested answer: one candidate, a ranking of all, or yes or no about a single one."""


class EventLists(Protocol):
    """Item lists for training interactions: candidates that include the chosen item, or rejected items."""

    def of(self, user: str) -> Sequence[tuple[int, tuple[str, ...]]]:
        """Return indices of a user's training interactions, with an item list for each."""
        ...


class RetrievedLists(EventLists, Protocol):
    """Retrieved candidates for training examples."""

    def held(self) -> Mapping[str, tuple[str, ...]]:
        """Return the retrieved candidates of validation requests by id, if they include the target."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskInputs:
    """The inputs that every task gets in addition to its section of the recipe.

    Attributes:
        data: The split data of the family.
        templates: All templates of the family by name.
        seed: The seed of training examples, windows and few-shot examples.
        candidates: Stored candidate sets, for families that rank them.
        shot_choice: The selection of few-shot examples (``eval.shots.choice``).
        index: The item index, if any.
        vectors: Text vectors of items, for similarity.
        lists: Retrieved candidates of training interactions; None: they are drawn.
        preference: The settings of preference training; None: answers are trained on directly.
        hard: Rejected items of training interactions, if ``preference`` names a ranker.
        learns: Whether there is training data; without it, a task can only evaluate.
        held: Items whose code and text no training example shows together; None: the alignment task selects them.
    """

    data: SplitDataset
    templates: Mapping[str, Template]
    seed: int
    candidates: CandidateSets | None = None
    shot_choice: ShotChoice = "random"
    index: ItemCodes | None = None
    vectors: ItemVectors | None = None
    lists: RetrievedLists | None = None
    preference: PreferenceSection | None = None
    hard: EventLists | None = None
    learns: bool = True
    held: HeldItems | None = None

    @property
    def listwise(self) -> Listwise | None:
        """The preference settings of training examples; None without preference training."""
        section = self.preference
        return None if section is None else Listwise("softmax", 1 + section.negatives, preference=section)

    def past(self, section: TaskSection, asking: Sequence[Template]) -> HistorySelector:
        """Return the selector that decides which interactions of a history are shown."""
        return HistorySelector(section, self.data.dataset, self.vectors, asking)

    def shots(
        self,
        family: str,
        events: Mapping[str, tuple[Event, ...]],
        *,
        least: int = 1,
        label: Callable[[Event], Hashable] | None = None,
    ) -> ShotPool:
        """Return the source of few-shot examples from training interactions; see `ShotPool`."""
        return ShotPool(
            family, events, seed=self.seed, choice=self.shot_choice, least=least, vectors=self.vectors, label=label
        )


class Task(Protocol):
    """A recommendation task on one data set; the same object is used for training, evaluation and rewards."""

    family: str
    _data: SplitDataset
    # The column of interactions that examples need; None: every interaction can be an example.
    _column: str | None = None
    _chosen: TemplateSelection
    _past: HistorySelector
    _listwise: Listwise | None = None

    @property
    def eval_templates(self) -> tuple[str, ...]:
        """Names of the evaluation templates."""
        return self._chosen.evaluate

    def examples(self, split: SplitName, limit: int | None = None) -> Iterator[Example]:
        """Yield training or validation examples with targets.

        For ``train`` this is an endless seeded stream from training interactions only: passes over the users, each
        example with a randomly drawn window and training template. For ``valid`` it is one example per held-out case,
        with that case as the only target. ``limit`` caps their number.
        """
        ...

    def cases(self, split: SplitName) -> Sequence[Case]:
        """Return the cases of a split, in a seeded order that does not depend on the order of the data."""
        ...

    def prompt(self, request: Request, *, template: str, shots: int = 0, want: Want = "one") -> Prompt:
        """Render the prompt for a request, with ``shots`` few-shot examples before it.

        Raises:
            RecipeError: If the template has no text for the requested answer.
        """
        ...

    def draw_shots(self, request: Request, shots: int) -> FewShotDraw:
        """Draw training interactions for few-shot examples; also return the remaining history of the question."""
        ...

    def continuations(self, request: Request, *, template: str) -> tuple[str, ...]:
        """Return the texts whose likelihoods answer a request, one per candidate or label; none for generation."""
        return ()

    def parse(self, completion: str, request: Request, *, template: str) -> Answer | None:
        """Parse a generated text; None if it contains no answer."""
        ...

    def reward(self, answer: Answer, case: Case) -> float:
        """Return a reward in [0, 1] for an answer, for preference and reinforcement training.

        For a ranking it is 1 / log2(1 + rank) of the true item, averaged over ties; 0 if it is not ranked.
        """
        return ranking_reward(answer, case)

    def shows(self, template: Template, shots: int) -> str:
        """Describe what a prompt contains, for a table column."""
        return describe_events(template, self._past.history, shots)

    def training_size(self) -> int:
        """Return the number of training interactions (or items) from which the task can draw examples."""
        return count_training_rows(self._data, self._column)

    # ----------------------------------------------------------------------- optional methods

    @property
    def catalogue(self) -> tuple[str, ...]:
        """All item ids, sorted: the default candidates of a request.

        Raises:
            RecipeError: If the family does not rank the catalogue.
        """
        raise self._lacks("does not rank the catalogue; use tasks.sequential")

    @property
    def training_templates(self) -> tuple[Template, ...]:
        """The training templates of a task that is answered by labels."""
        return ()

    @property
    def listwise(self) -> Listwise | None:
        """Settings of listwise training for examples with rejected answers; None for token-level training."""
        return self._listwise

    def words(self, template: str) -> Words:
        """Return the words of the language of a template, for strategies that write text."""
        return english_words()

    def training_cases(self) -> Iterator[Case]:
        """Yield training interactions as questions with the history before them, endlessly, in seeded order.

        Raises:
            RecipeError: If the family does not predict an item of the catalogue.
        """
        raise self._lacks("does not predict items of the catalogue; use tasks.sequential")

    def writes_alike(self, template: str) -> bool:
        """Whether a template writes an item the same way in all requests, as beam search requires."""
        return False

    def questions(self, count: int) -> list[Request]:
        """Return ``count`` questions about training interactions, with candidates as in evaluation.

        Raises:
            RecipeError: If the family has no candidates.
        """
        raise self._lacks("does not list candidates, so it has no position bias")

    def asked_by(self, template: Template, strategies: Sequence[str], *, tuned: bool) -> tuple[str, ...]:
        """Return the strategies that support the answers of a template, for the fine-tuned or the base model."""
        return tuple(strategies)

    def scored_by(self, template: Template) -> str | None:
        """Return the strategy that needs no generated text; None if there is none."""
        return None

    @property
    def strategy_options(self) -> Mapping[str, int]:
        """Options that the task sets for all strategies."""
        return {}

    @property
    def baseline_options(self) -> Mapping[str, float | None]:
        """Options that the task sets for all baselines."""
        return {}

    @property
    def calibrates(self) -> bool:
        """Whether answers are calibrated on validation interactions."""
        return False

    @property
    def users_kind(self) -> str | None:
        """Description of the evaluated users in metric signatures; left out if None."""
        return None

    @property
    def liked_from(self) -> float | None:
        """Lowest rating that counts as liked, if ratings are also evaluated by AUC."""
        return None

    # The first step of two-step ranking (PALR, arXiv 2305.07622): a generated user profile of one line.

    @property
    def profile_template(self) -> Template:
        """The template that generates a user profile.

        Raises:
            RecipeError: If the family has no profile.
        """
        raise self._lacks("does not generate profiles; use tasks.direct")

    @property
    def profile_tokens(self) -> int:
        """The maximum number of tokens of a profile."""
        return 0

    def profile_prompt(self, request: Request) -> Prompt:
        """Render the prompt for a user profile, which shows only the history."""
        raise self._lacks("does not generate profiles; use tasks.direct")

    def shows_profile(self, template: str) -> bool:
        """Whether a template shows a profile."""
        return False

    def _lacks(self, what: str) -> RecipeError:
        return RecipeError(f"tasks.{self.family} {what}", kind="unsupported", column=f"tasks.{self.family}")


class BranchingTask(Task):
    """A task that can draw an example of a user with the same history as other tasks."""

    _section: RatingSection | SequentialSection
    _events: UserHistories
    _seed: int
    _warm_up = 0

    @property
    def branches(self) -> bool:
        """Whether a template asks its question after the history, so that tasks can share the history.

        A history that is selected for the question, or summarised, cannot be shared.
        """
        return self._section.past == "latest" and any(template.shape == "chat" for template in self._chosen.train)

    def branch(self, number: int, user: str) -> Example | None:
        """Return the training example of a user for pass ``number``; None if the user has too few interactions.

        A chat template shows the history that all families show in the pass, and the next interaction.
        """
        events = self._events.get(user)
        if events is None:
            return None
        rng = seeded_random(f"{self.family} branch", self._seed, str(number), user)
        template = rng.choice(self._chosen.train)
        if template.shape == "list":
            events = sample_window(events, self._section.window, rng)
        else:
            # The same for all families with the same history.
            at = seeded_random("branch point", self._seed, str(number), user).randrange(
                min(1, len(events) - 1), len(events)
            )
            events = events[max(0, at - self._section.history) : at + 1]
        row = f"{self.family}/branch/{number}/{user}"
        return self._example(template, row, user, events, first_target=self._warm_up)

    @abstractmethod
    def _example(
        self, template: Template, row: str, user: str, events: tuple[Event, ...], *, first_target: int = 0
    ) -> Example:
        """Return an example of the interactions, the last of which a chat template asks for."""


def check_single_answer(family: str, want: Want) -> None:
    """Reject a request for more than one answer.

    Raises:
        RecipeError: If anything else is requested.
    """
    if want != "one":
        raise RecipeError(
            f"tasks.{family} does not list candidates; use tasks.direct",
            kind="unsupported",
            column=f"tasks.{family}",
        )
