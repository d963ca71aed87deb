"""The tools of a conversation, which return only items of the catalogue."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from llmrec.answer.known import Catalogue
from llmrec.answer.listing import ListSpec, recommendation_steps
from llmrec.answer.opening import Models
from llmrec.answer.recommender import RANK, SIMILAR, AnnotatedAnswer, Question, require_ranking
from llmrec.answer.rules import Rules
from llmrec.chat.calls import (
    Ask,
    Call,
    Explain,
    Filter,
    Forget,
    Rank,
    Search,
    Show,
    ShowProfile,
    Similar,
)
from llmrec.chat.facts import Facts, reciprocal_rank_fusion
from llmrec.chat.fit import FitJudge, match_preferences
from llmrec.chat.state import (
    ITEM,
    MAX_BUFFER_ITEMS,
    MAX_PROFILE_WISHES,
    MAX_SHOWN_ITEMS,
    State,
    UserPreference,
    merge_preferences,
    relax_oldest_constraint,
    remove_preferences,
)
from llmrec.data.requests import PastEvent, RankRequest
from llmrec.errors import DataError
from llmrec.guard import TEXT_LIMIT, clean
from llmrec.types import Cost

# Weight of soft preferences in the order of items, relative to 1 for the first rank.
_SOFT_WEIGHT = 0.5
# Number of rejected or liked items with the same value from which a preference is inferred.
_MIN_SHARED_ITEMS = 2
_NO_COST = Cost()


class ListRecommender(Protocol):
    """Interface to the recommender of a conversation."""

    @property
    def rules(self) -> Rules:
        """Business rules that always apply."""
        ...

    def rank(self, liked: Sequence[str], rules: Rules, k: int, candidates: Sequence[str] = ()) -> list[str]:
        """Return ids ranked best first, of the candidates or of the whole catalogue."""
        ...

    def similar(self, items: Sequence[str], rules: Rules, k: int) -> list[str]:
        """Return ids of items often chosen together with given items, best first."""
        ...


@dataclass(frozen=True)
class ModelListRecommender:
    """Recommends with models in this or another process.

    Attributes:
        catalogue: The catalogue.
        ask: A function that answers a question about a request.
        rules: Rules that always apply.
    """

    catalogue: Catalogue
    ask: Callable[[Question, RankRequest], AnnotatedAnswer]
    rules: Rules = field(default_factory=Rules)

    def rank(self, liked: Sequence[str], rules: Rules, k: int, candidates: Sequence[str] = ()) -> list[str]:
        """See `ListRecommender`."""
        return self._request(RANK, liked, rules, k, candidates)

    def similar(self, items: Sequence[str], rules: Rules, k: int) -> list[str]:
        """See `ListRecommender`."""
        return self._request(SIMILAR, items, rules, k)

    def _request(
        self, verb: str, history: Sequence[str], rules: Rules, k: int, candidates: Sequence[str] = ()
    ) -> list[str]:
        items = self.catalogue.items
        request = RankRequest(
            id="chat",
            candidates=tuple(items[name] for name in candidates if name in items),
            history=tuple(PastEvent(item=items[name]) for name in history if name in items),
        )
        steps = recommendation_steps(request, ListSpec(k, rules=self.rules.joined(rules)), self.catalogue, verb)
        step = next(steps)
        while True:
            try:
                step = steps.send(self.ask(*step))
            except StopIteration as done:
                return list(require_ranking(done.value).items)


def make_answer_function(models: Models) -> Callable[[Question, RankRequest], AnnotatedAnswer]:
    """Return a function that sends questions to models in this process."""
    by = "text" if models.data is None else "interactions"
    models.similar(by)

    def ask(question: Question, request: RankRequest) -> AnnotatedAnswer:
        query = replace(question, model=by if question.verb == SIMILAR else None)
        return models.answer(query, [request])[0]

    return ask


@dataclass(frozen=True)
class Outcome:
    """The result of a tool call.

    Attributes:
        items: Ids of the items shown to the user.
        lines: Lines for the user: facts, the profile, relaxed constraints; titles and values are data of the catalogue.
        ask: The field to ask about; empty: no question.
        note: The result of a tool for the manager, in fixed texts of this program.
        cost: The cost of a language model.
    """

    items: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    ask: str = ""
    note: str = ""
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True)
class Tools:
    """The tools for a catalogue and a recommender.

    Attributes:
        facts: The facts of the catalogue.
        lists: The recommender.
        judge: A language model that grades the first items of a list, with the reasons in its prompts as explanations;
            None: the recommender alone determines the order.
    """

    facts: Facts
    lists: ListRecommender
    judge: FitJudge | None = None

    @property
    def titles(self) -> Mapping[str, str]:
        """The titles of items, by id."""
        return self.facts.titles

    def allowed(self, state: State) -> frozenset[str]:
        """Return the ids that may be shown."""
        return self.lists.rules.joined(self.facts.rules(state.profile)).allowed(self.facts.items) - state.barred

    def apply(self, call: Call, state: State) -> tuple[State, Outcome]:
        """Run a tool call, and return the new state and the result; an invalid call has no effect."""
        if isinstance(call, Search):
            result = self.facts.search(call.text, self.allowed(state))[: call.k]
            return _with_buffer(state.with_(query=call.text), result, f"search found {len(result)}")
        if isinstance(call, Filter):
            return self._filter(call, state)
        if isinstance(call, Similar):
            named = [state.shown[n - 1] for n in call.items if n <= len(state.shown)] or list(state.liked)
            result = self._tried(self.lists.similar, named, state) if named else []
            return _with_buffer(state.with_(query=""), result, f"similar found {len(result)}")
        if isinstance(call, Rank):
            return self._rank(call, state)
        if isinstance(call, Explain):
            return state, self._explain(call, state)
        if isinstance(call, Show):
            return self._show(call, state)
        if isinstance(call, Ask):
            return state.with_(asked=(*state.asked, call.field)[-MAX_PROFILE_WISHES:]), Outcome(ask=call.field)
        if isinstance(call, ShowProfile):
            return state, Outcome(lines=self.profile(state))
        if isinstance(call, Forget):
            return self._forget(call, state)
        return state, Outcome()

    def profile(self, state: State) -> tuple[str, ...]:
        """Return the profile as numbered lines."""
        return tuple(
            f"{index}. {wish.describe(self.titles)}{' (concluded)' if wish.source == 'inferred' else ''}"
            for index, wish in enumerate(state.profile, start=1)
        )

    def concluded(self, state: State) -> State:
        """Infer soft preferences from values that liked or unwanted items share."""
        profile = state.profile
        for op in ("is", "not"):
            named = [wish.value for wish in profile if wish.field == ITEM and wish.op == op]
            counts: dict[tuple[str, str], int] = {}
            for name in named:
                for fact, text in self.facts.fields_of(name):
                    if fact not in self.facts.numeric:
                        for value in text.split(", "):
                            counts[fact, value] = counts.get((fact, value), 0) + 1
            profile = merge_preferences(
                profile,
                [
                    UserPreference(field=fact, op=op, value=value, hard=False, source="inferred", turn=state.turn)
                    for (fact, value), times in counts.items()
                    if times >= _MIN_SHARED_ITEMS and 2 * times > len(named)
                ],
            )
        return state.with_(profile=profile)

    # ------------------------------------------------------------------- individual tools

    def _filter(self, call: Filter, state: State) -> tuple[State, Outcome]:
        value = call.value if call.op in ("from", "until") else self.facts.value(call.field, call.value) or ""
        wish = UserPreference(field=call.field, op=call.op, value=value, source="inferred", turn=state.turn)
        if not self.facts.legal(wish):
            return state, Outcome(note="this value does not exist")
        state = state.with_(profile=merge_preferences(state.profile, [wish]))
        left = self.allowed(state)
        return _with_buffer(state, [name for name in state.buffer if name in left], f"{len(left)} items are left")

    def _rank(self, call: Rank, state: State) -> tuple[State, Outcome]:
        chosen = [state.shown[position - 1] for position in call.items if position <= len(state.shown)]
        if chosen:
            order = self._tried(self.lists.rank, list(state.liked), state, candidates=chosen, shown=True)
            order, cost = self._rerank_by_grades(order, state)
            return state, Outcome(items=tuple(order), note="the list is ordered", cost=cost)
        allowed = self.allowed(state)
        pool = [name for name in state.buffer if name in allowed]
        order = self._tried(self.lists.rank, list(state.liked), state, candidates=pool)
        if not order:
            # Items unknown to the recommender follow in the order of the search or of the catalogue.
            new = [(name, 0.0) for name in pool or self.facts.items if name in allowed]
            order = [name for name, _ in self.lists.rules.arrange(new, self.facts.items, MAX_BUFFER_ITEMS)]
        order, cost = self._rerank_by_grades(self._apply_soft_preferences(_fuse_rankings(order, pool), state), state)
        return _with_buffer(state, order, f"{len(order)} items are ranked", cost)

    def _rerank_by_grades(self, order: Sequence[str], state: State) -> tuple[list[str], Cost]:
        """Rerank items by the grades of a language model, if there is one."""
        return (list(order), Cost()) if self.judge is None else self.judge.ordered(self.facts, state, order)

    def _tried(
        self,
        ask: Callable[..., list[str]],
        history: list[str],
        state: State,
        candidates: Sequence[str] = (),
        shown: bool = False,
    ) -> list[str]:
        """Return items from the recommender; none if the rules allow none. Other errors are raised."""
        rules = self.facts.rules(state.profile).joined(Rules(block=frozenset() if shown else state.barred))
        further = {"candidates": candidates} if candidates else {}
        try:
            result = ask(history, rules, MAX_BUFFER_ITEMS, **further)
        except DataError as error:
            # A model without interactions has no similar items and would raise an error each time.
            if error.kind not in ("empty", "unsupported"):
                raise
            return []
        return [name for name in result if name in self.facts.items]

    def _apply_soft_preferences(self, order: Sequence[str], state: State) -> list[str]:
        """Reorder items by the soft preferences that they satisfy."""
        wishes = [wish for wish in state.profile if not wish.hard and wish.field != ITEM]
        if not wishes:
            return list(order)

        def value(index: int) -> float:
            met = [self.facts.matches(order[index], wish) * (-1 if wish.op == "not" else 1) for wish in wishes]
            return 1 - index / len(order) + _SOFT_WEIGHT * sum(met) / len(wishes)

        return [order[index] for index in sorted(range(len(order)), key=lambda index: (-value(index), index))]

    def _explain(self, call: Explain, state: State) -> Outcome:
        if call.item > len(state.shown):
            return Outcome(note="the list has no item of this number")
        name = state.shown[call.item - 1]
        text = "; ".join(clean(f"{fact}: {values}", TEXT_LIMIT) for fact, values in self.facts.fields_of(name))
        lines = [f"{self.titles[name]}: {text}"]
        why, graded, cost = match_preferences(self.facts, state, name), "", Cost()
        if self.judge is not None:
            (judged,), cost = self.judge.judge(self.facts, state, [name])
            graded = judged.phrase
        met = [wish for wish in why.met if graded or wish.op != "not"]
        if met:
            lines.append("It fits: " + "; ".join(wish.describe(self.titles) for wish in met))
        if graded and why.missed:
            lines.append("It does not fit: " + "; ".join(wish.describe(self.titles) for wish in why.missed))
        if state.liked:
            lines.append("You like: " + ", ".join(self.titles[item] for item in state.liked if item in self.titles))
        if graded:
            lines.append(f"A language model calls it: {graded}.")
        return Outcome(lines=tuple(lines), note="explained", cost=cost)

    def _show(self, call: Show, state: State) -> tuple[State, Outcome]:
        lines: list[str] = []
        result, cost = self._listed(state)
        while not result:
            profile, out = relax_oldest_constraint(state.profile)
            if out is None:
                break
            lines.append(f"No item satisfies this, so it is only a preference now: {out.describe(self.titles)}.")
            state, outcome = self._rank(Rank(), state.with_(profile=profile, buffer=()))
            result, took = self._listed(state)
            cost += outcome.cost + took
        items = tuple(result[: call.k])
        if not items:
            lines.append("No more items satisfy these wishes.")
        fields = (*state.asked, call.ask)[-MAX_PROFILE_WISHES:] if call.ask else state.asked
        past = (*state.past, *items)[-MAX_SHOWN_ITEMS:]
        return state.with_(shown=items, past=past, asked=fields), Outcome(items, tuple(lines), call.ask, cost=cost)

    def _listed(self, state: State) -> tuple[list[str], Cost]:
        """Return the items that may be shown, from the candidates or, if none is left, the whole catalogue."""
        allowed = self.allowed(state)
        results = [name for name in state.buffer if name in allowed]
        if results or not allowed:
            return results, Cost()
        ranked, outcome = self._rank(Rank(), state.with_(buffer=()))
        return [name for name in ranked.buffer if name in allowed], outcome.cost

    def _forget(self, call: Forget, state: State) -> tuple[State, Outcome]:
        if call.wish == 0:
            state = state.with_(profile=(), buffer=(), query="", past=(), asked=(), lines=())
            return state, Outcome(lines=("The profile is empty now.",))
        if call.wish > len(state.profile):
            return state, Outcome(note="this wish is not in the profile")
        wish = state.profile[call.wish - 1]
        profile = remove_preferences(state.profile, wish.field, wish.value)
        return state.with_(profile=profile, buffer=()), Outcome(lines=(f"Forgotten: {wish.describe(self.titles)}.",))


def _fuse_rankings(order: Sequence[str], pool: Sequence[str]) -> list[str]:
    """Combine the rankings of a recommender and of a search by reciprocal rank fusion."""
    if not pool:
        return list(order)
    scores, ranked = reciprocal_rank_fusion(pool, order), set(order)
    return sorted((name for name in pool if name in ranked), key=lambda name: -scores[name])


def _with_buffer(state: State, items: Sequence[str], note: str, cost: Cost = _NO_COST) -> tuple[State, Outcome]:
    return state.with_(buffer=tuple(items[:MAX_BUFFER_ITEMS])), Outcome(note=note, cost=cost)
