"""Child processes that do not run the caller's script again.

A process that `multiprocessing` starts anew ("spawn", "forkserver") first runs the parent's ``__main__`` under another
name, in case that what it is given was defined there. A script that calls `llmrec.run` without ``if __name__ ==
"__main__":`` would so be run again inside the engine that it starts, and one that came from stdin is a file that is
not there. Nothing that an engine is given is from ``__main__``, so its processes need not know it.

What a child is told about ``__main__`` comes from one function, `multiprocessing.spawn.get_preparation_data`, which is
asked in the thread that starts it. Hiding ``__main__.__file__`` meanwhile would hide it from every thread, and forking
in place of spawning is not safe beside the threads and the CUDA context that torch has by then.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from multiprocessing import spawn
from typing import TypeVar

_MAIN = ("init_main_from_name", "init_main_from_path")
_T = TypeVar("_T")


class _Here(threading.local):
    """Whether this thread starts processes without ``__main__``; every thread has its own answer."""

    hidden = False


_here = _Here()
_lock = threading.Lock()


@contextlib.contextmanager
def without_main() -> Iterator[None]:
    """Start processes in this thread that do not import ``__main__``; those of other threads do as ever."""
    with _lock:
        if not getattr(spawn.get_preparation_data, "hides_main", False):
            # Stays in place: put back, it could take with it what others have put there since.
            spawn.get_preparation_data = _hiding(spawn.get_preparation_data)  # type: ignore[assignment]
    before, _here.hidden = _here.hidden, True
    try:
        yield
    finally:
        _here.hidden = before


def _hiding(prepare: Callable[[str], dict[str, _T]]) -> Callable[[str], dict[str, _T]]:
    @functools.wraps(prepare)
    def prepared(name: str) -> dict[str, _T]:
        told = prepare(name)
        return {key: value for key, value in told.items() if key not in _MAIN} if _here.hidden else told

    prepared.hides_main = True  # type: ignore[attr-defined]
    return prepared
