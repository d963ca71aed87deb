"""The alignment task: held-out items, content of rows and prompts, and no leak through requests."""

from __future__ import annotations

import collections
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
from task_data import (
    example_text,
    load_templates,
    make_dataset,
    make_index,
    make_split,
    make_task,
    prompt_text,
    targets,
)

from llmrec.errors import DataError, ErrorKind, RecipeError
from llmrec.prompts.template import Template
from llmrec.prompts.template import load_templates as read_templates
from llmrec.recipe.schema import AlignmentSection, SequentialSection
from llmrec.tasks.alignment import AlignmentTask
from llmrec.tasks.held_items import alignment_request_id, sample_held_candidates, select_held_items
from llmrec.tasks.sequential import SequentialTask
from llmrec.types import Case, Event, Item, Ranking, Request, Unparsed
from tests.facts import Facts, raises
from tests.tasks.making import make

DATA = make_split(make_dataset(hostile=False))
INDEX = make_index(DATA)
TITLE = {item: entry.title for item, entry in DATA.dataset.items.items()}


def pairs_in(text: str) -> set[str]:
    """Return the items whose title and code are in a text."""
    return {item for item, title in TITLE.items() if title in text and INDEX.encode(item) in text}


def items_in(text: str) -> set[str]:
    """Return the items whose title or code is in a text."""
    return {item for item, title in TITLE.items() if title in text or INDEX.encode(item) in text}


def catalogue(count: int) -> dict[str, Item]:
    return {f"i{n}": Item(item_id=f"i{n}", title=f"Title {n}") for n in range(count)}


def test_held_out_share_has_two_halves() -> None:
    held = select_held_items(catalogue(4000), 0.1, seed=0)
    # 5 standard deviations of a binomial with n = 4000 and p = .05 are 69.
    assert abs(len(held.valid) - 200) < 69 and abs(len(held.test) - 200) < 69
    assert not set(held.valid) & set(held.test)
    assert held.items == {*held.valid, *held.test}
    assert select_held_items(catalogue(4000), 0.1, seed=1).items != held.items
    assert select_held_items(catalogue(50), 0.0, seed=0).items == frozenset()
    assert len(select_held_items(catalogue(50), 1.0, seed=0).items) == 50


def test_a_new_item_moves_no_other() -> None:
    few, many = select_held_items(catalogue(300), 0.2, seed=0), select_held_items(catalogue(600), 0.2, seed=0)
    known = set(catalogue(300))
    assert [item for item in many.valid if item in known] == list(few.valid)
    assert [item for item in many.test if item in known] == list(few.test)
    assert select_held_items(dict(reversed(catalogue(300).items())), 0.2, seed=0) == few


def test_items_of_equal_title_are_held_out_together() -> None:
    twins = {f"{copy}{n}": Item(item_id=f"{copy}{n}", title=f"Title {n}{end}") for n in range(60) for copy, end in
             (("a", ""), ("b", "!"))}  # fmt: skip
    held = select_held_items(twins, 0.5, seed=0)
    for part in (held.valid, held.test):
        assert part and {item[1:] for item in part if item[0] == "a"} == {item[1:] for item in part if item[0] == "b"}
    sets = sample_held_candidates(held, "test", count=6, seed=0).sets
    assert len(sets) == len(held.test)
    answers = {alignment_request_id(item, 0): item for item in held.test}
    for name, drawn in sets.items():
        other = {"a": "b", "b": "a"}[answers[name][0]] + answers[name][1:]
        assert answers[name] in drawn and other not in drawn


def test_too_few_held_out_items_raise_error() -> None:
    with raises(DataError, Facts("too-few", column="tasks.alignment.held_out", says="eval.candidates.count")):
        sample_held_candidates(select_held_items(catalogue(100), 0.1, seed=0), "test", count=20, seed=0)


def test_no_training_row_shows_a_held_out_pair() -> None:
    task = make_task("alignment", DATA)
    shown: set[str] = set()
    for row in islice(task.examples("train"), 2000):
        text = example_text(row)
        assert pairs_in(text) == items_in(text) == {row.pairs[0][1]} and len(row.pairs) == 1
        assert not items_in(text) & task.held.items
        assert row.user_id == "" and row.pairs[0][0] == ""
        shown |= items_in(text)
    assert shown == set(TITLE) - task.held.items and len(task.held.items) > 10


def test_rows_cover_both_directions() -> None:
    task = make_task("alignment", DATA)
    ways: collections.Counter[str] = collections.Counter()
    for row in islice(task.examples("train"), 300):
        (target,) = targets(row)
        item = row.pairs[0][1]
        question = "\n".join(message.text for message in row.messages)
        way = "code" if target == INDEX.encode(item) else "title"
        assert target in (INDEX.encode(item), TITLE[item])
        assert (TITLE[item] in question) == (way == "code") and (INDEX.encode(item) in question) == (way == "title")
        ways[way] += 1
    assert min(ways.values()) > 60 and set(ways) == {"code", "title"}


def test_validation_rows_use_held_out_items() -> None:
    task = make_task("alignment", DATA)
    rows = list(task.examples("valid"))
    assert [row.pairs for row in rows] == [(("", item),) for item in task.held.valid]
    assert [row.template for row in rows[:4]] == [f"alignment/{name}" for name in (
        "code-to-title", "text-to-code", "title-to-code", "code-to-title")]  # fmt: skip
    assert len(list(task.examples("valid", limit=3))) == 3
    with pytest.raises(ValueError, match="test split"):
        next(iter(task.examples("test")))


@pytest.fixture(scope="module")
def task() -> AlignmentTask:
    return make_task("alignment", DATA)  # type: ignore[no-any-return]


def test_request_does_not_reveal_its_item(task: AlignmentTask) -> None:
    cases = task.cases("test")
    assert [str(case.truth) for case in cases] == list(task.held.test) and len(cases) > 8
    for case in cases:
        request = case.request
        assert request.item is None and request.history == () and not request.context
        assert str(case.truth) not in request.id and str(case.truth) not in request.user_id
        assert request.candidates is not None and request.candidates.count(str(case.truth)) == 1
        assert len(set(request.candidates)) == 4
        assert set(request.candidates) <= set(task.held.test)
    # Intervals resample users, so each question needs its own user.
    assert len({case.request.user_id for case in cases}) == len(cases)
    with pytest.raises(ValueError, match="training split"):
        task.cases("train")


def test_candidates_do_not_reveal_the_answer() -> None:
    """Items are negatives equally often, and targets are at any position."""
    held = select_held_items(catalogue(4000), 0.2, seed=0)
    sets = sample_held_candidates(held, "test", count=20, seed=0)
    times = collections.Counter(item for drawn in sets.sets.values() for item in drawn)
    assert set(times) == set(held.test)
    mean = 20.0
    chi2 = sum((times[item] - mean) ** 2 / mean for item in held.test)
    assert chi2 < len(held.test) + 5 * (2 * len(held.test)) ** 0.5
    answers = {alignment_request_id(item, 0): item for item in held.test}
    positions = collections.Counter(drawn.index(answers[name]) for name, drawn in sets.sets.items())
    expected = len(sets.sets) / 20
    # The 99.9 % point at 19 degrees of freedom.
    assert sum((positions[position] - expected) ** 2 / expected for position in range(20)) < 43.8


@pytest.mark.parametrize("name", list(read_templates("alignment")))
def test_prompt_shows_only_one_form(task: AlignmentTask, name: str) -> None:
    template = read_templates("alignment")[name]
    for case in task.cases("test"):
        item, text = str(case.truth), prompt_text(task.prompt(case.request, template=name))
        assert (INDEX.encode(item) in text) != template.answers_with_code
        assert (TITLE[item] in text) == template.answers_with_code
        assert items_in(text) == {item}
        answers = task.continuations(case.request, template=name)
        assert answers == tuple(
            INDEX.encode(each) if template.answers_with_code else TITLE[each] for each in case.request.candidates or ()
        )
        again = task.prompt(replace(case.request, id="mine", item=item), template=template.id)
        assert again == task.prompt(case.request, template=name)


def test_shots_show_training_items_only(task: AlignmentTask) -> None:
    for case in task.cases("test"):
        drawn = task.draw_shots(case.request, 3)
        shown = [event.item_id for window in drawn.windows for event in window.events]
        assert len(set(shown)) == 3 and not set(shown) & task.held.items
        prompt = task.prompt(case.request, template="text-to-code", shots=3)
        assert [message.role for message in prompt.messages] == ["user", "assistant"] * 3 + ["user"]
        assert pairs_in(prompt_text(prompt)) == set(shown)
    # A training item is never a few-shot example of its own question.
    request = Request(id="own", user_id="", item=shown[0])
    everything = len(TITLE) - len(task.held.items) - 1
    assert shown[0] not in [w.events[0].item_id for w in task.draw_shots(request, everything).windows]
    with raises(DataError, Facts("too-few", column="eval.shots.k")):
        task.draw_shots(request, everything + 1)


def test_parses_titles_and_codes(task: AlignmentTask) -> None:
    case = task.cases("test")[0]
    item = str(case.truth)
    titled = task.parse(f"1. {TITLE[item].lower()}\nmore", case.request, template="code-to-title")
    coded = task.parse(INDEX.encode(item), case.request, template="text-to-code")
    assert titled == coded == Ranking(request_id=case.request.id, items=(item,), scores=(1.0,))
    assert task.reward(titled, case) == 1.0
    assert task.parse("no such title", case.request, template="code-to-title") is None
    assert task.parse(TITLE[item], case.request, template="text-to-code") is None
    other = next(each for each in case.request.candidates or () if each != item)
    both = Ranking(request_id="r", items=(other, item), scores=(2.0, 1.0))
    assert task.reward(both, case) == pytest.approx(0.63093)
    assert task.reward(Unparsed(request_id="r", reason="x"), Case(request=case.request, truth=item)) == 0.0


def built(words: dict[str, Template] | None = None, **section: Any) -> AlignmentTask:
    return make(
        AlignmentTask, DATA, AlignmentSection(**section), words or load_templates("alignment"), seed=0, index=INDEX
    )


def test_invalid_use_is_refused(task: AlignmentTask) -> None:
    with raises(RecipeError, Facts("missing-key", column="index", says="index: {scheme: semantic}")):
        make(AlignmentTask, DATA, AlignmentSection(), load_templates("alignment"), seed=0)
    with raises(RecipeError, Facts("too-few", column="tasks.alignment.held_out")):
        built(held_out=1.0)
    with raises(RecipeError, Facts("missing-value", column="candidates", says="llmrec.tasks.held_items")):
        built().cases("test")
    with raises(DataError, Facts("mismatch", column="tasks.alignment")):
        task.cases("valid")
    with raises(DataError, Facts("missing-value", column="item", says="set Request.item")):
        task.prompt(Request(id="q", user_id=""), template="code-to-title")
    with raises(DataError, Facts("missing-value", column="candidates", says="set Request.candidates")):
        task.continuations(Request(id="q", user_id=""), template="code-to-title")
    with raises(RecipeError, Facts("contradiction", "alignment/decode", column="tasks.alignment.templates")):
        built(templates=("decode",))


@pytest.mark.parametrize(
    ("user", "target", "key", "named"),
    [
        ("{{ item.title }}", "{{ item.title }}", None, "item.code"),
        ("{{ item.code }} {{ item.title }}", "{{ item.title }}", "user", "'title'"),
        ("{{ item.code }}{% for f in fields %}{{ f.value }}{% endfor %}", "{{ item.title }}", "user", "'fields'"),
        ("{{ history }} {{ item.title }}", "{{ item.code }}", "user", "'history'"),
        ("{{ item.title }}", "{{ item.code }} {{ item.title }}", "target", "'title'"),
    ],
)
def test_template_cannot_show_its_answer(user: str, target: str, key: str | None, named: str) -> None:
    kind: ErrorKind = "unknown-name" if key else "bad-value"
    with raises(RecipeError, Facts(kind, "alignment/x", column=key, says=named)):
        words = Template("alignment", "x", 1, "seen", "chat", f"Answer this: {user}", target)
        built({"x": words}, eval_templates=())


@pytest.mark.parametrize("name", ["codes-to-title", "titles-to-code"])
def test_fused_rows_use_one_form_for_history_and_one_for_target(name: str) -> None:
    section = SequentialSection(templates=(name,), history=4)
    task = make(SequentialTask, DATA, section, read_templates("sequential"), seed=0, index=INDEX)
    codes = name == "codes-to-title"
    for row in islice(task.examples("train"), 100):
        *past, last = [item for _, item in row.pairs]
        lines = row.messages[-1].text.splitlines()[1:-1]
        assert lines == [INDEX.encode(item) if codes else TITLE[item] for item in past]
        assert targets(row) == [TITLE[last] if codes else INDEX.encode(last)]
        assert pairs_in(example_text(row)) == set()
    history = tuple(Event(item_id=item) for item in ("i01", "i02"))
    request = Request(id="r", user_id="u", history=history, candidates=("i03", "i04"))
    answers = task.continuations(request, template=name)
    assert answers == tuple(TITLE[i] if codes else INDEX.encode(i) for i in ("i03", "i04"))
    result = task.parse(answers[1], request, template=name)
    assert isinstance(result, Ranking) and result.items == ("i04",)
