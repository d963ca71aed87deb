"""What ranks a file of requests: a language model, or a classic recommender over the data of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from llmrec.answer.checks import decided
from llmrec.answer.known import known_in
from llmrec.answer.loaded import Loaded, Wanted
from llmrec.answer.opening import Models, offered, open_classics, open_models, own_name
from llmrec.answer.options import RecommenderOptions
from llmrec.answer.rank.options import RankOptions
from llmrec.answer.recommender import Answered, Recommender
from llmrec.data.requests import RankRequest, identity
from llmrec.errors import DataError, LlmrecError, RecipeError
from llmrec.pipeline import bundle as bundles
from llmrec.pipeline.engines import dtype_name
from llmrec.pipeline.fusion.parts import FUSIONS
from llmrec.pipeline.resume import Budget
from llmrec.recipe.load import load_recipe, load_stored
from llmrec.types import Item, Unparsed

# What a classic recommender is told too; the other options say how a language model is asked.
_SHARED = ("items", "candidates", "settings", "top", "batch")
# How the language model of a folder is asked to rank, and how it is opened.
_ASKED = ("task", "template", "strategy", "beams", "exact", "settings", "retrieve", "k", "fuse", "rationale")
_OPENED = ("backend", "server_url", "server_model", "server_key_env", "noun", "max_length", "dtype")


class Ranker(AbstractContextManager["Ranker"], Protocol):
    """Answers requests, whatever it is; `llmrec.answer.recommender.Recommender` says what its members are."""

    budget: Budget

    @property
    def items(self) -> Mapping[str, Item] | None:
        """What requests may name by id."""
        ...

    @property
    def identity(self) -> Mapping[str, object]:
        """Everything besides the requests that can change an answer, by name."""
        ...

    @property
    def stored(self) -> str:
        """A hash over what is known of users, which requests may go by."""
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


def resolved(options: RankOptions) -> RankOptions:
    """Return options whose ``by`` names what ranks.

    Without ``--by`` it is the default of the folder; an option that says how the language model is asked means that.

    Raises:
        LlmrecError: If an option does not go with what ranks, or the folder cannot be opened.
    """
    if options.baseline is not None:
        if options.by is not None:
            raise RecipeError(
                "--by names a model of the folder of --model, and --baseline ranks without one; drop one of them",
                kind="contradiction",
                column="--by",
            )
        return options
    check_named(options)
    bundle = bundles.read(options.model)
    own = own_name(bundle)
    asked = _changed(options, _ASKED)
    by = options.by or (own if own and asked else offered(bundle)[0])
    if not bundle.weights:
        asked += _changed(options, _OPENED)
    if by != own and asked:
        lacks = f"--by {by!r} names another model" if own else f"{options.model} has none: {by} ranks"
        raise RecipeError(
            f"{asked[0]} says how a language model is opened or asked, and {lacks}; drop {asked[0]}",
            kind="contradiction",
            column=asked[0],
        )
    return replace(options, by=by)


def open_ranker(options: RankOptions, *, store: Path | None, budget: Budget) -> Ranker:
    """Open what is to rank.

    Args:
        options: They name a model or a baseline.
        store: A database of answers of a language model; None: none are kept.
        budget: Where seconds are booked.

    Raises:
        LlmrecError: If an option, a file or the model cannot be used.
    """
    options = resolved(options)
    if options.baseline is not None:
        return NamedRanker(options, loaded_classic(options, open_classic(options)), budget)
    if options.named is not None:
        return NamedRanker(options, loaded_named(options), budget)
    return Recommender.open(options, store=store, budget=budget)


def loaded_named(options: RankOptions) -> Loaded:
    """Open the model of a folder that ``by`` names, or else its default, as Python and a service ask it.

    Raises:
        LlmrecError: If it cannot be opened.
    """
    given = RecommenderOptions(**{each.name: getattr(options, each.name) for each in fields(RecommenderOptions)})
    asked = decided(given)
    return Loaded(asked, open_models(asked, [options.by or offered(bundles.read(options.model))[0]]))


def _changed(options: RankOptions, names: Sequence[str]) -> list[str]:
    """Return which options were given, as they are written."""
    plain = RankOptions()
    changed = [name for name in names if getattr(options, name) != getattr(plain, name)]
    return ["--set" if name == "settings" else f"--{name.replace('_', '-')}" for name in changed]


def told_of(ranker: Ranker) -> Mapping[str, object]:
    """Return what a summary says of what ranked, and how it was asked."""
    if isinstance(ranker, NamedRanker):
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
    read = load_stored if page.is_dir() else load_recipe
    recipe = read(page, options.settings)
    return open_classics(recipe, [str(options.baseline)], options.items)


def loaded_classic(options: RankOptions, models: Models) -> Loaded:
    """Return a fitted recommender as Python and a service ask it."""
    assert models.data is not None
    known = known_in(models.data.dataset, models.items, models.data.seed)
    return Loaded(RecommenderOptions(model=str(options.recipe)), models, known)


class NamedRanker:
    """Ranks for requests with one model under its name: candidates, or the whole catalogue where a request has none.

    A request that names a user of the data and brings no history has the one that the data know, and one about whom
    nothing is known gets the most popular items, as a service does it.

    Args:
        options: What was asked for.
        loaded: The model, as Python and a service ask it.
        budget: Where seconds are booked.
    """

    def __init__(self, options: RankOptions, loaded: Loaded, budget: Budget) -> None:
        self.budget, self._options, self._loaded = budget, options, loaded

    @property
    def items(self) -> Mapping[str, Item]:
        """See `Ranker`."""
        return self._loaded.items

    @property
    def identity(self) -> dict[str, object]:
        """See `Ranker`."""
        options = self._options
        return {
            "signature": self._loaded.signature(),
            "whole": options.whole,
            "top": options.top,
            "batch": options.batch,
        }

    @property
    def stored(self) -> str:
        """See `Ranker`."""
        return self._loaded.histories

    @property
    def told(self) -> Mapping[str, object]:
        """See `told_of`."""
        options, signature = self._options, self._loaded.signature()
        if options.baseline is None:
            return {"model": options.model, "by": self._loaded.models[0], "signature": signature}
        named = {"baseline": options.baseline, "signature": signature, "recipe": options.recipe}
        return {**named, "data": self._loaded.data_name}

    def read(self, record: Mapping[str, object], row: int = 1) -> RankRequest | Unparsed:
        """See `Ranker`."""
        whole = self._options.whole or record.get("candidates") is None
        try:
            return self._loaded.read(record, row, whole=whole)
        except DataError as error:
            return Unparsed(request_id=identity(record, row)[0] or str(row), reason=str(error))

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

    def __enter__(self) -> NamedRanker:
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
