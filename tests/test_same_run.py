"""The script that compares two versions of the code: what it leaves out, and what it says of two recordings."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from eval.benchmarks.same_run import SCENARIOS, differences, dump, main, normal


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("read in 0.31 s, 4.2e-05 s and 12 minutes", "read in TIME, TIME and TIME"),
        ("at 2026-11-30T05:54:12Z, of 2001-02-03", "at NOW, of 2001-02-03"),
        ("signature a8099ad2c8a46e9a", "signature HASH"),
        ("id aff764e7-7123-4c2c-989e-1d5c2f4a9b3e", "id UUID"),
        ("value 0.00010511700020288117", "value 0.00010511700020288117"),
        ("http://127.0.0.1:8341/docs", "http://127.0.0.1:PORT/docs"),
        ("WAIT /a/b/c  ", "WAIT HERE/c"),
        ("llmrec 0.2.0, HR@10|llmrec:0.2.0", "llmrec VERSION, HR@10|llmrec:VERSION"),
        ("time: 3 s (train 2 s, data 1 s)", "time: TIME"),
        ("37 788 tok/s", "RATE tok/s"),
        ("  speed     18.74 requests/s\n  Seconds   0.0\nend", "  speed TIME\n  Seconds TIME\nend"),
        ("f05 and u12 in 5 lists, k 10", "f05 and u12 in 5 lists, k 10"),
    ],
)
def test_what_differs_between_two_runs_of_one_code_is_left_out(text: str, kept: str) -> None:
    assert normal(text, {"/a/b": "HERE"}) == kept


def test_files_are_read_by_their_kind(tmp_path: Path) -> None:
    files = {
        "a.json": json.dumps({"value": 1, "seconds": 2.5, "rows": [{"versions": {}, "n": 3}]}),
        "a.jsonl": '{"seconds": 1, "id": "a"}\n{"id": "b"}\n',
        "a.csv": "id,seconds,value\na,0.5,1\n",
        "a.md": "| model | NDCG | Time |\n|---|---|---|\n| a | 0.5 | 3 |\n\ntext | time |\n",
        "a.html": "<p>a</p><table><tr><th>name</th><th>Seconds</th></tr><tr><td>a</td><td>3.1</td></tr></table>",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert json.loads(dump(tmp_path / "a.json")) == {"value": 1, "rows": [{"n": 3}]}
    assert dump(tmp_path / "a.jsonl").splitlines() == ['{"id": "a"}', '{"id": "b"}']
    assert dump(tmp_path / "a.csv").splitlines() == ["id,value", "a,1"]
    assert dump(tmp_path / "a.md").splitlines() == ["| model | NDCG |", "|---|---|", "| a | 0.5 |", "", "text | time |"]
    page = dump(tmp_path / "a.html")
    assert "name" in page and "<td>a" in page and "Seconds" not in page and "3.1" not in page


def test_two_recordings_are_compared_by_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, value in (("one", "0.5"), ("two", "0.6")):
        (tmp_path / folder).mkdir()
        text = f"##### llmrec data\nexit code 0\nsame\n##### llmrec data\nexit code 0\n{value}\n"
        (tmp_path / folder / "showing.txt").write_text(text, encoding="utf-8")
        (tmp_path / folder / "same.txt").write_text("##### a\nb\n", encoding="utf-8")
    (tmp_path / "two" / "more.txt").write_text("##### a\nb\n", encoding="utf-8")
    one, two = tmp_path / "one", tmp_path / "two"
    found = differences(one, two)
    assert found[0] == f"more: only in {two}"
    assert found[1].splitlines()[0] == "showing: llmrec data [2]"
    assert [line.strip() for line in found[1].splitlines()[2:]] == ["-0.5", "+0.6"] and len(found) == 2
    assert main(["compare", str(one), str(two)]) == 1 and "+0.6" in capsys.readouterr().out
    assert main(["compare", str(one), str(one)]) == 0 and capsys.readouterr().out == "the same\n"


def test_two_run_folders_are_compared_without_times_and_order(tmp_path: Path) -> None:
    rows = [{"row_id": "a", "request_id": str(number), "score": number / 2, "seconds": 0.1} for number in range(3)]
    for folder, seconds in (("one", 1.0), ("two", 2.0), ("three", 1.0)):
        (tmp_path / folder).mkdir()
        results = {"rows": [{"id": "a", "cost": {"seconds": seconds, "forwards": 3}}], "created": folder}
        (tmp_path / folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
        changed = rows if folder == "one" else [{**row, "seconds": seconds} for row in reversed(rows)]
        pl.DataFrame(changed).write_parquet(tmp_path / folder / "predictions.parquet")
    assert differences(tmp_path / "one", tmp_path / "two") == []
    pl.DataFrame([*rows[1:], {**rows[0], "score": 9.0}]).write_parquet(tmp_path / "three" / "predictions.parquet")
    (found,) = differences(tmp_path / "one", tmp_path / "three")
    assert found.startswith("run: predictions.parquet") and "9.0" in found


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="neither a recording nor a run folder"):
        differences(tmp_path, tmp_path)


def test_every_scenario_says_what_it_records() -> None:
    assert len(SCENARIOS) > 10
    assert all(work.__doc__ for work in SCENARIOS.values())
