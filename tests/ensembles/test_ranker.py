"""The trees of an ensemble: they learn what weights cannot, and noise selects nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from llmrec.ensembles import weights as forms
from llmrec.ensembles.cells import CandidateScores
from llmrec.ensembles.context import ContextFeatures
from llmrec.ensembles.members import restore_weights, weights_record
from llmrec.ensembles.trees import TREE_COUNTS, Trees, TreeSetting, fit_trees, select_setting
from llmrec.ensembles.weights import (
    FitFunction,
    Weights,
    extend_base,
    fit_logit,
    fit_pool,
    fit_ranker,
    fit_single_member,
    parse_tree_setting,
    select_form,
    tune_ranker,
)
from llmrec.errors import ModelError
from llmrec.pipeline.leaks import changed_features, with_random_holdouts
from llmrec.pipeline.study import load_split
from llmrec.recipe.schema import DataSection
from llmrec.results import FusionWeights
from llmrec.types import Request
from tests.facts import Facts, raises

pytest.importorskip("lightgbm")

CASES, ITEMS = 1500, 30


def _cells(
    members: Sequence[NDArray[np.float64]], truth: NDArray[np.int64], **context: NDArray[np.float64]
) -> CandidateScores:
    many = len(truth)
    starts = np.arange(many + 1) * ITEMS
    return CandidateScores(
        tuple(f"m{n}" for n in range(len(members))),
        ("logits",) * len(members),
        starts,
        np.stack([values.ravel() for values in members]).astype(np.float32),
        np.zeros(many * ITEMS, dtype=bool),
        truth + starts[:-1],
        {name: values.ravel().astype(np.float32) for name, values in context.items()},
    )


def _linear(cells: CandidateScores) -> dict[tuple[str, str], FitFunction]:
    """All forms except trees."""
    fits = {("logit", "logit"): partial(fit_logit, repeats=False), ("pool", "pool"): partial(fit_pool, repeats=False)}
    fits |= {("alone", name): partial(fit_single_member, member=n, repeats=False) for n, name in enumerate(cells.names)}
    return {key: lambda rows, start, fit=fit: fit(cells.of(rows), start) for key, fit in fits.items()}


def _drawn(rng: np.random.Generator, logits: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.asarray((logits + rng.gumbel(size=logits.shape)).argmax(axis=1))


def _switched(rng: np.random.Generator) -> CandidateScores:
    """One member is right for users with a short history, the other for users with a long one."""
    one, other = (rng.normal(0, 2, (CASES, ITEMS)) for _ in range(2))
    long = rng.random(CASES) < 0.5
    truth = _drawn(rng, np.where(long[:, None], other, one))
    return _cells([one, other], truth, long=np.repeat(long[:, None], ITEMS, axis=1))


FOLDS = np.arange(CASES) % 5
USERS = [f"u{n}" for n in range(CASES)]


def test_ranker_learns_what_weights_cannot() -> None:
    rng = np.random.default_rng(0)
    cells, fresh = _switched(rng), _switched(rng)
    result = tune_ranker(cells, FOLDS)
    assert result is not None
    setting, values = result
    linear = _linear(cells)
    every = np.arange(CASES)
    fitted = {form: fit(every, None) for form, fit in linear.items()}
    crossed = {form: forms.cross_fitted_ndcgs(cells, fit, fitted[form], FOLDS) for form, fit in linear.items()}
    assert values.mean() > max(item.mean() for item in crossed.values()) + 0.03
    # The cross-fitted value equals that of new users.
    weights = fit_ranker(cells, setting=setting)
    assert fresh.ndcg(weights.scores(fresh)).mean() == pytest.approx(values.mean(), abs=0.02)
    assert weights.trees is not None and weights.trees.gains["long"] > 0.01
    assert select_form({**crossed, "ranker": values}, "ranker", USERS) == "ranker"


def test_noise_gains_nothing() -> None:
    """The cross-fitted value of noise is that of a random ranking."""
    rng = np.random.default_rng(0)
    count = 600
    members = [rng.normal(0, 1, (count, ITEMS)) for _ in range(3)]
    cells = _cells(members, rng.integers(0, ITEMS, count))
    result = tune_ranker(cells, FOLDS[:count])
    assert result is not None
    random = (1 / np.log2(np.arange(2, 12))).sum() / ITEMS
    assert result[1].mean() == pytest.approx(random, abs=3 * result[1].std() / count**0.5)


def test_trees_need_a_gain_of_one_standard_error() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(400)
    noise = rng.normal(0, 0.2, 400)
    noise -= noise.mean()
    error = 0.2 / 400**0.5
    users = [str(n) for n in range(400)]
    for gain, chosen_form in ((0.5, "weights"), (2.0, "ranker")):
        values = {"member": base - 0.1, "weights": base, "ranker": base + noise + gain * error}
        assert select_form(values, "ranker", users) == chosen_form
        assert select_form({"member": base - 0.1, "weights": base}, None, users) == "weights"
    # The same gain is less certain if the cases of a user are correlated.
    alike = np.repeat(rng.normal(0, 0.2, 10), 40)
    alike -= alike.mean()
    values = {"weights": base, "ranker": base + alike + 2 * error}
    assert select_form(values, "ranker", users) == "ranker"
    assert select_form(values, "ranker", [str(n // 40) for n in range(400)]) == "weights"


def test_setting_is_evaluated_on_other_folds() -> None:
    """The best of many settings without effect is not better on folds that did not choose it."""
    rng = np.random.default_rng(1)
    values = {TreeSetting("binary", count): rng.normal(0, 1, CASES) for count in range(200)}
    setting, apart = select_setting(values, FOLDS)
    assert values[setting].mean() > 2 / CASES**0.5
    assert abs(apart.mean()) < 2 / CASES**0.5


def test_trees_equal_lightgbm() -> None:
    import lightgbm

    rng = np.random.default_rng(2)
    features = rng.normal(0, 1, (3000, 4)).astype(np.float32)
    # Values that are missing, in one column often enough to be learned from.
    features[rng.random(len(features)) < 0.3, 1] = np.nan
    labels = (np.nan_to_num(features[:, 0]) + np.isnan(features[:, 1]) > 0.5).astype(np.int8)
    for objective in ("lambdarank", "binary"):
        booster = fit_trees(features, labels, np.full(300, 10), TreeSetting(objective, 20))
        trees = Trees(booster.model_to_string(), tuple("abcd"))
        other = features.copy()
        other[::7, 3] = np.nan  # never missing in training
        for rows in (features, other):
            assert trees.scores(rows) == pytest.approx(booster.predict(rows, raw_score=True), abs=1e-12)
            *parts, mean = booster.predict(rows[:500], pred_contrib=True).T
            assert trees.contributions(rows[:500]) == pytest.approx(np.array(parts).T, abs=1e-9)
            assert trees.contributions(rows[:500]).sum(axis=1) + mean == pytest.approx(trees.scores(rows[:500]))
        assert np.array_equal(trees.scores(features)[5:6], trees.scores(features[5:6]))
        gains = booster.feature_importance("gain")
        assert list(trees.gains.values()) == pytest.approx(gains / gains.sum(), rel=1e-4)
    constant = lightgbm.train({"objective": "regression", "verbose": -1}, lightgbm.Dataset(features, np.zeros(3000)), 2)
    nothing = Trees(constant.model_to_string(), tuple("abcd"))
    assert np.all(nothing.scores(features) == 0) and not nothing.contributions(features[:9]).any()
    assert trees.contributions(features[:0]).shape == (0, 4)


def test_damaged_trees_are_one_error() -> None:
    rng = np.random.default_rng(3)
    features = rng.normal(0, 1, (2000, 3)).astype(np.float32)
    labels = (features[:, 0] > 0).astype(np.int8)
    text = fit_trees(features, labels, np.full(200, 10), TreeSetting("binary", 5)).model_to_string()
    refused = 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        letters = list(text)
        for index in random.integers(0, len(letters), random.integers(1, 10)):
            letters[index] = str(random.choice(list("0123456789- =.\nxe")))
        try:
            assert np.isfinite(Trees("".join(letters), tuple("abc")).scores(features[:50])).all()
        except ModelError as error:
            refused += error.kind == "damaged"
    assert 10 < refused < 100
    wrong_count = text.replace("leaf_count=", "leaf_count=1", 1)
    for wrong in ("", "tree\nversion=v4\nnonsense", text.replace("left_child=", "left_child=1 ", 1), wrong_count):
        with raises(ModelError, Facts(kind="damaged")):
            Trees(wrong, tuple("abc")).scores(features)
    with raises(ModelError, Facts(kind="damaged")):
        Trees(text, ("a",)).scores(np.zeros((1, 1), dtype=np.float32) if "split_feature=2" in text else features)


def test_weights_are_restored_from_their_record() -> None:
    cells = _switched(np.random.default_rng(5))
    trees = fit_ranker(cells, setting=TreeSetting("lambdarank", TREE_COUNTS[1]))
    joined = Weights("logit", (0.0, 0.3), base=trees, scale=0.9)
    for weights in (trees, joined, Weights("pool", (0.4, 0.6), -2.0)):
        record = FusionWeights.model_validate_json(weights_record(weights, cells.names).model_dump_json())
        assert np.array_equal(restore_weights(record).scores(cells), weights.scores(cells))
    record = weights_record(trees, cells.names)
    assert record.trees is not None and sum(feature.gain or 0 for feature in record.features) == pytest.approx(1)
    damaged = record.model_copy(update={"trees": record.trees.model_copy(update={"text": "no base64"})})
    with raises(ModelError, Facts(kind="damaged")):
        restore_weights(damaged)


def test_contributions_sum_to_the_score() -> None:
    cells = _switched(np.random.default_rng(7))
    cells = replace(cells, in_history=np.arange(len(cells.in_history)) % 7 == 0).of(np.arange(20))
    trees = fit_ranker(_switched(np.random.default_rng(5)), setting=TreeSetting("lambdarank", 20))
    for weights, names in (
        (trees, {"m0", "m1", "long"}),
        (Weights("logit", (0.4, -0.6), -2.0), {"m0", "m1", "in history"}),
        (Weights("logit", (0.0, 0.3), base=trees, scale=0.9), {"m0", "m1", "long"}),
        (Weights("pool", (0.4, 0.6), -2.0), {"m0", "m1"}),
        (Weights("alone", (0.0, 1.0)), {"m1"}),
    ):
        parts, scores = weights.contributions(cells), weights.scores(cells)
        values = np.exp(scores) if weights.form == "pool" else scores
        assert set(parts) == names
        centred = values - cells.total(values)[cells.rows] / ITEMS
        assert sum(parts.values()) == pytest.approx(centred, rel=1e-6, abs=1e-6)


def test_members_are_added_to_a_ranker() -> None:
    """A third member, fitted on few users, is added to a ranker fitted on many."""
    rng = np.random.default_rng(6)
    cells = _switched(rng)
    assert cells.truth is not None
    third = np.where(np.isin(np.arange(len(cells.in_history)), cells.truth), 1.5, 0.0) + rng.normal(
        0, 1, len(cells.in_history)
    )
    more = replace(
        cells, names=("m0", "m1", "m2"), kinds=("logits",) * 3, raw=np.vstack([cells.raw, third.astype(np.float32)])
    )
    base = replace(fit_ranker(cells, setting=TreeSetting("lambdarank", 40)), parts=(0.5, 0.5, 0.0))
    few, rest = more.of(np.arange(100)), more.of(np.arange(100, CASES))
    both = extend_base(few, base, [2])
    assert both.base == base and both.parts[2] > 0.3 and both.scale > 0.3
    assert rest.ndcg(both.scores(rest)).mean() > rest.ndcg(base.scores(rest)).mean() + 0.03


def test_members_are_added_to_a_single_member() -> None:
    cells = _switched(np.random.default_rng(6))
    alone, logit = (extend_base(cells, Weights(form, (1.0, 0.0)), [1]) for form in ("alone", "logit"))
    assert alone == logit


def test_without_hits_an_ensemble_stays_as_it_is() -> None:
    cells = _switched(np.random.default_rng(6))
    none = cells.of(np.arange(0))
    assert extend_base(none, Weights("logit", (1.0, 0.0)), [1]).parts == (1.0, 0.0)


def test_setting_is_restored_from_its_name() -> None:
    setting = TreeSetting("lambdarank", 40)
    assert parse_tree_setting(forms.EnsembleTrial("ranker", setting.name, 0.1)) == setting
    assert parse_tree_setting(forms.EnsembleTrial("logit", "logit", 0.1)) is None


def test_features_do_not_depend_on_held_out_data() -> None:
    """A planted leak, popularity that counts held-out events, is detected."""
    data = load_split(DataSection(source="made-reviews"), 0)
    other = with_random_holdouts(with_random_holdouts(data, "valid", 1), "test", 2)
    requests = [
        Request(id=str(n), user_id=user, history=data.train_events(user)) for n, user in enumerate(data.users())
    ]
    leaky = [replace(known, train=pl.concat([known.train, known.test])) for known in (data, other)]
    for one, two, leak in ((data, other, False), (*leaky, True)):
        cells = []
        for known in (one, two):
            context = ContextFeatures(known)
            codes = np.tile(np.arange(len(context.ids)), len(requests))
            rows = np.repeat(np.arange(len(requests)), len(context.ids))
            features = context.features(requests, rows, codes)
            starts = np.arange(len(requests) + 1) * len(context.ids)
            nothing = np.zeros((1, len(rows)), dtype=np.float32)
            cells.append(
                CandidateScores(("m",), ("logits",), starts, nothing, np.zeros(len(rows), bool), None, features)
            )
        assert "item: popularity" in cells[0].context
        assert bool(changed_features(*cells)) is leak
