"""Immutable records of a run: its shards, data sets, training and example texts.

Figures are in `llmrec.results`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

from llmrec.errors import RecipeError

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard of a job: a range of consecutive chunks.

    Requests that are batched in a single process are batched in a shard, so that answers are bit-identical.

    Attributes:
        index: Number of the shard, from 1.
        count: Number of shards.
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse a shard such as ``2/4``.

        Raises:
            RecipeError: If it is invalid.
        """
        result = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        shard = cls(int(result[1]), int(result[2])) if result else cls(0, 0)
        if not 1 <= shard.index <= shard.count:
            raise RecipeError(
                f"--shard {text[:40]}: write a shard as I/N, such as 1/4 to 4/4",
                kind="bad-value",
                column="--shard",
            )
        return shard

    @property
    def name(self) -> str:
        """Folder name of the shard, such as ``2-of-4``."""
        return f"{self.index}-of-{self.count}"

    def __str__(self) -> str:
        """Return the shard in the format of `parse`."""
        return f"{self.index}/{self.count}"

    def chunks(self, rows: int, size: int) -> range:
        """Return the indices of the shard's chunks, for a number of rows and a chunk size; may be empty."""
        total = -(-rows // size)
        return range((self.index - 1) * total // self.count, self.index * total // self.count)

    def share(self, found: Sequence[_T], size: int) -> Sequence[_T]:
        """Return the items in the shard's chunks."""
        chosen = self.chunks(len(found), size)
        return found[chosen.start * size : chosen.stop * size]


def _finite(value: object) -> object:
    """Return None for NaN and infinite numbers, which JSON does not allow."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]


class Record(BaseModel):
    """Base class of frozen records; unknown keys are ignored, so that newer files can be read."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    def as_json(self) -> dict[str, Any]:
        """Return the record as JSON, with only the keys that were set."""
        return self.model_dump(mode="json", exclude_unset=True)


class RewardLine(Record):
    """Statistics of the rollouts in an optimiser step.

    Attributes:
        reward: Their mean reward, with the weights of their advantages.
        zero: Share of groups with equal rewards of all members, which give no gradient.
        hit: Share of groups that contain the true item.
        kl: Estimated divergence from the initial model, in nats per item.
        entropy: Entropy of the items over all groups, in nats; 0 if every rollout is the same item.
        distinct: Number of different items among the rollouts.
        rollouts: Number of different rollouts of all groups.
        clipped: Share of rollouts whose ratio was clipped.
        tokens: Tokens read for training on them.
        targets: Tokens with loss among these.
    """

    reward: Number = None
    zero: Number = None
    hit: Number = None
    kl: Number = None
    entropy: Number = None
    distinct: int = 0
    rollouts: int = 0
    clipped: Number = None
    tokens: int = 0
    targets: int = 0


class LogLine(Record):
    """A logged optimiser step; losses are in nats per target token.

    ``figures`` are further quantities that a loss logs, such as ``rewards/margins``.
    In training from rewards, the loss is that of `llmrec.train.reward.objective` per question.
    """

    step: int
    loss: Number = None
    learning_rate: Number = None
    valid_loss: dict[str, Number] | None = None
    valid_ndcg: Number = None
    figures: dict[str, Number] | None = None
    reward: RewardLine | None = None
    tokens_per_second: Number = None
    seconds: Number = None


class CheckpointSelection(Record):
    """The validation cases on which the best checkpoint is selected, with its NDCG@10.

    ``controls`` are the NDCG@10 of the family's baselines, and of their ensembles, weighted on other validation users.
    """

    family: str
    users: int
    kept_step: int
    value: float
    controls: dict[str, float] = Field(default_factory=dict)


class Training(Record):
    """The settings and the log of a training run."""

    rows: dict[str, int] = Field(default_factory=dict)
    shares: dict[str, float] = Field(default_factory=dict)
    loss_shares: dict[str, float] = Field(default_factory=dict)
    dropped: dict[str, int] = Field(default_factory=dict)
    method: str
    steps: int
    tokens: int
    target_tokens: int
    seconds: Number
    seconds_before: Number = None
    tokens_per_second: Number
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    log: tuple[LogLine, ...] = ()
    judged: CheckpointSelection | None = None
    sparsity: float | None = None
    processes: int = 1
    distributed: str = "no"
    adapter_sha256: str | None = None
    merged_sha256: str | None = None

    @property
    def validated(self) -> tuple[str, ...]:
        """Tasks with a logged validation loss."""
        return tuple(dict.fromkeys(task for line in self.log for task in line.valid_loss or {}))

    @property
    def figured(self) -> tuple[str, ...]:
        """Names of logged values other than losses, such as ``rewards/margins``."""
        return tuple(dict.fromkeys(name for line in self.log for name in line.figures or {}))


class DataInfo(Record):
    """A data set as used in the run."""

    name: str
    users: int
    items: int
    interactions: int
    density: Number = None
    train: int
    valid: int
    test: int
    fingerprint: str
    split_fingerprint: str
    split: str
    noun: str = "items"
    made: bool = False
    derived: str = ""


class Candidates(Record):
    """Stored candidate sets, identified by their hash."""

    digest: str
    count: int
    kind: str
    ceiling: float | None = None


class Stage(Record):
    """Wall-clock seconds of a stage."""

    stage: str
    seconds: float


class ExamplePrompt(Record):
    """An example prompt with its answer."""

    task: str
    arm: str
    predictor: str
    template: str | None = None
    prompt: str
    raw: str | None = None
    parsed: Any = None
    truth: Any = None


class Reliability(Record):
    """Answers with a similar predicted probability: their mean probability, and the share whose true answer is yes."""

    n: int
    said: Number
    so: Number


class Calibration(Record):
    """The calibration curve of a model, fitted on n answers to validation cases."""

    n: int
    scale: float
    bias: float


class User(Record):
    """The user of a request; the name is empty if it is unknown."""

    id: str
    name: str = ""


class Product(Record):
    """The item that a text is about."""

    id: str
    title: str
    fields: dict[str, str] = Field(default_factory=dict)


class PromptContents(Record):
    """Optional contents of a prompt, with the templates that include them."""

    name: str
    text: str
    by: tuple[str, ...] = ()


class GeneratedText(Record):
    """A generated text; None if it could not be parsed, with the reason."""

    text: str | None
    error: str = ""
    raw: str = ""


class Sample(Record):
    """A request that is answered by text, with the true text and the text of each model."""

    task: str
    request_id: str
    user: User
    item: Product
    # Results that were written before this key was renamed call it `told`.
    inputs: tuple[PromptContents, ...] = Field((), validation_alias=AliasChoices("inputs", "told"))
    truth: str
    answers: dict[str, GeneratedText]


class TextExample(Record):
    """A request whose user or item has a generated text, and the answers with and without that text.

    Attributes:
        store: The folder of the features.
        read: Titles of the first interactions that the user's text was generated from.
        events: Number of these interactions.
        profile: The text on the user; empty for none.
        described: The text on the item; empty for none.
        truth: The true answer.
        answers: Answers by row id, of rows that differ only in the recommender's inputs.
    """

    task: str
    request_id: str
    user: User
    item: Product
    store: str
    read: tuple[str, ...] = ()
    events: int = 0
    profile: str = ""
    described: str = ""
    truth: str = ""
    answers: dict[str, str] = Field(default_factory=dict)


class SimilarText(Record):
    """A training item with a similar text, and the cosine similarity."""

    title: str
    cosine: float


class ExampleUser(Record):
    """The example user at the top of a report: history, recommended list, held-out item.

    Attributes:
        task: The family.
        row: The row of the list.
        user: The user.
        history: Titles of the latest interactions, oldest first.
        events: Number of interactions of the history.
        listed: Titles of the first items of the list.
        hit: Rank of the held-out item among these, from 1; None if it is not there.
        truth: Title of the held-out item.
        rank: Its rank; None if the list omits it.
        pool: Number of ranked items.
    """

    task: str
    row: str
    user: User
    history: tuple[str, ...]
    events: int
    listed: tuple[str, ...]
    hit: int | None = None
    truth: str
    rank: Number = None
    pool: int | None = None


class ListAppearance(Record):
    """A ranked list that contains an item: its user, the user's latest items, and the item's rank, from 1."""

    user: User
    latest: tuple[str, ...] = ()
    place: int
    wanted: bool = False


class ColdStartItem(Record):
    """A cold-start item and the users to whom it is recommended.

    Attributes:
        neighbours: Training items with the nearest texts, nearest first.
        wanted: Number of requests whose answer it is.
        lists: Number of lists that contain it, by row id.
        visits: Some of these lists, by row id.
    """

    task: str
    item: Product
    neighbours: tuple[SimilarText, ...] = ()
    wanted: int = 0
    lists: dict[str, int] = Field(default_factory=dict)
    visits: dict[str, tuple[ListAppearance, ...]] = Field(default_factory=dict)


class ExcludedUsers(Record):
    """Users who are excluded from evaluation, and why."""

    data: str
    said: str
    users: tuple[str, ...] = ()
