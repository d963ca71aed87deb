"""The command line: quick help, one-paragraph errors, exit codes."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from llmrec.cli import main as cli
from llmrec.registry import COMMANDS, PANELS
from tests.command import Done, llmrec

RECIPE = """\
name: shop
model: {name: MODEL}
data:
  source: table
  path: PATH
  columns: {user: user, item: item, rating: stars, time: day, title: title}
tasks:
  rating: {}
  sequential: {}
eval: {backend: fake, scorer: fake, arms: [zero-shot], users: 4, candidates: {count: 3}, bootstrap: 50}
"""
HEADER = "user,item,stars,day,title\n"


def rows() -> list[str]:
    return [
        f"u{u},i{(u + k) % 9},{1 + (u * k) % 5},{100 * u + k},Title {(u + k) % 9}" for u in range(8) for k in range(6)
    ]


def write(folder: Path, table: str, model: str = "none") -> str:
    (folder / "shop.csv").write_text(table, encoding="utf-8")
    text = RECIPE.replace("PATH", str(folder / "shop.csv")).replace("MODEL", model)
    (folder / "shop.yaml").write_text(text, encoding="utf-8")
    return str(folder / "shop.yaml")


def expect_error(done: Done, *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    for part in parts:
        assert part in done.stderr


def test_help_loads_no_large_library() -> None:
    code = (
        "import sys; sys.argv = ['llmrec', '--help']\n"
        "from llmrec.cli import main as cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "large = {'torch', 'transformers', 'datasets', 'vllm', 'polars', 'trl', 'pydantic', 'numpy', 'scipy'}\n"
        "sys.stderr.write(f'{sorted(large & set(sys.modules))}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == "[]" and "run" in done.stdout


def test_codes_of_ids_need_no_pandas() -> None:
    code = (
        "import sys, polars; from llmrec.data.read.codes import encode_ids\n"
        "print(encode_ids(polars.Series(['b', 'a', 'b'])).to_physical().to_list(), 'pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[1, 0, 1] False\n"


def test_help_of_commands() -> None:
    group: Any = get_command(cli.app)
    commands = {name: group.get_command(None, name) for name in COMMANDS}
    every = {**commands, **commands["features"].commands}
    summaries = {name: (command.help or "").strip().split("\n\n")[0] for name, command in every.items()}
    assert not {name: text for name, text in summaries.items() if not text or len(text) > 60}
    assert {name: command.help for name, command in COMMANDS.items()} == {name: summaries[name] for name in COMMANDS}
    assert {command.panel for command in COMMANDS.values()} == set(PANELS)
    text = CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).stdout
    for panel in PANELS:
        listed = [line.split(maxsplit=1) for line in text.split(f"{panel}:\n")[1].split("\n\n")[0].splitlines()]
        assert listed == [[name, summaries[name]] for name in COMMANDS if COMMANDS[name].panel == panel]
    done = CliRunner().invoke(cli.app, ["rnak"])
    assert done.exit_code == 2 and "Did you mean 'rank'" in done.output
    for command in COMMANDS:
        done = llmrec(command, "--help")
        assert done.returncode == 0
        assert done.stdout.startswith(f"Usage: llmrec {command} ")


def test_process_has_exit_code_and_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmrec", "report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    expect_error(Done(done.returncode, done.stdout, done.stderr), "results.json", "llmrec eval")


def test_every_command_has_an_example_that_parses() -> None:
    root: Any = get_command(cli.app)
    with root.make_context("llmrec", [], resilient_parsing=True) as context:
        for name in COMMANDS:
            command = root.get_command(context, name)
            inner = getattr(command, "commands", {})
            for path, part in {f"{name} {word}": part for word, part in inner.items()}.items() or [(name, command)]:
                lines = part.epilog.splitlines()[2:]
                assert lines
                for line in lines:
                    words = shlex.split(line)
                    assert " ".join(words[1 : 1 + len(path.split())]) == path
                    part.make_context(path, words[1 + len(path.split()) :])


def test_check_of_valid_data(tmp_path: Path, llama_folder: Path) -> None:
    done = llmrec("check", write(tmp_path, HEADER + "\n".join(rows()) + "\n", model=str(llama_folder)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("recipe shop is valid: ") and done.stdout.count("\n") == 1
    assert "test cases: rating 4, sequential 4" in done.stdout
    done = llmrec("check", str(tmp_path / "shop.yaml"), "-v")
    assert "sequential: 4 test cases, evaluated with sequential/" in done.stdout
    done = llmrec("data", str(tmp_path / "shop.yaml"))
    assert done.returncode == 0
    assert "interactions" in done.stdout


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda r: HEADER.replace("stars", "points") + "\n".join(r), ("shop.csv", "stars", "columns.rating")),
        (lambda r: HEADER + "\n".join([*r[:4], "u0,i3,nan,7,Title 3", *r[4:]]), ("shop.csv", "row 5", "stars")),
    ],
    ids=["missing column", "NaN rating"],
)
def test_check_of_invalid_data(tmp_path: Path, change: object, parts: tuple[str, ...]) -> None:
    done = llmrec("check", write(tmp_path, change(rows())))  # type: ignore[operator]
    expect_error(done, *parts)


def test_errors_of_keys_models_and_files(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER + "\n".join(rows()), model="./no-such-model")
    expect_error(llmrec("check", path, "train.stepz=3"), "train.stepz", "did you mean 'steps'")
    expect_error(llmrec("check", path), "./no-such-model", "model.name")
    expect_error(llmrec("run", str(tmp_path / "no.yaml")), "no.yaml", "does not exist", "recipes/quickstart.yaml")
    expect_error(llmrec("report", str(tmp_path)), "results.json", "llmrec eval")


def test_missing_extra_has_its_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, HEADER + "\n".join(rows()))
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = llmrec("run", path, "model.name=SmolLM2-135M-Instruct", "--out", str(tmp_path / "r"))
    expect_error(done, "pip install 'llmrec[train]'")


def test_run_with_the_fake_backend(tmp_path: Path, llama_folder: Path) -> None:
    path = write(tmp_path, HEADER + "\n".join(rows()), model=str(llama_folder))
    done = llmrec("run", path, "-q", "--out", str(tmp_path / "r"))
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80 + len(str(tmp_path))
    assert "Task and metric" in done.stdout and "best baseline" in done.stdout
    assert "time: " in done.stdout and "llmrec report" in done.stdout
    assert (tmp_path / "r" / "report" / "index.html").is_file()
