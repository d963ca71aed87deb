"""`llmrec chat`: conversations, transcripts, replay and tuning."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from llmrec.answer.known import read_known_entities
from llmrec.chat import leading, transcripts
from llmrec.chat.calls import Show
from llmrec.chat.fit import GRADE_PHRASES
from llmrec.chat.options import MAX_LIST_LENGTH, ChatOptions
from llmrec.chat.run import run_chat
from llmrec.cli.main import app
from llmrec.errors import DataError
from tests.answer.rank_cases import toy_run
from tests.encoders import tiny_encoder
from tests.facts import Facts, raises

pytest.importorskip("torch", reason="the train extra is not installed")


@pytest.fixture(scope="module")
def run(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_run(llama_folder, tmp_path_factory.mktemp("chat") / "run")


def test_conversation_is_saved_and_replayed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.jsonl"
    monkeypatch.setattr("sys.stdin", io.StringIO("surprise me please\nmore\nwhy the first?\nbye\n\nnot read\n"))
    options = ChatOptions(model=str(run), models=("item-knn",), save=file, calls=True)
    assert run_chat(options) == 0
    turns = [json.loads(line) for line in file.read_text().splitlines()]
    assert [turn["user"] for turn in turns] == ["surprise me please", "more", "why the first?", "bye"]
    output = capsys.readouterr().out
    assert all(turn["text"] in output for turn in turns) and '"tool": "show"' in output
    assert len(turns[0]["items"]) == 5 and not set(turns[0]["items"]) & set(turns[1]["items"])
    again = ChatOptions(model=str(run), models=("item-knn",), replay=file)
    assert run_chat(again) == 0
    turns[1]["items"] = turns[0]["items"]
    file.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    assert run_chat(again) == 1 and "1 with different output" in capsys.readouterr().out


def test_learns_from_simulated_users(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = tmp_path / "talks.jsonl", tmp_path / "dual"
    options = ChatOptions(model=str(run), models=("popularity",), encoder=tiny_encoder())
    assert run_chat(replace(options, simulate=20, save=file, learn=folder)) == 0
    turns = transcripts.read(file)
    assert sum(turn.user is None for turn in turns) == 20 and "20 conversations" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("something for the kitchen\n"))
    assert run_chat(replace(options, encoder=str(folder))) == 0
    with raises(DataError, Facts("missing-key", column="--learn")):
        run_chat(replace(options, learn=folder))
    with raises(DataError, Facts("contradiction", column="--simulate")):
        run_chat(replace(options, simulate=2, replay=file))


def test_tunes_a_manager(
    run: Path, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl", reason="the train extra is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(leading, "_EVALUATED_CALLS", 2)
    page = tmp_path / "manager.yaml"
    page.write_text(
        "name: tuned\ndata: {source: made-reviews}\ntasks: {sequential: {}}\neval: {arms: []}\n"
        f"model: {{name: {llama_folder}, dtype: float32, max_length: 4000}}\n"
        "train: {steps: 3, valid_rows: 8, batch_tokens: 2000, max_row_tokens: 3000, learning_rate: 0.01, "
        "packing: tree}\n"
    )
    options = ChatOptions(model=str(run), models=("popularity",), dtype="float32")
    file = tmp_path / "talks.jsonl"
    assert run_chat(replace(options, simulate=20, tune=page, save=file)) == 0
    output = capsys.readouterr().out
    assert "tuned, held out: " in output and "usual, in other words: " in output and "--manager runs/tuned" in output
    first, last = (float(each) for each in output.partition("held-out loss ")[2].splitlines()[0].split(", "))
    assert last < first - 0.2
    monkeypatch.setattr("sys.stdin", io.StringIO("something for the kitchen\n"))
    assert run_chat(replace(options, manager="runs/tuned")) == 0 and leading.tuning.manager_weights("runs/tuned")[1]
    # Tuning also accepts a transcript, but this one is too short.
    transcripts.write(file, transcripts.read(file)[:9])
    with raises(DataError, Facts("too-few", column="--tune")):
        run_chat(replace(options, replay=file, tune=page))
    for more, kind in (({}, "missing-key"), ({"simulate": 20, "manager": "runs/tuned"}, "contradiction")):
        with raises(DataError, Facts(kind, column="--tune")):
            run_chat(replace(options, tune=page, **more))


def test_language_model_grades_lists(
    run: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("something for the kitchen\nwhy the first?\n"))
    chosen = ChatOptions(model=str(run), models=("popularity",), ranker=str(llama_folder), dtype="float32", calls=True)
    assert run_chat(chosen) == 0
    output = capsys.readouterr().out
    assert any(f"A language model calls it: {phrase}." in output for phrase in GRADE_PHRASES)


def test_model_without_items_is_refused(llama_folder: Path) -> None:
    with raises(DataError, Facts("empty", column="--items")):
        run_chat(ChatOptions(model=str(llama_folder)))


@pytest.mark.parametrize("more", [{"replay": True}, {}], ids=["beside --replay", "over another file"])
def test_transcript_does_not_overwrite_files(more: dict[str, bool], tmp_path: Path) -> None:
    file = tmp_path / "precious.txt"
    file.write_text("dear diary\n")
    options = ChatOptions(model="nowhere", save=file, replay=file if more else None)
    with raises(DataError, Facts("contradiction" if more else "exists", column="--save")):
        run_chat(options)
    assert file.read_text() == "dear diary\n"


def test_interrupted_conversation_is_saved(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lines() -> Iterator[str]:
        yield "surprise me please\n"
        raise KeyboardInterrupt

    class Typed(io.StringIO):
        def __iter__(self) -> Iterator[str]:  # type: ignore[override]
            return lines()

    file = tmp_path / "talk.jsonl"
    monkeypatch.setattr("sys.stdin", Typed())
    with pytest.raises(KeyboardInterrupt):
        run_chat(ChatOptions(model=str(run), models=("popularity",), save=file))
    assert [turn.user for turn in transcripts.read(file)] == ["surprise me please"]


def test_item_texts_cannot_control_the_terminal(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table, file = tmp_path / "items.csv", tmp_path / "talk.jsonl"
    lines = [
        f'{name},Thing {name},"\x1b]0;mine\x07red\x9b2J\u2028blue"'
        for name in read_known_entities(str(run), None).items
    ]
    table.write_text("\n".join(["item_id,title,colour", *lines]), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("surprise me please\nwhy the first?\n"))
    options = ChatOptions(model=str(run), items=table, models=("popularity",), save=file, calls=True)
    assert run_chat(options) == 0
    replayed = [turn.model_copy(update={"text": "\x9b2J"}) for turn in transcripts.read(file)]
    assert len(replayed) == 2
    transcripts.write(file, replayed)
    assert run_chat(ChatOptions(model=str(run), items=table, models=("popularity",), replay=file)) == 1
    output = capsys.readouterr().out
    assert "colour: ]0;mine" in output and "2 with different output" in output
    assert not [character for character in output if character != "\n" and not character.isprintable()]


def test_list_length_is_limited(run: Path) -> None:
    result = CliRunner().invoke(app, ["chat", str(run), "--k", str(MAX_LIST_LENGTH + 1)])
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert Show(k=MAX_LIST_LENGTH).k == MAX_LIST_LENGTH
    with pytest.raises(ValidationError):
        Show(k=MAX_LIST_LENGTH + 1)
