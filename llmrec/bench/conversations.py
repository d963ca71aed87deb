"""Runs a benchmark of conversations: simulated users, several dialogue managers, and one recommender.

Simulated users are those of `llmrec.chat.audience`, managers those of `llmrec.chat.opening`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.answer.known import Catalogue
from llmrec.answer.opening import Models, open_baselines
from llmrec.bench.engine import BenchmarkProgress, FinishedRow, RequestValues, read_or_compute
from llmrec.bench.records import BenchmarkProtocol, BenchmarkRow, BenchmarkTable, Dialogues, RowFigures
from llmrec.chat.audience import DataUser, data_user_conversations, data_users
from llmrec.chat.calls import Call, format_call, parse_call
from llmrec.chat.conversation import Conversation
from llmrec.chat.facts import Facts
from llmrec.chat.opening import BASELINE_MANAGERS, MANAGERS, open_grader, open_manager_factory
from llmrec.chat.reading import Reader, spoken_title
from llmrec.chat.simulator import SimulatedConversation, has_near_title
from llmrec.chat.tools import ModelListRecommender, Tools, make_answer_function
from llmrec.data.assemble import digest_items
from llmrec.data.split import SplitDataset
from llmrec.errors import DataError, RecipeError, did_you_mean
from llmrec.fingerprint import fingerprint
from llmrec.metrics.stats import bootstrap_interval
from llmrec.pipeline.results import data_info
from llmrec.pipeline.resume import SUITE_FILES, lock_folder
from llmrec.progress import Progress
from llmrec.recipe.comparisons import ChatRow, ChatSuite
from llmrec.recipe.load import load_recipe, recipe_hash
from llmrec.records import Record
from llmrec.results import Figure
from llmrec.terminal import set_command_folder

# Keys that do not affect the conversations.
_IGNORED_KEYS = {"chat", "description", "rows", "pairs", "bootstrap"}
TABLE = "conversations"


class ConversationData(Record):
    """The data of a conversation from which results are computed.

    Attributes:
        seed: Seed of the sample of users.
        hit: The turn whose list contained the target, from 1; None for no hit.
        tokens: Tokens read and written by language models.
        calls: Number of calls by tool.
        unread: Number of calls that do not parse.
        outside: Number of shown items that are not in the catalogue.
        named: Number of user messages that name the target, exactly or nearly.
    """

    seed: int
    user: str
    hit: int | None = None
    turns: int
    seconds: float
    tokens: int = 0
    calls: dict[str, int]
    unread: int = 0
    outside: int = 0
    named: int = 0


@dataclass(frozen=True)
class SharedSetting:
    """The data, catalogue and recommender that all systems of a benchmark share."""

    page: ChatSuite
    data: SplitDataset
    tools: Tools
    reader: Reader

    @staticmethod
    def of(page: ChatSuite, models: Models) -> SharedSetting:
        """Return the shared data for an open recommender."""
        assert models.data is not None
        facts = Facts(models.items)
        tools = Tools(facts, ModelListRecommender(Catalogue(models.items), make_answer_function(models)))
        return SharedSetting(page, models.data, tools, Reader(facts))

    @cached_property
    def data_users(self) -> Mapping[int, Sequence[DataUser]]:
        """The simulated users of each seed."""
        page = self.page
        most = max(row.users or page.users for row in page.rows)
        draw = partial(
            data_users, self.data, self.tools.facts, most, split=page.split, past=page.past, liked=page.liked
        )
        return {seed: draw(seed) for seed in page.seeds}

    def held(self, row: ChatRow, out: Callable[[int], None]) -> Iterator[ConversationData]:
        """Run the conversations of a dialogue system, and report each to ``out``."""
        page, facts = self.page, self.tools.facts
        reader = None if row.manager in BASELINE_MANAGERS else self.reader
        with open_manager_factory(row.manager, k=page.k) as create, open_grader(row.ranker) as judge:
            tools = replace(self.tools, judge=judge)
            for seed in page.seeds:
                every = self.data_users[seed][: row.users or page.users]
                conversation = Conversation(tools, create(seed), reader)
                for simulated_user, held in data_user_conversations(conversation, every, seed, page.turns, row.knows):
                    yield _conversation_data(facts, seed, simulated_user.user, simulated_user.target, held)
                    out(1)


def run_conversations(page: ChatSuite, out: Path, say: Callable[[str], None]) -> Iterator[BenchmarkProgress]:
    """Run the missing conversations of all systems, and yield the results.

    Args:
        page: From `llmrec.recipe.load.load_chat_suite`.
        out: Folder of finished rows.
        say: Called with a line on each finished row.

    Raises:
        RecipeError: If the recipe, the recommender or a field of a row cannot be used.
        DataError: If the data cannot be used, or its items have no fields to talk about.
    """
    recipe, items = load_recipe(page.recipe, page.overrides), None if page.items is None else Path(page.items)
    if items is not None and not items.is_file():
        raise RecipeError(
            f"chat {page.chat}: items: there is no table {items}; create it, or drop the key to use the recipe's items",
            kind="missing-file",
            at=page.chat,
            column="items",
        )
    with lock_folder(out, SUITE_FILES), closing(open_baselines(recipe, [page.recommender], items)) as models:
        set_command_folder(out)
        setting = SharedSetting.of(page, models)
        _check_fields(page, setting.tools.facts)
        key = {
            "page": page.model_dump(mode="json", exclude=_IGNORED_KEYS),
            "recipe": recipe_hash(recipe),
            "data": setting.data.fingerprint,
            "items": digest_items(setting.tools.facts.items),
            "recommender": models.get().signature,
        }
        rows: list[FinishedRow] = []
        seconds = 0.0
        for number, row in enumerate(page.rows):
            held = _read_or_run(setting, row, out / "rows" / f"{number:02d}.json", key)
            seconds += sum(talk.seconds for talk in held)
            rows.append(conversation_row(page, row, held))
            say(_format_progress_line(page, rows[-1].row))
        yield _conversation_progress(setting, rows, seconds)


def _check_fields(page: ChatSuite, facts: Facts) -> None:
    for row in page.rows:
        for field in row.knows:
            if field not in facts.values:
                raise RecipeError(
                    f"chat {page.chat}, row {row.label!r}: items have no field {field!r}"
                    f"{did_you_mean(field, facts.values)}; the fields are {', '.join(facts.values) or 'none'}",
                    kind="unknown-name",
                    at=page.chat,
                    column="knows",
                )


def _read_or_run(setting: SharedSetting, row: ChatRow, path: Path, shared: Mapping[str, Any]) -> list[ConversationData]:
    """Return stored conversations with the same cache key, or run and store them."""
    config = row.model_dump(mode="json", exclude={"name"})
    files = [_model_files(name) for name in (row.manager, row.ranker)]
    key = fingerprint("chat", modules=(__name__,), row=config, models=files, **shared)

    def make() -> Mapping[str, Any]:
        with Progress(row.label, (row.users or setting.page.users) * len(setting.page.seeds)) as bar:
            return {"talks": [talk.as_json() for talk in setting.held(row, bar.advance)]}

    return read_or_compute(
        path, key, lambda stored: [ConversationData.model_validate(talk) for talk in stored["talks"]], make
    )


def _model_files(name: str | None) -> list[tuple[str, int, int]]:
    """Return names, sizes and times of the files in a model folder; empty for a model name."""
    if name is None or name in MANAGERS or not (folder := Path(name)).is_dir():
        return []
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.iterdir())]


def _conversation_data(
    facts: Facts, seed: int, user: str, target: str, held: SimulatedConversation
) -> ConversationData:
    title = spoken_title(facts.titles[target])
    return ConversationData(
        seed=seed,
        user=user,
        hit=held.hit,
        turns=len(held.turns),
        seconds=held.seconds,
        tokens=held.cost.prompt_tokens + held.cost.completion_tokens,
        calls=dict(Counter(held.tools)),
        unread=sum(not _is_parseable(call) for turn in held.turns for call in turn.calls),
        outside=sum(item not in facts.items for item in held.shown),
        named=sum(has_near_title(line, title) for line in held.lines),
    )


def _is_parseable(call: Call) -> bool:
    try:
        return parse_call(format_call(call)) == call
    except DataError:
        return False


# --------------------------------------------------------------------------- results


def hit_metric(page: ChatSuite, turns: int) -> str:
    """Return the name of the metric: the share of conversations with a hit in their first lists."""
    return f"Hit@{page.k}-in-{turns}"


def _hits_within(talks: Sequence[ConversationData], turns: int) -> NDArray[np.float64]:
    """Return 1 for each conversation with a hit within a number of turns, else 0, shape (n,)."""
    return np.array([float(talk.hit is not None and talk.hit <= turns) for talk in talks])


def conversation_row(page: ChatSuite, row: ChatRow, talks: Sequence[ConversationData]) -> FinishedRow:
    """Return the results of a dialogue system, with intervals over users, and its values by conversation."""
    users, turns = [talk.user for talk in talks], sum(talk.turns for talk in talks)
    hits = [talk.hit for talk in talks if talk.hit is not None]
    calls: Counter[str] = Counter()
    for talk in talks:
        calls.update(talk.calls)
    metrics = {}
    for within in range(1, page.turns + 1):
        hit = _hits_within(talks, within)
        interval = bootstrap_interval(hit, resamples=page.bootstrap, seed=0, users=users, method="bca", widen=True)
        metrics[hit_metric(page, within)] = Figure(**{end: round(value, 4) for end, value in asdict(interval).items()})
    parse_rate = 1 - sum(talk.unread for talk in talks) / max(1, calls.total())
    finished = BenchmarkRow(
        name=row.label,
        seeds=len(page.seeds),
        tables={TABLE: RowFigures(metrics=metrics, n=len(talks), parse_rate=parse_rate)},
        dialogues=Dialogues(
            manager=row.manager,
            ranker=row.ranker,
            knows=row.knows,
            conversations=len(talks),
            users=len(set(users)),
            turns=round(turns / len(talks), 2),
            turns_to_a_hit=round(float(np.mean(hits)), 2) if hits else None,
            seconds_a_turn=round(sum(talk.seconds for talk in talks) / turns, 4),
            tokens_a_turn=round(sum(talk.tokens for talk in talks) / turns, 1),
            shown_outside_the_catalogue=sum(talk.outside for talk in talks),
            lines_with_a_wanted_title=sum(talk.named for talk in talks),
            calls=dict(sorted(calls.items())),
        ),
    )
    requests = [(talk.seed, talk.user) for talk in talks]
    return FinishedRow(finished, {TABLE: RequestValues(_hits_within(talks, page.turns), users, requests)})


def conversation_tables(page: ChatSuite, rows: Sequence[FinishedRow]) -> list[BenchmarkTable]:
    """Return the only table of a benchmark of conversations."""
    samples = [row.samples[TABLE] for row in rows]
    return [
        BenchmarkTable(
            name=TABLE,
            task=TABLE,
            metric=hit_metric(page, page.turns),
            metrics=tuple(hit_metric(page, turns) for turns in range(1, page.turns + 1)),
            requests=max(len(sample.users) for sample in samples),
            users=max(len(set(sample.users)) for sample in samples),
        )
    ]


def _conversation_progress(setting: SharedSetting, rows: Sequence[FinishedRow], seconds: float) -> BenchmarkProgress:
    page, facts = setting.page, setting.tools.facts
    protocol = BenchmarkProtocol(
        split=f"{setting.data.kind}/{page.split}",
        seeds=page.seeds,
        users=page.users,
        recipe=page.recipe,
        recommender=page.recommender,
        fields={field: sum(bool(item.fields.get(field)) for item in facts.items.values()) for field in facts.values},
        turns=page.turns,
        k=page.k,
        past=page.past,
    )
    return BenchmarkProgress(
        conversation_tables(page, rows), rows, {"data": data_info(setting.data), "protocol": protocol}, seconds=seconds
    )


def _format_progress_line(page: ChatSuite, row: BenchmarkRow) -> str:
    metrics, dialogues = row.tables[TABLE].metrics, row.dialogues
    assert dialogues is not None
    names = dict.fromkeys((hit_metric(page, 1), hit_metric(page, page.turns)))
    shown = "  ".join(f"{name} {metrics[name].value:.3f}" for name in names)
    return f"{row.name:<28} {shown}  {1000 * dialogues.seconds_a_turn:.0f} ms a turn"
