"""A real `vllm serve` of SmolLM2 answers through the client what transformers answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from llmrec.backends.encode import Encoder
from llmrec.backends.server.backend import OpenAIBackend
from llmrec.recipe.schema import ModelSection, ServerSection
from llmrec.types import Backend, Message, Prompt, Segment
from tests.servers.client import question

pytestmark = [pytest.mark.model, pytest.mark.vllm, pytest.mark.slow]

# Nats. Two engines in float32 sum in another order.
TOLERANCE = 1e-2
LABELS = ("1", "2", "3", "4", "5")
LETTERS = ("A", "B", "C", "D")
TITLES = ("Fargo (1996)", "Casino (1995)", "Heat", "Toy Story 2 (1999)", "Amélie")
LISTS = tuple(
    question(f"Films that person {n} watched, in order.", given=given, stop="\n")
    for n, given in enumerate(
        ("Toy Story (1995)\nAlien (1979)\n", "Heat (1995)\n", "Brazil (1985)\nJaws (1975)\nRocky (1976)\n")
    )
)
CHATS = tuple(
    question(
        f"A person liked {film}. How much will they like Fargo? Answer with one digit from 1 to 5, and nothing else."
    )
    for film in ("Heat (1995)", "Toy Story (1995)", "Alien (1979) and Aliens (1986)")
)
SYSTEM = Prompt(
    messages=(
        Message("system", (Segment("text", "You answer with one word."),)),
        Message("user", (Segment("text", "Name a film by the director of Alien."),)),
    )
)


@dataclass(frozen=True)
class Both:
    """A server and transformers over the same weights."""

    url: str
    encoder: Encoder
    hf: Backend

    def client(self, encoder: Encoder | None = None, **changes: Any) -> OpenAIBackend:
        return OpenAIBackend(ServerSection(url=self.url, model="films", concurrency=8, **changes), encoder)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from llmrec.backends.hf.backend import HFBackend
    from llmrec.models.load import load_model, load_tokenizer, resolve
    from tests.servers.real import serving

    folder = resolve(ModelSection())
    part = ModelSection(name=folder, dtype="float32")
    encoder = Encoder(load_tokenizer(folder, part), max_length=1024)
    with serving(folder, tmp_path_factory.mktemp("served")) as url:
        yield Both(url, encoder, HFBackend(load_model(folder, part), encoder))


def furthest(one: Any, two: Any) -> float:
    return max(
        abs(a - b)
        for first, second in zip(one, two, strict=True)
        for a, b in zip(first.logprobs, second.logprobs, strict=True)
    )


@pytest.mark.slow
def test_token_ids_give_what_transformers_gives(both: Both, capsys: pytest.CaptureFixture[str]) -> None:
    client = both.client(both.encoder)
    try:
        offers = client.offers
        assert offers.exact and offers.named and offers.likelihood and offers.top == 20
        prompts = [*LISTS, *CHATS, SYSTEM]
        ours, theirs = client.generate(prompts, max_tokens=16), both.hf.generate(prompts, max_tokens=16)
        assert [done.text for done in ours] == [done.text for done in theirs]
        assert len({done.text for done in ours}) > 3
        assert [done.prompt_tokens for done in ours] == [done.prompt_tokens for done in theirs]
        assert [done.finish_reason for done in ours] == [done.finish_reason for done in theirs]
        apart = {}
        for name, asked, texts, closed in (
            ("one-token", CHATS, LABELS, False),
            ("one-token", (*LISTS, SYSTEM), LETTERS, False),
            ("echo", LISTS, TITLES, True),
        ):
            found = client.score(asked, [texts] * len(asked), closed=closed)
            assert {scores.engine for scores in found} == {f"openai:{name}"}
            known = both.hf.score(asked, [texts] * len(asked), closed=closed)
            assert [scores.tokens for scores in found] == [scores.tokens for scores in known]
            apart[name] = max(apart.get(name, 0.0), furthest(found, known))
    finally:
        client.close()
    with capsys.disabled():
        sys.stdout.write(f"\n[SmolLM2, vllm serve: furthest log-probabilities {apart} nats]")
    assert max(apart.values()) < TOLERANCE


def test_chat_gives_what_transformers_gives(both: Both) -> None:
    """No tokenizer here: the server's own chat template writes the same prompt."""
    client = both.client()
    try:
        assert not client.offers.exact and client.offers.continues and client.offers.top == 20
        prompts = [*LISTS, *CHATS, SYSTEM]
        ours, theirs = client.generate(prompts, max_tokens=16), both.hf.generate(prompts, max_tokens=16)
        assert [done.text.strip() for done in ours[3:]] == [done.text.strip() for done in theirs[3:]]
        # A given part of an answer is continued; where its last token ends is the server's to say.
        assert all(done.text and "\n" not in done.text for done in ours[:3])
        found = client.score(CHATS, [LABELS] * 3, closed=False)
        known = both.hf.score(CHATS, [LABELS] * 3, closed=False)
        floors = [min(scores.logprobs) for scores in found]
        seen = 0
        for scores, exact, floor in zip(found, known, floors, strict=True):
            for value, reference in zip(scores.logprobs, exact.logprobs, strict=True):
                # Those above the floor; a chat's label may also stand behind a space, which adds a little.
                if value > floor:
                    seen += 1
                    assert value == pytest.approx(reference, abs=0.2)
        assert seen >= 6
    finally:
        client.close()
