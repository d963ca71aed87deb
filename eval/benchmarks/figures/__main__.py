"""``python -m eval.benchmarks.figures --check`` compares, ``--write`` updates bound figures and generated pages."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from eval.benchmarks.figures.check import faults, write
from eval.benchmarks.figures.pointers import PointerError


def main() -> int:
    """Return 1 if a figure has no source or differs from it."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.figures", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="print what is wrong")
    what.add_argument("--write", action="store_true", help="write figures and generated pages, then check")
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout, by default this folder")
    chosen = parser.parse_args()
    try:
        if chosen.write:
            sys.stdout.writelines(f"written: {name}\n" for name in write(chosen.root))
        found = faults(chosen.root)
    except PointerError as error:
        found = [str(error)]
    sys.stdout.writelines(f"{fault}\n" for fault in found)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
