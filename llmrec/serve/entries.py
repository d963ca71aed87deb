"""The registry entries of the service."""

from llmrec.entries import Command

COMMANDS = {
    "serve": Command(
        "llmrec.serve.command:serve", "Serve", "Serve a model over HTTP, with a page to look at.", serves=True
    ),
    "serve-key": Command(
        "llmrec.serve.command:serve_key", "Serve", "Make an API key for `llmrec serve`, or revoke one."
    ),
    "refresh": Command(
        "llmrec.serve.command:refresh",
        "Serve",
        "Add new events and items to a folder that is served.",
        resumes=True,
    ),
}
