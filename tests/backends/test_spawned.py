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

from llmrec.backends.vllm.supervise import hide_main_module

# Without the guard that `multiprocessing` requires of scripts.
SCRIPT = """
import multiprocessing, sys
from llmrec.backends.vllm.supervise import hide_main_module

print("script", flush=True)
with hide_main_module():
    child = multiprocessing.get_context("spawn").Process(target=print, args=("child",), kwargs={"flush": True})
    child.start()
    child.join(60)
    sys.exit(child.exitcode)
"""
# A notebook's cells run in a module called __main__ that has no file.
CELL = "import sys, types; m = sys.modules['__main__'] = types.ModuleType('__main__'); exec(sys.argv[1], vars(m))"


def run_script(way: str, script: str, folder: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a script as a file, from stdin or in a notebook."""
    file = folder / "exact.py"
    file.write_text(script)
    arguments = {"file": [str(file)], "stdin": ["-"], "notebook": ["-c", CELL, script]}[way]
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, *arguments],
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
    done = run_script(way, SCRIPT, tmp_path, 60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["script", "child"]


def test_other_threads_keep_the_main_module(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, over, data = threading.Event(), threading.Event(), []
    # A test worker's main module has no file.
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None, raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", __file__, raising=False)

    def hides() -> None:
        with hide_main_module():
            with hide_main_module():
                pass
            data.append(spawn.get_preparation_data("child"))
            inside.set()
            over.wait(10)
        data.append(spawn.get_preparation_data("child"))

    thread = threading.Thread(target=hides)
    thread.start()
    assert inside.wait(10)
    meanwhile = spawn.get_preparation_data("child")
    over.set()
    thread.join()
    hidden, after = data
    assert meanwhile.keys() - hidden.keys() <= {"init_main_from_name", "init_main_from_path"}
    assert len(meanwhile.keys() - hidden.keys()) == 1
    assert after.keys() == meanwhile.keys()


@pytest.mark.vllm
@pytest.mark.slow
def test_readme_snippet_runs(tmp_path: Path, llama_folder: Path) -> None:
    """The snippet of the README, unguarded, on the default engine, with a small model and few steps and requests."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    match = re.search(r"```python\nimport llmrec\n\n(recipe = .*?)```", readme, re.DOTALL)
    assert match is not None
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
    lines = match[1].replace('["train.steps=50"]', repr(overrides))
    assert "train.steps=2" in lines
    lines = lines.replace("llmrec.run(recipe)", f"llmrec.run(recipe, {str(out)!r})")
    done = run_script("file", f"import llmrec\nopen({str(mark)!r}, 'a').write('x')\n{lines}", tmp_path, 400)
    assert done.returncode == 0, done.stderr
    assert mark.read_text() == "x"
    results = json.loads((out / "results.json").read_text())
    assert {row["engine"] for row in results["rows"] if row["arm"] == "tuned"} == {"vllm:generate"}
    assert (out / "report" / "index.html").is_file()
