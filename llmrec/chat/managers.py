"""Dialogue managers, which choose the tool calls of a turn: rules, a language model, and two baselines."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llmrec.chat.calls import (
    MAX_LISTED_VALUES,
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
    allowed_calls,
    format_call,
    parse_call,
)
from llmrec.chat.facts import Facts
from llmrec.chat.reading import ParsedMessage
from llmrec.chat.state import MAX_QUERY_CHARACTERS, State
from llmrec.chat.tools import Tools
from llmrec.guard import shorten_at_grapheme
from llmrec.prompts.template import Template, load_templates
from llmrec.types import Backend, Cost, Prompt, Scores

MAX_CALLS = 4
"""Maximum number of calls in a turn; the last one ends the turn."""
# Maximum number of calls that a model chooses from; further search texts are dropped.
_MAX_CHOICES = 2000
# Beam width of the search for a call.
_BEAM_WIDTH = 4
# Limits of a prompt, for small models: messages, preferences, titles of the list, and characters of each.
_MAX_MESSAGES, _MAX_WISHES, _MAX_TITLES, _MAX_CHARACTERS = 4, 12, 10, 160
_PROMPT_VARIABLES = ("profile", "shown", "lines", "made")


@dataclass(frozen=True)
class ManagerInput:
    """The input on which a manager decides.

    Attributes:
        state: The current state.
        begun: The state at the beginning of the turn, after the user message.
        parsed: The message as parsed by rules.
        steps: The calls of this turn so far, with their results.
        tools: The tools, with the facts.
    """

    state: State
    begun: State
    parsed: ParsedMessage
    steps: tuple[tuple[Call, str], ...]
    tools: Tools

    @property
    def last(self) -> bool:
        """Whether the next call must end the turn."""
        return len(self.steps) >= MAX_CALLS - 1


def call_choices(moment: ManagerInput) -> list[Call]:
    """Return the tool calls that a model may choose from: the last ones of the allowed calls.

    Each tool is available once per turn: greedy models would repeat it.
    """
    calls = allowed_calls(moment.state, moment.tools.facts, moment.parsed.intents, ending=moment.last)
    used = {call for call, _ in moment.steps}
    return [call for call in calls[-_MAX_CHOICES:] if call not in used]


class Manager(Protocol):
    """Chooses the tool calls of a turn one by one, until one ends the turn."""

    @property
    def name(self) -> str:
        """Name in tables and transcripts."""
        ...

    def choose(self, moment: ManagerInput) -> tuple[Call, Cost]:
        """Return the next call, with the cost of the choice."""
        ...


@dataclass(frozen=True)
class RuleManager:
    """A deterministic manager based on rules over parsed messages, without a language model.

    Attributes:
        k: The number of items of a list.
    """

    k: int = 5
    name: str = "rules"

    def choose(self, moment: ManagerInput) -> tuple[Call, Cost]:
        """See `Manager`."""
        return self.plan(moment)[len(moment.steps)], Cost()

    def plan(self, moment: ManagerInput) -> Sequence[Call]:
        """Return the calls of a turn."""
        parsed, state, facts = moment.parsed, moment.begun, moment.tools.facts
        wants = parsed.intents
        if "forget" in wants:
            return [Forget()]
        if "profile" in wants:
            return [ShowProfile()]
        if "explain" in wants and state.shown and not parsed.wishes:
            return [Explain(item=parsed.positions[0] if parsed.positions else 1), Say(what="explained")]
        if "bye" in wants and not parsed.wishes:
            return [Say(what="bye")]
        if "thanks" in wants and not parsed.wishes and not wants & {"more", "request"}:
            return [Say(what="thanks")]
        asks = wants & {"more", "request", "similar"} or (parsed.rest and "elsewhere" not in wants)
        if not (parsed.wishes or parsed.revoked or parsed.positions or asks):
            if state.shown or state.profile or "hello" not in wants:
                return [Say(what="decline")]
            question = self._question(state, facts)
            return [Ask(field=question) if question else Say(what="hello")]
        results: list[Call] = []
        if "similar" in wants and parsed.positions and state.shown:
            results.append(Similar(items=parsed.positions[:2]))
        elif state.liked and any(wish.value in state.liked for wish in parsed.wishes):
            results.append(Similar())
        # The last search remains valid if only the constraints have changed.
        elif query := parsed.rest[:MAX_QUERY_CHARACTERS] or (state.query if parsed.wishes or parsed.revoked else ""):
            results.append(Search(text=query, k=50))
        return [*results, Rank(), Show(k=self.k, ask=self._question(state, facts))]

    def _question(self, state: State, facts: Facts) -> str:
        """Return the field to ask about next, fields with few values first; empty if none is left."""
        known = {wish.field for wish in state.profile if wish.hard and wish.op != "not"} | set(state.asked)
        open_ = [name for name, values in facts.values.items() if name not in known and len(values) > 1]
        return min(
            open_, key=lambda name: (len(facts.values[name]) > MAX_LISTED_VALUES, len(facts.values[name])), default=""
        )


@dataclass
class ModelManager:
    """A language model that generates tool calls, constrained to the allowed ones.

    First it selects the tool. For a model that was not tuned as manager, this is the tool whose call prefix gains most
    in likelihood over the same prompt with an empty conversation (Holtzman et al., EMNLP 2021, section 2:
    domain conditional PMI): the likelihood of whole calls would favour the shortest. Then it searches the most likely
    legal call of that tool under its full softmax (`llmrec.decode.beam`), so every call parses.

    Attributes:
        backend: An engine that can ``score`` and ``search``.
        tuned: Whether the model was tuned as manager (`llmrec.chat.tuning`): it has learned the frequencies of tools,
            so the most likely tool is selected.
    """

    backend: Backend
    name: str = "model"
    template: Template = field(default_factory=lambda: load_templates("chat")["manage"])
    tuned: bool = False
    # Scores of the beginnings of calls after an empty conversation, by tools.
    _empty: dict[tuple[str, ...], Scores] = field(default_factory=dict, init=False, repr=False)

    def choose(self, moment: ManagerInput) -> tuple[Call, Cost]:
        """See `Manager`.

        Raises:
            LlmrecError: If the engine fails.
        """
        calls = call_choices(moment)
        prompt = render_decision_prompt(moment, self.template)
        tool, cost = self._select_tool(prompt, tuple(sorted({call.tool for call in calls})))
        texts = [format_call(call) for call in calls if call.tool == tool]
        (result,) = self.backend.search([prompt], texts, k=1, width=_BEAM_WIDTH)
        cost += Cost(prompt_tokens=result.prompt_tokens, completion_tokens=result.tokens, forwards=1)
        return parse_call(texts[result.items[0]]), cost

    def _select_tool(self, prompt: Prompt, tools: tuple[str, ...]) -> tuple[str, Cost]:
        prompts = [prompt]
        if not self.tuned and tools not in self._empty:
            prompts.append(Prompt(messages=self.template.turns(dict.fromkeys(_PROMPT_VARIABLES, ()))))
        # In training, the token after the name spans several characters.
        begins = [f'{{"tool": "{tool}' + ("" if self.tuned else '"') for tool in tools]
        scores, *plain = self.backend.score(prompts, [begins] * len(prompts), closed=False)
        self._empty.update((tools, item) for item in plain)
        without = (0.0,) * len(tools) if self.tuned else self._empty[tools].logprobs
        gains = [with_ - prior for with_, prior in zip(scores.logprobs, without, strict=True)]
        cost = Cost(prompt_tokens=sum(item.prompt_tokens for item in (scores, *plain)), forwards=len(prompts))
        return tools[max(range(len(tools)), key=gains.__getitem__)], cost


def render_decision_prompt(moment: ManagerInput, template: Template) -> Prompt:
    """Return the prompt for a decision; texts of users and catalogue are treated as data."""
    titles = moment.tools.titles
    values: Mapping[str, object] = {
        "profile": [
            {"value": shorten_at_grapheme(line, _MAX_CHARACTERS)}
            for line in moment.tools.profile(moment.state)[-_MAX_WISHES:]
        ],
        "shown": [
            {"title": shorten_at_grapheme(titles.get(name, name), _MAX_CHARACTERS)}
            for name in moment.state.shown[:_MAX_TITLES]
        ],
        "lines": [
            {"role": line.role, "text": shorten_at_grapheme(line.text, _MAX_CHARACTERS)}
            for line in moment.state.lines[-_MAX_MESSAGES:]
        ],
        "made": [{"call": format_call(call), "note": note} for call, note in moment.steps],
    }
    return Prompt(messages=template.turns(values))


@dataclass(frozen=True)
class HistoryManager:
    """A baseline: recommends from the liked items, without search or filters from the conversation."""

    k: int = 5
    name: str = "history"

    def choose(self, moment: ManagerInput) -> tuple[Call, Cost]:
        """See `Manager`."""
        return (Show(k=self.k), Cost()) if moment.steps else (Rank(), Cost())


@dataclass
class RandomManager:
    """A baseline: random allowed calls, until one ends the turn."""

    seed: int = 0
    name: str = "random"

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def choose(self, moment: ManagerInput) -> tuple[Call, Cost]:
        """See `Manager`."""
        calls = allowed_calls(moment.state, moment.tools.facts, moment.parsed.intents, ending=moment.last)
        # Draw the tool first and then its arguments, since most allowed calls are searches.
        tool = self._random.choice(sorted({call.tool for call in calls}))
        return self._random.choice([call for call in calls if call.tool == tool]), Cost()
