"""Plug-ins: external components, named as ``module:attribute`` or installed as entry points.

Naming a plug-in runs its code, so the name must come from the user: from a config file that the user passed
(`allow_plugins`), from the environment variable `PLUGINS_VARIABLE`, or as an entry point of an installed package. Names
from run folders and exported models of other users are rejected. A module that a user's config named is remembered by
its file, so that the user's own runs can be audited, reported and queried in another process; see
`read_stored_consents`.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmrec.errors import RecipeError, did_you_mean

PLUGINS_VARIABLE = "LLMREC_PLUGINS"
"""Environment variable with comma-separated modules that run folders and exported models may name.

It also accepts names of models whose recipe has ``trust_remote_code``.
"""
_GROUP_PREFIX = "llmrec."
_MODEL_PREFIX = "model:"
_ADDRESS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True)
class PluginKind:
    """The interface of one kind of plug-in.

    Attributes:
        what: Its name in errors.
        needs: Required attributes; after a dot those of an attribute.
        fix: How to provide them.
        called: Whether it is called, as a class or function.
        takes: Its parameters, if the same for all; names after ``*`` are keywords.
    """

    what: str
    needs: tuple[str, ...]
    fix: str
    called: bool = True
    takes: tuple[str, ...] = ()


KINDS: Mapping[str, PluginKind] = {
    "baselines": PluginKind(
        "baseline",
        (
            *("name", "Config.model_validate", "fit", "answer", "reads", "text_encoder", "with_config", "looked_at"),
            *("stochastic", "GRID", "READS", "SCORES", "FITS", "AT_ANSWER"),
        ),
        "derive it from llmrec.baselines.base.Baseline, and define name, Config, learn(data) and answer(requests)",
    ),
    "strategies": PluginKind(
        "strategy", (), "write a class that takes a Prompting and defines asker, engine and answer(requests)"
    ),
    "tasks": PluginKind(
        "task family",
        (
            "name",
            "title",
            "task",
            "section.model_validate",
            "answer",
            "headline",
            "strategies",
            "baselines",
            "controls",
        ),
        "make it a llmrec.tasks.family.Family",
        called=False,
    ),
    "indexes": PluginKind(
        "index scheme", ("build", "extend"), "define build and extend as in llmrec.index.table.Scheme", called=False
    ),
    "sources": PluginKind(
        "data source",
        (),
        "write a function (section, *, seed) -> llmrec.data.dataset.Dataset",
        takes=("section", "*", "seed"),
    ),
    "backends": PluginKind(
        "backend",
        ("name", "capabilities", "close"),
        "define name, capabilities, a method for each capability, and close(), as in llmrec.types.Backend",
        takes=("folder", "encoder", "*", "model", "section", "seed"),
    ),
    "metrics": PluginKind(
        "metric", ("kind", "about", "function", "several"), "make it a llmrec.entries.MetricEntry", called=False
    ),
}
"""The kinds of plug-ins by name of their table; ``llmrec.NAME`` is the group of their entry points."""

# What the config files of this process name: files of modules, modules without a file, and models with code.
_ALLOWED_ORIGINS: set[str] = set()


def is_address(name: str) -> bool:
    """Whether a name has the form ``module:attribute``."""
    return _ADDRESS.fullmatch(name) is not None


# --------------------------------------------------------------------------- entry points


# All packages are searched once for all kinds.
_all_entry_points = cache(entry_points)


@cache
def installed_plugins(group: str) -> Mapping[str, tuple[EntryPoint, ...]]:
    """Return the installed plug-ins of a kind by name."""
    result: dict[str, tuple[EntryPoint, ...]] = {}
    for point in sorted(
        _all_entry_points().select(group=_GROUP_PREFIX + group), key=lambda point: (point.name, point.value)
    ):
        result[point.name] = (*result.get(point.name, ()), point)
    return result


def describe_package(point: EntryPoint) -> str:
    """Return the name and version of the package of an entry point."""
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown package"


def describe_plugin_fault(group: str, name: str, built_in: Collection[str]) -> str:
    """Return why an installed plug-in cannot be used; empty if it can."""
    packages = " and ".join(describe_package(point) for point in installed_plugins(group)[name])
    if name in built_in:
        return f"has the name of a {KINDS[group].what} of llmrec; uninstall {packages}, or rename it"
    if len(installed_plugins(group)[name]) > 1:
        return f"comes from {packages}; uninstall one of them"
    return ""


def check_installed_plugins(tables: Mapping[str, Collection[str]]) -> None:
    """Reject installed plug-ins with the name of a built-in component or of another plug-in.

    ``tables`` has the built-in names by the kind of plug-in.
    """
    for group in KINDS:
        for name, (point, *_) in installed_plugins(group).items():
            if fault := describe_plugin_fault(group, name, tables[group]):
                raise RecipeError(
                    f"the entry point {name!r} of the group {_GROUP_PREFIX}{group} ({describe_package(point)}) {fault}",
                    kind="duplicate",
                    at=_GROUP_PREFIX + group,
                    column=name,
                )


# --------------------------------------------------------------------------- lookup


def import_plugin(group: str, name: str) -> Any:
    """Return the plug-in with a name; None if it is neither an address nor installed.

    Raises:
        RecipeError: If its module was not named by the user, cannot be imported or lacks the attribute, or if the
            attribute does not have the interface of the kind.
    """
    if is_address(name):
        check_plugin_consent(name)
    elif name not in installed_plugins(group):
        return None
    return _load_plugin(group, _plugin_address(group, name))


def package_digest(group: str, name: str) -> str:
    """Return a hash of the code of a plug-in's package, which is imported."""
    import_plugin(group, name)
    return _package_code_hash(_plugin_address(group, name).partition(":")[0])


def _plugin_address(group: str, name: str) -> str:
    return name if is_address(name) else installed_plugins(group)[name][0].value.partition("[")[0].replace(" ", "")


@cache
def _load_plugin(group: str, address: str) -> Any:
    module, _, attribute = address.partition(":")
    result = _import_plugin_module(module)
    for part in attribute.split(".") if attribute else ():
        if not hasattr(result, part):
            raise RecipeError.at(
                module,
                "unknown-name",
                f" has no {part!r}{did_you_mean(part, dir(result))}; use an attribute of "
                f"{getattr(result, '__file__', None) or module}",
            )
        result = getattr(result, part)
    kind = KINDS[group]
    lacking = [missing for need in _required_attributes(group, result) if (missing := _missing_attribute(result, need))]
    if lacking or (kind.called and not callable(result)):
        lacks = f"lacks {', '.join(lacking)}" if lacking else "cannot be called"
        raise RecipeError.at(address, "defect", f" is not a valid {kind.what}: it {lacks}; {kind.fix}")
    if kind.takes and not _accepts_arguments(result, kind.takes):
        called = f"cannot be called with ({', '.join(kind.takes)})"
        raise RecipeError.at(address, "defect", f" is not a valid {kind.what}: it {called}; {kind.fix}")
    return result


def _accepts_arguments(plugin: Any, arguments: tuple[str, ...]) -> bool:
    star = arguments.index("*")
    try:
        inspect.signature(plugin).bind(*arguments[:star], **dict.fromkeys(arguments[star + 1 :]))
    except (TypeError, ValueError):  # has other parameters, or is written in C without a signature
        return False
    return True


def _missing_attribute(plugin: object, path: str) -> str:
    """Return the first missing attribute on a dotted path; empty if all exist."""
    known: list[str] = []
    for part in path.split("."):
        known.append(part)
        if not hasattr(plugin, part):
            return ".".join(known)
        plugin = getattr(plugin, part)
    return ""


def _required_attributes(group: str, plugin: object) -> tuple[str, ...]:
    """Return the attributes that a plug-in (or the result of a plug-in function) must have."""
    needs = KINDS[group].needs
    if not isinstance(plugin, type):
        return needs
    if group == "backends":
        return (*needs, *sorted(map(str, getattr(plugin, "capabilities", ()))))
    return (*needs, "answer") if group == "strategies" else needs


def _import_plugin_module(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise failed_plugin_error(f"importing {module}", error, module) from error
        raise RecipeError(
            f"there is no module {error.name!r} on the Python path; install its package, set PYTHONPATH, or list its "
            "folder in the config's key plugins",
            kind="not-installed",
            at=module,
        ) from None
    except Exception as error:
        raise failed_plugin_error(f"importing {module}", error, module) from error


def failed_plugin_error(what: str, error: Exception, at: str, column: str | None = None) -> RecipeError:
    """Return an error for a plug-in whose code failed, with the failing line.

    ``what`` is the failed operation, as the start of a sentence; ``column`` the key that names the plug-in, if the
    message does not follow one.
    """
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return RecipeError(
        f"{what} failed ({text}, at line {last.lineno} of {last.filename}); fix the module",
        kind="failed",
        at=at,
        column=column,
    )


@cache
def _package_code_hash(module: str) -> str:
    top = sys.modules[module.partition(".")[0]]
    folders = [Path(folder) for folder in getattr(top, "__path__", ())]
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    digest = hashlib.sha256()
    for file in files or filter(None, [getattr(top, "__file__", None)]):
        digest.update(hashlib.sha256(Path(file).read_bytes()).digest())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------- consent


@contextmanager
def allow_plugins(addresses: Iterable[str], folder: str | None) -> Iterator[None]:
    """Allow, within the block, the modules named in a config file of the user, also in an additional folder.

    Their files are remembered for other processes if the body succeeds: an invalid file does not count as consent.
    """
    add_import_folder(folder)
    result = {origin for address in addresses if (origin := _module_origin(address))}
    fresh = result - _ALLOWED_ORIGINS
    _ALLOWED_ORIGINS.update(result)
    try:
        yield
    except BaseException:
        _ALLOWED_ORIGINS.difference_update(fresh)
        raise
    _store_consents(name for name in result if Path(name).is_absolute())


def check_plugin_consent(address: str, folder: str | None = None) -> None:
    """Reject a module that the user has not allowed, without importing it.

    It may lie in a folder in addition to the Python path.
    """
    top, origin = _top_module(address), _module_origin(address, folder)
    if (
        not origin
        or origin in _ALLOWED_ORIGINS
        or origin in read_stored_consents()
        or top in map(_top_module, _names_in_variable())
    ):
        return
    where = f" ({origin})" if Path(origin).is_absolute() else ""
    raise RecipeError(
        f"the plug-in {address!r} would run code of the module {top}{where}, which none of your recipes names; "
        f"if you trust this module, set the environment variable {PLUGINS_VARIABLE}={top}",
        kind="unsafe",
        at=address,
    )


def is_module_in_folder(address: str, folder: str) -> bool:
    """Whether a module is found in a folder and not on the Python path."""
    return _module_origin(address, folder).startswith(f"{Path(folder).resolve()}{os.sep}")


def allow_model_code(name: str, revision: str | None) -> None:
    """Allow the code of a model that a config file of the user names (``model.trust_remote_code``)."""
    code = _model_entry(name, revision)
    _ALLOWED_ORIGINS.add(code)
    _store_consents([code])


def check_model_consent(name: str, revision: str | None) -> None:
    """Reject a model with code if no config file of the user allows it."""
    code = _model_entry(name, revision)
    if code in _ALLOWED_ORIGINS or code in read_stored_consents() or name in _names_in_variable():
        return
    raise RecipeError(
        f"model.trust_remote_code would run code of the model {name!r}, which no recipe that you passed allows; if "
        f"you trust this code, set the environment variable {PLUGINS_VARIABLE}={name}",
        kind="unsafe",
        at=name,
        column="model.trust_remote_code",
    )


def _model_entry(name: str, revision: str | None) -> str:
    path = Path(name).expanduser()
    return f"{_MODEL_PREFIX}{path.resolve() if path.is_dir() else name}{'@' + revision if revision else ''}"


def _store_consents(names: Iterable[str]) -> None:
    # If the permission cannot be stored, the environment variable remains.
    with suppress(OSError, RuntimeError):
        lines = [f"{name}\n" for name in sorted(set(names) - read_stored_consents()) if "\n" not in name]
        if lines:
            _consent_file().parent.mkdir(parents=True, exist_ok=True)
            with _consent_file().open("a", encoding="utf-8") as stream:
                stream.writelines(lines)


def add_import_folder(folder: str | None) -> None:
    """Also allow imports from a folder, after the Python path."""
    if folder is not None and folder not in sys.path:
        sys.path.append(folder)


def read_stored_consents() -> frozenset[str]:
    """Return the modules and models with code that the user's config files name.

    They are the lines of ``~/.config/llmrec/plugins.txt``.
    """
    try:
        return frozenset(_consent_file().read_text(encoding="utf-8").splitlines())
    except (OSError, RuntimeError, UnicodeDecodeError):
        return frozenset()


def _consent_file() -> Path:
    chosen = os.environ.get("XDG_CONFIG_HOME")
    return (Path(chosen) if chosen else Path.home() / ".config") / "llmrec" / "plugins.txt"


def _names_in_variable() -> list[str]:
    return [part.strip() for part in os.environ.get(PLUGINS_VARIABLE, "").split(",")]


def _top_module(address: str) -> str:
    return address.partition(":")[0].partition(".")[0]


def _module_origin(address: str, folder: str | None = None) -> str:
    """Return the file of a module without importing it."""
    top = _top_module(address)
    try:
        spec = find_spec(top) or PathFinder.find_spec(top, [folder] if folder else [])
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return ""
    if spec.has_location and spec.origin:
        return str(Path(spec.origin).resolve())
    return str(Path(next(iter(spec.submodule_search_locations))).resolve()) if spec.submodule_search_locations else top
