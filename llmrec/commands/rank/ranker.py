"""What ranks a file of requests: a language model, or a classic recommender over the data of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from llmrec.answering.known import known_in, with_history
from llmrec.answering.loaded import Loaded, Wanted
from llmrec.answering.opening import Models, open_classics, open_models
from llmrec.answering.options import RecommenderOptions
from llmrec.answering.recommender import Answered, Recommender
from llmrec.commands.rank.options import RankOptions
from llmrec.data.requests import RankRequest, identity, read_request
from llmrec.errors import DataError, LlmrecError, RecipeError
from llmrec.experiment.engines import dtype_name
from llmrec.experiment.fusion.parts import FUSIONS
from llmrec.experiment.resume import Budget
from llmrec.recipe.load import load_recipe
from llmrec.types import Item, Unparsed

# What a classic recommender is told too; the other options say how a language model is asked.
_SHARED = ("items", "candidates", "settings", "top", "batch")
_PAGE = "recipe.yaml"


class Ranker(AbstractContextManager["Ranker"], Protocol):
    """Answers requests, whatever it is; `llmrec.answering.recommender.Recommender` says what its members are."""

    budget: Budget

    @property
    def items(self) -> Mapping[str, Item] | None:
        """What requests may name by id."""
        ...

    @property
    def identity(self) -> Mapping[str, object]:
        """Everything besides the requests that can change an answer, by name."""
        ...

    def read(self, record: Mapping[str, object], row: int = 1) -> RankRequest | Unparsed:
        """Read one request; what is wrong with it is a failure of its own."""
        ...

    def untitled(self, record: Mapping[str, object]) -> str:
        """Return what is wrong with a request that names an item by id where no item is known."""
        ...

    def answer(
        self,
        requests: Sequence[RankRequest | Unparsed],
        *,
        advance: Callable[[int], None] = lambda done: None,
        part: int | None = None,
    ) -> list[Answered]:
        """Answer every request, in order; see `Recommender.answer`."""
        ...


def open_ranker(options: RankOptions, *, store: Path | None, budget: Budget) -> Ranker:
    """Open what is to rank.

    Args:
        options: They name a model or a baseline.
        store: A database of answers of a language model; None: none are kept.
        budget: Where seconds are booked.

    Raises:
        LlmrecError: If an option, a file or the model cannot be used.
    """
    if options.baseline is None:
        check_named(options)
        return Recommender.open(options, store=store, budget=budget)
    return ClassicRanker(options, open_classic(options), budget)


def told_of(ranker: Ranker) -> Mapping[str, object]:
    """Return what a summary says of what ranked, and how it was asked."""
    if isinstance(ranker, ClassicRanker):
        return ranker.told
    assert isinstance(ranker, Recommender)
    way, options = ranker.way, ranker.options
    return {
        "model": options.model,
        "task": way.family,
        "template": way.template,
        "strategy": way.strategy,
        "options": way.options,
        "engine": ranker.engine,
        "server": options.server_model if ranker.engine == "openai" else None,
        "dtype": dtype_name(ranker.bundle.model),
        "window": ranker.encoder.max_length,
        "history": ranker.bundle.tasks.present()[way.family].history,
        "retriever": ranker.retriever.identity if ranker.retriever else None,
        "rationales": ranker.reasoner is not None,
    }


def check_named(options: RankOptions) -> None:
    """Refuse options that name no model, or a recipe beside one.

    Raises:
        RecipeError: If they do.
    """
    if options.recipe is not None:
        way = "and --model names the run itself; drop one of them" if options.model else "so name that too"
        raise RecipeError(
            f"--recipe belongs to --baseline NAME, {way}",
            kind="contradiction",
            column="--recipe",
        )
    if not options.model:
        raise RecipeError(
            "nothing says what ranks: name a model with --model, or a classic recommender with --baseline and --recipe",
            kind="missing-key",
            column="--model",
        )


def open_classic(options: RankOptions) -> Models:
    """Fit the classic recommender that options name to the data of their recipe.

    Raises:
        LlmrecError: If an option is one of language models, or the recipe or its data cannot be used.
    """
    plain = RecommenderOptions(model="")
    for each in fields(RecommenderOptions):
        if each.name not in _SHARED and getattr(options, each.name) != getattr(plain, each.name):
            option = f"--{each.name.replace('_', '-')}"
            more = "; --top says how many items are listed" if option == "--k" else ""
            raise RecipeError(
                f"{option} says how a language model is opened or asked, and --baseline ranks without one; drop one "
                f"of them{more}",
                kind="contradiction",
                column=option,
            )
    if options.recipe is None:
        raise RecipeError(
            "--baseline learns from the data of a recipe; name the recipe, or a run folder, with --recipe",
            kind="missing-key",
            column="--recipe",
        )
    page = Path(options.recipe)
    if options.baseline in FUSIONS.values():
        if not page.is_dir():
            raise RecipeError(
                f"--baseline {options.baseline!r} is weighed by a run; name its folder with --recipe",
                kind="unsupported",
                column="--recipe",
            )
        return open_models(RecommenderOptions(model=str(page), items=options.items), [str(options.baseline)])
    recipe = load_recipe(str(page / _PAGE if page.is_dir() else page), options.settings)
    return open_classics(recipe, [str(options.baseline)], options.items)


def loaded_classic(options: RankOptions, models: Models) -> Loaded:
    """Return a fitted recommender as Python and a service ask it."""
    assert models.data is not None
    known = known_in(models.data.dataset, models.items, models.data.seed)
    return Loaded(RecommenderOptions(model=str(options.recipe)), models, known)


class ClassicRanker:
    """Ranks for requests with one classic recommender: candidates, or the whole catalogue where a request has none.

    A request that names a user of the data and brings no history has the one that the data know, and one about whom
    nothing is known gets the most popular items, as a service does it.

    Args:
        options: What was asked for.
        models: The recommender; see `open_classic`.
        budget: Where seconds are booked.
    """

    def __init__(self, options: RankOptions, models: Models, budget: Budget) -> None:
        self.budget, self._options, self._models = budget, options, models
        self._loaded = loaded_classic(options, models)

    @property
    def items(self) -> Mapping[str, Item]:
        """See `Ranker`."""
        return self._models.items

    @property
    def identity(self) -> dict[str, object]:
        """See `Ranker`."""
        options = self._options
        signature = self._loaded.signature()
        return {
            "signature": signature,
            "known": self._loaded.histories,
            "whole": options.whole,
            "top": options.top,
            "batch": options.batch,
        }

    @property
    def told(self) -> Mapping[str, object]:
        """See `told_of`."""
        data = self._models.data
        return {
            "baseline": self._options.baseline,
            "signature": self._loaded.signature(),
            "recipe": self._options.recipe,
            "data": None if data is None else data.dataset.name,
        }

    def read(self, record: Mapping[str, object], row: int = 1) -> RankRequest | Unparsed:
        """See `Ranker`."""
        whole = self._options.whole or record.get("candidates") is None
        told = with_history(record, lambda: self._loaded.known.histories, self.items)
        try:
            request = read_request(told, row, self.items, whole=whole)
        except DataError as error:
            return Unparsed(request_id=identity(record, row)[0] or str(row), reason=str(error))
        if told is record or not request.history:
            return request
        events = len(request.history)
        note = f"history: {events} event{'s' if events > 1 else ''} that the data have of this user"
        return replace(request, notes=(*request.notes, note))

    def untitled(self, record: Mapping[str, object]) -> str:
        """See `Ranker`: data have a text for every item."""
        return ""

    def answer(
        self,
        requests: Sequence[RankRequest | Unparsed],
        *,
        advance: Callable[[int], None] = lambda done: None,
        part: int | None = None,
    ) -> list[Answered]:
        """See `Ranker`."""
        able = [each for each in requests if isinstance(each, RankRequest)]
        found = iter(self._loaded.lists(able, Wanted(k=self._options.top)))
        answers = [
            Answered(answer=each) if isinstance(each, Unparsed) else _answered(each, next(found)) for each in requests
        ]
        advance(len(requests))
        return answers

    def __enter__(self) -> ClassicRanker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loaded.close()


def _answered(request: RankRequest, found: Any) -> Answered:
    if isinstance(found, LlmrecError):
        return Answered(answer=Unparsed(request_id=request.id, reason=str(found)), notes=request.notes)
    assert isinstance(found, Answered)
    return found
