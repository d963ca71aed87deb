"""Foreign files and links in folders that llmrec writes and clears."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrec.answer.rank.run import rank_file
from llmrec.durable import replace_atomically, write_text
from llmrec.errors import LlmrecError
from llmrec.exports.files import replacing_folder
from llmrec.index.table import ItemIndex
from llmrec.pipeline.index_report import _has_foreign_files
from llmrec.pipeline.resume import LOCK_FILE, RUN_FILES, lock_folder
from llmrec.report import page
from tests.answer.rank_cases import jsonl, options, records
from tests.facts import Facts, raises


@pytest.fixture
def ranking(llama_folder: Path, tmp_path: Path) -> object:
    source = jsonl(tmp_path / "in.jsonl", records(2))
    return lambda **changes: options(llama_folder, source, tmp_path / "o.jsonl", **changes)


@pytest.mark.parametrize("restart", [False, True])
def test_keeps_foreign_file_in_parts_folder(ranking, tmp_path: Path, restart: bool) -> None:  # type: ignore[no-untyped-def]
    mine = tmp_path / "o.jsonl.parts" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with raises(LlmrecError, Facts("exists", says="mine.txt")):
        rank_file(ranking(restart=restart))
    assert mine.read_text() == "mine"
    assert [path.name for path in mine.parent.iterdir()] == ["mine.txt"]


def test_rejects_linked_parts_folder(ranking, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "keep.txt").write_text("keep")
    (tmp_path / "o.jsonl.parts").symlink_to(elsewhere)
    with raises(LlmrecError, Facts("unsafe", tmp_path / "o.jsonl.parts")):
        rank_file(ranking(restart=True))
    assert [path.name for path in elsewhere.iterdir()] == ["keep.txt"]


def test_keeps_file_added_to_parts_folder(ranking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from llmrec.answer.rank import run as rank_files

    write = rank_files.write_lists
    mine = tmp_path / "o.jsonl.parts" / "mine.txt"

    def late(*args: object) -> None:
        mine.write_text("mine")
        write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(rank_files, "write_lists", late)
    rank_file(ranking())
    assert mine.read_text() == "mine"
    assert {path.name for path in mine.parent.iterdir()} == {"mine.txt", LOCK_FILE}


def test_rejects_symlinked_lock(tmp_path: Path) -> None:
    precious, run = tmp_path / "precious", tmp_path / "run"
    precious.write_text("precious")
    run.mkdir()
    (run / LOCK_FILE).symlink_to(precious)
    with raises(LlmrecError, Facts("unsafe", run / LOCK_FILE)), lock_folder(run):
        pass
    assert precious.read_text() == "precious"


def test_keeps_content_of_foreign_lock(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text("mine")
    with raises(LlmrecError, Facts("exists", tmp_path, says=LOCK_FILE)), lock_folder(tmp_path, RUN_FILES):
        pass
    with lock_folder(tmp_path):
        pass
    assert (tmp_path / LOCK_FILE).read_text() == "mine"


def test_run_does_not_use_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.txt").write_text("mine")
    with raises(LlmrecError, Facts("exists", tmp_path, says="adapter")), lock_folder(tmp_path, RUN_FILES):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_run_continues_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with lock_folder(folder, RUN_FILES):
        (folder / "adapter").mkdir()
    with lock_folder(folder, RUN_FILES):
        assert (folder / "adapter").is_dir() and (folder / LOCK_FILE).read_text()


@pytest.mark.parametrize("name", ["merged", "results.json"])
def test_rejects_link_with_name_of_run_file(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    with lock_folder(run, RUN_FILES):
        pass
    (run / name).symlink_to(tmp_path / "elsewhere")
    with raises(LlmrecError, Facts("unsafe", run / name)), lock_folder(run, RUN_FILES):
        pass


def test_report_is_not_written_through_link(tmp_path: Path) -> None:
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    for folder in (elsewhere, run):
        folder.mkdir()
    (elsewhere / "index.html").write_text("mine")
    (run / "report").symlink_to(elsewhere)
    with raises(LlmrecError, Facts("unsafe", run / "report")):
        page._write_leak_pages(run, ())
    assert (elsewhere / "index.html").read_text() == "mine"


def test_draft_keeps_foreign_folder(tmp_path: Path) -> None:
    mine = tmp_path / ".table.csv.draft"
    mine.mkdir()
    (mine / "mine.txt").write_text("mine")
    write_text(tmp_path / "table.csv", "a")
    assert (mine / "mine.txt").read_text() == "mine"


def test_folder_does_not_replace_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "merged").symlink_to(tmp_path / "elsewhere")
    with raises(LlmrecError, Facts("unsafe", tmp_path / "merged")), replace_atomically(tmp_path / "merged") as draft:
        draft.mkdir()
    assert (tmp_path / "merged").is_symlink()


def test_export_keeps_foreign_folder(tmp_path: Path) -> None:
    process = next(number for number in range(4_000_000, 5_000_000) if not Path(f"/proc/{number}").exists())
    mine = tmp_path / f"model.old-{process}"
    mine.mkdir()
    with replacing_folder(tmp_path / "model", force=False) as draft:
        (draft / "x").touch()
    assert mine.is_dir()


def test_index_replaces_only_an_index(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    ItemIndex("title", {}).save(folder)
    assert not _has_foreign_files(folder)
    (folder / "mine.txt").touch()
    assert _has_foreign_files(folder)
    (folder / "mine.txt").unlink()
    (folder / "index.json").write_text("{}")
    assert _has_foreign_files(folder)


def test_file_does_not_replace_folder(tmp_path: Path) -> None:
    (tmp_path / "row.json").mkdir()
    with raises(LlmrecError, Facts("exists", tmp_path / "row.json", says="move the folder away")):
        write_text(tmp_path / "row.json", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["row.json"]
