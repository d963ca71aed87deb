"""The audit in the report: its findings are shown, and a run with a leak has no tables."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmrec.errors import DataError
from llmrec.report.audit import LeakError, read_audit_lines
from llmrec.report.page import PAGES, write_report
from llmrec.report.results import read_results
from tests.facts import Facts, raises
from tests.report.sample_run import NASTY, sample_audit, save_run

Save = Callable[[dict[str, Any]], Path]
LEAK = {
    "name": "training rows of direct",
    "found": f"2 held-out pairs {NASTY[0]}",
    "verdict": "leak",
    "examples": ["u1, i7\n\x1b[31m"],
}


def _section(html: str) -> str:
    return html.split('<section id="audit"')[1].split("</section>")[0]


def test_checks_are_in_the_page_and_in_markdown(results: dict[str, Any], tmp_path: Path) -> None:
    pages = write_report(save_run(tmp_path, results, sample_audit()))
    section = _section(pages["html"].read_text("utf-8"))
    assert "3 checks, no leak, 1 notice." in section
    rows = section.split("<tbody>")[1].split("<tr>")[1:]
    assert [re.findall(r"</span> (notice|clean|leak)", row)[0] for row in rows] == ["notice", "clean", "clean"]
    assert "3 titles are used more than once" in rows[0] and "Alien (i7, i90)" in rows[0]
    assert "&lt;img src=x" in rows[0] and "<img" not in rows[0]
    text = pages["markdown"].read_text("utf-8").split("## Audit")[1].split("\n## ")[0]
    assert "| notice | duplicate items | 3 titles are used more than once | Alien (i7, i90); " in text
    assert text.index("| notice |") < text.index("| clean |") and text.count("| clean |") == 2


def test_report_without_an_audit_names_the_command(pages: dict[str, Path]) -> None:
    folder = pages["html"].parents[1]
    assert f"not audited. To audit it: <code>llmrec audit {folder}</code>" in _section(pages["html"].read_text("utf-8"))
    assert "not audited. To audit it: " in pages["markdown"].read_text("utf-8")
    assert read_audit_lines(folder) is None


def test_audit_of_other_results_is_not_shown(results: dict[str, Any], tmp_path: Path) -> None:
    folder = save_run(tmp_path, results, sample_audit())
    assert read_audit_lines(folder) is not None
    (folder / "results.json").write_text(json.dumps(results | {"seconds": 1.0}), "utf-8")
    assert read_audit_lines(folder) is None
    assert "not audited. To audit it: " in write_report(folder)["markdown"].read_text("utf-8")


def test_run_with_a_leak_has_no_tables(results: dict[str, Any], tmp_path: Path) -> None:
    folder = save_run(tmp_path / "run", results, sample_audit(LEAK))
    says = ("this run leaks held-out data", "training rows of direct: 2 held-out pairs")
    with raises(LeakError, Facts("leak", "audit.json", says=says)) as e:
        write_report(folder)
    assert "u1, i7" in str(e.value) and "\x1b" not in str(e.value) and "\n" not in str(e.value)
    assert {file.name for file in (folder / "report").iterdir()} == {"index.html", "report.md"}
    for name in ("index.html", "report.md"):
        text = (folder / "report" / name).read_text("utf-8")
        assert text.index("This run leaks held-out data, so its report has no results.") < text.index(
            "2 held-out pairs"
        )
        assert "1 leak, " in text and "u1, i7" in text and "\x1b" not in text and "<img" not in text
        assert not any(
            f"{row['metrics'][metric]['value']:.3f}" in text for row in results["rows"] for metric in row["metrics"]
        )
    with pytest.raises(LeakError):
        read_results(folder)


def test_later_leak_removes_the_tables(results: dict[str, Any], tmp_path: Path) -> None:
    folder = save_run(tmp_path / "run", results, sample_audit())
    pages = write_report(folder)
    assert all(page.is_file() for page in pages.values()) and set(pages) == set(PAGES)
    save_run(folder, results, sample_audit(LEAK, LEAK | {"name": "another"}))
    with raises(LeakError, Facts("leak", "audit.json", says="and 1 more")):
        write_report(folder)
    assert not pages["csv"].exists() and not pages["latex"].exists()
    assert all("This run leaks" in pages[kind].read_text("utf-8") for kind in ("html", "markdown"))
    assert (folder / "results.json").is_file() and (folder / "audit.json").is_file()


def test_rejects_damaged_audit(results: dict[str, Any], save: Save) -> None:
    folder = save(results)
    unknown = b'{"checks": [{"name": "a", "found": "b", "verdict": "fine"}]}'
    for content in (b"", b"{}", b'{"checks": 3}', unknown, b"[" * 100_000):
        (folder / "audit.json").write_bytes(content)
        with raises(DataError, Facts("damaged", folder / "audit.json", says=f"llmrec audit {folder}")):
            write_report(folder)
    assert not (folder / "report").exists()
