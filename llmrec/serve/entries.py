"""The registry entries of the service."""

from llmrec.entries import Command

COMMANDS = {
    "serve": Command(
        "llmrec.serve.command:serve", "Serve", "Serve recommendations over HTTP, with a web page.", serves=True
    ),
    "serve-key": Command("llmrec.serve.command:serve_key", "Serve", "Create or revoke an API key for llmrec serve."),
    "refresh": Command(
        "llmrec.serve.command:refresh",
        "Serve",
        "Add new interactions and items to a served model.",
        resumes=True,
    ),
}
