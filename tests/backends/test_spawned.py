"""Processes that an engine starts do not run the caller's script again: as a file, from stdin, in a notebook."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from multiprocessing import spawn
from pathlib import Path

import pytest

from llmrec.backends.vllm.supervise import without_main

EXHAUSTIVE = bool(os.environ.get("LLMREC_EXHAUSTIVE"))
# Without the guard that `multiprocessing` asks of scripts. `print` stands for whatever else they do.
SCRIPT = """
import multiprocessing, sys
from llmrec.backends.vllm.supervise import without_main

print("script", flush=True)
with without_main():
    child = multiprocessing.get_context("spawn").Process(target=print, args=("child",), kwargs={"flush": True})
    child.start()
    child.join(60)
    sys.exit(child.exitcode)
"""
# A notebook's cells run in a module called __main__ that has no file.
CELL = "import sys, types; m = sys.modules['__main__'] = types.ModuleType('__main__'); exec(sys.argv[1], vars(m))"


def ran(way: str, script: str, folder: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a script in one of the three ways, from a folder of its own."""
    file = folder / "exact.py"
    file.write_text(script)
    words = {"file": [str(file)], "stdin": ["-"], "notebook": ["-c", CELL, script]}[way]
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, *words],
        input=script if way == "stdin" else "",
        capture_output=True,
        text=True,
        timeout=seconds,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root, "VLLM_CPU_KVCACHE_SPACE": "1"},
        check=False,
    )


@pytest.mark.parametrize("way", ["file", "stdin", "notebook"])
def test_a_spawned_process_does_not_run_the_script_again(way: str, tmp_path: Path) -> None:
    done = ran(way, SCRIPT, tmp_path, 60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["script", "child"]


def test_other_threads_still_hand_over_the_main_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one thread leaves out, another one tells meanwhile; afterwards all tell it."""
    inside, over, told = threading.Event(), threading.Event(), []
    # A worker of the tests has no file of its own to tell.
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None, raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", __file__, raising=False)

    def hides() -> None:
        with without_main():
            with without_main():
                pass
            told.append(spawn.get_preparation_data("child"))
            inside.set()
            over.wait(10)
        told.append(spawn.get_preparation_data("child"))

    thread = threading.Thread(target=hides)
    thread.start()
    assert inside.wait(10)
    meanwhile = spawn.get_preparation_data("child")
    over.set()
    thread.join()
    hidden, after = told
    assert meanwhile.keys() - hidden.keys() <= {"init_main_from_name", "init_main_from_path"}
    assert len(meanwhile.keys() - hidden.keys()) == 1
    assert after.keys() == meanwhile.keys()


def test_the_main_module_is_told_again_after_an_error() -> None:
    before = spawn.get_preparation_data("child")
    with pytest.raises(ZeroDivisionError), without_main():
        raise ZeroDivisionError
    assert spawn.get_preparation_data("child") == before


@pytest.mark.vllm
@pytest.mark.slow
# An engine takes a minute to start; what differs between the ways is held by the fast tests above.
@pytest.mark.parametrize("way", ["file", "stdin", "notebook"] if EXHAUSTIVE else ["file"])
def test_the_lines_of_the_readme_run_as_they_stand(way: str, tmp_path: Path, llama_folder: Path) -> None:
    """The README's snippet, unguarded, on the default engine; with a small model, few steps and few requests."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    found = re.search(r"```python\nimport llmrec\n\n(recipe = .*?)```", readme, re.DOTALL)
    assert found is not None
    overrides = [
        f"model.name={llama_folder}",
        "model.dtype=float32",
        "data={source: made-reviews, noun: products}",
        "reviews=null",
        "tasks={explanation: {templates: [plain], max_tokens: 20}}",
        "eval={arms: [tuned], users: 4, bootstrap: 50}",
        "train.steps=2",
    ]
    mark, out = tmp_path / "mark", tmp_path / "run"
    lines = found[1].replace('["train.steps=50"]', repr(overrides))
    assert "train.steps=2" in lines
    lines = lines.replace("llmrec.run(recipe)", f"llmrec.run(recipe, {str(out)!r})")
    done = ran(way, f"import llmrec\nopen({str(mark)!r}, 'a').write('x')\n{lines}", tmp_path, 400)
    assert done.returncode == 0, done.stderr
    assert mark.read_text() == "x"
    results = json.loads((out / "results.json").read_text())
    assert {row["engine"] for row in results["rows"] if row["arm"] == "tuned"} == {"vllm:generate"}
    assert (out / "report" / "index.html").is_file()
