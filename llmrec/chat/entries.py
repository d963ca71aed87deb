"""The registry entries of conversations."""

from llmrec.entries import Command

COMMANDS = {
    "chat": Command("llmrec.chat.command:chat", "Serve", "Chat with a recommender, or test recorded dialogues."),
}
