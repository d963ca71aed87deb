"""`llmrec doctor --security`: each fault with its mend, from made-up facts and from a folder that has them all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmrec.cli import security
from llmrec.cli.security import Finding

SECRET = "sk-abcdefghijklmnop1234567890"


def one(found: list[Finding], name: str) -> Finding:
    (finding,) = [each for each in found if each.name == name]
    return finding


def test_keys_in_the_environment_are_named_and_not_shown() -> None:
    environment = {"OPENAI_API_KEY": SECRET, "PATH": "/bin", "EMPTY_TOKEN": "", "KEYBOARD": "de"}
    (found,) = security.check_environment(environment)
    assert found.level == "notice"
    assert "OPENAI_API_KEY" in found.found and "EMPTY" not in found.found and "KEYBOARD" not in found.found
    assert SECRET not in repr(found)
    (clean,) = security.check_environment({"PATH": "/bin"})
    assert clean.level == "ok"


@pytest.mark.parametrize(
    ("command", "level"),
    [
        ("llmrec serve runs/a --host 0.0.0.0", "fault"),
        ("python /venv/bin/llmrec serve runs/a --host=::", "fault"),
        ("llmrec serve runs/a --host 0.0.0.0 --keys keys.json", "ok"),
        ("llmrec serve runs/a", "ok"),
        ("llmrec serve runs/a --host 127.0.0.1", "ok"),
        ("vllm serve model", "fault"),
        ("vllm serve model --host 0.0.0.0 --api-key=x", "ok"),
        ("vllm serve model --host localhost", "ok"),
        ("vim notes/of/llmrec.txt serve --host 0.0.0.0", "ok"),
        ("cat --host 0.0.0.0 serve", "ok"),
    ],
)
def test_services_that_answer_anybody(command: str, level: str) -> None:
    (found,) = security.check_services([command.split()])
    assert found.level == level


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as somebody might leave it."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    run = tmp_path / "runs" / "shop"
    (run / "merged").mkdir(parents=True)
    run.chmod(0o755)
    (run / ".lock").touch()
    (run / "merged" / "config.json").write_text("{}")
    (run / "merged" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (run / "recipe.yaml").write_text("name: shop\nmodel: {name: ./own, trust_remote_code: true}\n")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text("{}")
    (tmp_path / "own" / "old.pkl").write_bytes(b"\x80\x04.")
    (tmp_path / "page.yaml").write_text(f"name: x\neval:\n  server: {{extra: {{auth: {SECRET}}}}}\n")
    (tmp_path / "bomb.yaml").write_text("x: &a [*a]\n")
    (tmp_path / "suite.yaml").write_text("benchmark: b\noverrides: [model.trust_remote_code=true]\n")
    (tmp_path / "keys.json").write_text("{}")
    (tmp_path / "keys.json").chmod(0o644)
    (tmp_path / "keyboards.csv").touch()
    return tmp_path


def test_a_folder_with_every_fault(shop: Path) -> None:
    found = list(security.examine(shop))
    pickles = one(found, "pickled weights")
    assert "old.pkl" in pickles.found and "pytorch_model.bin" in pickles.found and pickles.level == "fault"
    assert one(found, "run folders").fix == f"chmod 700 {shop / 'runs' / 'shop'}"
    assert one(found, "key files").fix == f"chmod 600 {shop / 'keys.json'}"
    assert "page.yaml" in one(found, "keys in recipes").found
    assert "1 more" not in one(found, "keys in recipes").found
    remote = one(found, "trust_remote_code")
    assert "recipe.yaml" in remote.found and "suite.yaml" in remote.found and remote.level == "fault"
    assert SECRET not in repr(found)


def test_once_mended_nothing_is_left(shop: Path) -> None:
    (shop / "runs" / "shop").chmod(0o700)
    (shop / "keys.json").chmod(0o600)
    for name in ("page.yaml", "suite.yaml", "runs/shop/recipe.yaml", "own/old.pkl"):
        (shop / name).unlink()
    (shop / "runs" / "shop" / "merged" / "pytorch_model.bin").unlink()
    assert [each for each in security.examine(shop) if each.level == "fault" and each.name != "services"] == []


def test_the_command_exits_with_1_where_something_is_wrong(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shop)
    command = [sys.executable, "-m", "llmrec", "doctor", "--security", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    rows = json.loads(done.stdout)["findings"]
    assert {"pickled weights", "key files", "services"} <= {row["name"] for row in rows}
    assert SECRET not in done.stdout
