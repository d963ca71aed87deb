"""Frozen records: their base, a piece of a job, and what a run says of its data, its training and its texts.

Figures are in `llmrec.results`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from llmrec.errors import RecipeError

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Shard:
    """One of several pieces of a job: neighbouring whole chunks of the order in which one process does it.

    What is asked together in one process is asked together in a shard, so that answers are the same to the last bit.

    Attributes:
        index: Which piece, from 1.
        count: How many pieces there are.
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``2/4``.

        Raises:
            RecipeError: If it is no such piece.
        """
        result = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        shard = cls(int(result[1]), int(result[2])) if result else cls(0, 0)
        if not 1 <= shard.index <= shard.count:
            raise RecipeError(
                f"--shard {text[:40]}: name one piece of several as I/N, such as 1/4 to 4/4",
                kind="bad-value",
                column="--shard",
            )
        return shard

    @property
    def name(self) -> str:
        """The name of its folder, such as ``2-of-4``."""
        return f"{self.index}-of-{self.count}"

    def __str__(self) -> str:
        """Write it as `parse` reads it."""
        return f"{self.index}/{self.count}"

    def chunks(self, rows: int, size: int) -> range:
        """Return the numbers of its chunks, from 0, where so many rows are cut into chunks of one size; maybe none."""
        total = -(-rows // size)
        return range((self.index - 1) * total // self.count, self.index * total // self.count)

    def share(self, found: Sequence[_T], size: int) -> Sequence[_T]:
        """Return what stands in its chunks."""
        chosen = self.chunks(len(found), size)
        return found[chosen.start * size : chosen.stop * size]


def _finite(value: object) -> object:
    """Turn NaN and the infinities, which JSON cannot hold, into None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]


class Record(BaseModel):
    """Frozen base; keys that it does not have are ignored, so that results may grow."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    def as_json(self) -> dict[str, Any]:
        """Return the record as files hold it: the keys that whoever made it has set, in the order of the fields."""
        return self.model_dump(mode="json", exclude_unset=True)


class RewardLine(Record):
    """What the rollouts of an optimiser step were like.

    Attributes:
        reward: Their mean reward, weighted as their advantages are.
        zero: Share of groups whose members all have the same reward, which teach nothing.
        hit: Share of groups that hold the true item.
        kl: Estimated divergence from the model that training started from, in nats an item.
        entropy: Of the items over all groups, in nats: 0 where every rollout is the same item.
        distinct: How many items there are among them.
        rollouts: How many different rollouts all groups have.
        clipped: Share of rollouts whose ratio was clipped.
        tokens: Tokens that were read to learn from them.
        targets: Those of them that bear loss.
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
    """One logged optimiser step; losses are nats a target token, and NDCG@10 is that of `Judged`.

    ``figures`` are what else a loss says of its step, such as ``rewards/margins``.
    Where training learns from reward, the loss is that of `llmrec.train.reward.objective` a question.
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


class Judged(Record):
    """Which validation cases decided which adapter is kept, and what classic recommenders reach on them.

    Attributes:
        family: Whose cases.
        users: How many.
        kept_step: Whose adapter was kept.
        value: Its NDCG@10.
        controls: NDCG@10 of the family's baselines, and of their fusions, which other validation users weighed.
    """

    family: str
    users: int
    kept_step: int
    value: float
    controls: dict[str, float] = Field(default_factory=dict)


class Training(Record):
    """What was tuned, and how it went."""

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
    judged: Judged | None = None
    sparsity: float | None = None
    processes: int = 1
    distributed: str = "no"
    adapter_sha256: str | None = None
    merged_sha256: str | None = None

    @property
    def validated(self) -> tuple[str, ...]:
        """Tasks with a validation loss in the log."""
        return tuple(dict.fromkeys(task for line in self.log for task in line.valid_loss or {}))

    @property
    def figured(self) -> tuple[str, ...]:
        """Names of what the log has of steps beside losses, such as ``rewards/margins``."""
        return tuple(dict.fromkeys(name for line in self.log for name in line.figures or {}))


class DataInfo(Record):
    """One data set as it was used."""

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
    """Stored candidate sets, told apart by their digest."""

    digest: str
    count: int
    kind: str
    ceiling: float | None = None


class Stage(Record):
    """Wall-clock seconds of one stage."""

    stage: str
    seconds: float


class Shown(Record):
    """One prompt with its answer, kept for reading."""

    task: str
    arm: str
    predictor: str
    template: str | None = None
    prompt: str
    raw: str | None = None
    parsed: Any = None
    truth: Any = None


class Reliability(Record):
    """Answers with about the same P(yes): their mean, and the share of them whose truth is yes."""

    n: int
    said: Number
    so: Number


class Calibration(Record):
    """The curve that a row's probabilities were put right by: fitted to n answers to the validation split."""

    n: int
    scale: float
    bias: float


class User(Record):
    """Whose request it was; the name is empty where there is none."""

    id: str
    name: str = ""


class Product(Record):
    """What a text is about: an item with its further fields."""

    id: str
    title: str
    fields: dict[str, str] = Field(default_factory=dict)


class Told(Record):
    """Something that a question can tell beside user and item, and the templates that do."""

    name: str
    text: str
    by: tuple[str, ...] = ()


class Written(Record):
    """The text that a row wrote; None where its answer could not be read, with the reason and the raw answer."""

    text: str | None
    error: str = ""
    raw: str = ""


class Sample(Record):
    """One request whose answer is a text, with the true one and those of the rows, by row id."""

    task: str
    request_id: str
    user: User
    item: Product
    told: tuple[Told, ...] = ()
    truth: str
    answers: dict[str, Written]


class Exhibit(Record):
    """One request beside what a language model wrote as features, and what recommenders answer with and without it.

    Attributes:
        store: The folder of the features.
        read: Titles of the events that the text on the user was written from, the first of them.
        events: How many it was written from.
        profile: That text; empty: there is none.
        described: The text on the item; empty: there is none.
        truth: The answer.
        answers: By row id, of rows that are the same recommender but for what it reads.
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


class Nearby(Record):
    """An item of training that reads like another one: the cosine of their text vectors."""

    title: str
    cosine: float


class ExampleUser(Record):
    """One user as the first screen of a report shows it: what came before, what is recommended, what was held out.

    Attributes:
        task: The family.
        row: Whose list it is.
        user: Who it is.
        history: Titles of the latest events, the oldest first.
        events: How many events the history has.
        listed: Titles of the first items of the list.
        hit: The place of the held-out item among these, from 1; None where it is not there.
        truth: Title of the held-out item.
        rank: Its rank; None where the list leaves it out.
        pool: How many items were ranked.
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


class Visit(Record):
    """A list that holds an item: whose it is, the user's latest items, and the place, from 1."""

    user: User
    latest: tuple[str, ...] = ()
    place: int
    wanted: bool = False


class Newcomer(Record):
    """An item without training interactions, and who it is shown to.

    Attributes:
        neighbours: Items of training whose texts are nearest, the nearest first.
        wanted: Of how many requests it is the answer.
        lists: By row id, how many lists hold it.
        visits: By row id, some of these lists.
    """

    task: str
    item: Product
    neighbours: tuple[Nearby, ...] = ()
    wanted: int = 0
    lists: dict[str, int] = Field(default_factory=dict)
    visits: dict[str, tuple[Visit, ...]] = Field(default_factory=dict)


class SetAside(Record):
    """Users of a table who are not asked about, and why."""

    data: str
    said: str
    users: tuple[str, ...] = ()
