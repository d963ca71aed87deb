"""Conversations: constraints that hold until revoked, the profile, catalogue items only, and transcripts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from llmrec.answer.rules import Quota, Rules
from llmrec.chat import transcripts
from llmrec.chat.calls import Explain, Filter, Forget, Search, Show, is_ending_call
from llmrec.chat.conversation import Conversation, Reply
from llmrec.chat.facts import Facts
from llmrec.chat.managers import RandomManager, RuleManager
from llmrec.chat.simulator import (
    MIN_TITLE_SIMILARITY,
    SimulatedUser,
    has_near_title,
    sample_user_knowledge,
    simulate_conversation,
)
from llmrec.chat.state import (
    INFERRED_WISH_TURNS,
    ITEM,
    MAX_PROFILE_WISHES,
    MAX_TURNS,
    State,
    UserPreference,
    drop_expired_preferences,
    merge_preferences,
    relax_oldest_constraint,
)
from llmrec.chat.tools import Tools
from llmrec.errors import DataError, ErrorKind
from llmrec.types import Item
from tests.chat.shelf import MadeLists, conversation, items
from tests.facts import Facts as Expected
from tests.facts import raises


def replies_to(talk: Conversation, *lines: str, state: State | None = None) -> list[Reply]:
    """Send some lines and return the replies."""
    state, replies = state or State(), []
    for line in lines:
        replies.append(talk.answer(state, line))
        state = replies[-1].state
    return replies


def genres(reply: Reply) -> list[set[str]]:
    return [set(items()[name].fields["genres"].split(", ")) for name in reply.items]


def test_bans_hold_until_revoked() -> None:
    talk = conversation()
    first = "Please something, but not horror"
    more = ("more please", "I loved The Cellar Door", "a thriller", "something like number 1", "I have seen these")
    replies = replies_to(talk, first, *more, "from the eighties", "sci-fi instead", "anything else?")
    assert all("Horror" not in each for reply in replies for each in genres(reply))
    assert all(reply.items for reply in replies[:3])
    (again,) = replies_to(talk, "horror is fine again", state=replies[-1].state)
    assert any("Horror" in each for each in genres(again))
    assert not any(wish.op == "not" for wish in again.state.profile if wish.field == "genres")


def test_request_for_banned_value_is_explained() -> None:
    talk = conversation()
    banned, requested, lifted, after = replies_to(
        talk, "no horror", "a horror film please", "I don't mind horror", "a horror film please"
    )
    message = "You did not want Horror. Say that it is fine again to see some."
    assert message not in banned.text and message in requested.text and message not in after.text
    assert not any("Horror" in each for each in genres(requested)) and lifted.parsed.revoked == (("genres", "Horror"),)
    assert any("Horror" in each for reply in (lifted, after) for each in genres(reply))


def test_ban_narrows_a_search() -> None:
    talk = conversation()
    first, narrowed, more, other, banned = replies_to(
        talk, "something with a station", "no horror please", "not from before 1990", "a drama please",
        "nothing by Cy Marsh",
    )  # fmt: skip
    assert {"f03", "f08"} <= set(first.items) and first.state.query == "station"
    # Shown items are not repeated, and no other item contains the word: the list continues without it.
    assert [each.calls[0] for each in (narrowed, more)] == [Search(text="station", k=50)] * 2
    assert other.state.query == "" and not any(isinstance(call, Search) for call in banned.calls)
    assert replies_to(talk, "forget everything", state=first.state)[0].state.query == ""


@pytest.mark.parametrize(
    ("line", "wishes"),
    [
        ("I'd like a comedy", {("genres", "is", "Comedy", True)}),
        ("no musicals or horror please", {("genres", "not", "Musical", True), ("genres", "not", "Horror", True)}),
        ("comedies or thrillers", {("genres", "is", "Comedy", True), ("genres", "or", "Thriller", True)}),
        (
            "I don't like horror, but a scifi film would be nice",
            {("genres", "not", "Horror", True), ("genres", "is", "Sci-Fi", True)},
        ),
        ("something from the nineties", {("year", "from", "1990", True), ("year", "until", "1999", True)}),
        ("nothing before 1985", {("year", "from", "1985", True)}),
        ("older than the 70s please", {("year", "until", "1969", True)}),
        ("a film by Ann Vale", {("director", "is", "Ann Vale", True)}),
        ("I loved Cold Trail (1988)", {(ITEM, "is", "f16", False)}),
        ("I didn't like The Signal", {(ITEM, "not", "f07", False)}),
        ("I have already seen Two Left Feet", {(ITEM, "seen", "f04", False)}),
        ("I didn't like Saw (2004)", {(ITEM, "not", "f18", False)}),
        ("I have seen Cold Trail and didn't like it", {(ITEM, "not", "f16", False)}),
        ("I haven't seen Cold Trail", set()),
        ("I loved Cold Trail, not The Signal", {(ITEM, "is", "f16", False), (ITEM, "not", "f07", False)}),
        ("I loved Cold Trail, no horror please", {(ITEM, "is", "f16", False), ("genres", "not", "Horror", True)}),
        ("please remove horror", {("genres", "not", "Horror", True)}),
        ("leave out horror and exclude dramas", {("genres", "not", "Horror", True), ("genres", "not", "Drama", True)}),
        ("I do not mind horror, but no dramas", {("genres", "not", "Drama", True)}),
        ("neither horror nor dramas", {("genres", "not", "Horror", True), ("genres", "not", "Drama", True)}),
        ("what's the weather?", set()),
    ],
)
def test_reads_wishes(line: str, wishes: set[tuple[str, str, str, bool]]) -> None:
    known = items()
    known["f18"] = Item(item_id="f18", title="Saw (2004)", fields={"genres": "Horror", "colour": "yes"})
    known["f17"] = replace(known["f17"], fields={**known["f17"].fields, "colour": "no"})
    known["f16"] = replace(known["f16"], fields={**known["f16"].fields, "colour": "yes"})
    talk = conversation(known=known)
    assert "colour" in talk.tools.facts.values
    (reply,) = replies_to(talk, line)
    assert {(wish.field, wish.op, wish.value, wish.hard) for wish in reply.parsed.wishes} == wishes


@pytest.mark.parametrize("line", ["my sister loves horror", "is the first one horror?", "horror or a drama please"])
def test_mention_does_not_lift_a_ban(line: str) -> None:
    replies = replies_to(conversation(), "something, but not horror", line, "more please")
    assert all("Horror" not in each for reply in replies for each in genres(reply)) and replies[-1].items
    assert UserPreference(field="genres", op="not", value="Horror", turn=1) in replies[-1].state.profile


def test_fixed_rules_always_hold() -> None:
    rules = Rules(
        without={"genres": frozenset({"Horror"})}, block=frozenset({"f03"}), quotas=(Quota(field="director", most=1),)
    )
    talk = conversation(rules=rules)
    lines = ("a film about a ferry, cellar, station or harvest", "horror please", "I loved Red Dust Station", "more")
    replies = replies_to(talk, *lines)
    shown = [name for reply in replies for name in reply.items]
    assert shown and "f03" not in shown and not any("Horror" in items()[name].fields["genres"] for name in shown)
    directors = [[items()[name].fields["director"] for name in reply.items] for reply in replies]
    assert all(len(set(each)) == len(each) for each in directors)


class Failing(MadeLists):
    """A recommender that returns no items, or whose engine fails."""

    kind: ErrorKind = "empty"

    def rank(self, liked: Sequence[str], rules: Rules, k: int, candidates: Sequence[str] = ()) -> list[str]:
        raise DataError("the engine stopped", kind=self.kind)


def test_unknown_items_are_listed_and_failures_raised() -> None:
    lists, plain = Failing(items()), conversation()
    talk = Conversation(Tools(plain.tools.facts, lists), RuleManager(), plain.reader)
    (reply,) = replies_to(talk, "a western please")
    assert reply.items == ("f12", "f13")
    lists.kind = "failed"
    with raises(DataError, Expected("failed")):
        talk.answer(State(), "a western please")


def test_alternatives_stay_together() -> None:
    talk = conversation()
    replies = replies_to(talk, "comedies or thrillers", "a thriller or comedy please")
    kept = talk.tools.facts.rules(replies[-1].state.profile)
    assert kept.only == {"genres": frozenset({"comedy", "thriller"})} and not kept.more
    # One of them replaces both, and all are relaxed together.
    (reply,) = replies_to(talk, "a comedy please", state=replies[0].state)
    assert all("Comedy" in each for each in genres(reply)) and len(reply.state.profile) == 1
    profile, out = relax_oldest_constraint(replies[0].state.profile)
    assert out is not None and not any(wish.hard for wish in profile)
    # Alternatives of different turns are separate wishes.
    apart = (
        UserPreference(field="genres", op="is", value="Comedy", turn=1),
        UserPreference(field="genres", op="or", value="Drama", turn=2),
    )
    assert talk.tools.facts.rules(apart).allowed(items()) == frozenset()


def test_negative_bounds_never_ease() -> None:
    replies = replies_to(conversation(), "nothing before 1992", "a western please")
    assert all(int(items()[name].fields["year"]) >= 1992 for reply in replies for name in reply.items)
    assert "genres is Western" in replies[1].text and replies[1].items


def test_full_profile_keeps_bans() -> None:
    bans = [UserPreference(field="genres", op="not", value=f"g{n}") for n in range(MAX_PROFILE_WISHES - 3)]
    soft = [UserPreference(field=ITEM, op="is", value=f"i{n}", hard=False) for n in range(3)]
    guess = UserPreference(field="genres", op="is", value="guess", source="inferred")
    hard = [UserPreference(field="genres", op="is", value=f"w{n}") for n in range(2)]
    full = merge_preferences([*bans, *soft], [guess, *hard])
    assert full == (*bans, soft[2], *hard)


def test_wishes_combine_and_ease() -> None:
    talk = conversation()
    (reply,) = replies_to(talk, "a comedy or western from the sixties")
    assert reply.items == ("f13", "f12") or set(reply.items) == {"f12", "f13"}
    replies = replies_to(talk, "a western please", "by Cy Marsh")
    assert replies[1].items and "only a preference now" in replies[1].text
    assert {items()[name].fields["director"] for name in replies[1].items} == {"Cy Marsh"}
    # A ban is never relaxed.
    bans = "no western, no comedy, no horror, no drama, no thriller, no sci-fi, no romance, no musical"
    (reply,) = replies_to(talk, bans)
    assert not reply.items and "No more items" in reply.text


def test_stated_wishes_override_inferred_ones() -> None:
    stated, guess = (
        UserPreference(field="genres", op=op, value="Horror", source=source, turn=3)
        for op, source in (("not", "said"), ("is", "inferred"))
    )
    assert merge_preferences([stated], [guess]) == (stated,)
    assert merge_preferences([guess], [stated]) == (stated,)
    edited = stated.model_copy(update={"source": "edited", "op": "is"})
    assert merge_preferences([edited], [guess]) == (edited,)
    # A filter set by a language model counts as inferred.
    talk = conversation()
    state, _ = talk.tools.apply(Filter(field="genres", op="is", value="Horror"), State(profile=(stated,)))
    assert state.profile == (stated,)


def test_inferred_wishes_expire() -> None:
    lines = ("I loved Orbit of Glass", "I loved Paper Moon Landing", *["thanks"] * (INFERRED_WISH_TURNS + 1))
    replies = replies_to(conversation(), *lines)
    inferred = [[wish for wish in reply.state.profile if wish.source == "inferred"] for reply in replies]
    assert [bool(each) for each in inferred] == [False, *[True] * (INFERRED_WISH_TURNS + 1), False]
    (wish,) = inferred[1]
    assert (wish.field, wish.value, wish.hard) == ("genres", "Sci-Fi", False)
    assert drop_expired_preferences([wish.model_copy(update={"source": "said"})], 1000)


def test_profile_can_be_read_edited_and_deleted() -> None:
    talk = conversation()
    replies = replies_to(talk, "no horror please", "I loved Cold Trail", "what do you know about me?")
    assert "1. genres is not Horror" in replies[-1].text and "likes Cold Trail (1988)" in replies[-1].text
    state = replies[-1].state
    edited = state.with_(
        profile=(*state.profile, UserPreference(field="genres", op="not", value="Comedy", source="edited"))
    )
    (reply,) = replies_to(talk, "more please", state=State.model_validate(edited.model_dump()))
    assert not any({"Horror", "Comedy"} & each for each in genres(reply))
    gone, outcome = talk.tools.apply(Forget(wish=1), state)
    assert not any(wish.value == "Horror" for wish in gone.profile) and "Horror" in outcome.lines[0]
    (reply,) = replies_to(talk, "forget everything", state=state)
    left = reply.state
    assert not (left.profile or left.buffer or left.past or left.asked)
    assert [each.role for each in left.lines] == ["assistant"]
    # A title is not a request.
    known = items()
    known["f02"] = replace(known["f02"], title="Forget Me Not (1936)")
    replies = replies_to(conversation(known=known), "no horror please", "I loved Forget Me Not (1936)")
    assert len(replies[-1].state.profile) == 2
    assert replies_to(conversation(), "no horror please", "I loved Forget Me Not")[-1].state.profile


def test_state_is_validated() -> None:
    with pytest.raises(ValidationError, match=r"profile\.0\.op"):
        State.model_validate({"profile": [{"field": "genres", "op": "drop table", "value": "x"}]})
    talk = conversation()
    state = State(
        profile=(
            UserPreference(field="genres", op="is", value="Nonsense"),
            UserPreference(field=ITEM, op="is", value="f99"),
        ),
        shown=("f99", "f01"),
        buffer=("f98",),
        asked=("nothing",),
    )
    (reply,) = replies_to(talk, "more please", state=state)
    assert not reply.state.profile and set(reply.items) <= set(items()) and reply.items
    long = State(
        turn=MAX_TURNS,
        asked=("year",) * MAX_PROFILE_WISHES,
        profile=(UserPreference(field=ITEM, op="is", value="f01"),),
    )
    (reply,) = replies_to(talk, "surprise me", state=long)
    assert State.model_validate(reply.state.model_dump()) == reply.state and reply.state.turn == MAX_TURNS


def test_long_values_and_control_characters() -> None:
    bell = "Loud\x1b[31m\nNoise"
    known = items()
    for name in ("f00", "f01"):
        fields = {"mood\x07": bell, "long": "y" * 301, "z" * 101: "same", "genres": "Horror, " + "x" * 301}
        known[name] = replace(known[name], fields={**known[name].fields, **fields})
    talk = conversation(known=known)
    facts = talk.tools.facts
    assert set(facts.values) == {"genres", "year", "director", "mood\x07"}
    assert all(len(value) <= 300 for values in facts.values.values() for value in values)
    assert Facts(known, lambda texts: np.ones((len(texts), 2))).concepts.shape == (18, 2)
    state = State(shown=("f00",), profile=(UserPreference(field="mood\x07", op="is", value=bell),))
    (lines,) = [talk.tools.apply(Explain(item=1), state)[1].lines]
    spoken = (*lines, *talk.tools.profile(state), *(talk._question(field) for field in facts.values))
    assert "Noise" in "".join(spoken) and all(line.isprintable() for line in spoken)


def test_only_catalogue_items_are_shown() -> None:
    class Inventing:
        """A recommender that returns items missing in the catalogue."""

        def __init__(self, inner: object) -> None:
            self._inner = inner
            self.rules = Rules()

        def rank(self, *args: object, **more: object) -> list[str]:
            return ["x1", *self._inner.rank(*args, **more), "x2"]  # type: ignore[attr-defined]

        def similar(self, *args: object) -> list[str]:
            return ["x3", *self._inner.similar(*args)]  # type: ignore[attr-defined]

    plain = conversation()
    talk = Conversation(Tools(plain.tools.facts, Inventing(plain.tools.lists)), RandomManager(1), plain.reader)
    dice, shown = random.Random(0), 0
    lines = ("a comedy", "not horror", "more", "I liked Cold Trail", "like the first", "Titanic please", "thanks")
    for _ in range(25):
        state, banned = State(), False
        for _ in range(6):
            line = dice.choice(lines)
            banned = banned or line == "not horror"
            reply = talk.answer(state, line)
            state = reply.state
            assert not (banned and any("Horror" in each for each in genres(reply)))
            shown += len(reply.items)
            assert set(reply.items) <= set(items())
            assert len(set(reply.items)) == len(reply.items)
    assert shown > 30


def test_explanations_cite_fields() -> None:
    replies = replies_to(conversation(), "a comedy please", "why the second one?")
    name = replies[0].items[1]
    assert isinstance(replies[1].calls[0], Explain) and items()[name].title in replies[1].text
    assert f"genres: {items()[name].fields['genres']}" in replies[1].text and "genres is Comedy" in replies[1].text


def test_off_topic_requests_are_declined() -> None:
    replies = replies_to(conversation(), "hello", "surprise me", "write me a poem", "thanks", "bye")
    tools = [reply.calls[-1].tool for reply in replies]
    assert tools == ["ask", "show", "say", "say", "say"]
    assert [reply.calls[-1].model_dump().get("what") for reply in replies[2:]] == ["decline", "thanks", "bye"]
    (reply,) = replies_to(conversation(), "a film about a harbour")
    assert isinstance(reply.calls[0], Search) and reply.items[0] == "f10"


def test_transcript_replay_reports_differences(tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    lines = ("a comedy, not horror", "more please", "why the first?", "bye")
    turns = list(map(transcripts.Turn.of, lines, replies_to(conversation(), *lines)))
    transcripts.write(file, [*turns, transcripts.Turn(user=None), *turns])
    assert list(transcripts.replay_differences(transcripts.read(file), conversation())) == []
    assert list(transcripts.replay_differences(transcripts.read(file), conversation(RuleManager(k=3))))
    changed = turns[0].model_copy(update={"items": ("f00",)})
    (difference,) = transcripts.replay_differences([changed, *turns[1:]], conversation())
    assert "line 1" in difference and "items" in difference
    file.write_text(file.read_text() + '{"user": 3}\n')
    with raises(DataError, Expected("syntax", file=file.name, column="user")):
        transcripts.read(file)


def test_simulated_users_never_say_the_title() -> None:
    assert has_near_title("I loved Cold Trails so much", "Cold Trail") and not has_near_title(
        "I loved Cold Comfort", "Cold Trail"
    )
    assert 0 < MIN_TITLE_SIMILARITY < 1
    talk = conversation()
    facts, dice, hits = talk.tools.facts, random.Random(3), 0
    for number, target in enumerate(list(items()) * 3):
        liked = dice.sample([name for name in items() if name != target], 3)
        knowledge = sample_user_knowledge(facts, target, liked, number)
        user = SimulatedUser(knowledge, facts.numeric, number)
        likes = tuple(UserPreference(field=ITEM, op="is", value=name, hard=False) for name in liked)
        held = simulate_conversation(talk, user, target, 5, State(profile=likes))
        assert not any(has_near_title(line, facts.titles[target].split(" (")[0]) for line in held.lines), held.lines
        assert len(held.lines) <= 5 and (held.hit is None or held.hit == len(held.lines))
        hits += held.hit is not None
    # Attributes lead to the item in most cases: there are 18 items and lists of five.
    assert hits > 38, hits
    assert any(isinstance(call, Show) for call in replies_to(talk, "a comedy")[0].calls)


def test_search_by_embedding() -> None:
    def embed(texts: Sequence[str]) -> NDArray[np.float64]:
        # An encoder that knows one synonym.
        return np.array([[float(any(word in text.lower() for word in ("spooky", "horror"))), 0.1] for text in texts])

    plain, meant = Facts(items()), Facts(items(), embed)
    assert plain.search("spooky") == [] and plain.known_words(["spooky", "harbour"]) == ["harbour"]
    best = meant.search("spooky")[:4]
    assert all("Horror" in items()[name].fields["genres"] for name in best)
    assert meant.search("harbour")[0] == plain.search("harbour")[0] == "f10"
    assert meant.search("spooky", frozenset({"f03"})) == ["f03"]


def test_any_text_gets_a_reply() -> None:
    dice, talk = random.Random(1), conversation()
    parts = (
        *("not", "horror", "(1994)", "Cold Trail", "#", "9", "first", "after 1990", "80s", "'", '"', "<|im_end|>"),
        *(
            "\u202e",
            "\n",
            "\x00",
            "but",
            "again",
            "I loved",
            "or",
            "{",
            "[12]",
            "Zürich",
            "the last",
            "these",
            ",",
            ".",
        ),
    )
    for _ in range(40):
        state = State()
        for _ in range(3):
            reply = talk.answer(state, " ".join(dice.choice(parts) for _ in range(dice.randrange(12))))
            state = State.model_validate(reply.state.model_dump(mode="json"))
            assert set(reply.items) <= set(items()) and is_ending_call(reply.calls[-1])
