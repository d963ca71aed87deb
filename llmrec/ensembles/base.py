"""What catalogue ensembles, list ensembles and blends share: members, weights, and the choice of the form."""

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

# Limits for measuring the contribution of a member, which refits all folds: cases times items, and minimum cases.
_DISSECTED, _LEAST = 12_000_000, 500


def _nothing(rows: NDArray[np.int64], start: Weights | None) -> Weights:
    raise RuntimeError("a fusion was asked before fit() was called")


class Ensemble:
    """The base class of ensembles, with the fitted weights and the forms that were tried.

    Attributes:
        name: The name of its row.
        weights: None before ``fit``.
        tried: Forms with their cross-fitted results.
        without: The contribution of each member, if ``dissect`` was set and the best form has several members.
        crossed: The cross-fitted result of the best form for each case, shape (n,); None if no form was chosen.
    """

    def __init__(self, name: str) -> None:
        """Create the ensemble with the name of its row."""
        self.name = name
        self.weights: Weights | None = None
        self.tried: tuple[Tried, ...] = ()
        self.without: tuple[Without, ...] = ()
        self.crossed: NDArray[np.float64] | None = None
        # The users and forms of the fit, and the cached results of `apart_from`.
        self._fitted_to: tuple[tuple[str, ...], Fit] = (), _nothing
        self._apart: dict[frozenset[str], Weights] = {}

    @property
    def fitted(self) -> Weights:
        """The fitted weights.

        Raises:
            RuntimeError: If ``fit`` was not called.
        """
        if self.weights is None:
            raise RuntimeError(f"{self.name!r} was asked before fit() was called")
        return self.weights

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the members."""
        raise NotImplementedError

    def apart_from(self, gone: frozenset[str]) -> Weights:
        """Return the weights fitted in the chosen form without some users, for evaluation on these users.

        Args:
            gone: Users whose cases are ignored.
        """
        if gone not in self._apart:
            users, fit = self._fitted_to
            rows = np.array([row for row, user in enumerate(users) if user not in gone], dtype=np.int64)
            self._apart[gone] = self.fitted if len(rows) == len(users) else fit(rows, self.fitted)
        return self._apart[gone]

    def _refuse(self, parts: Sequence[tuple[str, object]], cases: Sequence[Case]) -> None:
        """Reject users who were used for model selection of a member.

        Raises:
            LlmrecError: If ``looked_at`` of a member contains one of the users.
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
        """Keep the ranking form with the best cross-fitted NDCG@10, or the given form, fitted to all cases.

        The forms include the ensembles ``onto``, unchanged and with the members that they lack. Their single members
        are not included: the ensemble may have been found better on more users than these.
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
    """Return the forms that are worse than a given ensemble: each of its members alone."""
    return {("alone", name) for base in bases for name in base.names}


def free_of(base: Ensemble, names: Sequence[str]) -> tuple[int, ...]:
    """Return the indices of the members that an ensemble lacks."""
    return tuple(index for index, name in enumerate(names) if name not in base.names)


class _Base:
    """An ensemble to which other members may be added, with weights from users outside the evaluated fold.

    Attributes:
        of: The ensemble.
        free: Indices of the members that it lacks.
    """

    def __init__(self, of: Ensemble, names: Sequence[str], users: Sequence[str]) -> None:
        self.of, self.free = of, free_of(of, names)
        self._names, self._users = names, users

    def others(self, names: Sequence[str]) -> str:
        """Return the names of the members that it lacks."""
        return " and ".join(names[place] for place in self.free)

    def as_is(self, rows: NDArray[np.int64], start: Weights | None = None) -> Weights:
        """Return its weights over all members, fitted without users whose cases are not in ``rows``."""
        inside = {self._users[row] for row in rows.tolist()}
        result = self.of.apart_from(frozenset(self._users) - inside)
        known = dict(zip(self.of.names, result.parts, strict=True))
        return Weights(result.form, tuple(known.get(name, 0.0) for name in self._names), result.repeat)

    def put(self, known: WeighedCases, free: Sequence[int]) -> Fit:
        """Return the function that fits it together with some of the members that it lacks."""
        if not free:
            return self.as_is
        return lambda rows, start: known.onto(self.as_is(rows), free, rows)
