"""Models unlike Llama: windows, position biases, untied heads, tokenizers without line breaks, half precision."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hub

from llmrec.backends.encode import Encoder
from llmrec.backends.hf.backend import HFBackend
from llmrec.errors import RecipeError
from llmrec.models.item_tokens import save_with_item_tokens
from llmrec.models.load import load_model, load_tokenizer
from llmrec.models.tensors import vocabulary_tables
from llmrec.models.traits import is_encoder_decoder
from llmrec.recipe.schema import LoraSection, ModelSection, TrainSection
from llmrec.train import lora, sft
from llmrec.train.batches import plan_steps, target_rows
from llmrec.train.loss import encoder_decoder_loss
from llmrec.types import Message, Prompt, Segment
from tests.conftest import make_model, make_tokenizer, section
from tests.facts import Facts, raises
from tests.train.test_item_tokens import INDEX, TITLES
from tests.train.test_item_tokens import examples as lists
from tests.train.tiny import example, fit, pairs

CANDIDATES = ("Heat (1995)", "Fargo (1996)", "Casino", "Heat", "Toy Story 2", "Alien", "Alien 2")
WORDS = "Continue the list of films that this person watched in order " * 6


def prompt(text: str = WORDS, stop: str | None = "\n") -> Prompt:
    turns = (Message("user", (Segment("text", text),)),)
    return Prompt(messages=turns, answer_prefix=(Segment("item", "Jaws\nRocky\n"),), stop=stop)


def shape(**more: Any) -> dict[str, Any]:
    tokenizer = make_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {"vocab_size": len(tokenizer), "hidden_size": 32, "bos_token_id": tokenizer.bos_token_id, **ends, **more}


def causal(kind: str) -> Any:
    """Return a random causal model; GPT-Neo's second layer sees 32 tokens, the others' positions bias attention."""
    torch.manual_seed(0)
    if kind == "gpt_neo":
        layers = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 32}
        model = hub.GPTNeoForCausalLM(hub.GPTNeoConfig(**shape(**layers)))
    elif kind == "mpt":
        layers = {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 1024}
        model = hub.MptForCausalLM(hub.MptConfig(**shape(**layers)))
    else:
        model = hub.BloomForCausalLM(hub.BloomConfig(**shape(n_layer=2, n_head=2)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return model.eval()


def plain_scores(model: Any, encoder: Encoder, question: Prompt) -> list[float]:
    """Return the summed log-probabilities of each title's tokens by plain forward passes."""
    ids, sums = encoder.prompt(question), []
    for text in CANDIDATES:
        tail = encoder.continuation(question, text, closed=True)
        if is_encoder_decoder(model.config):
            inputs, start = {"input_ids": [ids], "decoder_input_ids": [[0, *tail[:-1]]]}, 0
        else:
            inputs, start = {"input_ids": [[*ids, *tail]]}, len(ids) - 1
        with torch.no_grad():
            logits = model(**{name: torch.tensor(each) for name, each in inputs.items()}).logits[0].float()
        logs = logits.log_softmax(-1)
        sums.append(float(sum(logs[start + n, token] for n, token in enumerate(tail))))
    return sums


@pytest.mark.parametrize("kind", ["gpt_neo", "mpt", "bloom", "t5-v1.1", "umt5", "bart"])
def test_scores_and_search_equal_plain_forward_passes(kind: str) -> None:
    model = bart(tied=True) if kind == "bart" else t5(kind) if "t5" in kind else causal(kind)
    encoder = Encoder(make_tokenizer(), max_length=512)
    backend, questions = HFBackend(model, encoder), [prompt(), prompt("Next to")]
    assert len(encoder.prompt(questions[0])) > 64
    scores = backend.score(questions, [CANDIDATES] * 2)
    assert scores[0].engine == ("hf:tree" if kind == "t5-v1.1" else "hf:rows")
    results = backend.search(questions, list(CANDIDATES), k=3, width=7, exact=True)
    for question, each, best in zip(questions, scores, results, strict=True):
        plain = plain_scores(model, encoder, question)
        assert each.logprobs == pytest.approx(plain, abs=1e-3)
        order = sorted(range(len(plain)), key=lambda n: -plain[n])
        assert list(best.items) == order[:3]
        assert [float(value) for value in best.scores] == pytest.approx([plain[n] for n in order[:3]], abs=1e-3)


@pytest.mark.parametrize(("kind", "dtype"), [("gpt_neo", torch.float32), ("mpt", torch.bfloat16)])
def test_packing_is_rejected_for_windows_and_position_biases(kind: str, dtype: torch.dtype) -> None:
    with raises(RecipeError, Facts("unsupported", column="train.packing", says="train.packing=none")):
        sft.check_packing(causal(kind).to(dtype))


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
    random = model(config(**words, **({"tie_word_embeddings": False} if kind == "t5-v1.1" else {})))
    if kind != "t5":
        random.lm_head.weight = torch.nn.Parameter(torch.randn_like(random.lm_head.weight) * 0.3)
    return random.eval()


def bart(*, tied: bool) -> Any:
    torch.manual_seed(0)
    layers = {
        f"{half}_{what}": count
        for half in ("encoder", "decoder")
        for what, count in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 64))
    }
    words = {name: value for name, value in shape(d_model=32, **layers).items() if name != "hidden_size"}
    more = {"decoder_start_token_id": 0, "max_position_embeddings": 256, "tie_word_embeddings": tied}
    return hub.BartForConditionalGeneration(hub.BartConfig(**words, **more)).eval()


PAIRED = ("t5", "t5-v1.1", "mt5", "umt5", "bart", "bart-untied")


def paired(kind: str, folder: Path) -> Path:
    model = bart(tied=kind == "bart") if kind.startswith("bart") else t5(kind)
    model.save_pretrained(folder / kind)
    make_tokenizer().save_pretrained(folder / kind)
    return folder / kind


def loss_on_words(model: Any, known: int) -> float:
    with torch.no_grad():
        logits = model.eval()(
            input_ids=torch.tensor([[5, 9, 30, 12]]), decoder_input_ids=torch.tensor([[0, 7, 8]])
        ).logits
    return float(torch.nn.functional.cross_entropy(logits[0, :, :known], torch.tensor([7, 8, 9])))


@pytest.mark.parametrize("kind", ["t5", "umt5", "bart", "bart-untied"])
def test_item_tokens_keep_the_model_and_learn_in_every_table(kind: str, tmp_path: Path) -> None:
    folder, known = paired(kind, tmp_path), len(make_tokenizer())
    before = loss_on_words(load_model(str(folder), section(folder)), known)
    save_with_item_tokens(str(folder), section(folder), INDEX, TITLES, tmp_path / "grown", words=True, seed=0)
    grown = load_model(str(tmp_path / "grown"), section(folder))
    assert loss_on_words(grown, known) == pytest.approx(before, abs=1e-5)
    tokenizer = load_tokenizer(str(tmp_path / "grown"), section(folder))
    new = tokenizer.convert_tokens_to_ids(list(INDEX.tokens))
    train = TrainSection(steps=3, learning_rate=1e-2, lora=LoraSection(rank=4))
    torch.manual_seed(0)
    model = lora.load_trainable(str(tmp_path / "grown"), section(folder), train, tokens=new)
    assert loss_on_words(model, known) == pytest.approx(before, abs=1e-5)
    encoder = Encoder(tokenizer, max_length=256)
    rows = [row for example in lists(60) for row in target_rows(example, encoder, 256)]
    fit(model, encoder, plan_steps(iter(rows), steps=3, batch_tokens=256, seed=0), train, tmp_path / "run")
    lora.merge_adapter(str(tmp_path / "grown"), section(folder), tmp_path / "run" / "adapter", tmp_path / "merged")
    merged = load_model(str(tmp_path / "merged"), section(folder))
    with torch.no_grad():
        live, saved = (float(encoder_decoder_loss(each.eval(), **pairs(rows[:3]))[0]) for each in (model, merged))
    assert live == pytest.approx(saved, rel=1e-4)
    for (name, table), (_, start) in zip(vocabulary_tables(merged), vocabulary_tables(grown), strict=True):
        # An untied BART has a table that nothing reads.
        unread = kind == "bart-untied" and name == "model.shared"
        assert unread or float((table.weight[new] - start.weight[new]).detach().abs().max()) > 1e-3, name
        assert torch.equal(table.weight[:known], start.weight[:known])


def lineless() -> Any:
    """Return a tokenizer that drops all whitespace, as T5's tokenizer drops line breaks."""
    from tokenizers import pre_tokenizers

    tokenizer = make_tokenizer()
    core = tokenizer.backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), core.pre_tokenizer])
    return tokenizer


def test_answer_ends_if_tokenizer_drops_line_breaks() -> None:
    tokenizer = lineless()
    assert tokenizer.encode("\n", add_special_tokens=False) == []
    encoder = Encoder(tokenizer, max_length=512)
    question = prompt()
    alone, longer = (encoder.continuation(question, text, closed=True) for text in ("Alien", "Alien 2"))
    assert alone[-1] == longer[-1] == encoder.end_id
    assert longer[: len(alone)] != alone
    answer = (Segment("given", "Jaws\n"), Segment("target", "Alien\n"))
    row = encoder.row(example(question.messages, *answer, ends_turn=False))
    assert tuple(row.labels[-len(alone) :]) == alone
    begun = Prompt(messages=question.messages, answer_prefix=answer[:1], stop="\n")
    assert tuple(row.ids) == (*encoder.prompt(begun), *alone)


def coarse(folder: Path, factor: float = 60) -> Any:
    """A bfloat16 model with logits as large as those of trained ones."""
    model = load_model(str(folder), ModelSection(name="x", dtype="bfloat16"))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(factor)
    return model


@pytest.mark.parametrize("packed", [True, False])
def test_no_log_probability_is_above_0(packed: bool, tmp_path: Path) -> None:
    """A search relies on this bound; a bfloat16 head gave near-certain tokens up to .125."""
    model, encoder = coarse(make_model(tmp_path / "m"), 200), Encoder(make_tokenizer(), max_length=512)
    backend, questions = HFBackend(model, encoder, packed=packed), [prompt(f"Which one, {n}?") for n in range(12)]
    texts = tuple(done.text.strip() or "x" for done in backend.generate(questions, max_tokens=3))
    assert all(value <= 0 for s in backend.score(questions, [texts] * 12, closed=False) for value in s.logprobs)
    # No two titles tie.
    assert all(len(set(s.logprobs)) == len(CANDIDATES) for s in backend.score(questions, [CANDIDATES] * 12))


def test_bfloat16_scores_do_not_depend_on_candidate_order(tmp_path: Path) -> None:
    backend = HFBackend(coarse(make_model(tmp_path / "m")), Encoder(make_tokenizer(), max_length=512), packed=True)
    many = tuple(f"{title} {n}" for n in range(12) for title in CANDIDATES)
    forward, reverse = (backend.score([prompt()], [texts])[0].logprobs for texts in (many, many[::-1]))
    assert forward == reverse[::-1]


def test_decoding_is_greedy_whatever_the_folder_says(llama_folder: Path) -> None:
    model, encoder = load_model(str(llama_folder), section(llama_folder)), Encoder(make_tokenizer(), max_length=512)
    questions = [prompt("Continue the list", None), prompt("Answer with one number", None)]
    original = copy.deepcopy(model.generation_config)
    expected = [done.text for done in HFBackend(model, encoder).generate(questions, max_tokens=6)]
    for stored in (
        {"num_beams": 3},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(3, 300)), "begin_suppress_tokens": list(range(3, 300))},
        {"forced_eos_token_id": 2},
        {"exponential_decay_length_penalty": [1, 50.0]},
        {"encoder_repetition_penalty": 5.0},
        {"guidance_scale": 3.0},
        {"do_sample": True, "temperature": 5.0, "top_k": 3},
    ):
        model.generation_config = copy.deepcopy(original)
        for name, value in stored.items():
            setattr(model.generation_config, name, value)
        results = HFBackend(model, encoder).generate(questions, max_tokens=6)
        assert [done.text for done in results] == expected, stored


def test_completion_tokens_do_not_count_padding(llama_folder: Path) -> None:
    encoder = Encoder(make_tokenizer(), max_length=512)
    backend = HFBackend(load_model(str(llama_folder), section(llama_folder)), encoder)
    line = [*encoder.piece("Heat"), *encoder.piece("\n")]
    padded = [*line, *[encoder.tokenizer.pad_token_id] * 30]
    assert encoder.completion(padded, "\n", 0).completion_tokens == len(line)
    questions = [prompt(f"Which one, {n}?") for n in range(6)]
    together = backend.generate(questions, max_tokens=30)
    single = [backend.generate([each], max_tokens=30)[0] for each in questions]
    assert [done.completion_tokens for done in together] == [done.completion_tokens for done in single]
