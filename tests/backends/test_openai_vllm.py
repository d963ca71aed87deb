"""A real `vllm serve` of SmolLM2, compared with transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from llmrec.backends.encode import Encoder
from llmrec.backends.server.backend import OpenAIBackend
from llmrec.recipe.schema import ModelSection, ServerSection
from llmrec.types import Backend
from tests.servers.client import question

pytestmark = [pytest.mark.model, pytest.mark.vllm, pytest.mark.slow]

LABELS = ("1", "2", "3", "4", "5")
TITLES = ("Fargo (1996)", "Casino (1995)", "Heat", "Toy Story 2 (1999)", "Amélie")
LISTS = tuple(
    question(f"Films that person {n} watched, in order.", given=history, stop="\n")
    for n, history in enumerate(("Toy Story (1995)\nAlien (1979)\n", "Heat (1995)\n", "Brazil (1985)\nJaws (1975)\n"))
)
CHATS = tuple(
    question(f"A person liked {film}. How much will they like Fargo? Answer with one digit from 1 to 5.")
    for film in ("Heat (1995)", "Toy Story (1995)", "Alien (1979) and Aliens (1986)")
)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerSection, Encoder, Backend]]:
    """Return a server and transformers with the same weights."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from llmrec.backends.hf.backend import HFBackend
    from llmrec.models.load import resolve_model_folder
    from tests.conftest import encoder_of, opened
    from tests.servers.real import serving

    folder = resolve_model_folder(ModelSection())
    encoder = encoder_of(folder, 1024)
    with serving(folder, tmp_path_factory.mktemp("served")) as url:
        yield ServerSection(url=url, model="films", concurrency=8), encoder, HFBackend(opened(folder)[0], encoder)


def test_token_ids_equal_transformers(both: tuple[ServerSection, Encoder, Backend]) -> None:
    section, encoder, hf = both
    with closing(OpenAIBackend(section, encoder)) as client:
        offers = client.offers
        assert offers.exact and offers.named and offers.likelihood and offers.top == 20
        texts, expected = (backend.generate([*LISTS, *CHATS], max_tokens=16) for backend in (client, hf))
        for name in ("text", "prompt_tokens", "finish_reason"):
            assert [getattr(done, name) for done in texts] == [getattr(done, name) for done in expected]
        assert len({done.text for done in texts}) > 3
        for engine, prompts, candidates, closed in (
            ("openai:one-token", CHATS, LABELS, False),
            ("openai:echo", LISTS, TITLES, True),
        ):
            scores, exact = (b.score(prompts, [candidates] * 3, closed=closed) for b in (client, hf))
            for one, two in zip(scores, exact, strict=True):
                assert one.engine == engine and one.tokens == two.tokens
                # Two engines in float32 sum in different orders.
                assert one.logprobs == pytest.approx(two.logprobs, abs=1e-2)


def test_chat_equals_transformers(both: tuple[ServerSection, Encoder, Backend]) -> None:
    section, _, hf = both
    # Without a tokenizer, the chat template of the server writes the same prompt.
    with closing(OpenAIBackend(section)) as client:
        assert not client.offers.exact and client.offers.continues and client.offers.top == 20
        texts, expected = (backend.generate([*LISTS, *CHATS], max_tokens=16) for backend in (client, hf))
        assert [done.text.strip() for done in texts[3:]] == [done.text.strip() for done in expected[3:]]
        # A partial answer is continued; the server decides where its last token ends.
        assert all(done.text and "\n" not in done.text for done in texts[:3])
        scores, exact = (backend.score(CHATS, [LABELS] * 3, closed=False) for backend in (client, hf))
        count = 0
        for one, two in zip(scores, exact, strict=True):
            for value, reference in zip(one.logprobs, two.logprobs, strict=True):
                # Those above the floor; a label may also follow a space, which adds a little.
                if value > min(one.logprobs):
                    count += 1
                    assert value == pytest.approx(reference, abs=0.2)
        assert count >= 6
