"""Options that every command has, before or after the command, and JSON output."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from llmrec.answer.options import OptionHelp
from llmrec.cli import console
from llmrec.cli import main as cli
from llmrec.cli.audit import AuditOptions, audit
from llmrec.cli.main import build_app
from llmrec.pipeline import run as pipeline
from llmrec.progress import QUIET, Progress
from llmrec.recipe.load import load_recipe
from llmrec.types import Cost
from tests.test_cli import HEADER, rows, write


def output(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str, code: int = 0
) -> dict[str, Any]:
    """Run a command with --json, which redirects the file descriptor of stdout; return its JSON output."""
    monkeypatch.setattr(sys, "argv", ["llmrec", *args, "--json"])
    console.facts.clear()
    capfd.readouterr()
    stdout = os.dup(1)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
    printed = capfd.readouterr()
    assert (ended.value.code or 0) == code, printed.err
    # Messages precede the JSON, because the sys.stdout of pytest does not use the file descriptor.
    result: dict[str, Any] = json.loads(printed.out[printed.out.index("{\n") :])
    return result


def commands(group: Any, context: Any, *path: str) -> Iterator[tuple[str, Any]]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if hasattr(command, "list_commands"):
            yield from commands(command, context, *path, name)
        else:
            yield " ".join((*path, name)), command


def test_every_command_has_the_common_options_once() -> None:
    root = get_command(cli.app)
    context = typer.Context(root)  # type: ignore[arg-type]
    result = dict(commands(root, context))
    assert {"run", "check", "rank", "features show"} <= set(result)
    for name, command in result.items():
        names = [option for param in command.get_params(context) for option in param.opts]
        for option in ("--json", "-v", "-q", "--log-level"):
            assert names.count(option) == 1, (name, option)


@dataclass(frozen=True)
class Word:
    word: Annotated[str, OptionHelp(help="Anything.")] = ""


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    """A program that prints its logging levels."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for logger in (logging.getLogger(), logging.getLogger("llmrec")):
        monkeypatch.setattr(logger, "level", logger.level)

    def level(options: Word) -> None:
        names = [logging.getLevelName(logging.getLogger(name).level) for name in ("llmrec", "")]
        typer.echo(" ".join([*names, "quiet" if QUIET in os.environ else "bars"]))

    return build_app({"level": level, "other": level})


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("level", "WARNING WARNING bars"),
        ("level -v", "INFO WARNING bars"),
        ("-v level", "INFO WARNING bars"),
        ("-q level --word x", "ERROR ERROR quiet"),
        ("level --log-level debug", "DEBUG WARNING bars"),
        ("--log-level info level -q", "INFO ERROR quiet"),
    ],
)
def test_common_options_before_and_after_the_command(levels: typer.Typer, line: str, expected: str) -> None:
    done = CliRunner().invoke(levels, line.split())
    assert done.output == f"{expected}\n"


def test_environment_variable_hides_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(QUIET, raising=False)
    assert Progress("work", 2)._ticks and not Progress("work", 2, quiet=True)._ticks
    monkeypatch.setenv(QUIET, "1")
    assert not Progress("work", 2)._ticks


def test_json_of_check_and_data(
    tmp_path: Path, llama_folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = write(tmp_path, HEADER + "\n".join(rows()) + "\n", model=str(llama_folder))
    result = output(capfd, monkeypatch, "check", page)
    assert result["command"] == "check" and result["kind"] == "recipe"
    assert result["cases"] == {"rating": 4, "sequential": 4}
    result = output(capfd, monkeypatch, "data", page)
    (table,) = result["data"]
    assert table["users"] == 8 and len(table["fingerprint"]) == 64 and table["made"] is False
    assert result["candidates"]["count"] == 3


def test_json_of_a_run_and_its_audit(tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = write(tmp_path, HEADER + "\n".join(rows()), model=str(llama_folder))
    monkeypatch.setattr(console, "facts", {})
    done = pipeline.run(load_recipe(page), tmp_path / "r", quiet=True)
    console.show_run_results(done)
    audit(AuditOptions(folder=done.folder))
    result = json.loads(console.format_json(console.facts))
    assert result["results"] == str(tmp_path / "r" / "results.json") and Path(result["report"]).is_file()
    stored = json.loads(Path(result["results"]).read_text(encoding="utf-8"))
    assert [row["metrics"] for row in result["rows"]] == [row["metrics"] for row in stored["rows"]]
    assert result["comparisons"] == stored["comparisons"]
    assert result["budget"]["total"] == stored["seconds"]
    assert {check["verdict"] for check in result["checks"]} <= {"clean", "notice"}


def test_json_of_an_error_in_a_table(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = [*rows()[:4], "u0,i3,nan,7,Title 3", *rows()[4:]]
    page = write(tmp_path, HEADER + "\n".join(table))
    result = output(capfd, monkeypatch, "check", page, code=2)["error"]
    assert (result["kind"], result["row"], result["column"]) == ("bad-value", 5, "stars")
    assert result["file"].endswith("shop.csv")
    assert "stars" in result["message"]


@pytest.mark.parametrize("line", [("check", "--nonsense"), ("nonsense",)])
def test_json_of_a_usage_error(
    line: tuple[str, ...], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = output(capfd, monkeypatch, *line, code=2)
    assert list(result) == ["error"]
    assert list(result["error"]) == ["kind", "message", "file", "row", "line", "column"]
    assert result["error"]["kind"] == "usage"


def test_values_become_plain_json() -> None:
    value = {
        "cost": Cost(prompt_tokens=3),
        "path": Path("a/b"),
        "nan": float("nan"),
        "pair": (1, True, None),
        5: "five",
    }
    result = json.loads(console.format_json(value))
    assert result["cost"]["prompt_tokens"] == 3
    assert (result["path"], result["nan"], result["pair"], result["5"]) == ("a/b", None, [1, True, None], "five")
