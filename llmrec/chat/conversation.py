"""A turn of a conversation: parse the user message, call tools until one ends the turn, and write the reply.

Replies consist of this module's fixed texts, and of titles and values of the catalogue. A language model chooses calls
and generates no text of a reply, so it can neither invent an item nor repeat its instructions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from llmrec.chat.calls import Call, Say, ShowProfile, is_ending_call
from llmrec.chat.managers import Manager, ManagerInput
from llmrec.chat.reading import ParsedMessage, Reader
from llmrec.chat.state import ITEM, MAX_TURNS, State, drop_expired_preferences, merge_preferences, remove_preferences
from llmrec.chat.tools import Outcome, Tools
from llmrec.guard import TEXT_LIMIT, clean
from llmrec.types import Cost

_FIXED_SENTENCES = {
    "hello": "Hello! Say what you are looking for, what you like, or what you do not want.",
    "thanks": "You are welcome.",
    "bye": "Goodbye.",
    "decline": "I only know this catalogue. Say what you like, what you want, or what you do not want.",
    "explained": "That is what the catalogue says.",
}
_LIST_INTRODUCTION, _FIELD_QUESTION, _EMPTY_PROFILE = (
    "How about:",
    "Do you have a wish about {field}, such as {some}?",
    "Nothing is noted of you yet.",
)
_BANNED_VALUE = "You did not want {value}. Say that it is fine again to see some."
_RANGE_QUESTION = "Do you have a wish about {field} ({low} to {high})?"
# Number of example values in a question.
_MAX_EXAMPLE_VALUES = 3


@dataclass(frozen=True)
class Reply:
    """The reply to a user message.

    Attributes:
        text: The text, including the list.
        items: Ids of the list, best first.
        calls: The calls, the ending last.
        state: The new state.
        parsed: The message as parsed by rules.
        cost: The cost of the language model.
        seconds: The total time.
    """

    text: str
    items: tuple[str, ...]
    calls: tuple[Call, ...]
    state: State
    parsed: ParsedMessage = field(default_factory=ParsedMessage)
    cost: Cost = field(default_factory=Cost)
    seconds: float = 0.0


@dataclass(frozen=True)
class Conversation:
    """A conversation about a catalogue; the caller keeps the state of the user.

    Attributes:
        tools: The tools over the catalogue and a recommender.
        manager: The manager that chooses the calls.
        reader: The parser of user messages; None: messages are not parsed, as for baselines.
    """

    tools: Tools
    manager: Manager
    reader: Reader | None

    def answer(self, state: State, text: str, called: Callable[[Call], None] = lambda call: None) -> Reply:
        """Reply to a user message in a state; ``called`` is called after every call.

        Raises:
            LlmrecError: If an engine fails.
        """
        begun = time.perf_counter()
        message = clean(text, TEXT_LIMIT)
        state = self._drop_unknown_entries(state).with_(turn=min(state.turn + 1, MAX_TURNS)).saying("user", message)
        parsed = ParsedMessage() if self.reader is None else self.reader.read(message, state)
        state, notes = self._update_state(state, parsed)
        start = state
        steps: list[tuple[Call, str]] = []
        cost, outcome = Cost(), Outcome()
        while not steps or not is_ending_call(steps[-1][0]):
            call, took = self.manager.choose(ManagerInput(state, start, parsed, tuple(steps), self.tools))
            cost += took
            state, outcome = self.tools.apply(call, state)
            cost += outcome.cost
            notes += outcome.lines
            steps.append((call, outcome.note))
            called(call)
        # Items are looked up again, so that no tool can show an item that is not in the catalogue.
        items = tuple(name for name in outcome.items if name in self.tools.titles)
        answer = self._format_reply(steps[-1][0], notes, items, outcome.ask)
        calls = tuple(call for call, _ in steps)
        spent = time.perf_counter() - begun
        return Reply(answer, items, calls, state.saying("assistant", answer), parsed, cost, spent)

    def _drop_unknown_entries(self, state: State) -> State:
        """Return a state without items, fields and values that are not in the catalogue."""
        facts, titles = self.tools.facts, self.tools.titles
        return state.with_(
            profile=tuple(wish for wish in state.profile if facts.legal(wish)),
            buffer=tuple(name for name in state.buffer if name in titles),
            shown=tuple(name for name in state.shown if name in titles),
            asked=tuple(name for name in state.asked if name in facts.values),
        )

    def _update_state(self, state: State, parsed: ParsedMessage) -> tuple[State, list[str]]:
        """Update the state with a parsed message; also return notes on requests that contradict an exclusion."""
        profile = state.profile
        for name, value in parsed.revoked:
            profile = remove_preferences(profile, name, value)
        wishes = [wish for wish in parsed.wishes if self.tools.facts.legal(wish)]
        # Mentioning an excluded value does not include it again.
        bans = {
            wish.key
            for wish in (*profile, *wishes)
            if wish.op == "not" and wish.hard and wish.field != ITEM and wish.source != "inferred"
        }
        kept = [wish for wish in wishes if wish.op not in ("is", "or") or wish.key not in bans]
        new = {wish.key for wish in wishes if wish.op == "not"}
        notes = [
            _BANNED_VALUE.format(value=clean(wish.value))
            for wish in wishes
            if wish not in kept and wish.hard and wish.key not in new
        ]
        wishes = kept
        if "instead" in parsed.intents:
            fields = {wish.field for wish in wishes if wish.asks}
            profile = tuple(wish for wish in profile if not (wish.asks and wish.field in fields))
        changed = merge_preferences(profile, wishes)
        # Drop candidates found with earlier preferences.
        buffer = () if changed != state.profile else state.buffer
        # A new request replaces the last search.
        asks = any(wish.asks or (wish.field == ITEM and wish.op == "is") for wish in wishes)
        query = "" if asks else state.query
        state = state.with_(profile=drop_expired_preferences(changed, state.turn), buffer=buffer, query=query)
        # Nothing is inferred without new items, and earlier inferences expire. A state may begin with likes.
        named = state.turn == 1 or any(wish.field == ITEM for wish in wishes)
        return (self.tools.concluded(state) if named else state), notes

    def _format_reply(self, call: Call, notes: list[str], items: tuple[str, ...], ask: str) -> str:
        lines = list(notes)
        if isinstance(call, ShowProfile) and not notes:
            lines.append(_EMPTY_PROFILE)
        if isinstance(call, Say):
            lines.append(_FIXED_SENTENCES[call.what])
        if items:
            titles = [f"{index}. {self.tools.titles[name]}" for index, name in enumerate(items, start=1)]
            lines += [_LIST_INTRODUCTION, *titles]
        if ask:
            lines.append(self._question(ask))
        return "\n".join(lines)

    def _question(self, name: str) -> str:
        facts = self.tools.facts
        values = facts.values.get(name, ())
        if name in facts.numeric:
            low, high = facts.bounds(name)
            return _RANGE_QUESTION.format(field=clean(name), low=low, high=high)
        return _FIELD_QUESTION.format(
            field=clean(name), some=", ".join(clean(value) for value in values[:_MAX_EXAMPLE_VALUES])
        )
