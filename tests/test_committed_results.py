"""Committed results have their provenance, and no data of other people."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.benchmarks.provenance import EXCEPTIONS, lacking, provenance

ROOT = Path(__file__).parent.parent
BOARD = yaml.safe_load((ROOT / "eval" / "leaderboard.yaml").read_text(encoding="utf-8"))
COLUMNS = sorted({column["suite"] for group in BOARD["groups"] for column in group["columns"]})
READS = ("events", "texts", "language model")


@cache
def results() -> dict[str, Any]:
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "eval" / "results").glob("*.json")
    }


def test_incomplete_provenance_has_a_reason() -> None:
    listed: dict[str, set[str]] = {}
    for entry in yaml.safe_load((ROOT / EXCEPTIONS).read_text(encoding="utf-8")):
        assert entry["reason"]
        for name in entry["results"]:
            listed.setdefault(name, set()).update(entry["lacks"])
    assert listed == {name: lacks for name, result in results().items() if (lacks := lacking(result, ROOT))}


def test_provenance_needs_every_part() -> None:
    complete = {"command": "llmrec eval eval/suites/toys.yaml", **provenance(), "commit": "abc"}
    assert lacking(complete, ROOT) == set()
    for part, without in (
        ("command", {**complete, "command": ""}),
        ("commit", {**complete, "commit": ""}),
        ("commit", {**complete, "commit": "abc+"}),
        ("version", {**complete, "versions": {}}),
        ("machine", {**complete, "machine": {}}),
        ("duration", {**complete, "duration": None}),
        ("script", {**complete, "command": "llmrec run recipes/removed.yaml"}),
        ("script", {**complete, "command": "python -m eval.benchmarks.removed OUT"}),
        ("script", {**complete, "command": "make bench NAME=removed"}),
    ):
        assert lacking(without, ROOT) == {part}


def test_no_result_has_texts_of_other_people() -> None:
    for name, result in results().items():
        shown = [key for key in ("example", "examples", "gallery", "newcomers", "texts") if result.get(key)]
        failed = [row["id"] for row in result.get("rows", ()) if "id" in row and row.get("failures")]
        assert not shown and not failed, (name, "write it with eval.benchmarks.record", shown, failed)


@pytest.mark.parametrize("suite", COLUMNS)
def test_ensemble_is_compared_with_the_best_tuned_model_or_the_page_says_so(suite: str) -> None:
    result = results()[suite]
    page = (ROOT / "eval" / f"{suite}.md").read_text(encoding="utf-8")
    for table in result["tables"]:
        name = table["name"]
        rows = {row["name"]: row for row in result["rows"] if name in row["tables"]}
        single = {key: row for key, row in rows.items() if row["tables"][name].get("fusion") is None}
        for pair in result["pairs"]:
            if pair["table"] != name or pair["a"] in single or pair["b"] not in single:
                continue
            most = READS.index(rows[pair["a"]]["reads"])
            sign = 1 if single[pair["b"]]["chosen_by"] in ("RMSE", "LogLoss") else -1
            reached = {
                key: min(sign * trial["values"][name] for trial in row["trials"])
                for key, row in single.items()
                if row["trials"] and READS.index(row["reads"]) <= most
            }
            best = min(reached, key=lambda key: reached[key])
            output = f"`{pair['a']}` is compared with `{pair['b']}`, which is not the best model on validation"
            heading = {"excluded": "## Seen items filtered\n", "included": "## Seen items not filtered\n"}.get(
                name, "## "
            )
            part = page.partition(heading)[2].partition("\n## ")[0]
            assert (output in part) == (reached[pair["b"]] > reached[best]), (suite, name, pair["a"], pair["b"], best)


def test_every_result_is_used_by_a_page() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "eval" / "negative_results.yaml"]
    pages += [path for folder in ("docs", "eval") for path in (ROOT / folder).glob("*.md")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    used = set(re.findall(r"(?:^|[\s(\"`])([\w-]+):[\w\[$]", text, re.M)) | set(
        re.findall(r"results/([\w-]+)\.json", text)
    )
    site = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    unused = {name for name in results() if name not in used and f'"eval/{name}.md"' not in site}
    # The last campaign is checked by a test.
    assert unused == {"campaign"}
