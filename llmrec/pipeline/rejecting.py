"""Finds hard negatives for preference optimisation: items that a baseline or the model itself ranks high."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from llmrec.baselines.retrieve import HARD_NEGATIVE_POOL, RetrievedCandidates, SingleRetriever, check_retriever
from llmrec.data.split import SplitDataset
from llmrec.errors import DataError
from llmrec.recipe.schema import CandidateSection, ModelSection, Recipe
from llmrec.tasks.base import seeded_random
from llmrec.tasks.family import family_of
from llmrec.tasks.task import EventLists, Task
from llmrec.types import Ranking, Request

if TYPE_CHECKING:
    from llmrec.types import Backend

_RANDOM_KINDS = ("uniform", "popularity", "ratings")
BEAM = "beam"
"""The value of ``train.preference.rejected`` for items found by the model itself."""
# Number of training interactions per user for which the model is queried.
_EVENTS_PER_USER = 4


def hard_negative_source(
    recipe: Recipe, family: str, data: SplitDataset, seed: int, plain: Callable[[], Task]
) -> EventLists | None:
    """Return the hard-negative source of ``train.preference.rejected``; None if negatives are drawn at random.

    Args:
        recipe: A recipe with preference optimisation.
        family: A family that is trained.
        data: The data of the family.
        seed: Training seed.
        plain: Builds the family's task without preference optimisation.
    """
    section = recipe.train.preference
    if section is None or section.rejected in _RANDOM_KINDS or not family_of(family).ranks_for_users:
        return None
    if section.rejected == BEAM:
        return BeamSearchNegatives(recipe, data, seed, plain)
    key = "train.preference.rejected"
    check_retriever(section.rejected, key, *_RANDOM_KINDS, BEAM)
    best = CandidateSection(
        kind="retrieved", retriever=section.rejected, count=max(HARD_NEGATIVE_POOL, section.negatives)
    )
    return RetrievedCandidates(
        data, best, seed, SingleRetriever(section.rejected, seed, key), others=True, least=section.negatives
    )


class BeamSearchNegatives:
    """Finds hard negatives by beam search with the model that training starts from.

    It searches for a few training events of a user when the user's first row is built, with the earlier events as
    history. The user's training items are excluded, as for all rejected items.
    """

    def __init__(self, recipe: Recipe, data: SplitDataset, seed: int, plain: Callable[[], Task]) -> None:
        """Prepare the search; see `hard_negative_source`."""
        self._recipe, self._data, self._seed, self._plain = recipe, data, seed, plain
        self._task: Task | None = None
        self._cache: dict[str, Sequence[tuple[int, tuple[str, ...]]]] = {}

    def of(self, user: str) -> Sequence[tuple[int, tuple[str, ...]]]:
        """Return a user's training interactions, with the model's top items that the user has not chosen."""
        if user not in self._cache:
            self._cache[user] = self._search(user)
        return self._cache[user]

    def _search(self, user: str) -> list[tuple[int, tuple[str, ...]]]:
        from llmrec.strategies.asking import Prompting
        from llmrec.strategies.catalogue import CatalogueRanker

        recipe, events, section = self._recipe, self._data.train_events(user), self._recipe.train.preference
        assert section is not None and recipe.train.start is not None
        self._task = self._task or self._plain()
        backend = load_backend(
            str(Path(recipe.train.start).expanduser() / "merged"), recipe.model, recipe.eval.batch_tokens
        )
        asker = Prompting(backend=backend, task=self._task, template=self._task.eval_templates[0])
        had, most = frozenset(event.item_id for event in events), max(HARD_NEGATIVE_POOL, section.negatives)
        ranker = CatalogueRanker(asker, beams=most, exact=recipe.eval.exact, apart=lambda request: had)
        positions = range(1, len(events))
        drawn = sorted(
            seeded_random("beam events", self._seed, user).sample(positions, min(_EVENTS_PER_USER, len(positions)))
        )
        requests = [Request(id=f"beam/{user}/{at}", user_id=user, history=events[:at]) for at in drawn]
        results = []
        for at, answer in zip(drawn, ranker.answer(requests), strict=True):
            assert isinstance(answer, Ranking)  # the result of a search is always a ranking
            if len(answer.items) < section.negatives:
                raise DataError(
                    f"user {user!r} has only {len(answer.items)} items without a training interaction; set "
                    "train.preference.negatives to at most this number",
                    kind="too-few",
                    column="train.preference.negatives",
                )
            results.append((at, answer.items[:most]))
        return results


@lru_cache(maxsize=1)
def load_backend(folder: str, model: ModelSection, batch_tokens: int | None) -> Backend:
    """Load a model and keep it until `release_backend` is called."""
    from llmrec.backends.encode import Encoder
    from llmrec.backends.hf.backend import HFBackend
    from llmrec.models.load import device, load_model, load_tokenizer
    from llmrec.models.memory import LOADING_ADVICE, convert_memory_errors

    encoder = Encoder(load_tokenizer(folder, model), max_length=model.max_length)
    with convert_memory_errors(f"loading {model.name}", LOADING_ADVICE, "model.name"):
        weights = load_model(folder, model).to(device(model))
    return HFBackend(weights, encoder, batch_tokens=batch_tokens)


def release_backend() -> None:
    """Release the model, because training needs its memory."""
    if load_backend.cache_info().currsize:
        from llmrec.models.load import release_memory

        load_backend.cache_clear()
        release_memory()
