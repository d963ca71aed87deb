"""Plug-ins: components and templates outside of llmrec, named in a recipe, loaded in another process, or refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmrec import plugins, registry
from llmrec.answer.rank.options import RankOptions
from llmrec.answer.rank.run import rank_file
from llmrec.baselines.parameters import input_hashes
from llmrec.cli.doctor import check_plugins
from llmrec.errors import LlmrecError, RecipeError
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.audit import audit
from llmrec.pipeline.study import build_study
from llmrec.recipe.load import dump_recipe, load_recipe, load_stored_recipe, load_suite
from llmrec.recipe.schema import TasksSection
from tests.facts import Facts, raises

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "llmrec-example"

OWN = """\
from dataclasses import replace
from pathlib import Path

from llmrec.backends.fake import FakeBackend
from llmrec.baselines.popular import RecentPopularity
from llmrec.data.sets.table import load_made_reviews
from llmrec.index.numbers import RandomNumbers
from llmrec.strategies.raters import YesNoJudge
from llmrec.strategies.pointwise import LikelihoodRanker
from llmrec.types import Probability
from tests.pipeline.test_new_family import FameSection, FameTask, Half
from llmrec.tasks.family import Family


class Recent(RecentPopularity):
    name = "recent"
    families = ("sequential", "direct")


class Ranker(LikelihoodRanker):
    families, keys = ("sequential",), ("beams",)

    def __init__(self, asker, *, beams):
        super().__init__(asker)
        self.beams = beams


class Judge(YesNoJudge):
    pass


class Engine(FakeBackend):
    def __init__(self, folder, encoder, *, model, section, seed):
        assert Path(folder).is_dir()
        super().__init__()


class Numbers:
    @staticmethod
    def build(section, data, *, seed, embed=None):
        return RandomNumbers.build(section.model_copy(update={"scheme": "random"}), data, seed=seed, embed=embed)

    extend = staticmethod(RandomNumbers.extend)


def source(section, *, seed):
    return load_made_reviews(section, seed=seed)


def table(section, *, seed):
    return []


def bare(asker):
    return object()


FAME = Family(
    name="fame", title="What many choose", task=FameTask, section=FameSection, answer=Probability, headline="AUC",
    strategies=("yes-no",), baselines=("like-ratio",), controls=("like-ratio",), prompts=Path(__file__).parent / "fame",
)
RATING = replace(FAME, name="rating")
"""
TEMPLATE = """\
family: FAMILY
name: NAME
version: 1
use: seen
shape: SHAPE
user: What does one choose
target: "{{ item.title }}"
"""
RECIPE = """\
name: own
plugins: .
data: {source: made-reviews, noun: products, split: {kind: last_share, valid: 0.2, test: 0.4}}
tasks:
  sequential:
    baselines: [random, popularity, item-knn, markov-1]
eval: {arms: [zero-shot], backend: fake, users: 6, bootstrap: 50, candidates: {count: 5}}
"""


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A user without plug-ins; modules that a test imports are removed after it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv(plugins.PLUGINS_VARIABLE, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(registry, "_PLUGIN_TASK_NAMES", {})
    new_process(monkeypatch)
    known = set(sys.modules)
    yield
    for name in ("own", "broken", "payload", *(name for name in sys.modules if name.startswith("llmrec_example"))):
        if name not in known:
            sys.modules.pop(name, None)
    for cached in (
        plugins._all_entry_points,
        plugins.installed_plugins,
        plugins._load_plugin,
        plugins._package_code_hash,
    ):
        cached.cache_clear()


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clear the plug-in state of this process, except for imported modules."""
    monkeypatch.setattr(plugins, "_ALLOWED_ORIGINS", set())
    for cached in (
        plugins._all_entry_points,
        plugins.installed_plugins,
        plugins._load_plugin,
        plugins._package_code_hash,
    ):
        cached.cache_clear()


def install(site: Path, name: str, **groups: str) -> None:
    """Write a package's metadata into a folder, as an installer does."""
    info = site / f"{name}-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    text = "".join(f"[llmrec.{group}]\n{lines}\n" for group, lines in groups.items())
    (info / "entry_points.txt").write_text(text)


def page(folder: Path, text: str = RECIPE, own: str = OWN) -> Path:
    (folder / "own.py").write_text(own)
    (folder / "fame").mkdir(exist_ok=True)
    ask = TEMPLATE.replace("FAMILY", "fame").replace("NAME", "ask").replace("SHAPE", "chat")
    (folder / "fame" / "ask.yaml").write_text(ask.replace("item.title", "answer"))
    file = folder / "page.yaml"
    file.write_text(text)
    return file


# --------------------------------------------------------------------------- an installed package


def test_documented_example_runs_and_another_process_reads_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llama_folder: Path
) -> None:
    pytest.importorskip("trl", reason="the train extra is not installed")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    groups = {
        group.removeprefix("llmrec."): "\n".join(f"{name} = {value}" for name, value in points.items())
        for group, points in project["entry-points"].items()
    }
    install(tmp_path / "site", project["name"], **groups)
    for folder in (EXAMPLE, tmp_path / "site"):
        monkeypatch.syspath_prepend(folder)
    new_process(monkeypatch)
    small = {
        "model": {"name": str(llama_folder), "dtype": "float32"},
        "eval.backend": "fake", "eval.users": 6, "eval.bootstrap": 50,
    }  # fmt: skip
    pipeline.run(EXAMPLE / "recipe.yaml", tmp_path / "made", overrides=small, quiet=True)
    rows = {row["id"]: row for row in json.loads((tmp_path / "made/results.json").read_text())["rows"]}
    assert {"sequential/baseline/title-words(latest=2)", "sequential/zero-shot/likelihood-a-token/receipt"} <= set(rows)
    assert rows["sequential/baseline/title-words(latest=2)"]["reads"] == "texts"

    for name in ("audit.json", "report/index.html"):
        (tmp_path / "made" / name).unlink()
    path = os.pathsep.join(map(str, (ROOT, tmp_path / "site", EXAMPLE)))
    code = (
        "from llmrec.cli.main import app; [app([verb, 'made'], standalone_mode=False) for verb in ('audit', 'report')]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "made/audit.json").read_text())["leaks"] == 0
    assert "likelihood-a-token" in (tmp_path / "made/report/index.html").read_text()
    # Nothing was named by module, so nothing is remembered.
    assert not (tmp_path / "config").exists()


@pytest.mark.parametrize(
    ("group", "names", "says"),
    [
        ("baselines", ["popularity"], "shop 0.1"),
        ("tasks", ["rating"], "rename it"),
        ("sources", ["mine", "mine"], "uninstall one of them"),
    ],
)
def test_installed_name_cannot_shadow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, group: str, names: list[str], says: str
) -> None:
    for number, name in enumerate(names):
        install(tmp_path / "site", ("shop", "other")[number], **{group: f"{name} = own{number}:Thing"})
    monkeypatch.syspath_prepend(tmp_path / "site")
    new_process(monkeypatch)
    with raises(RecipeError, Facts("duplicate", f"llmrec.{group}", column=names[0], says=says)):
        load_recipe(page(tmp_path))
    (result,) = [each for each in check_plugins() if each.name == f"plug-in {names[0]}"]
    assert result.level == "fault" and says in result.fix + result.found


def test_doctor_lists_plug_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert [each.found for each in check_plugins()] == ["none installed"]
    install(tmp_path / "site", "shop", baselines="mine = nowhere:Mine")
    monkeypatch.syspath_prepend(tmp_path / "site")
    new_process(monkeypatch)
    (result,) = check_plugins()
    assert (result.name, result.level) == ("plug-in mine", "ok") and "shop 0.1 (nowhere:Mine)" in result.found
    with raises(RecipeError, Facts("not-installed", "page.yaml", column="tasks.sequential.baselines", says="nowhere")):
        load_recipe(page(tmp_path), ["tasks.sequential.baselines=[random, popularity, item-knn, markov-1, mine]"])


# --------------------------------------------------------------------------- module:attribute


def test_components_by_their_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llama_folder: Path) -> None:
    """One recipe names a plug-in of each kind; a new process audits and reports its run."""
    pytest.importorskip("trl", reason="the train extra is not installed")
    file = page(tmp_path)
    changed = {
        "model": {"name": str(llama_folder), "dtype": "float32"},
        "data.source": "own:source",
        "index": {"scheme": "own:Numbers"},
        "tasks": {
            "sequential": {
                "templates": ["continue-list"],
                "strategies": ["own:Ranker"],
                "baselines": [
                    "random", "popularity", "item-knn", "markov-1", {"name": "own:Recent", "half_life": 0.5},
                ],
            },
            "own:FAME": {"users": 6, "strategies": ["own:Judge"]},
        },
        "eval.backend": "own:Engine",
    }  # fmt: skip
    recipe = load_recipe(file, changed)
    assert list(recipe.tasks.present()) == ["sequential", "fame"]
    run = pipeline.run(recipe, tmp_path / "run", quiet=True)
    rows = {row["id"]: row for row in run.results["rows"]}
    assert {
        "sequential/baseline/own:Recent(half_life=0.5)",
        "sequential/zero-shot/own:Ranker/continue-list",
        "fame/zero-shot/own:Judge/ask",
    } <= set(rows)
    assert rows["fame/zero-shot/own:Judge/ask"]["engine"] == "fake"
    assert json.loads((run.folder / "index" / "index.json").read_text())["scheme"] == "own:Numbers"

    monkeypatch.setattr(registry, "_PLUGIN_TASK_NAMES", {})
    new_process(monkeypatch)
    assert "What many choose" in pipeline.report(run.folder).read_text()
    assert not [check for check in audit(run.folder) if check.verdict == "leak"]

    # A module that the user has not named is not imported, and the report works without it.
    monkeypatch.setattr(registry, "_PLUGIN_TASK_NAMES", {})
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "other"))
    new_process(monkeypatch)
    with raises(RecipeError, Facts("unsafe", "recipe.yaml", says=f"{plugins.PLUGINS_VARIABLE}=own")):
        audit(run.folder)
    assert "fame" in pipeline.report(run.folder).read_text()
    monkeypatch.setenv(plugins.PLUGINS_VARIABLE, "other, own")
    assert load_stored_recipe(run.folder) == recipe


def test_imports_only_modules_that_the_user_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = "tasks.sequential.baselines=[random, popularity, item-knn, markov-1, own:Recent]"
    recipe = load_recipe(page(tmp_path, own=OWN + f"\nPath({str(tmp_path / 'ran')!r}).touch()\n"), [names])
    (tmp_path / "ran").unlink()
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "recipe.yaml").write_text(dump_recipe(recipe).replace(str(tmp_path), str(strange)))
    page(strange, own=f"open({str(tmp_path / 'ran')!r}, 'w')")
    sys.modules.pop("own")
    sys.path.remove(str(tmp_path))
    new_process(monkeypatch)
    facts = Facts("unsafe", "recipe.yaml", column="tasks.sequential.baselines", says=str(strange / "own.py"))
    with raises(RecipeError, facts):
        load_stored_recipe(strange)
    with raises(RecipeError, Facts("unsafe", "own:FAME", says="LLMREC_PLUGINS=own")):
        monkeypatch.syspath_prepend(strange)
        TasksSection(**{"own:FAME": {}})  # type: ignore[arg-type]
    assert not (tmp_path / "ran").exists() and "own" not in sys.modules


def strange_run(folder: Path, recipe: str, code: str) -> Path:
    """A foreign run folder: its recipe, and a module that writes a file if it is imported."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "payload.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n{code}")
    return folder


def test_code_of_a_run_folder_is_not_run(tmp_path: Path) -> None:
    code = "def shop(section, *, seed):\n    raise SystemExit\n"
    run = strange_run(tmp_path / "strange", RECIPE.replace("made-reviews", "'payload:shop'"), code)
    (tmp_path / "q.jsonl").write_text('{"id": "1", "history": ["p1"]}\n')
    for baseline in ("markov", "popularity", "fusion"):
        options = RankOptions(
            baseline=baseline, recipe=str(run), requests=tmp_path / "q.jsonl", out=tmp_path / "lists.jsonl"
        )
        with raises(LlmrecError, Facts("unsafe", says="payload:shop")):
            rank_file(options)
    assert not (run / "ran").exists() and "payload" not in sys.modules
    assert not plugins.read_stored_consents()


def test_run_folder_is_not_on_the_python_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Otherwise a file in it could replace a package that is not installed, such as vllm."""
    run = strange_run(tmp_path / "strange", RECIPE, "")
    load_stored_recipe(run)
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(plugins.PLUGINS_VARIABLE, "own")
    (run / "recipe.yaml").write_text(RECIPE.replace("markov-1]", "own:Recent]"))
    load_stored_recipe(run)
    assert str(run) not in sys.path


def test_run_folder_does_not_allow_code_of_its_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = RECIPE.replace("plugins: .\n", "") + "model: {name: somebody/model, trust_remote_code: true}\n"
    run = strange_run(tmp_path / "strange", text, "")
    with raises(RecipeError, Facts("unsafe", column="model.trust_remote_code", says="LLMREC_PLUGINS=somebody/model")):
        load_stored_recipe(run)
    (tmp_path / "page.yaml").write_text(text)
    load_recipe(tmp_path / "page.yaml")
    new_process(monkeypatch)
    assert load_stored_recipe(run).model.trust_remote_code
    (run / "recipe.yaml").write_text(text.replace("true}", "true, revision: other}"))
    with raises(RecipeError, Facts("unsafe", column="model.trust_remote_code")):
        load_stored_recipe(run)
    monkeypatch.setenv(plugins.PLUGINS_VARIABLE, "somebody/model")
    assert load_stored_recipe(run).model.revision == "other"


@pytest.mark.parametrize("source", ["os:system", "builtins:dict", "own:bare"])
def test_invalid_source_is_no_consent(tmp_path: Path, source: str) -> None:
    file = page(tmp_path)
    with raises(RecipeError, Facts("defect", "page.yaml", column="data.source", says="(section, *, seed)")):
        load_recipe(file, [f"data.source={source}"])
    with raises(RecipeError, Facts("unknown-key")):
        load_recipe(file, ["data.source=own:source", "evil=1"])
    assert not plugins.read_stored_consents() and not plugins._ALLOWED_ORIGINS
    load_recipe(file, ["data.source=own:source"])
    assert plugins.read_stored_consents() == {str(tmp_path / "own.py")}


def test_errors_of_sources_and_templates(tmp_path: Path) -> None:
    code = "def source(section, *, seed):\n    return 1 / 0\n"
    recipe = load_recipe(page(tmp_path, own=code), ["data.source=own:source"])
    with raises(LlmrecError, Facts("failed", "own:source", column="data.source", says=f"line 2 of {tmp_path}")):
        build_study(recipe)
    with raises(RecipeError, Facts("unknown-name", says="key prompts")):
        build_study(load_recipe(page(tmp_path), ["tasks.sequential.templates=[mine]"]))


FAULTS = [
    ("tasks.sequential.baselines", "[random, nowhere.at:Mine]", "not-installed", "there is no module 'nowhere'"),
    ("tasks.sequential.baselines", "[random, own:Recnt]", "unknown-name", "did you mean 'Recent'"),
    ("tasks.sequential.baselines", "[random, broken:Mine]", "failed", "ZeroDivisionError: division by zero, at line 3"),
    ("tasks.sequential.baselines", "[{name: own:Judge}]", "defect", "lacks Config, fit"),
    ("tasks.sequential.strategies", "[own:Numbers]", "defect", "lacks answer"),
    ("index.scheme", "own:Judge", "defect", "lacks build, extend"),
    ("eval.backend", "own:Judge", "defect", "lacks capabilities, close"),
    ("data.source", "own:RATING", "defect", "cannot be called"),
    ("tasks.own:Recent", "{}", "defect", "lacks title, task, section"),
    ("tasks.own:RATING", "{}", "duplicate", "have the same name, 'rating'"),
]


@pytest.mark.parametrize(("key", "value", "kind", "says"), FAULTS)
def test_error_has_key_and_fix(tmp_path: Path, key: str, value: str, kind: str, says: str) -> None:
    (tmp_path / "broken.py").write_text("from pathlib import Path\n\nMine = 1 / 0\n")
    with raises(RecipeError, Facts(kind, "page.yaml", column=key, says=says)):  # type: ignore[arg-type]
        load_recipe(page(tmp_path), [f"{key}={value}"])


def test_results_of_plug_ins_are_checked(tmp_path: Path, encoder: object) -> None:
    from llmrec.strategies.asking import Prompting, create_strategy

    with raises(LlmrecError, Facts("defect", "own:table", column="data.source")):
        build_study(load_recipe(page(tmp_path), ["data.source=own:table"]))
    rated = "tasks={rating: {baselines: [global-mean, user-mean, item-mean, user-item-bias, own:Recent]}}"
    with raises(RecipeError, Facts("unknown-name", column="tasks.rating.baselines", says="does not support this task")):
        build_study(load_recipe(page(tmp_path), [rated]))
    with raises(RecipeError, Facts("bad-value", column="tasks.sequential.baselines", says="half_life of 'own:Recent'")):
        value = "[random, popularity, item-knn, markov-1, {name: own:Recent, half_life: -7}]"
        build_study(load_recipe(page(tmp_path), [f"tasks.sequential.baselines={value}"]))
    load_recipe(page(tmp_path), ["tasks.sequential.strategies=[own:bare, own:Ranker]"])
    asker = Prompting(backend=None, task=None, template="")  # type: ignore[arg-type]
    with raises(RecipeError, Facts("defect", "own:bare", says="lacks asker, engine, answer")):
        create_strategy("own:bare", asker)
    with raises(RecipeError, Facts("defect", "own:Ranker", says="attribute keys")):
        create_strategy("own:Ranker", asker, depth=3)
    assert registry.strategy_eval_keys("own:Ranker") == ("beams",)


def test_plug_ins_of_a_suite(tmp_path: Path) -> None:
    text = "suite: s\nplugins: .\ndata: {source: own:source}\nrows: [{baseline: own:Recent}]\n"
    suite = load_suite(page(tmp_path, text))
    assert suite.rows[0].label == "own:Recent" and suite.plugins == str(tmp_path)
    with raises(RecipeError, Facts("unknown-name", "page.yaml", line=4, column="rows")):
        load_suite(page(tmp_path, text.replace("own:Recent", "own:Nobody")))


def test_parameters_of_a_plug_in_may_have_any_meaning(tmp_path: Path) -> None:
    """Some have the names of built-in parameters for weights and files."""
    text = """
from llmrec.baselines.popular import Popularity
from llmrec.recipe.schema import Section

class Mine(Popularity):
    class Config(Section):
        align: str = "left"
        start: float = 0.5
        lexicon: tuple[str, ...] = ("a",)
        model: str = "linear"
"""
    (tmp_path / "mine.py").write_text(text)
    load_recipe(page(tmp_path), ["tasks.sequential.baselines=[random, popularity, item-knn, markov-1, mine:Mine]"])
    assert input_hashes("mine:Mine", {"start": 1.5}) == {}


def test_changed_code_changes_the_stamp(tmp_path: Path) -> None:
    load_recipe(page(tmp_path), ["data.source=own:source"])
    named = [(registry.SOURCES, "own:source"), (registry.BASELINES, "popularity")]
    before = registry.plugin_digests(named)
    (tmp_path / "own.py").write_text(OWN + "# changed\n")
    plugins._package_code_hash.cache_clear()
    assert list(before["plugins"]) == ["own:source"] and registry.plugin_digests(named) != before
    assert registry.plugin_digests(named[1:]) == {}


# --------------------------------------------------------------------------- prompts


def test_templates_by_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Templates are next to the recipe or in the working folder; stored paths are absolute."""
    text = TEMPLATE.replace("SHAPE", "list") + 'tail: "\\n"\n'
    for folder, name, family in (("words", "mine", "sequential"), ("words/sequential", "third", "sequential")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.yaml").write_text(text.replace("FAMILY", family).replace("NAME", name))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "fourth.yaml").write_text(text.replace("FAMILY", "sequential").replace("NAME", "fourth"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    words = [
        "prompts=words",
        "tasks.sequential.templates=[words/mine.yaml, third, continue-list]",
        "tasks.sequential.eval_templates=[fourth.yaml]",
    ]
    recipe = load_recipe(page(tmp_path), words)
    assert recipe.prompts == tuple(
        str(tmp_path / name) for name in ("words", "words/mine.yaml", "elsewhere/fourth.yaml")
    )
    assert recipe.tasks.sequential is not None
    assert recipe.tasks.sequential.templates == ("mine", "third", "continue-list")
    study = build_study(recipe)
    assert [template.name for template in study.eval_templates("sequential")] == ["fourth"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_stored_recipe(tmp_path) == recipe


@pytest.mark.parametrize("key", ["prompts", "plugins", "tasks.sequential.eval_templates"])
def test_missing_path(tmp_path: Path, key: str) -> None:
    value = "[gone.yaml]" if "." in key else "gone.yaml"
    with raises(RecipeError, Facts("missing-file", "gone.yaml", column=key)):
        load_recipe(page(tmp_path), [f"{key}={value}"])
