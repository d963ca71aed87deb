"""Direct recommendation: which of these candidates would this user choose?"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from string import ascii_uppercase

from llmrec.data.candidates import CandidateSets
from llmrec.data.split import SplitDataset, request_id
from llmrec.errors import DataError, RecipeError
from llmrec.prompts import Template
from llmrec.recipe import DirectSection
from llmrec.tasks.common import (
    ABOUT_USER,
    Values,
    View,
    candidates_of,
    chat_example,
    choose,
    held_out,
    keyed,
    passes,
    ranking_reward,
    refuse_test,
    solved,
    with_shots,
)
from llmrec.tasks.fewshot import Drawn, ShotPool
from llmrec.tasks.reading import read_ranking
from llmrec.types import Answer, Case, Event, Example, Family, ItemCodes, Message, Prompt, Ranking, Request, SplitName

# Candidates of a training row where no stored sets say how many evaluation shows.
_COUNT = 20


class DirectTask:
    """The direct family: labelled candidates in one prompt, one label as the answer, or an ordered list of labels."""

    family: Family = "direct"

    def __init__(
        self,
        data: SplitDataset,
        section: DirectSection,
        templates: Mapping[str, Template],
        *,
        seed: int,
        candidates: CandidateSets | None = None,
        shot_choice: str = "random",
        index: ItemCodes | None = None,
    ) -> None:
        self._data, self._section, self._seed, self._candidates = data, section, seed, candidates
        self._chosen = choose(self.family, section, templates, index)
        self._view = View(data, index)
        for template in templates.values():
            if template.shape == "list":
                raise RecipeError(f"template {template.id}: direct templates ask for one answer; use shape: chat")
            asked = ABOUT_USER | {"history", "candidates", "want"}
            template.check(turns=asked, lead=(), target=asked | {"label"})
        events = {user: data.train_events(user) for user in data.users()}
        self._events = {user: past for user, past in events.items() if past}
        self._negatives = Negatives(data, candidates.kind if candidates else "uniform")
        self._count = candidates.count if candidates else _COUNT
        self._shots = ShotPool(self.family, self._events, seed=seed, choice=shot_choice, least=1)

    @property
    def eval_templates(self) -> tuple[str, ...]:
        """Names of the templates that evaluation asks with."""
        return self._chosen.evaluate

    def examples(self, split: SplitName, limit: int | None = None) -> Iterator[Example]:
        """Yield rows with targets; see `Task`."""
        refuse_test(split)
        if split == "valid":
            for held in held_out(self._data, "valid")[:limit]:
                name = request_id(held.user_id, held.item_id)
                stored = self._candidates.sets.get(name) if self._candidates else None
                past = self._data.history(held.user_id, "valid")[-self._section.history :]
                events = (*past, Event(item_id=held.item_id))
                pool = stored or self._pool(
                    held.user_id, held.item_id, self._count, keyed("direct valid", self._seed, name)
                )
                yield self._example(self._chosen.train[0], f"direct/valid/{name}", held.user_id, events, pool)
            return
        for row, user, rng in passes(self.family, list(self._events), self._seed, limit):
            template = rng.choice(self._chosen.train)
            events = self._events[user]
            # A question about the first event has no history to show, so it is asked only of users with no other.
            at = rng.randrange(min(1, len(events) - 1), len(events))
            shown = events[max(0, at - self._section.history) : at + 1]
            pool = self._pool(user, events[at].item_id, self._count, rng)
            yield self._example(template, row, user, shown, pool)

    def cases(self, split: SplitName) -> list[Case]:
        """Return every held-out interaction with its stored candidates.

        Raises:
            RecipeError: If the task was built without candidate sets.
        """
        if self._candidates is None:
            raise RecipeError("tasks.direct ranks stored candidates; draw them first (llmrec.data.candidates.draw)")
        return [
            Case(
                request=Request(
                    id=request_id(held.user_id, held.item_id),
                    user_id=held.user_id,
                    history=self._data.history(held.user_id, split),
                    candidates=candidates_of(self._candidates, held, self.family),
                ),
                truth=held.item_id,
            )
            for held in held_out(self._data, split)
        ]

    def prompt(self, request: Request, *, template: str, shots: int = 0, want: str = "one") -> Prompt:
        """Render a request; see `Task`.

        Args:
            request: What to ask; it needs candidates.
            template: Name of the template.
            shots: Solved examples before the question.
            want: ``one`` label, or a ``ranking`` of all labels.
        """
        if want not in ("one", "ranking"):
            raise ValueError(f"want is 'one' or 'ranking', not {want!r}")
        chosen = self._chosen.get(template)
        pool = _asked(request)
        drawn = self.draw_shots(request, shots)
        turns = []
        for place, shot in enumerate(drawn.windows):
            rng = keyed("direct shot candidates", self._seed, request.id, str(place))
            shown = self._pool(shot.user_id, shot.events[-1].item_id, len(pool), rng)
            turns.append(self._solved(chosen, shot.user_id, shot.events, shown, want))
        values = self._values(request.user_id, drawn.history, pool, want, request.context)
        return Prompt(messages=with_shots(chosen.turns(values), turns))

    def draw_shots(self, request: Request, shots: int) -> Drawn:
        """Return the training events that few-shot examples show, and the history that the question keeps."""
        return self._shots.draw(request, request.history, shots, self._section.history)

    def continuations(self, request: Request, *, template: str) -> tuple[str, ...]:
        """Return the candidates' labels, in stored order."""
        return candidate_labels(len(_asked(request)))

    def parse(self, completion: str, request: Request, *, template: str) -> Answer | None:
        """Read labels and titles in order; candidates that are not mentioned are left out."""
        pool = _asked(request)
        places = read_ranking(completion, candidate_labels(len(pool)), [self._view.title(item) for item in pool])
        if not places:
            return None
        scores = tuple(float(len(places) - rank) for rank in range(len(places)))
        return Ranking(request_id=request.id, items=tuple(pool[place] for place in places), scores=scores)

    def reward(self, answer: Answer, case: Case) -> float:
        """Return 1 / log2(1 + rank) of the true item, in expectation over ties; 0 if it is left out."""
        return ranking_reward(answer, case)

    # ----------------------------------------------------------------------- building blocks

    def _pool(self, user: str, item: str, count: int, rng: random.Random) -> tuple[str, ...]:
        pool = [item, *self._negatives.draw(user, count - 1, rng)]
        rng.shuffle(pool)
        return tuple(pool)

    def _values(
        self, user: str, past: Sequence[Event], pool: Sequence[str], want: str, context: Mapping[str, str] | None = None
    ) -> Values:
        labels = candidate_labels(len(pool))
        listed = [{"label": label, "title": self._view.title(item)} for label, item in zip(labels, pool, strict=True)]
        return self._view.user(user, context) | {"history": self._view.events(past), "candidates": listed, "want": want}

    def _example(
        self, template: Template, row: str, user: str, events: tuple[Event, ...], pool: tuple[str, ...]
    ) -> Example:
        values = self._values(user, events[:-1], pool, "one")
        label = candidate_labels(len(pool))[pool.index(events[-1].item_id)]
        return chat_example(template, row, user, values, values | {"label": label}, past=events[:-1], event=events[-1])

    def _solved(
        self, template: Template, user: str, events: tuple[Event, ...], pool: tuple[str, ...], want: str
    ) -> tuple[Message, ...]:
        values = self._values(user, events[:-1], pool, want)
        labels = candidate_labels(len(pool))
        best = labels[pool.index(events[-1].item_id)]
        # Only the first place is known from the data; the rest keep the listed order and show the form of the answer.
        ranked = ", ".join((best, *(label for label in labels if label != best)))
        return solved(template, values, template.step(values | {"label": best if want == "one" else ranked})[1])


class Negatives:
    """Draws items that a user touched in no split, so that no held-out pair stands in a training text.

    Args:
        data: The split data.
        kind: ``uniform`` over the catalogue, or ``popularity``: by 1 + number of training interactions.
    """

    def __init__(self, data: SplitDataset, kind: str) -> None:
        self._catalogue = sorted(data.dataset.items)
        self._bag = list(self._catalogue)
        if kind == "popularity":
            self._bag = sorted([*self._bag, *data.train["item_id"].to_list()])
        self._interactions = data.dataset.interactions

    @cached_property
    def _touched(self) -> Mapping[str, frozenset[str]]:
        by_user: dict[str, set[str]] = {}
        for user, item in self._interactions.select("user_id", "item_id").iter_rows():
            by_user.setdefault(user, set()).add(item)
        return {user: frozenset(items) for user, items in by_user.items()}

    def draw(self, user: str, count: int, rng: random.Random) -> list[str]:
        """Return ``count`` different items.

        Raises:
            DataError: If the user left fewer untouched.
        """
        touched = self._touched.get(user, frozenset())
        free = len(self._catalogue) - len(touched)
        if free < count:
            raise DataError(
                f"user {user!r} leaves only {free} of {len(self._catalogue)} items untouched, fewer than the {count} "
                f"negatives asked for; set eval.candidates.count to at most {free + 1}"
            )
        taken: dict[str, None] = {}
        for _ in range(8 * count):
            if len(taken) == count:
                break
            item = self._bag[rng.randrange(len(self._bag))]
            if item not in touched:
                taken.setdefault(item)
        if len(taken) < count:
            rest = [item for item in self._bag if item not in touched and item not in taken]
            while len(taken) < count:
                item = rng.choice(rest)
                taken[item] = None
                rest = [other for other in rest if other != item]
        return list(taken)


def candidate_labels(count: int) -> tuple[str, ...]:
    """Return A, B, C, ... for up to 26 candidates, else numbers of equal width: no label starts another."""
    if count <= len(ascii_uppercase):
        return tuple(ascii_uppercase[:count])
    width = len(str(count))
    return tuple(f"{number:0{width}d}" for number in range(1, count + 1))


def _asked(request: Request) -> tuple[str, ...]:
    if not request.candidates:
        raise DataError(f"request {request.id!r}: the direct task ranks candidates; set Request.candidates")
    return request.candidates
