"""The cache of answers: equal prompts are computed once, and different ones never share an answer."""

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
from tests.servers.client import question

TEXT = "Rate Heat"
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
        self.count = 0

    def generate(self, prompts: Sequence[Prompt], *, max_tokens: int) -> list[Completion]:
        self.count += len(prompts)
        return super().generate(prompts, max_tokens=max_tokens)

    def score(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]], *, closed: bool = True
    ) -> list[Scores]:
        self.count += len(prompts)
        return super().score(prompts, candidates, closed=closed)


def backend(store: AnswerStore, started: FakeBackend, **changes: Any) -> CachedBackend:
    return CachedBackend(store, IDENTITY | changes, FakeBackend, lambda: started)


@pytest.fixture
def store(tmp_path: Path) -> AnswerStore:
    return AnswerStore(tmp_path / "answers.sqlite")


def test_equal_prompts_are_computed_once(store: AnswerStore) -> None:
    engine = Counting()
    # The last prompt equals the first one.
    prompts = [question("a"), question("b"), question("a", stop="\n"), question("a")]
    first = backend(store, engine)
    texts, scores = first.generate(prompts, max_tokens=4), first.score(prompts, [["x", "y"]] * 4)
    assert engine.count == 6 and first.recalled == 0
    again = backend(store, engine)
    assert again.generate(prompts, max_tokens=4) == texts
    assert again.score(prompts, [["x", "y"]] * 4) == scores
    assert engine.count == 6 and again.recalled > 0 and again.recalled_seconds >= 0
    assert texts == FakeBackend().generate(prompts, max_tokens=4)
    assert scores == FakeBackend().score(prompts, [["x", "y"]] * 4)


def test_generated_texts_are_stored_by_part_of_a_job(store: AnswerStore) -> None:
    engine = Counting()
    cached = backend(store, engine)
    for part, generated, scored in ((None, 1, 1), (0, 1, 0), (1, 1, 0), (0, 0, 0), (None, 0, 0)):
        cached.part, before = part, engine.count
        cached.generate([question(TEXT)], max_tokens=4)
        assert engine.count - before == generated
        cached.score([question(TEXT)], [["x", "y"]])
        assert engine.count - before == generated + scored


def test_engine_starts_only_for_new_prompts(store: AnswerStore) -> None:
    backend(store, Counting()).generate([question(TEXT)], max_tokens=4)

    def refuse() -> FakeBackend:
        raise AssertionError("the engine was started")

    known = CachedBackend(store, IDENTITY, FakeBackend, refuse)
    assert known.generate([question(TEXT)], max_tokens=4)
    known.close()
    with pytest.raises(AssertionError):
        known.generate([question("other")], max_tokens=4)


def test_another_model_gets_no_stale_answer(store: AnswerStore) -> None:
    engine = Counting()
    backend(store, engine).generate([question(TEXT)], max_tokens=4)
    other = backend(store, engine, model={**IDENTITY["model"], "revision": "main"})  # type: ignore[dict-item]
    other.generate([question(TEXT)], max_tokens=4)
    assert engine.count == 2 and other.recalled == 0


CHANGED = [
    ("template", question("Judge Heat"), 4),
    (
        "system turn",
        replace(question(TEXT), messages=(Message("system", (Segment("text", "s"),)), *question(TEXT).messages)),
        4,
    ),
    ("example", replace(question(TEXT), messages=(*question("shot").messages, *question(TEXT).messages)), 4),
    ("role", replace(question(TEXT), messages=(Message("assistant", question(TEXT).messages[0].segments),)), 4),
    ("answer prefix", question(TEXT, given="1. "), 4),
    ("role of the prefix", replace(question(TEXT), answer_prefix=(Segment("target", "1. "),)), 4),
    ("stop", question(TEXT, stop="\n"), 4),
    ("max tokens", question(TEXT), 5),
]


@pytest.mark.parametrize(("change", "changed", "tokens"), CHANGED, ids=[case[0] for case in CHANGED])
def test_another_prompt_gets_no_stale_answer(store: AnswerStore, change: str, changed: Prompt, tokens: int) -> None:
    engine = Counting()
    cached = backend(store, engine)
    cached.generate([question(TEXT), question(TEXT, given="2. ")], max_tokens=4)
    cached.generate([changed], max_tokens=tokens)
    assert engine.count == 3 and cached.recalled == 0, change


def test_method_and_candidates_are_part_of_the_key(store: AnswerStore) -> None:
    engine = Counting()
    cached = backend(store, engine)
    cached.score([question(TEXT)], [["x", "y"]])
    cached.score([question(TEXT)], [["y", "x"]])
    cached.score([question(TEXT)], [["x", "y", "z"]])
    cached.score([question(TEXT)], [["x", "y"]], closed=False)
    cached.generate([question(TEXT)], max_tokens=4)
    assert engine.count == 5 and cached.recalled == 0


@given(calls=st.lists(st.lists(st.sampled_from("abcdef"), max_size=5), max_size=6))
def test_any_calls_equal_the_plain_backend(calls: list[list[str]], tmp_path_factory: pytest.TempPathFactory) -> None:
    cached = backend(AnswerStore(tmp_path_factory.mktemp("store") / "a.sqlite"), FakeBackend())
    for texts in calls:
        prompts = [question(text) for text in texts]
        assert cached.generate(prompts, max_tokens=3) == FakeBackend().generate(prompts, max_tokens=3)


def test_failed_call_stores_nothing(store: AnswerStore) -> None:
    class Failing(FakeBackend):
        def generate(self, prompts: Sequence[Prompt], *, max_tokens: int) -> list[Completion]:
            raise BackendError("the engine died")

    with pytest.raises(BackendError):
        backend(store, Failing()).generate([question("a"), question("b")], max_tokens=4)
    assert len(store) == 0


PROMPTS = [question(f"Rate film {n}") for n in range(60)]


def filled(path: Path) -> tuple[bytes, list[Completion]]:
    """Return the bytes of a store with several pages, and its answers."""
    store = AnswerStore(path)
    answers = backend(store, FakeBackend()).generate(PROMPTS, max_tokens=4)
    store.put([(f"more-{n}", {"text": "x" * 90}) for n in range(200)])
    store.spend("server", Cost(prompt_tokens=11, completion_tokens=7))
    store.close()
    return path.read_bytes(), answers


def test_answers_with_a_wrong_checksum_are_requested_again(tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "answers.sqlite"
    store = AnswerStore(path)
    scores = backend(store, FakeBackend()).score(PROMPTS, [["x", "y"]] * len(PROMPTS))
    store.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE answers SET value = replace(replace(value, '7', '3'), '1', '2')")
    connection.close()
    engine = Counting()
    cached = backend(AnswerStore(path), engine)
    assert cached.score(PROMPTS, [["x", "y"]] * len(PROMPTS)) == scores
    assert engine.count == len(PROMPTS) and cached.recalled == 0
    assert "60 answers in" in caplog.text and "requested again" in caplog.text
    assert backend(AnswerStore(path), engine).score(PROMPTS, [["x", "y"]] * len(PROMPTS)) == scores
    assert engine.count == len(PROMPTS)


def test_store_without_checksums_is_renamed_and_its_usage_kept(tmp_path: Path, caplog: Any) -> None:
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


def test_damaged_pages_lose_only_their_answers(tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "answers.sqlite"
    content, answers = filled(path)
    middle = len(content) // 4096 // 2 * 4096
    path.write_bytes(content[:middle] + b"\xff" * 4096 + content[middle + 4096 :])
    for _ in range(2):
        store = AnswerStore(path)
        assert backend(store, FakeBackend()).generate(PROMPTS, max_tokens=4) == answers
        store.get([f"more-{n}" for n in range(200)])
        store.put([("new", 1)])
        assert store.get(["new"]) == {"new": 1}
        store.close()
    assert len([record for record in caplog.records if "was renamed to" in record.getMessage()]) == 1
    assert 100 < len(AnswerStore(path)) < 261
    assert (tmp_path / "answers.sqlite.damaged").stat().st_size >= len(content)


def test_damage_never_changes_an_answer(tmp_path: Path) -> None:
    content, answers = filled(tmp_path / "clean.sqlite")
    more = {f"more-{n}": {"text": "x" * 90} for n in range(200)}
    random = Random(0)
    for turn in range(50):
        path = tmp_path / f"{turn}.sqlite"
        damaged = bytearray(content)
        # Bytes of the header and the schema, and random ranges.
        start = 3 * turn if turn < 34 else random.randrange(len(content))
        length = 1 if turn < 34 else random.choice([1, 8, 300, 9000])
        stop = min(start + length, len(content))
        damaged[start:stop] = random.randbytes(stop - start)
        path.write_bytes(damaged if turn % 10 else damaged[: start + 1])
        try:
            store = AnswerStore(path)
            assert backend(store, FakeBackend()).generate(PROMPTS, max_tokens=4) == answers
            stored = store.get(list(more))
            assert stored == {key: more[key] for key in stored}
            store.put([("new", 1)])
            store.spend("server", Cost(prompt_tokens=1))
            assert store.spent("server").prompt_tokens in (1, 12)
            store.close()
        except BackendError as error:
            assert "answer cache" in str(error), (turn, start)


def test_lone_surrogate_is_stored(store: AnswerStore) -> None:
    store.put([("k", {"text": "\ud800A"})])
    assert store.get(["k"]) == {"k": {"text": "\ud800A"}}


def test_error_names_an_unreadable_store(tmp_path: Path) -> None:
    (tmp_path / "answers.sqlite").mkdir()
    with raises(BackendError, Facts("unreadable", "answers.sqlite")):
        AnswerStore(tmp_path / "answers.sqlite")


def test_more_keys_than_the_limit_of_a_query(store: AnswerStore) -> None:
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


def test_killed_writer_leaves_complete_transactions(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    for round_ in range(2):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        committed = [int(writer.stdout.readline()) for _ in range(5 + 7 * round_)][-1]
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        store = AnswerStore(path)
        count = len(store)
        assert count % 20 == 0 and count >= committed * 20
        answers = store.get([f"{n}-{k}" for n in range(count // 20) for k in range(20)])
        assert len(answers) == count and answers["0-19"] == {"n": 0, "k": 19}
        store.close()


def test_hard_linked_backup_is_unchanged(tmp_path: Path) -> None:
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
