"""Slices use training counts only, contain every case once, and average their cases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset
from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.predictor import evaluate
from llmrec.evaluate.slices import SMALL_SLICE, case_slices, slice_figures, target_slices
from llmrec.metrics.signature import parse_signature
from llmrec.results import Metric
from llmrec.tasks.family import family_of
from llmrec.types import Answer, Case, Event, Item, Rating, Request

PROTOCOL = EvalProtocol(split="loo/test", candidates="full", cutoffs=(1,), resamples=100, seed=0, catalogue=5)


def split_of(train: list[tuple[str, str]], held: list[tuple[str, str]] = []) -> SplitDataset:  # noqa: B006
    def frame(pairs: list[tuple[str, str]]) -> pl.DataFrame:
        names = {"user_id": pl.String, "item_id": pl.String}
        values = {"rating": pl.Float64, "timestamp": pl.Float64, "text": pl.String}
        rows = [(user, item, 3.0, 1.0, None) for user, item in pairs]
        return pl.DataFrame(rows, schema=names | values, orient="row")

    rows = frame(train + held)
    items = {item: Item(item_id=item, title=item) for item in sorted({*rows["item_id"], *"abcde"})}
    return SplitDataset(
        dataset=Dataset(name="made", noun="things", interactions=rows, items=items),
        kind="leave_one_out",
        seed=0,
        train=frame(train),
        valid=frame([]),
        test=frame(held),
        held_out=frozenset(held),
    )


TRAIN = [*((f"u{n}", "a") for n in range(8)), *((f"u{n}", "b") for n in range(6)), *(("u0", item) for item in "cef")]


def case(user: str, truth: str, history: int) -> Case:
    events = tuple(Event(item_id="a") for _ in range(history))
    return Case(request=Request(id=f"{user}/{truth}", user_id=user, history=events), truth=truth)


def members(slices: dict[str, NDArray[np.bool_]]) -> dict[str, list[int]]:
    """Return the cases of every slice that has any."""
    return {name: np.flatnonzero(member).tolist() for name, member in slices.items() if member.any()}


def test_slices_by_hand() -> None:
    # Training counts: a 8, b 6, c 1, d 0. a and b make 14 of 17, which is the first share of at least .8.
    cases = [case("u0", "a", 7), case("u1", "c", 1), case("u2", "d", 60), case("u9", "b", 0)]
    result = case_slices(cases, split_of(TRAIN))
    assert members(result) == {
        "item:cold-below-5": [1, 2],
        "item:warm-from-5": [0, 3],
        "item:head-0.8": [0, 3],
        "item:long-tail-0.8": [1, 2],
        "history:0-4": [1, 3],
        "history:5-9": [0],
        "history:from-50": [2],
        "activity:0-4": [1, 2, 3],
        "activity:5-9": [0],
    }
    assert {"history:10-19", "history:20-49", "activity:from-50"} <= result.keys()


def test_targets_are_binned_by_training_interactions_words_and_history() -> None:
    cases = [case("u0", "a", 3), case("u1", "c", 1), case("u2", "d", 60), case("u9", "b", 0)]
    assert members(target_slices(cases, split_of(TRAIN))) == {
        "count:0-0": [2],
        "count:1-4": [1],
        "count:5-19": [0, 3],
        "history:0-4": [0, 1, 3],
        "history:from-50": [2],
    }
    bare = split_of(TRAIN)
    items = {item: Item(item_id=item, title=f"the {item}") for item in bare.dataset.items}
    titled = replace(bare, dataset=replace(bare.dataset, items=items))
    assert not any(name.startswith("words") for name in target_slices(cases, bare))
    result = target_slices(cases, titled)
    assert result["words:0-7"].all()
    assert "words:from-32" in result and not any(
        name.startswith("words") for name in target_slices([], split_of(TRAIN))
    )


@pytest.mark.parametrize(("counts", "head"), [((6, 2, 2), [0, 1, 2]), ((8, 1, 1), [0])])
def test_items_tied_with_the_last_head_item_are_head_items(counts: tuple[int, ...], head: list[int]) -> None:
    train = [(f"u{n}", item) for item, count in zip("abc", counts, strict=True) for n in range(count)]
    result = case_slices([case("u0", item, 1) for item in "abc"], split_of(train))
    assert members(result)["item:head-0.8"] == head


def test_held_out_rows_do_not_change_slices() -> None:
    cases = [case("u0", "d", 2), case("u1", "a", 2)]
    before = case_slices(cases, split_of(TRAIN))
    after = case_slices(cases, split_of(TRAIN, [(f"v{n}", "d") for n in range(50)] + [("u1", "e")] * 9))
    assert members(before) == members(after)


@given(rows=st.lists(st.tuples(st.sampled_from(["u0", "u1", "u2"]), st.sampled_from("abcde"), st.integers(0, 60))))
def test_each_case_is_in_one_slice_per_kind(rows: list[tuple[str, str, int]]) -> None:
    cases = [case(*row) for row in rows]
    result = case_slices(cases, split_of(TRAIN))
    for kinds in (("item:cold", "item:warm"), ("item:head", "item:long"), ("history:",), ("activity:",)):
        slices = [member for name, member in result.items() if name.startswith(kinds)]
        if slices:
            assert np.sum(slices, axis=0).tolist() == [1] * len(cases)
        else:
            assert not cases


def test_metrics_of_slices_are_means_of_their_cases() -> None:
    cases = [case(f"u{k % 4}", "a" if k % 3 else "c", k % 6) for k in range(90)]
    values = np.random.default_rng(0).random(90)
    row = {"MRR": Metric(value=None, signature=PROTOCOL.sign("MRR", seen="included"))}
    figures = slice_figures({"MRR": values}, cases, split_of(TRAIN), metrics=row, protocol=PROTOCOL)
    slices = case_slices(cases, split_of(TRAIN))
    assert [figure.name for figure in figures] == list(slices)
    for figure in figures:
        member = slices[figure.name]
        assert figure.n == member.sum()
        assert figure.small == (figure.n < SMALL_SLICE)
        if figure.n:
            metric = figure.metrics["MRR"]
            assert metric.value == pytest.approx(values[member].mean())
            assert metric.low <= metric.value <= metric.high
            sign = parse_signature(metric.signature)
            assert (sign.slice, sign.seen) == (figure.name, "included")
            assert metric.signature != row["MRR"].signature
    assert sum(figure.users for figure in figures if figure.name.startswith("activity")) == 4


def test_empty_and_small_slices_are_marked() -> None:
    cases = [case("u0", "a", 1)] * 3
    row = {"MRR": Metric(value=None, signature=PROTOCOL.sign("MRR"))}
    result = slice_figures({"MRR": np.ones(3)}, cases, split_of(TRAIN), metrics=row, protocol=PROTOCOL)
    figures = {figure.name: figure for figure in result}
    assert (figures["item:cold-below-5"].n, figures["item:cold-below-5"].metrics) == (0, {})
    assert (figures["item:warm-from-5"].n, figures["item:warm-from-5"].small) == (3, True)


def test_rmse_by_slices_of_the_rated_item() -> None:
    class Three:
        name = "three"

        def answer(self, requests: list[Request]) -> list[Answer]:
            return [Rating(request_id=request.id, value=3.0) for request in requests]

    cases = [
        Case(request=Request(id=f"r{k}", user_id="u0", item=item), truth=truth)
        for k, (item, truth) in enumerate([("a", 5.0), ("a", 1.0), ("c", 4.0)])
    ]
    row = evaluate(Three(), cases, name="rating", kind=family_of("rating").answer, protocol=PROTOCOL)  # type: ignore[arg-type]
    result = slice_figures(row.values, cases, split_of(TRAIN), metrics=row.figures.metrics, protocol=PROTOCOL)
    figures = {figure.name: figure.metrics for figure in result}
    assert figures["item:warm-from-5"]["RMSE"].value == pytest.approx(2.0)
    assert figures["item:cold-below-5"]["RMSE"].value == pytest.approx(1.0)


def test_cases_without_an_item_have_no_item_slices() -> None:
    cases = [Case(request=Request(id="r", user_id="u0"), truth="some text")]
    assert not any(name.startswith("item:") for name in case_slices(cases, split_of(TRAIN)))


def test_slices_by_age_are_quarters_of_held_out_rows() -> None:
    users = [f"u{n}" for n in range(8)]
    data = split_of(TRAIN, [(user, "d") for user in users])
    times = pl.Series("timestamp", [80.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0])
    data = replace(data, test=data.test.with_columns(times))
    cases = [case(user, "d", 1) for user in users]
    assert not [name for name in case_slices(cases, data) if name.startswith("age")]

    result = case_slices(cases, replace(data, kind="global_time"))

    ages = {name: rows for name, rows in members(result).items() if name.startswith("age")}
    assert [sorted(times[row] for row in rows) for rows in ages.values()] == [[n, n + 10.0] for n in (10, 30, 50, 70)]
    # A sample of users does not change the edges.
    some = case_slices(cases[:3], replace(data, kind="global_time"))
    assert [int(some[name].sum()) for name in ages] == [2, 0, 0, 1]
    untimed = replace(data, kind="global_time", test=data.test.with_columns(timestamp=pl.lit(None, dtype=pl.Float64)))
    assert not [name for name in case_slices(cases, untimed) if name.startswith("age")]
