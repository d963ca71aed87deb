"""Options that every command has, wherever they stand on the line, and JSON in place of words."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from llmrec.answer.options import About
from llmrec.cli import console
from llmrec.cli import main as cli
from llmrec.cli.audit import AuditOptions, audit
from llmrec.cli.main import app_of
from llmrec.pipeline import run as pipeline
from llmrec.progress import QUIET, Bar
from llmrec.recipe.load import load_recipe
from llmrec.types import Cost
from tests.test_cli import HEADER, rows, write


def told(*args: str, code: int = 0) -> dict[str, Any]:
    """Run a command with --json and return the one object that it prints."""
    # In a process of its own: the descriptor of the standard output is moved.
    command = [sys.executable, "-m", "llmrec", *args, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def commands(group: Any, context: Any, *path: str) -> Iterator[tuple[str, Any]]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if hasattr(command, "list_commands"):
            yield from commands(command, context, *path, name)
        else:
            yield " ".join((*path, name)), command


# --------------------------------------------------------------------------- options


def test_every_command_has_them_once() -> None:
    root = get_command(cli.app)
    context = typer.Context(root)  # type: ignore[arg-type]
    found = dict(commands(root, context))
    assert {"run", "check", "rank", "features show"} <= set(found)
    for name, command in found.items():
        names = [option for param in command.get_params(context) for option in param.opts]
        for option in ("--json", "-v", "-q", "--log-level"):
            assert names.count(option) == 1, (name, option)


@dataclass(frozen=True)
class Word:
    word: Annotated[str, About(help="Anything.")] = ""


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    """A program that prints the levels it runs with."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for logger in (logging.getLogger(), logging.getLogger("llmrec")):
        monkeypatch.setattr(logger, "level", logger.level)

    def level(options: Word) -> None:
        names = [logging.getLevelName(logging.getLogger(name).level) for name in ("llmrec", "")]
        typer.echo(" ".join([*names, "quiet" if QUIET in os.environ else "bars"]))

    return app_of({"level": level, "other": level})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("level", "WARNING WARNING bars"),
        ("level -v", "INFO WARNING bars"),
        ("-v level", "INFO WARNING bars"),
        ("level -q --word x", "ERROR ERROR quiet"),
        ("-q level --word x", "ERROR ERROR quiet"),
        ("level --log-level debug", "DEBUG WARNING bars"),
        ("--log-level info level -q", "INFO ERROR quiet"),
    ],
)
def test_they_count_before_and_after_the_command(levels: typer.Typer, line: str, said: str) -> None:
    done = CliRunner().invoke(levels, line.split())
    assert done.output == f"{said}\n"


def test_nothing_is_shown_where_the_environment_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(QUIET, raising=False)
    assert Bar("work", 2)._ticks and not Bar("work", 2, quiet=True)._ticks
    monkeypatch.setenv(QUIET, "1")
    assert not Bar("work", 2)._ticks


# --------------------------------------------------------------------------- JSON


def test_check_and_data(tmp_path: Path, llama_folder: Path) -> None:
    page = write(tmp_path, HEADER + "\n".join(rows()) + "\n", model=str(llama_folder))
    found = told("check", page)
    assert found["command"] == "check" and found["kind"] == "recipe"
    assert found["cases"] == {"rating": 4, "sequential": 4}
    found = told("data", page)
    assert [table["users"] for table in found["data"]] == [8]
    assert found["candidates"]["count"] == 3


def test_a_run_and_its_audit(tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = write(tmp_path, HEADER + "\n".join(rows()), model=str(llama_folder))
    monkeypatch.setattr(console, "facts", {})
    done = pipeline.run(load_recipe(page), tmp_path / "r", quiet=True)
    console.finish(done)
    audit(AuditOptions(folder=done.folder))
    found = json.loads(console.as_json(console.facts))
    assert found["results"] == str(tmp_path / "r" / "results.json") and Path(found["report"]).is_file()
    stored = json.loads(Path(found["results"]).read_text(encoding="utf-8"))
    assert [row["metrics"] for row in found["rows"]] == [row["metrics"] for row in stored["rows"]]
    assert found["comparisons"] == stored["comparisons"]
    assert found["budget"]["total"] == stored["seconds"]
    assert {check["verdict"] for check in found["checks"]} <= {"clean", "notice"}


def test_what_is_wrong_with_a_table_keeps_its_facts(tmp_path: Path) -> None:
    table = [*rows()[:4], "u0,i3,nan,7,Title 3", *rows()[4:]]
    found = told("check", write(tmp_path, HEADER + "\n".join(table)), code=2)["error"]
    assert (found["kind"], found["row"], found["column"]) == ("bad-value", 5, "stars")
    assert found["file"].endswith("shop.csv")
    assert "stars" in found["message"]


@pytest.mark.parametrize("line", [("check", "--nonsense"), ("check",), ("nonsense",)])
def test_a_line_that_cannot_be_read(line: tuple[str, ...]) -> None:
    found = told(*line, code=2)
    assert list(found) == ["error"]
    assert list(found["error"]) == ["kind", "message", "file", "row", "line", "column"]
    assert found["error"]["kind"] == "usage"


PROGRAM = """
import os, subprocess, sys
from dataclasses import dataclass
from typing import Annotated
from llmrec.answer.options import About
from llmrec.cli.console import say, store_facts
from llmrec.cli.main import app_of, main
@dataclass
class Options:
    fault: Annotated[str, About(help="")] = ""
def one(options: Options) -> None:
    fault = options.fault
    print("a library's line")
    os.write(1, b"a line of C\\n")
    subprocess.run(["echo", "a child's line"], check=True)
    say("words")
    store_facts(figure=1.5)
    if fault == "full":
        raise OSError(28, "No space left on device", "results.json")
    if fault:
        raise ValueError(fault)
main(app_of({"one": one}))
"""


def ended(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *args], capture_output=True, text=True, timeout=60, check=False
    )


def test_nothing_else_is_on_the_standard_output() -> None:
    done = ended("--json")
    assert json.loads(done.stdout)["figure"] == 1.5
    assert done.stderr == "words\n", "libraries print into a log"
    plain = ended()
    assert plain.stdout == "words\n" and plain.stderr == ""


def test_a_full_disk_and_a_defect_are_errors_too() -> None:
    done = ended("--json", "--fault", "full")
    found = json.loads(done.stdout)["error"]
    assert (done.returncode, found["kind"], found["file"]) == (2, "exhausted", "results.json")
    done = ended("--json", "--fault", "broken")
    found = json.loads(done.stdout)["error"]
    assert (done.returncode, found["kind"], found["message"]) == (1, "defect", "ValueError: broken")
    assert "Traceback" in done.stderr


def test_facts_become_plain_json() -> None:
    value = {
        "cost": Cost(prompt_tokens=3),
        "path": Path("a/b"),
        "nan": float("nan"),
        "pair": (1, True, None),
        5: "five",
    }
    found = json.loads(console.as_json(value))
    assert found["cost"]["prompt_tokens"] == 3
    assert (found["path"], found["nan"], found["pair"], found["5"]) == ("a/b", None, [1, True, None], "five")
