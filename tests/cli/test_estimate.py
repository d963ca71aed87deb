"""Estimates: the counted work, and the measurements on this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmrec.cli import estimate
from llmrec.cli.estimate import ReadPrefixes, Speed, estimate_eval_work, measure_speed
from llmrec.cli.main import app
from llmrec.models import bottleneck
from llmrec.models.load import load_config, load_model
from llmrec.models.memory import count_weights
from llmrec.pipeline.study import build_study, encoder_of
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import LoraSection, ModelSection, Recipe, SoftSection, TrainSection
from tests.test_cli import HEADER, rows

SPEED = Speed(read=1e-3, head=1e-4, write=1e-2, train=3e-3)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama_folder: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("shop.csv").write_text(HEADER + "\n".join(rows()) + "\n")
    Path("shop.yaml").write_text(
        f"name: shop\nmodel: {{name: {llama_folder}, dtype: float32}}\n"
        "data:\n  source: table\n  path: shop.csv\n"
        "  columns: {user: user, item: item, rating: stars, time: day, title: title}\n"
        "tasks: {rating: {strategies: [expected]}}\n"
        "train: {steps: 4, batch_tokens: 400, valid_rows: 0}\n"
        "eval: {backend: hf, arms: [zero-shot, tuned], users: 8, candidates: {count: 3}}\n"
    )
    return tmp_path


def load(*more: str) -> Recipe:
    return load_recipe("shop.yaml", more)


def section(folder: Path, **more: Any) -> ModelSection:
    return ModelSection(name=str(folder), dtype="float32", **more)


@pytest.mark.parametrize(("until", "calls"), [(float("-inf"), 1), (float("inf"), estimate._REPEATS)])
def test_probe_measures_once_when_time_is_up(until: float, calls: int) -> None:
    result: list[int] = []
    assert estimate._Clock("cpu", until)(lambda: result.append(1)) > 0
    assert len(result) == calls


def test_probe_of_a_model(llama_folder: Path) -> None:
    model = section(llama_folder)
    config = load_config(str(llama_folder), model)
    result = measure_speed(config, model, TrainSection())
    assert 0 < result.read < result.train and result.head > 0 and result.write > 0
    assert config.to_dict() == load_config(str(llama_folder), model).to_dict()


def test_layers_without_adapters_cost_only_reading(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = section(llama_folder)
    times = iter([2.0 * 384, 1.0 * 32, 1.0 * 64, 6.0 * 384] * 3)
    monkeypatch.setattr(estimate._Clock, "__call__", lambda self, call: next(times))
    config = load_config(str(llama_folder), model)
    config.num_hidden_layers = 8
    every = measure_speed(config, model, TrainSection())
    assert (every.read, every.train) == (2.0 * 2, 6.0 * 2)
    top = measure_speed(config, model, TrainSection(lora=LoraSection(top_layers=2)))
    assert top.train == 2 * (2.0 * 6 + 6.0 * 2) / 8
    again = measure_speed(config, model, TrainSection(gradient_checkpointing=True))
    assert again.train == (6.0 + 2.0) * 2


@pytest.mark.parametrize(("method", "adapter"), [("prompt", False), ("option", False), ("option-adapter", True)])
def test_counts_weights_of_soft_prompts_and_bottlenecks(llama_folder: Path, method: Any, adapter: bool) -> None:
    model = load_model(str(llama_folder), section(llama_folder))
    before = sum(p.numel() for p in model.parameters())
    train = TrainSection(method=method, soft=SoftSection(prompts=7, rank=3))
    complete, _, added = count_weights(model.config, train)
    if adapter:
        bottleneck.attach(model, 3, seed=0)
    assert complete == before
    assert added == 7 * model.config.hidden_size + sum(p.numel() for p in model.parameters()) - before


def test_shared_prefix_of_prompts_is_read_once() -> None:
    seen, first = ReadPrefixes(), list(range(40))
    assert (seen.new(first), seen.new(first)) == (40, 8)
    assert seen.new([*first[:16], *range(100, 124)]) == 24
    assert seen.new([1]) == 1


def test_seconds_are_work_times_speed(shop: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "measure_speed", lambda *_: SPEED)
    study = build_study(load())
    encoder = encoder_of(study, str(llama_folder))
    rows_ = estimate.plan_training_counts(study, encoder, str(llama_folder))
    result = estimate.estimate_run(study, encoder, str(llama_folder), rows_)
    assert result.train_seconds == pytest.approx(rows_["padded_tokens"] * 3e-3 + rows_["target_tokens"] * 3e-4)  # type: ignore[operator]
    work = estimate_eval_work(study, encoder)["tuned"]
    expected = work.read * 1e-3 + work.scored * 1e-4 + work.written * (1e-2 + 1e-4) + 6.0
    assert result.eval_seconds["tuned"] == pytest.approx(expected)
    assert result.memory_gb > 0 and result.cost is None
    # Only part of a repeated prompt is processed again.
    twice = estimate_eval_work(build_study(load("tasks.rating.strategies=[expected, parsed]")), encoder)["tuned"]
    assert work.asked * 1.9 < twice.asked and work.read < twice.read < 1.5 * work.read


def test_server_estimate_has_tokens_and_cost(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "measure_speed", lambda *_: pytest.fail("nothing is computed here"))
    server = "eval.server={model: m, price_in: 2.0, price_out: 10.0}"
    request = ["eval.backend=openai", "eval.arms=[zero-shot]", "tasks.rating.strategies=[parsed]"]
    done = CliRunner().invoke(app, ["check", "shop.yaml", "--dry-run", server, *request])
    assert done.exception is None, done.exception
    result = re.search(r"server +([\d,]+) prompt tokens and ([\d,]+) completion tokens, cost ([\d.]+)", done.output)
    assert result is not None, done.output
    read, written = (int(result[n].replace(",", "")) for n in (1, 2))
    assert float(result[3]) == pytest.approx((2.0 * read + 10.0 * written) / 1e6, abs=0.006)


def test_large_run_prints_an_estimate_first(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "measure_speed", lambda *_: SPEED)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmrec.pipeline.run.train_stage", stop)
    monkeypatch.setattr("llmrec.pipeline.run.Session.evaluation", stop)
    assert "estimate" not in CliRunner().invoke(app, ["run", "shop.yaml", "--out", "small"]).output
    monkeypatch.setattr("llmrec.cli.estimate.MIN_LARGE_INTERACTIONS", 40)
    output = CliRunner().invoke(app, ["run", "shop.yaml", "--out", "large"]).output
    assert "  training " in output and "  memory " in output, output
    assert re.search(r"CPU memory +training needs [\d.]+ GiB and merging [\d.]+ GiB", output), output
