"""The scripts of eval/lines_of_code: counted as the page says, and those of llmrec do what the tasks ask for."""

from __future__ import annotations

import hashlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llmrec.start", reason="the extension is not there")

from eval.benchmarks import lines_of_code as code
from llmrec.models.wheels import WHEELS

ROOT = Path(__file__).parent.parent
KNOWN = code.definition(ROOT)
RESULT = json.loads((ROOT / code.RESULT).read_text(encoding="utf-8"))
# Scripts that train for minutes or repeat others: `compare` fits and evaluates what `popularity` and `serve` need.
LONG = {"tuned", "sasrec", "language_model", "encoder", "export", "cold", "intervals", "serve", "popularity"}


@pytest.mark.parametrize(
    "task",
    [pytest.param(task, id=task["name"], marks=[pytest.mark.slow] * (task["name"] in LONG)) for task in KNOWN["tasks"]],
)
def test_script_of_llmrec_does_its_task(task: dict[str, Any]) -> None:
    pytest.importorskip("torch", reason="the train extra is not installed")
    if task["name"] == "serve":
        pytest.importorskip("llmrec.serve", reason="the extension is not there")
    if not all(find_spec(wheel.package) for wheel in WHEELS.values()):
        pytest.skip("the models of the setup are not installed")
    result = code.outcome(code.scripts(ROOT, code.LIBRARY, task["name"]), task, sys.executable)
    assert result.get("served", 10) == 10 and result.get("NDCG@10", 1.0) > 0.05


def test_library_has_a_script_or_a_reason() -> None:
    for task in KNOWN["tasks"]:
        for library in KNOWN["libraries"]:
            assert bool(code.scripts(ROOT, library, task["name"])) != (library in task.get("absent", {}))


def test_result_is_of_these_scripts() -> None:
    counted = {}
    for cell in RESULT["cells"]:
        files = code.scripts(ROOT, cell["library"], cell["task"])
        assert cell["sha256"] == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
        counted[cell["library"], cell["task"]] = cell["lines"]
        assert cell["lines"] == sum(map(code.lines, files))
    assert all((code.LIBRARY, task["name"]) in counted for task in KNOWN["tasks"])


def test_ignores_blank_lines_and_comments(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("# why\nimport os\n\n    # more\nprint(os.name)  # shown\n")
    assert code.lines(tmp_path / "a.py") == 2
