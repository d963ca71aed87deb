"""A finished row taken apart: by slice, by where the target stands among its candidates, and text by text.

All is worked out from the values and answers that a row keeps, so that rows of an earlier run have it too. Texts to
read beside each other are drawn by a seeded hash of the request, never by how good an answer is, and are the same for
every row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from llmrec.baselines.parameters import stores_of
from llmrec.data.dataset import Dataset
from llmrec.data.features import FeatureStore
from llmrec.data.hashing import hash64
from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.slices import slice_figures
from llmrec.experiment.evaluation import ResultRow
from llmrec.experiment.row_specs import protocol_of
from llmrec.experiment.study import Study
from llmrec.guard import clean, cut
from llmrec.metrics import ranking
from llmrec.metrics.multiple import holm
from llmrec.metrics.stats import mean_ranks
from llmrec.prompts.template import Template
from llmrec.records import Exhibit, Product, Sample, Told, User, Written
from llmrec.results import AtPosition, Prediction, SliceOfRow, Trend
from llmrec.tasks.base import PAST, View
from llmrec.tasks.family import family_of
from llmrec.types import Case, Ranking, Request, Text

_ALPHA = 0.05
# No mean over requests, so that a slice of them has no figure of its own kind; log loss is sliced instead.
_INSTEAD = {"AUC": "LogLoss", "GAUC": "LogLoss"}
_FOR_EACH_ROW = 100
# Permuted positions drawn at a time: 4 MB of them.
_CHUNK = 1 << 19


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Where the targets of a row stand, and what became of them.

    Attributes:
        position: Place of the target in the stored order of its candidates, from 1, shape (n,).
        hit: HR@1, shape (n,).
        rank: Expected rank, shape (n,); a target that an answer leaves out counts as last.
    """

    position: NDArray[np.int64]
    hit: NDArray[np.float64]
    rank: NDArray[np.float64]


class Details(TypedDict):
    """What a row of results.json holds beside its figures."""

    users: int
    slices: tuple[SliceOfRow, ...]
    by_position: NotRequired[tuple[AtPosition, ...]]
    position_trend: NotRequired[Trend]


def breakdowns(study: Study, rows: Sequence[ResultRow], headline: Mapping[str, str]) -> list[Details]:
    """Return what each row of results.json holds beside its figures.

    Args:
        study: Its cases are those of the rows, in order.
        rows: Finished rows.
        headline: The metric by which slices of a family are compared.

    Returns:
        One mapping a row. Positions stand on rows with candidates, the trend on those of language models only.
    """
    cases = {family: study.cases(family) for family in study.tasks}
    protocols = {family: protocol_of(study, family) for family in study.tasks}
    placed = [place(row, cases[row.figures.task]) for row in rows]
    trends = _trends(rows, placed, resamples=study.recipe.eval.bootstrap, seed=study.recipe.seed)
    return [
        _details(
            len({record.user_id for record in row.records}),
            _slices(study, row, cases, headline, protocols),
            by_position(found) if found is not None else None,
            trend,
        )
        for row, found, trend in zip(rows, placed, trends, strict=True)
    ]


def _details(
    users: int, slices: tuple[SliceOfRow, ...], positions: tuple[AtPosition, ...] | None, trend: Trend | None
) -> Details:
    found = Details(users=users, slices=slices)
    if positions is not None:
        found["by_position"] = positions
    if trend is not None:
        found["position_trend"] = trend
    return found


def _slices(
    study: Study,
    row: ResultRow,
    cases: Mapping[str, Sequence[Case]],
    headline: Mapping[str, str],
    protocols: Mapping[str, EvalProtocol],
) -> tuple[SliceOfRow, ...]:
    family = row.figures.task
    metric = _INSTEAD.get(headline[family], headline[family])
    if metric not in row.values:
        return ()
    return slice_figures(
        {metric: row.values[metric]},
        cases[family],
        study.task_data(family),
        metrics=row.figures.metrics,
        protocol=protocols[family],
        attributes=study.recipe.eval.slices,
    )


# --------------------------------------------------------------------------- positions


def place(row: ResultRow, cases: Sequence[Case]) -> Placed | None:
    """Return where each target stands among its candidates, if it is there; None where a request has no candidates."""
    if not cases or any(case.request.candidates is None for case in cases):
        return None
    sets = [case.request.candidates or () for case in cases]
    ranks = [record.rank for record in row.records]
    # Retrieved candidates may lack the target: then it has no position.
    there = [n for n, (own, case) in enumerate(zip(sets, cases, strict=True)) if case.truth in own]
    if not there:
        return None
    hits = row.values["HR@1"] if "HR@1" in row.values else _hits(row, sets)
    last = [len(own) if rank is None else rank for own, rank in zip(sets, ranks, strict=True)]
    return Placed(
        position=np.array([sets[n].index(str(cases[n].truth)) + 1 for n in there]),
        hit=hits[there],
        rank=np.array(last, dtype=np.float64)[there],
    )


def _hits(row: ResultRow, sets: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """Return HR@1 from the stored answers, for a recipe whose cut-offs leave out 1."""
    standings = []
    for record, own in zip(row.records, sets, strict=True):
        found = json.loads(record.parsed) or {"items": (), "scores": ()}
        answer = Ranking(
            request_id=record.request_id, items=tuple(found["items"]), scores=tuple(map(float, found["scores"]))
        )
        standings.append(ranking.standing(answer, record.truth, len(own)))
    greater = np.array([standing.greater for standing in standings], dtype=np.int64)
    return ranking.hit_rate(greater, np.array([standing.tied for standing in standings], dtype=np.int64), 1)


def by_position(placed: Placed) -> tuple[AtPosition, ...]:
    """Return HR@1 and the mean rank of each position, those without requests left out."""
    found = []
    for position in np.unique(placed.position):
        here = placed.position == position
        rank = placed.rank[here]
        found.append(
            AtPosition(
                position=int(position),
                n=int(here.sum()),
                hit=float(placed.hit[here].mean()),
                rank=float(rank.mean()),
                rank_sd=float(rank.std(ddof=1)) if len(rank) > 1 else None,
            )
        )
    return tuple(found)


def _trends(
    rows: Sequence[ResultRow], placed: Sequence[Placed | None], *, resamples: int, seed: int
) -> list[Trend | None]:
    """Test the rows of language models for a trend over positions; p-values are Holm-adjusted over these rows."""
    tested = [row.figures.arm != "baseline" and own is not None for row, own in zip(rows, placed, strict=True)]
    # As for comparisons: enough draws that the smallest p stays small after Holm.
    resamples = max(resamples, _FOR_EACH_ROW * sum(tested))
    found: list[tuple[float, float] | None] = [
        trend(own.position, own.rank, resamples=resamples, seed=seed) if own is not None and chosen else None
        for own, chosen in zip(placed, tested, strict=True)
    ]
    adjusted = iter(holm([each[1] for each in found if each is not None]))
    return [None if each is None else _trend_of(each[0], next(adjusted)) for each in found]


def _trend_of(rho: float, p: float) -> Trend:
    """Say which end of the list a row prefers: a rank that grows with the position favours early targets."""
    return Trend(rho=rho, p=p, prefers=("early" if rho > 0 else "late") if p <= _ALPHA else None)


def trend(
    position: NDArray[np.int64], rank: NDArray[np.float64], *, resamples: int, seed: int
) -> tuple[float, float] | None:
    """Return the rank correlation (Spearman) of a target's position with its rank, and the two-sided p.

    Positions are drawn at random when candidate sets are made, so that without a preference for either end every
    assignment of the positions to the requests is equally likely, whatever users and items are like: p is the share of
    drawn assignments with a correlation at least as large, ``(1 + as large) / (1 + resamples)``.

    Returns:
        None where all positions or all ranks are equal.
    """
    x = mean_ranks(position) - (len(position) + 1) / 2
    y = mean_ranks(rank) - (len(rank) + 1) / 2
    scale = float(np.sqrt((x @ x) * (y @ y)))
    if scale == 0:
        return None
    observed = float(x @ y)
    rng = np.random.default_rng(seed)
    beyond, drawn = 0, 0
    while drawn < resamples:
        rows = min(max(1, _CHUNK // len(x)), resamples - drawn)
        sums = rng.permuted(np.tile(x, (rows, 1)), axis=1) @ y
        beyond += int(np.count_nonzero(np.abs(sums) >= abs(observed) - 1e-9 * scale))
        drawn += rows
    return observed / scale, (1 + beyond) / (1 + resamples)


COUNT = 20
"""Requests a family, or all that there are."""
# Characters of an input; of an answer that could not be read, which no task has cut.
_INPUT, _RAW = 400, 500
_TITLES = 3
EXHIBITS = 8
"""Requests a family that show what features say and change."""
_READ = 6
_STATISTICS = {"user_stats": "chosen by the user", "item_stats": "chosen by others"}


def text_samples(study: Study, rows: Sequence[ResultRow]) -> list[Sample]:
    """Return ``texts`` of results.json, family by family.

    Args:
        study: Its cases are those of the rows, in order.
        rows: Finished rows.

    Returns:
        One a request, in the order of the draw.
    """
    return [
        sample for family in study.tasks if family_of(family).answer is Text for sample in _samples(study, family, rows)
    ]


def _samples(study: Study, family: str, rows: Sequence[ResultRow]) -> Iterator[Sample]:
    cases, own = study.cases(family), [row for row in rows if row.figures.task == family]
    view = View(study.task_data(family))
    for place in drawn([case.request.id for case in cases], study.recipe.seed):
        case = cases[place]
        dataset = study.task_data(family).dataset
        yield Sample(
            task=family,
            request_id=case.request.id,
            user=_user(dataset, case.request.user_id),
            item=_product(dataset, str(case.request.item)),
            told=tuple(_told(study, family, case.request, view)),
            truth=str(case.truth),
            answers={row.figures.id: _answer(row.records[place]) for row in own},
        )


def exhibits(study: Study, rows: Sequence[ResultRow]) -> list[Exhibit]:
    """Return ``gallery`` of results.json: what features say of a few requests, and what they change.

    Of each family the first baseline that reads features is shown, beside the rows of the same baseline.
    """
    return [exhibit for family in study.tasks for exhibit in _exhibits(study, family, rows)]


def _exhibits(study: Study, family: str, rows: Sequence[ResultRow]) -> Iterator[Exhibit]:
    named = {each.label: each for each in study.baselines(family)}
    folders = {label: stores_of(each.name, each.parameters) for label, each in named.items()}
    reading = [label for label, found in folders.items() if found and not named[label].parameters.get("shuffled")]
    if not reading:
        return
    first, folder = named[reading[0]], next(iter(folders[reading[0]]))
    store, cases, data = FeatureStore.open(folder), study.cases(family), study.task_data(family).dataset
    alike = [
        row
        for row in rows
        if row.figures.task == family
        and row.figures.predictor in named
        and named[row.figures.predictor].name == first.name
    ]
    seen = store.seen_by("user")
    told = [place for place, case in enumerate(cases) if case.request.user_id in seen] or list(range(len(cases)))
    for n in drawn([cases[place].request.id for place in told], study.recipe.seed, EXHIBITS):
        place, request = told[n], cases[told[n]].request
        user, item = request.user_id, str(request.item or cases[told[n]].truth)
        pairs = sorted(each for _, each in seen.get(user, ()) if each in data.items)
        yield Exhibit(
            task=family,
            request_id=request.id,
            user=_user(data, user),
            item=_product(data, item),
            store=folder,
            read=tuple(clean(data.items[each].title) for each in pairs[:_READ]),
            events=len(pairs),
            profile=_cut(clean(store.texts("user", [user]).get(user, ""), _INPUT)),
            described=_cut(clean(store.texts("item", [item]).get(item, ""), _INPUT)),
            truth=f"{truth:g}" if isinstance(truth := cases[place].truth, float) else str(truth),
            answers={row.figures.id: _said(row.records[place], item) for row in alike},
        )


def _said(record: Prediction, item: str) -> str:
    """Return an answer in a few words: a number as it is, of a ranking the place of the item."""
    answer = json.loads(record.parsed)
    if isinstance(answer, list):
        return f"place {answer.index(item) + 1}" if item in answer else f"not among the first {len(answer)}"
    return f"{answer:.3f}" if isinstance(answer, float) else "could not be read" if answer is None else str(answer)


def drawn(requests: Sequence[str], seed: int, count: int = COUNT) -> list[int]:
    """Return the places of the requests to show, in the order of their seeded hash."""
    order = np.argsort(hash64("text sample", seed, requests), kind="stable")
    return [int(place) for place in order[:count]]


def _user(dataset: Dataset, user_id: str) -> User:
    """Say whose request it is, as questions write it."""
    return User(id=user_id, name=clean(dataset.users.get(user_id, {}).get("name", "")))


def _product(dataset: Dataset, item_id: str) -> Product:
    """Say what a request is about, as questions write it."""
    item = dataset.items[item_id]
    fields = {clean(name): _cut(clean(value)) for name, value in item.fields.items() if clean(value)}
    return Product(id=item_id, title=clean(item.title), fields=fields)


def _told(study: Study, family: str, request: Request, view: View) -> Iterator[Told]:
    """Yield the request's context, which baselines read too, and what else some template shows."""
    templates = study.eval_templates(family)
    for name, text in request.context.items():
        yield Told(name=name, text=_cut(clean(text, len(text))), by=_showing(templates, {name}))
    dataset = study.task_data(family).dataset
    profile = _pairs(dataset.users.get(request.user_id, {}))
    if profile and (by := _showing(templates, {"profile"})) and "profile" not in request.context:
        yield Told(name="profile", text=_cut(profile), by=by)
    if request.history and (by := _showing(templates, PAST)):
        titles = [clean(dataset.items[event.item_id].title) for event in request.history[-_TITLES:]]
        text = f"{len(request.history)}, the last of them: {'; '.join(titles)}"
        yield Told(name="earlier items", text=_cut(text), by=by)
    known = view.pair(request.user_id, str(request.item))
    for variable, name in _STATISTICS.items():
        by = _showing(templates, {variable})
        if by and (statistics := cast(Callable[[], Mapping[str, Any] | None], known[variable])()):
            yield Told(name=name, text=_counted(statistics), by=by)


def _showing(templates: Sequence[Template], names: frozenset[str] | set[str]) -> tuple[str, ...]:
    return tuple(template.id for template in templates if names & template.names("system", "user"))


def _counted(statistics: Mapping[str, Any]) -> str:
    mean = f", rated about {statistics['mean']} on average" if statistics["mean"] else ""
    return f"{statistics['count']} in training{mean}"


def _pairs(fields: Mapping[str, str]) -> str:
    """Write a user's fields as one line; the name stands elsewhere."""
    found = {clean(name): clean(value) for name, value in fields.items() if name != "name"}
    return "; ".join(f"{name}: {value}" for name, value in found.items() if value)


def _answer(record: Prediction) -> Written:
    """Return what was read, or why nothing was."""
    text = json.loads(record.parsed)
    if text is not None:
        return Written(text=str(text))
    return Written(text=None, error=record.error or "", raw=_cut(record.raw or "", _RAW))


def _cut(text: str, limit: int = _INPUT) -> str:
    """Return the beginning of a long text, and how long it is."""
    return text if len(text) <= limit else f"{cut(text, limit)} … ({len(text)} characters)"
