"""A command's options are the fields of its dataclass: names, defaults and bounds."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
from typer.testing import CliRunner

from llmrec import registry
from llmrec.answer.options import ModelOptions
from llmrec.answer.predict.options import PredictOptions
from llmrec.answer.rank.options import RankOptions
from llmrec.chat.options import ChatOptions
from llmrec.cli import main
from llmrec.cli.main import build_app
from llmrec.entries import Command
from llmrec.serve.options import ServeOptions

NEEDED = ["--model", "m", "--in", "a.jsonl", "--out", "b.csv"]
FILES = {"model": "m", "requests": Path("a.jsonl"), "out": Path("b.csv")}


def handed(*arguments: str) -> RankOptions | str:
    """Return the options that a command receives, or the output of the command line if it receives none."""
    result: list[RankOptions] = []

    def rank(options: RankOptions) -> None:
        result.append(options)

    done = CliRunner().invoke(build_app({"rank": rank}), arguments)
    return result[0] if result else done.output


def test_default_options() -> None:
    assert handed(*NEEDED) == RankOptions(**FILES)


def test_every_option_reaches_its_field() -> None:
    arguments = [
        "--items",
        "i.csv",
        "--task",
        "direct",
        "--template",
        "t",
        "--candidates",
        "all",
        "--strategy",
        "search",
    ]
    arguments += ["--beams", "3", "--exact", "--set", "depth=2", "--set", "window=3", "--retrieve", "knn", "--k", "4"]
    arguments += ["--fuse", "model", "--baseline", "markov", "--recipe", "r.yaml", "--form", "long"]
    arguments += ["--rationale", "5", "--backend", "openai", "--server-url", "u", "--server-url", "v"]
    arguments += ["--server-model", "s"]
    arguments += ["--server-key-env", "K", "--top", "6", "--batch", "7", "--noun", "films", "--max-length", "80"]
    arguments += ["--dtype", "float32", "--limit", "8", "--shard", "1/2", "--restart", "--all-users", "--to", "x.db"]
    arguments += ["--by", "fusion"]
    arguments += ["--gpu-memory", "0.5", "--tensor-parallel", "2", "--enforce-eager"]
    arguments += ["--ray", "local", "--actors", "2", "--cpus", "0.5", "--gpus", "3", "--shards", "9"]
    expected = RankOptions(
        **FILES, items=Path("i.csv"), task="direct", template="t", candidates="all", strategy="search", beams=3,
        exact=True, settings=("depth=2", "window=3"), retrieve="knn", k=4, fuse="model", rationale=5, backend="openai",
        server_url=("u", "v"), server_model="s", server_key_env="K", top=6, batch=7, noun="films", max_length=80,
        dtype="float32", limit=8, shard="1/2", restart=True, all_users=True, to="x.db", by="fusion", baseline="markov",
        recipe="r.yaml", form="long", ray="local", actors=2, cpus=0.5, gpus=3.0, shards=9,
        gpu_memory=0.5, tensor_parallel=2, enforce_eager=True,
    )  # fmt: skip
    assert handed(*NEEDED, *arguments) == expected
    default = RankOptions(**FILES)
    same = [name for name in vars(expected) if getattr(expected, name) == getattr(default, name)]
    assert sorted(same) == ["model", "out", "requests"]


@pytest.mark.parametrize("record", [RankOptions, PredictOptions, ServeOptions, ChatOptions])
def test_model_options_are_the_same_in_all_commands(record: type[ModelOptions]) -> None:
    expected, result = (get_type_hints(kind, include_extras=True) for kind in (ModelOptions, record))
    # The commands for a service and a conversation take the model as a positional argument.
    assert {name: result[name] for name in expected if name != "model"} == {
        name: hint for name, hint in expected.items() if name != "model"
    }
    defaults = [{field.name: field.default for field in fields(kind)} for kind in (ModelOptions, record)]
    assert {name: defaults[1][name] for name in expected if name != "model"} == {
        name: value for name, value in defaults[0].items() if name != "model"
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*NEEDED, "--batch", "0"], "Invalid value for '--batch'"),
        ([*NEEDED, "--max-length", "15"], "Invalid value for '--max-length'"),
        ([*NEEDED, "--no-exact"], "No such option"),
    ],
)
def test_rejects_invalid_values(arguments: list[str], message: str) -> None:
    result = handed(*arguments)
    assert isinstance(result, str) and message in result


COMMAND = '''
from dataclasses import dataclass
from typing import Annotated

from llmrec.answer.options import OptionHelp
from llmrec.cli.console import say, store_facts


@dataclass(frozen=True, kw_only=True)
class GreetOptions:
    """A name."""

    name: Annotated[str, OptionHelp(argument=True, metavar="NAME", help="Whose.")]
    loud: Annotated[bool, OptionHelp(help="In capitals.")] = False


def greet(options: GreetOptions) -> None:
    """Greet a user."""
    text = f"hello {options.name}"
    store_facts(greeting=text)
    say(text.upper() if options.loud else text)
'''


def test_new_command_is_a_module_and_a_registry_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "greeting_command.py").write_text(COMMAND, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    added = {**registry.COMMANDS, "greet": Command("greeting_command:greet", "Data", "Greet a user.")}
    for module in (registry, main):
        monkeypatch.setattr(module, "COMMANDS", added)
    listed = CliRunner().invoke(main.app, ["--help"]).output
    assert "greet         Greet a user.\n" in listed
    assert CliRunner().invoke(main.app, ["greet", "Ada", "--loud"]).output == "HELLO ADA\n"
