"""An encoder-decoder from its shape to a ranked catalogue: one run, its dry run, `llmrec rank`, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from llmrec.cli.main import app
from llmrec.errors import RecipeError
from llmrec.pipeline.run import Run, open_session, run
from llmrec.recipe.schema import Recipe
from tests.facts import Facts, raises

RECIPE: dict[str, Any] = {
    "name": "paired",
    "model": {
        "name": "new",
        "shape": {"kind": "encoder-decoder", "layers": 1, "width": 16, "heads": 2, "feedforward": 32, "dropout": 0.1},
        "dtype": "float32",
        "max_length": 96,
    },
    "data": {"source": "made-reviews"},
    "index": {"scheme": "collaborative", "collaborative": {"clusters": 4, "leaf": 6}},
    "tasks": {"sequential": {"templates": ["bare-next-code"], "strategies": ["search"]}},
    "train": {"method": "full", "steps": 12, "batch_tokens": 512, "valid_rows": 8, "schedule": "inverse_sqrt"},
    "eval": {"arms": ["tuned"], "backend": "hf", "users": 20, "candidates": {"kind": "catalogue"}, "bootstrap": 50},
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(Recipe(**RECIPE), tmp_path_factory.mktemp("run") / "out", quiet=True)


def test_a_run_trains_searches_and_reports(ran: Run) -> None:
    training = ran.results["training"]
    assert training["steps"] == 12 and training["rows"]["sequential"] > 50
    log = [json.loads(line) for line in (ran.folder / "train_log.jsonl").read_text().splitlines()]
    assert log[-1]["valid_loss"]["sequential"] < log[0]["valid_loss"]["sequential"]
    tuned = next(row for row in ran.results["rows"] if row["arm"] == "tuned")
    assert tuned["engine"] == "hf:tree" and tuned["parse_rate"] == 1.0 and tuned["n"] == 20
    assert json.loads((ran.folder / "merged" / "config.json").read_text())["is_encoder_decoder"]


def ranked(ran: Run, folder: Path, lines: list[dict[str, Any]], out: str = "out.jsonl") -> list[dict[str, Any]]:
    """Rank the five best items of the catalogue for each request by `llmrec rank`."""
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["rank", "--model", str(ran.folder), "--in", str(folder / "in.jsonl"), "--out", str(folder / out)]
    done = CliRunner().invoke(app, [*command, "--candidates", "all", "--top", "5"])
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in (folder / out).read_text().splitlines()]


def test_rank_answers_with_the_best_of_the_catalogue(ran: Run, tmp_path: Path) -> None:
    session = open_session(Recipe(**RECIPE), ran.folder, quiet=True)
    items = sorted(session.study.data.dataset.items)
    found = ranked(ran, tmp_path, [{"id": "one", "history": items[:3]}, {"id": "nobody", "history": []}])
    assert [each["request_id"] for each in found] == ["one", "nobody"]
    for each, given in zip(found, (items[:3], []), strict=True):
        assert len(set(each["items"])) == 5 and set(each["items"]) <= set(items) - set(given)
        assert each["scores"] == sorted(each["scores"], reverse=True)


def test_a_dry_run_counts_rows_and_weights(tmp_path: Path) -> None:
    file = tmp_path / "paired.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    done = CliRunner().invoke(app, ["check", str(file), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "parameters" in done.output and "training rows" in done.output


def test_what_cannot_serve_it_is_refused_by_name(ran: Run, tmp_path: Path) -> None:
    recipe = Recipe(**{**RECIPE, "eval": {**RECIPE["eval"], "scorer": "vllm"}})
    with raises(RecipeError, Facts("unsupported", column="eval.backend", says="eval.backend=hf")):
        open_session(recipe, tmp_path / "out", quiet=True)
    done = CliRunner().invoke(app, ["export", str(ran.folder), "--out", str(tmp_path / "exported")])
    assert done.exit_code != 0 and "contains an encoder-decoder" in str(done.exception)
