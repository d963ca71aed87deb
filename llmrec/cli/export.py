"""The command `llmrec export`."""

from __future__ import annotations

from llmrec.cli.console import say, show_values, store_facts
from llmrec.exports.options import ExportOptions, check_fine_tuned


def export(options: ExportOptions) -> None:
    """Export a fine-tuned model with a model card.

    The folder loads in llmrec, transformers and vLLM, and contains checksums.

    Example:
        llmrec export runs/quickstart --out films-model --licence mit
    """
    # Checked before torch and transformers are imported.
    check_fine_tuned(options.run)
    from llmrec.exports import export as exports

    done = exports.write_export(options, say=say)
    store_facts(exported=done)
    for title, rows in exports.export_summary(done):
        show_values(title, rows, record={})
