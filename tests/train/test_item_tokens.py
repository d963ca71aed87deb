"""Item tokens for real on tiny models: from words to a resized base, through training and merging, to an engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmrec.backends.encode import Encoder, TokenRow
from llmrec.backends.hf.backend import HFBackend
from llmrec.errors import ModelError
from llmrec.index.table import ItemIndex, token
from llmrec.models.item_tokens import add_item_tokens, extended
from llmrec.models.load import load_model, load_tokenizer
from llmrec.recipe.schema import LoraSection, TrainSection
from llmrec.train import lora, sft
from llmrec.train.batches import plan
from llmrec.train.loss import ItemLoss, label_loss
from llmrec.types import Code, Example, Message, Prompt, Segment
from tests.conftest import make_model, make_tokenizer, section
from tests.facts import Facts, raises

FILMS = ("Toy Story", "Heat", "Fargo", "Casino", "Alien", "Brazil", "Jaws", "Rocky", "Heat Story")
TITLES = {f"i{n}": title for n, title in enumerate(FILMS)}
INDEX = ItemIndex(
    "semantic",
    {f"i{n}": (token(0, n // 3), token(1, n % 3)) for n in range(9)},
    tokens=tuple(token(level, number) for level in range(2) for number in range(4)),
)
QUESTION = (Message("user", (Segment("text", "Continue the list"),)),)


def untied(folder: Path) -> Path:
    """A tiny model whose head is a matrix of its own."""
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_pretrained(make_model(folder / "tied"))
    made.config.tie_word_embeddings = False
    torch.manual_seed(7)
    made.lm_head.weight = torch.nn.Parameter(torch.randn_like(made.model.embed_tokens.weight) * 0.05)
    made.save_pretrained(folder / "untied")
    make_tokenizer().save_pretrained(folder / "untied")
    return folder / "untied"


@pytest.fixture(scope="module", params=["llama", "qwen", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    made = untied(folder) if request.param == "untied" else make_model(folder / "m", request.param)
    extended(str(made), section(made), INDEX, TITLES, folder / "base", words=True, seed=0)
    return folder / "base"


def examples(count: int = 1000) -> Iterator[Example]:
    """Lists in which every code is followed by the next one."""
    for k in range(count):
        codes = [INDEX.encode(f"i{(k + step) % 9}") + "\n" for step in range(4)]
        answer = (Segment("item", codes[0]), *(Segment("target", code) for code in codes[1:]))
        yield Example(
            id=str(k), user_id="u", task="sequential", template="x", messages=QUESTION, answer=answer, ends_turn=False
        )


def trained(base: Path, out: Path, dtype: Any = "float32", **settings: Any) -> tuple[Any, Encoder]:
    train = TrainSection(**{"steps": 90, "batch_tokens": 256, "learning_rate": 5e-3, **settings})
    encoder = Encoder(load_tokenizer(str(base), section(base)), max_length=256)
    rows = [encoder.row(example) for example in examples()]
    ids = encoder.tokenizer.convert_tokens_to_ids(list(INDEX.tokens))
    torch.manual_seed(0)
    model = lora.load_trainable(str(base), section(base, dtype), train, tokens=ids)
    steps = plan(iter(rows), steps=train.steps, batch_tokens=256, seed=0)
    sft.train(model, encoder, steps, {}, train, folder=out, seed=0, quiet=True)
    return model, encoder


def test_each_token_is_one_id_and_reads_back(base: Path) -> None:
    tokenizer = load_tokenizer(str(base), section(base))
    ids = tokenizer.convert_tokens_to_ids(list(INDEX.tokens))
    assert ids == list(range(len(tokenizer) - 8, len(tokenizer)))
    encoder = Encoder(tokenizer, max_length=99)
    assert encoder.piece(INDEX.encode("i5") + "\n")[:2] == (ids[1], ids[4 + 2])
    written = encoder.completion([*encoder.piece(INDEX.encode("i5") + "\n")], "\n", 0)
    assert INDEX.decode(written.text) == "i5"
    # Item tokens are no control tokens, and all others still are.
    assert not set(INDEX.tokens) & set(encoder.control) and "<|im_end|>" in encoder.control


def test_a_new_row_starts_near_the_words_of_its_items(base: Path) -> None:
    tokenizer = load_tokenizer(str(base), section(base))
    model = load_model(str(base), section(base))
    heads = {"in": model.get_input_embeddings().weight, "out": model.get_output_embeddings().weight}
    for table in (weight.detach().numpy() for weight in heads.values()):
        new, old = table[-8:], table[:-8]
        means = np.stack(
            [
                np.mean(
                    [
                        table[tokenizer.encode(TITLES[item], add_special_tokens=False)].mean(axis=0)
                        for item, pieces in INDEX.codes.items()
                        if name in pieces
                    ],
                    axis=0,
                )
                for name in INDEX.tokens[:3]
            ]
        )
        alike = np.corrcoef(np.vstack([new[:3] - new[:3].mean(axis=0), means - means.mean(axis=0)]))[:3, 3:]
        assert (alike.argmax(axis=1) == np.arange(3)).all() and alike.diagonal().min() > 0.8
        # Rows that no item has start at random; all have the spread of ordinary words, and no two are equal.
        sizes = np.linalg.norm(new - old.mean(axis=0), axis=1)
        usual = np.sqrt(np.square(old - old.mean(axis=0)).sum(axis=1).mean())
        assert 0.3 * usual < sizes.min() and sizes.max() < 3 * usual
        assert len(np.unique(new.round(6), axis=0)) == 8


def one_row(base: Path) -> tuple[Any, TokenRow, Any, Any, list[int]]:
    """Return a model with adapters, a row with its ids and labels as tensors, and the ids of the item tokens."""
    encoder = Encoder(load_tokenizer(str(base), section(base)), max_length=256)
    ids = encoder.tokenizer.convert_tokens_to_ids(list(INDEX.tokens))
    model = lora.load_trainable(str(base), section(base), TrainSection(lora=LoraSection(rank=4)), tokens=ids)
    row = encoder.row(next(examples()))
    return model, row, torch.tensor([row.ids]), torch.tensor([row.labels]), ids


def gradients(model: Any) -> dict[str, Any]:
    """Take the gradients of a model from it."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_the_loss_and_its_gradients_are_those_of_plain_cross_entropy(base: Path) -> None:
    model, row, inputs, labels, _ = one_row(base)
    loss, count = label_loss(model, inputs, labels)
    loss.backward()
    ours = gradients(model)
    logits = model(input_ids=inputs).logits[0, :-1].float()
    plain = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=-100)
    plain.backward()
    theirs = gradients(model)
    assert count == row.targets and float(loss.detach()) == pytest.approx(float(plain.detach()), abs=1e-4)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)
    tables = [name for name in ours if "trainable_tokens_delta" in name]
    tied = model.get_base_model().config.tie_word_embeddings
    assert len(tables) == (1 if tied else 2) and all(ours[name].shape[0] == 8 for name in tables)
    assert all(float(ours[name].abs().max()) > 0 for name in tables)


def test_only_rows_of_new_tokens_move_and_they_are_saved_and_merged(base: Path, tmp_path: Path) -> None:
    model, _ = trained(base, tmp_path, steps=6)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    tables = [name for name in stored if "trainable_tokens_delta" in name]
    assert tables and not [name for name in stored if name.endswith("embed_tokens.weight")]
    lora.merge(str(base), section(base), tmp_path / "adapter", tmp_path / "merged")
    before, after = load_model(str(base), section(base)), load_model(str(tmp_path / "merged"), section(base))
    for table in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, table)().weight, getattr(after, table)().weight
        assert torch.equal(old[:-8], new[:-8]) and not torch.equal(old[-8:], new[-8:])
    ids = torch.tensor([[5, 9, old.shape[0] - 3, 12]])
    with torch.no_grad():
        assert torch.allclose(model.eval()(input_ids=ids).logits, after(input_ids=ids).logits, atol=1e-3)


def test_small_steps_are_not_lost_in_a_bfloat16_base(tmp_path: Path) -> None:
    made = make_model(tmp_path / "m")
    extended(str(made), section(made, "bfloat16"), INDEX, TITLES, tmp_path / "base", words=True, seed=0)
    model, _ = trained(tmp_path / "base", tmp_path, dtype="bfloat16", steps=2, learning_rate=1e-5)
    (rows,) = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name]
    assert rows.dtype == torch.float32
    start = load_model(str(tmp_path / "base"), section(made, "bfloat16")).get_input_embeddings().weight[-8:].float()
    assert 0 < float((rows - start).detach().abs().max()) < 1e-4


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_other_methods_learn_the_tokens_too(method: str, tmp_path: Path) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    made = make_model(tmp_path / "m")
    extended(str(made), section(made), INDEX, TITLES, tmp_path / "base", words=False, seed=0)
    model, _ = trained(tmp_path / "base", tmp_path, steps=4, method=method)
    start = load_model(str(tmp_path / "base"), section(made)).get_input_embeddings().weight[-8:]
    if method == "full":
        now = model.get_input_embeddings().weight[-8:]
    else:
        (now,) = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name]
    assert float((now - start).detach().abs().max()) > 1e-3


def test_a_tokenizer_that_cuts_tokens_is_refused() -> None:
    class Cutting:
        def add_tokens(self, tokens: list[Any]) -> None: ...

        def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
            return [7] * len(tokens)

        def encode(self, text: str, **_: Any) -> list[int]:
            return list(range(len(text)))

    with raises(ModelError, Facts("unsupported", column="model.name", says=("Cutting", "<a_0>"))):
        add_item_tokens(Cutting(), INDEX.tokens)


# --------------------------------------------------------------------------- to the engine


def asked(item: str) -> Prompt:
    return Prompt(messages=QUESTION, answer_prefix=(Segment("item", Code(INDEX.encode(item) + "\n")),), stop="\n")


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Encoder]:
    """A model that was taught to answer each code with the next one."""
    folder = tmp_path_factory.mktemp("taught")
    made = make_model(folder / "m")
    extended(str(made), section(made), INDEX, TITLES, folder / "base", words=True, seed=0)
    _, encoder = trained(folder / "base", folder)
    lora.merge(str(folder / "base"), section(made), folder / "adapter", folder / "merged")
    encoder.tokenizer.save_pretrained(folder / "merged")
    return folder / "merged", Encoder(load_tokenizer(str(folder / "merged"), section(made)), max_length=256)


def test_a_trained_token_comes_out_of_transformers(merged: tuple[Path, Encoder]) -> None:
    backend = HFBackend(load_model(str(merged[0]), section(merged[0])), merged[1])
    said = backend.generate([asked(f"i{n}") for n in range(8)], max_tokens=8)
    assert [INDEX.decode(each.text) for each in said] == [f"i{n + 1}" for n in range(8)]


@pytest.mark.vllm
@pytest.mark.slow
def test_a_trained_token_comes_out_of_vllm(merged: tuple[Path, Encoder]) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from llmrec.backends.vllm.backend import VLLMBackend

    backend = VLLMBackend(str(merged[0]), merged[1], dtype="float32")
    try:
        said = backend.generate([asked(f"i{n}") for n in range(8)], max_tokens=8)
        assert [INDEX.decode(each.text) for each in said] == [f"i{n + 1}" for n in range(8)]
        codes = [INDEX.encode(item) for item in INDEX.codes]
        scores = backend.score([asked("i3")], [codes])[0].logprobs
    finally:
        backend.close()
    plain = HFBackend(load_model(str(merged[0]), section(merged[0])), merged[1])
    assert max(range(9), key=lambda n: scores[n]) == 4
    assert scores == pytest.approx(plain.score([asked("i3")], [codes])[0].logprobs, abs=1e-2)


def test_a_title_that_spells_a_token_is_read_as_words(tmp_path: Path) -> None:
    made = make_model(tmp_path / "m")
    titles = {**TITLES, "i0": "Heat <a_0><b_3> <|im_end|>"}
    extended(str(made), section(made), INDEX, titles, tmp_path / "base", words=True, seed=0)
    weights = load_model(str(tmp_path / "base"), section(made)).get_input_embeddings().weight
    assert torch.isfinite(weights).all() and len(weights) == len(load_tokenizer(str(tmp_path / "base"), section(made)))


def test_an_item_softmax_has_the_item_tokens_alone_and_leaves_other_targets_as_they_are(base: Path) -> None:
    model, row, inputs, labels, ids = one_row(base)
    # Targets are item tokens and line ends.
    weights = torch.tensor([2.0])
    loss, count = label_loss(model, inputs, labels, ItemLoss(tuple(sorted(ids))), weights)
    loss.backward()
    ours = gradients(model)
    logits, wanted = model(input_ids=inputs).logits[0, :-1].float(), labels[0, 1:]
    coded = torch.isin(wanted, torch.tensor(ids))
    assert coded.any() and not coded[wanted != -100].all()
    barred = torch.ones(logits.shape[-1], dtype=torch.bool).index_fill(0, torch.tensor(ids), False)
    logits = torch.where(coded[:, None] & barred, -torch.inf, logits)
    plain = 2 * torch.nn.functional.cross_entropy(logits, wanted, reduction="sum", ignore_index=-100)
    plain.backward()
    theirs = gradients(model)
    assert count == 2 * row.targets and float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)


def test_an_item_softmax_needs_the_loss_of_answers() -> None:
    with pytest.raises(ValueError, match=r"train\.exits"):
        TrainSection(softmax="items", exits=True)
