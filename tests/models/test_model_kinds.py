"""Scores of model kinds unlike Llama: windows, position biases, heads of their own, tokenizers without lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hub

from llmrec.backends.encode import Encoder
from llmrec.backends.hf.backend import HFBackend
from llmrec.errors import RecipeError
from llmrec.models.item_tokens import extended
from llmrec.models.load import load_model, load_tokenizer
from llmrec.models.tensors import named_tables
from llmrec.models.traits import takes_block_mask
from llmrec.recipe.schema import LoraSection, ModelSection, TrainSection
from llmrec.train import lora, sft
from llmrec.train.batches import paired_inputs, plan, target_rows
from llmrec.train.loss import paired_loss
from llmrec.types import Example, Message, Prompt, Segment
from tests.conftest import make_model, make_tokenizer, section
from tests.facts import Facts, raises
from tests.train.test_item_tokens import INDEX, TITLES
from tests.train.test_item_tokens import examples as lists

TITLES_ASKED = ("Heat (1995)", "Fargo (1996)", "Casino", "Heat", "Toy Story 2", "Alien", "Alien 2")
WORDS = "Continue the list of films that this person watched in order " * 6


def prompt(text: str = WORDS, stop: str | None = "\n") -> Prompt:
    turns = (Message("user", (Segment("text", text),)),)
    return Prompt(messages=turns, answer_prefix=(Segment("item", "Jaws\nRocky\n"),), stop=stop)


def shape(**more: Any) -> dict[str, Any]:
    tokenizer = make_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {"vocab_size": len(tokenizer), "hidden_size": 32, "bos_token_id": tokenizer.bos_token_id, **ends, **more}


def causal(kind: str) -> Any:
    """A random causal model; GPT-Neo's second layer sees 32 tokens, the others' positions are a bias on attention."""
    torch.manual_seed(0)
    if kind == "gpt_neo":
        layers = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 32}
        model = hub.GPTNeoForCausalLM(hub.GPTNeoConfig(**shape(**layers)))
    elif kind == "mpt":
        layers = {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 1024}
        model = hub.MptForCausalLM(hub.MptConfig(**shape(**layers)))
    elif kind == "bloom":
        model = hub.BloomForCausalLM(hub.BloomConfig(**shape(n_layer=2, n_head=2)))
    else:
        layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "alibi": True, "new_decoder_architecture": False}
        model = hub.FalconForCausalLM(hub.FalconConfig(**shape(**layers)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return model.eval()


def plain_score(model: Any, encoder: Encoder, asked: Prompt, text: str) -> float:
    """The sum of log-probabilities of a candidate's tokens, read off the model's own logits."""
    ids = encoder.prompt(asked)
    tail = encoder.continuation(asked, text, closed=True)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*ids, *tail]])).logits[0].float().log_softmax(-1)
    return float(sum(logits[len(ids) - 1 + n, token] for n, token in enumerate(tail)))


@pytest.mark.parametrize("kind", ["gpt_neo", "mpt", "bloom", "falcon"])
def test_windows_and_position_biases_are_scored_row_by_row(kind: str) -> None:
    model, encoder = causal(kind), Encoder(make_tokenizer(), max_length=512)
    assert not takes_block_mask(model.config)
    backend, asked = HFBackend(model, encoder), prompt()
    assert len(encoder.prompt(asked)) > 64
    (found,) = backend.score([asked], [TITLES_ASKED])
    assert found.engine == "hf:rows"
    plain = [plain_score(model, encoder, asked, text) for text in TITLES_ASKED]
    assert found.logprobs == pytest.approx(plain, abs=1e-3)
    (best,) = backend.search([asked], list(TITLES_ASKED), k=3, width=7, exact=True)
    order = sorted(range(len(plain)), key=lambda n: -plain[n])
    assert list(best.items) == order[:3]
    assert [float(value) for value in best.scores] == pytest.approx([plain[n] for n in order[:3]], abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gpt_neo", "mpt"])
def test_packed_rows_are_refused_for_them_whatever_the_dtype(kind: str, dtype: torch.dtype) -> None:
    with raises(RecipeError, Facts("unsupported", column="train.packing", says="train.packing=none")):
        sft.check_packing(causal(kind).to(dtype))


# ------------------------------------------------------------ encoder-decoders


def t5(kind: str) -> Any:
    torch.manual_seed(0)
    small = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    words = {name: value for name, value in shape(**small).items() if name != "hidden_size"}
    model, config = {
        "t5": (hub.T5ForConditionalGeneration, hub.T5Config),
        "t5-v1.1": (hub.T5ForConditionalGeneration, hub.T5Config),
        "mt5": (hub.MT5ForConditionalGeneration, hub.MT5Config),
        "umt5": (hub.UMT5ForConditionalGeneration, hub.UMT5Config),
    }[kind]
    made = model(config(**words, **({"tie_word_embeddings": False} if kind == "t5-v1.1" else {})))
    if kind != "t5":
        made.lm_head.weight = torch.nn.Parameter(torch.randn_like(made.lm_head.weight) * 0.3)
    return made.eval()


def bart(*, tied: bool) -> Any:
    torch.manual_seed(0)
    layers = {
        f"{half}_{what}": count
        for half in ("encoder", "decoder")
        for what, count in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 64))
    }
    words = {name: value for name, value in shape(d_model=32, **layers).items() if name != "hidden_size"}
    places = {"decoder_start_token_id": 0, "max_position_embeddings": 256, "tie_word_embeddings": tied}
    return hub.BartForConditionalGeneration(hub.BartConfig(**words, **places)).eval()


PAIRED = ("t5", "t5-v1.1", "mt5", "umt5", "bart", "bart-untied")


def paired(kind: str, folder: Path) -> Path:
    made = bart(tied=kind == "bart") if kind.startswith("bart") else t5(kind)
    made.save_pretrained(folder / kind)
    make_tokenizer().save_pretrained(folder / kind)
    return folder / kind


def loss_on_words(model: Any, known: int) -> float:
    """Cross-entropy over the old vocabulary, which new rows must not change."""
    with torch.no_grad():
        logits = model.eval()(
            input_ids=torch.tensor([[5, 9, 30, 12]]), decoder_input_ids=torch.tensor([[0, 7, 8]])
        ).logits
    return float(torch.nn.functional.cross_entropy(logits[0, :, :known], torch.tensor([7, 8, 9])))


@pytest.mark.parametrize("kind", PAIRED)
def test_item_tokens_leave_a_model_as_it_was_and_learn_in_every_table(kind: str, tmp_path: Path) -> None:
    folder, known = paired(kind, tmp_path), len(make_tokenizer())
    before = loss_on_words(load_model(str(folder), section(folder)), known)
    extended(str(folder), section(folder), INDEX, TITLES, tmp_path / "grown", words=True, seed=0)
    grown = load_model(str(tmp_path / "grown"), section(folder))
    assert loss_on_words(grown, known) == pytest.approx(before, abs=1e-5)
    tokenizer = load_tokenizer(str(tmp_path / "grown"), section(folder))
    new = tokenizer.convert_tokens_to_ids(list(INDEX.tokens))
    train = TrainSection(steps=4, learning_rate=1e-2, lora=LoraSection(rank=4))
    torch.manual_seed(0)
    model = lora.load_trainable(str(tmp_path / "grown"), section(folder), train, tokens=new)
    assert loss_on_words(model, known) == pytest.approx(before, abs=1e-5)
    encoder = Encoder(tokenizer, max_length=256)
    rows = [row for example in lists(60) for row in target_rows(example, encoder, 256)]
    steps = plan(iter(rows), steps=4, batch_tokens=256, seed=0)
    sft.train(model, encoder, steps, {}, train, folder=tmp_path / "run", seed=0, quiet=True)
    lora.merge(str(tmp_path / "grown"), section(folder), tmp_path / "run" / "adapter", tmp_path / "merged")
    merged = load_model(str(tmp_path / "merged"), section(folder))
    inputs = {name: torch.tensor(each) for name, each in paired_inputs(rows[:3], 0).items()}
    with torch.no_grad():
        live, alone = paired_loss(model.eval(), **inputs)[0], paired_loss(merged.eval(), **inputs)[0]
    assert float(live) == pytest.approx(float(alone), rel=1e-4)
    for (name, table), (_, start) in zip(named_tables(merged), named_tables(grown), strict=True):
        # Nothing reads the table that an untied BART's halves do not share.
        unread = kind == "bart-untied" and name == "model.shared"
        assert unread or float((table.weight[new] - start.weight[new]).detach().abs().max()) > 1e-3, name
        assert torch.equal(table.weight[:known], start.weight[:known])


@pytest.mark.parametrize("kind", ["t5", "t5-v1.1", "mt5", "umt5"])
def test_t5_kinds_are_scored_and_searched(kind: str, tmp_path: Path) -> None:
    folder = paired(kind, tmp_path)
    model, encoder = load_model(str(folder), section(folder)), Encoder(make_tokenizer(), max_length=512)
    backend, asked = HFBackend(model, encoder), prompt()
    (found,) = backend.score([asked], [TITLES_ASKED])
    ids = torch.tensor([encoder.prompt(asked)])
    plain = []
    for text in TITLES_ASKED:
        tail = encoder.continuation(asked, text, closed=True)
        with torch.no_grad():
            logits = model(input_ids=ids, decoder_input_ids=torch.tensor([[0, *tail[:-1]]])).logits[0].log_softmax(-1)
        plain.append(float(sum(logits[n, token] for n, token in enumerate(tail))))
    assert found.logprobs == pytest.approx(plain, abs=1e-3)
    (best,) = backend.search([asked], list(TITLES_ASKED), k=2, width=7, exact=True)
    assert best.items[0] == max(range(len(plain)), key=lambda n: plain[n])


# ------------------------------------------------------------ tokenizers that drop line breaks


def lineless() -> Any:
    """A tokenizer that reads words and drops all blanks, as T5's own does with line breaks."""
    from tokenizers import pre_tokenizers

    tokenizer = make_tokenizer()
    core = tokenizer.backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), core.pre_tokenizer])
    return tokenizer


def test_an_answer_that_ends_with_its_line_has_an_end_where_lines_are_dropped() -> None:
    tokenizer = lineless()
    assert tokenizer.encode("\n", add_special_tokens=False) == []
    encoder = Encoder(tokenizer, max_length=512)
    asked = prompt()
    alone, longer = (encoder.continuation(asked, text, closed=True) for text in ("Alien", "Alien 2"))
    assert alone[-1] == longer[-1] == encoder.end_id
    assert longer[: len(alone)] != alone
    answer = (Segment("given", "Jaws\n"), Segment("target", "Alien\n"))
    row = encoder.row(
        Example(
            id="1",
            user_id="u",
            task="sequential",
            template="x",
            messages=asked.messages,
            answer=answer,
            ends_turn=False,
        )
    )
    assert tuple(row.labels[-len(alone) :]) == alone
    begun = Prompt(messages=asked.messages, answer_prefix=answer[:1], stop="\n")
    assert tuple(row.ids) == (*encoder.prompt(begun), *alone)


# ------------------------------------------------------------ half precision


def coarse(folder: Path, factor: float = 60) -> Any:
    """A bfloat16 model with logits as large as those of trained ones."""
    model = load_model(str(folder), ModelSection(name="x", dtype="bfloat16"))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(factor)
    return model


@pytest.mark.parametrize("packed", [True, False])
def test_labels_and_titles_do_not_tie_on_any_route(packed: bool, tmp_path: Path) -> None:
    encoder = Encoder(make_tokenizer(), max_length=512)
    backend = HFBackend(coarse(make_model(tmp_path / "m")), encoder, packed=packed)
    asked = [prompt(f"Which one, {n}?", stop=None) for n in range(12)]
    for labels in backend.score(asked, [tuple("ABCDEFGHIJ")] * 12, closed=False):
        assert len(set(labels.logprobs)) == 10
    for titles in backend.score(asked, [TITLES_ASKED] * 12):
        assert len(set(titles.logprobs)) == len(TITLES_ASKED)


@pytest.mark.parametrize("packed", [True, False])
def test_no_log_probability_is_above_0(packed: bool, tmp_path: Path) -> None:
    """A search's bound takes it for granted; near-certain tokens of a bfloat16 head went up to .125."""
    from llmrec.models.traits import chosen_logprobs

    encoder = Encoder(make_tokenizer(), max_length=512)
    model = coarse(make_model(tmp_path / "m"), 200)
    backend = HFBackend(model, encoder, packed=packed)
    asked = [prompt(f"Which one, {n}?") for n in range(20)]
    sets = [tuple(done.text.strip() or "x" for done in backend.generate(asked, max_tokens=3))] * 20
    scores = backend.score(asked, sets, closed=False)
    assert all(value <= 0 for found in scores for value in found.logprobs)
    states = (4 * torch.randn(400, 128)).bfloat16()
    head = model.get_output_embeddings()
    with torch.inference_mode():
        likeliest = head(states).argmax(-1)
        found = chosen_logprobs(head, states, torch.arange(400), likeliest)
        exact = (states.double() @ head.weight.double().T).log_softmax(-1)[torch.arange(400), likeliest]
    assert float(found.max()) <= 0 and torch.allclose(found, exact, atol=2e-3)


def test_a_score_does_not_depend_on_the_order_of_candidates_in_bfloat16(tmp_path: Path) -> None:
    encoder = Encoder(make_tokenizer(), max_length=512)
    backend = HFBackend(coarse(make_model(tmp_path / "m")), encoder, packed=True)
    many = tuple(f"{title} {n}" for n in range(12) for title in TITLES_ASKED)
    forward, reverse = (backend.score([prompt()], [texts])[0].logprobs for texts in (many, many[::-1]))
    assert forward == reverse[::-1]


# ------------------------------------------------------------ decoding


@pytest.mark.parametrize(
    "stored",
    [
        {"num_beams": 3},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(3, 300))},
        {"begin_suppress_tokens": list(range(3, 300))},
        {"forced_eos_token_id": 2},
        {"exponential_decay_length_penalty": [1, 50.0]},
        {"encoder_repetition_penalty": 5.0},
        {"guidance_scale": 3.0},
        {"do_sample": True, "temperature": 5.0, "top_k": 3},
    ],
    ids=lambda stored: next(iter(stored)),
)
def test_answers_are_greedy_whatever_a_folder_asks_for(stored: dict[str, Any], llama_folder: Path) -> None:
    encoder = Encoder(make_tokenizer(), max_length=512)
    asked = [prompt("Continue the list", None), prompt("Answer with one number", None)]

    def said(changes: dict[str, Any]) -> list[str]:
        model = load_model(str(llama_folder), section(llama_folder))
        for name, value in changes.items():
            setattr(model.generation_config, name, value)
        return [done.text for done in HFBackend(model, encoder).generate(asked, max_tokens=6)]

    assert said(stored) == said({})


def test_written_tokens_are_counted_without_the_padding_of_a_batch(llama_folder: Path) -> None:
    backend = HFBackend(load_model(str(llama_folder), section(llama_folder)), Encoder(make_tokenizer(), max_length=512))
    encoder = backend.encoder
    line = [*encoder.piece("Heat"), *encoder.piece("\n")]
    padded = [*line, *[encoder.tokenizer.pad_token_id] * 30]
    assert encoder.completion(padded, "\n", 0).completion_tokens == len(line)
    asked = [prompt(f"Which one, {n}?") for n in range(12)]
    together = backend.generate(asked, max_tokens=40)
    alone = [backend.generate([each], max_tokens=40)[0] for each in asked]
    assert [done.completion_tokens for done in together] == [done.completion_tokens for done in alone]
