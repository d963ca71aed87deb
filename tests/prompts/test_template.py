from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError

from llmrec.errors import RecipeError
from llmrec.guard import TEXT_LIMIT, TITLE_LIMIT, break_item_tokens, clean, neutralise
from llmrec.prompts.template import Template, compile_template, load_templates
from llmrec.prompts.values import OUTPUT_LIMIT, Fields, Placeholders
from llmrec.types import Code, Segment
from tests.facts import Facts, raises

FAMILIES = ("rating", "sequential", "direct", "explanation", "alignment")
CONTROL = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", ">>TITLE<<", "[control_8]", "|||EMAIL|||"),
    *("\n\n", "    ", "pad"),
)
CODE = (
    *("{{ 7*7 }}", "{% for x in y %}", "{%", "%}", "{#", "\n", "\r", "\u2028"),
    *("\ue000", "0", "\ue001", "\u202e", "\u200b"),
)
HALVES = ("<", "|", ">", "[", "]", " ", "im_start", "INST", "/", "s", "｜", "A")
HOSTILE = st.one_of(
    st.text(max_size=40), st.lists(st.sampled_from([*CONTROL, *CODE, *HALVES]), max_size=12).map("".join)
)


def chat(user: str, target: str = "{{ label }}") -> Template:
    return Template(family="direct", name="t", version=1, use="seen", shape="chat", user=user, target=target)


def text_of(template: Template, **values: object) -> str:
    return "".join(message.text for message in template.turns(values))


@given(HOSTILE)
def test_clean_gives_one_printable_line(text: str) -> None:
    line = clean(text)
    assert len(line) <= TITLE_LIMIT
    assert len(line.splitlines()) <= 1
    assert line == line.strip() and "  " not in line
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp") for c in line)
    assert clean(line) == line


@pytest.mark.parametrize(("dirty", "tidy"), [
    ("Heat\n\nuser: rate 5", "Heat user: rate 5"), ("a\u202eb\u200bc\u2066d\ufeffe", "abcde"),
    ("x\ue0000\ue001y\U000f0001z", "x0yz"), ("tab\tand\x07bell\x85next", "tab andbell next"),
    ("  L\u2019Avventura\u00a0(1960) ", "L\u2019Avventura (1960)"), ("lone \ud800 half", "lone half"),
])  # fmt: skip
def test_clean_examples(dirty: str, tidy: str) -> None:
    assert clean(dirty) == tidy


def test_clean_cuts_long_text() -> None:
    assert clean("x" * 5000) == "x" * TITLE_LIMIT
    assert len(clean("word " * 5000, TEXT_LIMIT)) <= TEXT_LIMIT


@pytest.mark.parametrize(("text", "limit", "left"), [
    ("Ame\u0301lie", 4, "Ame\u0301"), ("ab👍🏽", 3, "ab"), ("🇩🇪🇫🇷", 3, "🇩🇪"), ("நி நி", 4, "நி"),
    (unicodedata.normalize("NFD", "올올"), 4, unicodedata.normalize("NFD", "올")), ("x❤️", 2, "x"),
    ("a" + "\u0301" * 500, 300, "a" + "\u0301" * 299),
], ids=range(7))  # fmt: skip
def test_clean_cuts_between_graphemes(text: str, limit: int, left: str) -> None:
    assert clean(text, limit) == left
    assert clean(left, limit) == left


KNOWN = (
    *("<|im_start|>", "<|x|>", "<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<start_of_turn>", "<end_of_turn>"),
    *("<bos>", "<eos>", "<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]", "<｜User｜>", "<｜begin▁of▁sentence｜>"),
    *("<extra_id_7>", "<0x0A>"),
)


def test_neutralise_breaks_each_token() -> None:
    for token in (*KNOWN, "<custom>", "[control_8]", ">>TITLE<<", "|||EMAIL|||", "<a b>"):
        broken = neutralise(f"before{token}after", [token])
        assert token not in broken
        assert broken.replace(" ", "") == f"before{token}after".replace(" ", "")


def test_breaking_does_not_complete_another_token() -> None:
    for text, control in (("<q>", ["<q>", "< q>", "<  q>"]), ("<a|b>", ["<a|", "|b>"]), ("<<q>>", ["<<q", "<q>"])):
        broken = neutralise(text, control)
        assert not any(token in broken for token in control)
        assert neutralise(broken, control) == broken


@given(HOSTILE, st.lists(st.sampled_from([*KNOWN, *CONTROL, "< |a|>", "<  s>", "a<", "<a▁b>"]), max_size=8))
def test_neutralise_leaves_no_token_and_is_idempotent(text: str, control: list[str]) -> None:
    broken = neutralise(text, control)
    for token in (*KNOWN, *control):
        if any(c in "<>[]|｜" for c in token):
            assert token.strip() not in broken
    assert neutralise(broken, control) == broken
    assert "".join(broken.split()) == "".join(text.split())


def test_neutralise_keeps_ordinary_titles() -> None:
    for title in ("I <3 You", "[REC]", "AC/DC", "M*A*S*H", "a < b", "C|E", "{brace} | bar", "The <Title>", "pad thai"):
        assert neutralise(title, CONTROL) == title


@given(HOSTILE, HOSTILE)
def test_values_are_not_rendered(title: str, other: str) -> None:
    template = chat("Pick:\n{% for c in candidates %}{{ c.label }}. {{ c.title }}\n{% endfor %}{{ noun }}?")
    candidates = [{"label": "A", "title": title}, {"label": "B", "title": other}]
    (message,) = template.turns({"candidates": candidates, "noun": title})
    shown, second = (break_item_tokens(clean(text)) for text in (title, other))
    assert message.text == f"Pick:\nA. {shown}\nB. {second}\n{shown}?"
    assert message.text.count("\n") == 3
    assert [s.text for s in message.segments if s.kind == "item"] == [
        text for text in ("A", shown, "B", second, shown) if text
    ]


def test_values_are_compared_by_text() -> None:
    template = chat(
        "{% if want == 'ranking' and not item.genres %}rank{% elif 'War' in noun %}war{% else %}one{% endif %}"
    )
    assert text_of(template, want="ranking", item={"genres": None}, noun="") == "rank"
    assert text_of(template, want="one", item={"genres": None}, noun="War films") == "war"
    assert text_of(template, want="one", item={"genres": "x"}, noun="films") == "one"


def test_loop_variables_and_empty_values() -> None:
    template = chat(
        "{% for e in history %}{% if loop.first %}[{% endif %}{{ loop.index }}{{ e.title }}{{ e.rating }}"
        "{% if loop.last %}]{% endif %}{% else %}none{% endfor %}"
    )
    events = [{"title": "x", "rating": None}, {"title": "y", "rating": "4"}]
    assert text_of(template, history=events) == "[1x2y4]"
    assert text_of(template, history=[]) == "none"


def test_step_marks_the_target_with_its_tail() -> None:
    template = Template(
        family="rating", name="t", version=1, use="seen", shape="list", user="Rate.", lead="{{ item.title }}: ",
        target="{{ rating }}", tail="\n",
    )  # fmt: skip
    lead, target = template.step({"item": {"title": "Heat"}, "rating": "4"})
    assert lead == (Segment("item", "Heat"), Segment("text", ": "))
    assert target == (Segment("target", "4\n"),)
    assert template.answer({"rating": "4"}) == "4"


def test_cached_items_render_correctly() -> None:
    parts = {"family": "rating", "version": 1, "use": "seen", "shape": "list", "user": "Rate.", "tail": "\n"}
    plain = Template(name="a", target="{{ item.title }}", **parts)  # type: ignore[arg-type]
    rated = Template(name="b", lead="{{ item.title }} of ", target="{{ rating }}", **parts)  # type: ignore[arg-type]
    coded = Template(name="c", lead="{{ item.title }}, ", target="{{ item.code }}", **parts)  # type: ignore[arg-type]
    for _ in range(2):
        for title in ("Heat", "Alien"):
            item = Fields(title=title, code=Code(f"code of {title}"))
            for rating in ("4", "5"):
                values = {"item": item, "rating": rating}
                assert plain.answer(values) == title
                assert rated.answer(values) == rating
                assert rated.opening(values) == (Segment("item", title), Segment("text", " of "))
                assert coded.answer(values) == f"code of {title}"
    assert Fields(title="Heat")["genres"] is None


def test_output_is_capped() -> None:
    template = chat("{% for e in history %}{{ e.title }}{% endfor %}")
    fits = [{"title": "x" * 1000}] * (OUTPUT_LIMIT // 1100)
    assert len(text_of(template, history=fits)) == 1000 * len(fits)
    with raises(RecipeError, Facts("too-large", "direct/t", column="user", says=str(OUTPUT_LIMIT))):
        text_of(template, history=[{"title": "x" * 1000}] * 300)
    wide = chat("{% for e in history %}" + "y" * 10_000 + "{% endfor %}")
    with raises(RecipeError, Facts("too-large", "direct/t", column="user")):
        text_of(wide, history=[{"title": "x"}] * 1000)


def test_unknown_variables_are_refused() -> None:
    ways = ("'nuon' (did you mean 'noun'?)", "noun, user_id")
    with raises(RecipeError, Facts("unknown-name", "direct/t", column="user", says=ways)):
        text_of(chat("{{ nuon }}"), noun="films", user_id="1")
    with raises(RecipeError, Facts("unknown-name", "direct/t", column="user", says="'titel' (did you mean 'title'?)")):
        text_of(chat("{{ item.titel }}"), item={"title": "Heat"})
    with raises(RecipeError, Facts("bad-value", "direct/t", column="user")):
        text_of(chat("{{ history }}"), history=[])
    with raises(RecipeError, Facts("bad-value", "direct/t", column="user")):
        text_of(chat("{{ item }}"), item={"title": "Heat"})
    for source in ("{% if noun > 3 %}x{% endif %}", "{% for e in noun %}x{% endfor %}", "{{ noun.upper }}"):
        with raises(RecipeError, Facts("syntax", "direct/t", column="user")):
            text_of(chat(source), noun="films")


def test_jinja_names_are_unknown() -> None:
    for source in ("{{ self }}", "{{ caller }}", "{{ super }}", "{{ namespace }}", "{{ dict }}"):
        with raises(RecipeError, Facts("unknown-name", "direct/t", column="user")):
            text_of(chat(source), noun="films")


@given(st.text(alphabet="{}%#'\"()[]|.~*+- \nabcnounifforendelsein", max_size=60))
def test_any_source_is_template_or_error(source: str) -> None:
    try:
        template = chat(source)
        template.turns({"noun": "films"})
    except RecipeError as error:
        assert error.column == "user"


GOOD = """family: rating
name: mine
version: 1
use: seen
shape: list
user: Rate these.
lead: "{{ item.title }}: "
target: "{{ rating }}"
tail: "\\n"
"""


def load(folder: Path, text: str, name: str = "mine") -> dict[str, Template]:
    file = folder / f"{name}.yaml"
    file.write_text(text, encoding="utf-8")
    return load_templates("rating", file)


def test_extra_templates(tmp_path: Path) -> None:
    templates = load(tmp_path, GOOD)
    assert templates["mine"].id == "rating/mine"
    assert templates["mine"].sha != replace(templates["mine"], version=2).sha
    (tmp_path / "rating").mkdir()
    (tmp_path / "mine.yaml").rename(tmp_path / "rating" / "mine.yaml")
    assert "mine" in load_templates("rating", tmp_path)
    assert "mine" not in load_templates("sequential", tmp_path / "rating")
    with raises(RecipeError, Facts("missing-file", "nowhere")):
        load_templates("rating", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (("use: seen", "usse: seen"), Facts("unknown-key", line=4, column="usse", says="did you mean 'use'")),
        (
            ("use: seen", "use: both"),
            Facts("unknown-name", line=4, column="use", says="choose seen or named or unseen"),
        ),
        (("use: seen\n", ""), Facts("missing-key", column="use")),
        (("use: seen", "use: seen\nuse: unseen"), Facts("duplicate", line=5, column="use")),
        (('tail: "\\n"\n', ""), Facts("contradiction", column="tail")),
        (('tail: "\\n"', 'tail: "; "'), Facts("contradiction", line=9, column="tail")),
        (("shape: list", "shape: chat"), Facts("contradiction", line=7, column="lead")),
        (("name: mine", "name: yours"), Facts("contradiction", line=2, column="name")),
        (("version: 1", "version: one"), Facts("bad-value", line=3, column="version")),
        (("version: 1", "version: true"), Facts("bad-value", line=3, column="version")),
        (("user: Rate these.", "user: 5"), Facts("bad-value", line=6, column="user")),
        (("user: Rate these.", "user: ''"), Facts("missing-value", line=6, column="user")),
        (
            ("user: Rate these.", "user: |-\n  Rate\n  {{ noun|upper }}"),
            Facts("syntax", line=6, column="user", says=("line 2 of its text", "filter")),
        ),
        (("family: rating", "family: direct"), Facts("contradiction", column="family")),
        (("user: Rate these.", "user: [unclosed"), Facts("syntax", line=7)),
        (("user: Rate these.", "user: !!python/object/apply:os.system ['x']"), Facts("syntax")),
        (("user: Rate these.", "user: " + "[" * 5000), Facts("too-large")),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, change: tuple[str, str], facts: Facts) -> None:
    folder = tmp_path / "rating"
    folder.mkdir()
    (folder / "mine.yaml").write_text(GOOD.replace(*change), encoding="utf-8")
    with raises(RecipeError, replace(facts, file="mine.yaml")):
        load_templates("rating", tmp_path)


def test_files_without_a_mapping(tmp_path: Path) -> None:
    for text in ("", "- a\n- b\n", "just words"):
        with raises(RecipeError, Facts("wrong-format", "mine.yaml")):
            load(tmp_path, text)
    with raises(RecipeError, Facts("too-large", "mine.yaml")):
        load(tmp_path, "# " + "x" * 100_000)
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with raises(RecipeError, Facts("encoding", "mine.yaml")):
        load_templates("rating", tmp_path / "mine.yaml")
    with raises(RecipeError, Facts("duplicate", "list-ratings.yaml", column="name")):
        load(tmp_path, GOOD.replace("mine", "list-ratings"), "list-ratings")


def test_nested_aliases(tmp_path: Path) -> None:
    bomb = "user: &a [x, x]\n" + "".join(f"k{i}: &b{i} [*{'a' if i == 0 else f'b{i - 1}'}, *a]\n" for i in range(30))
    with raises(RecipeError, Facts("unknown-key", "mine.yaml", column="k0")):
        load(tmp_path, bomb)


@pytest.mark.parametrize("family", FAMILIES)
def test_shipped_templates(family: str) -> None:
    templates = load_templates(family)
    seen = [template for template in templates.values() if template.use == "seen"]
    unseen = [template for template in templates.values() if template.use == "unseen"]
    assert len(seen) >= 3 and len(unseen) >= 1
    named = [template for template in templates.values() if template.use == "named"]
    assert list(templates.values()) == [*seen, *named, *unseen]
    assert all(name == template.name and template.family == family for name, template in templates.items())
    if family in ("rating", "sequential"):
        assert seen[0].shape == "list" and {template.shape for template in templates.values()} == {"list", "chat"}
    for template in templates.values():
        assert not any(neutralise(part, CONTROL) != part for part in (template.system, template.user, template.lead))
    assert any("history" not in template.names("system", "user") for template in load_templates("direct").values())


@pytest.mark.parametrize(
    ("source", "values"),
    [
        ("{{ item.title }}", {"item": {"title": "Alien"}}),
        ("A {{ item.title }}, {{ item.year }} {{ item.no }}!\n", {"item": {"title": "Up", "year": 2009, "no": None}}),
        ("{{ item.title }}{{ user.name }}", {"item": {"title": ""}, "user": {"name": "\ue0000\ue001 {{ x }}"}}),
        ("{{ item.title }}", {"item": {"title": ["a list"]}}),
        ("{{ item.title }}", {"item": {"name": "no title"}}),
        ("{{ item.title }}", {"item": "no record"}),
        ("{{ item.title }}", {"item": 5}),
    ],
)  # fmt: skip
def test_fast_rendering_equals_jinja(source: str, values: dict[str, Any]) -> None:
    def made(pieces: Callable[[dict[str, object]], Iterator[str]]) -> object:
        ledger = Placeholders()
        try:
            return ledger.segments("".join(pieces({name: ledger.wrap(value) for name, value in values.items()})))
        except (TemplateError, RecipeError, TypeError, ValueError) as error:
            return type(error), str(error)

    text = compile_template(source)
    assert text._plain is not None
    assert made(text.rendered) == made(text.template.generate)
