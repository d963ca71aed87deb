"""Requests with unknown items: no payload in them becomes a control token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from forging_cases import COUNT, halves, harmless, payloads
from test_role_forging import encoder, every_tokenizer, marks
from tokenizer_families import tokenizer_of

from llmrec.answer.prompting import rank_requests
from llmrec.answer.strategy import TaskStrategy
from llmrec.backends.encode import Encoder
from llmrec.backends.fake import FakeBackend
from llmrec.data.request_file import open_requests
from llmrec.data.requests import RankRequest, parse_request
from llmrec.errors import DataError
from llmrec.guard import clean
from llmrec.index.table import ItemIndex
from llmrec.pipeline.bundle import Bundle
from llmrec.prompts.template import load_templates
from llmrec.recipe.schema import DirectSection, ModelSection, SequentialSection, TasksSection
from llmrec.types import Item, Prompt, Ranking, Scores
from tests.facts import Facts, raises

__all__ = ["encoder"]

SIZE = 10
CATALOGUE = {"known": Item(item_id="known", title="Heat (1995)", fields={"genres": "Crime"})}
WAYS = (
    TaskStrategy("sequential", "profile-list", "likelihood"),
    TaskStrategy("direct", "after-history", "label"),
    TaskStrategy("direct", "profile-only", "list"),
)


class Recorder(FakeBackend):
    """Records prompts and candidates."""

    def __init__(self) -> None:
        super().__init__(complete=lambda text: "A, B")
        self.prompts: list[Prompt] = []
        self.texts: list[str] = []

    def generate(self, prompts: Sequence[Prompt], *, max_tokens: int) -> Any:
        self.prompts += prompts
        return super().generate(prompts, max_tokens=max_tokens)

    def score(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]], *, closed: bool = True
    ) -> list[Scores]:
        self.prompts += prompts
        self.texts += [text for texts in candidates for text in texts]
        return super().score(prompts, candidates, closed=closed)


def _bundle() -> Bundle:
    return Bundle(
        folder="nowhere",
        model=ModelSection(),
        tasks=TasksSection(sequential=SequentialSection(), direct=DirectSection()),
        templates={family: load_templates(family) for family in ("sequential", "direct")},
        noun="films",
        rating_scale=(1.0, 5.0),
        tuned=True,
        index=ItemIndex("title", {}),
    )


def _texts(fill: str) -> list[str]:
    """Return the texts of all fields of requests."""
    if fill == "harmless":
        return [harmless(n) for n in range(COUNT)]
    if fill == "full":
        return [text.replace("\0", "") for text in payloads()]
    return [f"{right} x{n} {left}" for n, (left, right) in enumerate(halves())]


def _records(texts: list[str], mark: str) -> list[dict[str, Any]]:
    """Return requests with every text as a candidate, in a history and in a profile; ids contain them too."""
    records = []
    for start in range(0, len(texts), SIZE):
        part = texts[start : start + SIZE]
        records.append(
            {
                "id": f"{start} {clean(part[0], 40)}",
                "user_id": clean(part[1], 40) or "u",
                "profile": f"p {part[2]}",
                "history": [
                    {"title": f"h{n} {text}", "rating": 4, "text": f"t {texts[(start + 7 + n) % len(texts)]}"}
                    for n, text in enumerate(part)
                ],
                # The number separates payloads with the same cleaned text, so both fills have equally many candidates.
                "candidates": [
                    {"item_id": f"{mark}{n}", "title": f"{text} c{n}", "genres": f"g {text}"}
                    for n, text in enumerate(part)
                ]
                + ["known"],
            }
        )
    return records


@cache
def _read(fill: str, folder: Path) -> list[RankRequest]:
    path = folder / f"{fill}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in _records(_texts(fill), "new-")), encoding="ascii")
    rows = list(open_requests(path))
    assert not any(row.error for row in rows)
    return [parse_request(row.record or {}, row.line, CATALOGUE) for row in rows]


@cache
def _recorded(fill: str, folder: Path, way: TaskStrategy) -> Recorder:
    """Return the prompts and candidates of the requests of one fill."""
    requests = _read(fill, folder)
    backend = Recorder()
    answers = rank_requests(
        _bundle(),
        requests,
        way=way,
        backend=backend,
        encoder=Encoder(tokenizer_of("qwen"), max_length=10**9),
        batch=64,
    )
    assert all(isinstance(answer, Ranking) for answer in answers), answers[:2]
    # Long candidates are scored in slices with the same prompt.
    backend.prompts = list(dict.fromkeys(backend.prompts))
    assert len(backend.prompts) == len(requests) == COUNT // SIZE
    return backend


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("requests")


def test_every_payload_is_in_a_prompt(folder: Path) -> None:
    # Without spaces, since broken item tokens get one.
    expected = {clean(text).replace(" ", "") for text in _texts("full")}
    for way in WAYS:
        recorder = _recorded("full", folder, way)
        shown = "\n".join(_flat(prompt) for prompt in recorder.prompts) + "\n".join(recorder.texts)
        shown = shown.replace(" ", "")
        assert not [text for text in expected if text not in shown]


def _flat(prompt: Prompt) -> str:
    return "\n".join(message.text for message in prompt.messages) + "".join(s.text for s in prompt.answer_prefix)


@every_tokenizer
def test_requests_have_the_control_tokens_of_harmless_ones(encoder: Encoder, name: str, folder: Path) -> None:
    for way in WAYS:
        plain = _recorded("harmless", folder, way)
        for fill in ("full",) if way.strategy == "list" else ("full", "split"):
            hostile = _recorded(fill, folder, way)
            # The list strategy uses the same prompts as the label strategy; a few are enough.
            few = slice(None, None, 5 if way.strategy == "list" else 1)
            for prompt, other in zip(hostile.prompts[few], plain.prompts[few], strict=True):
                _same(encoder, prompt, other)
            assert len(hostile.texts) == len(plain.texts)
            for text in hostile.texts if way.strategy == "likelihood" else ():
                assert not marks(encoder.tokenizer, encoder.piece(text)), text


_EXPECTED: dict[tuple[int, Prompt], tuple[int, ...]] = {}


def _same(encoder: Encoder, prompt: Prompt, other: Prompt) -> None:
    key = (id(encoder), other)
    if key not in _EXPECTED:
        _EXPECTED[key] = marks(encoder.tokenizer, encoder.prompt(other))
    assert marks(encoder.tokenizer, encoder.prompt(prompt)) == _EXPECTED[key], _flat(prompt)


def test_rejects_invalid_characters() -> None:
    for text in ("Heat\0", "Heat\ud800"):
        for record in ({"candidates": [{"title": text}]}, {"candidates": ["known"], "profile": text}):
            with raises(DataError, Facts("encoding")):
                parse_request(record, 1, CATALOGUE)
