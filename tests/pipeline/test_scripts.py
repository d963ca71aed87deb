"""Titles in any script, from a table to a report and ranked lists: none is changed, split or lost."""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

from llmrec.backends import fake
from llmrec.backends.fake import FakeBackend
from llmrec.cli.main import app
from llmrec.guard import clean
from llmrec.pipeline.study import load_split
from llmrec.recipe.load import load_recipe

TITLES = {
    "arabic": "ألف ليلة وليلة",
    "arabic-marks": "مُدَرِّسَة",
    "persian": "می\u200cخواهم زنده بمانم",
    "hebrew": "שלום ירושלים",
    "hebrew-points": "סִפְרִיָּה",
    "hindi": "क्षत्रिय की कहानी",
    "tamil": "தமிழ் படம்",
    "thai": "น้ำท่วมบ้าน",
    "chinese": "霸王别姬",
    "japanese": "千と千尋の神隠し",
    "half-width": "ﾄﾄﾛ ﾉ ﾓﾘ",
    "korean": "기생충",
    "korean-letters": unicodedata.normalize("NFD", "올드보이"),
    "family": "👨\u200d👩\u200d👧 Family",
    "flags": "🇩🇪🇫🇷 Race",
    "combining": "Ame\u0301lie",
    "cyrillic": "Сталкер",
    "greek": "Ζορμπάς",
    "mark-up": "Less < Möre & “co”",
    "override": "Left \u202eright",
}
USERS = 30


def table(folder: Path) -> Path:
    path, items = folder / "shows.csv", list(TITLES)
    with path.open("w", newline="", encoding="utf-8") as stream:
        out = csv.writer(stream)
        out.writerow(["user_id", "item_id", "rating", "timestamp", "title"])
        for user in range(USERS):
            for step in range(8):
                item = items[(user * 3 + step * (1 + user % 3)) % len(items)]
                out.writerow([f"u{user:02}", item, 1 + (user + step) % 5, 1000 * user + step, TITLES[item]])
    return path


def command(*args: str) -> None:
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == 0, result.output


class Naming(FakeBackend):
    """Answers with the titles of the candidates instead of their labels, in reverse order."""

    def __init__(self) -> None:
        super().__init__(lambda text: "\n".join(reversed(re.findall(r"^[A-Z]\. (.+)$", text, flags=re.MULTILINE))))

    def generate(self, prompts: Any, *, max_tokens: int) -> Any:
        return super().generate(prompts, max_tokens=10_000)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    """Return a run folder made by `llmrec init` and `llmrec run`, with titles as answers."""
    folder = tmp_path_factory.mktemp("scripts")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(fake, "FakeBackend", Naming)
        command("init", str(table(folder)), "--name", "shows")
        overrides = {
            "tasks": "{direct: {strategies: [list]}, sequential: {}}",
            "model": f"{{name: {llama_folder}, dtype: float32}}",
            "eval": "{arms: [zero-shot], backend: fake, users: 30, bootstrap: 50, candidates: {count: 6}}",
        }
        command("run", "shows.yaml", "-q", *(f"{key}={value}" for key, value in overrides.items()))
    return folder / "runs" / "shows"


def test_catalogue_keeps_titles(run: Path) -> None:
    items = load_split(load_recipe(run / "recipe.yaml").data, 0).dataset.items
    assert {item: entry.title for item, entry in items.items()} == TITLES


def test_titles_in_answers_are_parsed(run: Path) -> None:
    rows = pl.read_parquet(run / "predictions.parquet").filter(pl.col("predictor") == "list")
    assert len(rows) == USERS
    seen: set[str] = set()
    for raw, parsed in zip(rows["raw"], rows["parsed"], strict=True):
        titles, items = raw.split("\n"), json.loads(parsed)["items"]
        assert [clean(TITLES[item]) for item in items] == titles and len(titles) == 6
        seen |= set(items)
    assert seen == set(TITLES)


def test_ranked_lists_have_the_titles(run: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "requests.jsonl", tmp_path / "ranked.csv"
    path.write_text(json.dumps({"id": "1", "history": ["thai"], "candidates": list(TITLES)}), encoding="utf-8")
    recipe = str(run / "recipe.yaml")
    command("rank", "--baseline", "popularity", "--recipe", recipe, "--in", str(path), "--out", str(out))
    with out.open(encoding="utf-8", newline="") as stream:
        (row,) = csv.DictReader(stream)
    titles = dict(zip(json.loads(row["items"]), json.loads(row["titles"]), strict=True))
    assert titles == {item: clean(title) for item, title in TITLES.items()}
    assert {item for item, title in TITLES.items() if titles[item] != title} == {"persian", "family", "override"}
