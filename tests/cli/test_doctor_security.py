"""`llmrec doctor --security`: each problem with its fix, from fake system data and from a folder with all problems."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrec.cli import security
from llmrec.cli.security import Finding
from tests.command import llmrec

SECRET = "sk-abcdefghijklmnop1234567890"


def one(found: list[Finding], name: str) -> Finding:
    (finding,) = [each for each in found if each.name == name]
    return finding


def test_keys_in_environment_are_named_and_hidden() -> None:
    environment = {"OPENAI_API_KEY": SECRET, "PATH": "/bin", "EMPTY_TOKEN": "", "KEYBOARD": "de"}
    (result,) = security.check_environment(environment)
    assert result.level == "notice"
    assert "OPENAI_API_KEY" in result.found and "EMPTY" not in result.found and "KEYBOARD" not in result.found
    assert SECRET not in repr(result)
    (clean,) = security.check_environment({"PATH": "/bin"})
    assert clean.level == "ok"


@pytest.mark.parametrize(
    ("command", "level"),
    [
        ("llmrec serve runs/a --host 0.0.0.0", "fault"),
        ("python /venv/bin/llmrec serve runs/a --host=::", "fault"),
        ("llmrec serve runs/a --host 0.0.0.0 --keys keys.json", "ok"),
        ("llmrec serve runs/a", "ok"),
        ("vllm serve model", "fault"),
        ("vllm serve model --host 0.0.0.0 --api-key=x", "ok"),
        ("vllm serve model --host localhost", "ok"),
        ("vim notes/of/llmrec.txt serve --host 0.0.0.0", "ok"),
    ],
)
def test_public_services(command: str, level: str) -> None:
    (result,) = security.check_services([command.split()])
    assert result.level == level


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with every security problem."""
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


def test_folder_with_every_fault(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = list(security.check_security(shop))
    pickles = one(result, "pickled weights")
    assert "old.pkl" in pickles.found and "pytorch_model.bin" in pickles.found and pickles.level == "fault"
    assert one(result, "run folders").fix == f"chmod 700 {shop / 'runs' / 'shop'}"
    assert one(result, "key files").fix == f"chmod 600 {shop / 'keys.json'}"
    assert "page.yaml" in one(result, "keys in recipes").found
    assert "1 more" not in one(result, "keys in recipes").found
    remote = one(result, "trust_remote_code")
    assert "recipe.yaml" in remote.found and "suite.yaml" in remote.found and remote.level == "fault"
    assert SECRET not in repr(result)
    monkeypatch.chdir(shop)
    done = llmrec("doctor", "--security")
    assert done.returncode == 1 and "pickled weights" in done.stdout and SECRET not in done.stdout
    assert all(line[0] in "✓✗" for line in done.stdout.strip().splitlines())


def test_no_faults_after_fixes(shop: Path) -> None:
    (shop / "runs" / "shop").chmod(0o700)
    (shop / "keys.json").chmod(0o600)
    for name in ("page.yaml", "suite.yaml", "runs/shop/recipe.yaml", "own/old.pkl"):
        (shop / name).unlink()
    (shop / "runs" / "shop" / "merged" / "pytorch_model.bin").unlink()
    assert [each for each in security.check_security(shop) if each.level == "fault" and each.name != "services"] == []
