"""What rankers of catalogues, of lists, and blends share: parts, weights, and how the form is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from llmrec.ensembles.weights import Fit, Form, Tried, WeighedCases, Weights, Without, folds_of, forms, left_out
from llmrec.errors import LlmrecError
from llmrec.types import Case

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Cases that say what a part adds, times items: each part takes the fits of all folds. At least so many cases.
_DISSECTED, _LEAST = 12_000_000, 500


def _nothing(rows: NDArray[np.int64], start: Weights | None) -> Weights:
    raise RuntimeError("a fusion was asked before fit() was called")


class Ensemble:
    """What is made of parts: its weights once they are fitted, and the forms that were tried.

    Attributes:
        name: Of its row.
        weights: None before ``fit``.
        tried: Forms with their cross-fitted figures.
        without: What each part adds, where ``fit`` was asked to dissect and the best form has several parts.
        crossed: The cross-fitted figure of the best form for each case, shape (n,); None where no form was chosen.
    """

    def __init__(self, name: str) -> None:
        """Set up, under the name of its row."""
        self.name = name
        self.weights: Weights | None = None
        self.tried: tuple[Tried, ...] = ()
        self.without: tuple[Without, ...] = ()
        self.crossed: NDArray[np.float64] | None = None
        # Whose cases it was fitted to and how, and what `apart_from` found.
        self._fitted_to: tuple[tuple[str, ...], Fit] = (), _nothing
        self._apart: dict[frozenset[str], Weights] = {}

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

    def apart_from(self, gone: frozenset[str]) -> Weights:
        """Return the weights that the other users give in the form that was chosen, so that those users can judge them.

        Args:
            gone: Users whose cases count for nothing.
        """
        if gone not in self._apart:
            users, fit = self._fitted_to
            rows = np.array([row for row, user in enumerate(users) if user not in gone], dtype=np.int64)
            self._apart[gone] = self.fitted if len(rows) == len(users) else fit(rows, self.fitted)
        return self._apart[gone]

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
        known: WeighedCases,
        users: Sequence[str],
        *,
        dissect: bool,
        only: Tried | None = None,
        onto: Sequence[Ensemble] = (),
    ) -> None:
        """Keep the form of a ranking with the best cross-fitted NDCG@10, or the given one, fitted to all cases.

        To the forms belong fusions ``onto`` which the parts that they lack may be put: as they are, and with these.
        Their own parts alone do not: more users than these may have said already that the fusion is better.
        """
        folds, every = folds_of(self.name, users), np.arange(len(users))
        fits = {form: fit for form, fit in forms(known, self.names).items() if form not in settled(onto)}
        bases = {base.name: _Base(base, self.names, users) for base in onto}
        fits |= {(base.of.fitted.form, name): base.as_is for name, base in bases.items()}
        beside = {f"{name} and {base.others(self.names)}": base for name, base in bases.items()}
        for text, base in beside.items():
            form: Form = "pool" if base.of.fitted.form == "pool" else "logit"
            fits[form, text] = base.put(known, base.free)
        if only is not None:
            fits = {form: fit for form, fit in fits.items() if form == (only.form, only.name)}
        whole = {form: fit(every, None) for form, fit in fits.items()}
        if only is None:
            values = {form: known.crossed(fit, whole[form], folds) for form, fit in fits.items()}
            self.tried = tuple(Tried(form, part, float(result.mean())) for (form, part), result in values.items())
        else:
            self.tried = (only,)
        best = max(self.tried, key=lambda each: each.value)
        self.crossed = values[best.form, best.name] if only is None else None
        self.weights = whole[best.form, best.name]
        self._apart = {}
        self._fitted_to = tuple(users), fits[best.form, best.name]
        if best.name in bases:
            return
        if best.name in beside:
            if dissect:
                base = beside[best.name]
                first = known.crossed(fits[best.form, best.name], self.weights, folds)
                less = [
                    known.crossed(base.put(known, [item for item in base.free if item != place]), self.weights, folds)
                    for place in base.free
                ]
                self.without = tuple(
                    left_out(self.names[place], first, item, users) for place, item in zip(base.free, less, strict=True)
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
                left_out(name, all_parts, item, users[:count]) for name, item in zip(self.names, rest, strict=True)
            )


def settled(bases: Sequence[Ensemble]) -> set[tuple[Form, str]]:
    """Return the forms that some fusion was found better than: each of its parts alone."""
    return {("alone", name) for base in bases for name in base.names}


def free_of(base: Ensemble, names: Sequence[str]) -> tuple[int, ...]:
    """Return the places of the parts that a fusion lacks."""
    return tuple(index for index, name in enumerate(names) if name not in base.names)


class _Base:
    """A fusion that other parts may be put onto, as it is weighed by users other than those who judge a fold.

    Attributes:
        of: The fusion.
        free: Places of the parts that it lacks.
    """

    def __init__(self, of: Ensemble, names: Sequence[str], users: Sequence[str]) -> None:
        self.of, self.free = of, free_of(of, names)
        self._names, self._users = names, users

    def others(self, names: Sequence[str]) -> str:
        """Name the parts that it lacks."""
        return " and ".join(names[place] for place in self.free)

    def as_is(self, rows: NDArray[np.int64], start: Weights | None = None) -> Weights:
        """Return its weights over all parts; users whose cases are not among ``rows`` have no say in them."""
        inside = {self._users[row] for row in rows.tolist()}
        result = self.of.apart_from(frozenset(self._users) - inside)
        known = dict(zip(self.of.names, result.parts, strict=True))
        return Weights(result.form, tuple(known.get(name, 0.0) for name in self._names), result.repeat)

    def put(self, known: WeighedCases, free: Sequence[int]) -> Fit:
        """Return what fits it with some of the parts that it lacks beside it."""
        if not free:
            return self.as_is
        return lambda rows, start: known.onto(self.as_is(rows), free, rows)
