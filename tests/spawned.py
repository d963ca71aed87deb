"""Commands of llmrec in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys


def llmrec(*words: str, **environment: str) -> subprocess.Popen[str]:
    """Start a command on one thread, without a model hub and without stored fits, whose outputs are read as text."""
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LLMREC_FITS": "off", **environment}
    # A shell that starts tests in the background has them ignore SIGINT, and children inherit that.
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
