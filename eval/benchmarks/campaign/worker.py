"""Makes the calls read from standard input, and writes their outcomes to standard output."""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import Any

from eval.benchmarks.campaign.calls import Lines, quietly
from llmrec.errors import LlmrecError

_SHOWN = 600


def limit(more: int) -> None:
    """Limit the address space of this process to its current size plus a number of bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    bound = pages * os.sysconf("SC_PAGE_SIZE") + more
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))


def outcome(request: dict[str, Any]) -> dict[str, Any]:
    """Make a call and return its outcome."""
    folder = Path(request["folder"])
    os.chdir(folder)
    try:
        result = quietly(request["surface"], folder, request["arguments"])
    except LlmrecError as error:
        return {"how": "refused", "placed": _placed(error), "says": _short(error)}
    except BaseException as error:  # a panic in a Rust library is not an Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return {"how": "traceback", "says": f"{type(error).__name__}: {_short(error)}", "at": _at(error)}
    if isinstance(result, Lines):
        return {"how": "refused", "placed": result.placed, "says": _short(result.error)}
    return {"how": "answered"}


def _placed(error: LlmrecError) -> bool:
    """Return whether an error has a location."""
    return any(getattr(error, name) is not None for name in ("file", "row", "line", "column"))


def _short(error: object) -> str:
    text = " ".join(str(error).split())
    return text.encode("utf-8", "backslashreplace").decode()[:_SHOWN]


def _at(error: BaseException) -> str:
    """Return the deepest frame inside the package, and the deepest frame."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if "/llmrec/" in frame.filename]
    inner = f"{inside[-1].filename.rpartition('/llmrec/')[2]}:{inside[-1].name}" if inside else ""
    return f"{inner} < {Path(frames[-1].filename).name}:{frames[-1].name}" if frames else inner


def main() -> None:
    """Process calls until the end of the input."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with Path(os.devnull).open("w", encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    logging.disable(logging.CRITICAL)
    for line in sys.stdin:
        request = json.loads(line)
        output.write(json.dumps(outcome(request)) + "\n")
        output.flush()
        if request.get("bytes"):
            # After the last valid call every library is loaded.
            limit(request["bytes"])


if __name__ == "__main__":
    main()
