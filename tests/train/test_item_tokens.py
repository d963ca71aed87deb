"""Item tokens on tiny models: a resized base, training, merging, and decoding."""

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
from llmrec.index.table import ItemIndex, level_token
from llmrec.models.item_tokens import add_item_tokens, save_with_item_tokens
from llmrec.models.load import load_model, load_tokenizer
from llmrec.recipe.schema import LoraSection, TrainSection
from llmrec.train import lora
from llmrec.train.batches import plan_steps
from llmrec.train.loss import ItemLoss, label_loss
from llmrec.types import Code, Example, Prompt, Segment
from tests.conftest import encoder_of, make_model, make_tokenizer, section
from tests.facts import Facts, raises
from tests.train.tiny import alone, example, fit, user

FILMS = ("Toy Story", "Heat", "Fargo", "Casino", "Alien", "Brazil", "Jaws", "Rocky", "Heat Story")
TITLES = {f"i{n}": title for n, title in enumerate(FILMS)}
INDEX = ItemIndex(
    "semantic",
    {f"i{n}": (level_token(0, n // 3), level_token(1, n % 3)) for n in range(9)},
    tokens=tuple(level_token(level, number) for level in range(2) for number in range(4)),
)
QUESTION = user("Continue the list")


def untied(folder: Path) -> Path:
    """Save a tiny model whose head is not tied to its embeddings."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_model(folder / "tied"))
    model.config.tie_word_embeddings = False
    torch.manual_seed(7)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.model.embed_tokens.weight) * 0.05)
    model.save_pretrained(folder / "untied")
    make_tokenizer().save_pretrained(folder / "untied")
    return folder / "untied"


def grown(folder: Path, model: Path, *, dtype: Any = "float32", titles: Any = TITLES, words: bool = True) -> Path:
    save_with_item_tokens(str(model), section(model, dtype), INDEX, titles, folder / "base", words=words, seed=0)
    return folder / "base"


@pytest.fixture(scope="module", params=["qwen", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return grown(folder, untied(folder) if request.param == "untied" else make_model(folder / "m", request.param))


def examples(count: int = 1000) -> Iterator[Example]:
    """Yield lists in which every code is followed by the next one."""
    for k in range(count):
        codes = [INDEX.encode(f"i{(k + step) % 9}") + "\n" for step in range(4)]
        yield example(QUESTION, Segment("item", codes[0]), *codes[1:], id=str(k), task="sequential", ends_turn=False)


def trained(base: Path, out: Path, dtype: Any = "float32", **settings: Any) -> tuple[Any, Encoder]:
    train, encoder = TrainSection(**{"learning_rate": 5e-3, **settings}), encoder_of(base)
    rows = [encoder.row(example) for example in examples()]
    ids = encoder.tokenizer.convert_tokens_to_ids(list(INDEX.tokens))
    torch.manual_seed(0)
    model = lora.load_trainable(str(base), section(base, dtype), train, tokens=ids)
    fit(model, encoder, plan_steps(iter(rows), steps=train.steps, batch_tokens=256, seed=0), train, out)
    return model, encoder


def test_each_token_is_one_id_and_decodes(base: Path) -> None:
    tokenizer = load_tokenizer(str(base), section(base))
    ids = tokenizer.convert_tokens_to_ids(list(INDEX.tokens))
    assert ids == list(range(len(tokenizer) - 8, len(tokenizer)))
    encoder = Encoder(tokenizer, max_length=99)
    assert encoder.piece(INDEX.encode("i5") + "\n")[:2] == (ids[1], ids[4 + 2])
    written = encoder.completion([*encoder.piece(INDEX.encode("i5") + "\n")], "\n", 0)
    assert INDEX.decode(written.text) == "i5"
    # Item tokens are no control tokens.
    assert not set(INDEX.tokens) & set(encoder.control) and "<|im_end|>" in encoder.control


def test_new_rows_start_near_the_words_of_their_items(base: Path) -> None:
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
        # All rows have the spread of ordinary words, and no two are equal.
        sizes = np.linalg.norm(new - old.mean(axis=0), axis=1)
        usual = np.sqrt(np.square(old - old.mean(axis=0)).sum(axis=1).mean())
        assert 0.3 * usual < sizes.min() and sizes.max() < 3 * usual
        assert len(np.unique(new.round(6), axis=0)) == 8


def one_row(base: Path) -> tuple[Any, TokenRow, list[int]]:
    """Return a model with adapters, a row, and the ids of the item tokens."""
    encoder = encoder_of(base)
    ids = encoder.tokenizer.convert_tokens_to_ids(list(INDEX.tokens))
    model = lora.load_trainable(str(base), section(base), TrainSection(lora=LoraSection(rank=4)), tokens=ids)
    return model, encoder.row(next(examples())), ids


def gradients(model: Any, loss: Any) -> dict[str, Any]:
    """Return the gradients of a loss, and reset those of the model."""
    loss.backward()
    result = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return result


def test_loss_and_gradients_equal_cross_entropy(base: Path) -> None:
    model, row, _ = one_row(base)
    inputs, labels = alone(row)
    loss, count = label_loss(model, inputs, labels)
    ours = gradients(model, loss)
    logits = model(input_ids=inputs).logits[0, :-1].float()
    plain = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=-100)
    theirs = gradients(model, plain)
    assert count == row.targets and float(loss.detach()) == pytest.approx(float(plain.detach()), abs=1e-4)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)
    tables = [name for name in ours if "trainable_tokens_delta" in name]
    tied = model.get_base_model().config.tie_word_embeddings
    assert len(tables) == (1 if tied else 2) and all(ours[name].shape[0] == 8 for name in tables)
    assert all(float(ours[name].abs().max()) > 0 for name in tables)


def test_only_rows_of_new_tokens_are_trained_saved_and_merged(base: Path, tmp_path: Path) -> None:
    model, _ = trained(base, tmp_path, steps=6)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    tables = [name for name in stored if "trainable_tokens_delta" in name]
    assert tables and not [name for name in stored if name.endswith("embed_tokens.weight")]
    lora.merge_adapter(str(base), section(base), tmp_path / "adapter", tmp_path / "merged")
    before, after = load_model(str(base), section(base)), load_model(str(tmp_path / "merged"), section(base))
    for table in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, table)().weight, getattr(after, table)().weight
        assert torch.equal(old[:-8], new[:-8]) and not torch.equal(old[-8:], new[-8:])
    ids = torch.tensor([[5, 9, old.shape[0] - 3, 12]])
    with torch.no_grad():
        assert torch.allclose(model.eval()(input_ids=ids).logits, after(input_ids=ids).logits, atol=1e-3)


def test_small_steps_are_not_lost_in_a_bfloat16_base(llama_folder: Path, tmp_path: Path) -> None:
    base = grown(tmp_path, llama_folder, dtype="bfloat16")
    model, _ = trained(base, tmp_path, dtype="bfloat16", steps=2, learning_rate=1e-5)
    (rows,) = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name]
    assert rows.dtype == torch.float32
    start = load_model(str(base), section(base, "bfloat16")).get_input_embeddings().weight[-8:].float()
    assert 0 < float((rows - start).detach().abs().max()) < 1e-4


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_other_methods_train_the_tokens_too(method: str, llama_folder: Path, tmp_path: Path) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = grown(tmp_path, llama_folder, words=False)
    model, _ = trained(base, tmp_path, steps=4, method=method)
    start = load_model(str(base), section(base)).get_input_embeddings().weight[-8:]
    if method == "full":
        now = model.get_input_embeddings().weight[-8:]
    else:
        (now,) = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name]
    assert float((now - start).detach().abs().max()) > 1e-3


def test_rejects_tokenizer_that_splits_tokens() -> None:
    class Cutting:
        def add_tokens(self, tokens: list[Any]) -> None: ...

        def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
            return [7] * len(tokens)

        def encode(self, text: str, **_: Any) -> list[int]:
            return list(range(len(text)))

    with raises(ModelError, Facts("unsupported", column="model.name", says=("Cutting", "<a_0>"))):
        add_item_tokens(Cutting(), INDEX.tokens)


def prompt(item: str) -> Prompt:
    return Prompt(messages=QUESTION, answer_prefix=(Segment("item", Code(INDEX.encode(item) + "\n")),), stop="\n")


@pytest.fixture(scope="module")
def merged(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Encoder]:
    """A model that was trained to answer each code with the next one."""
    folder = tmp_path_factory.mktemp("trained")
    base = grown(folder, llama_folder)
    _, encoder = trained(base, folder, steps=60, learning_rate=8e-3)
    lora.merge_adapter(str(base), section(base), folder / "adapter", folder / "merged")
    encoder.tokenizer.save_pretrained(folder / "merged")
    return folder / "merged", encoder_of(folder / "merged")


def test_transformers_generates_trained_tokens(merged: tuple[Path, Encoder]) -> None:
    backend = HFBackend(load_model(str(merged[0]), section(merged[0])), merged[1])
    answers = backend.generate([prompt(f"i{n}") for n in range(8)], max_tokens=8)
    assert [INDEX.decode(each.text) for each in answers] == [f"i{n + 1}" for n in range(8)]


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_generates_trained_tokens(merged: tuple[Path, Encoder]) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from llmrec.backends.vllm.backend import VLLMBackend

    backend = VLLMBackend(str(merged[0]), merged[1], dtype="float32")
    try:
        answers = backend.generate([prompt(f"i{n}") for n in range(8)], max_tokens=8)
        assert [INDEX.decode(each.text) for each in answers] == [f"i{n + 1}" for n in range(8)]
        codes = [INDEX.encode(item) for item in INDEX.codes]
        scores = backend.score([prompt("i3")], [codes])[0].logprobs
    finally:
        backend.close()
    plain = HFBackend(load_model(str(merged[0]), section(merged[0])), merged[1])
    assert max(range(9), key=lambda n: scores[n]) == 4
    assert scores == pytest.approx(plain.score([prompt("i3")], [codes])[0].logprobs, abs=1e-2)


def test_title_that_spells_a_token_is_read_as_words(llama_folder: Path, tmp_path: Path) -> None:
    base = grown(tmp_path, llama_folder, titles={**TITLES, "i0": "Heat <a_0><b_3> <|im_end|>"})
    weights = load_model(str(base), section(base)).get_input_embeddings().weight
    assert torch.isfinite(weights).all() and len(weights) == len(load_tokenizer(str(base), section(base)))


def test_item_softmax_is_over_item_tokens_only(base: Path) -> None:
    model, row, ids = one_row(base)
    inputs, labels = alone(row)
    # Targets are item tokens and line ends.
    loss, count = label_loss(model, inputs, labels, ItemLoss(tuple(sorted(ids))), torch.tensor([2.0]))
    ours = gradients(model, loss)
    logits, targets = model(input_ids=inputs).logits[0, :-1].float(), labels[0, 1:]
    coded = torch.isin(targets, torch.tensor(ids))
    assert coded.any() and not coded[targets != -100].all()
    barred = torch.ones(logits.shape[-1], dtype=torch.bool).index_fill(0, torch.tensor(ids), False)
    logits = torch.where(coded[:, None] & barred, -torch.inf, logits)
    plain = 2 * torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
    theirs = gradients(model, plain)
    assert count == 2 * row.targets and float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)


def test_rejects_item_softmax_with_exits() -> None:
    with pytest.raises(ValueError, match=r"train\.exits"):
        TrainSection(softmax="items", exits=True)
