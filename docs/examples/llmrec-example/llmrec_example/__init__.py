"""An example of plug-ins for llmrec: docs/extend.md."""
