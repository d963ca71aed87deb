"""Yes or no as a probability: the whole answers' likelihoods, whatever the tokenizer, and what a text says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from llmrec.backends.encode import Encoder
from llmrec.backends.fake import FakeBackend
from llmrec.errors import BackendError, LlmrecError
from llmrec.metrics.probability import calibration_error
from llmrec.strategies.asking import Prompting
from llmrec.strategies.raters import Calibrated, ParsedYesNoJudge, YesNoJudge, fit_curve
from llmrec.tasks.ctr import read_choice
from llmrec.types import Answer, Case, Example, Message, Probability, Prompt, Request, Segment, Unparsed
from tests.facts import Facts, raises

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


class Asking:
    """Asks a fixed question whose two answers are given."""

    def __init__(self, yes: str = "Yes", no: str = "No") -> None:
        self._answers = (yes, no)

    def prompt(self, request: Request, *, template: str, shots: int = 0, want: str = "one") -> Prompt:
        return Prompt(messages=(Message("user", (Segment("text", f"Will {request.id} like it?"),)),))

    def continuations(self, request: Request, *, template: str) -> tuple[str, ...]:
        return self._answers

    def parse(self, completion: str, request: Request, *, template: str) -> Answer | None:
        place = read_choice(completion, self._answers)
        return None if place is None else Probability(request_id=request.id, value=1.0 - place)


def requests(n: int = 3) -> list[Request]:
    return [Request(id=f"r{k}", user_id="u", item="i") for k in range(n)]


def asker(backend: Any, task: Any = None) -> Prompting:
    return Prompting(backend=backend, task=task or Asking(), template="t", batch=2)


def value(answer: Answer) -> float:
    assert isinstance(answer, Probability)
    return answer.value


def test_the_probability_is_the_softmax_over_the_two_answers() -> None:
    logs = {"Yes": math.log(0.06), "No": math.log(0.02)}
    judge = YesNoJudge(asker(FakeBackend(prefer=lambda text, answer: logs[answer])))
    answers = judge.answer(requests())
    assert [value(answer) for answer in answers] == pytest.approx([0.75] * 3)
    assert [answer.request_id for answer in answers] == ["r0", "r1", "r2"]
    assert judge.engine == "fake" and answers[0].prompt_hash


@pytest.mark.parametrize(("yes", "no", "said"), [(-1000.0, -1.0, 0.0), (-1.0, -1000.0, 1.0), (-900.0, -900.0, 0.5)])
def test_far_likelihoods_neither_overflow_nor_vanish(yes: float, no: float, said: float) -> None:
    logs = {"Yes": yes, "No": no}
    (answer,) = YesNoJudge(asker(FakeBackend(prefer=lambda text, answer: logs[answer]))).answer(requests(1))
    assert value(answer) == said


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
    from llmrec.models.load import load_tokenizer, resolve
    from llmrec.recipe.schema import ModelSection

    section = ModelSection()
    return load_tokenizer(resolve(section), section)


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
def test_answers_of_one_token_and_of_several_mean_the_same(name: str, lengths: dict[tuple[str, str], Any]) -> None:
    """P(yes) against a forward pass over each whole answer; where one answer begins the other, its end counts too."""
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
            sums.append(sum(float(logs[len(ids) - 1 + place, token]) for place, token in enumerate(tail)))
            sizes.append(len(tail) - closed)
        assert expected is None or tuple(sizes) == expected
        odds = math.log(value(answer)) - math.log1p(-value(answer))
        assert odds == pytest.approx(sums[0] - sums[1], abs=2e-3)


@pytest.mark.parametrize("name", ["bytes", pytest.param("smollm2", marks=pytest.mark.model)])
def test_what_is_scored_is_what_was_trained_to_the_token(name: str) -> None:
    encoder = Encoder(tokenizer_of(name), max_length=400)
    prompt = Asking().prompt(requests(1)[0], template="t")
    for answer in ("Yes", "No"):
        example = Example(
            id="e", user_id="u", task="ctr", template="ctr/t", messages=prompt.messages,
            answer=(Segment("target", answer),), ends_turn=True,
        )  # fmt: skip
        row = encoder.row(example)
        asked = [*encoder.prompt(prompt), *encoder.continuation(prompt, answer, closed=False)]
        assert list(row.ids[: len(asked)]) == asked
        assert [label for label in row.labels if label >= 0][: len(asked) - len(encoder.prompt(prompt))] == asked[
            len(encoder.prompt(prompt)) :
        ]


def test_texts_are_read_and_refusals_stay() -> None:
    texts = iter(["Yes, surely", "No.", "Oui", "I cannot tell", ""])
    answers = ParsedYesNoJudge(asker(FakeBackend(complete=lambda text: next(texts)))).answer(requests(5))
    assert [type(answer).__name__ for answer in answers] == ["Probability", "Probability", *["Unparsed"] * 3]
    assert [value(answer) for answer in answers[:2]] == [1.0, 0.0]
    assert isinstance(answers[2], Unparsed) and answers[2].raw == "Oui"
    assert [answer.request_id for answer in answers] == [f"r{k}" for k in range(5)]


# --------------------------------------------------------------------------- calibration


def drawn(count: int, scale: float, bias: float) -> tuple[list[float], list[float]]:
    """What an overconfident judge says, and truths that follow ``scale`` times its log-odds plus ``bias``."""
    rng = np.random.default_rng(0)
    odds = rng.normal(0, 3, count)
    truth = rng.random(count) < 1 / (1 + np.exp(-(scale * odds + bias)))
    return (1 / (1 + np.exp(-odds))).tolist(), truth.astype(float).tolist()


def test_a_curve_finds_the_temperature_and_the_prior() -> None:
    said, truth = drawn(40_000, 0.4, -0.7)
    curve = fit_curve(said, truth)
    assert curve.scale == pytest.approx(0.4, abs=0.03) and curve.bias == pytest.approx(-0.7, abs=0.05)
    assert calibration_error([curve.of(value) for value in said], truth) < 0.02 < calibration_error(said, truth)
    assert fit_curve(*drawn(40_000, 1.0, 0.0)).scale == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("said", "truth"),
    [([0.9], [1.0]), ([0.1, 0.9], [0.0, 1.0]), ([1.0, 0.0], [0.0, 1.0]), ([0.5] * 5, [1.0] * 5), ([1.0, 1.0], [1, 0])],
)
def test_few_and_certain_answers_give_finite_curves_that_keep_the_order(said: list[float], truth: list[float]) -> None:
    curve = fit_curve(said, truth)
    values = [curve.of(value) for value in (0.0, 0.2, 0.8, 1.0)]
    assert all(0 <= value <= 1 for value in values) and values == sorted(values)
    assert 0 < curve.scale < math.inf and abs(curve.bias) <= 20


def test_calibration_keeps_the_order_of_answers_that_are_nearly_certain() -> None:
    said, truth = drawn(2_000, 0.4, -0.7)
    curve = fit_curve(said, truth)
    sure = [1e-12, 1e-9, 1e-7, 1e-3, 1 - 1e-7, 1 - 1e-9, 1 - 1e-12]
    found = [curve.of(value) for value in sure]
    assert found == sorted(found) and len(set(found)) == len(found)


def test_a_calibrated_judge_keeps_failures_and_order() -> None:
    texts = iter(["Yes", "No", "Yes", "No", "Yes", "No", "hm"])
    judge = ParsedYesNoJudge(asker(FakeBackend(complete=lambda text: next(texts))))
    cases = [
        Case(request=request, truth=truth) for request, truth in zip(requests(4), (1.0, 0.0, 0.0, 0.0), strict=True)
    ]
    calibrated = Calibrated(judge, cases)
    assert calibrated.name == "parsed-yes-no"
    yes, no, mute = calibrated.answer(requests(3))
    assert 0 < value(no) < value(yes) < 1 and isinstance(mute, Unparsed)
    # Of two that said yes one was right; of two that said no none was wrong.
    assert value(yes) == pytest.approx(0.5, abs=0.1) and value(no) < 0.3
    silent = ParsedYesNoJudge(asker(FakeBackend(complete=lambda text: "hm")))
    with raises(LlmrecError, Facts("too-few", column="tasks.ctr.calibrate", says="data.split.valid")):
        Calibrated(silent, cases)


def test_a_backend_that_cannot_is_refused_at_the_door() -> None:
    class Mute(FakeBackend):
        capabilities = frozenset({"rate"})  # type: ignore[assignment]

    for judge, capability in ((YesNoJudge, "score"), (ParsedYesNoJudge, "generate")):
        says = (f"'fake' does not support {capability}", "supports rate")
        with raises(BackendError, Facts("unsupported", column="eval.backend", says=says)):
            judge(asker(Mute()))
