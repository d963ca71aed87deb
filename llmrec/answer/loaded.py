"""A model in three lines of Python: `llmrec.load` returns an object that ranks, rates and explains.

::

    rec = llmrec.load("runs/quickstart")
    rec.rank(history=["1", "50"], k=10)
    rec.rank(frame)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import pyarrow as pa

from llmrec.answer.checks import decided
from llmrec.answer.known import Catalogue, Known, Profile, known_of, profiles_of, read_known
from llmrec.answer.language_model import LanguageModel
from llmrec.answer.listing import Wanted, listing
from llmrec.answer.opening import Models, open_models
from llmrec.answer.options import RecommenderOptions
from llmrec.answer.prompting import value_of
from llmrec.answer.recommender import RANK, Answered, Question, check_verb, ranking_of
from llmrec.answer.rules import Rules
from llmrec.data.frames import as_arrow, like
from llmrec.data.read.limits import shown
from llmrec.data.requests import RankRequest, identity, read_request, some
from llmrec.display import Displayed, Summary, listed
from llmrec.errors import DataError, LlmrecError, did_you_mean
from llmrec.keywords import speaks_python
from llmrec.types import Item, Unparsed

log = logging.getLogger(__name__)

__all__ = ["Loaded", "Scored", "Wanted", "load"]

_KEYS = ("id", "user_id", "history", "candidates", "profile")
# The batch size for the requests of a frame.
_TOGETHER = 64


_P = ParamSpec("_P")
_T = TypeVar("_T")


def _named_in_python(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorate a function so that its errors name the options of `load` as keywords."""
    return speaks_python(function, [option.name for option in fields(RecommenderOptions)])


@dataclass(frozen=True, slots=True)
class Scored:
    """One item of a list.

    Attributes:
        item_id: The id in the catalogue, or the title of an item given by title.
        title: The title as the model read it.
        score: The score on the model's scale; higher is better.
    """

    item_id: str
    title: str
    score: float


@_named_in_python
def load(folder: str, *, models: Sequence[str] = (), **options: Any) -> Loaded:
    """Open a run, an exported folder or a model, to answer any number of questions.

    Weights are loaded at the first question that needs them. Use the result as a context manager, or close it.

    Args:
        folder: A run folder, an exported folder, a model folder or a hub name.
        models: The models that answer, the default first: ``tuned``, ``untuned``, a row of the run's report by its
            name, such as ``fusion with texts``, a baseline, or the folder of another run with the same base model and
            catalogue, whose tuned model has the name of the folder; by default the model itself, the ensembles of its
            run, and the classic recommenders of its recipe.
        options: Options of `llmrec.answer.options.RecommenderOptions`, by name: ``items``, ``backend``, ``dtype``, ...

    Raises:
        LlmrecError: If the model cannot be opened, or an option is unknown.
    """
    try:
        asked = RecommenderOptions(model=str(folder), **options)
    except TypeError as error:
        raise LlmrecError(f"llmrec.load: {error}", kind="unknown-key") from None
    asked = decided(asked)
    return Loaded(asked, open_models(asked, models))


class Loaded(Displayed):
    """Open models, returned by `load`. It is thread-safe; calls of a language model are serialised.

    Args:
        options: The options of the models.
        models: The open models.
        known: The known items and users; None: those of the folder of ``options``, read when needed.
    """

    def __init__(self, options: RecommenderOptions, models: Models, known: Known | None = None) -> None:
        self._options, self._models, self._given = options, models, known
        self._warned: set[str] = set()

    def _summary(self) -> Summary:
        facts = {
            "models": f"{listed(self.models)}; the first is the default",
            "catalogue": f"{len(self._models.items):,} items" if self._models.items else "unknown",
        }
        return Summary(f"Recommender {self._options.model!r}", facts)

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models, the default first."""
        return tuple(self._models.opened)

    @_named_in_python
    def rank(
        self,
        frame: Any = None,
        *,
        history: Sequence[Any] | None = None,
        user: str | None = None,
        candidates: Sequence[Any] | None = None,
        k: int = 10,
        model: str | None = None,
        strategy: str = "auto",
        exclude_seen: bool = True,
        rules: Mapping[str, object] | None = None,
        profile: str = "",
        id: str = "1",
    ) -> Any:
        """Rank candidates, or the whole catalogue, for one user, or for every row of a frame.

        Args:
            frame: Rows with some of the columns ``id``, ``user_id`` (or ``user``), ``history``, ``candidates`` and
                ``profile``: a pandas or polars frame, an Arrow table, or a list of dictionaries. None: one user.
            history: Items, oldest first: ids, or dictionaries with ``item_id``, ``title``, ``rating``, ``timestamp``.
            user: A user of the run's data, whose history is used if none is given.
            candidates: Items to rank, as in ``history``; None: the whole catalogue.
            k: The maximum number of items of a list.
            model: One of `models`.
            strategy: How a language model orders candidates.
            exclude_seen: Exclude seen items when the catalogue is ranked.
            rules: Business rules, in the format of docs/serving.md.
            profile: A text about the user.
            id: The id of the request, which determines the order of equal scores.

        The logger ``llmrec`` warns of unknown users and unknown items of histories, once each.

        Returns:
            A list of `Scored`, best first; for a frame, a frame of the same library with the columns ``id``,
            ``user_id``, ``rank``, ``item_id``, ``title``, ``score``, ``error`` and ``notes`` (such as unknown items of
            a history): one row per item, and one per failed request.

        Raises:
            LlmrecError: If a single question cannot be answered; for a frame, if it cannot be read, or no column has
                users, histories or candidates.
        """
        wanted = Wanted(k, model, strategy, exclude_seen, Rules.read(rules or {}))
        if frame is not None:
            if not (history is None and user is None and candidates is None and not profile):
                raise DataError("rank takes a frame, or one user's history; give one of them", kind="contradiction")
            return like(frame, self._frame(as_arrow(frame, "requests frame").to_pylist(), wanted))
        record = {"id": id, "user_id": user, "history": history, "candidates": candidates, "profile": profile}
        (answer,) = self.lists([self._request(record, 1)], wanted)
        if isinstance(answer, LlmrecError):
            raise answer
        self._warn(answer, user)
        return _scored(answer)

    @property
    def users(self) -> list[str]:
        """The users of the run's data, sorted."""
        users: list[str] = self.known.histories.users.to_list()
        return users

    @property
    def items(self) -> Mapping[str, Item]:
        """The catalogue, by id."""
        return self._models.items

    @property
    def data_name(self) -> str | None:
        """The name of the training data of classic recommenders; None without data."""
        return None if self._models.data is None else self._models.data.dataset.name

    @property
    def histories(self) -> str:
        """A hash of the histories of users, and of the texts or fields that prompts show."""
        return self.known.digest

    def signature(self, model: str | None = None) -> str:
        """Return a hash of everything that can change an answer, except the question."""
        return self._models.get(model).signature

    def read(self, record: Mapping[str, object], row: int, *, whole: bool) -> RankRequest:
        """Read a request, with the stored data of its user; ``whole``: the whole catalogue is ranked.

        Raises:
            DataError: If the request cannot be ranked.
        """
        items = self._models.items or None
        return read_known(
            record, row, lambda user: self.known.histories.of_user(user), items, self._profiles, whole=whole
        )

    def lists(
        self, requests: Sequence[RankRequest], wanted: Wanted, *, rationale: int = 0
    ) -> list[Answered | LlmrecError]:
        """Return a list or an error for every request; requests with the same question are answered in one batch.

        Args:
            requests: The requests.
            wanted: The specification of the lists.
            rationale: The number of first items with a rationale.
        """
        check_verb(self._models.get(wanted.model), RANK)
        lists: dict[int, Answered | LlmrecError] = {}
        steps = {n: listing(request, wanted, self._catalogue) for n, request in enumerate(requests)}
        asked: dict[int, tuple[Question, RankRequest]] = {}

        def go_on(n: int, answer: Answered | None) -> None:
            try:
                asked[n] = next(steps[n]) if answer is None else steps[n].send(answer)
                return
            except StopIteration as done:
                lists[n] = self._with_reasons(done.value, *asked[n], rationale) if rationale else done.value
            except LlmrecError as error:
                lists[n] = error
            asked.pop(n, None)

        for n in steps:
            go_on(n, None)
        while asked:
            question = next(iter(asked.values()))[0]
            group = {n: request for n, (own, request) in asked.items() if own == question}
            answers = self._models.answer(question, list(group.values()))
            for n, answer in zip(group, answers, strict=True):
                go_on(n, answer)
        return [lists[n] for n in range(len(requests))]

    @_named_in_python
    def similar(self, items: Sequence[str], *, k: int = 10, by: str = "interactions") -> list[Scored]:
        """Return items that are co-chosen with others (``interactions``), or have similar texts (``text``).

        Raises:
            LlmrecError: If ``items`` is not a list of known ids, or ``k`` not an integer of at least 1.
        """
        if isinstance(items, str):
            raise DataError(f"items: {items!r} is one text; give a list of ids, such as [{items!r}]", kind="bad-value")
        Wanted(k)
        for item in items:
            self._catalogue.get(item)
        request = read_request({"history": list(items)}, 1, self._models.items, whole=True)
        return _scored(self._models.similar(by).answer([request], Question(depth=k))[0])

    @_named_in_python
    def rate(self, item: Any, **who: Any) -> float:
        """Predict a rating; ``who`` as in `rank`: ``history``, ``user``, ``model``, ``profile``."""
        return float(self._about("rating", item, **who))

    @_named_in_python
    def predict(self, item: Any, **who: Any) -> float:
        """Predict the probability that a user likes or chooses an item; ``who`` as in `rank`."""
        return float(self._about("ctr", item, **who))

    @_named_in_python
    def explain(self, item: Any, **who: Any) -> str:
        """Explain why an item suits a user; ``who`` as in `rank`.

        A language model writes a sentence; of an ensemble these are the largest contributions to the item's score.
        """
        return str(self._about("explanation", item, **who))

    def close(self) -> None:
        """Stop the engines."""
        self._models.close()

    def __enter__(self) -> Loaded:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------- internals

    @cached_property
    def known(self) -> Known:
        """The catalogue and the histories of users."""
        return self._given or known_of(self._options.model, self._options.items)

    @cached_property
    def _profiles(self) -> Callable[[str], Profile] | None:
        return None if self._given is not None else profiles_of(self._options.model)

    @cached_property
    def _catalogue(self) -> Catalogue:
        return Catalogue(self._models.items)

    def _request(self, record: Mapping[str, Any], row: int) -> RankRequest:
        known = {key: value for key, value in record.items() if value is not None}
        return self.read(known, row, whole="candidates" not in known)

    def _frame(self, rows: Sequence[Mapping[str, Any]], wanted: Wanted) -> pa.Table:
        columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
        rows = _read(rows)

        def add(row: Mapping[str, Any], number: int, notes: Sequence[str], **rest: Any) -> None:
            named, user = identity(row, number)
            cells = {"id": named or str(number), "user_id": user, "notes": "; ".join(notes) or None, **rest}
            for name, values in columns.items():
                values.append(cells.get(name))

        for start in range(0, len(rows), _TOGETHER):
            part = list(enumerate(rows[start : start + _TOGETHER], start=start + 1))
            requests: dict[int, RankRequest] = {}
            answers: dict[int, Answered | LlmrecError] = {}
            for number, row in part:
                try:
                    requests[number] = self._request(row, number)
                except LlmrecError as error:
                    answers[number] = error
            answers.update(zip(requests, self.lists(list(requests.values()), wanted), strict=True))
            for number, row in part:
                answer = answers[number]
                if isinstance(answer, LlmrecError):
                    add(row, number, requests[number].notes if number in requests else (), error=str(answer))
                    continue
                for rank, item in enumerate(_scored(answer), start=1):
                    add(row, number, answer.notes, rank=rank, item_id=item.item_id, title=item.title, score=item.score)
        return pa.table(columns, schema=_SCHEMA)

    def _with_reasons(self, answer: Answered, question: Question, request: RankRequest, first: int) -> Answered:
        (reasons,) = self._models.reasons(question, [request], [answer], first)
        return replace(answer, reasons=reasons, notes=(*answer.notes, *reasons.notes))

    def _about(self, family: str, item: Any, *, model: str | None = None, **who: Any) -> float | str:
        question = Question(model=model, verb=family)
        self._models.asked(question)
        record = {"history": who.pop("history", None), "user_id": who.pop("user", None)}
        record["profile"] = who.pop("profile", None)
        if who:
            raise DataError(f"unknown: {', '.join(who)}; give history, user, profile or model", kind="unknown-key")
        request = self._request({**record, "candidates": [item]}, 1)
        self._warn(request, request.user_id)
        answer = self._models.answer(question, [request])[0].answer
        value = value_of(answer)
        if value is None:
            reason = answer.reason if isinstance(answer, Unparsed) else "there is no answer"
            raise DataError(f"{family}: {reason}", kind="failed")
        return value

    def _warn(self, asked: Answered | RankRequest, user: object) -> None:
        """Log the unknown user and items of a question, once each."""
        messages = []
        if asked.unknown_user:
            messages.append(f"the user {shown(str(user))} is not known")
        if asked.unknown_items:
            messages.append(f"items of a history are unknown and left out: {some(asked.unknown_items)}")
        cold = isinstance(asked, Answered) and asked.cold
        for text in messages:
            if text not in self._warned:
                self._warned.add(text)
                log.warning("%s%s", text, "; the most popular items are listed" if cold else "")

    @_named_in_python
    def prompt(self, *, verb: str = RANK, model: str | None = None, **who: Any) -> str:
        """Return the prompt of a question to rank, or of a family (``verb``) with an ``item``."""
        reader = self._models.get(model)
        if not isinstance(reader, LanguageModel):
            raise DataError(f"{reader.name} is no language model, and reads no prompt", kind="unsupported")
        record = {key: who.get({"user_id": "user"}.get(key, key)) for key in _KEYS}
        if "item" in who:
            record["candidates"] = [who["item"]]
        return reader.prompt(self._request(record, 1), Question(verb=verb))


_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("user_id", pa.string()),
        ("rank", pa.int64()),
        ("item_id", pa.string()),
        ("title", pa.string()),
        ("score", pa.float64()),
        ("error", pa.string()),
        ("notes", pa.string()),
    ]
)


def _read(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return the rows of a frame, with the column ``user`` renamed to ``user_id``."""
    names = list(rows[0]) if rows else []
    if "user" in names and "user_id" not in names:
        rows = [{("user_id" if key == "user" else key): value for key, value in row.items()} for row in rows]
        names = list(rows[0])
    if rows and not set(names) & set(_KEYS[1:]):
        close = next((f"; rename {name!r}{hint}" for name in names if (hint := did_you_mean(name, _KEYS))), "")
        raise DataError(
            f"requests frame: none of its columns {names} says what is asked; give user_id, history, candidates or "
            f"profile{close}",
            kind="missing-column",
            column="user_id",
        )
    return rows


def _scored(answer: Answered) -> list[Scored]:
    ranking = ranking_of(answer)
    return [Scored(*item) for item in zip(ranking.items, answer.titles, ranking.scores, strict=True)]
