"""Figures on a page, and the comments that bind them.

**A figure** is a number with a decimal point, a count with thousands separators, a percentage, a number like 2e-16, an
integer with milliseconds, seconds, minutes or hours, or with times (faster, slower, longer, as, the). Not checked are
code blocks, backticks, headings, link targets and generated parts; versions (three numbers, or after the name of a
program); numbers of sections and papers; the level of the intervals (95 %). So write parameters in backticks.

**A comment binds** figures, in order, to expressions of `pointers`, one per line or separated by ``;``:

    Tuning gains +.163 [+.138, +.187]. <!-- figures: $pair/{value,low,high} -->

At the end of a line it binds the text before it on that line. On separate lines it binds the following paragraph, list
or table. ``a/{b,c}`` is ``a/b; a/c``. ``$name = TEXT`` defines an abbreviation for the rest of the page.

For a table, a line names a row by its first cell, then the expressions of the other cells, separated by ``|``; several
rows with the same first cell are matched in order. After ``each: CELLS`` rows give the values of $1, $2; $0 is the
row's name:

    <!-- figures
    each: $beauty[name=$1]/tables/excluded/metrics/{HR@5,NDCG@5} | $beauty[name=$1]/seconds/fit
    SASRec, full softmax: sasrec
    decayed Markov: markov
    -->

A value is rounded, half to even, to the printed decimals. Without a sign the value must not be negative. A percentage
is compared with a hundred times the value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_HALF_EVEN, Decimal
from itertools import pairwise

FIGURE = re.compile(
    r"(?<![\w.,/])(?P<sign>(?<![\d\w)])[−+-])?"
    r"(?P<digits>\d+(?:\.\d+)?e-?\d+|\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.\d+|\d+(?=(?: to \d+)? ?%)"
    r"|\d+(?=(?: to \d+)? (?:ms|s|seconds?|minutes?|hours?)\b)"
    r"|\d+(?=(?: to \d+)? times (?:as|faster|slower|longer|the)\b))(?![\d+]|\.\d|\w(?<!K))(?P<percent> ?%)?"
)
NO_FIGURE = re.compile(
    r"(?:Apache|License|Python|torch|bitsandbytes|capability|[Ss]ection|[Tt]able|[Ee]quation|arXiv) \d+(?:\.\d+)*"
    r"|\b\d{4}\.\d{5}\b|\b95 %"
)
FENCE = re.compile(r"^(```|~~~).*?^\1 *$", re.M | re.S)
HIDDEN = (
    re.compile(r"`[^`\n]+`"),
    re.compile(r"(?<=\])\([^)\n]*\)"),
    re.compile(r"https?://\S+"),
    re.compile(r"^#+ .*$", re.M),
    NO_FIGURE,
)
GENERATED = re.compile(r"<!-- (?P<name>[\w-]+:[\w-]+) -->.*?<!-- /(?P=name) -->", re.S)
COMMENT = re.compile(r"<!--.*?-->", re.S)
BINDING = re.compile(r"<!-- figures:?\s(?P<body>.*?)-->", re.S)
BRACES = re.compile(r"\{([^{}]*)\}")


class BindingError(Exception):
    """A comment that does not match the figures that it binds."""


@dataclass(frozen=True)
class Figure:
    """A printed figure.

    Attributes:
        start: Start of its text on the page.
        end: End of its text, without the percent sign.
        sign: Sign as printed, or empty.
        digits: Digits without sign.
        percent: Whether it is a percentage.
    """

    start: int
    end: int
    sign: str
    digits: str
    percent: bool

    def __str__(self) -> str:
        """Return the figure as printed."""
        return f"{self.sign}{self.digits}{' %' if self.percent else ''}"

    def written(self, value: Decimal) -> str:
        """Return a value in the form of this figure."""
        value = value * 100 if self.percent else value
        if "e" in self.digits:
            mantissa = self.digits.partition("e")[0]
            decimals = len(mantissa.partition(".")[2])
            text = f"{abs(value):.{decimals}e}"
            head, _, power = text.partition("e")
            return f"{self._sign(value)}{head}e{int(power)}"
        decimals = len(self.digits.partition(".")[2])
        rounded = value.quantize(Decimal(1).scaleb(-decimals), rounding=ROUND_HALF_EVEN)
        text = f"{abs(rounded):,}" if "," in self.digits or abs(rounded) >= 10_000 else str(abs(rounded))
        if self.digits.startswith(".") and text.startswith("0."):
            text = text[1:]
        return f"{self._sign(rounded)}{text}"

    def _sign(self, value: Decimal) -> str:
        if value < 0:
            return self.sign if self.sign in {"−", "-"} else "−"
        return "+" if self.sign == "+" else ""


@dataclass(frozen=True)
class Bound:
    """A figure and the expression that it must equal."""

    figure: Figure
    expression: str


@dataclass(frozen=True)
class Page:
    """The figures of a page, and the faults of its comments."""

    bound: tuple[Bound, ...]
    unbound: tuple[Figure, ...]
    faults: tuple[str, ...]


@dataclass
class _Names:
    known: dict[str, str] = field(default_factory=dict)

    def put(self, text: str) -> str:
        """Return a text with the abbreviations expanded."""
        for _ in range(5):
            text, count = re.subn(r"\$([A-Za-z_]\w*)", self._one, text)
            if not count:
                return text
        raise BindingError(f"circular abbreviations: {text}")

    def _one(self, match: re.Match[str]) -> str:
        if match[1] not in self.known:
            raise BindingError(f"${match[1]} is undefined here")
        return self.known[match[1]]


def masked(text: str) -> str:
    """Return the page with all parts blanked that cannot contain figures; positions are unchanged."""
    return _blanked(text, FENCE, GENERATED, COMMENT, *HIDDEN)


def plain_claims(text: str) -> str:
    """Return the page with comments and code blocks blanked; positions are unchanged."""
    return _blanked(text, FENCE, COMMENT)


def _blanked(text: str, *patterns: re.Pattern[str]) -> str:
    """Return a text with all matches blanked, one pattern after the other; line breaks are unchanged."""
    for pattern in patterns:
        text = pattern.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)
    return text


def figures(plain: str, start: int = 0, end: int | None = None) -> list[Figure]:
    """Return the figures of a masked page between two positions."""
    return [
        Figure(match.start(), match.end("digits"), match["sign"] or "", match["digits"], bool(match["percent"]))
        for match in FIGURE.finditer(plain, start, len(plain) if end is None else end)
    ]


def read(text: str, excepted: Sequence[tuple[int, int]] = ()) -> Page:
    """Return the figures of a page with their expressions.

    Args:
        text: The page.
        excepted: Ranges whose figures need no source.
    """
    plain = masked(text)
    for start, end in excepted:
        plain = plain[:start] + re.sub(r"[^\n]", " ", plain[start:end]) + plain[end:]
    code = _blanked(text, FENCE)
    names, bound, faults = _Names(), [], []
    for comment in BINDING.finditer(code):
        line = text.rfind("\n", 0, comment.start()) + 1
        alone = not text[line : comment.start()].strip()
        try:
            lines = _lines(comment["body"], names)
            if not alone:
                start = max([line, *(each.end() for each in BINDING.finditer(text, line, comment.start()))])
                bound += _in_order(lines, figures(plain, start, comment.start()), names)
                continue
            start, end = _block(text, comment.end())
            if text[start:end].lstrip().startswith("|"):
                bound += _table(lines, text, plain, (start, end), names)
            elif lines:
                bound += _in_order(lines, _free(text, plain, start, end), names)
        except BindingError as error:
            faults.append(f"line {text.count(chr(10), 0, comment.start()) + 1}: {error}")
    starts = {each.figure.start for each in bound}
    unbound = tuple(each for each in figures(plain) if each.start not in starts)
    return Page(tuple(bound), unbound, tuple(faults))


def _lines(body: str, names: _Names) -> list[str]:
    """Return the binding lines, and store the abbreviations."""
    kept = []
    for line in body.splitlines():
        match = re.match(r"\s*\$([A-Za-z_]\w*) = (\S.*?)\s*$", line)
        if match:
            names.known[match[1]] = match[2]
        elif line.strip():
            kept.append(line.strip())
    return kept


def _block(text: str, position: int) -> tuple[int, int]:
    """Return the range after a comment, up to an empty line."""
    start = text.find("\n", position) + 1
    end = text.find("\n\n", start)
    return start, len(text) if end < 0 else end


def _free(text: str, plain: str, start: int, end: int) -> list[Figure]:
    """Return the figures of a block, except on lines that end with a separate comment."""
    result, position = [], start
    for line in text[start:end].splitlines(keepends=True):
        if not BINDING.search(line):
            result += figures(plain, position, position + len(line))
        position += len(line)
    return result


def expressions(text: str, names: _Names) -> list[str]:
    """Return the expressions of a text, with braces expanded."""
    result = []
    for part in re.split(r";(?![^\[]*\])", names.put(text)):
        result += list(_spread(part.strip())) if part.strip() not in {"", "-"} else []
    return result


def _spread(text: str) -> Iterator[str]:
    match = BRACES.search(text)
    if match is None:
        yield text
        return
    for option in match[1].split(","):
        yield from _spread(text[: match.start()] + option.strip() + text[match.end() :])


def _pair(printed: Sequence[Figure], texts: Sequence[str], where: str) -> list[Bound]:
    if len(printed) != len(texts):
        shown = ", ".join(map(str, printed)) or "none"
        raise BindingError(f"{where}: {len(printed)} figures ({shown}), {len(texts)} expressions ({'; '.join(texts)})")
    return [Bound(figure, expression) for figure, expression in zip(printed, texts, strict=True)]


def _in_order(lines: Sequence[str], printed: Sequence[Figure], names: _Names) -> list[Bound]:
    return _pair(printed, [each for line in lines for each in expressions(line, names)], "in order")


def _table(lines: Sequence[str], text: str, plain: str, block: tuple[int, int], names: _Names) -> list[Bound]:
    rows: dict[str, list[list[tuple[int, int]]]] = {}
    position, bound = block[0], []
    for number, line in enumerate(text[block[0] : block[1]].splitlines(keepends=True)):
        cells = _cells(line, plain[position : position + len(line)], position)
        if number > 1:
            name = re.sub(r"[*`]", "", text[cells[0][0] : cells[0][1]]).strip()
            rows.setdefault(name, []).append(cells[1:])
        position += len(line)
    template = ""
    for line in lines:
        label, _, rest = line.rpartition(": ") if ": " in line else (line.removesuffix(":"), "", "")
        if label == "each":
            template = rest
            continue
        if not rows.get(label):
            raise BindingError(f"no (further) row of the table is called {label!r}; there are {', '.join(rows)}")
        columns = [each.strip() for each in _split(rest)]
        expected_cells = _split(_filled(template, [label, *columns])) if template else columns
        for cell, expected in zip(rows[label].pop(0), expected_cells, strict=False):
            printed = figures(plain, *cell)
            if printed or not template:
                bound += _pair(printed, expressions(expected, names), f"row {label!r}")
    return bound


def _filled(template: str, values: Sequence[str]) -> str:
    """Return a row's cells from those after ``each``; missing values are empty."""
    return re.sub(r"\$(\d)", lambda match: values[int(match[1])] if int(match[1]) < len(values) else "", template)


def _split(text: str) -> list[str]:
    return re.split(r" *\| *", text) if text else []


def _cells(line: str, plain: str, offset: int) -> list[tuple[int, int]]:
    """Return the positions of a row's cells."""
    bars = [index for index, letter in enumerate(line) if letter == "|" and not _escaped(line, index)]
    return [(offset + left + 1, offset + right) for left, right in pairwise(bars)]


def _escaped(line: str, index: int) -> bool:
    return line[index - 1 : index] == "\\" or line.count("`", 0, index) % 2 == 1
