"""The strategy ``head``: ratings in order whatever the batch, from engines that read a head and from no others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmrec.backends.fake import FakeBackend
from llmrec.errors import BackendError
from llmrec.strategies.asking import Prompting
from llmrec.strategies.raters import HeadRater
from llmrec.types import Cost, Message, Prompt, Rating, Read, Request, Segment
from tests.facts import Facts, raises

torch = pytest.importorskip("torch", reason="the train extra is not installed")


class Toy:
    """Asks about a user's name, so that prompts have different lengths."""

    def prompt(self, request: Request, *, template: str, shots: int = 0, want: str = "one") -> Prompt:
        return Prompt(messages=(Message("user", (Segment("item", f"Rate it, {request.user_id}"),)),))


class Lengths(FakeBackend):
    """A backend whose head says how long the prompt is."""

    capabilities = frozenset({"rate"})

    def rate(self, prompts: Sequence[Prompt]) -> list[Read]:
        return [Read(value=len(p.messages[0].text) / 10, prompt_tokens=7, engine="toy:head") for p in prompts]


def requests(n: int) -> list[Request]:
    return [Request(id=f"r{k}", user_id="x" * (5 * k), item="i") for k in range(n)]


def asker(backend: Any, **options: Any) -> Prompting:
    return Prompting(backend=backend, task=Toy(), template="toy", **options)


def test_every_request_gets_its_own_rating_in_order() -> None:
    seen: list[int] = []
    rater = HeadRater(asker(Lengths(), batch=2, advance=seen.append))
    answers = rater.answer(requests(5))
    assert [a.request_id for a in answers] == [f"r{k}" for k in range(5)]
    assert [a.value for a in answers if isinstance(a, Rating)] == pytest.approx([0.9 + 0.5 * k for k in range(5)])
    assert all(a.cost == Cost(prompt_tokens=7, forwards=1) and a.prompt_hash for a in answers)
    assert len({a.prompt_hash for a in answers}) == 5
    assert (seen, rater.engine) == ([2, 2, 1], "toy:head")


def test_engines_without_a_head_are_named_with_the_mend() -> None:
    with raises(
        BackendError, Facts("unsupported", column="tasks.rating.strategies", says=("'fake'", "eval.backend=hf"))
    ):
        HeadRater(asker(FakeBackend()))


@pytest.fixture
def backend(llama_folder: Path) -> Any:
    """A random model with a head that says different things of different prompts."""
    from llmrec.backends.encode import Encoder
    from llmrec.backends.hf.backend import HFBackend
    from llmrec.models.load import load_model, load_tokenizer
    from llmrec.models.rating_head import HeadShape, new_head
    from llmrec.recipe.schema import ModelSection

    section = ModelSection(name=str(llama_folder), dtype="float32")
    encoder = Encoder(load_tokenizer(str(llama_folder), section), max_length=512)
    head = new_head(HeadShape(values=(1.0, 2.0, 3.0, 4.0, 5.0), alpha=1.0, width=128), [1, 1, 1, 1, 1])
    torch.manual_seed(0)
    torch.nn.init.normal_(head.linear.weight, std=0.3)
    return HFBackend(load_model(str(llama_folder), section), encoder, batch_tokens=200, head=head)


def test_a_batch_reads_what_one_prompt_alone_gives(backend: Any) -> None:
    prompts = [Toy().prompt(request, template="toy") for request in requests(7)]
    together = backend.rate(prompts)
    alone = [backend.rate([prompt])[0] for prompt in prompts]
    assert [read.value for read in together] == pytest.approx([read.value for read in alone], abs=1e-4)
    assert len({round(read.value, 3) for read in together}) > 3
    for prompt, read in zip(prompts, together, strict=True):
        ids = backend.encoder.prompt(prompt)
        with torch.no_grad():
            hidden = backend.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        assert read.value == pytest.approx(backend._head.ratings(hidden[:, -1])[0], abs=1e-4)
        assert (read.prompt_tokens, read.engine) == (len(ids), "hf:head")


def test_a_model_without_a_head_says_so(backend: Any) -> None:
    backend._head = None
    with raises(BackendError, Facts("unsupported", column="tasks.rating.strategies", says="tasks.rating.head")):
        backend.rate([Toy().prompt(request, template="toy") for request in requests(1)])


def test_ratings_are_remembered(backend: Any, tmp_path: Path) -> None:
    from llmrec.backends.cache import AnswerStore, CachedBackend
    from llmrec.backends.hf.backend import HFBackend

    store = AnswerStore(tmp_path / "answers.sqlite")
    first = HeadRater(asker(CachedBackend(store, {"weights": "a"}, HFBackend, lambda: backend))).answer(requests(3))

    def refused() -> Any:
        raise AssertionError("the engine was started again")

    again = HeadRater(asker(CachedBackend(store, {"weights": "a"}, HFBackend, refused))).answer(requests(3))
    assert again == first
    with pytest.raises(AssertionError):
        HeadRater(asker(CachedBackend(store, {"weights": "b"}, HFBackend, refused))).answer(requests(3))
    store.close()
