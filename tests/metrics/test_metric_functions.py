"""Metrics as functions of lists: means and values by user, equal to those of `llmrec.score`."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import polars as pl
import pytest

import llmrec
from llmrec import metrics
from llmrec.errors import RecipeError
from llmrec.registry import METRICS
from tests.facts import Facts, raises

LISTS = {"u1": ["a", "b", "c"], "u2": ["c", "d"], "u3": ["x"]}
TRUTH = {"u1": ["b"], "u2": ["e", "c"], "u4": ["a"]}


def test_mean_and_values_per_user() -> None:
    # u4 has no list and counts as 0; u3 has no relevant item.
    values = {"u1": 1 / math.log2(3), "u2": 1 / (1 + 1 / math.log2(3)), "u4": 0.0}
    assert metrics.ndcg.per_user(LISTS, TRUTH, k=2) == pytest.approx(values)
    assert metrics.ndcg(LISTS, TRUTH, k=2) == pytest.approx(sum(values.values()) / 3)
    assert metrics.hr(LISTS, TRUTH, k=1) == pytest.approx(1 / 3)
    assert metrics.recall.per_user(LISTS, TRUTH)["u2"] == 0.5
    assert metrics.mrr(LISTS, TRUTH, k=None) == pytest.approx((0.5 + 1) / 3)
    graded = metrics.ndcg.per_user({"u": ["a", "b"]}, {"u": {"a": 1, "b": 3}}, graded=True)["u"]
    assert graded == pytest.approx((1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3)))


def test_values_equal_those_of_score() -> None:
    lists: Any = [{"user": user, "item": item} for user, items in LISTS.items() for item in items]
    truth = [{"user": user, "item": item} for user, items in TRUTH.items() for item in items]
    scores = llmrec.score(lists, truth, k=(2,), resamples=10)
    for name in dir(metrics):
        metric = getattr(metrics, name)
        assert metric(LISTS, TRUTH, k=2) == pytest.approx(scores.metrics[f"{metric.name}@2"].value), name
    value = metrics.ndcg(LISTS, TRUTH, k=2)
    for frame in (pl.DataFrame, pd.DataFrame):
        assert metrics.ndcg(frame(lists), frame(truth), k=2) == value
    assert metrics.ndcg([LISTS["u1"], LISTS["u2"]], [["b"], ["c"]], k=2) == metrics.ndcg(
        {"0": LISTS["u1"], 1: LISTS["u2"]}, {0: "b", 1: "c"}, k=2
    )


def test_names_and_errors() -> None:
    assert set(dir(metrics)) == {name.lower() for name, entry in METRICS.items() if entry.several} >= {"ndcg", "recall"}
    assert repr(metrics.ndcg).startswith("NDCG: ")
    with pytest.raises(AttributeError):
        metrics.nothing  # noqa: B018
    for k in (0, None, "5", 2.5, True):
        with raises(RecipeError, Facts(kind="bad-value", column="k")):
            metrics.ndcg(LISTS, TRUTH, k=k)
