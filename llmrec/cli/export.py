"""The command `llmrec export`."""

from __future__ import annotations

from llmrec.cli.console import say, show, store_facts
from llmrec.exports.options import ExportOptions, refuse_untuned


def export(options: ExportOptions) -> None:
    """Export a fine-tuned model with a model card.

    The folder loads in llmrec, transformers and vLLM, and contains checksums.

    Example:
        llmrec export runs/quickstart --out films-model --licence mit
    """
    # Checked before torch and transformers are imported.
    refuse_untuned(options.run)
    from llmrec.exports import export as exports

    done = exports.write_export(options, say=say)
    store_facts(exported=done)
    for title, rows in exports.summary(done):
        show(title, rows, record={})
