"""Commands of llmrec in separate processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys


def llmrec(*words: str, **environment: str) -> subprocess.Popen[str]:
    """Start a command with one thread, without a model hub or stored fits, and with text output."""
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LLMREC_FITS": "off", **environment}
    # A shell makes background tests ignore SIGINT, and child processes inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "llmrec", *words],
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
