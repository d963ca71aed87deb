"""Who chooses the calls of a turn: rules, a language model, and two controls, behind one protocol."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llmrec.chat.calls import (
    FEW,
    Ask,
    Call,
    Explain,
    Forget,
    Rank,
    Say,
    Search,
    Show,
    ShowProfile,
    Similar,
    legal,
    read_call,
    written,
)
from llmrec.chat.facts import Facts
from llmrec.chat.reading import Heard
from llmrec.chat.state import LONGEST, State
from llmrec.chat.tools import Tools
from llmrec.guard import cut
from llmrec.prompts.template import Template, load_templates
from llmrec.types import Backend, Cost, Prompt, Scores

MOST_CALLS = 4
"""Calls of a turn; the last one is an ending."""
# Prefixes that the search of a call keeps.
_BEAMS = 4
# What a model reads, so that it fits a small one: lines, wishes, titles of the list, and letters of each.
_LINES, _WISHES, _TITLES, _LETTERS = 4, 12, 10, 160
_READS = ("profile", "shown", "lines", "made")


@dataclass(frozen=True)
class Moment:
    """What a manager knows when it chooses.

    Attributes:
        state: Now.
        begun: When the turn began, with what was heard in it.
        heard: What rules read in the user's words.
        made: Calls of this turn so far, with what came of each.
        tools: With the facts.
    """

    state: State
    begun: State
    heard: Heard
    made: tuple[tuple[Call, str], ...]
    tools: Tools

    @property
    def last(self) -> bool:
        """Whether the next call has to end the turn."""
        return len(self.made) >= MOST_CALLS - 1


def choices(moment: Moment, most: int) -> list[Call]:
    """Return the calls that a model may choose from at a moment, the last ``most`` of those that are legal.

    A tool that was used in this turn is used up: greedy models would repeat it.
    """
    calls = legal(moment.state, moment.tools.facts, moment.heard.intents, ending=moment.last)
    used = {call for call, _ in moment.made}
    return [call for call in calls[-most:] if call not in used]


class Manager(Protocol):
    """Chooses one call after the other, until one that ends the turn."""

    @property
    def name(self) -> str:
        """As tables and transcripts call it."""
        ...

    def choose(self, moment: Moment) -> tuple[Call, Cost]:
        """Return the next call, and what choosing it took."""
        ...


@dataclass(frozen=True)
class RuleManager:
    """Rules over what was heard: no model is asked, and the same words have the same answer.

    Attributes:
        k: Items of a list.
        asks: Whether a list ends with a question while fields are left to ask about.
    """

    k: int = 5
    asks: bool = True
    name: str = "rules"

    def choose(self, moment: Moment) -> tuple[Call, Cost]:
        """See `Manager`."""
        return self.plan(moment)[len(moment.made)], Cost()

    def plan(self, moment: Moment) -> Sequence[Call]:
        """Return the calls of a turn."""
        heard, state, facts = moment.heard, moment.begun, moment.tools.facts
        wants = heard.intents
        if "forget" in wants:
            return [Forget()]
        if "profile" in wants:
            return [ShowProfile()]
        if "explain" in wants and state.shown and not heard.wishes:
            return [Explain(item=heard.places[0] if heard.places else 1), Say(what="explained")]
        if "bye" in wants and not heard.wishes:
            return [Say(what="bye")]
        if "thanks" in wants and not heard.wishes and not wants & {"more", "request"}:
            return [Say(what="thanks")]
        asks = wants & {"more", "request", "similar"}
        if not (heard.wishes or heard.revoked or heard.places or asks or (heard.rest and "elsewhere" not in wants)):
            if state.shown or state.profile or "hello" not in wants:
                return [Say(what="decline")]
            question = self._question(state, facts)
            return [Ask(field=question) if question else Say(what="hello")]
        results: list[Call] = []
        if "similar" in wants and heard.places and state.shown:
            results.append(Similar(items=heard.places[:2]))
        elif state.liked and any(wish.value in state.liked for wish in heard.wishes):
            results.append(Similar())
        # What was searched for still is where only what may be shown has changed.
        elif query := heard.rest[:LONGEST] or (state.query if heard.wishes or heard.revoked else ""):
            results.append(Search(text=query, k=50))
        return [*results, Rank(), Show(k=self.k, ask=self._question(state, facts) if self.asks else "")]

    def _question(self, state: State, facts: Facts) -> str:
        """Return the field to ask about next: one with few values first; empty: none is left."""
        known = {wish.field for wish in state.profile if wish.hard and wish.op != "not"} | set(state.asked)
        open_ = [name for name, values in facts.values.items() if name not in known and len(values) > 1]
        return min(open_, key=lambda name: (len(facts.values[name]) > FEW, len(facts.values[name])), default="")


@dataclass
class ModelManager:
    """A language model that writes the calls, under the token tree of those that are legal.

    First it is asked for the tool. Of a model that was not tuned to lead, it is the one whose beginning of a call gains
    most in likelihood by what the model reads, over the same question about an empty conversation (Holtzman et al.,
    EMNLP 2021, section 2: domain conditional PMI): the likelihood of whole calls would choose the shortest one. Then it
    is asked for the most likely legal call of that tool under its full softmax (`llmrec.decode.beam`), so each one
    parses.

    Attributes:
        backend: An engine that can ``score`` and ``search``.
        most: Calls that are legal at most; search texts beyond are left out.
        tuned: The model was tuned to lead (`llmrec.chat.tuning`): how often a tool is called is what it has learned,
            so the most likely one is taken.
    """

    backend: Backend
    most: int = 2000
    name: str = "model"
    template: Template = field(default_factory=lambda: load_templates("chat")["manage"])
    tuned: bool = False
    # What the beginnings of calls score after an empty conversation, by the tools.
    _empty: dict[tuple[str, ...], Scores] = field(default_factory=dict, init=False, repr=False)

    def choose(self, moment: Moment) -> tuple[Call, Cost]:
        """See `Manager`.

        Raises:
            LlmrecError: If the engine fails.
        """
        calls = choices(moment, self.most)
        asked = self.prompt(moment)
        tool, cost = self._tool(asked, tuple(sorted({call.tool for call in calls})))
        texts = [written(call) for call in calls if call.tool == tool]
        (result,) = self.backend.search([asked], texts, k=1, width=_BEAMS)
        cost += Cost(prompt_tokens=result.prompt_tokens, completion_tokens=result.tokens, forwards=1)
        return read_call(texts[result.items[0]]), cost

    def _tool(self, asked: Prompt, tools: tuple[str, ...]) -> tuple[str, Cost]:
        prompts = [asked]
        if not self.tuned and tools not in self._empty:
            prompts.append(Prompt(messages=self.template.turns(dict.fromkeys(_READS, ()))))
        # What a tuned model learned goes on behind the name with one token of several signs.
        begins = [f'{{"tool": "{tool}' + ("" if self.tuned else '"') for tool in tools]
        message, *plain = self.backend.score(prompts, [begins] * len(prompts), closed=False)
        self._empty.update((tools, item) for item in plain)
        without = (0.0,) * len(tools) if self.tuned else self._empty[tools].logprobs
        gains = [with_ - prior for with_, prior in zip(message.logprobs, without, strict=True)]
        cost = Cost(prompt_tokens=sum(item.prompt_tokens for item in (message, *plain)), forwards=len(prompts))
        return tools[max(range(len(tools)), key=gains.__getitem__)], cost

    def prompt(self, moment: Moment) -> Prompt:
        """Return what the model reads."""
        return told_to_model(moment, self.template)


def told_to_model(moment: Moment, template: Template) -> Prompt:
    """Return what a model reads at a moment; all that comes from users and the catalogue is data in it."""
    titles = moment.tools.titles
    values: Mapping[str, object] = {
        "profile": [{"value": cut(line, _LETTERS)} for line in moment.tools.profile(moment.state)[-_WISHES:]],
        "shown": [{"title": cut(titles.get(name, name), _LETTERS)} for name in moment.state.shown[:_TITLES]],
        "lines": [{"role": line.role, "text": cut(line.text, _LETTERS)} for line in moment.state.lines[-_LINES:]],
        "made": [{"call": written(call), "note": note} for call, note in moment.made],
    }
    return Prompt(messages=template.turns(values))


@dataclass(frozen=True)
class HistoryManager:
    """A control: the recommender's list for what the user likes; what was said is not searched or filtered by."""

    k: int = 5
    name: str = "history"

    def choose(self, moment: Moment) -> tuple[Call, Cost]:
        """See `Manager`."""
        return (Show(k=self.k), Cost()) if moment.made else (Rank(), Cost())


@dataclass
class RandomManager:
    """A control: any legal call, until one ends the turn."""

    seed: int = 0
    name: str = "random"

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def choose(self, moment: Moment) -> tuple[Call, Cost]:
        """See `Manager`."""
        calls = legal(moment.state, moment.tools.facts, moment.heard.intents, ending=moment.last)
        # Tools first, evenly, and then their arguments: most calls are searches.
        tool = self._random.choice(sorted({call.tool for call in calls}))
        return self._random.choice([call for call in calls if call.tool == tool]), Cost()
