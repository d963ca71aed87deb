"""Tables whose columns are those of a published set are told to be, and others are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrec.commands.init import start
from llmrec.data.sources.recognise import sources_with
from llmrec.registry import SOURCES


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        (["userId", "movieId", "rating", "timestamp"], "movielens-20m"),
        (["reviewerID", "asin", "overall", "unixReviewTime", "reviewText"], "amazon-2014"),
        (["user_id", "parent_asin", "rating", "timestamp", "text"], ""),
        (["user_id", "item_id", "rating", "timestamp"], ""),
        (["userId", "movieId"], ""),
    ],
)
def test_sets_are_named_by_columns_of_their_own(columns: list[str], named: str) -> None:
    found = sources_with(columns)
    assert (named in found) if named else not found
    assert set(found) <= set(SOURCES)


def test_init_says_so(tmp_path: Path) -> None:
    events = [(user, (user * 3 + step) % 9, 1 + step, 100 * step) for user in range(9) for step in range(4)]
    rows = "".join(",".join(map(str, event)) + "\n" for event in events)
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + rows, encoding="utf-8")
    made = start.init(str(tmp_path / "ratings.csv"), out=tmp_path / "r.yaml", name="r", backend="hf")
    assert "its columns are those of movielens-" in made.found and "data.source" in made.found
    (tmp_path / "ratings.csv").write_text("who,what,rating,timestamp\n" + rows, encoding="utf-8")
    again = start.init(
        str(tmp_path / "ratings.csv"),
        out=tmp_path / "s.yaml",
        name="s",
        backend="hf",
        asked=start.Asked(user="who", item="what"),
    )
    assert "its columns are those of" not in again.found
