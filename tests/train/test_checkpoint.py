"""Training resumes only from complete checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the train extra is not installed")

import torch

from llmrec.durable import MANIFEST, matches_manifest, replace_atomically, write_json, write_manifest
from llmrec.errors import LlmrecError
from llmrec.train.checkpoint import newest_valid_checkpoint, remove_old_checkpoints
from tests.facts import Facts, raises


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "adapter_model.safetensors").write_bytes(bytes(range(256)) * step)
    (path / "trainer_state.json").write_text("{}", encoding="utf-8")
    write_manifest(path)
    return path


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "truncated": ("adapter_model.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-1])),
    "flipped": ("adapter_model.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x00")),
    "missing file": ("adapter_model.safetensors", Path.unlink),
    "no manifest": (MANIFEST, Path.unlink),
    "truncated manifest": (MANIFEST, lambda file: file.write_bytes(file.read_bytes()[:20])),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoint_is_removed_and_the_previous_one_used(
    name: str, damage: Callable[[Path], object], tmp_path: Path
) -> None:
    checkpoint(tmp_path, 2)
    damaged = checkpoint(tmp_path, 4)
    damage(damaged / name)
    assert newest_valid_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert not damaged.exists()


def test_files_and_folders_are_replaced_atomically(tmp_path: Path) -> None:
    target = tmp_path / "a" / "x.json"
    write_json(target, {"a": 1})
    before = target.read_bytes()
    with pytest.raises(ValueError), replace_atomically(target) as draft:
        draft.write_text("half", encoding="utf-8")
        raise ValueError
    assert target.read_bytes() == before
    with pytest.raises(ValueError):
        write_json(target, {"a": float("nan")})
    assert target.read_bytes() == before and list(target.parent.iterdir()) == [target]
    folder = tmp_path / "model"
    for content in ("one", "two"):
        with replace_atomically(folder) as draft:
            draft.mkdir()
            (draft / f"{content}.txt").write_text(content, encoding="utf-8")
    assert [file.name for file in folder.iterdir()] == ["two.txt"]


def test_newest_is_chosen_by_number_and_other_folders_remain(tmp_path: Path) -> None:
    assert newest_valid_checkpoint(tmp_path) is newest_valid_checkpoint(tmp_path / "absent") is None
    for step in (2, 9, 10):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-10" / "note.txt").write_text("no file of the manifest")
    for name in ("checkpoint-foo", "checkpoint-5.bak"):
        (tmp_path / name).mkdir()
    assert newest_valid_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    remove_old_checkpoints(2, tmp_path / "checkpoint-10")
    remaining = {"checkpoint-foo", "checkpoint-5.bak", "checkpoint-9", "checkpoint-10"}
    assert {path.name for path in tmp_path.iterdir()} == remaining


def test_rejects_symlinked_checkpoint(tmp_path: Path) -> None:
    elsewhere = checkpoint(tmp_path / "elsewhere", 4)
    (tmp_path / "checkpoint-4").symlink_to(elsewhere)
    with raises(LlmrecError, Facts("unsafe", "checkpoint-4")):
        newest_valid_checkpoint(tmp_path)
    assert matches_manifest(elsewhere)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_pickle_in_sealed_checkpoint_is_not_loaded(tmp_path: Path, name: str) -> None:
    before, sealed = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    torch.save({"random": torch.zeros(3), "numpy": np.random.RandomState(0).get_state()}, before / "rng_state.pth")
    write_manifest(before)
    proof = tmp_path / "ran"
    (sealed / name).write_bytes(f"\x80\x04cos\nsystem\n(S'touch {proof}'\ntR.".encode("latin-1"))
    write_manifest(sealed)
    assert matches_manifest(sealed)
    assert newest_valid_checkpoint(tmp_path) == before
    assert not sealed.exists()
    assert not proof.exists()
