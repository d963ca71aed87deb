"""`llmrec compress`: the Pareto front, the choice, and the export."""

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
from llmrec.exports.files import is_unchanged_export
from llmrec.models.load import load_config, load_model
from llmrec.pipeline import bundle
from llmrec.pipeline import run as pipeline
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import ModelSection
from llmrec.recipe.shared import Dtype
from llmrec.systems.m6.compress import compress as compressing
from llmrec.systems.m6.compress.compress import (
    TABLE_FILE,
    CompressionResult,
    Measurement,
    compress_model,
    mark_pareto_front,
    select_measurement,
)
from tests.conftest import make_model
from tests.facts import Facts, raises
from tests.pipeline.test_ctr_run import SMALL

ROWS = (
    Measurement(30, "float32", 0.70, 300.0, 500.0),
    Measurement(30, "bfloat16", 0.70, 200.0, 250.0),
    Measurement(20, "bfloat16", 0.66, 150.0, 190.0),
    Measurement(10, "bfloat16", 0.50, 80.0, 120.0),
    Measurement(5, "bfloat16", 0.55, 40.0, 90.0),
    Measurement(2, "bfloat16", None, 10.0, 60.0),
)


def test_pareto_front() -> None:
    front = mark_pareto_front(ROWS, lower=False)
    assert [row.ms for row in front] == sorted(row.ms for row in ROWS)
    assert {(row.layers, row.dtype) for row in front if row.pareto} == {
        *((30, "bfloat16"), (20, "bfloat16"), (5, "bfloat16"), (2, "bfloat16"))
    }


def test_chooses_the_best_fast_enough_row() -> None:
    assert select_measurement(ROWS, 1000, lower=False) == ROWS[1]
    assert select_measurement(ROWS, 160, lower=False) == ROWS[2]
    assert select_measurement(ROWS, 100, lower=False) == ROWS[4]
    assert select_measurement(ROWS, 100, lower=True) == ROWS[3]
    # Rows without a result are never chosen.
    assert select_measurement(ROWS, 20, lower=False) is None


@pytest.mark.parametrize("target", [float("inf"), float("nan")])
def test_rejects_target_that_is_no_number(tmp_path: Path, target: float) -> None:
    with raises(LlmrecError, Facts("bad-value", column="--target-ms", says="milliseconds")):
        compress_model(tmp_path / "no run", tmp_path / "out", target_ms=target, users=1)


def test_page_shows_every_row(tmp_path: Path) -> None:
    rows = mark_pareto_front(ROWS, lower=False)
    best = select_measurement(rows, 160, lower=False)
    result = CompressionResult("AUC of ctr", 50, 160.0, rows, best, tmp_path)
    compressing.write_page(result, "<b>run</b>", tmp_path / compressing.PAGE_FILE)
    text = (tmp_path / compressing.PAGE_FILE).read_text(encoding="utf-8")
    assert "<b>" not in text and "&lt;b&gt;run" in text and text.count("<tr>") == 1 + len(ROWS)
    assert "chosen" in text
    compressing.write_page(
        CompressionResult("AUC of ctr", 50, 0.0, rows[:1], None, None), "none", tmp_path / compressing.PAGE_FILE
    )
    assert "No combination has a result" in (tmp_path / compressing.PAGE_FILE).read_text(encoding="utf-8")


def _run(folder: Path) -> Path:
    """Train a model of four layers with exits."""
    deep = make_model(folder / "deep", layers=4)
    only = "tasks={rating: {strategies: [expected], history: 5}}"
    more = ["train.exits=true", "eval.arms=[tuned]", f"model.name={deep}", "model.dtype=float32"]
    settings = [each for each in SMALL if not each.startswith("tasks=") and "top_layers" not in each]
    return pipeline.run(
        load_recipe("recipes/movielens-100k/four-tasks.yaml", [*settings, only, *more]), folder / "run", quiet=True
    ).folder


def test_error_of_8_bit_weights(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder, recipe = make_model(tmp_path / "deep", layers=1), load_recipe("recipes/movielens-100k/four-tasks.yaml")
    plain = dict(compressing.load_in_format(folder, "float32", recipe).named_parameters())
    small, others = 0, 0
    for name, weight in compressing.load_in_format(folder, "int8", recipe).named_parameters():
        if weight.dtype != torch.int8:
            others += 1
            continue
        steps = weight.SCB[:, None] / 127
        # bfloat16 rounds the weights and the scale of a row.
        assert ((plain[name] - weight * steps).abs() <= steps * (0.5 + 127 * 2**-8)).all()
        small += 1
    assert small == 7 and others


@pytest.mark.slow
def test_exports_8_bit_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    run = _run(tmp_path)
    monkeypatch.setattr(compressing, "WEIGHT_FORMATS", ("bfloat16", "int8"))
    result = compress_model(run, tmp_path / "none", target_ms=0, users=4, depths=(2,))
    sizes = {row.dtype: row.mb for row in result.rows}
    assert sizes["int8"] < sizes["bfloat16"]
    monkeypatch.setattr(compressing, "WEIGHT_FORMATS", ("int8",))
    result = compress_model(run, tmp_path / "out", target_ms=1e9, users=4, depths=(2,))
    assert result.chosen is not None and result.chosen.dtype == "int8" and is_unchanged_export(tmp_path / "out")
    section = ModelSection(name=str(tmp_path / "out"))
    model = load_model(str(tmp_path / "out"), section)
    assert sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6 == pytest.approx(result.chosen.mb)
    assert {p.dtype for p in model.get_decoder().layers[1].mlp.parameters()} == {torch.int8}


@pytest.mark.slow
def test_measures_cuts_and_exports_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path)
    none = compress_model(run, tmp_path / "none", target_ms=0, users=4, depths=(2,))
    assert none.chosen is None and not (tmp_path / "none").exists()
    table = json.loads((run / TABLE_FILE).read_text(encoding="utf-8"))
    assert table["chosen"] is None and {(row["layers"], row["dtype"]) for row in table["rows"]} == {
        (2, "bfloat16"),
        (2, "float32"),
        *([(2, "int8")] if find_spec("bitsandbytes") else []),
    }
    monkeypatch.setattr(compressing, "WEIGHT_FORMATS", ("bfloat16", "float32"))
    result = compress_model(run, tmp_path / "out", target_ms=1e9, users=4, depths=(2,))
    assert result.chosen is not None and result.chosen.layers == 2 and result.metric == "RMSE of rating"
    section = ModelSection(name=str(tmp_path / "out"), dtype=cast(Dtype, result.chosen.dtype))
    assert load_config(str(tmp_path / "out"), section).num_hidden_layers == 2
    model = load_model(str(tmp_path / "out"), section)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    assert size == pytest.approx(result.chosen.mb)
    bundle.read(str(tmp_path / "out"))
    # The weights equal the measured ones exactly.
    measured = load_model(str(run / "merged"), section).state_dict()
    assert all(torch.equal(each, measured[name]) for name, each in model.state_dict().items())
    assert is_unchanged_export(tmp_path / "out")
    with raises(LlmrecError, Facts("exists", says="--force")):
        compress_model(run, tmp_path / "out", target_ms=1e9, users=4)
    done = CliRunner().invoke(
        app,
        ["compress", str(run), "--target-ms", "0", "--out", str(tmp_path / "other"), "--depth", "2", "--users", "4"],
    )
    assert done.exit_code == 1 and not (tmp_path / "other").exists()
    # A failed export leaves the earlier one unchanged.
    before = (tmp_path / "out" / bundle.CHECKSUMS_FILE).read_bytes()
    with monkeypatch.context() as patched, raises(LlmrecError, Facts("unsafe", says="model.bin")):
        patched.setattr(
            compressing, "truncate_export", lambda merged, draft, *_: (draft / "model.bin").write_bytes(b"")
        )
        compress_model(run, tmp_path / "out", target_ms=1e9, users=4, depths=(4,), force=True)
    with monkeypatch.context() as patched, raises(LlmrecError, Facts("defect", says="nothing was exported")):
        patched.setattr(compressing, "_TOLERANCE", -1.0)
        compress_model(run, tmp_path / "out", target_ms=1e9, users=4, depths=(2,), force=True)
    assert is_unchanged_export(tmp_path / "out") and (tmp_path / "out" / bundle.CHECKSUMS_FILE).read_bytes() == before
    assert not list(tmp_path.glob("out.*"))
    with monkeypatch.context() as patched, raises(LlmrecError, Facts("unsupported", column="tasks", says="one-token")):
        patched.setattr("llmrec.backends.hf.backend.single_token_labels", lambda tails, closed: None)
        compress_model(run, tmp_path / "labels", target_ms=1e9, users=4, depths=(2,))
    compress_model(run, tmp_path / "out", target_ms=1e9, users=4, depths=(1,), force=True)
    assert load_config(str(tmp_path / "out"), section).num_hidden_layers == 1 and is_unchanged_export(tmp_path / "out")
