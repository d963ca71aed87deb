"""docs/tested.md: every test that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
_NAMED = re.compile(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`")


def test_every_test_that_the_page_names_is_there() -> None:
    file, found, missing = "", 0, list[str]()
    for path, name in _NAMED.findall((ROOT / "docs" / "tested.md").read_text(encoding="utf-8")):
        file = path or file
        if not (path or name):
            continue
        text = (ROOT / file).read_text(encoding="utf-8") if (ROOT / file).is_file() else ""
        found += 1
        if not text or (name and f"def {name}(" not in text):
            missing.append(f"{file}::{name}")
    assert found > 100 and missing == []
