"""Suite rows of language models: models that a recipe fine-tunes, and ensembles with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from llmrec.baselines.validation import ranking_cases
from llmrec.bench import suite as suites
from llmrec.bench.models import Models
from llmrec.bench.run import run_benchmark
from llmrec.data.split import SplitDataset
from llmrec.evaluate.lists import ListMetricData, cold_target_figures
from llmrec.metrics.significance import holm_p_values
from llmrec.pipeline.study import load_split
from llmrec.recipe.comparisons import Suite
from llmrec.types import Case, Request
from tests.bench.suites import page_of

RECIPE: dict[str, Any] = {
    "name": "small",
    "model": {
        "name": "new",
        "shape": {"layers": 1, "width": 16, "heads": 2, "feedforward": 32, "dropout": 0.0},
        "dtype": "float32",
        "max_length": 128,
    },
    "data": {"source": "made-reviews"},
    "index": {"scheme": "token"},
    "tasks": {"sequential": {"templates": ["bare-codes"], "strategies": ["search"]}},
    "train": {"method": "full", "steps": 10, "batch_tokens": 256, "learning_rate": 0.01, "valid_rows": 4},
    "eval": {"arms": ["tuned"], "backend": "hf", "candidates": {"kind": "catalogue"}},
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("recipes") / "small.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    return {
        "suite": "made",
        "data": {"source": "made-reviews"},
        "seeds": [0],
        "bootstrap": 60,
        "rows": [
            {"baseline": "markov-1"},
            {"recipe": str(file), "depth": 20},
            {"fuse": ["small", "markov-1"], "ranker": False, "name": "both"},
        ],
        "pairs": [["both", "markov-1"]],
    }


@pytest.fixture(scope="module")
def ran(page: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("suite")
    return folder, run_benchmark(Suite(**page), out=folder / "out", results=folder / "results").results.as_json()


def _data(page: dict[str, Any]) -> SplitDataset:
    return load_split(Suite(**page).data, 0)


def test_table_has_baselines_models_and_ensembles(ran: tuple[Path, dict[str, Any]]) -> None:
    rows = {row["name"]: row for row in ran[1]["rows"]}
    assert list(rows) == ["markov-1", "small", "both"]
    assert rows["small"]["tables"]["excluded"]["parameters"] == {"model": "from scratch", "index": "token", "steps": 10}
    assert rows["markov-1"]["reads"] == "events" and rows["both"]["reads"] == rows["small"]["reads"]
    for row in rows.values():
        for seen, table in row["tables"].items():
            assert (
                f"seen:{seen}" in table["metrics"]["NDCG@10"]["signature"]
                and table["n"] == rows["both"]["tables"][seen]["n"]
            )
    assert {line["b"] for line in ran[1]["comparisons"]} | {line["a"] for line in ran[1]["comparisons"]} == set(rows)


def test_only_rows_of_a_changed_recipe_are_trained_again(
    page: dict[str, Any], ran: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, first = ran
    added: list[str] = []
    genuine = suites.evaluate_row

    def counted(suite: Suite, row: Any, *rest: Any) -> dict[str, Any]:
        added.append(row.label)
        return genuine(suite, row, *rest)

    monkeypatch.setattr(suites, "evaluate_row", counted)
    again = run_benchmark(Suite(**page), out=folder / "out", results=folder / "results").results.as_json()
    assert added == [] and again["rows"] == first["rows"]
    rows = [page["rows"][0], page["rows"][1] | {"overrides": ["train.steps=2"]}, page["rows"][2]]
    changed = run_benchmark(
        Suite(**page | {"rows": rows}), out=folder / "out", results=folder / "results"
    ).results.as_json()
    assert added == ["small", "both"]
    assert changed["rows"][1]["tables"]["included"]["parameters"]["steps"] == 2


def test_stored_model_keeps_its_training_time(page: dict[str, Any], tmp_path: Path) -> None:
    rows = [page["rows"][1] | {"overrides": ["train.steps=2"]}]
    suite = Suite(**page | {"rows": rows, "pairs": [], "seen": ["included"]})
    run_benchmark(suite, out=tmp_path / "out", results=tmp_path / "results")
    (train,) = (tmp_path / "out").rglob("train.json")
    train.write_text(json.dumps(json.loads(train.read_text()) | {"seconds": 5000.0}))
    for row in (tmp_path / "out" / "rows").iterdir():
        row.unlink()
    (again,) = run_benchmark(suite, out=tmp_path / "out", results=tmp_path / "results").results.rows
    assert 5000 < again.seconds["fit"] < 5300


def test_planned_pairs_and_cold_targets(page: dict[str, Any], ran: tuple[Path, dict[str, Any]]) -> None:
    _, results = ran
    rows = {row["name"]: row for row in results["rows"]}
    assert [(pair["table"], pair["a"], pair["b"]) for pair in results["pairs"]] == [
        (seen, "both", "markov-1") for seen in ("excluded", "included")
    ]
    for pair in results["pairs"]:
        figures = [rows[pair[side]]["tables"][pair["table"]]["metrics"][pair["metric"]]["value"] for side in "ab"]
        assert pair["value"] == pytest.approx(figures[0] - figures[1])
    raw = [pair["p_raw"] for pair in results["pairs"]]
    assert [pair["p"] for pair in results["pairs"]] == holm_p_values(
        raw
    )  # one family of comparisons across both tables
    assert all((pair["low"] <= 0 <= pair["high"]) == (pair["p"] > 0.05) for pair in results["pairs"])
    assert all("2 planned comparisons" in line for line in (table["detectable"] for table in results["tables"]))
    assert "both − markov-1" in page_of(results)
    data = _data(page)
    known = set(data.train["item_id"].to_list())
    cold = sum(held.item_id not in known for held in data.holdouts("test"))
    assert {row["tables"]["excluded"]["cold"]["n"] for row in rows.values()} == {cold}
    with pytest.raises(ValueError, match="no model 'missing'"):
        Suite(**page | {"pairs": [["missing", "both"]]})


def test_metrics_of_cold_targets() -> None:
    cases = [Case(request=Request(id=t, user_id=t), truth=t) for t in ("a", "b", "c")]
    background = ListMetricData(items=("a", "b", "c"), counts=np.array([0.0, 2.0, 0.0]), users=2)
    result = cold_target_figures(cases, background, {"HR@10": np.array([1.0, 1.0, 0.0])}, ["HR@10"])
    assert result == {"n": 2.0, "HR@10": 0.5}
    warm = ListMetricData(items=("a", "b", "c"), counts=np.ones(3), users=2)
    assert cold_target_figures(cases, warm, {"HR@10": np.ones(3)}, ["HR@10"]) == {"n": 0.0}


def test_items_outside_the_search_have_score_zero(page: dict[str, Any], ran: tuple[Path, dict[str, Any]]) -> None:
    data, suite = _data(page), Suite(**page)
    model = Models(suite, ran[0] / "out").fit(suite.rows[1], data, 0, "excluded", {})
    cases = ranking_cases(data, 5)
    scores = model.scores([case.request for case in cases])
    assert scores.shape == (5, len(data.dataset.items)) and model.items == tuple(sorted(data.dataset.items))
    assert ((scores > 0).sum(axis=1) == min(20, len(model.items))).all() and (scores.sum(axis=1) <= 1 + 1e-6).all()


def test_rejects_row_of_two_kinds(page: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="one of baseline, recipe and fuse"):
        Suite(**page | {"rows": [{"baseline": "markov-1"}, {"baseline": "ease", "recipe": "x"}]})


def test_results_have_no_local_paths(ran: tuple[Path, dict[str, Any]]) -> None:
    written = json.dumps(ran[1]["rows"])
    assert str(ran[0]) not in written and "/tmp" not in written
