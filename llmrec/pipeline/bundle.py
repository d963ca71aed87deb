"""Describes the model in a folder (tasks, prompt templates, rating scale), so that it can be used without its run.

``llmrec.json`` holds the tasks with their settings, the exact templates, the noun for items and the rating scale.
It contains no data: no item, user or path. The codes of a model that was tuned on codes are stored in ``index/``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from llmrec import __version__
from llmrec.data.split import SplitDataset, scale_of
from llmrec.durable import Json, parse_checked_json, write_checked_json
from llmrec.ensembles.carried import INTERACTIONS_FILE
from llmrec.errors import LlmrecError, ModelError, RecipeError
from llmrec.index.table import ItemIndex
from llmrec.models.load import BUNDLE_FILE, file_sha256, resolve_model_folder
from llmrec.pipeline.indexing import load_stored_index
from llmrec.pipeline.study import Study
from llmrec.prompts.template import Template, load_templates
from llmrec.recipe.load import import_stored_plugins, load_stored_recipe
from llmrec.recipe.schema import DirectSection, ModelSection, Recipe, SequentialSection, TasksSection

CHECKSUMS_FILE = "SHA256SUMS"
"""The file in an exported folder with the sha256 of every file."""
_FORMAT = 1


@dataclass(frozen=True)
class Bundle:
    """A model with its tasks and prompt templates.

    Attributes:
        folder: The weights: a folder, or a hub name. If the run has no language model (``eval.arms: []``), it is
            empty or the refreshed folder.
        model: How to load the model; ``name`` is ``folder``.
        tasks: Settings of each family that it was tuned on; the defaults of ranking families for a plain model.
        templates: By family and name.
        run: The run folder that it was opened from, if any; its recipe names the data.
        noun: The plural noun for items in prompts.
        rating_scale: Lowest and highest rating, if it predicts ratings.
        seed: Seed of the recipe that it was tuned with.
        tuned: Whether the folder records how it was tuned; false for a plain pretrained model.
        index: Codes of items, if it was tuned on codes.
        weights: Whether it has a language model.
    """

    folder: str
    model: ModelSection
    tasks: TasksSection
    templates: Mapping[str, Mapping[str, Template]]
    run: Path | None = None
    noun: str = "items"
    rating_scale: tuple[float, float] | None = None
    seed: int = 0
    tuned: bool = False
    index: ItemIndex | None = None
    weights: bool = True

    @property
    def called(self) -> str:
        """Name of the model in messages."""
        return self.folder or str(self.run)

    @property
    def source_folder(self) -> Path:
        """The folder that it was opened from: a run folder, or the folder of the weights."""
        return self.run or Path(self.folder)


def bundle_content(study: Study) -> dict[str, Json]:
    """Return the content of ``llmrec.json``."""
    recipe = study.recipe
    return {
        "format": _FORMAT,
        "llmrec": __version__,
        "max_length": recipe.model.max_length,
        "seed": recipe.seed,
        "noun": study.data.dataset.noun,
        "rating_scale": _rating_scale(study.data),
        "index": recipe.index.scheme if recipe.index else None,
        "tasks": recipe.tasks.model_dump(mode="json", exclude_none=True),
        "templates": {
            family: [template.stored() for template in known.values()] for family, known in study.templates.items()
        },
    }


def _rating_scale(data: SplitDataset) -> tuple[float, float] | None:
    return scale_of(data) if data.train["rating"].null_count() < data.train.height else None


def write(study: Study, folder: Path) -> None:
    """Write ``llmrec.json`` into a model folder."""
    write_checked_json(folder / BUNDLE_FILE, bundle_content(study))


def read(name: str, model: ModelSection | None = None) -> Bundle:
    """Open a run folder, an exported folder, or any model that `resolve_model_folder` accepts.

    Args:
        name: The folder or hub name.
        model: How to load it, without its name; by default as in its tuning, or with the recipe's defaults.
    """
    run = Path(name).expanduser() if (Path(name).expanduser() / "recipe.yaml").is_file() else None
    if run is not None and not (run / "merged" / "config.json").is_file():
        try:
            recipe = load_stored_recipe(run)
            if not recipe.eval.arms:
                result = _bundle_without_model(run, recipe)
                return replace(result, folder=str(run), run=None) if (run / INTERACTIONS_FILE).is_file() else result
        except RecipeError as error:
            if error.kind == "unsafe":
                raise
            # An unreadable file is treated as an unfinished run.
        raise ModelError(
            f"the run folder {run} has no merged model; finish the run with `llmrec train` or `llmrec run` first",
            kind="missing-file",
            at=run,
        )
    if run is not None:
        import_stored_plugins(run)
    section = (model or ModelSection()).model_copy(update={"name": str(run / "merged") if run else name})
    folder = resolve_model_folder(section)
    stored = Path(folder) / BUNDLE_FILE
    if not stored.is_file():
        return _pretrained_bundle(folder, section)
    try:
        result = parse_checked_json(stored.read_bytes())
        if result["format"] != _FORMAT:
            raise ModelError(
                f"{stored} has format {result['format']}, but this version of llmrec reads format {_FORMAT}; use "
                f"llmrec {result['llmrec']}, or export the run again",
                kind="wrong-format",
                at=stored,
                column="format",
            )
        templates = {
            family: {entry["name"]: Template.of_stored(entry) for entry in entries}
            for family, entries in result["templates"].items()
        }
        scale = result["rating_scale"]
        return Bundle(
            folder=folder,
            run=run,
            model=section.model_copy(update={"max_length": result["max_length"]}) if model is None else section,
            tasks=TasksSection(**result["tasks"]),
            templates=templates,
            noun=str(result["noun"]),
            rating_scale=(float(scale[0]), float(scale[1])) if scale else None,
            index=load_stored_index(Path(folder), result.get("index")),
            seed=int(result["seed"]),
            tuned=True,
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, ValidationError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{stored} cannot be read ({type(error).__name__}: {reason}); export the run again",
            kind="damaged",
            at=stored,
        ) from error
    except ModelError:
        raise
    except LlmrecError as error:
        raise ModelError(
            f"{stored}: {error}; export the run again", kind=error.kind, at=stored, column=error.column
        ) from error


def check_unchanged(opened: Bundle, weights: str) -> None:
    """Reject a model that was changed after training or export.

    Args:
        opened: A run folder, an export, or any other model, such as the base of a run, which cannot be checked.
        weights: The `llmrec.models.load.model_folder_hash` of its folder.
    """
    if opened.run is not None and opened.tuned:
        path = opened.run / "train.json"
        try:
            recorded = parse_checked_json(path.read_bytes())["merged_sha256"] if path.is_file() else weights
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise _changed_error(path, f"cannot be read ({error})", "run `llmrec train` on its recipe again") from None
        if recorded != weights:
            raise _changed_error(
                opened.folder, "does not match the record of its training", "run `llmrec train` on its recipe again"
            )
        return
    folder = Path(opened.folder)
    if not (folder / CHECKSUMS_FILE).is_file():
        return
    try:
        lines = (folder / CHECKSUMS_FILE).read_text(encoding="utf-8").splitlines()
        listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        raise _changed_error(folder / CHECKSUMS_FILE, f"cannot be read ({error})", "export the run again") from None
    for name, digest in listed.items():
        # Users may edit the model card.
        if name.startswith("LICENSE") or name.endswith(".md"):
            continue
        if not (folder / name).is_file() or file_sha256(folder / name) != digest:
            raise _changed_error(
                folder / name, f"does not match {CHECKSUMS_FILE}", "export the run again, or restore the file"
            )


def _changed_error(path: Path | str, what: str, fix: str) -> ModelError:
    return ModelError(f"{path} {what}; {fix}", kind="damaged", at=path)


def _bundle_without_model(run: Path, recipe: Recipe) -> Bundle:
    """Return the description of a run without a language model."""
    return Bundle(
        folder="",
        run=run,
        model=recipe.model,
        tasks=recipe.tasks,
        templates={family: load_templates(family) for family in recipe.tasks.present()},
        noun=recipe.data.noun or "items",
        rating_scale=recipe.data.rating_scale,
        seed=recipe.seed,
        weights=False,
    )


def _pretrained_bundle(folder: str, model: ModelSection) -> Bundle:
    tasks = TasksSection(sequential=SequentialSection(), direct=DirectSection())
    return Bundle(folder, model, tasks, {family: load_templates(family) for family in tasks.present()})
