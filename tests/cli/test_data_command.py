"""The output of `llmrec data`: names and values that are clear without documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import shop
from tests.command import llmrec

RECIPE = """
name: shop
data: {source: table, path: orders.csv, duplicates: keep_last, columns: {user: customer_id, item: product_id, COLUMNS}}
tasks: {sequential: {}}
"""


def printed(folder: Path, monkeypatch: pytest.MonkeyPatch, columns: str) -> str:
    monkeypatch.chdir(folder)
    shop.write_orders(folder / "orders.csv")
    (folder / "r.yaml").write_text(RECIPE.replace("COLUMNS", columns), encoding="utf-8")
    done = llmrec("data", "r.yaml")
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def test_labels_and_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = printed(tmp_path, monkeypatch, "rating: stars, time: ordered_at, title: product_name, text: comment")
    lines = {line[:25].strip(): line[25:].strip() for line in output.splitlines() if line.startswith("  ")}
    assert lines["users"] == "80" and lines["interactions"].startswith("874, 18.2% of all user-item pairs")
    assert lines["split"] == "leave_one_out: 714 train, 80 valid, 80 test"
    assert lines["ratings"].startswith("1 to 5: 1 in ") and lines["texts"] == "622 interactions"
    assert lines["source"] == "table, orders.csv" and lines["rows read"] == "900"
    for name in ("_", "None", "made", "sha256", "digest"):
        assert not any(name in label for label in lines) and "None" not in output
    # Hashes are shortened.
    assert max(map(len, lines["data hash"].replace(",", "").split())) == 12


def test_missing_parts_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = printed(tmp_path, monkeypatch, "rating: none")
    assert "ratings                none" in output
    assert not any(name in output for name in ("texts", "equal timestamps", "new in test", "synthetic", "None"))
