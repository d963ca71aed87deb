"""Tiny encoder-decoders: rows, loss, training, resumption, adapters, and search."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from llmrec.backends.encode import IGNORED, Encoder, TokenRow
from llmrec.backends.hf.backend import HFBackend
from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset, split_dataset
from llmrec.errors import RecipeError
from llmrec.index.table import ItemIndex, level_token
from llmrec.models.item_tokens import save_with_item_tokens
from llmrec.models.load import load_model, write_random_model
from llmrec.prompts.template import load_templates
from llmrec.recipe.schema import LoraSection, SequentialSection, ShapeSection, Split, TrainSection
from llmrec.tasks.sequential import SequentialTask
from llmrec.train import lora, sft
from llmrec.train.batches import plan_steps, split_source_target, target_rows
from llmrec.train.loss import encoder_decoder_loss
from llmrec.types import Item, Segment
from tests.conftest import encoder_of, section
from tests.facts import Facts, raises
from tests.tasks.making import make
from tests.train.tiny import fit, pairs, tear

ITEMS = 20
SHAPE = ShapeSection(kind="encoder-decoder", layers=2, width=32, heads=2, head_width=16, feedforward=64, dropout=0.0)
INDEX = ItemIndex(
    "semantic",
    {f"i{n}": (level_token(0, n // 5), level_token(1, n % 5), level_token(2, n % 2)) for n in range(ITEMS)},
    tokens=tuple(level_token(level, number) for level in range(3) for number in range(5)),
)


def successors() -> SplitDataset:
    """Return data in which every item is followed by the next one."""
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
    return split_dataset(data, Split(), seed=0)


def task(template: str, data: SplitDataset | None = None) -> SequentialTask:
    section = SequentialSection(templates=(template,), strategies=("search",), history=6, window=7)
    return make(SequentialTask, data or successors(), section, load_templates("sequential"), seed=0, index=INDEX)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    write_random_model(SHAPE, folder / "m", seed=0)
    titles = {item: f"Film {item}" for item in INDEX.codes}
    save_with_item_tokens(str(folder / "m"), section(folder / "m"), INDEX, titles, folder / "base", words=True, seed=0)
    return folder / "base"


def rows_of(template: str, encoder: Encoder, count: int) -> list[TokenRow]:
    return [row for e in islice(task(template).examples("train"), count) for row in target_rows(e, encoder, 200)]


def trained(base: Path, out: Path, *, steps: int = 8, **settings: Any) -> tuple[sft.TrainingResult, Any]:
    values = {"method": "full", "steps": steps, "learning_rate": 5e-3, "save_every": 4, "valid_every": 4, **settings}
    train, encoder = TrainSection(**values), encoder_of(base)
    rows = rows_of("bare-next-code", encoder, 40 * steps)
    torch.manual_seed(0)
    ids = encoder.tokenizer.convert_tokens_to_ids(list(INDEX.tokens))
    model = lora.load_trainable(str(base), section(base), train, tokens=ids)
    planned = plan_steps(iter(rows), steps=steps, batch_tokens=512, seed=0)
    return fit(model, encoder, planned, train, out, {"sequential": rows[:8]}), model


@pytest.mark.parametrize("template", ["next-code", "bare-codes"])
def test_trained_tokens_equal_those_of_a_search(template: str, base: Path) -> None:
    encoder, data = encoder_of(base), successors()
    sequential = task(template, data)
    cases = sequential.cases("valid")
    rows = [row for example in sequential.examples("valid") for row in target_rows(example, encoder, 200)]
    assert len(rows) == len(cases) > 10
    for case, row in zip(cases, rows, strict=True):
        prompt = sequential.prompt(case.request, template=template)
        source, target = split_source_target(row)
        texts = sequential.continuations(case.request, template=template)
        code = texts[sequential.catalogue.index(str(case.truth))]
        assert list(source) == encoder.prompt(prompt)
        assert target == encoder.continuation(prompt, code, closed=True)
        assert row.targets == len(target)


def test_lists_give_one_row_per_target(base: Path) -> None:
    encoder = encoder_of(base)
    for example in islice(task("continue-codes").examples("train"), 20):
        full, rows = encoder.row(example), target_rows(example, encoder, 200)
        assert len(rows) == sum(segment.kind == "target" for segment in example.answer)
        assert [i for row in rows for i in split_source_target(row)[1]] == [i for i in full.labels if i != IGNORED]
        assert all(full.ids[: len(row.ids)] == row.ids for row in rows)
        # A limit drops later targets.
        short = target_rows(example, encoder, len(rows[0].ids) + 1)
        assert short == rows[:1]
        assert target_rows(example, encoder, len(rows[0].ids) - 1) == []
    assert target_rows(replace(example, answer=(Segment("item", "x"),)), encoder, 99) == []


def test_loss_equals_transformers_with_any_padding(base: Path) -> None:
    encoder = encoder_of(base)
    first, *others = rows_of("bare-next-code", encoder, 30)
    rows = [TokenRow((*first.ids, 7, 9), (*first.labels, 7, 9)), *others, rows_of("next-code", encoder, 1)[0]]
    model = load_model(str(base), section(base)).eval()
    with torch.no_grad():
        total, count = encoder_decoder_loss(model, **pairs(rows))
        theirs = float(model(**pairs(rows)).loss)
        single = [encoder_decoder_loss(model, **pairs([row])) for row in rows]
    assert count == sum(row.targets for row in rows) == sum(n for _, n in single)
    assert float(total) / count == pytest.approx(theirs, abs=1e-5)
    assert float(total) == pytest.approx(sum(float(each) for each, _ in single), rel=1e-5)


@pytest.fixture(scope="module")
def learned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, sft.TrainingResult]:
    folder = tmp_path_factory.mktemp("learned")
    done, _ = trained(base, folder, steps=400, learning_rate=3e-3, warmup=0.1, valid_every=100, save_every=400)
    lora.save_full_model(folder / "adapter", section("x"), folder / "merged")
    encoder_of(base).tokenizer.save_pretrained(folder / "merged")
    return folder / "merged", done


def test_search_returns_the_learned_successors(learned: tuple[Path, sft.TrainingResult]) -> None:
    folder, done = learned
    valid = [record["valid_loss"]["sequential"] for record in done.log if record["valid_loss"]]
    assert valid[-1] < 0.05 * valid[0]
    sequential, encoder = task("bare-next-code"), encoder_of(folder)
    backend = HFBackend(load_model(str(folder), section(folder)), encoder)
    cases = sequential.cases("test")
    prompts = [sequential.prompt(case.request, template="bare-next-code") for case in cases]
    codes = sequential.continuations(cases[0].request, template="bare-next-code")
    results = backend.search(prompts, codes, k=5, width=10)
    assert [sequential.catalogue[each.items[0]] for each in results] == [case.truth for case in cases]
    assert all(len(set(each.items)) == 5 and max(each.items) < ITEMS for each in results)
    # Unconstrained decoding gives the same items; after so few steps it may leave the catalogue once.
    answers = backend.generate(prompts[:8], max_tokens=8)
    read = [INDEX.decode(each.text) for each in answers]
    assert all(item in (case.truth, None) for item, case in zip(read, cases, strict=False)) and read.count(None) <= 1
    assert all(each.finish_reason == "stop" for each in answers)


def test_exact_search_sorts_all_scores(learned: tuple[Path, sft.TrainingResult]) -> None:
    folder, _ = learned
    sequential, encoder = task("bare-next-code"), encoder_of(folder)
    backend = HFBackend(load_model(str(folder), section(folder)), encoder)
    prompts = [sequential.prompt(case.request, template="bare-next-code") for case in sequential.cases("test")[:6]]
    texts = [INDEX.encode(item) for item in INDEX.codes]
    results = backend.search(prompts, texts, k=7, width=7, exact=True)
    scores = backend.score(prompts, [texts] * len(prompts))
    rows = HFBackend(backend.model, encoder, packed=False).score(prompts, [texts] * len(prompts))
    for each, some, plain in zip(results, scores, rows, strict=True):
        assert each.certified and list(each.scores) == pytest.approx(sorted(some.logprobs, reverse=True)[:7], abs=1e-4)
        assert some.logprobs == pytest.approx(plain.logprobs, abs=1e-4)
    assert results[0].engine == "hf:tree"


def test_killed_run_resumes_to_the_same_weights(base: Path, tmp_path: Path) -> None:
    full, _ = trained(base, tmp_path)
    tear(tmp_path, 8)
    resumed, _ = trained(base, tmp_path)
    assert resumed.adapter_sha256 == full.adapter_sha256
    assert [record["step"] for record in resumed.log] == [record["step"] for record in full.log] == list(range(9))
    assert full.trainable_parameters == full.total_parameters and full.target_tokens < full.tokens


def test_adapter_and_rows_of_item_tokens_are_trained(base: Path, tmp_path: Path) -> None:
    _, model = trained(base, tmp_path, steps=6, method="lora", lora=LoraSection(rank=4))
    moving = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moving and all("lora_" in name or "trainable_tokens" in name for name in moving)
    assert any("encoder" in name and "lora_" in name for name in moving)
    assert any("decoder" in name and "lora_" in name for name in moving)
    lora.merge_adapter(str(base), section(base), tmp_path / "adapter", tmp_path / "merged")
    before, after = load_model(str(base), section(base)), load_model(str(tmp_path / "merged"), section(base))
    new = len(INDEX.tokens)
    old, now = (m.get_input_embeddings().weight for m in (before, after))
    assert torch.equal(old[:-new], now[:-new]) and not torch.equal(old[-new:], now[-new:])
    rows = rows_of("bare-next-code", encoder_of(base), 8)
    with torch.no_grad():
        live, merged = (float(encoder_decoder_loss(each.eval(), **pairs(rows))[0]) for each in (model, after))
        start = float(encoder_decoder_loss(before.eval(), **pairs(rows))[0])
    assert live == pytest.approx(merged, rel=1e-4) and abs(live - start) > 0.1


def test_rejects_packing(base: Path, tmp_path: Path) -> None:
    train = TrainSection(method="full", packing="tree", steps=1)
    encoder = encoder_of(base)
    model = lora.load_trainable(str(base), section(base), train)
    planned = plan_steps(iter(rows_of("bare-next-code", encoder, 9)), steps=1, batch_tokens=256, seed=0, width=128)
    with raises(RecipeError, Facts("unsupported", column="train.packing", says=("t5", "train.packing=none"))):
        fit(model, encoder, planned, train, tmp_path)
