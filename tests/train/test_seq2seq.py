"""Encoder-decoders for real on tiny models: rows, loss, training, resuming, adapters, and the search that follows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from llmrec.backends.encode import IGNORED, Encoder, TokenRow
from llmrec.backends.hf.backend import HFBackend
from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset, split
from llmrec.errors import RecipeError
from llmrec.index.table import ItemIndex, token
from llmrec.models.item_tokens import extended
from llmrec.models.load import byte_tokenizer, load_model, write
from llmrec.prompts.template import load_templates
from llmrec.recipe.schema import LoraSection, SequentialSection, ShapeSection, Split, TrainSection
from llmrec.tasks.sequential import SequentialTask
from llmrec.train import lora, sft
from llmrec.train.batches import cut, paired_inputs, plan, target_rows
from llmrec.train.loss import paired_loss
from llmrec.types import Example, Item, Message, Prompt, Segment
from tests.conftest import encoder_of, section
from tests.facts import Facts, raises
from tests.tasks.making import make

ITEMS = 20
SHAPE = ShapeSection(kind="encoder-decoder", layers=2, width=32, heads=2, head_width=16, feedforward=64, dropout=0.0)
INDEX = ItemIndex(
    "semantic",
    {f"i{n}": (token(0, n // 5), token(1, n % 5), token(2, n % 2)) for n in range(ITEMS)},
    tokens=tuple(token(level, number) for level in range(3) for number in range(5)),
)


def successors() -> SplitDataset:
    """Every item is followed by the next one, around a ring: what comes is never in doubt."""
    rows = [
        (f"u{user}", f"i{(7 * user + step) % ITEMS}", None, float(step), None)
        for user in range(40)
        for step in range(9 + user % 4)
    ]
    schema = {"user_id": pl.String, "item_id": pl.String, "rating": pl.Float64, "timestamp": pl.Float64}
    data = Dataset(
        name="ring",
        noun="films",
        interactions=pl.DataFrame(rows, schema={**schema, "text": pl.String}, orient="row"),
        items={f"i{n}": Item(item_id=f"i{n}", title=f"Film {n}") for n in range(ITEMS)},
    )
    return split(data, Split(), seed=0)


def task(template: str, data: SplitDataset | None = None) -> SequentialTask:
    section = SequentialSection(templates=(template,), strategies=("search",), history=6, window=7)
    return make(SequentialTask, data or successors(), section, load_templates("sequential"), seed=0, index=INDEX)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    write(SHAPE, folder / "m", seed=0)
    titles = {item: f"Film {item}" for item in INDEX.codes}
    extended(str(folder / "m"), section(folder / "m"), INDEX, titles, folder / "base", words=True, seed=0)
    return folder / "base"


def rows_of(template: str, encoder: Encoder, count: int) -> list[TokenRow]:
    return [row for e in islice(task(template).examples("train"), count) for row in target_rows(e, encoder, 200)]


def trained(base: Path, out: Path, *, steps: int = 8, **settings: Any) -> tuple[sft.Training, Any]:
    values = {"method": "full", "steps": steps, "learning_rate": 5e-3, "save_every": 4, "valid_every": 4, **settings}
    train, encoder = TrainSection(**values), encoder_of(base)
    rows = rows_of("bare-next-code", encoder, 40 * steps)
    torch.manual_seed(0)
    ids = encoder.tokenizer.convert_tokens_to_ids(list(INDEX.tokens))
    model = lora.load_trainable(str(base), section(base), train, tokens=ids)
    planned = plan(iter(rows), steps=steps, batch_tokens=512, seed=0)
    return sft.train(model, encoder, planned, {"sequential": rows[:8]}, train, folder=out, seed=0, quiet=True), model


# --------------------------------------------------------------------------- rows


@pytest.mark.parametrize("template", ["bare-next-code", "next-code", "bare-codes", "continue-codes"])
def test_what_is_trained_is_what_a_search_asks_and_looks_for(template: str, base: Path) -> None:
    """The source of a validation row is the prompt of the request, its target the code of the item, to the token."""
    encoder, data = encoder_of(base), successors()
    asked = task(template, data)
    cases = asked.cases("valid")
    rows = [row for example in asked.examples("valid") for row in target_rows(example, encoder, 200)]
    assert len(rows) == len(cases) > 10
    for case, row in zip(cases, rows, strict=True):
        prompt = asked.prompt(case.request, template=template)
        source, target = cut(row)
        texts = asked.continuations(case.request, template=template)
        code = texts[asked.catalogue.index(str(case.truth))]
        assert list(source) == encoder.prompt(prompt)
        assert target == encoder.continuation(prompt, code, closed=True)
        assert row.targets == len(target)


@pytest.mark.parametrize("template", ["bare-codes", "continue-codes"])
def test_a_list_gives_a_row_for_each_target_with_all_before_it(template: str, base: Path) -> None:
    encoder = encoder_of(base)
    for example in islice(task(template).examples("train"), 20):
        whole, rows = encoder.row(example), target_rows(example, encoder, 200)
        assert len(rows) == sum(segment.kind == "target" for segment in example.answer)
        assert [i for row in rows for i in cut(row)[1]] == [i for i in whole.labels if i != IGNORED]
        assert all(whole.ids[: len(row.ids)] == row.ids for row in rows)
        # A limit takes the later targets, and each that stays is whole.
        short = target_rows(example, encoder, len(rows[0].ids) + 1)
        assert short == rows[:1]


def test_a_row_that_does_not_fit_is_dropped_whole(base: Path) -> None:
    encoder = encoder_of(base)
    example = next(task("bare-next-code").examples("train"))
    (row,) = target_rows(example, encoder, 200)
    assert target_rows(example, encoder, len(row.ids)) == [row]
    assert target_rows(example, encoder, len(row.ids) - 1) == []


# --------------------------------------------------------------------------- loss


def tensors(rows: Sequence[TokenRow]) -> dict[str, Any]:
    return {name: torch.tensor(values) for name, values in paired_inputs(rows, 0).items()}


def test_the_loss_is_that_of_transformers(base: Path) -> None:
    rows = [row for row in rows_of("bare-next-code", encoder_of(base), 30) if row.targets]
    assert len({len(row.ids) for row in rows}) > 3
    model, inputs = load_model(str(base), section(base)).eval(), tensors(rows)
    with torch.no_grad():
        total, count = paired_loss(model, **inputs)
        theirs = float(model(**inputs).loss)
    assert count == sum(row.targets for row in rows)
    assert float(total) / count == pytest.approx(theirs, abs=1e-5)


def test_padding_changes_nothing(base: Path) -> None:
    """Targets of unequal length side by side give what each gives alone."""
    encoder = encoder_of(base)
    rows = rows_of("bare-next-code", encoder, 4)
    longer = TokenRow((*rows[0].ids, 7, 9), (*rows[0].labels, 7, 9))
    rows = [longer, *rows[1:], rows_of("next-code", encoder, 1)[0]]
    model = load_model(str(base), section(base)).eval()
    with torch.no_grad():
        together, count = paired_loss(model, **tensors(rows))
        alone = [paired_loss(model, **tensors([row])) for row in rows]
    assert count == sum(n for _, n in alone)
    assert float(together) == pytest.approx(sum(float(total) for total, _ in alone), rel=1e-5)


# --------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def taught(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, sft.Training]:
    folder = tmp_path_factory.mktemp("taught")
    done, _ = trained(base, folder, steps=400, learning_rate=3e-3, warmup=0.1, valid_every=100, save_every=400)
    lora.save_full(folder / "adapter", section("x"), folder / "merged")
    encoder_of(base).tokenizer.save_pretrained(folder / "merged")
    return folder / "merged", done


def test_it_learns_what_follows_and_the_search_returns_it(taught: tuple[Path, sft.Training]) -> None:
    folder, done = taught
    valid = [record["valid_loss"]["sequential"] for record in done.log if record["valid_loss"]]
    assert valid[-1] < 0.05 * valid[0]
    asked, encoder = task("bare-next-code"), encoder_of(folder)
    backend = HFBackend(load_model(str(folder), section(folder)), encoder)
    cases = asked.cases("test")
    prompts = [asked.prompt(case.request, template="bare-next-code") for case in cases]
    codes = asked.continuations(cases[0].request, template="bare-next-code")
    found = backend.search(prompts, codes, k=5, width=10)
    assert [asked.catalogue[each.items[0]] for each in found] == [case.truth for case in cases]
    assert all(len(set(each.items)) == 5 and max(each.items) < ITEMS for each in found)
    # Unconstrained greedy decoding says the same, and its words are read back as the item; after so few steps it may
    # leave the catalogue once, which depends on how a processor rounds.
    said = backend.generate(prompts[:8], max_tokens=8)
    read = [INDEX.decode(each.text) for each in said]
    assert all(item in (case.truth, None) for item, case in zip(read, cases, strict=False)) and read.count(None) <= 1
    assert all(each.finish_reason == "stop" for each in said)


@pytest.mark.parametrize("packed", [None, False])
def test_an_exact_search_is_a_sort_of_all_scores(taught: tuple[Path, sft.Training], packed: bool | None) -> None:
    folder, _ = taught
    asked, encoder = task("bare-next-code"), encoder_of(folder)
    backend = HFBackend(load_model(str(folder), section(folder)), encoder, packed=packed)
    prompts = [asked.prompt(case.request, template="bare-next-code") for case in asked.cases("test")[:6]]
    codes = list(INDEX.codes)
    texts = [INDEX.encode(item) for item in codes]
    found = backend.search(prompts, texts, k=7, width=7, exact=True)
    scores = backend.score(prompts, [texts] * len(prompts))
    rows = HFBackend(backend.model, encoder, packed=False).score(prompts, [texts] * len(prompts))
    for each, some, plain in zip(found, scores, rows, strict=True):
        assert each.certified and list(each.scores) == pytest.approx(sorted(some.logprobs, reverse=True)[:7], abs=1e-4)
        assert some.logprobs == pytest.approx(plain.logprobs, abs=1e-4)
    assert found[0].engine == ("hf:rows" if packed is False else "hf:tree")


def test_scores_are_sums_of_plain_forwards(taught: tuple[Path, sft.Training]) -> None:
    folder, _ = taught
    asked, encoder = task("bare-next-code"), encoder_of(folder)
    model = load_model(str(folder), section(folder)).eval()
    prompt = asked.prompt(asked.cases("test")[3].request, template="bare-next-code")
    texts = [INDEX.encode(item) for item in INDEX.codes]
    (scores,) = HFBackend(model, encoder).score([prompt], [texts])
    for text, score in zip(texts, scores.logprobs, strict=True):
        labels = torch.tensor([encoder.continuation(prompt, text, closed=True)])
        with torch.no_grad():
            mean = float(model(input_ids=torch.tensor([encoder.prompt(prompt)]), labels=labels).loss)
        assert score == pytest.approx(-mean * labels.shape[1], abs=1e-4)


def test_a_killed_run_resumes_to_the_same_weights(base: Path, tmp_path: Path) -> None:
    whole, _ = trained(base, tmp_path / "whole", steps=12)
    for file in (tmp_path / "whole" / "checkpoints" / "checkpoint-12").iterdir():
        file.unlink()
    resumed, _ = trained(base, tmp_path / "whole", steps=12)
    assert resumed.adapter_sha256 == whole.adapter_sha256
    assert [record["step"] for record in resumed.log] == [record["step"] for record in whole.log] == list(range(13))
    assert whole.trainable_parameters == whole.total_parameters and whole.target_tokens < whole.tokens


def test_an_adapter_trains_itself_and_the_rows_of_item_tokens(base: Path, tmp_path: Path) -> None:
    settings = {"method": "lora", "lora": LoraSection(rank=4)}
    _, model = trained(base, tmp_path, steps=6, **settings)
    moving = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moving and all("lora_" in name or "trainable_tokens" in name for name in moving)
    assert any("encoder" in name and "lora_" in name for name in moving)
    assert any("decoder" in name and "lora_" in name for name in moving)
    lora.merge(str(base), section(base), tmp_path / "adapter", tmp_path / "merged")
    before, after = load_model(str(base), section(base)), load_model(str(tmp_path / "merged"), section(base))
    new = len(INDEX.tokens)
    for old, now in ((m.get_input_embeddings().weight for m in (before, after)),):
        assert torch.equal(old[:-new], now[:-new]) and not torch.equal(old[-new:], now[-new:])
    # The live adapter and the merged weights are one model: halves and head read the same rows.
    rows = rows_of("bare-next-code", encoder_of(base), 8)
    with torch.no_grad():
        live, merged = (float(paired_loss(each.eval(), **tensors(rows))[0]) for each in (model, after))
        start = float(paired_loss(before.eval(), **tensors(rows))[0])
    assert live == pytest.approx(merged, rel=1e-4) and abs(live - start) > 0.1


def test_other_encoder_decoders_are_read_in_whole_rows(tmp_path: Path) -> None:
    """BART counts places from the start of each half, and its decoder takes no tree; answers are exact all the same."""
    from transformers import BartConfig, BartForConditionalGeneration

    tokenizer = byte_tokenizer()
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    wide = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 128}
    marks = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(vocab_size=len(tokenizer), **sizes, **wide, **marks)).eval()
    backend = HFBackend(model, Encoder(tokenizer, max_length=64))
    prompts = [Prompt(messages=(Message("user", (Segment("text", text),)),)) for text in ("ab", "much longer", "c")]
    texts = ["heat", "heart", "alien", "ale"]
    scores = backend.score(prompts, [texts] * 3)
    found = backend.search(prompts, texts, k=4, width=1, exact=True)
    for prompt, each, some in zip(prompts, found, scores, strict=True):
        labels = torch.tensor([backend.encoder.continuation(prompt, texts[each.items[0]], closed=True)])
        with torch.no_grad():
            mean = float(model(input_ids=torch.tensor([backend.encoder.prompt(prompt)]), labels=labels).loss)
        assert each.scores[0] == pytest.approx(-mean * labels.shape[1], abs=1e-4)
        assert list(each.scores) == pytest.approx(sorted(some.logprobs, reverse=True), abs=1e-4)
    assert found[0].engine == "hf:rows"
    together = [said.text for said in backend.generate(prompts, max_tokens=5)]
    assert together == [backend.generate([prompt], max_tokens=5)[0].text for prompt in prompts]


def test_packing_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    train = TrainSection(method="full", packing="tree", steps=1)
    encoder = encoder_of(base)
    model = lora.load_trainable(str(base), section(base), train)
    planned = plan(iter(rows_of("bare-next-code", encoder, 9)), steps=1, batch_tokens=256, seed=0, width=128)
    with raises(RecipeError, Facts("unsupported", column="train.packing", says=("t5", "train.packing=none"))):
        sft.train(model, encoder, planned, {}, train, folder=tmp_path, seed=0, quiet=True)


def test_an_example_without_targets_gives_no_row(base: Path) -> None:
    message = Message("user", (Segment("text", "x"),))
    answer = (Segment("item", "x"),)
    example = Example(
        id="1", user_id="u", task="sequential", template="t", messages=(message,), answer=answer, ends_turn=True
    )
    assert target_rows(example, encoder_of(base), 99) == []
