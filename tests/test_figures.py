"""Figures in README.md, docs/ and the generated pages equal the committed results."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from scipy.stats import ttest_rel

from eval.benchmarks import record
from eval.benchmarks.figures.__main__ import main as command
from eval.benchmarks.figures.check import EXCEPTIONS, faults, named, write
from eval.benchmarks.figures.pages import figures, masked, read
from eval.benchmarks.figures.pointers import PointerError, Results, chance, paired_t
from llmrec.metrics.ranking import ndcg
from llmrec.recipe.load import load_recipe

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("docs", "eval", "recipes"):
        shutil.copytree(ROOT / name, copy / name)
    shutil.copy(ROOT / "README.md", copy)
    return copy


@pytest.fixture
def checkout(copied: Path) -> Iterator[Path]:
    """Yield a copy of the checked files, which tests may edit; edits are undone afterwards."""
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.suffix in {".md", ".json", ".yaml", ".svg"}}
    yield copied
    for path, content in before.items():
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)


def plant(root: Path, name: str, old: str, new: str) -> None:
    text = (root / name).read_text(encoding="utf-8")
    assert old in text
    (root / name).write_text(text.replace(old, new, 1), encoding="utf-8")


def test_figures_equal_their_sources() -> None:
    assert faults(ROOT) == []


PLANTED = [
    ("docs/quickstart.md", "| 0.647 |", "| 0.747 |", "docs/quickstart.md: is not what its generator writes"),
    ("README.md", "## Examples", "It is 12 % better.\n\n## Examples", "12 % has no source"),
    ("docs/generative-and-semantic-ids.md", "hour:test/rows", "hour:test/pairs", "leads to nothing"),
    (
        "eval/PERFORMANCE.md",
        "x** faster than `generate`",
        "9x** faster than `generate`",
        "eval/PERFORMANCE.md: is not what its generator writes",
    ),
    ("eval/LEADERBOARD.md", "| Popularity |", "| Popular |", "eval/LEADERBOARD.md: is not what its generator writes"),
    ("eval/NEGATIVE_RESULTS.md", "worse", "better", "eval/NEGATIVE_RESULTS.md: is not what its generator writes"),
    ("eval/two-stages.md", "0.", "1.", "eval/two-stages.md: is not what its generator writes"),
    (
        "docs/preference-and-rl.md",
        "no significant difference",
        "significantly better",
        "the text says 'significantly better'",
    ),
    ("docs/should-you-use-an-llm.md", "than `transitions-tuned`", "than `markov`", "the text compares with markov"),
    (
        "docs/should-you-use-an-llm.md",
        "| [yes/no](../eval/ml1m-ctr.md);",
        "| significantly better: [yes/no](../eval/ml1m-ctr.md);",
        "'significantly better' has no difference of a pair in its paragraph",
    ),
    (
        "docs/should-you-use-an-llm.md",
        "is not significantly better than `transitions`, ",
        "is not significantly better than `transitions`, the best single model, ",
        "which on validation is gru4rec and not transitions",
    ),
    (EXCEPTIONS, "page: docs/baselines-and-ensembles.md", "page: docs/install.md", "docs/install.md has no figure in"),
    ("recipes/quickstart.yaml", "steps: 240", "steps: 250", "train.steps was 240, is 250"),
    ("recipes/quickstart.yaml", "description: >-", "description: >- \n  Another.", "train.steps was 240, is 250"),
    (EXCEPTIONS, "text: 8 bytes per item", "text: 9 bytes per item", "no figure in '9 bytes per item"),
]


def test_finds_planted_edits(checkout: Path) -> None:
    for name, old, new, _ in PLANTED:
        plant(checkout, name, old, new)
    change_result(checkout)
    result = faults(checkout)
    for *_, says in PLANTED:
        assert any(says in fault for fault in result), (says, result)
    assert len([fault for fault in result if "narrow:" in fault]) == 1


def change_result(checkout: Path) -> None:
    results = checkout / "eval" / "results" / "narrow.json"
    content = json.loads(results.read_text())
    for pair in content["pairs"]:
        pair["value"] *= 2
    results.write_text(json.dumps(content))


def test_changed_result_is_written(checkout: Path) -> None:
    change_result(checkout)
    pages = {name: (checkout / name).read_text(encoding="utf-8") for name in named(checkout)}
    assert write(checkout) == ["docs/experimental.md", "eval/NEGATIVE_RESULTS.md", "eval/narrow.md"]
    assert faults(checkout) == []
    for name, text in pages.items():
        now = (checkout / name).read_text(encoding="utf-8")
        assert re.sub(r"\+\.00\d\d (?=\[)", "", now) == re.sub(r"\+\.00\d\d (?=\[)", "", text)


@pytest.mark.slow
def test_command_reports_and_corrects(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = "docs/baselines-and-ensembles.md"
    result = re.search(r"significantly better, by \+(\.\d{4}) \[", (checkout / page).read_text(encoding="utf-8"))
    assert result is not None
    plant(checkout, page, f"+{result[1]} [", "+.9999 [")
    wrong = rf"docs/baselines-and-ensembles\.md, line .*\.9999 is \+{re.escape(result[1])} in toys:"
    for flag, code, says in (("--check", 1, wrong), ("--write", 0, r"written: docs/baselines-and-ensembles\.md\n$")):
        monkeypatch.setattr(sys, "argv", ["figures", flag, "--root", str(checkout)])
        assert command() == code
        assert re.match(says, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("NDCG@10 .578, RMSE 1.061 and +0.169 [−.02, +.4]", [".578", "1.061", "+0.169", "−.02", "+.4"]),
        ("22,363 users, 12 % of 94.8K, p 2e-16 (.0361–.0467)", ["22,363", "12 %", "94.8", "2e-16", ".0361", ".0467"]),
        ("in 78 seconds, 13 to 16 minutes, 3 times faster", ["78", "13", "16", "3"]),
        ("943 users, three times, 20 candidates, `0.25` and `lr 1e-4`", []),
        ("Python 3.11, vllm 0.32.0, section 4.1, [a](b.5.md), arXiv 2305.06474, 95 % intervals", []),
        ("# 1.5\n```sh\nrun 0.5\n```\n<!-- 0.5 -->\n<!-- a:table -->\n0.5\n<!-- /a:table -->", []),
    ],
)
def test_recognises_figures(text: str, found: list[str]) -> None:
    assert [str(figure) for figure in figures(masked(text))] == found


@pytest.mark.parametrize(
    ("printed", "value", "written"),
    [
        (".57", ".5749", ".57"),
        (".123", ".1225", ".122"),
        ("0.57", "-.0349", "−0.03"),
        ("+.57", ".1", "+.10"),
        ("−.57", "-.1", "−.10"),
        ("57", "-.4", "0"),
        ("1,234", "98765.4", "98,765"),
        ("2e-16", "1.95e-17", "2e-17"),
        ("57 %", ".1234", "12"),
    ],
)
def test_printed_decimals_decide_the_rounding(printed: str, value: str, written: str) -> None:
    (figure,) = figures(f"{printed} minutes")
    assert figure.written(Decimal(value)) == written


@pytest.fixture
def results(tmp_path: Path) -> Results:
    (tmp_path / "eval" / "results").mkdir(parents=True)
    rows = [{"name": "a", "n": 2, "HR@5": {"value": 0.25}}, {"name": "b, c", "n": 6, "HR@5": {"value": 0.5}}]
    (tmp_path / "eval" / "results" / "made.json").write_text(json.dumps({"rows": rows, "with blank": True, "x": 1e-3}))
    return Results(tmp_path)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("made:rows[name=a]/HR@5", "0.25"),
        ("made:rows[name=b, c & n=6]/HR@5/value", "0.5"),
        ("made:x * 1000 + 2", "3"),
        ("(made:rows[name=a]/n - made:rows[name=b, c]/n) / 8", "-0.5"),
        ("abs(made:rows[name=a]/n - 3)", "1"),
        ("min(made:rows/*/n) + max(made:rows/*/n) + sum(made:rows/*/n) + mean(made:rows/*/n)", "20"),
        ("count(made:rows/*/n)", "2"),
    ],
)
def test_values_of_expressions(results: Results, expression: str, value: str) -> None:
    assert results.value(expression) == Decimal(value)


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("other:rows", "there is no eval/results/other.json"),
        ("made:rows[name=d]/n", "no entry has name=d"),
        ("made:rows/0/n", "no '0'"),
        ("made:rows/*/n", "leads to 2 values"),
        ("made:[with blank]", "leads to no number"),
        ("1 / 2", "names no result"),
        ("made:x +", "a pointer is missing"),
        ("made:x made:x", "one too many"),
        ("(made:x", "')' is missing"),
        ("__import__('os')", "cannot read"),
    ],
)
def test_rejects_invalid_expressions(results: Results, expression: str, says: str) -> None:
    with pytest.raises(PointerError, match=re.escape(says)):
        results.value(expression)


@pytest.mark.parametrize(("cutoff", "candidates"), [(10, 20), (5, 3)])
def test_chance_equals_the_metric_of_a_tied_ranking(cutoff: int, candidates: int) -> None:
    assert float(chance(cutoff, candidates)) == pytest.approx(ndcg([0], [candidates], cutoff)[0])


def test_paired_t_equals_scipy(results: Results) -> None:
    a, b = [0.71378, 0.71493, 0.71599, 0.71477, 0.71766], [0.71381, 0.71438, 0.71665, 0.71836, 0.71866]
    result = paired_t([Decimal(str(each)) for each in a], [Decimal(str(each)) for each in b])
    assert float(result) == pytest.approx(ttest_rel(a, b).statistic)
    for pairs in (([1], [2]), ([1, 2], [1]), ([1, 2], [2, 3])):
        with pytest.raises(PointerError):
            paired_t(*([Decimal(each) for each in values] for values in pairs))
    named = results.value("t(made:rows/*/n , made:rows/*/HR@5)")
    assert float(named) == pytest.approx(float(paired_t([Decimal(2), Decimal(6)], [Decimal("0.25"), Decimal("0.5")])))


def bound(text: str) -> list[tuple[str, str]]:
    page = read(text)
    assert not page.faults
    return [(str(each.figure), each.expression) for each in page.bound]


def test_comments_bind_lines_and_blocks() -> None:
    text = (
        "<!-- figures: a:x; a:{y,z} -->\nIt is .1 [.2, .3].\n\nAnd .4. <!-- figures\n$p = b:rows[name=q; r]\n$p/v -->\n"
        "- .5 <!-- figures: $p/w -->\n- .6\n"
    )
    assert bound(text) == [
        (".1", "a:x"),
        (".2", "a:y"),
        (".3", "a:z"),
        (".4", "b:rows[name=q; r]/v"),
        (".5", "b:rows[name=q; r]/w"),
    ]
    assert [str(figure) for figure in read(text).unbound] == [".6"]
    text = "<!-- figures: a:x -->\nTheirs .2, ours .1."
    start = text.index("Theirs")
    page = read(text, [(start, start + len("Theirs .2"))])
    assert [(str(each.figure), each.expression) for each in page.bound] == [(".1", "a:x")]
    assert not page.unbound and not page.faults


TABLE = """<!-- figures
each: a:rows[name=$1]/v | a:[$0]/{low,high}
one: x
**two**: y, z
-->
| | V | Interval |
|---|---|---|
| one | .1 | [.2, .3] |
| two | .4 | |
| **`three`** | .5 | |
"""


def test_comments_bind_rows_of_a_table() -> None:
    text = TABLE.replace("**two**", "two")
    assert bound(text) == [
        (".1", "a:rows[name=x]/v"),
        (".2", "a:[one]/low"),
        (".3", "a:[one]/high"),
        (".4", "a:rows[name=y, z]/v"),
    ]
    assert [str(figure) for figure in read(text).unbound] == [".5"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (TABLE, "no (further) row of the table is called '**two**'"),
        (TABLE.replace("**two**: y, z\n", "one: x\n"), "no (further) row of the table is called 'one'"),
        (TABLE.replace("**two**: y, z\n", "").replace("{low,high}", "low"), "row 'one': 2 figures (.2, .3), 1 expr"),
        ("<!-- figures: a:x; a:y -->\nIt is .1.", "1 figures (.1), 2 expressions"),
        ("It is .1. <!-- figures: $q/x -->", "$q is undefined here"),
    ],
)
def test_rejects_comments_that_do_not_match(text: str, says: str) -> None:
    (fault,) = read(text).faults
    assert says in fault


def test_records_a_run_only_with_its_recipe(tmp_path: Path) -> None:
    page = ROOT / "recipes" / "quickstart.yaml"
    kept = json.loads((ROOT / "eval" / "results" / "quickstart.json").read_text())
    # A run of this recipe with the current defaults, which may differ from those of the stored run.
    today = {"recipe": load_recipe(str(page)).model_dump(mode="json")}
    output = today | {"machine": {**kept["machine"], "gpu": "a card"}, "notes": ["made: a note of the run"]}
    (tmp_path / "results.json").write_text(json.dumps({**kept, **output}))
    readme = tmp_path / "README.md"
    readme.write_text(f"<!-- {record.PART} -->\n<!-- /{record.PART} -->\n")
    record.main(tmp_path, tmp_path / "kept.json", readme, page)
    recorded = json.loads((tmp_path / "kept.json").read_text())["recipe_page"]
    assert {**recorded, "description": ""} == {**kept["recipe_page"], "description": ""}
    text = readme.read_text()
    assert "a card" in text and "no GPU" not in text and "made: a note of the run" in text
    other = tmp_path / "other.yaml"
    other.write_text(page.read_text().replace("steps: 240", "steps: 250"))
    with pytest.raises(SystemExit, match="run with another recipe"):
        record.main(tmp_path, tmp_path / "kept.json", readme, other)
