"""Ratings by a head, and yes or no as a probability, by likelihood or by text, with calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrec.backends.encode import Encoder
from llmrec.backends.fake import FakeBackend
from llmrec.errors import BackendError, LlmrecError
from llmrec.metrics.probability import calibration_error
from llmrec.strategies.asking import Prompting
from llmrec.strategies.raters import CalibratedPredictor, HeadRater, ParsedYesNoJudge, YesNoJudge, fit_curve
from llmrec.tasks.ctr import parse_choice
from llmrec.types import (
    Answer,
    Case,
    Cost,
    Example,
    HeadRating,
    Message,
    Probability,
    Prompt,
    Rating,
    Request,
    Segment,
    Unparsed,
)
from tests.conftest import opened
from tests.facts import Facts, raises

torch = pytest.importorskip("torch", reason="the train extra is not installed")


class Asking:
    """A fixed question with two possible answers."""

    def __init__(self, yes: str = "Yes", no: str = "No") -> None:
        self._answers = (yes, no)

    def prompt(self, request: Request, *, template: str, shots: int = 0, want: str = "one") -> Prompt:
        return Prompt(messages=(Message("user", (Segment("text", f"Will {request.user_id} like {request.id}?"),)),))

    def continuations(self, request: Request, *, template: str) -> tuple[str, ...]:
        return self._answers

    def parse(self, completion: str, request: Request, *, template: str) -> Answer | None:
        index = parse_choice(completion, self._answers)
        return None if index is None else Probability(request_id=request.id, value=1.0 - index)


def requests(n: int = 3) -> list[Request]:
    return [Request(id=f"r{k}", user_id="u", item="i") for k in range(n)]


def asker(backend: Any, task: Any = None, **options: Any) -> Prompting:
    return Prompting(backend=backend, task=task or Asking(), template="t", batch=2, **options)


def value(answer: Answer) -> float:
    assert isinstance(answer, Probability)
    return answer.value


def test_probability_is_softmax_over_two_answers() -> None:
    logs = {"Yes": math.log(0.06), "No": math.log(0.02)}
    judge = YesNoJudge(asker(FakeBackend(prefer=lambda text, answer: logs[answer])))
    answers = judge.answer(requests())
    assert [value(answer) for answer in answers] == pytest.approx([0.75] * 3)
    assert [answer.request_id for answer in answers] == ["r0", "r1", "r2"]
    assert judge.engine == "fake" and answers[0].prompt_hash
    # Extreme likelihoods do not overflow.
    for yes, no, expected in ((-1000.0, -1.0, 0.0), (-1.0, -1000.0, 1.0), (-900.0, -900.0, 0.5)):
        logs |= {"Yes": yes, "No": no}
        assert value(judge.answer(requests(1))[0]) == expected


def model_of(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model.eval()


def tokenizer_of(name: str) -> Any:
    if name == "bytes":
        from llmrec.models.load import byte_tokenizer

        return byte_tokenizer()
    from llmrec.models.load import load_tokenizer, resolve_model_folder
    from llmrec.recipe.schema import ModelSection

    section = ModelSection()
    return load_tokenizer(resolve_model_folder(section), section)


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("bytes", {("Yes", "No"): (3, 2), (" Yes", " No"): (4, 3), ("No", "Now"): (2, 3)}),
        pytest.param(
            "smollm2", {("Yes", "No"): (1, 1), (" Yes", " No"): (1, 1), ("Absolutely not", "Nope"): None},
            marks=pytest.mark.model,
        ),
    ],
)  # fmt: skip
def test_probability_equals_forward_passes_for_any_token_count(name: str, lengths: dict[tuple[str, str], Any]) -> None:
    """P(yes) equals forward passes over both answers; if one is a prefix of the other, end tokens count too."""
    from llmrec.backends.hf.backend import HFBackend

    tokenizer = tokenizer_of(name)
    encoder, model = Encoder(tokenizer, max_length=400), model_of(tokenizer)
    backend = HFBackend(model, encoder)
    for (yes, no), expected in lengths.items():
        task = Asking(yes, no)
        (answer,) = YesNoJudge(asker(backend, task)).answer(requests(1))
        prompt = task.prompt(requests(1)[0], template="t")
        ids = encoder.prompt(prompt)
        sums, sizes = [], []
        for text in (yes, no):
            closed = no.startswith(yes)
            tail = list(encoder.continuation(prompt, text, closed=closed))
            with torch.no_grad():
                logs = torch.log_softmax(model(torch.tensor([ids + tail])).logits[0].double(), dim=-1)
            sums.append(sum(float(logs[len(ids) - 1 + n, token]) for n, token in enumerate(tail)))
            sizes.append(len(tail) - closed)
        assert expected is None or tuple(sizes) == expected
        odds = math.log(value(answer)) - math.log1p(-value(answer))
        assert odds == pytest.approx(sums[0] - sums[1], abs=2e-3)


@pytest.mark.parametrize("name", ["bytes", pytest.param("smollm2", marks=pytest.mark.model)])
def test_scored_tokens_equal_trained_tokens(name: str) -> None:
    encoder = Encoder(tokenizer_of(name), max_length=400)
    prompt = Asking().prompt(requests(1)[0], template="t")
    for answer in ("Yes", "No"):
        example = Example(
            id="e", user_id="u", task="ctr", template="ctr/t", messages=prompt.messages,
            answer=(Segment("target", answer),), ends_turn=True,
        )  # fmt: skip
        row, start = encoder.row(example), len(encoder.prompt(prompt))
        scored = [*encoder.prompt(prompt), *encoder.continuation(prompt, answer, closed=False)]
        assert list(row.ids[: len(scored)]) == scored
        assert [label for label in row.labels if label >= 0][: len(scored) - start] == scored[start:]


def test_parsed_answers_and_failures() -> None:
    texts = iter(["Yes, surely", "No.", "Oui", "I cannot tell", ""])
    answers = ParsedYesNoJudge(asker(FakeBackend(complete=lambda text: next(texts)))).answer(requests(5))
    assert [type(answer).__name__ for answer in answers] == ["Probability", "Probability", *["Unparsed"] * 3]
    assert [value(answer) for answer in answers[:2]] == [1.0, 0.0]
    assert isinstance(answers[2], Unparsed) and answers[2].raw == "Oui"
    assert [answer.request_id for answer in answers] == [f"r{k}" for k in range(5)]


def drawn(count: int, scale: float, bias: float) -> tuple[list[float], list[float]]:
    """Answers of an overconfident judge, and truths that follow ``scale`` times its log-odds plus ``bias``."""
    rng = np.random.default_rng(0)
    odds = rng.normal(0, 3, count)
    truth = rng.random(count) < 1 / (1 + np.exp(-(scale * odds + bias)))
    return (1 / (1 + np.exp(-odds))).tolist(), truth.astype(float).tolist()


def test_calibration_recovers_scale_and_bias() -> None:
    judged, truth = drawn(40_000, 0.4, -0.7)
    curve = fit_curve(judged, truth)
    assert curve.scale == pytest.approx(0.4, abs=0.03) and curve.bias == pytest.approx(-0.7, abs=0.05)
    assert calibration_error([curve.of(value) for value in judged], truth) < 0.02 < calibration_error(judged, truth)
    assert fit_curve(*drawn(40_000, 1.0, 0.0)).scale == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("judged", "truth"), [([0.9], [1.0]), ([1.0, 0.0], [0.0, 1.0]), ([0.5] * 5, [1.0] * 5), ([1.0, 1.0], [1, 0])]
)
def test_calibration_of_few_or_certain_answers_is_finite_and_monotone(judged: list[float], truth: list[float]) -> None:
    curve = fit_curve(judged, truth)
    values = [curve.of(value) for value in (0.0, 0.2, 0.8, 1.0)]
    assert all(0 <= value <= 1 for value in values) and values == sorted(values)
    assert 0 < curve.scale < math.inf and abs(curve.bias) <= 20


def test_calibration_keeps_order_of_nearly_certain_answers() -> None:
    curve = fit_curve(*drawn(2_000, 0.4, -0.7))
    sure = [1e-12, 1e-9, 1e-7, 1e-3, 1 - 1e-7, 1 - 1e-9, 1 - 1e-12]
    values = [curve.of(value) for value in sure]
    assert values == sorted(set(values)) and len(values) == len(sure)


def test_calibrated_judge_keeps_failures_and_order() -> None:
    texts = iter(["Yes", "No", "Yes", "No", "Yes", "No", "hm"])
    judge = ParsedYesNoJudge(asker(FakeBackend(complete=lambda text: next(texts))))
    cases = [
        Case(request=request, truth=truth) for request, truth in zip(requests(4), (1.0, 0.0, 0.0, 0.0), strict=True)
    ]
    calibrated = CalibratedPredictor(judge, cases)
    assert calibrated.name == "parsed-yes-no"
    yes, no, mute = calibrated.answer(requests(3))
    assert 0 < value(no) < value(yes) < 1 and isinstance(mute, Unparsed)
    # One of two yes answers was right, and both no answers.
    assert value(yes) == pytest.approx(0.5, abs=0.1) and value(no) < 0.3
    silent = ParsedYesNoJudge(asker(FakeBackend(complete=lambda text: "hm")))
    with raises(LlmrecError, Facts("too-few", column="tasks.ctr.calibrate", says="data.split.valid")):
        CalibratedPredictor(silent, cases)


def test_rejects_backend_without_capability() -> None:
    class Mute(FakeBackend):
        capabilities = frozenset({"rate"})  # type: ignore[assignment]

    for judge, capability in ((YesNoJudge, "score"), (ParsedYesNoJudge, "generate")):
        says = (f"'fake' does not support {capability}", "supports rate")
        with raises(BackendError, Facts("unsupported", column="eval.backend", says=says)):
            judge(asker(Mute()))


class Lengths(FakeBackend):
    """A backend whose ratings are the lengths of prompts."""

    capabilities = frozenset({"rate"})

    def rate(self, prompts: Sequence[Prompt]) -> list[HeadRating]:
        return [HeadRating(value=len(p.messages[0].text) / 10, prompt_tokens=7, engine="toy:head") for p in prompts]


def users(n: int) -> list[Request]:
    """Return requests of users with names of different lengths."""
    return [Request(id=f"r{k}", user_id="x" * (5 * k), item="i") for k in range(n)]


def test_ratings_are_in_request_order() -> None:
    seen: list[int] = []
    rater = HeadRater(asker(Lengths(), advance=seen.append))
    answers = rater.answer(users(5))
    assert [a.request_id for a in answers] == [f"r{k}" for k in range(5)]
    assert [a.value for a in answers if isinstance(a, Rating)] == pytest.approx([1.4 + 0.5 * k for k in range(5)])
    assert all(a.cost == Cost(prompt_tokens=7, forwards=1) and a.prompt_hash for a in answers)
    assert len({a.prompt_hash for a in answers}) == 5
    assert (seen, rater.engine) == ([2, 2, 1], "toy:head")


@pytest.fixture
def backend(llama_folder: Path) -> Any:
    """A random model with a head whose ratings depend on the prompt."""
    from llmrec.backends.hf.backend import HFBackend
    from llmrec.models.rating_head import HeadShape, new_rating_head

    model, encoder = opened(llama_folder)
    head = new_rating_head(HeadShape(values=(1.0, 2.0, 3.0, 4.0, 5.0), alpha=1.0, width=128), [1, 1, 1, 1, 1])
    torch.manual_seed(0)
    torch.nn.init.normal_(head.linear.weight, std=0.3)
    return HFBackend(model, encoder, batch_tokens=200, head=head)


def test_batched_ratings_equal_single_and_plain_ones(backend: Any) -> None:
    prompts = [Asking().prompt(request, template="t") for request in users(7)]
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


def test_rejects_engine_and_model_without_head(backend: Any) -> None:
    column, says = "tasks.rating.strategies", ("'fake'", "eval.backend=hf")
    with raises(BackendError, Facts("unsupported", column=column, says=says)):
        HeadRater(asker(FakeBackend()))
    backend._head = None
    with raises(BackendError, Facts("unsupported", column=column, says="tasks.rating.head")):
        backend.rate([Asking().prompt(request, template="t") for request in users(1)])


def test_cached_ratings_need_no_engine(backend: Any, tmp_path: Path) -> None:
    from llmrec.backends.cache import AnswerStore, CachedBackend
    from llmrec.backends.hf.backend import HFBackend

    store = AnswerStore(tmp_path / "answers.sqlite")
    first = HeadRater(asker(CachedBackend(store, {"weights": "a"}, HFBackend, lambda: backend))).answer(users(3))

    def rejected() -> Any:
        raise AssertionError("the engine was started")

    again = HeadRater(asker(CachedBackend(store, {"weights": "a"}, HFBackend, rejected))).answer(users(3))
    assert again == first
    with pytest.raises(AssertionError):
        HeadRater(asker(CachedBackend(store, {"weights": "b"}, HFBackend, rejected))).answer(users(3))
    store.close()
