"""The command `llmrec chat`."""

from __future__ import annotations

import typer

from llmrec.chat.options import ChatOptions


def chat(options: ChatOptions) -> None:
    """Chat with a recommender, or test recorded dialogues.

    Reads one message per line. Answers mention only items of the catalogue. Experimental: see docs/experimental.md.

    Example:
        llmrec chat runs/demo
    """
    from llmrec.chat.run import run_chat

    raise typer.Exit(run_chat(options))
