"""The command `llmrec chat`."""

from __future__ import annotations

import typer

from llmrec.chat.options import ChatOptions


def chat(options: ChatOptions) -> None:
    """Talk with a recommender about its catalogue.

    A line at a time, or replay a transcript as a test. It shows items of the catalogue alone; docs/chat.md says what it
    understands.
    """
    from llmrec.chat.run import chat

    raise typer.Exit(chat(options))
