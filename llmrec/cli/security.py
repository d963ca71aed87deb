"""Security checks that need no network, for `llmrec doctor --security`.

Every check is a function from facts to findings; `check_security` gathers the facts. A secret is never printed:
a finding names its location.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from llmrec.display import format_name_list
from llmrec.errors import RecipeError
from llmrec.pipeline.resume import LOCK_FILE
from llmrec.recipe.pages import read_yaml_page

# Suffixes of files with pickled objects, which can run code when they are loaded.
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
# Names of files that may contain keys.
_KEY_FILE = re.compile(r"(^|[._-])(keys?|tokens?|secrets?|credentials)([._-]|$)|^\.env(\.|$)", re.IGNORECASE)
_KEY_ENDINGS = frozenset({"", ".json", ".env", ".txt", ".yaml", ".yml", ".key"})
_SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY)$", re.IGNORECASE)
# Formats of keys of known services, and values assigned to names such as api_key.
_SECRET = re.compile(
    r"\b(?:sk-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{16,}|llmrec_[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|AKIA[A-Z0-9]{16}|xox[abp]-[A-Za-z0-9-]{10,}|AIza[A-Za-z0-9_-]{30,})"
    r"|://[^/\s:@]+:[^/\s@]+@"
    r"|\b(?:api_?key|secret|password|token)['\"]?\s*[:=]\s*['\"]?[A-Za-z0-9_+/=-]{16,}",
    re.IGNORECASE,
)
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_MAX_PAGES = 500
_MAX_PAGE_BYTES = 2**20
_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """A finding: one line of the output.

    Attributes:
        fix: How to fix a fault; empty if there is none.
        note: Advice that is not about a fault.
    """

    name: str
    found: str
    fix: str = ""
    note: str = ""

    @property
    def level(self) -> Literal["ok", "notice", "fault"]:
        """``fault`` if there is something to fix, ``notice`` if there is advice."""
        return "fault" if self.fix else "notice" if self.note else "ok"


@dataclass(frozen=True, kw_only=True)
class Page:
    """A recipe or suite: its path, its text, its model, and whether it allows the model to run code."""

    path: Path
    text: str
    remote_code: bool
    model: str | None


def check_security(folder: Path = Path()) -> Iterator[Finding]:
    """Yield findings on recipes, runs and key files in a folder, and on services on this machine."""
    runs = _find_run_folders(folder)
    pages = _find_pages(folder, runs)
    yield from check_pickles(_find_model_folders(folder, runs, pages))
    yield from check_modes("run folders", [run for run in runs if _is_open_to_others(run)], len(runs), "700")
    keys = _find_key_files(folder)
    yield from check_modes("key files", [file for file in keys if _is_open_to_others(file)], len(keys), "600")
    yield from check_environment(os.environ)
    yield from check_pages(pages)
    yield from check_services(_running_command_lines())


def check_pickles(folders: Iterable[Path]) -> Iterator[Finding]:
    """Check for pickled files in model folders."""
    files = [file for folder in folders for file in sorted(folder.iterdir()) if file.suffix.lower() in _PICKLE_SUFFIXES]
    yield _fault_or_clean(
        "pickled weights",
        format_name_list(map(str, files), _SHOWN),
        "llmrec does not load them, but other programs may and then run code in them: convert the weights to "
        "safetensors, and remove these files",
        "none in the model folders",
    )


def _fault_or_clean(name: str, fault: str, fix: str, clean: str) -> Finding:
    """Return a fault with its fix, or what was found if there is no fault."""
    return Finding(name, fault, fix) if fault else Finding(name, clean)


def check_modes(what: str, exposed: Sequence[Path], count: int, mode: str) -> Iterator[Finding]:
    """Check for files or folders that other users than the owner may read."""
    names = " ".join(map(str, exposed[:_SHOWN])) + (" ..." if len(exposed) > _SHOWN else "")
    fault = f"others may read {format_name_list(map(str, exposed), _SHOWN)}" if exposed else ""
    clean = f"{count} checked, none readable by other users" if count else "none here"
    yield _fault_or_clean(what, fault, f"chmod {mode} {names}", clean)


def check_environment(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Check for secrets in the environment, by variable name."""
    names = sorted(name for name, value in environment.items() if value and _SECRET_NAME.search(name))
    if names:
        yield Finding(
            "environment",
            f"{', '.join(names)} set",
            note="every program that is started from here can read these keys; set a key only for the command that "
            "needs it",
        )
    else:
        yield Finding("environment", "no keys")


def check_pages(pages: Sequence[Page]) -> Iterator[Finding]:
    """Check for recipes and suites that contain keys or allow a model to run code."""
    yield _fault_or_clean(
        "keys in recipes",
        format_name_list((str(page.path) for page in pages if _SECRET.search(page.text)), _SHOWN),
        "remove the key and replace it at the provider; set eval.server.key_env to an environment variable",
        f"none in {len(pages)} pages",
    )
    trusting = format_name_list((str(page.path) for page in pages if page.remote_code), _SHOWN)
    yield _fault_or_clean(
        "trust_remote_code",
        f"on in {trusting}" if trusting else "",
        "code of the model runs with your permissions: review the code and pin model.revision, or remove the setting",
        "off everywhere",
    )


def check_services(commands: Iterable[Sequence[str]]) -> Iterator[Finding]:
    """Check for services on this machine that other hosts can use without a key."""
    exposed = []
    for words in commands:
        host, serves = _option_value(words, "--host"), "serve" in words
        engine = next((Path(word).name for word in words[:3] if Path(word).name in ("llmrec", "vllm")), "")
        if not engine or not serves:
            continue
        # vLLM listens on all addresses by default.
        reached = host not in _LOOPBACK if host is not None else engine == "vllm"
        if reached and _option_value(words, "--keys" if engine == "llmrec" else "--api-key") is None:
            exposed.append(f"{engine} serve on {host or 'every address'}")
    yield _fault_or_clean(
        "services",
        f"without keys: {', '.join(exposed)}" if exposed else "",
        "reachable without authentication: use --keys (llmrec) or --api-key (vllm), or --host 127.0.0.1",
        "no service is reachable without keys",
    )


def _option_value(words: Sequence[str], name: str) -> str | None:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == name:
            return following
        if word.startswith(name + "="):
            return word.partition("=")[2]
    return None


# --------------------------------------------------------------------------- collecting files


def _find_run_folders(folder: Path) -> list[Path]:
    """Return the run folders in ``runs``, recognised by lock files or recipes."""
    home = folder / "runs"
    candidates = [*home.glob("*"), *home.glob("*/*")] if home.is_dir() else []
    return sorted(c for c in candidates if c.is_dir() and ((c / LOCK_FILE).is_file() or (c / "recipe.yaml").is_file()))


def _find_pages(folder: Path, runs: Sequence[Path]) -> list[Page]:
    """Return the recipes and suites in the folder, in ``recipes`` and ``eval/suites``, and in runs."""
    paths = [*folder.glob("*.y*ml"), *(run / "recipe.yaml" for run in runs)]
    for home in (folder / "recipes", folder / "eval" / "suites"):
        paths += home.rglob("*.yaml")
    return [page for path in sorted(set(paths))[:_MAX_PAGES] if (page := _read_page(path)) is not None]


def _read_page(path: Path) -> Page | None:
    try:
        if not path.is_file() or path.stat().st_size > _MAX_PAGE_BYTES:
            return None
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    model: object = None
    with suppress(RecipeError):
        model = read_yaml_page(path)[0].get("model")
    section = model if isinstance(model, dict) else {}
    name = section.get("name")
    return Page(
        path=path,
        text=text,
        remote_code=section.get("trust_remote_code") is True or bool(_REMOTE_CODE_OVERRIDE.search(text)),
        model=name if isinstance(name, str) else None,
    )


# Matches overrides in suites, where the key is part of a string.
_REMOTE_CODE_OVERRIDE = re.compile(r"model\.trust_remote_code\s*=\s*true", re.IGNORECASE)


def _find_model_folders(folder: Path, runs: Sequence[Path], pages: Sequence[Page]) -> list[Path]:
    """Return the local model folders in runs and recipes."""
    result = {run / name for run in runs for name in ("merged", "adapter", "base")}
    for page in pages:
        if page.model is not None and len(page.model) < 1000:
            result.add(folder / Path(page.model).expanduser())
    kept = []
    for path in sorted(result):
        with suppress(OSError):
            if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
                kept.append(path)
    return kept


def _find_key_files(folder: Path) -> list[Path]:
    """Return files in the folder whose names suggest keys, and the token of the hub."""
    result = [
        file
        for file in folder.glob("*")
        if _KEY_FILE.search(file.name) and file.suffix.lower() in _KEY_ENDINGS and file.is_file()
    ]
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "token"
    return [*sorted(result), *([hub] if hub.is_file() else [])]


def _is_open_to_others(path: Path) -> bool:
    """Whether other users than the owner may read a file or list a folder."""
    try:
        return bool(stat.S_IMODE(path.stat().st_mode) & 0o077)
    except OSError:
        return False


def _running_command_lines() -> Iterator[Sequence[str]]:
    """Yield the command lines of the running processes that this user may read."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if words := process.cmdline():
                yield words
