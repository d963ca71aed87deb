"""Pages of suites and the leaderboard: order, marks, one protocol per table, and escaping."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from llmrec.bench import leaderboard
from llmrec.bench.pages import read_benchmark_results
from llmrec.bench.references import Reference, read_reference_file
from llmrec.errors import DataError, LlmrecError
from tests.bench.suites import hostile_suite, page_of, sample_reference, sample_suite
from tests.facts import Facts, raises
from tests.report.payloads import FORMULAS, MARKDOWN, SCRIPTS
from tests.report.reading import blocks

ROOT = Path(__file__).resolve().parents[2]


def _page(suite: dict[str, Any] | None = None) -> str:
    return page_of(suite or sample_suite(), {"papers": sample_reference()})


def _tables(text: str) -> list[list[str]]:
    result: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            result[-1].append(line)
        elif result[-1]:
            result.append([])
    return [table for table in result if table]


def test_rows_are_sorted_with_intervals_and_differences() -> None:
    ours = _tables(_page())[0]
    assert ours[0] == (
        "| model | HR@5 | NDCG@5 | HR@10 | NDCG@10 | over tie rules | best model − this one | ties | parameters | "
        "seconds | GB |"
    )
    assert ours[2] == (
        "| sasrec | **0.1200** | **0.1320** | **0.1440** | **0.1560** [0.1404, 0.1716] sd 0.0010 | 0.1482 to 0.1638 "
        "| – | 25.0% | neighbours 20 | 3 | 0.5 |"
    )
    assert [line.split(" | ")[0] for line in ours[2:]] == ["| sasrec", "| item-knn", "| popularity", "| random"]
    assert [line.split(" | ")[6] for line in ours[2:]] == [
        "–", "+0.0300 [+0.0100, +0.0500]", "+0.0700 [+0.0500, +0.0900]", "+0.1100 [+0.0900, +0.1300]",
    ]  # fmt: skip
    assert "best model − this one" not in _tables(_page(sample_suite() | {"comparisons": []}))[0][0]


def test_rows_are_grouped_by_what_they_read() -> None:
    suite = sample_suite()
    for row, reads in zip(suite["rows"], ("events", "texts", "language model", "events"), strict=True):
        row["reads"] = reads
    lines = [line.split(" | ")[0].removeprefix("| ") for line in _tables(_page(suite))[0][2:]]
    assert lines == [
        *("*interactions only*", "sasrec", "random"),
        *("*interactions and texts, pretrained encoder*", "popularity"),
        *("*language model or fine-tuned text encoder*", "item-knn"),
    ]


def test_planned_pairs() -> None:
    text = _page()
    assert "sasrec − item-knn: +0.0300 [+0.0001, +0.0600] (97.5 %), p 0.040, significantly better" in text
    assert "sasrec − item-knn: +0.0300 [-0.0100, +0.0600] (97.5 %), p 0.100, no significant difference" in text


def test_page_says_how_hyperparameters_were_chosen() -> None:
    suite = sample_suite()
    row = suite["rows"][2]
    chosen = "Hyperparameters are chosen on validation users"
    assert chosen not in _page()
    values = {"excluded": 0.1, "included": 0.2}
    row |= {"baseline": "item-knn", "trials": [{"parameters": {"neighbours": k}, "values": values} for k in (10, 20)]}
    assert f"{chosen}, separately for each table." in _page(suite)
    suite["rows"][3]["baseline"] = "sasrec"
    assert "The hyperparameters of these models are fixed and not tuned: sasrec." in _page(suite)


@pytest.mark.parametrize(
    ("users", "seeds", "expected"),
    [
        (943, [0, 1, 2], ""),
        (943, [0], "Exploratory (1 training seed, fewer than 3):"),
        (40, [0, 1], "Exploratory (40 users, fewer than 200; 2 training seeds, fewer than 3):"),
    ],
)
def test_few_users_or_seeds_make_a_section_exploratory(users: int, seeds: list[int], expected: str) -> None:
    suite = sample_suite()
    suite["protocol"] |= {"users": users, "seeds": seeds}
    text = _page(suite)
    assert expected in text and ("Exploratory (" in text) == bool(expected)


def test_rows_of_ratings_are_sorted_by_lowest_error() -> None:
    suite = sample_suite()
    suite["protocol"].update(candidates=None)
    suite["tables"] = [suite["tables"][0] | {"name": "rating", "task": "rating", "metric": "RMSE", "metrics": ["RMSE"]}]
    suite |= {"comparisons": [], "pairs": []}
    for row, value in zip(suite["rows"], (1.1, 0.9, 1.0, None), strict=True):
        figure = {"value": value, "low": value, "high": value, "signature": "RMSE|split:x|llmrec:0.1.0"}
        row["tables"] = {"rating": {"metrics": {"RMSE": figure}, "tie_rate": 0.0}}
    ours = _tables(_page(suite))[0]
    assert [line.split(" | ")[0] for line in ours[2:]] == ["| popularity", "| item-knn", "| random", "| sasrec"]
    assert "**0.9000**" in ours[2] and ours[5].split(" | ")[1] == "undefined"
    assert "RMSE of sasrec is undefined. Models without a value are not compared." in _page(suite)
    assert "## Ratings" in _page(suite)
    for row in suite["rows"]:
        row["tables"]["yes-no"] = row["tables"].pop("rating")
    suite["tables"][0]["name"] = "yes-no"
    assert "## Like prediction" in _page(suite)


def test_published_rows_of_the_same_protocol() -> None:
    text = _page()
    assert text.count("Published under the same protocol") == 2 and "without a statement on seen items" in text
    published = _tables(text)[1]
    # Best first by the last published metric; rows without it come last.
    assert [re.findall(r"0\.\d{4}", line) for line in published[2:]] == [["0.0600"], ["0.0500", "0.0400"], ["0.9000"]]
    other = sample_suite()
    other["protocol"]["candidates"] = "uniform-100"
    assert "Published" not in _page(other)


def test_published_rows_on_other_interactions_are_separate() -> None:
    counts = {"users": 943, "items": 1682}
    other = sample_reference().model_copy(update={"counts": counts, "data": "all films"})
    text = page_of(sample_suite(), {"papers": sample_reference(), "all": other})
    assert text == _page()  # a suite shows only the references that it names
    suite = sample_suite() | {"references": ["papers", "all"]}
    text = page_of(suite, {"papers": sample_reference(), "all": other})
    apart = "on a different set of interactions (all films: 943 users, 1,682 items)"
    assert text.count(f"Published under the same protocol, {apart}:\n") == 2
    assert text.count(f"## Published, without a statement on seen items, {apart}\n") == 1
    assert text.count("Published under the same protocol:\n") == 2
    suite["data"]["items"] = 1682
    text = page_of(suite, {"papers": sample_reference(), "all": other})
    assert text.count("different set of interactions") == 0 and len(_tables(text)[1]) == 2 + 2 * 3


def test_rejects_mixed_protocols() -> None:
    suite = sample_suite()
    figure = suite["rows"][2]["tables"]["included"]["metrics"]["HR@5"]
    figure["signature"] = figure["signature"].replace("ties:expected", "ties:best")
    with raises(LlmrecError, Facts("mismatch", "films", says=("'included'", "ties:expected", "ties:best"))):
        _page(suite)


def test_rejects_missing_values_and_keys() -> None:
    suite = sample_suite()
    del suite["rows"][1]["tables"]["excluded"]["metrics"]["HR@5"]
    with raises(DataError, Facts("missing-value", "films", says=("'excluded'", "`llmrec eval`"))):
        _page(suite)
    del suite["rows"][1]["tables"]
    with raises(DataError, Facts("missing-key", "films", column="rows.1.tables", says="`llmrec eval`")):
        _page(suite)
    del suite["protocol"]
    with raises(DataError, Facts("missing-key", "films", column="protocol")):
        _page(suite)


def test_reads_only_suites_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "films.json").write_text(json.dumps(sample_suite()))
    (tmp_path / "a.json").write_text('{"kind": "run"}')
    (tmp_path / "c.json").write_text("[1]")
    assert [result.benchmark for result in read_benchmark_results(tmp_path)] == ["films"]
    # A result names the files of its page, so its name must be that of its own file.
    (tmp_path / "d.json").write_text(json.dumps(sample_suite() | {"benchmark": "../films"}))
    with raises(DataError, Facts("mismatch", "d.json", says="../films")):
        read_benchmark_results(tmp_path)
    (tmp_path / "d.json").write_text("{")
    with raises(DataError, Facts("syntax", "d.json", says="`llmrec eval`")):
        read_benchmark_results(tmp_path)


def test_committed_references_are_valid(tmp_path: Path) -> None:
    pages = sorted((ROOT / "eval" / "references").glob("*.yaml"))
    assert pages and all(read_reference_file(page).rows for page in pages)
    (tmp_path / "x.yaml").write_text("reference: [")
    with raises(DataError, Facts("wrong-format", "x.yaml")):
        read_reference_file(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xff")
    with raises(DataError, Facts("wrong-format", "x.yaml")):
        read_reference_file(tmp_path / "x.yaml")


@pytest.mark.parametrize("texts", [SCRIPTS, FORMULAS, MARKDOWN], ids=["scripts", "formulas", "markdown"])
def test_escapes_texts_of_a_suite(texts: tuple[str, ...]) -> None:
    size = len(texts)
    expected = blocks(page_of(hostile_suite([f"x{k}" for k in range(size)]), {"papers": sample_reference()}))
    shown = set()
    for start in range(0, size, 16):
        rotated = [*texts[start:], *texts[:start]]
        text = page_of(hostile_suite(rotated), {"papers": sample_reference(rotated[::-1])})
        assert blocks(text) == expected
        assert not re.search(r"<[A-Za-z!/?]", text)
        shown |= {table[0].count(" | ") for table in _tables(text)}
    assert len(shown) == 2


def _board(
    tmp_path: Path, settings: dict[str, Any], *suites: dict[str, Any], references: dict[str, Reference] | None = None
) -> tuple[str, list[dict[str, Any]]]:
    results = tmp_path / "results"
    results.mkdir(exist_ok=True)
    for suite in suites:
        (results / f"{suite['benchmark']}.json").write_text(json.dumps(suite))
    (tmp_path / "leaderboard.yaml").write_text(json.dumps(settings))
    pages = leaderboard.leaderboard_pages(results, references or {"papers": sample_reference()})
    return pages["LEADERBOARD.md"], json.loads(pages["leaderboard.json"])


SETTINGS = {
    "groups": [
        {
            "title": "Next item",
            "columns": [
                {"suite": "films", "title": "Films", "table": "excluded"},
                {"suite": "books", "title": "Books", "table": "excluded"},
                {"suite": "later", "title": "Not run yet"},
            ],
        }
    ],
    "models": {
        "sasrec": {"title": "SASRec", "pretrained": "none | at all"},
        "item-knn": {"title": "Item-kNN"},
        "random": {"title": "Random"},
    },
    "left_out": ["popularity"],
}


def test_leaderboard_has_rows_of_models_and_columns_of_data_sets(tmp_path: Path) -> None:
    films, books = sample_suite(), sample_suite() | {"benchmark": "books"}
    for suite in (films, books):
        for row, reads in zip(suite["rows"], ("events", "events", "texts", "language model"), strict=True):
            row["reads"] = reads
        suite["rows"][0]["baseline"] = "random"
    # On books there is no item-kNN, and no row is significantly worse than the best.
    books["rows"] = [row for row in books["rows"] if row["name"] != "item-knn"]
    books["comparisons"] = []
    text, (table,) = _board(tmp_path, SETTINGS, films, books)
    lines = _tables(text)[0]
    assert lines[0] == (
        "| model | [Films](films.md) | [Books](books.md) | mean rank | type | pretrained | training | ms per request |"
    )
    cells = [[part.strip() for part in line.strip("|").split(" | ")] for line in lines[2:]]
    assert [line[0] for line in cells[:3]] == ["SASRec", "Item-kNN", "Random"]
    assert [line[4] for line in cells[:3]] == ["language model", "text", "control"]
    assert cells[0][1:4] == ["**0.1560**", "**0.1560**", "1.0"] and cells[0][5] == "none \\| at all"
    # Films: the interval of the best row excludes 0. Books: no significant difference.
    assert cells[1][1:4] == ["0.1170", "–", "–"] and cells[2][1:4] == ["0.0130", "**0.0130**", "–"]
    assert [column["title"] for column in table["columns"]] == ["Films", "Books"] and not table["lower"]
    assert table["rows"][1]["cells"][1] is None and table["rows"][0]["cells"][0]["best"]
    # Published systems under the same protocol, with their best value.
    assert any(line[0].startswith("*P5") and line[4] == "*published*" for line in cells[3:])
    assert "popularity" not in text


def _published(name: str, figures: list[tuple[str, float]]) -> Reference:
    rows = [
        {"system": system, "source": name, "seen": "excluded", "values": {"NDCG@10": figure}}
        for system, figure in figures
    ]
    return Reference.model_validate(sample_reference().model_dump() | {"reference": name, "rows": rows})


def test_leaderboard_has_the_four_best_published_systems(tmp_path: Path) -> None:
    papers = [(f"s{number}", (50 - number) / 100) for number in range(10)]
    references = {
        "papers": _published("papers", papers),
        "again": _published("again", [("s0", 0.3)]),
        "others": _published("others", [("late", 0.4), ("s9", 0.5), ("s0", 0.1)]),
    }
    films = sample_suite() | {"references": ["papers", "again"]}
    books = sample_suite() | {"benchmark": "books", "references": ["others"]}
    text, (table,) = _board(tmp_path, SETTINGS, films, books, references=references)
    assert [row["model"] for row in table["published"]] == ["s0", "s9", "late", "s1"]
    assert [row["cells"] for row in table["published"][:3]] == [[0.5, 0.1], [0.41, 0.5], [None, 0.4]]
    # The sources are those of the values in the table.
    assert [row["source"] for row in table["published"][:4]] == ["papers; others", "papers; others", "others", "papers"]
    assert "| *s1* |" in text and "s2" not in text


def test_ensemble_with_one_member_is_not_in_the_leaderboard(tmp_path: Path) -> None:
    films = sample_suite()
    for form, shown in (("alone", False), ("ranker", True)):
        films["rows"][2]["tables"]["excluded"]["fusion"] = {"form": form, "parts": []}
        text, (table,) = _board(tmp_path, SETTINGS, films)
        assert ("Item-kNN" in text) == shown
        assert [row["type"] for row in table["rows"] if row["model"] == "Item-kNN"] == ["ensemble"] * shown


def test_column_with_models_of_further_suites(tmp_path: Path) -> None:
    films, later = sample_suite(), sample_suite() | {"benchmark": "later"}
    films["rows"] = [row for row in films["rows"] if row["name"] != "item-knn"]
    settings = copy.deepcopy(SETTINGS)
    settings["groups"][0]["columns"] = [
        {
            "suite": "films",
            "title": "Films",
            "table": "excluded",
            "further": {"later": ["item-knn", "random"], "not-run-yet": ["sasrec"]},
        }
    ]
    settings["models"]["item-knn"]["type"] = "language model"
    text, (table,) = _board(tmp_path, settings, films, later)
    lines = {row["model"]: (row["type"], row["cells"][0]["best"]) for row in table["rows"]}
    assert lines["Item-kNN"] == ("language model", False) and "| [0.1170](later.md) |" in text
    assert "[0.0130](later.md)" in text  # replaces the result of the column's own suite
    assert "| **0.1560** |" in text  # in no further suite with results
    board = leaderboard.read_leaderboard_config(tmp_path)
    assert (
        board is not None and leaderboard.undescribed_models(board, read_benchmark_results(tmp_path / "results")) == []
    )
    later["rows"] = [row for row in later["rows"] if row["name"] == "item-knn"]  # an unfinished run
    _, (table,) = _board(tmp_path, settings, films, later)
    assert [row["cells"][0]["best"] for row in table["rows"] if row["model"] == "Item-kNN"] == [False]
    later["data"]["items"] = 5
    assert "Item-kNN" not in _board(tmp_path, settings, films, later)[0]


def test_missing_descriptions_of_models(tmp_path: Path) -> None:
    settings = {**SETTINGS, "models": {"sasrec": {"title": "SASRec"}}, "left_out": []}
    _board(tmp_path, settings, sample_suite())
    board = leaderboard.read_leaderboard_config(tmp_path)
    assert board is not None
    assert leaderboard.undescribed_models(board, read_benchmark_results(tmp_path / "results")) == [
        "item-knn",
        "popularity",
        "random",
    ]
    assert leaderboard.read_leaderboard_config(tmp_path / "nowhere") is None
    (tmp_path / "leaderboard.yaml").write_text("groups: 3")
    with raises(DataError, Facts("wrong-format", "leaderboard.yaml")):
        leaderboard.read_leaderboard_config(tmp_path)


def test_committed_leaderboard_describes_every_model() -> None:
    board = leaderboard.read_leaderboard_config(ROOT / "eval")
    assert board is not None
    assert leaderboard.undescribed_models(board, read_benchmark_results(ROOT / "eval" / "results")) == []
    assert set(board.featured) <= set(board.models) and len(board.featured) <= 10
    page = (ROOT / "eval" / "LEADERBOARD.md").read_text(encoding="utf-8")
    further = [name for group in board.groups for column in group.columns for name in column.further]
    assert further and all(f"({name}.md)" in page for name in further if (ROOT / "eval" / f"{name}.md").exists())


def test_short_table_has_featured_rows_in_order(tmp_path: Path) -> None:
    _board(tmp_path, SETTINGS | {"featured": ["random", "sasrec"]}, sample_suite())
    board = leaderboard.read_leaderboard_config(tmp_path)
    assert board is not None
    (matrix,) = leaderboard.leaderboard_tables(board, read_benchmark_results(tmp_path / "results"), {})
    lines = leaderboard.short_table(leaderboard.featured(board, matrix), "eval/").splitlines()
    assert lines[0] == "| Model | [Films](eval/films.md) | Type |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| SASRec", "| Random"]


def test_escapes_texts_of_the_leaderboard(tmp_path: Path) -> None:
    suite, texts = sample_suite(), (SCRIPTS[0], SCRIPTS[10], FORMULAS[0], MARKDOWN[0])
    models = {row["name"]: {"title": text, "pretrained": text} for row, text in zip(suite["rows"], texts, strict=True)}
    text, _ = _board(tmp_path, {**SETTINGS, "models": models, "left_out": []}, suite)
    assert not re.search(r"<[A-Za-z!/?]", text)
