"""``python -m eval.benchmarks [NAME]`` runs a benchmark of commands.yaml, or lists them all; see ``make bench``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

BENCHMARKS: dict[str, dict[str, str]] = yaml.safe_load(
    Path(__file__).with_name("commands.yaml").read_text(encoding="utf-8")
)


def main(arguments: list[str]) -> int:
    if not arguments:
        width = max(map(len, BENCHMARKS))
        sys.stdout.writelines(f"{name:<{width}}  {benchmark['help']}\n" for name, benchmark in BENCHMARKS.items())
        return 0
    name = arguments[0]
    if name not in BENCHMARKS:
        sys.stderr.write(f"there is no benchmark {name!r}; known: {', '.join(BENCHMARKS)}\n")
        return 2
    programs = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    command = ["bash", "-e", "-c", BENCHMARKS[name]["run"]]
    return subprocess.run(command, env={**os.environ, "PATH": programs}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
