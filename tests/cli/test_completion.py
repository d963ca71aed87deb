"""Completion in a shell: commands and options, from the script that ``--show-completion`` prints."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

MAIN = "import sys; sys.argv = ['llmrec']; from llmrec.cli.main import main; main()"


@pytest.mark.parametrize(("typed", "expected"), [("llmrec ran", "rank"), ("llmrec rank --all", "--all-users")])
def test_completes_a_word(typed: str, expected: str) -> None:
    variables = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" ")), "_LLMREC_COMPLETE": "complete_bash"}
    done = subprocess.run([sys.executable, "-c", MAIN], env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.stdout.split() == [expected], done.stderr
