"""Only a checkpoint that was saved in full is gone on from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the train extra is not installed")

import torch

from llmrec.durable import MANIFEST, replacing, seal, verifies, write_json
from llmrec.errors import LlmrecError
from llmrec.train.checkpoint import keep_newest, newest
from tests.facts import Facts, raises


def checkpoint(folder: Path, step: int) -> Path:
    """Make a sealed checkpoint of two files."""
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    (made / "adapter_model.safetensors").write_bytes(bytes(range(256)) * step)
    (made / "trainer_state.json").write_text("{}", encoding="utf-8")
    seal(made)
    return made


def test_the_newest_sound_one_is_chosen_by_number(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        checkpoint(tmp_path, step)
    assert newest(tmp_path) == tmp_path / "checkpoint-10"


def test_there_may_be_none(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert newest(tmp_path / "absent") is None


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing file", "no manifest", "torn manifest"])
def test_a_torn_one_is_dropped_for_the_one_before(tmp_path: Path, damage: str) -> None:
    checkpoint(tmp_path, 2)
    torn = checkpoint(tmp_path, 4)
    weights, manifest = torn / "adapter_model.safetensors", torn / MANIFEST
    content = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(content[:-1])
    elif damage == "flipped":
        weights.write_bytes(content[:-1] + b"\x00")
    elif damage == "missing file":
        weights.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text(encoding="utf-8")[:20], encoding="utf-8")
    assert newest(tmp_path) == tmp_path / "checkpoint-2"
    assert not torn.exists()


def test_a_file_beside_the_manifest_does_not_matter(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, 2)
    (made / "note.txt").write_text("x", encoding="utf-8")
    assert verifies(made)


def test_a_draft_never_stands_under_the_final_name(tmp_path: Path) -> None:
    target = tmp_path / "a" / "x.json"
    write_json(target, {"a": 1})
    before = target.read_bytes()
    with pytest.raises(ValueError), replacing(target) as draft:
        draft.write_text("half", encoding="utf-8")
        raise ValueError
    assert target.read_bytes() == before
    with pytest.raises(ValueError):
        write_json(target, {"a": float("nan")})
    assert target.read_bytes() == before and list(target.parent.iterdir()) == [target]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("one", "two"):
        with replacing(target) as draft:
            draft.mkdir()
            (draft / f"{content}.txt").write_text(content, encoding="utf-8")
    assert [file.name for file in target.iterdir()] == ["two.txt"]


def test_what_only_looks_like_a_checkpoint_stays(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        checkpoint(tmp_path, step)
    for name in ("checkpoint-foo", "checkpoint-5.bak"):
        (tmp_path / name).mkdir()
    assert newest(tmp_path) == tmp_path / "checkpoint-6"
    keep_newest(2, tmp_path / "checkpoint-6")
    left = {"checkpoint-foo", "checkpoint-5.bak", "checkpoint-4", "checkpoint-6"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_a_checkpoint_that_is_a_link_is_refused_and_kept(tmp_path: Path) -> None:
    elsewhere = checkpoint(tmp_path / "elsewhere", 4)
    (tmp_path / "checkpoint-4").symlink_to(elsewhere)
    with raises(LlmrecError, Facts("unsafe", "checkpoint-4")):
        newest(tmp_path)
    assert verifies(elsewhere)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_sealed_checkpoint_is_not_run_and_the_one_before_is_used(tmp_path: Path, name: str) -> None:
    before, sealed = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    torch.save({"random": torch.zeros(3), "numpy": np.random.RandomState(0).get_state()}, before / "rng_state.pth")
    seal(before)
    proof = tmp_path / "ran"
    (sealed / name).write_bytes(f"\x80\x04cos\nsystem\n(S'touch {proof}'\ntR.".encode("latin-1"))
    seal(sealed)
    assert verifies(sealed)
    assert newest(tmp_path) == before
    assert not sealed.exists()
    assert not proof.exists()
