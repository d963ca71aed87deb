"""Pages of suites and the leaderboard: order, marks, one protocol a table, and texts that stay text."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from llmrec.bench import leaderboard
from llmrec.bench.pages import read_results
from llmrec.bench.references import Reference, load_reference
from llmrec.errors import DataError, LlmrecError
from tests.bench.suites import hostile_suite, made_reference, made_suite, page_of
from tests.facts import Facts, raises
from tests.report.payloads import FORMULAS, MARKDOWN, SCRIPTS
from tests.report.reading import blocks

ROOT = Path(__file__).resolve().parents[2]


def _page(suite: dict[str, Any] | None = None) -> str:
    return page_of(suite or made_suite(), {"papers": made_reference()})


def _tables(text: str) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def test_rows_stand_in_order_with_intervals_spread_and_verdicts() -> None:
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
    assert "best model − this one" not in _tables(_page(made_suite() | {"comparisons": []}))[0][0]


def test_rows_that_read_texts_stand_apart_from_those_that_do_not() -> None:
    suite = made_suite()
    for row, reads in zip(suite["rows"], ("events", "texts", "language model", "events"), strict=True):
        row["reads"] = reads
    lines = [line.split(" | ")[0].removeprefix("| ") for line in _tables(_page(suite))[0][2:]]
    assert lines == [
        *("*interactions only*", "sasrec", "random"),
        *("*interactions and texts, pretrained encoder*", "popularity"),
        *("*language model or fine-tuned text encoder*", "item-knn"),
    ]


def test_planned_pairs_have_the_level_of_their_step_and_plain_words() -> None:
    text = _page()
    assert "The 2 planned comparisons have p-values that are Holm-adjusted over all tables of this file" in text
    assert "sasrec − item-knn: +0.0300 [+0.0001, +0.0600] (97.5 %), p 0.040, significantly better" in text
    assert "sasrec − item-knn: +0.0300 [-0.0100, +0.0600] (97.5 %), p 0.100, no significant difference" in text
    assert "unadjusted 95 % intervals, but no p-values and no verdicts" in text


def test_notes_of_a_result_are_before_its_tables() -> None:
    text = _page(made_suite() | {"notes": ["Mind *this*."]})
    assert "\n\nMind \\*this\\*.\n\n" in text and text.index("Mind") < text.index("## Seen")


def test_a_section_says_how_its_parameters_came_about() -> None:
    suite = made_suite()
    row = suite["rows"][2]
    assert "Parameters are chosen" not in _page()
    values = {"excluded": 0.1, "included": 0.2}
    row |= {"baseline": "item-knn", "trials": [{"parameters": {"neighbours": k}, "values": values} for k in (10, 20)]}
    assert "Hyperparameters are chosen on validation users, separately for each table." in _page(suite)
    del values["included"]
    assert "Parameters are chosen" not in _page(suite)
    suite["rows"][3]["baseline"] = "sasrec"
    assert "The hyperparameters of these models are fixed and not tuned: sasrec." in _page(suite)


@pytest.mark.parametrize(
    ("users", "seeds", "said"),
    [
        (943, [0, 1, 2], ""),
        (943, [0], "Exploratory (1 training seed, fewer than 3):"),
        (166, [0, 1, 2], "Exploratory (166 users, fewer than 200):"),
        (40, [0, 1], "Exploratory (40 users, fewer than 200; 2 training seeds, fewer than 3):"),
    ],
)
def test_few_users_or_seeds_make_a_section_exploratory(users: int, seeds: list[int], said: str) -> None:
    suite = made_suite()
    suite["protocol"] |= {"users": users, "seeds": seeds}
    text = _page(suite)
    assert said in text and ("Exploratory (" in text) == bool(said)


def test_lower_is_better_for_ratings() -> None:
    suite = made_suite()
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


def test_published_rows_stand_beside_the_protocol_that_they_share() -> None:
    text = _page()
    assert text.count("Published under the same protocol") == 2 and "without a statement on seen items" in text
    published = _tables(text)[1]
    # Best first by the last metric that they print; a row without it comes after those with it.
    assert [re.findall(r"0\.\d{4}", line) for line in published[2:]] == [["0.0600"], ["0.0500", "0.0400"], ["0.9000"]]
    other = made_suite()
    other["protocol"]["candidates"] = "uniform-100"
    assert "Published" not in _page(other)


def test_published_rows_on_other_interactions_stand_apart_with_their_counts() -> None:
    counts = {"users": 943, "items": 1682}
    other = made_reference().model_copy(update={"counts": counts, "data": "all films"})
    text = page_of(made_suite(), {"papers": made_reference(), "all": other})
    assert text == _page()  # a suite prints the pages that it names
    suite = made_suite() | {"references": ["papers", "all"]}
    text = page_of(suite, {"papers": made_reference(), "all": other})
    apart = "on a different set of interactions (all films: 943 users, 1,682 items)"
    assert text.count(f"Published under the same protocol, {apart}:\n") == 2
    assert text.count(f"## Published, without a statement on seen items, {apart}\n") == 1
    assert text.count("Published under the same protocol:\n") == 2
    suite["data"]["items"] = 1682
    text = page_of(suite, {"papers": made_reference(), "all": other})
    assert text.count("different set of interactions") == 0 and len(_tables(text)[1]) == 2 + 2 * 3


def test_mixed_protocols_are_refused() -> None:
    suite = made_suite()
    figure = suite["rows"][2]["tables"]["included"]["metrics"]["HR@5"]
    figure["signature"] = figure["signature"].replace("ties:expected", "ties:best")
    with raises(LlmrecError, Facts("mismatch", "films", says=("'included'", "ties:expected", "ties:best"))):
        _page(suite)


def test_what_is_missing_is_named() -> None:
    suite = made_suite()
    del suite["rows"][1]["tables"]["excluded"]["metrics"]["HR@5"]
    with raises(DataError, Facts("missing-value", "films", says=("'excluded'", "`llmrec eval`"))):
        _page(suite)
    del suite["rows"][1]["tables"]
    with raises(DataError, Facts("missing-key", "films", column="rows.1.tables", says="`llmrec eval`")):
        _page(suite)
    with raises(DataError, Facts("missing-key", "films", column="protocol")):
        _page({key: value for key, value in made_suite().items() if key != "protocol"})


def test_only_suites_are_read_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "films.json").write_text(json.dumps(made_suite()))
    (tmp_path / "a.json").write_text('{"kind": "run"}')
    (tmp_path / "c.json").write_text("[1]")
    assert [found.benchmark for found in read_results(tmp_path)] == ["films"]
    # A result names the files of its page, so its name must be that of its own file.
    (tmp_path / "d.json").write_text(json.dumps(made_suite() | {"benchmark": "../films"}))
    with raises(DataError, Facts("mismatch", "d.json", says="../films")):
        read_results(tmp_path)
    (tmp_path / "d.json").write_text("{")
    with raises(DataError, Facts("syntax", "d.json", says="`llmrec eval`")):
        read_results(tmp_path)


def test_every_page_of_published_figures_in_the_repository_can_be_read(tmp_path: Path) -> None:
    pages = sorted((ROOT / "eval" / "references").glob("*.yaml"))
    assert pages and all(load_reference(page).rows for page in pages)
    (tmp_path / "x.yaml").write_text("reference: [")
    with raises(DataError, Facts("wrong-format", "x.yaml")):
        load_reference(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xff")
    with raises(DataError, Facts("wrong-format", "x.yaml")):
        load_reference(tmp_path / "x.yaml")


@pytest.mark.parametrize("texts", [SCRIPTS, FORMULAS, MARKDOWN], ids=["scripts", "formulas", "markdown"])
def test_no_text_becomes_markup(texts: tuple[str, ...]) -> None:
    size = len(texts)
    expected = blocks(page_of(hostile_suite([f"x{k}" for k in range(size)]), {"papers": made_reference()}))
    shown = set()
    for start in range(0, size, 8):
        turned = [*texts[start:], *texts[:start]]
        text = page_of(hostile_suite(turned), {"papers": made_reference(turned[::-1])})
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
    pages = leaderboard.pages_for(results, references or {"papers": made_reference()})
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


def test_the_leaderboard_has_a_row_for_each_model_and_a_column_for_each_data_set(tmp_path: Path) -> None:
    films, books = made_suite(), made_suite() | {"benchmark": "books"}
    for suite in (films, books):
        for row, reads in zip(suite["rows"], ("events", "events", "texts", "language model"), strict=True):
            row["reads"] = reads
        suite["rows"][0]["baseline"] = "random"
    # On books item-kNN was not run, and no row is shown to be worse than the best.
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
    # Films: the best row is better by an interval without 0. Books: nothing is shown.
    assert cells[1][1:4] == ["0.1170", "–", "–"] and cells[2][1:4] == ["0.0130", "**0.0130**", "–"]
    assert [column["title"] for column in table["columns"]] == ["Films", "Books"] and not table["lower"]
    assert table["rows"][1]["cells"][1] is None and table["rows"][0]["cells"][0]["best"]
    # Published systems under the same protocol, at their best figure.
    assert any(line[0].startswith("*P5") and line[4] == "*published*" for line in cells[3:])
    assert "popularity" not in text


def _published(name: str, figures: list[tuple[str, float]]) -> Reference:
    rows = [
        {"system": system, "source": name, "seen": "excluded", "values": {"NDCG@10": figure}}
        for system, figure in figures
    ]
    return Reference.model_validate(made_reference().model_dump() | {"reference": name, "rows": rows})


def test_four_published_systems_are_ordered_by_best_rank_then_by_the_number_of_their_figures(tmp_path: Path) -> None:
    papers = [(f"s{number}", (50 - number) / 100) for number in range(10)]
    references = {
        "papers": _published("papers", papers),
        "again": _published("again", [("s0", 0.3)]),
        "others": _published("others", [("late", 0.4), ("s9", 0.5), ("s0", 0.1)]),
    }
    films = made_suite() | {"references": ["papers", "again"]}
    books = made_suite() | {"benchmark": "books", "references": ["others"]}
    text, (table,) = _board(tmp_path, SETTINGS, films, books, references=references)
    assert [row["model"] for row in table["published"]] == ["s0", "s9", "late", "s1"]
    assert [row["cells"] for row in table["published"][:3]] == [[0.5, 0.1], [0.41, 0.5], [None, 0.4]]
    # The sources are those of the figures that are shown.
    assert [row["source"] for row in table["published"][:4]] == ["papers; others", "papers; others", "others", "papers"]
    assert "| *s1* |" in text and "s2" not in text


def test_an_ensemble_that_is_one_member_is_no_model_of_its_own(tmp_path: Path) -> None:
    films = made_suite()
    for form, shown in (("alone", False), ("ranker", True)):
        films["rows"][2]["tables"]["excluded"]["fusion"] = {"form": form, "parts": []}
        text, (table,) = _board(tmp_path, SETTINGS, films)
        assert ("Item-kNN" in text) == shown
        assert [row["type"] for row in table["rows"] if row["model"] == "Item-kNN"] == ["ensemble"] * shown


def test_a_column_takes_models_of_further_suites_on_the_same_requests(tmp_path: Path) -> None:
    films, later = made_suite(), made_suite() | {"benchmark": "later"}
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
    assert "[0.0130](later.md)" in text  # in place of the result on the data set's own page
    assert "| **0.1560** |" in text  # named by no further suite that has results
    board = leaderboard.load_board(tmp_path)
    assert board is not None and leaderboard.missing(board, read_results(tmp_path / "results")) == []
    later["rows"] = [row for row in later["rows"] if row["name"] == "item-knn"]  # a run that is not finished
    _, (table,) = _board(tmp_path, settings, films, later)
    assert [row["cells"][0]["best"] for row in table["rows"] if row["model"] == "Item-kNN"] == [False]
    later["data"]["items"] = 5
    assert "Item-kNN" not in _board(tmp_path, settings, films, later)[0]


def test_rows_without_a_description_are_named(tmp_path: Path) -> None:
    settings = {**SETTINGS, "models": {"sasrec": {"title": "SASRec"}}, "left_out": []}
    _board(tmp_path, settings, made_suite())
    board = leaderboard.load_board(tmp_path)
    assert board is not None
    assert leaderboard.missing(board, read_results(tmp_path / "results")) == ["item-knn", "popularity", "random"]
    assert leaderboard.load_board(tmp_path / "nowhere") is None
    (tmp_path / "leaderboard.yaml").write_text("groups: 3")
    with raises(DataError, Facts("wrong-format", "leaderboard.yaml")):
        leaderboard.load_board(tmp_path)


def test_the_leaderboard_of_the_repository_describes_every_row_of_its_suites() -> None:
    board = leaderboard.load_board(ROOT / "eval")
    assert board is not None
    assert leaderboard.missing(board, read_results(ROOT / "eval" / "results")) == []
    assert set(board.featured) <= set(board.models) and len(board.featured) <= 10
    page = (ROOT / "eval" / "LEADERBOARD.md").read_text(encoding="utf-8")
    further = [name for group in board.groups for column in group.columns for name in column.further]
    assert further and all(f"({name}.md)" in page for name in further if (ROOT / "eval" / f"{name}.md").exists())


def test_the_short_table_has_the_featured_rows_in_the_order_of_the_whole_one(tmp_path: Path) -> None:
    _board(tmp_path, SETTINGS | {"featured": ["random", "sasrec"]}, made_suite())
    board = leaderboard.load_board(tmp_path)
    assert board is not None
    (whole,) = leaderboard.matrices(board, read_results(tmp_path / "results"), {})
    lines = leaderboard.short_grid(leaderboard.featured(board, whole), "eval/").splitlines()
    assert lines[0] == "| Model | [Films](eval/films.md) | Type |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| SASRec", "| Random"]


@pytest.mark.parametrize("texts", [SCRIPTS, FORMULAS, MARKDOWN], ids=["scripts", "formulas", "markdown"])
def test_no_text_of_the_leaderboard_becomes_markup(tmp_path: Path, texts: tuple[str, ...]) -> None:
    made = made_suite()
    settings = {
        **SETTINGS,
        "models": {
            row["name"]: {"title": text, "pretrained": text} for row, text in zip(made["rows"], texts, strict=False)
        },
    }
    settings["left_out"] = []
    text, _ = _board(tmp_path, settings, made)
    assert not re.search(r"<[A-Za-z!/?]", text)
