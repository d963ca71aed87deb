"""Ensembles of rating or CTR models, with weights fitted on users that were not used to tune any member.

Ratings are combined by ridge regression (stacking: Breiman, Machine Learning 1996) and probabilities by logistic
regression on their log-odds. The penalty, and whether to use a single member, are chosen by cross-fitting over users.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import expit, logit

from llmrec.ensembles.base import Ensemble, base_member_keys, missing_members
from llmrec.ensembles.weights import (
    FOLDS,
    EnsembleTrial,
    Form,
    Weights,
    assign_folds,
    confidence_limits,
    measure_ablation,
)
from llmrec.errors import LlmrecError
from llmrec.metrics.stats import StatisticName
from llmrec.types import Answer, Case, Predictor, Probability, Rating, Request

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Ridge penalties of standardised weights, per case.
_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# The minimum distance of a probability from 0 and 1.
_PROBABILITY_MARGIN = 1e-6


@dataclass(frozen=True)
class _LinearModel:
    """A fitted ensemble: an intercept and one weight per member, on the scale of the features."""

    intercept: float
    weights: NDArray[np.float64]

    def of(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(self.intercept + features @ self.weights)


_FitFunction = Callable[["NDArray[np.int64]", "NDArray[np.float64]"], _LinearModel]
"""Fits a form to some of the cases, given by their row indices, and to all features."""


class PredictionEnsemble(Ensemble):
    """An ensemble of rating models or CTR models."""

    def __init__(self, name: str, parts: Sequence[tuple[str, Predictor]], *, predicts_probability: bool) -> None:
        """Create the ensemble.

        Args:
            name: Name in tables.
            parts: The members by name: fitted predictors of ratings, or of probabilities.
            predicts_probability: Whether they predict probabilities.

        Raises:
            LlmrecError: If there are fewer than two members.
        """
        if len(parts) < 2:
            raise LlmrecError(f"{name}: an ensemble needs at least two members", kind="mismatch")
        super().__init__(name, (part for part, _ in parts))
        self.parts, self._predicts_probability = tuple(parts), predicts_probability
        self._line: _LinearModel | None = None
        self._bounds = (-np.inf, np.inf)
        self._mean_answers: NDArray[np.float64] = np.zeros(len(parts))

    def fit(
        self,
        cases: Sequence[Case],
        *,
        ablate: bool = False,
        only: EnsembleTrial | None = None,
        base_ensembles: Sequence[Ensemble] = (),
    ) -> None:
        """Fit all types of ensemble, and keep the type with the lowest cross-fitted error.

        Args:
            cases: Validation cases of users who were not used to fit or choose a member, with a rating as truth, or 1
                for yes and 0 for no.
            ablate: Fit the best form again without each member, for the attribute ``without``.
            only: The form to fit, if it was chosen before with another seed of the members.
            base_ensembles: Fitted blends of some of the members; the others may be added to each of them.

        Raises:
            LlmrecError: If there are too few users to fit weights on four fifths of them.
        """
        self._refuse(self.parts, cases)
        users = [case.request.user_id for case in cases]
        folds = assign_folds(self.name, users)
        answers = self._answers([case.request for case in cases])
        self._mean_answers = np.array(
            [values[~np.isnan(values)].mean() if (~np.isnan(values)).any() else 0 for values in answers.T]
        )
        bases = [base for base in base_ensembles if isinstance(base, PredictionEnsemble)]
        for base in bases:
            self._mean_answers[[self.names.index(name) for name in base.names]] = base._mean_answers
        features = self._features(answers)
        truth = np.array([float(case.truth) for case in cases])
        self._bounds = (0.0, 1.0) if self._predicts_probability else (float(truth.min()), float(truth.max()))
        if bases:
            self._bounds = bases[0]._bounds
        every = np.arange(len(users))
        fits, reduced = self._fit_functions(bases, truth, users)
        if only is not None:
            fits = {item: fit for item, fit in fits.items() if item == (only.form, only.name)}
        crossed = {item: self._cross_fitted_errors(fit, features, truth, folds) for item, fit in fits.items()}
        errors = {item: float(result.mean()) for item, result in crossed.items()}
        # RMSE for ratings, log loss for probabilities.
        reported = {item: error if self._predicts_probability else error**0.5 for item, error in errors.items()}
        self.tried = tuple(EnsembleTrial(form, name, -error) for (form, name), error in reported.items())
        best = min(errors, key=lambda key: errors[key])
        form, name = best
        self.chosen = EnsembleTrial(form, name, -reported[best])
        self._line = fits[best](every, features)
        self._fits_without = {frozenset(): self._line}
        self._fitted_to = tuple(users), lambda rows, start: fits[best](rows, features)
        self.weights = Weights(form, tuple(self._line.weights.tolist()))
        if form == "alone" or name in (base.name for base in bases):
            return
        if name not in reduced:
            low, high = self._limits(self._line, features, truth, users)
            self.weights = Weights(form, self.weights.parts, 0.0, low, high)
        if ablate:
            # For ratings, these are squared errors.
            statistic: StatisticName = "mean" if self._predicts_probability else "root_mean"
            without = (
                {index: self._cross_fitted_errors(fit, features, truth, folds) for index, fit in reduced[name].items()}
                if name in reduced
                else {
                    index: self._cross_fitted_errors(fits[best], np.delete(features, index, axis=1), truth, folds)
                    for index in range(len(self.names))
                }
            )
            self.without = tuple(
                measure_ablation(self.names[n], values, crossed[best], users, statistic)
                for n, values in without.items()
            )

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer every request with a rating or a probability; see `Predictor.answer`."""
        if self._line is None:
            raise RuntimeError(f"{self.name!r} is not fitted; call fit() first")
        values = self._line.of(self._features(self._answers(requests))) if requests else np.empty(0)
        values = expit(values) if self._predicts_probability else np.clip(values, *self._bounds)
        answer_type = Probability if self._predicts_probability else Rating
        return [answer_type(request_id=r.id, value=float(v)) for r, v in zip(requests, values, strict=True)]

    # ----------------------------------------------------------------------- helpers

    def _answers(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        """Return the members' answers, shape (n, members): probabilities as log-odds, NaN for missing answers."""
        columns = []
        for _, part in self.parts:
            answers = part.answer(requests)
            values = np.array([a.value if isinstance(a, Rating | Probability) else np.nan for a in answers])
            columns.append(
                logit(np.clip(values, _PROBABILITY_MARGIN, 1 - _PROBABILITY_MARGIN))
                if self._predicts_probability
                else values
            )
        return np.stack(columns, axis=1)

    def _features(self, answers: NDArray[np.float64]) -> NDArray[np.float64]:
        """Replace missing answers by the mean answer of the same member."""
        return np.where(np.isnan(answers), self._mean_answers, answers)

    def _fit_functions(
        self, bases: Sequence[PredictionEnsemble], truth: NDArray[np.float64], users: Sequence[str]
    ) -> tuple[dict[tuple[Form, str], _FitFunction], dict[str, dict[int, _FitFunction]]]:
        """Return the functions that fit each type of ensemble, and those that add all members but one to a smaller one.

        The latter are given by the name of the type and the index of the member that is left out.
        """
        form: Form = "logit" if self._predicts_probability else "ridge"

        def plain(penalty: float, rows: NDArray[np.int64], features: NDArray[np.float64]) -> _LinearModel:
            return self._fit_linear_model(penalty, features[rows], truth[rows])

        def fixed(line: _LinearModel, rows: NDArray[np.int64], features: NDArray[np.float64]) -> _LinearModel:
            return line

        def extended(
            base: PredictionEnsemble,
            free: Sequence[int],
            penalty: float,
            rows: NDArray[np.int64],
            features: NDArray[np.float64],
        ) -> _LinearModel:
            inside = {users[row] for row in rows.tolist()}
            smaller: _LinearModel = base.fitted_without(frozenset(users) - inside)
            weights = np.zeros(features.shape[1])
            weights[[self.names.index(name) for name in base.names]] = smaller.weights
            line = _LinearModel(smaller.intercept, weights)
            return self.extend_base(line, free, penalty, features[rows], truth[rows]) if free else line

        fits: dict[tuple[Form, str], _FitFunction] = {
            (form, f"penalty {penalty:g}"): partial(plain, penalty) for penalty in _PENALTIES
        }
        for index, name in enumerate(self.names):
            if ("alone", name) in base_member_keys(bases):
                continue
            fits["alone", name] = partial(fixed, _LinearModel(0.0, np.eye(len(self.names))[index]))
        reduced: dict[str, dict[int, _FitFunction]] = {}
        for base in bases:
            free = missing_members(base, self.names)
            for penalty in _PENALTIES:
                name = f"{base.name} and {' and '.join(self.names[member] for member in free)}, penalty {penalty:g}"
                fits[form, name] = partial(extended, base, free, penalty)
                reduced[name] = {
                    off: partial(extended, base, [other for other in free if other != off], penalty) for off in free
                }
            # Without additional members the penalty has no effect.
            fits[base.fitted.form, base.name] = partial(extended, base, (), penalty)
        return fits, reduced

    def _cross_fitted_errors(
        self, fit: _FitFunction, features: NDArray[np.float64], truth: NDArray[np.float64], folds: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Return the error of each case with weights fitted on the other folds, shape (n,)."""
        result = np.empty(len(truth))
        for fold in range(FOLDS):
            outside = folds == fold
            line = fit(np.flatnonzero(~outside), features)
            result[outside] = self._error(line.of(features[outside]), truth[outside])
        return result

    def extend_base(
        self,
        line: _LinearModel,
        free: Sequence[int],
        penalty: float,
        features: NDArray[np.float64],
        truth: NDArray[np.float64],
    ) -> _LinearModel:
        """Add members to a fitted ensemble, with a penalty that favours the ensemble's own prediction."""
        prediction, columns = line.of(features), list(free)
        result = self._fit_linear_model(
            penalty, np.column_stack([prediction, features[:, columns]]), truth, offset=prediction
        )
        scale = 1 + result.weights[0]
        weights = scale * line.weights
        weights[columns] = result.weights[1:]
        return _LinearModel(float(result.intercept + scale * line.intercept), weights)

    def _fit_linear_model(
        self,
        penalty: float,
        features: NDArray[np.float64],
        truth: NDArray[np.float64],
        offset: NDArray[np.float64] | None = None,
    ) -> _LinearModel:
        """Fit a linear model to the features, with a fixed ``offset`` added."""
        count, start = features.shape[1], np.zeros(len(truth)) if offset is None else offset
        means, scales = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-9)
        scaled = (features - means) / scales
        penalty *= len(truth)
        if not self._predicts_probability:
            residuals = truth - start
            centred = residuals - residuals.mean()
            weights = np.linalg.solve(scaled.T @ scaled + penalty * np.eye(count), scaled.T @ centred) / scales
            return _LinearModel(float(residuals.mean() - means @ weights), weights)

        def loss(free: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            total = start + free[0] + scaled @ free[1:]
            error = expit(total) - truth
            value = np.logaddexp(0, total).sum() - truth @ total + penalty / 2 * free[1:] @ free[1:]
            return float(value), np.concatenate([[error.sum()], scaled.T @ error + penalty * free[1:]])

        # Importing scipy takes 0.1 s, which most commands do not need.
        from scipy.optimize import minimize

        result = minimize(loss, np.zeros(count + 1), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
        weights = result[1:] / scales
        return _LinearModel(float(result[0] - means @ weights), weights)

    def _error(self, values: NDArray[np.float64], truth: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the squared errors of ratings, or the log losses of probabilities, shape (n,)."""
        if self._predicts_probability:
            return np.asarray(np.logaddexp(0, values) - truth * values)
        return np.asarray((np.clip(values, *self._bounds) - truth) ** 2)

    def _limits(
        self, line: _LinearModel, features: NDArray[np.float64], truth: NDArray[np.float64], users: Sequence[str]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return 95 % limits of the weights, robust and clustered by user (White, Econometrica 1982)."""
        design = np.column_stack([np.ones(len(truth)), features])
        values = line.of(features)
        if self._predicts_probability:
            p = expit(values)
            scores, curvature = design * (p - truth)[:, None], (design * (p * (1 - p))[:, None]).T @ design
        else:
            scores, curvature = design * (values - truth)[:, None], design.T @ design
        low, high = confidence_limits(np.array([line.intercept, *line.weights]), scores, curvature, users)
        return low[1:], high[1:]
