"""Remembered answers: the same question is answered once, and nothing that differs gets a stale answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.backends.cache import AnswerStore, CachedBackend
from llmrec.backends.fake import FakeBackend
from llmrec.errors import BackendError
from llmrec.types import Completion, Message, Prompt, Scores, Segment

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
        ("tokenizer", "another chat template"),
        ("engine", "vllm"),
        ("dtype", "bfloat16"),
        ("device", "NVIDIA H100"),
        ("decoding", "temperature 1"),
        ("seed", 1),
        ("versions", {"llmrec": "1"}),
        ("model", {**IDENTITY["model"], "revision": "main"}),  # type: ignore[dict-item]
        ("model", {**IDENTITY["model"], "max_length": 512}),  # type: ignore[dict-item]
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


@settings(max_examples=40, deadline=None)
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


def test_a_table_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "answers.sqlite").mkdir()
    with pytest.raises(BackendError, match=r"answers\.sqlite"):
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
