"""`llmrec compress`: the front, the choice, and an export that answers as its row says."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import pytest
import torch
from typer.testing import CliRunner

from llmrec.cli.main import app
from llmrec.errors import LlmrecError
from llmrec.exports.files import SUMS, verify
from llmrec.models.load import load_config, load_model
from llmrec.pipeline import bundle
from llmrec.pipeline import run as pipeline
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import ModelSection
from llmrec.recipe.shared import Dtype
from llmrec.systems.m6.compress import compress as compressing
from llmrec.systems.m6.compress.compress import TABLE, Compressed, Row, chosen, compress, with_front
from tests.conftest import make_model
from tests.facts import Facts, raises
from tests.pipeline.test_ctr_run import SMALL

ROWS = (
    Row(30, "float32", 0.70, 300.0, 500.0),
    Row(30, "bfloat16", 0.70, 200.0, 250.0),
    Row(20, "bfloat16", 0.66, 150.0, 190.0),
    Row(10, "bfloat16", 0.50, 80.0, 120.0),
    Row(5, "bfloat16", 0.55, 40.0, 90.0),
    Row(2, "bfloat16", None, 10.0, 60.0),
)


def test_the_front_holds_what_nothing_else_beats() -> None:
    found = with_front(ROWS, lower=False)
    assert [row.ms for row in found] == sorted(row.ms for row in ROWS)
    assert {(row.layers, row.dtype) for row in found if row.pareto} == {
        *((30, "bfloat16"), (20, "bfloat16"), (5, "bfloat16"), (2, "bfloat16"))
    }


def test_the_best_that_is_fast_enough_is_chosen_or_none() -> None:
    assert chosen(ROWS, 1000, lower=False) == ROWS[1]
    assert chosen(ROWS, 160, lower=False) == ROWS[2]
    assert chosen(ROWS, 100, lower=False) == ROWS[4]
    assert chosen(ROWS, 100, lower=True) == ROWS[3]
    # A row without a figure is none.
    assert chosen(ROWS, 20, lower=False) is None


@pytest.mark.parametrize("target", [float("inf"), float("nan")])
def test_a_target_that_is_no_number_is_refused_before_anything_is_measured(tmp_path: Path, target: float) -> None:
    with raises(LlmrecError, Facts("bad-value", column="--target-ms", says="milliseconds")):
        compress(tmp_path / "no run", tmp_path / "out", target_ms=target, users=1)


def test_the_page_draws_the_front_and_shows_every_row(tmp_path: Path) -> None:
    rows = with_front(ROWS, lower=False)
    best = chosen(rows, 160, lower=False)
    found = Compressed("AUC of ctr", 50, 160.0, rows, best, tmp_path)
    compressing.write(found, "<b>own</b>", tmp_path / compressing.PAGE)
    text = (tmp_path / compressing.PAGE).read_text(encoding="utf-8")
    assert "<b>" not in text and "&lt;b&gt;own" in text and text.count("<tr>") == 1 + len(ROWS)
    canvas = compressing.front([row for row in rows if row.quality is not None], found, 540)
    marks = [shape for shape in canvas.shapes if shape.title]
    assert len(marks) == 5 and sum("chosen" in line for line in text.splitlines()) >= 1
    # The front rises from left to right, and no mark lies outside.
    (line,) = [dict(shape.at)["d"] for shape in canvas.shapes if shape.look == "curve good"]
    points = [tuple(map(float, each.split(","))) for each in line[1:].split()]
    assert (
        len(points) == 3 and points == sorted(points) and [y for _, y in points] == sorted([y for _, y in points])[::-1]
    )
    assert all(0 <= x <= 540 and 0 <= y <= canvas.height for x, y in points)
    compressing.write(Compressed("AUC of ctr", 50, 0.0, rows[:1], None, None), "none", tmp_path / compressing.PAGE)
    assert "No combination has a result" in (tmp_path / compressing.PAGE).read_text(encoding="utf-8")


def _run(folder: Path) -> Path:
    """Train a model of four layers with exits."""
    deep = make_model(folder / "deep", layers=4)
    only = "tasks={rating: {strategies: [expected], history: 5}}"
    more = ["train.exits=true", "eval.arms=[tuned]", f"model.name={deep}", "model.dtype=float32"]
    settings = [each for each in SMALL if not each.startswith("tasks=") and "top_layers" not in each]
    return pipeline.run(
        load_recipe("recipes/movielens-100k/four-tasks.yaml", [*settings, only, *more]), folder / "run", quiet=True
    ).folder


def test_a_weight_in_8_bits_is_off_by_half_a_step_of_its_row_at_most(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder, recipe = make_model(tmp_path / "deep", layers=1), load_recipe("recipes/movielens-100k/four-tasks.yaml")
    plain = dict(compressing.opened(folder, "float32", recipe).named_parameters())
    stored, whole = 0, 0
    for name, weight in compressing.opened(folder, "int8", recipe).named_parameters():
        if weight.dtype != torch.int8:
            whole += 1
            continue
        steps = weight.SCB[:, None] / 127
        # The weights come in bfloat16, which rounds the scale of a row and the weights themselves.
        assert ((plain[name] - weight * steps).abs() <= steps * (0.5 + 127 * 2**-8)).all()
        stored += 1
    assert stored == 7 and whole


@pytest.mark.slow
def test_a_model_in_8_bits_is_exported_and_read_as_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    run = _run(tmp_path)
    monkeypatch.setattr(compressing, "KINDS", ("bfloat16", "int8"))
    found = compress(run, tmp_path / "none", target_ms=0, users=4, depths=(2,))
    sizes = {row.dtype: row.mb for row in found.rows}
    assert sizes["int8"] < sizes["bfloat16"]
    monkeypatch.setattr(compressing, "KINDS", ("int8",))
    found = compress(run, tmp_path / "out", target_ms=1e9, users=4, depths=(2,))
    assert found.chosen is not None and found.chosen.dtype == "int8" and verify(tmp_path / "out")
    section = ModelSection(name=str(tmp_path / "out"))
    model = load_model(str(tmp_path / "out"), section)
    assert sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6 == pytest.approx(found.chosen.mb)
    assert {p.dtype for p in model.get_decoder().layers[1].mlp.parameters()} == {torch.int8}


@pytest.mark.slow
def test_a_run_is_measured_cut_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path)
    none = compress(run, tmp_path / "none", target_ms=0, users=4, depths=(2,))
    assert none.chosen is None and not (tmp_path / "none").exists()
    told = json.loads((run / TABLE).read_text(encoding="utf-8"))
    assert told["chosen"] is None and {(row["layers"], row["dtype"]) for row in told["rows"]} == {
        (2, "bfloat16"),
        (2, "float32"),
        *([(2, "int8")] if find_spec("bitsandbytes") else []),
    }
    monkeypatch.setattr(compressing, "KINDS", ("bfloat16", "float32"))
    found = compress(run, tmp_path / "out", target_ms=1e9, users=4, depths=(2,))
    assert found.chosen is not None and found.chosen.layers == 2 and found.metric == "RMSE of rating"
    section = ModelSection(name=str(tmp_path / "out"), dtype=cast(Dtype, found.chosen.dtype))
    assert load_config(str(tmp_path / "out"), section).num_hidden_layers == 2
    model = load_model(str(tmp_path / "out"), section)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    assert size == pytest.approx(found.chosen.mb)
    bundle.read(str(tmp_path / "out"))
    # They are the weights that were measured, to the bit.
    measured = load_model(str(run / "merged"), section).state_dict()
    assert all(torch.equal(each, measured[name]) for name, each in model.state_dict().items())
    assert verify(tmp_path / "out")
    with raises(LlmrecError, Facts("exists", says="--force")):
        compress(run, tmp_path / "out", target_ms=1e9, users=4)
    done = CliRunner().invoke(
        app,
        ["compress", str(run), "--target-ms", "0", "--out", str(tmp_path / "other"), "--depth", "2", "--users", "4"],
    )
    assert done.exit_code == 1 and not (tmp_path / "other").exists()
    # What fails before it is whole leaves the earlier export as it was.
    before = (tmp_path / "out" / SUMS).read_bytes()
    with monkeypatch.context() as patched, raises(LlmrecError, Facts("unsafe", says="model.bin")):
        patched.setattr(compressing, "cut", lambda merged, draft, *_: (draft / "model.bin").write_bytes(b""))
        compress(run, tmp_path / "out", target_ms=1e9, users=4, depths=(4,), force=True)
    with monkeypatch.context() as patched, raises(LlmrecError, Facts("defect", says="nothing was exported")):
        patched.setattr(compressing, "_TOLERANCE", -1.0)
        compress(run, tmp_path / "out", target_ms=1e9, users=4, depths=(2,), force=True)
    assert verify(tmp_path / "out") and (tmp_path / "out" / SUMS).read_bytes() == before
    assert not list(tmp_path.glob("out.*"))
    with monkeypatch.context() as patched, raises(LlmrecError, Facts("unsupported", column="tasks", says="one-token")):
        patched.setattr("llmrec.backends.hf.backend.single_token_labels", lambda tails, closed: None)
        compress(run, tmp_path / "labels", target_ms=1e9, users=4, depths=(2,))
    compress(run, tmp_path / "out", target_ms=1e9, users=4, depths=(1,), force=True)
    assert load_config(str(tmp_path / "out"), section).num_hidden_layers == 1 and verify(tmp_path / "out")
