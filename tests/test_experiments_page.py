"""The page of experiments follows from the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks.experiments import read, write
from llmrec.errors import DataError
from llmrec.resources import resource
from tests.facts import Facts, raises

FOLDER = resource("eval")


def test_no_committed_result_holds_prompts_texts_or_titles_of_other_people() -> None:
    for path in sorted((FOLDER / "results").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        shown = [key for key in ("example", "examples", "gallery", "newcomers", "texts") if found.get(key)]
        failed = [row["id"] for row in found.get("rows", ()) if "id" in row and row.get("failures")]
        assert not shown and not failed, (path.name, "write it with eval.benchmarks.record", shown, failed)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (
            {
                "kind": "suite",
                "protocol": {"users": 943, "seeds": [0, 1, 2]},
                "rows": [{"seeds": 1}],
                "seconds": 3600.0,
            },
            (943, 3, 1.0, False),
        ),
        (
            {"kind": "suite", "protocol": {"users": 166, "seeds": [0, 1, 2]}, "rows": [], "seconds": 0.0},
            (166, 3, 0.0, True),
        ),
        (
            {
                "kind": "suite",
                "protocol": {"users": 943, "seeds": [0, 1, 2]},
                "rows": [{"seeds": 3}, {"seeds": 1, "fewer_seeds": True}],
                "seconds": 0.0,
            },
            (943, 1, 0.0, False),
        ),
        (
            {
                "kind": "chat",
                "protocol": {"seeds": [0, 1, 2]},
                "rows": [
                    {"dialogues": {"manager": "rules", "users": 400}},
                    {"dialogues": {"manager": "some/model", "users": 12}},
                ],
                "seconds": 0.0,
            },
            (12, 3, 0.0, True),
        ),
        (
            {
                "kind": "benchmark",
                "seconds": 7200.0,
                "tables": [{"users": 400}, {"users": 300}],
                "rows": [
                    {"arm": "tuned", "seeds": 3},
                    {"arm": "zero-shot", "seeds": 1},
                    {"arm": "tuned", "seeds": 2},
                ],
            },
            (300, 2, 2.0, True),
        ),
        (
            {
                "seeds": [0, 1, 2],
                "users": 250,
                "seconds": 3600.0,
            },
            (250, 3, 1.0, False),
        ),
    ],
)
def test_users_seeds_and_hours_are_those_of_the_result(
    tmp_path: Path, result: dict[str, Any], expected: tuple[int, int, float, bool]
) -> None:
    (tmp_path / "some.json").write_text(json.dumps(result), encoding="utf-8")
    (found,) = read(tmp_path)
    assert (found.cases, found.seeds, found.hours, found.exploratory) == expected
    assert ("`some` \\*" in write([found])) == expected[3] and ("1 to 3" in write([found])) == (expected[1] == 1)


def test_a_result_that_says_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "some.json").write_text('{"kind": "suite"}', encoding="utf-8")
    with raises(DataError, Facts("missing-key", file="some.json")):
        read(tmp_path)
