"""What a family's task is given and what it can do: `TaskInputs` and `Task`.

The defaults below are what most families answer; a task that derives from `Task` writes only where it differs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from llmrec.data.candidates import CandidateSets
from llmrec.data.split import SplitDataset
from llmrec.errors import RecipeError
from llmrec.prompts.template import Template
from llmrec.prompts.words import Words, english
from llmrec.recipe.schema import PreferenceSection, TaskSection
from llmrec.tasks.fewshot import Drawn, ShotPool
from llmrec.tasks.held_items import HeldItems
from llmrec.tasks.history import ItemVectors, Past
from llmrec.tasks.rows import Listwise
from llmrec.types import Answer, Case, Event, Example, ItemCodes, Prompt, Request, SplitName

Want = Literal["one", "ranking", "yes"]
"""What a prompt asks of its candidates: the one to choose, an order of all, or a yes or no to the only one."""


class EventLists(Protocol):
    """Items for training events: candidates that hold an event's own, or others that it is preferred to."""

    def of(self, user: str) -> Sequence[tuple[int, tuple[str, ...]]]:
        """Return places among a user's training events, and a list for each."""
        ...


class RetrievedLists(EventLists, Protocol):
    """Candidates of training rows, where those of evaluation are retrieved."""

    def held(self) -> Mapping[str, tuple[str, ...]]:
        """Return the candidates of validation requests by id, where they hold the target."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskInputs:
    """What every task is made from, beside its section of the recipe.

    Attributes:
        data: The split data that the family reads.
        templates: All templates of the family, by name.
        seed: Of rows, windows and examples.
        candidates: Stored candidate sets, for families that rank them.
        shot_choice: How few-shot examples are chosen (``eval.shots.choice``).
        index: How items are written, where there is an index.
        vectors: What says which items read alike.
        lists: What is retrieved for training events; None: candidates of training rows are drawn.
        preference: How training rows are learned from preference; None: their answers are learned.
        hard: Rejected items of training events, where ``preference`` names what ranks them.
        learns: Whether there is something to learn from; without, a task can only ask.
        held: Items whose code and text no training row shows together; None: the alignment task holds them out itself.
    """

    data: SplitDataset
    templates: Mapping[str, Template]
    seed: int
    candidates: CandidateSets | None = None
    shot_choice: str = "random"
    index: ItemCodes | None = None
    vectors: ItemVectors | None = None
    lists: RetrievedLists | None = None
    preference: PreferenceSection | None = None
    hard: EventLists | None = None
    learns: bool = True
    held: HeldItems | None = None

    @property
    def listwise(self) -> Listwise | None:
        """How rows are learned as a chosen answer and rejected ones; None: they are not."""
        section = self.preference
        return None if section is None else Listwise("softmax", 1 + section.negatives, preference=section)

    def past(self, section: TaskSection, asking: Sequence[Template]) -> Past:
        """Return what chooses the events that a prompt shows."""
        return Past(section, self.data.dataset, self.vectors, asking)

    def shots(
        self,
        family: str,
        events: Mapping[str, tuple[Event, ...]],
        *,
        least: int = 1,
        label: Callable[[Event], Hashable] | None = None,
    ) -> ShotPool:
        """Return what draws few-shot examples from usable training events by user; see `ShotPool`."""
        return ShotPool(
            family, events, seed=self.seed, choice=self.shot_choice, least=least, vectors=self.vectors, label=label
        )


class Task(Protocol):
    """One family over one data set. The same object serves training, evaluation and reward."""

    family: str
    _listwise: Listwise | None = None

    @property
    def eval_templates(self) -> tuple[str, ...]:
        """Names of the templates that evaluation asks with."""
        ...

    def examples(self, split: SplitName, limit: int | None = None) -> Iterator[Example]:
        """Yield rows with targets.

        For ``train`` this is a seeded stream without end, from training interactions only: pass after pass over
        the users, each row with a freshly drawn window and seen template. For ``valid`` it is one row per held-out
        case, with that case as the only target. ``limit`` caps the number of rows.
        """
        ...

    def cases(self, split: SplitName) -> Sequence[Case]:
        """Return the held-out cases of a split in a seeded order that does not depend on row order."""
        ...

    def prompt(self, request: Request, *, template: str, shots: int = 0, want: Want = "one") -> Prompt:
        """Render a request, with ``shots`` solved examples from training data before it.

        Raises:
            RecipeError: If the template has no words for what is wanted.
        """
        ...

    def draw_shots(self, request: Request, shots: int) -> Drawn:
        """Return the training events that few-shot examples show, and the history that the question keeps."""
        ...

    def continuations(self, request: Request, *, template: str) -> tuple[str, ...]:
        """The texts whose likelihood answers the request: one per candidate, or one per label."""
        ...

    def parse(self, completion: str, request: Request, *, template: str) -> Answer | None:
        """Read a completion; None if it does not hold an answer."""
        ...

    def reward(self, answer: Answer, case: Case) -> float:
        """Score an answer in [0, 1], for preference and reinforcement training."""
        ...

    def shows(self, template: Template, shots: int) -> str:
        """Say in words what a prompt shows, for the column of a table."""
        ...

    def training_size(self) -> int:
        """Return how many training interactions (or items) have what the family asks for."""
        ...

    # ----------------------------------------------------------------------- what only some families have

    @property
    def catalogue(self) -> tuple[str, ...]:
        """Every item id, sorted: what a request without candidates chooses from.

        Raises:
            RecipeError: If the family ranks no catalogue.
        """
        raise RecipeError(
            f"tasks.{self.family} ranks no catalogue; tasks.sequential does",
            kind="unsupported",
            column=f"tasks.{self.family}",
        )

    @property
    def training_templates(self) -> tuple[Template, ...]:
        """The templates that training rows are drawn from, where a family is answered by labels."""
        return ()

    @property
    def listwise(self) -> Listwise | None:
        """How training rows are learned as lists, each with its `Example.rejected`; None: by their own tokens."""
        return self._listwise

    def words(self, template: str) -> Words:
        """Return the words of the language that a template is written in, where a strategy writes some itself."""
        return english()

    def training_cases(self) -> Iterator[Case]:
        """Yield training events as questions about what came before them, without end, in seeded order.

        Raises:
            RecipeError: If the family asks for no item of the catalogue.
        """
        raise RecipeError(
            f"tasks.{self.family} asks for no item of the catalogue; tasks.sequential does",
            kind="unsupported",
            column=f"tasks.{self.family}",
        )

    def writes_alike(self, template: str) -> bool:
        """Whether a template writes an item in the same way for every request, so that a search can."""
        return False

    def questions(self, count: int) -> list[Request]:
        """Return questions about training events, as many as asked for, with candidates as evaluation has them.

        Raises:
            RecipeError: If the family asks about no candidates.
        """
        raise RecipeError(
            f"tasks.{self.family} lists no candidates, so that no position can be measured",
            kind="unsupported",
            column=f"tasks.{self.family}",
        )

    def asked_by(self, template: Template, strategies: Sequence[str], *, tuned: bool) -> tuple[str, ...]:
        """Return those of the strategies that a template's answers are read by, for the tuned or the base model."""
        return tuple(strategies)

    def scored_by(self, template: Template) -> str | None:
        """Return the strategy that compares weights without the noise of generated text; None where there is none."""
        return None

    @property
    def strategy_options(self) -> Mapping[str, int]:
        """What every strategy of the family is handed of its section."""
        return {}

    @property
    def baseline_options(self) -> Mapping[str, float | None]:
        """What every baseline of the family is handed of its section."""
        return {}

    @property
    def calibrates(self) -> bool:
        """Whether answers are scaled on the validation split."""
        return False

    @property
    def users_kind(self) -> str | None:
        """What signatures say of the users asked about; None leaves it unsaid."""
        return None

    @property
    def liked_from(self) -> float | None:
        """The lowest rating that counts as liked, where ratings are measured by an AUC too."""
        return None

    # The first of two steps (PALR, 2305.07622): what the user likes, in one generated line.

    @property
    def profile_template(self) -> Template:
        """The words that ask what a user likes.

        Raises:
            RecipeError: If the family asks for no profile.
        """
        raise RecipeError(
            f"tasks.{self.family} asks for no profile; tasks.direct does",
            kind="unsupported",
            column=f"tasks.{self.family}",
        )

    @property
    def profile_tokens(self) -> int:
        """The longest profile."""
        return 0

    def profile_prompt(self, request: Request) -> Prompt:
        """Ask what a user likes: of the request it shows the history alone."""
        raise RecipeError(
            f"tasks.{self.family} asks for no profile; tasks.direct does",
            kind="unsupported",
            column=f"tasks.{self.family}",
        )

    def shows_profile(self, template: str) -> bool:
        """Whether a template has a place for a profile."""
        return False


def only_one(family: str, want: Want) -> None:
    """Refuse to ask for more than one answer.

    Raises:
        RecipeError: If anything else is wanted.
    """
    if want != "one":
        raise RecipeError(
            f"tasks.{family} asks for one answer and lists no candidates; use the direct task",
            kind="unsupported",
            column=f"tasks.{family}",
        )
