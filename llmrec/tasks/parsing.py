"""Parses answers from generated text; no function raises an error for any text."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher

from llmrec.index.titles import INVISIBLE_CHARACTERS, title_key
from llmrec.prompts.words import Words, english_words

MAX_ANSWER_LENGTH = 20_000
"""Number of characters of an answer that are parsed."""
_ALNUM = r"[^\W_]"
# In these scripts (no spaces between words, or attached particles), a label next to a letter is still a label.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff"
_JOINED = rf"[^\W_{_UNSPACED}]"
_NUMBER = re.compile(r"(?<!\w)[-−+]?(?:\d+(?:[.,]\d+)?|\.\d+)")
_ENTRY = re.compile(r"\s*(?:[-•*+]\s+|#?\d{1,3}[.):]\s*|\(\d{1,3}\)\s*)")
# The minimum similarity to match a misspelt title, and the minimum length of both.
_MIN_SIMILARITY, _MIN_FUZZY_LENGTH = 0.9, 6
_NUMERAL = re.compile(r"\b(?:\d+|[ivx]+)\b")


def first_line_keys(text: str) -> Iterator[str]:
    """Yield the first non-empty line, and the same line without a list mark."""
    line = next((line for line in text[:MAX_ANSWER_LENGTH].splitlines() if line.strip()), "")
    if line:
        yield title_key(line)
        bare = _ENTRY.sub("", line, count=1)
        if bare != line:
            yield title_key(bare)


def parse_number(text: str, low: float, high: float, words: Words | None = None) -> float | None:
    """Parse the first number of an answer; None if there is none or it is outside [low, high].

    Digits of any script, ``4.5``, ``4,5``, ``4/5``, ``4 out of 5``, a leading number word and a row of stars are
    recognised; ``words`` are those of the prompt's language, English by default.
    """
    known = words or english_words()
    text = text[:MAX_ANSWER_LENGTH].replace("½", ".5")
    match = _NUMBER.search(text)
    if match is None:
        message = next(iter(re.findall(r"\w+", text.casefold())), "")
        stars = re.search("[★⭐]+", text)
        value = float(len(stars.group())) if stars else None
        if message in known.numbers:
            value = float(known.numbers.index(message))
    else:
        value = float(match.group().replace(",", ".").replace("−", "-"))
        scale = known.scale.match(text, match.end())
        if scale and float(scale.group(1)) != high:
            return None
    return value if value is not None and low <= value <= high else None


# --------------------------------------------------------------------------- rankings


def parse_ranking(text: str, labels: Sequence[str], titles: Sequence[str], words: Words | None = None) -> list[int]:
    """Parse an ordered list of candidates from generated text.

    Labels and titles are equivalent, the first mention of a candidate counts, and other text is ignored.

    Args:
        text: Such as ``B, A, C``, ``1. B) Title``, a JSON list, or a sentence.
        labels: Capital letters, or numbers, one per candidate.
        titles: The candidates' titles, in the same order.
        words: Words of the prompt's language, English by default.

    Returns:
        Indices in ``labels``, best first; empty if nothing could be parsed.
    """
    reader = _LineParser(labels, titles, words or english_words())
    result: dict[int, None] = {}
    text = text[:MAX_ANSWER_LENGTH]
    for lines in (_parse_json_entries(text), text.splitlines()):
        for line in lines:
            for index in reader.line(line):
                result.setdefault(index)
        if result:
            break
    return list(result)


def _parse_json_entries(text: str) -> list[str]:
    start, end = text.find("["), text.rfind("]")
    if not 0 <= start < end:
        return []
    try:
        values = json.loads(text[start : end + 1])
    except (ValueError, RecursionError):
        return []
    entries: list[str] = []
    for value in values:
        parts = list(value.values()) if isinstance(value, dict) else [value]
        texts = [part for part in parts if isinstance(part, str)]
        entries += texts or [str(part) for part in parts if isinstance(part, int)]
    return entries


class _LineParser:
    """Finds candidate labels and titles in a line of an answer."""

    def __init__(self, labels: Sequence[str], titles: Sequence[str], words: Words) -> None:
        self._words = words
        self._numeric = bool(labels) and labels[0].isdecimal()
        self._labels = {self._label_key(label): index for index, label in enumerate(labels)}
        self._titles: dict[str, int] = {}
        for index, title in enumerate(titles):
            key = title_key(title)
            # A title of one letter could be mistaken for a label, as could "1984" if labels are numbers.
            if len(key) > 1 and not (self._numeric and key.isdecimal()):
                self._titles.setdefault(key, index)
        one = r"\d{1,4}" if self._numeric else "[A-Za-z]"
        joining = "".join(rf"|\b{re.escape(word)}\b" for word in words.joining)
        gap = rf"(?:(?:[\s,;>/|→–—&+.):\]\[(\"'`=-]|\*\*{joining})+)"
        self._strict = re.compile(rf"[\s\[(\"'`*#>-]*(?P<list>{one}(?:{gap}{one})*)[\s.,;:)\]\"'`*]*", re.IGNORECASE)
        label = r"\d{1,4}" if self._numeric else "[A-Z]"
        joined = r"[.*'’&/-]"
        self._label = re.compile(
            rf"(?<!{_JOINED})(?<!{_JOINED}{joined})({label})(?!{_JOINED})(?!{joined}{_JOINED})(?P<mark>[*\"'`_]*\s*[).:\]-])?"
        )

    def line(self, line: str) -> list[int]:
        """Return the indices of the candidates that a line mentions, in order."""
        line = INVISIBLE_CHARACTERS.sub("", unicodedata.normalize("NFKC", line))
        key = title_key(line)
        if key in self._titles:
            return [self._titles[key]]
        strict = self._strict.fullmatch(line)
        if strict:
            inner = re.findall(rf"(?<!{_ALNUM})\w+", strict["list"])
            return self._known(inner)
        entry = self._entry_start(line)
        rest = line[entry:]
        spans = self._title_spans(rest)
        marks = self._label_marks(rest, spans, is_entry=entry > 0)
        results = [index for _, index in sorted([*((start, index) for start, _, index in spans), *marks])]
        return results or self._alike(rest)

    def _known(self, words: Sequence[str]) -> list[int]:
        keys = [self._label_key(word) for word in words]
        return [self._labels[key] for key in keys if key in self._labels]

    def _label_key(self, label: str) -> str:
        return str(int(label)) if label.isdecimal() else label.upper()

    def _entry_start(self, line: str) -> int:
        """Return the index where a list entry begins after its bullet or number; 0 if it has none."""
        mark = _ENTRY.match(line)
        if mark is None:
            return 0
        # If labels are numbers, "7. Title" is candidate 7, unless a label follows: "1. 07) Title".
        if self._numeric and any(c.isdigit() for c in mark.group()) and not self._label.match(line, mark.end()):
            return 0
        return mark.end()

    def _alike(self, line: str) -> list[int]:
        """Match a misspelt title if it is the only similar one, as in LLMRank (Hou et al., ECIR 2024).

        Numbers must be equal, in digits or Roman numerals: the second part of a series is not a misspelling of the
        first. A line equally similar to two titles is neither.
        """
        key = title_key(line)
        if len(key) < _MIN_FUZZY_LENGTH:
            return []
        similarity = {}
        matcher = SequenceMatcher(None, autojunk=False)
        matcher.set_seq2(key)
        for title, index in self._titles.items():
            # The lengths give an upper bound of the similarity.
            if (
                2 * min(len(key), len(title)) < _MIN_SIMILARITY * (len(key) + len(title))
                or len(title) < _MIN_FUZZY_LENGTH
            ):
                continue
            matcher.set_seq1(title)
            alike = matcher.quick_ratio() >= _MIN_SIMILARITY and matcher.ratio() >= _MIN_SIMILARITY
            if alike and _NUMERAL.findall(key) == _NUMERAL.findall(title):
                similarity[index] = matcher.ratio()
        best = [index for index, ratio in similarity.items() if ratio == max(similarity.values())]
        return best if len(best) == 1 else []

    def _title_spans(self, line: str) -> list[tuple[int, int, int]]:
        """Return (start, end, index) of the titles in a line; a title inside a longer title does not count."""
        words = _split_words(line)
        text = " " + "".join(f"{word} " for word, _, _ in words)
        # Start of each word in `text`, to map a match back to the line.
        offsets, offset = {}, 0
        for index, (word, _, _) in enumerate(words):
            offsets[offset] = index
            offset += len(word) + 1
        spans: list[tuple[int, int, int]] = []
        for title, candidate in sorted(self._titles.items(), key=lambda pair: (-len(pair[0]), pair[0])):
            at = text.find(f" {title} ")
            while at >= 0:
                first = offsets[at]
                start, end = words[first][1], words[first + title.count(" ")][2]
                if all(end <= s or e <= start for s, e, _ in spans):
                    spans.append((start, end, candidate))
                    break
                at = text.find(f" {title} ", at + 1)
        return spans

    def _label_marks(
        self, line: str, spans: Sequence[tuple[int, int, int]], *, is_entry: bool
    ) -> list[tuple[int, int]]:
        hidden = line
        for start, end, _ in spans:
            hidden = hidden[:start] + "\0" * (end - start) + hidden[end:]
        result = list(self._label.finditer(hidden))
        opening = bool(result) and not re.search(_ALNUM, hidden[: result[0].start()].replace("\0", "x"))
        if is_entry:
            result = result[:1] if opening else []
        elif opening and result[0]["mark"]:
            result = [match for match in result if match["mark"]]
        marks: list[tuple[int, int]] = []
        for match in result:
            index = self._labels.get(self._label_key(match.group(1)))
            after = hidden[match.end() :]
            # A label before the title of another candidate is a list number: the title counts.
            if index is not None and not self._is_word(match.group(1), after, match["mark"]):
                numbering = match["mark"] or after.lstrip().startswith("(")
                if numbering and re.match(r"[\W_]*\0", after):
                    continue
                marks.append((match.start(), index))
        return marks

    def _is_word(self, label: str, after: str, mark: str | None) -> bool:
        """Whether a label such as A or I is an ordinary word here, because other words follow it."""
        if label not in self._words.words_alone or mark:
            return False
        word = re.match(rf"\s+({_ALNUM}{{2,}})", after)
        return word is not None and word.group(1).casefold() not in self._words.linking


def _split_words(line: str) -> list[tuple[str, int, int]]:
    """Split a line into normalised words, each with its (start, end) in the line."""
    words: list[tuple[str, int, int]] = []
    start = None
    for index, character in enumerate(line + " "):
        inside = character.isalnum() or unicodedata.category(character).startswith("M")
        if inside and start is None:
            start = index
        elif not inside and start is not None:
            words += [(word, start, index) for word in title_key(line[start:index]).split()]
            start = None
    return words
