"""Options of an export, and the check of its run, without importing model libraries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import OptionHelp
from llmrec.errors import LlmrecError
from llmrec.recipe.load import STORED_RECIPE_FILE, load_stored_recipe


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `llmrec export`."""

    run: Annotated[Path, OptionHelp(argument=True, metavar="RUN", help="Finished run folder, such as runs/quickstart.")]
    out: Annotated[Path, OptionHelp(metavar="FOLDER", help="Output folder.")]
    dtype: Annotated[
        str,
        OptionHelp(
            metavar="auto|float32|bfloat16|float16",
            help="Data type of the weights. auto: as in the evaluation.",
        ),
    ] = "auto"
    adapter_only: Annotated[bool, OptionHelp(help="Export only the LoRA adapter.")] = False
    with_items: Annotated[
        bool,
        OptionHelp(
            names=("--with-items/--no-items",),
            help="Whether to include the item catalogue; check the data licence first.",
        ),
    ] = True
    with_interactions: Annotated[
        bool, OptionHelp(help="Also include the training interactions, which --fuse and chat need.")
    ] = False
    check_users: Annotated[
        int, OptionHelp(least=0, help="Number of validation cases per task with which to verify the export.")
    ] = 50
    licence: Annotated[str | None, OptionHelp(help="Licence of the fine-tuned weights and the model card.")] = None
    base_licence: Annotated[
        str | None, OptionHelp(help="Licence of the base model, if the model does not declare it.")
    ] = None
    push: Annotated[str | None, OptionHelp(metavar="USER/NAME", help="Upload to this Hugging Face repository.")] = None
    private: Annotated[
        bool, OptionHelp(names=("--private/--public",), help="Whether the uploaded repository is private.")
    ] = True
    force: Annotated[bool, OptionHelp(help="Overwrite an earlier export.")] = False

    @property
    def address(self) -> str:
        """Name from which the model is loaded: its name on the hub, or the folder."""
        return self.push or self.out.name

    @property
    def model_name(self) -> str:
        """Name of the model in the model card."""
        return self.address.rpartition("/")[2]


def check_fine_tuned(run: Path) -> None:
    """Reject a run without a fine-tuned language model, which an export requires.

    Raises:
        LlmrecError: If there is none; the message suggests alternatives.
    """
    if (run / "train.json").is_file() or not (run / STORED_RECIPE_FILE).is_file():
        return
    arms = load_stored_recipe(run).eval.arms
    if not arms:
        raise LlmrecError.at(
            run,
            "unsupported",
            " has only baselines, but an export needs a fine-tuned language model; serve the run folder "
            f"instead: llmrec serve {run}",
        )
    if "tuned" not in arms:
        raise LlmrecError.at(
            run,
            "unsupported",
            f" did not fine-tune its language model (eval.arms={', '.join(arms)}), so there is nothing to export; "
            "add tuned to eval.arms and run the recipe again",
            "eval.arms",
        )
