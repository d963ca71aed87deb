"""What rankers of catalogues, of lists, and blends share: parts, weights, and how the form is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from llmrec.errors import LlmrecError
from llmrec.strategies.fusion_cases import Known, forms
from llmrec.strategies.fusion_weights import Fit, Form, Tried, Weights, Without, folds_of, left_out
from llmrec.types import Case

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Cases that say what a part is worth, times items: each part takes the fits of all folds. At least so many cases.
_DISSECTED, _LEAST = 12_000_000, 500


class Weighed:
    """What is made of parts: its weights once they are fitted, and the forms that were tried.

    Attributes:
        name: Of its row.
        weights: None before ``fit``.
        tried: Forms with their cross-fitted figures.
        without: What each part is worth, where ``fit`` was asked to dissect and the best form has several parts.
    """

    def __init__(self, name: str) -> None:
        """Set up, under the name of its row."""
        self.name = name
        self.weights: Weights | None = None
        self.tried: tuple[Tried, ...] = ()
        self.without: tuple[Without, ...] = ()

    @property
    def fitted(self) -> Weights:
        """What ``fit`` found.

        Raises:
            RuntimeError: If it was not called.
        """
        if self.weights is None:
            raise RuntimeError(f"{self.name!r} was asked before fit() was called")
        return self.weights

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parts."""
        raise NotImplementedError

    def _refuse(self, parts: Sequence[tuple[str, object]], cases: Sequence[Case]) -> None:
        """Refuse to weigh parts by users who chose something of them.

        Raises:
            LlmrecError: If a part has looked at one of the users, as it says itself.
        """
        users = {case.request.user_id for case in cases}
        for name, part in parts:
            if seen := users & getattr(part, "looked_at", frozenset()):
                raise LlmrecError(
                    f"{self.name}: {len(seen)} of {len(users)} users that are to weigh {name} have chosen its "
                    "parameters or its epoch, so that it would seem better than it is; hold some back "
                    "(llmrec.data.split.halves)",
                    kind="leak",
                )

    def _choose(
        self,
        known: Known,
        users: Sequence[str],
        *,
        dissect: bool,
        only: Tried | None = None,
        onto: Sequence[Weighed] = (),
    ) -> None:
        """Keep the form of a ranking with the best cross-fitted NDCG@10, or the given one, fitted to all cases.

        To the forms belong fusions ``onto`` which the parts that they lack may be put: as they are, and with these.
        """
        folds, fits, every = folds_of(self.name, users), forms(known, self.names), np.arange(len(users))
        bases = {base.name: _placed(base, self.names) for base in onto}
        fits |= {(base.form, name): _as_is(base) for name, base in bases.items()}
        free = {base.name: free_of(base, self.names) for base in onto}
        beside = {f"{name} and {' and '.join(self.names[place] for place in free[name])}": name for name in bases}
        for said, name in beside.items():
            form: Form = "pool" if bases[name].form == "pool" else "logit"
            fits[form, said] = partial(known.onto, bases[name], free[name])
        if only is not None:
            fits = {form: fit for form, fit in fits.items() if form == (only.form, only.name)}
        whole = {form: fit(every, None) for form, fit in fits.items()}
        if only is None:
            values = {form: known.crossed(fit, whole[form], folds) for form, fit in fits.items()}
            self.tried = tuple(Tried(form, part, float(found.mean())) for (form, part), found in values.items())
        else:
            self.tried = (only,)
        best = max(self.tried, key=lambda each: each.value)
        self.weights = whole[best.form, best.name]
        if best.name in bases:
            return
        if best.name in beside:
            base = bases[beside[best.name]]
            if dissect:
                places = free[beside[best.name]]
                first = known.crossed(fits[best.form, best.name], self.weights, folds)
                self.without = tuple(
                    left_out(self.names[place], first, _less(known, base, places, place, folds), users)
                    for place in places
                )
            return
        if best.form == "logit":
            low, high = known.limits(self.weights, users)
            self.weights = Weights("logit", self.weights.parts, self.weights.repeat, low, high)
        if dissect and best.form != "alone":
            few = known.first(max(_LEAST, _DISSECTED // known.had.shape[1]))
            fit, count = few.logit if best.form == "logit" else few.pool, len(few.truth)
            all_parts = few.crossed(fit, self.weights, folds[:count])
            rest = [
                few.crossed(partial(fit, off=place), self.weights, folds[:count]) for place in range(len(self.names))
            ]
            self.without = tuple(
                left_out(name, all_parts, each, users[:count]) for name, each in zip(self.names, rest, strict=True)
            )


def _less(
    known: Known, base: Weights, places: Sequence[int], off: int, folds: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return NDCG@10 of each case by a fusion with further parts, less one of them; shape (n,)."""
    rest, every = [place for place in places if place != off], np.arange(len(known.truth))
    if not rest:
        return known.ndcg(base, every)
    return known.crossed(partial(known.onto, base, rest), base, folds)


def free_of(base: Weighed, names: Sequence[str]) -> tuple[int, ...]:
    """Return the places of the parts that a fusion lacks."""
    return tuple(place for place, name in enumerate(names) if name not in base.names)


def _placed(base: Weighed, names: Sequence[str]) -> Weights:
    """Return the weights of a fusion over other parts as well, which have 0."""
    known, found = dict(zip(base.names, base.fitted.parts, strict=True)), base.fitted
    return Weights(found.form, tuple(known.get(name, 0.0) for name in names), found.repeat)


def _as_is(base: Weights) -> Fit:
    return lambda rows, start: base
