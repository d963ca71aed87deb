"""Blend: several predictors of a rating, or of a yes, become one, with weights from users whom no part was tuned on.

Ratings are joined by ridge regression (Breiman's stacking, Machine Learning 1996) and probabilities by logistic
regression on their log-odds (a conditional logit of two items, as `llmrec.strategies.fusion` has it for rankings). The
penalty, and whether a part alone does as well, are chosen by the error on users that the weights do not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit

from llmrec.errors import LlmrecError
from llmrec.metrics.stats import StatisticName
from llmrec.strategies.fusion_weights import FOLDS, Tried, Weights, folds_of, left_out, limits_of
from llmrec.strategies.weighed import Weighed
from llmrec.types import Answer, Case, Predictor, Probability, Rating, Request

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Ridge penalties of standardised weights, for each case.
_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Nearest that a probability comes to 0 or 1.
_SURE = 1e-6


@dataclass(frozen=True)
class _Line:
    """A fitted form: an intercept and one weight a part, on the scale of the features."""

    intercept: float
    weights: NDArray[np.float64]

    def of(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(self.intercept + features @ self.weights)


class Blend(Weighed):
    """Answers with what several predictors of one kind say."""

    def __init__(self, name: str, parts: Sequence[tuple[str, Predictor]], *, judges: bool) -> None:
        """Set up.

        Args:
            name: Of the row.
            parts: Fitted predictors with their names; all answer with a rating, or all with a probability.
            judges: They answer with a probability.

        Raises:
            LlmrecError: If there are fewer than two.
        """
        if len(parts) < 2:
            raise LlmrecError(f"{name}: a blend needs two or more parts", kind="mismatch")
        super().__init__(name)
        self.parts, self._judges = tuple(parts), judges
        self._line: _Line | None = None
        self._bounds = (-np.inf, np.inf)
        self._mute: NDArray[np.float64] = np.zeros(len(parts))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parts."""
        return tuple(name for name, _ in self.parts)

    def fit(self, cases: Sequence[Case], *, dissect: bool = False, only: Tried | None = None) -> None:
        """Fit the weights, and keep the form with the least cross-fitted error.

        Args:
            cases: Validation cases of users that no part has learned from or was chosen by: with a rating as truth, or
                with 1 for yes and 0 for no.
            dissect: Fit the best form once more without each part, for the attribute ``without``.
            only: The form to fit, where it was chosen before: with another seed of the parts.

        Raises:
            LlmrecError: If there are too few users to fit weights on all but a fifth of them.
        """
        self._refuse(self.parts, cases)
        users = [case.request.user_id for case in cases]
        folds = folds_of(self.name, users)
        said = self._said([case.request for case in cases])
        self._mute = np.array(
            [values[~np.isnan(values)].mean() if (~np.isnan(values)).any() else 0 for values in said.T]
        )
        features = self._features(said)
        truth = np.array([float(case.truth) for case in cases])
        self._bounds = (0.0, 1.0) if self._judges else (float(truth.min()), float(truth.max()))
        forms = [("logit" if self._judges else "ridge", penalty) for penalty in _PENALTIES]
        forms += [("alone", float(place)) for place in range(len(self.parts))]
        names = self.names
        said_of = {each: names[int(each[1])] if each[0] == "alone" else f"penalty {each[1]:g}" for each in forms}
        if only is not None:
            forms = [each for each in forms if (each[0], said_of[each]) == (only.form, only.name)]
        crossed = {each: self._crossed(*each, features, truth, folds) for each in forms}
        errors = {each: float(found.mean()) for each, found in crossed.items()}
        self.tried = tuple(
            Tried(each[0], said_of[each], -error)  # type: ignore[arg-type]
            for each, error in errors.items()
        )
        form, setting = min(errors, key=lambda each: errors[each])
        self._line = self._fit(form, setting, features, truth)
        low, high = self._limits(self._line, features, truth, users) if form != "alone" else ((), ())
        self.weights = Weights(form, tuple(self._line.weights.tolist()), 0.0, low, high)  # type: ignore[arg-type]
        if dissect and form != "alone":
            rest = [
                self._crossed(form, setting, np.delete(features, place, axis=1), truth, folds)
                for place in range(len(names))
            ]
            # Values of ratings are squared errors.
            statistic: StatisticName = "mean" if self._judges else "root_mean"
            self.without = tuple(
                left_out(name, values, crossed[form, setting], users, statistic)
                for name, values in zip(names, rest, strict=True)
            )

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer every request with a rating or a probability; see `Predictor.answer`."""
        weights = self.fitted
        assert weights is not None and self._line is not None
        values = self._line.of(self._features(self._said(requests))) if requests else np.empty(0)
        values = expit(values) if self._judges else np.clip(values, *self._bounds)
        made = Probability if self._judges else Rating
        return [made(request_id=r.id, value=float(v)) for r, v in zip(requests, values, strict=True)]

    # ----------------------------------------------------------------------- parts

    def _said(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        """Return what each part answers, log-odds of probabilities, NaN where it is mute, shape (n, parts)."""
        columns = []
        for _, part in self.parts:
            answers = part.answer(requests)
            values = np.array([a.value if isinstance(a, Rating | Probability) else np.nan for a in answers])
            columns.append(logit(np.clip(values, _SURE, 1 - _SURE)) if self._judges else values)
        return np.stack(columns, axis=1)

    def _features(self, said: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return answers with the part's mean over the cases of the fit where it is mute."""
        return np.where(np.isnan(said), self._mute, said)

    def _crossed(
        self,
        form: str,
        setting: float,
        features: NDArray[np.float64],
        truth: NDArray[np.float64],
        folds: NDArray[np.int64],
    ) -> NDArray[np.float64]:
        """Return the error of each case under weights that were fitted to the other folds, shape (n,)."""
        found = np.empty(len(truth))
        for fold in range(FOLDS):
            inside, outside = folds != fold, folds == fold
            line = self._fit(form, setting, features[inside], truth[inside])
            found[outside] = self._error(line.of(features[outside]), truth[outside])
        return found

    def _fit(self, form: str, setting: float, features: NDArray[np.float64], truth: NDArray[np.float64]) -> _Line:
        count = features.shape[1]
        if form == "alone":
            return _Line(0.0, np.eye(count)[int(setting)])
        means, scales = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-9)
        wide = (features - means) / scales
        penalty = setting * len(truth)
        if form == "ridge":
            inverse = np.linalg.solve(wide.T @ wide + penalty * np.eye(count), wide.T @ (truth - truth.mean()))
            weights = inverse / scales
            return _Line(float(truth.mean() - means @ weights), weights)

        def loss(free: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            total = free[0] + wide @ free[1:]
            error = expit(total) - truth
            value = np.logaddexp(0, total).sum() - truth @ total + penalty / 2 * free[1:] @ free[1:]
            return float(value), np.concatenate([[error.sum()], wide.T @ error + penalty * free[1:]])

        found = minimize(loss, np.zeros(count + 1), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
        weights = found[1:] / scales
        return _Line(float(found[0] - means @ weights), weights)

    def _error(self, values: NDArray[np.float64], truth: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return squared errors of ratings, and the log-loss of probabilities, shape (n,)."""
        if self._judges:
            return np.asarray(np.logaddexp(0, values) - truth * values)
        return np.asarray((np.clip(values, *self._bounds) - truth) ** 2)

    def _limits(
        self, line: _Line, features: NDArray[np.float64], truth: NDArray[np.float64], users: Sequence[str]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return 95 % limits of the weights, robust and clustered over users (White, Econometrica 1982)."""
        wide = np.column_stack([np.ones(len(truth)), features])
        values = line.of(features)
        if self._judges:
            chance = expit(values)
            scores, curvature = wide * (chance - truth)[:, None], (wide * (chance * (1 - chance))[:, None]).T @ wide
        else:
            scores, curvature = wide * (values - truth)[:, None], wide.T @ wide
        low, high = limits_of(np.array([line.intercept, *line.weights]), scores, curvature, users)
        return low[1:], high[1:]
