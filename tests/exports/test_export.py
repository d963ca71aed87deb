"""Exports of real runs on a tiny model: what is in the folder, what never is, and that it answers as it was trained."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from llmrec.answer.rank.run import rank_file
from llmrec.backends.hf.backend import HFBackend
from llmrec.data.assemble import read_items
from llmrec.errors import DataError, LlmrecError
from llmrec.exports import agreement, card_facts, export
from llmrec.exports import files as placing
from llmrec.exports.export import Exported
from llmrec.exports.files import verify
from llmrec.exports.options import ExportOptions
from llmrec.machine import Memory
from llmrec.models.load import load_model, load_tokenizer
from llmrec.pipeline import audit as audits
from llmrec.pipeline import bundle, runs
from llmrec.recipe.load import dump, load_recipe
from llmrec.recipe.schema import ModelSection, Recipe
from llmrec.report import page as pages
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
    # Enough for the adapter to matter after two steps.
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


def _noted(opened: list[int], *args: Any, **options: Any) -> HFBackend:
    backend = HFBackend(*args, **options)
    opened.append(backend.batch_tokens)
    return backend


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(IDS)).logits


# --------------------------------------------------------------------------- what is in the folder


def test_a_folder_is_whole_and_stands_alone(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "films"
    done = write(run, out, check_users=4)
    assert {file.name for file in out.iterdir()} == MODEL_FILES == set(done.files)
    assert verify(out)
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=out, check=True)
    assert (out / "model.safetensors").read_bytes() == (run / "merged" / "model.safetensors").read_bytes()
    shutil.rmtree(run)
    found = bundle.read(str(out))
    assert found.tuned and found.run is None and set(found.tasks.present()) == {"rating", "sequential", "direct"}
    assert load_tokenizer(str(out), section(out)).chat_template
    settings = json.loads((out / "generation_config.json").read_text(encoding="utf-8"))
    assert settings == {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 0, "do_sample": False}


def test_the_card_reports_the_run(run: Path, tmp_path: Path) -> None:
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


def test_items_are_put_in_unless_they_are_to_stay_out(run: Path, tmp_path: Path) -> None:
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
def test_ids_are_ranked_by_their_titles_or_not_at_all(run: Path, tmp_path: Path) -> None:
    """An export with items ranks ids as its run does; one without takes none for a title, and says what it needs."""
    write(run, tmp_path / "films")
    write(run, tmp_path / "bare", with_items=False)
    items = read_items(tmp_path / "films" / "items.parquet")
    past, *pool = sorted(items)[:5]

    def asked(model: Path, history: Any, candidates: Any, **more: Any) -> dict[str, Any]:
        path = tmp_path / "in.jsonl"
        request = {"id": "one", "history": [history], "candidates": candidates}
        path.write_text(json.dumps(request) + "\n", encoding="utf-8")
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        rank_file(rank_cases.options(model, path, tmp_path / "out.jsonl", restart=True, **more))
        (line,) = rank_cases.lines(tmp_path / "out.jsonl")
        return line

    def titled(item: str) -> dict[str, str]:
        return {"item_id": item, "title": items[item].title}

    known = asked(run, past, pool)
    assert sorted(known["titles"]) == sorted(items[item].title for item in pool)
    assert asked(tmp_path / "films", past, pool) == known
    for history, candidates in ((past, pool), (titled(past), pool), (past, [titled(item) for item in pool])):
        with raises(DataError, Facts("unknown-name", tmp_path / "in.jsonl", line=1, column="item_id", says="--items")):
            asked(tmp_path / "bare", history, candidates)
    assert asked(tmp_path / "bare", titled(past), [titled(item) for item in pool]) == known
    table = tmp_path / "films" / "items.parquet"
    assert asked(tmp_path / "bare", past, pool, items=table) == known


@pytest.mark.parametrize(
    "options", [{"with_items": True, "check_users": 2}, {"adapter_only": True}], ids=["model", "adapter"]
)
def test_nothing_private_is_handed_out(
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


@pytest.mark.parametrize("what", [TOKEN, "from /srv/secret/place"])
def test_a_secret_or_a_path_in_a_recipe_stops_the_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("LLMREC_CACHE", "/srv/secret/place")
    changed = load_recipe(run / "recipe.yaml").model_copy(update={"description": f"Made {what}."})
    (run / "recipe.yaml").write_text(dump(changed), encoding="utf-8")
    with raises(LlmrecError, Facts("unsafe", "README.md")) as error:
        write(run, tmp_path / "films")
    assert TOKEN not in str(error.value)
    assert not (tmp_path / "films").exists()


def test_a_base_model_is_named_without_the_folders_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))
    hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
    converted = str(tmp_path / "cache" / "models" / "SmolLM2-135M-Instruct.Q4_1")
    for name in ("SmolLM2-135M-Instruct", hub, converted):
        found = card_facts.origin(ModelSection(name=name), converted)
        assert (found.hub, found.licence) == (hub, "apache-2.0") and "quantised" in found.note
    snapshot = tmp_path / "hub" / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: mit\nlanguage: [en, de]\n---\n# x\n", encoding="utf-8")
    found = card_facts.origin(ModelSection(name="org/base", revision="main"), str(snapshot))
    assert (found.hub, found.revision, found.licence, found.languages) == ("org/base", "ab" * 20, "mit", ("en", "de"))
    assert not found.note
    (snapshot / "README.md").write_text("---\n[broken\n---\n", encoding="utf-8")
    (snapshot / "config.json").write_text('{"license": "gemma"}', encoding="utf-8")
    found = card_facts.origin(ModelSection(name=str(snapshot)), str(snapshot))
    assert (found.hub, found.name, found.licence) == (None, "ab" * 20, "gemma")


# --------------------------------------------------------------------------- the weights


@pytest.mark.parametrize("kind", ["llama_folder", "qwen_folder"])
def test_merged_weights_answer_like_base_and_adapter(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    base = request.getfixturevalue(kind)
    run = trained(base, tmp_path / "run")
    opened: list[int] = []
    monkeypatch.setattr(agreement, "HFBackend", partial(_noted, opened))
    done = write(run, tmp_path / "out", check_users=2)
    # Adapter and export are asked as the recipe says.
    assert opened == [777, 777]
    plain = load_model(str(base), section(base))
    before = logits(plain).clone()
    live = logits(peft.PeftModel.from_pretrained(plain, run / "adapter"))
    merged = logits(load_model(str(tmp_path / "out"), section(tmp_path / "out")))
    assert float((live - merged).abs().max()) < 1e-4
    assert float((live - before).abs().max()) > 0.1, "the adapter does nothing, so this test shows nothing"
    assert done.agreement is not None and done.agreement.logit < 1e-4
    assert all(abs(entry.loss[1] - entry.loss[0]) < 1e-4 for entry in done.agreement.families)
    assert "The run was not evaluated" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_weights_are_reused_in_their_dtype_and_merged_anew_in_another(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmrec.train import lora

    merge, calls = lora.merge, []
    monkeypatch.setattr(lora, "merge", lambda *args: calls.append(args) or merge(*args))
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


def test_a_measurement_that_does_not_fit_into_memory_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tight = Memory(total=2**40, available=2**18)
    monkeypatch.setattr("llmrec.exports.agreement.memory", lambda: tight)
    with raises(LlmrecError, Facts("exhausted", column="--check-users", says="--check-users 0")):
        write(run, tmp_path / "out", dtype="bfloat16", check_users=2)
    done = write(run, tmp_path / "out", dtype="bfloat16", check_users=0)
    assert done.agreement is None


def test_a_damaged_merged_model_is_not_reused(run: Path, tmp_path: Path) -> None:
    good = (run / "merged" / "model.safetensors").read_bytes()
    (run / "merged" / "model.safetensors").write_bytes(good[:-1] + b"\x01")
    write(run, tmp_path / "out", dtype="float32")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == good


def test_another_base_model_than_the_one_trained_on_is_refused(tmp_path: Path) -> None:
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


def test_an_altered_adapter_is_named_with_both_hashes(run: Path, tmp_path: Path) -> None:
    file = run / "adapter" / "adapter_model.safetensors"
    recorded = json.loads((run / "train.json").read_text(encoding="utf-8"))["adapter_sha256"]
    assert runs.weights_sha256(run / "adapter") == recorded
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(LlmrecError) as error:
        write(run, tmp_path / "out")
    assert recorded in str(error.value) and runs.weights_sha256(run / "adapter") in str(error.value)


def test_an_adapter_goes_alone(run: Path, tmp_path: Path, llama_folder: Path) -> None:
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


def test_gguf_has_a_name_for_every_tensor_of_an_export(run: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    write(run, tmp_path / "out")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {names.get_name(name, try_suffixes=(".weight",)) is not None for name in tensors} == {True}


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
def test_what_a_quantised_run_loses_is_measured(llama_folder: Path, tmp_path: Path) -> None:
    """The adapter learned on NF4 weights and the export has the plain ones: losses and figures move, and are shown."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    run = trained(llama_folder, tmp_path / "run", "train.method=qlora", "tasks.explanation={}")
    done = write(run, tmp_path / "out", check_users=12)
    found = done.agreement
    assert found is not None and "NF4" in found.before
    measured = {entry.family: entry for entry in found.families}
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
    assert 1e-3 < found.logit < 5.0


# --------------------------------------------------------------------------- errors


def test_runs_that_cannot_be_exported_say_why(run: Path, tmp_path: Path) -> None:
    with raises(LlmrecError, Facts("missing-file", tmp_path, says="recipe.yaml")):
        write(tmp_path, tmp_path / "out")
    other = load_recipe(run / "recipe.yaml", ["train.steps=7"])
    (run / "recipe.yaml").write_text(dump(other), encoding="utf-8")
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


def test_data_that_is_gone_is_needed_for_the_check_and_the_items_only(tmp_path: Path, llama_folder: Path) -> None:
    table = tmp_path / "shop.csv"
    table.write_bytes(resource("recipes", "made", "reviews.csv").read_bytes())
    own = load_recipe("recipes/movielens-100k/four-tasks.yaml", ["data={source: made-reviews}"]).data
    columns = own.model_copy(update={"source": "table", "path": str(table)}).model_dump(mode="json")
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


def test_a_changed_recipe_is_noted(run: Path, tmp_path: Path) -> None:
    other = load_recipe(run / "recipe.yaml", ["train.learning_rate=0.5"])
    (run / "recipe.yaml").write_text(dump(other), encoding="utf-8")
    done = write(run, tmp_path / "out")
    assert "have changed since training" in done.notes[0]
    assert done.notes[0] in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert write(run, tmp_path / "two").notes == done.notes


# --------------------------------------------------------------------------- the place


def test_the_same_command_finds_its_finished_work(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = write(run, out)
    written = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    said: list[str] = []
    again = export.write_export(ExportOptions(run=run, out=out, check_users=0), say=said.append)
    assert said == [f"{out} is already complete; use --force to export again"]
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


def test_an_existing_folder_is_replaced_by_force_alone(run: Path, tmp_path: Path) -> None:
    write(run, tmp_path / "out")
    with raises(LlmrecError, Facts("exists", tmp_path / "out", says="--force")):
        write(run, tmp_path / "out", licence="mit")
    (tmp_path / "out" / "README.md").write_text("edited", encoding="utf-8")
    with raises(LlmrecError, Facts("exists", tmp_path / "out", says="--force")):
        write(run, tmp_path / "out")
    write(run, tmp_path / "out", force=True, licence="mit")
    assert verify(tmp_path / "out") and (tmp_path / "out" / "LICENSE").is_file()
    (tmp_path / "out" / "mine.txt").write_text("keep me", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for place in (tmp_path / "out", tmp_path / "link", run):
        with raises(LlmrecError, Facts("exists", place, says=("`llmrec export`", "remove this folder, or"))):
            write(run, place, force=True)
    assert (tmp_path / "out" / "mine.txt").is_file() and (run / "train.json").is_file()


def test_leftovers_of_living_processes_stay(tmp_path: Path) -> None:
    def fill(folder: Path, text: str) -> None:
        folder.mkdir()
        (folder / "file").write_text(text, encoding="utf-8")

    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    gone = int(dead.stdout)
    alive = os.getppid()
    fill(tmp_path / f"out.llmrec-tmp-{alive}", "at work")
    fill(tmp_path / f"out.llmrec-tmp-{gone}", "half")
    fill(tmp_path / f"out.llmrec-old-{gone}", "whole")
    fill(tmp_path / f"output.llmrec-tmp-{gone}", "another name")
    with (
        raises(LlmrecError, Facts("exists", tmp_path / "out", says="--force")),
        placing.placing(tmp_path / "out", force=False),
    ):
        pass
    # What was moved aside by a process that died before it put the new folder in place is back.
    assert (tmp_path / "out" / "file").read_text(encoding="utf-8") == "whole"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"out", f"out.llmrec-tmp-{alive}", f"output.llmrec-tmp-{gone}"}


def test_an_error_on_the_way_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(export, "write_text", full)
        with raises(LlmrecError, Facts("unreadable", tmp_path / "out", says="No space left on device")):
            write(run, tmp_path / "out")
        assert not list(tmp_path.glob("out*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=50_000_000))
    with raises(LlmrecError, Facts("exhausted", tmp_path, says=("0.05 GB free", "--dtype"))):
        write(run, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


# --------------------------------------------------------------------------- what the card tells to type


def blocks(folder: Path, language: str) -> list[str]:
    text = (folder / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)\n```", text, flags=re.DOTALL)


def answered(run: Path, out: Path) -> str:
    """Ask the example of the card through the hf backend, as llmrec would."""
    from llmrec.backends.encode import Encoder
    from llmrec.backends.hf.backend import HFBackend
    from llmrec.exports.card_facts import sample_prompt

    loaded, told = load_recipe(run / "recipe.yaml"), bundle.read(str(out))
    sample = sample_prompt(
        loaded.tasks.present(), told.templates, noun=told.noun, scale=told.rating_scale, seed=loaded.seed
    )
    encoder = Encoder(load_tokenizer(str(out), section(out)), max_length=512)
    backend = HFBackend(load_model(str(out), section(out)), encoder)
    return backend.generate([sample.prompt], max_tokens=sample.max_tokens)[0].text


@pytest.mark.parametrize("families", ["chat", "list"])
def test_the_python_of_the_card_runs_and_asks_as_llmrec_does(
    families: str, run: Path, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    if families == "list":
        run = trained(llama_folder, tmp_path / "list", "tasks.direct=null", "tasks.rating=null")
    write(run, tmp_path / "films")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(blocks(tmp_path / "films", "python")[0], scope)
    assert capsys.readouterr().out.rstrip("\n") == answered(run, tmp_path / "films").rstrip("\n")


def test_the_rank_command_of_the_card_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_command_line_says_what_it_wrote(run: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from llmrec.cli.main import app

    out = tmp_path / "films"
    done = CliRunner().invoke(
        app, ["export", str(run), "--out", str(out), "--check-users", "2", "--base-licence", "mit"]
    )
    assert done.exit_code == 0, done.output
    assert "sequential: validation loss" in done.output and "largest difference of a logit" in done.output
    assert str(out) in done.output and verify(out)


# --------------------------------------------------------------------------- pushing


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, spoken to over HTTP; uploads go the way without Xet."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.address)
        yield found


def test_a_push_uploads_exactly_the_folder_and_is_private(run: Path, tmp_path: Path, hub: Hub) -> None:
    done = write(run, tmp_path / "out", push="me/films")
    assert hub.repositories == {"me/films": True} and hub.tokens == {TOKEN}
    assert hub.files["me/films"] == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert set(hub.files["me/films"]) == MODEL_FILES
    assert done.address == f"{hub.address}/me/films"
    assert 'from_pretrained("me/films")' in hub.files["me/films"]["README.md"].decode()
    write(run, tmp_path / "two", push="me/open", private=False)
    assert hub.repositories["me/open"] is False


def test_an_adapter_is_pushed_alone(run: Path, tmp_path: Path, hub: Hub) -> None:
    write(run, tmp_path / "out", adapter_only=True, base_licence="mit", push="me/adapter")
    files = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert hub.files["me/adapter"] == files
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files


def _refuses(hub: Hub) -> None:
    hub.refuse = 507


def _is_public(hub: Hub) -> None:
    hub.repositories["me/films"] = False


@pytest.mark.parametrize(
    ("prepare", "facts"),
    [
        (_refuses, Facts("unreachable", column="--push", says=("507", "hf upload me/films"))),
        (_is_public, Facts("contradiction", column="--push", says=("me/films", "--public"))),
    ],
)
def test_a_push_that_fails_keeps_the_folder(
    run: Path, tmp_path: Path, hub: Hub, prepare: Callable[[Hub], None], facts: Facts
) -> None:
    prepare(hub)
    with raises(LlmrecError, facts) as error:
        write(run, tmp_path / "out", push="me/films")
    assert TOKEN not in str(error.value) and "complete" in str(error.value)
    assert verify(tmp_path / "out") and not hub.files


def test_an_unreachable_hub_is_one_error(run: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with raises(LlmrecError, Facts("unreachable", column="--push", says="hf upload me/films")):
        write(run, tmp_path / "out", push="me/films")
    assert verify(tmp_path / "out")


def test_what_a_push_lacks_is_found_before_any_work(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


# --------------------------------------------------------------------------- damaged runs


_DAMAGE = {
    "cut off": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "null": lambda file: file.write_text("null"),
    "a list": lambda file: file.write_text("[]"),
    "empty": lambda file: file.write_text("{}"),
    "nested": lambda file: file.write_text("[" * 100_000),
    "bytes": lambda file: file.write_bytes(b"\xff\xfe\0"),
}
_BROKEN = ("damaged", "syntax", "wrong-format", "missing-key", "bad-value")


@pytest.mark.parametrize("damage", _DAMAGE.values(), ids=_DAMAGE)
@pytest.mark.parametrize("reader", ["audit", "export"])
def test_damaged_results_are_one_line(run: Path, tmp_path: Path, reader: str, damage: Callable[[Path], object]) -> None:
    damage(run / "results.json")
    with pytest.raises(LlmrecError) as error:
        if reader == "audit":
            audits.audit(run)
        else:
            write(run, tmp_path / "out")
    assert error.value.kind in _BROKEN
    assert (error.value.file or "").endswith("results.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [each for name, each in _DAMAGE.items() if name != "null"])
def test_a_damaged_bundle_is_one_line(run: Path, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    damage(run / "merged" / "llmrec.json")
    for open_it in (lambda: write(run, tmp_path / "out"), lambda: bundle.read(str(run))):
        with raises(LlmrecError, Facts("damaged", "llmrec.json")):
            open_it()
    assert not (tmp_path / "out").exists()


def test_damaged_answers_are_one_line(run: Path) -> None:
    (run / "predictions.parquet").write_bytes(b"PAR1")
    with raises(LlmrecError, Facts("damaged", "predictions.parquet", says="llmrec eval")):
        audits.audit(run)
    (run / "predictions.parquet").unlink()
    with raises(LlmrecError, Facts("missing-file", "predictions.parquet")):
        audits.audit(run)


def test_a_run_that_cannot_be_written_to_is_audited_and_left_as_it_is(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    checks = audits.audit(run)
    assert (run / "audit.json").stat().st_mtime_ns > before[run / "audit.json"]
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    monkeypatch.setattr(audits.os, "access", lambda path, mode: False)
    logging.getLogger("llmrec").setLevel(logging.WARNING)
    assert audits.audit(run) == checks
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before
    assert "is not writable" in caplog.text


def test_a_report_does_not_write_through_a_link(run: Path, tmp_path: Path) -> None:
    elsewhere = Path(shutil.copytree(run / "report", tmp_path / "elsewhere"))
    before = {file.name: file.stat().st_mtime_ns for file in elsewhere.iterdir()}
    shutil.rmtree(run / "report")
    (run / "report").symlink_to(elsewhere)
    with raises(LlmrecError, Facts("unsafe", "report")):
        pages.write(run)
    assert {file.name: file.stat().st_mtime_ns for file in elsewhere.iterdir()} == before
