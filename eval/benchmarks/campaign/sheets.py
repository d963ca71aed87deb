"""Mutations of a spreadsheet (.xlsx): cells, sheets, parts, and the archive."""

from __future__ import annotations

import io
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.sax.saxutils import escape, quoteattr

from eval.benchmarks.campaign.spoil import CELLS, some_bytes
from tests.workbook import NAMESPACE, workbook

Random = random.Random
Parts = dict[str, bytes]

_SHEET, _BOOK = "xl/sheet1.xml", "xl/workbook.xml"
_REFERENCES = (
    *("A0", "0", "", "A", "1", "$A$1", "a1", "XFD1048576", "XFE1", "A1048577", "ZZZZZZZZ9", "A99999999999999999999"),
    *("A-1", "A1:B2", "\u0661", "A1048576", "XFD1"),
)
_NUMBERS = (
    *("-1", "0", "1e308", "1e999", "-1e999", "nan", "inf", "9" * 400, "2958465", "2958466", "-2958466", "1e15", "0.5"),
    *("60", "59", "", " ", "x", "1,5", "45000.999999999", "9007199254740993"),
)
_TYPES = ("s", "n", "b", "e", "str", "inlineStr", "d", "nonsense", "")
_FORMULAS = (
    *("1+1", "SUM(A1:A1048576)", "cmd|'/c calc'!A0", 'HYPERLINK("http://127.0.0.1:9/","x")', "A2", "#REF!", "(" * 5000),
    *("", "WEBSERVICE(&quot;http://127.0.0.1:9/&quot;)", "\u202e", "y" * 9000),
)
_NAMES = (
    *("", " ", "x" * 31, "x" * 32, "y" * 70_000, "a/b", "a#b", "#", "../../etc/passwd", "=1+1", "<script>"),
    *("\u202eshop", "Zo\u00eb \u6620\u753b", "'", "Orders ", "orders", "[1]", "{}", "%s", "\U0001f600", "a\nb"),
    "Notes",
)
_MERGES = ("A1:B1", "A1:A3", "A2:E9", "A1:XFD1048576", "A0:B0", "B2:A1", "", "x", "A1", "A1:B2:C3", "A1:A99999999999")
_FORMATS = ("yyyy-mm-dd", "[h]:mm:ss", "dd/mm/yyyy", '"', "[", "General;yyyy", "@", "", "y" * 5000, "0.0000E+00")
_BOMB = '<!DOCTYPE x [<!ENTITY a0 "xxxxxxxxx">' + "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 9}">' for n in range(1, 11))


def sound(lines: list[str]) -> bytes:
    """Return a workbook with a sheet of these rows of cells, and a sheet of notes."""
    return _zipped(_parts(lines))


def some_workbook(rng: Random, lines: list[str]) -> tuple[str, bytes]:
    """Return the description of a mutation, and the mutated workbook."""
    parts = _parts(lines)
    way = rng.random()
    if way < 0.08:
        return some_bytes(rng, _zipped(parts))
    if way < 0.25:
        return _some_archive(rng, parts)
    if way < 0.35:
        name = rng.choice(list(parts))
        fault, parts[name] = some_bytes(rng, parts[name])
        return f"{name}: {fault}", _zipped(parts)
    ways: tuple[Callable[[Random, Parts], str], ...] = (_cell, _cell, _cell, _date, _merged, _rows, _names, _xml, _more)
    return rng.choice(ways)(rng, parts), _zipped(parts)


def _parts(lines: list[str]) -> Parts:
    rows: list[tuple[object, ...]] = [tuple(_value(cell) for cell in line.split(",")) for line in lines]
    with TemporaryDirectory(prefix="llmrec-campaign-") as name:
        path = workbook(Path(name) / "book.xlsx", {"Orders": rows, "Notes": [("note",), ("made by hand",)]})
        with zipfile.ZipFile(path) as archive:
            return {entry: archive.read(entry) for entry in archive.namelist()}


def _value(text: str) -> object:
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else text


def _zipped(parts: Parts) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return stream.getvalue()


def _change(parts: Parts, name: str, old: str, new: str, nth: int = 0) -> None:
    """Replace the nth occurrence of a text."""
    text = parts[name].decode()
    starts = [match.start() for match in re.finditer(re.escape(old), text)]
    at = starts[nth % len(starts)]
    parts[name] = (text[:at] + new + text[at + len(old) :]).encode("utf-8", "surrogatepass")


# --------------------------------------------------------------------------- the archive


def _some_archive(rng: Random, parts: Parts) -> tuple[str, bytes]:
    name = rng.choice(list(parts))
    match rng.randrange(9):
        case 0:
            del parts[name]
            return f"{name} is missing", _zipped(parts)
        case 1:
            parts[rng.choice((name.upper(), f"/{name}", f"../{name}", f"{name}\\x", f"./{name}"))] = parts.pop(name)
            return f"{name} under another name", _zipped(parts)
        case 2:
            parts[name] = parts[name] * rng.choice((2, 50))
            return f"{name} is repeated", _zipped(parts)
        case 3:
            parts["xl/" + "x" * 60_000] = b"x"
            return "a member with a long name", _zipped(parts)
        case 4:
            parts |= {f"xl/media/{n}.png": b"" for n in range(3000)}
            return "3,000 empty members", _zipped(parts)
        case 5:
            parts[name] += b" " * 60_000_000
            return f"{name} unpacks to 60 MB", _zipped(parts)
    raw = bytearray(_zipped(parts))
    local = [entry.start() for entry in re.finditer(b"PK\x03\x04", raw)]
    listed = [entry.start() for entry in re.finditer(b"PK\x01\x02", raw)]
    end = raw.rfind(b"PK\x05\x06")
    # Header fields: offset in the central directory, offset in the local header, new value.
    field, member, value = rng.choice(
        (
            (8, 6, b"\x01\x00"),  # encrypted
            (10, 8, b"\x63\x00"),  # an unknown method
            (10, 8, b"\x0c\x00"),  # the wrong method
            (16, 14, b"\0\0\0\0"),  # checksum
            (20, 18, b"\xff\xff\xff\x7f"),  # packed size
            (24, 22, b"\x01\0\0\0"),  # size
            (42, 26, b"\xff\xff\xff\x7f"),  # start of the member, or length of its name
        )
    )
    if rng.random() < 0.2:
        at = end + rng.choice((8, 10, 12, 16, 20))
        raw[at : at + 2] = b"\xff\xff"
        return f"end of the archive, byte {at - end}", bytes(raw)
    which = rng.randrange(len(listed))
    both = rng.random() < 0.5
    raw[listed[which] + field : listed[which] + field + len(value)] = value
    if both and member != 26:
        raw[local[which] + member : local[which] + member + len(value)] = value
    return f"member {which}, field {field} is {value!r}{' in both headers' if both else ''}", bytes(raw)


# --------------------------------------------------------------------------- cells


def _cell(rng: Random, parts: Parts) -> str:
    text = parts[_SHEET].decode()
    cells = re.findall(r"<c[ >].*?</c>", text)
    at = rng.randrange(len(cells) if rng.random() < 0.7 else 5)
    kind, attributes = rng.choice(_TYPES), ""
    if rng.random() < 0.25:
        attributes += f" r={quoteattr(rng.choice(_REFERENCES))}"
    if rng.random() < 0.1:
        attributes += f' s="{rng.choice(("-1", "0", "7", "99999999999", "x"))}"'
    value = escape(rng.choice(_NUMBERS if rng.random() < 0.5 else CELLS)).replace("\x00", "&#0;").replace("\x1b", "")
    inside = f"<is><t>{value}</t></is>" if kind == "inlineStr" and rng.random() < 0.8 else f"<v>{value}</v>"
    if rng.random() < 0.3:
        formula = rng.choice(_FORMULAS)
        shared = rng.choice(("", ' t="shared" si="0"', ' t="shared" si="999999" ref="A1:XFD9"', ' t="array" ref="x"'))
        inside = f"<f{shared}>{formula}</f>{rng.choice((inside, ''))}"
    new = f"<c{attributes} t={quoteattr(kind)}>{inside}</c>" if kind else f"<c{attributes}>{inside}</c>"
    spans = [match.span() for match in re.finditer(r"<c[ >].*?</c>", text)]
    begin, stop = spans[at]
    parts[_SHEET] = (text[:begin] + new + text[stop:]).encode("utf-8", "surrogatepass")
    return f"cell {at} is {ascii(new)[:60]}"


def _date(rng: Random, parts: Parts) -> str:
    """Format the numbers of a column as dates, some of them invalid."""
    code, number = rng.choice(_FORMATS), rng.choice(_NUMBERS)
    parts["xl/styles.xml"] = (
        f'<styleSheet {NAMESPACE}><numFmts count="1"><numFmt numFmtId="{rng.choice((164, 14, 0, 99999))}" '
        f'formatCode={quoteattr(code)}/></numFmts><cellXfs count="2"><xf numFmtId="0"/><xf numFmtId="164"/>'
        "</cellXfs></styleSheet>"
    ).encode()
    kind = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    links = "xl/_rels/workbook.xml.rels"
    _change(
        parts,
        links,
        "</Relationships>",
        f'<Relationship Id="r9" Type="{kind}/styles" Target="styles.xml"/></Relationships>',
    )
    style = rng.choice((1, 1, 1, 2, 10**9))
    times = re.findall(r"<c><v>17\d+\.0</v></c>", parts[_SHEET].decode())
    for old in times if rng.random() < 0.5 else [rng.choice(times)]:
        _change(parts, _SHEET, old, f'<c s="{style}"><v>{number}</v></c>')
    if rng.random() < 0.3:
        _change(parts, _BOOK, "<sheets>", '<workbookPr date1904="1"/><sheets>')
    return f"dates as {code[:20]!r}, style {style}, number {number[:20]}"


def _merged(rng: Random, parts: Parts) -> str:
    spans = rng.choices(_MERGES, k=rng.choice((1, 2, 3)))
    cells = "".join(f"<mergeCell ref={quoteattr(span)}/>" for span in spans)
    _change(
        parts,
        _SHEET,
        "</worksheet>",
        f'<mergeCells count="{rng.choice((len(spans), -1))}">{cells}</mergeCells></worksheet>',
    )
    return f"merged {spans}"


def _rows(rng: Random, parts: Parts) -> str:
    text = parts[_SHEET].decode()
    rows = re.findall(r"<row>.*?</row>", text)
    ways: dict[str, Callable[[], str]] = {
        "no rows": lambda: "",
        "the header alone": lambda: rows[0],
        "a blank row first": lambda: "<row></row>" + "".join(rows),
        "rows without cells": lambda: "<row/>" * 50 + "".join(rows) + "<row/>" * 50,
        "no header": lambda: "".join(rows[1:]),
        "the header twice": lambda: rows[0] + "".join(rows),
        "a blank name in the header": lambda: "<row><c/>" + rows[0][len("<row>") :] + "".join(rows[1:]),
        "the last row there is": lambda: "".join(rows[:-1]) + rows[-1].replace("<row>", '<row r="1048576">'),
        "a row past the last": lambda: "".join(rows[:-1]) + rows[-1].replace("<row>", '<row r="99999999999">'),
        "rows from below": lambda: "".join(
            row.replace("<row>", f'<row r="{len(rows) - n}">') for n, row in enumerate(rows)
        ),
        "one row many times": lambda: "".join(rows) + rows[1] * 20_000,
        "a wide row": lambda: "".join(rows) + "<row>" + "<c><v>1</v></c>" * 16_385 + "</row>",
        "a corner far away": lambda: "".join(rows) + '<row r="1048576"><c r="XFD1048576"><v>1</v></c></row>',
    }
    name = rng.choice(list(ways))
    dimension = rng.choice(
        ("", "", '<dimension ref="A1:XFD1048576"/>', '<dimension ref="x"/>', '<dimension ref="A1"/>')
    )
    body = text.index("<sheetData>")
    parts[_SHEET] = (text[:body] + f"{dimension}<sheetData>{ways[name]()}</sheetData></worksheet>").encode()
    return f"{name}{' ' if dimension else ''}{dimension}"


# --------------------------------------------------------------------------- sheets and parts


def _names(rng: Random, parts: Parts) -> str:
    name, which = rng.choice(_NAMES), rng.choice(("Orders", "Notes"))
    _change(parts, _BOOK, f'name="{which}"', f"name={quoteattr(name)}")
    state = rng.choice(("", "", ' state="hidden"', ' state="veryHidden"', ' state="x"'))
    _change(parts, _BOOK, "<sheet ", f"<sheet{state} ", rng.randrange(2))
    return f"sheet {which} is named {ascii(name)[:30]}{state}"


def _xml(rng: Random, parts: Parts) -> str:
    name = rng.choice((_SHEET, _BOOK, "xl/_rels/workbook.xml.rels"))
    raw = parts[name]
    ways: dict[str, bytes] = {
        "a bomb of entities": f"{_BOMB}]>".encode() + raw.replace(b"</", b"&a10;</", 1),
        "an entity of another file": b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>'
        + raw.replace(b"</", b"&a;</", 1),
        "another encoding": b'<?xml version="1.0" encoding="x-nonsense"?>' + raw,
        "UTF-16": raw.decode().encode("utf-16"),
        "deep elements": raw.replace(b"</", b"<a>" * 100_000 + b"</", 1),
        "another namespace": raw.replace(b"spreadsheetml/2006/main", b"nonsense"),
        "no namespace": raw.replace(NAMESPACE.encode(), b""),
        "targets elsewhere": raw.replace(b'Target="', b'Target="../../../../etc/'),
        "absolute targets": raw.replace(b'Target="', b'Target="/xl/'),
        "targets on a network": raw.replace(b'Target="', b'TargetMode="External" Target="http://127.0.0.1:9/'),
        "one id twice": raw.replace(b'"r2"', b'"r1"'),
        "ids of nothing": raw.replace(b'"r1"', b'"r7"'),
    }
    fault = rng.choice(list(ways))
    parts[name] = ways[fault]
    return f"{name}: {fault}"


def _more(rng: Random, parts: Parts) -> str:
    """Add valid or invalid notes, shared strings or chart sheets."""
    kind = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    odd = escape(rng.choice(CELLS)).replace("\x00", "").replace("\x1b", "")
    if rng.random() < 0.4:
        where = rng.choice(_REFERENCES)
        parts["xl/comments1.xml"] = (
            f"<comments {NAMESPACE}><authors><author>x</author></authors><commentList><comment ref={quoteattr(where)} "
            f'authorId="{rng.choice((0, -1, 99))}"><text><t>{odd}</t></text></comment></commentList></comments>'
        ).encode("utf-8", "surrogatepass")
        parts["xl/_rels/sheet1.xml.rels"] = (
            '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
            f'<Relationship Id="r1" Type="{kind}/comments" Target="comments1.xml"/></Relationships>'
        ).encode()
        return f"a note at {where}: {ascii(odd)[:30]}"
    links = "xl/_rels/workbook.xml.rels"
    if rng.random() < 0.5:
        number = rng.choice(("0", "1", "-1", "99999999999", "x"))
        parts["xl/sharedStrings.xml"] = (
            f'<sst {NAMESPACE} count="{rng.choice(("1", "-1", "999999999999"))}" uniqueCount="1"><si><t>{odd}</t></si>'
            "</sst>"
        ).encode("utf-8", "surrogatepass")
        _change(
            parts,
            links,
            "</Relationships>",
            f'<Relationship Id="r8" Type="{kind}/sharedStrings" Target="sharedStrings.xml"/></Relationships>',
        )
        cells = re.findall(r'<c t="inlineStr">.*?</c>', parts[_SHEET].decode())
        _change(parts, _SHEET, rng.choice(cells), f'<c t="s"><v>{number}</v></c>')
        return f"shared string {number} of one: {ascii(odd)[:30]}"
    kinds = rng.choice(("chartsheet", "dialogsheet", "macroSheet", "nonsense"))
    _change(parts, links, f"{kind}/worksheet", f"{kind}/{kinds}", rng.randrange(2))
    return f"a sheet is a {kinds}"
