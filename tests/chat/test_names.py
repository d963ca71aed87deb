"""Words inside titles and names are not requests, negations or ends of clauses."""

from __future__ import annotations

import pytest

from llmrec.chat.calls import Forget, allowed_calls
from llmrec.chat.conversation import Conversation
from llmrec.chat.state import ITEM, State, UserPreference
from llmrec.types import Item
from tests.chat.shelf import conversation

TITLES = (
    "Forget Paris (1995)",
    "The Lift (1983)",
    "Start Over Again (1979)",
    "Instead of Heaven",
    "But I'm a Cheerleader (1999)",
    "Not Another Teen Movie (2001)",
    "Thanks for Sharing",
    "Something Like Happiness",
    "Once More with Feeling",
    "What Do You Know About Me",
    "2001: A Space Odyssey (1968)",
    "After 1990",
    "Horror of Dracula",
    "First Knight",
)
BRANDS = ("Reset", "No Doubt", "Great Value", "Forget Me Not", "Lift", "Thanks Goods", "More Wares")


def talk() -> Conversation:
    return conversation(
        known={
            f"i{n}": Item(
                item_id=f"i{n}",
                title=title,
                fields={"genres": ("Horror", "Comedy")[n % 2], "brand": BRANDS[n % len(BRANDS)], "year": str(1960 + n)},
            )
            for n, title in enumerate(TITLES)
        }
    )


def begun() -> State:
    ban = UserPreference(field="genres", op="not", value="Horror")
    return State(turn=1, profile=(ban,), shown=("i3", "i4", "i5"))


@pytest.mark.parametrize("index", range(len(TITLES)))
def test_words_in_titles_are_no_requests(index: int) -> None:
    held, bare = talk(), TITLES[index].partition(" (")[0]
    reader = held.reader
    assert reader is not None
    for line, op, intents in (
        ("I loved {}.", "is", set()),
        ("something like {}", "is", {"request", "similar"}),
        ("nothing like {}", "not", set()),
    ):
        parsed = reader.read(line.format(bare), begun())
        assert [(wish.field, wish.op, wish.value) for wish in parsed.wishes] == [(ITEM, op, f"i{index}")]
        assert (parsed.intents, parsed.revoked, parsed.positions) == (intents, (), ())


def test_titles_and_brands_do_not_allow_forgetting() -> None:
    held, facts = talk(), talk().tools.facts
    assert held.reader is not None
    for line, expected in (
        ("more please", False),
        ("x" * 201, False),
        ("I loved Forget Paris.", False),
        ("something like The Lift", False),
        ("a chair by Reset, or by Forget Me Not", False),
        ("a comedy in a ski lift that I'll never forget", False),
        ("don't forget that I like comedies", False),
        ("forget the second wish", True),
        ("start over", True),
        ("lift the ban on horror", True),
        ("forget everything but Forget Paris", True),
    ):
        parsed = held.reader.read(line, begun())
        calls = allowed_calls(begun().saying("user", line), facts, parsed.intents)
        assert any(isinstance(call, Forget) for call in calls) == expected, line


@pytest.mark.parametrize("brand", BRANDS)
def test_brands_are_no_requests(brand: str) -> None:
    held = talk()
    other = "Lift" if brand == "Reset" else "Reset"
    replies = [held.answer(begun(), f"something by {brand} or {other}"), held.answer(begun(), f"nothing by {brand}")]
    for reply, expected in zip(replies, ({brand: "is", other: "or"}, {brand: "not"}), strict=True):
        assert {wish.value: wish.op for wish in reply.parsed.wishes} == expected
        assert all(wish.hard for wish in reply.parsed.wishes) and not reply.parsed.revoked
        assert not reply.parsed.intents - {"request"}
        # The earlier ban still holds.
        assert begun().profile[0] in reply.state.profile


def test_instead_in_a_title_replaces_nothing() -> None:
    held = talk()
    first = held.answer(State(), "I'd like a comedy")
    assert UserPreference(field="genres", op="is", value="Comedy", turn=1) in first.state.profile
    then = held.answer(first.state, "I liked Instead of Heaven, something by Reset")
    assert UserPreference(field="genres", op="is", value="Comedy", turn=1) in then.state.profile
    other = held.answer(first.state, "horror instead")
    assert not any(wish.value == "Comedy" for wish in other.state.profile)


def test_forgets_on_request() -> None:
    for line in ("forget everything", "Reset", "reset please", "start over"):
        reply = talk().answer(begun(), line)
        assert reply.calls == (Forget(),) and reply.state.profile == (), line
    kept = talk().answer(begun(), "don't forget everything")
    assert begun().profile[0] in kept.state.profile
