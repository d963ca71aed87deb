"""What `llmrec data` prints: names and values that read without a manual."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import shop
from tests.command import llmrec

RECIPE = """
name: shop
data: {source: table, path: orders.csv, duplicates: keep_last, columns: {user: customer_id, item: product_id, COLUMNS}}
tasks: {sequential: {}}
"""


def printed(folder: Path, monkeypatch: pytest.MonkeyPatch, columns: str, *options: str) -> str:
    monkeypatch.chdir(folder)
    shop.write_orders(folder / "orders.csv")
    (folder / "r.yaml").write_text(RECIPE.replace("COLUMNS", columns), encoding="utf-8")
    done = llmrec("data", "r.yaml", *options)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def test_figures_have_names_that_are_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = printed(tmp_path, monkeypatch, "rating: stars, time: ordered_at, title: product_name, text: comment")
    lines = {line[:25].strip(): line[25:].strip() for line in said.splitlines() if line.startswith("  ")}
    assert lines["users"] == "80" and lines["interactions"].startswith("874, 18.2% of all user-item pairs")
    assert lines["split"] == "leave_one_out: 714 train, 80 valid, 80 test"
    assert lines["ratings"].startswith("1 to 5: 1 in ") and lines["texts"] == "622 interactions"
    assert lines["source"] == "table, orders.csv" and lines["rows read"] == "900"
    for name in ("_", "None", "made", "sha256", "digest"):
        assert not any(name in label for label in lines) and "None" not in said
    # A hash is as long as it takes to compare two.
    assert max(map(len, lines["data hash"].replace(",", "").split())) == 12


def test_what_is_not_there_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = printed(tmp_path, monkeypatch, "rating: none")
    assert "ratings                none" in said
    assert not any(name in said for name in ("texts", "equal timestamps", "new in test", "synthetic", "None"))


def test_json_has_the_whole_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = json.loads(printed(tmp_path, monkeypatch, "time: ordered_at", "--json"))["data"]
    assert found["tied_last_share"] == 0.0 and len(found["fingerprint"]) == 64 and found["made"] is False
