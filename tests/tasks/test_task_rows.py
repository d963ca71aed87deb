from __future__ import annotations

import collections
from itertools import islice
from typing import Any

import polars as pl
import pytest
from task_data import (
    CLASSES,
    EVERY,
    FAMILIES,
    asking,
    example_text,
    load_templates,
    make_candidates,
    make_dataset,
    make_index,
    make_split,
    make_task,
    prompt_text,
    targets,
)

from llmrec.backends.encode import Encoder, answer_pieces
from llmrec.errors import DataError, RecipeError
from llmrec.prompts.template import Template
from llmrec.types import Case, Interaction, Prompt, Ranking, Rating, Request, Text, Unparsed
from tests.conftest import make_tokenizer
from tests.facts import Facts, raises
from tests.tasks.making import make

DATA = make_split()
INDEX = make_index(DATA)
PLAIN = make_split(make_dataset(hostile=False))


def shown_items(text: str) -> set[str]:
    return {f"i{i:02d}" for i in range(60) if f"Film #{i:02d}!" in text or f"on i{i:02d} end" in text}


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, "leave_one_out") for family in FAMILIES),
        *(("direct", kind) for kind in ("last_share", "global_time", "user_disjoint")),
    ],
)
def test_no_training_row_shows_a_held_out_pair(family: str, kind: str) -> None:
    data = PLAIN if kind == "leave_one_out" else make_split(make_dataset(hostile=False), kind=kind)
    task = make_task(family, data)
    for row in islice(task.examples("train"), 600 if kind == "leave_one_out" else 200):
        text = example_text(row)
        forbidden = {item for user, item in data.held_out if user == row.user_id}
        # A held-out item may only be a negative, whose draw does not depend on the held-out items.
        assert shown_items(text) & forbidden <= set(row.negatives)
        assert not shown_items("".join(segment.text for segment in row.answer)) & forbidden
        assert row.pairs and not set(row.pairs) & data.held_out
        trained = {event.item_id for event in data.train_events(row.user_id)}
        assert all(user == row.user_id and item in trained for user, item in row.pairs)
        assert shown_items(text) <= {item for _, item in row.pairs} | set(row.negatives)
        assert family == "direct" or not row.negatives


@pytest.mark.parametrize(
    ("family", "choice"), [*((family, "random") for family in FAMILIES), ("rating", "own"), ("sequential", "similar")]
)
def test_no_shot_shows_a_held_out_pair(family: str, choice: str) -> None:
    task = make_task(family, PLAIN, shot_choice=choice, history=4)
    held = collections.defaultdict(set)
    for user, item in PLAIN.held_out:
        held[user].add(item)
    count = 0
    cases = task.cases("test")[::4]
    for case in cases:
        for name in asking(family):
            drawn = task.draw_shots(case.request, 2)
            plain, shot = (task.prompt(case.request, template=name, shots=k) for k in (0, 2))
            assert len(drawn.windows) == 2
            assert len(shot.messages) == len(plain.messages) + 4
            first = len(plain.messages) - 1
            for index, window in enumerate(drawn.windows):
                pair = shot.messages[first + 2 * index : first + 2 * index + 2]
                assert [message.role for message in pair] == ["user", "assistant"]
                # A held-out item may be among the drawn negatives of an example: see test_task_independence.
                if family != "direct":
                    assert not shown_items("\n".join(m.text for m in pair)) & held[window.user_id]
                train = PLAIN.train_events(window.user_id)
                assert all(event in train for event in window.events)
            assert all(segment.kind != "target" for message in shot.messages for segment in message.segments)
            count += 2
    assert count >= 2 * len(cases) * 4


def test_sequential_rows_have_targets_after_warm_up() -> None:
    task = make_task("sequential", PLAIN, templates=("continue-list",), window=6, warm_up=2)
    for row in islice(task.examples("train"), 200):
        events = PLAIN.train_events(row.user_id)
        length = min(6, len(events))
        items = [item for _, item in row.pairs]
        start = [event.item_id for event in events].index(items[0])
        assert items == [event.item_id for event in events[start : start + length]]
        assert targets(row) == [f"Film #{item[1:]}!\n" for item in items[2:]]
        assert not row.ends_turn
        assert "".join(s.text for s in row.answer) == "".join(f"Film #{item[1:]}!\n" for item in items)


def test_windows_start_everywhere() -> None:
    task = make_task("sequential", PLAIN, templates=("continue-list",), window=4)
    starts = collections.defaultdict(set)
    for row in islice(task.examples("train"), 4000):
        starts[row.user_id].add(row.pairs[0][1])
    for user, seen in starts.items():
        assert len(seen) == max(1, len(PLAIN.train_events(user)) - 3)


def test_rating_rows_have_every_rating_as_target() -> None:
    task = make_task("rating", PLAIN, templates=("list-ratings",))
    for row in islice(task.examples("train"), 100):
        events = PLAIN.train_events(row.user_id)
        assert targets(row) == [f"{event.rating:.0f}\n" for event in events]
        assert len(row.pairs) == len(events)


@pytest.mark.parametrize("family", EVERY)
def test_chat_rows_have_one_target_and_close_the_turn(family: str) -> None:
    for row in islice(make_task(family).examples("train"), 200):
        template = load_templates(family)[row.template.rpartition("/")[2]]
        assert template.use == "seen"
        if template.shape == "chat":
            assert len(targets(row)) == 1 and row.ends_turn and row.messages[-1].role == "user"
        assert all(segment.kind != "target" for message in row.messages for segment in message.segments)


@pytest.mark.parametrize("family", EVERY)
def test_every_seen_template_trains_and_ids_are_unique(family: str) -> None:
    rows = list(islice(make_task(family).examples("train"), 400))
    seen = {t.id for t in load_templates(family).values() if t.use == "seen"}
    assert {row.template for row in rows} == seen
    assert len({row.id for row in rows}) == len(rows)
    assert [row.id for row in make_task(family).examples("train", limit=7)] == [row.id for row in rows[:7]]
    assert list(make_task(family).examples("train", limit=0)) == []
    assert list(islice(make_task(family, seed=1).examples("train"), 20)) != rows[:20]


def test_target_labels_are_uniform() -> None:
    task = make_task("direct", PLAIN)
    counts = collections.Counter(targets(row)[0] for row in islice(task.examples("train"), 2000))
    assert set(counts) == set("ABCDEFGHIJ")
    chi2 = sum((counts[label] - 200) ** 2 / 200 for label in counts)
    assert chi2 < 27.9  # the 99.9 % point at 9 degrees of freedom


@pytest.mark.parametrize("family", EVERY)
def test_row_order_of_the_data_does_not_matter(family: str) -> None:
    once, again = (make_task(family, make_split(make_dataset(shuffled=s)), shot_choice="similar") for s in (1, 2))
    assert list(islice(once.examples("train"), 60)) == list(islice(again.examples("train"), 60))
    assert list(once.cases("test")) == list(again.cases("test"))
    name = next(iter(load_templates(family)))
    for case in once.cases("test")[:10]:
        assert once.prompt(case.request, template=name, shots=2) == again.prompt(case.request, template=name, shots=2)
    reordered = [once.prompt(case.request, template=name, shots=2) for case in reversed(once.cases("test")[:10])]
    assert reordered[::-1] == [once.prompt(c.request, template=name, shots=2) for c in once.cases("test")[:10]]


@pytest.mark.parametrize("family", FAMILIES)
def test_validation_rows_have_the_held_out_target(family: str) -> None:
    task = make_task(family)
    rows = list(task.examples("valid"))
    truth = {held.user_id: held for held in DATA.holdouts("valid")}
    assert len(rows) == len(truth)
    assert len(list(task.examples("valid", limit=3))) == 3
    tests = {(held.user_id, held.item_id) for held in DATA.holdouts("test")}
    for row in rows:
        held: Interaction = truth[row.user_id]
        assert len(targets(row)) == 1
        assert row.pairs[-1] == (held.user_id, held.item_id)
        assert not set(row.pairs) & tests
        if family == "rating":
            assert targets(row) == [f"{held.rating:.0f}\n"]
        if family == "explanation":
            assert targets(row) == [held.text]
    with pytest.raises(ValueError, match="test split"):
        next(iter(task.examples("test")))
    with pytest.raises(ValueError, match="training split"):
        task.cases("train")


@pytest.mark.parametrize("family", FAMILIES)
def test_cases_and_prompts_show_the_known_history(family: str) -> None:
    task = make_task(family, PLAIN, history=3)
    sets = make_candidates(PLAIN)
    for case in task.cases("test"):
        request = case.request
        assert request.history == PLAIN.history(request.user_id, "test")
        if family in ("sequential", "direct"):
            assert request.candidates == sets.sets[request.id] and case.truth in request.candidates
        else:
            assert request.candidates is None and request.item is not None
        for name, template in asking(family).items():
            prompt = task.prompt(request, template=name)
            assert prompt.messages[-1].role == "user"
            assert (prompt.stop is None) == (template.shape == "chat") == (not prompt.answer_prefix)
            latest = {event.item_id for event in request.history[-3:]}
            shown = shown_items(prompt_text(prompt)) - set(request.candidates or ()) - {request.item}
            assert shown <= latest
            if "history" in template.names("system", "user") and name != "after-latest":
                assert shown == latest - set(request.candidates or ())
            if family == "explanation":
                assert str(case.truth) not in prompt_text(prompt)
            assert task.prompt(request, template=template.id) == prompt


@pytest.mark.parametrize(
    ("family", "name"), [("sequential", "continue-list"), ("rating", "list-ratings"), ("ctr", "list-likes")]
)
def test_list_validation_rows_begin_with_prompt_tokens(family: str, name: str) -> None:
    """They use the prompt tokens of evaluation, with which a validation loss of 4.309 was .454."""
    task = make_task(family, PLAIN, templates=(name,))
    encoder = Encoder(make_tokenizer(), max_length=4096)
    requests = {
        f"{held.user_id}|{held.item_id}": Request(
            id="x", user_id=held.user_id, history=tuple(PLAIN.history(held.user_id, "valid")), item=held.item_id
        )
        for held in PLAIN.holdouts("valid")
    }
    count = 0
    for example in task.examples("valid"):
        pair = example.id.rpartition("/valid/")[2]
        prompt = encoder.prompt(task.prompt(requests[pair], template=name))
        row = encoder.row(example)
        assert list(row.ids[: len(prompt)]) == prompt
        assert set(row.labels[: len(prompt)]) == {-100} and -100 not in row.labels[len(prompt) :]
        count += 1
    assert count > 10


def test_list_training_rows_begin_with_the_prompt() -> None:
    """Both are split into the same segments, targets and others, so that their tokens agree."""
    for family, name in (("sequential", "continue-list"), ("rating", "list-ratings")):
        task = make_task(family, PLAIN, templates=(name,), **({"window": 50} if family == "sequential" else {}))
        for row in islice(task.examples("train"), 40):
            *past, last = PLAIN.train_events(row.user_id)
            request = Request(
                id="x", user_id=row.user_id, history=tuple(past), item=last.item_id, candidates=(last.item_id,)
            )
            prompt: Prompt = task.prompt(request, template=name)
            if len(past) > task._section.history:
                continue
            assert prompt.messages == row.messages
            begun = row.answer[: len(prompt.answer_prefix)]
            assert answer_pieces(begun) == answer_pieces(prompt.answer_prefix)
            (rest,) = row.answer[len(prompt.answer_prefix) :]
            assert prompt.stop is not None
            texts = {text + prompt.stop for text in task.continuations(request, template=name)}
            assert rest.text in texts


def test_continuations() -> None:
    case = make_task("sequential", PLAIN).cases("test")[0]
    sequential, direct = make_task("sequential", PLAIN), make_task("direct", PLAIN)
    titles = tuple(f"Film #{item[1:]}!" for item in case.request.candidates)
    assert sequential.continuations(case.request, template="continue-list") == titles
    assert direct.continuations(case.request, template="shortlist") == tuple("ABCDEFGHIJ")
    catalogue = Request(id="w", user_id="u00", history=())
    assert len(sequential.continuations(catalogue, template="next-title")) == len(sequential.catalogue) == 60
    assert make_task("rating").continuations(case.request, template="rate-next") == ("1", "2", "3", "4", "5")
    many = Request(id="m", user_id="u00", candidates=tuple(sorted(PLAIN.dataset.items))[:30])
    labels = direct.continuations(many, template="shortlist")
    assert labels[:2] == ("01", "02") and len(labels) == 30
    assert not any(a != b and b.startswith(a) for a in labels for b in labels)


def test_hostile_titles_stay_on_one_line() -> None:
    for family in EVERY:
        task = make_task(family)
        for case in task.cases("test")[:8]:
            for name in asking(family):
                text = prompt_text(task.prompt(case.request, template=name, shots=1))
                assert "\ue000" not in text and "\nuser: forged" not in text and " 49" not in text


def test_invalid_use_is_refused() -> None:
    task = make_task("rating")
    with raises(RecipeError, Facts("unknown-name", says="'rate-nxt' (did you mean 'rate-next'?)")):
        task.prompt(task.cases("test")[0].request, template="rate-nxt")
    with raises(
        RecipeError, Facts("contradiction", "rating/judge-one", column="tasks.rating.templates", says="eval_templates")
    ):
        make_task("rating", templates=("judge-one",))
    assert make_task("rating", eval_templates=("judge-one",)).eval_templates == ("judge-one",)
    assert task.eval_templates == ("list-ratings",)
    with raises(DataError, Facts("missing-value", column="item", says="set Request.item")):
        task.prompt(Request(id="q", user_id="u00"), template="rate-next")
    with raises(DataError, Facts("unknown-name", "small", says="'i99'")):
        task.prompt(Request(id="q", user_id="u00", item="i99"), template="rate-next")
    with raises(DataError, Facts("too-few", column="eval.shots.k")):
        task.prompt(task.cases("test")[0].request, template="rate-next", shots=41)
    with raises(
        RecipeError, Facts("missing-value", column="candidates", says="llmrec.data.candidates.sample_candidates")
    ):
        make_task("direct", stored=False).cases("test")
    with raises(DataError, Facts("missing-value", column="candidates", says="set Request.candidates")):
        make_task("direct").prompt(Request(id="q", user_id="u00"), template="shortlist")
    with raises(RecipeError, Facts("unsupported", column="tasks.sequential", says="'likelihood'")):
        make_task("sequential").prompt(task.cases("test")[0].request, template="next-title", want="ranking")
    with raises(DataError, Facts("mismatch", column="tasks.sequential", says="'u02|i04'")):
        make_task("sequential").cases("valid")
    with raises(RecipeError, Facts("bad-value", column="tasks.sequential.window", says="at least 3")):
        make_task("sequential", window=2, warm_up=2)


def test_data_without_ratings_texts_or_enough_items() -> None:
    full = make_dataset()
    bare = full.restrict(full.interactions.with_columns(rating=pl.lit(None, pl.Float64), text=pl.lit(None, pl.String)))
    data = make_split(bare)
    with raises(DataError, Facts("missing-column", "small", column="rating", says="data.columns.rating")):
        make_task("rating", data)
    with raises(DataError, Facts("missing-column", "small", column="text", says="data.columns.text")):
        make_task("explanation", data)
    assert len(make_task("sequential", data).cases("test")) == len(data.holdouts("test"))
    data = make_split(make_dataset(items=26))
    task = make_task("direct", data, stored=False)
    with raises(DataError, Facts("too-few", column="eval.candidates.count", says="at most 19")):
        list(islice(task.examples("train"), 200))


def own_template(family: str, user: str, target: str, **more: Any) -> dict[str, Template]:
    words = {"use": "seen", "shape": "chat", "user": user, "target": target, **more}
    return {"x": Template(family=family, name="x", version=1, **words)}


@pytest.mark.parametrize("family", ["direct", "explanation", "review", "alignment"])
def test_list_templates_are_refused(family: str) -> None:
    task, section = CLASSES[family]
    with raises(RecipeError, Facts("unsupported", f"{family}/x", column="shape", says="shape: chat")):
        wrong = own_template(family, "u", "t", shape="list", tail="\n")
        make(task, DATA, section(eval_templates=()), wrong, seed=0, index=INDEX)


@pytest.mark.parametrize(("family", "user", "target"), [
    ("rating", "{{ rating }}", "{{ rating }}"), ("sequential", "{{ item.title }}", "{{ item.title }}"),
    ("direct", "{{ label }}", "{{ label }}"), ("explanation", "{{ text }}", "{{ text }}"),
    ("explanation", "{{ rating }}", "{{ rating }}: {{ text }}"), ("explanation", "{{ review }}", "{{ text }}"),
    ("review", "{{ headline }}", "{{ headline }}"), ("stars", "{{ rating }}", "{{ rating }}"),
])  # fmt: skip
def test_template_cannot_show_its_answer(family: str, user: str, target: str) -> None:
    task, section = CLASSES[family]
    with raises(RecipeError, Facts("unknown-name", f"{family}/x", column="user")):
        make(task, DATA, section(), own_template(family, user, target), seed=0)


def test_rewards() -> None:
    rating, direct, text = make_task("rating"), make_task("direct"), make_task("explanation")
    request = Request(id="r", user_id="u00")
    assert rating.reward(Rating(request_id="r", value=4.0), Case(request=request, truth=4.0)) == 1.0
    assert rating.reward(Rating(request_id="r", value=1.0), Case(request=request, truth=5.0)) == 0.0
    assert rating.reward(Rating(request_id="r", value=3.0), Case(request=request, truth=5.0)) == 0.5
    assert rating.reward(Rating(request_id="r", value=50.0), Case(request=request, truth=5.0)) == 0.0
    case = Case(request=request, truth="b")
    assert direct.reward(Ranking(request_id="r", items=("b", "a"), scores=(2.0, 1.0)), case) == 1.0
    assert direct.reward(Ranking(request_id="r", items=("a", "b"), scores=(2.0, 1.0)), case) == pytest.approx(0.63093)
    tied = direct.reward(Ranking(request_id="r", items=("a", "b"), scores=(1.0, 1.0)), case)
    assert tied == pytest.approx((1 + 0.63093) / 2, abs=1e-5)
    assert direct.reward(Ranking(request_id="r", items=("a",), scores=(1.0,)), case) == 0.0
    words = Case(request=request, truth="quiet and easy")
    assert text.reward(Text(request_id="r", text="Easy, and quiet!"), words) == 1.0
    assert text.reward(Text(request_id="r", text="easy one"), words) == pytest.approx(0.4)
    assert text.reward(Text(request_id="r", text=""), words) == 0.0
    for task in (rating, direct, text):
        assert task.reward(Unparsed(request_id="r", reason="x"), case) == 0.0
