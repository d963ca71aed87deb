"""User rows: one row with loss on every target equals one row per target."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmrec.backends.encode import IGNORED, Encoder, TokenRow
from llmrec.models.load import load_model, load_tokenizer
from llmrec.recipe.schema import ModelSection
from llmrec.train.batches import fit_row, padded, plan
from llmrec.train.loss import label_loss
from llmrec.train.steps import Step
from llmrec.types import Example, Message, Prompt, Segment

TITLES = ("Toy Story", "Heat", "Fargo", "Casino", "Brazil")


@pytest.fixture(scope="module", params=["llama_folder", "qwen_folder"])
def loaded(request: pytest.FixtureRequest) -> tuple[object, Encoder]:
    folder: Path = request.getfixturevalue(request.param)
    section = ModelSection(name=str(folder), dtype="float32")
    return load_model(str(folder), section), Encoder(load_tokenizer(str(folder), section), max_length=512)


def example(titles: tuple[str, ...] = TITLES, context: int = 1) -> Example:
    answer: list[Segment] = []
    for k, title in enumerate(titles):
        kind = "target" if k >= context else "item"
        answer += [Segment(kind, title), Segment(kind if kind == "target" else "text", "\n")]
    question = (Message("user", (Segment("text", "Continue the list"),)),)
    return Example(
        id="e",
        user_id="u",
        task="sequential",
        template="sequential/x",
        messages=question,
        answer=tuple(answer),
        ends_turn=False,
    )


def test_user_row_loss_equals_per_position_loss(loaded: tuple[object, Encoder]) -> None:
    """The claim of the main job: sum over one user row = sum over one row per position, within 1e-4 in float32."""
    model, encoder = loaded
    row = encoder.row(example())
    total, count = label_loss(model, torch.tensor([row.ids]), torch.tensor([row.labels]))
    apart, targets = 0.0, 0
    for k in range(1, len(TITLES)):
        given = tuple(s for title in TITLES[:k] for s in (Segment("item", title), Segment("text", "\n")))
        prompt = Prompt(messages=example().messages, answer_prefix=given, stop="\n")
        ids = encoder.prompt(prompt)
        tail = encoder.continuation(prompt, TITLES[k], closed=True)
        labels = [IGNORED] * len(ids) + list(tail)
        loss, n = label_loss(model, torch.tensor([ids + list(tail)]), torch.tensor([labels]))
        apart, targets = apart + float(loss.detach()), targets + n
    assert count == targets == row.targets
    assert float(total.detach()) == pytest.approx(apart, abs=1e-4)


def test_prompts_are_prefixes_of_the_training_row(loaded: tuple[object, Encoder]) -> None:
    _, encoder = loaded
    row = encoder.row(example())
    for k in range(len(TITLES)):
        given = tuple(s for title in TITLES[:k] for s in (Segment("item", title), Segment("text", "\n")))
        ids = encoder.prompt(Prompt(messages=example().messages, answer_prefix=given, stop="\n"))
        assert tuple(ids) == row.ids[: len(ids)]


def test_label_loss_equals_full_logits(loaded: tuple[object, Encoder]) -> None:
    """Head on label rows only, gradient formed in the forward pass: value and gradients as the plain way."""
    model, encoder = loaded
    rows = [encoder.row(example()), encoder.row(example(TITLES[:3]))]
    ids, labels = (torch.tensor(part) for part in padded(rows, encoder.tokenizer.pad_token_id))
    head = model.get_output_embeddings()
    probe = next(p for name, p in model.named_parameters() if "q_proj" in name)
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter is probe)
        total, count = label_loss(model, ids, labels)
        (ours,) = torch.autograd.grad(total / count, [probe])
        logits = model(input_ids=ids).logits[:, :-1]
        plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        (theirs,) = torch.autograd.grad(plain, [probe])
        assert float(total.detach() / count) == pytest.approx(float(plain.detach()), abs=1e-5)
        assert torch.allclose(ours, theirs, atol=1e-6)
        head.weight.requires_grad_(True)
        full, _ = label_loss(model, ids, labels)
        assert float(full.detach()) == pytest.approx(float(total.detach()), abs=1e-4)
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(True)


def test_padding_and_neighbours_change_no_loss(loaded: tuple[object, Encoder]) -> None:
    model, encoder = loaded
    short, long = encoder.row(example(TITLES[:2])), encoder.row(example())
    ids, labels = (torch.tensor(part) for part in padded([short, long], encoder.tokenizer.pad_token_id))
    together, _ = label_loss(model, ids, labels)
    alone = sum(
        float(label_loss(model, torch.tensor([r.ids]), torch.tensor([r.labels]))[0].detach()) for r in (short, long)
    )
    assert float(together.detach()) == pytest.approx(alone, abs=1e-4)


def test_steps_hold_to_their_budget_and_lose_no_row() -> None:
    rows = [TokenRow(tuple(range(n)), (IGNORED,) * (n - 1) + (1,)) for n in range(5, 65)]
    steps = list(plan(iter(rows), steps=1000, batch_tokens=128, seed=0))
    assert sorted(len(row.ids) for step in steps for row in step.rows) == [len(row.ids) for row in rows]
    assert all(step.padded_tokens <= 128 for step in steps)
    assert sum(s.tokens for s in steps) / sum(s.padded_tokens for s in steps) > 0.85
    again = list(plan(iter(rows), steps=1000, batch_tokens=128, seed=0))
    assert steps == again
    assert steps != list(plan(iter(rows), steps=1000, batch_tokens=128, seed=1))


def test_a_row_too_long_makes_a_step_of_its_own() -> None:
    row = TokenRow(tuple(range(300)), (1,) * 300)
    assert list(plan(iter([row]), steps=5, batch_tokens=128, seed=0)) == [Step((row,))]


def test_long_rows_are_cut_at_their_end(loaded: tuple[object, Encoder]) -> None:
    _, encoder = loaded
    full = encoder.row(example())
    cut = fit_row(example(), encoder, len(full.ids) - 3)
    assert cut is not None
    assert cut.ids == full.ids[:-3]
    assert fit_row(example(), encoder, 5) is None
