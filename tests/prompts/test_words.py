"""Languages of prompts: their word files, templates that select them, and parsing of answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrec.errors import RecipeError
from llmrec.prompts.template import Template, load_templates
from llmrec.prompts.words import english_words, read_language_words
from llmrec.resources import resource
from llmrec.tasks.ctr import parse_choice
from llmrec.tasks.parsing import parse_number, parse_ranking
from llmrec.types import Probability, Rating, Request
from tests.facts import Facts, raises
from tests.tasks.task_data import make_task

PAGES = sorted(resource("prompts", "languages").glob("*.yaml"))
GERMAN = read_language_words("de")
TEMPLATES = {family: load_templates(family) for family in ("sequential", "direct", "rating", "ctr", "explanation")}
TASK = """family: ctr
name: {name}
version: 1
use: named
shape: chat
language: {language}
user: "{{{{ item.title }}}}?"
target: "{{{{ answer }}}}"
"""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_language_is_parsed(page: Path) -> None:
    words = read_language_words(page.stem)
    yes, no = words.spellings()
    assert yes[0] == words.says_yes and no[0] == words.says_no and not set(yes) & set(no)
    spelt = [*yes, *no]
    assert not [(a, b) for a in spelt for b in spelt if a != b and b.startswith(a)]
    for index, number in enumerate(words.numbers):
        assert parse_number(f"{number}.", 0, 10, words) == index
    for between in words.out_of:
        assert parse_number(f"4 {between} 5", 1, 5, words) == 4 and parse_number(f"4 {between} 10", 1, 5, words) is None
    for joining in words.joining:
        assert parse_ranking(f"B {joining} A", "AB", ["x y", "y z"], words) == [1, 0]
    assert parse_choice(f"{words.answer}: {words.says_no}", (words.says_yes, words.says_no), words) == 1


def test_english_words() -> None:
    assert english_words().spellings() == (("Yes", "yes", "YES", " Yes", " yes"), ("No", "no", "NO", " No", " no"))


@pytest.mark.parametrize("family", list(TEMPLATES))
def test_german_set(family: str) -> None:
    german = [template for template in TEMPLATES[family].values() if template.language == "de"]
    assert german and {template.set for template in german} == {"de"} == {t.name[-2:] for t in german}
    assert {template.use for template in german} == {"named"}
    row = next(iter(make_task(family, templates=("de",)).examples("train")))
    assert TEMPLATES[family][row.template.rpartition("/")[2]].language == "de"


def test_answers_use_the_language_of_the_template() -> None:
    request = Request(id="r", user_id="u00", item="i01", candidates=("i01",))
    task = make_task("ctr", templates=("judge-fit-de",))
    assert task.continuations(request, template="judge-fit-de") == ("Ja", "Nein")
    assert task.continuations(request, template="judge-fit") == ("Yes", "No")
    for text, value in (("Ja.", 1.0), ("Die Antwort lautet: Nein", 0.0), ("Yes", None), ("Keine Ahnung", None)):
        read = task.parse(text, request, template="judge-fit-de")
        assert read == (None if value is None else Probability(request_id="r", value=value)), text
    rating = make_task("rating", templates=("score-one-de",))
    for text, number in (("4 von 5", 4.0), ("4,5", 4.5), ("vier Sterne", 4.0), ("4 von 10", None), ("four", None)):
        read_rating = rating.parse(text, request, template="score-one-de")
        assert (read_rating.value if isinstance(read_rating, Rating) else None) == number, text


def test_german_pointwise_prompt() -> None:
    task = make_task("direct", templates=("after-history-de",))
    assert task.words("after-history-de") == GERMAN and task.words("direct/after-history") == english_words()
    prompt = task.prompt(Request(id="r", user_id="u00", candidates=("i01",)), template="after-history-de", want="yes")
    assert "Ja oder Nein" in prompt.messages[-1].text


def test_words_are_stored_and_hashed() -> None:
    template = TEMPLATES["ctr"]["judge-fit-de"]
    other = Template.of_stored(template.stored() | {"words": GERMAN.model_dump() | {"says_yes": "Jawohl"}})
    assert other.answer({"answer": other.words.answer_word(yes=True)}) == "Jawohl" and other.sha != template.sha
    assert Template.of_stored(template.stored()).sha == template.sha
    # Templates that were stored before languages existed are English.
    old = {
        key: value for key, value in TEMPLATES["ctr"]["judge-fit"].stored().items() if key not in ("words", "language")
    }
    assert Template.of_stored(old) == TEMPLATES["ctr"]["judge-fit"]


def _own(folder: Path, language: str, words: str | None = None) -> Path:
    (folder / "ctr").mkdir()
    (folder / "ctr" / "mine.yaml").write_text(TASK.format(name="mine", language=language), "utf-8")
    if words is not None:
        (folder / "languages").mkdir()
        (folder / "languages" / f"{language}.yaml").write_text(words, "utf-8")
    return folder


def test_custom_language(tmp_path: Path) -> None:
    template = load_templates("ctr", _own(tmp_path, "zh", "language: zh\nsays_yes: 是\nsays_no: 否\n"))["mine"]
    assert template.words.spellings() == (("是", " 是"), ("否", " 否"))
    assert parse_choice("是。", ("是", "否"), template.words) == 0


@pytest.mark.parametrize(
    ("language", "words", "facts"),
    [
        ("dee", None, Facts("unknown-name", "mine.yaml", column="language", line=6, says="did you mean 'de'")),
        ("../../en", None, Facts("unknown-name", "mine.yaml", column="language")),
        ("xx", "language: yy\nsays_yes: a\nsays_no: b\n", Facts("contradiction", "xx.yaml", column="language")),
        ("xx", "language: xx\nsays_yes: a\nsays_no: A\n", Facts("contradiction", "xx.yaml", says="equals says_yes")),
        (
            "xx",
            "language: xx\nsays_yes: a\nsays_no: b\nnumbers: [one]\n",
            Facts("contradiction", "xx.yaml", says="11 words"),
        ),
    ],
)
def test_invalid_languages_are_refused(tmp_path: Path, language: str, words: str | None, facts: Facts) -> None:
    with raises(RecipeError, facts):
        load_templates("ctr", _own(tmp_path, language, words))
