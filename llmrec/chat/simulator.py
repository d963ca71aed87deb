"""A simulated user who looks for a target item, knowing its attributes but not its title.

A simulator that knows the title eventually leaks it (Zhu et al., SimpleUserSim, arXiv 2403.16416). This one has only
attributes and liked items, none with a title similar to the target's; hits are checked outside the simulator.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from llmrec.chat.conversation import Conversation
from llmrec.chat.facts import Facts
from llmrec.chat.reading import spoken_title
from llmrec.chat.state import State
from llmrec.chat.transcripts import Turn
from llmrec.errors import DataError
from llmrec.index.titles import title_key
from llmrec.types import Cost

MIN_TITLE_SIMILARITY = 0.9
"""Minimum similarity at which a text counts as a title."""


@dataclass(frozen=True)
class MessageTemplates:
    """Templates of user messages, several for each purpose.

    Attributes:
        asides: Messages other than wishes, about the shown list or the conversation, by intent.
    """

    begin: tuple[str, ...]
    likes: tuple[str, ...]
    wants: tuple[str, ...]
    time: tuple[str, ...]
    unwanted: tuple[str, ...]
    free: tuple[str, ...]
    more: tuple[str, ...]
    parting: tuple[str, ...]
    asides: Mapping[str, tuple[str, ...]]


USUAL_MESSAGES = MessageTemplates(
    begin=(
        "Hi, I'm looking for something to watch.",
        "Hello! Can you recommend something?",
        "I need an idea for tonight.",
    ),
    likes=("I really liked {title}.", "I enjoyed {title}.", "{title} is one of my favorites."),
    wants=("I'd like {value}.", "Something with {value} please.", "It should be {value}."),
    time=("Something from the {decade}s please.", "I'd prefer the {decade}s."),
    unwanted=("But not {value}.", "And no {value} please."),
    free=("I don't mind.", "No preference there."),
    more=("Anything else?", "Show me some more please.", "Something different?"),
    parting=("Bye!", "That's all, goodbye."),
    asides={
        "explain": ("Why the {nth} one?", "Why number {n}?", "Explain the {nth} one."),
        "similar": ("Something like number {n}.", "More like the {nth} one please."),
        "profile": ("What do you know about me?", "Show me my profile."),
        "thanks": ("Thanks!", "Thank you."),
        "elsewhere": ("How is the weather?", "Tell me a joke."),
        "forget": ("Forget everything.", "Please reset."),
    },
)
OTHER_MESSAGES = MessageTemplates(
    begin=("Hey, what do you suggest?", "Good evening, surprise me.", "Please find me something nice."),
    likes=("I loved {title}.", "{title} was great."),
    wants=("I'm looking for {value}.", "Please show me {value}.", "I want {value}."),
    time=("Make it the {decade}s.", "I want something from the {decade}s."),
    unwanted=("Nothing with {value}.", "I don't want {value}."),
    free=("Either is alright with me.", "Whatever."),
    more=("What else is there?", "Give me others.", "Next ones please."),
    parting=("Good night.", "See you."),
    asides={
        "explain": ("Tell me about number {n}.", "Why did you choose the {nth}?"),
        "similar": ("I want something similar to number {n}.", "Give me others similar to the {nth} one."),
        "profile": ("What have you noted so far?", "What have I told you?"),
        "thanks": ("Cheers.", "I appreciate it."),
        "elsewhere": ("Can you write a poem?", "Translate this for me."),
        "forget": ("Let's start over.", "Clear my profile."),
    },
)
"""Other wordings of the same messages, for a model that was fine-tuned on `USUAL_MESSAGES`."""
_ORDINALS = ("first", "second", "third", "fourth", "fifth")


@dataclass(frozen=True)
class Knowledge:
    """What a simulated user wants and knows, without the title of the target.

    Attributes:
        attributes: Values by field, in the order in which the user mentions them.
        unwanted: Pairs (field, value) that the target lacks and the user rejects.
        likes: Titles of other items.
    """

    attributes: Mapping[str, Sequence[str]]
    unwanted: tuple[tuple[str, str], ...] = ()
    likes: tuple[str, ...] = ()


@dataclass
class SimulatedUser:
    """A simulated user who wants a target item.

    Attributes:
        knowledge: The session variables.
        numeric: Fields of years.
        seed: The seed of wording and of the number of wishes per turn.
        asides: The probability of a message other than a wish: a question about the list, thanks, and the like.
        words: The templates of messages.
    """

    knowledge: Knowledge
    numeric: frozenset[str]
    seed: int
    asides: float = 0.0
    words: MessageTemplates = USUAL_MESSAGES

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        # A separate generator, so that digressions do not change the other messages.
        self._aside = random.Random(self.seed + 1)
        self._left = self._all_wishes()
        self._unwanted = list(self.knowledge.unwanted)
        self._likes = list(self.knowledge.likes)

    def says(self, question: str = "", *, first: bool = False, shown: int = 0) -> str:
        """Return the next user message.

        Args:
            question: The field that the last reply asked about; empty: none.
            first: Whether it is the first message.
            shown: The number of items of the last list, to which the user may refer.
        """
        lines: list[str] = []
        if not first and self._aside.random() < self.asides:
            return self._digression(shown)
        if first:
            lines.append(self._random.choice(self.words.begin))
            if self._likes:
                lines.append(self._random.choice(self.words.likes).format(title=self._likes.pop(0)))
        wish = next((pair for pair in self._left if pair[0] == question), None)
        if question and wish is None:
            lines.append(self._random.choice(self.words.free))
        if wish is None and self._left and (not first or self._random.random() < 0.5):
            wish = self._left[0]
        if wish is not None:
            self._left.remove(wish)
            lines.append(self._wish_message(*wish))
        if self._unwanted and self._random.random() < 0.3:
            lines.append(self._random.choice(self.words.unwanted).format(value=self._unwanted.pop(0)[1]))
        return " ".join(lines) or self._random.choice(self.words.more)

    def parts(self) -> str:
        """Return the message after a list with the target; empty for users without digressions."""
        return self._aside.choice(self.words.parting) if self.asides else ""

    def _digression(self, shown: int) -> str:
        """Return a message without a preference; after a request to forget everything, the user starts again."""
        intent = self._aside.choice([name for name in self.words.asides if shown or name not in ("explain", "similar")])
        if intent == "forget":
            self._left = self._all_wishes()
        index = self._aside.randrange(min(shown, len(_ORDINALS))) if shown else 0
        return self._aside.choice(self.words.asides[intent]).format(n=index + 1, nth=_ORDINALS[index])

    def _all_wishes(self) -> list[tuple[str, str]]:
        return [(name, value) for name, values in self.knowledge.attributes.items() for value in values]

    def _wish_message(self, name: str, value: str) -> str:
        if name in self.numeric:
            return self._random.choice(self.words.time).format(decade=int(value) // 10 * 10)
        return self._random.choice(self.words.wants).format(value=value)


@dataclass(frozen=True)
class SimulatedConversation:
    """A finished conversation with a simulated user.

    Attributes:
        turns: The messages, calls and lists.
        hit: The turn whose list has the target, from 1; None: none.
        seconds: The time of the replies.
        cost: The cost of a language model.
    """

    turns: tuple[Turn, ...]
    hit: int | None
    seconds: float
    cost: Cost

    @property
    def lines(self) -> list[str]:
        """The messages of the user."""
        return [turn.user or "" for turn in self.turns]

    @property
    def tools(self) -> list[str]:
        """Names of the tools that were called."""
        return [call.tool for turn in self.turns for call in turn.calls]

    @property
    def shown(self) -> list[str]:
        """All shown items."""
        return [item for turn in self.turns for item in turn.items]


def simulate_conversation(
    conversation: Conversation, user: SimulatedUser, target: str, turns: int, begun: State | None = None
) -> SimulatedConversation:
    """Run a conversation until a list contains the target, or up to a maximum number of turns.

    The simulated user never sees the target's title: hits are judged here. ``begun`` is the initial state, such as a
    known user's likes.
    """
    state, question, done, seconds, cost = begun or State(), "", [], 0.0, Cost()
    line: str = user.says(first=True)
    hit: int | None = None
    for turn in range(1, turns + 1):
        before = len(state.asked)
        reply = conversation.answer(state, line)
        done.append(Turn.of(line, reply))
        state, seconds, cost = reply.state, seconds + reply.seconds, cost + reply.cost
        if hit is not None:
            break
        question = state.asked[-1] if len(state.asked) > before else ""
        hit = turn if target in reply.items else None
        line = user.says(question, shown=len(state.shown)) if hit is None else user.parts()
        if not line:
            break
    return SimulatedConversation(tuple(done), hit, seconds, cost)


def random_target_conversations(
    conversation: Conversation,
    count: int,
    seed: int,
    turns: int = 5,
    asides: float = 0.0,
    words: MessageTemplates = USUAL_MESSAGES,
) -> Iterator[tuple[str, SimulatedConversation]]:
    """Yield random targets from the catalogue, each with the conversation of a simulated user; see `SimulatedUser`."""
    facts, rng = conversation.tools.facts, random.Random(seed)
    names = [name for name in facts.items if facts.fields_of(name)]
    if not names:
        raise DataError(
            "items have no fields to talk about; add columns such as genres or brand to the item table",
            kind="empty",
            column="--items",
        )
    for _ in range(count):
        target, user_seed = rng.choice(names), rng.randrange(2**32)
        user = SimulatedUser(
            sample_user_knowledge(facts, target, (), user_seed), facts.numeric, user_seed, asides, words
        )
        yield target, simulate_conversation(conversation, user, target, turns)


def transcript_turns(held: Iterable[tuple[str, SimulatedConversation]]) -> list[Turn]:
    """Return conversations as a transcript."""
    return [turn for target, one in held for turn in (Turn(user=None, items=(target,)), *one.turns)]


def sample_user_knowledge(facts: Facts, target: str, liked: Sequence[str], seed: int) -> Knowledge:
    """Return what a user knows about a target: its attributes, and one liked item with a dissimilar title.

    Values similar to the title are excluded, and so are numbers other than years, which users give as decades.
    """
    rng, title = random.Random(seed), spoken_title(facts.titles[target])
    attributes = {
        name: tuple(value for value in text.split(", ") if not has_near_title(value, title))
        for name, text in facts.fields_of(target)
        if name not in facts.numeric or name == facts.years
    }
    names = list(attributes)
    rng.shuffle(names)
    unwanted = [
        (name, value)
        for name, values in facts.values.items()
        if name not in facts.numeric and len(values) < 50
        for value in values
        if value not in attributes.get(name, ()) and not has_near_title(value, title)
    ]
    known = [facts.titles[name] for name in liked if not has_near_title(facts.titles[name], title)]
    rng.shuffle(known)
    return Knowledge(
        attributes={name: attributes[name] for name in names if attributes[name]},
        unwanted=tuple(rng.sample(unwanted, min(1, len(unwanted)))),
        likes=tuple(known[:1]),
    )


def has_near_title(text: str, title: str) -> bool:
    """Whether a text contains a title, or words at least `MIN_TITLE_SIMILARITY` similar to it."""
    words, target = title_key(text).split(), title_key(title)
    count = len(target.split())
    return any(
        SequenceMatcher(None, " ".join(words[at : at + size]), target, autojunk=False).ratio() >= MIN_TITLE_SIMILARITY
        for size in {max(1, count - 1), count, count + 1}
        for at in range(max(1, len(words) - size + 1))
    )
