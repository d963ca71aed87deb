"""An example of plug-ins for llmrec: docs/plugins.md."""
