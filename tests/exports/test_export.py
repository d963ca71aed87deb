"""Exports of real runs of a tiny model: the content of the folder, and the same answers as the run."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

from llmrec.answer.rank.run import rank_file
from llmrec.backends.hf.backend import HFBackend
from llmrec.data.assemble import read_items
from llmrec.errors import DataError, LlmrecError
from llmrec.exports import agreement, card_facts, export
from llmrec.exports import files as placing
from llmrec.exports.export import Exported
from llmrec.exports.files import is_unchanged_export
from llmrec.exports.options import ExportOptions
from llmrec.machine import Memory
from llmrec.models.load import load_model, load_tokenizer
from llmrec.pipeline import audit as audits
from llmrec.pipeline import bundle, runs
from llmrec.recipe.load import dump_recipe, load_recipe
from llmrec.recipe.schema import ModelSection, Recipe
from llmrec.resources import resource
from tests.answer import rank_cases
from tests.conftest import make_model, section
from tests.exports.fake_hub import Hub, serving
from tests.facts import Facts, raises

pytest.importorskip("trl", reason="the train extra is not installed")
torch = pytest.importorskip("torch", reason="the train extra is not installed")

SMALL = (
    "eval.fusion={}",
    "data={source: made-reviews, noun: products}",
    "reviews=null",
    "model.dtype=float32",
    # A learning rate with which the adapter has an effect after two steps.
    "train={steps: 2, batch_tokens: 512, valid_rows: 0, learning_rate: 0.03, warmup: 0, lora: {rank: 4, alpha: 8}}",
    "tasks.sequential={templates: [continue-list]}",
    "tasks.rating={templates: [list-ratings]}",
    "tasks.direct={templates: [after-history], strategies: [label]}",
    "tasks.explanation=null",
    "eval={users: 6, backend: hf, batch_tokens: 777, bootstrap: 50, candidates: {count: 5}, arms: [tuned, zero-shot]}",
)
MODEL_FILES = {
    *("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "llmrec.json", "README.md", "SHA256SUMS", "items.parquet"),
}
TOKEN = "hf_PlantedInTheEnvironment42"
IDS = [[1, 40, 77, 200, 15, 9], [1, 300, 21, 21, 8, 64]]


def recipe(folder: Path, *more: str) -> Recipe:
    return load_recipe("recipes/movielens-100k/four-tasks.yaml", [f"model.name={folder}", *SMALL, *more])


def trained(folder: Path, out: Path, *more: str) -> Path:
    from llmrec.pipeline import run as pipeline

    pipeline.train(recipe(folder, *more), out, quiet=True)
    return out


@pytest.fixture(scope="module")
def evaluated(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with results; tests that change something work on a copy."""
    from llmrec.pipeline import run as pipeline

    return pipeline.run(recipe(llama_folder), tmp_path_factory.mktemp("runs") / "run", quiet=True).folder


@pytest.fixture
def run(evaluated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(evaluated, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))


def write(run: Path, out: Path, **options: Any) -> Exported:
    return export.export(run, out, **{"check_users": 0, **options})


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(IDS)).logits


def test_folder_is_complete_without_the_run(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "films"
    done = write(run, out, check_users=4)
    assert {file.name for file in out.iterdir()} == MODEL_FILES == set(done.files)
    assert is_unchanged_export(out)
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=out, check=True)
    assert (out / "model.safetensors").read_bytes() == (run / "merged" / "model.safetensors").read_bytes()
    shutil.rmtree(run)
    result = bundle.read(str(out))
    assert result.tuned and result.run is None and set(result.tasks.present()) == {"rating", "sequential", "direct"}
    assert load_tokenizer(str(out), section(out)).chat_template
    settings = json.loads((out / "generation_config.json").read_text(encoding="utf-8"))
    assert settings == {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 0, "do_sample": False}


def test_card_reports_the_run(run: Path, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="the train extra is not installed")
    write(run, tmp_path / "films", check_users=4, licence="cc-by-4.0", base_licence="mit")
    card = hub.ModelCard.load(tmp_path / "films" / "README.md")
    assert card.data.license == "cc-by-4.0"
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    for row in results["rows"]:
        assert f"{row['metrics'][results['headline'][row['task']]]['value']:.3f}" in card.text
    assert results["data"]["main"]["fingerprint"] in card.text
    assert results["training"]["adapter_sha256"] in card.text
    assert "Base model" in card.text and ": mit." in card.text
    assert "The best model is" in card.text
    assert "not real reviews" in card.text
    assert "cc-by-4.0" in (tmp_path / "films" / "LICENSE").read_text(encoding="utf-8")


def test_results_of_other_weights_are_not_reported(run: Path, tmp_path: Path) -> None:
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    results["training"]["adapter_sha256"] = "0" * 64
    (run / "results.json").write_text(json.dumps(results), encoding="utf-8")
    write(run, tmp_path / "films")
    assert "The run was not evaluated" in (tmp_path / "films" / "README.md").read_text(encoding="utf-8")


def test_items_are_included_by_default(run: Path, tmp_path: Path) -> None:
    write(run, tmp_path / "films")
    held = read_items(tmp_path / "films" / "items.parquet")
    assert len(held) == 40 and all(
        item.title and set(item.fields) == {"category", "brand", "price"} for item in held.values()
    )
    assert "The terms of the data" in (tmp_path / "films" / "README.md").read_text(encoding="utf-8")
    write(run, tmp_path / "bare", with_items=False)
    assert {file.name for file in (tmp_path / "bare").iterdir()} == MODEL_FILES - {"items.parquet"}
    assert "The catalogue is not included" in (tmp_path / "bare" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_ids_need_the_items(run: Path, tmp_path: Path) -> None:
    """An export with items ranks ids like its run; one without them rejects ids."""
    write(run, tmp_path / "films")
    write(run, tmp_path / "bare", with_items=False)
    table = tmp_path / "films" / "items.parquet"
    items = read_items(table)
    past, *pool = sorted(items)[:5]
    titled = {item: {"item_id": item, "title": items[item].title} for item in items}

    def ranked(model: str, history: Any, candidates: Any, **options: Any) -> dict[str, Any]:
        requests = rank_cases.jsonl(
            tmp_path / "in.jsonl", [{"id": "one", "history": [history], "candidates": candidates}]
        )
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        rank_file(rank_cases.options(tmp_path / model, requests, tmp_path / "out.jsonl", restart=True, **options))
        (line,) = rank_cases.lines(tmp_path / "out.jsonl")
        return line

    expected = ranked("run", past, pool)
    assert sorted(expected["titles"]) == sorted(items[item].title for item in pool)
    for history, candidates in ((past, [titled[item] for item in pool]), (titled[past], pool)):
        with raises(DataError, Facts("unknown-name", "in.jsonl", line=1, column="item_id", says="--items")):
            ranked("bare", history, candidates)
    assert ranked("films", past, pool) == ranked("bare", past, pool, items=table) == expected
    assert ranked("bare", titled[past], [titled[item] for item in pool]) == expected


@pytest.mark.parametrize(
    "options", [{"with_items": True, "check_users": 2}, {"adapter_only": True}], ids=["model", "adapter"]
)
def test_nothing_private_is_exported(
    run: Path, tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "extra.pkl", "notes.log"):
        for folder in ("merged", "adapter"):
            (run / folder / name).write_bytes(b"x")
    write(run, tmp_path / "films", **options)
    private = {
        TOKEN,
        str(Path.home()),
        str(Path.cwd()),
        str(run),
        str(tmp_path),
        str(llama_folder),
        str(llama_folder.parent),
    }
    kinds = {".json", ".jinja", ".md", ".safetensors", ".parquet", ""}
    files = [file for file in (tmp_path / "films").rglob("*") if file.is_file()]
    assert len(files) >= 5
    for file in files:
        assert file.suffix in kinds and (file.suffix or file.name == "SHA256SUMS"), file.name
        content = file.read_bytes()
        assert not [each for each in private if each.encode() in content], file.name
        if file.suffix == ".json":
            assert "/" + llama_folder.name not in content.decode()


@pytest.mark.parametrize("text", [TOKEN, "from /srv/secret/folder"])
def test_rejects_secrets_and_paths_in_a_recipe(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("LLMREC_CACHE", "/srv/secret/folder")
    changed = load_recipe(run / "recipe.yaml").model_copy(update={"description": f"Made {text}."})
    (run / "recipe.yaml").write_text(dump_recipe(changed), encoding="utf-8")
    with raises(LlmrecError, Facts("unsafe", "README.md")) as error:
        write(run, tmp_path / "films")
    assert TOKEN not in str(error.value)
    assert not (tmp_path / "films").exists()


def test_base_model_is_named_without_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))
    hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
    converted = str(tmp_path / "cache" / "models" / "SmolLM2-135M-Instruct.Q4_1")
    for name in ("SmolLM2-135M-Instruct", hub, converted):
        result = card_facts.base_facts(ModelSection(name=name), converted)
        assert (result.hub, result.licence) == (hub, "apache-2.0") and "quantised" in result.note
    snapshot = tmp_path / "hub" / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: mit\nlanguage: [en, de]\n---\n# x\n", encoding="utf-8")
    result = card_facts.base_facts(ModelSection(name="org/base", revision="main"), str(snapshot))
    assert (result.hub, result.revision, result.licence, result.languages) == (
        "org/base",
        "ab" * 20,
        "mit",
        ("en", "de"),
    )
    assert not result.note
    (snapshot / "README.md").write_text("---\n[broken\n---\n", encoding="utf-8")
    (snapshot / "config.json").write_text('{"license": "gemma"}', encoding="utf-8")
    result = card_facts.base_facts(ModelSection(name=str(snapshot)), str(snapshot))
    assert (result.hub, result.name, result.licence) == (None, "ab" * 20, "gemma")


def test_merged_weights_equal_base_and_adapter(
    qwen_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    run, opened = trained(qwen_folder, tmp_path / "run"), []

    def opening(*args: Any, **options: Any) -> HFBackend:
        backend = HFBackend(*args, **options)
        opened.append(backend.batch_tokens)
        return backend

    monkeypatch.setattr(agreement, "HFBackend", opening)
    done = write(run, tmp_path / "out", check_users=2)
    # Both are evaluated with the settings of the recipe.
    assert opened == [777, 777]
    plain = load_model(str(qwen_folder), section(qwen_folder))
    before = logits(plain).clone()
    live = logits(peft.PeftModel.from_pretrained(plain, run / "adapter"))
    merged = logits(load_model(str(tmp_path / "out"), section(tmp_path / "out")))
    assert float((live - merged).abs().max()) < 1e-4
    assert float((live - before).abs().max()) > 0.1, "the adapter has no effect"
    assert done.agreement is not None and done.agreement.logit < 1e-4
    assert all(abs(entry.loss[1] - entry.loss[0]) < 1e-4 for entry in done.agreement.families)
    assert "The run was not evaluated" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_weights_are_merged_again_for_another_dtype(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmrec.train import lora

    merge, calls = lora.merge_adapter, []
    monkeypatch.setattr(lora, "merge_adapter", lambda *args: calls.append(args) or merge(*args))
    assert write(run, tmp_path / "same", dtype="float32").dtype == "float32"
    assert calls == []
    done = write(run, tmp_path / "half", dtype="bfloat16", check_users=2)
    assert len(calls) == 1
    one, two = (
        load_model(str(tmp_path / n), section(tmp_path / n, d)) for n, d in (("same", "float32"), ("half", "bfloat16"))
    )
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert b.dtype == torch.bfloat16 and torch.equal(a.to(torch.bfloat16), b)
    assert json.loads((tmp_path / "half" / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    assert done.agreement is not None and 1e-4 < done.agreement.logit < 1.0
    text = (tmp_path / "half" / "README.md").read_text(encoding="utf-8")
    assert "used float32 weights; this folder contains bfloat16" in text


def test_rejects_a_check_that_exceeds_memory(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tight = Memory(total=2**40, available=2**18)
    monkeypatch.setattr("llmrec.exports.agreement.read_memory", lambda: tight)
    with raises(LlmrecError, Facts("exhausted", column="--check-users", says="--check-users 0")):
        write(run, tmp_path / "out", dtype="bfloat16", check_users=2)
    done = write(run, tmp_path / "out", dtype="bfloat16", check_users=0)
    assert done.agreement is None


def test_damaged_merged_model_is_not_reused(run: Path, tmp_path: Path) -> None:
    good = (run / "merged" / "model.safetensors").read_bytes()
    (run / "merged" / "model.safetensors").write_bytes(good[:-1] + b"\x01")
    write(run, tmp_path / "out", dtype="float32")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == good


def test_rejects_another_base_model(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    run = trained(base, tmp_path / "run")
    make_model(base, seed=5)
    with raises(LlmrecError, Facts("mismatch", run, column="model.name", says="`llmrec train`")):
        write(run, tmp_path / "out", dtype="bfloat16")
    shutil.rmtree(run / "merged")
    with raises(LlmrecError, Facts("mismatch", run, column="model.name", says="`llmrec train`")):
        write(run, tmp_path / "out")
    make_model(base)
    write(run, tmp_path / "out")
    assert bundle.read(str(tmp_path / "out")).tuned


def test_changed_adapter_is_reported_with_both_hashes(run: Path, tmp_path: Path) -> None:
    file = run / "adapter" / "adapter_model.safetensors"
    recorded = json.loads((run / "train.json").read_text(encoding="utf-8"))["adapter_sha256"]
    assert runs.weights_sha256(run / "adapter") == recorded
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(LlmrecError) as error:
        write(run, tmp_path / "out")
    assert recorded in str(error.value) and runs.weights_sha256(run / "adapter") in str(error.value)


def test_adapter_only(run: Path, tmp_path: Path, llama_folder: Path) -> None:
    import peft

    write(run, tmp_path / "out", adapter_only=True, base_licence="mit")
    names = {"adapter_model.safetensors", "adapter_config.json", "llmrec.json", "README.md", "LICENSE", "SHA256SUMS"}
    names |= {"items.parquet"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == llama_folder.name
    live = peft.PeftModel.from_pretrained(load_model(str(llama_folder), section(llama_folder)), tmp_path / "out")
    merged = load_model(str(run / "merged"), section(run))
    assert float((logits(live) - logits(merged)).abs().max()) < 1e-4


@pytest.mark.slow
def test_fully_tuned_weights_are_exported(llama_folder: Path, tmp_path: Path) -> None:
    full = "train={method: full, steps: 1, batch_tokens: 512, valid_rows: 0, learning_rate: 0.001, warmup: 0}"
    run = trained(llama_folder, tmp_path / "run", full, "model.dtype=bfloat16")
    assert write(run, tmp_path / "out").dtype == "bfloat16"
    done = write(run, tmp_path / "exact", dtype="float32", check_users=2)
    assert done.agreement is not None and done.agreement.logit < 1e-4
    with raises(LlmrecError, Facts("unsupported", column="--adapter-only")):
        write(run, tmp_path / "adapter", adapter_only=True)


@pytest.mark.slow
def test_loss_of_a_quantised_run_is_measured(llama_folder: Path, tmp_path: Path) -> None:
    """The adapter was trained on NF4 weights, and the export has unquantised ones: losses and metrics change."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    run = trained(llama_folder, tmp_path / "run", "train.method=qlora", "tasks.explanation={}")
    done = write(run, tmp_path / "out", check_users=12)
    result = done.agreement
    assert result is not None and "NF4" in result.before
    measured = {entry.family: entry for entry in result.families}
    assert list(measured) == ["rating", "sequential", "direct", "explanation"]
    metrics = {family: entry.metric for family, entry in measured.items()}
    assert metrics == {"rating": "RMSE", "sequential": "NDCG@10", "direct": "NDCG@10", "explanation": None}
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for entry in measured.values():
        assert entry.rows == 12 and 0 < abs(entry.loss[1] - entry.loss[0]) < 1.0
        assert f"| {entry.loss[0]:.4f} | {entry.loss[1]:.4f} |" in text
        if entry.values is not None and entry.difference is not None:
            assert entry.cases == 12
            assert entry.difference[0] == pytest.approx(entry.values[1] - entry.values[0])
    assert 1e-3 < result.logit < 5.0


def test_rejects_incomplete_and_changed_runs(run: Path, tmp_path: Path) -> None:
    with raises(LlmrecError, Facts("missing-file", tmp_path, says="recipe.yaml")):
        write(tmp_path, tmp_path / "out")
    other = load_recipe(run / "recipe.yaml", ["train.steps=7"])
    (run / "recipe.yaml").write_text(dump_recipe(other), encoding="utf-8")
    with raises(LlmrecError, Facts("mismatch", run / "train.json", column="train", says="lora and 7 steps")):
        write(run, tmp_path / "out")
    (run / "train.json").write_text("{", encoding="utf-8")
    with raises(LlmrecError, Facts("damaged", run / "train.json", says="`llmrec train`")):
        write(run, tmp_path / "out")
    (run / "train.json").unlink()
    with raises(LlmrecError, Facts("missing-file", run / "train.json", says="`llmrec train`")):
        write(run, tmp_path / "out")
    with raises(LlmrecError, Facts("unknown-name", column="--dtype", says="did you mean 'bfloat16'")):
        write(run, tmp_path / "out", dtype="bfloat")
    assert not list(tmp_path.glob("out*"))


def test_missing_data_is_needed_for_check_and_items_only(tmp_path: Path, llama_folder: Path) -> None:
    table = tmp_path / "shop.csv"
    table.write_bytes(resource("recipes", "made", "reviews.csv").read_bytes())
    data = load_recipe("recipes/movielens-100k/four-tasks.yaml", ["data={source: made-reviews}"]).data
    columns = data.model_copy(update={"source": "table", "path": str(table)}).model_dump(mode="json")
    run = trained(llama_folder, tmp_path / "run", f"data={json.dumps(columns)}", "tasks.rating=null")
    table.unlink()
    for options, fix in (
        ({"check_users": 3}, "use --no-items and --check-users 0;"),
        ({}, "use --no-items;"),
        ({"check_users": 3, "with_items": False}, "use --check-users 0;"),
    ):
        with raises(LlmrecError, Facts("missing-file", table, says=fix)):
            write(run, tmp_path / "out", **options)
    done = write(run, tmp_path / "out", with_items=False)
    assert done.agreement is None and "could not be read" in done.notes[0]
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "Not measured." in text and "could not be read when this card was written" in text


def test_changed_recipe_is_noted(run: Path, tmp_path: Path) -> None:
    other = load_recipe(run / "recipe.yaml", ["train.learning_rate=0.5"])
    (run / "recipe.yaml").write_text(dump_recipe(other), encoding="utf-8")
    done = write(run, tmp_path / "out")
    assert "have changed since training" in done.notes[0]
    assert done.notes[0] in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert write(run, tmp_path / "two").notes == done.notes


def test_finished_export_is_not_repeated(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = write(run, out)
    written = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    messages: list[str] = []
    again = export.write_export(ExportOptions(run=run, out=out, check_users=0), say=messages.append)
    assert messages == [f"{out} is already complete; use --force to export again"]
    assert again.files == done.files and again.notes == done.notes
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == written
    changes: list[dict[str, Any]] = [
        *({"licence": "mit"}, {"base_licence": "mit"}, {"check_users": 1}, {"with_items": False}),
        *({"dtype": "bfloat16"}, {"adapter_only": True}),
    ]
    for change in changes:
        with raises(LlmrecError, Facts("exists", out, says="--force")):
            write(run, out, **change)
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    (run / "results.json").write_text(json.dumps({**results, "notes": ["measured again"]}), encoding="utf-8")
    with raises(LlmrecError, Facts("exists", out, says="--force")):
        write(run, out)
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == written


def test_existing_folder_needs_force(run: Path, tmp_path: Path) -> None:
    write(run, tmp_path / "out")
    with raises(LlmrecError, Facts("exists", tmp_path / "out", says="--force")):
        write(run, tmp_path / "out", licence="mit")
    (tmp_path / "out" / "README.md").write_text("edited", encoding="utf-8")
    with raises(LlmrecError, Facts("exists", tmp_path / "out", says="--force")):
        write(run, tmp_path / "out")
    write(run, tmp_path / "out", force=True, licence="mit")
    assert is_unchanged_export(tmp_path / "out") and (tmp_path / "out" / "LICENSE").is_file()
    (tmp_path / "out" / "mine.txt").write_text("keep me", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for folder in (tmp_path / "out", tmp_path / "link", run):
        with raises(LlmrecError, Facts("exists", folder, says=("`llmrec export`", "remove this folder, or"))):
            write(run, folder, force=True)
    assert (tmp_path / "out" / "mine.txt").is_file() and (run / "train.json").is_file()


def test_temporary_folders_of_running_processes_stay(tmp_path: Path) -> None:
    def fill(folder: Path, text: str) -> None:
        folder.mkdir()
        (folder / "file").write_text(text, encoding="utf-8")

    ended = subprocess.Popen(["true"])
    ended.wait()
    gone, alive = ended.pid, os.getppid()
    fill(tmp_path / f"out.llmrec-tmp-{alive}", "at work")
    fill(tmp_path / f"out.llmrec-tmp-{gone}", "half")
    fill(tmp_path / f"out.llmrec-old-{gone}", "complete")
    fill(tmp_path / f"output.llmrec-tmp-{gone}", "another name")
    with (
        raises(LlmrecError, Facts("exists", tmp_path / "out", says="--force")),
        placing.replacing_folder(tmp_path / "out", force=False),
    ):
        pass
    # A folder that a dead process moved aside is restored.
    assert (tmp_path / "out" / "file").read_text(encoding="utf-8") == "complete"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"out", f"out.llmrec-tmp-{alive}", f"output.llmrec-tmp-{gone}"}


def test_failed_export_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(export, "write_text", full)
        with raises(LlmrecError, Facts("unreadable", tmp_path / "out", says="No space left on device")):
            write(run, tmp_path / "out")
        assert not list(tmp_path.glob("out*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=50_000_000))
    with raises(LlmrecError, Facts("exhausted", tmp_path, says=("0.05 GB free", "--dtype"))):
        write(run, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def blocks(folder: Path, language: str) -> list[str]:
    text = (folder / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)\n```", text, flags=re.DOTALL)


def answered(run: Path, out: Path) -> str:
    """Answer the example of the card with the hf backend."""
    from llmrec.backends.encode import Encoder
    from llmrec.backends.hf.backend import HFBackend
    from llmrec.exports.card_facts import example_prompt

    loaded, bundled = load_recipe(run / "recipe.yaml"), bundle.read(str(out))
    sample = example_prompt(
        loaded.tasks.present(), bundled.templates, noun=bundled.noun, scale=bundled.rating_scale, seed=loaded.seed
    )
    encoder = Encoder(load_tokenizer(str(out), section(out)), max_length=512)
    backend = HFBackend(load_model(str(out), section(out)), encoder)
    return backend.generate([sample.prompt], max_tokens=sample.max_tokens)[0].text


@pytest.mark.parametrize("families", ["chat", pytest.param("list", marks=pytest.mark.slow)])
def test_python_example_of_the_card(
    families: str, run: Path, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    if families == "list":
        run = trained(llama_folder, tmp_path / "list", "tasks.direct=null", "tasks.rating=null")
    write(run, tmp_path / "films")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(blocks(tmp_path / "films", "python")[0], scope)
    assert capsys.readouterr().out.rstrip("\n") == answered(run, tmp_path / "films").rstrip("\n")


def test_rank_command_of_the_card(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from llmrec.cli.main import app

    write(run, tmp_path / "films", with_items=True)
    monkeypatch.chdir(tmp_path)
    echo, command = blocks(tmp_path / "films", "sh")[0].splitlines()
    subprocess.run(["sh", "-c", echo], check=True)
    done = CliRunner().invoke(app, [*command.split()[1:], "--backend", "hf", "--quiet"])
    assert done.exit_code == 0, done.output
    (line,) = (tmp_path / "ranked.jsonl").read_text(encoding="utf-8").splitlines()
    for title in ("Four of a Kind", "Five Fables", "Sixth Sense"):
        assert title in line


def test_command_reports_the_export(run: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from llmrec.cli.main import app

    out = tmp_path / "films"
    done = CliRunner().invoke(
        app, ["export", str(run), "--out", str(out), "--check-users", "2", "--base-licence", "mit"]
    )
    assert done.exit_code == 0, done.output
    assert "sequential: validation loss" in done.output and "largest difference of a logit" in done.output
    assert str(out) in done.output and is_unchanged_export(out)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.vllm
def test_vllm_answers_the_request_of_the_card(tmp_path: Path) -> None:
    """The commands of the card, on SmolLM2: the server answers like transformers."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from tests.servers.real import started

    out = tmp_path / "films"
    run = trained(Path(ModelSection().name), tmp_path / "run", "train.learning_rate=0.001", "model.max_length=1024")
    write(run, out, dtype="float32")
    serve, curl = (block for block in blocks(out, "sh") if block.startswith(("vllm serve", "curl")))
    words = shlex.split(curl.replace("\\\n", " "))
    body = json.loads(words[words.index("-d") + 1])
    path = next(word for word in words if word.startswith("http")).partition("8000")[2]
    assert path == "/v1/chat/completions"
    # The command names the folder relative to its parent folder.
    with started([*shlex.split(serve)[1:], "--dtype", "float32"], tmp_path, cwd=tmp_path) as address:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            (choice,) = json.load(response)["choices"]
    model, tokenizer = load_model(str(out), section(out)), load_tokenizer(str(out), section(out))
    text = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=body["max_tokens"], do_sample=False)
    expected = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert expected
    assert choice["message"]["content"] == expected


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A local hub over HTTP; uploads do not use Xet."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        yield hub


def test_push_uploads_the_folder_privately(run: Path, tmp_path: Path, hub: Hub) -> None:
    done = write(run, tmp_path / "out", push="me/films")
    assert hub.repositories == {"me/films": True} and hub.tokens == {TOKEN}
    assert hub.files["me/films"] == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert set(hub.files["me/films"]) == MODEL_FILES
    assert done.address == f"{hub.address}/me/films"
    assert 'from_pretrained("me/films")' in hub.files["me/films"]["README.md"].decode()
    write(run, tmp_path / "two", push="me/open", private=False, adapter_only=True, base_licence="mit")
    assert hub.repositories["me/open"] is False
    files = hub.files["me/open"]
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "two").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files


@pytest.mark.parametrize("status", [507, None])
def test_failed_push_keeps_the_folder(
    run: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, status: int | None
) -> None:
    hub.refuse = status
    if status is None:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    says = ("hf upload me/films", str(status or ""))
    with raises(LlmrecError, Facts("unreachable", column="--push", says=says)) as error:
        write(run, tmp_path / "out", push="me/films")
    assert TOKEN not in str(error.value) and "complete" in str(error.value)
    assert is_unchanged_export(tmp_path / "out") and not hub.files


def test_private_push_rejects_a_public_repository(run: Path, tmp_path: Path, hub: Hub) -> None:
    hub.repositories["me/films"] = False
    with raises(LlmrecError, Facts("contradiction", column="--push", says=("me/films", "--public"))):
        write(run, tmp_path / "out", push="me/films")
    assert is_unchanged_export(tmp_path / "out") and not hub.files


def test_push_is_checked_first(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with raises(LlmrecError, Facts("unreachable", column="--push", says="HF_HUB_OFFLINE")):
        write(run, tmp_path / "out", push="me/films")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with raises(LlmrecError, Facts("missing-value", column="--push", says=("HF_TOKEN", "`hf auth login`"))):
        write(run, tmp_path / "out", push="me/films")
    for name in ("films", "me/my/films", "me/ films"):
        with raises(LlmrecError, Facts("bad-value", column="--push", says="USER/NAME")):
            write(run, tmp_path / "out", push=name)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("content", [b"{", b"[]", b"[" * 100_000], ids=["cut off", "a list", "nested"])
def test_damaged_bundle_is_one_error(run: Path, tmp_path: Path, content: bytes) -> None:
    (run / "merged" / "llmrec.json").write_bytes(content)
    for call in (lambda: write(run, tmp_path / "out"), lambda: bundle.read(str(run))):
        with raises(LlmrecError, Facts("damaged", "llmrec.json")):
            call()
    assert not (tmp_path / "out").exists()


def test_damaged_results_are_one_error(run: Path, tmp_path: Path) -> None:
    (run / "results.json").write_text("{")
    for call in (lambda: write(run, tmp_path / "out"), lambda: audits.audit(run)):
        with raises(LlmrecError, Facts("syntax", "results.json")):
            call()


def test_changed_predictions_cannot_be_audited(run: Path) -> None:
    file, stored = run / "predictions.parquet", run / "results.json"
    pl.read_parquet(file)[1:].write_parquet(file)
    with raises(LlmrecError, Facts("damaged", file.name, says="was changed")):
        audits.audit(run)
    file.unlink()
    with raises(LlmrecError, Facts("missing-file", file.name)):
        audits.audit(run)
    # Results of earlier versions contain no checksum.
    stored.write_text(json.dumps(json.loads(stored.read_text(encoding="utf-8")) | {"files": {}}), encoding="utf-8")
    file.write_bytes(b"PAR1")
    with raises(LlmrecError, Facts("damaged", file.name, says="cannot be read")):
        audits.audit(run)


def test_audit_of_a_read_only_run(run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    checks = audits.audit(run)
    assert (run / "audit.json").stat().st_mtime_ns > before[run / "audit.json"]
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    monkeypatch.setattr(audits.os, "access", lambda path, mode: False)
    logging.getLogger("llmrec").setLevel(logging.WARNING)
    assert audits.audit(run) == checks
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before
    assert "is not writable" in caplog.text
