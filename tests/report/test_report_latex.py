"""The LaTeX tables: one per task with a valid structure, and escaped texts."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.report.escape import escape_tex
from llmrec.report.render import render_latex
from llmrec.report.results import parse_results
from tests.report.payloads import FORMULAS, LATEX, SCRIPTS
from tests.report.sample_run import hostile_results, sample_results

COMMANDS = {
    *("begin", "end", "centering", "footnotesize", "setlength", "tabcolsep", "caption", "label", "toprule", "midrule"),
    *("bottomrule", "addlinespace", "textbf", "tiny", "shortstack", "texttt", "allowbreak"),
    *("textbackslash", "textasciicircum", "textasciitilde", "textless", "textgreater", "textbar", "symbol"),
    *("textperiodcentered", "dots"),
}
# A control word, a control symbol, a special character, or any other one.
_TOKEN = re.compile(r"\\([a-zA-Z]+)|\\([^a-zA-Z])|([{}$&#%_^~])|(.|\n)", re.S)


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    for word, symbol, special, other in _TOKEN.findall(text):
        kind = "word" if word else "symbol" if symbol else "special" if special else "other"
        yield kind, word or symbol or special or other


def _tables(text: str) -> list[str]:
    return re.findall(r"\\begin\{table\}.*?\\end\{table\}", text, flags=re.S)


def _check_structure(text: str) -> None:
    """Check commands, braces, and the number of cells in each row."""
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    depth = 0
    for kind, token in _tokens(body):
        assert kind != "word" or token in COMMANDS, token
        assert kind != "symbol" or token in "\\{}$&#%_,", token
        assert kind != "special" or token in "{}$&", token
        depth += {"{": 1, "}": -1}.get(token, 0) if kind == "special" else 0
        assert depth >= 0
    assert depth == 0
    assert body.isascii() or not re.search("[^\x20-\x7e\n\u00c0-\u00ff]", body)
    # A minus is the only maths.
    assert body.count("$-$") * 2 + 2 * body.count("$n$") == len(re.findall(r"(?<!\\)\$", body))
    for table in _tables(body):
        columns = re.search(r"\\begin\{tabular\}\{@\{\}([lr]+)@\{\}\}", table)
        assert columns is not None
        inner = table.split(columns[0])[1].split(r"\end{tabular}")[0]
        rows = [line for line in inner.splitlines() if line.strip() and not re.match(r"\\\w+rule", line)]
        for row in rows:
            assert row.endswith((r"\\", r"\\[3pt]"))
            assert len(re.findall(r"(?<!\\)&", row)) == len(columns[1]) - 1
            # In a row, two backslashes are only used in stacked cells.
            assert all(re.match(r"\\\\(\{\\tiny \[|zero-shot|baseline)", row[m.start() :]) for m in
                       re.finditer(r"\\\\(?!\[3pt\]$|$)", row))  # fmt: skip


def test_one_table_per_task(results: dict[str, Any]) -> None:
    text = render_latex(parse_results(results))
    tables = _tables(text)
    assert len(tables) == 4 and text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 4
    assert [re.findall(r"\\caption\{(\w+ \w+)", table)[0] for table in tables] == [
        *("Rating prediction", "Next item", "Pick from", "Explanations on"),
    ]  # fmt: skip
    assert re.findall(r"\\label\{(.*?)\}", text) == [f"tab:llmrec-{number}" for number in range(1, 5)]
    for table, task in zip(tables, results["headline"], strict=True):
        assert sum(line.endswith(r"\\[3pt]") for line in table.splitlines()) == sum(
            row["task"] == task for row in results["rows"]
        )
    _check_structure(text)


def test_values_intervals_and_order_of_rows(results: dict[str, Any]) -> None:
    results["rows"][0]["metrics"]["MAE"].update(value=-0.25, low=None, high=None)
    table = _tables(render_latex(parse_results(results)))[0]
    assert r"\shortstack[r]{\textbf{0.930}\\{\tiny [0.865, 1.002]}}" in table
    assert r"\textbf{$-$0.250}" in table
    lines = [line for line in table.splitlines() if line.endswith(r"\\[3pt]")]
    # Language models first, then baselines, each best first.
    assert [line.split(" &")[0].split(r"\textperiodcentered")[0].strip() for line in lines] == [
        *("fine-tuned", "fine-tuned", "few-shot", "zero-shot"),
        *("user-item-bias", "item-mean", "user-mean", "global-mean"),
    ]  # fmt: skip
    assert table.count(r"\midrule") == 2
    for part in ("RMSE (lower is better)", "seed 0", "200 requests", "Holm-corrected", "best baseline, user-item-bias"):
        assert part in table


def test_missing_comparisons_and_values(results: dict[str, Any]) -> None:
    results["comparisons"] = [entry for entry in results["comparisons"] if entry["task"] != "rating"]
    del results["rows"][0]["metrics"]["MAE"]
    results["rows"][1]["metrics"]["MAE"].update(value=None, low=None, high=None, undefined="50 % of nothing")
    text = render_latex(parse_results(results))
    tables = _tables(text)
    assert "vs." not in tables[0] and r"vs.\\zero-shot" in tables[1]
    assert "Best baseline: user-item-bias." in tables[0]
    assert len(re.findall(r"& -- & 200 ", _tables(text)[0])) == 1
    assert len(re.findall(r"& undefined & 200 ", _tables(text)[0])) == 1
    assert r"is undefined: 50 \% of nothing." in _tables(text)[0]
    _check_structure(text)


# --------------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}$&#%_", r"\{\}\$\&\#\%\_"),
        ("\\^~", r"\textbackslash{}\textasciicircum{}\textasciitilde{}"),
        ("<>|", r"\textless{}\textgreater{}\textbar{}"),
        ('"', r"{}\symbol{34}{}"),
        ("[]*", "{[}{]}{*}"),
        ("---", "-{}-{}-"),
        ("''", "'{}'"),
        (",,", ",{},"),
        ("?`", r"?{}\symbol{96}{}"),
        ("a\n\n b\t", "a b"),
        ("Amélie", "Amélie"),
        ("ð ÷", "{[}U+00F0{]} {[}U+00F7{]}"),
        ("映🎬", "{[}U+6620{]}{[}U+1F3AC{]}"),
        ("\x1b\u202e", "{[}U+001B{]}{[}U+202E{]}"),
        ("0.5–0.6…", r"0.5--0.6\dots{}"),
    ],
)
def test_special_characters(text: str, expected: str) -> None:
    assert escape_tex(text) == expected


@given(st.text() | st.text("\\{}$&#%_^~<>|\"'`[]*,-?! \n", max_size=20))
def test_escapes_any_text(text: str) -> None:
    written = escape_tex(text)
    assert "\n" not in written
    depth = 0
    for kind, token in _tokens(written):
        assert kind != "word" or token.startswith(("text", "symbol", "dots"))
        assert kind != "symbol" or token in "{}$&#%_,"
        assert kind != "special" or token in "{}"
        depth += {"{": 1, "}": -1}.get(token, 0) if kind == "special" else 0
        assert depth >= 0
    assert depth == 0 and not written.startswith(("[", "*"))


def _documents() -> Iterator[str]:
    texts = [*LATEX, *FORMULAS, *SCRIPTS]
    for start in range(0, len(texts), 40):
        yield render_latex(parse_results(hostile_results(sample_results(), [*texts[start:], *texts[:start]])))


def test_hostile_texts_keep_the_structure() -> None:
    for text in _documents():
        assert len(_tables(text)) == 4
        _check_structure(text)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on PATH")
def test_pdflatex_accepts_hostile_texts(tmp_path: Path) -> None:
    bodies = list(_documents())
    for number, body in enumerate(bodies):
        (tmp_path / f"table{number}.tex").write_text(body, "utf-8")
    inputs = "".join(rf"\input{{table{number}}}\clearpage" for number in range(len(bodies)))
    document = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{inputs}\end{{document}}"
    (tmp_path / "all.tex").write_text(document, "utf-8")
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "-no-shell-escape", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=90, check=False)
    assert done.returncode == 0, done.stdout[-1500:].decode("utf-8", "replace")
    assert not (tmp_path / "pwned").exists()


def test_file_is_in_the_report(pages: dict[str, Path], results: dict[str, Any]) -> None:
    assert pages["latex"].name == "table.tex"
    assert pages["latex"].read_text("utf-8") == render_latex(parse_results(results))
    assert 'href="table.tex"' in pages["html"].read_text("utf-8")
