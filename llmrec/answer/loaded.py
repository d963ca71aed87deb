"""`llmrec.fit` and `llmrec.load` return a recommender in Python, which ranks, rates, explains and evaluates.

::

    rec = llmrec.load("runs/quickstart")
    rec.recommend(["u1", "u2"], k=10)
    rec.rank(["50", "172"], history=["1", "50"])
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa

from llmrec.answer.checks import with_resolved_engine
from llmrec.answer.known import (
    Catalogue,
    KnownEntities,
    Profile,
    parse_request_with_history,
    profile_lookup,
    read_known_entities,
)
from llmrec.answer.language_model import LanguageModel
from llmrec.answer.listing import ListSpec, recommendation_steps
from llmrec.answer.opening import Models, open_models, reserved_fraction
from llmrec.answer.options import RecommenderOptions
from llmrec.answer.prompting import answer_value
from llmrec.answer.recommender import RANK, AnnotatedAnswer, Closeable, Question, check_verb, require_ranking
from llmrec.answer.rules import Rules
from llmrec.answer.saving import (
    check_other_files,
    draft_folder,
    interactions_with_parts,
    link_model_files,
    publish_folder,
    write_model_data,
)
from llmrec.data.frames import as_arrow, convert_like
from llmrec.data.lists import EntityColumns, read_lists, read_truth
from llmrec.data.ranked import LIST_SCHEMA
from llmrec.data.read.limits import format_value
from llmrec.data.requests import RankRequest, format_few_names, parse_request, request_identity
from llmrec.display import Displayed, Summary, format_name_list
from llmrec.durable import write_text
from llmrec.ensembles import stored
from llmrec.errors import DataError, LlmrecError, did_you_mean
from llmrec.evaluate.scoring import Scores, list_evaluation_settings, score_lists
from llmrec.keywords import with_keywords_in_errors
from llmrec.pipeline import bundle as bundles
from llmrec.progress import Progress
from llmrec.recipe.load import STORED_RECIPE_FILE, dump_recipe, load_stored_recipe
from llmrec.recipe.schema import Recipe
from llmrec.recipe.shared import RESAMPLES
from llmrec.results import Choice
from llmrec.types import Item, Unparsed

log = logging.getLogger(__name__)

__all__ = ["ListSpec", "Loaded", "Ranked", "Scored", "load"]

_REQUEST_KEYS = ("id", "user_id", "history", "candidates", "profile")
# Number of requests per batch for a data frame.
_BATCH_SIZE = 64


_P = ParamSpec("_P")
_T = TypeVar("_T")


def _with_keyword_errors(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorate a function so that its errors name the keywords of `load` instead of command options."""
    return with_keywords_in_errors(function, [option.name for option in fields(RecommenderOptions)])


@dataclass(frozen=True, slots=True)
class Scored:
    """An item of a recommendation list with its score.

    Attributes:
        item_id: The id in the catalogue, or the title of an item given by title.
        title: The title as the model read it.
        score: The score on the model's scale; higher is better.
    """

    item_id: str
    title: str
    score: float


class Ranked(Displayed, list[Scored]):
    """A recommendation list, best items first."""

    def _summary(self) -> Summary:
        rows = [(str(rank), item.item_id, item.title, f"{item.score:.4g}") for rank, item in enumerate(self, start=1)]
        return Summary(f"{len(self)} items", header=("rank", "item_id", "title", "score"), rows=rows)


@_with_keyword_errors
def load(folder: str | Path, *, models: Sequence[str] = (), frame: Any = None, **options: Any) -> Loaded:
    """Open a run, an exported folder or a model.

    Weights are loaded at the first question that needs them. Use the result as a context manager, or close it.

    Args:
        folder: A run folder, an exported folder, a model folder or a hub name.
        models: The models to open, the default first: ``tuned``, ``untuned``, a model of the run's report, such as
            ``fusion with texts``, a baseline, or the folder of another run with the same base model and catalogue,
            whose fine-tuned model gets the name of the folder. Default: the model itself, the ensembles of its run,
            and the baselines of its recipe.
        frame: A frame of the library for the tables of `Loaded.recommend`; None: polars.
        options: Options of `llmrec.answer.options.RecommenderOptions`, by name: ``items``, ``backend``, ``dtype``, ...

    Raises:
        LlmrecError: If the model cannot be opened, or an option is unknown.
    """
    try:
        chosen = RecommenderOptions(model=str(folder), **options)
    except TypeError as error:
        raise LlmrecError(f"llmrec.load: {error}", kind="unknown-key") from None
    chosen = with_resolved_engine(chosen)
    return Loaded(chosen, open_models(chosen, models), frame=frame)


class Loaded(Displayed, Closeable):
    """A recommender: open models over one catalogue, returned by `llmrec.fit` and `llmrec.load`.

    It is thread-safe; calls of a language model are serialised.

    Args:
        options: The options of the models.
        models: The open models.
        known: The items and users; None: those of the folder of ``options``, read when needed.
        recipe: For a recommender without a folder: its recipe, and the choice of its model, which is None for a class
            that cannot be imported.
        frame: A frame of the library for tables of results; None: polars.
    """

    def __init__(
        self,
        options: RecommenderOptions,
        models: Models,
        known: KnownEntities | None = None,
        *,
        recipe: tuple[Recipe, Choice | None] | None = None,
        frame: Any = None,
    ) -> None:
        self._options, self._models, self._given, self._recipe = options, models, known, recipe
        self._frame = pl.DataFrame() if frame is None else frame
        self._warned: set[str] = set()

    def _summary(self) -> Summary:
        facts = {
            "models": f"{format_name_list(self.models)}; the first is the default",
            "catalogue": f"{len(self._models.items):,} items" if self._models.items else "unknown",
        }
        return Summary(f"Recommender {self._options.model!r}", facts)

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models, the default model first."""
        return tuple(self._models.opened)

    @_with_keyword_errors
    def recommend(
        self,
        users: Any = None,
        k: int = 10,
        *,
        where: Mapping[str, object] | None = None,
        exclude_seen: bool = True,
        model: str | None = None,
        strategy: str = "auto",
    ) -> Any:
        """Return the best items of the catalogue for users or histories, as a table.

        Args:
            users: One of: ids of users, as a list, a series or an array; one id; histories, as a list of lists of
                items; a frame of requests, one per row, with some of the columns ``id``, ``user_id`` (or ``user``),
                ``history``, ``candidates`` and ``profile``. None: all users of the data.
            k: The maximum number of items per list.
            where: Business rules, in the format of docs/serving.md, such as ``{"only": {"genre": ["Comedy"]}}``.
            exclude_seen: Exclude seen items.
            model: One of `models`.
            strategy: How a language model orders candidates.

        Returns:
            A table with one row per item, and the columns ``user_id`` (for histories ``id``, their position from 0),
            ``rank``, ``item_id``, ``title`` and ``score``. For a frame of requests also ``id``, ``error`` and
            ``notes`` (such as unknown items of a history), with one row for each failed request. The table uses the
            library of ``users``; for a list, that of the interactions of `llmrec.fit`, or polars.

        Raises:
            LlmrecError: If a request cannot be answered, or ids and histories are mixed; for a frame, if it cannot be
                read, or no column has users, histories or candidates.
        """
        spec = ListSpec(k, model, strategy, exclude_seen, Rules.read(where or {}))
        if (sequence := _as_list(self.users if users is None else users)) is None:
            return convert_like(users, self._table(as_arrow(users, "requests frame").to_pylist(), spec))
        are_ids = {isinstance(entry, str | int | float | None) for entry in sequence}
        if len(are_ids) > 1:
            raise DataError(
                "users: ids and histories are mixed; pass only ids, or only histories", kind="bad-value", column="users"
            )
        histories = are_ids == {False}
        if not histories:
            self._warn_of_unknown_users(sequence)
        rows = [
            {"id": str(n), "history": list(entry)} if histories else {"id": str(entry), "user_id": entry}
            for n, entry in enumerate(sequence)
        ]
        with Progress("recommending", len(rows), unit="lists", passing=True) as bar:
            table = self._table(rows, spec, bar) if rows else _LISTS_SCHEMA.empty_table()
        return convert_like(
            self._like(users), table.select(["id" if histories else "user_id", *_LISTS_SCHEMA.names[2:6]])
        )

    @_with_keyword_errors
    def rank(
        self,
        candidates: Sequence[Any] | None = None,
        *,
        history: Sequence[Any] | None = None,
        user: str | None = None,
        k: int = 10,
        model: str | None = None,
        strategy: str = "auto",
        exclude_seen: bool = True,
        where: Mapping[str, object] | None = None,
        profile: str = "",
        id: str = "1",
    ) -> Ranked:
        """Rank candidates, or the whole catalogue, for one user.

        Args:
            candidates: Items to rank, as in ``history``; None: the whole catalogue.
            history: Items, oldest first: ids, or dictionaries with ``item_id``, ``title``, ``rating``, ``timestamp``.
            user: A user of the data, whose history is used if none is given.
            k: The maximum number of items of the list.
            model: One of `models`.
            strategy: How a language model orders candidates.
            exclude_seen: Exclude seen items when the catalogue is ranked.
            where: Business rules; see `recommend`.
            profile: A text about the user.
            id: The id of the request, which determines the order of equal scores.

        The logger ``llmrec`` warns of unknown users and unknown items of histories, once each.

        Raises:
            LlmrecError: If the question cannot be answered.
        """
        spec = ListSpec(k, model, strategy, exclude_seen, Rules.read(where or {}))
        record = {"id": id, "user_id": user, "history": history, "candidates": candidates, "profile": profile}
        (answer,) = self.lists([self._request(record, 1)], spec)
        if isinstance(answer, LlmrecError):
            raise answer
        self._warn_once(answer, user)
        return _ranked_list(answer)

    @_with_keyword_errors
    def evaluate(
        self,
        test: Any,
        *,
        against: Loaded | None = None,
        k: int | Sequence[int] = 10,
        model: str | None = None,
        exclude_seen: bool = True,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> Scores:
        """Evaluate recommendations against the test interactions, with 95 % confidence intervals.

        Args:
            test: A frame or the path of a table: one row per relevant item, with the columns of the interactions of
                `llmrec.fit`, or usual names such as ``user_id`` and ``item_id``.
            against: Another recommender to compare with, paired by user. The difference in NDCG at the largest cutoff
                is tested.
            k: One or more cutoffs of the metrics.
            model: One of `models`; ``against`` answers with its default.
            exclude_seen: Exclude the items of a user's history from the lists. Such items in ``test`` are then
                never hits.
            resamples: Number of bootstrap resamples over users.
            seed: Seed of the resamples.

        Raises:
            LlmrecError: If ``test`` cannot be read, or a list cannot be computed.
        """
        cuts = (k,) if isinstance(k, int) else tuple(k)
        how = list_evaluation_settings(
            cuts, resamples, seed, whole=False, planned=f"NDCG@{max(cuts, default=0)}" if against else None
        )
        truth = read_truth(test, self._columns, by_user=True)
        users = truth.frame["key"].unique().sort().to_list()
        if exclude_seen:
            self._warn_of_seen_items(truth.frame)
        lists = []
        for rec, name in ((self, model), *(((against, None),) if against else ())):
            table = rec.recommend(pa.array(users), max(cuts), exclude_seen=exclude_seen, model=name)
            lists.append(replace(read_lists(table), name=name or rec.models[0]))
        if len({entry.name for entry in lists}) < len(lists):
            lists = [replace(entry, name=f"{letter}: {entry.name}") for letter, entry in zip("AB", lists, strict=True)]
        return score_lists(lists, replace(truth, name="test interactions"), how)

    @_with_keyword_errors
    def save(self, folder: str | Path) -> Path:
        """Write the recommender to a folder that `llmrec.load` and ``llmrec serve`` open, and return its path.

        The folder contains the interactions, the catalogue, and weights of a language model. Baselines are
        fitted again when the folder is opened, or restored from the cache of fits. `llmrec.export` writes a language
        model without user data.

        Args:
            folder: A new folder, or one written by `save`, which is replaced.

        Raises:
            LlmrecError: If the folder contains other files.
        """
        out = Path(folder).expanduser()
        check_other_files(out, "folder")
        with draft_folder(out) as draft:
            reserved, measured = 0.0, stored.StoredEnsembles()
            if self._recipe is not None:
                recipe, choice = self._recipe
                if choice is None:
                    raise DataError(
                        f"the class of {self.models[0]} is in __main__, which cannot be imported; move it to a module",
                        kind="unsupported",
                    )
                write_text(draft / STORED_RECIPE_FILE, dump_recipe(recipe))
                measured = replace(measured, choice=choice)
            else:
                bundle = bundles.read(self._options.model)
                reserved, measured = (
                    reserved_fraction(bundle),
                    stored.without_reserved_users(stored.read_ensembles(bundle.source_folder)),
                )
                if bundle.weights:
                    link_model_files(Path(bundle.folder), draft)
                else:
                    shutil.copyfile(bundle.source_folder / STORED_RECIPE_FILE, draft / STORED_RECIPE_FILE)
            data = self._models.data
            rows = None if data is None else interactions_with_parts(data, reserved)
            write_model_data(draft, self._options.model, self._models.items, rows, measured)
            publish_folder(draft, out)
        return out

    @property
    def users(self) -> list[str]:
        """All users of the run's data, sorted."""
        users: list[str] = self.known.histories.users.to_list()
        return users

    @property
    def items(self) -> Mapping[str, Item]:
        """Items by id."""
        return self._models.items

    @property
    def data_name(self) -> str | None:
        """Name of the data on which baselines are trained; None without data."""
        return None if self._models.data is None else self._models.data.dataset.name

    @property
    def histories(self) -> str:
        """Hash of the users' histories and of the texts or fields that prompts show."""
        return self.known.digest

    def signature(self, model: str | None = None) -> str:
        """Return a hash of everything that can change an answer, except the request."""
        return self._models.get(model).signature

    def read(self, record: Mapping[str, object], row: int, *, whole: bool) -> RankRequest:
        """Parse a request and add the stored data of its user; ``whole`` means that the whole catalogue is ranked.

        Raises:
            DataError: If the request cannot be ranked.
        """
        items = self._models.items or None
        return parse_request_with_history(
            record, row, lambda user: self.known.histories.of_user(user), items, self._profiles, whole=whole
        )

    def lists(
        self, requests: Sequence[RankRequest], spec: ListSpec, *, rationale: int = 0
    ) -> list[AnnotatedAnswer | LlmrecError]:
        """Return a list or an error for every request; requests with the same settings are answered in one batch.

        Args:
            requests: The requests.
            spec: The specification of the lists.
            rationale: The number of first items with a rationale.
        """
        check_verb(self._models.get(spec.model), RANK)
        lists: dict[int, AnnotatedAnswer | LlmrecError] = {}
        steps = {n: recommendation_steps(request, spec, self._catalogue) for n, request in enumerate(requests)}
        pending: dict[int, tuple[Question, RankRequest]] = {}

        def advance(n: int, answer: AnnotatedAnswer | None) -> None:
            try:
                pending[n] = next(steps[n]) if answer is None else steps[n].send(answer)
                return
            except StopIteration as done:
                lists[n] = self._with_rationales(done.value, *pending[n], rationale) if rationale else done.value
            except LlmrecError as error:
                lists[n] = error
            pending.pop(n, None)

        for n in steps:
            advance(n, None)
        while pending:
            question = next(iter(pending.values()))[0]
            group = {n: request for n, (other, request) in pending.items() if other == question}
            answers = self._models.answer(question, list(group.values()))
            for n, answer in zip(group, answers, strict=True):
                advance(n, answer)
        return [lists[n] for n in range(len(requests))]

    @_with_keyword_errors
    def similar(self, items: Sequence[str], *, k: int = 10, by: str = "interactions") -> Ranked:
        """Return items that often occur in the same histories (``interactions``), or have similar texts (``text``).

        Raises:
            LlmrecError: If ``items`` is not a list of known ids, or ``k`` not an integer of at least 1.
        """
        if isinstance(items, str):
            raise DataError(f"items: {items!r} is a string; give a list of ids, such as [{items!r}]", kind="bad-value")
        ListSpec(k)
        known = [self._catalogue.get(str(item)).item_id for item in items]
        request = parse_request({"history": known}, 1, self._models.items, whole=True)
        return _ranked_list(self._models.similar(by).answer([request], Question(depth=k))[0])

    @_with_keyword_errors
    def rate(self, item: Any, **who: Any) -> float:
        """Predict a user's rating of an item; the user is given as in `rank`."""
        return float(self._about("rating", item, **who))

    @_with_keyword_errors
    def predict(self, item: Any, **who: Any) -> float:
        """Predict the probability that a user likes or chooses an item; the user is given as in `rank`."""
        return float(self._about("ctr", item, **who))

    @_with_keyword_errors
    def explain(self, item: Any, **who: Any) -> str:
        """Explain why an item suits a user; ``who`` as in `rank`.

        A language model writes a sentence; an ensemble lists the largest contributions to the item's score.
        """
        return str(self._about("explanation", item, **who))

    def close(self) -> None:
        """Stop the engines."""
        self._models.close()

    # ------------------------------------------------------------------- internals

    @cached_property
    def known(self) -> KnownEntities:
        """The catalogue and the histories of users."""
        return self._given or read_known_entities(self._options.model, self._options.items)

    @cached_property
    def _profiles(self) -> Callable[[str], Profile] | None:
        return None if self._given is not None else profile_lookup(self._options.model, lambda: self.known.users)

    @cached_property
    def _columns(self) -> EntityColumns:
        """Column names of users and items in the data."""
        if self._recipe is not None:
            recipe = self._recipe[0]
        else:
            folder = Path(self._options.model).expanduser()
            if not (folder / STORED_RECIPE_FILE).is_file():
                return EntityColumns()
            recipe = load_stored_recipe(folder)
        return EntityColumns(recipe.data.columns.user, recipe.data.columns.item)

    def _like(self, users: Any) -> Any:
        """Return a series or array of users as a data frame of the same library."""
        if isinstance(users, pa.Array | pa.ChunkedArray):
            return _LISTS_SCHEMA.empty_table()
        return users if type(users).__module__.partition(".")[0] in ("pandas", "polars") else self._frame

    @cached_property
    def _catalogue(self) -> Catalogue:
        return Catalogue(self._models.items)

    def _request(self, record: Mapping[str, Any], row: int) -> RankRequest:
        known = {key: value for key, value in record.items() if value is not None}
        return self.read(known, row, whole="candidates" not in known)

    def _table(self, rows: Sequence[Mapping[str, Any]], spec: ListSpec, bar: Progress | None = None) -> pa.Table:
        """Rank requests and return a table with one row per item or failed request."""
        columns: dict[str, list[Any]] = {name: [] for name in _LISTS_SCHEMA.names}
        rows = _normalise_request_rows(rows)

        def add(row: Mapping[str, Any], number: int, notes: Sequence[str], **rest: Any) -> None:
            named, user = request_identity(row, number)
            cells = {"id": named or str(number), "user_id": user, "notes": "; ".join(notes) or None, **rest}
            for name, values in columns.items():
                values.append(cells.get(name))

        for start in range(0, len(rows), _BATCH_SIZE):
            part = list(enumerate(rows[start : start + _BATCH_SIZE], start=start + 1))
            requests: dict[int, RankRequest] = {}
            answers: dict[int, AnnotatedAnswer | LlmrecError] = {}
            for number, row in part:
                try:
                    requests[number] = self._request(row, number)
                except LlmrecError as error:
                    answers[number] = error
            answers.update(zip(requests, self.lists(list(requests.values()), spec), strict=True))
            for number, row in part:
                answer = answers[number]
                if isinstance(answer, LlmrecError):
                    if bar is not None:
                        raise answer
                    add(row, number, requests[number].notes if number in requests else (), error=str(answer))
                    continue
                for rank, item in enumerate(_ranked_list(answer), start=1):
                    add(row, number, answer.notes, rank=rank, item_id=item.item_id, title=item.title, score=item.score)
            if bar is not None:
                bar.advance(len(part))
        return pa.table(columns, schema=_LISTS_SCHEMA)

    def _warn_of_unknown_users(self, users: Sequence[object]) -> None:
        names = pl.Series([request_identity({"user_id": user}, 1)[1] for user in users], dtype=pl.String)
        unknown = names.filter(~names.is_in(self.known.histories.users.implode())).drop_nulls()
        if len(unknown):
            log.warning("users without data, who get the most popular items: %s", format_few_names(unknown.to_list()))

    def _warn_of_seen_items(self, relevant: pl.DataFrame) -> None:
        by_user = relevant.group_by("key", maintain_order=True).agg("item").iter_rows()
        past = self.known.histories.of_user
        seen = sum(len({event.item_id for event in past(user)}.intersection(items)) for user, items in by_user)
        if seen:
            log.warning(
                "%s of %s relevant items are in the histories of their users, so no list contains them; fit without "
                "these interactions, or pass exclude_seen=False",
                f"{seen:,}",
                f"{relevant.height:,}",
            )

    def _with_rationales(
        self, answer: AnnotatedAnswer, question: Question, request: RankRequest, first: int
    ) -> AnnotatedAnswer:
        (reasons,) = self._models.reasons(question, [request], [answer], first)
        return replace(answer, reasons=reasons, notes=(*answer.notes, *reasons.notes))

    def _about(self, family: str, item: Any, *, model: str | None = None, **who: Any) -> float | str:
        question = Question(model=model, verb=family)
        self._models.model_for(question)
        record = {"history": who.pop("history", None), "user_id": who.pop("user", None)}
        record["profile"] = who.pop("profile", None)
        if who:
            raise DataError(
                f"unknown argument: {', '.join(who)}; use history, user, profile or model", kind="unknown-key"
            )
        request = self._request({**record, "candidates": [item]}, 1)
        self._warn_once(request, request.user_id)
        answer = self._models.answer(question, [request])[0].answer
        value = answer_value(answer)
        if value is None:
            reason = answer.reason if isinstance(answer, Unparsed) else "there is no answer"
            raise DataError(f"{family}: {reason}", kind="failed")
        return value

    def _warn_once(self, entry: AnnotatedAnswer | RankRequest, user: object) -> None:
        """Warn once about each unknown user and item in a request."""
        messages = []
        if entry.unknown_user:
            messages.append(f"unknown user {format_value(str(user))}")
        if entry.unknown_items:
            messages.append(f"unknown items of a history, ignored: {format_few_names(entry.unknown_items)}")
        cold = isinstance(entry, AnnotatedAnswer) and entry.cold
        for text in messages:
            if text not in self._warned:
                self._warned.add(text)
                log.warning("%s%s", text, "; the most popular items are listed" if cold else "")

    @_with_keyword_errors
    def prompt(self, *, verb: str = RANK, model: str | None = None, **who: Any) -> str:
        """Return the prompt for a ranking or, with ``verb``, for another task about an ``item``."""
        reader = self._models.get(model)
        if not isinstance(reader, LanguageModel):
            raise DataError(f"{reader.name} is not a language model, so it has no prompt", kind="unsupported")
        record = {key: who.get({"user_id": "user"}.get(key, key)) for key in _REQUEST_KEYS}
        if "item" in who:
            record["candidates"] = [who["item"]]
        return reader.prompt(self._request(record, 1), Question(verb=verb))


_LISTS_SCHEMA = pa.schema([("id", pa.string()), *LIST_SCHEMA, ("notes", pa.string())])


def _normalise_request_rows(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return the rows of a data frame, with the column ``user`` renamed to ``user_id``."""
    names = list(rows[0]) if rows else []
    if "user" in names and "user_id" not in names:
        rows = [{("user_id" if key == "user" else key): value for key, value in row.items()} for row in rows]
        names = list(rows[0])
    if rows and not set(names) & set(_REQUEST_KEYS[1:]):
        close = next((f"; rename {name!r}{hint}" for name in names if (hint := did_you_mean(name, _REQUEST_KEYS))), "")
        raise DataError(
            f"data frame of requests: unknown columns {names}; use user_id, history, candidates or profile{close}",
            kind="missing-column",
            column="user_id",
        )
    return rows


def _ranked_list(answer: AnnotatedAnswer) -> Ranked:
    ranking = require_ranking(answer)
    return Ranked(Scored(*item) for item in zip(ranking.items, answer.titles, ranking.scores, strict=True))


def _as_list(value: Any) -> list[Any] | None:
    """Return ids or histories as a list; None for a data frame."""
    if isinstance(value, str | int):
        return [value]
    if isinstance(value, list | tuple | set | frozenset | range):
        rows = bool(value) and isinstance(next(iter(value)), Mapping)
        # convert NumPy scalars to Python
        return None if rows else [entry.item() if isinstance(entry, np.generic) else entry for entry in value]
    framed = isinstance(value, pa.Table | pa.RecordBatch) or hasattr(value, "columns") or hasattr(value, "features")
    listing = next((name for name in ("to_list", "to_pylist", "tolist") if hasattr(value, name)), None)
    return None if framed or listing is None else list(getattr(value, listing)())
