"""What the registry says of a command of the program."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command: its function, and what is known of it before that is imported.

    Attributes:
        target: ``module:function`` of one options record, or a mapping of names to such functions; see
            `llmrec.cli.options.takes`.
        panel: The heading that ``llmrec --help`` lists it under.
        help: The first line of the function's docstring.
        resumes: Whether the same command goes on where it was stopped.
        serves: Whether it runs until it is stopped, so that its libraries write to the error stream.
    """

    target: str
    panel: str
    help: str
    resumes: bool = False
    serves: bool = False
