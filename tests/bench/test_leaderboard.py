"""The leaderboard page: order, marks, one protocol a table, and texts that stay text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llmrec.bench.pages import leaderboard, read_results, result_of
from llmrec.bench.references import load_reference
from llmrec.errors import DataError, LlmrecError
from tests.bench.suites import hostile_suite, made_reference, made_suite
from tests.facts import Facts, raises
from tests.report.payloads import FORMULAS, MARKDOWN, SCRIPTS
from tests.report.reading import blocks

ROOT = Path(__file__).resolve().parents[2]


def _page(*suites: dict[str, Any]) -> str:
    return leaderboard([result_of(suite) for suite in suites or (made_suite(),)], {"papers": made_reference()})


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
        "| predictor | HR@5 | NDCG@5 | HR@10 | NDCG@10 | over tie rules | best row less this one | ties | parameters | "
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
    assert "best row less this one" not in _tables(_page(made_suite() | {"comparisons": []}))[0][0]


def test_rows_that_read_texts_stand_apart_from_those_that_do_not() -> None:
    suite = made_suite()
    for row, reads in zip(suite["rows"], ("events", "texts", "language model", "events"), strict=True):
        row["reads"] = reads
    lines = [line.split(" | ")[0].removeprefix("| ") for line in _tables(_page(suite))[0][2:]]
    assert lines == [
        *("*events alone*", "sasrec", "random"),
        *("*texts too, by an encoder that is not trained here*", "popularity"),
        *("*a language model or fine-tuned text encoder*", "item-knn"),
    ]


def test_several_suites_have_a_head_with_the_best_row_of_each_kind() -> None:
    assert "| suite |" not in _page()
    films, odd = made_suite(), made_suite() | {"benchmark": "Odd (name)"}
    for row, reads in zip(films["rows"], ("events", "texts", "language model", "events"), strict=True):
        row["reads"] = reads
    odd["protocol"] = odd["protocol"] | {"seeds": [0]}
    odd["rows"][3]["tables"]["excluded"]["metrics"]["NDCG@10"] |= {"value": None, "undefined": "no request"}
    page = _page(odd, films)
    head = _tables(page)[0]
    assert head == [
        "| suite | users | metric | events alone | texts too | a language model or fine-tuned text encoder "
        "| not said |",
        "| --- | ---: | --- | --- | --- | --- | --- |",
        "| Odd (name), *exploratory* | 943 | NDCG@10 | – | – | – | item-knn 0.1170 |",
        "| [films](#films) | 943 | NDCG@10 | sasrec 0.1560 | popularity 0.0650 | item-knn 0.1170 | – |",
    ]
    assert page.index("| [films](#films) |") < page.index("## films")


def test_planned_pairs_have_the_level_of_their_step_and_plain_words() -> None:
    text = _page()
    assert "The 2 planned comparisons have p Holm-adjusted over all tables of the file" in text
    assert "sasrec less item-knn: +0.0300 [+0.0001, +0.0600] (97.5 %), p 0.040, significantly better" in text
    assert "sasrec less item-knn: +0.0300 [-0.0100, +0.0600] (97.5 %), p 0.100, no significant difference" in text
    assert "exploratory: unadjusted 95 % intervals, no p and no verdict" in text


def test_notes_of_a_result_are_before_its_tables() -> None:
    text = _page(made_suite() | {"notes": ["Mind *this*."]})
    assert "\n\nMind \\*this\\*.\n\n" in text and text.index("Mind") < text.index("### Seen")


def test_a_section_says_how_its_parameters_came_about() -> None:
    suite = made_suite()
    row = suite["rows"][2]
    assert "Parameters are chosen" not in _page()
    values = {"excluded": 0.1, "included": 0.2}
    row |= {"baseline": "item-knn", "trials": [{"parameters": {"neighbours": k}, "values": values} for k in (10, 20)]}
    assert "Parameters are chosen on validation, for each table by itself." in _page(suite)
    del values["included"]
    assert "Parameters are chosen" not in _page(suite)
    suite["rows"][3]["baseline"] = "sasrec"
    assert "Not tuned in this suite, which names their parameters: sasrec." in _page(suite)


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
    assert "RMSE of sasrec is undefined. Nothing is compared with what has no figure." in _page(suite)
    assert "### Ratings" in _page(suite)
    for row in suite["rows"]:
        row["tables"]["yes-no"] = row["tables"].pop("rating")
    suite["tables"][0]["name"] = "yes-no"
    assert "### Yes or no to an item" in _page(suite)


def test_published_rows_stand_beside_the_protocol_that_they_share() -> None:
    text = _page()
    assert text.count("Published under the same protocol") == 2 and "not stated" in text
    published = _tables(text)[1]
    # Best first by the last metric that they print; a row without it comes after those with it.
    assert [re.findall(r"0\.\d{4}", line) for line in published[2:]] == [["0.0600"], ["0.0500", "0.0400"], ["0.9000"]]
    other = made_suite()
    other["protocol"]["candidates"] = "uniform-100"
    assert "Published" not in _page(other).split("## films")[1]


def test_published_rows_on_other_interactions_stand_apart_with_their_counts() -> None:
    counts = {"users": 943, "items": 1682}
    other = made_reference().model_copy(update={"counts": counts, "data": "all films"})
    text = leaderboard([result_of(made_suite())], {"papers": made_reference(), "all": other})
    assert text == _page()  # a suite prints the pages that it names
    suite = made_suite() | {"references": ["papers", "all"]}
    text = leaderboard([result_of(suite)], {"papers": made_reference(), "all": other})
    apart = "but on other interactions (all films: 943 users, 1,682 items)"
    assert text.count(f"Published under the same protocol, {apart}:\n") == 2
    assert text.count(f"### Published, treatment of the history not stated, {apart}\n") == 1
    assert text.count("Published under the same protocol:\n") == 2
    suite["data"]["items"] = 1682
    text = leaderboard([result_of(suite)], {"papers": made_reference(), "all": other})
    assert text.count("other interactions") == 0 and len(_tables(text)[1]) == 2 + 2 * 3


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
    (tmp_path / "b.json").write_text(json.dumps(made_suite()))
    (tmp_path / "a.json").write_text('{"kind": "run"}')
    (tmp_path / "c.json").write_text("[1]")
    assert [found.benchmark for found in read_results(tmp_path)] == ["films"]
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
    expected = blocks(
        leaderboard([result_of(hostile_suite([f"x{k}" for k in range(size)]))], {"papers": made_reference()})
    )
    shown = set()
    for start in range(0, size, 8):
        turned = [*texts[start:], *texts[:start]]
        text = leaderboard([result_of(hostile_suite(turned))], {"papers": made_reference(turned[::-1])})
        assert blocks(text) == expected
        assert not re.search(r"<[A-Za-z!/?]", text)
        shown |= {table[0].count(" | ") for table in _tables(text)}
    assert len(shown) == 2
