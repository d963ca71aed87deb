"""A band: no target of a long list reads more lines than evaluation shows, as far as one layer goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llmrec.backends.encode import IGNORED, Encoder, TokenRow
from llmrec.models.load import load_model, load_tokenizer
from llmrec.pipeline.study import build_study
from llmrec.pipeline.training import plan_training
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import ModelSection, TrainSection
from llmrec.train.batches import fit_row
from llmrec.train.loss import packed_loss
from llmrec.train.packing import bins, stack, tree
from llmrec.types import Example, Message, Segment
from tests.conftest import make_model, make_tokenizer

TITLES = ("Toy Story", "Heat", "Fargo", "Casino", "Alien", "Brazil", "Jaws", "Rocky")


def example(titles: tuple[str, ...] = TITLES, lead: str = "", tail: str = "\n") -> Example:
    answer = [Segment("item", titles[0] + tail)]
    for title in titles[1:]:
        answer += [*([Segment("text", lead)] if lead else []), Segment("target", title + tail)]
    return Example(
        id="e",
        user_id="u",
        task="sequential",
        template="sequential/x",
        messages=(Message("user", (Segment("text", "Continue the list"),)),),
        answer=tuple(answer),
        ends_turn=False,
    )


def listed(lengths: list[int], question: int = 3) -> TokenRow:
    """A row of a question and lines of given lengths, all but the first line with loss."""
    starts = [question + sum(lengths[:n]) for n in range(len(lengths))]
    size = question + sum(lengths)
    ids = tuple(range(10, 10 + size))
    quiet = question + lengths[0]
    return TokenRow(ids, (*[IGNORED] * quiet, *ids[quiet:]), tuple(starts))


def seen(packed: Any) -> Any:
    columns = np.arange(len(packed.ids))
    return (columns <= columns[:, None]) & (columns[:, None] < packed.ends)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=9), st.integers(1, 5), st.integers(1, 4))
def test_every_target_reads_the_question_and_so_many_lines(lengths: list[int], band: int, question: int) -> None:
    row = listed(lengths, question)
    packed = tree([row], band)
    visible = seen(packed)
    line = np.searchsorted(np.array(row.lines), np.arange(len(row.ids)), side="right") - 1
    for column, token in zip(packed.after.tolist(), packed.wanted.tolist(), strict=True):
        target = column + 1
        assert row.ids[target] == token
        wanted = [at for at in range(target) if at < question or line[at] >= line[target] - band]
        assert np.flatnonzero(visible[column]).tolist() == wanted


@given(
    st.lists(st.lists(st.integers(1, 3), min_size=2, max_size=7), min_size=1, max_size=6),
    st.integers(1, 3),
    st.integers(10, 60),
)
def test_rows_of_a_bin_stay_apart_and_are_counted(rows: list[list[int]], band: int, width: int) -> None:
    made = [listed(lengths) for lengths in rows] + [TokenRow((1, 2, 3), (IGNORED, 2, 3))]
    for filled in bins(made, width, band):
        packed = tree(filled.rows, band)
        assert len(packed.ids) == filled.columns
        assert filled.columns <= width or len(filled.rows) == 1
        found = sorted(
            (tuple(packed.ids[mask].tolist()), token)
            for mask, token in zip(seen(packed)[packed.after], packed.wanted.tolist(), strict=True)
        )
        wanted = sorted(
            (tuple(single.ids[mask].tolist()), token)
            for each in filled.rows
            for single in [tree([each], band)]
            for mask, token in zip(seen(single)[single.after], single.wanted.tolist(), strict=True)
        )
        assert found == wanted


def test_without_a_cut_a_band_changes_nothing() -> None:
    row = listed([2, 3, 1])
    for band in (2, 5):
        assert tree([row], band).ends.tolist() == tree([row]).ends.tolist()
    assert tree([row], 1).ends.tolist() != tree([row]).ends.tolist()


@pytest.mark.parametrize(("lead", "tail"), [("", "\n"), ("Next: ", "\n"), ("", "\n\n")])
def test_rows_know_where_their_lines_begin(lead: str, tail: str) -> None:
    encoder = Encoder(make_tokenizer(), max_length=512)
    asked = example(lead=lead, tail=tail)
    row = fit_row(asked, encoder, 512, lines=True)
    assert row is not None
    plain = encoder.row(asked)
    assert (row.ids, row.labels) == (plain.ids, plain.labels)
    texts = [
        encoder.tokenizer.decode(list(row.ids[start:end]))
        for start, end in zip(row.lines, [*row.lines[1:], len(row.ids)], strict=True)
    ]
    assert texts == [f"{lead if n else ''}{title}{tail}" for n, title in enumerate(TITLES)]
    cut = fit_row(asked, encoder, row.lines[4] + 1, lines=True)
    assert cut is not None
    assert cut.lines == row.lines[:5]
    assert fit_row(asked, encoder, 512) == plain


def losses(model: Any, row: TokenRow, band: int | None) -> list[float]:
    """The loss of every target of a packed row."""
    packed = stack([tree([row], band)], 0)
    found = []
    for n in range(len(packed.after)):
        one = {"after": packed.after[n : n + 1], "wanted": packed.wanted[n : n + 1]}
        parts = {"ids": packed.ids, "places": packed.places, "ends": packed.ends, **one}
        with torch.no_grad():
            found.append(float(packed_loss(model, {name: torch.from_numpy(each) for name, each in parts.items()})[0]))
    return found


def one_by_one(model: Any, row: TokenRow, band: int) -> list[float]:
    """The same from a row a target that holds the question and the lines of its window alone, at their places."""
    line = np.searchsorted(np.array(row.lines), np.arange(len(row.ids)), side="right") - 1
    found = []
    for target in np.flatnonzero(np.array(row.labels) != IGNORED).tolist():
        kept = [at for at in range(target) if line[at] < 0 or line[at] >= line[target] - band]
        mask = torch.ones(len(kept), len(kept)).tril().bool()[None, None]
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([[row.ids[at] for at in kept]]),
                position_ids=torch.tensor([kept]),
                attention_mask=mask,
            ).logits[0, -1]
        found.append(float(-logits.log_softmax(-1)[row.ids[target]]))
    return found


@pytest.mark.parametrize("layers", [1, 2])
def test_one_layer_reads_the_window_and_deeper_ones_leak_through_states(layers: int, tmp_path: Path) -> None:
    """What DTI calls hidden-state leakage: exact in one layer, and there in two, though less than without a band."""
    folder = make_model(tmp_path / "made", layers=layers)
    section = ModelSection(name=str(folder), dtype="float32")
    model = load_model(str(folder), section).eval()
    row = fit_row(example(), Encoder(load_tokenizer(str(folder), section), max_length=512), 512, lines=True)
    assert row is not None
    windows = np.array(one_by_one(model, row, 2))
    banded, free = (np.abs(np.array(losses(model, row, band)) - windows) for band in (2, None))
    # The first targets have no more lines before them than the window shows.
    inside = np.flatnonzero(np.array(row.labels) != IGNORED) < row.lines[3]
    assert inside.any()
    assert banded[inside].max() < 1e-4
    assert free[inside].max() < 1e-4
    assert free[~inside].mean() > 0.01
    if layers == 1:
        assert banded.max() < 1e-4
    else:
        assert banded[~inside].max() > 1e-3
        assert banded[~inside].mean() < free[~inside].mean()


def test_a_plan_with_a_band_packs_rows_that_know_their_lines() -> None:
    tasks = "tasks={rating: {}, sequential: {templates: [continue-list], window: 8}}"
    base = ["reviews=null", "data={source: made-reviews}", "eval.candidates.count=5", "eval.backend=hf", tasks]
    settings = ["train.steps=6", "train.packing=tree", "train.band=3"]
    study = build_study(load_recipe("recipes/movielens-100k/four-tasks.yaml", [*base, *settings]))
    planned = plan_training(study, Encoder(make_tokenizer(), max_length=2048))
    assert all(each.band == 3 for step in planned.steps for each in step.bins)
    longest = max((row for step in planned.steps for row in step.rows), key=lambda row: len(row.lines))
    assert len(longest.lines) > 4
    assert longest.lines[0] > 5
    assert tree([longest], 3).ends.tolist() != tree([longest]).ends.tolist()


def test_a_band_takes_packing() -> None:
    assert TrainSection(packing="tree", band=4).band == 4
    with pytest.raises(ValidationError, match=r"train\.packing=tree"):
        TrainSection(band=4)
