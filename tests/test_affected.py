"""Which tests a change affects: `make test CHANGED=1`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import affected

FILES = {
    "llmrec/__init__.py": 'HOMES = {"run": "llmrec.pipeline"}\n',
    "llmrec/pipeline.py": "def run():\n    from llmrec import registry\n",
    "llmrec/registry.py": 'TABLE = {"markov": "llmrec.baselines.markov:A", "ease": "llmrec.baselines.ease:B"}\n',
    "llmrec/extending.py": 'FOUND = root.glob("*/entries.py")\n',
    "llmrec/chat/__init__.py": "",
    "llmrec/chat/entries.py": 'COMMANDS = {"chat": Command("llmrec.chat.command:chat", "Talk.")}\n',
    "llmrec/chat/command.py": "",
    "llmrec/baselines/__init__.py": "",
    "llmrec/baselines/markov.py": "from llmrec.baselines.base import Baseline\n",
    "llmrec/baselines/base.py": "class Baseline: ...\n",
    "llmrec/baselines/ease.py": "from llmrec.baselines.base import Baseline\n",
    "llmrec/words.py": 'FOLDER = "prompts"\nSEE = "docs/guide.md"\n',
    "llmrec/sheets.py": "",
    "llmrec/__main__.py": "from llmrec import sheets\n",
    "prompts/rating/rate.yaml": "",
    "docs/guide.md": "",
    "pyproject.toml": "",
    "tests/conftest.py": (
        "import pytest\n@pytest.fixture\ndef model():\n    from llmrec.baselines import base\n"
        "@pytest.fixture(autouse=True)\ndef quiet():\n    import llmrec.words\n"
    ),
    "tests/helper.py": "import llmrec.baselines.ease\n",
    "tests/test_python.py": 'import llmrec\nllmrec.run("baselines: [markov]")\n',
    "tests/test_ease.py": '"""Not markov."""\nfrom tests.helper import x\n',
    "tests/test_fixture.py": "def test_a(model): ...\n",
    "tests/test_process.py": 'run([python, "-m", "llmrec"])\n',
    "llmrec/cli/main.py": "import llmrec.extending\n",
    "tests/test_chat.py": "import llmrec.cli.main\ncall('chat')\n",
    "tests/test_no_command.py": "import llmrec.extending\nprint('chat')\n",
    "tests/test_docs.py": 'read(ROOT / "docs")\n',
    "tests/typed/test_types.py": "if TYPE_CHECKING:\n    import llmrec.sheets\n",
}
TESTS = [file for file in FILES if "test_" in file]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for file, text in FILES.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "tests"),
    [
        ([], []),
        # Imports in helpers and functions; fixtures by their names; entries of tables by their keys.
        (["llmrec/baselines/ease.py"], ["ease"]),
        (["llmrec/baselines/base.py"], ["ease", "fixture", "python"]),
        (["llmrec/baselines/markov.py"], ["python"]),
        (["llmrec/registry.py"], ["python"]),
        # An import in a separate process counts, one for type checking does not.
        (["llmrec/sheets.py"], ["process"]),
        (["tests/helper.py"], ["ease"]),
        # Modules that match a pattern, and entries of their tables.
        (["llmrec/chat/command.py"], ["chat"]),
        (["tests/test_docs.py", "tests/test_ease.py"], ["docs", "ease"]),
        # Files that the package reads; files that only its messages recommend.
        (["docs/guide.md"], ["docs"]),
        (["docs/gone.md"], ["docs"]),
    ],
)
def test_tests_that_reach_a_change(checkout: Path, changed: list[str], tests: list[str]) -> None:
    assert affected.affected(checkout, FILES, changed) == [f"tests/test_{name}.py" for name in tests]


@pytest.mark.parametrize(
    "changed", ["llmrec/words.py", "tests/conftest.py", "prompts/rating/rate.yaml", "pyproject.toml", "odd.txt"]
)
def test_shared_files_affect_every_test(checkout: Path, changed: str) -> None:
    assert affected.affected(checkout, FILES, [changed]) == sorted(TESTS)


def test_removed_module_affects_its_importers(checkout: Path) -> None:
    (checkout / "llmrec/baselines/ease.py").unlink()
    (checkout / "tests/test_docs.py").unlink()
    files = [file for file in FILES if (checkout / file).exists()]
    changed = ["llmrec/baselines/ease.py", "tests/test_docs.py"]
    assert affected.affected(checkout, files, changed) == ["tests/test_ease.py"]


def test_changed_files_of_a_branch(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def git(*arguments: str) -> None:
        name = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *name, *arguments], cwd=checkout, check=True, capture_output=True)

    monkeypatch.setattr(affected, "ROOT", checkout)
    git("init", "--initial-branch", "main")
    git("add", ".")
    git("commit", "-m", "first")
    assert affected.changed_files() == []
    (checkout / "tests/new name.py").write_text("")
    assert affected.changed_files() == ["tests/new name.py"]
    git("switch", "--create", "branch")
    git("mv", "tests/helper.py", "tests/helpers.py")
    git("add", ".")
    git("commit", "-m", "second")
    (checkout / "docs/guide.md").write_text("changed")
    git("branch", "later", "main")
    assert affected.changed_files() == ["docs/guide.md", "tests/helper.py", "tests/helpers.py", "tests/new name.py"]
