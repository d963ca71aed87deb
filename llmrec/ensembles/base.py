"""Base class of ensembles: members, weights, and how the scores are combined (the type of ensemble)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.ensembles.cells import CandidateScores
from llmrec.ensembles.trees import TreeSetting
from llmrec.ensembles.weights import (
    EnsembleTrial,
    FitFunction,
    Form,
    MemberAblation,
    Weights,
    assign_folds,
    cross_fitted_ndcgs,
    extend_base,
    fit_logit,
    fit_pool,
    fit_ranker,
    fit_single_member,
    measure_ablation,
    parse_tree_setting,
    select_form,
    tune_ranker,
    with_confidence_limits,
)
from llmrec.errors import LlmrecError
from llmrec.types import Case

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Maximum number of scores and minimum number of cases for measuring a member's contribution, which refits all folds.
_MAX_ABLATION_SCORES, _MIN_ABLATION_CASES = 300_000, 500


class Ensemble:
    """Base class of ensembles of rankers, with the fitted weights and the types that were compared.

    Attributes:
        name: Name in tables.
        names: Names of the members.
        weights: None before ``fit``.
        tried: Forms with their cross-fitted results.
        chosen: The form of the fitted weights.
        without: The contribution of each member, if ``ablate`` was set and the best form has several members.
        crossed: The cross-fitted result of the best form for each case, shape (n,); None if no form was chosen.
    """

    def __init__(self, name: str, names: Iterable[str], *, learns: bool = True) -> None:
        """Create the ensemble.

        Args:
            name: Name in tables.
            names: Names of the members.
            learns: Whether a ranker is one of the forms.
        """
        self.name, self.names, self._learns = name, tuple(names), learns
        self.weights: Weights | None = None
        self.tried: tuple[EnsembleTrial, ...] = ()
        self.chosen: EnsembleTrial | None = None
        self.without: tuple[MemberAblation, ...] = ()
        self.crossed: NDArray[np.float64] | None = None
        # Users and form of the last fit, and cached results of `fitted_without`, by the users left out.
        # An ensemble that is created with weights was fitted to no users.
        self._fitted_to: tuple[tuple[str, ...], Callable[[NDArray[np.int64], Any], Any]] = (), lambda _, start: start
        self._fits_without: dict[frozenset[str], Any] = {}

    @property
    def fitted(self) -> Weights:
        """The fitted weights; raises an error before ``fit``.

        Raises:
            RuntimeError: If ``fit`` was not called.
        """
        if self.weights is None:
            raise RuntimeError(f"{self.name!r} is not fitted; call fit() first")
        return self.weights

    def fitted_without(self, excluded: frozenset[str]) -> Any:
        """Return the weights of the chosen type, fitted without some users, for evaluation on these users.

        Args:
            excluded: Users whose cases are ignored.

        Returns:
            `Weights` of rankings; an intercept and weights of ratings and probabilities.
        """
        if excluded not in self._fits_without:
            (users, fit), full = self._fitted_to, self._fits_without[frozenset()] if self._fits_without else self.fitted
            rows = np.array([row for row, user in enumerate(users) if user not in excluded], dtype=np.int64)
            self._fits_without[excluded] = full if len(rows) == len(users) else fit(rows, full)
        return self._fits_without[excluded]

    def _refuse(self, parts: Sequence[tuple[str, object]], cases: Sequence[Case]) -> None:
        """Reject users on whom a member was selected or stopped early."""
        users = {case.request.user_id for case in cases}
        for name, part in parts:
            if seen := users & getattr(part, "looked_at", frozenset()):
                raise LlmrecError(
                    f"{self.name}: {len(seen)} of {len(users)} users for the ensemble weights were also used to "
                    f"choose parameters or the epoch of {name}, which would overestimate this member; reserve other "
                    "users (llmrec.data.split.split_validation_users)",
                    kind="leak",
                )

    def _choose(
        self,
        cells: CandidateScores,
        users: Sequence[str],
        *,
        repeats: bool,
        ablate: bool,
        only: EnsembleTrial | None = None,
        base_ensembles: Sequence[Ensemble] = (),
    ) -> None:
        """Fit all types of ensemble on all cases, and keep the one with the best cross-fitted NDCG@10.

        See `select_form`. The forms include the ensembles ``base_ensembles``, unchanged and with the members that they
        lack, but not the single members of these, since an ensemble may have been chosen on more users.
        """
        folds, every = assign_folds(self.name, users), np.arange(len(users))
        values: dict[tuple[Form, str], NDArray[np.float64]] = {}
        if only is None:
            options = {
                option.key: option
                for option in self._options(cells, users, repeats=repeats, base_ensembles=base_ensembles)
            }
            trees: tuple[Form, str] | None = None
            if self._learns and (result := tune_ranker(cells, folds)) is not None:
                option = _tree_ensemble_type(result[0], len(self.names))
                trees, options[option.key], values[option.key] = option.key, option, result[1]
            for key in options.keys() - values.keys():
                fit = options[key].on(cells, None)
                values[key] = cross_fitted_ndcgs(cells, fit, fit(every, None), folds)
            values = {key: values[key] for key in options}
            self.tried = tuple(EnsembleTrial(form, name, float(item.mean())) for (form, name), item in values.items())
            # A smaller ensemble may be a ranker too: only the trees that are learned here need the margin.
            best = options[select_form(values, trees, users)]
            self.chosen = next(entry for entry in self.tried if (entry.form, entry.name) == best.key)
        else:
            self.tried, self.chosen = (only,), only
            setting = parse_tree_setting(only)
            available = self._options(cells, users, repeats=repeats, base_ensembles=base_ensembles)
            best = (
                _tree_ensemble_type(setting, len(self.names))
                if setting
                else next(o for o in available if o.key == (only.form, only.name))
            )
        self.crossed = values.get(best.key)
        fit = best.on(cells, None)
        self.weights = fit(every, None)
        if self.weights.form == "logit" and len(best.members) == len(self.names):
            self.weights = with_confidence_limits(cells, self.weights, users, repeats=repeats)
        self._fitted_to, self._fits_without = (tuple(users), fit), {frozenset(): self.weights}
        if ablate and best.members:
            sample = cells.of(
                every[: max(_MIN_ABLATION_CASES, _MAX_ABLATION_SCORES * len(users) // max(1, len(cells.in_history)))]
            )
            count = len(sample.starts) - 1
            first, *reduced = (
                cross_fitted_ndcgs(sample, best.on(sample, off), self.weights, folds[:count])
                for off in (None, *best.members)
            )
            self.without = tuple(
                measure_ablation(self.names[member], first, item, users[:count])
                for member, item in zip(best.members, reduced, strict=True)
            )

    def _options(
        self, cells: CandidateScores, users: Sequence[str], *, repeats: bool, base_ensembles: Sequence[Ensemble]
    ) -> Iterator[_EnsembleType]:
        """Yield every type of ensemble except gradient-boosted trees."""
        every = range(len(self.names))
        yield _EnsembleType("logit", "logit", partial(_bind_fit, fit_logit, repeats=repeats), tuple(every))
        yield _EnsembleType("pool", "pool", partial(_bind_fit, fit_pool, repeats=repeats), tuple(every))
        for member, name in enumerate(self.names):
            if ("alone", name) not in base_member_keys(base_ensembles):
                yield _EnsembleType(
                    "alone", name, partial(_bind_fit, fit_single_member, member=member, repeats=repeats)
                )
        for base in (_BaseEnsemble(ensemble, self.names, users) for ensemble in base_ensembles):
            others = " and ".join(self.names[index] for index in base.free)
            form, name = base.ensemble.fitted.form, base.ensemble.name
            yield _EnsembleType(form, name, base.unchanged)
            extended: Form = "pool" if form == "pool" else "logit"
            yield _EnsembleType(extended, f"{name} and {others}", base.extended, base.free)


@dataclass(frozen=True)
class _EnsembleType:
    """A type of ensemble that can be fitted.

    Attributes:
        form: The form.
        name: Its name.
        on: Cells and a member to leave out or None -> the function that fits the form to some of their cases.
        members: The members whose contribution is measured.
    """

    form: Form
    name: str
    on: Callable[[CandidateScores, int | None], FitFunction]
    members: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[Form, str]:
        """Identifies the type of ensemble by kind and name."""
        return self.form, self.name


def _bind_fit(fit: Callable[..., Weights], cells: CandidateScores, without: int | None, **settings: Any) -> FitFunction:
    """Return a function that fits one type of ensemble on a subset of the cases."""
    more = settings if without is None else {**settings, "off": without}
    return lambda rows, start: fit(cells.of(rows), start, **more)


def _tree_ensemble_type(setting: TreeSetting, members: int) -> _EnsembleType:
    """Return gradient-boosted trees with these hyperparameters as a type of ensemble."""
    return _EnsembleType("ranker", setting.name, partial(_bind_fit, fit_ranker, setting=setting), tuple(range(members)))


def base_member_keys(bases: Sequence[Ensemble]) -> set[tuple[Form, str]]:
    """Return the members of smaller ensembles, which need not be tried alone."""
    return {("alone", name) for base in bases for name in base.names}


def missing_members(base: Ensemble, names: Sequence[str]) -> tuple[int, ...]:
    """Return the indices of the members that an ensemble does not contain."""
    return tuple(index for index, name in enumerate(names) if name not in base.names)


class _BaseEnsemble:
    """A smaller ensemble to which members can be added, with weights from users outside the evaluated fold.

    Attributes:
        ensemble: The ensemble.
        free: Indices of the members that it lacks.
    """

    def __init__(self, ensemble: Ensemble, names: Sequence[str], users: Sequence[str]) -> None:
        self.ensemble, self.free = ensemble, missing_members(ensemble, names)
        self._names, self._users = names, users

    def as_is(self, rows: NDArray[np.int64], start: Weights | None = None) -> Weights:
        """Return the weights of the smaller ensemble, fitted only on the users of these cases."""
        inside = {self._users[row] for row in rows.tolist()}
        result: Weights = self.ensemble.fitted_without(frozenset(self._users) - inside)
        known = dict(zip(self.ensemble.names, result.parts, strict=True))
        return replace(result, parts=tuple(known.get(name, 0.0) for name in self._names), low=(), high=())

    def unchanged(self, cells: CandidateScores, without: int | None) -> FitFunction:
        """Return the function that fits the smaller ensemble, for any arguments."""
        return self.as_is

    def extended(self, cells: CandidateScores, without: int | None) -> FitFunction:
        """Return a function that adds the missing members to the smaller ensemble."""
        free = [member for member in self.free if member != without]
        if not free:
            return self.as_is
        return lambda rows, start: extend_base(cells.of(rows), self.as_is(rows), free)
