"""Whole-word embeddings: indices by hand, the same wherever an encoder reads, trained, saved, and absent where off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from llmrec.models.item_tokens import add_item_tokens, extended
from llmrec.models.load import byte_tokenizer, load_model, load_tokenizer, weights_stamp, write
from llmrec.models.whole_words import (
    CONTROL,
    INSIDE,
    LEVEL,
    SPACE,
    START,
    WEIGHTS,
    attach,
    copy_words,
    kinds_of,
    load_words,
    numbers,
    save_words,
    words_of,
)
from llmrec.recipe.schema import LoraSection, ModelSection, ShapeSection, TrainSection
from llmrec.train import lora, sft
from llmrec.train.batches import paired_inputs, plan, target_rows
from llmrec.train.loss import paired_loss
from llmrec.train.whole_words import put_on
from llmrec.types import Example, Message, Prompt, Segment
from tests.conftest import make_model
from tests.facts import Facts, raises

SHAPE = ShapeSection(kind="encoder-decoder", layers=1, width=16, heads=2, feedforward=32, dropout=0.0)
# What training sees and what is asked: ids of several pieces, which stand beside other text.
QUESTION = "user 31 chose 1001, 1002 and 1003; next?"
ANSWERS = ("1004", "1005", "no", "1", "another")


def section(folder: Path | str, **settings: Any) -> ModelSection:
    return ModelSection(name=str(folder), dtype="float32", max_length=96, **settings)


def encoder_of(folder: Path) -> Encoder:
    return Encoder(load_tokenizer(str(folder), section(folder)), max_length=96)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5") / "base"
    write(SHAPE, folder, seed=0)
    return folder


def with_words(base: Path, *, zero: bool = False) -> Any:
    model = load_model(str(base), section(base)).eval()
    put_on(model, encoder_of(base), size=97, seed=0)
    if zero:
        torch.nn.init.zeros_(words_of(model).weight)
    return model


def prompt(text: str = QUESTION) -> Prompt:
    return Prompt(messages=(Message("user", (Segment("text", text),)),))


def example(question: str, answer: str) -> Example:
    messages = (Message("user", (Segment("text", question),)),)
    target = (Segment("target", answer),)
    return Example(
        id="1", user_id="u", task="sequential", template="t", messages=messages, answer=target, ends_turn=True
    )


def rows(encoder: Encoder, count: int = 6) -> list[TokenRow]:
    texts = [QUESTION.replace("31", str(n)) + " more" * (n % 3) for n in range(count)]
    return [row for n, text in enumerate(texts) for row in target_rows(example(text, ANSWERS[n % 2]), encoder, 200)]


def tensors(some: Sequence[TokenRow]) -> dict[str, Any]:
    return {name: torch.tensor(values) for name, values in paired_inputs(some, 0).items()}


# --------------------------------------------------------------------------- indices


def sentencepiece() -> Any:
    """A tokenizer in the manner of T5's: pieces begin words with a mark, and numbers are cut."""
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
    kinds = torch.tensor(kinds_of(tokenizer, control, len(tokenizer)))
    found = numbers(kinds[torch.tensor([ids])])[0].tolist()
    return list(zip(tokenizer.convert_ids_to_tokens(ids), found, strict=True))


def test_indices_on_a_sentence_by_hand() -> None:
    """As P5's code counts: a word starts where a piece has the mark, and the end of the text has 0."""
    found = indices(sentencepiece(), "user_23 has bought item_1234, item_4 .", end=True)
    assert found == [
        *[("\u2581user", 1), ("_", 1), ("23", 1)],
        *[("\u2581has", 2), ("\u2581bought", 3)],
        *[("\u2581item", 4), ("_", 4), ("12", 4), ("3", 4), ("4", 4), (",", 4)],
        *[("\u2581item", 5), ("_", 5), ("4", 5)],
        *[("\u2581", 6), (".", 6), ("</s>", 0)],
    ]
    # A letter that the vocabulary lacks belongs to its word.
    assert indices(sentencepiece(), "user_ß2 has")[-3:] == [("<unk>", 1), ("2", 1), ("\u2581has", 2)]


def test_a_tokenizer_of_bytes_counts_the_same_words() -> None:
    found = indices(byte_tokenizer(), "user 31\n\n  of 1001,")
    words = [[token for token, number in found if number == n] for n in range(1, 5)]
    assert ["".join(word) for word in words] == ["user", "Ġ31", "ĊĊĠĠof", "Ġ1001,"]
    assert len(found) == sum(map(len, words))


def test_codes_are_words_whatever_stands_beside_them() -> None:
    tokenizer = byte_tokenizer()
    add_item_tokens(tokenizer, ["<a_1>", "<a_2>", "<b_1>", "<c_7>", "<item_1>", "<item_2>"])
    bare = indices(tokenizer, "<a_1><b_1><c_7><a_2><b_1><a_1><a_1><item_1><a_2><b_1><item_2><item_1><item_2>>")
    assert [number for _, number in bare] == [1, 1, 1, 2, 2, 3, 4, 4, 5, 5, 5, 6, 7, 8]
    among = indices(tokenizer, "x<a_1><b_1>, <a_2><b_1> y\n<item_1>")
    assert [number for _, number in among] == [1, 2, 2, 3, 4, 4, 4, 5, 5, 6, 6]
    # A level that is not the next one, as where an index leaves levels out, is still of the same code.
    assert [number for _, number in indices(tokenizer, "<a_1><c_7><b_1>")] == [1, 1, 2]


def test_a_users_token_is_a_word_between_codes_and_texts() -> None:
    """P5-I: "<user_7> got <item_1>" has three words, and no code runs on into a user, or the other way round."""
    tokenizer = byte_tokenizer()
    add_item_tokens(tokenizer, ["<a_1>", "<b_1>", "<item_1>", "<user_7>", "<user_8>"])
    found = indices(tokenizer, "<user_7> got <item_1>", end=True)
    assert [number for _, number in found] == [1, 2, 2, 2, 2, 3, 3, 0]
    bare = indices(tokenizer, "<user_7><item_1><user_8><a_1><b_1><user_7><user_8>x<user_7>,")
    assert [number for _, number in bare] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 9]


def test_control_tokens_have_0_and_end_words() -> None:
    tokenizer = byte_tokenizer()
    found = indices(tokenizer, "<|start|>ab<|end|>c d<|pad|><|pad|>")
    assert [number for _, number in found] == [0, 1, 1, 0, 2, 3, 3, 0, 0]


def test_kinds_of_a_vocabulary() -> None:
    tokenizer = byte_tokenizer()
    add_item_tokens(tokenizer, ["<b_3>", "<item_0>"])
    names = ["<|end|>", "a", "Ġ", "Ċ", "<b_3>", "<item_0>"]
    kinds = kinds_of(tokenizer, (), len(tokenizer) + 3)
    assert [kinds[tokenizer.convert_tokens_to_ids(name)] for name in names] == [
        *(CONTROL, INSIDE, SPACE, SPACE, LEVEL + 1, LEVEL + 26),
    ]
    # Rows beyond the tokenizer's, which models round up to, are no words.
    assert kinds[-3:] == [INSIDE] * 3
    assert START in kinds_of(sentencepiece(), (), 18)


# --------------------------------------------------------------------------- wherever an encoder reads


class Heard:
    """Notes what the first block of an encoder is handed, shape (rows, columns, width) each."""

    def __init__(self, model: Any) -> None:
        self.seen: list[Any] = []
        model.get_encoder().block[0].register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen.append(args[0] if args else kwargs["hidden_states"])


def test_every_route_reads_the_same_embeddings(base: Path) -> None:
    """Whatever is asked, the encoder's blocks are handed what training hands them."""
    model, encoder = with_words(base), encoder_of(base)
    heard, asked = Heard(model), [prompt(), prompt("short")]
    tree, plain = (HFBackend(model, encoder, packed=packed) for packed in (True, False))
    (row,) = target_rows(example(QUESTION, "1004"), encoder, 200)
    routes: dict[str, Callable[[], Any]] = {
        "training": lambda: paired_loss(model, **tensors([row, *rows(encoder, 3)])),
        "generation": lambda: tree.generate(asked, max_tokens=3),
        "scoring by tree": lambda: tree.score(asked, [ANSWERS] * 2),
        "scoring by rows": lambda: plain.score(asked, [ANSWERS] * 2),
        "search by tree": lambda: tree.search(asked, ANSWERS, k=2, width=4),
        "search by rows": lambda: plain.search(asked, ANSWERS, k=2, width=4),
    }
    ids = torch.tensor(encoder.prompt(prompt()))
    places = numbers(words_of(model).kinds[ids[None]])[0]
    assert int(places.max()) == len(QUESTION.split()) == 8
    tokens = model.get_input_embeddings()(ids).detach()
    wanted = tokens + words_of(model).weight.detach()[places]
    assert not torch.allclose(wanted, tokens, atol=1e-2)
    for name, run in routes.items():
        heard.seen.clear()
        with torch.no_grad():
            run()
        found = [states[: len(ids)] for batch in heard.seen for states in batch if len(states) >= len(ids)]
        assert any(torch.allclose(each, wanted, atol=1e-6) for each in found), name
        assert not any(torch.allclose(each, tokens, atol=1e-2) for each in found), name


def test_a_table_of_zeros_changes_nothing_and_another_one_does(base: Path) -> None:
    plain, encoder = load_model(str(base), section(base)).eval(), encoder_of(base)
    zeroed, drawn = with_words(base, zero=True), with_words(base)
    asked = [prompt(), prompt("short")]
    scores = [
        [each.logprobs for each in HFBackend(model, encoder).score(asked, [ANSWERS] * 2)]
        for model in (plain, zeroed, drawn)
    ]
    assert scores[0] == scores[1]
    assert all(one != pytest.approx(two, abs=1e-3) for one, two in zip(scores[0], scores[2], strict=True))
    said = [HFBackend(model, encoder).generate(asked, max_tokens=4) for model in (plain, zeroed)]
    assert said[0] == said[1]
    with torch.no_grad():
        losses = [float(paired_loss(model, **tensors(rows(encoder)))[0]) for model in (plain, zeroed, drawn)]
    assert losses[0] == losses[1] != losses[2]


def test_padding_and_neighbours_change_nothing(base: Path) -> None:
    model, encoder = with_words(base), encoder_of(base)
    some = rows(encoder, 3)
    assert len({len(row.ids) for row in some}) > 1
    with torch.no_grad():
        together = float(paired_loss(model, **tensors(some))[0])
        alone = sum(float(paired_loss(model, **tensors([row]))[0]) for row in some)
    assert together == pytest.approx(alone, rel=1e-5)


def test_words_beyond_the_table_share_its_last_row(base: Path) -> None:
    model, encoder = load_model(str(base), section(base)).eval(), encoder_of(base)
    put_on(model, encoder, size=4, seed=0)
    (found,) = HFBackend(model, encoder).score([prompt("a b c d e f g")], [ANSWERS])
    assert all(value < 0 for value in found.logprobs)


# --------------------------------------------------------------------------- saved, loaded, copied


def test_a_table_survives_saving_and_loading(base: Path, tmp_path: Path) -> None:
    model, encoder = with_words(base), encoder_of(base)
    model.save_pretrained(tmp_path / "m")
    without = weights_stamp(str(tmp_path / "m"))
    save_words(model, tmp_path / "m")
    # The model's own file is that of any T5, and what may change answers is in its stamp.
    assert not any(_word(name) for name in load_file(tmp_path / "m" / "model.safetensors"))
    assert weights_stamp(str(tmp_path / "m")) != without
    again = load_model(str(tmp_path / "m"), section(base)).eval()
    assert torch.equal(words_of(again).weight, words_of(model).weight)
    assert torch.equal(words_of(again).kinds, words_of(model).kinds)
    scores = [HFBackend(each, encoder).score([prompt()], [ANSWERS])[0].logprobs for each in (model, again)]
    assert scores[0] == scores[1]
    half = load_model(str(tmp_path / "m"), section(base), dtype=torch.bfloat16).eval()
    (rounded,) = HFBackend(half, encoder).score([prompt()], [ANSWERS])
    assert rounded.logprobs == pytest.approx(scores[0], rel=0.1)
    (tmp_path / "other").mkdir()
    copy_words(tmp_path / "m", tmp_path / "other")
    copy_words(base, tmp_path)
    assert (tmp_path / "other" / WEIGHTS).is_file() and not (tmp_path / WEIGHTS).exists()


def test_tokens_that_a_vocabulary_gains_are_words_to_a_table_that_was_there(base: Path, tmp_path: Path) -> None:
    """What a grown model hands to its blocks, in training and when it generates, by indices written down by hand."""
    known = with_words(base)
    known.save_pretrained(tmp_path / "m")
    encoder_of(base).tokenizer.save_pretrained(tmp_path / "m")
    save_words(known, tmp_path / "m")
    index = ItemIndex(
        "token", {"i": ("<item_0>",), "j": ("<item_1>",)}, tokens=("<item_0>", "<item_1>"), users={"u": "<user_0>"}
    )
    for kind in ("bfloat16", "float32"):
        asked_for = section(base).model_copy(update={"dtype": kind})
        extended(str(tmp_path / "m"), asked_for, index, {}, tmp_path / "grown", words=False, seed=0)
        # Whatever the model is rounded to, the table is not.
        assert torch.equal(load_file(tmp_path / "grown" / WEIGHTS)["table"], words_of(known).weight)
    encoder, table = encoder_of(tmp_path / "grown"), words_of(known).weight.detach()
    model = load_model(str(tmp_path / "grown"), section(base)).eval()
    put_on(model, encoder, size=97, seed=1)
    asked = Prompt(messages=(Message("user", (Segment("text", "ab <user_0><item_1><item_0> c"),)),))
    ids = torch.tensor(encoder.prompt(asked))
    places = numbers(words_of(model).kinds[ids[None]])[0]
    # The mark of the chat, a, b, the space with the user, both items, the space with c; what follows are marks again.
    assert places.tolist()[:9] == [0, 1, 1, 2, 2, 3, 4, 5, 5] and not places[9:].any()
    wanted, heard = model.get_input_embeddings()(ids).detach() + table[places], Heard(model)
    (row,) = target_rows(example(asked.messages[0].text, "no"), encoder, 200)
    for ask in (
        lambda: paired_loss(model, **tensors([row])),
        lambda: HFBackend(model, encoder).generate([asked], max_tokens=2),
    ):
        heard.seen.clear()
        with torch.no_grad():
            ask()
        assert torch.allclose(heard.seen[0][0][: len(ids)], wanted, atol=1e-6)


def test_a_folder_without_a_table_has_none(base: Path) -> None:
    model = load_model(str(base), section(base))
    assert words_of(model) is None
    assert not model.get_encoder()._forward_pre_hooks


def test_a_table_that_is_damaged_or_of_another_model_is_named(base: Path, tmp_path: Path) -> None:
    model = load_model(str(base), section(base))
    (tmp_path / WEIGHTS).write_bytes(b"no tensors")
    with raises(ModelError, Facts("damaged", tmp_path, says="`llmrec train`")):
        load_words(model, tmp_path)
    save_file({"table": torch.zeros(3, 16)}, tmp_path / WEIGHTS)
    with raises(ModelError, Facts("damaged", tmp_path)):
        load_words(model, tmp_path)
    save_file({"table": torch.zeros(3, 8), "kinds": torch.zeros(9, dtype=torch.int32)}, tmp_path / WEIGHTS)
    with raises(
        ModelError, Facts("mismatch", tmp_path, says=("9 tokens of width 8", "259 of width 16", "`llmrec train`"))
    ):
        load_words(model, tmp_path)
    assert words_of(model) is None


# --------------------------------------------------------------------------- training


def trained(base: Path, out: Path, *, steps: int = 6, words: bool = True, **settings: Any) -> tuple[Any, Any, Any]:
    values = {"method": "full", "steps": steps, "learning_rate": 5e-3, "save_every": 3, "valid_every": 6, **settings}
    train, encoder = TrainSection(**values), encoder_of(base)
    torch.manual_seed(0)
    model = lora.load_trainable(str(base), section(base), train)
    start = None
    if words:
        put_on(model, encoder, size=97, seed=0)
        start = words_of(model).weight.detach().clone()
    planned = plan(iter(rows(encoder, 12 * steps)), steps=steps, batch_tokens=256, seed=0)
    done = sft.train(model, encoder, planned, {}, train, folder=out, seed=0, quiet=True)
    return done, model, start


def test_training_moves_the_rows_of_words_that_occur(base: Path, tmp_path: Path) -> None:
    done, model, start = trained(base, tmp_path)
    table = words_of(model).weight.detach()
    moved = [bool((table[n] != start[n]).any()) for n in range(len(table))]
    # The question has 8 words and up to two more; number 0 is of the marks of the chat.
    assert moved[:11] == [True] * 11 and not any(moved[11:])
    assert done.trainable_parameters == sum(each.numel() for each in model.parameters())
    saved = load_file(tmp_path / "adapter" / WEIGHTS)["table"]
    assert torch.equal(saved, table)


def test_a_killed_run_resumes_to_the_same_table(base: Path, tmp_path: Path) -> None:
    whole, *_ = trained(base, tmp_path / "whole")
    for file in (tmp_path / "whole" / "checkpoints" / "checkpoint-6").iterdir():
        file.unlink()
    resumed, *_ = trained(base, tmp_path / "whole")
    assert resumed.adapter_sha256 == whole.adapter_sha256


def test_an_adapter_is_trained_and_merged_with_its_table(base: Path, tmp_path: Path) -> None:
    _, model, start = trained(base, tmp_path, method="lora", lora=LoraSection(rank=4))
    moving = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [name for name in moving if _word(name)] and any("lora_" in name for name in moving)
    assert not torch.equal(words_of(model).weight, start)
    assert not any(_word(name) for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    lora.merge(str(base), section(base), tmp_path / "adapter", tmp_path / "merged")
    copy_words(tmp_path / "adapter", tmp_path / "merged")
    after, some = load_model(str(tmp_path / "merged"), section(base)), tensors(rows(encoder_of(base)))
    with torch.no_grad():
        live, merged = (float(paired_loss(each.eval(), **some)[0]) for each in (model, after))
        torch.nn.init.zeros_(words_of(after).weight)
        assert abs(float(paired_loss(after, **some)[0]) - live) > 0.1
    assert live == pytest.approx(merged, rel=1e-4)


@pytest.mark.slow
def test_a_tuned_model_goes_on_with_its_table(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "first")
    folder = tmp_path / "first" / "adapter"
    encoder_of(base).tokenizer.save_pretrained(folder)
    had = load_file(folder / WEIGHTS)["table"]
    _, _, start = trained(folder, tmp_path / "second")
    assert torch.equal(start, had)
    # Where the recipe does not ask for one, the model's own stays on and is saved again.
    trained(folder, tmp_path / "third", words=False)
    assert (tmp_path / "third" / "adapter" / WEIGHTS).is_file()


def test_without_it_training_writes_none(base: Path, tmp_path: Path) -> None:
    _, model, _ = trained(base, tmp_path, words=False)
    assert words_of(model) is None
    assert not list(tmp_path.rglob(WEIGHTS))


def test_tables_are_seeded(base: Path) -> None:
    one, two = with_words(base), with_words(base)
    assert torch.equal(words_of(one).weight, words_of(two).weight)
    put_on(other := load_model(str(base), section(base)), encoder_of(base), size=97, seed=1)
    assert not torch.equal(words_of(other).weight, words_of(one).weight)
    assert float(words_of(one).weight.detach().std()) == pytest.approx(1.0, abs=0.1)


# --------------------------------------------------------------------------- refused


def test_decoders_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "llama")
    model = load_model(str(folder), section(folder))
    with raises(RecipeError, Facts("contradiction", column="model.whole_words", says="model.whole_words=false")):
        attach(model, torch.zeros(3, 4), [0])
    assert words_of(model) is None
    with pytest.raises(ValidationError, match=r"model\.whole_words: a decoder has no encoder"):
        ModelSection(name="new", shape=ShapeSection(), whole_words=True)
    assert ModelSection(name="new", shape=SHAPE, whole_words=True).whole_words
    assert not ModelSection().whole_words


def test_embeddings_in_place_of_ids_are_refused(base: Path) -> None:
    model = with_words(base)
    with raises(ModelError, Facts("unsupported")):
        model.get_encoder()(inputs_embeds=torch.zeros(1, 2, 16))


def _word(name: str) -> bool:
    return "whole_words" in name
