"""Makes one call after another, as it is told on its standard input, and says on its standard output how each ended.

``python worker.py`` runs by its own path, so that PYTHONPATH alone decides which checkout of llmrec is asked.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import Any

from calls import Lines, quietly

_SHOWN = 600


def limit(more: int) -> None:
    """Let this process take so many bytes beside the address space that its libraries have taken."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    bound = pages * os.sysconf("SC_PAGE_SIZE") + more
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))


def outcome(asked: dict[str, Any]) -> dict[str, Any]:
    """Make a call and return how it ended."""
    from llmrec.errors import LlmrecError

    folder = Path(asked["folder"])
    os.chdir(folder)
    try:
        found = quietly(asked["surface"], folder, asked["given"])
    except LlmrecError as error:
        return {"how": "refused", "placed": _placed(error, asked), "says": _short(error), "kind": _kind(error)}
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return {"how": "traceback", "says": f"{type(error).__name__}: {_short(error)}", "at": _at(error)}
    if isinstance(found, Lines):
        return {"how": "refused", "placed": found.placed, "says": _short(found.said), "kind": "line"}
    return {"how": "answered"}


def _placed(error: Any, asked: dict[str, Any]) -> bool:
    """Whether an error says where: by its facts, or, in a checkout whose errors have none, by what it names."""
    if hasattr(error, "kind"):
        return any(getattr(error, name, None) is not None for name in ("file", "row", "line", "column"))
    return any(name in str(error) for name in asked["names"])


def _kind(error: Any) -> str | None:
    return getattr(error, "kind", None)


def _short(error: object) -> str:
    text = " ".join(str(error).split())
    return text.encode("utf-8", "backslashreplace").decode()[:_SHOWN]


def _at(error: BaseException) -> str:
    """Return the deepest place inside the package, and the deepest of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/llmrec/" in frame.filename]
    inner = f"{own[-1].filename.rpartition('/llmrec/')[2]}:{own[-1].name}" if own else ""
    return f"{inner} < {Path(frames[-1].filename).name}:{frames[-1].name}" if frames else inner


def main() -> None:
    """Answer until there is nothing more to do."""
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with Path(os.devnull).open("w", encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    logging.disable(logging.CRITICAL)
    for line in sys.stdin:
        asked = json.loads(line)
        told.write(json.dumps(outcome(asked)) + "\n")
        told.flush()
        if asked.get("bytes"):
            # The last of the sound calls: every library is loaded.
            limit(asked["bytes"])


if __name__ == "__main__":
    main()
