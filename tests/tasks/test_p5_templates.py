"""The template set `p5`: equivalents of P5's templates, what each shows and writes, and no leaks."""

from __future__ import annotations

import collections
import re
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any

import pytest
from task_data import CLASSES, example_text, make_candidates, make_dataset, make_index, make_split, targets

from llmrec.backends.fake import FakeBackend
from llmrec.data.split import SplitDataset, with_review_part
from llmrec.errors import DataError, RecipeError
from llmrec.prompts.template import Template
from llmrec.prompts.template import load_templates as read_templates
from llmrec.strategies.asking import Prompting
from llmrec.strategies.pointwise import LikelihoodRanker
from llmrec.tasks.direct import asks_for, is_strategy_supported
from llmrec.tasks.rating import is_training_only
from llmrec.types import Example, Probability, Ranking
from tests.facts import Facts, raises
from tests.tasks.making import make

FAMILIES = ("rating", "ctr", "sequential", "direct", "explanation", "review", "stars")
PARTS = {"explanation": "sentence", "review": "headline"}

# P5, RecSys 2022, `all_amazon_templates.py`: number, arguments of the question -> arguments of the answer.
AMAZON = """
1-1 user_id item_id -> star; 1-2 user_id title -> star; 1-3 user_id item_id star -> yes/no
1-4 user_id item_id -> like/dislike; 1-5 user_id item_id title -> star; 1-6 name item_id -> star
1-7 name title -> star; 1-8 name star title -> yes/no; 1-9 name title -> like/dislike; 1-10 name title -> star
2-1 user_id history -> item_id; 2-2 user_id history -> item_id; 2-3 user_id history -> item_id
2-4 name history -> item_id; 2-5 name history -> item_id; 2-6 name history -> item_id
2-7 user_id history candidates -> item_id; 2-8 name history candidates -> item_id
2-9 user_id history candidates -> item_id; 2-10 name history candidates -> item_id
2-11 user_id history item_id -> yes/no; 2-12 name history item_id -> yes/no; 2-13 name history -> item_id
3-1 user_id title -> text; 3-2 headline user_id item_id -> text; 3-3 user_id star title -> text
3-4 name title -> text; 3-5 headline name title -> text; 3-6 name star item_id -> text
3-7 feature user_id item_id -> star text; 3-8 name item_id -> star text; 3-9 feature user_id title -> text
3-10 feature name title -> text; 3-11 feature star user_id item_id -> text; 3-12 feature star name item_id -> text
4-1 user_id review -> headline; 4-2 user_id review -> star; 4-3 name review -> headline; 4-4 name review -> star
5-1 user_id item_id -> yes/no; 5-2 item_id name -> yes/no; 5-3 name title -> yes/no; 5-4 user_id title -> yes/no
5-5 name candidates -> item_id; 5-6 name candidates -> item_id; 5-7 user_id candidates -> item_id
5-8 user_id candidates -> item_id
"""
# Brand and price are item fields here, like all other data of an item.
CROSS_DOMAIN = """
Z-1 user_id title fields -> like/dislike; Z-2 title fields name -> star; Z-3 user_id title fields -> star
Z-4 name title fields -> like/dislike; Z-5 name title fields -> text; Z-6 feature user_id star title fields -> text
Z-7 title name -> text
"""
# `all_yelp_templates.py` where it differs from Amazon's: no headline is shown or written.
YELP = """
3-1 user_id title -> text; 3-2 user_id star title -> text; 3-3 name title -> text; 3-4 name star item_id -> text
3-5 feature user_id item_id -> star text; 3-6 name item_id -> star text; 3-7 feature user_id title -> text
3-8 feature name title -> text; 3-9 feature star user_id item_id -> text; 3-10 feature star name item_id -> text
4-1 user_id review -> star; 4-2 user_id review -> star; 4-3 name review -> star
"""
HELD_OUT = {"p5": {"1-10", "2-13", "3-12", "4-4", "5-8"}, "p5-yelp": {"1-10", "2-13", "3-10", "4-3", "5-8"}}
_SAME = {"user_name": "name", "rating": "star", "stars": "star"}
_OURS = {"noun", "scale_low", "scale_high", "want"}


load_templates = cache(read_templates)


def table(text: str) -> dict[str, tuple[frozenset[str], str]]:
    rows = (row.partition(" ") for row in re.split("\n|; ", text) if row)
    return {
        number: (frozenset(shown.split()), wrote)
        for number, shown, wrote in ((n, *rest.split(" -> ")) for n, _, rest in rows)
    }


def template_set(name: str) -> dict[str, Template]:
    templates = [
        template for family in FAMILIES for template in load_templates(family).values() if name in template.sets
    ]
    numbered = {template.sets[name]: template for template in templates}
    assert len(numbered) == len(templates)
    return numbered


def shown(template: Template) -> frozenset[str]:
    """Return what a prompt shows, in the terms of the tables; the code of an item counts as its id."""
    names = set()
    for name in template.names("system", "user") - _OURS:
        fields = re.findall(r"\bitem\.(\w+)", template.user) if name == "item" else [_SAME.get(name, name)]
        names |= {"item_id" if field == "code" else field for field in fields}
    return frozenset(names)


def wrote(template: Template) -> str:
    names = template.names("target")
    if "answer" in names:
        return "/".join(template.answer({"answer": answer}).casefold() for answer in ("Yes", "No"))
    if "item" in names:
        assert template.answers_with_code
        return "item_id"
    return " ".join(_SAME.get(name, name) for name in ("rating", "text", "headline") if name in names)


def test_amazon_set_matches_p5() -> None:
    templates, expected = template_set("p5"), table(AMAZON + CROSS_DOMAIN)
    assert len([number for number in templates if number[0] != "Z"]) == 47
    assert len([number for number in templates if number[0] == "Z"]) == 7
    counts = collections.Counter(number.partition("-")[0] for number in templates)
    assert counts == {"1": 10, "2": 13, "3": 12, "4": 4, "5": 8, "Z": 7}
    assert {number: (shown(template), wrote(template)) for number, template in templates.items()} == expected


def test_yelp_set_matches_p5() -> None:
    templates = template_set("p5-yelp")
    kept = {number: row for number, row in table(AMAZON).items() if number[0] in "125"}
    assert len(templates) == 44
    assert {number: (shown(template), wrote(template)) for number, template in templates.items()} == kept | table(YELP)
    assert not any("headline" in template.names("user", "target") for template in templates.values())
    (extra,) = [template for template in templates.values() if template.set == "p5-yelp"]
    assert extra.id == "stars/user-text-stars" and templates["4-2"].user != extra.user


@pytest.mark.parametrize("name", HELD_OUT)
def test_one_template_of_each_family_is_held_out(name: str) -> None:
    templates = template_set(name)
    unseen = {number for number, template in templates.items() if template.use == "unseen"}
    assert unseen == HELD_OUT[name] | {number for number in templates if number[0] == "Z"}


def test_leaking_templates_are_marked() -> None:
    for number, template in template_set("p5").items():
        leaking = shown(template) & {"headline", "feature", "star"}
        # A yes/no question about a number of stars has to show these stars.
        assert bool(template.leak) == (bool(leaking) and "yes/no" not in wrote(template)), number


def test_second_set_needs_a_number() -> None:
    template = template_set("p5")["3-3"]
    assert template.sets == {"p5": "3-3", "p5-yelp": "3-2"}
    with raises(RecipeError, Facts("bad-value", column="also", says="'p5-yelp 3-2'")):
        replace(template, also="p5-yelp")


@cache
def data() -> SplitDataset:
    dataset = make_dataset(hostile=False)
    users = {user: {"name": f"Name of {user}"} for user in sorted(set(dataset.interactions["user_id"]))}
    reviews = {
        pair: replace(review, feature=f"feature {' '.join(pair)}", sentence=f"sentence {' '.join(pair)}")
        for pair, review in dataset.reviews.items()
    }
    # Features are set here, not derived from phrases as by a split.
    result = make_split(replace(dataset, users=users))
    return replace(result, dataset=replace(result.dataset, reviews=reviews))


def used(family: str) -> SplitDataset:
    result = data()
    return with_review_part(result, PARTS[family]) if family in PARTS else result  # type: ignore[arg-type]


def task_of(family: str, templates: tuple[str, ...] = ("p5",), **section: Any) -> Any:
    """Return a task that trains on templates, and evaluates with those that its strategies support."""
    task, kind = CLASSES[family]
    split = used(family)
    if family == "direct":
        section = {
            "strategies": ("likelihood", "pointwise-yes"),
            "eval_templates": ("name-among", "item-name"),
        } | section
    if family == "rating":
        section = {"eval_templates": ("name-item",)} | section
    stored = make_candidates(split) if family in ("direct", "sequential") else None
    return make(
        task, split, kind(templates=templates, **section), load_templates(family), seed=0, candidates=stored,
        index=make_index(split),
    )  # fmt: skip


@cache
def training_rows(family: str, name: str = "p5", count: int = 500) -> tuple[Example, ...]:
    return tuple(islice(task_of(family, (name,)).examples("train"), count))


def template_of(row: Example) -> Template:
    family, _, name = row.template.partition("/")
    return load_templates(family)[name]


@pytest.mark.parametrize(("family", "name"), [*((family, "p5") for family in FAMILIES), ("stars", "p5-yelp")])
def test_named_set_trains_its_seen_templates(family: str, name: str) -> None:
    templates = [template for template in load_templates(family).values() if name in template.sets]
    expected = {template.id for template in templates if template.use != "unseen"}
    assert {row.template for row in training_rows(family, name)} == expected


def test_set_trains_only_if_named() -> None:
    for family in ("direct", "sequential"):
        assert {template_of(row).use for row in islice(task_of(family, ()).examples("train"), 200)} == {"seen"}
    with raises(RecipeError, Facts("unknown-name", says="'p5-yelp'")):
        task_of("review", ("p5-yelp",))


def test_templates_with_missing_data_are_left_out() -> None:
    """Templates with codes need an index, and templates with parts of reviews need reviews."""
    task, kind = CLASSES["direct"]
    section = kind(templates=("p5",), eval_templates=("name-title",), strategies=("pointwise-yes",))
    made = make(task, data(), section, load_templates("direct"), seed=0)
    assert {row.template for row in islice(made.examples("train"), 100)} == {"direct/name-title", "direct/user-title"}
    task, kind = CLASSES["sequential"]
    with raises(RecipeError, Facts("unsupported", says=("'p5'", "index: {scheme: semantic}"))):
        make(task, data(), kind(templates=("p5",)), load_templates("sequential"), seed=0)
    bare = make_split(replace(data().dataset, reviews={}))
    task, kind = CLASSES["explanation"]
    with raises(RecipeError, Facts("unsupported", says=("'p5'", "amazon-reviews"))):
        make(task, bare, kind(templates=("p5",)), load_templates("explanation"), seed=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_training_row_shows_a_held_out_pair(family: str) -> None:
    split, index = used(family), make_index(used(family))
    codes = {index.encode(item): item for item in split.dataset.items}
    held = collections.defaultdict(set)
    for user, item in split.held_out:
        held[user].add(item)
    rows = training_rows(family)
    count = 0
    for row in rows:
        text = example_text(row)
        items = {codes[code] for code in re.findall(r"<a_\d+><b_\d+>", text)} | set(re.findall(r"\bi\d\d\b", text))
        items |= {f"i{number}" for number in re.findall(r"Film #(\d\d)!", text)}
        assert items & held[row.user_id] <= set(row.negatives), row.id
        assert not set(row.pairs) & split.held_out
        trained = {event.item_id for event in split.train_events(row.user_id)}
        assert {user for user, _ in row.pairs} <= {row.user_id} and {item for _, item in row.pairs} <= trained
        count += bool(items)
    # Prompts about a review show no item, but the text of the review names it here.
    assert count == len(rows)


def test_yes_and_no_are_equally_frequent() -> None:
    for family, count in (("rating", 1000), ("direct", 1500)):
        counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for row in training_rows(family, count=count):
            if "answer" in template_of(row).names("target"):
                counts[row.template][targets(row)[0]] += 1
        assert len(counts) == {"rating": 2, "direct": 6}[family]
        for template, answers in counts.items():
            total = answers.total()
            assert set(answers) == {"Yes", "No"} and total > 60
            # 4.5 standard deviations of a fair coin.
            assert abs(answers["Yes"] - total / 2) < 4.5 * (total**0.5) / 2, (template, answers)


def test_only_yes_shows_the_true_rating() -> None:
    split = data()
    true = {(user, event.item_id): event.rating for user in split.users() for event in split.train_events(user)}
    seen = collections.Counter()
    for row in training_rows("rating", count=1000):
        if not is_training_only(template_of(row)):
            continue
        (pair,) = row.pairs
        (stars,) = re.findall(r"(\d) stars", row.messages[-1].text)
        assert (float(stars) == true[pair]) == (targets(row) == ["Yes"])
        seen[stars] += 1
    assert set(seen) == set("12345")


def test_no_rows_show_items_outside_training() -> None:
    split, index = data(), make_index(data())
    codes = {index.encode(item): item for item in split.dataset.items}
    answers, held = collections.Counter(), 0
    for row in training_rows("direct", count=1500):
        template = template_of(row)
        if asks_for(template) != "yes":
            continue
        text = row.messages[-1].text
        past = {item for _, item in row.pairs} if targets(row) == ["No"] else {item for _, item in row.pairs[:-1]}
        items = {codes[code] for code in re.findall(r"<a_\d+><b_\d+>", text)}
        (target,) = (items | {f"i{number}" for number in re.findall(r"Film #(\d\d)!", text)}) - past
        trained = {event.item_id for event in split.train_events(row.user_id)}
        assert (target in trained) == (targets(row) == ["Yes"])
        assert row.negatives == (() if targets(row) == ["Yes"] else (target,))
        held += (row.user_id, target) in split.held_out
        assert past <= trained
        answers[targets(row)[0]] += 1
    assert min(answers.values()) > 200 and held > 5


def test_validation_rows_have_both_answers() -> None:
    for family, name in (("direct", "item-name"), ("rating", "whether-user-item")):
        rows = list(task_of(family, (name,)).examples("valid"))
        held = {(each.user_id, each.item_id) for each in data().holdouts("valid")}
        answers = collections.Counter(targets(row)[0] for row in rows)
        assert len(rows) == len(held) and min(answers["Yes"], answers["No"]) > len(rows) / 5
        assert all(set(row.pairs) <= held for row in rows)


@pytest.mark.parametrize("family", ["sequential", "direct"])
def test_likelihood_ranks_all_candidates(family: str) -> None:
    index = make_index(data())
    for template in load_templates(family).values():
        if "p5" not in template.sets or wrote(template) != "item_id":
            continue
        strategies = {"strategies": ("likelihood",)} if family == "direct" else {}
        task = task_of(family, (), eval_templates=(template.name,), **strategies)
        cases = task.cases("test")[:8]
        best = {case.request.user_id: index.encode(str(case.truth)) for case in cases}

        def prefer(text: str, candidate: str, best: dict[str, str] = best) -> float:
            user = next(user for user in best if f"ser {user}" in text or f"Name of {user}" in text)
            return 0.0 if candidate == best[user] else -5.0 - (sum(map(ord, candidate)) % 97) / 100

        asker = Prompting(backend=FakeBackend(prefer=prefer), task=task, template=template.name)
        answers = LikelihoodRanker(asker).answer([case.request for case in cases])
        for case, answer in zip(cases, answers, strict=True):
            assert isinstance(answer, Ranking) and answer.items[0] == case.truth
            assert sorted(answer.items) == sorted(case.request.candidates)
            assert task.reward(answer, case) == 1.0
            parsed = task.parse(index.encode(str(case.truth)), case.request, template=template.name)
            assert isinstance(parsed, Ranking) and parsed.items == (case.truth,)
            assert task.parse("nothing of that", case.request, template=template.name) is None


def test_yes_templates_take_a_single_candidate() -> None:
    for template in load_templates("direct").values():
        if "p5" not in template.sets or asks_for(template) != "yes":
            continue
        task = task_of("direct", (), eval_templates=(template.name,), strategies=("pointwise-yes",))
        request = task.cases("test")[0].request
        single = replace(request, candidates=request.candidates[:1])
        assert task.continuations(single, template=template.name) == ("Yes", "No")
        assert task.parse("No.", single, template=template.name) == Probability(request_id=single.id, value=0.0)
        with raises(DataError, Facts("bad-value", column="candidates")):
            task.prompt(request, template=template.name)


def test_like_and_dislike_answers() -> None:
    task = task_of("ctr")
    assert {targets(row)[0] for row in training_rows("ctr")} == {"like", "dislike"}
    case = task.cases("test")[0]
    assert task.continuations(case.request, template="user-item") == ("like", "dislike")
    for text, value in (("like", 1.0), ("Dislike.", 0.0), ("dislike", 0.0), ("like or dislike", None), ("Yes", None)):
        answer = task.parse(text, case.request, template="user-item")
        assert (answer.value if isinstance(answer, Probability) else None) == value


@pytest.mark.parametrize(
    ("template", "strategies", "key", "says"),
    [
        ("name-among", ("label", "list"), "tasks.direct.strategies", ("label, list", "add likelihood")),
        ("item-name", ("label",), "tasks.direct.strategies", ("label", "add pointwise-yes")),
        ("item-name", ("pointwise-yes", "likelihood"), None, ("'likelihood'", "use 'pointwise-yes'")),
        ("shortlist", ("label", "likelihood"), None, ("'likelihood'", "use 'label'")),
        ("name-among", ("likelihood", "pointwise-yes"), None, ("'pointwise-yes'", "use 'likelihood'")),
    ],
)
def test_unsuitable_strategies_are_refused(
    template: str, strategies: tuple[str, ...], key: str | None, says: tuple[str, ...]
) -> None:
    with raises(RecipeError, Facts("contradiction", f"direct/{template}", column=key, says=says)):
        task_of("direct", (), eval_templates=(template,), strategies=strategies)


def test_templates_and_their_strategies() -> None:
    templates = load_templates("direct")
    task = task_of(
        "direct",
        eval_templates=("user-among", "user-title", "shortlist"),
        strategies=("label", "likelihood", "pointwise-yes"),
    )
    assert task.eval_templates == ("user-among", "user-title", "shortlist")
    for name, expected in (("user-among", [False, True, False]), ("user-title", [False, False, True])):
        assert [
            is_strategy_supported(templates[name], each) for each in ("label", "likelihood", "pointwise-yes")
        ] == expected
    assert [is_strategy_supported(templates["shortlist"], each) for each in ("label", "likelihood")] == [True, False]
    request = task.cases("test")[0].request
    for want in ("ranking", "yes"):
        with raises(RecipeError, Facts("contradiction", "direct/user-among", says="'likelihood'")):
            task.prompt(replace(request, candidates=request.candidates[:1]), template="user-among", want=want)
    with raises(RecipeError, Facts("contradiction", "direct/user-title", says="'pointwise-yes'")):
        task.prompt(replace(request, candidates=request.candidates[:1]), template="user-title", want="ranking")


def test_training_only_template_is_not_evaluated() -> None:
    with raises(
        RecipeError,
        Facts("contradiction", "rating/whether-name-title", column="tasks.rating.eval_templates", says="name-item"),
    ):
        task_of("rating", eval_templates=("whether-name-title",))
    task = task_of("rating")
    with raises(
        RecipeError,
        Facts("contradiction", "rating/whether-user-item", column="tasks.rating.eval_templates", says="name-item"),
    ):
        task.prompt(task.cases("test")[0].request, template="whether-user-item")


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        (
            {"target": "{% if answer == 'Yes' %}sure{% else %}never{% endif %}"},
            Facts("bad-value", "direct/own", column="target", says="{{ answer }}"),
        ),
        (
            {"user": "{% for c in candidates %}{{ c.title }}{% endfor %} {{ item.title }}?"},
            Facts("unknown-name", "direct/own", column="user", says="'candidates'"),
        ),
        ({"target": "{{ item.title }}"}, Facts("unknown-name", "direct/own", column="user", says="'item'")),
    ],
)
def test_direct_template_cannot_show_its_answer(changes: dict[str, str], facts: Facts) -> None:
    """A prompt about one item lists no items, and a prompt whose answer is the item does not name it."""
    template = replace(load_templates("direct")["name-title"], name="own", **changes)
    task, kind = CLASSES["direct"]
    with raises(RecipeError, facts):
        make(task, data(), kind(), {**load_templates("direct"), "own": template}, seed=0)
