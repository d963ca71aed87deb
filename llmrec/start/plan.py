"""Decisions of `llmrec init`: table statistics, supported tasks, and sizes that fit into ten minutes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import polars as pl

from llmrec.data.dataset import Dataset, k_core
from llmrec.data.read.words import plural_noun
from llmrec.data.split import MAX_RATING_STEPS, rating_steps
from llmrec.data.stats import BASKET_WARNING_SHARE
from llmrec.errors import ModelError, is_installed
from llmrec.results import LANGUAGE_MODEL_ARMS
from llmrec.start.columns import Roles
from llmrec.start.profile import as_float

FAMILIES = ("rating", "sequential", "direct", "explanation")
_CORE_ROWS = 50_000
_MIN_CORE_SIZE = 200
_MIN_TEXTS = 20
# Minimum number of users with three or more baskets, for a split that holds out whole baskets.
_MIN_BASKET_USERS = 10
# Measured on two cores with SmolLM2-135M in bf16: `make quickstart` trains 900 tokens per second; scoring and
# generation speeds.
TRAIN_SPEED, _SCORE_SPEED, _ASK_SPEED, _DECODE_SPEED = 900.0, 1600.0, 3000.0, 700.0
# Texts per second that MiniLM encodes.
_ENCODE_SPEED = 150.0
_ENCODER = "all-MiniLM-L6-v2"
_START_SECONDS = {"vllm": 60.0, "hf": 20.0}
_OTHER_SECONDS = 40.0
BUDGET_SECONDS = 600.0
MIN_TITLED_SHARE = 0.5
"""Share of rows or items with a title, above which baselines read titles."""
BATCH_TOKENS = 1536
ROW_TOKENS = 384


@dataclass(frozen=True)
class TableStatistics:
    """Statistics of the rows that a recipe keeps.

    Attributes:
        rows: Number of rows, repeats included.
        repeats: Rows whose user and item are in another row too.
        history: Distinct items of a user: minimum, median, maximum.
        able: Users with at least 3 distinct items, of which leave-one-out can hold out two. If whole baskets are
            held out, users with at least 3 baskets; if a column gives the split, users with test rows and training
            rows.
        teachable: Users with two or more items left for training, which show an order.
        targets: Mean number of held-out items of an able user; more than one if whole baskets are held out.
        tied: Share of users with several items at their last time; 0 without times.
        with_texts: Number of rows with a text.
        with_title: Share of rows with a title.
        levels: Distinct ratings, also of rows that the core filter drops, lowest first: a recipe's scale
            has to hold for all rows.
        zeros: Share of ratings that are 0.
        title_tokens: Estimated tokens of a title.
        field_tokens: Estimated tokens of an item's fields.
        text_tokens: Estimated tokens of a text.
    """

    rows: int
    users: int
    items: int
    repeats: int
    history: tuple[int, float, int]
    able: int
    teachable: int
    targets: float
    tied: float
    with_texts: int
    with_title: float
    levels: tuple[float, ...]
    zeros: float
    title_tokens: float
    field_tokens: float
    text_tokens: float


@dataclass(frozen=True)
class RecipePlan:
    """The decisions for a recipe, except its columns.

    Attributes:
        tasks: Whether each family is switched on, and the reason.
        core: ``filter.user_core`` and ``filter.item_core``; 1 keeps everything.
        noun: The word for items in prompts.
        scale: Lowest and highest rating; None if there is only one.
        encoder: The text encoder of the baselines; None without titles, or if there is no encoder.
        seconds: Estimate by stage, on two common CPU cores.
    """

    tasks: Mapping[str, tuple[bool, str]]
    split: str
    core: int
    noun: str
    scale: tuple[float, float] | None
    candidates: int
    users: int
    arms: tuple[str, ...]
    steps: int
    backend: str
    facts: TableStatistics
    encoder: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def on(self) -> tuple[str, ...]:
        """Names of the enabled tasks."""
        return tuple(family for family in FAMILIES if self.tasks[family][0])

    @property
    def rates(self) -> bool:
        """Whether the ratings can be used, since no task supports a scale with very many steps."""
        return bool(self.facts.levels) and count_labels(self.facts.levels) <= MAX_RATING_STEPS

    def without(self, family: str, reason: str) -> RecipePlan:
        """Return the plan with one task disabled."""
        return fit_to_budget(replace(self, tasks={**self.tasks, family: (False, reason)}))


@dataclass(frozen=True)
class Events:
    """The interactions for a plan, of a table or of a published data set.

    Attributes:
        pairs: One row per interaction: ``user_id``, ``item_id``, and ``time``, a sortable value that is null if
            missing.
        titles: Titles of items; empty if blank.
        titled: Whether they are titles rather than ids.
        fields: The values of each further field of items.
        ratings: Rating of each interaction; None without ratings.
        texts: Text of each interaction, empty if blank; None without texts.
        parts: Split of each interaction: train, valid or test; None if the data has no split.
        rating: Name of the ratings.
        text: Name of the texts.
        time: Name of the times; None without times.
    """

    pairs: pl.DataFrame
    titles: pl.Series
    titled: bool
    fields: Sequence[pl.Series]
    ratings: pl.Series | None
    texts: pl.Series | None
    parts: pl.Series | None
    rating: str = "the ratings"
    text: str = "the texts"
    time: str | None = None


def events_of_table(roles: Roles) -> Events:
    """Return the interactions of a table."""
    profiles = roles.profiles
    pairs = pl.DataFrame({"user_id": profiles[roles.user].cells, "item_id": profiles[roles.item].cells})
    titles = roles.items.get(roles.title or "") or profiles.get(roles.title or "") or profiles[roles.item]
    times = profiles[roles.time].times.sortable if roles.time else pl.lit(None, pl.Float64)
    return Events(
        pairs=pairs.with_columns(time=times),
        titles=titles.cells,
        titled=roles.title is not None,
        fields=[(roles.items.get(name) or profiles[name]).cells for name in roles.fields],
        ratings=profiles[roles.rating].numbers.values if roles.rating else None,
        texts=profiles[roles.text].cells if roles.text else None,
        parts=profiles[roles.split].cells if roles.split else None,
        rating=roles.rating or "",
        text=roles.text or "",
        time=roles.time,
    )


def events_of_dataset(dataset: Dataset) -> Events:
    """Return the interactions of a published data set."""
    rows = dataset.interactions.with_columns(pl.col("user_id", "item_id").cast(pl.String))
    items = dataset.items.values()
    names = dict.fromkeys(name for item in items for name in item.fields)
    parts = None
    if (given_split := dataset.given) is not None:
        col = {**dict.fromkeys(given_split.valid, "valid"), **dict.fromkeys(given_split.test, "test")}
        parts = pl.Series([col.get(pair, "train") for pair in rows.select("user_id", "item_id").iter_rows()])
    return Events(
        pairs=rows.select("user_id", "item_id", pl.col("timestamp").alias("time")),
        titles=pl.Series([item.title for item in items], dtype=pl.String),
        titled=any(item.title != item.item_id for item in items),
        fields=[pl.Series([item.fields.get(name, "") for item in items], dtype=pl.String) for name in names],
        ratings=rows["rating"] if rows["rating"].null_count() < rows.height else None,
        texts=rows["text"].fill_null("") if rows["text"].null_count() < rows.height else None,
        parts=parts,
        time="time" if dataset.has_time else None,
    )


def table_statistics(events: Events, cores: int = 1) -> TableStatistics:
    """Return statistics of the interactions that a k-core filter keeps."""
    pairs = events.pairs.with_row_index("row").sort("time", maintain_order=True, nulls_last=False)
    once = k_core(pairs.unique(["user_id", "item_id"], keep="last"), user_core=cores, item_core=cores)
    rows = pairs.join(once.select("user_id", "item_id"), on=["user_id", "item_id"], how="semi")["row"]
    sizes = once.group_by("user_id").len()["len"]
    texts = events.texts.gather(rows) if events.texts is not None else None
    ratings = events.ratings.gather(rows).drop_nulls() if events.ratings is not None else None
    able, teachable, targets, tied = int((sizes >= 3).sum()), int((sizes >= 4).sum()), 1.0, 0.0
    if events.time is not None and events.parts is None and (baskets := _basket_statistics(once)) is not None:
        able, teachable, targets, tied = baskets
    if events.parts is not None:
        able, teachable = _count_split_users(events.pairs["user_id"].gather(rows), events.parts.gather(rows))
    return TableStatistics(
        rows=len(rows),
        users=len(sizes),
        items=once["item_id"].n_unique(),
        repeats=len(rows) - once.height,
        history=(int(as_float(sizes.min())), as_float(sizes.median()), int(as_float(sizes.max()))),
        able=able,
        teachable=teachable,
        targets=targets,
        tied=tied,
        with_texts=int((texts != "").sum()) if texts is not None else 0,
        with_title=as_float((events.titles != "").mean()) if events.titled else 0.0,
        levels=tuple(ratings.unique().sort().to_list()) if ratings is not None else (),
        zeros=as_float((ratings == 0).mean()) if ratings is not None and len(ratings) else 0.0,
        title_tokens=_mean_tokens(events.titles),
        field_tokens=sum(map(_mean_tokens, events.fields)),
        text_tokens=_mean_tokens(texts) if texts is not None else 0.0,
    )


def _basket_statistics(once: pl.DataFrame) -> tuple[int, int, float, float] | None:
    """Return ``able``, ``teachable``, ``targets`` and ``tied`` of `TableStatistics`, from rows without duplicates.

    A basket has the items of a user with the same time. None if leave-one-out would divide few baskets, so that whole
    baskets need not be held out.
    """
    sizes = once.drop_nulls("time").group_by("user_id", "time").len().sort("time")
    users = sizes.group_by("user_id", maintain_order=True).agg(
        pl.len().alias("moments"), pl.col("len").last().alias("last"), pl.col("len").sum().alias("items"),
        pl.col("len").slice(-2).sum().alias("held"),
    )  # fmt: skip
    able = users.filter(pl.col("moments") >= 3)
    left = pl.concat(
        [able.select(pl.col("items") - pl.col("held")), users.filter(pl.col("moments") < 3).select("items")]
    )
    tied = as_float((users["last"] > 1).mean())
    if tied <= BASKET_WARNING_SHARE or able.height < _MIN_BASKET_USERS:
        return None
    return able.height, int((left["items"] >= 2).sum()), as_float(able["last"].mean()), tied


def _count_split_users(users: pl.Series, parts: pl.Series) -> tuple[int, int]:
    """Return the number of users with training and test rows, and with two or more training rows."""
    text = parts.str.strip_chars().str.to_lowercase()
    learned = users.filter(text == "train").value_counts()
    tested = users.filter(text == "test").unique()
    return int(tested.is_in(learned[users.name].implode()).sum()), int((learned["count"] >= 2).sum())


def _mean_tokens(cells: pl.Series) -> float:
    """Estimate the mean number of tokens of a value, about one per 3.2 bytes of UTF-8."""
    return min(as_float(cells.filter(cells != "").str.len_bytes().mean()) / 3.2, 300.0) + 2.0


# --------------------------------------------------------------------------- decisions


def plan_recipe(events: Events, names: tuple[str, ...], *, whole: bool, backend: str) -> RecipePlan:
    """Return the plan of a recipe for interactions.

    Args:
        events: The interactions.
        names: Names to derive the noun from: the item's column, files, the title's column.
        whole: Whether the table was read whole, so that its statistics are exact.
        backend: The backend.
    """
    facts, cores = table_statistics(events), 1
    if facts.rows >= _CORE_ROWS and (facts.history[1] < 5 or facts.rows / facts.items < 5):
        for cores in (5, 3, 1):
            filtered = table_statistics(events, cores) if cores > 1 else facts
            if filtered.users >= _MIN_CORE_SIZE and filtered.items >= _MIN_CORE_SIZE:
                break
        facts = replace(filtered, levels=facts.levels)
    count = min(20, facts.items, facts.items - facts.history[2] + 1) if facts.able else 20
    plan = RecipePlan(
        tasks=_supported_tasks(events, facts, count),
        split="given" if events.parts is not None else _split_kind(facts),
        core=cores,
        noun=next((noun for name in names if (noun := plural_noun(name))), "items"),
        scale=_rating_scale(facts.levels) if whole else None,
        candidates=count,
        users=min(100, max(facts.able, 1)) if facts.able else 100,
        arms=LANGUAGE_MODEL_ARMS,
        steps=120,
        backend=backend,
        facts=facts,
        encoder=installed_encoder() if facts.with_title > MIN_TITLED_SHARE else None,
    )
    return fit_to_budget(plan)


def installed_encoder() -> str | None:
    """Return the text encoder of `init` and `auto`; None if its weights or libraries are not available."""
    if not is_installed("transformers"):
        return None
    from llmrec.models.text_encoder import text_embedder

    try:
        text_embedder(_ENCODER)
    except ModelError:
        return None
    return _ENCODER


def _split_kind(facts: TableStatistics) -> str:
    return "last_basket" if facts.tied else "leave_one_out" if facts.able else "global_time"


def _rating_scale(levels: tuple[float, ...]) -> tuple[float, float] | None:
    """Derive the rating scale, such as 1 to 5, from the ratings that occur."""
    if len(levels) < 2:
        return None
    low, high = levels[0], levels[-1]
    return (1.0 if low > 1 and high in (5, 10) else low), high


def count_labels(levels: tuple[float, ...]) -> int:
    """Return the number of ratings that a model can answer, in steps of 1 or 0.5 from the lowest to the highest."""
    _, first, last = rating_steps(levels[0], levels[-1], levels)
    return last - first + 1


def _supported_tasks(events: Events, facts: TableStatistics, count: int) -> dict[str, tuple[bool, str]]:
    order = f"in order of {events.time}" if events.time else "in row order, since there are no timestamps"
    few = f"{facts.able} of {facts.users} users have 3 or more different items"
    short = "needs users with 4 or more different items: 2 held-out items, 2 training items"
    if facts.tied:
        few = f"{facts.able} of {facts.users} users have items at 3 or more times"
        short = "needs users with 2 or more items before the held-out baskets"
    if events.parts is not None:
        few = f"{facts.able} of {facts.users} users have test rows and training rows"
        short = "needs users with 2 or more training rows"
    result: dict[str, tuple[bool, str]] = {}
    if events.ratings is None:
        result["rating"] = (False, "needs a column of ratings")
    elif len(facts.levels) < 2:
        result["rating"] = (False, f"needs ratings with at least 2 values, but {events.rating} has {len(facts.levels)}")
    elif count_labels(facts.levels) > MAX_RATING_STEPS:
        many = count_labels(facts.levels)
        result["rating"] = (False, f"needs a scale of at most {MAX_RATING_STEPS} steps, but {events.rating} has {many}")
    else:
        low, high = facts.levels[0], facts.levels[-1]
        result["rating"] = (True, f"{len(facts.levels)} values from {low:g} to {high:g} in {events.rating}")
    if not facts.able:
        result["sequential"] = result["direct"] = (False, f"needs users with a history: {few}")
    elif not facts.teachable:
        result["sequential"] = (False, short)
    else:
        result["sequential"] = (True, f"{few}, {order}")
    if facts.able:
        result["direct"] = (True, f"{facts.items} items, {count} candidates a request")
        if count < 2:
            why = (
                f"needs items without interactions of a user, but one user has {facts.history[2]} of {facts.items} "
                "items"
            )
            result["direct"] = result["sequential"] = (False, why)
    if events.texts is None:
        result["explanation"] = (False, "needs a column of texts written by users")
    elif facts.with_texts < _MIN_TEXTS:
        why = f"needs at least {_MIN_TEXTS} texts, but {events.text} has {facts.with_texts}"
        result["explanation"] = (False, why)
    else:
        result["explanation"] = (True, f"{facts.with_texts} texts in {events.text}")
    return result


# --------------------------------------------------------------------------- sizes and duration


def fit_to_budget(plan: RecipePlan) -> RecipePlan:
    """Return a plan with its estimated duration, reduced in size until it fits into `BUDGET_SECONDS`."""
    sizes = ((100, 120, True), (100, 120, False), (60, 100, False), (40, 80, False), (25, 60, False))
    for users, steps, shots in sizes:
        arms = LANGUAGE_MODEL_ARMS if shots else ("zero-shot", "tuned")
        plan = replace(plan, users=min(plan.users, users), steps=steps, arms=arms)
        plan = replace(plan, seconds=_estimate_seconds(plan))
        if sum(plan.seconds.values()) <= BUDGET_SECONDS:
            break
    return plan


def shown_history(plan: RecipePlan) -> int:
    """Return the number of interactions in a prompt for sequential recommendation."""
    return int(max(5, min(20, plan.facts.history[2] - 1)))


def training_window(plan: RecipePlan, *, tokens: float) -> int:
    """Return the number of interactions in a training example, limited by its maximum length."""
    return int(max(4, min(30, plan.facts.history[2], (ROW_TOKENS - 60) // tokens)))


def answer_tokens(plan: RecipePlan) -> int:
    """Return the maximum number of tokens of an explanation: 30 % more than the mean of the texts."""
    return int(min(80, max(16, 8 * math.ceil(plan.facts.text_tokens * 1.3 / 8))))


def _estimate_seconds(plan: RecipePlan) -> dict[str, float]:
    facts, history = plan.facts, min(plan.facts.history[1], 20)
    title, about = facts.title_tokens, facts.title_tokens + facts.field_tokens + 3
    ask = score = decode = 0.0
    if "rating" in plan.on:
        ask, decode = ask + 1.5 * (50 + min(history, 10) * about), decode + 3
    if "sequential" in plan.on:
        score += 40 + (history + plan.candidates) * title
    if "direct" in plan.on:
        ask += 1.5 * (80 + min(history, 5) * title + plan.candidates * (title + 3))
        decode += 4 * plan.candidates
    if "explanation" in plan.on:
        ask += 60 + 3 * min(facts.text_tokens, 50) + about
        decode += answer_tokens(plan)
    arm = plan.users * plan.facts.targets * (ask / _ASK_SPEED + score / _SCORE_SPEED + decode / _DECODE_SPEED)
    shots = 2.2 * arm if "few-shot" in plan.arms else 0.0
    evaluation = (len(plan.arms) - ("few-shot" in plan.arms)) * arm + shots
    return {
        "training": plan.steps * BATCH_TOKENS / TRAIN_SPEED,
        "evaluation": evaluation,
        # With backend auto, vLLM is used if it is installed.
        "starts": _START_SECONDS.get(plan.backend, _START_SECONDS["vllm"]) + _OTHER_SECONDS,
        **({"item texts": facts.items / _ENCODE_SPEED} if plan.encoder else {}),
    }
