"""A run without a tuned model cannot be exported, which is reported before any library is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmrec.errors import LlmrecError
from llmrec.exports.options import check_fine_tuned
from tests.facts import Facts, raises

RECIPE = """\
name: shop
data: {source: made-reviews, noun: products}
tasks: {sequential: {}}
eval: {arms: ARMS}
"""


def make_run(folder: Path, arms: str) -> Path:
    (folder / "recipe.yaml").write_text(RECIPE.replace("ARMS", arms))
    return folder


@pytest.mark.parametrize(
    ("arms", "column", "says"), [("[]", None, "llmrec serve"), ("[zero-shot]", "eval.arms", "add tuned to eval.arms")]
)
def test_error_names_the_fix(tmp_path: Path, arms: str, column: str | None, says: str) -> None:
    run = make_run(tmp_path, arms)
    with raises(LlmrecError, Facts("unsupported", run, column=column, says=says)):
        check_fine_tuned(run)
    (run / "train.json").write_text("{}")
    check_fine_tuned(run)


def test_runs_to_be_tuned_are_accepted(tmp_path: Path) -> None:
    check_fine_tuned(make_run(tmp_path, "[zero-shot, tuned]"))
    check_fine_tuned(tmp_path / "nothing")


def test_error_imports_no_library(tmp_path: Path) -> None:
    code = (
        "import sys; from llmrec.cli import main as cli\n"
        f"sys.argv = ['llmrec', 'export', {str(make_run(tmp_path, '[]'))!r}, '--out', {str(tmp_path / 'out')!r}]\n"
        "try:\n    cli.main()\nfinally:\n    print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and done.stdout == "[]\n"
    assert len(done.stderr.splitlines()) == 1 and "finish the run" not in done.stderr
