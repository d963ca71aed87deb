"""Drives an installed Chromium over a pipe (the DevTools protocol), without a further library."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--disable-sync",
    # Nothing is fetched from other hosts.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip
SETTLED = "document.fonts.ready.then(() => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 30))))"
"""A script that waits until a page has been laid out."""


def executable() -> str | None:
    """Return the path of Chromium: that in ``CHROMIUM``, else the first installed one; None without one."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A page in a headless Chromium; use it in a ``with`` statement.

    Attributes:
        errors: What the console has reported as an error since `open`, and uncaught exceptions.
    """

    def __init__(self, seconds: float = 60) -> None:
        """Prepare a browser, which `__enter__` starts.

        Args:
            seconds: The longest wait for an answer of the browser.
        """
        self.errors: list[str] = []
        self._seconds, self._session, self._number, self._rest = seconds, "", 0, b""
        self._loaded = False

    def __enter__(self) -> Self:
        """Start Chromium; exits with a message if there is none."""
        program = executable()
        if program is None:
            sys.exit(f"none of {', '.join(NAMES)} is installed; install one, or name it: CHROMIUM=/path")
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        # The browser reads from descriptor 3 and writes to 4.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for pair in (os.pipe(), os.pipe()) for end in pair]
        theirs, self._write, self._read, answers = ends

        def wire() -> None:
            os.dup2(theirs, 3)
            os.dup2(answers, 4)

        command = [program, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}"]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=wire, close_fds=False
        )
        os.close(theirs)
        os.close(answers)
        try:
            target = self._call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log"):
                self._call(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Close Chromium."""
        os.close(self._write)
        os.close(self._read)
        self._process.terminate()
        self._process.wait(timeout=30)
        self._profile.cleanup()

    def view(self, size: tuple[int, int], scheme: str, *, scale: float = 1) -> None:
        """Set the window for this and later pages.

        Args:
            size: Width and height in CSS pixels; a width below 500 is that of a phone.
            scheme: The colour scheme that the reader prefers, ``light`` or ``dark``.
            scale: Pixels of a screenshot per CSS pixel.
        """
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": scale, "mobile": size[0] < 500}
        self._call("Emulation.setDeviceMetricsOverride", **metrics)
        preferred = [{"name": "prefers-color-scheme", "value": scheme}]
        self._call("Emulation.setEmulatedMedia", features=preferred)

    def open(self, address: str) -> None:
        """Open a page and wait until it has been loaded and laid out."""
        self.errors, self._loaded = [], False
        answer = self._call("Page.navigate", url=address)
        if "errorText" in answer:
            raise RuntimeError(f"{address}: {answer['errorText']}")
        while not self._loaded:
            self._next(time.monotonic() + self._seconds)
        self.run(SETTLED)

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression, a promise's once it is settled."""
        answer = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:2000])
        return answer["result"].get("value")

    def wait(self, script: str) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + self._seconds
        while not self.run(f"Boolean({script})"):
            if time.monotonic() > end:
                raise TimeoutError(script)
            self.run("new Promise((done) => setTimeout(done, 100))")

    def screenshot(self) -> bytes:
        """Return the window as a WebP file."""
        return base64.b64decode(self._call("Page.captureScreenshot", format="webp", quality=85)["data"])

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        end = time.monotonic() + self._seconds
        while True:
            answer = self._next(end)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                found: dict[str, Any] = answer["result"]
                return found

    def _next(self, end: float) -> Mapping[str, Any]:
        """Return the next message of the browser; notes errors and the end of loading."""
        while b"\0" not in self._rest:
            if not select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer")
            part = os.read(self._read, 1 << 20)
            if not part:
                raise RuntimeError("Chromium has ended")
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        found = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Runtime.exceptionThrown":
                details = found["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description") or details["text"])
            case "Runtime.consoleAPICalled" if found["type"] in ("error", "assert"):
                self.errors.append(" ".join(str(each.get("value", each.get("description"))) for each in found["args"]))
            case "Log.entryAdded" if found["entry"]["level"] == "error":
                self.errors.append(f"{found['entry']['text']} {found['entry'].get('url', '')}".rstrip())
        return message
