"""Runs a suite of conversations: simulated users of the data, several managers, one catalogue and one recommender.

Users are those of `llmrec.chat.audience`, managers those of `llmrec.chat.opening`. A row whose conversations were held
is kept, so that a killed suite does not hold them again.
"""

from __future__ import annotations

import datetime as dt
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from llmrec import __version__
from llmrec.answer.known import Catalogue
from llmrec.answer.opening import Models, open_classics
from llmrec.bench.conversations_page import page_of
from llmrec.bench.records import ChatLine, ChatPair, ChatResult, ChatTalk
from llmrec.chat.audience import Guest, guests, talks
from llmrec.chat.calls import Call, read_call, written
from llmrec.chat.conversation import Conversation
from llmrec.chat.facts import Facts
from llmrec.chat.opening import CONTROLS, MANAGERS, grader, opened
from llmrec.chat.reading import Reader, title_of
from llmrec.chat.simulator import Held, near
from llmrec.chat.tools import ModelLists, Tools, asking
from llmrec.data.assemble import digest_items
from llmrec.data.split import SplitDataset
from llmrec.durable import write_checked, write_json, write_text
from llmrec.errors import DataError, RecipeError, did_you_mean
from llmrec.evaluate.compare import Contrast, Standing, planned, reach
from llmrec.fingerprint import fingerprint
from llmrec.machine import command_line, machine, versions
from llmrec.metrics.stats import interval
from llmrec.pipeline.results import describe
from llmrec.pipeline.resume import SUITE, locked, read_stage
from llmrec.progress import Bar
from llmrec.recipe.comparisons import ChatRow, ChatSuite
from llmrec.recipe.load import load_recipe, recipe_hash
from llmrec.results import Figure, Pair
from llmrec.terminal import works_in

log = logging.getLogger(__name__)

# What has no say in the conversations of a row.
_SILENT = {"chat", "description", "rows", "pairs", "bootstrap"}


@dataclass(frozen=True)
class Setting:
    """What the rows of a suite share: data, catalogue and recommender."""

    page: ChatSuite
    data: SplitDataset
    tools: Tools
    reader: Reader

    @staticmethod
    def of(page: ChatSuite, models: Models) -> Setting:
        """Return the setting over a recommender that is open."""
        assert models.data is not None
        facts = Facts(models.items)
        tools = Tools(facts, ModelLists(Catalogue(models.items), asking(models)))
        return Setting(page, models.data, tools, Reader(facts))

    @cached_property
    def guests(self) -> Mapping[int, Sequence[Guest]]:
        """The users of each seed, as many as the row with most of them has; fewer are the first of these."""
        page = self.page
        most = max(row.users or page.users for row in page.rows)
        draw = partial(guests, self.data, self.tools.facts, most, split=page.split, past=page.past, liked=page.liked)
        return {seed: draw(seed) for seed in page.seeds}

    def held(self, row: ChatRow, out: Callable[[int], None]) -> Iterator[ChatTalk]:
        """Hold the conversations of a row, and tell ``out`` of each."""
        page, facts = self.page, self.tools.facts
        reader = None if row.manager in CONTROLS else self.reader
        with opened(row.manager, k=page.k) as made, grader(row.ranker) as judge:
            tools = replace(self.tools, judge=judge)
            for seed in page.seeds:
                every = self.guests[seed][: row.users or page.users]
                conversation = Conversation(tools, made(seed), reader)
                for guest, held in talks(conversation, every, seed, page.turns, row.knows):
                    yield _talk(facts, seed, guest.user, guest.target, held)
                    out(1)


def run_chat(
    page: ChatSuite,
    *,
    out: Path,
    results: Path,
    say: Callable[[str], None] = log.info,
) -> dict[str, Path]:
    """Hold the conversations of every row that are not there yet, and write the results and their page.

    Args:
        page: From `llmrec.recipe.load.load_chat`.
        out: Where finished rows are kept.
        results: Folder for ``<chat>.json``; ``<chat>.md`` is written beside it.
        say: Told of each row as it is done.

    Returns:
        The written files by what they are.

    Raises:
        RecipeError: If the recipe, the recommender or a field of a row cannot be used.
        DataError: If the data cannot be, or nothing can be said of their items.
    """
    recipe, items = load_recipe(page.recipe, page.overrides), None if page.items is None else Path(page.items)
    if items is not None and not items.is_file():
        raise RecipeError(
            f"chat {page.chat}: items: there is no table {items}; make it, or drop the key for the recipe's own items",
            kind="missing-file",
            at=page.chat,
            column="items",
        )
    with locked(out, SUITE), closing(open_classics(recipe, [page.recommender], items)) as models:
        works_in(out)
        setting = Setting.of(page, models)
        _check_fields(page, setting.tools.facts)
        key = {
            "page": page.model_dump(mode="json", exclude=_SILENT),
            "recipe": recipe_hash(recipe),
            "data": setting.data.fingerprint,
            "items": digest_items(setting.tools.facts.items),
            "recommender": models.get().signature,
        }
        rows, begun = {}, time.monotonic()
        for place, row in enumerate(page.rows):
            rows[row.label] = _row(setting, row, out / "rows" / f"{place:02d}.json", key)
            say(_said(page, line_of(page, row, rows[row.label])))
        found = _results(setting, rows, time.monotonic() - begun)
    files = {"results": results / f"{page.chat}.json", "page": results.parent / f"{page.chat}.md"}
    write_json(files["results"], found.as_json())
    write_text(files["page"], page_of(found))
    return files


def _check_fields(page: ChatSuite, facts: Facts) -> None:
    for row in page.rows:
        for field in row.knows:
            if field not in facts.values:
                raise RecipeError(
                    f"chat {page.chat}, row {row.label!r}: nobody can know the field {field!r}"
                    f"{did_you_mean(field, facts.values)}; items have {', '.join(facts.values) or 'none'}",
                    kind="unknown-name",
                    at=page.chat,
                    column="knows",
                )


def _row(setting: Setting, row: ChatRow, path: Path, shared: Mapping[str, Any]) -> list[ChatTalk]:
    """Return the conversations of a stored row with the same key, or hold them and store what figures need."""
    asked = row.model_dump(mode="json", exclude={"name"})
    key = fingerprint("chat", row=asked, models=[_model(name) for name in (row.manager, row.ranker)], **shared)
    stored = read_stage(path, key, _talks)
    if stored is None:
        with Bar(row.label, (row.users or setting.page.users) * len(setting.page.seeds)) as bar:
            found = list(setting.held(row, bar.advance))
        stored = {"key": key, "talks": [talk.as_json() for talk in found]}
        write_checked(path, stored)
    else:
        log.info("chat: reusing %s", path)
    return _talks(stored)


def _talks(stored: Mapping[str, Any]) -> list[ChatTalk]:
    return [ChatTalk.model_validate(each) for each in stored["talks"]]


def _model(name: str | None) -> list[tuple[str, int, int]]:
    """Return what tells the files of a model's folder from those of another time; nothing for a name."""
    if name is None or name in MANAGERS or not (folder := Path(name)).is_dir():
        return []
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.iterdir())]


def _talk(facts: Facts, seed: int, user: str, target: str, held: Held) -> ChatTalk:
    title = title_of(facts.titles[target])
    return ChatTalk(
        seed=seed,
        user=user,
        hit=held.hit,
        turns=len(held.turns),
        seconds=held.seconds,
        tokens=held.cost.prompt_tokens + held.cost.completion_tokens,
        calls=dict(Counter(held.tools)),
        unread=sum(not _parses(call) for turn in held.turns for call in turn.calls),
        outside=sum(item not in facts.items for item in held.shown),
        named=sum(near(line, title) for line in held.lines),
    )


def _parses(call: Call) -> bool:
    try:
        return read_call(written(call)) == call
    except DataError:
        return False


# --------------------------------------------------------------------------- figures


def headline_of(page: ChatSuite) -> str:
    """Return the metric that rows are compared by."""
    return metric_of(page, page.turns)


def metric_of(page: ChatSuite, turns: int) -> str:
    """Return the name of the share of conversations one of whose first lists held what was wanted."""
    return f"Hit@{page.k}-in-{turns}"


def _within(talks: Sequence[ChatTalk], turns: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return whether each conversation had a hit within so many turns, shape (n,)."""
    return np.array([float(talk.hit is not None and talk.hit <= turns) for talk in talks])


def line_of(page: ChatSuite, row: ChatRow, talks: Sequence[ChatTalk]) -> ChatLine:
    """Return a row's figures; intervals resample users, who may have come with several seeds."""
    users, turns = [talk.user for talk in talks], sum(talk.turns for talk in talks)
    hits = [talk.hit for talk in talks if talk.hit is not None]
    calls: Counter[str] = Counter()
    for talk in talks:
        calls.update(talk.calls)
    metrics = {}
    for within in range(1, page.turns + 1):
        hit = _within(talks, within)
        found = interval(hit, resamples=page.bootstrap, seed=0, users=users, method="bca", widen=True)
        metrics[metric_of(page, within)] = Figure(**{end: round(value, 4) for end, value in asdict(found).items()})
    return ChatLine(
        name=row.label,
        manager=row.manager,
        ranker=row.ranker,
        knows=row.knows,
        conversations=len(talks),
        users=len(set(users)),
        metrics=metrics,
        turns=round(turns / len(talks), 2),
        turns_to_a_hit=round(float(np.mean(hits)), 2) if hits else None,
        seconds_a_turn=round(sum(talk.seconds for talk in talks) / turns, 4),
        tokens_a_turn=round(sum(talk.tokens for talk in talks) / turns, 1),
        parse_rate=1 - sum(talk.unread for talk in talks) / max(1, calls.total()),
        shown_outside_the_catalogue=sum(talk.outside for talk in talks),
        lines_with_a_wanted_title=sum(talk.named for talk in talks),
        calls=dict(sorted(calls.items())),
    )


def compared(page: ChatSuite, rows: Mapping[str, Sequence[ChatTalk]]) -> list[ChatPair]:
    """Return the planned comparisons, tested as one family, each on the conversations that both rows have."""
    contrasts = []
    for pair in page.pairs:
        one, other = ({(talk.seed, talk.user): talk for talk in rows[name]} for name in pair)
        both = [place for place in one if place in other]
        a, b = (
            Standing(name, 0.0, _within([each[place] for place in both], page.turns))
            for name, each in zip(pair, (one, other), strict=True)
        )
        contrasts.append(Contrast(headline_of(page), a, b, [user for _, user in both]))
    found = planned(contrasts, resamples=page.bootstrap)
    return [
        ChatPair(**dict(pair), conversations=len(contrast.users), users=len(set(contrast.users)))
        for pair, contrast in zip(found, contrasts, strict=True)
    ]


def _results(setting: Setting, rows: Mapping[str, Sequence[ChatTalk]], seconds: float) -> ChatResult:
    page, facts = setting.page, setting.tools.facts
    pairs = compared(page, rows)
    by_users: dict[int, list[Pair]] = {}
    for pair in pairs:
        by_users.setdefault(pair.users, []).append(pair)
    reached = [
        reach(headline_of(page), every, users=users, comparisons=len(pairs)) for users, every in by_users.items()
    ]
    return ChatResult(
        kind="chat",
        chat=page.chat,
        description=page.description,
        llmrec=__version__,
        created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        command=command_line(),
        chat_hash=recipe_hash(page),
        versions=versions(),
        machine=machine(),
        recipe=page.recipe,
        recommender=page.recommender,
        data=describe(setting.data),
        fields={field: sum(bool(item.fields.get(field)) for item in facts.items.values()) for field in facts.values},
        split=f"{setting.data.kind}/{page.split}",
        metric=headline_of(page),
        users=page.users,
        seeds=page.seeds,
        turns=page.turns,
        k=page.k,
        past=page.past,
        rows=tuple(line_of(page, row, rows[row.label]) for row in page.rows),
        pairs=tuple(pairs),
        detectable=" ".join(reached),
        seconds=max(seconds, sum(talk.seconds for talks in rows.values() for talk in talks)),
    )


def _said(page: ChatSuite, line: ChatLine) -> str:
    names = dict.fromkeys((metric_of(page, 1), headline_of(page)))
    shown = "  ".join(f"{name} {line.metrics[name].value:.3f}" for name in names)
    return f"{line.name:<28} {shown}  {1000 * line.seconds_a_turn:.0f} ms a turn"
