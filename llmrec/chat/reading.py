"""Rule-based parsing of user messages: items, field values, preferences and other intents.

English only (`llmrec.chat.english`). Values and titles are those of the catalogue; synonyms, such as *scary* for
horror, are recognised if the catalogue has the value.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmrec.chat import english
from llmrec.chat.english import singular
from llmrec.chat.facts import Facts
from llmrec.chat.state import ITEM, Op, State, UserPreference
from llmrec.index.titles import title_key

_BRACKET = re.compile(r"\s*\([^()]*\)\s*$")
_ARTICLE = re.compile(r"^(.*), (The|A|An|Les?|La|Il|Der|Die|Das)$", re.IGNORECASE)
_YEAR = re.compile(r"\s*\((\d{4})\)")
_LETTER = re.compile(r"\w")
# Fields with more values contain names; a single word of a name matches only if it is capitalised.
_NAMES_THRESHOLD = 200
# Maximum number of words in a clause that is a request without a verb.
_MAX_BARE_WORDS = 6


@dataclass(frozen=True)
class ParsedMessage:
    """A parsed user message.

    Attributes:
        wishes: New wishes.
        revoked: (field, value) of lifted bans.
        intents: Names among `llmrec.chat.english.INTENTS`.
        positions: Positions in the shown list, from 1.
        rest: The other words that occur in any item's text: the search query.
    """

    wishes: tuple[UserPreference, ...] = ()
    revoked: tuple[tuple[str, str], ...] = ()
    intents: frozenset[str] = frozenset()
    positions: tuple[int, ...] = ()
    rest: str = ""


@dataclass(frozen=True)
class _Mention:
    """A mention of a catalogue value in a text: field, value, first and last character."""

    field: str
    value: str
    start: int
    end: int


class Reader:
    """Parses user messages about a catalogue."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._phrases: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for name, title in facts.titles.items():
            if form := title_key(spoken_title(title)):
                self._phrases[form].append((ITEM, name))
        for field, values in facts.values.items():
            for value in values if field not in facts.numeric else ():
                for form in {title_key(value), singular(title_key(value))}:
                    # Stop words such as "no" are too frequent: such values can only be chosen by filters.
                    if not english.STOP_WORDS.issuperset(form.split()):
                        self._phrases[form].append((field, value))
        # Two passes, since a word may be a synonym of a synonym.
        for text, meant in (*english.SYNONYMS.items(), *english.SYNONYMS.items()):
            known = self._values(title_key(meant))
            if known and not self._values(title_key(text)):
                self._phrases[title_key(text)] += known
        self._longest = max((len(form.split()) for form in self._phrases), default=1)

    def read(self, text: str, state: State) -> ParsedMessage:
        """Parse a user message, given the state before it; its turn is that of the wishes."""
        wishes: list[UserPreference] = []
        revoked: list[tuple[str, str]] = []
        rest: list[str] = []
        mentions = list(self._find_mentions(text))
        # Titles and names come first, since their words do not belong to clauses.
        titles = [mention for mention in mentions if mention.field == ITEM]
        names = [mention for mention in mentions if mention.field == ITEM or _is_name(text, mention)]
        plain = _mask_names(text, names)
        for start, end in _clause_spans(text, names):
            bare = plain[start:end]
            inside = [mention for mention in mentions if start <= mention.start < end]
            for wish, revokes in self._clause_preferences(bare, start, inside, state):
                if revokes:
                    revoked.append((wish.field, wish.value))
                else:
                    wishes.append(wish)
            wishes += self._times(bare, state)
            rest += self._rest(bare, start, inside)
        intents = frozenset(name for name, pattern in english.INTENTS.items() if pattern.search(plain))
        positions = _parse_positions(plain, len(state.shown))
        if not titles and "explain" not in intents:
            wishes += _preferences_about_list(plain, state, positions, intents)
        return ParsedMessage(tuple(dict.fromkeys(wishes)), tuple(revoked), intents, positions, " ".join(rest))

    # ------------------------------------------------------------------- wishes

    def _clause_preferences(
        self, bare: str, start: int, inside: Sequence[_Mention], state: State
    ) -> Iterator[tuple[UserPreference, bool]]:
        """Yield a preference for each mention in a clause, and whether it revokes an exclusion."""
        banned = {(wish.field, wish.value) for wish in state.profile if wish.op == "not"}
        requested = bool(english.WANT.search(bare)) or len(english.WORD.findall(bare)) <= _MAX_BARE_WORDS
        last: _Mention | None = None
        for item in inside:
            before, after = bare[: item.start - start], bare[item.end - start :]
            tolerated = bool(english.TOLERATED.search(before))
            unwanted = _is_negated(before, after, item.field == ITEM)
            if item.field == ITEM:
                if not _is_unseen(before):
                    yield (
                        UserPreference(
                            field=ITEM, op=_item_operator(bare, unwanted), value=item.value, hard=False, turn=state.turn
                        ),
                        False,
                    )
                continue
            revokes = bool(english.BAN_REVOCATION.search(bare)) and (
                ((item.field, item.value) in banned and not unwanted) or bool(english.LIFT_REQUEST.search(bare))
            )
            if tolerated and not unwanted and not revokes:
                continue
            joined = last is not None and last.field == item.field
            between = "" if last is None else bare[last.end - start : item.start - start]
            op: Op = "not" if unwanted else "or" if joined and english.OR.fullmatch(between) else "is"
            hard = unwanted or (requested and not (english.LIKE.search(before) and not english.WOULD.search(before)))
            yield UserPreference(field=item.field, op=op, value=item.value, hard=hard, turn=state.turn), revokes
            last = None if unwanted else item

    def _times(self, bare: str, state: State) -> Iterator[UserPreference]:
        """Yield limits on the year: *after 1990*, *the nineties*, *80s*."""
        if not self._facts.years:
            return

        def bound(op: Op, year: int | str, ban: bool = False) -> UserPreference:
            return UserPreference(field=self._facts.years, op=op, value=str(year), turn=state.turn, ban=ban)

        for pattern, newer in english.YEAR_BOUNDS:
            for result in pattern.finditer(bare):
                # Excluding items before a year is a lower limit at that year.
                ban = bool(english.NEGATION.search(bare[: result.start()]))
                yield bound("from" if newer != ban else "until", result[1], ban)
        decades = [int(result[1]) for result in english.DECADE.finditer(bare)]
        decades += [year for name, year in english.DECADES.items() if re.search(rf"\b{name}\b", bare, re.IGNORECASE)]
        years = [year if year > 100 else 1900 + year if year >= 20 else 2000 + year for year in decades]
        if not years or english.NEGATION.search(bare):
            return
        if english.OLDER.search(bare):
            yield bound("until", min(years) - 1)
            return
        yield bound("from", min(years))
        if not english.NEWER.search(bare):
            yield bound("until", max(years) + 9)

    def _rest(self, bare: str, start: int, inside: Sequence[_Mention]) -> list[str]:
        """Return the words of a clause to search for; empty for a negated clause."""
        if english.NEGATION.search(bare) or english.TOLERATED.search(bare):
            return []
        taken = [(item.start - start, item.end - start) for item in inside]
        free = [
            result.group()
            for result in english.WORD.finditer(bare)
            if not any(low <= result.start() < high for low, high in taken)
            and result.group().casefold() not in english.STOP_WORDS
        ]
        return self._facts.known_words([word for word in free if len(word) > 2])

    # ------------------------------------------------------------------- mentions

    def _find_mentions(self, text: str) -> Iterator[_Mention]:
        """Yield the mentions of catalogue values in a text, the longest one at each position."""
        words = [(result.start(), result.end(), title_key(result.group())) for result in english.WORD.finditer(text)]
        at = 0
        while at < len(words):
            result = self._longest_mention(text, words[at : at + self._longest])
            if result is None:
                at += 1
                continue
            yield result
            while at < len(words) and words[at][0] < result.end:
                at += 1

    def _longest_mention(self, text: str, words: Sequence[tuple[int, int, str]]) -> _Mention | None:
        """Return the longest mention at the beginning of a list of words."""
        for size in range(len(words), 0, -1):
            start, end = words[0][0], words[size - 1][1]
            form = " ".join(word for *_, word in words[:size])
            known = self._phrases.get(form) or self._phrases.get(singular(form), [])
            chosen = self._chosen(known, text, start, end, form) if known else None
            if chosen is not None:
                # Brackets after a title contain its year.
                year = _YEAR.match(text[end:]) if chosen[0] == ITEM else None
                return _Mention(*chosen, start, end + (year.end() if year else 0))
        return None

    def _chosen(
        self, known: Sequence[tuple[str, str]], text: str, start: int, end: int, form: str
    ) -> tuple[str, str] | None:
        """Return the intended meaning of a phrase with several known meanings, or None."""
        value = next((pair for pair in known if pair[0] != ITEM), None)
        items = [name for field, name in known if field == ITEM]
        if items:
            year = _YEAR.match(text[end:])
            quoted = text[start - 1 : start] in ('"', "“") and text[end : end + 1] in ('"', "”")
            same = [name for name in items if year and year[1] in self._facts.titles[name]]
            if year or quoted or (value is None and _is_title(text, start, end, form)):
                return ITEM, (same or items)[0]
        if value is not None and len(self._facts.values[value[0]]) > _NAMES_THRESHOLD and " " not in form:
            return value if text[start].isupper() else None
        return value

    def _values(self, form: str) -> list[tuple[str, str]]:
        return [pair for pair in self._phrases.get(form, ()) if pair[0] != ITEM]


# --------------------------------------------------------------------------- words


def spoken_title(title: str) -> str:
    """Return a title as people say it: without its year, and with its article in front."""
    bare = title
    while (result := _BRACKET.search(bare)) is not None and result.start() > 0:
        bare = bare[: result.start()]
    moved = _ARTICLE.match(bare)
    return f"{moved[2]} {moved[1]}" if moved else bare


def _is_title(text: str, start: int, end: int, form: str) -> bool:
    """Whether words that match a title are meant as a title."""
    words = text[start:end].split()
    capitals = sum(word[:1].isupper() or word[:1].isdigit() for word in words)
    before = text[:start].rstrip()
    if len(words) > 1:
        return capitals > 1 or len(words) > 2
    # the first word of a sentence is always capitalised
    inner = bool(before) and before[-1] not in ".!?"
    return capitals == 1 and inner and form not in english.COMMON_WORD_TITLES and len(form) > 3


def _is_name(text: str, value: _Mention) -> bool:
    """Whether a value, such as a brand, is written like a name."""
    name = text[value.start : value.end]
    return name[:1].isupper() and _is_title(text, value.start, value.end, title_key(name))


def _clause_spans(text: str, names: Sequence[_Mention]) -> Iterator[tuple[int, int]]:
    """Yield the start and end of clauses; separators inside titles and names are ignored."""
    begin = 0
    for result in english.CLAUSE_SEPARATOR.finditer(text):
        # the space before a word belongs to the separator
        if any(result.start() < name.end and name.start < result.end() for name in names):
            continue
        if text[begin : result.start()].strip():
            yield begin, result.start()
        begin = result.end()
    if text[begin:].strip():
        yield begin, len(text)


def _mask_names(text: str, names: Sequence[_Mention]) -> str:
    """Mask titles and replace names by neutral words, without changing the length of the text."""
    result = text
    for name in names:
        original = text[name.start : name.end]
        masked = "\u00b7" * len(original) if name.field == ITEM else _LETTER.sub("x", original)
        result = result[: name.start] + masked + result[name.end :]
    return result


def _is_negated(before: str, after: str, item: bool) -> bool:
    """Whether a mention is negated by the last negation before it, or one directly after it."""
    negations = list(
        english.NEGATION.finditer(english.TOLERATED.sub(lambda match: "\u00b7" * len(match.group()), before))
    )
    if not negations and english.LEAVE_OUT[0].search(before) and english.LEAVE_OUT[1].match(after):
        return True
    if negations:
        between = before[negations[-1].end() :]
        return not re.match(r"\s+only\b", between, re.IGNORECASE) and not english.NEGATION_END.search(between)
    return bool(english.IS_NOT.match(after)) or (item and bool(english.DID_NOT.match(after)))


def _is_unseen(before: str) -> bool:
    """Whether the words before a title say that the user has not seen it, which is not a preference."""
    matches = list(english.UNSEEN.finditer(before))
    return bool(matches) and not english.NEGATION_END.search(before[matches[-1].end() :])


def _item_operator(bare: str, unwanted: bool) -> Op:
    """Return the operator (like, dislike, ...) of a clause that names an item."""
    seen, liked = english.SEEN.search(bare), english.LIKE.search(bare)
    if english.DISLIKED.search(bare) or (unwanted and (liked or not seen)):
        return "not"
    return "seen" if seen and not liked else "is"


def _parse_positions(text: str, count: int) -> tuple[int, ...]:
    """Return the list positions mentioned in a text: numbers, *the first one*, *last*."""
    if not count:
        return ()
    matches = english.POSITION.finditer(text)
    positions = [int(item[1]) if item[1] else english.ORDINALS[item[2].lower()] for item in matches]
    if alone := re.fullmatch(r"\s*(\d{1,2})\s*[.!?]?\s*", text):
        positions.append(int(alone[1]))
    positions = [count if position == -1 else position for position in positions]
    return tuple(dict.fromkeys(position for position in positions if 1 <= position <= count))


def _preferences_about_list(
    text: str, state: State, positions: Sequence[int], intents: frozenset[str]
) -> Iterator[UserPreference]:
    """Yield preferences about items of the list to which the user refers."""
    everything = range(1, len(state.shown) + 1) if english.THESE.search(text) else ()
    seen, liked, unwanted = (bool(item.search(text)) for item in (english.SEEN, english.LIKE, english.NEGATION))
    if not (seen or liked or unwanted) or (positions and "similar" in intents) or english.UNSEEN.search(text):
        return
    op: Op = "seen" if seen and (not liked or unwanted) else "not" if unwanted else "is"
    if english.DISLIKED.search(text):
        op = "not"
    for position in positions or everything:
        yield UserPreference(field=ITEM, op=op, value=state.shown[position - 1], hard=False, turn=state.turn)
