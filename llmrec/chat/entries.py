"""The registry entries of conversations."""

from llmrec.entries import Command

COMMANDS = {
    "chat": Command("llmrec.chat.command:chat", "Serve", "Talk with a recommender about its catalogue."),
}
