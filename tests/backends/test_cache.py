"""Remembered answers: the same question is answered once, and nothing that differs gets a stale answer."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.backends.cache import AnswerStore, CachedBackend
from llmrec.backends.fake import FakeBackend
from llmrec.errors import BackendError
from llmrec.types import Completion, Cost, Message, Prompt, Scores, Segment
from tests.facts import Facts, raises

IDENTITY = {
    "engine": "fake",
    "weights": "w",
    "tokenizer": "t",
    "model": {"revision": None, "dtype": "auto", "trust_remote_code": False, "max_length": 1024},
    "dtype": "float32",
    "device": "cpu",
    "decoding": "greedy",
    "seed": 0,
    "versions": {"llmrec": "0"},
}


class Counting(FakeBackend):
    """Counts the prompts that reach the engine."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def generate(self, prompts: Sequence[Prompt], *, max_tokens: int) -> list[Completion]:
        self.asked += len(prompts)
        return super().generate(prompts, max_tokens=max_tokens)

    def score(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]], *, closed: bool = True
    ) -> list[Scores]:
        self.asked += len(prompts)
        return super().score(prompts, candidates, closed=closed)


def prompt(text: str = "Rate Heat", given: str = "", stop: str | None = None) -> Prompt:
    answer = (Segment("item", given),) if given else ()
    return Prompt(messages=(Message("user", (Segment("text", text),)),), answer_prefix=answer, stop=stop)


def backend(store: AnswerStore, started: FakeBackend, **changes: Any) -> CachedBackend:
    return CachedBackend(store, IDENTITY | changes, FakeBackend, lambda: started)


@pytest.fixture
def store(tmp_path: Path) -> AnswerStore:
    return AnswerStore(tmp_path / "answers.sqlite")


def test_a_question_is_computed_once_and_answered_alike(store: AnswerStore) -> None:
    engine = Counting()
    questions = [prompt("a"), prompt("b"), prompt("a", stop="\n")]
    first = backend(store, engine)
    written, scores = first.generate(questions, max_tokens=4), first.score(questions, [["x", "y"]] * 3)
    assert engine.asked == 6 and first.recalled == 0
    again = backend(store, engine)
    assert again.generate(questions, max_tokens=4) == written
    assert again.score(questions, [["x", "y"]] * 3) == scores
    assert engine.asked == 6 and again.recalled == 6 and again.recalled_seconds >= 0
    assert written == FakeBackend().generate(questions, max_tokens=4)
    assert scores == FakeBackend().score(questions, [["x", "y"]] * 3)


def test_what_is_generated_is_remembered_for_its_part_of_a_job_alone(store: AnswerStore) -> None:
    engine = Counting()
    asked = backend(store, engine)
    for part, generated, scored in ((None, 1, 1), (0, 1, 0), (1, 1, 0), (0, 0, 0), (None, 0, 0)):
        asked.part, before = part, engine.asked
        asked.generate([prompt()], max_tokens=4)
        assert engine.asked - before == generated
        asked.score([prompt()], [["x", "y"]])
        assert engine.asked - before == generated + scored


def test_the_engine_starts_only_for_a_new_question(store: AnswerStore) -> None:
    backend(store, Counting()).generate([prompt()], max_tokens=4)

    def refuse() -> FakeBackend:
        raise AssertionError("the engine was started")

    known = CachedBackend(store, IDENTITY, FakeBackend, refuse)
    assert known.generate([prompt()], max_tokens=4)
    known.close()
    with pytest.raises(AssertionError):
        known.generate([prompt("other")], max_tokens=4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weights", "another model or adapter"),
        ("model", {**IDENTITY["model"], "revision": "main"}),  # type: ignore[dict-item]
    ],
)
def test_another_model_or_engine_gets_no_stale_answer(store: AnswerStore, name: str, value: object) -> None:
    engine = Counting()
    backend(store, engine).generate([prompt()], max_tokens=4)
    other = backend(store, engine, **{name: value})
    other.generate([prompt()], max_tokens=4)
    assert engine.asked == 2 and other.recalled == 0


CHANGED = [
    ("template", prompt("Judge Heat"), 4),
    ("system turn", replace(prompt(), messages=(Message("system", (Segment("text", "s"),)), *prompt().messages)), 4),
    ("k, a solved example", replace(prompt(), messages=(*prompt("shot").messages, *prompt().messages)), 4),
    ("role", replace(prompt(), messages=(Message("assistant", prompt().messages[0].segments),)), 4),
    ("given answer", prompt(given="1. "), 4),
    ("where the answer is cut", replace(prompt(), answer_prefix=(Segment("target", "1. "),)), 4),
    ("stop", prompt(stop="\n"), 4),
    ("max tokens", prompt(), 5),
]


@pytest.mark.parametrize(("what", "question", "tokens"), CHANGED, ids=[case[0] for case in CHANGED])
def test_another_question_gets_no_stale_answer(store: AnswerStore, what: str, question: Prompt, tokens: int) -> None:
    engine = Counting()
    asked = backend(store, engine)
    asked.generate([prompt(), prompt(given="2. ")], max_tokens=4)
    asked.generate([question], max_tokens=tokens)
    assert engine.asked == 3 and asked.recalled == 0, what


def test_verb_candidates_and_closing_are_part_of_the_question(store: AnswerStore) -> None:
    engine = Counting()
    asked = backend(store, engine)
    asked.score([prompt()], [["x", "y"]])
    asked.score([prompt()], [["y", "x"]])
    asked.score([prompt()], [["x", "y", "z"]])
    asked.score([prompt()], [["x", "y"]], closed=False)
    asked.generate([prompt()], max_tokens=4)
    assert engine.asked == 5 and asked.recalled == 0


def test_repeated_questions_of_one_call_are_computed_once(store: AnswerStore) -> None:
    engine = Counting()
    found = backend(store, engine).generate([prompt("a"), prompt("b"), prompt("a")], max_tokens=4)
    assert engine.asked == 2 and found[0] == found[2] != found[1]


@given(calls=st.lists(st.lists(st.sampled_from("abcdef"), max_size=5), max_size=6))
def test_any_sequence_of_calls_equals_the_plain_backend(
    calls: list[list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    cached = backend(AnswerStore(tmp_path_factory.mktemp("store") / "a.sqlite"), FakeBackend())
    for texts in calls:
        questions = [prompt(text) for text in texts]
        assert cached.generate(questions, max_tokens=3) == FakeBackend().generate(questions, max_tokens=3)


def test_a_failing_call_stores_nothing(store: AnswerStore) -> None:
    class Failing(FakeBackend):
        def generate(self, prompts: Sequence[Prompt], *, max_tokens: int) -> list[Completion]:
            raise BackendError("the engine died")

    with pytest.raises(BackendError):
        backend(store, Failing()).generate([prompt("a"), prompt("b")], max_tokens=4)
    assert len(store) == 0


def test_a_damaged_table_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    path.write_bytes(b"this is no database" * 100)
    store = AnswerStore(path)
    store.put([("k", {"a": 1})])
    assert store.get(["k"]) == {"k": {"a": 1}}
    assert (tmp_path / "answers.sqlite.damaged").read_bytes().startswith(b"this is no database")


QUESTIONS = [prompt(f"Rate film {n}") for n in range(60)]


def filled(path: Path) -> tuple[bytes, list[Completion]]:
    """Return the bytes of a table of answers on several pages, and the answers."""
    store = AnswerStore(path)
    answers = backend(store, FakeBackend()).generate(QUESTIONS, max_tokens=4)
    store.put([(f"more-{n}", {"text": "x" * 90}) for n in range(200)])
    store.spend("server", Cost(prompt_tokens=11, completion_tokens=7))
    store.close()
    return path.read_bytes(), answers


def test_an_answer_whose_digits_were_changed_is_asked_again(tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "answers.sqlite"
    store = AnswerStore(path)
    scores = backend(store, FakeBackend()).score(QUESTIONS, [["x", "y"]] * len(QUESTIONS))
    store.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE answers SET value = replace(replace(value, '7', '3'), '1', '2')")
    connection.close()
    engine = Counting()
    found = backend(AnswerStore(path), engine)
    assert found.score(QUESTIONS, [["x", "y"]] * len(QUESTIONS)) == scores
    assert engine.asked == len(QUESTIONS) and found.recalled == 0
    assert "60 answers in" in caplog.text and "requested again" in caplog.text
    assert backend(AnswerStore(path), engine).score(QUESTIONS, [["x", "y"]] * len(QUESTIONS)) == scores
    assert engine.asked == len(QUESTIONS)


def test_a_table_without_checksums_is_set_aside_with_what_was_spent(tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "answers.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript(
            "CREATE TABLE answers (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;"
            "CREATE TABLE spent (name TEXT PRIMARY KEY, prompt_tokens INTEGER NOT NULL, "
            "completion_tokens INTEGER NOT NULL) WITHOUT ROWID; INSERT INTO answers VALUES ('k', '1');"
            "INSERT INTO spent VALUES ('server', 11, 7); PRAGMA user_version=1;"
        )
    connection.close()
    store = AnswerStore(path)
    assert store.get(["k"]) == {}
    assert store.spent("server") == Cost(prompt_tokens=11, completion_tokens=7)
    assert (tmp_path / "answers.sqlite.damaged").is_file()
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} is damaged (it has answers without checksums) and was renamed to answers.sqlite.damaged; 0 of its "
        "answers are reused, and the others are requested again"
    ]


def test_pages_that_are_overwritten_cost_their_answers_alone(tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "answers.sqlite"
    content, answers = filled(path)
    middle = len(content) // 4096 // 2 * 4096
    path.write_bytes(content[:middle] + b"\xff" * 4096 + content[middle + 4096 :])
    for _ in range(2):
        store = AnswerStore(path)
        assert backend(store, FakeBackend()).generate(QUESTIONS, max_tokens=4) == answers
        store.get([f"more-{n}" for n in range(200)])
        store.put([("new", 1)])
        assert store.get(["new"]) == {"new": 1}
        store.close()
    assert len([record for record in caplog.records if "was renamed to" in record.getMessage()]) == 1
    assert 100 < len(AnswerStore(path)) < 261
    assert (tmp_path / "answers.sqlite.damaged").stat().st_size >= len(content)


def test_no_damage_gives_another_answer_or_a_traceback(tmp_path: Path) -> None:
    content, answers = filled(tmp_path / "clean.sqlite")
    more = {f"more-{n}": {"text": "x" * 90} for n in range(200)}
    random = Random(0)
    for turn in range(150):
        path = tmp_path / f"{turn}.sqlite"
        damaged = bytearray(content)
        # Every byte of the header and the schema once, and some stretches anywhere.
        start = turn if turn < 100 else random.randrange(len(content))
        length = 1 if turn < 100 else random.choice([1, 8, 300, 9000])
        stop = min(start + length, len(content))
        damaged[start:stop] = random.randbytes(stop - start)
        path.write_bytes(damaged if turn % 10 else damaged[: start + 1])
        try:
            store = AnswerStore(path)
            assert backend(store, FakeBackend()).generate(QUESTIONS, max_tokens=4) == answers
            found = store.get(list(more))
            assert found == {key: more[key] for key in found}
            store.put([("new", 1)])
            store.spend("server", Cost(prompt_tokens=1))
            assert store.spent("server").prompt_tokens in (1, 12)
            store.close()
        except BackendError as error:
            assert "answer cache" in str(error), (turn, start)


def test_a_lone_surrogate_is_stored(store: AnswerStore) -> None:
    store.put([("k", {"text": "\ud800A"})])
    assert store.get(["k"]) == {"k": {"text": "\ud800A"}}


def test_a_table_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "answers.sqlite").mkdir()
    with raises(BackendError, Facts("unreadable", "answers.sqlite")):
        AnswerStore(tmp_path / "answers.sqlite")


def test_more_keys_than_one_query_takes(store: AnswerStore) -> None:
    rows = {f"k{n}": {"n": n} for n in range(1700)}
    store.put(rows.items())
    assert store.get([*rows, "absent"]) == rows


WRITER = """
import sys
from pathlib import Path
from llmrec.backends.cache import AnswerStore
store = AnswerStore(Path(sys.argv[1]))
n = 0
while True:
    store.put([(f"{n}-{k}", {"n": n, "k": k}) for k in range(20)])
    n += 1
    print(n, flush=True)
"""


def test_a_killed_writer_leaves_whole_transactions(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    for round_ in range(4):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        committed = [int(writer.stdout.readline()) for _ in range(5 + 7 * round_)][-1]
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        store = AnswerStore(path)
        count = len(store)
        assert count % 20 == 0 and count >= committed * 20
        found = store.get([f"{n}-{k}" for n in range(count // 20) for k in range(20)])
        assert len(found) == count and found["0-19"] == {"n": 0, "k": 19}
        store.close()


def test_a_backup_by_hard_links_stays_as_it_was(tmp_path: Path) -> None:
    path, backup = tmp_path / "answers.sqlite", tmp_path / "backup.sqlite"
    store = AnswerStore(path)
    store.put([("a", {"seconds": 0.0, "answer": 1})])
    store.close()
    backup.hardlink_to(path)
    content = backup.read_bytes()
    store = AnswerStore(path)
    store.put([("b", {"seconds": 0.0, "answer": 2})])
    assert set(store.get(["a", "b"])) == {"a", "b"}
    store.close()
    assert backup.read_bytes() == content
