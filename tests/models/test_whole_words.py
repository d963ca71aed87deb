"""Whole-word embeddings: word indices, equal inputs of every engine, training, saving and errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from llmrec.backends.encode import Encoder, TokenRow
from llmrec.backends.hf.backend import HFBackend
from llmrec.errors import ModelError, RecipeError
from llmrec.guard import control_tokens
from llmrec.index.table import ItemIndex
from llmrec.models.item_tokens import add_item_tokens, save_with_item_tokens
from llmrec.models.load import byte_tokenizer, load_model, model_folder_hash, write_random_model
from llmrec.models.whole_words import (
    WHOLE_WORDS_FILE,
    attach_whole_words,
    copy_whole_words,
    load_whole_words,
    save_whole_words,
    token_kinds,
    whole_word_embeddings,
    word_numbers,
)
from llmrec.recipe.schema import LoraSection, ModelSection, ShapeSection, TrainSection
from llmrec.train import lora
from llmrec.train.batches import plan_steps, target_rows
from llmrec.train.heads import add_whole_words
from llmrec.train.loss import encoder_decoder_loss
from llmrec.types import Prompt
from tests.conftest import encoder_of as encoder_in
from tests.facts import Facts, raises
from tests.train.tiny import example, fit, pairs, tear, user

SHAPE = ShapeSection(kind="encoder-decoder", layers=1, width=16, heads=2, feedforward=32, dropout=0.0)
# Ids of several pieces, next to other text.
QUESTION = "user 31 chose 1001, 1002 and 1003; next?"
ANSWERS = ("1004", "1005", "no", "1", "another")


def section(folder: Path | str) -> ModelSection:
    return ModelSection(name=str(folder), dtype="float32", max_length=96)


encoder_of = partial(encoder_in, max_length=96)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5") / "base"
    write_random_model(SHAPE, folder, seed=0)
    return folder


def with_words(base: Path, *, zero: bool = False) -> Any:
    model = load_model(str(base), section(base)).eval()
    add_whole_words(model, encoder_of(base), size=97, seed=0)
    if zero:
        torch.nn.init.zeros_(whole_word_embeddings(model).weight)
    return model


def prompt(text: str = QUESTION) -> Prompt:
    return Prompt(messages=user(text))


def rows(encoder: Encoder, count: int = 6) -> list[TokenRow]:
    texts = [QUESTION.replace("31", str(n)) + " more" * (n % 3) for n in range(count)]
    return [row for n, text in enumerate(texts) for row in target_rows(example(text, ANSWERS[n % 2]), encoder, 200)]


def sentencepiece() -> Any:
    """A tokenizer like T5's: the first piece of a word has a mark, and numbers are split."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["user", "item", "has", "bought", "12", ""]
    pieces = ["<pad>", "</s>", "<unk>", "_", ",", ".", *"1234", "23", "12", *(f"\u2581{word}" for word in words)]
    scored = [(piece, float(number - len(pieces))) for number, piece in enumerate(pieces)]
    core = tokenizers.Tokenizer(tokenizers.models.Unigram(scored, unk_id=2, byte_fallback=False))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    core.decoder = tokenizers.decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def indices(tokenizer: Any, text: str, *, end: bool = False) -> list[tuple[str, int]]:
    ids = [*tokenizer.encode(text, add_special_tokens=False), *([tokenizer.eos_token_id] if end else [])]
    control = control_tokens(tokenizer.all_special_tokens, tokenizer.added_tokens_decoder.values())
    # A model may have more embeddings than its tokenizer has tokens.
    kinds = torch.tensor(token_kinds(tokenizer, control, len(tokenizer) + 3))
    words = word_numbers(kinds[torch.tensor([ids])])[0].tolist()
    return list(zip(tokenizer.convert_ids_to_tokens(ids), words, strict=True))


def test_indices_of_a_sentence_by_hand() -> None:
    """As in P5's code: a word starts at a piece with the mark, and the end of the text has 0."""
    result = indices(sentencepiece(), "user_23 has bought item_1234, item_4 .", end=True)
    assert result == [
        *[("\u2581user", 1), ("_", 1), ("23", 1)],
        *[("\u2581has", 2), ("\u2581bought", 3)],
        *[("\u2581item", 4), ("_", 4), ("12", 4), ("3", 4), ("4", 4), (",", 4)],
        *[("\u2581item", 5), ("_", 5), ("4", 5)],
        *[("\u2581", 6), (".", 6), ("</s>", 0)],
    ]
    # An unknown letter belongs to its word.
    assert indices(sentencepiece(), "user_ß2 has")[-3:] == [("<unk>", 1), ("2", 1), ("\u2581has", 2)]


def test_indices_of_bytes_control_tokens_codes_and_users() -> None:
    tokenizer = byte_tokenizer()
    result = indices(tokenizer, "user 31\n\n  of 1001,")
    words = ["".join(token for token, number in result if number == n) for n in range(1, 5)]
    assert words == ["user", "Ġ31", "ĊĊĠĠof", "Ġ1001,"] and result[-1][1] == 4
    add_item_tokens(tokenizer, ["<a_1>", "<a_2>", "<b_1>", "<c_7>", "<item_1>", "<item_2>", "<user_7>", "<user_8>"])
    for text, expected in {
        "<|start|>ab<|end|>c d<|pad|><|pad|>": [0, 1, 1, 0, 2, 3, 3, 0, 0],
        "<a_1><b_1><c_7><a_2><b_1><a_1><a_1><item_1><a_2><b_1><item_2><item_1><item_2>>": [
            *(1, 1, 1, 2, 2, 3, 4, 4, 5, 5, 5, 6, 7, 8)
        ],
        "x<a_1><b_1>, <a_2><b_1> y\n<item_1>": [1, 2, 2, 3, 4, 4, 4, 5, 5, 6, 6],
        # An index may leave out levels of a code.
        "<a_1><c_7><b_1>": [1, 1, 2],
        # P5-I: codes and users are separate words.
        "<user_7> got <item_1>": [1, 2, 2, 2, 2, 3, 3],
        "<user_7><item_1><user_8><a_1><b_1><user_7><user_8>x<user_7>,": [1, 2, 3, 4, 4, 5, 6, 7, 8, 9],
    }.items():
        assert [number for _, number in indices(tokenizer, text)] == expected


class Inputs:
    """Records the inputs of the first block of an encoder, shape (rows, columns, width) each."""

    def __init__(self, model: Any) -> None:
        self.seen: list[Any] = []
        model.get_encoder().block[0].register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen.append(args[0] if args else kwargs["hidden_states"])


def test_every_engine_reads_the_embeddings_of_training(base: Path) -> None:
    model, encoder = with_words(base), encoder_of(base)
    inputs, questions = Inputs(model), [prompt(), prompt("short")]
    tree, plain = (HFBackend(model, encoder, packed=packed) for packed in (True, False))
    (row,) = target_rows(example(QUESTION, "1004"), encoder, 200)
    routes: dict[str, Callable[[], Any]] = {
        "training": lambda: encoder_decoder_loss(model, **pairs([row, *rows(encoder, 3)])),
        "generation": lambda: tree.generate(questions, max_tokens=3),
        "scoring by tree": lambda: tree.score(questions, [ANSWERS] * 2),
        "scoring by rows": lambda: plain.score(questions, [ANSWERS] * 2),
        "search by tree": lambda: tree.search(questions, ANSWERS, k=2, width=4),
        "search by rows": lambda: plain.search(questions, ANSWERS, k=2, width=4),
    }
    ids = torch.tensor(encoder.prompt(prompt()))
    words = word_numbers(whole_word_embeddings(model).kinds[ids[None]])[0]
    assert int(words.max()) == len(QUESTION.split()) == 8
    tokens = model.get_input_embeddings()(ids).detach()
    expected = tokens + whole_word_embeddings(model).weight.detach()[words]
    assert not torch.allclose(expected, tokens, atol=1e-2)
    for name, run in routes.items():
        inputs.seen.clear()
        with torch.no_grad():
            run()
        seen = [states[: len(ids)] for batch in inputs.seen for states in batch if len(states) >= len(ids)]
        assert any(torch.allclose(each, expected, atol=1e-6) for each in seen), name
        assert not any(torch.allclose(each, tokens, atol=1e-2) for each in seen), name


def test_table_of_zeros_changes_nothing(base: Path) -> None:
    plain, encoder = load_model(str(base), section(base)).eval(), encoder_of(base)
    zeroed, drawn = with_words(base, zero=True), with_words(base)
    questions = [prompt(), prompt("short")]
    scores = [
        [each.logprobs for each in HFBackend(model, encoder).score(questions, [ANSWERS] * 2)]
        for model in (plain, zeroed, drawn)
    ]
    assert scores[0] == scores[1]
    assert all(one != pytest.approx(two, abs=1e-3) for one, two in zip(scores[0], scores[2], strict=True))
    texts = [HFBackend(model, encoder).generate(questions, max_tokens=4) for model in (plain, zeroed)]
    assert texts[0] == texts[1]
    with torch.no_grad():
        losses = [float(encoder_decoder_loss(model, **pairs(rows(encoder)))[0]) for model in (plain, zeroed, drawn)]
    assert losses[0] == losses[1] != losses[2]


def test_padding_and_long_texts_change_nothing(base: Path) -> None:
    model, encoder = with_words(base), encoder_of(base)
    some = rows(encoder, 3)
    assert len({len(row.ids) for row in some}) > 1
    with torch.no_grad():
        together = float(encoder_decoder_loss(model, **pairs(some))[0])
        alone = sum(float(encoder_decoder_loss(model, **pairs([row]))[0]) for row in some)
    assert together == pytest.approx(alone, rel=1e-5)
    # Words beyond the table share its last row.
    add_whole_words(model, encoder, size=4, seed=0)
    (scores,) = HFBackend(model, encoder).score([prompt("a b c d e f g")], [ANSWERS])
    assert all(value < 0 for value in scores.logprobs)


def test_table_is_saved_and_loaded(base: Path, tmp_path: Path) -> None:
    model, encoder = with_words(base), encoder_of(base)
    model.save_pretrained(tmp_path / "m")
    without = model_folder_hash(str(tmp_path / "m"))
    save_whole_words(model, tmp_path / "m")
    # The model's own file is that of a plain T5; the stamp covers the table, which changes answers.
    assert not any(_word(name) for name in load_file(tmp_path / "m" / "model.safetensors"))
    assert model_folder_hash(str(tmp_path / "m")) != without
    again = load_model(str(tmp_path / "m"), section(base)).eval()
    assert torch.equal(whole_word_embeddings(again).weight, whole_word_embeddings(model).weight)
    assert torch.equal(whole_word_embeddings(again).kinds, whole_word_embeddings(model).kinds)
    scores = [HFBackend(each, encoder).score([prompt()], [ANSWERS])[0].logprobs for each in (model, again)]
    assert scores[0] == scores[1]
    half = load_model(str(tmp_path / "m"), section(base), dtype=torch.bfloat16).eval()
    (rounded,) = HFBackend(half, encoder).score([prompt()], [ANSWERS])
    assert rounded.logprobs == pytest.approx(scores[0], rel=0.1)
    (tmp_path / "other").mkdir()
    copy_whole_words(tmp_path / "m", tmp_path / "other")
    copy_whole_words(base, tmp_path)
    assert (tmp_path / "other" / WHOLE_WORDS_FILE).is_file() and not (tmp_path / WHOLE_WORDS_FILE).exists()


def test_added_tokens_are_words_of_an_existing_table(base: Path, tmp_path: Path) -> None:
    known = with_words(base)
    known.save_pretrained(tmp_path / "m")
    encoder_of(base).tokenizer.save_pretrained(tmp_path / "m")
    save_whole_words(known, tmp_path / "m")
    index = ItemIndex(
        "token", {"i": ("<item_0>",), "j": ("<item_1>",)}, tokens=("<item_0>", "<item_1>"), users={"u": "<user_0>"}
    )
    for kind in ("bfloat16", "float32"):
        chosen = section(base).model_copy(update={"dtype": kind})
        save_with_item_tokens(str(tmp_path / "m"), chosen, index, {}, tmp_path / "grown", words=False, seed=0)
        # The table stays in float32 in a bfloat16 model.
        assert torch.equal(
            load_file(tmp_path / "grown" / WHOLE_WORDS_FILE)["table"], whole_word_embeddings(known).weight
        )
    encoder = encoder_of(tmp_path / "grown")
    model = load_model(str(tmp_path / "grown"), section(base)).eval()
    add_whole_words(model, encoder, size=97, seed=1)
    assert torch.equal(whole_word_embeddings(model).weight, whole_word_embeddings(known).weight)
    text = "ab <user_0><item_1><item_0> c"
    ids = torch.tensor(encoder.prompt(prompt(text)))
    words = word_numbers(whole_word_embeddings(model).kinds[ids[None]])[0]
    # The start of the chat, a, b, the space with the user, both items, the space with c; then control tokens.
    assert words.tolist()[:9] == [0, 1, 1, 2, 2, 3, 4, 5, 5] and not words[9:].any()


def test_rejects_damaged_table_and_that_of_another_model(base: Path, tmp_path: Path) -> None:
    model = load_model(str(base), section(base))
    (tmp_path / WHOLE_WORDS_FILE).write_bytes(b"no tensors")
    with raises(ModelError, Facts("damaged", tmp_path, says="`llmrec train`")):
        load_whole_words(model, tmp_path)
    save_file({"table": torch.zeros(3, 16)}, tmp_path / WHOLE_WORDS_FILE)
    with raises(ModelError, Facts("damaged", tmp_path)):
        load_whole_words(model, tmp_path)
    save_file({"table": torch.zeros(3, 8), "kinds": torch.zeros(9, dtype=torch.int32)}, tmp_path / WHOLE_WORDS_FILE)
    with raises(ModelError, Facts("mismatch", tmp_path, says=("9 tokens of width 8", "259 of width 16"))):
        load_whole_words(model, tmp_path)
    assert whole_word_embeddings(model) is None


def trained(base: Path, out: Path, *, steps: int = 6, words: bool = True, **settings: Any) -> tuple[Any, Any, Any]:
    values = {"method": "full", "steps": steps, "learning_rate": 5e-3, "save_every": 3, "valid_every": 6, **settings}
    train, encoder = TrainSection(**values), encoder_of(base)
    torch.manual_seed(0)
    model = lora.load_trainable(str(base), section(base), train)
    start = None
    if words:
        add_whole_words(model, encoder, size=97, seed=0)
        start = whole_word_embeddings(model).weight.detach().clone()
    planned = plan_steps(iter(rows(encoder, 12 * steps)), steps=steps, batch_tokens=256, seed=0)
    return fit(model, encoder, planned, train, out), model, start


def test_training_changes_rows_of_occurring_words(base: Path, tmp_path: Path) -> None:
    done, model, start = trained(base, tmp_path)
    table = whole_word_embeddings(model).weight.detach()
    moved = [bool((table[n] != start[n]).any()) for n in range(len(table))]
    # The question has 8 words and up to two more; index 0 is that of the chat's control tokens.
    assert moved[:11] == [True] * 11 and not any(moved[11:])
    assert done.trainable_parameters == sum(each.numel() for each in model.parameters())
    saved = load_file(tmp_path / "adapter" / WHOLE_WORDS_FILE)["table"]
    assert torch.equal(saved, table)


def test_killed_run_resumes_to_the_same_table(base: Path, tmp_path: Path) -> None:
    full, *_ = trained(base, tmp_path)
    tear(tmp_path, 6)
    assert trained(base, tmp_path)[0].adapter_sha256 == full.adapter_sha256


def test_adapter_is_trained_and_merged_with_its_table(base: Path, tmp_path: Path) -> None:
    _, model, start = trained(base, tmp_path, method="lora", lora=LoraSection(rank=4))
    moving = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [name for name in moving if _word(name)] and any("lora_" in name for name in moving)
    assert not torch.equal(whole_word_embeddings(model).weight, start)
    assert not any(_word(name) for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    lora.merge_adapter(str(base), section(base), tmp_path / "adapter", tmp_path / "merged")
    copy_whole_words(tmp_path / "adapter", tmp_path / "merged")
    after, some = load_model(str(tmp_path / "merged"), section(base)), pairs(rows(encoder_of(base)))
    with torch.no_grad():
        live, merged = (float(encoder_decoder_loss(each.eval(), **some)[0]) for each in (model, after))
        torch.nn.init.zeros_(whole_word_embeddings(after).weight)
        assert abs(float(encoder_decoder_loss(after, **some)[0]) - live) > 0.1
    assert live == pytest.approx(merged, rel=1e-4)


@pytest.mark.slow
def test_training_continues_with_an_existing_table(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "first")
    folder = tmp_path / "first" / "adapter"
    encoder_of(base).tokenizer.save_pretrained(folder)
    had = load_file(folder / WHOLE_WORDS_FILE)["table"]
    _, _, start = trained(folder, tmp_path / "second")
    assert torch.equal(start, had)
    # Without the setting, the model's own table is kept and saved again.
    trained(folder, tmp_path / "third", words=False)
    assert (tmp_path / "third" / "adapter" / WHOLE_WORDS_FILE).is_file()


def test_no_table_without_the_setting(base: Path, tmp_path: Path) -> None:
    _, model, _ = trained(base, tmp_path, words=False)
    assert whole_word_embeddings(model) is None
    assert not list(tmp_path.rglob(WHOLE_WORDS_FILE))


def test_tables_are_seeded(base: Path) -> None:
    one, two = with_words(base), with_words(base)
    assert torch.equal(whole_word_embeddings(one).weight, whole_word_embeddings(two).weight)
    add_whole_words(other := load_model(str(base), section(base)), encoder_of(base), size=97, seed=1)
    assert not torch.equal(whole_word_embeddings(other).weight, whole_word_embeddings(one).weight)
    assert float(whole_word_embeddings(one).weight.detach().std()) == pytest.approx(1.0, abs=0.1)


def test_rejects_decoders_and_embeddings_as_inputs(base: Path, llama_folder: Path) -> None:
    model = load_model(str(llama_folder), section(llama_folder))
    with raises(RecipeError, Facts("contradiction", column="model.whole_words", says="model.whole_words=false")):
        attach_whole_words(model, torch.zeros(3, 4), [0])
    assert whole_word_embeddings(model) is None
    with pytest.raises(ValidationError, match=r"model\.whole_words: a decoder has no encoder"):
        ModelSection(name="new", shape=ShapeSection(), whole_words=True)
    assert ModelSection(name="new", shape=SHAPE, whole_words=True).whole_words
    with raises(ModelError, Facts("unsupported")):
        with_words(base).get_encoder()(inputs_embeds=torch.zeros(1, 2, 16))


def _word(name: str) -> bool:
    return "whole_words" in name
