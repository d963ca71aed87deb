"""The model card: its content, its metadata, and that no text of a run becomes markup."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from llmrec.exports.card import (
    Agreement,
    BaseFacts,
    Card,
    DataFacts,
    Example,
    FamilyAgreement,
    TaskSettings,
    metadata,
    render_card,
    request_body,
    safe_literal,
)
from llmrec.report.results import parse_results
from llmrec.results import Results

Hostile = Callable[[dict[str, Any], list[str]], dict[str, Any]]

TRAINING = {
    "steps": 240,
    "tokens": 296_400,
    "target_tokens": 91_000,
    "trainable_parameters": 4_884_480,
    "total_parameters": 139_400_000,
    "rows": {"rating": 410, "sequential": 300},
    "adapter_sha256": "d4" * 32,
}
EXAMPLE = Example(
    family="direct",
    messages=(("system", "You recommend films."), ("user", "Which one?\nA. Alien\nB. It's 'Heat' & more\n")),
    given="",
    text="...",
    stop=None,
    max_tokens=8,
)
AGREEMENT = Agreement(
    before="the adapter on the base in NF4",
    after="the exported weights, bfloat16",
    families=(
        FamilyAgreement(
            family="rating",
            rows=50,
            target_tokens=50,
            loss=(1.2345, 1.2301),
            metric="RMSE",
            cases=50,
            values=(1.05, 1.06),
            difference=(0.01, -0.002, 0.021),
        ),
    ),
    prompts=8,
    logit=0.46,
)


def make_card(**changes: Any) -> Card:
    card = Card(
        name="films-model",
        address="films-model",
        description="Films for friends.",
        version="0.1.0",
        noun="films",
        adapter_only=False,
        dtype="bfloat16",
        max_length=2048,
        base=BaseFacts(name="SmolLM2", hub="HuggingFaceTB/SmolLM2-135M-Instruct", licence="apache-2.0"),
        licence=None,
        method="lora",
        lora={"rank": 16, "alpha": 32},
        seed=0,
        training=TRAINING,
        data=(
            DataFacts(
                name="movielens-100k", source="movielens-100k", users=943, items=1682, interactions=100_000,
                parts=(98_114, 943, 943), split="leave one out", fingerprint="a3" * 32, filters="none",
                licence="GroupLens research licence",
            ),
        ),
        asked=(
            TaskSettings(
                family="rating", strategies=("expected",), template="rating/list-ratings", version=1, weight=5.0
            ),
            TaskSettings(
                family="direct", strategies=("label",), template="direct/after-history", version=2, weight=0.5
            ),
        ),
        example=EXAMPLE,
        results=None,
        measured_dtype=None,
        agreement=None,
        with_items=False,
    )  # fmt: skip
    return replace(card, **changes)


def parts(text: str) -> tuple[dict[str, Any], str]:
    """Split a card into front matter and body."""
    match = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
    assert match is not None
    return yaml.safe_load(match[1]), text[match.end() :]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", text, flags=re.DOTALL)


def test_front_matter_is_read_by_the_hub_library() -> None:
    hub = pytest.importorskip("huggingface_hub", reason="the train extra is not installed")
    text = render_card(make_card(base=BaseFacts(name="x", hub="org/base", licence="mit", languages=("en", "de"))))
    card = hub.ModelCard(text)
    parsed = card.data.to_dict()
    assert parsed["license"] == "mit"
    assert parsed["base_model"] == "org/base" and parsed["base_model_relation"] == "finetune"
    assert (parsed["library_name"], parsed["pipeline_tag"]) == ("transformers", "text-generation")
    assert parsed["language"] == ["en", "de"]
    assert {"llmrec", "recommendation", "lora", "rating", "direct"} <= set(parsed["tags"])
    assert card.text.lstrip().startswith("# films-model")
    assert hub.ModelCard(str(card)).data.to_dict() == parsed


@pytest.mark.parametrize(
    ("licence", "base", "expected"),
    [
        (None, None, {"license": "unknown"}),
        ("cc-by-nc-4.0", "apache-2.0", {"license": "cc-by-nc-4.0"}),
        ("My own terms: ask", "mit", {"license": "other", "license_name": "My own terms: ask"}),
    ],
)
def test_licences(licence: str | None, base: str | None, expected: dict[str, str]) -> None:
    card = make_card(licence=licence, base=BaseFacts(name="b", licence=base))
    header, body = parts(render_card(card))
    assert {key: header[key] for key in header if key.startswith("license")} == expected
    section = body.partition("## Licence")[2]
    assert f"Base model b: {base or 'unknown: fill in'}." in section
    assert f"this card: {licence or 'unknown: fill in'}." in section


def test_local_names_are_not_in_the_metadata() -> None:
    header = metadata(make_card(base=BaseFacts(name="my-model")))
    assert "base_model" not in header and "datasets" not in header
    data = DataFacts(name="films", source="table", hub="org/films")
    assert metadata(make_card(data=(data,)))["datasets"] == ["org/films"]


def test_results_have_baselines_intervals_and_signatures(results: dict[str, Any]) -> None:
    parsed = parse_results(results)
    text = render_card(make_card(results=parsed, measured_dtype="bfloat16"))
    section = text.partition("## Evaluation")[2].partition("## Effect of the export")[0]
    for row in parsed.rows:
        metric = row.metrics[parsed.headline[row.task]]
        assert f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]" in section
        assert metric.signature in section
    assert section.count("(baseline)") == sum(row.arm == "baseline" for row in parsed.rows)
    assert "The best model is a baseline" in section and "The best model is a language model" in section
    assert "One seed only." in section
    assert "evaluation used" not in section
    assert "evaluation used bfloat16 weights; this folder contains float32" in render_card(
        make_card(results=parsed, measured_dtype="bfloat16", dtype="float32")
    )


def test_card_describes_data_and_terms() -> None:
    reviews = DataFacts(name="made-reviews", source="made-reviews", users=120, items=40, interactions=1442,
                        parts=(1202, 120, 120), split="leave one out", filters="none", made=True)  # fmt: skip
    body = parts(render_card(make_card(data=(*make_card().data, reviews))))[1]
    section = body.partition("## Data")[2].partition("## Evaluation")[0]
    assert "98 114 for training, 943 for validation and 943 for test" in section
    assert "GroupLens research licence" in section and "unknown: fill in" in section
    assert section.count("not real reviews") == 1
    assert "is not included" in section
    assert "items.parquet" in parts(render_card(make_card(with_items=True)))[1]


def test_card_shows_the_loss_of_a_quantised_run() -> None:
    section = render_card(make_card(agreement=AGREEMENT, method="qlora")).partition("## Effect of the export")[2]
    assert "trained on a quantised base" in section
    assert "| Rating prediction | RMSE | 50 | 1.0500 | 1.0600 | +0.0100 [−0.002, +0.021] |" in section
    assert "−0.0044" in section and "0.46" in section
    unmeasured = render_card(make_card(method="qlora")).partition("## Effect of the export")[2]
    assert "Not measured." in unmeasured and "changes the model slightly" in unmeasured


def test_card_of_an_adapter_loads_the_base() -> None:
    text = render_card(make_card(adapter_only=True))
    header, body = parts(text)
    assert (header["library_name"], header["base_model_relation"]) == ("peft", "adapter")
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in blocks(body, "python")[0]
    assert "--enable-lora" in blocks(body, "sh")[0]


@pytest.mark.parametrize("address", ["it's; $(rm x) `y`", "me/films"])
def test_folder_names_are_quoted_in_commands(address: str) -> None:
    text = render_card(make_card(address=address, example=replace(EXAMPLE, candidates=("A", "B"))))
    rank, serve, request = blocks(text, "sh")
    assert shlex.split(serve) == ["vllm", "serve", address, "--max-model-len", "2048"]
    assert shlex.split(rank.splitlines()[1])[3] == address
    words = shlex.split(request.replace("\\\n", " "))
    body = json.loads(words[words.index("-d") + 1])
    assert (body["model"], body["temperature"]) == (address, 0)
    assert body["messages"][1]["content"] == EXAMPLE.messages[1][1]
    tree = ast.parse(blocks(text, "python")[0])
    assert address in [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]


def test_example_of_a_list_continues_text() -> None:
    example = replace(EXAMPLE, given="Alien\nHeat\n", text="<|im_start|>Alien\nHeat\n", stop="\n")
    card = make_card(example=example)
    path, body = request_body(card)
    assert path == "/v1/completions"
    assert (body["prompt"], body["stop"]) == (example.text, ["\n"])
    script = blocks(render_card(card), "python")[0]
    assert 'text += "Alien\\nHeat\\n"' in script and 'stop_strings=["\\n"]' in script


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_literal_is_json_and_python(text: str) -> None:
    written = safe_literal({"a": [text]})
    assert json.loads(written) == ast.literal_eval(written) == {"a": [text]}
    assert not set("<>&`'\n") & set(written)


def _all_hostile(results: Results, texts: list[str]) -> Card:
    one, two, three, four = (texts[n % len(texts)] for n in range(4))
    return make_card(
        name=one, description=two, noun=three, results=results, licence=four[:70], measured_dtype=one, notes=(two,),
        base=BaseFacts(name=one, hub=two, revision=three, licence=four, note=""),
        data=(DataFacts(name=one, source=two, split=three, filters=four, licence=one, fingerprint=two),),
        asked=(TaskSettings(family="rating", strategies=(one, two), template=three, version=1, weight=1.0),),
        training={**TRAINING, "adapter_sha256": four, "rows": {one: 3}},
        lora={two: three},
        example=replace(EXAMPLE, messages=(("user", one + "\n```\n" + two),)),
    )  # fmt: skip


def test_hostile_texts_do_not_become_markup(results: dict[str, Any], payloads: list[str], hostile: Hostile) -> None:
    extra = [
        "---\nlicense: mit\n---",
        "a\n---\nb",
        "# heading",
        "![x](http://x/y.png)",
        "```\n# out\n```",
        "| a | b |",
        ": x",
    ]
    plain = MarkdownIt("commonmark", {"html": True}).enable("table")
    kinds = [token.type for token in plain.parse(parts(render_card(make_card(results=parse_results(results))))[1])]
    assert "html_block" not in kinds
    for start in range(0, len(payloads), 12):
        texts = [*payloads[start : start + 12], *extra]
        parsed = parse_results(hostile(results, texts))
        for shift in range(0, len(texts), 4):
            text = render_card(_all_hostile(parsed, texts[shift:] + texts[:shift]))
            header, body = parts(text)
            known = {"license", "license_name", "library_name", "pipeline_tag", "tags"}
            assert header.keys() <= known | {"base_model", "base_model_relation"}
            assert header["license"] == "other"
            tokens = plain.parse(body)
            inline = [child.type for token in tokens for child in token.children or ()]
            assert not {"html_block", "html_inline"} & {*(token.type for token in tokens), *inline}
            assert not {"link_open", "image"} & set(inline)
            headings = [token for token in tokens if token.type == "heading_open" and token.tag == "h2"]
            assert len(headings) == 8
            assert len(blocks(body, "python")) == 1 and len(blocks(body, "sh")) == 2
            ast.parse(blocks(body, "python")[0])
