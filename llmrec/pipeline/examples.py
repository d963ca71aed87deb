"""Selects example users, items and answers for the report, by a seeded hash that does not depend on the answers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import polars as pl

from llmrec.baselines.parameters import feature_store_hashes
from llmrec.data.dataset import Dataset
from llmrec.data.features import FeatureStore
from llmrec.data.hashing import hash64
from llmrec.errors import LlmrecError
from llmrec.guard import clean, shorten_at_grapheme
from llmrec.pipeline.evaluation import ResultRow
from llmrec.pipeline.study import Study, lazy_item_vectors
from llmrec.prompts.template import Template
from llmrec.records import (
    ColdStartItem,
    ExampleUser,
    GeneratedText,
    ListAppearance,
    Product,
    PromptContents,
    Sample,
    SimilarText,
    TextExample,
    User,
)
from llmrec.registry import is_lower_better
from llmrec.results import Prediction
from llmrec.tasks.base import HISTORY_VARIABLES, DataView
from llmrec.tasks.family import family_of
from llmrec.types import Case, Request, Text

MAX_SAMPLES = 20
"""The maximum number of requests shown per family."""
MAX_INPUT_CHARACTERS = 400
"""The maximum number of characters of an input."""


def sample_indices(requests: Sequence[str], seed: int, count: int = MAX_SAMPLES) -> list[int]:
    """Return the indices of requests to show, in the order of a seeded hash."""
    order = np.argsort(hash64("text sample", seed, requests), kind="stable")
    return [int(index) for index in order[:count]]


def user_record(dataset: Dataset, user_id: str) -> User:
    """Return the user of a request in the form used in prompts."""
    return User(id=user_id, name=clean(dataset.users.get(user_id, {}).get("name", "")))


def product_record(dataset: Dataset, item_id: str) -> Product:
    """Return the item of a request in the form used in prompts."""
    item = dataset.items[item_id]
    fields = {clean(name): shorten_text(clean(value)) for name, value in item.fields.items() if clean(value)}
    return Product(id=item_id, title=clean(item.title), fields=fields)


def shorten_text(text: str, limit: int = MAX_INPUT_CHARACTERS) -> str:
    """Return the beginning of a long text, with a note on its full length."""
    return text if len(text) <= limit else f"{shorten_at_grapheme(text, limit)} … ({len(text)} characters)"


def parse_ranked_items(parsed: str) -> list[str]:
    """Return the items of a ranking in order; empty for other answers."""
    answer = json.loads(parsed)
    return [str(item) for item in answer["items"]] if isinstance(answer, dict) else []


# --------------------------------------------------------------------------- example


_HISTORY, _LISTED = 8, 5


def example_user(study: Study, rows: Sequence[ResultRow], headline: Mapping[str, str]) -> ExampleUser | None:
    """Return an example user with a ranked list, the entry ``example`` of results.json.

    The row is the best tuned one of the first task that ranks for users (the sequential task if present); without a
    tuned model the best row of a language model alone, otherwise the best baseline. The user is drawn by the seed among
    those with a history, independently of the quality of the list.

    Args:
        study: Its cases are those of the rows, in order.
        rows: Finished rows.
        headline: The metric by which rows of a family are ordered.

    Returns:
        None if no row ranks for users.
    """
    # In the order of result tables, which starts with the sequential task.
    for family in (family for family in study.tasks if family_of(family).ranks_for_users):
        row = _best_row(family, headline[family], rows)
        if row is not None:
            return _build_example_user(study, family, row)
    return None


def _best_row(family: str, metric: str, rows: Sequence[ResultRow]) -> ResultRow | None:
    eligible = [
        row
        for row in rows
        if row.figures.task == family and metric in row.figures.metrics and row.figures.fusion is None
    ]
    sign = 1 if is_lower_better(metric) else -1

    def order(row: ResultRow) -> tuple[bool, bool, float]:
        value = row.figures.metrics[metric].value
        arm = row.figures.arm
        return arm != "tuned", arm == "baseline", float("inf") if value is None else sign * value

    return min(eligible, key=order, default=None)


def _build_example_user(study: Study, family: str, row: ResultRow) -> ExampleUser:
    cases, dataset = study.cases(family), study.task_data(family).dataset
    known = [index for index, case in enumerate(cases) if case.request.history] or list(range(len(cases)))
    index = known[sample_indices([cases[n].request.id for n in known], study.recipe.seed, 1)[0]]
    request, truth, record = cases[index].request, str(cases[index].truth), row.records[index]

    def title(item: str) -> str:
        return clean(dataset.items[item].title) if item in dataset.items else item

    listed = parse_ranked_items(record.parsed)[:_LISTED]
    return ExampleUser(
        task=family,
        row=row.figures.id,
        user=user_record(dataset, request.user_id),
        history=tuple(title(event.item_id) for event in request.history[-_HISTORY:]),
        events=len(request.history),
        listed=tuple(map(title, listed)),
        hit=listed.index(truth) + 1 if truth in listed else None,
        truth=title(truth),
        rank=record.rank,
        pool=record.pool,
    )


# --------------------------------------------------------------------------- effect of features


FEATURE_EXAMPLES = 8
"""The number of requests per family that show features and their effect."""
_MAX_READ_ITEMS = 6


def text_feature_examples(study: Study, rows: Sequence[ResultRow]) -> Iterator[TextExample]:
    """Yield how generated features changed the answers to a few requests, the entry ``gallery`` of results.json.

    It shows the first baseline with features of each family, and the other rows of the same baseline.
    """
    for family in study.tasks:
        named = {baseline.label: baseline for baseline in study.baselines(family)}
        folders = {label: feature_store_hashes(entry.name, entry.parameters) for label, entry in named.items()}
        reading = [label for label, stores in folders.items() if stores and not named[label].parameters.get("shuffled")]
        if reading:
            alike = [label for label, entry in named.items() if entry.name == named[reading[0]].name]
            family_rows = [row for row in rows if row.figures.task == family and row.figures.predictor in alike]
            yield from _feature_examples(study, family, next(iter(folders[reading[0]])), family_rows)


def _feature_examples(study: Study, family: str, folder: str, rows: Sequence[ResultRow]) -> Iterator[TextExample]:
    store, cases, data = FeatureStore.open(folder), study.cases(family), study.task_data(family).dataset
    seen = store.seen_by("user")
    indices = [index for index, case in enumerate(cases) if case.request.user_id in seen] or list(range(len(cases)))
    for n in sample_indices([cases[index].request.id for index in indices], study.recipe.seed, FEATURE_EXAMPLES):
        index, request = indices[n], cases[indices[n]].request
        user, item = request.user_id, str(request.item or cases[indices[n]].truth)
        pairs = sorted(entry for _, entry in seen.get(user, ()) if entry in data.items)
        yield TextExample(
            task=family,
            request_id=request.id,
            user=user_record(data, user),
            item=product_record(data, item),
            store=folder,
            read=tuple(clean(data.items[pair].title) for pair in pairs[:_MAX_READ_ITEMS]),
            events=len(pairs),
            profile=shorten_text(clean(store.texts("user", [user]).get(user, ""), MAX_INPUT_CHARACTERS)),
            described=shorten_text(clean(store.texts("item", [item]).get(item, ""), MAX_INPUT_CHARACTERS)),
            truth=f"{truth:g}" if isinstance(truth := cases[index].truth, float) else str(truth),
            answers={row.figures.id: _format_answer(row.records[index], item) for row in rows},
        )


def _format_answer(record: Prediction, item: str) -> str:
    """Return an answer as text: a number, or the rank of the target item."""
    if answer := parse_ranked_items(record.parsed):
        return f"rank {answer.index(item) + 1}" if item in answer else f"not in the top {len(answer)}"
    parsed = json.loads(record.parsed)
    return f"{parsed:.3f}" if isinstance(parsed, float) else "could not be parsed" if parsed is None else str(parsed)


# --------------------------------------------------------------------------- generated texts


# Characters to show of an answer that could not be parsed.
_MAX_RAW_CHARACTERS = 500
_LATEST_TITLES = 3
_STATISTICS = {"user_stats": "chosen by the user", "item_stats": "chosen by others"}


def text_samples(study: Study, rows: Sequence[ResultRow]) -> Iterator[Sample]:
    """Yield examples of generated texts by task, the entry ``texts`` of results.json, in the order of the draw.

    The cases of the study are those of the rows, in order.
    """
    for family in (family for family in study.tasks if family_of(family).answer is Text):
        cases, family_rows = study.cases(family), [row for row in rows if row.figures.task == family]
        dataset, view = study.task_data(family).dataset, DataView(study.task_data(family))
        for index in sample_indices([case.request.id for case in cases], study.recipe.seed):
            case = cases[index]
            yield Sample(
                task=family,
                request_id=case.request.id,
                user=user_record(dataset, case.request.user_id),
                item=product_record(dataset, str(case.request.item)),
                inputs=tuple(_prompt_contents(study, family, case.request, view)),
                truth=str(case.truth),
                answers={row.figures.id: _generated_text(row.records[index]) for row in family_rows},
            )


def _prompt_contents(study: Study, family: str, request: Request, view: DataView) -> Iterator[PromptContents]:
    """Yield the inputs of a request that prompts can show."""
    templates = study.eval_templates(family)
    for name, text in request.context.items():
        yield PromptContents(
            name=name, text=shorten_text(clean(text, len(text))), by=_templates_showing(templates, {name})
        )
    dataset = study.task_data(family).dataset
    profile = _format_profile(dataset.users.get(request.user_id, {}))
    if profile and (by := _templates_showing(templates, {"profile"})) and "profile" not in request.context:
        yield PromptContents(name="profile", text=shorten_text(profile), by=by)
    if request.history and (by := _templates_showing(templates, HISTORY_VARIABLES)):
        titles = [clean(dataset.items[event.item_id].title) for event in request.history[-_LATEST_TITLES:]]
        text = f"{len(request.history)}; the latest: {'; '.join(titles)}"
        yield PromptContents(name="earlier items", text=shorten_text(text), by=by)
    known = view.pair(request.user_id, str(request.item))
    for variable, name in _STATISTICS.items():
        by = _templates_showing(templates, {variable})
        if by and (statistics := cast(Callable[[], Mapping[str, Any] | None], known[variable])()):
            yield PromptContents(name=name, text=_format_statistics(statistics), by=by)


def _templates_showing(templates: Sequence[Template], names: frozenset[str] | set[str]) -> tuple[str, ...]:
    return tuple(template.id for template in templates if names & template.names("system", "user"))


def _format_statistics(statistics: Mapping[str, Any]) -> str:
    mean = f", rated about {statistics['mean']} on average" if statistics["mean"] else ""
    return f"{statistics['count']} in training{mean}"


def _format_profile(fields: Mapping[str, str]) -> str:
    """Return the profile fields of a user as one line, without the name."""
    result = {clean(name): clean(value) for name, value in fields.items() if name != "name"}
    return "; ".join(f"{name}: {value}" for name, value in result.items() if value)


def _generated_text(record: Prediction) -> GeneratedText:
    """Return the parsed answer, or the reason why it is missing."""
    text = json.loads(record.parsed)
    if text is not None:
        return GeneratedText(text=str(text))
    return GeneratedText(text=None, error=record.error or "", raw=shorten_text(record.raw or "", _MAX_RAW_CHARACTERS))


# --------------------------------------------------------------------------- cold-start items


log = logging.getLogger(__name__)

SHOWN_RANKS = 10
"""The number of ranks shown of a list."""
# Number of items per task, similar items per item, and ranked lists per model.
_ITEMS, _NEAR, _VISITS = 6, 4, 2


def cold_start_examples(study: Study, rows: Sequence[ResultRow]) -> Iterator[ColdStartItem]:
    """Yield examples of cold-start items and their users, the entry ``newcomers`` of results.json.

    They are drawn for each family that ranks for users, by the seed among the cold-start targets and independently of
    the rankings; none if the split has no cold-start items.
    """
    for family in study.tasks:
        if family_of(family).ranks_for_users:
            yield from _cold_start_items(study, family, rows)


def _cold_start_items(study: Study, family: str, rows: Sequence[ResultRow]) -> Iterator[ColdStartItem]:
    data, cases = study.task_data(family), study.cases(family)
    targets = sorted({str(case.truth) for case in cases} & data.cold)
    if not targets:
        return
    chosen = [targets[n] for n in sample_indices(targets, study.recipe.seed, _ITEMS)]
    family_rows = [row for row in rows if row.figures.task == family]
    lists = {
        row.figures.id: [parse_ranked_items(record.parsed)[:SHOWN_RANKS] for record in row.records]
        for row in family_rows
    }
    near = _similar_items(study, family, chosen)
    for item in chosen:
        ranks = {
            name: [(n, top.index(item) + 1) for n, top in enumerate(row_lists) if item in top]
            for name, row_lists in lists.items()
        }
        shown = {name: _first_rank_per_user(hits, cases)[:_VISITS] for name, hits in ranks.items()}
        yield ColdStartItem(
            task=family,
            item=product_record(data.dataset, item),
            neighbours=near[item],
            wanted=sum(str(case.truth) == item for case in cases),
            lists={name: len(hits) for name, hits in ranks.items()},
            visits={
                name: tuple(_list_appearance(study, family, cases[n], rank, item) for n, rank in hits)
                for name, hits in shown.items()
                if hits
            },
        )


def _first_rank_per_user(ranks: Sequence[tuple[int, int]], cases: Sequence[Case]) -> list[tuple[int, int]]:
    """Keep one list per user."""
    first = {cases[n].request.user_id: (n, rank) for n, rank in reversed(ranks)}
    return sorted(first.values())


def _list_appearance(study: Study, family: str, case: Case, rank: int, item: str) -> ListAppearance:
    dataset = study.task_data(family).dataset
    latest = (clean(dataset.items[event.item_id].title) for event in case.request.history[-_LATEST_TITLES:])
    return ListAppearance(
        user=user_record(dataset, case.request.user_id),
        latest=tuple(latest),
        place=rank,
        wanted=str(case.truth) == item,
    )


def _similar_items(study: Study, family: str, items: Sequence[str]) -> dict[str, tuple[SimilarText, ...]]:
    """Return, for each item, the training items with the most similar texts; empty without a text encoder."""
    data, result = study.task_data(family), dict[str, tuple[SimilarText, ...]]()
    warm = sorted(data.train["item_id"].unique().cast(pl.String).to_list())
    shown = {item: data.dataset.items[item] for item in (*items, *warm)}
    try:
        vectors = lazy_item_vectors(shown, study.recipe.encoder, data)
        similarity = vectors.of(items) @ vectors.of(warm).T
    except LlmrecError as error:
        # An error in an example must not discard the metrics, which are computed by now.
        log.warning("the report shows cold-start items without similar items: %s", error)
        return dict.fromkeys(items, ())
    for item, row in zip(items, similarity, strict=True):
        best = np.argsort(-row, kind="stable")[:_NEAR]
        result[item] = tuple(
            SimilarText(title=clean(data.dataset.items[warm[index]].title), cosine=float(row[index]))
            for index in best.tolist()
        )
    return result
